"""Blocked attention in plain jax for any device: memory linear in the number of tokens.

Each step (`boxes`) copies one tile of queries and the box of keys that they see out of the operands
as they lie, and multiplies.  Results of the steps of one tile, such as pieces of a large box or
additional keys, are merged by their log-sum-exps.  Steps run one after the other, which makes sums
over them deterministic; batch and heads, and the products themselves, are what runs in parallel.

Scores are laid out [queries, keys] in the forward pass and [keys, queries] in the backward pass,
where two of three products contract queries: a product that has to transpose scores takes longer.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..nonfinite import contained, contained_backward
from ..platforms import default_platform
from ..problem import Operands, Problem, Residuals, Size
from ..varying import vary, varying_axes
from .boxes import Loop, Plan, plan

# Scores of a step: on a CPU they should stay in its cache, on a GPU in that of the second level,
# elsewhere fill the device.
BUDGET = {"cpu": 1 << 18, "gpu": 1 << 22}
DEFAULT_BUDGET = 1 << 24

# Masks that are made in advance, if all of them together are no larger than this many steps.
MASKS = 8

# Stands for minus infinity where differences must not be NaN: exp(HIDDEN - x) is 0 for any score x.
HIDDEN = -1e30


def unsupported(problem: Problem, platform: str) -> str | None:
    """Why this backend cannot do a problem on a platform, or None if it can."""
    return None


class _Source(NamedTuple):
    """Keys and values, those on the token layout or additional ones, and the steps over them."""

    key: Float[Array, "B *GY K 1 D"]
    value: Float[Array, "B *GY K 1 Dv"]
    layout: tuple[int, ...]
    loops: tuple[Loop, ...]


class _Box(NamedTuple):
    """A box of tokens of some batch entries and key heads, within the layout of `_grouped`."""

    first: tuple[Int[Array, ""] | int, ...]
    sizes: tuple[int, ...]


class _Step(NamedTuple):
    """The tile of queries and the box of keys of a step, and which of its pairs are seen."""

    queries: _Box
    keys: _Box
    seen: Bool[Array, "Q 1 K"] | Bool[Array, "K Q 1"] | None


def forward(problem: Problem, operands: Operands) -> tuple[Array, Array]:
    """Output [B, *X, Hq, Dv] in the dtype of the query, and its log-sum-exp [B, *X, Hq]."""
    work, query = plan_of(problem), operands.query
    if _has_masks(work):
        operands = contained(operands)
    queries = _grouped(problem, work.dilation, work.queries, query)
    # With one step per tile its result is final; otherwise results are merged in float32.
    once = operands.additional_keys is None and all(
        len(np.unique(loop.queries, axis=0)) == len(loop.queries) for loop in work.loops
    )
    shape = (*queries.shape[:-1], problem.value_dim)
    output = full(shape, 0.0, query.dtype if once else jnp.float32, query)
    lse = full((*shape[:-1], 1), HIDDEN, jnp.float32, query)

    def step(source: _Source, at: _Step, state: Any) -> Any:
        output, lse = state
        key, value = _read(source.key, at.keys), _read(source.value, at.keys)
        scores = dot("lqd,lkd->lqk", _read(queries, at.queries), key) * problem.scale
        if at.seen is not None:
            by_head = scores.reshape(len(scores), -1, problem.repeats, scores.shape[-1])
            scores = jnp.where(at.seen, by_head, HIDDEN).reshape(scores.shape)
        top = scores.max(-1, keepdims=True)
        p = jnp.exp(scores - top)
        total = p.sum(-1, keepdims=True)
        part = dot("lqk,lkd->lqd", p.astype(value.dtype), value) / total
        part_lse = top + jnp.log(total)
        if not once:
            old, old_lse = _read(output, at.queries), _read(lse, at.queries)
            part = old - jax.nn.sigmoid(part_lse - old_lse) * (old - part)
            part_lse = jnp.logaddexp(old_lse, part_lse)
        return _write(output, at.queries, part), _write(lse, at.queries, part_lse)

    for source in _sources(problem, work, operands):
        for loop in source.loops:
            call = functools.partial(step, source)
            output, lse = _run(problem, loop, call, (output, lse), queries_first=True)
    return (
        _ungrouped(problem, work.query_layout, output).astype(query.dtype),
        _ungrouped(problem, work.query_layout, lse)[..., 0],
    )


def backward(problem: Problem, residuals: Residuals, d_output: Array, delta: Array) -> Operands:
    """Gradients of the inputs; see `reference.backward`.

    One pass: a step adds to the gradients of its tile of queries and of its box of keys.
    """
    work = plan_of(problem)
    if _has_masks(work):
        residuals, d_output, delta = contained_backward(residuals, d_output, delta)
    operands, _, lse = residuals
    query = operands.query
    queries, d_outputs, lses, deltas = (
        _grouped(problem, work.dilation, work.queries, x)
        for x in (query, d_output, lse[..., None], delta[..., None])
    )

    def step(source: _Source, at: _Step, state: Any) -> Any:
        d_query, d_key, d_value = state
        q, do = _read(queries, at.queries), _read(d_outputs, at.queries)
        at_lse, at_delta = (_read(x, at.queries)[:, None, :, 0] for x in (lses, deltas))
        key = _read(source.key, at.keys)
        p = jnp.exp(dot("lkd,lqd->lkq", key, q) * problem.scale - at_lse)
        if at.seen is not None:
            by_head = p.reshape(*p.shape[:2], -1, problem.repeats)
            p = jnp.where(at.seen, by_head, 0).reshape(p.shape)
        d_p = dot("lkd,lqd->lkq", _read(source.value, at.keys), do)
        d_scores = (p * (d_p - at_delta) * problem.scale).astype(q.dtype)
        return (
            _add(d_query, at.queries, dot("lkq,lkd->lqd", d_scores, key)),
            _add(d_key, at.keys, dot("lkq,lqd->lkd", d_scores, q)),
            _add(d_value, at.keys, dot("lkq,lqd->lkd", p.astype(do.dtype), do)),
        )

    d_query = full(queries.shape, 0.0, jnp.float32, query)
    gradients = []
    for source in _sources(problem, work, operands):
        d_keys = [full(x.shape, 0.0, jnp.float32, query) for x in (source.key, source.value)]
        for loop in source.loops:
            call = functools.partial(step, source)
            d_query, *d_keys = _run(problem, loop, call, (d_query, *d_keys), queries_first=False)
        gradients += [_ungrouped(problem, source.layout, x) for x in d_keys]
    gradients.insert(0, _ungrouped(problem, work.query_layout, d_query))
    cast = (x.astype(query.dtype) for x in gradients)
    return Operands(*cast, *(None,) * (5 - len(gradients)))


# Layouts


def plan_of(problem: Problem) -> Plan:
    """The steps that this backend takes on the platform that is traced for."""
    return plan(problem, budget())


def _has_masks(work: Plan) -> bool:
    return any(limits is not None for loop in work.loops for limits in loop.masks)


def budget() -> int:
    """Scores of a step on the platform that is traced for."""
    return BUDGET.get(default_platform(), DEFAULT_BUDGET)


def _sources(problem: Problem, work: Plan, operands: Operands) -> list[_Source]:
    own, more = operands[1:3], operands[3:]
    keys, values = (_grouped(problem, work.dilation, work.keys, x) for x in own)
    sources = [_Source(keys, values, work.key_layout, work.loops)]
    if work.additional:
        row = (problem.additional,)
        keys, values = (_grouped(problem, (1,), row, x) for x in more if x is not None)
        sources.append(_Source(keys, values, row, work.additional))
    return sources


def _grouped(
    problem: Problem,
    dilation: tuple[int, ...],
    extent: tuple[int, ...],
    x: Float[Array, "B *X H D"],
) -> Float[Array, "B *GY K r D"]:
    """Each dimension as [places in a dilation group, groups], padded to `extent` places.

    K is key heads, r the heads that share one.
    """
    sizes = [n for pair in zip(extent, dilation, strict=True) for n in pair]
    padding = [(0, y * d - n) for y, d, n in zip(extent, dilation, x.shape[1:], strict=False)]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0), (0, 0)))
    return x.reshape(x.shape[0], *sizes, problem.kv_heads, -1, x.shape[-1])


def _ungrouped(
    problem: Problem, layout: tuple[int, ...], x: Float[Array, "B *GY K r D"]
) -> Float[Array, "B *X H D"]:
    """The inverse of `_grouped`, without its padding."""
    full = (y * d for y, d in zip(x.shape[1:-3:2], x.shape[2:-3:2], strict=True))
    x = x.reshape(x.shape[0], *full, -1, x.shape[-1])
    return x[(slice(None), *(slice(n) for n in layout))]


# Steps


def _run(
    problem: Problem,
    loop: Loop,
    step: Callable[[_Step, Any], Any],
    state: tuple[Array, ...],
    *,
    queries_first: bool,
) -> Any:
    """All steps of a loop; the state passes through them."""
    count = len(loop.queries)
    scores = problem.repeats * math.prod(loop.tile) * math.prod(loop.box)
    heads, entries = _lanes(problem, max(1, budget() // (2 * scores)))
    queries, seen = jnp.asarray(loop.queries), _masks(loop, queries_first)
    keys, mask = (_of_shard(problem, table) for table in (loop.keys, loop.mask))
    across = problem.kv_heads // heads

    def body(i: Array, state: Any) -> Any:
        # All tiles of some heads before the next heads, whose keys would need the cache.
        n, lane = i % count, i // count
        entry, head = lane // across * entries, lane % across * heads

        def box(first: Array, sizes: tuple[int, ...]) -> _Box:
            one_group = (n for size in sizes for n in (size, 1))
            # Of one type, also where jax counts in 64 bits.
            place = (jnp.asarray(n, jnp.int32) for n in (entry, *first, head, 0, 0))
            return _Box(tuple(place), (entries, *one_group, heads))

        return step(_Step(box(queries[n], loop.tile), box(keys[n], loop.box), seen(mask[n])), state)

    return jax.lax.fori_loop(0, across * (problem.batch // entries) * count, body, state)


def _lanes(problem: Problem, most: int) -> tuple[int, int]:
    """Key heads and batch entries of a step: at most so many pairs, heads first."""
    heads = divisor(problem.kv_heads, most)
    if heads < problem.kv_heads:
        return heads, 1
    return heads, divisor(problem.known_batch, most // heads)


def divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`."""
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)


