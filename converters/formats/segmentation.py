"""Checkpoints of MAFT+ and FC-CLIP (detectron2 `.pth`) and of OpenCLIP's ConvNeXt models.

These are single files without a `config.json`: the sizes are read from the tensors' shapes.  A file
may be `.pth`, `.bin` or `.pt` (read with torch, nothing in it is executed) or `.safetensors`.
Models that are loaded here can be kept as folders with `save_pytorch`.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..errors import CheckpointError, OutputError
from ..files.output import atomic_file
from ..files.safetensors_file import PendingTensor, StoredTensor, write_safetensors
from ..files.weights import WeightFile, open_weights, opened
from ..parameters import OneKey, ShardingRule, fill, parameter_dtype, pending, put
from ..tensors import TensorSpec, match, tensor_specs

STUDENT, TEACHER = "backbone.clip_model.", "backbone_t.clip_model."
WRAPPERS = ("model", "state_dict")  # detectron2; open_clip while it trains
_TRANSFER = "cdt."
_CRITERION = "criterion.empty_weight"  # [K + 1]: ones, and the weight of void
_VOID_WEIGHT = 0.1

_SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")
_TOWER = "visual.trunk.stages."

Shapes = Mapping[str, tuple[int, ...]]


class Plan(NamedTuple):
    """What a file holds, told from names and shapes.

    Attributes:
      model_class: of the model.
      config: its settings.
      stored: tensors under the model's names, and others.
      without: beginning of the names of parameters that such a file does not hold, if any.
    """

    model_class: Callable[..., nnx.Module]
    config: Any
    stored: Mapping[str, StoredTensor]
    without: str = ""

    def specs(self, **options: Any) -> tuple[nnx.Module, list[TensorSpec]]:
        """The model in shapes only, and the tensors that it takes from the file."""
        rngs = OneKey()
        model = nnx.eval_shape(lambda: self.model_class(self.config, rngs=rngs, **options))
        specs = tensor_specs(model)
        return model, [s for s in specs if not (self.without and s.key.startswith(self.without))]

    def wanted(self, specs: Sequence[TensorSpec]) -> dict[str, StoredTensor]:
        """The tensors that the model has a place for."""
        keys = {spec.key for spec in specs}
        return {key: tensor for key, tensor in self.stored.items() if key in keys}


def loader_of(file: WeightFile) -> Callable[..., Any] | None:
    """Which of the loaders below takes a weight file without a `config.json`; None for any other.

    Raises:
      CheckpointError: damaged or unsafe files.
    """
    path = file.path
    if (path.parent / "config.json").is_file() or path.suffix not in _SUFFIXES:
        return None
    return _loader(open_weights(file, wrappers=WRAPPERS))


def _loader(keys: Iterable[str]) -> Callable[..., Any] | None:
    keys = [key.removeprefix("module.") for key in keys]
    if any(key.startswith(STUDENT + _TOWER) for key in keys):
        return load_maft_plus
    return load_open_clip if any(key.startswith(_TOWER) for key in keys) else None


def plan_of(file: WeightFile) -> Plan | None:
    """What a file of one of the loaders holds; None for any other.

    Raises:
      CheckpointError: damaged or unsafe files, or a tensor that tells a size is missing.
    """
    loader = loader_of(file)
    if loader is None:
        return None
    return _plan_maft_plus(file) if loader is load_maft_plus else _plan_open_clip(file)


def _plan_open_clip(file: WeightFile, prefix: str = "", config: Any = None) -> Plan:
    from ...flax_models.open_clip import OpenCLIP

    stored = open_weights(file, wrappers=WRAPPERS)
    stored = {key.removeprefix("module."): tensor for key, tensor in stored.items()}
    stored = {
        k.removeprefix(prefix): tensor for k, tensor in stored.items() if k.startswith(prefix)
    }
    return Plan(OpenCLIP, config or clip_config(_shapes(stored), source=str(file.path)), stored)


def _plan_maft_plus(
    file: WeightFile, form: str = "semantic", token_order: str = "reference", config: Any = None
) -> Plan:
    from ...flax_models.maft_plus import MaftPlus

    stored = open_weights(file, wrappers=WRAPPERS)
    has_transfer = any(key.startswith(_TRANSFER) for key in stored)
    if config is None:
        config = maft_plus_config(
            _shapes(stored),
            form=form if has_transfer else "panoptic",
            token_order=token_order,
            source=str(file.path),
        )
    return Plan(MaftPlus, config, stored, without="" if has_transfer else _TRANSFER)


def load_open_clip(
    path: Path | str | WeightFile,
    *,
    prefix: str = "",
    config: Any = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    sharding: ShardingRule = None,
) -> Any:
    """Load an OpenCLIP model with a ConvNeXt tower from its weight file, or from a larger one.

    Args:
      path: the file; `~` is expanded.
      prefix: what its keys begin with in this file: nothing in OpenCLIP's own, `STUDENT` or
        `TEACHER` in one of MAFT+.
      config: an `OpenCLIPConfig`; default: read from the shapes, with heads of 64 features.
      dtype: computation dtype.
      param_dtype: dtype to convert the parameters to; None keeps each as stored.
      sharding: where parameters go, as for `load_pytorch`.

    Returns:
      A `flax_models.open_clip.OpenCLIP`.

    Raises:
      CheckpointError: the file is absent, damaged, or of another architecture.
    """
    file = _existing(path)
    plan = _plan_open_clip(file, prefix, config)
    return _load(plan, str(file.path), dtype=dtype, param_dtype=param_dtype, sharding=sharding)


def load_maft_plus(
    path: Path | str | WeightFile,
    *,
    form: str = "semantic",
    token_order: str = "reference",
    config: Any = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    sharding: ShardingRule = None,
) -> Any:
    """Load MAFT+ or FC-CLIP from a detectron2 checkpoint.

    The teacher, the criterion, optimizer states and other things that no inference needs are passed
    over; `load_open_clip(path, prefix=TEACHER)` reads the teacher. FC-CLIP has no transfer: it gets
    one that leaves the text as it is, in the panoptic form.

    Args:
      path: the file; `~` is expanded.
      form, token_order: of the transfer, which the file does not tell; see
        `flax_models.maft_plus.ContentDependentTransfer`.
      config: a `MaftPlusConfig`, which then decides form and token order too; default: read from
        the shapes, with 8 heads everywhere, and heads of 64 features in the text tower.
      dtype, param_dtype, sharding: as for `load_open_clip`.

    Returns:
      A `flax_models.maft_plus.MaftPlus`.

    Raises:
      CheckpointError: the file is absent, damaged, or of another architecture; one message names
        everything that is missing or has another shape.
    """
    from ...flax_models.maft_plus import ContentDependentTransfer

    file = _existing(path)
    plan = _plan_maft_plus(file, form, token_order, config)
    model = _load(plan, str(file.path), dtype=dtype, param_dtype=param_dtype, sharding=sharding)
    if plan.without:
        config = plan.config
        model.cdt = ContentDependentTransfer(
            config.clip_config.embed_dim,
            config.transfer_heads,
            form="panoptic",
            token_order=config.token_order,
            dtype=dtype,
            param_dtype=parameter_dtype(plan.stored, param_dtype),
            rngs=nnx.Rngs(0),
        )
    return model


def save_maft_plus(
    model: Any,
    path: Path | str,
    *,
    teacher: Any = None,
    classes: int | None = None,
    force: bool = False,
) -> Path:
    """Write a model under the names of detectron2 checkpoints.

    Args:
      model: a `MaftPlus`.
      path: ends with `.pth` (a dict with the entry `model`, written with torch) or `.safetensors`.
      teacher: the original `OpenCLIP`, which training resumes with; left out if None.
      classes: of the training vocabulary, for the criterion's buffer; left out if None.
      force: replace an existing file.

    Returns:
      the file's path.

    Raises:
      OutputError: `path` is occupied or unwritable, or a parameter is NaN or infinite; nothing is
        left on disk.
      ValueError: another suffix.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"save_maft_plus writes .pth and .safetensors, received {path.name!r}.")
    tensors = pending(model, tensor_specs(model), None)
    if teacher is not None:
        tensors += [
            PendingTensor(TEACHER + tensor.key, tensor.dtype, tensor.shape, tensor.produce)
            for tensor in pending(teacher, tensor_specs(teacher), None)
        ]
    if classes is not None:
        weights = np.append(np.ones(classes, np.float32), np.float32(_VOID_WEIGHT))
        tensors.append(PendingTensor(_CRITERION, weights.dtype, weights.shape, lambda: weights))
    write = _write_pickle if path.suffix == ".pth" else write_safetensors
    with atomic_file(path, force=force) as partial:
        write(partial, tensors, {"format": "pt"})
    return path


