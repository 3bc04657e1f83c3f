"""Fill a model's parameters from stored tensors, and write them out."""

import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from ..flax_models.abstract import OneKey as OneKey  # for whoever builds a model to fill
from ..flax_models.pretrained import Published
from ..flax_models.streaming import Deferred, aligned_copy
from .errors import CheckpointError, OutputError, TypeToConvert, counted, listing
from .files.safetensors_file import (
    FLOAT_NAMES,
    FLOAT_TYPES,
    PARAMETER_TYPES,
    TYPES,
    PendingTensor,
    StoredTensor,
    ahead,
)
from .tensors import Path, TensorSpec, compare, is_finite, tensor_specs, turned, variables

# "mapped" leaves parameters in the file: NumPy views of it, which take no memory of their own.
# So does "streamed", for whoever checks that they are finite when they are read, and those that are
# converted as they are read, being quantized, it leaves there too, as `Deferred`.
ShardingRule = (
    Sharding
    | Callable[[Path, tuple[int, ...]], Sharding | None]
    | Literal["mapped", "streamed"]
    | None
)


CONVERT = (
    "Convert such weights: conceptax convert SOURCE DEST --dtype float32 (param_dtype= in Python)."
)


def fill(
    model: Any,
    stored: Mapping[str, StoredTensor],
    *,
    source: str,
    specs: Sequence[TensorSpec] | None = None,
    param_dtype: Any = None,
    sharding: ShardingRule = None,
    prefix: Path = (),
) -> dict[str, StoredTensor]:
    """Give an abstract model its parameters, the largest first: all, or none.

    A thread for each processor checks and turns one at a time; this one hands them to JAX.

    Args:
      model: of shapes only; it is changed.
      stored: the tensors, by PyTorch's names.
      source: what to call them in messages.
      specs: of the parameters to fill; default: all.
      param_dtype, sharding: as for `load_pytorch`.
      prefix: of the path that a sharding rule is asked about.

    Returns:
      name -> stored tensor, for those that the model has and does not read.

    Raises:
      CheckpointError: names every tensor that is missing, unexpected, of another shape or type, or
        not finite.
    """
    specs, double = tensor_specs(model) if specs is None else specs, param_dtype is not None
    found, problems, unread = compare(specs, stored, model, double=double)
    if problems:
        kind, advice = CheckpointError, "Check that config.json and the weights belong together."
        others = FLOAT_TYPES.keys() - PARAMETER_TYPES.keys()
        if not double and any(tensor.dtype in others for tensor in found.values()):
            kind, advice = TypeToConvert, CONVERT
        raise kind(f"{source} does not fit {type(model).__name__}: {counted(problems)}. {advice}")
    slots = variables(model)
    broken, placed = [], []
    if sharding == "streamed":
        for spec in specs:
            if found[spec.key].kept:
                slots[spec.path].set_value(_deferred(spec, found[spec.key]))
        specs = [spec for spec in specs if not found[spec.key].kept]
    prepare = functools.partial(_prepared, found, source, param_dtype, sharding)
    largest_first = sorted(specs, key=lambda s: -math.prod(s.shape))
    for spec, values in ahead(prepare, largest_first, min(os.cpu_count() or 1, 8)):
        if values is None:
            broken.append(spec.key)
        elif not broken:
            array = _put((*prefix, *spec.path), values, sharding)
            slots[spec.path].set_value(array)
            placed.append(array)
    if broken:
        raise CheckpointError(
            f"{source}: {len(broken)} tensors hold NaN or infinite values: "
            f"{listing(sorted(broken))}. The checkpoint is damaged or its training diverged; use "
            "another one."
        )
    jax.block_until_ready(placed)  # a transfer may still be reading the mapped file
    if param_dtype is None:
        return unread
    kind = np.dtype(param_dtype)
    return {name: _stored_as(kind, name, tensor, source) for name, tensor in unread.items()}


