"""Single files of CompVis's latent diffusion (`.ckpt`, `.safetensors`): SD 1, SD 2 and SDXL.

Such a file holds the UNet, the autoencoder and the text encoders under the names of the training
code, and no settings: `compvis_parts` reads the sizes from the tensors' shapes. SD 1 and SDXL are
also written.
"""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from . import architectures
from .components import build
from .compvis_names import (
    PROJECTIONS,
    TEXT_ENCODERS,
    UNET,
    VAE,
    Names,
    TextEncoder,
    open_clip_names,
    renamed,
    split_projection,
    vae_names,
)
from .compvis_parts import (
    Part,
    Shapes,
    Stored,
    heads,
    is_single_file,
    read_single_file,
    unet_config,
    unet_names_of,
    vae_config,
)
from .errors import CheckpointError, OutputError, listing
from .output import atomic_file
from .parameters import ShardingRule, pending, put
from .safetensors_file import PendingTensor, write_safetensors
from .tensors import tensor_specs
from .tokenizer import read_tokenizer
from .weights import open_weights

WRAPPERS = ("state_dict",)
_SUFFIXES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")
_PREDICTIONS = ("epsilon", "v_prediction")
_PIPELINES = {"SDXL": "StableDiffusionXLPipeline"}


# ---- in ----


def open_single_file(path: Path) -> Stored | None:
    """The tensors of a file if it is a single file of several models; None for any other.

    Raises:
      CheckpointError: damaged or unsafe files.
    """
    if path.suffix not in _SUFFIXES or not path.is_file():
        return None
    stored = open_weights(path, wrappers=WRAPPERS if path.suffix != ".safetensors" else ())
    return stored if is_single_file(stored) else None


def load_single_file(
    path: Path | str,
    *,
    tokenizer: Path | str | None = None,
    prediction_type: str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    sharding: ShardingRule = None,
    components: Collection[str] | None = None,
    stored: Stored | None = None,
) -> Any:
    """Load a Stable Diffusion 1.x, 2.x or XL model from a single file.

    Copies that training keeps beside the models (moving averages, the noise schedule and others)
    are passed over; `inspect_checkpoint` names them.

    Args:
      path: the file, `.safetensors` or a pickle, which needs torch; nothing in it is executed.
      tokenizer: folder of the tokenizer, which such files lack: that of any Stable Diffusion
        folder; default: the folder `tokenizer` beside the file. Where there is neither, the
        pipeline has none, and a warning says so. SDXL's second one is the same, padding with "!".
      prediction_type: what the UNet predicts, "epsilon" or "v_prediction"; default: the latter for
        SD 2, with a warning, because the published files for 512 pixels ("base") do the former and
        nothing in them tells.
      dtype, param_dtype, sharding, components: as for `load_pytorch`.
      stored: the file's tensors, where it has been opened before.

    Returns:
      A `StableDiffusionPipeline`, or a `StableDiffusionXLPipeline`.

    Raises:
      CheckpointError: damaged or unsafe files, missing or unexpected tensors, another family.
    """
    path = Path(path).expanduser()
    if prediction_type not in (None, *_PREDICTIONS):
        raise ValueError(f"prediction_type accepts {_PREDICTIONS}, received {prediction_type!r}.")
    if stored is None and (stored := open_single_file(path)) is None:
        raise CheckpointError(
            f"{path} is no single file of Stable Diffusion: no tensor begins with {UNET} or {VAE}."
        )
    file = read_single_file(stored, str(path))
    index = {"_class_name": _PIPELINES.get(file.family, "StableDiffusionPipeline")}
    kind = architectures.pipeline_class(index["_class_name"])
    accepted = (*kind.MODELS, *kind.TOKENIZERS, "scheduler")
    wanted = set(accepted if components is None else components)
    if not wanted <= set(accepted):
        raise ValueError(f"components accepts {accepted}, received {sorted(wanted)}.")
    if file.unknown:
        raise CheckpointError(
            f"{path} does not fit {file.family}: {len(file.unknown)} unexpected: "
            f"{listing(file.unknown)}. It holds another model, or more than one."
        )
    parts: dict[str, Any] = dict.fromkeys(accepted[:-1])
    for name in kind.MODELS:
        if name not in wanted:
            continue
        if name not in file.parts:
            raise CheckpointError(
                f"{path} holds no {name} (found {listing(sorted(file.parts))}). Pass components= "
                "with the parts to load."
            )
        part = file.parts[name]
        parts[name] = build(
            architectures.model_class(part.class_name, str(path)), part.raw, part.tensors,
            source=f"{path} ({name})", file=f"{path} ({name})", dtype=dtype,
            param_dtype=param_dtype, model_options={},
            place=functools.partial(put, rule=sharding, prefix=(name,)),
        )  # fmt: skip
    if wanted & set(kind.TOKENIZERS):
        first = _tokenizer(path, tokenizer, file.parts.get("text_encoder"))
        second = copy.deepcopy(first)
        if second is not None:
            second.pad_token = "!"  # as in the published folders
        both = {"tokenizer": first, "tokenizer_2": second}
        parts |= {name: both[name] for name in kind.TOKENIZERS if name in wanted}
    scheduler = _scheduler(path, file.family, prediction_type) if "scheduler" in wanted else {}
    return kind(**parts, scheduler_config=scheduler, model_index=index)


