"""`conceptax gna bench`: neighborhood attention measured here, beside what the simulator predicts.

Three runs, dense, free of masks and of stride 1, give the kernel's constants: seconds of a tile
step, of starting a block, and what a mask adds.  With them the problem asked for is predicted.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from conceptax.cli.runs import new_json
from conceptax.kernels.gna import describe, unsupported
from conceptax.kernels.gna.api import select
from conceptax.kernels.gna.problem import Problem, windows_of
from conceptax.kernels.gna.simulator import Gpu, Simulation, fit, measure
from conceptax.kernels.gna.tiles import Window
from conceptax.methods.memory import require_memory
from conceptax.reporting.gna_tables import bench_table
from conceptax.reporting.results import environment
from conceptax.text import write_json

from .commands import Bench, problem_of

JAX = "jax.nn, dense"
# Of a step, which is two products of 128 x 128 pairs and 128 channels; five more in the backward
# pass.
OPERATIONS = {"forward": 4 * 128**3, "training step": 14 * 128**3}


class Measured(NamedTuple):
    """A problem, what the simulator says of it, whether constants are fitted to it, its times."""

    problem: Problem
    simulation: Simulation
    fitted: bool
    timing: measure.Timing


def run(command: Bench) -> None:
    """Measure, print the table, and write the record if asked to."""
    if command.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, received {command.rounds}.")
    with new_json(command) as file:
        problems = _problems(command)
        implementation = command.implementation or select(problems["dense"])
        for problem in problems.values():
            reason = unsupported(implementation, problem)
            if reason is not None:
                raise ValueError(f"the implementation {implementation} cannot do this: {reason}.")
        record = _measured(command, implementation, problems)
        if file is not None:
            write_json(file, record)
    print(bench_table(record))
    if command.output is not None:
        print(f"\n{command.output}: all of this, and every round")


def _windows(command: Bench) -> tuple[Window, ...]:
    """The windows asked for; what is not given suits what is."""
    given = problem_of(command)
    window, stride = given.pop("kernel_size"), given.pop("stride")
    if window is None:
        alone = windows_of(command.layout, 1, 1, **given)
        window = tuple(max(1, w.length // (2 * w.dilation)) for w in alone)
    if stride is None:
        alone = windows_of(command.layout, window, 1, **given)
        stride = tuple(min(8, w.kernel_size) for w in alone)
    return windows_of(command.layout, window, stride, **given)


def _problems(command: Bench) -> dict[str, Problem]:
    """By name: three to fit, and what was asked for, if it is another one."""
    windows = _windows(command)
    dtype = command.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    layout = tuple(w.length for w in windows)
    x = jax.ShapeDtypeStruct((command.batch, *layout, command.heads, command.head_dim), dtype)
    # Tiles within a stride group share a window; the largest stride has the largest groups.
    strides = {
        "no masks": tuple(w.kernel_size for w in windows),
        "stride 1": (1,) * len(windows),
        "asked for": tuple(w.stride for w in windows),
    }
    settings: dict[str, Any] = {
        name: tuple(getattr(w, name) for w in windows)
        for name in ("kernel_size", "dilation", "is_causal")
    }
    problems = {"dense": describe(x, x, x, kernel_size=layout)}
    for name, stride in strides.items():
        problem = describe(x, x, x, stride=stride, **settings)
        if problem not in problems.values():
            problems[name] = problem
    return problems


def _measured(command: Bench, implementation: str, problems: dict[str, Problem]) -> dict[str, Any]:
    """The record: all measured in turns, and the constants that explain it, if there are any."""
    direction = "training step" if command.training else "forward"
    make = measure.PASSES[direction]
    dense = problems["dense"]
    simulations = {name: measure.expected(each, implementation) for name, each in problems.items()}
    held = 4.0 * dense.batch * math.prod(dense.layout) * dense.heads * dense.head_dim
    require_memory(
        held * jnp.dtype(dense.dtype).itemsize,
        "holding query, key, value and their gradient",
        "take a smaller --layout, --batch, --heads or --head-dim",
    )
    given = measure.operands(dense)
    on_gpu = jax.default_backend() == "gpu" and dense.dtype != "float32"
    kernel: Literal["xla", "cudnn"] = "cudnn" if on_gpu else "xla"
    contenders = {JAX: make(functools.partial(measure.dense_attention, kernel), given)}
    for name, problem in problems.items():
        contenders[name] = make(measure.attention(problem, implementation), given)
    timings = measure.take_turns(contenders, command.rounds)
    runs = {
        name: Measured(problem, simulations[name], name != "asked for", timings[name])
        for name, problem in problems.items()
    }
    pairs = [(run.simulation.blocks, run.timing.median) for run in runs.values() if run.fitted]
    machine, fitted, why_not = None, None, None
    try:
        machine = fit(pairs, measure.this_machine(implementation))
        fitted = {
            "c_s": machine.step,
            "t0_s": machine.launch,
            "mu": machine.mask,
            "processors": machine.processors,
            "flops": OPERATIONS[direction] * machine.processors / machine.step,
        }
    except ValueError as error:  # little work, all in one tile
        why_not = str(error)
    rows = [_row(name, run, runs["dense"].timing, machine) for name, run in runs.items()]
    return {
        **{
            name: getattr(dense, name) for name in ("layout", "batch", "heads", "head_dim", "dtype")
        },
        "implementation": implementation,
        "pass": direction,
        "fit": fitted,
        "rows": [{"run": JAX, **_times(timings[JAX])}, *rows],
        **environment(),
        "not_fitted": why_not,
    }


def _row(name: str, run: Measured, dense: measure.Timing, machine: Gpu | None) -> dict[str, Any]:
    simulation = run.simulation
    gained = measure.speedup(dense, run.timing)
    return {
        "run": name,
        "window": [w.kernel_size for w in run.problem.windows],
        "stride": [w.stride for w in run.problem.windows],
        "query_tile": simulation.query_tile,
        "key_tile": simulation.key_tile,
        "pairs_bound": simulation.flop_speedup,
        "bound": simulation.tile_speedup,
        "worst_bound": simulation.worst_tile_speedup,
        "fitted": run.fitted,
        "predicted_s": None if machine is None else simulation.blocks.seconds(machine),
        "over_dense": gained,
        "bound_share": gained / simulation.tile_speedup,
        **_times(run.timing),
    }


def _times(timing: measure.Timing) -> dict[str, Any]:
    times = {"first": timing.first, "median": timing.median, "best": timing.best}
    return {f"{name}_s": value for name, value in (*times.items(), ("rounds", timing.rounds))}
