"""Which keys a query sees, one dimension at a time: the geometry that everything here shares.

Generalized Neighborhood Attention (arXiv 2504.16922) is an AND of independent one-dimensional
windows.  A dimension of `length` tokens with dilation d falls into d groups, x = i*d + g, that
never see each other; inside a group, runs of `stride` queries share the window of their leader.
Everything here is plain numpy on static arguments.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int

Number = int | Int[np.ndarray, "..."]


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """The window of one dimension.

    Attributes:
      length: tokens along the dimension.
      kernel_size: keys a query sees (at most, if causal).
      stride: neighbouring queries that share a window; 1 is a sliding window.
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
    window: Window,
    length: int,
    query_tile: int,
    key_tile: int,
    tiles: int | None = None,
    *,
    dynamic: bool = False,
) -> Visits:
    """Tiles met along one dimension of a group of `length` tokens, its end padded to whole tiles.

    `tiles` is the number of query tiles, where other groups have more tokens than this one: query
    tiles past the end behave as the last query. `dynamic` key tiles start at the first key that a
    query tile sees, and are counted from there, instead of lying on a grid.
    """
    tiles = -(-length // query_tile) if tiles is None else tiles
    k, s, causal = window.kernel_size, window.stride, window.is_causal
    return tile_visits(
        np.arange(tiles), length, k, s, causal, query_tile, key_tile, dynamic=dynamic
    )


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
    """`visits` for query tiles `tiles` of many windows at once: all arguments broadcast."""
    firsts = tiles * query_tile
    first_start, first_end = bounds(firsts, length, kernel_size, stride, causal)
    last_start, last_end = bounds(firsts + query_tile - 1, length, kernel_size, stride, causal)
    origin = first_start if dynamic else 0
    # Starts and ends never decrease, so a tile's first query sees the first key and its last one
    # the last, and keys that all of them see lie between the last start and the first end.
    free_first = _ceil_div(last_start - origin, key_tile)
    free_end = first_end - origin
    # Past the group's end there is nothing to mask but padding.
    free_last = np.where(first_end == length, _ceil_div(free_end, key_tile), free_end // key_tile)
    return Visits(
        (first_start - origin) // key_tile,
        _ceil_div(last_end - origin, key_tile),
        free_first,
        np.maximum(free_last, free_first),
    )


def _ceil_div(a: Int[np.ndarray, "..."], b: int) -> Int[np.ndarray, "..."]:
    return -(-a // b)
