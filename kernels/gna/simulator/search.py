"""Search over all windows and strides for those that pay, one dimension at a time.

Pairs, visited tiles and mask-free tiles are products over the dimensions. So each dimension is
tabulated over all its windows and strides, its hopeless rows dropped, and the rest multiplied out,
a part at a time, of which only what nothing beats is kept.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from ..problem import windows_of
from ..tiles import Window, bounds, tile_visits
from .schedule import Gpu, Tiles, find_gpu, tile_options

# Up to here every window is tried; longer dimensions take windows of whole key tiles.
ALL_WINDOWS = 512
# Up to here every stride of every window is tried; beyond, 1 and those of whole query tiles.
ALL_ROWS = 1 << 17
# Up to here all products of the dimensions' rows are tried, beyond, the same is left out in all
# dimensions: first strides, then windows.
ALL_PRODUCTS = 1 << 26
# So many products are looked at together, some 100 bytes each.
CHUNK = 1 << 20
# So many rows of a dimension are compared together with all that are kept.
ROWS = 1 << 10


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """A window, a stride and tile shapes, and what they give.

    Attributes:
      kernel_size, stride: per dimension.
      query_tile, key_tile: tile shapes.
      sparsity: share of the pairs that do not attend.
      flop_speedup: dense pairs over attending pairs, the bound.
      tile_speedup: dense tiles over visited tiles.
      worst_tile_speedup: the same of the query tile that visits most.
      speedup: the same with the time that masks take counted in.
      block_sparse: whether no tile needs a mask.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    query_tile: tuple[int, ...]
    key_tile: tuple[int, ...]
    sparsity: float
    flop_speedup: float
    tile_speedup: float
    worst_tile_speedup: float
    speedup: float
    block_sparse: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """Counts along one dimension, a row for each window and stride."""

    kernel_size: Int[np.ndarray, " rows"]
    stride: Int[np.ndarray, " rows"]
    pairs: Int[np.ndarray, " rows"]
    visited: Int[np.ndarray, " rows"]
    free: Int[np.ndarray, " rows"]
    most: Int[np.ndarray, " rows"]  # visited by one query tile

    def take(self, rows: Int[np.ndarray, " taken"] | Bool[np.ndarray, " rows"]) -> "Table":
        """Some of the rows."""
        return Table(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


def search(
    token_layout: Sequence[int],
    *,
    kernel_size: int | Sequence[int] | None = None,
    sparsity: float | None = None,
    tolerance: float = 0.01,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    query_tile: int | Sequence[int] | None = None,
    key_tile: int | Sequence[int] | None = None,
    block_sparse: bool = False,
    gpu: str | Gpu = "h200",
) -> tuple[Choice, ...]:
    """The choices that no other choice beats in sparsity, speed-up and fineness of stride at once.

    Less sparsity keeps more of the attention, and a smaller product of strides treats tokens more
    alike; both cost speed. The fastest choice comes first.

    Every window and stride is tried, but for layouts so large that this takes too long (a dimension
    of more than 512 tokens, or some hundred million combinations): there strides are 1 or whole
    query tiles, and windows, where that does not suffice, whole key tiles.

    Args:
      token_layout: tokens along each of one to three dimensions.
      kernel_size: a window whose strides to search; otherwise all windows are searched.
      sparsity: share of pairs that must not attend, within `tolerance`; needed unless the window is
        given.
      dilation, is_causal: per dimension, as in `neighborhood_attention`.
      query_tile, key_tile: tile shapes; by default all that kernels on the GPU offer.
      block_sparse: whether to leave out everything that needs masks.
      gpu: a name from `GPUS` or constants of your own: for tile shapes and the cost of a mask.

    Raises:
      ValueError: an argument is out of range, both or neither of window and sparsity are given, or
        nothing fits.
    """
    if (kernel_size is None) == (sparsity is None):
        raise ValueError(
            f"search needs either kernel_size or sparsity, received {kernel_size} and {sparsity}."
        )
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and below 1, received {sparsity}.")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative, received {tolerance}.")
    window = 1 if kernel_size is None else kernel_size
    windows = windows_of(token_layout, window, 1, dilation, is_causal)
    machine = find_gpu(gpu)
    every_window = kernel_size is None
    pairs = math.prod(token_layout) ** 2
    band = (0.0, math.inf)
    if sparsity is not None:
        band = ((1 - sparsity - tolerance) * pairs, (1 - sparsity + tolerance) * pairs)
    # More pairs in a dimension may leave the band; without one they are only better.
    alike = "kernel_size" if sparsity is None else "pairs"
    pool: list[Choice] = []
    for tiles in tile_options(machine, len(windows), query_tile, key_tile):
        tables: list[Table] = []
        for thin in range(3):
            tables = [
                _undominated(
                    tabulate(window, query, key, every_window=every_window, thin=thin),
                    block_sparse,
                    alike,
                )
                for window, query, key in zip(windows, *tiles, strict=True)
            ]
            if _expected(tables, band) <= ALL_PRODUCTS:
                break
        pool += _best(token_layout, tiles, tables, band, machine.mask)
    if not pool:
        asked = "the window" if sparsity is None else f"a sparsity of {sparsity} ± {tolerance}"
        raise ValueError(
            f"nothing fits {asked}{' without masks' if block_sparse else ''} on a layout of "
            f"{tuple(token_layout)}; allow more tolerance, masks, or other tiles."
        )
    keep = _pareto(
        np.array([choice.speedup for choice in pool]),
        np.array([-choice.sparsity for choice in pool]),
        np.array([math.prod(choice.stride) for choice in pool]),
    )
    return tuple(sorted((pool[n] for n in keep), key=lambda choice: -choice.speedup))


