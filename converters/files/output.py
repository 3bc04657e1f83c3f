"""Atomic output: files and folders that appear only when complete, replacing earlier results alone.

Every folder gets `conceptax.json`, the record of which files in it were written here. A folder
without it, or with files that are not in it, is somebody's own and is never replaced.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from ... import __version__
from ...errors import ConceptaxError
from ...interrupts import temporary, whole
from ..errors import OutputError, listing

try:
    import fcntl
except ImportError:  # no such locks on this system: leftovers are then never removed
    fcntl: Any = None

RECORD = "conceptax.json"
_REPLACE = "Choose another output path, or replace it with force=True (--force)."
CHECKPOINT_FILES = ("config.json", "model_index.json")


@contextlib.contextmanager
def atomic_folder(
    path: Path | str,
    *,
    force: bool = False,
    markers: Sequence[str] = CHECKPOINT_FILES,
    sources: Iterable[Path | str] = (),
    by: str = "conceptax",
) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block succeeds, and vanishes when it fails.

    What a run that was killed left of the same result is removed first, or, where it was killed
    while it replaced an earlier result, put back.

    Args:
      path: the result; its parents are made.
      force: replace an earlier result, which is removed only after the new one is in place. Only a
        folder with the record `conceptax.json` is one, and only while nothing was added to it.
      markers: an existing folder is replaced only if it also holds one of these files, so that a
        result of another kind is not.
      sources: files and folders that are read: `path` may be none of them, nor in or above one.
      by: what to call the writer in the record.

    Yields:
      An empty folder beside `path` to write into.

    Raises:
      OutputError: `path` exists and may not be replaced, or the file system refuses (unwritable,
        full). Nothing is left on disk.
    """
    path = Path(os.path.abspath(Path(path).expanduser()))

    def finish(work: Path) -> None:
        _write_records(work, by)
        _swap_in(work, path)

    check = functools.partial(_check_folder, path, force, markers)
    with _claimed(path, sources, Path.mkdir, check, finish) as work:
        yield work


