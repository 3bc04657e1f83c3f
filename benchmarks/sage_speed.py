"""How fast SAGE runs: seconds to prepare and compile, cycles a second, peak memory.

    python benchmarks/sage_speed.py [--model FOLDER] [--cycles 20] [--dtype bfloat16]

A cycle is one `erase_step`: the self-check (10 updates of the attacked embeddings through the text
encoder alone), then an update of the text encoder through the UNet, with global and local
retention.  The parts are timed by leaving them out.  Prints a table and writes it as JSON.
"""

import argparse
import dataclasses
import datetime
import json
import resource
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import conceptax
from conceptax.converters import load_pytorch
from conceptax.methods.erasing.sage import SageConfig, erase_step, prepare
from conceptax.methods.training import compile_step
from conceptax.reporting.results import environment, write_records

VARIANTS = {
    "whole": {},
    "no self-check": {"check_steps": 0},
    "no retention": {"global_weight": 0.0, "local_weight": 0.0},
}


def measure(pipeline, config: SageConfig, cycles: int) -> dict:
    began = time.perf_counter()
    static, state, frozen = prepare(pipeline, ["three"], config)
    jax.block_until_ready(frozen)
    prepared = time.perf_counter()
    step, key = compile_step(erase_step, static), jax.random.key(0)
    state = jax.tree.map(jnp.copy, state)  # it is donated
    state, _ = jax.block_until_ready(step(state, frozen, None, key))
    compiled = time.perf_counter()
    times = []
    for _ in range(cycles):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, frozen, None, key))
        times.append(time.perf_counter() - start)
    return {
        "prepare_s": prepared - began,
        "first_cycle_s": compiled - prepared,
        "cycle_median_s": statistics.median(times),
        "cycle_best_s": min(times),
        "cycles_per_s": 1 / statistics.median(times),
        "loss": float(metrics["loss"]),
        "peak_gib": _peak(),
    }


def _peak() -> float:
    """Peak memory so far, GiB: of the accelerator, or of the process on a CPU."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.memory_stats()["peak_bytes_in_use"] / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a Stable Diffusion 1.x folder; default: glyphs")
    parser.add_argument("--cycles", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--sage", type=json.loads, default={}, help="changes of settings, as JSON")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "sage_speed.json"
    )
    options = parser.parse_args()

    pipeline = load_pytorch(
        options.model or conceptax.bundled_model(), dtype=jnp.dtype(options.dtype)
    )
    base = SageConfig(**options.sage)
    print(f"{'cycle':16}{'prepare':>10}{'first':>10}{'cycle':>10}{'cycles/s':>10}{'GiB':>8}")
    rows = {}
    for name in options.only:
        config = dataclasses.replace(base, **VARIANTS[name])
        row = rows[name] = measure(pipeline, config, options.cycles)
        print(
            f"{name:16}{row['prepare_s']:8.1f} s{row['first_cycle_s']:8.1f} s"
            f"{row['cycle_median_s']:8.3f} s{row['cycles_per_s']:10.2f}{row['peak_gib']:8.2f}",
            flush=True,
        )
    record = {
        "benchmark": "sage_speed",
        "date": datetime.date.today().isoformat(),
        "model": str(options.model or "bundled"),
        "dtype": options.dtype,
        "cycles": options.cycles,
        "settings": dataclasses.asdict(base),
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_records(options.output, record | environment())


if __name__ == "__main__":
    main()
