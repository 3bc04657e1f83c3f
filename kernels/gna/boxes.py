"""What a blocked backend does, step by step: tiles of queries against boxes of keys.

The queries of a tile see windows that overlap, and their union is a box: one interval per
dimension.  A step takes a tile and copies its box, whose size is static and whose place comes from
a table, so that a step is two dense matrix products.  Where all queries of a tile share one window
(a tile within a stride group, or at a border) the box is that window: no mask is needed and nothing
computed in vain, whatever the strides.  Key tiles on a fixed grid, as in NATTEN's kernels, reach
this only for certain strides (arXiv 2504.16922).

Everything here is plain numpy on static arguments.
"""

import dataclasses
import functools
import itertools
import math

import numpy as np
from jaxtyping import Int

from .problem import Problem
from .windows import Window

# Costs in units of one score (two products of head_dim multiply-adds).
KEY_COST = 24  # copying one key and its value
STEP_COST = 8192  # starting a step
MASK_COST = 1.15  # of a score that is masked, relative to one that is not


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """Steps of one shape: n query tiles against boxes of the same size.

    Attributes:
      box: keys of a step along each dimension.
      tile: queries of a step along each dimension, or 1 where all see the same additional keys.
      queries: queries of a step, for all query heads that share a key head.
      tiles: query tile of each step [n].
      origins: dilation group, and the box's first key along each dimension, on each shard [S, n,
        1 + rank].
      masks: per dimension, the different masks of these steps: the first key and one past the last
        that each query of the tile sees, counted from the origin [P, 2, tile]; None where every
        query sees the whole box.
      mask: mask of each step, on each shard [S, n].
    """

    box: tuple[int, ...]
    tile: tuple[int, ...]
    queries: int
    tiles: Int[np.ndarray, " n"]
    origins: Int[np.ndarray, "S n C"]
    masks: tuple[Int[np.ndarray, "P 2 _"] | None, ...]
    mask: Int[np.ndarray, "S n"]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """All steps of a problem.

    Attributes:
      tile: queries of a tile along each dimension.
      grid: tiles along each dimension, of the longest dilation group.
      dilation: dilation groups along each dimension.
      keys: keys along each dimension, of the longest dilation group.
      query_layout: tokens that query, along each dimension: all, or those of a shard.
      key_layout: tokens that are seen, along each dimension: all, or those of a shard and its halo.
      loops: the steps over keys on the token layout.
      additional: the steps over additional keys, which lie in one row.
    """

    tile: tuple[int, ...]
    grid: tuple[int, ...]
    dilation: tuple[int, ...]
    keys: tuple[int, ...]
    query_layout: tuple[int, ...]
    key_layout: tuple[int, ...]
    loops: tuple[Loop, ...]
    additional: tuple[Loop, ...]

    @property
    def tiles(self) -> int:
        """Query tiles of all dilation groups."""
        return math.prod(self.dilation) * math.prod(self.grid)


@dataclasses.dataclass(frozen=True, eq=False)
class _Side:
    """One dimension cut into query tiles; an entry is a tile of a dilation group.

    Attributes:
      start: first key that each query sees [shards, entries, tile].
      end: one past the last.
      entries: groups times tiles.
    """

    start: Int[np.ndarray, "S E t"]
    end: Int[np.ndarray, "S E t"]

    @property
    def sizes(self) -> Int[np.ndarray, " E"]:
        """Keys that each tile sees, on the shard where it sees most."""
        return (self.end.max(-1) - self.start.min(-1)).max(0)

    @property
    def is_free(self) -> np.ndarray:
        """Whether all queries of a tile see the same number of the same keys, on every shard."""
        first, last = self.start.min(-1), self.end.max(-1)
        shared = (self.start == first[..., None]) & (self.end == last[..., None])
        return shared.all((0, 2)) & (last - first == self.sizes).all(0)


