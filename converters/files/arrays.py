"""Read one array from a file: .npy, or a pickle of it, of which nothing is executed.

Q16's prompts are published as a pickle of a numpy array.  A pickle may name any function; this
reader knows numpy's own constructors of arrays and refuses every other name.
"""

import codecs
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, first_line

_MOST = 64 << 20  # bytes of such a file


def _reconstruct(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """An empty array, which the pickle fills: what numpy's function of that name does."""
    if kind is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError("it makes something other than an array")
    return np.ndarray(shape, np.int8)


def _scalar_type(code: Any, align: Any = False, copy: Any = False) -> np.dtype:
    """A type of plain numbers."""
    kind = np.dtype(code)
    if kind.hasobject:
        raise pickle.UnpicklingError("its array holds objects")
    return kind


def _from_bytes(data: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
    """Numbers from their bytes."""
    if not isinstance(kind, np.dtype) or kind.hasobject:
        raise pickle.UnpicklingError("its array holds objects")
    return np.frombuffer(data, kind).reshape(shape, order=order)


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _scalar_type,
    ("_codecs", "encode"): codecs.encode,  # bytes, in pickles that Python 2 could read
    **{
        (module, "_reconstruct"): _reconstruct
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    },
    **{
        (module, "_frombuffer"): _from_bytes
        for module in ("numpy.core.numeric", "numpy._core.numeric")
    },
}


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which could run a program and is not loaded"
            )
        return _KNOWN[module, name]


def read_array(path: Path) -> np.ndarray:
    """The array of numbers in a .npy file, or in a pickle of an array or of lists of numbers.

    Raises:
      CheckpointError: absent, too large, damaged, or of something else.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    told = f"{path} is not a file of one array"
    if len(data) > _MOST:
        raise CheckpointError(f"{told}: it is larger than {_MOST >> 20} MiB.")
    try:
        if data.startswith(b"\x93NUMPY"):
            found = np.load(io.BytesIO(data), allow_pickle=False)
        else:
            found = np.asarray(_Arrays(io.BytesIO(data)).load())
    except Exception as error:  # a damaged pickle raises what it likes
        raise CheckpointError(f"{told}: {first_line(error)}. Take a fresh download.") from error
    if found.dtype.kind not in "fiu":
        raise CheckpointError(f"{told}: it holds {found.dtype}, and numbers are wanted.")
    return found
