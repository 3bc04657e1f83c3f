"""Neighborhood attention in Triton (arXiv 2504.16922): a forward and three backward kernels.

The queries of a tile see windows whose union is a box of keys. A program takes one tile, and the
tiles of its box, which start at the first key seen rather than on a grid: those that all queries
see whole in a first loop without any mask, the others in a second one, additional keys in a third.
Which are which is worked out from a few integers per program (`triton_geometry`). Rows are read
where they lie: inside a tile they are at the same distances everywhere, dilated or not, so nothing
is permuted before.

Operands are contiguous: query and output [B, N, Hq, D], key and value [B, N, Hkv, D], log-sum-exps
and delta [B, Hq, N] in float32; N is all tokens, in row-major order. `S` is `Static`. Nothing but
triton is needed.
"""
# Types here are those of the device, which a checker of Python does not know.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl

from .triton_geometry import (
    Static,
    are_inside,
    are_seen,
    free_tile,
    inverse_windows,
    keys_box,
    masked_tile,
    place_of,
    positions,
    queries_box,
    steps_of,
    token_of,
    windows_of,
    within_tile,
)

__all__ = ["Static", "backward_additional", "backward_keys", "backward_query", "forward"]

# Memory


@triton.jit
def _pointers(base, tokens, ROW: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers [token, column] of rows ROW apart."""
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
def _load_rows(x, y, rows, keep, S: tl.constexpr):
    """Rows of two arrays [rows, D] and [rows, Dv]; zero where not kept."""
    from_x = _pointers(x, rows, S.dim, S.block_dim)
    from_y = _pointers(y, rows, S.value_dim, S.block_value_dim)
    return (
        _load(from_x, keep, True, S.dim, S.block_dim),
        _load(from_y, keep, True, S.value_dim, S.block_value_dim),
    )


@triton.jit
def _store_rows(x, rows, values, keep, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Writes kept rows of an array [rows, DIM]."""
    keep = keep[:, None]
    if DIM < BLOCK:
        keep = keep & (tl.arange(0, BLOCK) < DIM)[None, :]
    values = values.to(x.dtype.element_ty)
    tl.store(_pointers(x, rows, DIM, BLOCK), values, mask=keep)


@triton.jit
def _tile_pointers(x, y, row, tokens, HEADS: tl.constexpr, S: tl.constexpr):
    """Pointers into [N, HEADS, D] and [N, HEADS, Dv] to what is `tokens` behind `row`."""
    if S.wide:
        tokens = tokens.to(tl.int64)
    return (
        _pointers(x + row * S.dim, tokens, HEADS * S.dim, S.block_dim),
        _pointers(y + row * S.value_dim, tokens, HEADS * S.value_dim, S.block_value_dim),
    )


@triton.jit
def _key_step(n, pointers, box, group, lengths, windows, MASKED: tl.constexpr, S: tl.constexpr):
    """Keys and values of the n-th tile of a box, free or masked, and which of them are seen."""
    within = within_tile(S.key_shape)
    if MASKED:
        first = masked_tile(n, box, S.key_shape)
        real = are_inside(positions(first, within), lengths)
        seen = are_seen(windows, first, within, S.key_shape)
    else:
        first = free_tile(n, box, S.key_shape)
        real = within[0] >= 0  # that is all, and never asked for
        seen = real[None, :]
    row = token_of(first, group, S).to(tl.int64) * S.kv_heads
    k = _load(pointers[0] + row * S.dim, real, MASKED, S.dim, S.block_dim)
    v = _load(pointers[1] + row * S.value_dim, real, MASKED, S.value_dim, S.block_value_dim)
    return k, v, seen


@triton.jit
def _additional_step(n, pointers, MASKED: tl.constexpr, S: tl.constexpr):
    """As `_key_step`, of the n-th tile of the additional keys; only the last may be masked."""
    real = tl.arange(0, S.keys) < S.additional % S.keys
    row = tl.cast(n, tl.int64) * S.keys * S.kv_heads
    k = _load(pointers[0] + row * S.dim, real, MASKED, S.dim, S.block_dim)
    v = _load(pointers[1] + row * S.value_dim, real, MASKED, S.value_dim, S.block_value_dim)
    return k, v, real[None, :]


@triton.jit
def _query_step(
    n, count, pointers, box, group, lengths, windows, MASKED: tl.constexpr, S: tl.constexpr
):
    """Queries of a tile of a box, and what belongs to them; n counts `count` tiles per head."""
    within = within_tile(S.query_shape)
    count = tl.maximum(count, 1)
    if MASKED:
        first = masked_tile(n % count, box, S.query_shape)
        real = are_inside(positions(first, within), lengths)
        seen = are_seen(windows, first, within, S.query_shape)
    else:
        first = free_tile(n % count, box, S.query_shape)
        real = within[0] >= 0  # that is all, and never asked for
        seen = real[None, :]
    token = token_of(first, group, S)
    row = token.to(tl.int64) * S.heads + n // count
    q = _load(pointers[0] + row * S.dim, real, MASKED, S.dim, S.block_dim)
    do = _load(pointers[1] + row * S.value_dim, real, MASKED, S.value_dim, S.block_value_dim)
    of_head = n // count * S.tokens + token
    if MASKED:
        lse = tl.load(pointers[2] + of_head, mask=real, other=0.0)
        delta = tl.load(pointers[3] + of_head, mask=real, other=0.0)
    else:
        lse = tl.load(pointers[2] + of_head)
        delta = tl.load(pointers[3] + of_head)
    return q, do, seen, lse, delta


# Forward


@triton.jit
def _attend(q, k, v, seen, state, MASKED: tl.constexpr, S: tl.constexpr):
    """A step of the online softmax: (accumulated values, greatest score, sum), scores in bits."""
    acc, top, total = state
    scores = tl.dot(q, tl.trans(k), input_precision=S.precision)
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * S.factor)
    base = new_top
    if MASKED:  # a query may have seen nothing yet
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores * S.factor - base[:, None])
    fade = tl.exp2(top - base)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=S.precision)
    return acc, new_top, total * fade + tl.sum(p, 1)