def _existing(path: Path | str | WeightFile) -> WeightFile:
    if not isinstance(path, WeightFile) and not Path(path).expanduser().is_file():
        raise CheckpointError(f"{path} is not a file. Pass a checkpoint's weight file.")
    return opened(path)


def _shapes(stored: Mapping[str, StoredTensor]) -> Shapes:
    return {key: tensor.shape for key, tensor in stored.items()}


def _load(plan: Plan, source: str, *, dtype: Any, param_dtype: Any, sharding: ShardingRule) -> Any:
    """Build a model and fill it; tensors that it has no place for are passed over."""
    init_dtype = parameter_dtype(plan.stored, param_dtype)
    model, specs = plan.specs(dtype=dtype, param_dtype=init_dtype)
    tensors = match(
        specs,
        plan.wanted(specs),
        source=source,
        model_class=plan.model_class,
        double=param_dtype is not None,
    )
    place = functools.partial(put, rule=sharding)
    fill(model, specs, tensors, source=source, param_dtype=param_dtype, place=place)
    return model


def _write_pickle(path: Path, tensors: list[PendingTensor], metadata: Mapping[str, str]) -> None:
    del metadata
    try:
        import torch
    except ImportError as error:
        raise OutputError(
            "Writing a .pth file needs torch. Install conceptax[torch], or write .safetensors."
        ) from error

    def as_torch(tensor: PendingTensor) -> Any:
        values = tensor.produce()
        if values.dtype.name == "bfloat16":  # which NumPy does not know
            return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(np.array(values))

    torch.save({"model": {tensor.key: as_torch(tensor) for tensor in tensors}}, path)


