"""Triton kernels of neighborhood attention, without a GPU: values by the interpreter, lowering."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gna_oracle import attention, operands, random_case, random_heads

from conceptax.kernels.gna import describe
from conceptax.kernels.gna import triton as backend
from conceptax.kernels.gna.problem import Residuals

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.fixture(scope="module")
def interpreter(repository, tmp_path_factory):
    """`triton.call` by Triton's interpreter, which must be alone in a process."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("interpreter")
    script = [str(repository / "tests/gna_interpreter.py")]
    script += [str(repository / "kernels/gna/triton_kernels.py")]
    process = subprocess.Popen(
        [sys.executable, *script],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout
    assert process.stdout.readline() == "ready\n"

    def call(name, launch, operands, results):
        path = str(folder / "operands.npz")
        np.savez(path, *map(np.asarray, operands))
        asked = {
            "kernel": name,
            "programs": launch.programs,
            "static": launch.static,
            "operands": path,
            "results": [(x.shape, x.dtype.name) for x in results],
        }
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, "the interpreter failed; its error is above"
        with np.load(answer.rstrip()) as file:
            return [jnp.asarray(file[f"arr_{n}"]) for n in range(len(results))]

    yield call
    process.stdin.close()
    process.wait(10)
    process.stdout.close()


def problem_of(case, arrays):
    settings = {name: case[name] for name in ("kernel_size", "stride", "dilation", "is_causal")}
    return describe(*(None if x is None else jnp.asarray(x) for x in arrays), **settings)


def run(problem, arrays):
    """Output, log-sum-exp and gradients."""
    *inputs, d_output, d_lse = arrays
    inputs = [None if x is None else jnp.asarray(x) for x in inputs]
    output, lse = backend.forward(problem, *inputs)
    delta = (np.float32(d_output) * np.float32(output)).sum(-1) - d_lse
    residuals = Residuals(*inputs, output, lse)
    gradients = backend.backward(problem, residuals, jnp.asarray(d_output), jnp.asarray(delta))
    return [output, lse, *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("seed", range(6))
def test_against_float64(interpreter, monkeypatch, seed):
    monkeypatch.setattr(backend, "call", interpreter)
    blocks = backend.Blocks(16, 16, 4, 1)
    monkeypatch.setattr(backend, "blocks_of", lambda *_: blocks)
    rng = np.random.default_rng(seed)
    case = random_case(rng, rank=1 + seed % 3)
    heads = random_heads(rng) | {"additional": 20 * (seed % 2)}
    arrays = operands(rng, case, heads)
    got = run(problem_of(case, arrays[:5]), arrays)
    for one, other in zip(got, attention(case, *arrays), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5, err_msg=str(case))
