"""Memory and time of one SAGE cycle at Stable Diffusion 1.5's size, with random weights.

    python benchmarks/sage_memory.py                      # one device, then fsdp over 8
    python benchmarks/sage_memory.py --size tiny          # seconds instead of minutes

Four prompts and eight retained phrases a cycle (16 predictions, which 8 devices divide), bfloat16
computation with recomputed blocks, float32 master weights of the text encoder, a frozen UNet stored
in bfloat16.  Each row runs in a process of its own.  Peak memory is what the compiled cycle needs
on each device, from the compiler: arguments and temporaries.  On a CPU, XLA widens bfloat16
products to float32, so temporaries are larger there than on a GPU.
"""

import argparse
import json
import os
import statistics
import sys
import time
from datetime import date
from pathlib import Path

from _processes import measured_alone

RESULTS = Path(__file__).parent / "results"
DEVICES = {"one device": 1, "fsdp over 8": 8}


def measure(size: str, fsdp: int, cycles: int) -> dict:
    """One row; cycles run on one device only, since 8 forced devices share the same cores."""
    import jax
    import jax.numpy as jnp
    from _random_sd15 import random_pipeline

    from conceptax.methods.erasing.sage import SageConfig, erase_step, prepare
    from conceptax.methods.training import RULES, compile_step, make_mesh, shard_state, shard_tree

    # To random weights all words are alike: none is too near to the concept. A larger vocabulary
    # takes longer to prepare, a cycle draws the same number of rows of it.
    config = SageConfig(prompts=4, local_rows=8, contexts=16, similarity_cap=1.0, vocabulary=128)
    static, state, frozen = prepare(random_pipeline(size), ["three"], config)
    rules, shardings = RULES["StableDiffusionPipeline"], None
    state = jax.tree.map(jnp.copy, state)  # it is donated, and shares arrays with the frozen ones
    key = jax.random.key(0)
    if fsdp > 1:
        mesh = make_mesh(data=1, fsdp=fsdp)
        jax.set_mesh(mesh)
        shardings = shard_state(state, mesh, rules)
        state = jax.device_put(state, shardings)
        frozen = jax.device_put(frozen, shard_tree(frozen, mesh, rules))
    began = time.perf_counter()
    compiled = compile_step(erase_step, static, shardings).lower(state, frozen, None, key).compile()
    compile_s = time.perf_counter() - began
    needs = compiled.memory_analysis()
    gib = 2.0**-30
    row = {
        "devices": fsdp,
        "compile_s": compile_s,
        "arguments_gib": needs.argument_size_in_bytes * gib,
        "temporaries_gib": needs.temp_size_in_bytes * gib,
        "peak_gib": (needs.argument_size_in_bytes + needs.temp_size_in_bytes) * gib,
        "device": jax.devices()[0].device_kind,
    }
    if fsdp == 1 and cycles:
        times = []
        for _ in range(cycles):  # compiled already: the first is like the others
            start = time.perf_counter()
            state, metrics = compiled(state, frozen, None, key)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - start)
        if not jnp.isfinite(metrics["loss"]):
            raise SystemExit("the loss is not finite")
        row |= {"cycle_s": statistics.median(times), "cycles": cycles}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--cycles", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.size, options.one, options.cycles)))
        return
    from conceptax.reporting.results import environment, write_records

    rows = {}
    print(f"{'':14}{'arguments':>12}{'temporaries':>13}{'peak':>11}{'compile':>10}{'cycle':>10}")
    for name, devices in DEVICES.items():
        flags = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        )
        command = [
            sys.executable,
            __file__,
            "--size",
            options.size,
            "--cycles",
            str(options.cycles),
            "--one",
            str(devices),
        ]
        row = rows[name] = measured_alone(name, command, os.environ | {"XLA_FLAGS": flags})
        cycle = f"{row['cycle_s']:8.1f} s" if "cycle_s" in row else f"{'':>10}"
        print(
            f"{name:14}{row['arguments_gib']:8.2f} GiB{row['temporaries_gib']:9.2f} GiB"
            f"{row['peak_gib']:7.2f} GiB{row['compile_s']:8.1f} s{cycle}",
            flush=True,
        )
    record = {
        "benchmark": "sage_memory",
        "date": date.today().isoformat(),
        "size": options.size,
        "prompts": 4,
        "compute": "bfloat16",
        "master": "float32",
        "remat": True,
        "rows": rows,
    }
    output = options.output or RESULTS / f"sage_memory_{options.size}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_records(output, record | environment())


if __name__ == "__main__":
    main()