# ---- sizes from shapes ----


def _count(shapes: Shapes, pattern: str) -> int:
    """How many numbers the pattern's group takes among the keys: 0, 1, ... without a gap."""
    found = (re.match(pattern, key) for key in shapes)
    numbers = {int(match.group(1)) for match in found if match}
    if numbers and max(numbers) >= len(numbers):
        raise ValueError(f"of the numbers to {max(numbers)} in {pattern} some are missing")
    return len(numbers)


def clip_config(shapes: Shapes, *, source: str) -> Any:
    """The `OpenCLIPConfig` of tensors with these shapes.

    Raises:
      CheckpointError: a tensor that tells a size is missing.
    """
    from ...flax_models.convnext import ConvNeXtConfig
    from ...flax_models.open_clip import OpenCLIPConfig, OpenCLIPTextConfig

    try:
        stages = [f"visual.trunk.stages.{n}.blocks." for n in range(4)]
        depths = tuple(_count(shapes, re.escape(stage) + r"(\d+)\.") for stage in stages)
        dims = tuple(shapes[f"{stage}0.norm.weight"][0] for stage in stages)
        width, embed_dim = shapes["text_projection"]
        text = OpenCLIPTextConfig(
            width=width,
            heads=max(width // 64, 1),
            layers=_count(shapes, r"transformer\.resblocks\.(\d+)\."),
            vocab_size=shapes["token_embedding.weight"][0],
            context_length=shapes["positional_embedding"][0],
        )
        projection = "linear" if "visual.head.proj.weight" in shapes else "mlp"
        return OpenCLIPConfig(text, ConvNeXtConfig(depths, dims), embed_dim, projection)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{source} holds no OpenCLIP model with a ConvNeXt tower ({error}). Pass the weights "
            "of convnext_base_w_320 or convnext_large_d_320, or a config."
        ) from error


def maft_plus_config(
    shapes: Shapes, *, form: str = "semantic", token_order: str = "reference", source: str
) -> Any:
    """The `MaftPlusConfig` of tensors with these shapes, with 8 heads.

    Raises:
      CheckpointError: a tensor that tells a size is missing.
    """
    from ...flax_models.maft_plus import MaftPlusConfig

    clip = clip_config(
        {k.removeprefix(STUDENT): shape for k, shape in shapes.items() if k.startswith(STUDENT)},
        source=source,
    )
    pixel, predictor = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
    encoder = f"{pixel}transformer.encoder.layers."
    heads = 8
    try:
        weights = shapes[f"{encoder}0.self_attn.attention_weights.weight"]
        queries, width = shapes[f"{predictor}query_feat.weight"]
        return MaftPlusConfig.of(
            clip,
            form=form,
            token_order=token_order,
            hidden_dim=width,
            heads=heads,
            num_points=weights[0] // (3 * heads),
            encoder_layers=_count(shapes, re.escape(encoder) + r"(\d+)\."),
            encoder_ffn=shapes[f"{encoder}0.linear1.weight"][0],
            decoder_layers=_count(
                shapes, re.escape(predictor) + r"transformer_ffn_layers\.(\d+)\."
            ),
            decoder_ffn=shapes[f"{predictor}transformer_ffn_layers.0.linear1.weight"][0],
            num_queries=queries,
        )
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{source} is no checkpoint of MAFT+ or FC-CLIP ({error}). Pass a detectron2 file such "
            "as maftp_b.pth, or a config."
        ) from error
