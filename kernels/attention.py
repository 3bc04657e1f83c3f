"""Dense attention, by the implementation that is fast where a program runs.

Heads are second-to-last: `[B, L, H, D]`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .gna import neighborhood_attention
from .gna.platforms import default_platform
from .gna.problem import DTYPES

# With this many logits in all, a CPU spends its time on carrying them to and from memory.  With as
# many per (batch, head), queries are taken in chunks, so that memory stays linear in their number.
_MANY_LOGITS = 1 << 20


def _attend(query: Array, key: Array, value: Array, mask: Array | None, scale: float) -> Array:
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * scale
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def _attend_in_chunks(
    query: Array, key: Array, value: Array, mask: Array | None, is_causal: bool, scale: float
) -> Array:
    (batch, queries, heads, dim), keys = query.shape, key.shape[1]
    if is_causal:
        earlier = jnp.tril(jnp.ones((queries, keys), bool))[None, None]
        mask = earlier if mask is None else mask & earlier
    if mask is not None or not _are_many(queries, keys):
        return _attend(query, key, value, mask, scale)
    chunk = max(1, _MANY_LOGITS // keys)
    if queries % chunk:
        return _attend(query, key, value, mask, scale)
    chunks = jnp.moveaxis(query.reshape(batch, queries // chunk, chunk, heads, dim), 1, 0)
    # The logits of a chunk are recomputed in the backward pass instead of being kept for all.
    attend = jax.checkpoint(lambda part: _attend(part, key, value, None, scale))
    attended = jnp.moveaxis(jax.lax.map(attend, chunks), 0, 1)
    return attended.reshape(batch, queries, heads, value.shape[-1])


def _attend_in_cache(
    query: Array, key: Array, value: Array, is_causal: bool, scale: float
) -> Array:
    """By a kernel that asks for one dtype."""
    kernels_own = query.dtype == key.dtype == value.dtype and value.dtype.name in DTYPES
    operands = (x if kernels_own else x.astype(jnp.float32) for x in (query, key, value))
    attended = neighborhood_attention(
        *operands, kernel_size=query.shape[1], is_causal=is_causal, scale=scale
    )
    assert isinstance(attended, jax.Array)
    return attended.astype(value.dtype)


def _are_many(*sizes: Any) -> bool:
    """Whether so many logits are many; of symbolic sizes nothing is known."""
    return all(isinstance(size, int) for size in sizes) and math.prod(sizes) >= _MANY_LOGITS


def _in_one_dtype(query: Array, key: Array) -> tuple[Array, Array]:
    if query.dtype == key.dtype:
        return query, key
    wide = jnp.float64 if jnp.float64 in (query.dtype, key.dtype) else jnp.float32
    return query.astype(wide), key.astype(wide)


def dot_product_attention(
    query: Float[Array, "B Q H D"],
    key: Float[Array, "B K H D"],
    value: Float[Array, "B K H E"],
    *,
    mask: Bool[Array, "#B #H #Q K"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "B Q H E"]:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1) with a float32 softmax.

    Large self-attention where a program is lowered for a CPU is that of `kernels.gna`, whose
    neighborhood may be everything: it keeps blocks of logits in cache, forward and backward. It
    has no forward-mode derivative (`jax.jvp`, `jax.jacfwd`), and `jax.export` for a CPU asks leave
    for its calls; lowered for other platforms, the same program holds nothing of it.

    Args:
      query, key, value: heads second-to-last, any float dtype, not necessarily the same.
      mask: True where a query may attend, broadcast over batch, heads and queries.
      is_causal: whether no query attends to a later key; with a mask, both hold.
      scale: factor of the logits, by default D ** -0.5.

    Returns:
      [B, Q, H, E] in `value`'s dtype.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    (batch, queries, heads, _), keys = query.shape, key.shape[1]
    query, key = _in_one_dtype(query, key)
    if (
        mask is None
        and queries == keys
        and _are_many(batch, heads, queries, keys)
        and default_platform() == "cpu"
        and jnp.float64 not in (query.dtype, value.dtype)
    ):
        # What is not run must leave nothing for the backward pass but the operands.
        plain = jax.checkpoint(lambda q, k, v: _attend_in_chunks(q, k, v, None, is_causal, factor))
        return jax.lax.platform_dependent(
            query,
            key,
            value,
            cpu=lambda q, k, v: _attend_in_cache(q, k, v, is_causal, factor),
            default=plain,
        )
    return _attend_in_chunks(query, key, value, mask, is_causal, factor)
