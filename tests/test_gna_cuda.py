"""Custom calls into C++ and CUDA: their numbers on a CPU, their building, their lowering."""

import re
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gna_oracle import attention, full_mask, operands, random_case, random_heads

from conceptax.kernels import gna
from conceptax.kernels.gna import cuda
from conceptax.kernels.gna.cuda import build

needs_compiler = pytest.mark.skipif(build.compiler("cpu") is None, reason="no C++ compiler")

# Against float64: dot products of a few hundred terms of size one.
FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}


def settings(case: dict) -> dict:
    return {name: case[name] for name in ("kernel_size", "stride", "dilation", "is_causal")}


def with_gradients(case, arrays, **options):
    """Output, log-sum-exp and gradients of the inputs that are present."""
    *inputs, d_output, d_lse = (None if x is None else jnp.asarray(x) for x in arrays)

    def call(q, k, v, ak, av):
        return gna.neighborhood_attention(
            q, k, v, additional_keys=ak, additional_values=av, return_lse=True,
            implementation="cuda", **settings(case), **options,
        )  # fmt: skip

    results, pull = jax.vjp(call, *inputs)
    gradients = pull((d_output.astype(results[0].dtype), d_lse))
    return *results, *(x for x in gradients if x is not None)


@needs_compiler
@pytest.mark.parametrize("seed", range(12))
def test_random_problems(seed):
    rng = np.random.default_rng(seed)
    case = random_case(rng, rank=1 + seed % 3)
    heads = random_heads(rng) | {"additional": seed % 4}
    arrays = operands(rng, case, heads)
    got = with_gradients(case, arrays)
    for one, other in zip(got, attention(case, *arrays), strict=True):
        np.testing.assert_allclose(one, other, **FLOAT32, err_msg=f"{case} {heads}")
