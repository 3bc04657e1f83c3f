"""Flax's `.msgpack` files: what diffusers up to 0.39, transformers 4 and maxdiffusion wrote.

The format (https://msgpack.org, flax.serialization): nested maps with text keys, whose leaves are
extensions of code 1 with a packed (shape, dtype's name, bytes); arrays above 2^30 bytes are maps of
flat chunks.  The file is walked without copying a tensor, and everything it claims is bounded: by
its own size, by a depth and by a number of values.

Names and layouts are PyTorch's when they leave this module: the converse of what diffusers did,
which wrote `down_blocks.0` as `down_blocks_0`, and kernels [in, out] or [h, w, in, out].
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import CheckpointError
from .safetensors_file import FLOAT_TYPES, ITEM_SIZES, Content, StoredTensor, mapped

_DEPTH = 32
_VALUES = 100_000  # SDXL's UNet has a fifth
_TEXT = 1 << 16
_RANK = 32
_ARRAY, _SCALAR = 1, 3  # extension codes of flax.serialization
_CHUNKED = "__msgpack_chunked_array__"
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "uint32": "U32",
    "bool": "BOOL",
}
# Lists of modules, whose members Flax numbers with an underscore.
_LISTS = (
    "down_blocks",
    "up_blocks",
    "attentions",
    "resnets",
    "downsamplers",
    "upsamplers",
    "transformer_blocks",
    "to_out",
    "net",
    "motion_modules",
    "layers",
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
    tree = reader.value(0, len(data), 0)
    if reader.at != len(data):
        raise CheckpointError(f"{path} has {len(data) - reader.at} bytes behind its end.")
    if not isinstance(tree, dict):
        raise CheckpointError(
            f"{path} must hold a map of named arrays, received {type(tree).__name__}."
        )
    if isinstance(tree.get("params"), dict):  # a training state
        tree = tree["params"]
    tensors: dict[str, StoredTensor] = {}
    _collect(path, data, tree, (), tensors)
    return tensors


def _collect(
    path: Path,
    data: np.ndarray,
    tree: dict[str, Any],
    parents: tuple[str, ...],
    tensors: dict[str, StoredTensor],
) -> None:
    for name, value in tree.items():
        here = (*parents, name)
        if isinstance(value, dict) and value.get(_CHUNKED) is True:
            value = _joined(path, here, value)
        if isinstance(value, dict):
            _collect(path, data, value, here, tensors)
            continue
        if not isinstance(value, _Array):
            raise CheckpointError(
                f"{path}: {'/'.join(here)[:200]} is {type(value).__name__}, expected an array."
            )
        key, tensor = _in_pytorch(here, _stored(data, value))
        if key in tensors:
            raise CheckpointError(f"{path} names {key[:200]} more than once.")
        tensors[key] = tensor


def _joined(path: Path, here: tuple[str, ...], value: dict[str, Any]) -> _Array:
    """An array that was stored in flat chunks."""

    def items(name: str) -> list[Any]:
        part = value.get(name)
        if isinstance(part, dict):  # numbered, as flax writes lists
            part = [part.get(str(number)) for number in range(len(part))]
        return part if isinstance(part, list) else []

    shape, chunks = items("shape"), items("chunks")
    arrays = [chunk for chunk in chunks if isinstance(chunk, _Array)]
    sizes = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape)
    if (
        not arrays
        or len(arrays) != len(chunks)
        or not sizes
        or len(shape) > _RANK
        or len({array.dtype for array in arrays}) > 1
        or sum(math.prod(array.shape) for array in arrays) != math.prod(shape)
    ):
        raise CheckpointError(f"{path}: the chunks of {'/'.join(here)[:200]} do not fit together.")
    spans = tuple(span for array in arrays for span in array.spans)
    return _Array(arrays[0].dtype, tuple(shape), spans)


def _stored(data: np.ndarray, array: _Array) -> StoredTensor:
    def read() -> np.ndarray:
        kind = FLOAT_TYPES[array.dtype]
        whole = np.concatenate([data[start:stop] for start, stop in array.spans])
        return whole.view(kind).reshape(array.shape)

    return StoredTensor(array.dtype, array.shape, read)


def _in_pytorch(path: tuple[str, ...], tensor: StoredTensor) -> tuple[str, StoredTensor]:
    """A parameter's name and layout in PyTorch."""
    if path[-1] == "value" and len(path) > 1:  # boxed with its logical axes, as maxdiffusion does
        path = path[:-1]
    parts: list[str] = []
    for part in path[:-1]:
        stem, _, number = part.rpartition("_")
        parts += [stem, number] if stem in _LISTS and number.isdecimal() else [part]
    leaf = path[-1]
    if leaf == "kernel" and len(tensor.shape) in (2, 4):
        axes = (1, 0) if len(tensor.shape) == 2 else (3, 2, 0, 1)
        shape = tuple(tensor.shape[axis] for axis in axes)
        old = tensor.read
        tensor = StoredTensor(
            tensor.dtype, shape, lambda: np.ascontiguousarray(old().transpose(axes))
        )
    leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    return ".".join([*parts, leaf]), tensor


