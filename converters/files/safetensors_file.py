"""Safetensors files, memory-mapped for reading and written one tensor at a time.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length, a JSON
header `{name: {"dtype", "shape", "data_offsets"}, "__metadata__": {str: str}}`, then the tensors,
C-ordered and without gaps; all of it little endian.

Mapped pages belong to the file and not to the process, so a checkpoint can be read without a second
copy of it in memory.  The views returned here stay valid only while the file keeps its content:
copy out of them before returning to the caller.
"""

import contextlib
import dataclasses
import errno
import json
import math
import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeGuard

import jax
import ml_dtypes
import numpy as np

from ...flax_models.streaming import mapping
from ..errors import CheckpointError

# Floating-point types that parameters have, under their names in the format.
PARAMETER_TYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# And those that are read to be converted to one of them.
FLOAT_TYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    **PARAMETER_TYPES,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
FLOAT_NAMES = {dtype: name for name, dtype in FLOAT_TYPES.items()}
# Types that are read too, though no parameter has them: alphas of LoRA files.
_INTEGERS = {
    f"{kind.upper()}{8 * size}": np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)
}
TYPES = FLOAT_TYPES | _INTEGERS
# NumPy's names, which are torch's and Flax's too, -> those of the format.
NUMPY_NAMES = {dtype.name: name for name, dtype in TYPES.items()} | {"bool": "BOOL"}
# Bytes per element of everything else a file may hold; a type not listed is not checked further.
ITEM_SIZES = {name: dtype.itemsize for name, dtype in TYPES.items()} | {
    "BOOL": 1,
    "C64": 8,
}
_MAX_HEADER = 100_000_000  # the reference implementation's limit
_AGAIN = "Download or copy it again."
# Bytes written at once; Linux takes several times as long for large pieces of a mapped file.
_PIECE = 1 << 17
# What the system says that does not copy between two files by itself.
_NO_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor on disk.

    Attributes:
      dtype: name of the type that is read.
      shape: its sizes.
      read: maps its values.
      kept: of a quantized tensor, whose values are converted as they are read, what it is in the
        file.
      width: of such a tensor, bytes of a number in the file.
      cut: converts some rows of such a tensor alone.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    kept: str = ""
    width: float = 0.0
    cut: Callable[[slice], np.ndarray] | None = None

    @classmethod
    def of(cls, values: np.ndarray) -> "StoredTensor":
        """Floating-point values in memory, as if they were in a file."""
        return cls(FLOAT_NAMES[values.dtype], values.shape, lambda: values)

    def then(self, shape: tuple[int, ...], change: Callable[[Any], np.ndarray]) -> "StoredTensor":
        """The tensor of that shape which `change` makes of the values once they are read."""
        read = lambda: change(self.read())  # noqa: E731
        return dataclasses.replace(self, shape=shape, read=read, cut=None)

    def rows(self, part: slice) -> "StoredTensor":
        """Some rows of it, from a start to a stop."""
        shape, cut = (part.stop - part.start, *self.shape[1:]), self.cut
        if cut is None:
            return self.then(shape, lambda values: values[part])
        return dataclasses.replace(self, shape=shape, read=lambda: cut(part), cut=None)

    @property
    def bytes_each(self) -> float:
        """Bytes of a number in the file; 0 where its type is not known."""
        return float(self.width or ITEM_SIZES.get(self.dtype, 0))


@dataclasses.dataclass(frozen=True, slots=True)
class PendingTensor:
    """A tensor to be written: `produce` is called once, when its turn comes."""

    key: str
    dtype: np.dtype
    shape: tuple[int, ...]
    produce: Callable[[], np.ndarray]

    @classmethod
    def of(cls, key: str, values: np.ndarray) -> "PendingTensor":
        """Values that are there already."""
        return cls(key, values.dtype, values.shape, lambda: values)

    def then(
        self, key: str, shape: tuple[int, ...], change: Callable[[Any], np.ndarray]
    ) -> "PendingTensor":
        """The tensor of another name and shape which `change` makes of the values."""
        return PendingTensor(key, self.dtype, shape, lambda: change(self.produce()))

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


class _Mapped(mmap.mmap):
    """A mapped file that knows its descriptor."""

    descriptor: int | None = None


