"""Partitioning over devices: how `jax.jit` divides a backend's call by batch and heads.

Devices need nothing of each other's batch entries and heads.  A compiler that partitions programs
cannot know that of a custom call, or of a loop that takes a few heads at a time: it would gather
all operands on all devices.  Tokens are gathered; `context_parallel` divides them.

Where the mesh's axes are Auto, the compiler asks how operands are divided when it partitions
(`custom_partitioning`).  Where they are Explicit, the operands' types say it (`shard_map`).
"""

import copyreg
import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.core import eval_jaxpr
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from .problem import (
    AnyProblem,
    ListOperands,
    ListProblem,
    Operands,
    Problem,
    Residuals,
    Size,
)

# Axes of the operands and results: batch, tokens, query heads, key heads, dims, additional keys;
# tokens of keys in a row of their own, blocks of queries and the places of their lists.
_ADDITIONAL = ("b a g d", "b a g e")
_OUTPUT, _LSE = "b x h e", "b x h"
_OPERANDS = Operands._make(("b x h d", "b x g d", "b x g e", *_ADDITIONAL))
_LISTS = ("b h i j", "b h i")
_LIST_OPERANDS = ListOperands._make(("b x h d", "b y g d", "b y g e", *_ADDITIONAL, *_LISTS))

Axes = tuple[str, ...]


def _backward(operands: Any, gradients: Any) -> tuple[Any, Any]:
    return (Residuals._make((operands, _OUTPUT, _LSE)), _OUTPUT, _LSE), gradients


# What goes into a backend's function, and what comes out, by the kind of the problem.
FORWARD = {
    Problem: ((_OPERANDS,), (_OUTPUT, _LSE)),
    ListProblem: ((_LIST_OPERANDS,), (_OUTPUT, _LSE)),
}
BACKWARD = {
    Problem: _backward(_OPERANDS, _OPERANDS),
    ListProblem: _backward(_LIST_OPERANDS, _LIST_OPERANDS._replace(blocks=None, counts=None)),
}

# A compiled program keeps what jax asked when it partitioned it, of no use any more: that cannot be
# pickled, and must not keep `jax.experimental.serialize_executable` from saving the program.
_ASKED = custom_partitioning.def_partition.__globals__.get("_ShardingCallbackInfo")
if _ASKED is not None:
    copyreg.pickle(_ASKED, lambda asked: (object, ()))


def partitioned(
    run: Callable[..., Any], problem: AnyProblem, axes: tuple[Any, Any]
) -> Callable[..., Any]:
    """`run(problem, *operands)` as a function of the operands that divides over devices.

    Args:
      run: a backend's `forward` or `backward`.
      problem: the whole problem; a device is given its part of it.
      axes: of `FORWARD` or `BACKWARD`.
    """

    def absent(names: str) -> bool:
        return " a " in names and not problem.additional

    operands, results = jax.tree.map(lambda names: None if absent(names) else names, axes)

    def partition(mesh: Mesh, arguments: Any, _: Any) -> Any:
        tables, given = arguments
        query = jax.tree.leaves(given)[0]
        mesh = _refined(mesh, query.sharding)
        batch = _axes_along(0, mesh, query)
        heads = _axes_along(query.ndim - 2, mesh, query)
        part, spec = _divided(problem, mesh, batch, heads)

        def sharding(names: str) -> NamedSharding:
            return NamedSharding(mesh, spec(names))

        everywhere = [NamedSharding(mesh, PartitionSpec())] * len(tables)
        return (
            mesh,
            lambda tables, given: run(part, *given),
            jax.tree.map(sharding, results),
            (everywhere, jax.tree.map(sharding, operands)),
        )

    def call(*given: Any) -> Any:
        mesh = _explicit_mesh(*jax.tree.leaves(given))
        if mesh is not None:
            return _over_explicit_axes(run, problem, operands, results, mesh, given)
        if jax.sharding.get_abstract_mesh().manual_axes:  # in shard_map, which has divided already
            return run(problem, *given)
        # Tables are constants of the program, which a partitioned call must be handed.
        program, shapes = jax.make_jaxpr(functools.partial(run, problem), return_shape=True)(*given)
        words = _fingerprint(run, problem, program)

        def whole(tables: list[Any], given: Any) -> Any:
            flat = eval_jaxpr(program.jaxpr, tables[len(words) :], *jax.tree.leaves(given))
            return jax.tree.unflatten(jax.tree.structure(shapes), flat)

        tables = [*words, *program.consts]
        divided = custom_partitioning(whole)
        divided.def_partition(
            partition, decode_shardings=False, **_rule(problem, tables, operands, results)
        )
        return divided(tables, given)

    return call