class _Reader:
    """One pass over a file; every length is checked before it is believed."""

    def __init__(self, path: Path, data: memoryview):
        self.path = path
        self.data = data
        self.at = 0
        self.values = 0

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

    def value(self, start: int, end: int, depth: int) -> Any:
        """The value at `start`, which ends before `end`; moves behind it."""
        self.at = start
        self.values += 1
        if depth > _DEPTH:
            raise self.fail(f"nested deeper than {_DEPTH}")
        if self.values > _VALUES:
            raise self.fail(f"more than {_VALUES} values")
        kind = self.take(1, end)[0]
        if kind <= 0x7F or kind >= 0xE0:
            return kind if kind <= 0x7F else kind - 0x100
        if kind <= 0x8F:
            return self.read_map(kind & 0xF, end, depth)
        if kind <= 0x9F:
            return self.read_list(kind & 0xF, end, depth)
        if kind in (0xDE, 0xDF):
            return self.read_map(self.number(2 << (kind - 0xDE), end), end, depth)
        if kind in (0xDC, 0xDD):
            return self.read_list(self.number(2 << (kind - 0xDC), end), end, depth)
        if kind <= 0xBF:
            return self.read_text(kind & 0x1F, end)
        if 0xD9 <= kind <= 0xDB:
            return self.read_text(self.number(1 << (kind - 0xD9), end), end)
        if kind in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[kind]
        if 0xC4 <= kind <= 0xC6:
            return self.read_bytes(self.number(1 << (kind - 0xC4), end), end)
        if 0xCC <= kind <= 0xCF:
            return self.number(1 << (kind - 0xCC), end)
        if 0xD0 <= kind <= 0xD3:
            return self.number(1 << (kind - 0xD0), end, signed=True)
        if kind in (0xCA, 0xCB):
            return struct.unpack(
                ">f" if kind == 0xCA else ">d", self.take(4 << (kind - 0xCA), end)
            )[0]
        if 0xC7 <= kind <= 0xC9:
            return self.read_extension(self.number(1 << (kind - 0xC7), end), end, depth)
        if 0xD4 <= kind <= 0xD8:
            return self.read_extension(1 << (kind - 0xD4), end, depth)
        raise self.fail(f"an unknown type {kind:#x}")

    def announced(self, count: int, each: int, end: int) -> int:
        if count * each > end - self.at:
            raise self.fail(f"truncated, {count} entries are announced")
        return count

    def read_map(self, count: int, end: int, depth: int) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for _ in range(self.announced(count, 2, end)):
            key = self.value(self.at, end, depth + 1)
            if not isinstance(key, str):
                raise self.fail(f"a key that is {type(key).__name__}")
            if key in content:
                raise self.fail(f"the key {key[:80]!r} for the second time")
            content[key] = self.value(self.at, end, depth + 1)
        return content

    def read_list(self, count: int, end: int, depth: int) -> list[Any]:
        count = self.announced(count, 1, end)
        return [self.value(self.at, end, depth + 1) for _ in range(count)]

    def read_text(self, size: int, end: int) -> str:
        if size > _TEXT:
            raise self.fail(f"a text of {size} bytes")
        try:
            return bytes(self.take(size, end)).decode()
        except UnicodeDecodeError:
            raise self.fail("text that is not UTF-8") from None

    def read_bytes(self, size: int, end: int) -> range:
        """Where raw bytes are."""
        self.take(size, end)
        return range(self.at - size, self.at)

    def read_extension(self, size: int, end: int, depth: int) -> _Array:
        code = self.number(1, end, signed=True)
        start, stop = self.at, self.at + size
        if stop > end:
            raise self.fail(f"truncated, {size} bytes are announced")
        if code not in (_ARRAY, _SCALAR):
            raise self.fail(f"an extension of the unknown code {code}")
        content = self.value(start, stop, depth + 1)
        if self.at != stop or not isinstance(content, list) or len(content) != 3:
            raise self.fail("an array that is not (shape, type, bytes)")
        shape, dtype, span = content
        if not (
            isinstance(shape, list)
            and len(shape) <= _RANK
            and isinstance(dtype, str)
            and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape)
            and isinstance(span, range)
        ):
            raise self.fail("an array that is not (shape, type, bytes)")
        name = _DTYPES.get(dtype, dtype[:40])
        if name in ITEM_SIZES and math.prod(shape) * ITEM_SIZES[name] != len(span):
            raise self.fail(f"{len(span)} bytes for {dtype} of shape {shape}"[:200])
        return _Array(name, tuple(shape), ((span.start, span.stop),))
