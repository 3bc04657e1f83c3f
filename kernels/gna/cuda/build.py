"""Builds the custom calls' libraries on first use and keeps them in the user's cache folder.

A library's name carries a digest of all that its code depends on: the sources, the compiler and its
options, the machine's instructions, XLA's headers.  So another version never meets an old library,
and machines that share a home folder do not take each other's.  It ends with a digest of the file
itself: a damaged one, as a full disk or a power cut may leave, is never mapped but built again.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax

SOURCES = Path(__file__).parent
TARGETS = {"cpu": "gna_cpu.cc", "gpu": "gna_gpu.cu", "bfloat16": "bfloat16_cpu.cc"}
# The calls in each library by their symbols; a GPU's share what is done before the first of them.
_WINDOWS = {"conceptax_gna_forward": "GnaForward", "conceptax_gna_backward": "GnaBackward"}
_LISTS = {
    "conceptax_gna_lists_forward": "GnaListsForward",
    "conceptax_gna_lists_backward": "GnaListsBackward",
}
CALLS = {
    "cpu": _WINDOWS | _LISTS,
    "gpu": _WINDOWS,
    "bfloat16": {
        "conceptax_bfloat16_convolve": "Bfloat16Convolve",
        "conceptax_bfloat16_correlate": "Bfloat16Correlate",
    },
}
_INITIALIZE = "GnaInitialize"

# What a build that was killed leaves is cleared by one that starts so many seconds later.
ABANDONED = 3600

VARIABLES = {"cpu": "CXX", "gpu": "NVCC", "bfloat16": "CXX"}


def compiler(target: str) -> str | None:
    """Path of the compiler for a target, a key of `TARGETS`, or None if there is none.

    For CPUs that is the first word of $CXX if it is set, or else g++, c++ or clang++; for the
    GPU that of $NVCC, or else $CUDA_HOME/bin/nvcc or nvcc.
    """
    words = _found(target)
    return words[0] if words else None


def _found(target: str) -> list[str]:
    """The compiler's path, and the arguments that its variable gives it; nothing if there is none.

    Raises:
      RuntimeError: if its variable is set to what cannot be run: another is not taken instead.
    """
    variable = VARIABLES[target]
    given = os.environ.get(variable, "").strip()
    if given:
        try:
            name, *arguments = shlex.split(given)
        except ValueError as error:
            raise RuntimeError(f"{variable}={given} cannot be read: {error}.") from error
        path = shutil.which(name)
        if path is None:
            raise RuntimeError(
                f"{variable}={given} names no program: {name} is not an executable file, nor found "
                f"on PATH. Set {variable} to a compiler, or not at all for the one on PATH."
            )
        return [path, *arguments]
    if target != "gpu":
        names = ["g++", "c++", "clang++"]
    else:
        home = os.environ.get("CUDA_HOME")
        names = [f"{home}/bin/nvcc"] if home else []
        names += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return [path for path in map(shutil.which, names) if path][:1]


def missing(target: str) -> str | None:
    """Why a target cannot be built for want of a compiler, and what to do; None if it can.

    A variable that names no compiler is none of these reasons: it fails the build, so that it is
    said.
    """
    try:
        if compiler(target) is not None:
            return None
    except RuntimeError:
        return None
    if target != "gpu":
        return (
            "no C++ compiler was found (g++, c++ or clang++ on PATH, or its path in CXX); Debian's "
            "and Ubuntu's package g++ provides one"
        )
    return (
        "nvcc was not found (on PATH, in $CUDA_HOME/bin, or its path in NVCC); it is part of the "
        "CUDA toolkit"
    )


def capabilities() -> list[str]:
    """Compute capabilities of this process's own GPUs, "80" to "103"; none without a GPU."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return []
    return sorted({x.compute_capability.replace(".", "") for x in devices}, key=int)


def architectures() -> str | None:
    """What nvcc is to compile for: that of each GPU at hand, such as "80,90a"."""
    names = (f"{one}a" if int(one) >= 90 else one for one in capabilities())
    return ",".join(names) or None


def command(target: str, architecture: str | None = None) -> list[str]:
    """The compiler and its options; source and output are to follow.

    Raises:
      RuntimeError: if there is no compiler.
    """
    try:
        found = _found(target)
    except RuntimeError as error:
        raise RuntimeError(f"the cuda implementation cannot be built: {error}") from error
    reason = missing(target)
    if reason is not None:
        raise RuntimeError(f"the cuda implementation cannot be built: {reason}.")
    shared = ["-std=c++17", "-O3", "-shared", "-isystem", jax.ffi.include_dir()]
    if target != "gpu":
        native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
        options = [native, "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-pthread"]
    else:
        if architecture is None:
            raise RuntimeError("the cuda implementation cannot be built: there is no NVIDIA GPU.")
        options = [f"-gencode=arch=compute_{one},code=sm_{one}" for one in architecture.split(",")]
        options += ["-Xcompiler", "-fPIC"]
    return [*found, *shared, *options]


def library_of(
    target: str, architecture: str | None = None, folder: Path | None = None
) -> Path | None:
    """The library of a target if it is built, and whole; see `build`.

    Raises:
      RuntimeError: if there is no compiler.
    """
    name = _name(target, architecture)
    there = sorted((folder or _cache_folder()).glob(f"{name}-*.so"))
    return next((path for path in there if path.stem == f"{name}-{_digest(path)}"), None)


