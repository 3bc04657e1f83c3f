"""Large images through a model piece by piece, so that memory does not grow with their size.

Tiles overlap by a quarter and are blended there, as in diffusers' `enable_tiling()`.  The result is
near that of the whole image, not equal to it: norms and attention see a tile at a time.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def tiled(
    function: Callable[[Array], Array], images: Float[Array, "B H W C"], *, tile: int, output: int
) -> Float[Array, "B Y X D"]:
    """Apply a function to overlapping tiles, one after the other, and blend the results.

    Args:
      function: [B, h, w, C] -> [B, y, x, D], of tiles of `tile` pixels' side and of smaller ones.
      images: what to cut.
      tile: pixels along a tile's side, at least 2.
      output: pixels along the side of a whole tile's result.

    Raises:
      ValueError: a tile of less than 2 pixels.
    """
    if tile < 2:
        raise ValueError(f"a tile has at least 2 pixels along its side, received {tile}.")
    batch, height, width, channels = images.shape
    step, overlap = tile * 3 // 4, output // 4
    rows, columns = range(0, height, step), range(0, width, step)
    places = defaultdict(list)  # size of a tile -> where such tiles begin; one program for each
    for y, x in itertools.product(rows, columns):
        places[min(tile, height - y), min(tile, width - x)].append((y, x))
    results = {}
    for size, origins in places.items():

        def cut(origin: Array, size: tuple[int, int] = size) -> Array:
            start = (0, *origin, 0)
            return function(jax.lax.dynamic_slice(images, start, (batch, *size, channels)))

        results |= dict(zip(origins, jax.lax.map(cut, jnp.asarray(origins)), strict=True))

    kept = output - overlap
    lines = []
    for y in rows:
        line = []
        for x in columns:
            piece = results[y, x]
            if y > 0:
                piece = _blend(results[y - step, x], piece, overlap, 1)
            if x > 0:
                piece = _blend(results[y, x - step], piece, overlap, 2)
            results[y, x] = piece
            line.append(piece[:, :kept, :kept])
        lines.append(jnp.concatenate(line, axis=2))
    return jnp.concatenate(lines, axis=1)


def _blend(before: Array, after: Array, extent: int, axis: int) -> Array:
    """`after` with its first rows (or columns) faded in over the last of `before`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    fade = (jnp.arange(extent, dtype=after.dtype) / max(extent, 1)).reshape(
        [-1 if dimension == axis else 1 for dimension in range(after.ndim)]
    )
    length = before.shape[axis]
    last = jax.lax.slice_in_dim(before, length - extent, length, axis=axis)
    first, rest = jnp.split(after, [extent], axis=axis)
    return jnp.concatenate([last * (1 - fade) + first * fade, rest], axis=axis)
