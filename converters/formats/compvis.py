"""Single files (`.ckpt`, `.safetensors`, GGUF) of SD 1 to 3, FLUX, HunyuanVideo, Wan and Cosmos.

Such a file holds the UNet or transformer, the autoencoder and the text encoders under the names of
the training code, and no settings: `compvis_parts` reads the sizes from the tensors' shapes. Files
of a part of these, with their prefixes or without, are read too; all families are written.
"""

import copy
import dataclasses
import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from .. import architectures
from ..components import build
from ..errors import CheckpointError, OutputError, listing
from ..files.output import atomic_file
from ..files.safetensors_file import (
    NUMPY_NAMES,
    PendingTensor,
    StoredTensor,
    parse_json,
    write_safetensors,
)
from ..files.weights import WeightFile, open_weights, opened, read_json
from ..parameters import ShardingRule, pending, pending_unread
from ..pipeline_folder import check_vocabulary, pipeline_components
from ..tensors import tensor_specs
from ..tokenizer import CLIP_TOKENS, clip_tokenizer, read_tokenizer
from .compvis_names import (
    MARKERS,
    TEXT_ENCODERS,
    UNET,
    VAE,
    TextEncoder,
    open_clip_names,
    vae_names,
)
from .compvis_parts import (
    FLUX_2_VAE,
    SingleFile,
    is_published,
    is_single_file,
    read_single_file,
    stranger,
    unet_names_of,
)
from .cosmos_names import cosmos_vae_names
from .drawn_with import difference_of
from .names import Stored, Table, joined
from .transformer_parts import (
    CLASSES,
    COSMOS,
    FLUX,
    FLUX_2,
    HUNYUAN,
    SD_3,
    TELLING,
    WAN,
    table_of,
    variant,
)
from .wan_names import wan_vae_names

WRAPPERS = ("state_dict", "module", "model", "ema")
PIPELINES = {
    "SD 1": "StableDiffusionPipeline",
    "SD 2": "StableDiffusionPipeline",
    "SDXL": "StableDiffusionXLPipeline",
    SD_3: "StableDiffusion3Pipeline",
    FLUX: "FluxPipeline",
    FLUX_2: "Flux2KleinPipeline",
    WAN: "WanPipeline",
    COSMOS: "CosmosTextToWorldPipeline",
    HUNYUAN: "HunyuanVideoPipeline",
}
_FROM_VIDEO = "CosmosVideoToWorldPipeline"
_PREDICTIONS = ("epsilon", "v_prediction")
_INPAINTING = 9  # channels: latents, those of the masked image, and the mask


# ---- in ----


def open_single_file(path: Path | WeightFile) -> Stored | None:
    """The tensors of a file if it is a single file of one or several models; None for any other.

    What it is told by its content, whatever its name.

    Raises:
      CheckpointError: damaged or unsafe files.
    """
    file = opened(path)
    suffix = file.path.suffix.lower()
    if suffix == ".msgpack" or (suffix == ".json" and not file.is_index):
        return None
    stored = open_weights(file, wrappers=WRAPPERS)
    folder = file.path.parent
    if is_published(stored) and (folder / "config.json").is_file() and not is_publishers(folder):
        return None  # a file of a component folder
    return stored if is_single_file(stored) else None


def is_publishers(folder: Path) -> bool:
    """Whether a `config.json` is Wan's or Tencent's own, whose settings are not read."""
    try:
        kind = read_json(folder / "config.json").get("_class_name")
    except CheckpointError:
        return False  # whoever reads it says what is wrong with it
    return kind in ("WanModel", "AutoencoderKLCausal3D")


