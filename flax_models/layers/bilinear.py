"""Bilinear sampling as torch's `grid_sample` and `interpolate` do it, without aligned corners.

Coordinates are in pixels with the first pixel's center at 0; outside of a map everything is zero.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

Layout = Sequence[Sequence[int]]


def resize(x: Float[Array, "..."], size: Sequence[int], *, axis: int = 1) -> Float[Array, "..."]:
    """Bilinear resize of the dimensions `axis` and `axis + 1` to `size`, without antialiasing."""
    axis %= x.ndim
    shape = (*x.shape[:axis], *size, *x.shape[axis + 2 :])
    return x if shape == x.shape else jax.image.resize(x, shape, "bilinear", antialias=False)


def sample_points(
    maps: Shaped[Array, "H W *C"], points: Float[Array, "P 2"]
) -> Float[Array, " P *C"]:
    """Values of one map (of several channels, if there are any) at points.

    Args:
      maps: [H, W, ...], floating or boolean.
      points: (x, y) in [0, 1], where 0 and 1 are the map's outer borders.
    """
    height, width = maps.shape[:2]
    x, y = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5
    left, top = jnp.floor(x), jnp.floor(y)
    flat = maps.reshape(height * width, *maps.shape[2:])
    channels = (1,) * (maps.ndim - 2)
    total = None
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        i, j = top + row, left + column
        weight = (1 - jnp.abs(y - i)) * (1 - jnp.abs(x - j))
        inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
        index = jnp.where(inside, i * width + j, 0).astype(jnp.int32)
        weight = jnp.where(inside, weight, 0).reshape(*weight.shape, *channels)
        term = weight * flat[index]
        total = term if total is None else total + term
    assert total is not None
    return total


def sample_levels(
    values: Float[Array, "B L M D"],
    layout: Layout,
    points: Float[Array, "B Q M N K 2"],
    weights: Float[Array, "B Q M N K"],
) -> Float[Array, "B Q M D"]:
    """Weighted sums of values sampled at K points in each of N maps (Zhu et al. 2021, eq. 3).

    Memory stays linear in tokens and queries: the points of a query are visited one after another,
    in the backward pass too, where their samples are computed again.

    Args:
      values: tokens of the maps, one map after another, M heads of D features.
      layout: rows and columns of each of the N maps; L is the sum of their products.
      points: (x, y) in pixels of the map they are sampled from.
      weights: of each point.

    Raises:
      ValueError: the layout does not fit the values or the points.
    """
    batch, tokens, heads, width = values.shape
    sizes = [height * columns for height, columns in layout]
    if sum(sizes) != tokens or len(layout) != points.shape[3]:
        raise ValueError(
            f"sample_levels: maps {tuple(layout)} hold {sum(sizes)} tokens; received {tokens} "
            f"tokens and points in {points.shape[3]} maps."
        )
    # One row for each 2x2 neighborhood of a map with a border of zeros: its corners side by side.
    rows, starts, start = [], [], 0
    first = 0
    for (height, columns), size in zip(layout, sizes, strict=True):
        grid = values[:, first : first + size].reshape(batch, height, columns, heads, width)
        grid = jnp.pad(grid, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0)))
        corners = (grid[:, :-1, :-1], grid[:, :-1, 1:], grid[:, 1:, :-1], grid[:, 1:, 1:])
        rows.append(jnp.concatenate(corners, axis=-1).reshape(batch, -1, heads, 4 * width))
        starts.append(start)
        first, start = first + size, start + (height + 1) * (columns + 1)
    table = jnp.concatenate(rows, axis=1).reshape(-1, 4 * width)  # [B*R*M, 4*D]

    extent = jnp.asarray([(columns, height) for height, columns in layout], jnp.float32)
    extent = extent[:, None]  # [N, 1, 2], x first
    low = jnp.floor(points)
    inside = ((low >= -1) & (low < extent)).all(-1)
    anchor = jnp.clip(low + 1, 0, extent).astype(jnp.int32)
    index = (
        jnp.asarray(starts)[:, None]
        + anchor[..., 1] * (extent[..., 0].astype(jnp.int32) + 1)
        + anchor[..., 0]
    )  # [B, Q, M, N, K]
    index = (jnp.arange(batch)[:, None, None, None, None] * start + index) * heads
    index = index + jnp.arange(heads)[:, None, None]
    across, down = jnp.moveaxis(points - low, -1, 0)
    scale = jnp.where(inside, weights, 0)
    factors = jnp.stack(
        [(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across], -1
    )
    factors = factors * scale[..., None]  # [B, Q, M, N, K, 4]

    @jax.checkpoint
    def visit(total: Array, point: tuple[Array, Array]) -> tuple[Array, None]:
        where, factor = point
        found = table.at[where].get(mode="promise_in_bounds")  # [B, Q, M, 4*D]
        found = found.reshape(*where.shape, 4, width)
        return total + jnp.einsum("bqmcd,bqmc->bqmd", found, factor), None

    def points_first(x: Array) -> Array:
        x = jnp.moveaxis(x, (3, 4), (0, 1))
        return x.reshape(-1, *x.shape[2:])

    total = jnp.zeros((batch, points.shape[1], heads, width), values.dtype)
    return jax.lax.scan(visit, total, (points_first(index), points_first(factors)))[0]
