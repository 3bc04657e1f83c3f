"""Attention to listed blocks in float32: the definition that the other backends are held to.

The blocks of every list are gathered at once, and the derivatives are jax's own.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..problem import ListOperands, ListProblem, Residuals
from .lists import key_blocks, key_limits, query_blocks, tokens_of, whole_lists

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def unsupported(problem: ListProblem, platform: str) -> str | None:
    """Why this backend cannot do a problem on a platform, or None if it can."""
    return None


def forward(problem: ListProblem, operands: ListOperands) -> tuple[Array, Array]:
    """Output [B, N, Hq, Dv] in the dtype of the query, and its log-sum-exp [B, N, Hq]."""
    query, key, value, additional_keys, additional_values, blocks, counts = operands
    assert blocks is not None and counts is not None
    lists, _ = whole_lists(problem, blocks, counts)
    # [B, Hq, query blocks, listed blocks, keys of a block]
    place = jnp.arange(problem.key_block, dtype=jnp.int32)[None, None, None, None]
    seen = (place < jnp.asarray(key_limits(problem))[lists][..., None])[:, :, :, None]

    def listed(own: Array, additional: Array | None) -> Array:
        x = key_blocks(problem, own.astype(jnp.float32), additional)
        x = jnp.repeat(x, problem.repeats, axis=1)
        return jax.vmap(jax.vmap(lambda x, lists: x[lists]))(x, lists)

    queries = query_blocks(problem, query.astype(jnp.float32))
    scores = _einsum("bhiqd,bhijkd->bhiqjk", queries, listed(key, additional_keys)) * problem.scale
    # Where nothing is seen there is neither a maximum nor a sum.
    scores = jnp.where(seen, scores, -1e30)
    top = jax.lax.stop_gradient(scores.max((-2, -1), keepdims=True))
    p = jnp.where(seen, jnp.exp(scores - top), 0)
    total = p.sum((-2, -1))[..., None]
    nothing = total == 0
    total = jnp.where(nothing, 1, total)
    output = _einsum("bhiqjk,bhijkd->bhiqd", p, listed(value, additional_values)) / total
    lse = jnp.where(nothing, -jnp.inf, top[..., 0] + jnp.log(total))
    output, lse = (tokens_of(x, problem.tokens) for x in (output, lse))
    return output.astype(query.dtype), lse[..., 0]


def backward(
    problem: ListProblem, residuals: Residuals, d_output: Array, delta: Array
) -> ListOperands:
    """Gradients of the inputs; see `reference.backward`."""
    *inputs, blocks, counts = residuals.operands
    product = d_output.astype(jnp.float32) * residuals.output.astype(jnp.float32)

    def run(*inputs: Array | None) -> tuple[Array, Array]:
        return forward(problem, ListOperands._make((*inputs, blocks, counts)))

    _, pull = jax.vjp(run, *inputs)
    return ListOperands._make((*pull((d_output, product.sum(-1) - delta)), None, None))