def load_single_file(
    path: Path | str | WeightFile,
    *,
    tokenizer: Path | str | None = None,
    prediction_type: str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    sharding: ShardingRule = None,
    components: Collection[str] | None = None,
    stream: bool = False,
) -> Any:
    """Load a model of Stable Diffusion, FLUX, HunyuanVideo, Wan or Cosmos from a single file.

    Copies that training keeps beside the models (moving averages, the noise schedule and others)
    are passed over; `inspect_checkpoint` names them.

    Args:
      path: the file, `.safetensors` or a pickle, which needs torch; nothing in it is executed.
      tokenizer: folder of the tokenizer, which such files lack: that of any Stable Diffusion
        folder; default: the folder `tokenizer` beside the file, else CLIP's own. A text encoder
        of other tokens than CLIP's gets none, and a warning says so. SDXL's second one is the
        same, padding with "!".
      prediction_type: what the UNet predicts, "epsilon" or "v_prediction"; default: what the file
        tells, by the marker `v_pred` or in its header (`modelspec.prediction_type`); else epsilon,
        and for SD 2 velocities, with a warning, because the published files for 512 pixels ("base")
        predict the noise and nothing in them tells.
      dtype, param_dtype, sharding, components, stream: as for `load_pytorch`.

    Returns:
      The family's pipeline, such as `StableDiffusionXLPipeline`; what the file lacks is None, and
      a warning names it, unless `components` asks for it.

    Raises:
      CheckpointError: damaged or unsafe files, missing or unexpected tensors, another family.
      ValueError: an argument for a part that the file lacks.
    """
    source = opened(path)
    path = source.path
    if prediction_type not in (None, *_PREDICTIONS):
        raise ValueError(f"prediction_type accepts {_PREDICTIONS}, received {prediction_type!r}.")
    if (stored := open_single_file(source)) is None:
        raise CheckpointError(
            f"{path} is no single file that is read: no tensor begins with {UNET} or {VAE}."
            f" {stranger(open_weights(source, wrappers=WRAPPERS))}".rstrip()
        )
    file = read_single_file(stored, str(path), source.metadata)
    kind = architectures.pipeline_class(_pipeline_of(file))
    if stream:
        require_streamable(kind, path)
    index: dict[str, Any] = {"_class_name": _predict2(file) or kind.__name__}
    if "unet" in file.parts and file.parts["unet"].raw["in_channels"] == _INPAINTING:
        index["_class_name"] = kind.__name__.replace("Pipeline", "InpaintPipeline")
    wan = file.parts.get("transformer") if file.family == WAN else None
    if wan is not None and wan.raw["in_channels"] == _WAN_5B:
        index["expand_timesteps"] = True  # as its published folder says
    accepted = pipeline_components(kind)
    if components is not None and not set(components) <= set(accepted):
        raise ValueError(f"components accepts {accepted}, received {sorted(components)}.")
    if file.unknown:
        raise CheckpointError(
            f"{path} does not fit {file.family}: {len(file.unknown)} unexpected: "
            f"{listing(file.unknown)}. It holds another model, or more than one."
        )
    if components is None:
        wanted = _wanted(path, file, kind, tokenizer, prediction_type)
    else:
        wanted = set(components)
    parts: dict[str, Any] = dict.fromkeys(accepted[:-1])
    models = [name for name in kind.MODELS if name in wanted]
    types = {"dtype": dtype, "param_dtype": param_dtype, "sharding": sharding, "stream": stream}
    parts |= build_parts(file, str(path), models, **types)
    parts |= _tokenizers(path, tokenizer, file, [n for n in kind.TOKENIZERS if n in wanted])
    scheduler = {}
    if "scheduler" in wanted:
        told = _told(source, file)
        if file.family in TELLING:
            transformer = file.parts["transformer"].raw
            scheduler = told if "_class_name" in told else _flow(file.family, transformer)
        else:
            scheduler = _scheduler(path, file.family, prediction_type, told)
    return kind(**parts, scheduler_config=scheduler, model_index=index)


def require_streamable(kind: Any, path: Path | str) -> None:
    """Raise ValueError for a family whose denoiser has no blocks to stream."""
    if kind.DENOISER == "unet":
        raise ValueError(
            f"{path} is a {kind.__name__}, whose UNet is loaded whole: stream=True is for "
            "transformers."
        )


def _pipeline_of(file: SingleFile) -> str:
    """The pipeline whose models a file holds, or some of them."""
    raw = file.parts["transformer"].raw if "transformer" in file.parts else {}
    given = file.family == COSMOS and raw and raw["in_channels"] > raw["out_channels"]
    return _FROM_VIDEO if given else PIPELINES[file.family]


