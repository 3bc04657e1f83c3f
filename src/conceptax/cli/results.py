"""What commands leave on disk: folders and files that appear only when complete, and records."""

import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from conceptax.converters import OutputError, atomic_folder
from conceptax.converters.output import CHECKPOINT_FILES
from conceptax.interrupts import temporary
from conceptax.text import read_text

_PACKAGES = ("conceptax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers")


@contextlib.contextmanager
def new_folder(
    path: Path, *, force: bool, markers: Sequence[str] = CHECKPOINT_FILES
) -> Iterator[Path]:
    """`converters.atomic_folder`, entered before the work starts.

    So an occupied or unwritable `path` is refused before minutes are spent, and messages name
    `path` and not the temporary folder.
    """
    with atomic_folder(path, force=force, markers=markers) as folder:
        try:
            yield folder
        except OutputError as error:
            raise OutputError(str(error).replace(str(folder), str(path))) from error


@contextlib.contextmanager
def new_file(path: Path, *, force: bool) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block succeeds, and vanishes when it fails.

    Raises:
      OutputError: `path` exists and `force` is off, or the file system refuses.
    """
    path = Path(os.path.abspath(path.expanduser()))
    if path.exists() and not force:
        raise OutputError(f"{path} already exists. Choose another output path or pass --force.")
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Choose another output path.")
    made: list[Path] = []
    work: Path | None = None
    try:
        made = [p for p in (path.parent, *path.parent.parents) if not p.exists()]
        root = made[-1].parent if made else path.parent
        if not root.is_dir():
            raise OutputError(f"{root} is not a folder, so {path} cannot be made in it.")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{path.stem}.", suffix=f".partial{path.suffix}", dir=path.parent
        )
        os.close(handle)
        work = Path(name)
        umask = os.umask(0)
        os.umask(umask)
        work.chmod(0o666 & ~umask)
        with temporary(work, made):
            yield work
        os.replace(work, path)
    except BaseException as error:
        if work is not None:
            work.unlink(missing_ok=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise OutputError(
                f"{path} could not be written: {error.strerror or error}. Nothing was left behind; "
                "choose another output path."
            ) from error
        raise


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder for the time of the block, also where a signal ends the process."""
    with tempfile.TemporaryDirectory() as name, temporary(Path(name)):
        yield Path(name)


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
            earlier = json.loads(read_text(path))
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
