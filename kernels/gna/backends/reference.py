"""Dense masked attention in float32: the definition that the other backends are held to.

Memory and time are quadratic in the number of tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..nonfinite import contained, contained_backward
from ..problem import Operands, Problem, Residuals
from ..tiles import Window

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def unsupported(problem: Problem, platform: str) -> str | None:
    """Why this backend cannot do a problem on a platform, or None if it can."""
    if problem.shards > 1:
        return "it does not attend from a shard of the tokens"
    return None


def mask_of(windows: tuple[Window, ...]) -> Bool[np.ndarray, "N N"]:
    """mask[i, j]: whether query i sees key j, tokens in row-major order."""
    return functools.reduce(np.kron, (w.mask() for w in windows))


def _flat(problem: Problem, x: Array) -> Float[Array, "B N Hkv R D"]:
    """Tokens in a row, query heads by the key head that they read; key heads have R = 1."""
    batch, (heads, dim) = x.shape[0], x.shape[-2:]
    x = x.astype(jnp.float32)
    return x.reshape(batch, -1, problem.kv_heads, heads // problem.kv_heads, dim)


def _keys(problem: Problem, x: Array, additional: Array | None) -> Float[Array, "B M Hkv D"]:
    parts = [x] if additional is None else [x, additional]
    return jnp.concatenate([_flat(problem, part) for part in parts], axis=1)[:, :, :, 0]


def _scores(
    problem: Problem, query: Array, keys: Float[Array, "B M Hkv D"]
) -> Float[Array, "B Hkv R N M"]:
    """Scaled scores, minus infinity where a query does not see a key."""
    seen = np.pad(mask_of(problem.windows), ((0, 0), (0, problem.additional)), constant_values=True)
    scores = _einsum("bqhrd,bkhd->bhrqk", _flat(problem, query), keys) * problem.scale
    return jnp.where(seen, scores, -jnp.inf)


def forward(problem: Problem, operands: Operands) -> tuple[Array, Array]:
    """Output [B, *X, Hq, Dv] in the dtype of the query, and its log-sum-exp [B, *X, Hq]."""
    query, key, value, additional_keys, additional_values = contained(operands)
    values = _keys(problem, value, additional_values)
    scores = _scores(problem, query, _keys(problem, key, additional_keys))
    lse = jax.nn.logsumexp(scores, axis=-1)
    output = _einsum("bhrqk,bkhd->bqhrd", jnp.exp(scores - lse[..., None]), values)
    shape = (*query.shape[:-1], problem.value_dim)
    return (output.reshape(shape).astype(query.dtype), jnp.moveaxis(lse, 3, 1).reshape(shape[:-1]))


def backward(problem: Problem, residuals: Residuals, d_output: Array, delta: Array) -> Operands:
    """Gradients of the inputs.

    Args:
      problem: the problem.
      residuals: of the forward pass.
      d_output: cotangent of the output [B, *X, Hq, Dv].
      delta: sum of d_output * output over Dv, minus the cotangent of the log-sum-exp; [B, *X, Hq],
        float32.
    """
    residuals, d_output, delta = contained_backward(residuals, d_output, delta)
    (query, key, value, additional_keys, additional_values), _, lse = residuals
    keys = _keys(problem, key, additional_keys)
    values = _keys(problem, value, additional_values)

    def rows(x: Array) -> Float[Array, "B Hkv R N 1"]:
        return jnp.moveaxis(_flat(problem, x[..., None]), 1, 3)

    d_out = _flat(problem, d_output)
    scores = _scores(problem, query, keys)
    p = jnp.where(jnp.isneginf(scores), 0, jnp.exp(scores - rows(lse)))
    d_values = _einsum("bhrqk,bqhrd->bkhd", p, d_out)
    d_p = _einsum("bqhrd,bkhd->bhrqk", d_out, values)
    d_scores = p * (d_p - rows(delta)) * problem.scale
    d_query = _einsum("bhrqk,bkhd->bqhrd", d_scores, keys)
    d_keys = _einsum("bhrqk,bqhrd->bkhd", d_scores, _flat(problem, query))

    def split(gradient: Float[Array, "B M Hkv D"], x: Array, additional: Array | None):
        own, more = jnp.split(gradient, [problem.tokens], axis=1)
        if additional is not None:
            additional = more.reshape(additional.shape).astype(additional.dtype)
        return own.reshape(x.shape).astype(x.dtype), additional

    d_key, d_additional_keys = split(d_keys, key, additional_keys)
    d_value, d_additional_values = split(d_values, value, additional_values)
    return Operands(
        d_query.reshape(query.shape).astype(query.dtype),
        d_key,
        d_value,
        d_additional_keys,
        d_additional_values,
    )
