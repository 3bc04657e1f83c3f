"""A computation takes the implementation of the platform that it is lowered for."""

import dataclasses
import functools
import types

import gna_machines
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from conceptax.kernels import gna
from conceptax.kernels.gna import api, cuda, cudnn, platforms
from conceptax.kernels.gna.api import attend, choose
from conceptax.kernels.gna.backends import triton
from conceptax.kernels.gna.cuda import build

CPU, GPU = f"@{cuda.FORWARD}", "@triton_kernel_call"
CPU_BACKWARD = f"@{cuda.BACKWARD}"
CUDNN, CUDNN_BACKWARD = "@__cudnn$fmhaSoftmax(", "@__cudnn$fmhaSoftmaxBackward("
CALLS = (cuda.FORWARD, cuda.BACKWARD, "triton_kernel_call")

window = functools.partial(gna.neighborhood_attention, kernel_size=3)
dense = functools.partial(gna.neighborhood_attention, kernel_size=8)
X = jax.random.normal(jax.random.key(0), (2, 8, 2, 16), jnp.float32)
HALF = jax.ShapeDtypeStruct(X.shape, jnp.bfloat16)


def loss(x, attend=window):
    return (attend(x, x, x).astype(jnp.float32) ** 2).sum()


def lowered(function, *operands, platform):
    return jax.jit(function).trace(*operands).lower(lowering_platforms=(platform,)).as_text()


def problem(x=X):
    return gna.describe(x, x, x, kernel_size=3)


@pytest.fixture
def both(monkeypatch):
    """As if a GPU were beside the CPU."""
    if build.compiler("cpu") is None:
        pytest.skip("no C++ compiler")
    reason = gna.unsupported("triton", problem(HALF), "gpu")
    if reason is not None:
        pytest.skip(reason)
    gna_machines.triton_kernels(monkeypatch)
    clients = {"cpu": types.SimpleNamespace(platform="cpu")}
    clients["cuda"] = types.SimpleNamespace(platform="gpu")
    monkeypatch.setattr(platforms, "backends", lambda: clients)
    attend.clear_cache()
    yield
    attend.clear_cache()


def test_one_platform_needs_no_branches():
    assert platforms.platforms_at_hand() == ("cpu",)
    chosen = choose(problem())
    assert chosen == gna.api.select(problem())
    assert "platform_index" not in str(jax.make_jaxpr(jax.grad(loss))(X))


def test_each_platform_takes_its_own(both):
    assert choose(problem()) == (("cpu", "cuda"), ("gpu", "triton"))
    on_cpu = lowered(jax.grad(loss), X, platform="cpu")
    assert CPU in on_cpu and CPU_BACKWARD in on_cpu and GPU not in on_cpu
    on_gpu = lowered(jax.grad(loss), X, platform="cuda")
    assert on_gpu.count(GPU) == 3 and CPU not in on_gpu and CPU_BACKWARD not in on_gpu
    with jax.default_device(jax.devices("cpu")[0]):
        assert lowered(jax.grad(loss), X, platform="cuda").count(GPU) == 3
    many = jax.vmap(jax.grad(loss))
    assert "tensor<6x8x2x16xf32>" in lowered(many, jnp.stack([X] * 3), platform="cuda")


def test_exports_for_one_or_the_other(both):
    leave = [jax.export.DisabledSafetyCheck.custom_call(name) for name in CALLS]
    export = functools.partial(jax.export.export, jax.jit(loss), disabled_checks=leave)
    on_cpu, on_gpu = (export(platforms=(platform,))(X) for platform in ("cpu", "cuda"))
    assert GPU in on_gpu.mlir_module() and CPU not in on_gpu.mlir_module()
    assert GPU not in on_cpu.mlir_module()
    np.testing.assert_allclose(on_cpu.call(X), loss(X), rtol=1e-5)


def test_values_where_there_are_branches(both):
    """Under all that traces the branches again: as by the reference."""
    expected = jax.grad(
        functools.partial(loss, attend=functools.partial(window, implementation="reference"))
    )(X)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(jax.grad(loss)(X), expected)
    close(jax.jit(jax.vmap(jax.grad(lambda x: loss(x[None]))))(X), expected)
    spec = jax.P("data")
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            x = jax.device_put(X, jax.NamedSharding(mesh, spec))
            close(jax.jit(jax.grad(loss))(x), expected)
            run = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=spec, out_specs=spec)
            close(jax.jit(run)(x), expected)


def test_explicit_requests_are_for_the_platforms_that_can(both):
    assert choose(problem(), "triton") == "triton"
    assert choose(problem(), "cuda") == "cuda"  # float32: on a CPU
    assert choose(problem(), "xla") == (("cpu", "xla"), ("gpu", "xla"))
    with pytest.raises(NotImplementedError, match="it does not attend from a shard"):
        choose(dataclasses.replace(problem(), shards=2), "reference")


def test_nothing_is_built_for_devices_that_may_not_be_used(both, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cuda, "is_built", lambda platform: False)
    monkeypatch.setattr(cuda, "prepare", lambda platform: pytest.fail("is built"))
    api._is_ready.cache_clear()
    assert choose(problem()) == (("cpu", "xla"), ("gpu", "triton"))
    api._is_ready.cache_clear()


def test_steps_of_xla_are_their_platforms(both, monkeypatch):
    seen = []
    monkeypatch.setattr(api.xla, "plan_of", lambda p: seen.append(api.xla.budget()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lowered(
            functools.partial(loss, attend=functools.partial(window, implementation="xla")),
            X,
            platform="cpu",
        )
    with platforms.traced_for("gpu"):
        assert api.xla.budget() == 1 << 22
    assert seen == [1 << 18]


@pytest.fixture
def with_cudnn(both, monkeypatch):
    """As if cuDNN were installed: its version is all that jax asks of it before a program runs."""
    from jax._src.cudnn import fused_attention_stablehlo

    cudnn.takes.cache_clear()
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    yield
    cudnn.takes.cache_clear()


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_dense_problems_are_cudnns(with_cudnn, implementation):
    text = jax.ShapeDtypeStruct((2, 4, 2, 16), jnp.bfloat16)

    def gradient(x, text):
        def both(x, text):
            return loss(
                x,
                functools.partial(
                    dense,
                    additional_keys=text,
                    additional_values=text,
                    implementation=implementation,
                ),
            )

        return jax.grad(both, (0, 1))(x, text)

    on_gpu = lowered(gradient, HALF, text, platform="cuda")
    assert on_gpu.count(CUDNN) >= 1 and CUDNN_BACKWARD in on_gpu and GPU not in on_gpu
    assert "tensor<2x12x2x16xbf16>" in on_gpu  # additional keys follow the others
    on_cpu = lowered(gradient, HALF, text, platform="cpu")
    assert "cudnn" not in on_cpu and (implementation or CPU in on_cpu)


def test_what_is_not_cudnns(with_cudnn):
    def of(**options):
        return functools.partial(loss, attend=functools.partial(dense, **options))

    for function, x in (
        (of(implementation="triton"), HALF),
        (of(), jax.ShapeDtypeStruct(X.shape, jnp.float32)),
        (lambda x: loss(x), HALF),
        (lambda x: dense(x, x, x, return_lse=True)[1], HALF),
    ):
        assert "cudnn" not in lowered(function, x, platform="cuda")


def test_only_own_devices_are_asked(monkeypatch):
    own = types.SimpleNamespace(compute_capability="10.0")
    monkeypatch.setattr(jax, "devices", lambda *_: pytest.fail("a device of another process"))
    monkeypatch.setattr(jax, "local_devices", lambda backend: [own])
    assert triton._capability() == 100
