"""Neighborhood attention at the edges: nothing to do, 64-bit jax, numbers of numpy, devices."""

import functools
import re
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conceptax.kernels import gna
from conceptax.kernels.gna import platforms
from conceptax.kernels.gna.backends import boxes
from conceptax.kernels.gna.cuda import build

CPU_BACKENDS = [
    "reference",
    "xla",
    pytest.param("cuda", marks=pytest.mark.skipif(not build.compiler("cpu"), reason="no C++")),
]
X = jax.random.normal(jax.random.key(0), (2, 6, 2, 8))
attend = functools.partial(gna.neighborhood_attention, kernel_size=3, return_lse=True)


@pytest.mark.parametrize("implementation", CPU_BACKENDS)
def test_vmap_over_nothing(implementation):
    def run(q, k):
        return attend(q, k, k, implementation=implementation)

    nothing = jnp.zeros((0, *X.shape))
    output, lse = jax.vmap(run, (0, None))(nothing, X)
    assert output.shape == nothing.shape and lse.shape == nothing.shape[:-1]
    gradient = jax.grad(lambda q: jax.vmap(run, (0, None))(q, X)[0].sum())(nothing)
    assert gradient.shape == nothing.shape


@pytest.mark.parametrize("implementation", CPU_BACKENDS)
def test_each_sample_takes_its_own_branch(implementation):
    """A vmapped `cond` or `switch`: values and gradients, either way round, as one by one."""
    x = jax.random.normal(jax.random.key(1), (3, 1, 6, 2, 4))
    text = jax.random.normal(jax.random.key(2), (1, 2, 2, 4))
    which = (2, 0, 1)

    def window(kernel_size, x, text):
        return gna.neighborhood_attention(
            x,
            x,
            x,
            kernel_size=kernel_size,
            additional_keys=text,
            additional_values=text,
            implementation=implementation,
        )

    branches = [functools.partial(window, kernel_size) for kernel_size in (6, 3, 2)]

    def one(n, x, text):
        return (jax.lax.switch(n, branches, x, text) ** 2).sum()

    def expected(x, text):
        return jnp.stack(
            [(branches[n](one, text) ** 2).sum() for n, one in zip(which, x, strict=True)]
        )

    @jax.jit
    def transformed(n, x, text):
        each = jax.vmap(one, (0, 0, None))
        values, gradients = jax.value_and_grad(lambda *y: each(n, *y).sum(), (0, 1))(x, text)
        own = jax.vmap(jax.grad(one, (1, 2)), (0, 0, None))(n, x, text)
        nested = jax.vmap(jax.vmap(one, (None, 0, None)), (0, None, None))(n, x, text)
        mapped = jax.lax.map(lambda pair: one(*pair, text), (n, x), batch_size=2)
        return each(n, x, text), values, gradients, own, jnp.diagonal(nested), mapped

    values, total, gradients, own, nested, mapped = transformed(jnp.array(which), x, text)
    want = expected(x, text)
    of_x, of_text = jax.grad(lambda *y: expected(*y).sum(), (0, 1))(x, text)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    for got in (values, nested, mapped):
        close(got, want)
    close(total, want.sum())
    for got in (gradients, (own[0], own[1].sum(0))):
        close(got[0], of_x)
        close(got[1], of_text)


@pytest.mark.parametrize("implementation", CPU_BACKENDS)
def test_with_64_bits(implementation):
    def loss(x):
        output, lse = attend(x, x, x, implementation=implementation)
        assert output.dtype == lse.dtype == jnp.float32
        return (output**2).sum() + lse.sum()

    expected = jax.grad(loss)(X)
    with jax.enable_x64(True):
        got = jax.grad(loss)(X)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [np.float32(2), np.float64(2), np.int64(2), 2])
def test_scale_of_numpy(scale):
    np.testing.assert_array_equal(attend(X, X, X, scale=scale)[0], attend(X, X, X, scale=2.0)[0])


@pytest.mark.parametrize("scale", [0, 0.0, -0.5, np.inf, True, np.float32("nan")])
def test_scale_that_is_none(scale):
    with pytest.raises(ValueError, match=re.escape(f"received {scale!r}.")):
        attend(X, X, X, scale=scale)


def test_layouts_that_are_none():
    for layout in ((6, 0), (), (1, 2, 3, 1)):
        with pytest.raises(ValueError, match=re.escape(f"received {layout}.")):
            gna.joint_neighborhood_attention((X,) * 3, (X,) * 3, token_layout=layout, kernel_size=2)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda q, k, v: (q, k[:, :, :1], v), "key"),
        (lambda q, k, v: (q, k, v[:, :2]), "value"),
        (lambda q, k, v: (q.astype(jnp.bfloat16), k, v), "query"),
        (lambda q, k, v: (q[:, :0], k[:, :0], v[:, :0]), "query"),
        (lambda q, k, v: (q[0], k, v), "query"),
    ],
)
def test_text_that_does_not_fit_its_image(change, name):
    """The message speaks of the text, not of arguments that nobody gave."""
    with pytest.raises(ValueError, match=f"^the text's {name} must be") as refusal:
        gna.joint_neighborhood_attention(
            (X,) * 3, change(X, X, X), token_layout=(3, 2), kernel_size=2
        )
    assert "additional" not in str(refusal.value)


