"""The backward kernels for sm_90a without a GPU: on the emulator, and by the compiler's log."""

import functools
import math

import gna_machines
import hopper_machine
import jax.numpy as jnp
import numpy as np
import pytest
from gna_oracle import attention, full_mask, operands, random_case
from hopper_machine import NOTHING, Spoiled
from hopper_problems import CHANGES, ROWS, drawn_shapes, missed

from conceptax.kernels import gna
from conceptax.kernels.gna import cuda
from conceptax.kernels.gna.cuda import build
from conceptax.kernels.gna.problem import Operands, Residuals

# Against float64: rounding of results, of probabilities and of their gradients.
TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2}
DIMS = (8, 16, 24, 32, 64, 64, 72, 128)


def columns(heads):
    """Queries that a tile of keys meets at a time; see `HopperBackward`."""
    return 64 if max(heads["dim"], heads["value_dim"]) > 64 else 128


def with_cotangents(case, heads, arrays, dtype):
    """Operands of 16 bits, cotangent, log-sum-exp and delta, and the gradients by the oracle."""
    *given, d_lse = arrays
    given = [None if x is None else np.asarray(x).astype(dtype) for x in given]
    exact = [None if x is None else x.astype(float) for x in given]
    output, lse, *gradients = attention(case, *exact, d_lse)
    delta = (exact[5] * output).sum(-1) - d_lse
    return [*given, lse.astype(np.float32), delta.astype(np.float32)], gradients


