"""Splash attention, jax's Pallas kernels for TPUs, over tokens permuted to tiles.

A tile of tokens is a block of rows.  Which blocks meet which is worked out here, one dimension at a
time, from the windows; blocks that no query sees are never visited.  Where blocks are seen in part,
the kernels compute who sees what: each query carries its windows' bounds in one integer, and a
key's place follows from its number.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..nonfinite import contained, contained_backward
from ..platforms import default_platform
from ..problem import Operands, Problem, Residuals
from ..tiles import Window, bounds, shapes_of, visits
from ..varying import vary, varying_axes
from . import xla

BLOCKS = (512, 256, 128)  # tokens of a block
STEP = 1 << 16  # what visiting a block costs beside its scores, in scores
MOST_STEPS = 1 << 18  # their numbers lie in scalar memory
MOST_DIM = 256
DTYPES = ("bfloat16", "float32")
MASK_VALUE = -0.7 * float(np.finfo(np.float32).max)


def unsupported(problem: Problem, platform: str) -> str | None:
    """Why this backend cannot do a problem on a platform, or None if it can."""
    if platform != "tpu":
        return f"it runs on a TPU, not on {platform}"
    if problem.shards > 1:
        return "it does not attend from a shard of the tokens"
    if not isinstance(problem.batch, int):
        return "it takes a batch of known size, not a symbolic one"
    if problem.dtype not in DTYPES:
        return f"it takes {' and '.join(DTYPES)}, not {problem.dtype}"
    dims = problem.head_dim, problem.value_dim
    if max(dims) > MOST_DIM:
        return f"head dimensions may be {MOST_DIM} at most, not {dims[0]} and {dims[1]}"
    tiles = tiling(problem.windows)
    blocks = -(-problem.additional // tiles.block)
    if tiles.steps + tiles.blocks * blocks > MOST_STEPS or sum(_widths(tiles)) > 31:
        return f"it has tables for fewer tokens, not for {problem.tokens}"
    return None


@functools.cache
def missing(platform: str) -> str | None:
    """Why splash attention is not to be had, or None if it is."""
    try:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
    except Exception as error:  # whatever it is: without it this backend is not to be had
        return f"jax's splash attention cannot be imported ({str(error).splitlines()[0]})"
    names = ("_splash_attention_forward", "_splash_attention_bwd_dq", "_splash_attention_bwd_dkv")
    if all(hasattr(splash_attention_kernel, name) for name in names):
        return None
    return "this version of jax has another splash attention"


def forward(problem: Problem, operands: Operands) -> tuple[Array, Array]:
    """Output [B, *X, Hq, Dv] in the dtype of the query, and its log-sum-exp [B, *X, Hq]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    tiles = tiling(problem.windows)
    how = table(tiles, problem.additional)
    if how.mask is not None:
        operands = contained(operands)
    sizes = splash.BlockSizes(tiles.block, tiles.block)

    def run(query: Array, key: Array, value: Array) -> Any:
        return splash._splash_attention_forward(
            _info(how, how.of_queries),
            query,
            key,
            value,
            None,
            None,
            mask_value=MASK_VALUE,
            is_mqa=False,
            block_sizes=sizes,
            residual_checkpoint_name=None,
            save_residuals=True,
            mask_function=how.mask,
            interpret=_is_interpreted(),
        )

    query, key, value = _tiled_operands(problem, tiles, operands)
    axes = varying_axes(*jax.tree.leaves(operands))
    with _as_they_are(problem):
        output, (lse,) = jax.vmap(run)(query, key, value)
    output, lse = (vary(x, axes) for x in (output, lse))
    return _untiled(problem, tiles, output), _untiled(problem, tiles, lse[..., None])[..., 0]


