"""Neighborhood attention transformed, merged, in half precision, over devices; and its memory."""

import functools

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from gna_oracle import full_mask
from jax import export
from jax.sharding import AxisType, PartitionSpec

from conceptax.kernels import gna
from conceptax.kernels.gna.api import attend as attend_checked
from conceptax.kernels.gna.problem import windows_of
from conceptax.kernels.gna.tiles import key_rows

# Both sides compute in float32; see test_gna.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}

SETTINGS = {"kernel_size": (3, 4), "stride": (1, 2), "dilation": (2, 1), "is_causal": (False, True)}
CASE = SETTINGS | {"layout": (6, 6)}
attend = functools.partial(gna.neighborhood_attention, **SETTINGS, implementation="xla")
reference = functools.partial(attend, implementation="reference")


def arrays(*shapes, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def loss(function):
    """A scalar that weighs every entry of an output differently."""

    def scalar(*args):
        return sum(
            jnp.vdot(x, jnp.sin(jnp.arange(x.size)).reshape(x.shape))
            for x in jax.tree.leaves(function(*args))
        )

    return scalar


def assert_same(function, other, args, argnums=None, tolerance=None):
    """Values and gradients of two functions agree."""
    argnums = tuple(range(len(args))) if argnums is None else argnums
    pair = [jax.jit(jax.value_and_grad(loss(f), argnums)) for f in (function, other)]
    (value, gradients), (expected, expected_gradients) = (f(*args) for f in pair)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-4)
    for one, two in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(one, two, **(tolerance or TOLERANCE))


Q, K = (2, 6, 6, 4, 8), (2, 6, 6, 2, 8)


def test_vmap_folds_into_the_batch():
    q, k, v = arrays((3, *Q), (2, 6, 3, 6, 2, 8), K)
    axes = (0, 2, None)
    got = jax.jit(jax.vmap(attend, axes))(q, k, v)
    for n in range(3):
        np.testing.assert_allclose(got[n], reference(q[n], k[:, :, n], v), **TOLERANCE)
    assert_same(jax.vmap(attend, axes), jax.vmap(reference, axes), (q, k, v))


def test_nested_vmap_of_a_gradient():
    q, k, v = arrays((3, 2, *Q), (2, *K), (3, *K))
    per_example = [jax.grad(loss(f), (0, 1, 2)) for f in (attend, reference)]
    one, two = (
        jax.jit(jax.vmap(jax.vmap(f, (0, 0, None)), (0, None, 0)))(q, k, v) for f in per_example
    )
    for x, y in zip(one, two, strict=True):
        assert x.shape[:2] == (3, 2)
        np.testing.assert_allclose(x, y, **TOLERANCE)


def test_vmap_with_additional_keys_and_both_results():
    q, k, v, ak, av = arrays((2, *Q), (2, *K), (2, *K), (2, 2, 5, 2, 8), (2, 5, 2, 8))

    def call(function, q, k, v, ak, av):
        return function(q, k, v, additional_keys=ak, additional_values=av, return_lse=True)

    axes = (0, 0, 0, 0, None)
    pair = (jax.vmap(functools.partial(call, f), axes) for f in (attend, reference))
    assert_same(*pair, (q, k, v, ak, av))


def test_checkpoint():
    assert_same(jax.checkpoint(attend), reference, arrays(Q, K, K))


def test_shard_map_over_batch_and_heads():
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("data", None, None, "heads")
    more = PartitionSpec("data", None, "heads")

    def call(function, q, k, v, ak, av):
        return function(q, k, v, additional_keys=ak, additional_values=av)

    sharded = jax.shard_map(
        functools.partial(call, attend),
        mesh=mesh,
        in_specs=(spec, spec, spec, more, more),
        out_specs=spec,
    )
    inputs = arrays(Q, K, K, (2, 5, 2, 8), (2, 5, 2, 8))
    assert_same(sharded, functools.partial(call, reference), inputs)


