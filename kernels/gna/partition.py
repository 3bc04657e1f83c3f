"""Batch and heads over many devices: how `jax.jit` divides a backend's call.

Devices need nothing of each other's batch entries and heads.  A compiler that partitions programs
cannot know that of a custom call, or of a loop that takes a few heads at a time: it would gather
all operands on all devices.  Tokens are gathered; `context_parallel` divides them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.core import eval_jaxpr
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .problem import Gradients, Problem, Residuals

# Axes of the operands and results: batch, tokens, query heads, key heads, dims, additional keys.
_QUERY, _KEY, _VALUE = "b x h d", "b x g d", "b x g e"
_ADDITIONAL = ("b a g d", "b a g e")
_OUTPUT, _LSE = "b x h e", "b x h"
_OPERANDS = (_QUERY, _KEY, _VALUE, *_ADDITIONAL)

FORWARD = (_OPERANDS, (_OUTPUT, _LSE))
BACKWARD = (
    (Residuals._make((*_OPERANDS, _OUTPUT, _LSE)), _OUTPUT, _LSE),
    Gradients._make(_OPERANDS),
)


def partitioned(
    run: Callable[..., Any], problem: Problem, axes: tuple[Any, Any]
) -> Callable[..., Any]:
    """`run(problem, *operands)` as a function of the operands that divides over devices.

    Args:
      run: a backend's `forward` or `backward`.
      problem: the whole problem; a device is given its part of it.
      axes: `FORWARD` or `BACKWARD`.
    """

    def absent(names: str) -> bool:
        return " a " in names and not problem.additional

    operands, results = jax.tree.map(lambda names: None if absent(names) else names, axes)

    def partition(mesh: Mesh, arguments: Any, _: Any) -> Any:
        tables, given = arguments
        batch, heads = _axes_of(mesh, jax.tree.leaves(given)[0], problem)
        part = dataclasses.replace(
            problem,
            batch=problem.batch // _devices(mesh, batch),
            heads=problem.heads // _devices(mesh, heads),
            kv_heads=problem.kv_heads // _devices(mesh, heads),
        )
        tokens = (None,) * len(problem.windows)

        def sharding(names: str) -> NamedSharding:
            where = {"b": (batch,), "x": tokens, "h": (heads,), "g": (heads,)}
            spec = [axis for name in names.split() for axis in where.get(name, (None,))]
            return NamedSharding(mesh, PartitionSpec(*spec))

        everywhere = [NamedSharding(mesh, PartitionSpec())] * len(tables)
        return (
            mesh,
            lambda tables, given: run(part, *given),
            jax.tree.map(sharding, results),
            (everywhere, jax.tree.map(sharding, operands)),
        )

    def call(*given: Any) -> Any:
        if jax.sharding.get_abstract_mesh().manual_axes:  # in shard_map, which has divided already
            return run(problem, *given)
        # Tables are constants of the program, which a partitioned call must be handed.
        program, shapes = jax.make_jaxpr(functools.partial(run, problem), return_shape=True)(*given)

        def whole(tables: list[Any], given: Any) -> Any:
            flat = eval_jaxpr(program.jaxpr, tables, *jax.tree.leaves(given))
            return jax.tree.unflatten(jax.tree.structure(shapes), flat)

        divided = custom_partitioning(whole)
        divided.def_partition(partition, **_rule(problem, program.consts, operands, results))
        return divided(program.consts, given)

    return call


def _rule(problem: Problem, tables: list[Any], operands: Any, results: Any) -> dict[str, Any]:
    """What may be divided, in the terms of `custom_partitioning`."""
    tokens = [f"x{m}" for m in range(len(problem.windows))]
    repeated, several = problem.repeats > 1, problem.kv_heads > 1
    heads = ("(h r)" if several else "r") if repeated else "h"
    named = {"x": " ".join(tokens), "h": heads, "g": "h"}

    def listed(names: list[str]) -> str:
        return ", ".join(" ".join(named.get(n, n) for n in each.split()) for each in names)

    of_tables = [" ".join(f"t{i}{m}" for m in range(x.ndim)) for i, x in enumerate(tables)]
    # In the order in which they appear, as the verifier wants them.
    whole = [name for names in of_tables for name in names.split()]
    whole += [*tokens, *("r" * repeated), "d", "e", *("a" * (problem.additional > 0))]
    given = listed(of_tables + jax.tree.leaves(operands))
    return {
        "sharding_rule": f"{given} -> {listed(jax.tree.leaves(results))}",
        "need_replication_factors": tuple(whole),
        **({"r": problem.repeats} if repeated and several else {}),
    }


def _axes_of(mesh: Mesh, query: Any, problem: Problem) -> tuple[Any, Any]:
    """The mesh axes that divide the batch and the heads of a query; None where they cannot."""
    spec = (*query.sharding.spec, *(None,) * query.ndim)
    batch, heads = spec[0], spec[query.ndim - 2]
    return (
        None if problem.batch % _devices(mesh, batch) else batch,
        None if problem.kv_heads % _devices(mesh, heads) else heads,
    )


def _devices(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)
