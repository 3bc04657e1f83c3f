"""GGUF files, memory-mapped: llama.cpp's format, in which transformers and text encoders come too.

The format (https://github.com/ggml-org/ggml, docs/gguf.md): "GGUF", a version, counts, settings
by name, then names, sizes, types and offsets of tensors, then their data; little endian.  Values of
quantized types are kept in blocks; the `gguf` package turns them into float32 as they are read
(`conceptax[gguf]`), and nothing else needs it.  Everything that a file claims is bounded by its own
size.
"""

import dataclasses
import functools
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import CheckpointError
from .safetensors_file import FLOAT_TYPES, Content, StoredTensor, mapped


class _Kind(NamedTuple):
    """A type: its name, and how many numbers a block holds in how many bytes."""

    name: str
    block: int = 1
    size: int = 0


# By their numbers; those without a size are not read.
_KINDS = {
    0: _Kind("F32", 1, 4),
    1: _Kind("F16", 1, 2),
    2: _Kind("Q4_0", 32, 18),
    3: _Kind("Q4_1", 32, 20),
    6: _Kind("Q5_0", 32, 22),
    7: _Kind("Q5_1", 32, 24),
    8: _Kind("Q8_0", 32, 34),
    9: _Kind("Q8_1"),
    10: _Kind("Q2_K", 256, 84),
    11: _Kind("Q3_K", 256, 110),
    12: _Kind("Q4_K", 256, 144),
    13: _Kind("Q5_K", 256, 176),
    14: _Kind("Q6_K", 256, 210),
    15: _Kind("Q8_K"),
    16: _Kind("IQ2_XXS"),
    17: _Kind("IQ2_XS"),
    18: _Kind("IQ3_XXS"),
    19: _Kind("IQ1_S"),
    20: _Kind("IQ4_NL", 32, 18),
    21: _Kind("IQ3_S"),
    22: _Kind("IQ2_S"),
    23: _Kind("IQ4_XS", 256, 136),
    28: _Kind("F64", 1, 8),
    29: _Kind("IQ1_M"),
    30: _Kind("BF16", 1, 2),
    34: _Kind("TQ1_0"),
    35: _Kind("TQ2_0"),
    39: _Kind("MXFP4"),
}
_READ = [kind.name for kind in _KINDS.values() if kind.size]
_VERSIONS = (2, 3)
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_TEXT, _LIST = 8, 9
_NAME = 1 << 16  # bytes of a name
_COUNT = 100_000  # of tensors and of settings
_DEPTH, _RANK = 4, 4
_ALIGNMENT = "general.alignment"
_ORIGINAL = "comfy.gguf.orig_shape."  # sizes of what was flattened into rows, by its name


