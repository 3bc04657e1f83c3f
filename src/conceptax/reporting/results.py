"""Records: JSON files, and the versions and devices that a result came from."""

import contextlib
import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("conceptax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record, indented, ending with a line break."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def environment() -> dict[str, Any]:
    """Versions and devices that a result came from."""
    import jax

    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    devices = jax.devices()
    return {
        "versions": versions,
        "platform": sys.platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
    }