def test_shard_map_with_keys_that_are_the_same_everywhere():
    """Gradients of keys that do not vary over an axis are summed over it."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(None, None, None, "data")
    sharded = jax.shard_map(
        attend, mesh=mesh, in_specs=(spec, PartitionSpec(), PartitionSpec()), out_specs=spec
    )
    q, k, v = arrays(Q, (2, 6, 6, 1, 8), (2, 6, 6, 1, 8))
    assert_same(sharded, reference, (q, k, v))


def test_merging_differentiates():
    """Windows and additional keys attended to apart and merged: the same as together, also where
    the merged log-sum-exp is used."""
    q, k, v, ak, av = arrays(Q, K, K, (2, 5, 2, 8), (2, 5, 2, 8))

    def text(q, ak, av):
        keys, values = (jnp.repeat(x, 2, axis=2) for x in (ak, av))
        scores = jnp.einsum("bxyhd,bahd->bxyha", q, keys) * q.shape[-1] ** -0.5
        out = jnp.einsum("bxyha,bahd->bxyhd", jax.nn.softmax(scores), values)
        return out, jax.nn.logsumexp(scores, -1)

    def apart(q, k, v, ak, av):
        outputs, lses = zip(
            text(q, ak[:, :2], av[:, :2]),
            attend(q, k, v, return_lse=True),
            text(q, ak[:, 2:], av[:, 2:]),
            strict=True,
        )
        return gna.merge_attentions(outputs, lses)

    def together(q, k, v, ak, av):
        return attend(q, k, v, additional_keys=ak, additional_values=av, return_lse=True)

    assert_same(apart, together, (q, k, v, ak, av))


def test_merging_refuses_what_does_not_fit():
    x, lse = jnp.zeros((2, 3, 4)), jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="received 2 outputs and 1 log-sum-exps"):
        gna.merge_attentions([x, x], [lse])
    with pytest.raises(ValueError, match=r"received \(2, 3, 4\) and \(2, 3, 4\) at position 1"):
        gna.merge_attentions([x, x], [lse, x])


def test_joint_attention_of_image_and_text():
    case = {"kernel_size": (3, 2), "stride": (1, 2), "dilation": (1, 3)}
    mask = full_mask(case | {"layout": (4, 6), "is_causal": (False, False)})
    mask = np.pad(mask, ((0, 3), (0, 3)), constant_values=True)
    image, text = (
        [(2, 24, 4, 8), (2, 24, 2, 8), (2, 24, 2, 4)],
        [(2, 3, 4, 8), (2, 3, 2, 8), (2, 3, 2, 4)],
    )
    inputs = arrays(*image, *text)

    def joint(*x):
        return gna.joint_neighborhood_attention(x[:3], x[3:], token_layout=(4, 6), **case)

    def dense(*x):
        q, k, v = (jnp.concatenate([i, t], 1) for i, t in zip(x[:3], x[3:], strict=True))
        k, v = (jnp.repeat(y, 2, axis=2) for y in (k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, where=mask), v)
        return out[:, :24], out[:, 24:]

    assert_same(joint, dense, inputs)


def test_dense_problems_need_no_layout():
    q, k, v = arrays((1, 4, 6, 2, 8), (1, 4, 6, 2, 8), (1, 4, 6, 2, 8))

    def whole(q, k, v):
        return gna.neighborhood_attention(q, k, v, kernel_size=(4, 6), implementation="xla")

    def jax_own(q, k, v):
        flat = (x.reshape(1, 24, 2, 8) for x in (q, k, v))
        return jax.nn.dot_product_attention(*flat).reshape(q.shape)

    assert_same(whole, jax_own, (q, k, v))


# Unit roundoff u of the dtype: probabilities and outputs are rounded to it once each, gradients
# also at the scores' cotangent; terms are of size one, so a few u in all.
@pytest.mark.parametrize(("dtype", "unit"), [(jnp.bfloat16, 2.0**-8), (jnp.float16, 2.0**-11)])
def test_half_precision(dtype, unit):
    inputs = [x.astype(dtype) for x in arrays(Q, K, K, (2, 5, 2, 8), (2, 5, 2, 8))]
    (do,) = arrays(Q, seed=1)

    def call(function, *x):
        q, k, v, ak, av = x
        return function(q, k, v, additional_keys=ak, additional_values=av)

    out, pull = jax.vjp(functools.partial(call, attend), *inputs)
    exact = [x.astype(jnp.float32) for x in inputs]
    expected, pull_exact = jax.vjp(functools.partial(call, reference), *exact)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=2 * unit, rtol=2 * unit)
    cotangent = (0.05 * do).astype(dtype)
    gradients = pull(cotangent)
    for one, two in zip(gradients, pull_exact(cotangent.astype(jnp.float32)), strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(one.astype(jnp.float32), two, atol=2 * unit, rtol=4 * unit)


@pytest.fixture
def compilations():
    """The number of programs that were compiled so far, as a function."""
    count = 0

    def listen(event, duration, **_):
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: count
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_calls_outside_of_jit_compile_once(implementation, compilations):
    (x,) = arrays((2, 5, 2, 4))

    def all_calls():
        # New functions each time, as in a loop of a notebook.
        def function(x):
            return gna.neighborhood_attention(x, x, x, kernel_size=3, implementation=implementation)

        def scalar(x):
            return function(x).sum()

        functions = (
            function,
            jax.grad(scalar),
            lambda x: jax.vmap(function)(x[None]),
            lambda x: jax.vmap(jax.grad(scalar))(x[None]),
        )
        return [function(x) for function in functions]

    start = compilations()
    all_calls()
    first = compilations()
    all_calls()
    assert first > start and compilations() == first


def test_a_problem_is_traced_once_until_it_is_forgotten():
    """What changes how a problem is run, as tuning does, has to clear what was traced before."""
    q, k, v = arrays(Q, K, K)
    attend(q, k, v)
    size = attend_checked._cache_size()
    attend(q, k, v)
    assert attend_checked._cache_size() == size > 0
    attend_checked.clear_cache()
    assert attend_checked._cache_size() == 0


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_symbolic_batch(implementation):
    (batch,) = export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((batch, *x[1:]), jnp.float32) for x in (Q, K, K)]
    function = functools.partial(attend, implementation=implementation)
    step = jax.jit(jax.value_and_grad(loss(function), (0, 1, 2)))
    exported = export.export(step, platforms=["cpu"])(*shapes)
    for size in (1, 3):
        inputs = arrays(*((size, *x[1:]) for x in (Q, K, K)))
        got, expected = exported.call(*inputs), step(*inputs)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-4)


def test_symbolic_tokens_are_refused():
    (tokens,) = export.symbolic_shape("n")
    x = jax.ShapeDtypeStruct((1, tokens, 2, 4), jnp.float32)
    with pytest.raises(ValueError, match=r"only the batch may be symbolic.*shape \(1, n, 2, 4\)"):
        export.export(jax.jit(lambda x: attend(x, x, x)))(x)


@pytest.mark.parametrize("implementation", ["reference", "xla", None])
def test_strict_promotion(implementation):
    """No operand is brought to another rank or dtype without being told, also where jax counts in
    64 bits."""
    inputs = [np.asarray(x) for x in arrays(Q, K, K, (2, 5, 2, 8), (2, 5, 2, 8))]

    def call(q, k, v, ak, av):
        output, lse = gna.neighborhood_attention(
            q,
            k,
            v,
            additional_keys=ak,
            additional_values=av,
            return_lse=True,
            implementation=implementation,
            **SETTINGS,
        )
        output, lse = gna.merge_attentions([output, output], [lse, lse])
        return output.sum() + lse.sum()

    step = jax.value_and_grad(call, range(5))
    expected = step(*inputs)
    strict = jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict")
    with strict[0], strict[1], jax.enable_x64(True):
        received = step(*inputs)
    for one, other in zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


CONTEXT = {
    "halo": ((16, 6), {"kernel_size": (4, 3), "stride": (3, 1)}),
    "halo over several devices": ((16, 4), {"kernel_size": (6, 2), "is_causal": (True, False)}),
    "dilated": ((32,), {"kernel_size": 5, "stride": 2, "dilation": 4}),
    "everything": ((8, 2, 3), {"kernel_size": (8, 1, 3), "is_causal": (True, False, False)}),
}


@pytest.mark.parametrize("name", CONTEXT)
def test_context_parallel(name):
    layout, case = CONTEXT[name]
    mesh = jax.make_mesh((8,), ("context",), axis_types=(AxisType.Auto,))
    slab, same = PartitionSpec(None, "context"), PartitionSpec()

    def call(function, q, k, v, ak, av, **options):
        return function(
            q, k, v, additional_keys=ak, additional_values=av, return_lse=True, **case, **options
        )

    spread = jax.shard_map(
        functools.partial(call, gna.context_parallel_attention, axis_name="context"),
        mesh=mesh,
        in_specs=(slab, slab, slab, same, same),
        out_specs=slab,
    )
    single = functools.partial(call, gna.neighborhood_attention, implementation="reference")
    q, k, v, ak, av = (
        (2, *layout, 2, 4),
        (2, *layout, 1, 4),
        (2, *layout, 1, 8),
        (2, 3, 1, 4),
        (2, 3, 1, 8),
    )
    assert_same(spread, single, arrays(q, k, v, ak, av))


def test_context_parallel_fetches_a_halo_only():
    (window,) = windows_of((1024,), 32, 8, 2)
    first, rows = key_rows(window, 8)
    assert rows < 128 + 3 * 64 and first[1] == 128 + first[0]
    (window,) = windows_of((1024,), 1000)
    assert key_rows(window, 8) == ((0,) * 8, 1024)


def test_context_parallel_refuses_what_does_not_fit():
    mesh = jax.make_mesh((8,), ("context",), axis_types=(AxisType.Auto,))
    slab = PartitionSpec(None, "context")
    q = jnp.zeros((1, 24, 2, 4))
    for options, error, message in (
        ({"dilation": 2}, ValueError, "received dilation 2 and 3 of 24 tokens on each of 8"),
        ({"implementation": "reference"}, NotImplementedError, "from a shard of the tokens"),
        ({"kernel_size": 25}, ValueError, "25 > 24"),
    ):
        function = functools.partial(
            gna.context_parallel_attention,
            axis_name="context",
            **({"kernel_size": 3} | options),
        )
        with pytest.raises(error, match=message):
            jax.shard_map(function, mesh=mesh, in_specs=(slab,) * 3, out_specs=slab)(q, q, q)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("share", [None, 2])
def test_memory_is_linear_in_tokens(share, training):
    """What the compiler reserves, for a fixed window and for one that grows with the layout."""

    def reserved(side):
        window = 16 if share is None else side // share

        def call(q, k, v):
            return gna.neighborhood_attention(
                q, k, v, kernel_size=window, stride=4, implementation="xla"
            )

        x = jax.ShapeDtypeStruct((1, side, side, 2, 32), jnp.float32)
        function = jax.grad(loss(call), (0, 1, 2)) if training else call
        fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        compiled = jax.jit(function).lower(x, x, x).compile(fast)
        return compiled.memory_analysis().temp_size_in_bytes, x.size * 4

    (small, of_small), (large, of_large) = reserved(64), reserved(256)
    assert of_large == 16 * of_small
    # A constant for the scores of a step, and some copies of the operands.
    assert large - small <= 16 * (of_large - of_small)
    assert large < 2 * 65536**2 * 4 / 100