def open_gguf(path: Path, content: Content | None = None) -> dict[str, StoredTensor]:
    """The tensors of a file, in PyTorch's layout; their values stay on disk.

    Args:
      path: the file.
      content: its bytes, where they are mapped already.

    Returns:
      Tensor name -> stored tensor; those of quantized types are read as float32.

    Raises:
      CheckpointError: not such a file, truncated, inconsistent, or of a type that is not read here.
    """
    data = np.frombuffer(mapped(path) if content is None else content, np.uint8)
    reader = _Reader(path, data.data)
    if bytes(reader.take(4)) != b"GGUF":
        raise reader.fail("it does not begin so")
    if (version := reader.number("I")) not in _VERSIONS:
        raise reader.fail(f"version {version}, of which {_VERSIONS} are read")
    tensors, settings = (reader.count(least) for least in (24, 12))
    told = dict(reader.setting() for _ in range(settings))
    entries = [reader.entry() for _ in range(tensors)]
    alignment = told.get(_ALIGNMENT, 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 16:
        raise reader.fail(f"an alignment of {alignment!r}"[:80])
    start = -(-reader.at // alignment) * alignment
    stored: dict[str, StoredTensor] = {}
    end = start
    for entry in sorted(entries, key=lambda each: each.offset):
        stop = start + entry.offset + entry.nbytes
        if stop > len(data):
            raise reader.fail(f"truncated, {entry.name!r} ends at byte {stop} of {len(data)}"[:200])
        if start + entry.offset < end or entry.offset % alignment or entry.name in stored:
            raise reader.fail(
                f"{entry.name!r} lies where another tensor is, or is named twice"[:200]
            )
        shape = told.get(_ORIGINAL + entry.name, entry.shape)
        if not isinstance(shape, tuple) or math.prod(shape) != math.prod(entry.shape):
            raise reader.fail(f"{entry.name!r} has shapes that differ"[:200])
        stored[entry.name] = _tensor(path, entry, shape, data[stop - entry.nbytes : stop])
        end = stop
    return stored


class _Entry(NamedTuple):
    """A tensor as it is announced: its shape in PyTorch's order, and where its data are."""

    name: str
    kind: _Kind
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.kind.block * self.kind.size


def _tensor(path: Path, entry: _Entry, shape: tuple[int, ...], data: np.ndarray) -> StoredTensor:
    name, block, size = entry.kind
    if name in FLOAT_TYPES:
        kind = FLOAT_TYPES[name]
        return StoredTensor(name, shape, lambda: data.view(kind).reshape(shape))
    rows = data.reshape(-1, max(entry.shape[-1] // block * size, 1))
    values = functools.partial(_dequantize, path, name)

    def cut(part: slice) -> np.ndarray:
        each = math.prod(shape[1:-1])
        new = (part.stop - part.start, *shape[1:])
        return values(rows[part.start * each : part.stop * each], new)

    whole = StoredTensor("F32", shape, lambda: values(rows, shape), name, size / block)
    return dataclasses.replace(whole, cut=cut) if shape == entry.shape[: len(shape)] else whole


def _dequantize(path: Path, name: str, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            f"{path} holds weights quantized as {name}, and reading them needs the package gguf. "
            "Install conceptax[gguf], or use the model's safetensors file."
        ) from error
    if not rows.size:
        return np.zeros(shape, np.float32)
    return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name]).reshape(shape)


class _Reader:
    """One pass over the part before the data; every length is checked before it is believed."""

    def __init__(self, path: Path, data: memoryview):
        self.path, self.data, self.at = path, data, 0

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is no GGUF file that can be read: {problem}, at byte {self.at}. Download "
            "or copy it again."
        )

    def take(self, size: int) -> memoryview:
        left = len(self.data) - self.at
        if size > left:
            raise self.fail(f"truncated, {size} bytes are announced and {left} are there")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def count(self, least: int) -> int:
        """A number of entries of at least so many bytes."""
        count = self.number("Q")
        if count > min(_COUNT, (len(self.data) - self.at) // least):
            raise self.fail(f"{count} entries are announced")
        return count

    def text(self, most: int | None = _NAME) -> str:
        size = self.number("Q")
        if most is not None and size > most:
            raise self.fail(f"a name of {size} bytes")
        try:
            return bytes(self.take(size)).decode()
        except UnicodeDecodeError:
            raise self.fail("a text that is not UTF-8") from None

    def setting(self) -> tuple[str, Any]:
        name = self.text()
        return name, self.value(self.number("I"))

    def value(self, kind: int, depth: int = 0) -> Any:
        """A setting's value; of a list only what may be a shape is kept."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            self.take(self.number("Q"))
            return None
        if kind != _LIST or depth > _DEPTH:
            raise self.fail(f"a setting of the unknown type {kind}, or too deep")
        inner, count = self.number("I"), self.number("Q")
        if inner in _NUMBERS:
            form = f"<{_NUMBERS[inner]}"
            values = self.take(count * struct.calcsize(form))
            return tuple(v for (v,) in struct.iter_unpack(form, values)) if count <= 8 else None
        if count > (len(self.data) - self.at) // 8:
            raise self.fail(f"{count} entries are announced")
        for _ in range(count):
            self.value(inner, depth + 1)
        return None

    def entry(self) -> _Entry:
        name, rank = self.text(), self.number("I")
        if rank > _RANK:
            raise self.fail(f"{rank} dimensions of {name!r}"[:200])
        shape = tuple(self.number("Q") for _ in range(rank))[::-1]  # the innermost comes first
        number, offset = self.number("I"), self.number("Q")
        kind = _KINDS.get(number, _Kind(f"type {number}"))
        if not kind.size:
            raise CheckpointError(
                f"{self.path}: {name[:200]!r} is quantized as {kind.name}, which is not read here; "
                f"{', '.join(_READ)} are."
            )
        most, last = 8 * len(self.data), shape[-1] if shape else 1
        if max(shape, default=0) > most or math.prod(shape) > most or last % kind.block:
            raise self.fail(f"{name!r} of shape {shape} in {kind.name}"[:200])
        return _Entry(name, kind, shape, offset)
