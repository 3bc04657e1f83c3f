"""Flax's `.msgpack` files: what diffusers up to 0.39, transformers 4 and maxdiffusion wrote.

The format (https://msgpack.org, flax.serialization): nested maps with text keys, whose leaves are
extensions of code 1 with a packed (shape, dtype's name, bytes); arrays above 2^30 bytes are maps of
flat chunks.  The file is walked without copying a tensor, and everything it claims is bounded: by
its own size, by a depth and by a number of values.

Names and layouts are PyTorch's when they leave this module: the converse of what diffusers did,
which wrote `down_blocks.0` as `down_blocks_0`, and kernels [in, out] or [h, w, in, out].
"""

import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import CheckpointError
from .safetensors_file import (
    FLOAT_TYPES,
    ITEM_SIZES,
    NUMPY_NAMES,
    Content,
    StoredTensor,
    is_shape,
    mapped,
)

_DEPTH = 32
_VALUES = 100_000  # SDXL's UNet has a fifth
_TEXT = 1 << 16
_RANK = 32
_ARRAY, _SCALAR = 1, 3  # extension codes of flax.serialization
_CHUNKED = "__msgpack_chunked_array__"
# Members of lists of modules, which Flax numbers with an underscore.
_MEMBER = re.compile(
    r"((?:down|up|transformer)_blocks|attentions|resnets|(?:down|up)samplers|to_out|net"
    r"|motion_modules|layers)_(\d+)"
)
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
# Kinds of values: first and last of their first bytes, what they are, and how many bytes hold the
# size or number behind the first byte, twice as many behind each next one; 0: it is in the byte.
_KINDS = (
    (0x00, 0x7F, "number", 0),
    (0x80, 0x8F, "map", 0),
    (0x90, 0x9F, "list", 0),
    (0xA0, 0xBF, "text", 0),
    (0xC4, 0xC6, "bytes", 1),
    (0xC7, 0xC9, "extension", 1),
    (0xCA, 0xCB, "float", 4),
    (0xCC, 0xCF, "number", 1),
    (0xD0, 0xD3, "signed", 1),
    (0xD4, 0xD8, "short extension", 0),
    (0xD9, 0xDB, "text", 1),
    (0xDC, 0xDD, "list", 2),
    (0xDE, 0xDF, "map", 2),
    (0xE0, 0xFF, "negative", 0),
)


class _Array(NamedTuple):
    """An array in the file: type's name, shape, and its bytes' ranges, in order."""

    dtype: str
    shape: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


def open_flax(path: Path, content: Content | None = None) -> dict[str, StoredTensor]:
    """The tensors of a file, under PyTorch's names and in its layout; their values stay on disk.

    Args:
      path: the file.
      content: its bytes, where they are mapped already.

    Raises:
      CheckpointError: not such a file, truncated, or with anything else than named arrays in it.
    """
    data = np.frombuffer(mapped(path) if content is None else content, np.uint8)
    if not len(data):
        raise CheckpointError(f"{path} is truncated: it is empty. Download or copy it again.")
    reader = _Reader(path, data.data)
    tree = reader.value(len(data))
    if reader.at != len(data):
        raise CheckpointError(f"{path} has {len(data) - reader.at} bytes behind its end.")
    if not isinstance(tree, dict):
        raise CheckpointError(
            f"{path} must hold a map of named arrays, received {type(tree).__name__}."
        )
    if isinstance(tree.get("params"), dict):  # a training state
        tree = tree["params"]
    tensors: dict[str, StoredTensor] = {}
    for place, array in _arrays(path, tree):
        key, tensor = _in_pytorch(place, data, array)
        if key in tensors:
            raise CheckpointError(f"{path} names {key[:200]} more than once.")
        tensors[key] = tensor
    return tensors


def _arrays(
    path: Path, tree: dict[str, Any], parents: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], _Array]]:
    """The leaves of a tree, each with the names that lead to it."""
    for name, value in tree.items():
        here = (*parents, name)
        if isinstance(value, dict) and value.get(_CHUNKED) is True:
            value = _joined(path, here, value)
        if isinstance(value, dict):
            yield from _arrays(path, value, here)
        elif isinstance(value, _Array):
            yield here, value
        else:
            raise CheckpointError(
                f"{path}: {'/'.join(here)[:200]} is {type(value).__name__}, expected an array."
            )


def _joined(path: Path, here: tuple[str, ...], value: dict[str, Any]) -> _Array:
    """An array that was stored in flat chunks."""

    def items(name: str) -> list[Any]:
        part = value.get(name)
        if isinstance(part, dict):  # numbered, as flax writes lists
            part = [part.get(str(number)) for number in range(len(part))]
        return part if isinstance(part, list) else []

    shape, chunks = items("shape"), items("chunks")
    arrays = [chunk for chunk in chunks if isinstance(chunk, _Array)]
    if (
        not arrays
        or len(arrays) != len(chunks)
        or not is_shape(shape)
        or len(shape) > _RANK
        or len({array.dtype for array in arrays}) > 1
        or sum(math.prod(array.shape) for array in arrays) != math.prod(shape)
    ):
        raise CheckpointError(f"{path}: the chunks of {'/'.join(here)[:200]} do not fit together.")
    spans = tuple(span for array in arrays for span in array.spans)
    return _Array(arrays[0].dtype, tuple(shape), spans)


