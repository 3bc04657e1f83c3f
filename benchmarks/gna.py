"""Neighborhood attention's speed, beside the fastest dense attention in the same run.

    python benchmarks/gna.py                 # this machine's device
    python benchmarks/gna.py --size tiny     # seconds instead of minutes, to try the script
    python benchmarks/gna.py --export FOLDER # for a GPU that is elsewhere, where --exports reads it

Results are checked first against float64: values and gradients of small problems, rows of the
large ones.  Then contenders take turns, round by round; speed-ups are medians over
the rounds.  Dense attention is `jax.nn.dot_product_attention` (XLA on a CPU, cuDNN on NVIDIA) and
each backend's own; FlexAttention, compiled, gets the same mask where torch is installed.  "Bound"
is the simulator's tile-aware speed-up for the best tiles of 64 queries (128 on a GPU) and keys
exactly as these see them; the last columns tell how much of it is reached, over jax's dense
attention and over the backend's own.  A training step is the forward and the backward pass.  Last,
the memory that `xla` takes beyond its operands, in processes of their own.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, Literal

# Both allocate as they go, so that jax leaves torch room.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import _natten
import jax
import jax.numpy as jnp
import numpy as np
from _exports import Exports
from _gna_checks import (
    TOLERANCE,
    Programs,
    check_output,
    check_rows,
    check_small,
    forward,
    just_jit,
    program_of,
    relative_error,
    shapes_of,
    small_problems,
)

from conceptax.kernels.gna import describe, unsupported
from conceptax.kernels.gna.problem import Problem
from conceptax.kernels.gna.simulator import measure
from conceptax.reporting.results import environment, write_records

RESULTS = Path(__file__).resolve().parent / "results"


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem by name: token layout, window, stride."""

    name: str
    layout: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]

    def problem(self, heads: int, dim: int, dtype: str, *, dense: bool = False) -> Problem:
        x = jax.ShapeDtypeStruct((1, *self.layout, heads, dim), jnp.dtype(dtype))
        if dense:
            return describe(x, x, x, kernel_size=self.layout)
        return describe(x, x, x, kernel_size=self.window, stride=self.stride)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is measured on a device."""

    dtypes: tuple[str, ...]
    heads: int
    dim: int
    implementations: tuple[str, ...]
    dense: Literal["xla", "cudnn"]  # of jax.nn.dot_product_attention
    cases: tuple[Case, ...]
    passes: tuple[str, ...]
    rounds: int
    queries: int  # of a tile, for the bound
    own_dense: bool = False  # whether each backend's own dense attention is measured too


CPU_CASES = (
    Case("2-D, block-sparse", (64, 64), (32, 32), (8, 8)),
    Case("2-D, stride 1", (64, 64), (32, 32), (1, 1)),
    Case("3-D, block-sparse", (8, 16, 16), (4, 8, 8), (4, 4, 4)),
    Case("3-D, blocks", (8, 16, 16), (4, 8, 8), (4, 8, 8)),
    Case("3-D, stride 1", (8, 16, 16), (4, 8, 8), (1, 1, 1)),
)
GPU_CASES = (
    Case("FLUX-4K", (256, 256), (80, 80), (16, 16)),
    Case("FLUX-4K, stride 1", (256, 256), (80, 80), (1, 1)),
    Case("Hunyuan", (30, 48, 80), (18, 24, 24), (16, 8, 8)),
    Case("Hunyuan, stride 1", (30, 48, 80), (18, 24, 24), (1, 1, 1)),
)
TINY_CASES = (
    Case("2-D, block-sparse", (16, 16), (8, 8), (4, 4)),
    Case("3-D, stride 1", (4, 8, 8), (2, 4, 4), (1, 1, 1)),
)
STEP = ("forward", "training step")
CPU, GPU = ("xla", "cuda"), ("cuda", "triton", "xla")
SETUPS = {
    ("cpu", "full"): Setup(("float32",), 4, 64, CPU, "xla", CPU_CASES, STEP, 9, 64, True),
    ("cpu", "tiny"): Setup(("float32",), 2, 32, CPU, "xla", TINY_CASES, STEP, 3, 64, True),
    ("gpu", "full"): Setup(("bfloat16", "float16"), 24, 128, GPU, "cudnn", GPU_CASES, STEP, 5, 128),
    ("gpu", "tiny"): Setup(("bfloat16",), 2, 128, GPU, "cudnn", TINY_CASES, STEP, 3, 128),
}
# NATTEN's published forward times on an H100, ms.
NATTEN_MS = {
    "FLUX-4K": 7.914,
    "FLUX-4K, stride 1": 16.201,
    "Hunyuan": 23.359,
    "Hunyuan, stride 1": 79.043,
}
# What is exported for a GPU, since it takes long to compile: kernels whose PTX can go along.
EXPORTED = ("triton",)
MEMORY_SIDES = {"full": (64, 128, 256), "tiny": (16, 32)}


@dataclasses.dataclass(frozen=True)
class Run:
    """How a run measures, beside its setup."""

    setup: Setup
    programs: Programs = just_jit
    natten: Path | None = None  # the library
    flex: bool = False
    once: bool = False  # neither checked nor timed: for profilers
    small: int | None = None  # how many of the small problems are checked


# Contenders


def natten_calls(
    run: Run, problem: Problem, direction: str, given: measure.Operands, absent: dict[str, str]
) -> dict[str, Callable[[], Any]]:
    """NATTEN's kernel in both schedules, and the first of them with the permutations around it."""
    if run.natten is None:
        return {}
    reason = _natten.unsupported(problem)
    if reason is None and direction != "forward":
        reason = "NATTEN is measured forward only"
    if reason is not None:
        absent["NATTEN"] = reason
        return {}
    calls: dict[str, Callable[[], Any]] = {}
    try:
        _natten.register(run.natten)
        tiled = [jax.jit(functools.partial(_natten.permuted, problem))(x) for x in given[:3]]
        for schedule in _natten.SCHEDULES:
            name, whole = f"NATTEN, {schedule}", _natten.attention(problem, schedule)
            error = 0.0 if run.once else check_output(problem, given, jax.jit(whole)(*given[:3]))
            if not error <= 1:
                absent[name] = f"its error is {error:.2g} times what is allowed"
                continue
            kernel = jax.jit(_natten.kernel(problem, schedule))
            calls[name] = functools.partial(kernel, *tiled)
            calls.setdefault("NATTEN, permuting", measure.forward(whole, given))
    except Exception as error:  # whatever it says: the others are measured all the same
        absent["NATTEN"] = first_line(error)
    return calls