def test_names_that_are_none():
    problem = gna.describe(X, X, X, kernel_size=3)
    with pytest.raises(ValueError, match=r"one of reference, xla, .*received 'fast'"):
        gna.unsupported("fast", problem)


def test_merging_parts_without_keys():
    output, lse = attend(X, X, X)
    empty = jnp.zeros_like(output), jnp.full_like(lse, -jnp.inf)

    def merged(output, lse):
        return gna.merge_attentions([empty[0], output, empty[0]], [empty[1], lse, empty[1]])

    for one, other in zip(merged(output, lse), (output, lse), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    nothing = gna.merge_attentions([empty[0]] * 2, [empty[1]] * 2)
    np.testing.assert_array_equal(nothing[0], empty[0])
    np.testing.assert_array_equal(nothing[1], empty[1])
    gradients = jax.grad(lambda *x: sum(y.sum() for y in merged(*x)), (0, 1))(output, lse)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 1, rtol=1e-6)


EMPTY = {  # which parts have keys, row by row of the queries
    "two": [(0, 0), (0, 1), (1, 0), (1, 1)],
    "three": [(0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1)],
    "five": [(0, 0, 0, 0, 1), (1, 0, 0, 0, 0), (0, 0, 1, 0, 0), (0, 1, 0, 0, 1), (0,) * 5],
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merging_parts_without_keys_differentiates(name, dtype):
    """Values and gradients against float64: a sum over the parts that have keys, and no other.

    What stands in an output without keys counts for nothing, be it not a number.
    """
    has = np.array(EMPTY[name], bool).T[:, :, None]  # [parts, queries, heads]
    rng = np.random.default_rng(0)
    parts, (queries, heads, dim) = len(has), (has.shape[1], 1, 4)
    outputs = rng.standard_normal((parts, queries, heads, dim)).astype(np.float32)
    outputs = np.array(jnp.asarray(outputs, dtype).astype(jnp.float32), np.float64)
    lses = np.where(has, rng.standard_normal((parts, queries, heads)).astype(np.float32), -np.inf)
    d_output, d_lse = rng.standard_normal((queries, heads, dim)), rng.standard_normal((queries, 1))
    some = has.any(0)
    mass = np.exp(lses.astype(np.float64))
    weights = mass / np.where(some, mass.sum(0), 1)
    merged = (weights[..., None] * outputs).sum(0)
    d_weights = ((outputs - merged) * d_output).sum(-1)
    expected = (
        merged,
        np.log(mass.sum(0), out=np.full(some.shape, -np.inf), where=some),
        weights[..., None] * d_output,
        weights * (d_weights + np.where(some, d_lse, 0)),
    )

    def call(outputs, lses):
        return gna.merge_attentions(list(outputs), list(lses))

    given = jnp.asarray(np.where(has[..., None], outputs, np.nan), dtype), jnp.float32(lses)
    cotangents = jnp.asarray(d_output, dtype), jnp.float32(d_lse)
    results, pull = jax.vjp(jax.jit(call), *given)
    for got, value in zip((*results, *pull(cotangents)), expected, strict=True):
        rough = 2.0**-7 if dtype == jnp.bfloat16 else 1e-5  # a few units of roundoff
        np.testing.assert_allclose(np.float64(got), value, rtol=4 * rough, atol=4 * rough)


def test_steps_over_many_tokens_take_little_memory():
    """Where all queries see all keys, steps keep nothing per query: here that were 0.5 GB."""
    x = jax.ShapeDtypeStruct((1, 1 << 15, 1, 8), jnp.float32)
    problem = gna.describe(x, x, x, kernel_size=1 << 15)
    tracemalloc.start()
    try:
        loop, *_ = boxes.plan.__wrapped__(problem, 1 << 12, 1).loops
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(loop.queries) == (1 << 15) // loop.tile[0] * (1 << 15) // loop.box[0]
    assert peak < 2e8


def test_the_default_device_decides(monkeypatch):
    problem = gna.describe(X, X, X, kernel_size=3)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert platforms.default_platform() == "gpu"
    with jax.default_device(jax.devices("cpu")[1]):
        assert platforms.default_platform() == "cpu"
        assert gna.unsupported("triton", problem) == "it runs on a GPU, not on cpu"
