"""What commands leave on disk: folders and files that appear only when complete, and records."""

import contextlib
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import conceptax
from conceptax.cli.options import Model
from conceptax.converters import OutputError, atomic_folder
from conceptax.converters.output import CHECKPOINT_FILES, atomic_file

_PACKAGES = ("conceptax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers")


@contextlib.contextmanager
def new_folder(
    path: Path, *, force: bool, markers: Sequence[str] = CHECKPOINT_FILES, command: Any = None,
    sources: Iterable[Path] = (),
) -> Iterator[Path]:  # fmt: skip
    """`converters.atomic_folder`, entered before the work starts.

    So an occupied or unwritable `path` is refused before minutes are spent, and messages name
    `path` and not the temporary folder.

    Args:
      path, force, markers: as for `atomic_folder`.
      command: whose result it is; the files and folders it names are sources.
      sources: more of them.
    """
    read = [*sources_of(command), *sources]
    with atomic_folder(
        path, force=force, markers=markers, sources=read, by=_name(command)
    ) as folder:
        try:
            yield folder
        except OutputError as error:
            raise OutputError(str(error).replace(str(folder), str(path))) from error


@contextlib.contextmanager
def new_file(path: Path, *, force: bool, command: Any = None) -> Iterator[Path]:
    """`converters.atomic_file`, entered before the work starts.

    Args:
      path, force: as for `atomic_file`.
      command: whose result it is; the files and folders it names are sources.
    """
    with atomic_file(path, force=force, sources=sources_of(command)) as file:
        yield file


def sources_of(command: Any) -> list[Path]:
    """The files and folders that a command names, but for its result."""
    if command is None:
        return []
    found: list[Path] = []
    for field in dataclasses.fields(command):
        if field.name in ("output", "dest"):
            continue
        value = getattr(command, field.name)
        if value is None and field.type == Model:  # the bundled one
            value = conceptax.bundled_model()
        if dataclasses.is_dataclass(value):
            found += sources_of(value)
            continue
        for each in value if isinstance(value, tuple) else (value,):
            is_list = isinstance(each, str) and each.endswith((".txt", ".csv", ".json"))
            if isinstance(each, Path) or is_list:
                found.append(Path(each))
    return found


def _name(command: Any) -> str:
    if command is None:
        return "conceptax"
    module = type(command).__module__.rsplit(".", 1)[-1]
    return f"conceptax {module.replace('_', ' ')}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record, indented, ending with a line break."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def training_log(path: Path | None) -> tuple[str, Any]:
    """What a run logged and the last record of it; nothing where another process writes it."""
    if path is None or not path.exists():
        return "", None
    lines = path.read_text(encoding="utf-8")
    return lines, json.loads(lines.splitlines()[-1])


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


def claim_run(path: Path, record: Mapping[str, Any], *, length: str) -> None:
    """Refuse checkpoints of another run; note this one's settings beside them.

    Args:
      path: the record beside the checkpoints, written here.
      record: what the run is, its settings under "settings".
      length: the setting that says how long it runs, which may differ.

    Raises:
      ValueError: the record there differs, or is damaged.
    """
    if path.exists():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); choose another folder.") from error
        here = json.loads(json.dumps(record))
        differing = {name for name in here if here[name] != earlier.get(name)}
        for settings in (here["settings"], earlier.get("settings", {})):
            settings.pop(length, None)
        if here["settings"] == earlier.get("settings"):
            differing.discard("settings")
        if differing:
            raise ValueError(
                f"{path.parent} holds checkpoints of a run with another {sorted(differing)}. "
                "Choose another --checkpoint-dir, or remove this one."
            )
    import jax

    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
