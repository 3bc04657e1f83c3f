"""The kernels for sm_90a, without a GPU: on an emulator of the machine, and by the compiler's log.

The emulator has what the kernels ask of TMA, wgmma and barriers in shared memory, with copies and
products that end late, early or out of order; see `tests/hopper_emulator.h`.
"""

import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import gna_machines
import hopper_machine
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gna_oracle import attention, full_mask, operands, random_case
from hopper_machine import NOTHING, Spoiled
from hopper_problems import CHANGES, ROWS, drawn_shapes, missed

from conceptax.kernels import gna
from conceptax.kernels.gna import cuda
from conceptax.kernels.gna.cuda import build

# Against float64: rounding of results, and of the probabilities.
TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2}


def random_problem(seed: int, dims: tuple[int, ...] = (8, 32, 40, 64, 72, 96, 128)):
    """Settings, sizes, operands of 16 bits with cotangents, a generator for what else is drawn."""
    rng = np.random.default_rng(seed)
    case = random_case(rng, most=200)
    if math.prod(case["dilation"]) > 16:  # each is a tile at least
        case["dilation"] = (1, *case["dilation"][1:])
    most = 3 if math.prod(case["dilation"]) < 4 else 2
    weights = np.array([3.0] + [1.0] * (len(dims) - 1))
    dim, value_dim = (int(x) for x in rng.choice(dims, 2, p=weights / weights.sum()))
    kv_heads = int(rng.integers(1, most))
    heads = {
        "batch": int(rng.integers(1, 3)),
        "heads": kv_heads * int(rng.integers(1, most)),
        "kv_heads": kv_heads,
        "dim": dim,
        "value_dim": value_dim if rng.integers(2) else dim,
        "additional": int(rng.choice([0, 0, 0, 3, 130])),
    }
    dtype = jnp.bfloat16 if rng.integers(2) else jnp.float16
    arrays = operands(rng, case, heads)
    arrays = [None if x is None else np.asarray(x).astype(dtype) for x in arrays[:6]]
    return rng, case, heads, arrays


def compare(got, expected, dtype, message):
    """All results, the second of which is a log-sum-exp in float32."""
    for n, (one, other) in enumerate(zip(got, expected, strict=True)):
        tolerance = 2e-4 if n == 1 else TOLERANCE[dtype]
        finite = np.where(np.isfinite(other), np.abs(other), 0)
        np.testing.assert_allclose(
            np.asarray(one, float),
            other,
            rtol=tolerance,
            atol=tolerance * max(1, finite.max()),
            err_msg=f"result {n} of {message}",
        )


@functools.cache
def expected_forward(seed):
    _, case, _, arrays = random_problem(seed)
    return attention(case, *(None if x is None else x.astype(float) for x in arrays[:5]))


def check_forward(seed, spoiled=NOTHING):
    rng, case, heads, arrays = random_problem(seed)
    tile, box = drawn_shapes(rng, case, ROWS, ROWS)
    hopper_machine.begin(seed, spoiled)
    got = hopper_machine.forward(case, heads, arrays[:5], tile, box)
    compare(got, expected_forward(seed), arrays[0].dtype.name, f"{case} {heads} {tile} {box}")


@pytest.mark.parametrize("part", range(8))
def test_forward_of_random_problems(part):
    for n in range(26):
        check_forward(part * 1000 + n)


# Between them: many steps, masks along every dimension, additional keys, two panels.
SPOILED_FORWARD = [
    ((2, 8, 24), (2, 5, 20), (1, 2, 1), 3, (2, 8, 8), (1, 8, 16)),
    ((3, 3, 40), (2, 3, 40), (1, 3, 7), 130, (4, 2, 16), (4, 4, 8)),
]


@functools.cache
def spoiled_forward(n):
    """A problem of two panels with what is to come of it."""
    layout, kernel, stride, additional, tile, box = SPOILED_FORWARD[n]
    case = {"layout": layout, "kernel_size": kernel, "stride": stride}
    case |= {"dilation": (1, 1, 1), "is_causal": (False, False, False)}
    heads = {"batch": 1, "heads": 1, "kv_heads": 1, "dim": 72, "value_dim": 72}
    heads["additional"] = additional
    arrays = operands(np.random.default_rng(n), case, heads)[:5]
    arrays = [x.astype(jnp.bfloat16) for x in arrays]
    return case, heads, arrays, tile, box, attention(case, *(x.astype(float) for x in arrays))


def check_spoiled_forward(seed, spoiled):
    case, heads, arrays, tile, box, expected = spoiled_forward(seed % len(SPOILED_FORWARD))
    hopper_machine.begin(seed, spoiled)
    got = hopper_machine.forward(case, heads, arrays, tile, box)
    compare(got, expected, "bfloat16", spoiled)


def test_what_is_spoiled_in_the_forward_kernel_shows():
    """Every instruction that orders events, lays out an operand or bounds a mask is needed."""
    seeds = range(4)
    with hopper_machine.sites() as sites:
        for seed in seeds:
            check_spoiled_forward(seed, NOTHING)
    spoiled = [Spoiled(*site, change) for site in sites for change in CHANGES[site[0]]]
    assert len(spoiled) > 60
    assert not [one for one in spoiled if missed(check_spoiled_forward, seeds, one)]


