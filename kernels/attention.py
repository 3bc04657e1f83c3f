"""Dense attention, by the implementation that is fast where a program runs.

Heads are second-to-last: `[B, L, H, D]`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .gna import cudnn, neighborhood_attention
from .gna.platforms import default_platform, traced_for
from .gna.problem import DTYPES

# With this many logits in all, a CPU spends its time on carrying them to and from memory.  With as
# many per (batch, head), queries are taken in chunks, so that memory stays linear in their number.
_MANY_LOGITS = 1 << 20
_TOO_MANY_LOGITS = 1 << 24  # so many are never kept at once, whatever the mask and the lengths


def _attend(
    query: Array, key: Array, value: Array, mask: Array | None, scale: float, with_lse: bool = False
) -> Any:
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * scale
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    output = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
    return (output, jax.nn.logsumexp(logits, axis=-1).swapaxes(1, 2)) if with_lse else output


def _attend_in_chunks(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    is_causal: bool,
    scale: float,
    with_lse: bool = False,
) -> Any:
    queries, keys = query.shape[1], key.shape[1]

    def attend(query: Array, mask: Array | None, first: Array | int) -> Any:
        if is_causal:
            places = first + jnp.arange(query.shape[1])
            earlier = (jnp.arange(keys)[None] <= places[:, None])[None, None]
            mask = earlier if mask is None else mask & earlier
        return _attend(query, key, value, mask, scale, with_lse)

    if not _are_many(queries, keys):
        return attend(query, mask, 0)
    chunk = max(1, _MANY_LOGITS // keys)
    if (mask is not None or is_causal or queries % chunk) and queries * keys < _TOO_MANY_LOGITS:
        return attend(query, mask, 0)
    parts, rest = _chunks(query, 1, chunk)
    masks, rest_mask, shared = None, None, mask
    if mask is not None and mask.shape[2] > 1:
        (masks, rest_mask), shared = _chunks(mask, 2, chunk), None
    # The logits of a chunk are recomputed in the backward pass instead of being kept for all.
    again = jax.checkpoint(
        lambda x, seen, first: attend(x, shared if seen is None else seen, first)
    )
    count, whole = len(parts), len(parts) * chunk
    given = parts, masks, chunk * jnp.arange(count)
    attended = jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(query.shape[0], whole, *x.shape[3:]),
        jax.lax.map(lambda each: again(*each), given),
    )
    if whole == queries:
        return attended
    both = attended, again(rest, rest_mask, whole)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *both)


def _chunks(x: Array, axis: int, chunk: int) -> tuple[Array, Array]:
    """The whole chunks of an axis, stacked in a new first one, and what is left."""
    count = x.shape[axis] // chunk
    whole, rest = jnp.split(x, [count * chunk], axis)
    whole = whole.reshape(*x.shape[:axis], count, chunk, *x.shape[axis + 1 :])
    return jnp.moveaxis(whole, axis, 0), rest


def _attend_in_cache(
    query: Array, key: Array, value: Array, is_causal: bool, scale: float
) -> Array:
    """By a kernel that asks for one dtype."""
    kernels_own = query.dtype == key.dtype == value.dtype and value.dtype.name in DTYPES
    operands = (x if kernels_own else x.astype(jnp.float32) for x in (query, key, value))
    with traced_for("cpu"):
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

    Large attention of bfloat16 or float16 where a program is lowered for CUDA is cuDNN's, if the
    installed jax takes it there, forward and backward: heads of a multiple of 8 up to 128 features
    (256 on Hopper and later), values as wide as keys, even lengths, no mask (which cuDNN would want
    for all logits, and give a gradient). It too is for reverse mode alone, and `jax.export` for
    CUDA asks leave for its calls and for no platform beside it. What remains (float32, other
    heads, masks) takes queries in chunks, so that memory grows with the number of keys alone.

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

    def plain(query: Array, key: Array, value: Array) -> Array:
        return _attend_in_chunks(query, key, value, mask, is_causal, factor)

    branches: dict[str, Callable[..., Array]] = {}
    if mask is None and _are_many(batch, heads, queries, keys):
        here = default_platform() == "cpu"
        if here and queries == keys and jnp.float64 not in (query.dtype, value.dtype):
            branches["cpu"] = lambda q, k, v: _attend_in_cache(q, k, v, is_causal, factor)
        kinds = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value))
        if cudnn.takes(*kinds, is_causal):
            branches["cuda"] = functools.partial(cudnn.attend, is_causal, float(factor))
            if here:
                branches.setdefault("cpu", plain)
    if not branches:
        return plain(query, key, value)
    # What is not run must leave nothing for the backward pass but the operands.
    again = jax.checkpoint(plain)
    return jax.lax.platform_dependent(query, key, value, **branches, default=again)


def attention_with_lse(
    query: Float[Array, "B Q H D"],
    key: Float[Array, "B K H D"],
    value: Float[Array, "B K H E"],
    *,
    mask: Bool[Array, "#B #H #Q K"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B Q H E"], Float[Array, "B Q H"]]:
    """Attention to a part of the keys, for `kernels.gna.merge_attentions`.

    Args:
      query, key, value, mask, scale: as for `dot_product_attention`.

    Returns:
      What `dot_product_attention` does, in chunks of queries where they are many, and the
      log-sum-exp of the logits, natural logarithm, float32; next to nothing (-3e38) where the mask
      hides all keys.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    query, key = _in_one_dtype(query, key)
    return _attend_in_chunks(query, key, value, mask, False, factor, with_lse=True)


def frame_causal_attention(
    query: Float[Array, "B T N H D"],
    key: Float[Array, "B T N H D"],
    value: Float[Array, "B T N H D"],
) -> Float[Array, "B T N H D"]:
    """Attention of videos' tokens to those of their own frame and of earlier ones.

    Frames are attended from one by one, to keys that grow, so that nothing is masked.  Large videos
    where a program is lowered for a CPU take `kernels.gna`, with a neighborhood of all of that, as
    in `dot_product_attention`.

    Args:
      query, key, value: tokens of a frame third-to-last, in one dtype.
    """
    batch, frames, tokens, heads, features = query.shape

    def grown(query: Array, key: Array, value: Array) -> Array:
        flat = [x.reshape(batch, -1, heads, features) for x in (key, value)]
        attended = [
            dot_product_attention(query[:, t], *(x[:, : (t + 1) * tokens] for x in flat))
            for t in range(frames)
        ]
        return jnp.stack(attended, axis=1)

    def in_cache(query: Array, key: Array, value: Array) -> Array:
        with traced_for("cpu"):
            attended = neighborhood_attention(
                query, key, value, kernel_size=(frames, tokens), is_causal=(True, False)
            )
        assert isinstance(attended, jax.Array)
        return attended

    known = query.dtype == key.dtype == value.dtype and query.dtype.name in DTYPES
    if (
        not known
        or default_platform() != "cpu"
        or not _are_many(batch, heads, *2 * (frames, tokens))
    ):
        return grown(query, key, value)
    again = jax.checkpoint(grown)
    return jax.lax.platform_dependent(query, key, value, cpu=in_cache, default=again)
