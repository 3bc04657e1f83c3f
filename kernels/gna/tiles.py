"""Tiles of a power of two of tokens, for kernels that skip key tiles and mask as few as they can.

The keys that a tile of queries sees are a box, cut into key tiles from its first key on. What a
choice of tile shapes costs is counted here, on static arguments, and the cheapest is taken.
"""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np

from .windows import Window

# In units of one tile step without a mask.
MASK_COST = 1.2  # a step with a mask
START_COST = 1.5  # starting a tile and writing its results

# A mask of several dimensions takes one bit for each row of a tile along each dimension.
MOST_BITS = 32


class Tiling(NamedTuple):
    """Tile shapes, three-dimensional, and what they lead to.

    Attributes:
      own: tokens of a program's tile along each dimension.
      seen: tokens of the tiles that it visits.
      grid: own tiles of the longest dilation group.
      steps: visited tiles, summed over all tiles.
      free: those among them that need no mask.
    """

    own: tuple[int, ...]
    seen: tuple[int, ...]
    grid: tuple[int, ...]
    steps: int
    free: int


def padded(windows: tuple[Window, ...]) -> tuple[Window, ...]:
    """Windows of three dimensions, the leading ones of one token."""
    return (Window(1, 1),) * (3 - len(windows)) + windows


def _cover(window: Window, own: int, seen: int, inverse: bool) -> tuple[int, int, int]:
    """Own tiles, visited tiles and free ones along one dimension, of all its dilation groups.

    With `inverse` own tiles are of keys, and what they visit are the queries that see them.
    """
    tiles = steps = free = 0
    for length, groups in zip(*np.unique(window.group_lengths(), return_counts=True), strict=True):
        first, last = window.bounds(int(length))
        if inverse:  # both never decrease
            keys = np.arange(length)
            first, last = (
                np.searchsorted(last, keys, "right"),
                np.searchsorted(first, keys, "right"),
            )
        head = np.arange(0, length, own)
        tail = np.minimum(head + own, length) - 1
        origin = first[head]
        inside = (last[head] - origin) // seen + (first[tail] - origin) // -seen
        tiles += int(groups) * len(head)
        steps += int(groups) * int((-((last[tail] - origin) // -seen)).sum())
        free += int(groups) * int(np.maximum(inside, 0).sum())
    return tiles, steps, free


def _shapes(size: int, windows: tuple[Window, ...]) -> list[tuple[int, ...]]:
    """Shapes of `size` tokens, whose masks fit into a word."""
    sides = [2**n for n in range(size.bit_length())]
    shapes = [
        shape for shape in itertools.product(sides, repeat=len(windows)) if math.prod(shape) == size
    ]
    if len(windows) == 1:
        return shapes
    return [shape for shape in shapes if sum(shape) + 3 - len(windows) <= MOST_BITS]


@functools.lru_cache(maxsize=1024)
def tiling(windows: tuple[Window, ...], own: int, seen: int, *, inverse: bool = False) -> Tiling:
    """The cheapest shapes for tiles of `own` tokens that visit tiles of `seen` tokens.

    Own tokens are queries and those visited keys; with `inverse` it is the other way round.
    """
    cover = functools.lru_cache(maxsize=None)(_cover)
    best, lowest = None, math.inf
    for own_shape, seen_shape in itertools.product(_shapes(own, windows), _shapes(seen, windows)):
        sides = zip(windows, own_shape, seen_shape, strict=True)
        tiles, steps, free = map(
            math.prod, zip(*(cover(*side, inverse) for side in sides), strict=True)
        )
        cost = MASK_COST * steps - (MASK_COST - 1) * free + START_COST * tiles
        if cost < lowest:
            best, lowest = (own_shape, seen_shape, steps, free), cost
    assert best is not None
    own_shape, seen_shape, steps, free = best
    grid = tuple(
        -(-window.length // (window.dilation * side))
        for window, side in zip(windows, own_shape, strict=True)
    )
    ones = (1,) * (3 - len(windows))
    return Tiling(ones + own_shape, ones + seen_shape, ones + grid, steps, free)
