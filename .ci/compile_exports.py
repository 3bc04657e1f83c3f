"""Compile the programs that gpu_prepare.sh has exported for an H200, without one."""

from pathlib import Path

import jax
import jax_triton  # noqa: F401  (makes the call known)
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

home = Path(__file__).resolve().parent
topology = topologies.get_topology_desc(
    platform="cuda",
    topology_name="",
    target_config=(home / "h200.txtpb").read_text(),
    topology="1x1x1",
)
where = SingleDeviceSharding(topology.devices[0])
paths = sorted((home.parent / "build/gpu/exports").rglob("*.bin"))
for path in paths:
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    given = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for x in program.in_avals]
    compiled = jax.jit(program.call).lower(*given).compile()
    assert "triton_kernel_call" in compiled.as_text(), path
print(f"{len(paths)} exported programs compile for an H200")
