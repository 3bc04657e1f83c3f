"""Windows, boxes and masks inside Triton kernels (`triton_kernels`), from a few integers.

The same as `windows` says in numpy, here of scalars and vectors on the device: a box is for each
dimension (first position, tiles, free tiles before them, free tiles), where free tiles need no
mask. Positions count inside the dilation group, in three dimensions of which the leading ones may
be of length 1. `S` is `Static`; nothing but triton is needed.
"""
# Types here are those of the device, which a checker of Python does not know.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import dataclasses
import math

import triton
import triton.language as tl


@dataclasses.dataclass(frozen=True)
class Static:
    """What is known as a kernel is compiled.

    Attributes:
      windows: per dimension (length, kernel_size, stride, dilation, is_causal).
      query_tile: queries of a tile along each dimension; a power of two in all.
      key_tile: likewise keys.
      wide: whether offsets inside a tile need 64 bits.
      batch: B; only for `backward_additional`, others find out from the number of programs.
      heads: Hq.
      kv_heads: Hkv.
      additional: number of additional keys.
      dim: D.
      value_dim: Dv.
      block_dim: D, rounded up to a power of two.
      block_value_dim: Dv, likewise.
      scale: factor of the scores.
      precision: how float32 is multiplied, see `tl.dot`.
      tiles: tiles, of the longest dilation group, that programs stand for.
      has_free: whether any step needs no mask.
      has_masked: whether any step needs one.
      part: query tiles of a program of `backward_additional`.
    """

    windows: tuple[tuple[int, int, int, int, bool], ...]
    query_tile: tuple[int, ...]
    key_tile: tuple[int, ...]
    wide: bool
    batch: int
    heads: int
    kv_heads: int
    additional: int
    dim: int
    value_dim: int
    block_dim: int
    block_value_dim: int
    scale: float
    precision: str
    tiles: tuple[int, ...] = (1, 1, 1)
    has_free: bool = True
    has_masked: bool = True
    part: int = 1

    @property
    def query_shape(self) -> tl.constexpr:
        """`query_tile`, to be passed on: a bare tuple cannot be, in triton 3.6."""
        return tl.constexpr(self.query_tile)

    @property
    def key_shape(self) -> tl.constexpr:
        """`key_tile`, likewise."""
        return tl.constexpr(self.key_tile)

    @property
    def tokens(self) -> int:
        """All tokens."""
        return math.prod(window[0] for window in self.windows)

    @property
    def count(self) -> int:
        """Tiles of all dilation groups."""
        return math.prod(self.tiles) * math.prod(window[3] for window in self.windows)

    @property
    def rows(self) -> int:
        """Queries of a tile."""
        return math.prod(self.query_tile)

    @property
    def keys(self) -> int:
        """Keys of a tile."""
        return math.prod(self.key_tile)

    @property
    def repeats(self) -> int:
        """Query heads per key head."""
        return self.heads // self.kv_heads

    @property
    def factor(self) -> float:
        """Factor of scores that are exponents of 2."""
        return self.scale * math.log2(math.e)


# Windows of dimension M: queries i and keys j in a group of `length`.


