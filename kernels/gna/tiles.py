"""Windows and tiles: which keys a query sees, what tiles meet, and which tiles cost least.

Generalized Neighborhood Attention (arXiv 2504.16922) is an AND of independent one-dimensional
windows. A dimension of `length` tokens with dilation d falls into d groups, x = i*d + g, that
never see each other; inside a group, runs of `stride` queries share the window of their leader.
So everything is counted one dimension at a time, and counts of several dimensions multiply. All of
it is plain numpy on static arguments, and shared by the backends and the simulator.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Bool, Int

Number = int | Int[np.ndarray, "..."]


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """The window of one dimension.

    Attributes:
      length: tokens along the dimension.
      kernel_size: keys a query sees (at most, if causal).
      stride: neighboring queries that share a window; 1 is a sliding window.
      dilation: distance between the keys of a window.
      is_causal: whether a query sees no key behind itself.
    """

    length: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False

    def group_lengths(self) -> tuple[int, ...]:
        """Tokens of each dilation group: ceil((length - g) / dilation)."""
        return tuple(-(-(self.length - g) // self.dilation) for g in range(self.dilation))

    def bounds(
        self, length: int, queries: Int[np.ndarray, " Q"] | None = None
    ) -> tuple[Int[np.ndarray, " Q"], Int[np.ndarray, " Q"]]:
        """First key and one past the last key of queries in a group of `length` tokens.

        `queries` are in-group positions, by default all; positions past the end are taken for the
        last query's.
        """
        i = np.arange(length) if queries is None else queries
        return bounds(i, length, self.kernel_size, self.stride, self.is_causal)

    def mask(self, queries: Int[np.ndarray, " Q"] | None = None) -> Bool[np.ndarray, "Q length"]:
        """mask[i, j]: whether query i sees key j; `queries` are positions, by default all."""
        x = np.arange(self.length)
        i = x if queries is None else queries
        group = i % self.dilation
        length = _ceil_div(self.length - group, self.dilation)
        start, end = bounds(
            i // self.dilation, length, self.kernel_size, self.stride, self.is_causal
        )
        j = x // self.dilation
        inside = (j >= start[:, None]) & (j < end[:, None])
        return inside & (x % self.dilation == group[:, None])

    def is_dense(self) -> bool:
        """Whether every query sees every key."""
        return self.kernel_size == self.length and self.dilation == 1 and not self.is_causal


@dataclasses.dataclass(frozen=True, slots=True)
class Visits:
    """The key tiles that each query tile of one dilation group visits, along one dimension.

    A query tile visits key tiles `first` <= tile < `last`; of these, `free_first` <= tile <
    `free_last` need no mask (an empty range where none does). Arrays [..., query tiles].
    """

    first: Int[np.ndarray, "..."]
    last: Int[np.ndarray, "..."]
    free_first: Int[np.ndarray, "..."]
    free_last: Int[np.ndarray, "..."]


def visits(
    window: Window, length: int, query_tile: int, key_tile: int, *, dynamic: bool = False
) -> Visits:
    """Tiles met along one dimension of a group of `length` tokens, its end padded to whole tiles.

    `dynamic` key tiles start at the first key that a query tile sees, and are counted from there,
    instead of lying on a grid.
    """
    tiles = np.arange(-(-length // query_tile))
    seen = window.kernel_size, window.stride, window.is_causal
    return tile_visits(tiles, length, *seen, query_tile, key_tile, dynamic=dynamic)


def bounds(
    queries: Int[np.ndarray, "..."],
    length: Number,
    kernel_size: Number,
    stride: Number,
    causal: bool,
) -> tuple[Int[np.ndarray, "..."], Int[np.ndarray, "..."]]:
    """`Window.bounds` for many windows at once: all arguments broadcast."""
    i = np.minimum(queries, length - 1)
    if causal:
        leader = np.minimum(i // stride * stride + stride - 1, length - 1)
        return np.maximum(leader - kernel_size + 1, 0), i + 1
    leader = np.minimum(i // stride * stride + stride // 2, length - 1)
    start = np.clip(leader - kernel_size // 2, 0, length - kernel_size)
    return start, start + kernel_size


def tile_visits(
    tiles: Int[np.ndarray, "..."],
    length: int,
    kernel_size: Number,
    stride: Number,
    causal: bool,
    query_tile: int,
    key_tile: int,
    *,
    dynamic: bool = False,
) -> Visits:
    """`visits` for query tiles `tiles` of many windows at once: all arguments broadcast.

    Query tiles past the end behave as the last query.
    """
    firsts = tiles * query_tile
    first = bounds(firsts, length, kernel_size, stride, causal)
    last = bounds(firsts + query_tile - 1, length, kernel_size, stride, causal)
    return _visits_between(first, last, key_tile, dynamic=dynamic, free_end=length)


def _visits_between(
    first: tuple[Int[np.ndarray, "..."], Int[np.ndarray, "..."]],
    last: tuple[Int[np.ndarray, "..."], Int[np.ndarray, "..."]],
    size: int,
    *,
    dynamic: bool,
    free_end: int = -1,
) -> Visits:
    """Tiles of `size` that those meet whose first and last tokens have these bounds.

    Past `free_end` there is nothing to mask but padding.
    """
    origin = first[0] if dynamic else 0
    # Starts and ends never decrease, so a tile's first query sees the first key and its last one
    # the last, and keys that all of them see lie between the last start and the first end.
    free_first = _ceil_div(last[0] - origin, size)
    end = first[1] - origin
    free_last = np.where(first[1] == free_end, _ceil_div(end, size), end // size)
    return Visits(
        (first[0] - origin) // size,
        _ceil_div(last[1] - origin, size),
        free_first,
        np.maximum(free_last, free_first),
    )


def _ceil_div(a: Int[np.ndarray, "..."], b: int) -> Int[np.ndarray, "..."]:
    return -(-a // b)


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


# Choosing


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """One dimension in tiles of `own` tokens; counts are of all dilation groups together.

    Attributes:
      own: tokens of a tile.
      seen: tokens of a step, of what a tile visits.
      tiles: how many tiles there are.
      met: tokens that tiles visit, counted for each tile.
      steps: what they are worked on in, such as visited tiles.
      free: steps without a mask.
    """

    own: int
    seen: int
    tiles: int
    met: int
    steps: int
    free: int


def cut(window: Window, own: int, seen: int = 1, *, inverse: bool = False) -> Cut:
    """A dimension in tiles whose visited ones begin with the first token that they meet.

    Own tiles are of queries, visited ones of keys; with `inverse` it is the other way round.
    """
    tiles = met = steps = free = 0
    for length, groups in zip(*np.unique(window.group_lengths(), return_counts=True), strict=True):
        start, end = window.bounds(int(length))
        if inverse:  # both never decrease
            keys = np.arange(length)
            start, end = np.searchsorted(end, keys, "right"), np.searchsorted(start, keys, "right")
        head = np.arange(0, length, own)
        tail = np.minimum(head + own, length) - 1
        found = _visits_between(
            (start[head], end[head]), (start[tail], end[tail]), seen, dynamic=True
        )
        tiles += int(groups) * len(head)
        met += int(groups) * int((end[tail] - start[head]).sum())
        steps += int(groups) * int(found.last.sum())
        free += int(groups) * int((found.free_last - found.free_first).sum())
    return Cut(own, seen, tiles, met, steps, free)


@dataclasses.dataclass(frozen=True, slots=True)
class Costs:
    """What tiles cost, in a unit of each backend's own.

    Attributes:
      start: starting a tile and writing its results.
      met: each token that a tile meets.
      step: each step.
      mask: what a mask adds to a step, as a share of it.
    """

    start: int | float = 0
    met: int | float = 0
    step: int | float = 0
    mask: int | float = 0

    def of(self, cuts: tuple[Cut, ...]) -> int | float:
        """The cost of the dimensions' cuts together."""
        tiles = met = steps = free = 1
        for one in cuts:
            tiles, met = tiles * one.tiles, met * one.met
            steps, free = steps * one.steps, free * one.free
        return (
            self.start * tiles + self.met * met + self.step * (steps + self.mask * (steps - free))
        )


def cheapest(
    choices: Iterable[tuple[Cut, ...]],
    costs: Costs,
    weight: Callable[[int], float] = lambda tokens: 1.0,
) -> tuple[Cut, ...]:
    """The choice of one cut along each dimension that costs least; of equal ones the first.

    `weight` multiplies the cost of tiles of so many tokens in all; infinity is for too large ones.
    """

    def cost(cuts: tuple[Cut, ...]) -> int | float:
        worth = weight(math.prod(one.own for one in cuts))
        return worth if worth == math.inf else worth * costs.of(cuts)

    return min(choices, key=cost)


def sizes_up_to(most: int, extra: Iterable[int] = ()) -> list[int]:
    """Tile sizes worth trying along a dimension: powers of two, the `extra` ones, and `most`."""
    powers = (1 << n for n in range(most.bit_length()))
    return sorted(size for size in {*powers, *extra, most} if size <= most)


def shapes_of(tokens: int, rank: int) -> list[tuple[int, ...]]:
    """Tile shapes of so many tokens, a power of two, whose sides are powers of two."""
    sides = [1 << n for n in range(tokens.bit_length())]
    shapes = itertools.product(sides, repeat=rank)
    return [shape for shape in shapes if math.prod(shape) == tokens]
