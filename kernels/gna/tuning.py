"""Measure with which tiles the Triton kernels are fastest on the GPU at hand."""

import contextlib
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .api import attend
from .backends import triton
from .backends.triton_blocks import TUNED, Blocks, tuning_key
from .problem import Operands, Problem, Residuals

CANDIDATES = tuple(
    Blocks(own, seen, warps, stages)
    for own in (32, 64, 128)
    for seen in (32, 64, 128)
    for warps in (4, 8)
    for stages in (1, 2, 3, 4)
    if own * seen <= 2048 * warps and own >= 8 * warps
)


def tune(
    problem: Problem, candidates: Sequence[Blocks] = CANDIDATES, repeats: int = 20
) -> dict[str, dict[Blocks, float]]:
    """Times the kernels on this GPU, and uses the fastest for such problems from now on.

    Functions that are compiled already keep what they have. What was found is in
    `triton_blocks.TUNED`, from where it may be saved.

    Args:
      problem: what to tune for; see `describe`.
      candidates: what to try; those that do not fit the GPU are left out.
      repeats: calls that are timed together, after one that is not.

    Returns:
      Milliseconds of each candidate that ran, the fastest first, by kernel; of the two kernels of
      the backward pass together, while one of them is tuned.
    """
    times: dict[str, dict[Blocks, float]] = {}
    operands = _random_operands(problem)
    for kernel in ("forward", "backward_query", "backward_keys"):
        key = tuning_key(problem, kernel)
        found: dict[Blocks, float] = {}
        for blocks in dict.fromkeys((triton.blocks_here(problem, kernel), *candidates)):
            TUNED[key] = blocks
            # What is too large for the GPU fails as it is compiled or started.
            with contextlib.suppress(ValueError, RuntimeError):
                found[blocks] = _milliseconds(problem, kernel, operands, repeats)
        TUNED.pop(key)
        times[kernel] = dict(sorted(found.items(), key=lambda item: item[1]))
        if found:
            TUNED[key] = next(iter(times[kernel]))
    attend.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]; traced for earlier tiles
    return times


def _random_operands(problem: Problem) -> tuple[Residuals, Array, Array]:
    """What `backward` takes; operands of `forward` are among the residuals."""
    keys = iter(jax.random.split(jax.random.key(0), 6))

    def draw(*shape: int) -> Array:
        return jax.random.normal(next(keys), (problem.batch, *shape), problem.dtype)

    tokens, heads, kv_heads = problem.layout, problem.heads, problem.kv_heads
    query, key = draw(*tokens, heads, problem.head_dim), draw(*tokens, kv_heads, problem.head_dim)
    value, d_output = (draw(*tokens, n, problem.value_dim) for n in (kv_heads, heads))
    more_keys = more_values = None
    if problem.additional:
        more_keys = draw(problem.additional, kv_heads, problem.head_dim)
        more_values = draw(problem.additional, kv_heads, problem.value_dim)
    lse = jnp.full(query.shape[:-1], 10.0, jnp.float32)
    operands = Operands(query, key, value, more_keys, more_values)
    return Residuals(operands, d_output, lse), d_output, jnp.zeros_like(lse)


def _milliseconds(problem: Problem, kernel: str, operands: Any, repeats: int) -> float:
    if kernel == "forward":
        run, operands = triton.forward, (operands[0].operands,)
    else:
        run = triton.backward
    run = jax.jit(functools.partial(run, problem))
    jax.block_until_ready(run(*operands))
    start = time.perf_counter()
    jax.block_until_ready([run(*operands) for _ in range(repeats)])
    return (time.perf_counter() - start) / repeats * 1000
