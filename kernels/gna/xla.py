"""Blocked attention in plain jax for any device: memory linear in the number of tokens.

Queries are permuted into tiles and dilation groups become separate rows of keys.  Then each step
(`boxes`) takes one tile, copies the box of keys that its queries see, and multiplies.  Results of
the steps of one tile, such as pieces of a large box or additional keys, are merged by their
log-sum-exps.  Steps run one after the other, which makes sums over them deterministic; batch and
heads, and the products themselves, are what runs in parallel.

Scores are laid out [keys, queries]: sums over keys then run along vectors of queries.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .boxes import Loop, Plan, plan
from .problem import Gradients, Problem, Residuals
from .varying import vary, varying_axes

# Scores of a step: on a CPU they should stay in its cache, elsewhere fill the device.
BUDGET = {"cpu": 1 << 18}
DEFAULT_BUDGET = 1 << 24

# Masks that are made in advance, if all of them together are no larger than this many steps.
MASKS = 8

# Stands for minus infinity where differences must not be NaN: exp(HIDDEN - x) is 0 for any score x.
HIDDEN = -1e30


def unsupported(problem: Problem, platform: str) -> str | None:
    """Why this backend cannot do a problem on a platform, or None if it can."""
    return None


class _Keys(NamedTuple):
    """Keys and values of one source, tokens of the layout or additional ones, and their steps."""

    key: Float[Array, "G R *Y D"]
    value: Float[Array, "G R *Y Dv"]
    loops: tuple[Loop, ...]


class _Step(NamedTuple):
    """Where a step reads and writes, and what it has read of keys and values."""

    tile: Int[Array, ""]
    lane: Int[Array, ""]
    origin: tuple[Any, ...]
    box: tuple[int, ...]
    key: Float[Array, "r K D"]
    value: Float[Array, "r K Dv"]
    seen: Bool[Array, "K 1 T"] | None


def forward(
    problem: Problem,
    query: Array,
    key: Array,
    value: Array,
    additional_keys: Array | None,
    additional_values: Array | None,
) -> tuple[Array, Array]:
    """Output [B, *X, Hq, Dv] in the dtype of the query, and its log-sum-exp [B, *X, Hq]."""
    work = _plan(problem)
    queries = _to_tiles(problem, work, query)
    sources = _sources(problem, work, key, value, additional_keys, additional_values)
    # With one step per tile its result is final; otherwise results are merged in float32.
    once = sum(len(loop.tiles) for source in sources for loop in source.loops) == work.tiles
    output = _full(
        (*queries.shape[:-1], problem.value_dim), 0.0, query.dtype if once else jnp.float32, query
    )
    lse = _full(queries.shape[:-1], HIDDEN, jnp.float32, query)

    def step(at: _Step, state: tuple[Array, Array]) -> tuple[Array, Array]:
        output, lse = state
        scores = _scores(problem, at, _read(queries, at))
        top = scores.max(1, keepdims=True)
        p = jnp.exp(scores - top)
        total = p.sum(1)
        part = _dot("rkq,rkd->rqd", p.astype(at.value.dtype), at.value) / total[..., None]
        part_lse = top[:, 0] + jnp.log(total)
        if not once:
            old, old_lse = _read(output, at), _read(lse, at)
            weight = jax.nn.sigmoid(part_lse - old_lse)[..., None]
            part = old - weight * (old - part)
            part_lse = jnp.logaddexp(old_lse, part_lse)
        return _write(output, at, part), _write(lse, at, part_lse)

    for source in sources:
        output, lse = _run(problem, source, step, (output, lse))
    return (
        _from_tiles(problem, work, output).astype(query.dtype),
        _from_tiles(problem, work, lse[..., None])[..., 0],
    )


def backward(problem: Problem, residuals: Residuals, d_output: Array, delta: Array) -> Gradients:
    """Gradients of the inputs; see `reference.backward`.

    One pass: a step adds to the gradients of its tile of queries and of its box of keys.
    """
    query, key, value, additional_keys, additional_values, _, lse = residuals
    work = _plan(problem)
    queries, d_outputs = (_to_tiles(problem, work, x) for x in (query, d_output))
    lses, deltas = (_to_tiles(problem, work, x[..., None])[..., 0] for x in (lse, delta))

    def step(at: _Step, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        d_query, d_key, d_value = state
        q, do = _read(queries, at), _read(d_outputs, at)
        p = jnp.exp(_scores(problem, at, q) - _read(lses, at)[:, None])
        d_p = _dot("rkd,rqd->rkq", at.value, do)
        d_scores = (p * (d_p - _read(deltas, at)[:, None]) * problem.scale).astype(q.dtype)
        return (
            _write(d_query, at, _read(d_query, at) + _dot("rkq,rkd->rqd", d_scores, at.key)),
            _add_box(d_key, at, _dot("rkq,rqd->rkd", d_scores, q)),
            _add_box(d_value, at, _dot("rkq,rqd->rkd", p.astype(do.dtype), do)),
        )

    d_query = _full(queries.shape, 0.0, jnp.float32, query)
    d_keys = []
    for source in _sources(problem, work, key, value, additional_keys, additional_values):
        zeros = (_full(x.shape, 0.0, jnp.float32, query) for x in (source.key, source.value))
        d_query, *of_source = _run(problem, source, step, (d_query, *zeros))
        d_keys += of_source
    gradients = [_from_tiles(problem, work, d_query)]
    gradients += [_from_groups(problem, work, x) for x in d_keys[:2]]
    gradients += [jnp.moveaxis(_unfold(problem, x[0]), 1, 2) for x in d_keys[2:]]
    cast = (x.astype(query.dtype) for x in gradients)
    return Gradients(*cast, *(None,) * (5 - len(gradients)))


# Layouts


def _plan(problem: Problem) -> Plan:
    return plan(problem, _budget())


def _budget() -> int:
    return BUDGET.get(jax.default_backend(), DEFAULT_BUDGET)


def _sources(
    problem: Problem, work: Plan, key: Array, value: Array, *additional: Array | None
) -> list[_Keys]:
    sources = [_Keys(_to_groups(work, key), _to_groups(work, value), work.loops)]
    if work.additional:
        keys, values = (_fold(jnp.moveaxis(x, 2, 1))[None] for x in additional if x is not None)
        sources.append(_Keys(keys, values, work.additional))
    return sources


def _fold(x: Array) -> Array:
    """[B, H, ...] to [B * H, ...]."""
    return x.reshape(-1, *x.shape[2:])


def _unfold(problem: Problem, x: Array) -> Array:
    return x.reshape(problem.batch, -1, *x.shape[1:])


def _to_groups(work: Plan, x: Float[Array, "B *X H D"]) -> Float[Array, "G R *Y D"]:
    """Dilation groups, each a smaller layout of its own; R is batch and heads."""
    rank = len(work.keys)
    batch, heads, dim = x.shape[0], *x.shape[-2:]
    padding = [
        (0, y * d - n) for y, d, n in zip(work.keys, work.dilation, x.shape[1:], strict=False)
    ]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0), (0, 0)))
    both = [n for pair in zip(work.keys, work.dilation, strict=True) for n in pair]
    x = x.reshape(batch, *both, heads, dim)  # [B, y1, d1, ..., H, D]
    place, group = range(1, 2 * rank, 2), range(2, 2 * rank + 1, 2)
    x = x.transpose(*group, 0, 2 * rank + 1, *place, 2 * rank + 2)
    return x.reshape(math.prod(work.dilation), batch * heads, *work.keys, dim)


def _from_groups(
    problem: Problem, work: Plan, x: Float[Array, "G R *Y D"]
) -> Float[Array, "B *X H D"]:
    rank = len(work.keys)
    x = x.reshape(*work.dilation, problem.batch, -1, *work.keys, x.shape[-1])
    pairs = [axis for m in range(rank) for axis in (rank + 2 + m, m)]
    x = x.transpose(rank, *pairs, rank + 1, 2 * rank + 2)
    full = [y * d for y, d in zip(work.keys, work.dilation, strict=True)]
    x = x.reshape(problem.batch, *full, *x.shape[-2:])
    return x[(slice(None), *(slice(n) for n in work.key_layout))]


def _to_tiles(
    problem: Problem, work: Plan, x: Float[Array, "B *X Hq D"]
) -> Float[Array, "U R Q D"]:
    """Tiles of queries; Q are those of a tile, for each query head that shares a key head."""
    rank, batch, dim = len(work.tile), x.shape[0], x.shape[-1]
    steps = list(zip(work.grid, work.tile, work.dilation, strict=True))
    padding = [(0, r * t * d - n) for (r, t, d), n in zip(steps, x.shape[1:], strict=False)]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0), (0, 0)))
    x = x.reshape(batch, *(n for one in steps for n in one), problem.kv_heads, -1, dim)
    tile, place, group = (range(first, 3 * rank + 1, 3) for first in (1, 2, 3))
    head = 3 * rank + 1
    x = x.transpose(*group, *tile, 0, head, head + 1, *place, head + 2)
    return x.reshape(work.tiles, batch * problem.kv_heads, -1, dim)


def _from_tiles(
    problem: Problem, work: Plan, x: Float[Array, "U R Q D"]
) -> Float[Array, "B *X Hq D"]:
    rank = len(work.tile)
    heads = (problem.kv_heads, problem.repeats)
    x = x.reshape(*work.dilation, *work.grid, problem.batch, *heads, *work.tile, x.shape[-1])
    # Axes are now [group, tile, B, Hkv, repeat, place, D].
    triples = [axis for m in range(rank) for axis in (rank + m, 2 * rank + 3 + m, m)]
    x = x.transpose(2 * rank, *triples, 2 * rank + 1, 2 * rank + 2, 3 * rank + 3)
    full = [math.prod(one) for one in zip(work.grid, work.tile, work.dilation, strict=True)]
    x = x.reshape(problem.batch, *full, problem.heads, x.shape[-1])
    return x[(slice(None), *(slice(n) for n in work.query_layout))]


# Steps


def _run(problem: Problem, source: _Keys, step: Callable[[_Step, Any], Any], state: Any) -> Any:
    """All steps over one source of keys; the state passes through them."""
    for loop in source.loops:
        state = _run_loop(problem, source, loop, step, state)
    return state


def _run_loop(
    problem: Problem, source: _Keys, loop: Loop, step: Callable[[_Step, Any], Any], state: Any
) -> Any:
    lanes, count, size = source.key.shape[1], len(loop.tiles), math.prod(loop.box)
    most = max(1, _budget() // (loop.queries * size))
    width = max(w for w in range(1, min(most, lanes) + 1) if lanes % w == 0)
    tiles = jnp.asarray(loop.tiles)
    origins = _of_shard(problem, loop.origins)
    mask_of = _masks(loop)
    mask = _of_shard(problem, loop.mask)

    def body(i: Array, state: Any) -> Any:
        # All tiles of some lanes before the next lanes, whose keys would need the cache.
        n, lane = i % count, i // count * width
        group, *first = origins[n]
        key, value = (
            jax.lax.dynamic_slice(x, (group, lane, *first, 0), (1, width, *loop.box, x.shape[-1]))
            for x in (source.key, source.value)
        )
        at = _Step(
            tiles[n],
            lane,
            (group, lane, *first, 0),
            loop.box,
            key.reshape(width, size, -1),
            value.reshape(width, size, -1),
            mask_of(mask[n]),
        )
        return step(at, state)

    return jax.lax.fori_loop(0, lanes // width * count, body, state)


def _of_shard(problem: Problem, table: np.ndarray) -> Array:
    """The rows of a table [S, ...] for the device that runs this."""
    if table.shape[0] == 1:
        return jnp.asarray(table[0])
    return jnp.asarray(table)[jax.lax.axis_index(problem.axis_name)]


def _masks(loop: Loop) -> Callable[[Array], Bool[Array, "K 1 T"] | None]:
    """Which keys of the box the queries of the tile see, by the index of the mask; None is all."""
    if all(limits is None for limits in loop.masks):
        return lambda mask: None
    rank = len(loop.box)
    masks = [None if limits is None else jnp.asarray(limits) for limits in loop.masks]

    def make(mask: Array) -> Array:
        seen = jnp.ones((*loop.box, *loop.tile), bool)
        for m, limits in enumerate(masks):
            if limits is not None:
                first, last = limits[mask]
                keys = jnp.arange(loop.box[m])[:, None]
                inside = (keys >= first) & (keys < last)  # [box, tile]
                others = [n for n in range(2 * rank) if n not in (m, rank + m)]
                seen &= jnp.expand_dims(inside, others)
        # Made once for all heads, and before its axes are joined, which would cost divisions.
        return jax.lax.optimization_barrier(seen).reshape(math.prod(loop.box), 1, -1)

    count = next(len(limits) for limits in loop.masks if limits is not None)
    if count * math.prod(loop.box) * math.prod(loop.tile) > MASKS * _budget():
        return make
    made = jax.vmap(make)(jnp.arange(count))
    return lambda mask: made[mask]


def _scores(problem: Problem, at: _Step, query: Float[Array, "r Q D"]) -> Float[Array, "r K Q"]:
    scores = _dot("rkd,rqd->rkq", at.key, query) * problem.scale
    if at.seen is None:
        return scores
    shape = scores.shape
    scores = scores.reshape(*shape[:2], -1, at.seen.shape[-1])
    return jnp.where(at.seen, scores, HIDDEN).reshape(shape)


def _dot(equation: str, a: Array, b: Array) -> Array:
    """A product summed in float32; operands in float32 are not rounded to less."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def _read(x: Float[Array, "U R *Q"], at: _Step) -> Float[Array, "r *Q"]:
    """The rows of a step's tile."""
    index = (at.tile, at.lane, *(0 for _ in x.shape[2:]))
    return jax.lax.dynamic_slice(x, index, (1, at.key.shape[0], *x.shape[2:]))[0]


def _write(x: Float[Array, "U R *Q"], at: _Step, rows: Float[Array, "r *Q"]) -> Array:
    index = (at.tile, at.lane, *(0 for _ in x.shape[2:]))
    return jax.lax.dynamic_update_slice(x, rows[None].astype(x.dtype), index)


def _add_box(x: Float[Array, "G R *Y D"], at: _Step, box: Float[Array, "r K D"]) -> Array:
    """Adds to the keys of a step's box."""
    shape = (1, box.shape[0], *at.box, x.shape[-1])
    old = jax.lax.dynamic_slice(x, at.origin, shape)
    return jax.lax.dynamic_update_slice(x, old + box.reshape(shape), at.origin)


def _full(shape: tuple[int, ...], value: float, dtype: Any, like: Array) -> Array:
    """A constant that varies over the mesh axes that `like` varies over, as a loop's state must."""
    return vary(jnp.full(shape, value, dtype), varying_axes(like))