def key_rows(window: Window, shards: int) -> tuple[tuple[int, ...], int]:
    """The keys at hand where shards of a dimension's queries are attended from, one by one.

    Returns:
      The first key of each shard, and the number of keys, the same for all: a shard's own tokens
      and a halo around them, or all tokens if these are no more. Keys before the first token or
      after the last one are never seen.
    """
    own = window.length // shards
    if shards == 1:
        return (0,), own
    d = window.dilation
    before = after = 0
    for shard in range(shards):
        queries = np.arange(shard * own // d, (shard + 1) * own // d)
        start, end = window.bounds(window.length // d, queries)
        before = max(before, d * int(queries[0] - start.min()))
        after = max(after, d * int(end.max() - queries[-1] - 1))
    if before + own + after >= window.length:
        return (0,) * shards, window.length
    return tuple(shard * own - before for shard in range(shards)), before + own + after


def _side(window: Window, tile: int, shards: int) -> _Side:
    d = window.dilation
    queries = -(-window.length // d) // shards
    positions = np.minimum(np.arange(-(-queries // tile) * tile), queries - 1)
    bounds = [
        [
            np.stack(window.bounds(length, shard * queries + positions)) - first // d
            for length in window.group_lengths()
        ]
        for shard, first in enumerate(key_rows(window, shards)[0])
    ]
    start, end = np.moveaxis(np.array(bounds), 2, 0).reshape(2, shards, -1, tile)
    return _Side(start, end)


def _tile_sizes(window: Window, queries: int) -> list[int]:
    """Tiles worth trying: powers of two, and what divides or repeats the stride groups."""
    s = window.stride
    sizes = {1 << n for n in range(9)} | {s * n for n in (1, 2, 3, 4, 8, 16)} | {queries}
    sizes |= {s // n for n in range(1, s + 1) if s % n == 0}
    return sorted(t for t in sizes if t <= min(queries, 256))


def _best_tile(problem: Problem, shards: tuple[int, ...]) -> tuple[int, ...]:
    """The tile that makes the steps cheapest."""
    choices = []
    for window, count in zip(problem.windows, shards, strict=True):
        queries = -(-window.length // window.dilation) // count
        one = []
        for tile in _tile_sizes(window, queries):
            side = _side(window, tile, count)
            one.append((tile, side.sizes.size, int(side.sizes.sum()), bool(side.is_free.all())))
        choices.append(one)

    def cost(combination):
        tiles, entries, sizes, free = zip(*combination, strict=True)
        rows = problem.repeats * math.prod(tiles)
        if rows > 512 and math.prod(tiles) > 1:
            return math.inf
        scores = math.prod(sizes) * rows * (1 if all(free) else MASK_COST)
        lanes = problem.batch * problem.kv_heads
        return lanes * (scores + math.prod(sizes) * KEY_COST) + math.prod(entries) * STEP_COST

    return tuple(one[0] for one in min(itertools.product(*choices), key=cost))


def _classes(side: _Side, most: int) -> list[tuple[Int[np.ndarray, " E"], int, bool]]:
    """Entries by the size of their box: (entries, size, whether free of masks), at most `most`.

    Boxes of one class have the size of its largest; classes are those that cost least, and a
    further one must save a twentieth.
    """
    free = side.is_free
    kinds, which = np.unique(np.stack([side.sizes, ~free]), axis=1, return_inverse=True)
    sizes, masked = kinds
    which = which.reshape(-1)
    count = np.bincount(which)
    n = len(count)

    def price(first: int, last: int) -> float:  # kinds first..last, sorted by size, as one class
        is_masked = first != last or masked[first]
        return float(count[first : last + 1].sum() * sizes[last] * (MASK_COST if is_masked else 1))

    # best[c][j]: least cost of kinds 0..j-1 in c classes, and where the last of them begins
    best = [[(0.0, 0)] + [(math.inf, 0)] * n]
    for _ in range(min(most, n)):
        row = [(math.inf, 0)]
        for j in range(1, n + 1):
            row.append(min((best[-1][i][0] + price(i, j - 1), i) for i in range(j)))
        best.append(row)
    chosen = 1
    for c in range(2, len(best)):
        if best[c][n][0] < 0.95 * best[chosen][n][0]:
            chosen = c
    classes, last = [], n
    for c in range(chosen, 0, -1):
        first = best[c][last][1]
        entries = np.flatnonzero((which >= first) & (which < last))
        classes.append(
            (entries, int(sizes[last - 1]), bool(free[entries].all() and last - first == 1))
        )
        last = first
    return classes[::-1]


def _pieces(box: tuple[int, ...], rows: int, budget: int) -> tuple[int, int]:
    """Number and size of the pieces of the first dimension that keep a step within the budget."""
    count = min(box[0], -(-rows * math.prod(box) // budget))
    for more in range(count, min(box[0], 2 * count) + 1):
        if box[0] % more == 0:
            return more, box[0] // more
    size = -(-box[0] // count)
    return -(-box[0] // size), size


@functools.lru_cache(maxsize=256)
def plan(problem: Problem, budget: int, most_classes: int | None = None) -> Plan:
    """The steps of a problem, each of at most about `budget` scores per key head.

    `most_classes` bounds the box sizes told apart along each dimension; by default 1 for little
    work, where compiling more loops would not pay.
    """
    windows = problem.windows
    rank = len(windows)
    shards = (problem.shards,) + (1,) * (rank - 1)
    tile = _best_tile(problem, shards)
    sides = [_side(w, t, s) for w, t, s in zip(windows, tile, shards, strict=True)]
    dilation = tuple(w.dilation for w in windows)
    grid = tuple(s.sizes.size // d for s, d in zip(sides, dilation, strict=True))
    key_layout = (key_rows(windows[0], problem.shards)[1], *problem.layout[1:])
    keys = tuple(-(-x // d) for x, d in zip(key_layout, dilation, strict=True))
    rows = problem.repeats * math.prod(tile)
    if most_classes is None:
        work = (
            problem.batch * problem.kv_heads * rows * math.prod(int(s.sizes.sum()) for s in sides)
        )
        most_classes = (8, 3, 2)[rank - 1] if work > 1 << 22 else 1
    loops = tuple(
        _loop(problem.shards, sides, classes, grid, keys, rows, budget)
        for classes in itertools.product(*(_classes(side, most_classes) for side in sides))
    )
    additional = ()
    if problem.additional:
        tiles = math.prod(dilation) * math.prod(grid)
        additional = (_additional(tiles, problem.additional, rows, budget),)
    query_layout = (windows[0].length // problem.shards, *problem.layout[1:])
    return Plan(tile, grid, dilation, keys, query_layout, key_layout, loops, additional)


def _loop(shards, sides, classes, grid, keys, rows, budget) -> Loop:
    """Steps of the tiles whose entries are in one class along each dimension."""
    rank = len(sides)
    box = tuple(size for _, size, _ in classes)
    count, length = _pieces(box, rows, budget)
    index = np.meshgrid(range(count), *(entries for entries, _, _ in classes), indexing="ij")
    piece, *entries = (i.reshape(-1) for i in index)
    group = np.zeros(len(piece), int)
    position = np.zeros(len(piece), int)
    origins, limits = [], []
    for m in range(rank):
        side, size = sides[m], box[m]
        group = group * (side.sizes.size // grid[m]) + entries[m] // grid[m]
        position = position * grid[m] + entries[m] % grid[m]
        start, end = side.start[:, entries[m]], side.end[:, entries[m]]
        origin = np.minimum(start.min(-1), keys[m] - size)
        free = classes[m][2]
        if m == 0 and count > 1:
            first, last = origin + piece * length, origin + np.minimum((piece + 1) * length, size)
            start = np.clip(start, first[..., None], last[..., None])
            end = np.clip(end, first[..., None], last[..., None])
            origin = np.minimum(first, origin + size - length)
            free = free and size % length == 0
        origins.append(origin)
        limits.append(None if free else np.stack([start, end], axis=2) - origin[:, :, None, None])
    tiles = group * math.prod(grid) + position
    order = np.lexsort((piece, tiles))
    masks, mask = _distinct(limits, (shards, len(order)))
    places = np.broadcast_arrays(group[None], *origins, np.empty((shards, 1)))[:-1]
    return Loop(
        (length, *box[1:]),
        tuple(side.start.shape[-1] for side in sides),
        rows,
        tiles[order].astype(np.int32),
        np.stack(places, axis=-1)[:, order].astype(np.int32),
        masks,
        mask[:, order],
    )


def _additional(tiles: int, length: int, rows: int, budget: int) -> Loop:
    """Steps of all tiles over additional keys, a box of rank 1."""
    count, size = _pieces((length,), rows, budget)
    tile, piece = np.indices((tiles, count)).reshape(2, -1)
    first, last = piece * size, np.minimum((piece + 1) * size, length)
    origin = np.minimum(first, length - size)
    limits = np.stack([first - origin, last - origin], axis=-1)[None, :, :, None]
    masks, mask = _distinct([limits if length % size else None], (1, len(tile)))
    origins = np.stack([np.zeros_like(origin), origin], axis=-1)
    return Loop(
        (size,), (1,), rows, tile.astype(np.int32), origins.astype(np.int32)[None], masks, mask
    )


def _distinct(
    limits: list[Int[np.ndarray, "_ n 2 _"] | None], steps: tuple[int, int]
) -> tuple[tuple[Int[np.ndarray, "P 2 _"] | None, ...], Int[np.ndarray, "S n"]]:
    """The different masks of many steps [shards, n], and the index of each step's."""
    sizes = [0 if one is None else one.shape[-1] for one in limits]
    rows = [
        np.broadcast_to(one, (*steps, *one.shape[2:])).reshape(math.prod(steps), -1)
        for one in limits
        if one is not None
    ]
    if not rows:
        return (None,) * len(limits), np.zeros(steps, np.int32)
    rows, which = np.unique(np.concatenate(rows, axis=1), axis=0, return_inverse=True)
    parts = np.split(rows.astype(np.int32), 2 * np.cumsum(sizes)[:-1], axis=1)
    masks = tuple(
        part.reshape(-1, 2, size) if size else None for part, size in zip(parts, sizes, strict=True)
    )
    return masks, which.reshape(steps).astype(np.int32)