def call_of(
    run: Run, problem: Problem, name: str, direction: str, given: measure.Operands
) -> Callable[[], Any]:
    """One of our implementations."""
    if name not in EXPORTED or direction not in STEP:
        return measure.PASSES[direction](measure.attention(problem, name), given)
    if direction == "forward":
        program = forward_program(problem, name, run.programs)
        return functools.partial(program, *given[:3])
    program = program_of(problem, name, run.programs)
    no_d_lse = jnp.zeros(given.query.shape[:-1], jnp.float32)
    return functools.partial(program, given.d_output, no_d_lse, *given[:3])


def forward_program(problem: Problem, name: str, programs: Programs) -> Callable[..., Any]:
    function = forward(problem, name)
    return programs(f"{name} forward {problem}", function, shapes_of(problem)[2:])


def flex_attention(problem: Problem, given: measure.Operands) -> Callable[[], Any]:
    """Compiled FlexAttention with the problem's mask, forward only; on the same numbers."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    on_gpu = jax.default_backend() == "gpu"
    device = "cuda" if on_gpu else "cpu"
    kind = getattr(torch, problem.dtype)

    def tensor(x):
        numbers = np.asarray(x.astype(jnp.float32)).reshape(problem.tokens, problem.heads, -1)
        return torch.tensor(numbers).permute(1, 0, 2)[None].contiguous().to(device, kind)

    tensors = [tensor(x) for x in given[:3]]
    bounds = [
        tuple(torch.tensor(x, device=device) for x in window.bounds(window.length))
        for window in problem.windows
    ]

    def visible(batch, head, query, key):
        inside = query >= 0
        for window, (start, end) in reversed(list(zip(problem.windows, bounds, strict=True))):
            i, j = query % window.length, key % window.length
            inside = inside & (j >= start[i]) & (j < end[i])
            query, key = query // window.length, key // window.length
        return inside

    size = (None, None, problem.tokens, problem.tokens)
    # Without compilation the mask would be made whole: N x N.
    mask = create_block_mask(visible, *size, device=device, _compile=problem.tokens > 2**14)
    call = torch.compile(flex, dynamic=False)

    def run():
        with torch.inference_mode():
            output = call(*tensors, block_mask=mask)
        if on_gpu:
            torch.cuda.synchronize()
        return output

    exact = measure.forward(measure.attention(problem, None), given)()
    received = run()[0].permute(1, 0, 2).float().cpu().numpy()
    error = relative_error(received, np.asarray(exact.astype(jnp.float32)).reshape(received.shape))
    if error > TOLERANCE[problem.dtype]:
        raise RuntimeError(f"FlexAttention's result differs by {error:.1e}.")
    return run


def contenders_of(
    run: Run, case: Case, dtype: str, direction: str, implementations: list[str]
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """What takes turns, and why something that should does not."""
    setup = run.setup
    make = measure.PASSES[direction]
    sparse = case.problem(setup.heads, setup.dim, dtype)
    dense = case.problem(setup.heads, setup.dim, dtype, dense=True)
    given = measure.operands(sparse)
    absent: dict[str, str] = {}
    calls: dict[str, Callable[[], Any]] = {}
    calls[f"jax.nn {setup.dense}, dense"] = make(
        functools.partial(measure.dense_attention, setup.dense), given
    )
    calls |= natten_calls(run, sparse, direction, given, absent)
    for name in implementations:
        if setup.own_dense:
            calls[f"{name}, dense"] = make(measure.attention(dense, name), given)
        calls[name] = call_of(run, sparse, name, direction, given)
    if run.flex and direction != "forward":
        absent["flex"] = "compiled FlexAttention has no backward pass on a CPU"
        if jax.default_backend() == "gpu":
            absent["flex"] = "FlexAttention is measured forward only"
    elif run.flex:
        try:
            calls["flex"] = flex_attention(sparse, given)
        except Exception as error:  # whatever torch says: the others are measured all the same
            absent["flex"] = first_line(error)
    return calls, absent


def first_calls(run: dict[str, Callable[[], Any]], absent: dict[str, str]) -> dict[str, float]:
    """Seconds of the first calls, which compile; what fails leaves the contest and says why."""
    seconds = {}
    for name, call in list(run.items()):
        start = time.perf_counter()
        try:
            jax.block_until_ready(call())
        except Exception as error:
            absent[name] = first_line(error)
            del run[name]
        seconds[name] = time.perf_counter() - start
    return seconds


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def measure_case(
    run: Run, case: Case, dtype: str, direction: str, implementations: list[str]
) -> list[dict[str, Any]]:
    setup = run.setup
    sparse = case.problem(setup.heads, setup.dim, dtype)
    limit = measure.bound(sparse, setup.queries)
    head = {
        **dataclasses.asdict(case),
        "dtype": dtype,
        "pass": direction,
        "heads": setup.heads,
        "head_dim": setup.dim,
        "pairs_bound": limit.flop_speedup,
        "bound": limit.tile_speedup,
        "worst_bound": limit.worst_tile_speedup,
    }
    calls, absent = contenders_of(run, case, dtype, direction, implementations)
    first = first_calls(calls, absent)
    timings = {} if run.once else measure.take_turns(calls, setup.rounds)
    base = timings.get(f"jax.nn {setup.dense}, dense")
    rows = []
    for name, timing in timings.items():
        row = head | {
            "contender": name,
            "first_s": first[name],
            "median_s": timing.median,
            "best_s": timing.best,
            "rounds_s": timing.rounds,
            "over_dense": measure.speedup(base, timing) if base else None,
        }
        if name in implementations:
            row["bound_share_over_dense"] = base and row["over_dense"] / limit.tile_speedup
        if name in implementations and f"{name}, dense" in timings:
            own = measure.speedup(timings[f"{name}, dense"], timing)
            row |= {"over_own_dense": own, "bound_share_over_own_dense": own / limit.tile_speedup}
        rows.append(row)
    rows += [head | {"contender": name, "absent": why} for name, why in absent.items()]
    return rows


# Memory


def peak_memory(side: int, direction: str) -> int:
    """Bytes that a first call of `xla` adds to this process at most, outputs included."""
    case = Case("memory", (side, side), (min(32, side // 2),) * 2, (8, 8))
    problem = case.problem(4, 64, "float32")
    given = measure.operands(problem)
    run = measure.attention(problem, "xla")
    if direction == "forward":
        call = jax.jit(run).lower(*given[:3]).compile()
        arguments = given[:3]
    else:
        step = lambda q, k, v, do: jax.vjp(run, q, k, v)[1](do)  # noqa: E731
        call, arguments = jax.jit(step).lower(*given).compile(), given
    jax.block_until_ready(given)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = status("VmRSS")
    jax.block_until_ready(call(*arguments))
    return status("VmHWM") - before


def status(name: str) -> int:
    """A size of this process in bytes, from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def measure_memory(size: str) -> list[dict[str, Any]]:
    rows = []
    for direction in STEP:
        for side in MEMORY_SIDES[size]:
            command = [sys.executable, __file__, "--memory", str(side), direction]
            done = subprocess.run(command, capture_output=True, text=True)
            row = {"pass": direction, "tokens": side**2}
            if done.returncode:
                row["absent"] = done.stderr.strip().splitlines()[-1]
            else:
                row["peak_bytes"] = int(done.stdout)
                row["bytes_per_token"] = row["peak_bytes"] / side**2
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--dtypes", nargs="+")
    parser.add_argument("--passes", nargs="+", choices=measure.PASSES)
    parser.add_argument("--cases", nargs="*", help="their names, or parts of them; default: all")
    parser.add_argument("--implementations", nargs="*", choices=("xla", "triton", "cuda"))
    parser.add_argument("--small", type=int, help="how many small problems to check; default: all")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out")
    parser.add_argument("--no-memory", action="store_true", help="leave memory out")
    parser.add_argument("--check-only", action="store_true", help="check, measure nothing")
    parser.add_argument(
        "--once", action="store_true", help="check nothing, call each once: for profilers"
    )
    parser.add_argument("--export", type=Path, help="a folder, for programs for GPUs; nothing else")
    parser.add_argument("--exports", type=Path, help="that folder, to take them from")
    parser.add_argument("--natten", type=Path, help="its library, to measure beside")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(peak_memory(int(arguments.memory[0]), arguments.memory[1]))
        return
    if arguments.export:
        export(setup_of(arguments, "gpu"), Exports(arguments.export), arguments.small)
        return
    sys.exit(run(arguments))


