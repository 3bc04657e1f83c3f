"""The one table between NNX parameters and PyTorch tensors, and what follows from it.

Attribute paths of our models are PyTorch's state-dict paths, so a parameter's key follows from its
path, and its layout from the type of the module that owns it.  Loading and exporting read the same
list of `TensorSpec`, made by walking the model.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from ..flax_models.streaming import aligned_empty
from .files.safetensors_file import FLOAT_TYPES, PARAMETER_TYPES, TYPES, StoredTensor

_SAME = lambda rank: tuple(range(rank))  # noqa: E731
_REVERSED = lambda rank: tuple(range(rank))[::-1]  # noqa: E731  [out, in] -> [in, out]
# [out, in, *spatial] -> [*spatial, in, out]
_SPATIAL_FIRST = lambda rank: (*range(2, rank), 1, 0)  # noqa: E731

# (module type, leaf) -> (PyTorch's leaf, PyTorch's axes in NNX's order).  Parameters of other
# modules (raw `nnx.Param` attributes) keep name and layout.
LEAVES = {
    (nnx.Linear, "kernel"): ("weight", _REVERSED),
    (nnx.Conv, "kernel"): ("weight", _SPATIAL_FIRST),
    (nnx.Embed, "embedding"): ("weight", _SAME),
    **{(norm, "scale"): ("weight", _SAME) for norm in (nnx.LayerNorm, nnx.GroupNorm, nnx.RMSNorm)},
    **{
        (layer, "bias"): ("bias", _SAME)
        for layer in (nnx.Linear, nnx.Conv, nnx.LayerNorm, nnx.GroupNorm)
    },
}

Path = tuple[Any, ...]  # attribute names and list indices


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """One parameter: where it is in each world and how the axes correspond.

    Attributes:
      key: PyTorch state-dict key, without the model's on-disk prefix.
      path: attribute path in the NNX model.
      shape: PyTorch's shape.
      axes: `nnx = torch.transpose(axes)`.
    """

    key: str
    path: Path
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    def to_nnx(self, tensor: np.ndarray) -> np.ndarray:
        """View of a PyTorch tensor in NNX layout."""
        return tensor.transpose(self.axes)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """View of an NNX array in PyTorch layout."""
        return array.transpose(np.argsort(self.axes))


def variables(model: nnx.Module) -> dict[Path, nnx.Variable]:
    """Everything that is stored, by attribute path; random state is not."""
    return {
        path: node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState)
    }


def _rule(owner: Any, leaf: str | int):
    for kind in type(owner).__mro__:
        if (kind, leaf) in LEAVES:
            return LEAVES[kind, leaf]
    if type(owner).__module__.startswith("flax.nnx.nn."):
        raise TypeError(
            f"The converter has no rule for nnx.{type(owner).__name__}.{leaf}: add it to LEAVES."
        )
    return str(leaf), _SAME


def tensor_specs(model: nnx.Module) -> list[TensorSpec]:
    """The specification of a model, abstract or not, sorted by key."""
    owners = dict(nnx.iter_graph(model))
    specs = []
    for path, variable in variables(model).items():
        *parents, leaf = path
        torch_leaf, order = _rule(owners[tuple(parents)], leaf)
        shape = tuple(variable.get_value().shape)
        axes = order(len(shape))
        torch_shape = tuple(shape[i] for i in np.argsort(axes)) if axes else ()
        key = ".".join([*map(str, parents), torch_leaf])
        specs.append(TensorSpec(key, path, torch_shape, axes))
    return sorted(specs, key=lambda spec: spec.key)


class Comparison(NamedTuple):
    """What a checkpoint has of a model.

    Attributes:
      found: key -> stored tensor, for the model's keys that are there.
      problems: kind of problem -> the names of tensors, sorted; empty if all is well.
      unread: name on disk -> stored tensor, for those that belong to it and are not read.
    """

    found: dict[str, StoredTensor]
    problems: dict[str, list[str]]
    unread: dict[str, StoredTensor]


def compare(
    specs: Sequence[TensorSpec],
    stored: Mapping[str, StoredTensor],
    model: Any,
    *,
    double: bool,
) -> Comparison:
    """Pair every parameter with its tensor, by names, shapes and types alone.

    Args:
      specs: the model's specification.
      stored: what the checkpoint holds.
      model: it, or its class, declares, all optional, `pytorch_prefix`, `pytorch_renames`,
        patterns `pytorch_ignored` of names that are dropped and `pytorch_unread` of keys that are
        kept, and `pytorch_tied`, a second name of a tensor -> its own, which is read where both
        are.
      double: whether types that no parameter keeps (float64, those of 8 bits) may be converted.
    """
    prefix = getattr(model, "pytorch_prefix", "")
    renames = getattr(model, "pytorch_renames", {})
    ignored = getattr(model, "pytorch_ignored", ())
    kept = getattr(model, "pytorch_unread", ())
    tied = getattr(model, "pytorch_tied", {})
    accepted = FLOAT_TYPES if double else PARAMETER_TYPES
    expected = {spec.key: spec for spec in specs}

    found: dict[str, StoredTensor] = {}
    names: dict[str, str] = {}  # key -> its name on disk
    unread: dict[str, StoredTensor] = {}
    unexpected, repeated, misshaped, mistyped = [], [], [], []
    for name, tensor in stored.items():
        bare = name.removeprefix(prefix)
        renamed = ".".join(renames.get(part, part) for part in bare.split("."))
        key = next((key for key in (name, bare, renamed) if key in expected), None)
        if key is None and name in tied:
            if tied[name] in stored:
                continue
            key = tied[name]
        if key is None:
            if any(fnmatch.fnmatchcase(bare, pattern) for pattern in kept):
                unread[name] = tensor
                if tensor.dtype not in (accepted if tensor.dtype in FLOAT_TYPES else TYPES):
                    mistyped.append(f"{name} ({tensor.dtype})")
            elif not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored):
                unexpected.append(name)
        elif key in found:
            repeated.append(f"{names[key]} and {name}")
        else:
            found[key], names[key] = tensor, name
            if tensor.shape != (shape := expected[key].shape):
                misshaped.append(f"{name} {list(tensor.shape)} instead of {list(shape)}")
            if tensor.dtype not in accepted:
                mistyped.append(f"{name} ({tensor.dtype})")
    problems = {
        "missing": [prefix + key for key in expected if key not in found],
        "unexpected": unexpected,
        "stored twice": repeated,
        "of the wrong shape": misshaped,
        f"of the wrong type (accepted: {', '.join(accepted)})": mistyped,
    }
    told = {kind: sorted(names) for kind, names in problems.items() if names}
    return Comparison(found, told, unread)


_INFINITY = {  # the least bits that are no number
    "F16": 0x7C00,
    "BF16": 0x7F80,
    "F32": 0x7F800000,
    "F64": 0x7FF0000000000000,
    "F8_E4M3": 0x7F,
    "F8_E5M2": 0x7C,
}
_CHUNK = 1 << 18  # stays in a processor's cache


def is_finite(values: np.ndarray, dtype: str) -> bool:
    """Whether a C-contiguous float array has neither NaN nor infinity, in constant memory.

    As integers, the bits of positive numbers grow up to infinity and NaN behind it; so do those of
    negative ones, all of which are larger where the sign bit counts as a digit.
    """
    size = FLOAT_TYPES[dtype].itemsize
    unsigned, signed = (values.reshape(-1).view(f"{kind}{size}") for kind in "ui")
    infinity = _INFINITY[dtype]
    negative = infinity | 1 << (8 * size - 1)
    pieces = (slice(start, start + _CHUNK) for start in range(0, unsigned.size, _CHUNK))
    return all(
        int(unsigned[piece].max()) < negative and int(signed[piece].max()) < infinity
        for piece in pieces
    )


_OUTER, _INNER = 64, 256  # [out, in * spatial] of a block that stays in a processor's cache


def turned(tensor: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """A C-contiguous copy of `tensor.transpose(axes)`, in memory that JAX adopts.

    Matrices and the weights of convolutions are turned in blocks, which takes half the time.
    """
    own = aligned_empty(tuple(tensor.shape[axis] for axis in axes), tensor.dtype)
    if len(axes) < 2 or axes != _SPATIAL_FIRST(len(axes)) or not tensor.size:
        own[...] = tensor.transpose(axes)
        return own
    rows, columns = tensor.shape[:2]
    source, target = tensor.reshape(rows, columns, -1), own.reshape(-1, columns, rows)
    width = max(_INNER // source.shape[2], 1)
    for row in range(0, rows, _OUTER):
        for column in range(0, columns, width):
            block = np.s_[row : row + _OUTER], np.s_[column : column + width]
            target[:, block[1], block[0]] = source[block].T
    return own
