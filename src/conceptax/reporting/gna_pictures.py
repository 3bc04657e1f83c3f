"""The picture of a search: speed-up over window and stride, and the tiles one query tile visits."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

from conceptax.kernels.gna.problem import windows_of
from conceptax.kernels.gna.simulator.search import ALL_WINDOWS, Choice, tabulate
from conceptax.kernels.gna.tiles import Window, visits
from conceptax.reporting.gna_tables import by

SKIPPED, FREE, MASKED, QUERY = "#eceff2", "#2f81c7", "#f0883e", "#d1242f"
CLASSES = ListedColormap([SKIPPED, FREE, MASKED])
MAX_SLICES = 12


def draw_search(
    file: Path,
    layout: Sequence[int],
    choices: Sequence[Choice],
    *,
    dilation: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
) -> None:
    """Write a PNG with a heat map for each dimension, above two choices' visited tiles.

    A dimension's speed-up is its dense over its visited tiles; the whole speed-up is the product of
    the dimensions'. Below are the fastest choice and, of the finest stride, the fastest.
    """
    fastest = choices[0]
    finest = min(choices, key=lambda choice: (math.prod(choice.stride), -choice.speedup))
    shown = [fastest] if finest is fastest else [fastest, finest]
    figure = Figure(figsize=(max(4.6 * len(layout), 11), 9.6), layout="constrained", dpi=110)
    dilated = "" if set(np.atleast_1d(dilation)) == {1} else " (below: the first dilation group)"
    figure.suptitle(
        f"Neighborhood attention on {by(layout, '×')} tokens{dilated}",
        fontsize=15,
        fontweight="bold",
    )
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    windows = [
        windows_of(layout, choice.kernel_size, choice.stride, dilation, is_causal)
        for choice in shown
    ]
    for m, axes in enumerate(above.subplots(1, len(layout), squeeze=False)[0]):
        own = [window[m] for window in windows]
        marks = list(zip(own, ("fastest", "finest"), strict=False))
        _heat_map(axes, m, fastest.query_tile[m], fastest.key_tile[m], marks)
    parts = np.atleast_1d(below.subfigures(1, len(shown)))
    for part, choice, window in zip(parts, shown, windows, strict=True):
        kind = "fastest" if choice is fastest else "finest stride"
        part.suptitle(
            f"{kind}: window {by(choice.kernel_size, '×')}, stride {by(choice.stride, '×')}\n"
            f"tiles {by(choice.query_tile, '×')} by {by(choice.key_tile, '×')}, "
            f"{100 * choice.sparsity:.1f} % sparse, {choice.tile_speedup:.2f} x of "
            f"{choice.flop_speedup:.2f} x",
            fontsize=10.5,
        )
        _tiles(part, choice, window)
    handles = [
        Patch(color=FREE, label="key tile visited, no mask"),
        Patch(color=MASKED, label="key tile visited, masked"),
        Patch(color=SKIPPED, label="key tile skipped"),
        Patch(facecolor="none", edgecolor=QUERY, linewidth=2, label="the query tile"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, format="png")


def _heat_map(
    axes: Any, m: int, query_tile: int, key_tile: int, marks: Sequence[tuple[Window, str]]
) -> None:
    window = marks[0][0]
    table = tabulate(window, query_tile, key_tile)
    dense = window.length / query_tile * (window.length / key_tile)
    sizes, column = np.unique(table.kernel_size, return_inverse=True)
    strides, row = np.unique(table.stride, return_inverse=True)
    image = np.full((len(strides), len(sizes)), np.nan)
    image[row, column] = dense / table.visited
    top = np.nanmax(image)
    norm = LogNorm(min(1.0, np.nanmin(image)), max(top, 1.01))
    style = {"shading": "nearest", "cmap": "viridis", "rasterized": True}
    mesh = axes.pcolormesh(sizes, strides, image, norm=norm, **style)
    bar = axes.figure.colorbar(mesh, ax=axes, label="speed-up (dense / visited tiles)")
    ticks = [tick for tick in (1, 2, 4, 8, 16, 32, 64, 128, 256) if tick <= top]
    bar.set_ticks(ticks, labels=[f"{tick} x" for tick in ticks])
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    clean = table.take(table.visited == table.free)
    clean = clean.take(np.unique(clean.kernel_size, return_index=True)[1])
    axes.plot(clean.kernel_size, clean.stride, ".w", markersize=4, label="finest without masks")
    style = {"markerfacecolor": QUERY, "markeredgecolor": "white", "clip_on": False, "zorder": 5}
    for (each, label), marker, size in zip(marks, "*o", (15, 9), strict=False):
        axes.plot(each.kernel_size, each.stride, marker, markersize=size, label=label, **style)
    axes.set(xlabel="window", ylabel="stride")
    title = f"dimension {m}: {window.length} tokens, tiles {query_tile} by {key_tile}"
    axes.set_title(title, fontsize=10.5)
    if window.length > ALL_WINDOWS:
        axes.set(xscale="log", yscale="log")
    axes.legend(loc="upper left", fontsize=9, facecolor="#c8ced4")
    for axis in (axes.xaxis, axes.yaxis):
        if window.length <= ALL_WINDOWS:
            axis.set_major_locator(MaxNLocator(integer=True))
        axis.set_major_formatter(ScalarFormatter())


def _tiles(part: Any, choice: Choice, windows: Sequence[Window]) -> None:
    """The key tiles of the first dilation group, as the middle query tile sees them."""
    lengths = [window.group_lengths()[0] for window in windows]
    shape = [-(-length // tile) for length, tile in zip(lengths, choice.query_tile, strict=True)]
    middle = [size // 2 for size in shape]
    each = zip(windows, lengths, choice.query_tile, choice.key_tile, strict=True)
    classes = [_classes(*dimension) for dimension in each]
    if len(windows) == 1:
        # One dimension has room for all query tiles.
        axes = part.subplots()
        image = classes[0]
        size = (0, image.shape[1] * choice.key_tile[0], image.shape[0] * choice.query_tile[0], 0)
        axes.imshow(image, cmap=CLASSES, vmin=0, vmax=2, extent=size, interpolation="nearest")
        own, high = (0, middle[0] * choice.query_tile[0]), choice.query_tile[0]
        axes.add_patch(Rectangle(own, size[1], high, fill=False, color=QUERY, linewidth=1.5))
        axes.set(xlabel="key", ylabel="query")
        return
    seen = [per_query[tile] for per_query, tile in zip(classes, middle, strict=True)]
    plane = _product(seen[-2], seen[-1])
    if len(windows) == 2:
        axes = part.subplots()
        _plane(axes, plane, choice, middle, lengths)
        axes.set(xlabel="dimension 1", ylabel="dimension 0")
        return
    # Three dimensions: slices along the first, those that are visited.
    slices = np.flatnonzero(seen[0])
    shown = slices[:MAX_SLICES]
    columns = math.ceil(math.sqrt(len(shown)))
    grid = part.subplots(math.ceil(len(shown) / columns), columns, squeeze=False).ravel()
    own = middle[0] * choice.query_tile[0]
    for axes, tile in zip(grid, shown, strict=False):
        first = int(tile) * choice.key_tile[0]
        last = min(first + choice.key_tile[0], lengths[0]) - 1
        inside = own <= last and first < own + choice.query_tile[0]
        image = np.where(seen[0][tile] == 2, 2 * (plane > 0), plane)
        _plane(axes, image, choice, middle[1:] if inside else [], lengths[1:])
        axes.set_title(f"{first} to {last}" if last > first else f"{first}", fontsize=9, pad=2)
        axes.set(xticks=[], yticks=[])
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    hidden = len(slices) - len(shown)
    part.supxlabel(
        "dimension 2, in slices along dimension 0" + (f" ({hidden} more)" if hidden else ""),
        fontsize=10,
    )
    part.supylabel("dimension 1", fontsize=10)


def _plane(
    axes: Any, image: Int[np.ndarray, "R C"], choice: Choice, query: Any, lengths: Sequence[int]
) -> None:
    """Key tiles of the last two dimensions, in tokens; `query` is the query tile if it is there."""
    (high, wide), (q_high, q_wide) = choice.key_tile[-2:], choice.query_tile[-2:]
    rows, columns = image.shape
    x = np.minimum(np.arange(columns + 1) * wide, lengths[1])
    y = np.minimum(np.arange(rows + 1) * high, lengths[0])
    axes.pcolormesh(x, y, image, cmap=CLASSES, vmin=0, vmax=2, edgecolors="white", linewidth=0.4)
    axes.set(xlim=(0, lengths[1]), ylim=(lengths[0], 0), aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    if len(query):
        corner = (query[1] * q_wide, query[0] * q_high)
        axes.add_patch(Rectangle(corner, q_wide, q_high, fill=False, color=QUERY, linewidth=2))


def _classes(
    window: Window, length: int, query_tile: int, key_tile: int
) -> Int[np.ndarray, "query_tiles key_tiles"]:
    """0 where a key tile is skipped, 1 where it needs no mask, 2 where it does."""
    found = visits(window, length, query_tile, key_tile)
    keys = np.arange(-(-length // key_tile))
    visited = (keys >= found.first[:, None]) & (keys < found.last[:, None])
    free = (keys >= found.free_first[:, None]) & (keys < found.free_last[:, None])
    return 2 * visited - free


def _product(rows: Int[np.ndarray, " R"], columns: Int[np.ndarray, " C"]) -> Int[np.ndarray, "R C"]:
    """Classes of two dimensions together: a tile is free only if it is so in both."""
    seen = (rows[:, None] > 0) & (columns > 0)
    return np.where(seen, np.maximum(rows[:, None], columns), 0)
