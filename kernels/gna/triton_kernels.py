"""Neighborhood attention in Triton (arXiv 2504.16922): a forward and three backward kernels.

The queries of a tile see windows whose union is a box of keys. A program takes one tile, and the
tiles of its box, which start at the first key seen rather than on a grid: those that all queries
see whole in a first loop without any mask, the others in a second one, additional keys in a third.
Which are which is worked out from a few integers per program. Rows are read where they lie: inside
a tile they are at the same distances everywhere, dilated or not, so nothing is permuted before.

Operands are contiguous: query and output [B, N, Hq, D], key and value [B, N, Hkv, D], lse and delta
[B, Hq, N] in float32; N is all tokens, in row-major order. Positions count inside the dilation
group. Static arguments, all in three dimensions of which the leading ones may be of length 1:

  WINDOWS      per dimension (length, kernel_size, stride, dilation, is_causal)
  QUERY_TILE   queries of a tile, KEY_TILE keys of a tile; their products are powers of two
  TILES        tiles of the longest dilation group
  HAS_FREE     whether any tile needs no mask, HAS_MASKED whether any does
  WIDE         whether offsets inside a tile need 64 bits

This module needs nothing but triton.
"""

import triton
import triton.language as tl

# Windows of one dimension: queries i and keys j in a group of `length`.