def _deferred(spec: TensorSpec, tensor: StoredTensor) -> Deferred:
    shape = tuple(tensor.shape[axis] for axis in spec.axes)
    kind = np.dtype(FLOAT_TYPES[tensor.dtype])
    return Deferred(shape, kind, lambda: spec.to_nnx(tensor.read()))


def _prepared(
    found: Mapping[str, StoredTensor],
    source: str,
    param_dtype: Any,
    sharding: ShardingRule,
    spec: TensorSpec,
) -> np.ndarray | None:
    """A parameter's values in NNX's layout as `_put` takes them; None where one is no number."""
    values, dtype = found[spec.key].read(), found[spec.key].dtype
    if sharding != "streamed" and not is_finite(values, dtype):
        return None
    if param_dtype is not None and values.dtype != param_dtype:
        values = _convert(values, np.dtype(param_dtype), f"{source}: {spec.key}")
    return turned(values, spec.axes) if sharding is None else spec.to_nnx(values)


def _stored_as(dtype: np.dtype, name: str, tensor: StoredTensor, source: str) -> StoredTensor:
    """A tensor in another type, once it is read; integers stay as they are."""
    if FLOAT_TYPES.get(tensor.dtype, dtype) == dtype:
        return tensor
    read = lambda: _convert(tensor.read(), dtype, f"{source}: {name}")  # noqa: E731
    return StoredTensor(FLOAT_NAMES[dtype], tensor.shape, read)


def replaced(model: Any, tensors: Iterable[tuple[TensorSpec, np.ndarray]]) -> Any:
    """A copy of a model with some tensors, in PyTorch's layout, of its own dtypes and shardings."""
    copy = nnx.clone(model)
    slots = variables(copy)
    for spec, values in tensors:
        old = slots[spec.path].get_value()
        new = spec.to_nnx(values).astype(old.dtype, order="C")
        slots[spec.path].set_value(jax.device_put(new, getattr(old, "sharding", None)))
    return copy


def changed(
    edited: Any, original: Any, name: str = "model"
) -> Iterator[tuple[TensorSpec, np.ndarray, np.ndarray]]:
    """Each parameter in which a model differs from its original, with both values in NNX's layout.

    Raises:
      ValueError: the models differ in their parameters' names or shapes.
    """
    specs = tensor_specs(edited)
    shapes = {spec.path: spec.shape for spec in specs}
    if original is None or shapes != {s.path: s.shape for s in tensor_specs(original)}:
        raise ValueError(f"the edited {name} and the original are not of one architecture.")
    new, old = variables(edited), variables(original)
    for spec in specs:
        after, before = (on_host(slots[spec.path].get_value()) for slots in (new, old))
        if not np.array_equal(after, before):
            yield spec, after, before


def parameter_dtype(stored: Mapping[str, StoredTensor], param_dtype: Any) -> np.dtype:
    """`param_dtype`, or the type that most of a checkpoint's tensors have and keep, or float32."""
    kinds = Counter(tensor.dtype for tensor in stored.values() if tensor.dtype in PARAMETER_TYPES)
    return np.dtype(param_dtype or PARAMETER_TYPES[kinds.most_common(1)[0][0] if kinds else "F32"])


