"""Timing side by side, and what the simulator expects of the tiles that a backend takes.

`conceptax gna bench` and `benchmarks/gna.py` measure with this.
"""

import dataclasses
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .. import cuda
from ..api import neighborhood_attention, seen_by_backends
from ..backends import splash, triton, xla
from ..problem import Problem
from ..tiles import shapes_of
from .schedule import GPUS, Gpu
from .simulate import Simulation, simulate


class Timing(NamedTuple):
    """Seconds of a call: the first, which compiles, and one mean for each round."""

    first: float
    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.rounds)

    @property
    def best(self) -> float:
        """Of the rounds."""
        return min(self.rounds)


def take_turns(
    contenders: Mapping[str, Callable[[], Any]], rounds: int = 7, seconds: float = 0.1
) -> dict[str, Timing]:
    """Times functions round by round, each once in a round: what drifts meets all alike.

    Args:
      contenders: functions without arguments by name; a result of jax arrays is waited for.
      rounds: how many rounds.
      seconds: about how long a function is called in a round, at least once; 0 takes no time to
        find out how often that is.

    Raises:
      ValueError: for less than one round.
    """
    if rounds < 1:
        raise ValueError(f"there must be at least 1 round, received {rounds}.")
    first, calls, times = {}, {}, {name: [] for name in contenders}
    for name, call in contenders.items():
        first[name] = _seconds(call, 1)
        often = round(seconds / max(_seconds(call, 1), 1e-9)) if seconds else 1
        calls[name] = max(1, often)
    for _ in range(rounds):
        for name, call in contenders.items():
            times[name].append(_seconds(call, calls[name]))
    return {name: Timing(first[name], tuple(times[name])) for name in contenders}


def speedup(slow: Timing, fast: Timing) -> float:
    """How many times faster, the median over the rounds in which both took turns."""
    return statistics.median(a / b for a, b in zip(slow.rounds, fast.rounds, strict=True))


