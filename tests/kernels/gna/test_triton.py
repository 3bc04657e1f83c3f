"""Triton kernels of neighborhood attention without a GPU: values, by the interpreter; lowering."""

import dataclasses
import sys

import gna_machines
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gna_oracle import attention, full_mask, operands, random_case

from conceptax.kernels import gna
from conceptax.kernels.gna import tuning
from conceptax.kernels.gna.api import attend
from conceptax.kernels.gna.backends import triton as backend
from conceptax.kernels.gna.backends.triton_blocks import TUNED, padded, tiling
from conceptax.kernels.gna.problem import Operands, Residuals
from conceptax.kernels.gna.tiles import Window

CASES = {
    # name: layout, kernel_size, stride, dilation, is_causal; B, Hq, Hkv, D, Dv, A; tile sizes
    "row": ((70,), (21,), (1,), (1,), (False,), (1, 1, 1, 8, 8, 0), (64, 16)),
    "blocks": ((48,), (32,), (16,), (1,), (False,), (1, 1, 1, 16, 8, 0), (16, 16)),
    "causal": ((50,), (40,), (3,), (1,), (True,), (2, 1, 1, 8, 8, 37), (64, 32)),
    "image": ((11, 11), (7, 5), (2, 1), (1, 2), (False, False), (1, 2, 1, 20, 8, 0), (64, 32)),
    "mixed": ((9, 14), (4, 9), (3, 1), (2, 1), (False, True), (1, 1, 1, 8, 24, 32), (64, 32)),
    "video": (
        (5, 8, 9),
        (3, 4, 5),
        (1, 2, 1),
        (1, 1, 1),
        (True, False, False),
        (1, 1, 1, 8, 8, 0),
        (128, 64),
    ),
    "ragged": (
        (5, 7, 3),
        (2, 7, 3),
        (1, 1, 3),
        (2, 1, 1),
        (False,) * 3,
        (1, 1, 1, 4, 8, 3),
        (32, 16),
    ),
}


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    with gna_machines.interpreter(tmp_path_factory.mktemp("interpreter")) as call:
        yield call


def problem_of(name, dtype=jnp.float32):
    """The problem, its settings and its operands."""
    layout, kernel_size, stride, dilation, is_causal, heads, _ = CASES[name]
    case = {
        "layout": layout,
        "kernel_size": kernel_size,
        "stride": stride,
        "dilation": dilation,
        "is_causal": is_causal,
    }
    names = ("batch", "heads", "kv_heads", "dim", "value_dim", "additional")
    arrays = operands(np.random.default_rng(0), case, dict(zip(names, heads, strict=True)))
    inputs = [None if x is None else jnp.asarray(x, dtype) for x in arrays[:5]]
    settings = {key: value for key, value in case.items() if key != "layout"}
    cotangents = (jnp.asarray(arrays[5], dtype), jnp.asarray(arrays[6]))
    return gna.describe(*inputs, **settings), case, inputs, cotangents


def with_gradients(problem, inputs, cotangents):
    """Output, log-sum-exp and gradients."""
    given = Operands(*inputs)
    output, lse = backend.forward(problem, given)
    d_output, d_lse = cotangents
    delta = (d_output.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1) - d_lse
    gradients = backend.backward(problem, Residuals(given, output, lse), d_output, delta)
    return [output, lse, *(g for g in gradients if g is not None)]


def interpreted(monkeypatch, interpreter, name, dtype, wide=False):
    blocks = backend.Blocks(*CASES[name][-1], 4, 2)
    monkeypatch.setattr(backend, "blocks_here", lambda *_: blocks)
    monkeypatch.setattr(backend, "ENOUGH_PROGRAMS", 4)

    def call(name, launch, operands, results):
        launch.static["wide"] = wide
        return interpreter(name, launch, operands, results)

    monkeypatch.setattr(backend, "call", call)
    problem, case, inputs, cotangents = problem_of(name, dtype)
    got = with_gradients(problem, inputs, cotangents)
    assert [x.dtype for x in got] == [dtype, jnp.float32] + [dtype] * (len(got) - 2)
    expected = attention(case, *inputs, *cotangents)
    assert [x.shape for x in got] == [x.shape for x in expected]
    return zip(got, expected, strict=True)


@pytest.mark.parametrize("name", CASES)
def test_against_float64(interpreter, monkeypatch, name):
    wide = name in ("row", "image")
    for one, other in interpreted(monkeypatch, interpreter, name, jnp.float32, wide):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["causal", "ragged"])
def test_half_precision(interpreter, monkeypatch, name):
    # Probabilities and score gradients are rounded to 2**-11 before the second product.
    for one, other in interpreted(monkeypatch, interpreter, name, jnp.float16):
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-2)


def test_tiles_by_counting():
    rng = np.random.default_rng(0)
    for n in range(30):
        case = random_case(rng, rank=1 + n % 3)
        windows = tuple(
            map(
                Window,
                *(case[x] for x in ("layout", "kernel_size", "stride", "dilation", "is_causal")),
            )
        )
        mask = full_mask(case)
        for inverse in (False, True):
            tiles = tiling(windows, 16, 8, inverse=inverse)
            assert (tiles.steps, tiles.free) == count(
                mask.T if inverse else mask, padded(windows), tiles
            ), (case, inverse)