def seen_attention(case, heads, q, k, v, ak, av):
    """Output and log-sum-exp where what a query does not see is no number at all."""
    mask = full_mask(case)
    tokens, repeats = len(mask), heads["heads"] // heads["kv_heads"]
    batch = len(q)
    output = np.zeros((batch, tokens, heads["heads"], heads["value_dim"]))
    lse = np.zeros(output.shape[:-1])
    q, k, v = (x.reshape(batch, tokens, *x.shape[-2:]).astype(float) for x in (q, k, v))
    for b, t, h in np.ndindex(lse.shape):
        keys, values = k[b, mask[t], h // repeats], v[b, mask[t], h // repeats]
        if ak is not None:
            keys = np.concatenate([keys, ak[b, :, h // repeats].astype(float)])
            values = np.concatenate([values, av[b, :, h // repeats].astype(float)])
        scores = keys @ q[b, t, h] * heads["dim"] ** -0.5
        lse[b, t, h] = np.logaddexp.reduce(scores)
        output[b, t, h] = np.exp(scores - lse[b, t, h]) @ values
    shape = (batch, *case["layout"])
    return output.reshape(*shape, *output.shape[-2:]), lse.reshape(*shape, lse.shape[-1])


def strange_problem(seed):
    """A random problem some of whose numbers are not finite."""
    rng, case, heads, arrays = random_problem(seed)
    for n in (0, 1, 2, 2, 2):
        x = arrays[n].reshape(-1, arrays[n].shape[-1])
        strange = rng.choice([np.nan, np.inf, -np.inf]) if n == 2 else np.nan
        x[rng.integers(len(x)), rng.integers(x.shape[1])] = strange
    return rng, case, heads, arrays


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_reaches_those_who_see_it_only(seed):
    rng, case, heads, arrays = strange_problem(seed)
    tile, box = drawn_shapes(rng, case, ROWS, ROWS)
    hopper_machine.begin(seed)
    got = hopper_machine.forward(case, heads, arrays[:5], tile, box)
    expected = seen_attention(case, heads, *arrays[:5])
    compare(got, expected, arrays[0].dtype.name, f"{case} {heads} {tile} {box}")


def test_compiles_for_an_h200_without_one():
    """The whole call, ahead of time: XLA takes the handlers, and the program needs no more memory
    than its arguments, its results and a number for each query."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="no jax-cuda13-pjrt, of 390 MB")
    script = Path(hopper_machine.__file__).with_name("compile_for_h200.py")
    library = gna_machines.emulated_library()._name
    run = subprocess.run(
        [sys.executable, str(script), library], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    told = json.loads(run.stdout.splitlines()[-1])
    array = 30 * 48 * 80 * 24 * 128 * 2
    assert cuda.FORWARD in told["forward"]["text"]
    assert cuda.BACKWARD in told["backward"]["text"]
    assert told["forward"]["arguments"] == 3 * array
    assert told["forward"]["results"] == array
    assert told["forward"]["scratch"] < array / 16  # the log-sum-exp
    assert told["backward"]["results"] < 3 * array + 64  # three arrays in a tuple
    assert told["backward"]["scratch"] < array / 16  # and its delta; the output is in dq's place


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_on_sm_80(seed):
    _, case, heads, arrays = strange_problem(seed)
    q, k, v, *more = (None if x is None else jnp.asarray(x) for x in arrays[:5])
    settings = {name: x for name, x in case.items() if name != "layout"}
    settings |= dict(zip(("additional_keys", "additional_values"), more, strict=True))
    settings |= {"return_lse": True, "implementation": "cuda"}
    with gna_machines.emulator():
        got = gna.neighborhood_attention(q, k, v, **settings)
    expected = seen_attention(case, heads, *arrays[:5])
    compare(got, expected, arrays[0].dtype.name, f"{case} {heads}")


@pytest.mark.parametrize("hopper", [False, True], ids=["sm_80", "sm_90a"])
def test_what_is_not_finite_leaves_other_gradients_alone(hopper):
    rng = np.random.default_rng(0)
    q, k, v, d_output = (
        jnp.asarray(rng.standard_normal((1, 20, 1, 8)), "float16") for _ in range(4)
    )

    @jax.jit
    def gradients(*operands):
        def attend(q, k, v):
            return gna.neighborhood_attention(q, k, v, kernel_size=5, implementation="cuda")

        return jax.vjp(attend, *operands)[1](d_output)

    strange = q.at[0, 1].set(jnp.inf), k.at[0, 0].set(jnp.nan), v.at[0, 2, 0, 3].set(jnp.inf)
    with gna_machines.emulator(hopper):
        got, expected = gradients(*strange), gradients(q, k, v)
    for one, other in zip(got, expected, strict=True):
        assert not np.isfinite(one[:, :2]).all()
        # Those who meet nobody who meets those; some were rounded otherwise.
        np.testing.assert_allclose(one[:, 9:], other[:, 9:], rtol=4e-3, atol=4e-3)


@pytest.mark.skipif(build.compiler("gpu") is None, reason="no nvcc")
@pytest.mark.parametrize(("dim", "products"), [(64, 12), (128, 16)])
def test_what_the_compiler_says(dim, products, tmp_path):
    """No register in memory, no product serialized, and the main loop within its budget."""
    main = hopper_machine.main_loop("forward", f"BFloat16, {dim}", tmp_path)
    assert sum(code.startswith("HGMMA") for code in main) == products
    assert len(main) <= 870  # with its mask; some 580 without
    # Exponentials are made while the products with values go on.
    waits = [n for n, code in enumerate(main) if code.startswith("WARPGROUP.DEPBAR")]
    powers = [n for n, code in enumerate(main) if code.startswith("MUFU.EX2")]
    assert len(powers) == 66 and waits[0] < powers[0] and powers[-1] < waits[1]
