"""Neighborhood attention: meaning, errors, gradients, transformations, backends."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gna_oracle import attention, full_mask, operands, random_case, random_heads

from conceptax.kernels import gna
from conceptax.kernels.gna.backends import boxes
from conceptax.kernels.gna.tiles import key_rows

GOLDEN = [
    "1d_w7",
    "1d_even_w8_s2",
    "1d_causal_w6_s3",
    "2d_w5x3",
    "2d_w4x6_s2x3_d1x1",
    "2d_gqa",
    "2d_dil_causal",
    "2d_context",
    "3d_w3x4x3_s1x2x3",
]
CPU_BACKENDS = ["reference", "xla"]

# Scores and outputs are dot products of a few hundred float32 terms of size one: errors of a few
# 2**-24 times sqrt(terms) each, against float64.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def settings(case: dict) -> dict:
    return {name: case[name] for name in ("kernel_size", "stride", "dilation", "is_causal")}


def with_gradients(case, arrays, implementation, **options):
    """Output, log-sum-exp and gradients, compiled without costly optimizations."""
    *inputs, d_output, d_lse = arrays
    present = [x is not None for x in inputs]

    def run(inputs, cotangents):
        def call(*given):
            given = iter(given)
            q, k, v, ak, av = (next(given) if is_in else None for is_in in present)
            return gna.neighborhood_attention(
                q,
                k,
                v,
                additional_keys=ak,
                additional_values=av,
                return_lse=True,
                implementation=implementation,
                **settings(case),
                **options,
            )

        results, pull = jax.vjp(call, *inputs)
        return *results, *pull(cotangents)

    fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    given = [jnp.asarray(x) for x in inputs if x is not None]
    return jax.jit(run, compiler_options=fast)(given, (jnp.asarray(d_output), jnp.asarray(d_lse)))


@pytest.mark.parametrize("implementation", CPU_BACKENDS)
@pytest.mark.parametrize("name", GOLDEN)
def test_matches_the_original(golden, name, implementation):
    with np.load(golden(f"gna_{name}.npz")) as data:
        case = {
            key: tuple(data[f"meta.{key}"].tolist())
            for key in ("kernel_size", "stride", "dilation", "is_causal")
        }
        q, k, v = (jnp.asarray(data[f"in.{key}"]) for key in "qkv")
        additional = {}
        if "in.additional_k" in data:
            additional = {
                "additional_keys": jnp.asarray(data["in.additional_k"]),
                "additional_values": jnp.asarray(data["in.additional_v"]),
            }
        out = gna.neighborhood_attention(
            q, k, v, implementation=implementation, **case, **additional
        )
        np.testing.assert_allclose(out, data["out"], atol=2e-6, rtol=0)
        mask = gna.neighborhood_mask(q.shape[1:-2], **case)
        np.testing.assert_array_equal(mask, data["mask"])


def test_mask_of_random_problems():
    rng = np.random.default_rng(0)
    for _ in range(300):
        case = random_case(rng)
        mask = gna.neighborhood_mask(case["layout"], **settings(case))
        np.testing.assert_array_equal(mask, full_mask(case), err_msg=str(case))


@pytest.mark.parametrize("seed", range(4))
def test_reference_against_float64(seed):
    rng = np.random.default_rng(seed)
    case, heads = random_case(rng, rank=1 + seed % 3), random_heads(rng) | {"additional": seed}
    arrays = operands(rng, case, heads)
    got = with_gradients(case, arrays, "reference")
    for one, other in zip(got, attention(case, *arrays), strict=True):
        np.testing.assert_allclose(one, other, **TOLERANCE)


def array(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


X = {"kernel_size": 3}
Q = array(1, 8, 2, 4)
Q2 = array(1, 8, 8, 2, 4)


@pytest.mark.parametrize(
    ("operands", "options", "message"),
    [
        (
            (Q[0], Q, Q),
            X,
            "query must be [batch, *layout, heads, head_dim] with a layout of 1 to 3 "
            "dimensions, that is of rank 4 to 6; received shape (8, 2, 4).",
        ),
        ((Q, Q, Q[None, None, None]), X, "value must be [batch,"),
        ((Q[:, :0], Q[:, :0], Q[:, :0]), X, "query must not be empty; received shape (1, 0, 2, 4)"),
        (
            (Q2, Q, Q),
            X,
            "query and key must have the same batch and token layout; received shapes "
            "(1, 8, 8, 2, 4) and (1, 8, 2, 4).",
        ),
        ((Q, Q, array(2, 8, 2, 4)), X, "query and value must have the same batch and token layout"),
        ((Q, array(1, 8, 2, 6), Q), X, "same head_dim; received 4 and 6."),
        ((Q, array(1, 8, 1, 4), Q), X, "same number of heads; received 1 and 2."),
        (
            (array(1, 8, 3, 4), Q, Q),
            X,
            "must be a multiple of the number of key heads; received 3 and 2.",
        ),
        (
            (Q, Q, Q.astype(jnp.bfloat16)),
            X,
            "same dtype, one of float32, bfloat16, float16; "
            "received query float32, key float32, value bfloat16.",
        ),
        ((Q.astype(int),) * 3, X, "received query int32"),
        (
            (Q, Q, Q),
            {"kernel_size": 0},
            "kernel_size must be an integer of at least 1, or a "
            "sequence of 1, one for each dimension of the token layout; received 0.",
        ),
        ((Q, Q, Q), {"kernel_size": 2.0}, "kernel_size must be an integer of at least 1"),
        ((Q, Q, Q), {"kernel_size": True}, "kernel_size must be an integer of at least 1"),
        (
            (Q, Q, Q),
            {"kernel_size": (3, 3)},
            "a sequence of 1, one for each dimension of the token layout; received (3, 3).",
        ),
        ((Q2, Q2, Q2), {"kernel_size": (3,)}, "a sequence of 2"),
        ((Q, Q, Q), X | {"stride": 0}, "stride must be an integer of at least 1"),
        ((Q, Q, Q), X | {"stride": False}, "stride must be an integer of at least 1"),
        ((Q, Q, Q), X | {"dilation": -1}, "dilation must be an integer of at least 1"),
        ((Q, Q, Q), X | {"dilation": "2"}, "dilation must be an integer of at least 1"),
        ((Q, Q, Q), X | {"is_causal": 1}, "is_causal must be a bool, or a sequence of 1"),
        ((Q2, Q2, Q2), X | {"is_causal": (True, 0)}, "received (True, 0)"),
        (
            (Q, Q, Q),
            X | {"dilation": 3},
            "kernel_size times dilation must not exceed the tokens "
            "along a dimension; received 3 * 3 = 9 > 8 in dimension 0",
        ),
        (
            (Q, Q, Q),
            {"kernel_size": 9},
            "kernel_size must not exceed the tokens along a dimension; "
            "received 9 > 8 in dimension 0 (kernel_size=(9,), token layout (8,)).",
        ),
        (
            (Q, Q, Q),
            {"kernel_size": 1, "dilation": 9},
            "dilation must not exceed the tokens along "
            "a dimension; received 9 > 8 in dimension 0 (dilation=(9,), token layout (8,)).",
        ),
        (
            (Q2, Q2, Q2),
            X | {"stride": (1, 4)},
            "stride must not exceed kernel_size; received 4 > 3 in dimension 1",
        ),
        (
            (Q, Q, Q),
            X | {"scale": 0.0},
            "scale must be a positive number, or None for head_dim ** -0.5; received 0.0.",
        ),
        ((Q, Q, Q), X | {"scale": float("nan")}, "received nan"),
        (
            (Q, Q, Q),
            X | {"additional_keys": array(1, 5, 2, 4)},
            "received additional_keys without additional_values.",
        ),
        (
            (Q, Q, Q),
            X | {"additional_values": array(1, 5, 2, 4)},
            "received additional_values without additional_keys.",
        ),
        (
            (Q, Q, Q),
            X | {"additional_keys": array(1, 5, 2, 4), "additional_values": array(1, 6, 2, 4)},
            "additional_values must be [batch, additional, kv_heads, head_dim], "
            "here [1, 5, 2, 4] with at least 1 token, the same for keys and values; received shape "
            "(1, 6, 2, 4).",
        ),
        (
            (Q, Q, Q),
            X | {"additional_keys": array(5, 2, 4), "additional_values": array(1, 6, 2, 4)},
            "additional_keys must be",
        ),
        ((Q, Q, Q), X | {"implementation": "fast"}, "implementation must be one of reference, xla"),
    ],
)
def test_wrong_arguments(operands, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gna.neighborhood_attention(*operands, **({} | options))


def test_wrong_layouts():
    with pytest.raises(ValueError, match=r"1 to 3 dimensions; received \(4, 4, 4, 4\)"):
        gna.neighborhood_mask((4, 4, 4, 4), kernel_size=2)
    with pytest.raises(ValueError, match="token_layout must be an integer of at least 1"):
        gna.neighborhood_mask((4, 0), kernel_size=2)
    flat = array(1, 12, 2, 4)
    with pytest.raises(ValueError, match=r"with 16 tokens for the token layout \(4, 4\); received"):
        gna.joint_neighborhood_attention(
            (flat,) * 3, (flat,) * 3, token_layout=(4, 4), kernel_size=2
        )


def test_explicit_requests_never_fall_back(monkeypatch):
    monkeypatch.setattr(gna.BACKENDS["reference"], "unsupported", lambda *_: "it is at rest")
    with pytest.raises(NotImplementedError, match="'reference' cannot do this: it is at rest"):
        gna.neighborhood_attention(Q, Q, Q, **X, implementation="reference")


def problem_of(case, batch=1, heads=1, shards=1):
    x = jax.ShapeDtypeStruct((batch, *case["layout"], heads, 4), jnp.float32)
    return dataclasses.replace(gna.describe(x, x, x, **settings(case)), shards=shards)


def visited(problem, work):
    """How often each query meets each key in the steps of a plan; [N, N] in row-major order."""
    layout = problem.layout
    tokens = np.arange(problem.tokens).reshape(layout)
    counts = np.zeros((problem.tokens, problem.tokens), int)
    firsts = key_rows(problem.windows[0], problem.shards)[0]
    steps = [
        (loop, s, n)
        for loop in work.loops
        for s in range(problem.shards)
        for n in range(len(loop.queries))
    ]
    for loop, shard, n in steps:
        first, groups = loop.queries[n, ::2], loop.queries[n, 1::2]
        first_key, key_groups = loop.keys[shard, n, ::2], loop.keys[shard, n, 1::2]
        np.testing.assert_array_equal(groups, key_groups)
        rows, columns, seen = [], [], []
        for m, (t, b) in enumerate(zip(loop.tile, loop.box, strict=True)):
            assert 0 <= first[m] <= work.queries[m] - t
            assert 0 <= first_key[m] <= work.keys[m] - b
            inside = np.ones((t, b), int)
            if loop.masks[m] is not None:
                start, end = loop.masks[m][loop.mask[shard, n]]
                keys = np.arange(b)
                inside = ((keys >= start[:, None]) & (keys < end[:, None])).astype(int)
            d, g = work.dilation[m], groups[m]
            queries = (first[m] + np.arange(t)) * d + g
            keys = (first_key[m] + np.arange(b)) * d + g
            inside = inside[queries < work.query_layout[m]]
            queries = queries[queries < work.query_layout[m]]
            if m == 0:
                queries, keys = queries + shard * work.query_layout[0], keys + firsts[shard]
            exists = (keys >= 0) & (keys < layout[m])
            assert not inside[:, ~exists].any()
            rows.append(queries)
            columns.append(keys[exists])
            seen.append(inside[:, exists])
        pairs = tokens[np.ix_(*rows)].reshape(-1, 1), tokens[np.ix_(*columns)].reshape(1, -1)
        counts[pairs] += functools.reduce(np.kron, seen)
    return counts


def cut(problem, rng):
    """A plan in more shapes and smaller tiles and pieces than so little work would be worth."""
    costs = {"start": int(rng.choice([0, 8192])), "met": int(rng.choice([0, 2, 32]))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boxes, "COSTS", dataclasses.replace(boxes.COSTS, **costs))
        budget = int(rng.choice([8, 64, 1 << 18]))
        return boxes.plan.__wrapped__(problem, budget, int(rng.integers(1, 4)))


@pytest.mark.parametrize("problems", [200, pytest.param(600, marks=pytest.mark.slow)])
def test_steps_meet_each_pair_once(problems):
    """For random problems, classes and pieces: each visible pair is met once, no other is."""
    rng = np.random.default_rng(1)
    several = pieces = free = joined = 0
    for _ in range(problems):
        case = random_case(rng, most=100)
        problem = problem_of(case, int(rng.choice([1, 4])), int(rng.choice([1, 8])))
        work = cut(problem, rng)
        np.testing.assert_array_equal(visited(problem, work), full_mask(case), err_msg=str(case))
        several += len(work.loops) > 1
        pieces += any(len(np.unique(x.queries, axis=0)) < len(x.queries) for x in work.loops)
        free += any(all(m is None for m in loop.masks) for loop in work.loops)
        joined += len({loop.tile for loop in work.loops}) > 1
    assert min(several, pieces, free, joined) > problems // 12, (several, pieces, free, joined)


@pytest.mark.parametrize("problems", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_steps_of_shards_meet_each_pair_once(problems):
    rng = np.random.default_rng(2)
    halos = 0
    for _ in range(problems):
        case = random_case(rng, most=40)
        shards = int(rng.choice([2, 3, 4]))
        first = case["layout"][0] * shards * case["dilation"][0]
        case["layout"] = (first, *case["layout"][1:])
        problem = problem_of(case, shards=shards)
        work = cut(problem, rng)
        np.testing.assert_array_equal(visited(problem, work), full_mask(case), err_msg=str(case))
        halos += work.key_layout[0] < first
    assert halos > problems // 4, halos