def count(mask, windows, tiles):
    """Steps and free steps, by looking at every tile of every box."""
    layout = tuple(w.length for w in windows)
    dilation = tuple(w.dilation for w in windows)
    mask = mask.reshape(layout + layout)
    steps = free = 0
    for group in np.ndindex(dilation):
        every = tuple(slice(g, None, d) for g, d in zip(group, dilation, strict=True))
        inside = mask[every + every]
        lengths = inside.shape[:3]
        for at in np.ndindex(*(-(-n // t) for n, t in zip(lengths, tiles.own, strict=True))):
            rows = inside[
                tuple(slice(a * t, a * t + t) for a, t in zip(at, tiles.own, strict=True))
            ]
            seen = np.nonzero(rows.any((0, 1, 2)))
            box = [(x.min(), x.max() + 1) for x in seen]
            counts = [-(-(b - a) // t) for (a, b), t in zip(box, tiles.seen, strict=True)]
            for tile in np.ndindex(*counts):
                first = [a + n * t for (a, _), n, t in zip(box, tile, tiles.seen, strict=True)]
                part = tuple(slice(a, a + t) for a, t in zip(first, tiles.seen, strict=True))
                whole = rows[(..., *part)]
                steps += 1
                free += bool(whole.all()) and whole.shape[3:] == tiles.seen
    return steps, free


@pytest.fixture
def kernels(monkeypatch):
    return gna_machines.triton_kernels(monkeypatch)


def test_lowers_for_a_gpu_that_is_not_here(kernels, monkeypatch):
    problem, _, inputs, _ = problem_of("mixed", jnp.bfloat16)
    reason = gna.unsupported("triton", problem, "gpu")
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(backend, "blocks_here", lambda *_: backend.Blocks(64, 64, 4, 2))

    def loss(*inputs):
        output, lse = attend(problem, "triton", Operands(*inputs))
        return output.astype(jnp.float32).sum() + lse.sum()

    def lowered(step, inputs):
        return jax.jit(step).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()

    gradients = jax.grad(loss, argnums=range(5))
    assert lowered(gradients, inputs).count("custom_call @triton_kernel_call") == 4
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("data")
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=spec, out_specs=spec)
    doubled = [jnp.concatenate([x, x]) for x in inputs]
    assert lowered(sharded, doubled).count("custom_call @triton_kernel_call") == 4


@pytest.mark.parametrize("name", ["forward", "backward_query", "backward_keys"])
def test_compiles_for_hopper(kernels, monkeypatch, tmp_path, name):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = jax.ShapeDtypeStruct((1, 30, 48, 80, 24, 128), jnp.bfloat16)
    problem = gna.describe(x, x, x, kernel_size=(18, 24, 24), stride=(16, 8, 8))
    launch = backend.launch(problem, name)
    assert launch.static["has_free"] and not launch.static["has_masked"]
    kernel = getattr(kernels, name)
    types = {"lse": "*fp32", "delta": "*fp32", "S": "constexpr"}
    signature = {argument: types.get(argument, "*bf16") for argument in kernel.arg_names}
    aligned = {
        (n,): [["tt.divisibility", 16]]
        for n, argument in enumerate(kernel.arg_names)
        if signature[argument] != "constexpr"
    }
    options = {
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        "enable_fp_fusion": True,
    }
    compiled = compile(
        ASTSource(
            kernel, signature, constexprs={"S": kernels.Static(**launch.static)}, attrs=aligned
        ),
        target=GPUTarget("cuda", 90, 32),
        options=options,
    )
    text = compiled.asm["ptx"]
    assert "wgmma.mma_async" in text and "cp.async.cg" in text
    assert compiled.metadata.shared <= 227 * 1024


def test_says_what_it_cannot_do(monkeypatch):
    x = jax.ShapeDtypeStruct((1, 8, 2, 136), jnp.float32)
    problem = gna.describe(x, x, x, kernel_size=3)
    assert gna.unsupported("triton", problem, "cpu") == "it runs on a GPU, not on cpu"
    reason = "head dimensions may be 128 at most in float32, not 136 (queries and keys) and 136"
    assert reason in (gna.unsupported("triton", problem, "gpu") or "")
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    backend.missing.cache_clear()
    problem = dataclasses.replace(problem, dtype="float16")
    assert "pip install 'conceptax[cuda]'" in (gna.unsupported("triton", problem, "gpu") or "")
    backend.missing.cache_clear()


def test_tuning_keeps_the_fastest(monkeypatch):
    problem, case, *_ = problem_of("mixed")
    settings = {key: value for key, value in case.items() if key != "layout"}

    def milliseconds(problem, kernel, operands, repeats):
        assert gna.describe(*operands[0].operands, **settings) == problem
        blocks = backend.blocks_here(problem, kernel)
        if blocks.own == 128:
            raise RuntimeError("out of shared memory")
        return 1000 / blocks.own / blocks.seen

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    try:
        times = tuning.tune(problem)
        assert list(times) == ["forward", "backward_query", "backward_keys"]
        for kernel, found in times.items():
            assert {128} & {blocks.own for blocks in found} == set()
            assert list(found.values()) == sorted(found.values())
            larger = dataclasses.replace(problem, batch=3)
            assert backend.blocks_here(larger, kernel)[:2] == (64, 128)
    finally:
        TUNED.clear()
