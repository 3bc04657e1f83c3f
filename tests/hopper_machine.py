"""The kernels for sm_90a on an emulator of their machine (`hopper_emulator.h`), called directly."""

import contextlib
import ctypes
import functools
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import gna_machines
import jax
import numpy as np
import pytest

from conceptax.kernels.gna.cuda import build


class Spoiled(NamedTuple):
    """An instruction's site, and how it is to go wrong there; see `hopper_emulator.h`."""

    what: str = ""
    file: str = ""
    line: int = 0
    change: int = 0


NOTHING = Spoiled()


class EmulatorError(RuntimeError):
    """What would hang, fault or be undefined on the machine."""


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels, compiled for the emulator."""
    found = gna_machines.emulated_library()
    found.hopper_forward.restype = ctypes.c_char_p
    found.hopper_backward.restype = ctypes.c_char_p
    found.hopper_sites.restype = ctypes.c_char_p
    return found


@contextlib.contextmanager
def sites() -> Iterator[list[tuple[str, str, int]]]:
    """Collects the sites that are met."""
    library().hopper_sites(True)
    found: list[tuple[str, str, int]] = []
    yield found
    for line in library().hopper_sites(False).decode().splitlines():
        what, file, number = line.split(" ")
        found.append((what, file, int(number)))


def begin(seed: int, spoiled: Spoiled = NOTHING) -> None:
    """Seeds the order of events, and spoils an instruction."""
    what, file, line, change = spoiled
    library().hopper_begin(seed, what.encode(), file.encode(), line, change)


def problem_numbers(case: dict, heads: dict, tile: Sequence[int]) -> ctypes.Array:
    """A problem as `hopper_entry.cc` reads it; `tile` of what a block works on."""
    names = ("batch", "heads", "kv_heads", "dim", "value_dim", "additional")
    numbers = [heads[name] for name in names]
    names = ("layout", "kernel_size", "stride", "dilation", "is_causal")
    axes = list(zip(*(case[name] for name in names), tile, strict=True))
    for axis in [(1, 1, 1, 1, 0, 1)] * (3 - len(axes)) + axes:
        numbers += map(int, axis)
    return (ctypes.c_int * len(numbers))(*numbers)


def shape_of(shape: Sequence[int]) -> ctypes.Array:
    """A shape of always three dimensions."""
    return (ctypes.c_int * 3)(*[1] * (3 - len(shape)), *shape)


def pointers(arrays: Sequence[np.ndarray | None]) -> ctypes.Array:
    """Where arrays lie, which must stay alive."""
    places = [None if x is None else x.ctypes.data for x in arrays]
    return (ctypes.c_void_p * len(places))(*places)


def check(error: bytes | None) -> None:
    """Raises what the emulator says."""
    if error is not None:
        raise EmulatorError(error.decode())


def forward(
    case: dict,
    heads: dict,
    arrays: Sequence[np.ndarray | None],
    tile: Sequence[int],
    box: Sequence[int],
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp; `arrays` are q, k, v, additional keys and values, in 16 bits."""
    query = arrays[0]
    assert query is not None
    output = np.full((*query.shape[:-1], heads["value_dim"]), np.nan, query.dtype)
    lse = np.full(query.shape[:-1], np.nan, np.float32)
    scale = heads["dim"] ** -0.5 if scale is None else scale
    error = library().hopper_forward(
        problem_numbers(case, heads, tile),
        ctypes.c_float(scale),
        query.dtype.name == "bfloat16",
        max(heads["dim"], heads["value_dim"]),
        shape_of(box),
        pointers([*arrays, output, lse]),
    )
    check(error)
    return output, lse


def backward(
    case: dict,
    heads: dict,
    arrays: Sequence[np.ndarray | None],
    tiles: Sequence[Sequence[int]],
    by_query: bool = True,
) -> list[np.ndarray]:
    """Gradients of q, k, v, and additional keys and values if there are.

    `arrays` are these five and the output's cotangent, in 16 bits, log-sum-exp and delta; `tiles`
    the shapes of a tile of queries and of the boxes of keys that it meets, then of a tile of keys
    and of boxes of queries. Unless `by_query`, the first is left out.
    """
    gradients = [None if x is None else np.full_like(x, np.nan) for x in arrays[:5]]
    if not by_query:
        gradients[0] = None
    query = arrays[0]
    assert query is not None
    error = library().hopper_backward(
        problem_numbers(case, heads, tiles[0]),
        shape_of(tiles[1]),
        problem_numbers(case, heads, tiles[2]),
        shape_of(tiles[3]),
        ctypes.c_float(heads["dim"] ** -0.5),
        query.dtype.name == "bfloat16",
        max(heads["dim"], heads["value_dim"]),
        pointers([*arrays, *gradients]),
    )
    check(error)
    return [x for x in gradients if x is not None]


COMPILED = """
#include "hopper/{0}.h"
namespace gna {{
using Arguments = Hopper{1}Arguments<BFloat16>;
template __global__ void hopper_{0}<{2}>(const __grid_constant__ Arguments);
}}
"""


def main_loop(name: str, parameters: str, folder: Path) -> list[str]:
    """The instructions of a kernel's main loop, of which the compiler must say nothing but good.

    No register lies in memory, no product waits for another, threads share out all registers.
    """
    source, binary = folder / "one.cu", folder / "one.cubin"
    source.write_text(COMPILED.format(name, name.capitalize(), parameters))
    command = [build.compiler("gpu"), "-std=c++17", "-O3", "-cubin", "-Xptxas", "-v"]
    command += ["-gencode=arch=compute_90a,code=sm_90a", "-I", build.SOURCES]
    command += ["-isystem", jax.ffi.include_dir(), source, "-o", binary]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in said and " 0 bytes stack frame" in said
    assert "C75" not in said  # such as C7510: wgmma serialized
    assert "Used 168 registers" in said
    main = next(x for x in loops(binary) if any(code.startswith("HGMMA") for code in x))
    assert not [code for code in main if code.startswith(("LDL", "STL"))]
    return main


def loops(binary: Path) -> list[list[str]]:
    """The instructions of a compiled file's loops, in the order of their ends."""
    folder = Path(pytest.importorskip("triton").__file__).parent / "backends/nvidia/bin"
    command = [folder / "nvdisasm", "-c", binary]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    codes, labels, found = [], {}, []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(codes)
        if not (code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line)):
            continue
        codes.append(code[1].strip())
        jump = re.search(r"\bBRA\b.*?(\.L_x_\d+)", code[1])
        if jump and jump[1] in labels:
            found.append(codes[labels[jump[1]] :])
    return found