def random_problem(seed):
    """Settings, sizes, arrays, gradients, shapes of tiles: few blocks, for time's sake."""
    rng = np.random.default_rng(seed)
    while True:
        case = random_case(rng, most=260)
        kv_heads = int(rng.integers(1, 3))
        heads = {
            "batch": int(rng.integers(1, 3)),
            "heads": kv_heads * int(rng.integers(1, 3)),
            "kv_heads": kv_heads,
            "dim": int(rng.choice(DIMS)),
            "value_dim": int(rng.choice(DIMS)),
            "additional": int(rng.choice([0, 0, 0, 3, 130])),
        }
        tiles = drawn_shapes(rng, case, ROWS, ROWS, ROWS, columns(heads))
        lengths = [-(-x // d) for x, d in zip(case["layout"], case["dilation"], strict=True)]
        blocks = heads["batch"] * heads["heads"] * math.prod(case["dilation"])
        for one in tiles[::2]:
            for n, length in zip(one, lengths, strict=True):
                blocks *= -(-length // n)
        if blocks <= 24:
            break
    dtype = jnp.bfloat16 if rng.integers(2) else jnp.float16
    arrays, gradients = with_cotangents(case, heads, operands(rng, case, heads), dtype)
    return case, heads, arrays, gradients, tiles


def check(problem, seed, spoiled=NOTHING, by_query=True):
    """All gradients, where these are finite and where not."""
    case, heads, arrays, gradients, tiles = problem
    hopper_machine.begin(seed, spoiled)
    got = hopper_machine.backward(case, heads, arrays, tiles, by_query)
    message = f"{case} {heads} {tiles}, seed {seed}, {spoiled}"
    compare(got, gradients if by_query else gradients[1:], arrays[0].dtype.name, message)


def compare(got, gradients, dtype, message):
    tolerance = TOLERANCE[dtype]
    for n, (one, other) in enumerate(zip(got, gradients, strict=True)):
        np.testing.assert_allclose(
            np.asarray(one, float),
            other,
            rtol=tolerance,
            atol=tolerance * max(1, np.abs(other[np.isfinite(other)]).max(initial=0)),
            err_msg=f"gradient {n} of {message}",
        )


@pytest.mark.parametrize("part", range(6))
def test_random_problems(part):
    for seed in range(part * 1000, part * 1000 + 18):
        check(random_problem(seed), seed)


def test_results_are_the_same_whatever_comes_first():
    case, heads, arrays, _, tiles = random_problem(3)
    results = []
    for seed in range(3):
        hopper_machine.begin(seed)
        results.append(hopper_machine.backward(case, heads, arrays, tiles))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def of_what_is_seen(case, heads, arrays):
    """Gradients where what a query does not see is no number at all."""
    q, k, v, ak, av, d_output, lse, delta = (None if x is None else x.astype(float) for x in arrays)
    batch, repeats = len(q), heads["heads"] // heads["kv_heads"]

    def rows(x, more=None):  # [B, heads, tokens, dim]
        x = x.reshape(batch, -1, *x.shape[-2:])
        return np.moveaxis(x if more is None else np.concatenate([x, more], 1), 2, 1)

    mask = full_mask(case)
    tokens, more = len(mask), heads["additional"]
    mask = np.pad(mask, ((0, 0), (0, more)), constant_values=True)
    qr, dr, kr, vr = rows(q), rows(d_output), rows(k, ak), rows(v, av)
    lr, er = (rows(x[..., None])[..., 0] for x in (lse, delta))
    dq, dk, dv = np.zeros_like(qr), np.zeros_like(kr), np.zeros_like(vr)
    scale = heads["dim"] ** -0.5
    for b, h, t in np.ndindex(lr.shape):
        at = b, h // repeats, np.flatnonzero(mask[t])
        p = np.exp(kr[at] @ qr[b, h, t] * scale - lr[b, h, t])
        ds = p * (vr[at] @ dr[b, h, t] - er[b, h, t]) * scale
        dq[b, h, t] = ds @ kr[at]
        dk[at] += np.outer(ds, qr[b, h, t])
        dv[at] += np.outer(p, dr[b, h, t])

    def back(x, like):
        return np.moveaxis(x, 1, 2).reshape(like.shape)

    results = [back(dq, q), back(dk[:, :, :tokens], k), back(dv[:, :, :tokens], v)]
    if more:
        results += [back(dk[:, :, tokens:], ak), back(dv[:, :, tokens:], av)]
    return results


def strange_problem(seed):
    """NaN and infinity among keys and values, and what comes of it from the forward pass."""
    rng = np.random.default_rng(seed)
    case, heads, arrays, _, tiles = random_problem(seed)
    q, k, v, *_, d_output, lse, delta = arrays
    strange = np.zeros((len(q), math.prod(case["layout"]), heads["kv_heads"]), bool)
    for x, value in ((k, np.nan), (v, np.inf), (v, np.nan)):
        b, n, h = (int(rng.integers(size)) for size in strange.shape)
        x.reshape(*strange.shape, -1)[b, n, h, rng.integers(x.shape[-1])] = value
        strange[b, n, h] = True
    seen = np.einsum("qk,bkh->bqh", full_mask(case), strange).astype(bool)
    reached = np.repeat(seen, heads["heads"] // heads["kv_heads"], -1).reshape(lse.shape)
    for x in (d_output, lse, delta):
        x[reached] = np.nan
    return case, heads, arrays, of_what_is_seen(case, heads, arrays), tiles


@pytest.mark.parametrize("seed", range(100, 108))
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_reaches_those_who_see_it_only(seed):
    check(strange_problem(seed), seed)


@pytest.mark.parametrize(("seed", "hopper"), [(100, False), (101, False), (100, True), (101, True)])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_the_call_does_likewise_on_every_machine(seed, hopper):
    case, _, arrays, gradients, _ = strange_problem(seed)
    q, k, v, ak, av, d_output, lse, delta = (None if x is None else jnp.asarray(x) for x in arrays)
    windows = {name: case[name] for name in ("kernel_size", "stride", "dilation", "is_causal")}
    problem = gna.describe(q, k, v, ak, av, **windows)
    residuals = Residuals(Operands(q, k, v, ak, av), d_output, lse)
    with gna_machines.emulator(hopper):
        got = cuda.backward(problem, residuals, d_output, delta)
    compare([x for x in got if x is not None], gradients, arrays[0].dtype.name, f"seed {seed}")


# Between them: stages that come round, masks along every dimension, heads that share keys,
# additional keys, two panels.
SPOILED = [
    ((2, 8, 16), (2, 5, 11), (1, 2, 1), 1, 0, ((2, 8, 8), (1, 8, 16), (2, 8, 8), (1, 8, 8))),
    ((2, 3, 24), (1, 3, 20), (1, 1, 7), 2, 70, ((2, 4, 16), (4, 4, 8), (2, 4, 16), (2, 4, 8))),
]


@functools.cache
def spoiled_problem(n):
    layout, kernel, stride, repeats, additional, tiles = SPOILED[n]
    case = {"layout": layout, "kernel_size": kernel, "stride": stride}
    case |= {"dilation": (1, 1, 1), "is_causal": (False, False, False)}
    heads = {"batch": 1, "heads": repeats, "kv_heads": 1, "dim": 72, "value_dim": 72}
    heads["additional"] = additional
    arrays = operands(np.random.default_rng(n), case, heads)
    arrays, gradients = with_cotangents(case, heads, arrays, jnp.bfloat16)
    return case, heads, arrays, gradients, tiles


def test_what_is_spoiled_shows():
    """Every instruction that orders events, lays out an operand or bounds a mask is needed.

    Both kernels are of one source; that by keys has all instructions. Threads of the emulator are
    none so late as to need the last block's barrier, after which rows know what they meet; and
    columns past the last are zeros, whose gradients add nothing, so masks are not spoiled to be
    wider, as those of the forward kernel are.
    """
    seeds = range(4)

    def run(seed, spoiled):
        n = seed % len(SPOILED)
        check(spoiled_problem(n), seed, spoiled, by_query=False)

    with hopper_machine.sites() as sites:
        for seed in seeds:
            run(seed, NOTHING)
    last = max(site for site in sites if site[0] == "block_barrier")
    changes = CHANGES | {"bit_range": [1, 3]}
    spoiled = [Spoiled(*x, change) for x in sites if x != last for change in changes[x[0]]]
    assert len(spoiled) > 60
    assert [one for one in spoiled if missed(run, seeds, one)] == []


@pytest.mark.skipif(build.compiler("gpu") is None, reason="no nvcc")
@pytest.mark.parametrize(
    ("dim", "by_key", "products", "most"),
    # With the mask, which is some 250 of it, or, by key at 128, 190.
    [
        (128, False, 24, 700),
        (128, True, 24, 520),
        pytest.param(64, False, 16, 660, marks=pytest.mark.slow),
        pytest.param(64, True, 24, 750, marks=pytest.mark.slow),
    ],
)
def test_what_the_compiler_says(dim, by_key, products, most, tmp_path):
    main = hopper_machine.main_loop("backward", f"BFloat16, {dim}, {str(by_key).lower()}", tmp_path)
    assert sum(code.startswith("HGMMA") for code in main) == products
    assert len(main) <= most
