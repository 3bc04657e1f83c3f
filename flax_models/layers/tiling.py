"""Large images and videos through a model piece by piece, in memory that a piece takes.

Tiles overlap and are blended there, as in diffusers' `enable_tiling()`.  The result is near that of
the whole, not equal to it: norms and attention see a tile at a time.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def tiled(
    function: Callable[[Array], Array],
    x: Float[Array, "B *T H W C"],
    *,
    tile: int,
    output: int,
) -> Float[Array, "B *S Y X D"]:
    """Apply a function to overlapping tiles, one after the other, and blend the results.

    Tiles overlap by a quarter. One is blended with that above, then with that to the left, both
    blended before.

    Args:
      function: [B, *T, h, w, C] -> [B, *S, y, x, D], of tiles of `tile` pixels' side and smaller.
      x: images or videos to cut.
      tile: pixels along a tile's side, at least 2.
      output: pixels along the side of a whole tile's result.

    Raises:
      ValueError: a tile of less than 2 pixels.
    """
    if tile < 2:
        raise ValueError(f"a tile has at least 2 pixels along its side, received {tile}.")
    height, width = x.shape[-3:-1]
    stride, overlap, before = tile * 3 // 4, output // 4, (0,) * (x.ndim - 3)
    rows, columns = range(0, height, stride), range(0, width, stride)
    places = defaultdict(list)  # size of a tile -> where such tiles begin; one program for each
    for top, left in itertools.product(rows, columns):
        places[min(tile, height - top), min(tile, width - left)].append((top, left))
    results = {}
    for size, origins in places.items():

        def cut(origin: Array, size: tuple[int, int] = size) -> Array:
            shape = (*x.shape[:-3], *size, x.shape[-1])
            return function(jax.lax.dynamic_slice(x, (*before, *origin, 0), shape))

        results |= dict(zip(origins, jax.lax.map(cut, jnp.asarray(origins)), strict=True))

    kept = output - overlap
    lines = []
    for top in rows:
        line = []
        for left in columns:
            piece = results[top, left]
            if top > 0:
                piece = _blend(results[top - stride, left], piece, overlap, -3)
            if left > 0:
                piece = _blend(results[top, left - stride], piece, overlap, -2)
            results[top, left] = piece
            line.append(piece[..., :kept, :kept, :])
        lines.append(jnp.concatenate(line, axis=-2))
    return jnp.concatenate(lines, axis=-3)


def tiled_in_time(
    function: Callable[[Array], Array],
    videos: Float[Array, "B T H W C"],
    *,
    tile: int,
    stride: int,
    kept: int,
    overlap: int,
) -> Float[Array, "B S Y X D"]:
    """Apply a causal function to overlapping pieces of a video, one after the other.

    The first frame of a piece stands alone, as a video's does: of later pieces' results it is
    dropped, and the frames after it are faded in over the last ones of the piece before.

    Args:
      function: [B, t, H, W, C] -> [B, s, Y, X, D], of pieces of `tile` frames and of shorter ones.
      videos: what to cut, of at least `tile` frames.
      tile: frames of a piece.
      stride: frames from one piece to the next, less than `tile`.
      kept: frames from one piece's result to the next.
      overlap: frames of a piece's result that are blended.
    """
    frames = videos.shape[1]
    starts = range(0, frames - 1, stride)  # a piece of one frame would leave nothing
    whole = [start for start in starts if frames - start >= tile]

    def following(last: Array, start: Array) -> tuple[Array, tuple[Array, Array]]:
        piece = function(jax.lax.dynamic_slice_in_dim(videos, start, tile, axis=1))
        first, rest = jnp.split(piece, [1], axis=1)
        rest = jnp.where(start == 0, rest, _blend(last, rest, overlap, 1))
        return rest[:, rest.shape[1] - overlap :], (first, rest[:, :kept])

    shape = jax.eval_shape(function, videos[:, :tile])
    last = jnp.zeros((shape.shape[0], overlap, *shape.shape[2:]), shape.dtype)
    last, (first, rest) = jax.lax.scan(following, last, jnp.asarray(whole))
    pieces = [first[0], jnp.moveaxis(rest, 0, 1).reshape(shape.shape[0], -1, *shape.shape[2:])]
    for start in starts[len(whole) :]:
        piece = function(videos[:, start:])[:, 1:]
        piece = _blend(last, piece, overlap, 1)
        last = piece[:, max(0, piece.shape[1] - overlap) :]
        pieces.append(piece[:, :kept])
    return jnp.concatenate(pieces, axis=1)


def _blend(before: Array, after: Array, extent: int, axis: int) -> Array:
    """`after` with its first rows (or columns, or frames) faded in over the last of `before`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    fade = jnp.arange(extent, dtype=after.dtype) / max(extent, 1)
    fade = jnp.expand_dims(fade, [i for i in range(after.ndim) if i != axis % after.ndim])
    length = before.shape[axis]
    last = jax.lax.slice_in_dim(before, length - extent, length, axis=axis)
    first, rest = jnp.split(after, [extent], axis=axis)
    return jnp.concatenate([last * (1 - fade) + first * fade, rest], axis=axis)