@triton.jit
def forward(query, key, value, additional_keys, additional_values, output, lse, S: tl.constexpr):
    """Output and log-sum-exp of one query tile per program, tiles before heads before batch."""
    program = tl.program_id(0)
    lane = program // S.count
    head = lane % S.heads
    start = (lane // S.heads).to(tl.int64) * S.tokens
    group, lengths, first = place_of(program % S.count, S.query_shape, S)
    i = positions(first, within_tile(S.query_shape))
    keep = are_inside(i, lengths)
    tokens = token_of(i, group, S)
    rows = (start + tokens) * S.heads + head
    q = _load(_pointers(query, rows, S.dim, S.block_dim), keep, True, S.dim, S.block_dim)

    row = start * S.kv_heads + head // S.repeats
    j = token_of(within_tile(S.key_shape), (0, 0, 0), S)
    pointers = _tile_pointers(key, value, row, j, S.kv_heads, S)
    box = keys_box(first, lengths, S)
    free, masked = steps_of(box)
    acc = tl.full([S.rows, S.block_value_dim], 0.0, tl.float32)
    top = tl.full([S.rows], float("-inf"), tl.float32)
    total = tl.full([S.rows], 0.0, tl.float32)
    if S.has_free:
        for n in range(free):
            k, v, seen = _key_step(n, pointers, box, group, lengths, None, False, S)
            acc, top, total = _attend(q, k, v, seen, (acc, top, total), False, S)
    if S.has_masked:
        windows = windows_of(i, lengths, S)
        for n in range(masked):
            k, v, seen = _key_step(n, pointers, box, group, lengths, windows, True, S)
            acc, top, total = _attend(q, k, v, seen, (acc, top, total), True, S)
    if S.additional > 0:
        row = (lane // S.heads).to(tl.int64) * S.additional * S.kv_heads + head // S.repeats
        j = tl.arange(0, S.keys)
        pointers = _tile_pointers(additional_keys, additional_values, row, j, S.kv_heads, S)
        for n in range(S.additional // S.keys):
            k, v, seen = _additional_step(n, pointers, False, S)
            acc, top, total = _attend(q, k, v, seen, (acc, top, total), False, S)
        if S.additional % S.keys > 0:
            k, v, seen = _additional_step(S.additional // S.keys, pointers, True, S)
            acc, top, total = _attend(q, k, v, seen, (acc, top, total), True, S)
    _store_rows(output, rows, acc / total[:, None], keep, S.value_dim, S.block_value_dim)
    of_head = start * S.heads + head * S.tokens + tokens
    tl.store(lse + of_head, (top + tl.log2(total)) * 0.6931471805599453, mask=keep)  # ln(2)


# Backward. Scores are computed again, from log-sum-exps in bits; delta is the sum of d_output *
# output minus the cotangent of the log-sum-exp, so that d_scores = p * (d_output . value - delta).
# A gradient is summed by one program in a fixed order: results are the same every time.


@triton.jit
def _add_to_query(q, do, k, v, seen, lse, delta, dq, MASKED: tl.constexpr, S: tl.constexpr):
    scores = tl.dot(q, tl.trans(k), input_precision=S.precision)
    p = tl.exp2(scores * S.factor - lse[:, None])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=S.precision)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=S.precision)


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
    S: tl.constexpr,
):
    """Gradient of one query tile per program, in the order of `forward`."""
    program = tl.program_id(0)
    lane = program // S.count
    head = lane % S.heads
    start = (lane // S.heads).to(tl.int64) * S.tokens
    group, lengths, first = place_of(program % S.count, S.query_shape, S)
    i = positions(first, within_tile(S.query_shape))
    keep = are_inside(i, lengths)
    tokens = token_of(i, group, S)
    rows = (start + tokens) * S.heads + head
    q, do = _load_rows(query, d_output, rows, keep, S)
    of_head = start * S.heads + head * S.tokens + tokens
    sums = tl.load(lse + of_head, mask=keep, other=0.0)
    products = tl.load(delta + of_head, mask=keep, other=0.0)

    row = start * S.kv_heads + head // S.repeats
    j = token_of(within_tile(S.key_shape), (0, 0, 0), S)
    pointers = _tile_pointers(key, value, row, j, S.kv_heads, S)
    box = keys_box(first, lengths, S)
    free, masked = steps_of(box)
    dq = tl.full([S.rows, S.block_dim], 0.0, tl.float32)
    if S.has_free:
        for n in range(free):
            k, v, seen = _key_step(n, pointers, box, group, lengths, None, False, S)
            dq = _add_to_query(q, do, k, v, seen, sums, products, dq, False, S)
    if S.has_masked:
        windows = windows_of(i, lengths, S)
        for n in range(masked):
            k, v, seen = _key_step(n, pointers, box, group, lengths, windows, True, S)
            dq = _add_to_query(q, do, k, v, seen, sums, products, dq, True, S)
    if S.additional > 0:
        row = (lane // S.heads).to(tl.int64) * S.additional * S.kv_heads + head // S.repeats
        j = tl.arange(0, S.keys)
        pointers = _tile_pointers(additional_keys, additional_values, row, j, S.kv_heads, S)
        for n in range(S.additional // S.keys):
            k, v, seen = _additional_step(n, pointers, False, S)
            dq = _add_to_query(q, do, k, v, seen, sums, products, dq, False, S)
        if S.additional % S.keys > 0:
            k, v, seen = _additional_step(S.additional // S.keys, pointers, True, S)
            dq = _add_to_query(q, do, k, v, seen, sums, products, dq, True, S)
    _store_rows(d_query, rows, dq * S.scale, keep, S.dim, S.block_dim)


@triton.jit
def _add_to_keys(q, do, k, v, seen, lse, delta, dk, dv, MASKED: tl.constexpr, S: tl.constexpr):
    """Scores are [key, query] here, as the products with queries need them."""
    scores = tl.dot(k, tl.trans(q), input_precision=S.precision)
    p = tl.exp2(scores * S.factor - lse[None, :])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=S.precision)
    dp = tl.dot(v, tl.trans(do), input_precision=S.precision)
    ds = p * (dp - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=S.precision), dv


@triton.jit
def backward_keys(query, key, value, d_output, lse, delta, d_key, d_value, S: tl.constexpr):
    """Gradients of one key tile per program, from the tiles of queries that see any of it.

    Tiles are of keys here, and programs are in the order of `forward`, by key head.
    """
    program = tl.program_id(0)
    lane = program // S.count
    kv_head = lane % S.kv_heads
    start = (lane // S.kv_heads).to(tl.int64) * S.tokens
    group, lengths, first = place_of(program % S.count, S.key_shape, S)
    j = positions(first, within_tile(S.key_shape))
    keep = are_inside(j, lengths)
    rows = (start + token_of(j, group, S)) * S.kv_heads + kv_head
    k, v = _load_rows(key, value, rows, keep, S)

    head = kv_head * S.repeats
    i = token_of(within_tile(S.query_shape), (0, 0, 0), S)
    from_query, from_output = _tile_pointers(query, d_output, start * S.heads + head, i, S.heads, S)
    of_head = start * S.heads + head * S.tokens + i
    pointers = (from_query, from_output, lse + of_head, delta + of_head)
    box = queries_box(first, lengths, S)
    free, masked = steps_of(box)
    dk = tl.full([S.keys, S.block_dim], 0.0, tl.float32)
    dv = tl.full([S.keys, S.block_value_dim], 0.0, tl.float32)
    if S.has_free:
        for n in range(free * S.repeats):
            q, do, seen, sums, products = _query_step(
                n, free, pointers, box, group, lengths, None, False, S
            )
            dk, dv = _add_to_keys(q, do, k, v, seen, sums, products, dk, dv, False, S)
    if S.has_masked:
        windows = inverse_windows(j, lengths, S)
        for n in range(masked * S.repeats):
            q, do, seen, sums, products = _query_step(
                n, masked, pointers, box, group, lengths, windows, True, S
            )
            dk, dv = _add_to_keys(q, do, k, v, seen, sums, products, dk, dv, True, S)
    _store_rows(d_key, rows, dk * S.scale, keep, S.dim, S.block_dim)
    _store_rows(d_value, rows, dv, keep, S.value_dim, S.block_value_dim)


@triton.jit
def backward_additional(query, key, value, d_output, lse, delta, d_key, d_value, S: tl.constexpr):
    """Gradients of one tile of additional keys per program, from a part of the queries.

    Every query sees these keys, so the queries are cut into parts of some tiles; gradients are
    [parts, B, A, Hkv, D] in float32, to be summed over the parts.
    """
    count: tl.constexpr = (S.additional + S.keys - 1) // S.keys
    program = tl.program_id(0)
    kv_head = program // count % S.kv_heads
    lane = program // count // S.kv_heads
    batch = (lane % S.batch).to(tl.int64)
    j = program % count * S.keys + tl.arange(0, S.keys)
    keep = j < S.additional
    k, v = _load_rows(key, value, (batch * S.additional + j) * S.kv_heads + kv_head, keep, S)
    dk = tl.full([S.keys, S.block_dim], 0.0, tl.float32)
    dv = tl.full([S.keys, S.block_value_dim], 0.0, tl.float32)
    for n in range(S.part * S.repeats):
        head = kv_head * S.repeats + n // S.part
        i = (lane // S.batch * S.part + n % S.part) * S.rows + tl.arange(0, S.rows)
        real = i < S.tokens
        q, do = _load_rows(query, d_output, (batch * S.tokens + i) * S.heads + head, real, S)
        of_head = (batch * S.heads + head) * S.tokens + i
        sums = tl.load(lse + of_head, mask=real, other=0.0)
        products = tl.load(delta + of_head, mask=real, other=0.0)
        dk, dv = _add_to_keys(q, do, k, v, keep, sums, products, dk, dv, False, S)
    rows = (lane.to(tl.int64) * S.additional + j) * S.kv_heads + kv_head
    _store_rows(d_key, rows, dk * S.scale, keep, S.dim, S.block_dim)
    _store_rows(d_value, rows, dv, keep, S.value_dim, S.block_value_dim)
