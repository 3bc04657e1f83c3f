"""Checkpoints of MAFT+ and FC-CLIP (detectron2 `.pth`) and of OpenCLIP's ConvNeXt models.

These are single files without a `config.json`: the sizes are read from the tensors' shapes.  A file
may be `.pth`, `.bin` or `.pt` (read with torch, nothing in it is executed) or `.safetensors`.
Models that are loaded here can be kept as folders with `save_pytorch`.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..errors import CheckpointError
from ..files.output import atomic_file
from ..files.safetensors_file import PendingTensor, StoredTensor, write_safetensors
from ..files.weights import WeightFile, open_weights, opened, save_pickle
from ..parameters import OneKey, ShardingRule, fill, parameter_dtype, pending
from ..tensors import TensorSpec, tensor_specs

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

    @property
    def shapes(self) -> Shapes:
        """Of all that is stored."""
        return {key: tensor.shape for key, tensor in self.stored.items()}

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

    def load(self, source: str, *, dtype: Any, param_dtype: Any, sharding: ShardingRule) -> Any:
        """Build a model and fill it; tensors that it has no place for are passed over."""
        init_dtype = parameter_dtype(self.stored, param_dtype)
        model, specs = self.specs(dtype=dtype, param_dtype=init_dtype)
        options = {"source": source, "param_dtype": param_dtype, "sharding": sharding}
        fill(model, self.wanted(specs), specs=specs, **options)
        return model


def loader_of(file: WeightFile) -> Callable[..., Any] | None:
    """Which of the loaders below takes a weight file without a `config.json`; None for any other.

    Raises:
      CheckpointError: damaged or unsafe files.
    """
    path = file.path
    if (path.parent / "config.json").is_file() or path.suffix not in _SUFFIXES:
        return None
    keys = [key.removeprefix("module.") for key in open_weights(file, wrappers=WRAPPERS)]
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

    stored = {}
    for name, tensor in open_weights(file, wrappers=WRAPPERS).items():
        key = name.removeprefix("module.")
        if key.startswith(prefix):
            stored[key.removeprefix(prefix)] = tensor
    plan = Plan(OpenCLIP, config, stored)
    return plan._replace(config=config or clip_config(plan.shapes, source=str(file.path)))


def _plan_maft_plus(
    file: WeightFile, form: str = "semantic", token_order: str = "reference", config: Any = None
) -> Plan:
    from ...flax_models.maft_plus import MaftPlus

    stored = open_weights(file, wrappers=WRAPPERS)
    plan = Plan(MaftPlus, config, stored)
    if not any(key.startswith(_TRANSFER) for key in stored):
        plan, form = plan._replace(without=_TRANSFER), "panoptic"
    if config is None:
        told = {"form": form, "token_order": token_order, "source": str(file.path)}
        plan = plan._replace(config=maft_plus_config(plan.shapes, **told))
    return plan


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
    types = {"dtype": dtype, "param_dtype": param_dtype, "sharding": sharding}
    return _plan_open_clip(file, prefix, config).load(str(file.path), **types)


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
    types = {"dtype": dtype, "param_dtype": param_dtype, "sharding": sharding}
    model = plan.load(str(file.path), **types)
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
        for each in pending(teacher, tensor_specs(teacher), None):
            tensors.append(dataclasses.replace(each, key=TEACHER + each.key))
    if classes is not None:
        weights = np.append(np.ones(classes, np.float32), np.float32(_VOID_WEIGHT))
        tensors.append(PendingTensor.of(_CRITERION, weights))
    with atomic_file(path, force=force) as partial:
        if path.suffix == ".pth":
            save_pickle(partial, {"model": {each.key: each.produce() for each in tensors}})
        else:
            write_safetensors(partial, tensors, {"format": "pt"})
    return path


def _existing(path: Path | str | WeightFile) -> WeightFile:
    if not isinstance(path, WeightFile) and not Path(path).expanduser().is_file():
        raise CheckpointError(f"{path} is not a file. Pass a checkpoint's weight file.")
    return opened(path)


# ---- sizes from shapes ----


def _count(shapes: Shapes, pattern: str) -> int:
    """How many numbers the pattern's group takes among the keys: 0, 1, ... without a gap."""
    found = (re.match(pattern, key) for key in shapes)
    numbers = {int(match.group(1)) for match in found if match}
    if numbers and max(numbers) >= len(numbers):
        raise ValueError(f"of the numbers to {max(numbers)} in {pattern} some are missing")
    return len(numbers)


@contextlib.contextmanager
def _told(source: str, what: str, advice: str) -> Iterator[None]:
    """Errors of reading sizes from shapes, as one of the checkpoint."""
    try:
        yield
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{source} {what} ({error}). Pass {advice}, or a config.") from error


def clip_config(shapes: Shapes, *, source: str) -> Any:
    """The `OpenCLIPConfig` of tensors with these shapes.

    Raises:
      CheckpointError: a tensor that tells a size is missing.
    """
    from ...flax_models.convnext import ConvNeXtConfig
    from ...flax_models.open_clip import OpenCLIPConfig, OpenCLIPTextConfig

    what = "holds no OpenCLIP model with a ConvNeXt tower"
    with _told(source, what, "the weights of convnext_base_w_320 or convnext_large_d_320"):
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


def maft_plus_config(
    shapes: Shapes, *, form: str = "semantic", token_order: str = "reference", source: str
) -> Any:
    """The `MaftPlusConfig` of tensors with these shapes, with 8 heads.

    Raises:
      CheckpointError: a tensor that tells a size is missing.
    """
    from ...flax_models.maft_plus import MaftPlusConfig

    clip = {k.removeprefix(STUDENT): shape for k, shape in shapes.items() if k.startswith(STUDENT)}
    clip_part = clip_config(clip, source=source)
    predictor = "sem_seg_head.predictor."
    encoder = "sem_seg_head.pixel_decoder.transformer.encoder.layers."
    decoder, heads = f"{predictor}transformer_ffn_layers.", 8
    what, advice = "is no checkpoint of MAFT+ or FC-CLIP", "a detectron2 file such as maftp_b.pth"
    with _told(source, what, advice):
        weights = shapes[f"{encoder}0.self_attn.attention_weights.weight"]
        queries, width = shapes[f"{predictor}query_feat.weight"]
        return MaftPlusConfig.of(
            clip_part,
            form=form,
            token_order=token_order,
            hidden_dim=width,
            heads=heads,
            num_points=weights[0] // (3 * heads),
            encoder_layers=_count(shapes, re.escape(encoder) + r"(\d+)\."),
            encoder_ffn=shapes[f"{encoder}0.linear1.weight"][0],
            decoder_layers=_count(shapes, re.escape(decoder) + r"(\d+)\."),
            decoder_ffn=shapes[f"{decoder}0.linear1.weight"][0],
            num_queries=queries,
        )