def _predict2(file: SingleFile) -> str:
    """The class in diffusers of Cosmos-Predict2, which has the same models and other steps."""
    raw = file.parts["transformer"].raw if "transformer" in file.parts else {}
    if file.family != COSMOS or not raw or raw["extra_pos_embed_type"] is not None:
        return ""
    return "Cosmos2TextToImagePipeline" if _pipeline_of(file) != _FROM_VIDEO else _SECOND_FROM_VIDEO


_SECOND_FROM_VIDEO = "Cosmos2VideoToWorldPipeline"


def build_parts(
    file: SingleFile, source: str, components: Collection[str], **types: Any
) -> dict[str, Any]:
    """Models of a single file by component.

    Args:
      file: what it holds, as `read_single_file` tells.
      source: what to call it in messages.
      components: those to build.
      types: `dtype`, `param_dtype`, `sharding` and `stream`, as for `load_pytorch`.

    Raises:
      CheckpointError: the file lacks one, or its tensors do not fit.
    """
    parts = {}
    for name in components:
        if name not in file.parts:
            raise CheckpointError(
                f"{source} holds no {name} (found {listing(sorted(file.parts))}): leave it out of "
                "components, or take it from another file."
            )
        class_name, raw, tensors = file.parts[name]
        model_class = architectures.model_class(class_name, source)
        told = f"{source} ({name})"
        parts[name] = build(
            model_class, raw, tensors, prefix=(name,), source=told, file=told, **types
        )
    return parts


def _wanted(
    path: Path, file: SingleFile, kind: Any, tokenizer: Any, prediction_type: Any
) -> set[str]:
    """What to load where nobody says: what is there, and what belongs to that."""
    accepted = pipeline_components(kind)
    others = {name for name in accepted if name.startswith(("scheduler", "tokenizer"))}
    lacking = [name for name in accepted if name not in (*file.parts, *others)]
    wanted = set(accepted) - set(lacking)
    wanted -= {name.replace("text_encoder", "tokenizer") for name in lacking}
    lacking = [name for name in lacking if name not in kind.OPTIONAL]
    texts = [name for name in file.parts if name.startswith("text_encoder")]
    if tokenizer is not None and not texts:
        raise ValueError(f"{path} holds no text encoder, to which a tokenizer could belong.")
    if tokenizer is None and (not texts or len(file.parts) == 1):
        wanted -= {name for name in others if name.startswith("tokenizer")}
    if "unet" not in file.parts and prediction_type is not None:
        raise ValueError(f"{path} holds no UNet, of which a prediction type could tell.")
    if {"unet", "transformer"} & set(lacking):
        wanted.discard("scheduler")
    if lacking and len(file.parts) > 1:
        warnings.warn(
            f"{path} holds {listing(sorted(file.parts))} and no {' or '.join(lacking)}: that can "
            "be converted, and drawn from only with the rest of a pipeline.",
            stacklevel=4,
        )
    if file.guessed and file.family in _SIMILAR and "vae" in file.parts:
        warnings.warn(
            f"nothing in {path} tells whether it belongs to {_SIMILAR[file.family]}, to be set in "
            "its config.json.",
            stacklevel=4,
        )
    return wanted


# Families whose autoencoders differ from others' in their latents' scale alone.
_SIMILAR = {
    "SD 1": "Stable Diffusion 1 and 2 or to XL: scaling_factor 0.18215 is assumed; XL's is 0.13025",
    FLUX: "FLUX.1 or to Stable Diffusion 3: scaling_factor 0.3611 and shift_factor 0.1159 are "
    "assumed; the latter's are 1.5305 and 0.0609",
}