Content = mmap.mmap | bytes  # of a file


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object from untrusted bytes; a repeated key is an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) != len(pairs):
            names = [name for name, _ in pairs]
            repeated = sorted({name for name in names if names.count(name) > 1})
            raise CheckpointError(f"{what} names {repeated[0]!r} more than once. {_AGAIN}")
        return seen

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON ({error}). {_AGAIN}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{what} must be a JSON object, received {type(parsed).__name__}.")
    return parsed


def is_shape(value: Any) -> TypeGuard[list[int]]:
    """Whether an untrusted value is a list of counts."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_entry(path: Path, key: str, entry: Any, data_size: int) -> tuple[int, int]:
    """The byte range of one header entry, after checking everything about it."""
    damaged = f"{path}: the header entry of {key!r}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{damaged} is not an object. {_AGAIN}")
    dtype, shape, offsets = (entry.get(name) for name in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and is_shape(shape) and is_shape(offsets) and len(offsets) == 2):
        told = f"{damaged} needs a dtype, a shape and two data_offsets, received {entry}"
        raise CheckpointError(f"{told[:400]}. {_AGAIN}")
    start, stop = offsets
    if stop > data_size:
        raise CheckpointError(
            f"{path} is truncated: {key!r} ends at byte {stop} of the data, "
            f"but only {data_size} bytes are there. {_AGAIN}"
        )
    size = math.prod(shape) * ITEM_SIZES[dtype] if dtype in ITEM_SIZES else stop - start
    if start > stop or stop - start != size:
        raise CheckpointError(
            f"{damaged} gives {stop - start} bytes to a {dtype} tensor of shape {shape}, "
            f"which takes {size}. {_AGAIN}"
        )
    return start, stop


def mapped(path: Path) -> Content:
    """The bytes of a file, mapped: nothing else opens files of weights, but for torch.

    Raises:
      CheckpointError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            if not file.seek(0, 2):
                return b""
            content = _Mapped(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(os, "copy_file_range"):
                content.descriptor = os.dup(file.fileno())
                weakref.finalize(content, os.close, content.descriptor)
            return content
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def _header(path: Path, content: Content) -> tuple[dict[str, Any], np.ndarray]:
    """The parsed header, and the bytes behind it."""
    data = np.frombuffer(content, np.uint8)
    size, length = len(data), int.from_bytes(data[:8].tobytes(), "little")
    problem = ""
    if size < 8:
        problem = f"truncated: a safetensors file has at least 8 bytes, this has {size}"
    elif length > _MAX_HEADER or data[8:9].tobytes() not in (b"{", b""):
        problem = (
            "not a safetensors file: it does not start with a header of at most "
            f"{_MAX_HEADER} bytes"
        )
    elif 8 + length > size:
        problem = f"truncated: its header takes {length} bytes, but the file has only {size}"
    if problem:
        raise CheckpointError(f"{path} is {problem}. {_AGAIN}")
    header = parse_json(data[8 : 8 + length].tobytes(), f"{path}: the header")
    return header, data[8 + length :]


def begins_as_safetensors(start: bytes) -> bool:
    """Whether a file's first bytes are the length of a header, of at most 4 GiB, and its brace."""
    return start[4:9] == b"\0\0\0\0{"


def read_metadata(path: Path, content: Content) -> dict[str, str]:
    """The free text in the header of a file with this content, by name.

    Raises:
      CheckpointError: not a safetensors file.
    """
    metadata = _header(path, content)[0].get("__metadata__")
    entries = metadata.items() if isinstance(metadata, dict) else ()
    return {name: text for name, text in entries if isinstance(text, str)}


def open_safetensors(path: Path, content: Content | None = None) -> dict[str, StoredTensor]:
    """Map a file and check its header completely, without touching the data.

    Args:
      path: the file.
      content: its bytes, where they are mapped already.

    Returns:
      Tensor name -> stored tensor; its `read()` is a read-only view into the mapped file, whose
      type is one of `FLOAT_TYPES` or an integer (other types are listed, but cannot be read).

    Raises:
      CheckpointError: not a safetensors file, truncated, or with an inconsistent header.
    """
    header, data = _header(path, mapped(path) if content is None else content)
    header.pop("__metadata__", None)

    end = 0
    ranges = {key: _check_entry(path, key, entry, len(data)) for key, entry in header.items()}
    for key, (start, stop) in sorted(ranges.items(), key=lambda item: item[1]):
        if start != end:
            problem = "overlaps the one before it" if start < end else "leaves a gap before it"
            raise CheckpointError(f"{path}: the data of {key!r} {problem}. {_AGAIN}")
        end = stop
    if end != len(data):
        raise CheckpointError(
            f"{path} has {len(data) - end} bytes that belong to no tensor. {_AGAIN}"
        )

    def stored(dtype: str, shape: list[int], values: np.ndarray) -> StoredTensor:
        def read() -> np.ndarray:
            if dtype not in FLOAT_TYPES | _INTEGERS:
                raise CheckpointError(f"{path} holds {dtype}, which is not read here.")
            return values.view((FLOAT_TYPES | _INTEGERS)[dtype]).reshape(shape)

        return StoredTensor(dtype, tuple(shape), read)

    return {
        key: stored(header[key]["dtype"], header[key]["shape"], data[start:stop])
        for key, (start, stop) in ranges.items()
    }


def file_order(tensors: Iterable[PendingTensor]) -> list[PendingTensor]:
    """The order in which tensors are written: widest type first, so that all are aligned."""
    return sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.key))


