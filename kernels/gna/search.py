"""Which windows and strides pay: a search over all of them, one dimension at a time.

Pairs, visited tiles and mask-free tiles are products over the dimensions. So each dimension is
tabulated over all its windows and strides, its hopeless rows dropped, and the rest multiplied out.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from .problem import windows_of
from .schedule import Gpu, Tiles, find_gpu, tile_options
from .windows import Window, bounds, tile_visits

# Up to here every window is tried; longer dimensions take windows of whole key tiles.
ALL_WINDOWS = 512
# Up to here every stride of every window is tried; beyond, 1 and those of whole query tiles.
ALL_ROWS = 1 << 17


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """A window, a stride and tile shapes, and what they give.

    Attributes:
      kernel_size, stride: per dimension.
      query_tile, key_tile: tile shapes.
      sparsity: share of the pairs that do not attend.
      flop_speedup: dense pairs over attending pairs, the bound.
      tile_speedup: dense tiles over visited tiles.
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
    if sparsity is not None and not (0 <= sparsity < 1 and tolerance >= 0):
        raise ValueError(
            f"sparsity must be at least 0 and below 1 and tolerance not negative, received "
            f"{sparsity} and {tolerance}."
        )
    window = 1 if kernel_size is None else kernel_size
    windows = windows_of(token_layout, window, 1, dilation, is_causal)
    machine = find_gpu(gpu)
    every_window = kernel_size is None
    pairs = math.prod(token_layout) ** 2
    band = (0.0, math.inf)
    if sparsity is not None:
        band = ((1 - sparsity - tolerance) * pairs, (1 - sparsity + tolerance) * pairs)
    pool: list[Choice] = []
    for tiles in tile_options(machine, len(windows), query_tile, key_tile):
        tables = [
            _undominated(tabulate(window, query, key, every_window=every_window), block_sparse)
            for window, query, key in zip(windows, *tiles, strict=True)
        ]
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


def tabulate(window: Window, query_tile: int, key_tile: int, *, every_window: bool = True) -> Table:
    """Counts along one dimension for all strides of the given window, or of every window.

    `window` gives length, dilation, causality and, unless `every_window`, its size.
    """
    longest = window.length // window.dilation
    if not every_window:
        sizes = np.array([window.kernel_size])
    elif longest <= ALL_WINDOWS:
        sizes = np.arange(min(2, longest), longest + 1)
    else:
        sizes = np.union1d(np.arange(key_tile, longest, key_tile), longest)
    if sizes.sum() <= ALL_ROWS:
        strides = np.arange(1, sizes.max() + 1)
    else:
        strides = np.union1d(1, np.arange(query_tile, sizes.max() + 1, query_tile))
    row, column = np.nonzero(strides <= sizes[:, None])
    kernel_size, stride = sizes[row], strides[column]
    pairs, visited, free = np.zeros((3, len(row)), int)
    for length, groups in Counter(window.group_lengths()).items():
        tiles, queries = np.arange(-(-length // query_tile)), np.arange(length)
        for some in _chunks(len(row), length if window.is_causal else len(tiles)):
            sizes_, strides_ = kernel_size[some, None], stride[some, None]
            found = tile_visits(
                tiles, length, sizes_, strides_, window.is_causal, query_tile, key_tile
            )
            visited[some] += groups * (found.last - found.first).sum(axis=1)
            free[some] += groups * (found.free_last - found.free_first).sum(axis=1)
            if window.is_causal:
                start, end = bounds(queries, length, sizes_, strides_, True)
                pairs[some] += groups * (end - start).sum(axis=1)
            else:
                pairs[some] += groups * length * kernel_size[some]
    return Table(kernel_size, stride, pairs, visited, free)


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of the rows such that an array [rows, columns] of each stays small."""
    size = max(1, (1 << 21) // columns)
    return (slice(first, first + size) for first in range(0, rows, size))


def _undominated(table: Table, block_sparse: bool) -> Table:
    """Without the rows that a finer stride of the same window beats in both counts."""
    if block_sparse:
        table = table.take(table.visited == table.free)
    # Of equal counts, keep the finest stride: rows come in its order.
    counts = np.stack([table.kernel_size, table.visited, table.free])
    table = table.take(np.sort(np.unique(counts, axis=1, return_index=True)[1]))
    keep = np.zeros(len(table.stride), bool)
    for size in np.unique(table.kernel_size):
        rows = np.flatnonzero(table.kernel_size == size)
        visited, free = table.visited[rows], table.free[rows]
        better = (visited <= visited[:, None]) & (free >= free[:, None])
        keep[rows] = ~np.tril(better, -1).any(axis=1)
    return table.take(keep)


def _best(
    token_layout: Sequence[int],
    tiles: Tiles,
    tables: Sequence[Table],
    band: tuple[float, float],
    mask: float,
) -> list[Choice]:
    """The undominated products of rows whose pairs lie in the band."""
    rows = _products(tables, band)
    picked = [table.take(row) for table, row in zip(tables, rows, strict=True)]
    pairs, visited, free, coarseness = (
        np.prod([getattr(table, name) for table in picked], axis=0)
        for name in ("pairs", "visited", "free", "stride")
    )
    query_size, key_size = map(math.prod, tiles)
    tokens = math.prod(token_layout)
    dense = -(-tokens // query_size) * -(-tokens // key_size)
    speedup = dense / (visited + mask * (visited - free))
    return [
        Choice(
            kernel_size=tuple(int(table.kernel_size[n]) for table in picked),
            stride=tuple(int(table.stride[n]) for table in picked),
            query_tile=tiles[0],
            key_tile=tiles[1],
            sparsity=1 - int(pairs[n]) / tokens**2,
            flop_speedup=tokens**2 / int(pairs[n]),
            tile_speedup=dense / int(visited[n]),
            speedup=float(speedup[n]),
            block_sparse=bool(visited[n] == free[n]),
        )
        for n in _pareto(speedup, pairs, coarseness)
    ]


def _products(
    tables: Sequence[Table], band: tuple[float, float]
) -> list[Int[np.ndarray, " products"]]:
    """Row numbers per table of all products of rows whose pairs lie in the band."""
    *heads, last = tables
    order = np.argsort(last.pairs, kind="stable")
    rows = [index.ravel() for index in np.indices([len(table.stride) for table in heads])]
    pairs = functools.reduce(
        np.multiply, (table.pairs[row] for table, row in zip(heads, rows, strict=True)), np.ones(1)
    )
    # Of the last dimension, sorted by pairs, each product of the others takes one run.
    low = np.searchsorted(last.pairs[order], band[0] / pairs * (1 - 1e-12), "left")
    high = np.searchsorted(last.pairs[order], band[1] / pairs * (1 + 1e-12), "right")
    counts = high - low
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return [*(np.repeat(row, counts) for row in rows), order[np.repeat(low, counts) + within]]


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
