"""Convolutions of bfloat16 on CPUs: the call by each kind of instructions, against float64."""

import ctypes
import functools
import platform
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conceptax.flax_models.layers.resnet import conv1x1, conv3x3
from conceptax.kernels import bfloat16, convolution, products
from conceptax.kernels.gna.cuda import build

EMULATOR = Path(__file__).parent / "amx_emulator.h"
X86 = platform.machine() == "x86_64"

# Image and kernel, strides, padding: several pieces of a sum, blocks of rows and of columns; odd
# rows; what a VAE pads at the end; videos whose past is padded.
CASES = {
    "image": ((2, 9, 7, 20), (3, 3, 20, 34), (1, 1), ((1, 1), (1, 1))),
    "many of all": ((1, 21, 19, 290), (1, 2, 290, 270), (1, 1), ((0, 0), (0, 1))),
    "strides": ((2, 8, 9, 16), (3, 3, 16, 16), (2, 2), ((1, 1), (1, 1))),
    "padded at the end": ((1, 8, 6, 16), (3, 3, 16, 18), (2, 2), ((0, 1), (0, 1))),
    "more padding than kernel": ((1, 3, 2, 16), (2, 2, 16, 16), (1, 1), ((3, 2), (2, 3))),
    "video": ((1, 4, 5, 3, 16), (3, 3, 3, 16, 16), (1, 2, 1), ((2, 0), (1, 1), (1, 1))),
}


@pytest.fixture
def fast(monkeypatch):
    if build.missing("bfloat16"):
        pytest.skip(build.missing("bfloat16"))
    monkeypatch.setattr(products, "fast_bfloat16", lambda: True)


@pytest.fixture(scope="module", params=["own", "float32", "emulated AMX"])
def instructions(request, tmp_path_factory):
    """The call's targets, built for one kind of instructions."""
    if build.missing("bfloat16"):
        pytest.skip(build.missing("bfloat16"))
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "own":
            assert bfloat16.available()
            yield
            return
        if not X86:
            pytest.skip("there are other instructions on x86 alone")
        off = "-mno-avx512bf16 -mno-amx-bf16"
        patch.setenv(
            "CXX", f"g++ {off}" if request.param == "float32" else f"g++ {off} -include {EMULATOR}"
        )
        build._version.cache_clear()
        library = ctypes.CDLL(
            str(build.build("bfloat16", folder=tmp_path_factory.mktemp("library")))
        )
        for name in ("_CONVOLVE", "_CORRELATE"):
            target = getattr(bfloat16, name)
            other = f"{target}_{request.param.replace(' ', '_')}"
            symbol = getattr(library, build.CALLS["bfloat16"][target])
            jax.ffi.register_ffi_target(other, jax.ffi.pycapsule(symbol), platform="cpu")
            patch.setattr(bfloat16, name, other)
        yield


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def wide(x):
    return np.asarray(x.astype(jnp.float32)).astype(np.float64)


def exact(x, kernel, strides, padding):
    """In float64, as a sum over taps; with what the terms' sizes add up to."""
    axes = x.ndim - 2
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    sizes = [
        (size - tap) // stride + 1
        for size, tap, stride in zip(x.shape[1:], kernel.shape, strides, strict=False)
    ]
    total = 0.0
    for tap in np.ndindex(kernel.shape[:axes]):
        seen = tuple(
            slice(first, first + (size - 1) * stride + 1, stride)
            for first, size, stride in zip(tap, sizes, strides, strict=True)
        )
        total = total + x[(slice(None), *seen)] @ kernel[tap]
    return total


def assert_within_two_ulps(value, wanted, magnitude):
    """Of bfloat16, and what sums in float32 of so large terms may lose."""
    ulp = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(wanted), 1e-30))) - 7)
    assert np.all(np.abs(wide(value) - wanted) <= 2 * ulp + 2.0**-20 * magnitude)


@functools.cache
def _exact_derivatives(case):
    """Result and cotangents in float64, by differences that are exact: it is linear in each."""
    shape, taps, strides, padding = CASES[case]
    x, kernel = wide(normal(0, *shape)), wide(normal(1, *taps))
    jax.config.update("jax_enable_x64", True)
    try:
        names = ("NHWC", "HWIO", "NHWC") if x.ndim == 4 else ("NDHWC", "DHWIO", "NDHWC")

        def run(x, kernel):
            return jax.lax.conv_general_dilated(
                x, kernel, strides, padding, dimension_numbers=names, precision="highest"
            )

        made = exact(x, kernel, strides, padding)
        g = wide(normal(2, *made.shape))

        @jax.jit
        def pulled(x, kernel, g):
            return jax.vjp(run, x, kernel)[1](g)

        values = (made, *pulled(x, kernel, g))
        sizes = exact(*map(np.abs, (x, kernel)), strides, padding)
        sizes = (sizes, *pulled(*map(np.abs, (x, kernel, g))))
        return [np.asarray(v) for v in values], [np.asarray(v) for v in sizes]
    finally:
        jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_exact_to_two_ulps(instructions, case):
    shape, taps, strides, padding = CASES[case]
    values, sizes = _exact_derivatives(case)

    @jax.jit
    def both(x, kernel, g):
        made, pull = jax.vjp(
            lambda x, kernel: bfloat16.convolved(x, kernel, strides, padding), x, kernel
        )
        return made, *pull(g)

    given = normal(0, *shape), normal(1, *taps), normal(2, *values[0].shape)
    text = both.lower(*given).as_text()
    assert text.count(bfloat16._CONVOLVE) == 2
    assert text.count(bfloat16._CORRELATE) == 1
    for received, wanted, size in zip(both(*given), values, sizes, strict=True):
        assert received.dtype == jnp.bfloat16
        assert_within_two_ulps(received, wanted, size)