def setup_of(arguments: argparse.Namespace, device: str) -> Setup:
    setup = SETUPS[device, arguments.size]
    for name in ("dtypes", "passes", "implementations", "rounds"):
        if getattr(arguments, name) is not None:
            setup = dataclasses.replace(setup, **{name: getattr(arguments, name)})
    if arguments.cases is None:
        return setup
    names = {case.name for case in setup.cases}
    whole = names.intersection(arguments.cases)
    parts = set(arguments.cases) - names
    chosen = tuple(c for c in setup.cases if c.name in whole or any(p in c.name for p in parts))
    return dataclasses.replace(setup, cases=chosen)


def export(setup: Setup, exports: Exports, small: int | None) -> None:
    """Writes what a run with this setup takes from `--exports`."""
    problems = [problem for _, problem in small_problems(setup.dtypes, setup.dim, small)]
    large = [
        case.problem(setup.heads, setup.dim, dtype)
        for case, dtype in itertools.product(setup.cases, setup.dtypes)
    ]
    for name, problem in itertools.product(EXPORTED, problems + large):
        reason = unsupported(name, problem, "gpu")
        if reason is not None:
            print(f"{name}: {reason}", file=sys.stderr)
            continue
        program_of(problem, name, exports.write)
        if problem in large:
            forward_program(problem, name, exports.write)