def _in_pytorch(path: tuple[str, ...], data: np.ndarray, array: _Array) -> tuple[str, StoredTensor]:
    """A parameter's name and layout in PyTorch."""
    if path[-1] == "value" and len(path) > 1:  # boxed with its logical axes, as maxdiffusion does
        path = path[:-1]
    parents, leaf = path[:-1], path[-1]
    rank = len(array.shape)
    axes = {2: (1, 0), 4: (3, 2, 0, 1)}.get(rank) if leaf == "kernel" else None

    def read() -> np.ndarray:
        whole = np.concatenate([data[start:stop] for start, stop in array.spans])
        values = whole.view(FLOAT_TYPES[array.dtype]).reshape(array.shape)
        return values if axes is None else np.ascontiguousarray(values.transpose(axes))

    leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    names = [_MEMBER.sub(r"\1.\2", part) if _MEMBER.fullmatch(part) else part for part in parents]
    shape = tuple(array.shape[axis] for axis in axes or range(rank))
    return ".".join([*names, leaf]), StoredTensor(array.dtype, shape, read)


class _Reader:
    """One pass over a file; every length is checked before it is believed."""

    def __init__(self, path: Path, data: memoryview):
        self.path, self.data = path, data
        self.at = self.values = 0

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not a msgpack file of Flax: {problem} at byte {self.at}. Download or "
            "copy it again."
        )

    def take(self, size: int, end: int) -> memoryview:
        if size > end - self.at:
            raise self.fail(f"truncated, {size} bytes are announced and {end - self.at} are there")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, size: int, end: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(size, end), "big", signed=signed)

    def value(self, end: int, depth: int = 0) -> Any:
        """The value here, which ends before `end`; moves behind it."""
        self.values += 1
        if depth > _DEPTH:
            raise self.fail(f"nested deeper than {_DEPTH}")
        if self.values > _VALUES:
            raise self.fail(f"more than {_VALUES} values")
        first = self.number(1, end)
        if first in _CONSTANTS:
            return _CONSTANTS[first]
        for start, last, what, width in _KINDS:
            if start <= first <= last:
                return self.of_kind(what, first - start, width << (first - start), end, depth)
        raise self.fail(f"an unknown type {first:#x}")

    def of_kind(self, what: str, inside: int, width: int, end: int, depth: int) -> Any:
        """A value of a kind, given the number inside its first byte and how many bytes follow."""
        if what == "float":
            return struct.unpack(">f" if width == 4 else ">d", self.take(width, end))[0]
        size = self.number(width, end, signed=what == "signed") if width else inside
        match what:
            case "number" | "signed":
                return size
            case "negative":
                return size - 32
            case "map":
                return self.read_map(size, end, depth)
            case "list":
                self.announced(size, 1, end)
                return [self.value(end, depth + 1) for _ in range(size)]
            case "text":
                return self.read_text(size, end)
            case "bytes":  # where they are
                self.take(size, end)
                return range(self.at - size, self.at)
        return self.read_extension(size if what == "extension" else 1 << size, end, depth)

    def announced(self, count: int, each: int, end: int) -> None:
        if count * each > end - self.at:
            raise self.fail(f"truncated, {count} entries are announced")

    def read_map(self, count: int, end: int, depth: int) -> dict[str, Any]:
        self.announced(count, 2, end)
        content: dict[str, Any] = {}
        for _ in range(count):
            key = self.value(end, depth + 1)
            if not isinstance(key, str):
                raise self.fail(f"a key that is {type(key).__name__}")
            if key in content:
                raise self.fail(f"the key {key[:80]!r} for the second time")
            content[key] = self.value(end, depth + 1)
        return content

    def read_text(self, size: int, end: int) -> str:
        if size > _TEXT:
            raise self.fail(f"a text of {size} bytes")
        try:
            return bytes(self.take(size, end)).decode()
        except UnicodeDecodeError:
            raise self.fail("text that is not UTF-8") from None

    def read_extension(self, size: int, end: int, depth: int) -> _Array:
        code = self.number(1, end, signed=True)
        stop = self.at + size
        if stop > end:
            raise self.fail(f"truncated, {size} bytes are announced")
        if code not in (_ARRAY, _SCALAR):
            raise self.fail(f"an extension of the unknown code {code}")
        content = self.value(stop, depth + 1)
        parts = content if isinstance(content, list) and len(content) == 3 else ("", 0, 0)
        shape, dtype, span = parts
        if (
            self.at != stop
            or not is_shape(shape)
            or len(shape) > _RANK
            or not isinstance(dtype, str)
            or not isinstance(span, range)
        ):
            raise self.fail("an array that is not (shape, type, bytes)")
        name = NUMPY_NAMES.get(dtype, dtype[:40])
        if name in ITEM_SIZES and math.prod(shape) * ITEM_SIZES[name] != len(span):
            raise self.fail(f"{len(span)} bytes for {dtype} of shape {shape}"[:200])
        return _Array(name, tuple(shape), ((span.start, span.stop),))
