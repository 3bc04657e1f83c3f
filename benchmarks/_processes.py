"""Measurements in processes of their own, so that peak memory is their own."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def peak_memory() -> float:
    """Peak resident memory of this process, GiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 2**20
    return float("nan")


def measured_alone(
    name: str, command: Sequence[str], env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What the last line of a command's output holds as JSON.

    Where the command fails, this process ends with the end of what it said.
    """
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