def _convert(values: np.ndarray, dtype: np.dtype, source: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        converted = values.astype(dtype, order="C")
    if not is_finite(converted, FLOAT_NAMES[dtype]):
        raise CheckpointError(
            f"{source} has values too large for {dtype.name}. Convert to bfloat16 or float32."
        )
    return converted


def _put(path: Path, view: np.ndarray, rule: ShardingRule) -> Any:
    """Put a view of a mapped file onto its devices; nothing there shares its memory.

    Where there is no rule, `view` is a copy already, of which JAX takes the memory.
    """
    if isinstance(rule, str):
        return view
    sharding = rule(path, view.shape) if callable(rule) else rule
    if sharding is None:
        return jax.device_put(view if rule is None else _detached(view))
    return jax.make_array_from_callback(
        view.shape, sharding, lambda index: _detached(view[(*(index or ()), ...)])
    )


def _detached(view: np.ndarray) -> np.ndarray:
    """What JAX may be given: it adopts C-contiguous memory instead of copying it, and copies (and
    transposes, faster than NumPy) everything else."""
    return aligned_copy(view) if view.flags.c_contiguous else view


def pending(model: Any, specs: Iterable[TensorSpec], dtype: np.dtype | None) -> list[PendingTensor]:
    """The tensors of some of a model's parameters, under their names on disk."""
    slots = variables(model)
    prefix = getattr(model, "pytorch_prefix", "")
    tensors = []
    for spec in specs:
        array = slots[spec.path].get_value()
        kind = np.dtype(array.dtype) if dtype is None else dtype
        if kind not in PARAMETER_TYPES.values():
            raise OutputError(
                f"{spec.key} is {kind}, which is not stored as a weight. Convert it to float32."
            )
        produce = functools.partial(_export, spec, array, kind)
        tensors.append(PendingTensor(prefix + spec.key, kind, spec.shape, produce))
    return tensors


def pending_unread(model: Any, dtype: np.dtype | None) -> list[PendingTensor]:
    """The tensors that a model's checkpoint had beside what it reads, under their names there."""
    tensors = []
    for name, tensor in getattr(model, "published_config", Published("{}")).unread.items():
        if dtype is not None:
            tensor = _stored_as(dtype, name, tensor, "the checkpoint")
        produce = functools.partial(_unread, name, tensor)
        tensors.append(PendingTensor(name, TYPES[tensor.dtype], tensor.shape, produce))
    return tensors


def _unread(name: str, tensor: StoredTensor) -> np.ndarray:
    values = tensor.read()
    if tensor.dtype in FLOAT_TYPES:
        check_finite(values, name)
    return values


def _export(spec: TensorSpec, array: Any, dtype: np.dtype) -> np.ndarray:
    """One parameter in PyTorch's layout, on the host, C-contiguous."""
    if _is_split(array):  # put together in its final layout: one tensor, not two
        values = np.empty(spec.shape, array.dtype)
        _collect(array, spec.to_nnx(values))
    else:
        values = spec.to_torch(on_host(array))
        if not values.flags.c_contiguous:
            values = np.ascontiguousarray(values)
    check_finite(values, spec.key)
    return values if values.dtype == dtype else _convert(values, dtype, spec.key)


def check_finite(values: np.ndarray, name: str) -> None:
    """Refuse to write values that no file of weights keeps; `OutputError`."""
    if values.dtype not in FLOAT_NAMES:
        raise OutputError(
            f"{name} is {values.dtype}, which is not stored as a weight. Convert it to float32."
        )
    if not is_finite(np.ascontiguousarray(values), FLOAT_NAMES[values.dtype]):
        raise OutputError(
            f"{name} holds NaN or infinite values, so nothing was written. The training has "
            "diverged: lower its learning rate, or go back to an earlier state."
        )


def _host() -> jax.Device:
    return jax.local_devices(backend="cpu")[0]


def on_host(array: Any) -> np.ndarray:
    """Values of an array on any devices; unlike `np.asarray`, leaves no cached copy behind."""
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(jax.device_put(array.addressable_shards[0].data, _host()))
    if not array.is_fully_addressable:  # all processes come here, each for the same parameter
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    whole = np.empty(array.shape, array.dtype)
    _collect(array, whole)
    return whole


def _is_split(array: Any) -> bool:
    """Whether an array lies in parts on devices of this process."""
    return (
        isinstance(array, jax.Array)
        and array.is_fully_addressable
        and not array.is_fully_replicated
    )


def _collect(array: jax.Array, whole: np.ndarray) -> None:
    """Write the parts of an array into one of its shape."""
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            whole[shard.index] = np.asarray(jax.device_put(shard.data, _host()))
