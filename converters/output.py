"""Folders that appear only when complete."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from ..interrupts import temporary, whole
from .errors import OutputError

CHECKPOINT_FILES = ("config.json", "model_index.json")


def _check_target(path: Path, force: bool, markers: Sequence[str]) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError(f"{path} exists and is not a folder. Choose another output path.")
    if not path.exists() or not any(path.iterdir()):
        return
    if not force:
        raise OutputError(
            f"{path} already exists and is not empty. Choose another output path, or replace it "
            "with force=True (--force)."
        )
    if not any((path / name).is_file() for name in markers):
        raise OutputError(
            f"{path} holds no {' or '.join(markers)}, so it does not look like an earlier result "
            "and is not replaced. Choose another output path."
        )


@contextlib.contextmanager
def atomic_folder(
    path: Path | str, *, force: bool = False, markers: Sequence[str] = CHECKPOINT_FILES
) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block succeeds, and vanishes when it fails.

    Args:
      path: the result; its parents are made.
      force: replace an earlier result, which is removed only after the new one is in place.
      markers: an existing folder is replaced only if it holds one of these files.

    Yields:
      An empty folder beside `path` to write into.

    Raises:
      OutputError: `path` exists and may not be replaced, or the file system refuses (unwritable,
        full). Nothing is left on disk.
    """
    if jax.process_index() > 0:  # the first of several processes writes the result
        with tempfile.TemporaryDirectory() as unused:
            yield Path(unused)
        return
    path = Path(os.path.abspath(Path(path).expanduser()))
    made: list[Path] = []
    work: Path | None = None
    try:
        _check_target(path, force, markers)
        parent = path.parent
        made = [p for p in (parent, *parent.parents) if not p.exists()]
        root = made[-1].parent if made else parent
        if not root.is_dir():
            raise OutputError(f"{root} is not a folder, so {path} cannot be made in it.")
        parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=parent))
        umask = os.umask(0)
        os.umask(umask)
        work.chmod(0o777 & ~umask)
        with temporary(work, made):
            yield work
        with whole():
            _swap_in(work, path)
    except BaseException as error:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise OutputError(
                f"{path} could not be written: {error.strerror or error}. Nothing was left behind; "
                + ("free some space first." if full else "choose another output path.")
            ) from error
        raise


@contextlib.contextmanager
def atomic_file(path: Path | str, *, force: bool = False) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block succeeds, and vanishes when it fails.

    Args:
      path: the result; its folder exists.
      force: replace an existing file.

    Raises:
      OutputError: `path` exists and may not be replaced, or the file system refuses.
    """
    if jax.process_index() > 0:
        with tempfile.TemporaryDirectory() as unused:
            yield Path(unused) / Path(path).name
        return
    path = Path(path)
    if path.is_dir() or (path.exists() and not force):
        raise OutputError(
            f"{path} already exists. Choose another output path"
            + ("." if path.is_dir() else ", or replace it with force=True (--force).")
        )
    work = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary(work):
            yield work
        work.replace(path)
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
        work.unlink(missing_ok=True)


def _swap_in(work: Path, path: Path) -> None:
    if not path.exists():
        work.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    path.rename(old)  # onto the empty folder
    try:
        work.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