def _seconds(call: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    result = None
    for _ in range(calls):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


class Operands(NamedTuple):
    """Random operands of a problem without additional keys, and a cotangent of the output."""

    query: Array
    key: Array
    value: Array
    d_output: Array


def operands(problem: Problem, seed: int = 0) -> Operands:
    """Standard normal operands; the cotangent is small, as a training step's is."""
    heads, kv_heads, layout = problem.heads, problem.kv_heads, problem.layout
    shapes = [(heads, problem.head_dim), (kv_heads, problem.head_dim)]
    shapes += [(kv_heads, problem.value_dim), (heads, problem.value_dim)]
    keys = jax.random.split(jax.random.key(seed), 4)
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    query, key, value, d_output = (
        draw(k, (problem.batch, *layout, *shape), jnp.dtype(problem.dtype))
        for k, shape in zip(keys, shapes, strict=True)
    )
    return Operands(query, key, value, 0.05 * d_output)


def attention(problem: Problem, implementation: str | None) -> Callable[..., Any]:
    """`neighborhood_attention` of query, key and value with the settings of a problem."""
    return functools.partial(
        neighborhood_attention,
        **_settings(problem),
        scale=problem.scale,
        implementation=implementation,
    )


def dense_attention(
    implementation: Literal["xla", "cudnn"], query: Array, key: Array, value: Array
) -> Array:
    """`jax.nn.dot_product_attention` of all tokens of a layout."""
    q, k, v = (x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (query, key, value))
    output = jax.nn.dot_product_attention(q, k, v, implementation=implementation)
    return output.reshape(*query.shape[:-1], -1)


def forward(run: Callable[..., Any], given: Operands) -> Callable[[], Array]:
    """A compiled call of an attention function."""
    call = jax.jit(run)
    return lambda: call(*given[:3])


def backward(run: Callable[..., Any], given: Operands) -> Callable[[], tuple[Array, ...]]:
    """A compiled call of an attention function's backward pass alone: dQ, dK and dV."""
    call = jax.jit(lambda pull, d_output: pull(d_output))
    pullback = functools.cache(lambda: jax.vjp(jax.jit(run), *given[:3])[1])
    return lambda: call(pullback(), given.d_output)


def training_step(run: Callable[..., Any], given: Operands) -> Callable[[], tuple[Array, ...]]:
    """A compiled call of forward and backward pass: output, dQ, dK and dV."""

    @jax.jit
    def step(query: Array, key: Array, value: Array, d_output: Array) -> tuple[Array, ...]:
        output, pull = jax.vjp(run, query, key, value)
        return output, *pull(d_output)

    return lambda: step(*given)


PASSES = {"forward": forward, "backward": backward, "training step": training_step}


def expected(problem: Problem, implementation: str, machine: Gpu | None = None) -> Simulation:
    """The simulation of a problem in the tiles that an implementation takes on this device.

    Key tiles begin with a query tile's first key. The boxes of `xla` and the key lists of `cuda`
    have any size: their key tiles count as one token.
    """
    problem = seen_by_backends(problem)
    machine = machine or this_machine(implementation)
    # A box of `xla` is masked as a whole.
    whole = implementation == "xla"
    return _simulate(problem, *_tiles(problem, implementation), machine, mask_every_tile=whole)


def bound(problem: Problem, queries: int) -> Simulation:
    """The simulation of a problem in the best tiles of `queries` tokens, a power of two.

    Keys are exactly those that a tile sees: no kernel that gives tiles of so many queries one set
    of keys can save more.
    """
    problem = seen_by_backends(problem)
    rank = len(problem.windows)
    sizes = (1,) * rank
    return max(
        (_simulate(problem, shape, sizes, GPUS["h200"]) for shape in shapes_of(queries, rank)),
        key=lambda one: one.tile_speedup,
    )


def _simulate(
    problem: Problem,
    query_tile: tuple[int, ...],
    key_tile: tuple[int, ...],
    machine: Gpu,
    *,
    mask_every_tile: bool = False,
) -> Simulation:
    return simulate(
        problem.layout,
        **_settings(problem),
        query_tile=query_tile,
        key_tile=key_tile,
        tiling="fused",
        batch=problem.batch,
        heads=problem.heads,
        kv_heads=problem.kv_heads,
        head_dim=problem.head_dim,
        additional=problem.additional,
        mask_every_tile=mask_every_tile,
        gpu=machine,
    )


def _settings(problem: Problem) -> dict[str, Any]:
    names = ("kernel_size", "stride", "dilation", "is_causal")
    return {name: tuple(getattr(w, name) for w in problem.windows) for name in names}


def this_machine(implementation: str) -> Gpu:
    """What runs an implementation here, for schedules: constants are those of an H200 until fitted.

    On a CPU `xla` takes one step at a time, with all cores, and `cuda` a tile on each core; memory
    is no limit.
    """
    device = jax.devices()[0]
    if device.platform == "gpu":
        kind = device.device_kind.lower()
        known = next((gpu for name, gpu in GPUS.items() if name in kind), GPUS["h200"])
        processors = getattr(device, "core_count", None) or known.processors
        return dataclasses.replace(known, processors=processors)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processors = (cores or 1) if implementation == "cuda" else 1
    return dataclasses.replace(GPUS["h200"], processors=processors, bandwidth=math.inf)


def _tiles(problem: Problem, implementation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the forward pass's query tiles and key tiles; a problem as backends see it."""
    rank = len(problem.windows)
    if implementation == "triton":
        static = triton.launch(problem, "forward").static
        return static["query_tile"][-rank:], static["key_tile"][-rank:]
    if implementation == "cuda":
        kind = cuda.CPU_TILE if jax.default_backend() == "cpu" else cuda.FORWARD_TILE
        return cuda.tiles(problem.windows)[kind], (1,) * rank
    if implementation == "xla":
        # Tiles that share a window run as one; all are multiples of the first.
        tiles = [loop.tile for loop in xla.plan_of(problem).loops]
        return tuple(math.gcd(*lengths) for lengths in zip(*tiles, strict=True)), (1,) * rank
    if implementation == "splash":
        tile = splash.tiling(problem.windows).tile[-rank:]
        return tile, tile
    raise ValueError(
        f"implementation must be xla, cuda, triton or splash, received {implementation!r}."
    )