def _rule(problem: AnyProblem, tables: list[Any], operands: Any, results: Any) -> dict[str, Any]:
    """What may be divided, in the terms of `custom_partitioning`."""
    tokens = [f"x{m}" for m in range(len(problem.layout))]
    repeated, several = problem.repeats > 1, problem.kv_heads > 1
    heads = ("(h r)" if several else "r") if repeated else "h"
    named = {"x": " ".join(tokens), "h": heads, "g": "h"}

    def listed(names: list[str]) -> str:
        return ", ".join(" ".join(named.get(n, n) for n in each.split()) for each in names)

    of_tables = [" ".join(f"t{i}{m}" for m in range(x.ndim)) for i, x in enumerate(tables)]
    given = listed(of_tables + jax.tree.leaves(operands))
    # In the order in which they appear, as the verifier wants them.
    whole = [name for name in dict.fromkeys(re.findall(r"\w+", given)) if name not in ("b", "h")]
    return {
        "sharding_rule": f"{given} -> {listed(jax.tree.leaves(results))}",
        "need_replication_factors": tuple(whole),
        **({"r": problem.repeats} if repeated and several else {}),
    }


def _divided(
    problem: AnyProblem, mesh: Mesh | AbstractMesh, batch: Axes, heads: Axes
) -> tuple[AnyProblem, Callable[[str], PartitionSpec]]:
    """A device's part of a problem, and the partition of an operand or result by its axes' names.

    Of the mesh axes along the batch and the heads of a query those are used that divide evenly.
    """
    batch = _dividing(problem.batch, mesh, batch)
    heads = _dividing(problem.kv_heads, mesh, heads)
    along_batch, along_heads = (math.prod(mesh.shape[a] for a in axes) for axes in (batch, heads))
    part = dataclasses.replace(
        problem,
        batch=problem.batch // along_batch,
        heads=problem.heads // along_heads,
        kv_heads=problem.kv_heads // along_heads,
    )
    tokens = (None,) * len(problem.layout)

    def spec(names: str) -> PartitionSpec:
        where = {"b": (batch or None,), "x": tokens, "h": (heads or None,), "g": (heads or None,)}
        return PartitionSpec(*(axis for name in names.split() for axis in where.get(name, (None,))))

    return part, spec


def _dividing(size: Size, mesh: Mesh | AbstractMesh, axes: Axes) -> Axes:
    """The first of the axes, as many as divide a size together."""
    counts = [math.prod(mesh.shape[a] for a in axes[:n]) for n in range(len(axes) + 1)]
    return axes[: max(n for n, count in enumerate(counts) if size % count == 0)]


# What the key of a program in the compilation cache is made from


def _fingerprint(run: Callable[..., Any], problem: AnyProblem, program: Any) -> list[Array]:
    """Numbers that stand for all that a call does, in every process the same.

    A program that is yet to be partitioned shows of the call only its operands, and the key of the
    persistent compilation cache is made from such a program: so they are operands too.
    """
    # Functions among the parameters of an equation are printed with their addresses.
    text = re.sub("0x[0-9a-f]+", "", str(program.jaxpr))
    said = repr((run.__module__, run.__qualname__, problem, text, _sources()))
    words = np.frombuffer(hashlib.sha256(said.encode()).digest(), "<u4")
    # Made by the program: what it closes over may become an argument of it instead.
    return [jax.lax.full((1,), int(word), np.uint32) for word in words]


@functools.cache
def _sources() -> str:
    """A digest of this package: a kernel's code is not part of a traced program."""
    digest, folder = hashlib.sha256(), Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


# Auto axes: what the partitioner has chosen


def _refined(mesh: Mesh, sharding: Sharding) -> Mesh:
    """The devices of a mesh with an axis for each prime factor of its axes.

    Heads that share key heads may be divided by a part of an axis. Where no mesh is known, its
    devices stand in one row.
    """
    devices = mesh.devices if mesh.size > 1 else np.array(list(sharding.devices_indices_map((1,))))
    sizes = [factor for size in devices.shape for factor in _factors(size)] or [1]
    return Mesh(devices.reshape(sizes), tuple(f"axis{n}" for n in range(len(sizes))))


