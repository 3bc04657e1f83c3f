"""Programs for a GPU, exported where there is none: a GPU's minutes go into running them.

The Triton kernels' PTX is in them; only XLA's own part is compiled where they run.
"""

import functools
import hashlib
import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from conceptax.kernels import gna

CALLS = ("triton_kernel_call",)


class Exports:
    """A folder of programs for GPUs of compute capability 9.0, by the name of what they compute.

    They hold for these sources and this jax; programs of others are not found.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / _digest()

    def write(self, name: str, function: Callable[..., Any], given: Sequence[Any]) -> None:
        """Exports a function of arrays of these shapes, unless it is there."""
        path = self._path(name)
        if path.exists():
            return
        leave = [jax.export.DisabledSafetyCheck.custom_call(call) for call in CALLS]
        export = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=leave)
        program = export(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in given)).serialize()
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(program)

    def read(
        self, name: str, function: Callable[..., Any], given: Sequence[Any]
    ) -> Callable[..., Any]:
        """The function, compiled: as exported, or as it is if it has not been."""
        path = self._path(name)
        capability = getattr(jax.devices()[0], "compute_capability", None)
        if capability != "9.0" or not path.exists():
            return jax.jit(function)
        import jax_triton  # noqa: F401  (makes the call known)

        return jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)

    def _path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:20]}.bin"


@functools.cache
def _digest() -> str:
    """Of what programs depend on."""
    digest = hashlib.sha256(importlib.metadata.version("jax").encode())
    home = Path(gna.__file__).parent
    for path in sorted(home.rglob("*.py")):
        digest.update(path.relative_to(home).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]
