"""Simulator: what Generalized Neighborhood Attention can gain, counted exactly and without a GPU.

Sparse attention saves whole tiles of query-key pairs, not single pairs. The simulator counts the
key tiles that each query tile visits and those among them that need no mask, and schedules the
blocks on a GPU. docs/gna_simulator.md compares it with published timings (arXiv 2504.16922).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

from ..problem import windows_of
from ..tiles import Window, visits
from .schedule import Blocks, Gpu, end_to_end_speedup, find_gpu, tile_options

Tiling = Literal["permuted", "fused", "single-dim"]
BYTES = 2  # of an element: fp16 and bf16


@dataclasses.dataclass(frozen=True, slots=True)
class Simulation:
    """Counts for one head of one batch entry, and times for the whole call.

    Attributes:
      windows: one per dimension.
      query_tile, key_tile: tokens of a tile along each dimension (one number if single-dim).
      tiling: how tokens come into tiles.
      batch, heads, kv_heads, head_dim: of the call.
      additional: tokens beside the layout (text) that every query sees.
      gpu: what the times were predicted for.
      pairs: query-key pairs that attend.
      dense_pairs: pairs of dense attention over the same tokens.
      query_tiles: query tiles launched, padding included.
      dense_tiles: tile pairs that dense attention visits.
      visited_tiles: tile pairs with at least one attending pair.
      free_tiles: of these, tile pairs that need no mask (but for keys past the end).
      block_sparse: whether no window needs a mask anywhere.
      visited_per_tile, free_per_tile: the same per query tile [dilation groups, query tiles],
        row-major; without additional tokens.
      makespan, dense_makespan: seconds of computation, sparse and dense with the same kernel.
      memory_floor: seconds to read and write queries, keys, values and outputs once.
      permutation: seconds to bring tokens into tiles and back.
    """

    windows: tuple[Window, ...]
    query_tile: tuple[int, ...]
    key_tile: tuple[int, ...]
    tiling: Tiling
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    additional: int
    gpu: Gpu
    pairs: int
    dense_pairs: int
    query_tiles: int
    dense_tiles: int
    visited_tiles: int
    free_tiles: int
    block_sparse: bool
    visited_per_tile: Int[np.ndarray, "G T"] = dataclasses.field(compare=False, repr=False)
    free_per_tile: Int[np.ndarray, "G T"] = dataclasses.field(compare=False, repr=False)
    blocks: Blocks = dataclasses.field(compare=False, repr=False)
    dense_blocks: Blocks = dataclasses.field(compare=False, repr=False)
    makespan: float
    dense_makespan: float
    memory_floor: float
    permutation: float

    @property
    def sparsity(self) -> float:
        """Share of the pairs that do not attend."""
        return 1 - self.pairs / self.dense_pairs

    @property
    def flop_speedup(self) -> float:
        """The bound: dense pairs over attending pairs."""
        return self.dense_pairs / self.pairs

    @property
    def tile_speedup(self) -> float:
        """What whole tiles leave of it, on average: dense tiles over visited tiles."""
        return self.dense_tiles / self.visited_tiles

    @property
    def mean_visits(self) -> float:
        """Key tiles that a query tile of the layout visits: the mean of those that hold tokens."""
        visits = self.visited_per_tile[self.visited_per_tile > 0]
        return float(visits.mean()) + self._additional_tiles

    @property
    def worst_visits(self) -> int:
        """The same of the query tile that visits most."""
        return int(self.visited_per_tile.max()) + self._additional_tiles

    @property
    def all_visits(self) -> int:
        """Key tiles that a query tile of dense attention visits."""
        tokens = math.prod(window.length for window in self.windows)
        return -(-(tokens + self.additional) // math.prod(self.key_tile))

    @property
    def worst_tile_speedup(self) -> float:
        """The tile-aware speed-up of the query tile that visits most, as NATTENSim counts it."""
        return self.all_visits / self.worst_visits

    @property
    def _additional_tiles(self) -> int:
        return -(-self.additional // math.prod(self.key_tile))

    @property
    def bound_share(self) -> float:
        """Tile-aware over FLOP-wise speed-up; above 1 only where tiles pad dense attention more."""
        return self.tile_speedup / self.flop_speedup

    @property
    def free_share(self) -> float:
        """Share of the visited tiles that need no mask."""
        return self.free_tiles / self.visited_tiles

    @property
    def flops(self) -> int:
        """Operations of the forward pass on attending pairs, whole call; backward takes 2.5 x."""
        return 4 * self.head_dim * self.pairs * self.batch * self.heads

    @property
    def tile_flops(self) -> int:
        """Operations of the forward pass on all pairs of visited tiles, whole call."""
        area = math.prod(self.query_tile) * math.prod(self.key_tile)
        return 4 * self.head_dim * self.visited_tiles * area * self.batch * self.heads

    @property
    def seconds(self) -> float:
        """Predicted time of the sparse kernel, without permutation."""
        return max(self.makespan, self.memory_floor)

    @property
    def dense_seconds(self) -> float:
        """Predicted time of dense attention with the same kernel."""
        return max(self.dense_makespan, self.memory_floor)

    @property
    def waves(self) -> int:
        """How often the blocks fill the GPU, the last time perhaps in part."""
        return -(
            -self.query_tiles * self.batch * self.heads // (self.gpu.processors * self.gpu.slots)
        )

    @property
    def wave_speedup(self) -> float:
        """Predicted speed-up of the kernel over dense attention with the same kernel."""
        return self.dense_seconds / self.seconds

    @property
    def speedup(self) -> float:
        """The same with token permutation counted in."""
        return self.dense_seconds / (self.seconds + self.permutation)

    def end_to_end(self, attention_share: float, replaced: float = 1.0) -> float:
        """Speed-up of a model that spends `attention_share` of its time in dense attention like
        this, when a share `replaced` of the calls becomes this problem (permuted on each call).
        """
        return end_to_end_speedup(
            attention_share,
            self.seconds / self.dense_seconds,
            replaced=replaced,
            permutation=replaced * self.permutation / self.dense_seconds,
        )


def simulate(
    token_layout: Sequence[int],
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    query_tile: int | Sequence[int] | None = None,
    key_tile: int | Sequence[int] | None = None,
    tiling: Tiling = "permuted",
    batch: int = 1,
    heads: int = 1,
    kv_heads: int | None = None,
    head_dim: int = 128,
    additional: int = 0,
    additional_queries: bool = False,
    mask_every_tile: bool = False,
    gpu: str | Gpu = "h200",
) -> Simulation:
    """Count the tiles of a problem and predict its forward pass.

    Args:
      token_layout: tokens along each of one to three dimensions.
      kernel_size, stride, dilation, is_causal: as in `neighborhood_attention`.
      query_tile, key_tile: tile shapes; by default those of the GPU's that visit fewest pairs.
      tiling: "permuted" tiles lie on a grid of the layout; with "fused" the key tiles start at each
        query tile's first key; "single-dim" tiles are runs of the flattened tokens.
      batch, heads, kv_heads, head_dim: of the call; `kv_heads` is `heads` unless given.
      additional: tokens that every query sees beside its window.
      additional_queries: whether these tokens are queries too, which see everything (the joint
        attention of MMDiT models).
      mask_every_tile: mask all visited tiles unless the problem is block-sparse, as NATTEN does,
        instead of those that need it.
      gpu: a name from `GPUS`, or constants fitted to your own runs (`fit`).

    Raises:
      ValueError: an argument is out of range, or the layout, windows and tiles do not match.
    """
    windows = windows_of(token_layout, kernel_size, stride, dilation, is_causal)
    kv_heads = heads if kv_heads is None else kv_heads
    _check(tiling, additional, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    machine = find_gpu(gpu)
    rank = 1 if tiling == "single-dim" else len(windows)
    options = tile_options(machine, rank, query_tile, key_tile)
    # Of equal counts the first offer wins.
    best = min(
        options, key=lambda tiles: count_tiles(windows, *tiles, tiling)[0].sum() * _area(*tiles)
    )
    visited, free = count_tiles(windows, *best, tiling)
    tokens = math.prod(window.length for window in windows)
    query_size, key_size = map(math.prod, best)
    everything = tokens + additional
    queries = everything if additional_queries else tokens
    dense_row = -(-everything // key_size)

    # A row per block: key tiles visited, and those among them without a mask.
    extra, extra_masked = -(-additional // key_size), additional % key_size > 0
    seen = np.where(visited > 0, visited + extra, 0).ravel()
    unmasked = np.where(visited > 0, free + extra - extra_masked, 0).ravel()
    if additional_queries:
        rows = np.full(-(-additional // query_size), dense_row)
        seen, unmasked = np.append(seen, rows), np.append(unmasked, rows)
    block_sparse = bool((visited == free).all())
    masked = seen if mask_every_tile and not block_sparse else seen - unmasked
    unit = query_size * key_size * head_dim / 128**3
    blocks = Blocks(unit * seen, unit * masked, batch * heads)
    dense = np.full(-(-queries // query_size), unit * dense_row)
    dense_blocks = Blocks(dense, 0 * dense, batch * heads)

    pairs = math.prod(_pairs(window) for window in windows)
    extra_pairs = additional * (tokens + (everything if additional_queries else 0))
    moved = 2 * head_dim * BYTES * batch  # by one token of queries and outputs, or keys and values
    permuted = tiling == "permuted" and (len(windows) > 1 or windows[0].dilation > 1)
    return Simulation(
        windows=windows,
        query_tile=best[0],
        key_tile=best[1],
        tiling=tiling,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        additional=additional,
        gpu=machine,
        pairs=pairs + extra_pairs,
        dense_pairs=queries * everything,
        query_tiles=len(seen),
        dense_tiles=len(dense) * dense_row,
        visited_tiles=int(seen.sum()),
        free_tiles=int(unmasked.sum()),
        block_sparse=block_sparse,
        visited_per_tile=visited,
        free_per_tile=free,
        blocks=blocks,
        dense_blocks=dense_blocks,
        makespan=blocks.seconds(machine),
        dense_makespan=dense_blocks.seconds(machine),
        memory_floor=moved * (queries * heads + everything * kv_heads) / machine.bandwidth,
        permutation=permuted * 2 * moved * tokens * (heads + kv_heads) / machine.bandwidth,
    )


def count_tiles(
    windows: Sequence[Window],
    query_tile: tuple[int, ...],
    key_tile: tuple[int, ...],
    tiling: Tiling = "permuted",
) -> tuple[Int[np.ndarray, "G T"], Int[np.ndarray, "G T"]]:
    """Key tiles that each query tile visits, and those without a mask [dilation groups, tiles].

    Windows and tiles are products over the dimensions, and so are the counts; but for "single-dim"
    tiles, which are runs of flattened tokens.
    """
    if tiling == "single-dim":
        return _flat_tiles(windows, query_tile[0], key_tile[0])
    along = [
        _tiles_along(window, query, key, dynamic=tiling == "fused")
        for window, query, key in zip(windows, query_tile, key_tile, strict=True)
    ]
    visited, free = (functools.reduce(_outer, counts) for counts in zip(*along, strict=True))
    return visited, free


def _tiles_along(
    window: Window, query_tile: int, key_tile: int, *, dynamic: bool
) -> tuple[Int[np.ndarray, "G T"], Int[np.ndarray, "G T"]]:
    """One dimension's visited and mask-free key tiles; query tiles of nothing but padding: none."""
    lengths = window.group_lengths()
    tiles = -(-lengths[0] // query_tile)
    counts = np.zeros((2, len(lengths), tiles), int)
    for group, length in enumerate(lengths):
        found = visits(window, length, query_tile, key_tile, dynamic=dynamic)
        here = len(found.first)
        counts[0, group, :here] = found.last - found.first
        counts[1, group, :here] = found.free_last - found.free_first
    return counts[0], counts[1]


def _outer(left: Int[np.ndarray, "G T"], right: Int[np.ndarray, "H U"]) -> Int[np.ndarray, "GH TU"]:
    groups, tiles = left.shape[0] * right.shape[0], left.shape[1] * right.shape[1]
    return np.einsum("gt,hu->ghtu", left, right).reshape(groups, tiles)


def _flat_tiles(
    windows: Sequence[Window], query_tile: int, key_tile: int
) -> tuple[Int[np.ndarray, "1 T"], Int[np.ndarray, "1 T"]]:
    layout = [window.length for window in windows]
    tokens = math.prod(layout)
    padding = -tokens % key_tile
    counts = []
    for first in range(0, tokens, query_tile):
        flat = np.arange(first, min(first + query_tile, tokens))
        masks = [w.mask(x) for w, x in zip(windows, np.unravel_index(flat, layout), strict=True)]
        # Keys seen by some query: per row of the last dimension a box, together their union.
        _, heads = np.unique(flat // layout[-1], return_index=True)
        rows = functools.reduce(
            lambda a, b: (a[:, :, None] & b[:, None, :]).reshape(len(a), -1),
            [mask[heads] for mask in masks[:-1]],
            np.ones((len(heads), 1), bool),
        )
        last = np.logical_or.reduceat(masks[-1], heads, axis=0)
        some = (rows.T.astype(np.float32) @ last.astype(np.float32)).ravel() > 0
        # Keys seen by every query: one box.
        every = functools.reduce(np.multiply.outer, [mask.all(axis=0) for mask in masks]).ravel()
        visited = np.pad(some, (0, padding)).reshape(-1, key_tile).any(axis=1)
        free = np.pad(every, (0, padding), constant_values=True).reshape(-1, key_tile).all(axis=1)
        counts.append((visited.sum(), free.sum()))
    visited, free = np.array(counts).T
    return visited[None], free[None]


def _pairs(window: Window) -> int:
    if not window.is_causal:
        return window.length * window.kernel_size
    bounds = (window.bounds(length) for length in window.group_lengths())
    return int(sum((end - start).sum() for start, end in bounds))


def _area(query_tile: tuple[int, ...], key_tile: tuple[int, ...]) -> int:
    return math.prod(query_tile) * math.prod(key_tile)


def _check(tiling: str, additional: int, **sizes: int) -> None:
    if tiling not in ("permuted", "fused", "single-dim"):
        raise ValueError(f"tiling must be permuted, fused or single-dim, received {tiling!r}.")
    if additional < 0:
        raise ValueError(f"additional must not be negative, received {additional}.")
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, received {value}.")
    if sizes["heads"] % sizes["kv_heads"]:
        raise ValueError(
            f"heads must be a multiple of kv_heads, received {sizes['heads']} and "
            f"{sizes['kv_heads']}."
        )
