"""Neighborhood attention under `jax.jit` over a mesh: devices divide batch and heads."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from conceptax.kernels import gna
from conceptax.kernels.gna import partition
from conceptax.kernels.gna.cuda import build

LAYOUT = (6, 5)

# Of each backend, the C++ one where there is a compiler.
BACKENDS = ["reference", "xla", *(["cuda"] if build.compiler("cpu") else [])]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    ("kv_heads", "additional", "gathers"),
    [(4, 0, False), (2, 3, False), (1, 0, True)],
    ids=["MHA", "GQA and additional keys", "MQA"],
)
def test_devices_divide_batch_and_heads(kv_heads, additional, gathers, implementation):
    rng = np.random.default_rng(0)

    def operand(tokens, heads):
        return jnp.asarray(rng.standard_normal((8, *tokens, heads, 8), np.float32))

    query, key, value = (operand(LAYOUT, heads) for heads in (4, kv_heads, kv_heads))
    given = [query, key, value]
    if additional:
        given += [operand((additional,), kv_heads) for _ in range(2)]

    def loss(query, key, value, additional_keys=None, additional_values=None):
        out, lse = gna.neighborhood_attention(
            query,
            key,
            value,
            kernel_size=3,
            stride=2,
            return_lse=True,
            additional_keys=additional_keys,
            additional_values=additional_values,
            implementation=implementation,
        )
        return (out**2).mean() + (lse**2).mean()

    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def spread(x):
        heads = "tensor" if x.shape[-2] % 2 == 0 else None
        spec = PartitionSpec("data", *(None,) * (x.ndim - 3), heads)
        return jax.device_put(x, NamedSharding(mesh, spec))

    function = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(given)))))
    divided = [spread(x) for x in given]
    assert ("all-gather(" in function.lower(*divided).compile().as_text()) == gathers
    received, expected = function(*divided), function(*given)
    assert received[1][0].sharding.spec[0] == "data"
    for one, other in zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6)


def test_tokens_on_many_devices_are_gathered():
    mesh = jax.make_mesh((2,), ("tokens",), axis_types=(AxisType.Auto,))
    x = jax.random.normal(jax.random.key(0), (1, 8, 2, 4))
    slab = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "tokens")))
    attend = jax.jit(lambda x: gna.neighborhood_attention(x, x, x, kernel_size=3))
    np.testing.assert_allclose(attend(slab), attend(x), atol=1e-6)


def unpartitioned(implementation, argnums=(0, 1, 2), **settings):
    """A training step's program over a mesh before it is partitioned, without its pointers.

    The persistent compilation cache makes its key from that.
    """
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    where = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((2, 8, 2, 4), jnp.float32, sharding=where)

    def loss(*x):
        return gna.neighborhood_attention(*x, implementation=implementation, **settings).sum()

    function = jax.grad(loss, argnums) if argnums else loss
    text = jax.jit(function).lower(x, x, x).as_text()
    assert "CustomSPMDPartitioning" in text
    return re.sub(r'backend_config = "\d+"', "", text)


@pytest.mark.parametrize("argnums", [(), (0, 1, 2)], ids=["forward", "gradient"])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_programs_of_two_problems_differ_before_they_are_partitioned(implementation, argnums):
    settings = [
        {"kernel_size": 4},
        {"kernel_size": 3},
        {"kernel_size": 4, "stride": 2},
        {"kernel_size": 4, "dilation": 2},
        {"kernel_size": 4, "is_causal": True},
        {"kernel_size": 4, "scale": 0.25},
    ]
    programs = [unpartitioned(implementation, argnums, **one) for one in settings]
    assert len(set(programs)) == len(settings)
    assert unpartitioned(implementation, argnums, **settings[0]) == programs[0]


def test_the_code_of_every_backend_is_in_the_key(monkeypatch):
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or read_bytes(path))
    partition._sources.__wrapped__()
    names = {path.name for path in read}
    assert {"api.py", "tiles.py", "xla.py", "boxes.py", "triton_kernels.py"} <= names


def test_programs_of_one_problem_are_the_same_in_every_process(repository):
    def digests():
        return [
            hashlib.sha256(unpartitioned(name, kernel_size=3).encode()).hexdigest()
            for name in BACKENDS
        ]

    script = (
        "import test_partition as here, hashlib\n"
        "for name in here.BACKENDS:\n"
        "    text = here.unpartitioned(name, kernel_size=3)\n"
        "    print(hashlib.sha256(text.encode()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parent)}
    other = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert other.stdout.split() == digests(), other.stderr


@pytest.mark.parametrize(
    ("shape", "heads", "kv_heads", "implementation"),
    [
        *(((4,), 8, 2, name) for name in BACKENDS),
        ((8,), 8, 4, "reference"),
        ((2, 4), 8, 2, "reference"),
        ((4,), 12, 3, "reference"),
    ],
)
def test_an_axis_that_does_not_divide_the_key_heads(shape, heads, kv_heads, implementation):
    """Devices divide what can be divided: parts of the axis, or all of it stay together."""
    rng = np.random.default_rng(0)
    given = [rng.standard_normal((2, 6, n, 4), np.float32) for n in (heads, kv_heads, kv_heads)]

    def loss(*x):
        return (
            gna.neighborhood_attention(*x, kernel_size=3, implementation=implementation) ** 2
        ).sum()

    names = ("data", "tensor")[-len(shape) :]
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=devices)
    batch = "data" if len(shape) > 1 else None
    specs = [PartitionSpec(batch, None, "tensor"), *[PartitionSpec(batch)] * 2]
    divided = [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(given, specs, strict=True)
    ]
    function = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    received, expected = function(*divided), function(*given)
    for one, other in zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


WHOLE = PartitionSpec()
EXPLICIT = {
    "batch and heads": (PartitionSpec("data", None, None, "tensor"),) * 3,
    "heads that are not divided": (PartitionSpec(None, None, None, "data"), WHOLE, WHOLE),
    "a query only": (PartitionSpec("data"), WHOLE, WHOLE),
    "tokens": (PartitionSpec("tensor", "data"),) * 3,
}


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("name", EXPLICIT)
def test_explicit_axes(name, implementation):
    """Results are divided as the query, gradients as what they are of; with and without `jit`."""
    rng = np.random.default_rng(0)
    given = [rng.standard_normal((4, 4, 6, n, 4), np.float32) for n in (4, 2, 2)]

    def attend(*x):
        return gna.neighborhood_attention(*x, kernel_size=(3, 2), implementation=implementation)

    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    divided = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(given, EXPLICIT[name], strict=True)
    ]
    expected = jax.jit(attend)(*given)
    step = jax.jit(jax.grad(lambda *x: (attend(*x) ** 2).sum(), (0, 1, 2)))
    for received in (attend(*divided), jax.jit(attend)(*divided)):
        assert jax.typeof(received).sharding == jax.typeof(divided[0]).sharding
        np.testing.assert_allclose(received, expected, rtol=2e-5, atol=2e-5)
    for x, one, other in zip(divided, step(*divided), step(*given), strict=True):
        assert jax.typeof(one).sharding == jax.typeof(x).sharding
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("spec", [("data",), (None, "data"), ("data", "tensor")])
def test_explicit_axes_under_vmap(spec):
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4]
    )
    x = np.random.default_rng(0).standard_normal((2, 2, 6, 2, 4), np.float32)
    divided = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    step = jax.jit(
        jax.vmap(
            jax.grad(
                lambda x: (
                    gna.neighborhood_attention(x, x, x, kernel_size=3, implementation="reference")
                    ** 2
                ).sum()
            )
        )
    )
    received = step(divided)
    assert jax.typeof(received).sharding == jax.typeof(divided).sharding
    np.testing.assert_allclose(received, step(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("spec", [("tensor", "data"), ("tensor", None, None, "data"), ("tensor",)])
def test_vmap_along_one_explicit_axis_of_a_mixed_mesh(spec):
    """The other axes, Explicit or Auto, are left to what is mapped."""
    kinds = (AxisType.Explicit, AxisType.Auto, AxisType.Explicit)
    mesh = jax.make_mesh((2, 2, 2), ("data", "other", "tensor"), axis_types=kinds)
    x = np.random.default_rng(0).standard_normal((2, 2, 6, 2, 4), np.float32)
    step = jax.jit(
        jax.vmap(
            jax.grad(
                lambda x: (
                    gna.neighborhood_attention(x, x, x, kernel_size=3, implementation="reference")
                    ** 2
                ).sum()
            )
        )
    )
    with jax.set_mesh(mesh):
        received = step(jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))))
    np.testing.assert_allclose(received, step(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("spec", [("data",), (("data", "tensor"),), (None, None, "tensor")])
def test_devices_that_do_not_divide_evenly(spec):
    """Three batch entries and three heads on meshes of twos, as constraints may ask for."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    x = np.random.default_rng(0).standard_normal((3, 6, 3, 4), np.float32)

    def loss(x, where=None):
        x = x if where is None else jax.lax.with_sharding_constraint(x, where)
        out = gna.neighborhood_attention(x, x, x, kernel_size=3, implementation="reference")
        return (out**2).sum()

    where = NamedSharding(mesh, PartitionSpec(*spec))
    received = jax.jit(jax.grad(lambda x: loss(x, where)))(x)
    np.testing.assert_allclose(received, jax.grad(loss)(x), rtol=2e-5, atol=2e-5)


def test_a_program_over_a_mesh_is_saved():
    """What partitioned a program does not keep `serialize_executable` from it."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    x = jax.device_put(
        np.ones((2, 6, 1, 4), np.float32), NamedSharding(mesh, PartitionSpec("data"))
    )
    attend = jax.jit(lambda x: gna.neighborhood_attention(x, x, x, kernel_size=3))
    program = attend.lower(x).compile()
    saved = serialize_executable.serialize(program)
    again = serialize_executable.deserialize_and_load(*saved, execution_devices=jax.devices()[:2])
    np.testing.assert_array_equal(again(x), program(x))
