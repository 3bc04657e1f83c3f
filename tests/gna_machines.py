"""Machines that run GPU kernels where there is no GPU: Triton's interpreter, a CUDA emulator."""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import gna_interpreter
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conceptax.kernels.gna import backends, cuda
from conceptax.kernels.gna.api import attend
from conceptax.kernels.gna.cuda import build

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def interpreter(folder: Path) -> Iterator[Callable]:
    """`triton.call` by Triton's interpreter, which must be alone in a process."""
    pytest.importorskip("triton")
    pytest.importorskip("torch")
    process = subprocess.Popen(
        [sys.executable, gna_interpreter.__file__, str(ROOT / "kernels/gna/backends")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout
    assert process.stdout.readline() == "ready\n"

    def call(name, launch, operands, results):
        path = str(folder / "operands.npz")
        np.savez(path, *map(np.asarray, operands))
        asked = {
            "kernel": name,
            "programs": launch.programs,
            "static": launch.static,
            "operands": path,
            "results": [(x.shape, x.dtype.name) for x in results],
        }
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, "the interpreter failed; its error is above"
        with np.load(answer.rstrip()) as file:
            return [jnp.asarray(file[f"arr_{n}"]) for n in range(len(results))]

    yield call
    process.stdin.close()
    process.wait(10)
    process.stdout.close()


def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The kernels imported apart from the hook that checks annotations, which wraps functions."""
    pytest.importorskip("triton")
    module = gna_interpreter.load(ROOT / "kernels/gna/backends")
    monkeypatch.setitem(sys.modules, "conceptax.kernels.gna.backends.triton_kernels", module)
    monkeypatch.setattr(backends, "triton_kernels", module, raising=False)
    return module


@contextlib.contextmanager
def emulator(hopper: bool = False) -> Iterator[None]:
    """The custom calls by the GPU's sources, compiled for the emulators.

    Args:
      hopper: whether the machine is one for the kernels of `cuda/hopper`.
    """
    library = emulated_library()
    library.hopper_is_here(hopper)
    with pytest.MonkeyPatch.context() as patch:
        for name, symbol in (("FORWARD", library.GnaForward), ("BACKWARD", library.GnaBackward)):
            target = f"emulated_{name.lower()}"
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(symbol), platform="cpu")
            patch.setattr(cuda, name, target)
        patch.setattr(cuda, "prepare", lambda platform: None)
        attend.clear_cache()  # programs for the calls that were patched, and afterwards these
        yield
    attend.clear_cache()


@functools.cache
def emulated_library() -> ctypes.CDLL:
    """The GPU's sources compiled for the emulators, once for all processes that test them."""
    compiler = build.compiler("cpu")
    if compiler is None:
        pytest.skip("no C++ compiler")
    tests, cache = ROOT / "tests", ROOT / ".cache"
    options = ["-x", "c++", "-std=c++17", "-O2", "-ftree-vectorize", "-march=native", "-w"]
    options += ["-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-isystem", jax.ffi.include_dir()]
    options += ["-I", str(build.SOURCES), f'-DGNA_INSTRUCTIONS="{tests}/cuda_emulator.h"']
    options += [f'-DGNA_HOPPER_MACHINE="{tests}/hopper_emulator.h"', str(tests / "hopper_entry.cc")]
    digest = hashlib.sha256(" ".join([compiler, *options]).encode())
    sources = [*build.SOURCES.rglob("*.h"), *build.SOURCES.glob("*.cu"), *tests.glob("*emulator.h")]
    for path in sorted([*sources, tests / "hopper_entry.cc"]):
        digest.update(path.read_bytes())
    library = cache / f"emulated-{digest.hexdigest()[:20]}.so"
    cache.mkdir(exist_ok=True)
    with open(cache / "emulated.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            for old in cache.glob("emulated-*.so"):
                old.unlink()
            scratch = cache / "emulated.scratch"
            subprocess.run([compiler, *options, "-o", str(scratch)], check=True)
            scratch.replace(library)
        return ctypes.CDLL(str(library))
