"""Triton kernels of neighborhood attention without a GPU: values, by the interpreter; lowering."""

import dataclasses
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

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
from conceptax.kernels.gna.backends.triton_blocks import (
    COLUMNS,
    TUNED,
    Blocks,
    blocks_of,
    candidates_of,
    padded,
    tiling,
)
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


def compiled(kernels, problem, name, capability):
    """A kernel for a GPU that is not here, and the bytes that it spills for each thread."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import __file__ as compiler
    from triton.compiler import ASTSource, compile

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_capability", lambda: capability)
        launch = backend.launch(problem, name)
    kernel = getattr(kernels, name)
    own = {"bfloat16": "*bf16", "float32": "*fp32"}[problem.dtype]
    types = {"lse": "*fp32", "delta": "*fp32", "S": "constexpr"}
    signature = {argument: types.get(argument, own) for argument in kernel.arg_names}
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
    result = compile(
        ASTSource(
            kernel, signature, constexprs={"S": kernels.Static(**launch.static)}, attrs=aligned
        ),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        tool = Path(compiler).parent / "bin/cuobjdump"
        arguments = [tool, "--dump-resource-usage", file.name]
        said = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    (spilled,) = re.findall(r"REG:\d+ STACK:(\d+)", said)
    return launch, result, int(spilled)


def video(dim=128, dtype=jnp.bfloat16):
    """HunyuanVideo's windows."""
    x = jax.ShapeDtypeStruct((1, 30, 48, 80, 24, dim), dtype)
    return gna.describe(x, x, x, kernel_size=(18, 24, 24), stride=(16, 8, 8))


@pytest.mark.parametrize("name", tuning.KERNELS)
@pytest.mark.parametrize(
    ("capability", "product"),
    [
        (90, "wgmma.mma_async"),
        pytest.param(100, "tcgen05.mma", marks=pytest.mark.slow),
    ],
)
def test_compiles_for_tensor_cores(kernels, monkeypatch, tmp_path, name, capability, product):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launch, result, spilled = compiled(kernels, video(), name, capability)
    assert launch.static["has_free"] and not launch.static["has_masked"]
    text = result.asm["ptx"]
    assert product in text and "cp.async.cg" in text
    assert result.metadata.shared <= 227 * 1024
    assert spilled == 0


MEMORY = {80: 163, 86: 99, 90: 227}


@pytest.mark.slow
@pytest.mark.parametrize("name", tuning.KERNELS)
@pytest.mark.parametrize("capability", MEMORY)
@pytest.mark.parametrize(("size", "dim"), COLUMNS)
def test_no_tile_spills(kernels, monkeypatch, tmp_path, name, capability, size, dim):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    problem = video(dim, {2: jnp.bfloat16, 4: jnp.float32}[size])
    _, result, spilled = compiled(kernels, problem, name, capability)
    assert spilled == 0
    assert result.metadata.shared <= MEMORY[capability] * 1024


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


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Calls of the clock, which takes larger tiles for faster and does not start the largest."""
    calls = []

    def milliseconds(problem, kernel, operands, repeats):
        settings = {"kernel_size": (4, 9), "stride": (3, 1), "dilation": (2, 1)}
        given = gna.describe(*operands[0].operands, **settings, is_causal=(False, True))
        assert given == problem
        blocks = backend.blocks_here(problem, kernel)
        calls.append((kernel, blocks))
        if blocks.own == 256:
            raise RuntimeError("out of shared memory")
        return 1000 / blocks.own / blocks.seen

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield calls
    TUNED.clear()


SIZES = {name: [Blocks(n, 64, 8, 2) for n in (64, 128, 256)] for name in tuning.KERNELS}


def test_tuning_keeps_the_fastest(measured):
    problem, *_ = problem_of("mixed")
    times = tuning.tune(problem, SIZES)
    assert list(times) == list(tuning.KERNELS)
    for kernel, found in times.items():
        assert [blocks.own for blocks in found] == [128, 64]
        larger = dataclasses.replace(problem, batch=3)
        assert backend.blocks_here(larger, kernel) == (128, 64, 8, 2)


def test_what_was_measured_is_kept(measured, monkeypatch, tmp_path):
    problem, *_ = problem_of("mixed")
    times, count = tuning.tune(problem, SIZES), len(measured)
    (file,) = (tmp_path / "conceptax").iterdir()
    TUNED.clear()
    assert tuning.tune(problem, SIZES) == times and len(measured) == count
    assert backend.blocks_here(problem, "forward") == (128, 64, 8, 2)
    whole = file.read_text()
    for damage in (
        "",
        whole[: len(whole) // 2],
        "[]",
        whole.replace("128", "32"),
        '{"forward": 1}',
    ):
        file.write_text(damage)
        before = len(measured)
        assert tuning.tune(problem, SIZES) == times and len(measured) == before + count
        assert file.read_text() == whole
    # What is not the same has a file of its own.
    tuning.tune(problem, SIZES | {"forward": [Blocks(32, 32, 4, 1)]})
    monkeypatch.setattr(tuning.importlib.metadata, "version", lambda package: "0")
    tuning.tune(problem, SIZES)
    device = types.SimpleNamespace(device_kind="another", compute_capability="9.0")
    monkeypatch.setattr(tuning, "local_devices", lambda platform: [device])
    tuning.tune(problem, SIZES)
    assert len(list((tmp_path / "conceptax").iterdir())) == 4


def test_a_folder_that_cannot_be_written(measured, monkeypatch, tmp_path):
    problem, *_ = problem_of("mixed")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert tuning.tune(problem, SIZES)["forward"]


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
@pytest.mark.parametrize(("dtype", "dim"), [("bfloat16", 64), ("bfloat16", 128), ("float32", 128)])
def test_few_candidates(capability, dtype, dim):
    problem, *_ = problem_of("row")
    problem = dataclasses.replace(problem, dtype=dtype, head_dim=dim, value_dim=dim)
    for kernel in tuning.KERNELS:
        candidates = candidates_of(problem, kernel, capability)
        assert candidates[0] == blocks_of(problem, kernel, capability)
        assert 1 <= len(candidates) <= 4 and len(set(candidates)) == len(candidates)