def _of_shard(problem: Problem, table: np.ndarray) -> Array:
    """The rows of a table [S, ...] for the device that runs this."""
    if table.shape[0] == 1:
        return jnp.asarray(table[0])
    return jnp.asarray(table)[jax.lax.axis_index(problem.axis_name)]


def _masks(
    loop: Loop, queries_first: bool
) -> Callable[[Array], Bool[Array, "Q 1 K"] | Bool[Array, "K Q 1"] | None]:
    """Which keys of the box the queries of the tile see, by the index of the mask; None is all.

    One axis is for the query heads that share a key head. Q is 1 where all queries see the same.
    """
    if all(limits is None for limits in loop.masks):
        return lambda mask: None
    rank, keys = len(loop.box), math.prod(loop.box)
    masks = [None if limits is None else jnp.asarray(limits) for limits in loop.masks]
    tile = tuple(
        loop.tile[m] if limits is None else limits.shape[-1] for m, limits in enumerate(loop.masks)
    )

    def make(mask: Array) -> Array:
        seen = jnp.ones((*tile, *loop.box) if queries_first else (*loop.box, *tile), bool)
        for m, limits in enumerate(masks):
            if limits is not None:
                first, last = limits[mask][..., None]
                inside = jnp.arange(loop.box[m], dtype=limits.dtype)[None]
                inside = (inside >= first) & (inside < last)  # [tile, box]
                others = [n for n in range(2 * rank) if n not in (m, rank + m)]
                seen &= jnp.expand_dims(inside if queries_first else inside.T, others)
        # Made once for all heads, and before its axes are joined, which would cost divisions.
        seen = jax.lax.optimization_barrier(seen)
        return seen.reshape((-1, 1, keys) if queries_first else (keys, -1, 1))

    count = next(len(limits) for limits in loop.masks if limits is not None)
    if count * keys * math.prod(tile) > MASKS * budget():
        return make
    made = jax.vmap(make)(jnp.arange(count))
    return lambda mask: made[mask]


