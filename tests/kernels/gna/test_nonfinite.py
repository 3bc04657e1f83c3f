"""NaN and infinity reach those that see them, and nobody else, forward and backward."""

import functools

import gna_machines
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gna_oracle import attention, full_mask, operands

from conceptax.kernels import gna
from conceptax.kernels.gna.backends import triton
from conceptax.kernels.gna.cuda import build
from conceptax.kernels.gna.problem import Operands, Residuals

CASE = {"layout": (7, 6), "kernel_size": (3, 4), "stride": (2, 1), "dilation": (1, 1)}
CASE |= {"is_causal": (False, True)}
SETTINGS = {name: x for name, x in CASE.items() if name != "layout"}
SIZES = {"batch": 1, "heads": 2, "kv_heads": 1, "dim": 8, "value_dim": 8, "additional": 3}

# What is spoiled: operand, token, head, number.
SPOILED = {
    "key": (1, 9, 0, np.nan),
    "infinite key": (1, 23, 0, -np.inf),
    "value": (2, 16, 0, np.inf),
    "query": (0, 20, 1, np.nan),
    "cotangent": (5, 13, 1, -np.inf),
}


@functools.cache
def compiled(implementation):
    def run(inputs, cotangents):
        def call(q, k, v, ak, av):
            return gna.neighborhood_attention(
                q,
                k,
                v,
                additional_keys=ak,
                additional_values=av,
                return_lse=True,
                implementation=implementation,
                **SETTINGS,
            )

        results, pull = jax.vjp(call, *inputs)
        return *results, *pull(cotangents)

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def custom_call():
    if build.compiler("cpu") is None:
        pytest.skip("no C++ compiler")
    return compiled("cuda")


@pytest.fixture(scope="module")
def reference():
    return compiled("reference")


@pytest.fixture(scope="module")
def xla():
    return compiled("xla")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    def run(inputs, cotangents):
        given = Operands(*inputs)
        problem = gna.describe(*given, **SETTINGS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton, "blocks_here", lambda *_: triton.Blocks(16, 16, 4, 2))
            patch.setattr(triton, "ENOUGH_PROGRAMS", 4)
            patch.setattr(triton, "call", interpreter)
            output, lse = triton.forward(problem, given)
            delta = (cotangents[0] * output).sum(-1) - cotangents[1]
            residuals = Residuals(given, output, lse)
            return output, lse, *triton.backward(problem, residuals, cotangents[0], delta)

    with gna_machines.interpreter(tmp_path_factory.mktemp("interpreter")) as interpreter:
        yield run


def flat(x):
    """Tokens in a row, without the batch."""
    return np.asarray(x).reshape(42, *np.shape(x)[3:])


@pytest.mark.parametrize("name", SPOILED)
@pytest.mark.parametrize("backend", ["reference", "xla", "custom_call", "interpreted"])
def test_it_reaches_those_that_see_it(request, backend, name):
    run = request.getfixturevalue(backend)
    which, token, head, number = SPOILED[name]
    arrays = operands(np.random.default_rng(0), CASE, SIZES)
    flat(arrays[which])[token, head] = 0
    expected = attention(CASE, *arrays)
    flat(arrays[which])[token, head, 2] = number
    *inputs, d_output, d_lse = map(jnp.asarray, arrays)
    output, lse, d_query, d_key, d_value, *_ = map(np.asarray, run(inputs, (d_output, d_lse)))

    seen = full_mask(CASE)
    spoiled = np.zeros((42, 2), bool)  # queries [token, head] that are not to be computed
    if which in (1, 2):
        spoiled[:] = seen[:, token, None]
    else:
        spoiled[token, head] = True
    reached = seen[spoiled.any(1)].any(0)[:, None]  # keys that any of these sees
    forward = spoiled & (which != 5)
    for got, want, where in (
        (output, expected[0], forward),
        (lse[..., None], expected[1][..., None], forward),
        (d_query, expected[2], spoiled),
        (d_key, expected[3], reached),
        (d_value, expected[4], reached),
    ):
        got, want = flat(got), flat(want)
        np.testing.assert_allclose(got[~where], want[~where], rtol=2e-5, atol=2e-5)
    # An infinite key may have a score of minus infinity, and then no part in the output.
    certain = [(output, forward), (d_key, reached)] if np.isnan(number) or which != 1 else []
    for got, where in ((d_query, spoiled), *certain):
        assert not np.isfinite(flat(got)[where]).all(-1).any()
