"""Build one model from its published settings and its stored tensors."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from flax import nnx

from ..flax_models import streaming
from ..flax_models.pretrained import Published
from .errors import CheckpointError
from .files.safetensors_file import StoredTensor
from .parameters import OneKey, fill, parameter_dtype

_LAYERS = 1024  # of one setting


def abstract(
    model_class: Any, raw: Mapping[str, Any], *, source: str, **options: Any
) -> nnx.Module:
    """A model of shapes only.

    Args:
      model_class: the class, whose `config_class` reads `raw`.
      raw: the settings, as in a `config.json`.
      source: what to call those settings in messages.
      options: further arguments of the class, `dtype` and `param_dtype` among them.

    Raises:
      CheckpointError: settings of no model that can be built.
    """
    if crowd := _too_many(raw):
        raise CheckpointError(f"{source}: {crowd} is more layers than any model has.")
    try:
        config = model_class.config_class.from_dict(raw)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    rngs = OneKey()
    try:
        return nnx.eval_shape(lambda: model_class(config, rngs=rngs, **options))
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        told = ", ".join(
            f"{name}={value!r}" for name, value in options.items() if not name.endswith("dtype")
        )
        raise CheckpointError(
            f"{source} describes no model that can be built{told and f' with {told}'}: {error}"
        ) from error


def _too_many(raw: Mapping[str, Any]) -> str:
    """A setting that asks for absurdly many layers, which take a moment each to make."""
    for name, value in raw.items():
        if isinstance(value, Mapping) and (found := _too_many(value)):
            return found
        values = value if isinstance(value, list | tuple) else [value]
        counts = [v for v in values if isinstance(v, int) and ("layer" in name or "depth" in name)]
        if len(values) > _LAYERS or any(count > _LAYERS for count in counts):
            return f"{name}={value!r}"[:80]
    return ""


def build(
    model_class: Any,
    raw: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    *,
    source: str,
    file: str,
    dtype: Any,
    param_dtype: Any,
    model_options: Mapping[str, Any] = MappingProxyType({}),
    stream: bool = False,
    **options: Any,
) -> Any:
    """A model with the values of stored tensors.

    Args:
      model_class, raw, source: as for `abstract`.
      stored: the tensors, by PyTorch's names.
      file: what to call them in messages.
      dtype, param_dtype, model_options: as `load_pytorch` has them.
      stream: leave the model's blocks in the file, if it has any.
      options: `sharding` and `prefix`, as for `fill`.

    Raises:
      CheckpointError: settings of no model, or tensors that do not fit it.
    """
    kinds = {"dtype": dtype, "param_dtype": parameter_dtype(stored, param_dtype)}
    model: Any = abstract(model_class, raw, source=source, **kinds, **model_options)
    stream = stream and hasattr(model_class, "BLOCKS")
    if stream:
        options["sharding"] = "streamed"
    unread = fill(model, stored, source=file, param_dtype=param_dtype, **options)
    model.published_config = Published(json.dumps(raw), unread)
    return streaming.stream(model) if stream else model