@triton.jit
def _start(i, length, M: tl.constexpr, WINDOWS: tl.constexpr):
    """First key that a query sees."""
    k: tl.constexpr = WINDOWS[M][1]
    s: tl.constexpr = WINDOWS[M][2]
    if WINDOWS[M][4]:
        start = tl.maximum(tl.minimum(i // s * s + (s - 1), length - 1) - (k - 1), 0)
    else:
        leader = tl.minimum(i // s * s + s // 2, length - 1)
        start = tl.minimum(tl.maximum(leader - k // 2, 0), length - k)
    return start


@triton.jit
def _end(i, length, M: tl.constexpr, WINDOWS: tl.constexpr):
    """One past the last key that a query sees."""
    if WINDOWS[M][4]:
        return i + 1
    return _start(i, length, M, WINDOWS) + WINDOWS[M][1]


@triton.jit
def _first_query(j, M: tl.constexpr, WINDOWS: tl.constexpr):
    """First query that sees a key."""
    k: tl.constexpr = WINDOWS[M][1]
    s: tl.constexpr = WINDOWS[M][2]
    if WINDOWS[M][4]:
        return j
    return tl.where(j < k, 0, (j - k + k // 2 - s // 2 + s) // s * s)


@triton.jit
def _last_query(j, length, M: tl.constexpr, WINDOWS: tl.constexpr):
    """One past the last query that sees a key."""
    k: tl.constexpr = WINDOWS[M][1]
    s: tl.constexpr = WINDOWS[M][2]
    behind: tl.constexpr = k if WINDOWS[M][4] else k // 2 - s // 2 + s
    last = (j + behind) // s * s
    return tl.where(j + k >= length, length, tl.minimum(last, length))


@triton.jit
def _keys_of(
    first, length, size: tl.constexpr, tile: tl.constexpr, M: tl.constexpr, WINDOWS: tl.constexpr
):
    """Keys that `size` queries see: (first, tiles, free tiles before them, free tiles)."""
    first = tl.minimum(first, length - 1)
    last = tl.minimum(first + size, length) - 1
    origin = _start(first, length, M, WINDOWS)
    free = tl.cdiv(_start(last, length, M, WINDOWS) - origin, tile)
    until = (_end(first, length, M, WINDOWS) - origin) // tile
    tiles = tl.cdiv(_end(last, length, M, WINDOWS) - origin, tile)
    return (origin, tiles, free, tl.maximum(until - free, 0))


@triton.jit
def _queries_of(
    first, length, size: tl.constexpr, tile: tl.constexpr, M: tl.constexpr, WINDOWS: tl.constexpr
):
    """Queries that see any of `size` keys: as `_keys_of`."""
    first = tl.minimum(first, length - 1)
    last = tl.minimum(first + size, length) - 1
    origin = _first_query(first, M, WINDOWS)
    free = tl.cdiv(_first_query(last, M, WINDOWS) - origin, tile)
    until = (_last_query(first, length, M, WINDOWS) - origin) // tile
    tiles = tl.cdiv(_last_query(last, length, M, WINDOWS) - origin, tile)
    return (origin, tiles, free, tl.maximum(until - free, 0))


# Three dimensions


@triton.jit
def _unravel(index, n1, n2):
    row = index // n2
    i0 = row // n1
    return (i0, row - i0 * n1, index - row * n2)


@triton.jit
def _down(x):
    """Vectors as columns [:, 1]."""
    return (x[0][:, None], x[1][:, None], x[2][:, None])


@triton.jit
def _positions(first, within):
    return (first[0] + within[0], first[1] + within[1], first[2] + within[2])


@triton.jit
def _place(tile, SHAPE: tl.constexpr, TILES: tl.constexpr, WINDOWS: tl.constexpr):
    """Dilation group of the n-th tile, groups before tiles; its lengths; its first position."""
    group = _unravel(tile // (TILES[0] * TILES[1] * TILES[2]), WINDOWS[1][3], WINDOWS[2][3])
    at = _unravel(tile % (TILES[0] * TILES[1] * TILES[2]), TILES[1], TILES[2])
    lengths = (
        tl.cdiv(WINDOWS[0][0] - group[0], WINDOWS[0][3]),
        tl.cdiv(WINDOWS[1][0] - group[1], WINDOWS[1][3]),
        tl.cdiv(WINDOWS[2][0] - group[2], WINDOWS[2][3]),
    )
    return group, lengths, (at[0] * SHAPE[0], at[1] * SHAPE[1], at[2] * SHAPE[2])


@triton.jit
def _token(i, group, WINDOWS: tl.constexpr):
    """Index of a position among all tokens."""
    row = i[0] * WINDOWS[0][3] + group[0]
    row = row * WINDOWS[1][0] + i[1] * WINDOWS[1][3] + group[1]
    return row * WINDOWS[2][0] + i[2] * WINDOWS[2][3] + group[2]


@triton.jit
def _keys_box(
    first,
    lengths,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    return (
        _keys_of(first[0], lengths[0], QUERY_TILE[0], KEY_TILE[0], 0, WINDOWS),
        _keys_of(first[1], lengths[1], QUERY_TILE[1], KEY_TILE[1], 1, WINDOWS),
        _keys_of(first[2], lengths[2], QUERY_TILE[2], KEY_TILE[2], 2, WINDOWS),
    )


@triton.jit
def _queries_box(
    first,
    lengths,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    return (
        _queries_of(first[0], lengths[0], KEY_TILE[0], QUERY_TILE[0], 0, WINDOWS),
        _queries_of(first[1], lengths[1], KEY_TILE[1], QUERY_TILE[1], 1, WINDOWS),
        _queries_of(first[2], lengths[2], KEY_TILE[2], QUERY_TILE[2], 2, WINDOWS),
    )


@triton.jit
def _tiles(box):
    """Number of tiles that need no mask, and of those that do."""
    free = box[0][3] * box[1][3] * box[2][3]
    return free, box[0][1] * box[1][1] * box[2][1] - free


@triton.jit
def _free_tile(n, box, SHAPE: tl.constexpr):
    """First position of the n-th tile of a box that needs no mask."""
    a, b, c = box
    at = _unravel(n, tl.maximum(b[3], 1), tl.maximum(c[3], 1))
    return (
        a[0] + (a[2] + at[0]) * SHAPE[0],
        b[0] + (b[2] + at[1]) * SHAPE[1],
        c[0] + (c[2] + at[2]) * SHAPE[2],
    )


@triton.jit
def _masked_tile(n, box, SHAPE: tl.constexpr):
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
    return (a[0] + t0 * SHAPE[0], b[0] + t1 * SHAPE[1], c[0] + t2 * SHAPE[2])


@triton.jit
def _are_inside(i, lengths):
    return (i[0] < lengths[0]) & (i[1] < lengths[1]) & (i[2] < lengths[2])


# Masks. Along a dimension, the tokens of a visited tile that a token does not see (or is not seen
# by) are some bits, and a visited token is one bit; the bits of all dimensions fit in a word, so
# that one instruction per score tells all.


@triton.jit
def _windows(i, lengths, WINDOWS: tl.constexpr):
    """First keys, and ends of the keys, that queries see; past the group's end as the last one."""
    i0 = tl.minimum(i[0], lengths[0] - 1)
    i1 = tl.minimum(i[1], lengths[1] - 1)
    i2 = tl.minimum(i[2], lengths[2] - 1)
    starts = (
        _start(i0, lengths[0], 0, WINDOWS),
        _start(i1, lengths[1], 1, WINDOWS),
        _start(i2, lengths[2], 2, WINDOWS),
    )
    ends = (
        _end(i0, lengths[0], 0, WINDOWS),
        _end(i1, lengths[1], 1, WINDOWS),
        _end(i2, lengths[2], 2, WINDOWS),
    )
    return _down(starts), _down(ends)


@triton.jit
def _inverse_windows(j, lengths, WINDOWS: tl.constexpr):
    """First queries, and ends of the queries, that see keys."""
    j0 = tl.minimum(j[0], lengths[0] - 1)
    j1 = tl.minimum(j[1], lengths[1] - 1)
    j2 = tl.minimum(j[2], lengths[2] - 1)
    starts = (
        _first_query(j0, 0, WINDOWS),
        _first_query(j1, 1, WINDOWS),
        _first_query(j2, 2, WINDOWS),
    )
    ends = (
        _last_query(j0, lengths[0], 0, WINDOWS),
        _last_query(j1, lengths[1], 1, WINDOWS),
        _last_query(j2, lengths[2], 2, WINDOWS),
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
def _seen(windows, first, within, SHAPE: tl.constexpr):
    """mask[token, visited]: visited tokens are at `within` from `first`, their tile's first."""
    starts, ends = windows
    if SHAPE[0] + SHAPE[1] + SHAPE[2] <= 32:
        hidden = _hidden(starts[0], ends[0], first[0], SHAPE[0])
        hidden |= _hidden(starts[1], ends[1], first[1], SHAPE[1]) << SHAPE[0]
        hidden |= _hidden(starts[2], ends[2], first[2], SHAPE[2]) << (SHAPE[0] + SHAPE[1])
        one = within[0] * 0 + 1
        bits = one << within[0] | one << (within[1] + SHAPE[0])
        bits |= one << (within[2] + (SHAPE[0] + SHAPE[1]))
        seen = (hidden & bits[None, :]) == 0
    else:  # the tile is one row, of a layout that is one row
        at = within[2][None, :]
        seen = (at >= starts[2] - first[2]) & (at < ends[2] - first[2])
    return seen


# Memory


@triton.jit
def _pointers(base, tokens, ROW: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Pointers [token, column] of rows ROW apart; WIDE where offsets need 64 bits."""
    if WIDE:
        tokens = tokens.to(tl.int64)
    return base + tokens[:, None] * ROW + tl.arange(0, BLOCK)[None, :]


@triton.jit
def _load(pointers, keep, MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [token, column]; zero where not kept and in columns that only fill the block."""
    columns = (tl.arange(0, BLOCK) < DIM)[None, :]
    if MASKED:
        keep = keep[:, None]
        if DIM < BLOCK:
            keep = keep & columns
        x = tl.load(pointers, mask=keep, other=0.0)
    elif DIM < BLOCK:
        x = tl.load(pointers, mask=columns, other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def _store(pointers, x, keep, DIM: tl.constexpr, BLOCK: tl.constexpr):
    keep = keep[:, None]
    if DIM < BLOCK:
        keep = keep & (tl.arange(0, BLOCK) < DIM)[None, :]
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask=keep)


@triton.jit
def _key_step(
    n,
    pointers,
    box,
    group,
    lengths,
    windows,
    MASKED: tl.constexpr,
    WINDOWS: tl.constexpr,
    KEY_TILE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
):
    """Keys and values of the n-th tile of a box, free or masked, and which of them are seen."""
    within = _unravel(
        tl.arange(0, KEY_TILE[0] * KEY_TILE[1] * KEY_TILE[2]), KEY_TILE[1], KEY_TILE[2]
    )
    if MASKED:
        first = _masked_tile(n, box, KEY_TILE)
        real = _are_inside(_positions(first, within), lengths)
        seen = _seen(windows, first, within, KEY_TILE)
    else:
        first = _free_tile(n, box, KEY_TILE)
        real = within[0] >= 0  # that is all, and never asked for
        seen = real[None, :]
    row = _token(first, group, WINDOWS).to(tl.int64) * KV_HEADS
    k = _load(pointers[0] + row * DIM, real, MASKED, DIM, BLOCK_DIM)
    v = _load(pointers[1] + row * VALUE_DIM, real, MASKED, VALUE_DIM, BLOCK_VALUE_DIM)
    return k, v, seen


@triton.jit
def _additional_step(
    n,
    pointers,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,
    ADDITIONAL: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
):
    """As `_key_step`, of the n-th KEYS additional keys; only the last may be masked."""
    real = tl.arange(0, KEYS) < ADDITIONAL % KEYS
    row = n * KEYS * KV_HEADS
    k = _load(pointers[0] + row * DIM, real, MASKED, DIM, BLOCK_DIM)
    v = _load(pointers[1] + row * VALUE_DIM, real, MASKED, VALUE_DIM, BLOCK_VALUE_DIM)
    return k, v, real[None, :]


# Forward


@triton.jit
def _attend(
    q, k, v, seen, state, FACTOR: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """A step of the online softmax: (accumulated values, greatest score, sum), scores in bits."""
    acc, top, total = state
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * FACTOR)
    base = new_top
    if MASKED:  # a query may have seen nothing yet
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores * FACTOR - base[:, None])
    fade = tl.exp2(top - base)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, new_top, total * fade + tl.sum(p, 1)


@triton.jit
def forward(
    query,
    key,
    value,
    additional_keys,
    additional_values,
    output,
    lse,
    WINDOWS: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    TILES: tl.constexpr,
    HAS_FREE: tl.constexpr,
    HAS_MASKED: tl.constexpr,
    ADDITIONAL: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and log-sum-exp of one query tile per program, tiles before heads before batch."""
    ROWS: tl.constexpr = QUERY_TILE[0] * QUERY_TILE[1] * QUERY_TILE[2]
    KEYS: tl.constexpr = KEY_TILE[0] * KEY_TILE[1] * KEY_TILE[2]
    TOKENS: tl.constexpr = WINDOWS[0][0] * WINDOWS[1][0] * WINDOWS[2][0]
    GROUPS: tl.constexpr = WINDOWS[0][3] * WINDOWS[1][3] * WINDOWS[2][3]
    COUNT: tl.constexpr = GROUPS * TILES[0] * TILES[1] * TILES[2]
    FACTOR: tl.constexpr = SCALE * 1.4426950408889634  # log2(e)
    program = tl.program_id(0)
    lane = program // COUNT
    head = lane % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    start = (lane // HEADS).to(tl.int64) * TOKENS
    group, lengths, first = _place(program % COUNT, QUERY_TILE, TILES, WINDOWS)

    i = _positions(first, _unravel(tl.arange(0, ROWS), QUERY_TILE[1], QUERY_TILE[2]))
    keep = _are_inside(i, lengths)
    tokens = _token(i, group, WINDOWS)
    rows = (start + tokens) * HEADS + head
    q = _load(_pointers(query, rows, DIM, BLOCK_DIM, False), keep, True, DIM, BLOCK_DIM)

    j = _token(_unravel(tl.arange(0, KEYS), KEY_TILE[1], KEY_TILE[2]), (0, 0, 0), WINDOWS)
    row = start * KV_HEADS + kv_head
    pointers = (
        _pointers(key + row * DIM, j, KV_HEADS * DIM, BLOCK_DIM, WIDE),
        _pointers(value + row * VALUE_DIM, j, KV_HEADS * VALUE_DIM, BLOCK_VALUE_DIM, WIDE),
    )
    box = _keys_box(first, lengths, QUERY_TILE, KEY_TILE, WINDOWS)
    free, masked = _tiles(box)
    acc = tl.zeros([ROWS, BLOCK_VALUE_DIM], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    # fmt: off
    if HAS_FREE:
        for n in range(free):
            k, v, seen = _key_step(
                n, pointers, box, group, lengths, None, False, WINDOWS, KEY_TILE, KV_HEADS, DIM,
                VALUE_DIM, BLOCK_DIM, BLOCK_VALUE_DIM,
            )
            acc, top, total = _attend(q, k, v, seen, (acc, top, total), FACTOR, False, PRECISION)
    if HAS_MASKED:
        windows = _windows(i, lengths, WINDOWS)
        for n in range(masked):
            k, v, seen = _key_step(
                n, pointers, box, group, lengths, windows, True, WINDOWS, KEY_TILE, KV_HEADS, DIM,
                VALUE_DIM, BLOCK_DIM, BLOCK_VALUE_DIM,
            )
            acc, top, total = _attend(q, k, v, seen, (acc, top, total), FACTOR, True, PRECISION)
    if ADDITIONAL > 0:
        j = tl.arange(0, KEYS)
        row = (lane // HEADS * ADDITIONAL * KV_HEADS + kv_head).to(tl.int64)
        pointers = (
            _pointers(additional_keys + row * DIM, j, KV_HEADS * DIM, BLOCK_DIM, False),
            _pointers(
                additional_values + row * VALUE_DIM, j, KV_HEADS * VALUE_DIM, BLOCK_VALUE_DIM, False
            ),
        )
        for n in range(ADDITIONAL // KEYS):
            k, v, seen = _additional_step(
                n, pointers, False, KEYS, ADDITIONAL, KV_HEADS, DIM, VALUE_DIM, BLOCK_DIM,
                BLOCK_VALUE_DIM,
            )
            acc, top, total = _attend(q, k, v, seen, (acc, top, total), FACTOR, False, PRECISION)
        if ADDITIONAL % KEYS > 0:
            k, v, seen = _additional_step(
                ADDITIONAL // KEYS, pointers, True, KEYS, ADDITIONAL, KV_HEADS, DIM, VALUE_DIM,
                BLOCK_DIM, BLOCK_VALUE_DIM,
            )
            acc, top, total = _attend(q, k, v, seen, (acc, top, total), FACTOR, True, PRECISION)
    # fmt: on
    into = _pointers(output, rows, VALUE_DIM, BLOCK_VALUE_DIM, False)
    _store(into, acc / total[:, None], keep, VALUE_DIM, BLOCK_VALUE_DIM)
    into = lse + (start * HEADS + head * TOKENS) + tokens
    tl.store(into, (top + tl.log2(total)) * 0.6931471805599453, mask=keep)  # ln(2)


# Backward. Scores are computed again; delta is the sum of d_output * output minus the cotangent of
# the log-sum-exp, so that d_scores = p * (d_output . value - delta). A gradient is summed by one
# program in a fixed order: results are the same every time.


@triton.jit
def _add_to_query(
    q, do, k, v, seen, lse, delta, dq, FACTOR: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * FACTOR - lse[:, None])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def backward_query(
    query,
    key,
    value,
    additional_keys,
    additional_values,
    d_output,
    lse,
    delta,
    d_query,
    WINDOWS: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    TILES: tl.constexpr,
    HAS_FREE: tl.constexpr,
    HAS_MASKED: tl.constexpr,
    ADDITIONAL: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of one query tile per program, in the order of `forward`."""
    ROWS: tl.constexpr = QUERY_TILE[0] * QUERY_TILE[1] * QUERY_TILE[2]
    KEYS: tl.constexpr = KEY_TILE[0] * KEY_TILE[1] * KEY_TILE[2]
    TOKENS: tl.constexpr = WINDOWS[0][0] * WINDOWS[1][0] * WINDOWS[2][0]
    GROUPS: tl.constexpr = WINDOWS[0][3] * WINDOWS[1][3] * WINDOWS[2][3]
    COUNT: tl.constexpr = GROUPS * TILES[0] * TILES[1] * TILES[2]
    FACTOR: tl.constexpr = SCALE * 1.4426950408889634  # log2(e)
    program = tl.program_id(0)
    lane = program // COUNT
    head = lane % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    start = (lane // HEADS).to(tl.int64) * TOKENS
    group, lengths, first = _place(program % COUNT, QUERY_TILE, TILES, WINDOWS)

    i = _positions(first, _unravel(tl.arange(0, ROWS), QUERY_TILE[1], QUERY_TILE[2]))
    keep = _are_inside(i, lengths)
    tokens = _token(i, group, WINDOWS)
    rows = (start + tokens) * HEADS + head
    q = _load(_pointers(query, rows, DIM, BLOCK_DIM, False), keep, True, DIM, BLOCK_DIM)
    from_output = _pointers(d_output, rows, VALUE_DIM, BLOCK_VALUE_DIM, False)
    do = _load(from_output, keep, True, VALUE_DIM, BLOCK_VALUE_DIM)
    of_head = (start * HEADS + head * TOKENS) + tokens
    log_sum = tl.load(lse + of_head, mask=keep, other=0.0) * 1.4426950408889634
    product = tl.load(delta + of_head, mask=keep, other=0.0)

    j = _token(_unravel(tl.arange(0, KEYS), KEY_TILE[1], KEY_TILE[2]), (0, 0, 0), WINDOWS)
    row = start * KV_HEADS + kv_head
    pointers = (
        _pointers(key + row * DIM, j, KV_HEADS * DIM, BLOCK_DIM, WIDE),
        _pointers(value + row * VALUE_DIM, j, KV_HEADS * VALUE_DIM, BLOCK_VALUE_DIM, WIDE),
    )
    box = _keys_box(first, lengths, QUERY_TILE, KEY_TILE, WINDOWS)
    free, masked = _tiles(box)
    dq = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    # fmt: off
    if HAS_FREE:
        for n in range(free):
            k, v, seen = _key_step(
                n, pointers, box, group, lengths, None, False, WINDOWS, KEY_TILE, KV_HEADS, DIM,
                VALUE_DIM, BLOCK_DIM, BLOCK_VALUE_DIM,
            )
            dq = _add_to_query(q, do, k, v, seen, log_sum, product, dq, FACTOR, False, PRECISION)
    if HAS_MASKED:
        windows = _windows(i, lengths, WINDOWS)
        for n in range(masked):
            k, v, seen = _key_step(
                n, pointers, box, group, lengths, windows, True, WINDOWS, KEY_TILE, KV_HEADS, DIM,
                VALUE_DIM, BLOCK_DIM, BLOCK_VALUE_DIM,
            )
            dq = _add_to_query(q, do, k, v, seen, log_sum, product, dq, FACTOR, True, PRECISION)
    if ADDITIONAL > 0:
        j = tl.arange(0, KEYS)
        row = (lane // HEADS * ADDITIONAL * KV_HEADS + kv_head).to(tl.int64)
        pointers = (
            _pointers(additional_keys + row * DIM, j, KV_HEADS * DIM, BLOCK_DIM, False),
            _pointers(
                additional_values + row * VALUE_DIM, j, KV_HEADS * VALUE_DIM, BLOCK_VALUE_DIM, False
            ),
        )
        for n in range(ADDITIONAL // KEYS):
            k, v, seen = _additional_step(
                n, pointers, False, KEYS, ADDITIONAL, KV_HEADS, DIM, VALUE_DIM, BLOCK_DIM,
                BLOCK_VALUE_DIM,
            )
            dq = _add_to_query(q, do, k, v, seen, log_sum, product, dq, FACTOR, False, PRECISION)
        if ADDITIONAL % KEYS > 0:
            k, v, seen = _additional_step(
                ADDITIONAL // KEYS, pointers, True, KEYS, ADDITIONAL, KV_HEADS, DIM, VALUE_DIM,
                BLOCK_DIM, BLOCK_VALUE_DIM,
            )
            dq = _add_to_query(q, do, k, v, seen, log_sum, product, dq, FACTOR, True, PRECISION)
    # fmt: on
    into = _pointers(d_query, rows, DIM, BLOCK_DIM, False)
    _store(into, dq * SCALE, keep, DIM, BLOCK_DIM)


@triton.jit
def _add_to_keys(
    q, do, k, v, seen, lse, delta, dk, dv, FACTOR: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores are [key, query] here, as the products with queries need them."""
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * FACTOR - lse[None, :])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _query_step(
    n,
    count,
    pointers,
    box,
    group,
    lengths,
    windows,
    MASKED: tl.constexpr,
    WINDOWS: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
):
    """Queries of a tile of a box, and what belongs to them; n counts `count` tiles per head."""
    TOKENS: tl.constexpr = WINDOWS[0][0] * WINDOWS[1][0] * WINDOWS[2][0]
    within = _unravel(
        tl.arange(0, QUERY_TILE[0] * QUERY_TILE[1] * QUERY_TILE[2]), QUERY_TILE[1], QUERY_TILE[2]
    )
    count = tl.maximum(count, 1)
    if MASKED:
        first = _masked_tile(n % count, box, QUERY_TILE)
        keep = _are_inside(_positions(first, within), lengths)
        seen = _seen(windows, first, within, QUERY_TILE)
    else:
        first = _free_tile(n % count, box, QUERY_TILE)
        keep = within[0] >= 0  # that is all, and never asked for
        seen = keep[None, :]
    token = _token(first, group, WINDOWS)
    row = token.to(tl.int64) * HEADS + n // count
    q = _load(pointers[0] + row * DIM, keep, MASKED, DIM, BLOCK_DIM)
    do = _load(pointers[1] + row * VALUE_DIM, keep, MASKED, VALUE_DIM, BLOCK_VALUE_DIM)
    of_head = n // count * TOKENS + token
    if MASKED:
        lse = tl.load(pointers[2] + of_head, mask=keep, other=0.0)
        delta = tl.load(pointers[3] + of_head, mask=keep, other=0.0)
    else:
        lse = tl.load(pointers[2] + of_head)
        delta = tl.load(pointers[3] + of_head)
    return q, do, seen, lse * 1.4426950408889634, delta


@triton.jit
def backward_keys(
    query,
    key,
    value,
    d_output,
    lse,
    delta,
    d_key,
    d_value,
    WINDOWS: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    TILES: tl.constexpr,
    HAS_FREE: tl.constexpr,
    HAS_MASKED: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one key tile per program, from the tiles of queries that see any of it.

    TILES are of keys here, and programs are in the order of `forward`, by key head.
    """
    ROWS: tl.constexpr = QUERY_TILE[0] * QUERY_TILE[1] * QUERY_TILE[2]
    KEYS: tl.constexpr = KEY_TILE[0] * KEY_TILE[1] * KEY_TILE[2]
    TOKENS: tl.constexpr = WINDOWS[0][0] * WINDOWS[1][0] * WINDOWS[2][0]
    GROUPS: tl.constexpr = WINDOWS[0][3] * WINDOWS[1][3] * WINDOWS[2][3]
    COUNT: tl.constexpr = GROUPS * TILES[0] * TILES[1] * TILES[2]
    REPEATS: tl.constexpr = HEADS // KV_HEADS
    FACTOR: tl.constexpr = SCALE * 1.4426950408889634  # log2(e)
    program = tl.program_id(0)
    lane = program // COUNT
    kv_head = lane % KV_HEADS
    head = kv_head * REPEATS
    start = (lane // KV_HEADS).to(tl.int64) * TOKENS
    group, lengths, first = _place(program % COUNT, KEY_TILE, TILES, WINDOWS)

    j = _positions(first, _unravel(tl.arange(0, KEYS), KEY_TILE[1], KEY_TILE[2]))
    keep = _are_inside(j, lengths)
    rows = (start + _token(j, group, WINDOWS)) * KV_HEADS + kv_head
    k = _load(_pointers(key, rows, DIM, BLOCK_DIM, False), keep, True, DIM, BLOCK_DIM)
    from_value = _pointers(value, rows, VALUE_DIM, BLOCK_VALUE_DIM, False)
    v = _load(from_value, keep, True, VALUE_DIM, BLOCK_VALUE_DIM)

    i = _token(_unravel(tl.arange(0, ROWS), QUERY_TILE[1], QUERY_TILE[2]), (0, 0, 0), WINDOWS)
    row = start * HEADS + head
    of_head = start * HEADS + head * TOKENS
    pointers = (
        _pointers(query + row * DIM, i, HEADS * DIM, BLOCK_DIM, WIDE),
        _pointers(d_output + row * VALUE_DIM, i, HEADS * VALUE_DIM, BLOCK_VALUE_DIM, WIDE),
        lse + of_head + i,
        delta + of_head + i,
    )
    box = _queries_box(first, lengths, QUERY_TILE, KEY_TILE, WINDOWS)
    free, masked = _tiles(box)
    dk = tl.zeros([KEYS, BLOCK_DIM], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_VALUE_DIM], tl.float32)
    # fmt: off
    if HAS_FREE:
        for n in range(free * REPEATS):
            q, do, seen, log_sum, product = _query_step(
                n, free, pointers, box, group, lengths, None, False, WINDOWS, QUERY_TILE, HEADS,
                DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE_DIM,
            )
            dk, dv = _add_to_keys(
                q, do, k, v, seen, log_sum, product, dk, dv, FACTOR, False, PRECISION
            )
    if HAS_MASKED:
        windows = _inverse_windows(j, lengths, WINDOWS)
        for n in range(masked * REPEATS):
            q, do, seen, log_sum, product = _query_step(
                n, masked, pointers, box, group, lengths, windows, True, WINDOWS, QUERY_TILE, HEADS,
                DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE_DIM,
            )
            dk, dv = _add_to_keys(
                q, do, k, v, seen, log_sum, product, dk, dv, FACTOR, True, PRECISION
            )
    # fmt: on
    into = _pointers(d_key, rows, DIM, BLOCK_DIM, False)
    _store(into, dk * SCALE, keep, DIM, BLOCK_DIM)
    into = _pointers(d_value, rows, VALUE_DIM, BLOCK_VALUE_DIM, False)
    _store(into, dv, keep, VALUE_DIM, BLOCK_VALUE_DIM)


@triton.jit
def backward_additional(
    query,
    key,
    value,
    d_output,
    lse,
    delta,
    d_key,
    d_value,
    BATCH: tl.constexpr,
    TOKENS: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    ADDITIONAL: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of KEYS additional keys per program from a part of the queries.

    Every query sees these keys, so the queries are cut into parts of PART tiles of ROWS; gradients
    are [parts, B, A, Hkv, D] in float32, to be summed over the parts.
    """
    COUNT: tl.constexpr = (ADDITIONAL + KEYS - 1) // KEYS
    REPEATS: tl.constexpr = HEADS // KV_HEADS
    FACTOR: tl.constexpr = SCALE * 1.4426950408889634  # log2(e)
    program = tl.program_id(0)
    kv_head = program // COUNT % KV_HEADS
    lane = program // (COUNT * KV_HEADS)
    batch = lane % BATCH
    start = batch.to(tl.int64) * TOKENS

    j = program % COUNT * KEYS + tl.arange(0, KEYS)
    keep = j < ADDITIONAL
    rows = (batch.to(tl.int64) * ADDITIONAL + j) * KV_HEADS + kv_head
    k = _load(_pointers(key, rows, DIM, BLOCK_DIM, False), keep, True, DIM, BLOCK_DIM)
    from_value = _pointers(value, rows, VALUE_DIM, BLOCK_VALUE_DIM, False)
    v = _load(from_value, keep, True, VALUE_DIM, BLOCK_VALUE_DIM)
    dk = tl.zeros([KEYS, BLOCK_DIM], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_VALUE_DIM], tl.float32)
    for n in range(PART * REPEATS):
        head = kv_head * REPEATS + n // PART
        i = (lane // BATCH * PART + n % PART) * ROWS + tl.arange(0, ROWS)
        real = i < TOKENS
        row = (start + i) * HEADS + head
        q = _load(_pointers(query, row, DIM, BLOCK_DIM, False), real, True, DIM, BLOCK_DIM)
        from_output = _pointers(d_output, row, VALUE_DIM, BLOCK_VALUE_DIM, False)
        do = _load(from_output, real, True, VALUE_DIM, BLOCK_VALUE_DIM)
        of_head = (start * HEADS + head * TOKENS) + i
        log_sum = tl.load(lse + of_head, mask=real, other=0.0) * 1.4426950408889634
        product = tl.load(delta + of_head, mask=real, other=0.0)
        dk, dv = _add_to_keys(q, do, k, v, keep, log_sum, product, dk, dv, FACTOR, False, PRECISION)
    rows = (lane.to(tl.int64) * ADDITIONAL + j) * KV_HEADS + kv_head
    into = _pointers(d_key, rows, DIM, BLOCK_DIM, False)
    _store(into, dk * SCALE, keep, DIM, BLOCK_DIM)
    into = _pointers(d_value, rows, VALUE_DIM, BLOCK_VALUE_DIM, False)
    _store(into, dv, keep, VALUE_DIM, BLOCK_VALUE_DIM)