def run(arguments: argparse.Namespace) -> int:
    device = jax.default_backend()
    setup = setup_of(arguments, device)
    report: dict[str, Any] = {
        "benchmark": "gna",
        "date": date.today().isoformat(),
        "size": arguments.size,
        **environment(),
        "cpu": cpu_name(),
        "checks": [],
        "rows": [],
        "memory": [],
    }
    output = arguments.output or RESULTS / f"gna_{device}_{arguments.size}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    how = Run(
        setup,
        Exports(arguments.exports).read if arguments.exports else just_jit,
        arguments.natten,
        flex=not arguments.no_flex and has_torch(report),
        once=arguments.once,
        small=arguments.small,
    )
    ended = False
    try:
        measure_all(how, arguments, report, output)
        ended = True
    except KeyboardInterrupt:  # out of time: there is something to show all the same
        pass
    print_report(report)
    return 0 if ended and all(check.get("passed", True) for check in report["checks"]) else 1


def measure_all(
    run: Run, arguments: argparse.Namespace, report: dict[str, Any], output: Path
) -> None:
    """Checks, then measures what is right; after each step the report is on disk."""
    setup = run.setup

    def keep(told: str) -> None:
        write_records(output, report)
        print(told, file=sys.stderr, flush=True)

    checks = {name: new_check(name) for name in setup.implementations}
    report["checks"] = [] if run.once else list(checks.values())
    small = [] if run.once else list(small_problems(setup.dtypes, setup.dim, run.small))
    good = []
    for name, check in checks.items():
        if passes(check, functools.partial(check_small, name, small, run.programs)):
            good.append(name)
        keep(f"check {name}: {describe_check(check)}")
    for dtype, case in itertools.product(setup.dtypes, setup.cases):
        able = []
        for name in good:
            check = checks[name]
            right = run.once or passes(check, functools.partial(check_case, run, case, dtype, name))
            if right and told_of(case, dtype) not in check["left_out"]:
                able.append(name)
            keep(f"check {name}: {describe_check(check)}")
        for direction in () if arguments.check_only else setup.passes:
            report["rows"] += measure_case(run, case, dtype, direction, able)
            keep(f"measured {case.name}, {dtype}, {direction}")
    if jax.default_backend() == "cpu" and "xla" in good and not arguments.no_memory:
        report["memory"] = [] if arguments.check_only else measure_memory(arguments.size)
    write_records(output, report)


