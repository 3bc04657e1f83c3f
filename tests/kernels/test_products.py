"""Products of bfloat16 on CPUs: against float64, and that XLA is asked not to widen them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import conceptax
from conceptax.cli.options import computed_in
from conceptax.flax_models.layers.linear import linear
from conceptax.flax_models.layers.remat import recomputed
from conceptax.kernels import products

LINEAR = (((2,), (0,)), ((), ()))


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(products, "fast_bfloat16", lambda: True)


def product(x, w):
    return products.dot_general(x, w, LINEAR)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def wide(x):
    return np.asarray(x.astype(jnp.float32)).astype(np.float64)


def assert_within_two_ulps(value, exact, magnitude):
    """Of bfloat16, and what sums in float32 of so large terms may lose."""
    assert value.dtype == jnp.bfloat16
    ulp = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), 1e-30))) - 7)
    assert np.all(np.abs(wide(value) - exact) <= 2 * ulp + 2.0**-20 * magnitude)


@pytest.mark.parametrize(
    ("vendor", "flags", "fast"),
    [
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx512f", False),
        ("GenuineIntel", "avx512f avx512_bf16", False),
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16 amx_tile", True),
    ],
)
def test_which_processors_are_fast_at_it(monkeypatch, tmp_path, vendor, flags, fast):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n\nflags\t\t: fpu {flags}\n")
    monkeypatch.setattr(products, "_CPU_INFO", info)
    assert products.fast_bfloat16.__wrapped__() is fast
    monkeypatch.setattr(products, "_CPU_INFO", tmp_path / "none")
    assert products.fast_bfloat16.__wrapped__() is False


@pytest.mark.parametrize(("fast", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_the_fastest_dtype_and_is_said(monkeypatch, capsys, fast, dtype):
    monkeypatch.setattr(products, "fast_bfloat16", lambda: fast)
    assert products.fastest_dtype() == computed_in("auto") == dtype
    assert f"computing in {dtype}" in capsys.readouterr().err
    assert computed_in("bfloat16") == "bfloat16"
    folder = conceptax.bundled_model() / "text_encoder"
    assert conceptax.load(folder, dtype="auto").dtype == jnp.dtype(dtype)


def test_values_and_gradients_are_exact_to_two_ulps(fast):
    x, w, g = normal(0, 2, 24, 100), normal(1, 100, 40), normal(2, 2, 24, 40)

    @jax.jit
    def both(x, w, g):
        value, pull = jax.vjp(product, x, w)
        return value, *pull(g)

    value, dx, dw = both(x, w, g)
    x, w, g = map(wide, (x, w, g))
    for made, equation, a, b in (
        (value, "bmk,kn->bmn", x, w),
        (dx, "bmn,kn->bmk", g, w),
        (dw, "bmk,bmn->kn", x, g),
    ):
        magnitude = np.einsum(equation, np.abs(a), np.abs(b))
        assert_within_two_ulps(made, np.einsum(equation, a, b), magnitude)


def test_vmap_is_the_products_one_by_one(fast):
    x, w = normal(0, 3, 2, 8, 32), normal(1, 3, 32, 16)
    single = jnp.stack([product(a, b) for a, b in zip(x, w, strict=True)])
    np.testing.assert_array_equal(wide(jax.vmap(product)(x, w)), wide(single))
    shared = jnp.stack([product(a, w[0]) for a in x])
    np.testing.assert_array_equal(wide(jax.vmap(product, (0, None))(x, w[0])), wide(shared))


def _lowered(function, *arguments, platform="cpu"):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def test_only_programs_for_cpus_ask_for_it(fast):
    x, w = normal(0, 2, 24, 32), normal(1, 32, 16)
    gradient = jax.grad(lambda x, w: product(x, w).sum().astype(jnp.float32))
    asked = "(tensor<2x24x32xbf16>, tensor<32x16xbf16>) -> tensor<2x24x16xf32>"
    assert asked in _lowered(product, x, w)
    assert "(tensor<2x24x16xbf16>, tensor<32x16xbf16>) -> tensor<2x24x32xf32>" in _lowered(
        gradient, x, w
    )
    plain = _lowered(lambda x, w: jax.lax.dot_general(x, w, LINEAR), x, w, platform="cuda")
    assert "xf32" not in plain
    assert "xf32" not in _lowered(product, x, w, platform="cuda")


def test_slow_processors_and_other_products_are_as_ever(monkeypatch):
    x, w = normal(0, 2, 24, 32), normal(1, 32, 16)
    plain = _lowered(lambda x, w: jax.lax.dot_general(x, w, LINEAR), x, w)
    monkeypatch.setattr(products, "fast_bfloat16", lambda: False)
    assert plain.splitlines()[1:] == _lowered(lambda x, w: product(x, w), x, w).splitlines()[1:]
    monkeypatch.setattr(products, "fast_bfloat16", lambda: True)
    for dtype, options in (
        (jnp.float32, {}),
        (jnp.bfloat16, {"precision": jax.lax.Precision.HIGHEST}),
        (jnp.bfloat16, {"preferred_element_type": jnp.float32}),
    ):
        texts = (
            str(jax.make_jaxpr(functools.partial(f, dimension_numbers=LINEAR, **options))(*given))
            for given in [(x.astype(dtype), w.astype(dtype))]
            for f in (products.dot_general, jax.lax.dot_general)
        )
        assert len(set(texts)) == 1


@pytest.mark.parametrize("policy", ["dots_saveable", "dots_with_no_batch_dims_saveable"])
def test_policies_keep_products(fast, policy):
    x, w = normal(0, 2, 24, 32), normal(1, 32, 32)

    def layers(x, w):
        return jnp.sum(jnp.tanh(product(jnp.tanh(product(x, w)), w)).astype(jnp.float32))

    def products_of(layers):
        gradient = jax.make_jaxpr(jax.value_and_grad(layers, (0, 1)))(x, w)
        return str(gradient).count("bfloat16_product[")

    assert products_of(layers) == products_of(recomputed(layers, policy)) == 4
    assert products_of(recomputed(layers, True)) == 6


def test_both_modes_of_derivatives(fast):
    x, w, dx, dw = normal(0, 2, 8, 32), normal(1, 32, 16), normal(2, 2, 8, 32), normal(3, 32, 16)
    _, change = jax.jvp(product, (x, w), (dx, dw))
    x, w, dx, dw = map(wide, (x, w, dx, dw))
    np.testing.assert_allclose(wide(change), dx @ w + x @ dw, rtol=2**-5, atol=2**-4)


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_devices_divide_rows_without_talking(fast, axes):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axes,))
    x = jax.device_put(normal(0, 8, 4, 32), NamedSharding(mesh, PartitionSpec("data")))
    w = jax.device_put(normal(1, 32, 16), NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        compiled = jax.jit(product).lower(x, w).compile()
    assert "all-" not in compiled.as_text()
    one = [jax.device_put(np.asarray(each), jax.devices()[0]) for each in (x, w)]
    np.testing.assert_array_equal(wide(compiled(x, w)), wide(jax.jit(product)(*one)))


def test_every_linear_layer_of_the_models_has_it(repository):
    assert linear(2, 4, rngs=nnx.Rngs(0)).dot_general is products.dot_general
    folder = repository / "flax_models"
    sources = {path.name: path.read_text() for path in folder.rglob("*.py")}
    assert [name for name, text in sources.items() if "nnx.Linear(" in text] == ["linear.py"]