def backward(problem: Problem, residuals: Residuals, d_output: Array, delta: Array) -> Operands:
    """Gradients of the inputs; see `reference.backward`.

    Splash attention hides scores before it takes their exponents, so that a query's log-sum-exp
    that is not a number spoils keys that it does not see. Then `xla` does it.
    """
    if table(tiling(problem.windows), problem.additional).mask is None:
        return _backward(problem, residuals, d_output, delta)
    marked = contained_backward(residuals, d_output, delta)

    def by_splash() -> Operands:
        return _backward(problem, *marked)

    def by_xla() -> Operands:
        return xla.backward(problem, residuals, d_output, delta)

    return jax.lax.cond(jnp.isfinite(marked[0].lse).all(), by_splash, by_xla)


def _backward(problem: Problem, residuals: Residuals, d_output: Array, delta: Array) -> Operands:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    tiles = tiling(problem.windows)
    how = table(tiles, problem.additional)
    block = tiles.block
    minor = splash.QKVLayout.HEAD_DIM_MINOR
    shared: dict[str, Any] = {
        "is_mqa": False,
        "mask_value": MASK_VALUE,
        "attn_logits_soft_cap": None,
        "q_layout": minor,
        "k_layout": minor,
        "v_layout": minor,
        "mask_function": how.mask,
        "interpret": _is_interpreted(),
    }

    def run(query: Array, key: Array, value: Array, *rest: Array) -> Any:
        d_output, lse, delta = rest
        given = query, key, value, None, None, lse[..., 0], d_output, delta[..., 0]
        _, d_key, d_value = splash._splash_attention_bwd_dkv(
            *given,
            bq=block,
            bkv=block,
            bkv_compute=block,
            mask_info=_info(how, how.of_keys),
            use_fused_bwd_kernel=False,
            **shared,
        )
        d_query = splash._splash_attention_bwd_dq(
            *given, bq=block, bkv=block, mask_info=_info(how, how.of_queries), **shared
        )
        return d_query, d_key, d_value

    operands = residuals.operands
    rest = d_output.astype(operands.query.dtype), residuals.lse[..., None], delta[..., None]
    given = *_tiled_operands(problem, tiles, operands), *(_tiled(tiles, x) for x in rest)
    axes = varying_axes(*jax.tree.leaves((operands, d_output)))
    with _as_they_are(problem):
        gradients = jax.vmap(run)(*given)
    d_query, *of_keys = (vary(x, axes) for x in gradients)
    d_query = _untiled(problem, tiles, d_query * jnp.asarray(problem.scale, d_query.dtype))
    own, more = zip(*(_split(problem, tiles, x) for x in of_keys), strict=True)
    return Operands(d_query, *own, *more)


# How kernels are run


def _is_interpreted() -> bool:
    return default_platform() != "tpu"


@contextlib.contextmanager
def _as_they_are(problem: Problem) -> Iterator[None]:
    """float32 is not rounded to less, and devices of `jax.shard_map` are not asked for."""
    from jax._src import config

    exact = "highest" if problem.dtype == "float32" else None
    with jax.default_matmul_precision(exact), config._check_vma(False):
        yield


def _info(how: "Table", visited: "Visited") -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

    codes: Any = None if how.mask is None else jnp.asarray(how.codes)
    block, status = (jnp.asarray(x)[None] for x in visited)
    return info.MaskInfo(block, None, status, None, codes)


# Tokens in tiles


class Tiling(NamedTuple):
    """Three dimensions in tiles of the same shape for queries and keys.

    Attributes:
      windows: of three dimensions, the leading ones of one token.
      tile: tokens along each dimension.
      counts: tiles of the longest dilation group.
      steps: pairs of tiles that meet.
    """

    windows: tuple[Window, ...]
    tile: tuple[int, ...]
    counts: tuple[int, ...]
    steps: int

    @property
    def block(self) -> int:
        """Tokens of a tile."""
        return math.prod(self.tile)

    @property
    def dilation(self) -> tuple[int, ...]:
        """Dilation groups along each dimension."""
        return tuple(w.dilation for w in self.windows)

    @property
    def blocks(self) -> int:
        """Tiles of all groups."""
        return math.prod(self.counts) * math.prod(self.dilation)


