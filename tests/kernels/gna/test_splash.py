"""Splash attention without a TPU: values, interpreted; who sees what; lowering."""

import functools
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gna_oracle import attention, full_mask, operands, random_case
from jax.sharding import AxisType

from conceptax.kernels import gna
from conceptax.kernels.gna import platforms
from conceptax.kernels.gna.api import attend, choose
from conceptax.kernels.gna.backends import splash
from conceptax.kernels.gna.problem import Operands, windows_of

CASES = {
    # name: layout, kernel_size, stride, dilation, is_causal; B, Hq, Hkv, D, Dv, A
    "row": ((300,), (40,), (3,), (2,), (True,), (1, 2, 1, 8, 16, 3)),
    "image": ((17, 20), (7, 5), (2, 1), (1, 2), (False, False), (2, 1, 1, 8, 8, 130)),
    "video": (
        (5, 8, 10),
        (3, 4, 5),
        (1, 2, 1),
        (1, 1, 2),
        (True, False, False),
        (1, 1, 1, 8, 8, 0),
    ),
}
NAMES = ("layout", "kernel_size", "stride", "dilation", "is_causal")
SIZES = ("batch", "heads", "kv_heads", "dim", "value_dim", "additional")
X = jax.ShapeDtypeStruct((1, 16, 32, 2, 64), jnp.bfloat16)


def with_gradients(settings, arrays, implementation="splash"):
    *inputs, d_output, d_lse = arrays
    problem = gna.describe(*inputs, **settings)

    def run(inputs, cotangents):
        results, pull = jax.vjp(functools.partial(attend, problem, implementation), inputs)
        return *results, *jax.tree.leaves(pull(cotangents))

    return jax.jit(run)(Operands(*inputs), (d_output, d_lse))


@functools.cache
def drawn(name):
    *case, sizes = CASES[name]
    case = dict(zip(NAMES, case, strict=True))
    arrays = operands(np.random.default_rng(0), case, dict(zip(SIZES, sizes, strict=True)))
    settings = {key: value for key, value in case.items() if key != "layout"}
    return case, settings, [None if x is None else jnp.asarray(x) for x in arrays]


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name):
    case, settings, arrays = drawn(name)
    got = with_gradients(settings, arrays)
    for one, other in zip(got, attention(case, *arrays), strict=True):
        np.testing.assert_allclose(one, other, rtol=5e-5, atol=5e-5)


def test_numbers_that_are_not_finite():
    """A query that saw one spoils the gradients of what it sees, and of nothing else."""
    _, settings, arrays = drawn("row")
    case, *_ = drawn("row")
    arrays = list(arrays)
    arrays[2] = arrays[2].at[0, 150].set(jnp.inf)
    output, _, d_query, d_key, *_ = with_gradients(settings, arrays)
    seen = full_mask(case)
    spoiled = seen[:, 150]
    np.testing.assert_array_equal(np.isnan(output).any((0, 2, 3)), spoiled)
    np.testing.assert_array_equal(np.isnan(d_query).any((0, 2, 3)), spoiled)
    np.testing.assert_array_equal(np.isnan(d_key).any((0, 2, 3)), seen[spoiled].any(0))


