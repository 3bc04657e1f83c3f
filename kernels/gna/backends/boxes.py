"""Schedule of blocked attention, step by step: boxes of queries against boxes of keys.

The queries of a tile see windows that overlap, and their union is a box: one interval per
dimension.  A step copies a tile of queries and its box of keys, whose sizes are static and whose
places come from tables, so that it is a few dense matrix products.  Where all queries of a tile
share one window (a tile within a stride group, or at a border) the box is that window: no mask is
needed and nothing computed in vain, whatever the strides; neighboring tiles with the same box are
then one.  Key tiles on a fixed grid, as in NATTEN's kernels, reach this only for certain strides
(arXiv 2504.16922).

Everything here is plain numpy on static arguments.
"""

import dataclasses
import functools
import itertools
import math

import numpy as np
from jaxtyping import Bool, Int

from ..problem import Problem
from ..tiles import Costs, Cut, Window, cheapest, key_rows, sizes_up_to

# In units of one score (two products of head_dim multiply-adds forward, five backward), as measured
# on a CPU: starting a step, copying a key, its value and what is added to their gradients, a score,
# and what masking it adds.
COSTS = Costs(start=8192, met=32, step=1, mask=0.1)
ROWS = 256  # queries of a tile, beyond which a larger one gains nothing


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """Steps of one shape.

    Attributes:
      tile: queries of a step along each dimension.
      box: keys of a step along each dimension.
      queries: along each dimension the tile's first query and its dilation group, one after the
        other, of each step [n, 2 * rank].
      keys: the same of the box of keys, on each shard [S, n, C]; additional keys have one dimension
        and one group.
      masks: per dimension of the box, the different masks of these steps: the first key and one
        past the last that each query of the tile sees, counted from the box's first [P, 2, tile],
        or all queries [P, 2, 1] for additional keys; None where every query sees the whole box.
      mask: mask of each step, on each shard [S, n].
    """

    tile: tuple[int, ...]
    box: tuple[int, ...]
    queries: Int[np.ndarray, "n Q"]
    keys: Int[np.ndarray, "S n C"]
    masks: tuple[Int[np.ndarray, "P 2 _"] | None, ...]
    mask: Int[np.ndarray, "S n"]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """All steps of a problem. Tuples are per dimension.

    Attributes:
      dilation: dilation groups.
      queries: queries of a group, padded to whole tiles.
      keys: keys of the longest group.
      query_layout: tokens that query: all, or those of a shard.
      key_layout: tokens that are seen: all, or those of a shard and its halo.
      loops: the steps over keys on the token layout.
      additional: the steps over additional keys, which lie in one row.
    """

    dilation: tuple[int, ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    query_layout: tuple[int, ...]
    key_layout: tuple[int, ...]
    loops: tuple[Loop, ...]
    additional: tuple[Loop, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Side:
    """One dimension cut into tiles, those of all dilation groups one after the other.

    Attributes:
      group: dilation group of each tile.
      first: its first query.
      length: its queries.
      start: first key that each query sees, on each shard; one column where `length` is more than
        the columns, and all see the same.
      end: one past the last.
    """

    group: Int[np.ndarray, " E"]
    first: Int[np.ndarray, " E"]
    length: Int[np.ndarray, " E"]
    start: Int[np.ndarray, "S E t"]
    end: Int[np.ndarray, "S E t"]

    @property
    def sizes(self) -> Int[np.ndarray, " E"]:
        """Keys that each tile sees, on the shard where it sees most."""
        return (self.end.max(-1) - self.start.min(-1)).max(0)

    @property
    def is_free(self) -> Bool[np.ndarray, " E"]:
        """Whether all queries of a tile see the same keys, as many on every shard."""
        first, last = self.start.min(-1), self.end.max(-1)
        shared = (self.start == first[..., None]) & (self.end == last[..., None])
        return shared.all((0, 2)) & (last - first == self.sizes).all(0)

    def cut(self, tile: int) -> Cut:
        """What tiles of `tile` queries, some joined, come to; a step is one score of a head."""
        pairs, keys = int((self.sizes * self.length).sum()), int(self.sizes.sum())
        free = pairs if self.is_free.all() else 0
        return Cut(tile, 1, len(self.group), keys, pairs, free)

    def bounds(
        self, entries: Int[np.ndarray, " e"], length: int
    ) -> tuple[Int[np.ndarray, "S e l"], Int[np.ndarray, "S e l"]]:
        """Start and end for each query of tiles of `length`."""
        shape = (self.start.shape[0], len(entries), length)
        columns = slice(None) if length == self.start.shape[-1] else slice(1)
        start, end = (x[:, entries, columns] for x in (self.start, self.end))
        return np.broadcast_to(start, shape), np.broadcast_to(end, shape)


def _side(window: Window, tile: int, shards: int, most: int) -> _Side:
    """A dimension in tiles of `tile` queries; neighbors of one window are joined, up to `most`."""
    d = window.dilation
    queries = -(-window.length // d) // shards
    tiles = -(-queries // tile)
    positions = np.minimum(np.arange(tiles * tile), queries - 1)
    bounds = [
        [
            np.stack(window.bounds(length, shard * queries + positions)) - first // d
            for length in window.group_lengths()
        ]
        for shard, first in enumerate(key_rows(window, shards)[0])
    ]
    start, end = np.moveaxis(np.array(bounds), 2, 0).reshape(2, shards, -1, tile)
    group, first = np.indices((d, tiles)).reshape(2, -1)
    side = _Side(group, first * tile, np.full(len(group), tile), start, end)
    if most < 2 * tile:
        return side
    same = (start[:, 1:] == start[:, :-1]) & (end[:, 1:] == end[:, :-1])
    joined = same.all((0, 2)) & side.is_free[1:] & (group[1:] == group[:-1])
    run = np.concatenate([[0], np.cumsum(~joined)])
    place = np.arange(len(run)) - np.searchsorted(run, run)
    heads = np.flatnonzero(place % (most // tile) == 0)
    length = tile * np.diff(np.append(heads, len(run)))
    return _Side(group[heads], first[heads] * tile, length, start[:, heads], end[:, heads])


def _best_sides(problem: Problem, join: bool) -> list[_Side]:
    """The dimensions in the tiles that make the steps cheapest."""
    rank = len(problem.windows)
    most = int((ROWS // problem.repeats) ** (1 / rank)) if join else 0
    choices, sides = [], []
    for m, window in enumerate(problem.windows):
        shards = problem.shards if m == 0 else 1
        queries = -(-window.length // window.dilation) // shards
        s = window.stride
        fitting = [s * n for n in (1, 2, 3, 4, 8, 16)]  # and what divides the stride groups
        fitting += [s // n for n in range(1, s + 1) if s % n == 0]
        sizes = sizes_up_to(min(queries, ROWS), fitting)
        sides.append({size: _side(window, size, shards, most) for size in sizes})
        choices.append([side.cut(size) for size, side in sides[-1].items()])
    lanes = problem.known_batch * problem.kv_heads
    costs = dataclasses.replace(
        COSTS, met=lanes * COSTS.met, step=lanes * problem.repeats * COSTS.step
    )
    limit = max(1, 2 * ROWS // problem.repeats)
    best = cheapest(
        itertools.product(*choices), costs, lambda tokens: 1.0 if tokens <= limit else math.inf
    )
    return [side[one.own] for side, one in zip(sides, best, strict=True)]


def _classes(side: _Side, most: int) -> list[tuple[Int[np.ndarray, " e"], int, int, bool]]:
    """Tiles of one shape: (tiles, queries of a tile, keys of its box, whether free of masks).

    Boxes of one class have the size of its largest. There are as few classes as tiles have lengths,
    or up to `most` where a further one saves a twentieth.
    """
    free = side.is_free
    table = np.stack([side.length, side.sizes, ~free])
    kinds, which = np.unique(table, axis=1, return_inverse=True)
    which = which.reshape(-1)
    count, n = np.bincount(which), kinds.shape[1]

    def price(first, last):  # kinds first..last, which are sorted, as one class
        if kinds[0, first] != kinds[0, last]:
            return math.inf
        masked = first != last or kinds[2, first]
        rows = int(count[first : last + 1].sum() * kinds[0, last])
        return rows * int(kinds[1, last]) * (1 + COSTS.mask * masked)

    # best[c][j]: least cost of kinds 0..j-1 in c classes, and where the last of them begins
    best = [[(0.0, 0)] + [(math.inf, 0)] * n]
    chosen = 0
    for c in range(1, n + 1):
        row = [(math.inf, 0)]
        row += [
            min((best[-1][i][0] + price(i, j - 1), i) for i in range(j)) for j in range(1, n + 1)
        ]
        best.append(row)
        if row[n][0] < 0.95 * best[chosen][n][0]:
            chosen = c
        if c >= most and chosen:
            break
    classes, last = [], n
    for c in range(chosen, 0, -1):
        first = best[c][last][1]
        entries = np.flatnonzero((which >= first) & (which < last))
        is_free = bool(free[entries].all()) and last - first == 1
        classes.append((entries, int(kinds[0, last - 1]), int(kinds[1, last - 1]), is_free))
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
def plan(problem: Problem, budget: int, most: int | None = None) -> Plan:
    """The steps of a problem, each of at most about `budget` scores per key head.

    `most` bounds the shapes of steps told apart along each dimension; by default it is 1 for little
    work, where compiling more loops would not pay.
    """
    windows, rank = problem.windows, len(problem.windows)
    if most is None:
        sides = _best_sides(problem, False)
        pairs = math.prod(int((side.sizes * side.length).sum()) for side in sides)
        work = problem.known_batch * problem.heads * pairs
        most = (8, 3, 2)[rank - 1] if work > 1 << 20 else 1
    sides = _best_sides(problem, most > 1)
    dilation = tuple(w.dilation for w in windows)
    key_layout = (key_rows(windows[0], problem.shards)[1], *problem.layout[1:])
    keys = tuple(-(-x // d) for x, d in zip(key_layout, dilation, strict=True))
    loops = tuple(
        _loop(problem, sides, classes, keys, budget)
        for classes in itertools.product(*(_classes(side, most) for side in sides))
    )
    additional = ()
    if problem.additional:
        tiles = sorted({loop.tile for loop in loops})
        additional = tuple(_additional(problem, loops, tile, budget) for tile in tiles)
    return Plan(
        dilation,
        tuple(int((side.first + side.length).max()) for side in sides),
        keys,
        (windows[0].length // problem.shards, *problem.layout[1:]),
        key_layout,
        loops,
        additional,
    )


def _loop(problem, sides, classes, keys, budget) -> Loop:
    """Steps of the tiles that are in one class along each dimension."""
    tile, box = tuple(c[1] for c in classes), tuple(c[2] for c in classes)
    count, length = _pieces(box, problem.repeats * math.prod(tile), budget)
    index = np.meshgrid(*(c[0] for c in classes), range(count), indexing="ij")
    *entries, piece = (i.reshape(-1) for i in index)
    queries, places, limits = [], [], []
    for m, side in enumerate(sides):
        group = side.group[entries[m]]
        free = classes[m][3]
        # All queries of a tile alike are one: there may be many steps.
        start, end = side.bounds(entries[m], 1 if free else tile[m])
        place = np.minimum(start.min(-1), keys[m] - box[m])
        if m == 0 and count > 1:
            first, last = place + piece * length, place + np.minimum((piece + 1) * length, box[0])
            start, end = (np.clip(x, first[..., None], last[..., None]) for x in (start, end))
            place = np.minimum(first, place + box[0] - length)
            free = free and box[0] % length == 0
        queries += [side.first[entries[m]], group]
        places += [place, group]
        limit = np.stack([start, end], axis=2) - place[:, :, None, None]
        limits.append(None if free else np.broadcast_to(limit, (*limit.shape[:3], tile[m])))
    steps = (problem.shards, len(piece))
    masks, mask = _distinct(limits, steps)
    return Loop(
        tile,
        (length, *box[1:]),
        np.stack(queries, axis=-1).astype(np.int32),
        np.stack([np.broadcast_to(x, steps) for x in places], axis=-1).astype(np.int32),
        masks,
        mask,
    )


def _additional(problem, loops, tile, budget) -> Loop:
    """Steps of all tiles of one shape over additional keys, a box of rank 1."""
    queries = np.concatenate([loop.queries for loop in loops if loop.tile == tile])
    queries = np.unique(queries, axis=0)
    length = problem.additional
    count, size = _pieces((length,), problem.repeats * math.prod(tile), budget)
    piece = np.tile(np.arange(count), len(queries))
    first, last = piece * size, np.minimum((piece + 1) * size, length)
    place = np.minimum(first, length - size)
    limits = np.stack([first - place, last - place], axis=-1)[None, :, :, None]
    masks, mask = _distinct([limits if length % size else None], (1, len(piece)))
    keys = np.stack([place, np.zeros_like(place)], axis=-1).astype(np.int32)[None]
    return Loop(tile, (size,), np.repeat(queries, count, axis=0), keys, masks, mask)


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