def new_check(implementation: str) -> dict[str, Any]:
    """Errors as shares of what is allowed; what an implementation cannot do, and why."""
    return {
        "implementation": implementation,
        "passed": True,
        "error_over_allowed": {},
        "left_out": {},
    }


def passes(check: dict[str, Any], find: Callable[[], dict[str, float | str]]) -> bool:
    """Whether all that is found is right; it is added to the check, as is a failure."""
    if "failed" in check:
        return False
    try:
        found = find()
    except Exception as error:  # a backend that fails must not keep others from being measured
        check |= {"failed": str(error)[-2000:], "passed": False}
        return False
    errors = {name: error for name, error in found.items() if not isinstance(error, str)}
    check["error_over_allowed"] |= errors
    check["left_out"] |= {name: why for name, why in found.items() if name not in errors}
    right = all(error <= 1 for error in errors.values())
    check["passed"] &= right
    return right


def check_case(run: Run, case: Case, dtype: str, implementation: str) -> dict[str, float | str]:
    problem = case.problem(run.setup.heads, run.setup.dim, dtype)
    reason = unsupported(implementation, problem)
    error = reason or check_rows(implementation, problem, run.programs)
    return {told_of(case, dtype): error}


def told_of(case: Case, dtype: str) -> str:
    return f"{case.name}, {dtype}"


