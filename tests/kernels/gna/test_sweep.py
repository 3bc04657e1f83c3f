"""Random problems: values and gradients of every backend against numpy in float64.

The fast tests draw the same few problems each time; the full sweep (`make test-full`) draws 500 new
ones per backend. What fails is shrunk and printed, with the seed (`--hypothesis-seed`). GPU kernels
run without a GPU: Triton's by its interpreter, CUDA's on an emulator.
"""

import dataclasses

import gna_machines
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gna_oracle import attention, operands
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conceptax.kernels import gna
from conceptax.kernels.gna.api import attend
from conceptax.kernels.gna.backends import boxes, triton, xla
from conceptax.kernels.gna.cuda import build
from conceptax.kernels.gna.problem import Operands, Residuals

# Per backend in the full sweep.
MANY = 500

# Of each result against float64, relative to its largest number: rounding of results, and of the
# probabilities where these are rounded to 16 bits; float32 sums a few hundred terms of size one.
TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}

LONGEST = {1: 64, 2: 16, 3: 8}


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A problem: settings, sizes, dtype, the seed of its numbers; how a backend is to cut it."""

    case: dict
    sizes: dict
    dtype: str
    seed: int
    cut: dict

    @property
    def settings(self):
        names = ("kernel_size", "stride", "dilation", "is_causal")
        return {name: self.case[name] for name in names}

    def operands(self):
        """Inputs, some of them None, and cotangents of output and log-sum-exp."""
        arrays = operands(np.random.default_rng(self.seed), self.case, self.sizes)
        dtypes = [self.dtype] * 6 + ["float32"]
        arrays = [
            None if x is None else jnp.asarray(x, dtype)
            for x, dtype in zip(arrays, dtypes, strict=True)
        ]
        return arrays[:5], (arrays[5], arrays[6])


@st.composite
def problems(draw, most, dtypes, dims=(1, 12), lanes=(2, 2, 3), groups=64, **cut):
    """Problems of at most `most` tokens and `groups` dilation groups.

    `dims` are the least and the most of the head dimensions, or a list of them; `lanes` the most
    batches, key heads, and heads for each of these.
    """
    dims = st.sampled_from(dims) if isinstance(dims, list) else st.integers(*dims)
    rank = draw(st.integers(1, 3))
    case = dict.fromkeys(("layout", "kernel_size", "stride", "dilation", "is_causal"), ())
    for _ in range(rank):
        length = draw(st.integers(1, min(LONGEST[rank], most)))
        most //= length
        dilation = draw(st.integers(1, min(length, 4, groups)))
        groups //= dilation
        kernel_size = draw(st.integers(1, length // dilation))
        one = (
            length,
            kernel_size,
            draw(st.integers(1, kernel_size)),
            dilation,
            draw(st.booleans()),
        )
        case = {name: (*values, x) for (name, values), x in zip(case.items(), one, strict=True)}
    batch, kv_heads, repeats = (draw(st.integers(1, n)) for n in lanes)
    sizes = {
        "batch": batch,
        "heads": kv_heads * repeats,
        "kv_heads": kv_heads,
        "dim": draw(dims),
        "value_dim": draw(dims),
        "additional": draw(st.sampled_from([0, 0, 1, 3, 20])),
    }
    seed = draw(st.integers(0, 2**32 - 1))
    cut = draw(st.fixed_dictionaries({name: st.sampled_from(x) for name, x in cut.items()}))
    return Drawn(case, sizes, draw(st.sampled_from(dtypes)), seed, cut)


def compiled(implementation):
    """Output, log-sum-exp and gradients by `neighborhood_attention`, compiled in the least time."""
    fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

    def run(drawn):
        def call(q, k, v, ak, av):
            return gna.neighborhood_attention(
                q,
                k,
                v,
                additional_keys=ak,
                additional_values=av,
                return_lse=True,
                implementation=implementation,
                **drawn.settings,
            )

        def both(inputs, cotangents):
            results, pull = jax.vjp(call, *inputs)
            return *results, *pull(cotangents)

        return jax.jit(both, compiler_options=fast)(*drawn.operands())

    return run


@pytest.fixture(scope="module")
def reference():
    return compiled("reference")


@pytest.fixture(scope="module")
def blocked():
    """`xla`, cut into steps of more shapes and smaller ones than so little work would be worth."""
    run, plan = compiled("xla"), boxes.plan.__wrapped__  # what it keeps is for other costs

    def cut(drawn):
        how = drawn.cut
        with pytest.MonkeyPatch.context() as patch:
            costs = {"start": how["step_cost"], "met": how["key_cost"]}
            patch.setattr(boxes, "COSTS", dataclasses.replace(boxes.COSTS, **costs))
            patch.setattr(xla, "plan_of", lambda x: plan(x, how["budget"], how["shapes"]))
            attend.clear_cache()  # it may have met the problem before, cut otherwise
            return run(drawn)

    return cut


@pytest.fixture(scope="module")
def custom_call():
    """`cuda`, its CPU target."""
    if build.compiler("cpu") is None:
        pytest.skip("no C++ compiler")
    return compiled("cuda")


@pytest.fixture(scope="module")
def emulated():
    """`cuda`, the sources of its GPU target."""
    with gna_machines.emulator():
        yield compiled("cuda")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """The kernels of `triton`, with tiles of random size."""

    def run(drawn):
        inputs, (d_output, d_lse) = drawn.operands()
        problem = gna.describe(*inputs, **drawn.settings)
        blocks = triton.Blocks(drawn.cut["own"], drawn.cut["seen"], 4, 2)

        def call(name, launch, *arrays):
            launch.static["wide"] = drawn.cut["wide"]
            return interpreter(name, launch, *arrays)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton, "blocks_here", lambda *_: blocks)
            patch.setattr(triton, "ENOUGH_PROGRAMS", 4)
            patch.setattr(triton, "call", call)
            given = Operands(*inputs)
            output, lse = triton.forward(problem, given)
            delta = (d_output.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1) - d_lse
            gradients = triton.backward(problem, Residuals(given, output, lse), d_output, delta)
        return output, lse, *gradients

    with gna_machines.interpreter(tmp_path_factory.mktemp("interpreter")) as interpreter:
        yield run


def check(drawn, run):
    inputs, cotangents = drawn.operands()
    expected = attention(
        drawn.case, *(None if x is None else np.asarray(x, float) for x in (*inputs, *cotangents))
    )
    got = [x for x in run(drawn) if x is not None]
    assert [x.dtype for x in got] == [drawn.dtype, "float32"] + [drawn.dtype] * (len(got) - 2)
    tolerance = TOLERANCE[drawn.dtype]
    for n, (one, other) in enumerate(zip(got, expected, strict=True)):
        np.testing.assert_allclose(
            np.asarray(one, float),
            other,
            rtol=tolerance,
            atol=tolerance * max(1, np.abs(other).max()),
            err_msg=f"result {n} of {drawn}",
        )


def few(count):
    """The same problems each time."""
    return settings(several(count), derandomize=True)


def several(count):
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


ALL = ("float32", "bfloat16", "float16")
HALF = ("bfloat16", "float16")

for_reference = given(problems(80, ALL))
for_blocked = given(
    problems(
        80,
        ALL,
        budget=[16, 64, 1 << 18],
        shapes=[1, 2, 3],
        step_cost=[0, 8192],
        key_cost=[0, 2, 32],
    )
)
for_custom_call = given(problems(200, ALL, (1, 40)))
for_emulated = given(problems(150, HALF, [8, 16, 24, 64, 88, 128]))
for_interpreted = given(  # small: the interpreter takes its time; it gets bfloat16 wrong
    problems(
        48,
        ("float32", "float16"),
        lanes=(2, 1, 2),
        groups=4,
        own=[16, 32, 64],
        seen=[16, 32, 64],
        wide=[False, True],
    )
)


@few(10)
@for_reference
def test_reference(reference, drawn):
    check(drawn, reference)


@few(20)
@for_blocked
def test_blocked(blocked, drawn):
    check(drawn, blocked)


@few(60)
@for_custom_call
def test_custom_call(custom_call, drawn):
    check(drawn, custom_call)


@few(10)
@for_emulated
def test_emulated(emulated, drawn):
    check(drawn, emulated)


@few(8)
@for_interpreted
def test_interpreted(interpreted, drawn):
    check(drawn, interpreted)


@pytest.mark.slow
@several(MANY)
@for_reference
def test_many_by_reference(reference, drawn):
    check(drawn, reference)


@pytest.mark.slow
@several(MANY)
@for_blocked
def test_many_blocked(blocked, drawn):
    check(drawn, blocked)


@pytest.mark.slow
@several(MANY)
@for_custom_call
def test_many_custom_calls(custom_call, drawn):
    check(drawn, custom_call)


@pytest.mark.slow
@several(MANY)
@for_emulated
def test_many_emulated(emulated, drawn):
    check(drawn, emulated)


@pytest.mark.slow
@several(MANY)
@for_interpreted
def test_many_interpreted(interpreted, drawn):
    check(drawn, interpreted)
