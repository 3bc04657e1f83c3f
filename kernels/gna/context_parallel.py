"""Neighborhood attention over tokens that are spread over devices.

Each device holds a slab of the token layout, cut along its first dimension.  Its queries see keys
in a bounded neighborhood, so it needs its own slab and a halo from its neighbors, not all tokens.
At the ends of the layout windows are shifted inwards, which makes the halo there wider on one side;
one program runs on all devices, so all fetch the widest.
"""

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .api import attend, choose
from .problem import Operands, Settings, describe
from .tiles import Window, key_rows
from .varying import vary_alike


def context_parallel_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    axis_name: str,
    additional_keys: Array | None = None,
    additional_values: Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    **settings: Unpack[Settings],
) -> Array | tuple[Array, Array]:
    """`neighborhood_attention` inside `jax.shard_map`, tokens sharded along their first dimension.

    Equal to `neighborhood_attention` of the whole arrays, gradients included. What is not said here
    is as there.

    Args:
      query: this device's slab [B, X1 / devices, ..., Hq, D]; key and value are its slabs too.
      axis_name: the mesh axis along which slabs follow each other.
      additional_keys: all of them on every device, as are their values.
      settings: `kernel_size`, `stride`, `dilation`, `is_causal` and `scale` of the whole layout.

    Returns:
      This device's slab of the output, and of its log-sum-exp with `return_lse`.

    Raises:
      ValueError: as `neighborhood_attention`, and where the dilation along the first dimension does
        not divide the tokens of a device.
      NotImplementedError: if the implementation asked for cannot do this.
    """
    shards = jax.lax.axis_size(axis_name)

    def whole(x: Array) -> jax.ShapeDtypeStruct:
        shape = x.shape if x.ndim < 2 else (x.shape[0], x.shape[1] * shards, *x.shape[2:])
        return jax.ShapeDtypeStruct(shape, x.dtype)

    problem = describe(
        whole(query), whole(key), whole(value), additional_keys, additional_values, **settings
    )
    window, own = problem.windows[0], query.shape[1]
    if own % window.dilation:
        raise ValueError(
            "the dilation along the first dimension must divide the tokens of each device; "
            f"received dilation {window.dilation} and {own} of {window.length} tokens on each of "
            f"{shards} devices."
        )
    if shards > 1:
        problem = dataclasses.replace(problem, shards=shards, axis_name=axis_name)
        key, value = (exchange(x, problem.windows[0], axis_name) for x in (key, value))
    operands = Operands(query, key, value, additional_keys, additional_values)
    output, lse = attend(problem, choose(problem, implementation), vary_alike(operands))
    return (output, lse) if return_lse else output


def exchange(x: Float[Array, "B n *rest"], window: Window, axis_name: str) -> Array:
    """A slab of tokens with the tokens around it that its queries see, [B, rows, ...]."""
    shards, own = jax.lax.axis_size(axis_name), x.shape[1]
    first, rows = key_rows(window, shards)
    if rows == window.length:
        return jax.lax.all_gather(x, axis_name, axis=1, tiled=True)
    before = -first[0]
    after = rows - own - before

    def fetch(part: Array, hop: int) -> Array:
        """`part` of the device `hop` places before this one, zeros where there is none."""
        pairs = [(n, n + hop) for n in range(shards) if 0 <= n + hop < shards]
        return jax.lax.ppermute(part, axis_name, pairs)

    parts = [x]
    for hop in range(1, -(-before // own) + 1):
        parts.insert(0, fetch(x[:, own - min(own, before - (hop - 1) * own) :], hop))
    for hop in range(1, -(-after // own) + 1):
        parts.append(fetch(x[:, : min(own, after - (hop - 1) * own)], -hop))
    return jnp.concatenate(parts, axis=1)