@contextlib.contextmanager
def atomic_file(
    path: Path | str, *, force: bool = False, sources: Iterable[Path | str] = ()
) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block succeeds, and vanishes when it fails.

    Args:
      path: the result; its parents are made.
      force: replace an existing file.
      sources: files and folders that are read: `path` may be none of them, nor in one.

    Raises:
      OutputError: `path` exists and may not be replaced, or the file system refuses.
    """
    path = Path(os.path.abspath(Path(path).expanduser()))

    def check() -> None:
        if path.is_dir():
            problem = "is a folder that already exists. Choose another output path."
        elif (path.exists() or path.is_symlink()) and not force:
            problem = f"already exists. {_REPLACE}"
        else:
            return
        raise OutputError(f"{path} {problem}")

    make = functools.partial(Path.touch, exist_ok=False)
    with _claimed(path, sources, make, check, lambda work: work.replace(path)) as work:
        yield work


def written_files(folder: Path) -> set[str]:
    """All that a folder holds but folders and the record, as paths below it."""
    found = set()
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        below = os.path.relpath(root, folder)
        found |= {Path(below, name).as_posix() for name in (*files, *links)}
    return found - {RECORD}


def refuse_overlap(path: Path, sources: Iterable[Path | str]) -> None:
    """Refuse a result that is one of the files and folders it is made from, or in or above one.

    Raises:
      OutputError: names both.
    """
    here = _lineage(path)
    for source in sources:
        there = _lineage(Path(source).expanduser())
        equal = _same(here[0], there[0])
        if equal or any(_same(here[0], above) for above in there[1:]):
            how = "is" if equal else "contains"
        elif any(_same(above, there[0]) for above in here[1:]):
            how = "is inside"
        else:
            continue
        raise OutputError(
            f"the output {path} {how} {source}, which is read: what is read is never replaced. "
            "Choose another output path."
        )


def _lineage(path: Path) -> list[Path]:
    """The real path and all folders above it."""
    real = Path(os.path.realpath(path))
    return [real, *real.parents]


def _same(one: Path, other: Path) -> bool:
    if one == other:
        return True
    try:
        return os.path.samefile(one, other)  # names that differ in case, bind mounts
    except OSError:
        return False


@contextlib.contextmanager
def _claimed(
    path: Path,
    sources: Iterable[Path | str],
    make: Callable[[Path], Any],
    check: Callable[[], None],
    finish: Callable[[Path], Any],
) -> Iterator[Path]:
    """What files and folders have in common: `make` a temporary one, `check`, `finish`."""
    if jax.process_index() > 0:  # the first of several processes writes the result
        with tempfile.TemporaryDirectory() as unused:
            work = Path(unused) / (path.name or "output")
            make(work)
            yield work
        return
    made: list[Path] = []
    work = None
    with contextlib.ExitStack() as locks:
        try:
            _refuse_home(path)
            refuse_overlap(path, sources)
            _sweep(path)
            check()
            made = [p for p in (path.parent, *path.parent.parents) if not p.exists()]
            root = made[-1].parent if made else path.parent
            if not root.is_dir():
                raise OutputError(f"{root} is not a folder, so {path} cannot be made in it.")
            path.parent.mkdir(parents=True, exist_ok=True)
            new = _temporary(path, secrets.token_hex(4), "partial")
            make(new)
            work = new
            with contextlib.suppress(OSError):
                locks.callback(os.close, _locked(work))
            with temporary(work, made):
                yield work
            with whole():
                check()  # again: what is there may have changed meanwhile
                finish(work)
        except BaseException as error:
            if work is not None:
                _remove(work)
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            if isinstance(error, OSError) and _is_about(error, path):
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                advice = "free some space first." if full else "choose another output path."
                raise OutputError(
                    f"{path} could not be written: {error.strerror or error}. Nothing was left "
                    f"behind; {advice}"
                ) from error
            raise


def _is_about(error: OSError, path: Path) -> bool:
    """Whether the system refused the result, and not something else that was read or written."""
    if isinstance(error, ConceptaxError):
        return False
    if error.filename is None:
        return True
    place = os.path.abspath(os.fsdecode(error.filename))
    beside = os.path.join(path.parent, f".{path.name[:_SHOWN]}.")
    return (
        _same(Path(place), path)
        or place.startswith((f"{path}{os.sep}", beside))
        or (Path(place) in path.parents)
    )


# ---- temporary names, and what killed runs left under them ----

_SHOWN = 40  # characters of a name


def _temporary(path: Path, token: str, kind: str) -> Path:
    """What a result of this host is called before it is complete, beside its place."""
    tag = hashlib.blake2s(f"{platform.node()}/{path.name}".encode(), digest_size=4).hexdigest()
    # A folder may be named like a file: the suffix tells writers of files what to write.
    suffix = path.suffix if re.fullmatch(r"\.\w{1,16}", path.suffix) else ""
    return path.with_name(f".{path.name[:_SHOWN]}.{tag}-{token}.{kind}{suffix}")


def _sweep(path: Path) -> None:
    """Remove what killed runs left of this result; put back what they were replacing.

    Raises:
      OutputError: a run that still lives is writing it.
    """
    if not path.parent.is_dir():
        return
    pattern = re.escape(_temporary(path, "TOKEN", "KIND").name)
    pattern = pattern.replace("TOKEN", "[0-9a-f]{8}").replace("KIND", "(partial|old)")
    for name in os.listdir(path.parent):
        if (found := re.fullmatch(pattern, name)) is None:
            continue
        leftover = path.with_name(name)
        try:
            lock = _locked(leftover)
        except BlockingIOError:
            raise OutputError(
                f"{path} is being written by another process. Wait for it, or choose another "
                "output path."
            ) from None
        except OSError:  # gone, or nothing is known about it
            continue
        try:
            if found[1] == "old" and not path.exists():
                leftover.rename(path)
            else:
                _remove(leftover)
        finally:
            os.close(lock)


def _locked(path: Path) -> int:
    """A descriptor that locks `path` until it is closed, or the process ends in any way.

    Raises:
      BlockingIOError: another one does.
      OSError: it cannot be locked.
    """
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


# ---- what may be replaced ----


def _refuse_home(path: Path) -> None:
    """Refuse places that are no result's: the working folder, the home folder, those above them."""
    real, problem = Path(os.path.realpath(path)), ""
    for what, place in (("the working folder", Path.cwd), ("the home folder", Path.home)):
        with contextlib.suppress(OSError, RuntimeError):
            above = _lineage(place())
            if any(_same(real, folder) for folder in above):
                holds = "is" if _same(real, above[0]) else "contains"
                problem = problem or f"{holds} {what}, which is not replaced"
    if not problem and os.path.ismount(real):
        problem = "is where a file system is mounted, which cannot be replaced"
    if problem:
        raise OutputError(f"{path} {problem}. Name a folder in it, such as {real / 'output'}.")


def _check_folder(path: Path, force: bool, markers: Sequence[str]) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError(f"{path} exists and is not a folder. Choose another output path.")
    if not path.exists() or not any(path.iterdir()):
        return
    if not force:
        raise OutputError(f"{path} already exists and is not empty. {_REPLACE}")
    ours = _recorded(path)
    lacking = RECORD if ours is None else " or ".join(markers)
    if ours is None or not any((path / name).is_file() for name in markers):
        raise OutputError(
            f"{path} holds no {lacking}, so it does not look like an earlier result and is not "
            "replaced. Choose another output path, or remove it yourself."
        )
    if foreign := written_files(path) - ours:
        tops = {name.split("/")[0] for name in ours}
        names = {
            name if name.split("/")[0] in tops else name.split("/")[0] + "/" * ("/" in name)
            for name in foreign
        }
        raise OutputError(
            f"{path} also holds what was not written with it and would be lost: "
            f"{listing(sorted(names))}. Move that elsewhere, or choose another output path."
        )


def _recorded(folder: Path) -> set[str] | None:
    """The files that the record of a folder names; None where there is no record."""
    try:
        return set(json.loads((folder / RECORD).read_text("utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_records(folder: Path, by: str) -> None:
    """The record of a folder; those of results in it learn what was added to them."""
    below = [file for file in folder.rglob(RECORD) if file.parent != folder]
    records = {file: json.loads(file.read_text("utf-8")) for file in below}
    records[folder / RECORD] = {"written_by": by, "version": __version__}
    for file, record in records.items():
        content = {**record, "files": sorted(written_files(file.parent))}
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _swap_in(work: Path, path: Path) -> None:
    if not path.exists():
        work.rename(path)
        return
    old = _temporary(path, secrets.token_hex(4), "old")
    with contextlib.ExitStack() as locks:
        with contextlib.suppress(OSError):
            locks.callback(os.close, _locked(path))
        path.rename(old)
        try:
            work.rename(path)
        except BaseException:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