def _tokenizers(
    path: Path, folder: Path | str | None, file: SingleFile, names: Collection[str]
) -> dict[str, Any]:
    """The tokenizers of these names; T5's and others than CLIP's from a folder beside the file."""
    found: dict[str, Any] = {}
    classes = {each.component: each.class_name for each in TEXT_ENCODERS[file.family]}
    for name in names:
        if "CLIP" not in classes.get(name.replace("tokenizer", "text_encoder"), ""):
            beside = path.parent / name
            found[name] = read_tokenizer(beside) if beside.is_dir() else None
            if found[name] is None:
                warnings.warn(
                    f"{path} holds no {name}, and no folder {name!r} is beside it: put that of a "
                    "pipeline's folder there to draw from prompts.",
                    stacklevel=4,
                )
            continue
        if "tokenizer" not in found:
            found["tokenizer"] = _tokenizer(path, folder, file)
        if name != "tokenizer" and (second := copy.deepcopy(found["tokenizer"])) is not None:
            second.pad_token = "!"  # as in the published folders
            found[name] = second
    return {name: found.get(name) for name in names}


def _tokenizer(path: Path, folder: Path | str | None, file: SingleFile) -> Any:
    text, beside = file.parts.get("text_encoder"), path.parent / "tokenizer"
    rows = None if text is None else text.raw["vocab_size"]
    if folder is None and not beside.is_dir():
        if rows == CLIP_TOKENS:
            return clip_tokenizer("!") if file.family == "SD 2" else clip_tokenizer()
        warnings.warn(
            f"{path} holds no tokenizer, and no folder 'tokenizer' is beside it: pass tokenizer=, "
            "the folder of one, to draw from prompts or to train.",
            stacklevel=4,
        )
        return None
    folder = beside if folder is None else Path(folder).expanduser()
    tokenizer = read_tokenizer(folder)
    if rows is not None:
        check_vocabulary(folder, tokenizer, rows, f" in {path}")
    return tokenizer


# Where a file written here keeps the settings of the sampler, which other programs choose anew.
_OWN_SCHEDULER = "conceptax.scheduler_config"


def _told(source: WeightFile, file: SingleFile) -> dict[str, Any]:
    """Settings of the scheduler that a file tells."""
    text = source.metadata.get(_OWN_SCHEDULER)
    if text is None:
        return dict(file.scheduler)
    own = parse_json(text.encode(), f"{source.path}: {_OWN_SCHEDULER}")
    return own | {k: v for k, v in file.scheduler.items() if k in _MODELS_OWN}