def dot(equation: str, a: Array, b: Array) -> Array:
    """A product summed in float32; operands in float32 are not rounded to less."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def _read(x: Float[Array, "B *GY K r D"], at: _Box) -> Float[Array, "l N D"]:
    """The tokens of a box; l is its batch entries and key heads, N its tokens times r."""
    box = jax.lax.dynamic_slice(
        x, at.first, (*at.sizes, *x.shape[-2:]), allow_negative_indices=False
    )
    lanes = at.sizes[0] * at.sizes[-1]
    return jnp.moveaxis(box, -3, 1).reshape(lanes, -1, x.shape[-1])


def _write(x: Float[Array, "B *GY K r D"], at: _Box, new: Float[Array, "l N D"]) -> Array:
    entries, *box, heads = at.sizes
    new = new.reshape(entries, heads, *box, *x.shape[-2:]).astype(x.dtype)
    return jax.lax.dynamic_update_slice(
        x, jnp.moveaxis(new, 1, -3), at.first, allow_negative_indices=False
    )


def _add(x: Float[Array, "B *GY K r D"], at: _Box, new: Float[Array, "l N D"]) -> Array:
    return _write(x, at, _read(x, at) + new)


def full(shape: tuple[Size, ...], value: float, dtype: Any, like: Array) -> Array:
    """A constant that varies over the mesh axes that `like` varies over, as a loop's state must."""
    return vary(jnp.full(shape, value, dtype), varying_axes(like))
