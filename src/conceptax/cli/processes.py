"""One command as several processes: under any launcher they find each other."""

import os
import sys
from collections.abc import Mapping
from typing import Any

# A process that ends without a word is noticed after this time; the others then end too.
_HEARTBEAT_SECONDS = 30

# What launchers tell each process: its coordinator's address, how many there are, which it is.
_LAUNCHERS = (
    ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    ("MASTER_ADDR", "WORLD_SIZE", "RANK"),  # torchrun and many schedulers, with MASTER_PORT
)
# Launchers that JAX knows: these count the processes they started.
_KNOWN_TO_JAX = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def join_processes() -> None:
    """Become one run with the other processes that a launcher started, if it did.

    Afterwards `jax.devices()` are those of all processes; what the command prints, the first one
    prints.

    Raises:
      ValueError: the launcher's variables are incomplete.
    """
    options = launched(os.environ)
    if options is None:
        return
    import jax

    if not jax.distributed.is_initialized():
        jax.distributed.initialize(**options, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def leave_processes() -> None:
    """Have the other processes of the run, if there are any, not wait for this failed one."""
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        from conceptax.methods.training.processes import leave

        leave()


def launched(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`, or None where this is the only process."""
    for names in _LAUNCHERS:
        address, count, index = (environment.get(name) for name in names)
        if count is None or not _number(names[1], count) > 1:
            continue
        if address is None or index is None:
            raise ValueError(
                f"{names[1]} is {count}, but {names[0] if address is None else names[2]} is not "
                "set: every process needs the address of the first and its own number."
            )
        port = environment.get("MASTER_PORT")
        if names[0] == "MASTER_ADDR":
            if port is None:
                raise ValueError("MASTER_ADDR is set, but MASTER_PORT is not: set both.")
            address = f"{address}:{port}"
        options: dict[str, Any] = {
            "coordinator_address": address,
            "num_processes": _number(names[1], count),
            "process_id": _number(names[2], index),
        }
        local = environment.get("LOCAL_RANK")
        if local is not None and environment.get("LOCAL_WORLD_SIZE", "1") != "1":
            options["local_device_ids"] = [_number("LOCAL_RANK", local)]  # one device each
        return options
    if any(_number(name, environment.get(name, "1")) > 1 for name in _KNOWN_TO_JAX):
        return {}
    return None


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} must be a whole number, received {text!r}.") from None