def _scheduler(
    path: Path, family: str, prediction_type: str | None, told: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The noise schedule that all Stable Diffusion models with a UNet were trained with.

    Args:
      path: the file, for messages.
      family: as in `SingleFile`.
      prediction_type: what the caller says of it.
      told: what the file says; a whole configuration where it names its class.
    """
    told = dict(told or {})
    if prediction_type is not None:
        told["prediction_type"] = prediction_type
    if "prediction_type" not in told and family == "SD 2":
        warnings.warn(
            f"{path} does not tell what its UNet predicts: 'v_prediction' is assumed, as for 768 "
            "pixels; pass prediction_type='epsilon' for the base models.",
            stacklevel=3,
        )
        told["prediction_type"] = "v_prediction"
    if "_class_name" in told:
        return told
    shared = {k: v for k, v in _ASSUMED.items() if v is not None}
    own: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": False}
    kind = "DDIMScheduler"
    if family == "SDXL":
        own, kind = {"timestep_spacing": "leading"}, "EulerDiscreteScheduler"
    own |= {"steps_offset": 1, "prediction_type": "epsilon"}
    return {"_class_name": kind, **shared, **own, **told}


_FLOW = "FlowMatchEulerDiscreteScheduler"
_WAN_5B = 48  # channels of the latents of Wan 2.2's model of 5 billion parameters


def _flow(family: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The published settings of a rectified flow's steps, or of EDM's."""
    if family == WAN:
        return {
            "_class_name": "UniPCMultistepScheduler",
            "num_train_timesteps": 1000,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 5.0 if raw["in_channels"] == _WAN_5B else 3.0,
        }
    if family == COSMOS:
        if raw["extra_pos_embed_type"] is None:
            return {"_class_name": _FLOW, "num_train_timesteps": 1000, "use_karras_sigmas": True}
        return {
            "_class_name": "EDMEulerScheduler",
            "sigma_min": 0.002,
            "sigma_max": 80.0,
            "sigma_data": 0.5,
            "sigma_schedule": "karras",
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "rho": 7.0,
            "final_sigmas_type": "sigma_min",
        }
    shift = {SD_3: 3.0, HUNYUAN: 7.0}.get(family)
    dynamic = family == FLUX_2 or (family == FLUX and raw["guidance_embeds"])
    config: dict[str, Any] = {
        "_class_name": _FLOW,
        "num_train_timesteps": 1000,
        "shift": shift or (3.0 if dynamic else 1.0),
        "use_dynamic_shifting": dynamic,
    }
    if shift is not None:
        return config
    lengths = {"base_image_seq_len": 256, "max_image_seq_len": 4096}
    return config | {"base_shift": 0.5, "max_shift": 1.15, **lengths}


# ---- out ----


def save_single_file(
    pipeline: Any, path: Path | str, *, dtype: Any = None, force: bool = False
) -> Path:
    """Write a pipeline as one `.safetensors` with its publisher's names, ComfyUI's all-in-one form.

    What such a file tells of the scheduler is written as other programs read it: the marker keys
    `v_pred` and `ztsnr`, and `modelspec`'s entries in the header. The sampler's settings, which
    those choose anew, are kept in the header for `load_single_file`.

    Args:
      pipeline: of Stable Diffusion 1, 2, XL or 3, FLUX, Wan or Cosmos, or of HunyuanVideo its
        transformer alone; parts that are None are left out, and so are tokenizers, for which such
        files have no place.
      path: the file; its folder exists.
      dtype: dtype to store (float32, float16, bfloat16); None keeps each parameter's own.
      force: replace an existing file.

    Raises:
      OutputError: `path` is occupied or unwritable, a parameter is NaN or infinite, or a setting is
        another than readers of such files assume, who would take the model for one that it is not.
    """
    path, kind = Path(path).expanduser(), None if dtype is None else np.dtype(dtype)
    if getattr(pipeline, "transformer_2", None) is not None:
        raise OutputError(
            "a single file has a place for one transformer, and this model has two. Write a folder."
        )
    family = _family_of(pipeline)
    tensors = part_tensors(
        {name: getattr(pipeline, name) for name in pipeline.MODELS}, family, kind
    )
    markers, metadata = _scheduler_out(pipeline, family)
    tensors += [PendingTensor.of(name, np.zeros(0, np.float32)) for name in markers]
    if pipeline.carried:
        warnings.warn(
            f"a single file has no place for {listing(sorted(pipeline.carried))}, which is left "
            "out of it; programs add their own, or check no image. A folder keeps it.",
            stacklevel=2,
        )
    metadata["modelspec.architecture"] = _ARCHITECTURES[family]
    unet = getattr(pipeline, "unet", None)
    if unet is None and (transformer := getattr(pipeline, "transformer", None)) is not None:
        told = f"-{variant(family, transformer.config.to_dict())}".rstrip("-")
        metadata["modelspec.architecture"] += told.replace(" ", "-").lower()
    sizes = getattr(getattr(unet, "config", None), "sample_size", None)
    if sizes is not None:
        levels = 4 if pipeline.vae is None else len(pipeline.vae.config.block_out_channels)
        height, width = (sizes, sizes) if isinstance(sizes, int) else sizes
        pixels = f"{width << (levels - 1)}x{height << (levels - 1)}"
        metadata["modelspec.resolution"] = pixels
    metadata |= difference_of(getattr(pipeline, "transformer", None), None).header
    _require_told(pipeline, family, tensors, metadata)
    with atomic_file(path, force=force) as partial:
        write_safetensors(partial, tensors, {"format": "pt", **metadata})
    return path


def part_tensors(
    models: Mapping[str, Any], family: str, dtype: np.dtype | None = None
) -> list[PendingTensor]:
    """The tensors of a single file.

    Args:
      models: component -> NNX model; those that are None are left out.
      family: as in `SingleFile`.
      dtype: to store; None keeps each parameter's own.

    Raises:
      OutputError: a parameter that has no place in such a file.
    """
    others = sorted(n for n, model in models.items() if model is not None and n != "transformer")
    if family == HUNYUAN and others:
        raise OutputError(
            f"a single file of HunyuanVideo holds its transformer alone, and no {listing(others)}: "
            "write a folder, or load the transformer alone first."
        )
    tensors = []
    if (unet := models.get("unet")) is not None:
        tensors += _named(unet, UNET, unet_names_of(unet.config.to_dict()), dtype)
    if (transformer := models.get("transformer")) is not None:
        names = table_of(family, transformer.config.to_dict())
        tensors += _named(transformer, UNET, names, dtype)
    if (vae := models.get("vae")) is not None:
        tensors += _named(vae, VAE, _vae_names(vae, family), dtype)
    written = {each.component: each for each in reversed(TEXT_ENCODERS[family])}
    for component, encoder in written.items():
        if (model := models.get(component)) is not None:
            tensors += _text(model, encoder, dtype)
    return tensors


def _vae_names(vae: Any, family: str) -> Table:
    if family == WAN:
        return wan_vae_names(vae.config.to_dict())
    if family == COSMOS:
        return cosmos_vae_names(vae.config.to_dict())
    names = vae_names(len(vae.config.block_out_channels), vae.config.layers_per_block)
    return names | FLUX_2_VAE if family == FLUX_2 else names


def _family_of(pipeline: Any) -> str:
    if "transformer" in pipeline.MODELS:
        named = {CLASSES[family]: family for family in CLASSES}
        kind = type(pipeline).__name__
        own = getattr(pipeline.transformer, "pytorch_class", "")
        kinds = {name: family for family, name in PIPELINES.items()} | {_FROM_VIDEO: COSMOS}
        return named.get(own) or kinds[kind]
    if "text_encoder_2" in pipeline.MODELS:
        return "SDXL"
    if pipeline.text_encoder is not None:
        return "SD 1" if pipeline.text_encoder.config.hidden_act == "quick_gelu" else "SD 2"
    linear = pipeline.unet is not None and pipeline.unet.config.use_linear_projection
    return "SD 2" if linear else "SD 1"


_ARCHITECTURES = {
    "SD 1": "stable-diffusion-v1",
    "SD 2": "stable-diffusion-v2",
    "SDXL": "stable-diffusion-xl-v1-base",
    SD_3: "stable-diffusion-3",
    FLUX: "flux-1",
    FLUX_2: "flux-2",
    WAN: "wan",
    COSMOS: "cosmos",
    HUNYUAN: "hunyuan-video",
}
# Settings of a scheduler that belong to the model: defaults of diffusers' classes, and what all
# readers of single files take for granted.
_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
}
_ASSUMED = {**_DEFAULTS, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_LINEAR = {**_ASSUMED, "beta_schedule": "linear"}
_CLASS_DEFAULTS = {
    "LCMScheduler": _ASSUMED,
    "HeunDiscreteScheduler": _LINEAR,
    "KDPM2DiscreteScheduler": _LINEAR,
    "KDPM2AncestralDiscreteScheduler": _LINEAR,
}
_MODELS_OWN = ("prediction_type", "rescale_betas_zero_snr")


def _scheduler_out(pipeline: Any, family: str) -> tuple[list[str], dict[str, str]]:
    """The marker keys and the header's entries that tell a pipeline's noise schedule.

    Raises:
      OutputError: a setting of the model's that readers would assume otherwise.
    """
    config = dict(pipeline.scheduler_config)
    if family in TELLING and config:
        return [], {_OWN_SCHEDULER: _as_json({"_class_name": _FLOW, **config})}
    if family in TELLING or pipeline.unet is None or not config:
        return [], {}
    own = _CLASS_DEFAULTS.get(config.get("_class_name", ""), _DEFAULTS) | config
    prediction, zero = own.get("prediction_type", "epsilon"), own.get("rescale_betas_zero_snr")
    differing = [f"{k}={own[k]}" for k, value in _ASSUMED.items() if own[k] != value]
    if prediction not in _PREDICTIONS:
        differing.append(f"prediction_type={prediction}")
    elif zero and prediction == "epsilon":  # readers ask for the marker of it where velocities are
        differing.append("rescale_betas_zero_snr=True with prediction_type=epsilon")
    _require_none(differing, " of the scheduler")
    told = (prediction == "v_prediction", zero)
    text = _as_json({"_class_name": "DDIMScheduler", **config})
    spec = "v" if prediction == "v_prediction" else prediction
    return [name for name, true in zip(MARKERS, told, strict=True) if true], {
        "modelspec.prediction_type": spec,
        _OWN_SCHEDULER: text,
    }


def _as_json(config: Mapping[str, Any]) -> str:
    try:
        return json.dumps(config)
    except TypeError as error:
        raise OutputError(f"the scheduler's settings cannot be written: {error}.") from error


def _require_none(differing: Sequence[str], of: str = "") -> None:
    """Refuse settings that the file cannot tell."""
    if differing:
        raise OutputError(
            f"a single file cannot tell {listing(differing)}{of}, and readers would assume "
            "otherwise. Write a folder."
        )


def _require_told(
    pipeline: Any, family: str, tensors: Sequence[PendingTensor], metadata: Mapping[str, str]
) -> None:
    """Refuse models whose settings are not those that a reader of the file finds in it."""
    shapes = {t.key: StoredTensor(NUMPY_NAMES[t.dtype.name], t.shape, t.produce) for t in tensors}
    differing = []
    try:
        file = read_single_file(shapes, "a single file", metadata)
        if file.family != family and file.parts:
            raise CheckpointError(f"Readers would take it for {file.family}, and it is {family}.")
        for name, part in file.parts.items():
            config = getattr(pipeline, name).config
            reading = type(config).from_dict(part.raw)
            for field in (field.name for field in dataclasses.fields(config)):
                here, there = _meaning(config, field), _meaning(reading, field)
                if here != there and not _same(name, field, config):
                    differing.append(f"{field}={getattr(config, field)}")
    except ValueError as error:
        raise OutputError(
            f"a single file cannot hold this model: {error} Write a folder."
        ) from error
    lost = [key for keys in file.leftovers.values() for key in keys]
    differing += [f"the layers {listing(keys)}" for keys in (file.unknown, lost) if keys]
    _require_none(differing)


def _meaning(config: Any, name: str) -> Any:
    """A setting, for each resolution where it is one for all or one for each."""
    per_level = ("attention_head_dim", "layers_per_block", "transformer_layers_per_block")
    if hasattr(config, "per_block") and name in per_level:
        return config.per_block(name)
    return getattr(config, name)


def _same(component: str, name: str, config: Any) -> bool:
    """Whether a setting computes nothing here, whatever it is."""
    if name == "qk_norm_eps":  # NVIDIA's code has its own
        return True
    if name == "sample_size":
        return component == "vae" or config.sample_size is None
    if component.startswith("text_encoder"):
        if name == "eos_token_id":  # pooling at the greatest id is pooling there
            return config.eos_token_id in (2, config.vocab_size - 1)
        return name in ("bos_token_id", "pad_token_id") or (
            name == "projection_dim" and component == "text_encoder"
        )
    return False


def _named(model: Any, prefix: str, names: Table, dtype: np.dtype | None) -> list[PendingTensor]:
    tensors = []
    own = [*pending(model, tensor_specs(model), dtype), *pending_unread(model, dtype)]
    for each in joined(own, names):
        pixel = (1, 1) if ".attn_1." in each.key and len(each.shape) == 2 else ()
        tensors.append(_reshaped(each, prefix + each.key, (*each.shape, *pixel)))
    return tensors


def _reshaped(tensor: PendingTensor, key: str, shape: tuple[int, ...]) -> PendingTensor:
    return tensor.then(key, shape, lambda values: values.reshape(shape))


def _text(model: Any, encoder: TextEncoder, dtype: np.dtype | None) -> list[PendingTensor]:
    tensors = pending(model, tensor_specs(model), dtype)
    if encoder.open_clip:
        bare = [dataclasses.replace(t, key=t.key.removeprefix("text_model.")) for t in tensors]
        tensors = [
            each.then(each.key, each.shape[::-1], lambda v: np.ascontiguousarray(v.T))
            if each.key == "text_projection"
            else each
            for each in joined(bare, open_clip_names(model.config.num_hidden_layers))
        ]
    return [dataclasses.replace(each, key=encoder.prefix + each.key) for each in tensors]
