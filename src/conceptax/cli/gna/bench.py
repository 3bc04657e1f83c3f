"""`conceptax gna bench`: neighborhood attention measured here, beside what the simulator predicts.

Three runs, dense, free of masks and of stride 1, give the kernel's constants: seconds of a tile
step, of starting a block, and what a mask adds.  With them the problem asked for is predicted.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from conceptax.cli.runs import new_file
from conceptax.kernels.gna import describe, unsupported
from conceptax.kernels.gna.api import select
from conceptax.kernels.gna.problem import Problem, windows_of
from conceptax.kernels.gna.simulator import Gpu, Simulation, fit, measure
from conceptax.kernels.gna.tiles import Window
from conceptax.methods.memory import require_memory
from conceptax.reporting.results import environment
from conceptax.text import write_json

from .commands import Bench, by, each

JAX = "jax.nn, dense"
# Of a step, which is two products of 128 x 128 pairs and 128 channels; five more in the backward
# pass.
OPERATIONS = {"forward": 4 * 128**3, "training step": 14 * 128**3}


@dataclasses.dataclass(frozen=True)
class Run:
    """A problem, what the simulator says of it, and whether the constants are fitted to it."""

    problem: Problem
    simulation: Simulation
    fitted: bool


def bench(command: Bench) -> None:
    """Measure, print the table, and write the record if asked to."""
    if command.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, received {command.rounds}.")
    with _output(command.output, command.force) as file:
        implementation, runs = _plan(command)
        timings = _measure(command, implementation, runs)
        machine, why_not = _fitted(implementation, runs, timings)
        record = _record(command, implementation, runs, timings, machine) | {"not_fitted": why_not}
        if file is not None:
            write_json(file, record)
    print(_table(record))
    if command.output is not None:
        print(f"\n{command.output}: all of this, and every round")


@contextlib.contextmanager
def _output(path: Path | None, force: bool) -> Iterator[Path | None]:
    if path is None:
        yield None
        return
    if path.suffix.lower() != ".json":
        raise ValueError(f"--output takes a .json file, received {path}.")
    with new_file(path, force=force) as file:
        yield file


def _windows(command: Bench) -> tuple[Window, ...]:
    """The windows asked for."""
    dilation, causal = each(command.dilation), each(command.causal)
    alone = windows_of(command.layout, 1, 1, dilation, causal)
    # What is not given suits what is.
    window: Any = tuple(max(1, w.length // (2 * w.dilation)) for w in alone)
    if command.window is not None:
        window = each(command.window)
    stride: Any = tuple(
        min(8, w.kernel_size) for w in windows_of(command.layout, window, 1, dilation, causal)
    )
    if command.stride is not None:
        stride = each(command.stride)
    return windows_of(command.layout, window, stride, dilation, causal)


def _plan(command: Bench) -> tuple[str, dict[str, Run]]:
    """The implementation, and the runs by name: three to fit, and what was asked for."""
    windows = _windows(command)
    dtype = command.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    layout = tuple(w.length for w in windows)
    x = jax.ShapeDtypeStruct((command.batch, *layout, command.heads, command.head_dim), dtype)
    asked = tuple(w.stride for w in windows)
    # Tiles within a stride group share a window; the largest stride has the largest groups.
    strides = {
        "no masks": tuple(w.kernel_size for w in windows),
        "stride 1": (1,) * len(windows),
        "asked for": asked,
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
    implementation = command.implementation or select(problems["dense"])
    for problem in problems.values():
        reason = unsupported(implementation, problem)
        if reason is not None:
            raise ValueError(f"the implementation {implementation} cannot do this: {reason}.")
    return implementation, {
        name: Run(problem, measure.expected(problem, implementation), name != "asked for")
        for name, problem in problems.items()
    }


def _measure(
    command: Bench, implementation: str, runs: dict[str, Run]
) -> dict[str, measure.Timing]:
    make = measure.PASSES["training step" if command.training else "forward"]
    dense = runs["dense"].problem
    held = 4.0 * dense.batch * math.prod(dense.layout) * dense.heads * dense.head_dim
    require_memory(
        held * jnp.dtype(dense.dtype).itemsize,
        "holding query, key, value and their gradient",
        "take a smaller --layout, --batch, --heads or --head-dim",
    )
    given = measure.operands(dense)
    kernel: Literal["xla", "cudnn"] = "xla"
    if jax.default_backend() == "gpu" and dense.dtype != "float32":
        kernel = "cudnn"
    contenders = {JAX: make(functools.partial(measure.dense_attention, kernel), given)}
    for name, run in runs.items():
        contenders[name] = make(measure.attention(run.problem, implementation), given)
    return measure.take_turns(contenders, command.rounds)


def _fitted(
    implementation: str, runs: dict[str, Run], timings: dict[str, measure.Timing]
) -> tuple[Gpu | None, str | None]:
    """This machine with constants that explain the runs, or why there are none."""
    pairs = [
        (run.simulation.blocks, timings[name].median) for name, run in runs.items() if run.fitted
    ]
    try:
        return fit(pairs, measure.this_machine(implementation)), None
    except ValueError as error:  # little work, all in one tile
        return None, str(error)


def _record(
    command: Bench,
    implementation: str,
    runs: dict[str, Run],
    timings: dict[str, measure.Timing],
    machine: Gpu | None,
) -> dict[str, Any]:
    dense = runs["dense"].problem
    direction = "training step" if command.training else "forward"
    rows: list[dict[str, Any]] = [{"run": JAX, **_times(timings[JAX])}]
    for name, run in runs.items():
        simulation = run.simulation
        gained = measure.speedup(timings["dense"], timings[name])
        rows.append(
            {
                "run": name,
                "window": [w.kernel_size for w in run.problem.windows],
                "stride": [w.stride for w in run.problem.windows],
                "query_tile": simulation.query_tile,
                "key_tile": simulation.key_tile,
                "pairs_bound": simulation.flop_speedup,
                "bound": simulation.tile_speedup,
                "fitted": run.fitted,
                "predicted_s": None if machine is None else simulation.blocks.seconds(machine),
                "over_dense": gained,
                "bound_share": gained / simulation.tile_speedup,
                **_times(timings[name]),
            }
        )
    return {
        "layout": dense.layout,
        "batch": dense.batch,
        "heads": dense.heads,
        "head_dim": dense.head_dim,
        "dtype": dense.dtype,
        "implementation": implementation,
        "pass": direction,
        "fit": None
        if machine is None
        else {
            "c_s": machine.step,
            "t0_s": machine.launch,
            "mu": machine.mask,
            "processors": machine.processors,
            "flops": OPERATIONS[direction] * machine.processors / machine.step,
        },
        "rows": rows,
        **environment(),
    }


def _times(timing: measure.Timing) -> dict[str, Any]:
    return {
        "first_s": timing.first,
        "median_s": timing.median,
        "best_s": timing.best,
        "rounds_s": timing.rounds,
    }


def _table(record: dict[str, Any]) -> str:
    fitted = record["fit"]
    lines = [
        f"tokens       {by(record['layout'])}; batch {record['batch']}, "
        f"{record['heads']} heads of {record['head_dim']}, {record['dtype']}",
        f"measured     {record['pass']}, {record['implementation']} on {record['device']} "
        f"({record['cpu_cores']} cores)",
        "",
        f"{'':14}{'stride':>12}{'query tile':>12}{'bound':>8}{'measured':>13}{'predicted':>13}"
        f"{'x dense':>9}{'of bound':>10}",
    ]
    for row in record["rows"]:
        measured = f"{1e3 * row['median_s']:.3f} ms"
        if "bound" not in row:
            lines.append(f"{row['run']:14}{'':32}{measured:>13}")
            continue
        seconds = row["predicted_s"]
        predicted = "" if seconds is None else f"{1e3 * seconds:.3f} ms"
        lines.append(
            f"{row['run']:14}{by(row['stride']):>12}{by(row['query_tile']):>12}"
            f"{row['bound']:8.2f}{measured:>13}{predicted:>13}{row['over_dense']:9.2f}"
            f"{100 * row['bound_share']:8.0f} %"
        )
    if fitted is None:
        return "\n".join([*lines, "", f"no prediction: {record['not_fitted']}"])
    asked = any(not row.get("fitted", True) for row in record["rows"])
    lines += [
        "",
        f"c   {1e6 * fitted['c_s']:9.2f} µs for 128 x 128 pairs of 128 channels "
        f"({fitted['flops'] / 1e12:.3g} TFLOP/s in all)",
        f"t0  {1e6 * fitted['t0_s']:9.2f} µs for starting a tile of queries",
        f"mu  {fitted['mu']:9.2f}    of a step's time for its mask",
        "fitted to the runs dense, no masks and stride 1"
        + ("; what was asked for is predicted from them." if asked else "."),
    ]
    return "\n".join(lines)
