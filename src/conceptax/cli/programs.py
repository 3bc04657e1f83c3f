"""What XLA compiles is kept for the next command, in a folder of bounded size.

JAX keys it by the program, its own and XLA's versions and flags, and the kind of device, a CPU's
instructions among it: a home folder may be shared by different machines.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_LIMIT = 2 << 30  # bytes; the largest programs take some ten million
_SETTINGS = {
    # Shorter ones are as many, and together take a second too.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    # What attention does over a mesh is told by its operands; the pointer is new in each process.
    "JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY": "1",
}


def programs_folder() -> Path:
    """Where all commands keep them, unless `JAX_COMPILATION_CACHE_DIR` says otherwise."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(caches, "conceptax", "xla")


@contextlib.contextmanager
def kept_programs() -> Iterator[None]:
    """Have JAX, which nothing has imported yet, keep what it compiles; drop the oldest at the end.

    A folder that the environment names is its owner's, who bounds it.
    """
    folder = programs_folder()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if "jax" in sys.modules and os.environ.get("JAX_COMPILATION_CACHE_DIR") == str(folder):
            drop_oldest(folder, _LIMIT)


def drop_oldest(folder: Path, limit: int) -> None:
    """Remove what was read longest ago until the files of a folder have no more than `limit` bytes.

    Other commands may do so at the same time; what cannot be removed stays.
    """
    try:
        files = [entry for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)]
        told = [(entry.stat(follow_symlinks=False), entry.path) for entry in files]
    except OSError:  # there is none, or another command is removing some
        return
    size = sum(stat.st_size for stat, _ in told)
    for stat, path in sorted(told, key=lambda each: max(each[0].st_atime, each[0].st_mtime)):
        if size <= limit:
            return
        with contextlib.suppress(OSError):
            os.unlink(path)
        size -= stat.st_size