def describe_check(check: dict[str, Any]) -> str:
    if "failed" in check:
        return f"FAILED: {check['failed']}"
    errors, reasons = check["error_over_allowed"], sorted(set(check["left_out"].values()))
    left_out = f"left out: {'; '.join(reasons)}" if reasons else ""
    if not errors:
        return left_out or "nothing was asked"
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    told = f"largest error {100 * errors[worst]:.0f} % of what is allowed ({worst})"
    return "; ".join(filter(None, ("right" if check["passed"] else "WRONG", told, left_out)))


def has_torch(report: dict[str, Any]) -> bool:
    try:
        import torch
    except ImportError:
        return False
    report["versions"]["torch"] = torch.__version__
    return True


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def print_report(report: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items())
    print(
        f"\nNeighborhood attention, {report['date']}: {report['device']}, {report['cpu']}, "
        f"{report['cpu_cores']} cores; {versions}"
    )
    for check in report["checks"]:
        print(f"check {check['implementation']:8} {describe_check(check)}")
    titles = ("median ms", "best ms", "x dense", "x own", "bound", "% dense", "% own")
    previous = None
    for row in report["rows"]:
        head = tuple(row[name] for name in ("name", "layout", "window", "stride", "dtype", "pass"))
        if head != previous:
            name, *sizes, dtype, direction = head
            layout, window, stride = ("x".join(map(str, size)) for size in sizes)
            print(
                f"\n{name}: {layout}, window {window}, stride {stride}; {row['heads']} heads of "
                f"{row['head_dim']}, {dtype}; {direction}"
            )
            print(f"  {'':22}" + "".join(f"{title:>11}" for title in titles))
            if name in NATTEN_MS and direction == "forward":
                print(f"  {'NATTEN, published':22}{NATTEN_MS[name]:11.3f}  on an H100")
            previous = head
        if "absent" in row:
            print(f"  {row['contender']:22}  {row['absent']}")
            continue
        shares = [row.get(f"bound_share_over_{name}") for name in ("dense", "own_dense")]
        numbers = [f"{1e3 * row['median_s']:.3f}", f"{1e3 * row['best_s']:.3f}"]
        numbers += [number(row["over_dense"], 2)]
        if "bound_share_over_dense" in row:
            numbers += [number(x, 2) for x in (row.get("over_own_dense"), row["bound"])]
            numbers += [number(share and 100 * share, 0) for share in shares]
        print(f"  {row['contender']:22}" + "".join(f"{x:>11}" for x in numbers))
    if report["memory"]:
        print(
            f"\nMemory of xla, 4 heads of 64, float32\n  {'':22}{'tokens':>11}{'peak MiB':>11}"
            f"{'bytes/token':>13}"
        )
    for row in report["memory"]:
        peak = row.get("absent") or (
            f"{row['peak_bytes'] / 2**20:11.1f}{row['bytes_per_token']:13.0f}"
        )
        print(f"  {row['pass']:22}{row['tokens']:11,}{peak}")


if __name__ == "__main__":
    main()