@triton.jit
def _start(i, length, M: tl.constexpr, S: tl.constexpr):
    """First key that a query sees."""
    k: tl.constexpr = S.windows[M][1]
    s: tl.constexpr = S.windows[M][2]
    if S.windows[M][4]:
        start = tl.maximum(tl.minimum(i // s * s + (s - 1), length - 1) - (k - 1), 0)
    else:
        leader = tl.minimum(i // s * s + s // 2, length - 1)
        start = tl.minimum(tl.maximum(leader - k // 2, 0), length - k)
    return start


@triton.jit
def _end(i, length, M: tl.constexpr, S: tl.constexpr):
    """One past the last key that a query sees."""
    if S.windows[M][4]:
        return i + 1
    return _start(i, length, M, S) + S.windows[M][1]


@triton.jit
def _first_query(j, M: tl.constexpr, S: tl.constexpr):
    """First query that sees a key."""
    k: tl.constexpr = S.windows[M][1]
    s: tl.constexpr = S.windows[M][2]
    if S.windows[M][4]:
        return j
    return tl.where(j < k, 0, (j - k + k // 2 - s // 2 + s) // s * s)


@triton.jit
def _last_query(j, length, M: tl.constexpr, S: tl.constexpr):
    """One past the last query that sees a key."""
    k: tl.constexpr = S.windows[M][1]
    s: tl.constexpr = S.windows[M][2]
    behind: tl.constexpr = k if S.windows[M][4] else k // 2 - s // 2 + s
    last = (j + behind) // s * s
    return tl.where(j + k >= length, length, tl.minimum(last, length))


@triton.jit
def _keys_of(first, length, M: tl.constexpr, S: tl.constexpr):
    """Keys that a query tile sees: (first, tiles, free tiles before them, free tiles)."""
    first = tl.minimum(first, length - 1)
    last = tl.minimum(first + S.query_tile[M], length) - 1
    origin = _start(first, length, M, S)
    free = tl.cdiv(_start(last, length, M, S) - origin, S.key_tile[M])
    until = (_end(first, length, M, S) - origin) // S.key_tile[M]
    tiles = tl.cdiv(_end(last, length, M, S) - origin, S.key_tile[M])
    return (origin, tiles, free, tl.maximum(until - free, 0))


@triton.jit
def _queries_of(first, length, M: tl.constexpr, S: tl.constexpr):
    """Queries that see any of a key tile, as `_keys_of`."""
    first = tl.minimum(first, length - 1)
    last = tl.minimum(first + S.key_tile[M], length) - 1
    origin = _first_query(first, M, S)
    free = tl.cdiv(_first_query(last, M, S) - origin, S.query_tile[M])
    until = (_last_query(first, length, M, S) - origin) // S.query_tile[M]
    tiles = tl.cdiv(_last_query(last, length, M, S) - origin, S.query_tile[M])
    return (origin, tiles, free, tl.maximum(until - free, 0))


# Three dimensions


@triton.jit
def _unravel(index, n1, n2):
    row = index // n2
    i0 = row // n1
    return (i0, row - i0 * n1, index - row * n2)


@triton.jit
def within_tile(TILE: tl.constexpr):
    """Where in a tile its tokens are."""
    return _unravel(tl.arange(0, TILE[0] * TILE[1] * TILE[2]), TILE[1], TILE[2])


@triton.jit
def _down(x):
    """Vectors as columns [:, 1]."""
    return (x[0][:, None], x[1][:, None], x[2][:, None])


@triton.jit
def positions(first, within):
    """Positions of the tokens of a tile."""
    return (first[0] + within[0], first[1] + within[1], first[2] + within[2])


@triton.jit
def are_inside(i, lengths):
    """Which positions are not past the group's end."""
    return (i[0] < lengths[0]) & (i[1] < lengths[1]) & (i[2] < lengths[2])


@triton.jit
def token_of(i, group, S: tl.constexpr):
    """Index of a position among all tokens."""
    row = i[0] * S.windows[0][3] + group[0]
    row = row * S.windows[1][0] + i[1] * S.windows[1][3] + group[1]
    return row * S.windows[2][0] + i[2] * S.windows[2][3] + group[2]


@triton.jit
def place_of(n, TILE: tl.constexpr, S: tl.constexpr):
    """Dilation group of the n-th tile, groups before tiles; its lengths; its first position."""
    tiles: tl.constexpr = S.tiles[0] * S.tiles[1] * S.tiles[2]
    group = _unravel(n // tiles, S.windows[1][3], S.windows[2][3])
    at = _unravel(n % tiles, S.tiles[1], S.tiles[2])
    lengths = (
        tl.cdiv(S.windows[0][0] - group[0], S.windows[0][3]),
        tl.cdiv(S.windows[1][0] - group[1], S.windows[1][3]),
        tl.cdiv(S.windows[2][0] - group[2], S.windows[2][3]),
    )
    return group, lengths, (at[0] * TILE[0], at[1] * TILE[1], at[2] * TILE[2])


@triton.jit
def keys_box(first, lengths, S: tl.constexpr):
    """The keys that the query tile at `first` sees."""
    return (
        _keys_of(first[0], lengths[0], 0, S),
        _keys_of(first[1], lengths[1], 1, S),
        _keys_of(first[2], lengths[2], 2, S),
    )


@triton.jit
def queries_box(first, lengths, S: tl.constexpr):
    """The queries that see any of the key tile at `first`."""
    return (
        _queries_of(first[0], lengths[0], 0, S),
        _queries_of(first[1], lengths[1], 1, S),
        _queries_of(first[2], lengths[2], 2, S),
    )


@triton.jit
def steps_of(box):
    """Number of tiles that need no mask, and of those that do."""
    free = box[0][3] * box[1][3] * box[2][3]
    return free, box[0][1] * box[1][1] * box[2][1] - free


@triton.jit
def free_tile(n, box, TILE: tl.constexpr):
    """First position of the n-th tile of a box that needs no mask."""
    a, b, c = box
    at = _unravel(n, tl.maximum(b[3], 1), tl.maximum(c[3], 1))
    return (
        a[0] + (a[2] + at[0]) * TILE[0],
        b[0] + (b[2] + at[1]) * TILE[1],
        c[0] + (c[2] + at[2]) * TILE[2],
    )


@triton.jit
def masked_tile(n, box, TILE: tl.constexpr):
    """First position of the n-th tile of a box that needs a mask.

    First come the tiles outside the free range of the first dimension, then those inside it but
    outside that of the second, then those inside both but outside that of the third.
    """
    a, b, c = box
    outer = (a[1] - a[3]) * b[1] * c[1]
    middle = a[3] * (b[1] - b[3]) * c[1]
    in_a = n >= outer
    in_b = n >= outer + middle
    n -= tl.where(in_b, outer + middle, tl.where(in_a, outer, 0))
    width = tl.where(in_b, b[3], tl.where(in_a, b[1] - b[3], b[1]))
    at = _unravel(n, tl.maximum(width, 1), tl.maximum(tl.where(in_b, c[1] - c[3], c[1]), 1))
    # A counter inside a free range starts at it, one outside jumps over it.
    t0 = at[0] + tl.where(in_a, a[2], tl.where(at[0] >= a[2], a[3], 0))
    t1 = at[1] + tl.where(in_b, b[2], tl.where(in_a & (at[1] >= b[2]), b[3], 0))
    t2 = at[2] + tl.where(in_b & (at[2] >= c[2]), c[3], 0)
    return (a[0] + t0 * TILE[0], b[0] + t1 * TILE[1], c[0] + t2 * TILE[2])


# Masks. Along a dimension, the tokens of a visited tile that a token does not see (or is not seen
# by) are some bits, and a visited token is one bit; the bits of all dimensions fit in a word, so
# that one instruction per score tells all.


@triton.jit
def windows_of(i, lengths, S: tl.constexpr):
    """First keys, and ends of the keys, that queries see; past the group's end as the last one."""
    i0 = tl.minimum(i[0], lengths[0] - 1)
    i1 = tl.minimum(i[1], lengths[1] - 1)
    i2 = tl.minimum(i[2], lengths[2] - 1)
    starts = (
        _start(i0, lengths[0], 0, S),
        _start(i1, lengths[1], 1, S),
        _start(i2, lengths[2], 2, S),
    )
    ends = (_end(i0, lengths[0], 0, S), _end(i1, lengths[1], 1, S), _end(i2, lengths[2], 2, S))
    return _down(starts), _down(ends)


@triton.jit
def inverse_windows(j, lengths, S: tl.constexpr):
    """First queries, and ends of the queries, that see keys."""
    j0 = tl.minimum(j[0], lengths[0] - 1)
    j1 = tl.minimum(j[1], lengths[1] - 1)
    j2 = tl.minimum(j[2], lengths[2] - 1)
    starts = (_first_query(j0, 0, S), _first_query(j1, 1, S), _first_query(j2, 2, S))
    ends = (
        _last_query(j0, lengths[0], 0, S),
        _last_query(j1, lengths[1], 1, S),
        _last_query(j2, lengths[2], 2, S),
    )
    return _down(starts), _down(ends)


@triton.jit
def _hidden(start, end, first, size: tl.constexpr):
    """Bits of the rows of a tile that are outside a window, in one dimension."""
    one = start * 0 + 1
    low = tl.minimum(tl.maximum(start - first, 0), size)
    high = tl.minimum(tl.maximum(end - first, 0), size)
    return ((one << low) - 1) | ((1 << size) - (one << high))


@triton.jit
def are_seen(windows, first, within, TILE: tl.constexpr):
    """mask[token, visited]: visited tokens are at `within` from `first`, their tile's first."""
    starts, ends = windows
    if TILE[0] + TILE[1] + TILE[2] <= 32:
        hidden = _hidden(starts[0], ends[0], first[0], TILE[0])
        hidden |= _hidden(starts[1], ends[1], first[1], TILE[1]) << TILE[0]
        hidden |= _hidden(starts[2], ends[2], first[2], TILE[2]) << (TILE[0] + TILE[1])
        one = within[0] * 0 + 1
        bits = one << within[0] | one << (within[1] + TILE[0])
        bits |= one << (within[2] + (TILE[0] + TILE[1]))
        seen = (hidden & bits[None, :]) == 0
    else:  # the tile is one row, of a layout that is one row
        at = within[2][None, :]
        seen = (at >= starts[2] - first[2]) & (at < ends[2] - first[2])
    return seen
