"""Compiles neighborhood attention for an H200 where there is none, alone in a process.

    python compile_for_h200.py LIBRARY

The custom calls are those of a library with the same handlers, which need not run: XLA only asks
them what they are. Writes what XLA says of the program, as JSON.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from conceptax.kernels import gna
from conceptax.kernels.gna import cuda


def main() -> None:
    config = Path(__file__).with_name("h200.txtpb").read_text()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=config, topology="1x1x1"
    )
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    library = ctypes.CDLL(sys.argv[1])
    for name, symbol in ((cuda.FORWARD, library.GnaForward), (cuda.BACKWARD, library.GnaBackward)):
        stages = {"execute": symbol, "initialize": library.GnaInitialize}
        capsules = {stage: jax.ffi.pycapsule(x) for stage, x in stages.items()}
        jax.ffi.register_ffi_target(name, capsules, platform="CUDA")
    cuda.prepare = lambda platform: None
    x = jax.ShapeDtypeStruct((1, 30, 48, 80, 24, 128), jnp.bfloat16, sharding=sharding)

    def attend(q, k, v):
        return gna.neighborhood_attention(
            q, k, v, kernel_size=(18, 24, 24), stride=(16, 8, 8), implementation="cuda"
        )

    def pull(q, k, v, d_output):
        return jax.vjp(attend, q, k, v)[1](d_output)

    told = {}
    for name, run, operands in (("forward", attend, (x,) * 3), ("backward", pull, (x,) * 4)):
        program = jax.jit(run).lower(*operands).compile()
        memory = program.memory_analysis()
        assert memory is not None
        told[name] = {
            "text": program.as_text(),
            "arguments": memory.argument_size_in_bytes,
            "results": memory.output_size_in_bytes,
            "scratch": memory.temp_size_in_bytes,
        }
    print(json.dumps(told))


main()
