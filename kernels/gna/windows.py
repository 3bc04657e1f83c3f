"""Which keys a query sees, one dimension at a time: the geometry all backends and the simulator share.

Generalized Neighborhood Attention (arXiv 2504.16922) is an AND of independent one-dimensional
windows.  A dimension of `length` tokens with dilation d falls into d groups, x = i*d + g, that never
see each other; inside a group, runs of `stride` queries share the window of their leader.
Everything here is plain numpy on static arguments.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int


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
        i = np.arange(length) if queries is None else np.minimum(queries, length - 1)
        k, s = self.kernel_size, self.stride
        if self.is_causal:
            leader = np.minimum(i // s * s + s - 1, length - 1)
            return np.maximum(leader - k + 1, 0), i + 1
        leader = np.minimum(i // s * s + s // 2, length - 1)
        start = np.clip(leader - k // 2, 0, length - k)
        return start, start + k

    def mask(self) -> Bool[np.ndarray, "length length"]:
        """mask[i, j]: whether query i sees key j."""
        seen = np.zeros((self.length, self.length), bool)
        for g, length in enumerate(self.group_lengths()):
            start, end = self.bounds(length)
            keys = np.arange(length)
            inside = (keys >= start[:, None]) & (keys < end[:, None])
            seen[g :: self.dilation, g :: self.dilation] = inside
        return seen

    def is_dense(self) -> bool:
        """Whether every query sees every key."""
        return self.kernel_size == self.length and self.dilation == 1 and not self.is_causal


@dataclasses.dataclass(frozen=True, slots=True)
class Visits:
    """The key tiles that each query tile of one dilation group visits, along one dimension.

    A query tile visits key tiles `first` <= tile < `last`; of these, `free_first` <= tile <
    `free_last` need no mask (an empty range where none does). Arrays [query tiles].
    """

    first: Int[np.ndarray, " T"]
    last: Int[np.ndarray, " T"]
    free_first: Int[np.ndarray, " T"]
    free_last: Int[np.ndarray, " T"]


def visits(
    window: Window, length: int, query_tile: int, key_tile: int, tiles: int | None = None
) -> Visits:
    """Tiles met along one dimension of a group of `length` tokens, padded at its end to whole tiles.

    `tiles` is the number of query tiles, where other groups have more tokens than this one: query
    tiles past the end behave as the last query.
    """
    tiles = -(-length // query_tile) if tiles is None else tiles
    firsts = np.arange(tiles) * query_tile
    lasts = firsts + query_tile - 1
    first_start, first_end = window.bounds(length, firsts)
    last_start, last_end = window.bounds(length, lasts)
    # Starts and ends never decrease, so a tile's first query sees the first key and its last one
    # the last, and keys that all of them see lie between the last start and the first end.
    free_first = -(-last_start // key_tile)
    ragged = (first_end == length) & (length % key_tile != 0)
    free_last = np.where(ragged, -(-first_end // key_tile), first_end // key_tile)
    return Visits(
        first_start // key_tile,
        -(-last_end // key_tile),
        free_first,
        np.maximum(free_last, free_first),
    )
