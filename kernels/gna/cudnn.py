"""Dense attention by cuDNN, as jax calls it: vmapped axes are folded, and it has one derivative.

Heads are second-to-last: `[B, L, H, D]`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .platforms import local_devices


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(is_causal: bool, scale: float, query: Array, key: Array, value: Array) -> Array:
    """Scaled dot-product attention of [B, Q, H, D] to [B, K, H, D], in one of 16-bit dtypes."""
    return _foldable(functools.partial(_by_cudnn, is_causal, scale))(query, key, value)


def _forward(is_causal: bool, scale: float, *operands: Array) -> tuple[Array, tuple[Array, ...]]:
    return attend(is_causal, scale, *operands), operands


def _backward(
    is_causal: bool, scale: float, operands: tuple[Array, ...], cotangent: Array
) -> tuple[Array, ...]:
    # What the forward pass leaves beside the operands is recomputed: its form is jax's own affair.
    def pull(cotangent: Array, *operands: Array) -> tuple[Array, ...]:
        return jax.vjp(functools.partial(_by_cudnn, is_causal, scale), *operands)[1](cotangent)

    return _foldable(pull)(cotangent, *operands)


attend.defvjp(_forward, _backward)


def _by_cudnn(is_causal: bool, scale: float, query: Array, key: Array, value: Array) -> Array:
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=is_causal, scale=scale, implementation="cudnn"
    )


def _foldable(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays [B, ...] whose vmapped axes become part of B.

    jax's own rule for cuDNN asks that all operands are mapped, and along their first axes.
    """
    call = jax.custom_batching.custom_vmap(function)

    @call.def_vmap
    def _(size: int, mapped: list[bool], *arrays: Array) -> tuple[Any, Any]:
        everywhere = (
            x if own else jnp.broadcast_to(x, (size, *x.shape))
            for x, own in zip(arrays, mapped, strict=True)
        )
        results = _foldable(function)(*(x.reshape(-1, *x.shape[2:]) for x in everywhere))
        results = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return call


@functools.cache
def takes(query: Any, key: Any, value: Any, is_causal: bool) -> bool:
    """Whether jax and the GPUs here would hand such operands to cuDNN, with a gradient."""
    if not (
        query.dtype == key.dtype == value.dtype
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and key.shape == value.shape
        and (not is_causal or query.shape[1] == key.shape[1])  # of others, versions differ
    ):
        return False
    if any(float(device.compute_capability) < 8 for device in local_devices("gpu")):
        return False  # older than Ampere
    try:
        jax.eval_shape(
            functools.partial(jax.vjp, functools.partial(_by_cudnn, is_causal, 1.0)),
            query,
            key,
            value,
        )
    except RuntimeError:  # there is no cuDNN, or NotImplementedError: it has no such kernel
        return False
    return True