def tabulate(
    window: Window, query_tile: int, key_tile: int, *, every_window: bool = True, thin: int = 0
) -> Table:
    """Counts along one dimension for all strides of the given window, or of every window.

    `window` gives length, dilation, causality and, unless `every_window`, its size. From `thin` 1
    on strides are 1 or whole query tiles, with 2 every window is one of whole key tiles.
    """
    longest = window.length // window.dilation
    if not every_window:
        sizes = np.array([window.kernel_size])
    elif longest <= ALL_WINDOWS and thin < 2:
        sizes = np.arange(min(2, longest), longest + 1)
    else:
        sizes = np.union1d(np.arange(key_tile, longest, key_tile), longest)
    if sizes.sum() <= ALL_ROWS and thin < 1:
        strides = np.arange(1, sizes.max() + 1)
    else:
        strides = np.union1d(1, np.arange(query_tile, sizes.max() + 1, query_tile))
    row, column = np.nonzero(strides <= sizes[:, None])
    kernel_size, stride = sizes[row], strides[column]
    pairs, visited, free, most = np.zeros((4, len(row)), int)
    for length, groups in Counter(window.group_lengths()).items():
        tiles, queries = np.arange(-(-length // query_tile)), np.arange(length)
        for some in _chunks(len(row), length if window.is_causal else len(tiles)):
            sizes_, strides_ = kernel_size[some, None], stride[some, None]
            found = tile_visits(
                tiles, length, sizes_, strides_, window.is_causal, query_tile, key_tile
            )
            visits = found.last - found.first
            visited[some] += groups * visits.sum(axis=1)
            most[some] = np.maximum(most[some], visits.max(axis=1))
            free[some] += groups * (found.free_last - found.free_first).sum(axis=1)
            if window.is_causal:
                start, end = bounds(queries, length, sizes_, strides_, True)
                pairs[some] += groups * (end - start).sum(axis=1)
            else:
                pairs[some] += groups * length * kernel_size[some]
    return Table(kernel_size, stride, pairs, visited, free, most)


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of the rows such that an array [rows, columns] of each stays small."""
    size = max(1, (1 << 21) // columns)
    return (slice(first, first + size) for first in range(0, rows, size))


def _undominated(table: Table, block_sparse: bool, alike: str) -> Table:
    """Without the rows that a row beats which has as fine a stride and as many pairs.

    Only rows are compared that are `alike` in "kernel_size", or in "pairs".
    """
    if block_sparse:
        table = table.take(table.visited == table.free)
    table = table.take(np.lexsort((table.kernel_size, table.stride)))
    # Of equal counts, keep the finest stride.
    group = getattr(table, alike)
    counts = np.stack([group, table.pairs, table.visited, table.free])
    table = table.take(np.sort(np.unique(counts, axis=1, return_index=True)[1]))
    group = getattr(table, alike)
    keep = np.ones(len(group), bool)
    order = np.argsort(group, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        kept = rows[:0]
        for first in range(0, len(rows), ROWS):  # all at once would be quadratic in memory
            some = rows[first : first + ROWS]
            rivals = np.concatenate([kept, some])
            better = table.visited[rivals] <= table.visited[some, None]
            better &= table.free[rivals] >= table.free[some, None]
            better &= table.pairs[rivals] >= table.pairs[some, None]
            keep[some] = ~np.tril(better, len(kept) - 1).any(axis=1)  # of those before it
            kept = rivals[keep[rivals]]
    return table.take(keep)


def _best(
    token_layout: Sequence[int],
    tiles: Tiles,
    tables: Sequence[Table],
    band: tuple[float, float],
    mask: float,
) -> list[Choice]:
    """The undominated products of rows whose pairs lie in the band."""
    query_size, key_size = map(math.prod, tiles)
    tokens = math.prod(token_layout)
    dense = -(-tokens // query_size) * -(-tokens // key_size)

    def counts(name: str, rows: Int[np.ndarray, "dims points"]) -> Int[np.ndarray, " points"]:
        each = (getattr(table, name)[row] for table, row in zip(tables, rows, strict=True))
        return functools.reduce(np.multiply, each)

    def values(rows: Int[np.ndarray, "dims points"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        visited, free = counts("visited", rows), counts("free", rows)
        speedup = dense / (visited + mask * (visited - free))
        return speedup, counts("pairs", rows), counts("stride", rows)

    front = np.zeros((len(tables), 0), int)
    for rows in _products(tables, band):
        rows = rows[:, ~_reached(values(front), values(rows))]
        if rows.size:
            rows = np.concatenate([front, rows], axis=1)
            front = rows[:, _pareto(*values(rows))]
    picked = [table.take(row) for table, row in zip(tables, front, strict=True)]
    names = ("visited", "free", "pairs", "most")
    visited, free, pairs, most = (counts(name, front) for name in names)
    return [
        Choice(
            kernel_size=tuple(int(table.kernel_size[n]) for table in picked),
            stride=tuple(int(table.stride[n]) for table in picked),
            query_tile=tiles[0],
            key_tile=tiles[1],
            sparsity=1 - int(pairs[n]) / tokens**2,
            flop_speedup=tokens**2 / int(pairs[n]),
            tile_speedup=dense / int(visited[n]),
            worst_tile_speedup=-(-tokens // key_size) / int(most[n]),
            speedup=float(speedup),
            block_sparse=bool(visited[n] == free[n]),
        )
        for n, speedup in enumerate(values(front)[0])
    ]


def _expected(tables: Sequence[Table], band: tuple[float, float]) -> float:
    """About how many products of rows have pairs in the band: told from some of them."""
    combinations = math.prod(len(table.stride) for table in tables[:-1])
    some = np.unique(np.linspace(0, combinations, 4096, endpoint=False).astype(int))
    if not combinations:
        return 0.0
    low, high = _runs(tables, band, _heads(tables, some))
    return float((high - low).mean()) * combinations


def _heads(
    tables: Sequence[Table], numbers: Int[np.ndarray, " heads"]
) -> tuple[Int[np.ndarray, " heads"], ...]:
    """The rows of all dimensions but the last that combinations, counted through, consist of."""
    return np.unravel_index(numbers, (1, *(len(table.stride) for table in tables[:-1])))[1:]


def _runs(
    tables: Sequence[Table], band: tuple[float, float], heads: Sequence[Int[np.ndarray, " heads"]]
) -> tuple[Int[np.ndarray, " heads"], Int[np.ndarray, " heads"]]:
    """Which of the last dimension's rows, sorted by pairs, bring each of the others' products into
    the band: from where and to where.
    """
    pairs = functools.reduce(
        np.multiply,
        (table.pairs[row] for table, row in zip(tables[:-1], heads, strict=True)),
        np.ones(1),
    )
    last = np.sort(tables[-1].pairs)
    low = np.searchsorted(last, band[0] / pairs * (1 - 1e-12), "left")
    return low, np.searchsorted(last, band[1] / pairs * (1 + 1e-12), "right")


def _products(
    tables: Sequence[Table], band: tuple[float, float]
) -> Iterator[Int[np.ndarray, "dims products"]]:
    """Row numbers per table of all products of rows whose pairs lie in the band, in parts."""
    order = np.argsort(tables[-1].pairs, kind="stable")
    combinations = math.prod(len(table.stride) for table in tables[:-1])
    for first in range(0, combinations, CHUNK):
        heads = _heads(tables, np.arange(first, min(first + CHUNK, combinations)))
        low, high = _runs(tables, band, heads)
        number = high - low
        before = np.cumsum(number) - number
        parts = np.searchsorted(before, np.arange(CHUNK, number.sum(), CHUNK))
        for part in np.split(np.arange(len(number)), parts):
            times, start = number[part], low[part]
            within = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
            last = order[np.repeat(start, times) + within]
            yield np.stack([*(np.repeat(row[part], times) for row in heads), last])


def _reached(
    front: tuple[np.ndarray, np.ndarray, np.ndarray],
    points: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> Bool[np.ndarray, " points"]:
    """Whether a point of the front is as good in speed-up, pairs and coarseness, point by point."""
    levels, row = np.unique(front[2], return_inverse=True)
    marks, column = np.unique(front[1], return_inverse=True)
    # best[i, j]: the highest speed-up at most as coarse as level i and with pairs from mark j on;
    # the last row and column are for points that nobody can reach.
    best = np.full((len(levels) + 1, len(marks) + 1), -np.inf)
    np.maximum.at(best, (row, column), front[0])
    best[:-1] = np.maximum.accumulate(best[:-1], axis=0)
    best[:, :-1] = np.maximum.accumulate(best[:, -2::-1], axis=1)[:, ::-1]
    speedup, pairs, coarseness = points
    level = np.searchsorted(levels, coarseness, "right") - 1
    return best[level, np.searchsorted(marks, pairs, "left")] >= speedup


def _pareto(
    speedup: Float[np.ndarray, " points"],
    pairs: Float[np.ndarray, " points"] | Int[np.ndarray, " points"],
    coarseness: Int[np.ndarray, " points"],
) -> Int[np.ndarray, " kept"]:
    """Points that no other reaches in speed-up and pairs at the same or a smaller coarseness."""
    kept: list[np.ndarray] = []
    # The best found at finer strides: speed-ups falling, pairs rising.
    best_speedup, best_pairs = np.array([]), np.array([])
    order = np.lexsort((-pairs, -speedup, coarseness))
    starts = np.flatnonzero(np.diff(coarseness[order], prepend=-1))
    for points in np.split(order, starts[1:]):
        # Fastest first: a point survives if it has more pairs than all before it.
        before = np.maximum.accumulate(np.concatenate([[-np.inf], pairs[points][:-1]]))
        points = points[pairs[points] > before]
        at = np.searchsorted(-best_speedup, -speedup[points], "right") - 1
        rivals = np.concatenate([best_pairs, [-np.inf]])[at]  # -1 is nobody
        points = points[pairs[points] > rivals]
        kept.append(points)
        merged = np.concatenate([best_speedup, speedup[points]])
        merged_pairs = np.concatenate([best_pairs, pairs[points]])
        front = np.lexsort((-merged_pairs, -merged))
        best_speedup = merged[front]
        best_pairs = np.maximum.accumulate(merged_pairs[front])
    return np.concatenate(kept) if kept else np.array([], int)
