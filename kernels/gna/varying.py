"""Values that differ between the devices of a mesh axis, inside `jax.shard_map`.

Its checks want the state of a loop to vary over the same axes before and after a step, and a
cotangent over those of its primal.
"""

from typing import Any

import jax
from jaxtyping import Array


def varying_axes(*arrays: Array) -> tuple[str, ...]:
    """The mesh axes that any of the arrays vary over; none outside `shard_map`."""
    axes: set[str] = set()
    for x in arrays:
        axes |= set(jax.typeof(x).manual_axis_type.varying)
    return tuple(sorted(axes))


def vary_alike(tree: Any) -> Any:
    """Arrays, each taken to vary over the axes of any of them."""
    axes = varying_axes(*jax.tree.leaves(tree))
    return jax.tree.map(lambda x: vary(x, axes), tree)


def vary(x: Array, axes: tuple[str, ...]) -> Array:
    """The same values, taken to vary over `axes`; its transpose sums over them."""
    missing = tuple(axis for axis in axes if axis not in varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
