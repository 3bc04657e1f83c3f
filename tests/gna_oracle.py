"""Neighborhood attention in numpy float64, written from the equations, apart from the package."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def window(length: int, k: int, s: int, d: int, causal: bool) -> np.ndarray:
    """mask[i, j] of one dimension, position by position."""
    mask = np.zeros((length, length), bool)
    for x in range(length):
        group = range(x % d, length, d)
        i, last = x // d, len(group) - 1
        if causal:
            leader = min(i // s * s + s - 1, last)
            start, end = max(leader - k + 1, 0), i + 1
        else:
            leader = min(i // s * s + s // 2, last)
            start = min(max(leader - k // 2, 0), len(group) - k)
            end = start + k
        mask[x, list(group)[start:end]] = True
    return mask


def full_mask(case: dict) -> np.ndarray:
    """mask[i, j] over row-major tokens."""
    settings = zip(
        case["layout"],
        case["kernel_size"],
        case["stride"],
        case["dilation"],
        case["is_causal"],
        strict=True,
    )
    return functools.reduce(np.kron, (window(*one) for one in settings))


def attention(case: dict, q, k, v, ak=None, av=None, d_output=None, d_lse=None, scale=None):
    """Output and log-sum-exp; with their cotangents also the gradients of q, k, v, ak, av."""
    return masked(full_mask(case), q, k, v, ak, av, d_output, d_lse, scale)


def masked(mask, q, k, v, ak=None, av=None, d_output=None, d_lse=None, scale=None):
    """The same for any mask [..., queries, keys]."""
    arrays = [None if x is None else np.asarray(x, np.float64) for x in (q, k, v, ak, av)]
    q, k, v, ak, av = arrays
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, kv_heads = q.shape[0], q.shape[-2], k.shape[-2]
    tokens = mask.shape[-1]

    def rows(x):  # [B, heads, tokens, dim]
        return np.moveaxis(x.reshape(batch, -1, *x.shape[-2:]), 2, 1)

    def keys(x, additional):
        x = rows(x) if additional is None else np.concatenate([rows(x), rows(additional)], 2)
        return np.repeat(x, heads // kv_heads, axis=1)

    qr, kr, vr = rows(q), keys(k, ak), keys(v, av)
    widths = ((0, 0),) * (mask.ndim - 1)
    mask = np.pad(mask, (*widths, (0, kr.shape[2] - tokens)), constant_values=True)
    scores = np.where(mask, np.einsum("bhqd,bhkd->bhqk", qr, kr) * scale, -np.inf)
    with np.errstate(divide="ignore"):  # of a query that sees nothing
        top = np.maximum(scores.max(-1, keepdims=True), -1e300)
        total = np.exp(scores - top).sum(-1, keepdims=True)
        lse = np.log(total) + top
    p = np.exp(scores - np.where(total == 0, 0, lse))
    out = p @ vr

    def back(x, shape):
        return np.moveaxis(x, 1, 2).reshape(shape)

    results = [back(out, (*q.shape[:-1], v.shape[-1])), back(lse, q.shape[:-1])]
    if d_output is None:
        return results
    do = rows(np.asarray(d_output, np.float64))
    delta = (do * out).sum(-1, keepdims=True)
    if d_lse is not None:
        delta = delta - rows(np.asarray(d_lse, np.float64)[..., None])
    ds = p * (do @ np.swapaxes(vr, -1, -2) - delta) * scale
    dq, dk, dv = ds @ kr, np.swapaxes(ds, -1, -2) @ qr, np.swapaxes(p, -1, -2) @ do

    def summed(x):  # over the query heads that share a key head
        return x.reshape(batch, kv_heads, -1, *x.shape[2:]).sum(2)

    dk, dv = summed(dk), summed(dv)
    results += [
        back(dq, q.shape),
        back(dk[:, :, :tokens], k.shape),
        back(dv[:, :, :tokens], v.shape),
    ]
    if ak is not None:
        results += [back(dk[:, :, tokens:], ak.shape), back(dv[:, :, tokens:], av.shape)]
    return results


def random_case(rng: np.random.Generator, most: int = 200, rank: int | None = None) -> dict:
    """Settings of a random problem of at most `most` tokens."""
    rank = int(rng.integers(1, 4)) if rank is None else rank
    longest = {1: 40, 2: 14, 3: 7}[rank]
    while True:
        layout = rng.integers(1, longest + 1, rank)
        if layout.prod() <= most:
            break
    dilation = [int(rng.integers(1, min(x, 4) + 1)) for x in layout]
    kernel = [int(rng.integers(1, x // d + 1)) for x, d in zip(layout, dilation, strict=True)]
    return {
        "layout": tuple(map(int, layout)),
        "kernel_size": tuple(kernel),
        "stride": tuple(int(rng.integers(1, k + 1)) for k in kernel),
        "dilation": tuple(dilation),
        "is_causal": tuple(bool(rng.integers(2)) for _ in kernel),
    }


def random_heads(rng: np.random.Generator) -> dict:
    """Batch, heads, dimensions and number of additional keys of a random problem."""
    kv_heads = int(rng.integers(1, 3))
    return {
        "batch": int(rng.integers(1, 3)),
        "heads": kv_heads * int(rng.integers(1, 4)),
        "kv_heads": kv_heads,
        "dim": int(rng.choice([4, 8])),
        "value_dim": int(rng.choice([4, 8])),
        "additional": int(rng.choice([0, 0, 3])),
    }


def operands(rng: np.random.Generator, case: dict, heads: dict) -> list:
    """q, k, v, additional keys and values (or None), and cotangents of output and log-sum-exp."""
    b, hq, hk, d, dv = (heads[n] for n in ("batch", "heads", "kv_heads", "dim", "value_dim"))
    x, a = case["layout"], heads["additional"]
    shapes = [(b, *x, hq, d), (b, *x, hk, d), (b, *x, hk, dv)]
    shapes += [(b, a, hk, d), (b, a, hk, dv)] if a else [None, None]
    shapes += [(b, *x, hq, dv), (b, *x, hq)]
    return [None if s is None else rng.standard_normal(s).astype(np.float32) for s in shapes]


def dense_under(masks):
    """Stands in for the dense attention of joint models, [B, L, H, D]: each call takes the next of
    `masks`, over all tokens and true where a query sees a key, in place of its own."""

    def attend(query, key, value, *, scale, mask):
        assert scale is None
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        weights = jax.nn.softmax(jnp.where(next(masks), logits, -jnp.inf))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value)

    return attend