def _tokenizer(path: Path, folder: Path | str | None, text: Part | None) -> Any:
    beside = path.parent / "tokenizer"
    if folder is None and not beside.is_dir():
        warnings.warn(
            f"{path} holds no tokenizer, and no folder 'tokenizer' is beside it: pass tokenizer=, "
            "the folder of one, to draw from prompts or to train.",
            stacklevel=3,
        )
        return None
    folder = beside if folder is None else Path(folder).expanduser()
    tokenizer = read_tokenizer(folder)
    if text is not None and len(tokenizer) > text.raw["vocab_size"]:
        raise CheckpointError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, but the text encoder in "
            f"{path} embeds only {text.raw['vocab_size']}. Use the one that belongs to it."
        )
    return tokenizer


def _scheduler(path: Path, family: str, prediction_type: str | None) -> dict[str, Any]:
    """The noise schedule that all Stable Diffusion models were trained with."""
    if prediction_type is None and family == "SD 2":
        warnings.warn(
            f"{path} does not tell what its UNet predicts: 'v_prediction' is assumed, as for 768 "
            "pixels; pass prediction_type='epsilon' for the base models.",
            stacklevel=3,
        )
        prediction_type = "v_prediction"
    config = {
        "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085,
        "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
        "set_alpha_to_one": False, "steps_offset": 1,
        "prediction_type": prediction_type or "epsilon",
    }  # fmt: skip
    if family == "SDXL":
        for name in ("clip_sample", "set_alpha_to_one"):
            del config[name]
        config |= {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    return config


# ---- out ----


def save_single_file(
    pipeline: Any, path: Path | str, *, dtype: Any = None, force: bool = False
) -> Path:
    """Write a Stable Diffusion 1.x or XL pipeline as one `.safetensors` with CompVis's names.

    Args:
      pipeline: a `StableDiffusionPipeline` or `StableDiffusionXLPipeline`; parts that are None are
        left out, and so are tokenizers and the scheduler, for which such files have no place.
      path: the file; its folder exists.
      dtype: dtype to store (float32, float16, bfloat16); None keeps each parameter's own.
      force: replace an existing file.

    Raises:
      OutputError: `path` is occupied or unwritable, a parameter is NaN or infinite, the text
        encoder is that of SD 2, whose last layer diffusers' folders lack, or a setting is another
        than readers of such files assume, who would take the model for one that it is not.
    """
    path, kind = Path(path).expanduser(), None if dtype is None else np.dtype(dtype)
    family = "SDXL" if "text_encoder_2" in pipeline.MODELS else "SD 1"
    tensors = []
    if pipeline.unet is not None:
        names = unet_names_of(pipeline.unet.config.to_dict())
        per_level = ("attention_head_dim", "layers_per_block", "transformer_layers_per_block")
        _require_told(pipeline.unet, unet_config, names, per_level)
        tensors += _named(pipeline.unet, UNET, names, kind)
    if pipeline.vae is not None:
        config = pipeline.vae.config
        names = vae_names(len(config.block_out_channels), config.layers_per_block)
        _require_told(pipeline.vae, functools.partial(vae_config, family=family), names)
        tensors += _named(pipeline.vae, VAE, names, kind)
    for encoder in TEXT_ENCODERS[family]:
        if (model := getattr(pipeline, encoder.component)) is not None:
            tensors += _text(model, encoder, kind)
    with atomic_file(path, force=force) as partial:
        write_safetensors(partial, tensors, {"format": "pt"})
    return path


def _require_told(
    model: Any,
    read: Callable[[Shapes], dict[str, Any]],
    names: Names,
    per_level: Sequence[str] = (),
) -> None:
    """Refuse a model whose settings are not those that its shapes are taken to tell."""
    back = {new: old for old, new in names.items()}
    shapes = {renamed(spec.key, back) or spec.key: spec.shape for spec in tensor_specs(model)}
    config = model.config
    try:
        told = type(config).from_dict(read(shapes))
    except (KeyError, IndexError, ValueError) as error:
        raise OutputError(
            f"a single file cannot hold this model: {error} Write a folder."
        ) from error
    differing = [
        f"{field.name}={getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if field.name != "sample_size"
        and (
            told.per_block(field.name) != config.per_block(field.name)
            if field.name in per_level
            else getattr(told, field.name) != getattr(config, field.name)
        )
    ]
    if differing:
        raise OutputError(
            f"a single file cannot tell {listing(differing)}, and readers would assume otherwise. "
            "Write a folder."
        )


def _named(model: Any, prefix: str, names: Names, dtype: np.dtype | None) -> list[PendingTensor]:
    back = {new: old for old, new in names.items()}
    tensors = []
    for each in pending(model, tensor_specs(model), dtype):
        old = renamed(each.key, back)
        if old is None:
            raise OutputError(f"{each.key} has no place in a single file. Write a folder.")
        shape = each.shape
        if ".attn_1." in old and len(shape) == 2:
            shape = (*shape, 1, 1)
        produce = functools.partial(_reshape, each, shape)
        tensors.append(PendingTensor(prefix + old, each.dtype, shape, produce))
    return tensors


def _text(model: Any, encoder: TextEncoder, dtype: np.dtype | None) -> list[PendingTensor]:
    config = model.config
    activation = "gelu" if encoder.open_clip else "quick_gelu"
    if config.hidden_act != activation:
        raise OutputError(
            f"only Stable Diffusion 1.x and XL are written as a single file: this "
            f"{encoder.component} is of another family ({config.hidden_act}, not {activation}). "
            "Write a folder."
        )
    if config.num_attention_heads != heads(config.hidden_size):
        raise OutputError(
            f"a single file cannot tell num_attention_heads={config.num_attention_heads}, and "
            f"readers would assume {heads(config.hidden_size)}. Write a folder."
        )
    tensors = pending(model, tensor_specs(model), dtype)
    if not encoder.open_clip:
        return [dataclasses.replace(each, key=encoder.prefix + each.key) for each in tensors]
    back = {new: old for old, new in open_clip_names(config.num_hidden_layers).items()}
    named, projections = [], dict[str, dict[str, PendingTensor]]()
    for each in tensors:
        key = each.key.removeprefix("text_model.")
        if place := split_projection(key):
            projections.setdefault(place[0], {})[place[1]] = each
            continue
        if key == "text_projection.weight":
            transpose = functools.partial(_transpose, each)
            each = dataclasses.replace(each, shape=each.shape[::-1], produce=transpose)
        named.append(dataclasses.replace(each, key=f"{encoder.prefix}{renamed(key, back)}"))
    for key, parts in projections.items():
        three = [parts[name] for name in PROJECTIONS]
        shape = (3 * three[0].shape[0], *three[0].shape[1:])
        produce = functools.partial(_join, three)
        named.append(PendingTensor(encoder.prefix + key, three[0].dtype, shape, produce))
    return named


def _join(tensors: Sequence[PendingTensor]) -> np.ndarray:
    return np.concatenate([each.produce() for each in tensors])


def _transpose(tensor: PendingTensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.produce().T)


def _reshape(tensor: PendingTensor, shape: tuple[int, ...]) -> np.ndarray:
    return tensor.produce().reshape(shape)
