"""Tokens spread over devices, as layers and models see them (`ContextParallel`).

Inside of it each device has a slab of the tokens: a part of the first dimension of their grid, the
frames of a video or the rows of an image.  Outside, the only slab is everything.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

AXIS = "context"  # of a mesh, along which slabs follow each other


def count() -> int:
    """How many slabs there are."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[AXIS] if AXIS in mesh.manual_axes else 1


def whole(grid: tuple[int, ...]) -> tuple[int, ...]:
    """The grid of all tokens, of which each slab has a `grid`."""
    return (count() * grid[0], *grid[1:])


def own(tables: Any, axis: int = 0) -> Any:
    """The part of this slab in arrays of all tokens, or of all frames, along an axis."""
    slabs = count()
    if slabs == 1:
        return tables

    def part(x: Array) -> Array:
        size = x.shape[axis] // slabs
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS) * size, size, axis)

    return jax.tree.map(part, tables)


def gathered(x: Float[Array, "B n *X"]) -> Float[Array, "B N *X"]:
    """The tokens of all slabs."""
    return x if count() == 1 else jax.lax.all_gather(x, AXIS, axis=1, tiled=True)


def merged(
    output: Float[Array, "B Q H D"], lse: Float[Array, "B Q H"]
) -> tuple[Float[Array, "B Q H D"], Float[Array, "B Q H"]]:
    """Attention to the keys of all slabs, of what the same queries get from each by itself.

    Args:
      output: of attention to the keys of this slab.
      lse: log-sum-exp of its logits, natural logarithm, float32.
    """
    if count() == 1:
        return output, lse
    most = jax.lax.pmax(jax.lax.stop_gradient(lse), AXIS)
    weight = jnp.exp(lse - most)
    total = jax.lax.psum(weight, AXIS)
    summed = jax.lax.psum(weight[..., None] * output.astype(jnp.float32), AXIS)
    return (summed / total[..., None]).astype(output.dtype), most + jnp.log(total)
