"""Custom calls for listed blocks: on CPUs, by the same code as windows (`lists.h`).

On a GPU a call for the gradients of keys and values would also take the lists the other way round
(`backends.lists.inverse`), one block of keys after the other; on a CPU a thread adds what its
queries give to sums of its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..problem import ListOperands, ListProblem, Residuals
from . import LISTS_BACKWARD, LISTS_FORWARD, call, without_gaps


def unsupported(problem: ListProblem, platform: str) -> str | None:
    """Why this backend cannot do a problem on a platform, or None if it can."""
    if platform != "cpu":
        return f"it takes block lists on CPUs, not on a {platform}"
    return None


def forward(problem: ListProblem, operands: ListOperands) -> tuple[Array, Array]:
    """Output [B, N, Hq, Dv] in the dtype of the query, and its log-sum-exp [B, N, Hq]."""
    query = operands.query
    shape = (*query.shape[:-1], problem.value_dim)
    results = [
        jax.ShapeDtypeStruct(shape, query.dtype),
        jax.ShapeDtypeStruct(shape[:-1], jnp.float32),
    ]
    output, lse = call(LISTS_FORWARD, results, _given(operands), _attributes(problem))
    return output, lse


def backward(
    problem: ListProblem, residuals: Residuals, d_output: Array, delta: Array
) -> ListOperands:
    """Gradients of the inputs; see `reference.backward`."""
    operands = residuals.operands
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in without_gaps(operands)]
    given = [*_given(operands), residuals.lse, d_output, delta]
    gradients = call(LISTS_BACKWARD, results, given, _attributes(problem))
    more = gradients[3:] if problem.additional else (None, None)
    return ListOperands._make((*gradients[:3], *more, None, None))


def _given(operands: ListOperands) -> list[Array]:
    assert operands.blocks is not None and operands.counts is not None
    return [*without_gaps(operands), operands.blocks, operands.counts]


def _attributes(problem: ListProblem) -> dict[str, Any]:
    return {
        "sizes": np.array([problem.query_block, problem.key_block], np.int64),
        "scale": np.float32(problem.scale),
    }