def _name(target: str, architecture: str | None) -> str:
    """A library's name up to the digest of its content.

    Where compiler and headers lie is not in it: a library may be built for another machine.
    """
    _, *options = command(target, architecture)
    options.remove(jax.ffi.include_dir())
    digest = hashlib.sha256(shlex.join(options).encode())
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in (".h", ".cc", ".cu"):
            name = path.relative_to(SOURCES).as_posix()
            digest.update(name.encode() + b"\0" + path.read_bytes())
    version = _version(tuple(_found(target)))
    digest.update(version.encode() + importlib.metadata.version("jaxlib").encode())
    if target != "gpu":
        digest.update(_instructions().encode())
    return f"gna-{target}-{digest.hexdigest()[:20]}"


def build(target: str, architecture: str | None = None, folder: Path | None = None) -> Path:
    """Path of a target's library, compiled unless it is there already, and whole.

    Args:
      target: "cpu", "gpu", or "bfloat16", which is for CPUs too.
      architecture: of the GPUs, such as "90a" or "80,90a"; unused for the CPU.
      folder: where libraries are kept, by default `conceptax` in $XDG_CACHE_HOME or ~/.cache.

    Raises:
      RuntimeError: if there is no compiler, or it fails, with what it said, or the folder cannot be
        written.
    """
    folder = folder or _cache_folder()
    try:
        library = library_of(target, architecture, folder)
        if library is not None:
            return library
        folder.mkdir(parents=True, exist_ok=True)
        name = _name(target, architecture)
        library = _compile(command(target, architecture), target, folder, name)
        damaged = [path for path in folder.glob(f"{name}-*.so") if path != library]
        _clear(folder)
    except OSError as error:
        raise RuntimeError(
            f"the cuda implementation could not be written to {folder}: {error}. XDG_CACHE_HOME "
            "chooses another place."
        ) from error
    for path in damaged:
        # Another process may have built one meanwhile, and be about to load it.
        if path.stem != f"{name}-{_digest(path)}":
            with contextlib.suppress(OSError):
                path.unlink()
    return library


def _digest(path: Path) -> str:
    """That of a file's content; of one that cannot be read, nothing."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:20]
    except OSError:
        return ""


def _clear(folder: Path) -> None:
    for scratch in folder.glob("build-*"):
        with contextlib.suppress(OSError):
            if time.time() - scratch.stat().st_mtime > ABANDONED:
                shutil.rmtree(scratch, ignore_errors=True)


def _compile(options: list[str], target: str, folder: Path, name: str) -> Path:
    # Several processes may build at once: each its own file, and the last rename wins.
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as scratch:
        output = Path(scratch) / f"{name}.so"
        arguments = [*options, str(SOURCES / TARGETS[target]), "-o", str(output)]
        result = _run(arguments)
        if result.returncode != 0:
            raise RuntimeError(
                f"the cuda implementation did not compile with\n{shlex.join(arguments)}\n"
                f"{result.stderr[-4000:]}"
            )
        if not output.is_file() or not output.stat().st_size:
            raise RuntimeError(
                f"the cuda implementation cannot be built: {options[0]} reported success but wrote "
                f"no library; set {VARIABLES[target]} to a compiler, or not at all."
            )
        library = folder / f"{name}-{_digest(output)}.so"
        with output.open("rb+") as file:  # on the disk before it has its name
            os.fsync(file.fileno())
        output.replace(library)
    return library


def _run(arguments: Sequence[str]) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(
            arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        raise RuntimeError(
            f"the cuda implementation cannot be built: {arguments[0]} does not run: {error}."
        ) from error


@functools.cache
def load(target: str) -> ctypes.CDLL:
    """The library of a target for this machine, built if need be.

    Raises:
      RuntimeError: if it cannot be built, or the system does not load it.
    """
    path = build(target, architectures() if target == "gpu" else None)
    try:
        library = ctypes.CDLL(str(path))
        for symbol in (*CALLS[target].values(), *[_INITIALIZE] * (target == "gpu")):
            getattr(library, symbol)
    except (OSError, AttributeError) as error:
        raise RuntimeError(
            f"the cuda implementation could not be loaded: {error}. If files in {path.parent} "
            "may not be executed, XDG_CACHE_HOME chooses another place."
        ) from error
    return library


def register(target: str) -> None:
    """Makes the calls of a target known to jax.

    Raises:
      RuntimeError: as for `load`.
    """
    library = load(target)
    for name, symbol in CALLS[target].items():
        stages = {"execute": jax.ffi.pycapsule(getattr(library, symbol))}
        if target == "gpu":
            stages["initialize"] = jax.ffi.pycapsule(getattr(library, _INITIALIZE))
        platform = "CUDA" if target == "gpu" else "cpu"
        jax.ffi.register_ffi_target(name, stages, platform=platform)


def _cache_folder() -> Path:
    chosen = os.environ.get("XDG_CACHE_HOME")
    if chosen:
        return Path(chosen) / "conceptax"
    try:
        return Path.home() / ".cache" / "conceptax"
    except RuntimeError as error:
        raise RuntimeError(
            f"the cuda implementation has no place to be kept: {str(error).rstrip('.')}. "
            "XDG_CACHE_HOME chooses one."
        ) from error


@functools.cache
def _version(words: tuple[str, ...]) -> str:
    return _run([*words, "--version"]).stdout


def _instructions() -> str:
    """The processor's instruction sets, as Linux lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
