"""Attention to listed blocks in plain jax for any device: memory linear in the number of tokens.

Each step gathers a few listed blocks for some blocks of the other side, and multiplies.  The
backward pass goes twice over the same pairs, as kernels do: by blocks of queries for their
gradient, and by blocks of keys, with the lists the other way round, for theirs.  So no sum needs
atomics, and their order is always the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..problem import ListOperands, ListProblem, Residuals, Size
from .lists import (
    inverse,
    key_blocks,
    key_gradients,
    key_limits,
    query_blocks,
    query_limits,
    sharing_blocks,
    tokens_of,
    whole_lists,
)
from .xla import HIDDEN, budget, divisor, dot, full

# Tokens that a step gathers for each block: enough for products, and few enough for what lists
# shorter than their neighbors' leave unused.
GATHERED = 512

# A step's blocks of the other side as places among all of them, and which of their tokens are seen.
Gather = Callable[[Array], tuple[Int[Array, "r c"], Bool[Array, "r K"]]]


class _Lists(NamedTuple):
    """For each of some blocks, its list of blocks of the other side."""

    entries: Int[Array, " all"]  # of all lists
    first: Int[Array, " rows"]  # the place of each list's first one
    count: Int[Array, " rows"]
    lane: Int[Array, " rows"]  # batch entry and key head
    limits: Int[np.ndarray, " E"]  # tokens of a lane's blocks on the other side; the last is empty
    block: int  # the most that they are


def unsupported(problem: ListProblem, platform: str) -> str | None:
    """Why this backend cannot do a problem on a platform, or None if it can."""
    return None


def forward(problem: ListProblem, operands: ListOperands) -> tuple[Array, Array]:
    """Output [B, N, Hq, Dv] in the dtype of the query, and its log-sum-exp [B, N, Hq]."""
    query, key, value, additional_keys, additional_values, *_ = operands
    keys, values = (
        key_blocks(problem, *x) for x in ((key, additional_keys), (value, additional_values))
    )

    def attend(steps: Array, gather: Gather, queries: Array) -> tuple[Array, Array]:
        def step(n: Array, state: Any) -> Any:
            sums, top, total = state
            at, seen = gather(n)
            scores = dot("rqd,rkd->rqk", queries, _read(keys, at)) * problem.scale
            scores = jnp.where(seen[:, None], scores, HIDDEN)
            most = jnp.maximum(top, scores.max(-1, keepdims=True))
            # A row that has seen nothing yet has no maximum to hide keys by.
            p = jnp.where(seen[:, None], jnp.exp(scores - most), 0)
            kept = jnp.exp(top - most)
            part = dot("rqk,rkd->rqd", p.astype(values.dtype), _read(values, at))
            return sums * kept + part, most, total * kept + p.sum(-1, keepdims=True)

        starts = ((problem.value_dim, 0.0), (1, HIDDEN), (1, 0.0))
        state = (full((*queries.shape[:2], n), x, jnp.float32, query) for n, x in starts)
        sums, top, total = jax.lax.fori_loop(0, steps, step, tuple(state))
        nothing = total == 0
        total = jnp.where(nothing, 1, total)
        lse = jnp.where(nothing, -jnp.inf, top + jnp.log(total))
        return (sums / total).astype(query.dtype), lse

    results = _by_rows(problem, _by_query(problem, operands), attend, query_blocks(problem, query))
    output, lse = (tokens_of(x, problem.tokens) for x in results)
    return output, lse[..., 0]


def backward(
    problem: ListProblem, residuals: Residuals, d_output: Array, delta: Array
) -> ListOperands:
    """Gradients of the inputs; see `reference.backward`."""
    operands, _, lse = residuals
    query, key, value, additional_keys, additional_values, *_ = operands
    keys, values = (
        key_blocks(problem, *x) for x in ((key, additional_keys), (value, additional_values))
    )
    of_queries = (query, d_output, lse[..., None], delta[..., None])

    def by_query(steps: Array, gather: Gather, q: Array, do: Array, lse: Array, delta: Array):
        def step(n: Array, d_query: Array) -> Array:
            at, seen = gather(n)
            k, seen = _read(keys, at), seen[:, None]
            p = jnp.exp(dot("rqd,rkd->rqk", q, k) * problem.scale - lse)
            d_p = dot("rqd,rkd->rqk", do, _read(values, at))
            d_scores = jnp.where(seen, p * (d_p - delta) * problem.scale, 0).astype(q.dtype)
            return d_query + dot("rqk,rkd->rqd", d_scores, k)

        return jax.lax.fori_loop(0, steps, step, full(q.shape, 0.0, jnp.float32, query))

    own = (query_blocks(problem, x) for x in of_queries)
    d_query = _by_rows(problem, _by_query(problem, operands), by_query, *own)

    queries, d_outputs, lses, deltas = (sharing_blocks(problem, x) for x in of_queries)

    def by_key(steps: Array, gather: Gather, k: Array, v: Array) -> tuple[Array, Array]:
        def step(n: Array, state: Any) -> Any:
            d_key, d_value = state
            at, seen = gather(n)
            q, do, seen = _read(queries, at), _read(d_outputs, at), seen[:, None]
            at_lse, at_delta = (_read(x, at)[:, None, :, 0] for x in (lses, deltas))
            p = jnp.exp(dot("rkd,rqd->rkq", k, q) * problem.scale - at_lse)
            p = jnp.where(seen, p, 0)
            d_p = dot("rkd,rqd->rkq", v, do)
            d_scores = jnp.where(seen, p * (d_p - at_delta) * problem.scale, 0).astype(q.dtype)
            return (
                d_key + dot("rkq,rqd->rkd", d_scores, q),
                d_value + dot("rkq,rqd->rkd", p.astype(do.dtype), do),
            )

        state = tuple(full(x.shape, 0.0, jnp.float32, query) for x in (k, v))
        return jax.lax.fori_loop(0, steps, step, state)

    own = (x[:, :, :-1] for x in (keys, values))  # the empty block is nobody's
    gradients = _by_rows(problem, _by_key(problem, operands), by_key, *own)
    (d_key, d_more_keys), (d_value, d_more_values) = (key_gradients(problem, x) for x in gradients)
    d_query = tokens_of(d_query, problem.tokens)
    given = (d_query, d_key, d_value, d_more_keys, d_more_values)
    cast = (None if x is None else x.astype(query.dtype) for x in given)
    return ListOperands._make((*cast, None, None))


def _by_query(problem: ListProblem, operands: ListOperands) -> _Lists:
    """The lists of blocks of queries."""
    assert operands.blocks is not None and operands.counts is not None
    lists, counts = whole_lists(problem, operands.blocks, operands.counts)
    first = jnp.arange(counts.size, dtype=jnp.int32) * lists.shape[-1]
    lane = _lanes(problem, counts.shape, problem.repeats)
    limits, block = key_limits(problem), problem.key_block
    return _Lists(lists.reshape(-1), first, counts.reshape(-1), lane, limits, block)


def _by_key(problem: ListProblem, operands: ListOperands) -> _Lists:
    """The lists of blocks of keys, additional ones included."""
    assert operands.blocks is not None and operands.counts is not None
    queries, first = inverse(problem, operands.blocks, operands.counts)
    counts = jnp.diff(first)
    lane = _lanes(problem, counts.shape, 1)
    first = first[..., :-1].reshape(-1) + lane * queries.shape[-1]
    limits, block = query_limits(problem), problem.query_block
    return _Lists(queries.reshape(-1), first, counts.reshape(-1), lane, limits, block)


def _lanes(problem: ListProblem, shape: tuple[Size, ...], repeats: int) -> Int[Array, " rows"]:
    """Batch entry and key head of blocks [B, H, n]."""
    batch, heads, _ = shape
    lanes = jnp.arange(batch * heads, dtype=jnp.int32) // repeats
    return jnp.broadcast_to(lanes.reshape(batch, heads, 1), shape).reshape(-1)


def _by_rows(
    problem: ListProblem,
    lists: _Lists,
    run: Callable[..., Any],
    *own: Array,
) -> Any:
    """`run(steps, gather, *own)` on blocks [B, H, n, block, D], a few [r, block, D] at a time."""
    shape, block = own[0].shape[:3], own[0].shape[3]
    per_step = -(-GATHERED // lists.block)
    most = max(1, budget() // (block * per_step * lists.block))
    count = divisor(problem.known_batch * shape[1] * shape[2], most)
    limits, empty = jnp.asarray(lists.limits), len(lists.limits) - 1

    def some(given: Any) -> Any:
        first, length, lane, own = given

        def gather(n: Array) -> tuple[Array, Array]:
            place = n * per_step + jnp.arange(per_step, dtype=jnp.int32)[None]
            entry = lists.entries.at[first[:, None] + place].get(mode="clip")
            entry = jnp.where(place < length[:, None], entry, empty)
            seen = jnp.arange(lists.block, dtype=jnp.int32)[None, None] < limits[entry][..., None]
            return lane[:, None] * len(limits) + entry, seen.reshape(count, -1)

        return run((length.max() + per_step - 1) // per_step, gather, *own)

    rows = lists.first, lists.count, lists.lane, tuple(x.reshape(-1, *x.shape[3:]) for x in own)
    rows = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]), rows)
    return jax.tree.map(lambda x: x.reshape(*shape, block, -1), jax.lax.map(some, rows))


def _read(x: Float[Array, "B Hkv E block D"], at: Int[Array, "r c"]) -> Float[Array, "r K D"]:
    """The tokens of the blocks at these places."""
    x = x.reshape(-1, *x.shape[3:])[at]
    return x.reshape(x.shape[0], -1, x.shape[-1])