def write_safetensors(
    path: Path, tensors: Iterable[PendingTensor], metadata: Mapping[str, str]
) -> None:
    """Write a file tensor by tensor; the bytes depend on the content alone.

    Of several processes the first one writes; the others help to gather what is spread over them.

    Raises:
      OSError: what the file system reports; the file is then incomplete.
    """
    ordered, offset = file_order(tensors), 0
    if jax.process_index() > 0:
        for tensor in ordered:
            tensor.produce()
        return
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for tensor in ordered:
        header[tensor.key] = {
            "dtype": NUMPY_NAMES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    written = 0
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor, values in _made(ordered):
            received = f"{values.dtype}{values.shape}"
            if received != f"{tensor.dtype}{tensor.shape}":
                raise AssertionError(f"{tensor.key}: {received} was not announced")
            data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            for start in range(_copy(data, file), len(data), _PIECE):
                file.write(data.data[start : start + _PIECE])
            written += len(data)
            if (tell := _teller.get()) is not None:
                tell(path, written, offset)
            del values, data  # before the next one is made


# Told of a file how many bytes of how many are written.
Teller = Callable[[Path, int, int], None]
_teller: ContextVar[Teller | None] = ContextVar("teller", default=None)


@contextlib.contextmanager
def telling(teller: Teller) -> Iterator[None]:
    """While this is entered, whatever writes such files tells how far it is."""
    token = _teller.set(teller)
    try:
        yield
    finally:
        _teller.reset(token)


def _made(ordered: list[PendingTensor]) -> Iterator[tuple[PendingTensor, np.ndarray]]:
    """Tensors with their values, each made while the one before it is written."""
    if jax.process_count() > 1:  # all gather the same one
        return ((tensor, tensor.produce()) for tensor in ordered)
    return ahead(lambda tensor: tensor.produce(), ordered, 1)


def _copy(data: np.ndarray, file: Any) -> int:
    """Have the system copy bytes of a mapped file into another one; returns how many it did."""
    source, start = mapping(data)
    descriptor, done = getattr(source, "descriptor", None), 0
    if descriptor is None or len(data) < _PIECE:
        return 0
    file.flush()
    try:
        while done < len(data):
            copied = os.copy_file_range(
                descriptor, file.fileno(), len(data) - done, offset_src=start + done
            )
            if not copied:
                break
            done += copied
    except OSError as error:
        if error.errno not in _NO_COPY:
            raise
    return done


def ahead(
    function: Callable[[Any], Any], items: Iterable[Any], threads: int
) -> Iterator[tuple[Any, Any]]:
    """Each item with what a function makes of it, in order; threads make one each meanwhile."""
    with ThreadPoolExecutor(threads, thread_name_prefix="conceptax-tensors") as pool:
        waiting = deque[Any]()

        def first() -> tuple[Any, Any]:
            item, made = waiting.popleft()
            return item, made.result()

        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > threads:
                yield first()
        while waiting:
            yield first()