def _factors(number: int) -> list[int]:
    first = next((n for n in range(2, number + 1) if number % n == 0), None)
    return [] if first is None else [first, *_factors(number // first)]


def _axes_along(dimension: int, mesh: Mesh, x: jax.ShapeDtypeStruct) -> Axes:
    """The mesh axes that divide a dimension, major first; none where axes do not describe it."""
    # Of a shape that all divide evenly, be it not so with that of `x`.
    shape = (mesh.size,) * x.ndim
    places = {
        device: index[dimension].start or 0
        for device, index in x.sharding.devices_indices_map(shape).items()
    }
    starts = np.vectorize(places.__getitem__, otypes=[int])(mesh.devices)
    steps = {
        name: int(np.take(starts, 1, axis).flat[0])
        for axis, name in enumerate(mesh.axis_names)
        if mesh.shape[name] > 1
    }
    axes = sorted((name for name in steps if steps[name]), key=lambda name: -steps[name])
    pieces = mesh.size // x.sharding.shard_shape(shape)[dimension]
    return tuple(axes) if math.prod(mesh.shape[name] for name in axes) == pieces else ()


# Explicit axes


def _explicit_mesh(*arrays: Array) -> AbstractMesh | None:
    """The mesh of the arrays, if any of its axes are Explicit."""
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in arrays)]
    return next((mesh for mesh in meshes if AxisType.Explicit in (mesh.axis_types or ())), None)


def is_in_mesh(*arrays: Array) -> bool:
    """Whether the devices of a mesh are known as a program is traced, not only to a compiler."""
    return bool(_explicit_mesh(*arrays) is not None or jax.sharding.get_abstract_mesh().manual_axes)


def _spec(x: Array) -> tuple[Axes, ...]:
    """The Explicit axes that divide each dimension."""
    return _entries(jax.typeof(x).sharding.spec, x.ndim)


def _entries(spec: PartitionSpec, rank: int) -> tuple[Axes, ...]:
    entries = (*spec, *(None,) * rank)[:rank]
    return tuple((axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in entries)


def sharded(x: Array, spec: tuple[Axes, ...], mesh: AbstractMesh | None = None) -> Array:
    """An array divided over these Explicit axes along each dimension; without a mesh as it is."""
    mesh = mesh or _explicit_mesh(x)
    if mesh is None or _spec(x) == spec:
        return x
    return jax.reshard(x, NamedSharding(mesh, PartitionSpec(*(axes or None for axes in spec))))


def with_whole_tokens(x: Array) -> Array:
    """Operand [B, *X, H, D] of which Explicit axes divide the batch and the heads only."""
    spec = _spec(x)
    return sharded(x, (spec[0], *((),) * (x.ndim - 3), spec[-2], ()))


def sharded_as(x: Array, other: Array, dimensions: int) -> Array:
    """An array with the first dimensions divided as those of another."""
    return sharded(x, (*_spec(other)[:dimensions], *_spec(x)[dimensions:]))


def fold(x: Array) -> Array:
    """[S, B, ...] as [S * B, ...], where Explicit axes then divide S only."""
    spec = _spec(x)
    return sharded(x, (spec[0], (), *spec[2:])).reshape(-1, *x.shape[2:])


def unfold(x: Array, shape: tuple[Size, Size], like: Array, query: Array) -> Array:
    """[S * B, ...] as [S, B, ...], S divided as in the array `like`, B as in the query."""
    x = x.reshape(*shape, *x.shape[1:])
    return sharded(x, (_spec(like)[0], _spec(query)[1], *_spec(x)[2:]))


def _over_explicit_axes(
    run: Callable[..., Any],
    problem: AnyProblem,
    operands: Any,
    results: Any,
    mesh: AbstractMesh,
    given: Any,
) -> Any:
    """Every operand and result is divided as the query is, as far as its heads allow."""
    query = jax.tree.leaves(given)[0]
    spec = _spec(query)
    part, partition = _divided(problem, mesh, spec[0], spec[-2])
    inside = jax.tree.map(partition, operands)
    outside = jax.tree.map(partition, results)

    def laid_out(x: Array, where: PartitionSpec) -> Array:
        return sharded(x, _entries(where, x.ndim), mesh)

    given = jax.tree.map(laid_out, given, inside)
    # No names are all axes but those along which vmap maps, which one may not name.
    every = all(kind == AxisType.Explicit for kind in mesh.axis_types)
    entries = (_entries(where, len(where)) for where in jax.tree.leaves(outside))
    names = {axis for each in entries for axes in each for axis in axes}
    if not every and not names:
        return run(part, *given)
    divided = jax.shard_map(
        functools.partial(run, part),
        mesh=mesh,
        in_specs=inside,
        out_specs=outside,
        axis_names=set() if every else names,
    )
    return divided(*given)