def test_derivatives_of_derivatives_and_vmap(fast):
    shape, taps, strides, padding = CASES["padded at the end"]
    x, kernel = normal(0, *shape), normal(1, *taps)

    def both(convolve):
        def made(x, kernel):
            return convolve(x, kernel, strides, padding)

        def loss(x, kernel):
            return jnp.sum(made(x, kernel).astype(jnp.float32) ** 2) / 64

        def slope(x):
            return jnp.sum(jax.grad(loss, 1)(x, kernel).astype(jnp.float32) ** 2)

        two_x, two_kernels = jnp.stack([x, 2 * x]), jnp.stack([kernel, -kernel])
        return (
            jax.jvp(made, (x, kernel), (x, kernel))[1],
            jax.grad(slope)(x),
            *jax.vmap(jax.grad(loss, (0, 1)), (0, None))(two_x, kernel),
            *jax.vmap(jax.grad(loss, (0, 1)))(two_x, two_kernels),
            jax.vmap(made, (None, 0))(x, two_kernels),
            jax.vmap(made, (0, None))(two_x, kernel),
        )

    def plain(x, kernel, strides, padding):
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    received, wanted = (jax.jit(functools.partial(both, f))() for f in (bfloat16.convolved, plain))
    for one, other in zip(received, wanted, strict=True):
        assert one.shape == other.shape
        difference = np.linalg.norm(wide(one) - wide(other))
        assert difference <= 2**-6 * np.linalg.norm(wide(other))


def _text(layer, *shape, platform="cpu"):
    graphdef, state = nnx.split(layer)
    call = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    traced = call.trace(state, jnp.ones(shape, jnp.bfloat16))
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_layers_take_it_on_cpus_that_are_fast(fast, monkeypatch):
    init = {"dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    layer = conv3x3(16, 32, **init)
    assert bfloat16._CONVOLVE in _text(layer, 2, 8, 8, 16)
    assert "bf16>) -> tensor<2x8x8x32xf32>" in _text(conv1x1(16, 32, **init), 2, 8, 8, 16)
    for shape in ((2, 8, 8, 16), (2, 2, 2, 16)):
        assert bfloat16._CONVOLVE not in _text(layer, *shape, platform="cuda")
        assert "stablehlo.convolution" in _text(layer, *shape, platform="cuda")
    assert bfloat16._CONVOLVE not in _text(conv3x3(3, 32, **init), 2, 8, 8, 3)
    monkeypatch.setattr(products, "fast_bfloat16", lambda: False)
    assert bfloat16._CONVOLVE not in _text(layer, 2, 8, 8, 16)


def test_exported_programs_and_several_devices_have_xlas_own(fast):
    def run(x, kernel):
        made = bfloat16.convolved(x, kernel, (1, 1), ((1, 1), (1, 1)))
        assert made is not None
        return made

    x, kernel = normal(0, 8, 4, 4, 16), normal(1, 3, 3, 16, 16)
    exported = jax.export.export(jax.jit(run))(x, kernel)
    assert "custom_call" not in str(exported.mlir_module())
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    compiled = jax.jit(run, in_shardings=(where, everywhere)).lower(x, kernel).compile()
    assert bfloat16._CONVOLVE not in compiled.as_text()
    assert "all-" not in compiled.as_text()


def test_without_a_compiler_it_is_xlas(fast, monkeypatch):
    x, kernel = normal(0, 1, 4, 4, 16), normal(1, 3, 3, 16, 16)
    bfloat16.available.cache_clear()
    monkeypatch.setattr(build, "missing", lambda target: "no compiler")
    settings = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    padding = ((1, 1), (1, 1))
    assert bfloat16.convolved(x, kernel, (1, 1), padding) is None
    assert convolution.convolve(x, kernel, (1, 1), padding, **settings).shape == (1, 4, 4, 16)
    assert bfloat16.rows_product(x, x) is None
    bfloat16.available.cache_clear()

    def fails(_):
        raise RuntimeError("the compiler said no")

    monkeypatch.setattr(build, "missing", lambda target: None)
    monkeypatch.setattr(build, "load", fails)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert bfloat16.convolved(x, kernel, (1, 1), padding) is None
    assert "XLA's: the compiler said no" in str(said[0].message)
    bfloat16.available.cache_clear()