@functools.lru_cache(maxsize=256)
def tiling(windows: tuple[Window, ...]) -> Tiling:
    """The tiles that cost least."""
    ones = (1,) * (3 - len(windows))
    three = (*(Window(1, 1) for _ in ones), *windows)

    @functools.cache
    def steps(window: Window, tile: int) -> int:
        first, last, *_ = _along(window, tile)
        return int((last - first).sum())

    def of(tile: tuple[int, ...]) -> Tiling:
        counts = tuple(-(-w.group_lengths()[0] // t) for w, t in zip(three, tile, strict=True))
        return Tiling(three, tile, counts, math.prod(map(steps, three, tile)))

    choices = [of(ones + shape) for block in BLOCKS for shape in shapes_of(block, len(windows))]
    return min(choices, key=lambda one: one.steps * (one.block**2 + STEP))


def _along(window: Window, tile: int) -> tuple[Int[np.ndarray, "d T"], ...]:
    """The tiles of keys that tiles of queries meet: first, last, and those seen whole likewise."""
    longest = -(-window.group_lengths()[0] // tile)
    groups = []
    for length in window.group_lengths():
        found = visits(window, length, tile, tile)
        # Padding is not to be seen here, however whole a tile is otherwise.
        free_last = np.maximum(np.minimum(found.free_last, length // tile), found.free_first)
        arrays = (found.first, found.last, found.free_first, free_last)
        # A group without a last tile has queries there that count as its last.
        groups.append([np.pad(x, (0, longest - len(x)), mode="edge") for x in arrays])
    return tuple(np.array(groups).swapaxes(0, 1))


def _tiled(tiles: Tiling, x: Float[Array, "B *X H D"]) -> Float[Array, "B H S D"]:
    """Heads before tokens, these by dilation group, tile and place in the tile; padded."""
    batch, *_, heads, dim = x.shape
    layout = [w.length for w in tiles.windows]
    x = x.reshape(batch, *layout, heads, dim)
    shape = [*zip(tiles.counts, tiles.tile, tiles.dilation, strict=True)]
    padding = [(0, math.prod(one) - n) for one, n in zip(shape, layout, strict=True)]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0), (0, 0)))
    x = x.reshape(batch, *(n for one in shape for n in one), heads, dim)
    x = x.transpose(0, 10, 3, 6, 9, 1, 4, 7, 2, 5, 8, 11)
    return x.reshape(batch, heads, -1, dim)


def _untiled(
    problem: Problem, tiles: Tiling, x: Float[Array, "B H S D"]
) -> Float[Array, "B *X H D"]:
    """The inverse of `_tiled`, in the problem's own layout."""
    batch, heads, _, dim = x.shape
    x = x.reshape(batch, heads, *tiles.dilation, *tiles.counts, *tiles.tile, dim)
    x = x.transpose(0, 5, 8, 2, 6, 9, 3, 7, 10, 4, 1, 11)
    sides = zip(tiles.counts, tiles.tile, tiles.dilation, strict=True)
    x = x.reshape(batch, *map(math.prod, sides), heads, dim)
    x = x[(slice(None), *(slice(w.length) for w in tiles.windows))]
    return x.reshape(batch, *problem.layout, heads, dim)


def _tiled_operands(problem: Problem, tiles: Tiling, operands: Operands) -> tuple[Array, ...]:
    """Queries times the scale, keys and values; additional ones follow, in whole tiles."""
    query, key, value, *additional = operands
    query = query * jnp.asarray(problem.scale, query.dtype)
    query, *of_keys = (_tiled(tiles, x) for x in (query, key, value))
    joined = []
    for own, more in zip(of_keys, additional, strict=True):
        if more is not None:
            more = jnp.pad(more, ((0, 0), (0, -more.shape[1] % tiles.block), (0, 0), (0, 0)))
            own = jnp.concatenate([own, jnp.moveaxis(more, 1, 2)], axis=2)
        joined.append(own)
    return query, *joined


def _split(problem: Problem, tiles: Tiling, x: Float[Array, "B H S D"]) -> tuple[Any, Any]:
    """What `_tiled_operands` joins, gradients of keys or of values, as they lie in the problem."""
    own, more = jnp.split(x, [tiles.blocks * tiles.block], axis=2)
    own = _untiled(problem, tiles, own)
    if not problem.additional:
        return own, None
    return own, jnp.moveaxis(more[:, :, : problem.additional], 2, 1)


# Who sees what


class Visited(NamedTuple):
    """The blocks that blocks visit, and how: 2 whole, 1 in part, 0 not at all."""

    block: Int[np.ndarray, "_ _"]
    status: Int[np.ndarray, "_ _"]


class Table(NamedTuple):
    """What the kernels are told.

    Attributes:
      of_queries: visited blocks of keys [query blocks, steps].
      of_keys: visited blocks of queries [steps, key blocks].
      codes: for each query its dilation group and, for each dimension, the first key that it sees
        and, where that is causal, its own place: some bits each.
      mask: whether queries of such codes see keys of such numbers; None if all that meet do.
    """

    of_queries: Visited
    of_keys: Visited
    codes: Int[np.ndarray, " S"]
    mask: Callable[[Array, Array], Array] | None


@functools.lru_cache(maxsize=64)
def table(tiles: Tiling, additional: int) -> Table:
    """The tables of a problem with so many additional keys."""
    query, key, status = _pairs(tiles, additional)
    key_blocks = tiles.blocks - (-additional // tiles.block)
    of_queries = _lists(query, key, status, tiles.blocks)
    block, how = _lists(key, query, status, key_blocks)
    masked = bool((status == 1).any())
    return Table(
        of_queries,
        Visited(block.T, how.T),
        _codes(tiles),
        functools.partial(_are_seen, tiles, additional) if masked else None,
    )


def _pairs(tiles: Tiling, additional: int) -> tuple[Int[np.ndarray, " P"], ...]:
    """The pairs of a query block and a key block that meet, in the order of the former; and how."""
    per_dimension = [_along(w, t) for w, t in zip(tiles.windows, tiles.tile, strict=True)]
    groups_and_tiles = np.indices((*tiles.dilation, *tiles.counts)).reshape(6, -1)
    group, at = groups_and_tiles[:3], groups_and_tiles[3:]
    places, hows = [], []
    for m, (first, last, free_first, free_last) in enumerate(per_dimension):
        width = int((last - first).max())
        steps = np.arange(width).reshape([-1 if n == m else 1 for n in range(3)])
        rows = (group[m], at[m])
        place = first[rows][:, None, None, None] + steps
        meets = place < last[rows][:, None, None, None]
        whole = (place >= free_first[rows][:, None, None, None]) & (
            place < free_last[rows][:, None, None, None]
        )
        places.append(np.where(meets, place, 0))
        hows.append(np.where(meets, np.where(whole, 2, 1), 0))
    shape = np.broadcast_shapes(*(x.shape for x in places))
    blocks = np.arange(tiles.blocks) // math.prod(tiles.counts) * math.prod(tiles.counts)
    (a, b, c), (_, n1, n2) = places, tiles.counts
    key = blocks[:, None, None, None] + (a * n1 + b) * n2 + c
    status = np.where(np.minimum(np.minimum(*hows[:2]), hows[2]) > 0, 1, 0)
    status = np.where((hows[0] == 2) & (hows[1] == 2) & (hows[2] == 2), 2, status)
    key, status = (np.broadcast_to(x, shape).reshape(tiles.blocks, -1) for x in (key, status))
    if additional:
        more = np.arange(-(-additional // tiles.block))
        partly = (more + 1) * tiles.block > additional
        rows = (tiles.blocks, len(more))
        key = np.concatenate([key, np.broadcast_to(tiles.blocks + more, rows)], axis=1)
        status = np.concatenate([status, np.broadcast_to(np.where(partly, 1, 2), rows)], axis=1)
    query, place = np.nonzero(status)
    return query, key[query, place], status[query, place]


def _lists(
    own: Int[np.ndarray, " P"],
    seen: Int[np.ndarray, " P"],
    status: Int[np.ndarray, " P"],
    count: int,
) -> Visited:
    """For each of `count` blocks a row of those that it meets; rows end with the last again."""
    order = np.lexsort((seen, own))
    own, seen, status = own[order], seen[order], status[order]
    counts = np.bincount(own, minlength=count)
    width = max(1, int(counts.max()))
    starts = np.cumsum(counts) - counts
    place = np.minimum(np.arange(width), np.maximum(counts - 1, 0)[:, None])
    index = np.minimum(starts[:, None] + place, len(own) - 1)
    is_one = np.arange(width) < counts[:, None]
    small = np.int16 if seen.max() < 1 << 15 else np.int32
    return Visited(seen[index].astype(small), np.where(is_one, status[index], 0).astype(np.int8))


def _widths(tiles: Tiling) -> list[int]:
    """Bits of the parts of a code: the dilation group, then first keys and own places."""
    widths = [(math.prod(tiles.dilation) - 1).bit_length()]
    for window in tiles.windows:
        bits = (window.group_lengths()[0] - 1).bit_length()
        widths += [bits, bits if window.is_causal else 0]
    return widths


def _codes(tiles: Tiling) -> Int[np.ndarray, " S"]:
    """The code of each query; those that only fill a tile count as the last of their group."""
    *group, n0, n1, n2, t0, t1, t2 = np.ix_(
        *map(np.arange, (*tiles.dilation, *tiles.counts, *tiles.tile))
    )
    (_, d1, d2), parts = tiles.dilation, []
    parts.append((group[0] * d1 + group[1]) * d2 + group[2])
    own = [n * size + t for n, t, size in zip((n0, n1, n2), (t0, t1, t2), tiles.tile, strict=True)]
    for window, g, place in zip(tiles.windows, group, own, strict=True):
        length = -(-(window.length - g) // window.dilation)
        start, end = bounds(place, length, window.kernel_size, window.stride, window.is_causal)
        parts += [start, end - 1]
    code, shift = np.zeros((1,) * 9, np.int64), 0
    for part, width in zip(parts, _widths(tiles), strict=True):
        code = code + ((part << shift) if width else 0)
        shift += width
    shape = (*tiles.dilation, *tiles.counts, *tiles.tile)
    return np.broadcast_to(code, shape).reshape(-1).astype(np.int32)


def _are_seen(tiles: Tiling, additional: int, code: Array, key: Array) -> Array:
    """Whether queries see keys; both int32 of the same shape, the latter counted in tiles."""
    shifts = np.cumsum([0, *_widths(tiles)])
    parts = [
        (code >> int(shift)) & ((1 << width) - 1)
        for shift, width in zip(shifts[:-1], _widths(tiles), strict=True)
    ]
    block, within = _divided(key, tiles.block)
    group, block = _divided(block, math.prod(tiles.counts))
    seen = group == parts[0]
    row, last = _divided(block, tiles.counts[2])
    tile = (*_divided(row, tiles.counts[1]), last)
    row, last = _divided(within, tiles.tile[2])
    inside = (*_divided(row, tiles.tile[1]), last)
    for m, window in enumerate(tiles.windows):
        if tiles.tile[m] * tiles.counts[m] > 1:
            place = tile[m] * tiles.tile[m] + inside[m]
            start, own = parts[1 + 2 * m : 3 + 2 * m]
            end = own + 1 if window.is_causal else start + window.kernel_size
            seen &= (place >= start) & (place < end)
    if additional:
        first = tiles.blocks * tiles.block
        seen |= (key >= first) & (key < first + additional)
    return seen


def _divided(x: Array, by: int) -> tuple[Array, Array]:
    """Quotient and rest of non-negative numbers below 2**21; TPUs do not divide integers."""
    if by & (by - 1) == 0:
        return x >> (by.bit_length() - 1), x & (by - 1)
    quotient = jnp.floor((x.astype(jnp.float32) + 0.5) * np.float32(1 / by)).astype(jnp.int32)
    return quotient, x - quotient * by
