"""Tile sizes of the Triton kernels by GPU: a table, and what was measured instead."""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax.numpy as jnp

from ..problem import Problem
from ..tiles import Costs, Window, cheapest, cut, shapes_of


class Blocks(NamedTuple):
    """How a kernel is cut: tokens of its own tile and of those visited, and its resources."""

    own: int
    seen: int
    warps: int
    stages: int


# Columns of the tables below, (bytes of an element, head dimension); the largest dimension of a
# problem is rounded up to one of them. Rows are kernels, and a cell is own/seen/warps/stages.
COLUMNS = ((2, 64), (2, 128), (2, 256), (4, 64), (4, 128))

Table = dict[str, tuple[Blocks, ...]]


def _table(text: str) -> Table:
    rows = (line.split() for line in text.strip().splitlines())
    return {name: tuple(Blocks(*map(int, x.split("/"))) for x in cells) for name, *cells in rows}


# 227 KiB of shared memory, 163 KiB and 99 KiB.
HOPPER = _table("""
    forward         128/128/8/3  128/128/8/3    64/64/8/2   32/128/8/2    32/64/8/2
    backward_query   128/64/8/3   128/64/8/3    64/32/8/2    64/32/4/2    32/32/8/2
    backward_keys    128/64/8/3   128/32/8/2    32/32/8/2   128/16/8/2    16/16/4/2
""")
# As Hopper, but for what would spill there.
BLACKWELL = HOPPER | _table("""
    forward         128/128/8/3   128/64/8/2    64/64/8/2   32/128/8/2    32/64/8/2
""")
A100 = _table("""
    forward          128/64/4/3   128/64/8/3    64/64/8/2    64/32/8/2    32/32/8/2
    backward_query   128/64/8/2    64/64/4/2    64/32/8/2    32/64/8/2    32/32/8/2
    backward_keys    128/64/8/2    64/64/8/2    32/64/8/2    32/64/8/1    16/16/4/2
""")
OTHERS = _table("""
    forward           64/64/4/2    64/64/4/2    32/64/8/2    64/32/8/1    32/32/8/1
    backward_query    64/64/4/2    64/64/4/2    32/32/8/2    32/64/8/2    32/32/8/2
    backward_keys     64/64/8/2    32/64/8/2    32/16/4/2    32/64/8/1    16/32/4/1
""")
# By compute capability: the last that is not above the GPU's. Own tokens of "backward_keys" are
# keys, of the others queries. Chosen for what fits and does not spill; `tuning.tune` measures.
TABLES = {0: OTHERS, 80: A100, 86: OTHERS, 90: HOPPER, 100: BLACKWELL, 120: OTHERS}

# What else is worth measuring from Hopper on, in 16 bits; it does not spill either.
RIVALS = tuple(
    map(
        _table,
        (
            """
    forward          128/64/8/3   128/64/8/3
    backward_query   128/32/8/4   128/32/8/3
    backward_keys    128/32/8/2    64/32/8/2
            """,
            """
    forward           64/64/4/3    64/64/4/3
    backward_query    64/64/4/3   128/32/8/4
    backward_keys     64/64/8/2    64/64/8/2
            """,
            """
    forward          64/128/4/3   128/64/8/2
    backward_query   128/64/8/2    64/64/4/3
    backward_keys     64/32/8/3    64/32/8/3
            """,
        ),
    )
)

# What was measured, for problems of batch 1, whatever the batch; see `tuning.tune`.
TUNED: dict[tuple[Problem, str], Blocks] = {}


def largest_dim(problem: Problem) -> int:
    """The largest head dimension that kernels have tiles for in the dtype of a problem."""
    return max(dim for size, dim in COLUMNS if size == jnp.dtype(problem.dtype).itemsize)


def tuning_key(problem: Problem, kernel: str) -> tuple[Problem, str]:
    """Where `TUNED` keeps the tiles of a kernel for a problem."""
    return dataclasses.replace(problem, batch=1), kernel


def blocks_of(problem: Problem, kernel: str, capability: int) -> Blocks:
    """How a kernel is cut for a problem on a GPU of a compute capability, such as 90 for 9.0."""
    tuned = TUNED.get(tuning_key(problem, kernel))
    if tuned is not None:
        return tuned
    blocks = _cell(_table_of(capability)[kernel], problem)
    assert blocks is not None, "larger dimensions are refused before"
    return blocks


def candidates_of(problem: Problem, kernel: str, capability: int) -> tuple[Blocks, ...]:
    """What is worth measuring on such a GPU: the table's tiles, and up to three more."""
    table = _table_of(capability)
    rivals = RIVALS if 90 <= capability < 120 else ()
    found = (_cell(each[kernel], problem) for each in (table, *rivals))
    return tuple(dict.fromkeys(blocks for blocks in found if blocks is not None))


def _table_of(capability: int) -> Table:
    return TABLES[max(c for c in TABLES if c <= capability)]


def _cell(row: tuple[Blocks, ...], problem: Problem) -> Blocks | None:
    """That of a problem, if a row has so many columns."""
    size, dim = jnp.dtype(problem.dtype).itemsize, max(problem.head_dim, problem.value_dim)
    cells = zip(row, COLUMNS, strict=False)
    return next((blocks for blocks, (of, most) in cells if of == size and most >= dim), None)


# Shapes

# In units of a tile step without a mask.
COSTS = Costs(start=1.5, step=1, mask=0.2)

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


def _shapes(tokens: int, rank: int) -> list[tuple[int, ...]]:
    """Shapes of a tile, whose masks fit into a word."""
    shapes = shapes_of(tokens, rank)
    return [one for one in shapes if rank == 1 or sum(one) + 3 - rank <= MOST_BITS]


@functools.lru_cache(maxsize=1024)
def tiling(windows: tuple[Window, ...], own: int, seen: int, *, inverse: bool = False) -> Tiling:
    """The cheapest shapes for tiles of `own` tokens that visit tiles of `seen` tokens.

    Own tokens are queries and those visited keys; with `inverse` it is the other way round.
    """
    rank = len(windows)
    side = functools.cache(functools.partial(cut, inverse=inverse))
    shapes = itertools.product(_shapes(own, rank), _shapes(seen, rank))
    best = cheapest((tuple(map(side, windows, *pair)) for pair in shapes), COSTS)
    grid = tuple(-(-w.length // (w.dilation * c.own)) for w, c in zip(windows, best, strict=True))
    ones = (1,) * (3 - rank)
    return Tiling(
        own=ones + tuple(c.own for c in best),
        seen=ones + tuple(c.seen for c in best),
        grid=ones + grid,
        steps=math.prod(c.steps for c in best),
        free=math.prod(c.free for c in best),
    )