def test_who_sees_what_by_counting():
    """Tables and computed masks together: each pair that is seen is met once, and no other is."""
    rng = np.random.default_rng(0)
    for n in range(30):
        case = random_case(rng, rank=1 + n % 3)
        windows = windows_of(*(case[name] for name in NAMES))
        additional = int(rng.choice([0, 5]))
        tiles = splash.tiling(windows)
        how = splash.table(tiles, additional)
        block, tokens = tiles.block, tiles.blocks * tiles.block
        keys = tokens - (-additional // block) * block
        place = np.arange(int(np.prod(case["layout"]))) + 1
        place = place.reshape(1, *case["layout"], 1, 1)
        place = np.asarray(splash._tiled(tiles, jnp.asarray(place, jnp.float32))).reshape(-1)
        place = place.astype(int) - 1
        seen = np.zeros((tokens, keys), int)
        by_key = np.zeros((tokens // block, keys // block), int)
        for i, (row, status) in enumerate(zip(*how.of_queries, strict=True)):
            for j, kind in zip(row, status, strict=True):
                by_key[i, j] += kind
                queries, others = np.ogrid[i * block : (i + 1) * block, j * block : (j + 1) * block]
                if how.mask is None or not kind:
                    inside = kind > 0
                else:
                    shape = (block, block)
                    code, number = (
                        jnp.asarray(np.broadcast_to(x, shape), jnp.int32)
                        for x in (how.codes[queries], others)
                    )
                    inside = np.asarray(how.mask(code, number))
                    assert kind == 1 or inside.all()
                seen[queries, others] += inside
        real = place >= 0
        whole = np.zeros((real.sum(), real.sum()), int)
        whole[np.ix_(place[real], place[real])] = seen[real][:, :tokens][:, real]
        np.testing.assert_array_equal(whole, full_mask(case), err_msg=str(case))
        assert not seen[real][:, :tokens][:, ~real].any()
        assert (seen[real][:, tokens:].sum(1) == additional).all()
        transposed = np.zeros_like(by_key)
        for j, (row, status) in enumerate(zip(*(x.T for x in how.of_keys), strict=True)):
            np.add.at(transposed[:, j], row, status)
        np.testing.assert_array_equal(transposed, by_key)


@pytest.fixture
def on_a_tpu(monkeypatch):
    """As if a TPU were beside the CPU."""
    clients = {name: types.SimpleNamespace(platform=name) for name in ("cpu", "tpu")}
    monkeypatch.setattr(platforms, "backends", lambda: clients)
    attend.clear_cache()
    yield
    attend.clear_cache()


def loss(x):
    out = gna.neighborhood_attention(x, x, x, kernel_size=(7, 9))
    return out.astype(jnp.float32).sum()


def test_lowers_for_a_tpu(on_a_tpu):
    chosen = dict(choose(gna.describe(X, X, X, kernel_size=(7, 9))))
    assert chosen["tpu"] == "splash" and chosen["cpu"] != "splash"
    traced = jax.jit(jax.grad(loss)).trace(X)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 3
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_devices_divide_it():
    """Inside `jax.shard_map`, and where axes are explicit."""
    x = jax.random.normal(jax.random.key(0), (2, 130, 1, 8))

    def loss(x):
        problem = gna.describe(x, x, x, kernel_size=5)
        return (attend(problem, "splash", Operands(x, x, x, None, None))[0] ** 2).sum()

    expected = jax.grad(loss)(x)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    spec = jax.P("data")
    with jax.set_mesh(mesh):
        divided = jax.device_put(x, jax.NamedSharding(mesh, spec))
        run = jax.shard_map(jax.grad(loss), in_specs=spec, out_specs=spec)
        for function in (jax.grad(loss), run):
            np.testing.assert_allclose(jax.jit(function)(divided), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": jnp.float16}, "it takes bfloat16 and float32, not float16"),
        ({"dim": 320}, "head dimensions may be 256 at most, not 320"),
        ({"tokens": 1 << 20}, "it has tables for fewer tokens"),
    ],
)
def test_says_what_it_cannot_do(changes, words):
    tokens, dim = changes.get("tokens", 8), changes.get("dim", 8)
    x = jax.ShapeDtypeStruct((1, tokens, 1, dim), changes.get("dtype", jnp.bfloat16))
    problem = gna.describe(x, x, x, kernel_size=tokens)
    assert words in (gna.unsupported("splash", problem, "tpu") or "")
    assert gna.unsupported("splash", problem, "cpu") == "it runs on a TPU, not on cpu"


AHEAD = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from conceptax.kernels import gna
from conceptax.kernels.gna import platforms
device = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]
x = jax.ShapeDtypeStruct(
    (1, 64, 64, 4, 128), jnp.bfloat16, sharding=SingleDeviceSharding(device)
)
def loss(x):
    out = gna.neighborhood_attention(x, x, x, kernel_size=(32, 32), stride=1)
    return out.astype(jnp.float32).sum()
with platforms.traced_for("tpu"):
    jax.jit(jax.grad(loss)).lower(x).compile()
"""


@pytest.mark.slow
def test_compiles_ahead_of_time():
    pytest.importorskip("libtpu")
    environment = os.environ | {"TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", AHEAD], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
