"""Records: JSON files, and the versions and devices that a result came from."""

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from conceptax.reporting.report import Table, markdown_table
from conceptax.text import write_json

METRICS = "metrics.json"
_PACKAGES = ("conceptax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers")


def write_records(path: Path, content: Mapping[str, Any]) -> None:
    """Write figures as JSON, one line a record, for files that are kept and compared."""
    path.write_text(_records(content, 2) + "\n", encoding="utf-8")


def write_tables(folder: Path, record: Mapping[str, Any], tables: Iterable[Table]) -> str:
    """Write what was measured: metrics.json, and table.md, whose text is returned."""
    write_json(folder / METRICS, record)
    markdown = "\n".join(map(markdown_table, tables))
    (folder / "table.md").write_text(markdown, encoding="utf-8")
    return markdown


def _records(value: Any, depth: int, indent: str = "") -> str:
    """JSON with a line for each entry of what holds mappings, down to a depth."""
    named = isinstance(value, Mapping)
    entries = list(value.values()) if named else value if isinstance(value, list | tuple) else []
    if not (depth and any(isinstance(entry, Mapping) for entry in entries)):
        return json.dumps(value, ensure_ascii=False)
    inner = indent + " "
    lines = [_records(entry, depth - 1, inner) for entry in entries]
    if named:
        names = [json.dumps(str(name), ensure_ascii=False) for name in value]
        lines = [f"{name}: {line}" for name, line in zip(names, lines, strict=True)]
    start, end = "{}" if named else "[]"
    return f"{start}\n{inner}" + f",\n{inner}".join(lines) + f"\n{indent}{end}"


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
