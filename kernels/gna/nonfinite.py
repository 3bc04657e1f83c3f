"""NaN and infinity of tokens that a query does not see, kept from reaching it.

Products of whole tiles take what is not seen times zero, and zero times NaN is NaN.  A backend that
computes them is handed finite numbers instead, and NaN where a mask takes it away again: in scores.
Who sees a number that is not finite gets NaN; others get what they would without it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .problem import Operands, Residuals


def contained(operands: Operands) -> Operands:
    """What a forward pass is given: where a key or its value is not finite, NaN and zero."""
    query, key, value, more_keys, more_values = operands
    key, value = _marked(key, value)
    if more_keys is not None and more_values is not None:
        more_keys, more_values = _marked(more_keys, more_values)
    return Operands(query, key, value, more_keys, more_values)


def contained_backward(
    residuals: Residuals, d_output: Array, delta: Array
) -> tuple[Residuals, Array, Array]:
    """What a backward pass is given: finite numbers, but for the log-sum-exps.

    These are NaN where the query, its cotangent or delta holds a number that is not finite, as they
    are already where the query saw one; so its probabilities are, which are masked.
    """
    operands, output, lse = residuals
    # A cotangent that is all ones is not to be tested as a program is compiled, which takes long.
    d_output = jax.lax.optimization_barrier(d_output)
    good = _is_finite(operands.query) & _is_finite(d_output) & jnp.isfinite(delta)
    operands, d_output, delta = jax.tree.map(_or_zero, (operands, d_output, delta))
    return Residuals(operands, output, jnp.where(good, lse, jnp.nan)), d_output, delta


def _marked(key: Array, value: Array) -> tuple[Array, Array]:
    good = (_is_finite(key) & _is_finite(value))[..., None]
    return jnp.where(good, key, jnp.nan), jnp.where(good, value, 0)


def _is_finite(x: Array) -> Array:
    """Of each row along the last axis."""
    return jnp.isfinite(x).all(-1)


def _or_zero(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), x, 0)
