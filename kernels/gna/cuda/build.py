"""Builds the custom calls' libraries on first use and keeps them in the user's cache folder.

A library's name carries a digest of all that its code depends on: the sources, the compiler and its
options, the machine's instructions, XLA's headers.  So another version never meets an old library,
and machines that share a home folder do not take each other's.
"""

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
from pathlib import Path

import jax

SOURCES = Path(__file__).parent
TARGETS = {"cpu": "gna_cpu.cc", "gpu": "gna_gpu.cu"}


def compiler(target: str) -> str | None:
    """Path of the compiler for a target ("cpu" or "gpu"), or None if there is none.

    For the CPU that is $CXX, or else g++, c++ or clang++; for the GPU $NVCC, $CUDA_HOME/bin/nvcc or
    nvcc.
    """
    if target == "cpu":
        names = [os.environ.get("CXX"), "g++", "c++", "clang++"]
    else:
        home = os.environ.get("CUDA_HOME")
        names = [os.environ.get("NVCC"), home and f"{home}/bin/nvcc", "nvcc"]
        names.append("/usr/local/cuda/bin/nvcc")
    return next(filter(None, (shutil.which(name) for name in names if name)), None)


def missing(target: str) -> str | None:
    """Why a target cannot be built for want of a compiler, and what to do; None if it can."""
    if compiler(target) is not None:
        return None
    if target == "cpu":
        return (
            "no C++ compiler was found (g++, c++ or clang++ on PATH, or its path in CXX); Debian's "
            "and Ubuntu's package g++ provides one"
        )
    return (
        "nvcc was not found (on PATH, in $CUDA_HOME/bin, or its path in NVCC); it is part of the "
        "CUDA toolkit"
    )


def architecture() -> str:
    """What nvcc is to compile for: that of the first GPU, "80" to "90a"."""
    capability = jax.devices("gpu")[0].compute_capability.replace(".", "")
    return f"{capability}a" if int(capability) >= 90 else capability


def command(target: str, architecture: str | None = None) -> list[str]:
    """The compiler and its options; source and output are to follow.

    Raises:
      RuntimeError: if there is no compiler.
    """
    reason = missing(target)
    if reason is not None:
        raise RuntimeError(f"the cuda implementation cannot be built: {reason}.")
    shared = ["-std=c++17", "-O3", "-shared", "-isystem", jax.ffi.include_dir()]
    if target == "cpu":
        native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
        options = [native, "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-pthread"]
    else:
        options = [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
        options += ["-Xcompiler", "-fPIC"]
    return [str(compiler(target)), *shared, *options]


def library_of(target: str, architecture: str | None = None, folder: Path | None = None) -> Path:
    """Where the library of a target is, or is to be once it is built; see `build`.

    Raises:
      RuntimeError: if there is no compiler.
    """
    options = command(target, architecture)
    digest = hashlib.sha256(shlex.join(options).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".h", ".cc", ".cu"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(_version(options[0]).encode() + importlib.metadata.version("jaxlib").encode())
    if target == "cpu":
        digest.update(_instructions().encode())
    folder = folder or _cache_folder()
    return folder / f"gna-{target}-{digest.hexdigest()[:20]}.so"


def build(target: str, architecture: str | None = None, folder: Path | None = None) -> Path:
    """Path of a target's library, compiled unless it is there already.

    Args:
      target: "cpu" or "gpu".
      architecture: of the GPU, such as "80" or "90a"; unused for the CPU.
      folder: where libraries are kept, by default `conceptax` in $XDG_CACHE_HOME or ~/.cache.

    Raises:
      RuntimeError: if there is no compiler, or it fails, with what it said, or the folder cannot be
        written.
    """
    library = library_of(target, architecture, folder)
    if library.exists():
        return library
    folder = library.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _compile(command(target, architecture), target, library)
    except OSError as error:
        raise RuntimeError(
            f"the cuda implementation could not be written to {folder}: {error}. XDG_CACHE_HOME "
            "chooses another place."
        ) from error
    return library


def _compile(options: list[str], target: str, library: Path) -> None:
    folder = library.parent
    # Several processes may build at once: each its own file, and the last rename wins.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        output = Path(scratch) / library.name
        arguments = [*options, str(SOURCES / TARGETS[target]), "-o", str(output)]
        result = subprocess.run(arguments, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(
                f"the cuda implementation did not compile with\n{shlex.join(arguments)}\n"
                f"{result.stderr[-4000:]}"
            )
        output.replace(library)


@functools.cache
def load(target: str) -> ctypes.CDLL:
    """The library of a target for this machine, built if need be."""
    return ctypes.CDLL(str(build(target, architecture() if target == "gpu" else None)))


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "conceptax"


@functools.cache
def _version(path: str) -> str:
    return subprocess.run([path, "--version"], capture_output=True, text=True).stdout


def _instructions() -> str:
    """The processor's instruction sets, as Linux lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
