"""Registry of architectures: which model class reads which published class name."""

import importlib
import re
from collections.abc import Mapping
from typing import Any

from .errors import CheckpointError

# Published class name -> module of `flax_models` with the class of that name; imported when needed.
MODULES = {
    "UNet2DConditionModel": "unet_2d_condition",
    "UNetMotionModel": "unet_motion",
    "MotionAdapter": "unet_motion",
    "AutoencoderKL": "autoencoder_kl",
    "AutoencoderKLFlux2": "autoencoder_kl",
    "AutoencoderKLHunyuanVideo": "autoencoder_kl_hunyuan_video",
    "AutoencoderKLWan": "autoencoder_kl_wan",
    "AutoencoderKLCosmos": "autoencoder_kl_cosmos",
    "CLIPTextModel": "clip",
    "CLIPTextModelWithProjection": "clip",
    "CLIPVisionModel": "clip",
    "CLIPModel": "clip",
    "DiTTransformer2DModel": "dit_transformer_2d",
    "LlamaForCausalLM": "llama",
    "LlamaModel": "llama",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3Model": "qwen3",
    "T5EncoderModel": "t5",
    "UMT5EncoderModel": "t5",
    "FluxTransformer2DModel": "flux_transformer_2d",
    "Flux2Transformer2DModel": "flux_2_transformer_2d",
    "SD3Transformer2DModel": "sd3_transformer_2d",
    "CosmosTransformer3DModel": "cosmos_transformer_3d",
    "WanTransformer3DModel": "wan_transformer_3d",
    "HunyuanVideoTransformer3DModel": "hunyuan_video_transformer_3d",
    "Dinov2Model": "dinov2",
    "BlipForImageTextRetrieval": "blip",
    "Blip2ForImageTextRetrieval": "blip_2",
    "OpenCLIP": "open_clip",
    "MaftPlus": "maft_plus",
}
PIPELINES = {
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "stable_diffusion_xl",
    "StableDiffusion3Pipeline": "stable_diffusion_3",
    "FluxPipeline": "flux",
    "Flux2KleinPipeline": "flux_2_klein",
    "HunyuanVideoPipeline": "hunyuan_video",
    "WanPipeline": "wan",
    "CosmosTextToWorldPipeline": "cosmos_text_to_world",
    "CosmosVideoToWorldPipeline": "cosmos_video_to_world",
}

_COSMOS = {
    "transformer": "CosmosTransformer3DModel",
    "vae": "AutoencoderKLCosmos",
    "text_encoder": "T5EncoderModel",
}
_SD = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
_PARTS = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionXLPipeline": _SD | {"text_encoder_2": "CLIPTextModelWithProjection"},
    "StableDiffusion3Pipeline": {
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
    },
    "FluxPipeline": {
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
    },
    "Flux2KleinPipeline": {
        "transformer": "Flux2Transformer2DModel",
        "vae": "AutoencoderKLFlux2",
        "text_encoder": "Qwen3ForCausalLM",
    },
    "HunyuanVideoPipeline": {
        "transformer": "HunyuanVideoTransformer3DModel",
        "vae": "AutoencoderKLHunyuanVideo",
        "text_encoder": "LlamaModel",
        "text_encoder_2": "CLIPTextModel",
    },
    "WanPipeline": {
        "transformer": "WanTransformer3DModel",
        "vae": "AutoencoderKLWan",
        "text_encoder": "UMT5EncoderModel",
    },
    "CosmosVideoToWorldPipeline": _COSMOS,
    "CosmosTextToWorldPipeline": _COSMOS,
}

_FLAX = "Flax"  # how diffusers up to 0.39 and transformers 4 began their names
# Settings of diffusers' and maxdiffusion's Flax models that say how, not what, they compute.
_FLAX_SETTINGS = re.compile(
    r"use_memory_efficient_attention|split_head_dim|(weights_)?dtype|precision|attention_kernel"
    r"|flash_min_seq_length|flash_block_sizes|mesh(_axes)?"
)


def without_flax(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as PyTorch's classes have them, whether Flax's wrote them or not.

    Takes a parsed `config.json`, `scheduler_config.json` or `model_index.json`.
    """
    plain = dict(config)
    name = plain.get("_class_name")
    if isinstance(name, str) and name.startswith(_FLAX):
        plain = {k: v for k, v in plain.items() if not _FLAX_SETTINGS.fullmatch(k)}
        plain["_class_name"] = name.removeprefix(_FLAX)
    for key, value in plain.items():  # [library, class] in an index
        names = isinstance(value, list) and all(isinstance(each, str) for each in value)
        if names and (key == "architectures" or len(value) == 2):
            plain[key] = [each.removeprefix(_FLAX) for each in value]
    return plain


def class_in(entry: Any) -> str | None:
    """The class in an index's entry, [library, class]; None where it names none."""
    pair = isinstance(entry, list | tuple) and len(entry) == 2
    return entry[1] if pair and isinstance(entry[1], str) else None


def class_of_pipeline(index: Mapping[str, Any], source: str) -> Any:
    """The pipeline class that reads the parts which a `model_index.json` names.

    Its `_class_name` may be any whose models are those of a known one (image to image, inpainting,
    latent consistency, a custom pipeline's `["file", "Class"]`), since the parts are the same.

    Raises:
      CheckpointError: a name that is none, or parts of other models; the message names them.
    """
    name = index.get("_class_name")
    if isinstance(name, str) and name in PIPELINES:
        return pipeline_class(name)
    pair = isinstance(name, list) and len(name) == 2 and all(isinstance(n, str) for n in name)
    if not (name is None or isinstance(name, str) or pair):
        raise CheckpointError(
            f"{source} has {name!r} as its _class_name, which is not the name of a pipeline."
        )
    classes = {key: class_in(entry) for key, entry in index.items() if not key.startswith("_")}
    wanted = "StableDiffusionPipeline"
    if classes.get("transformer") is not None:
        kinds = {parts.get("transformer"): family for family, parts in _PARTS.items()}
        wanted = kinds.get(classes["transformer"], wanted)
    elif classes.get("text_encoder_2") is not None:
        wanted = "StableDiffusionXLPipeline"
    differing = [
        f"{key} ({classes.get(key) or 'none'})"
        for key, accepted in _PARTS[wanted].items()
        if classes.get(key) != accepted
    ]
    if differing:
        called = "a pipeline without a name" if name is None else f"a {name!r} pipeline"
        raise CheckpointError(
            f"{source} is {called}; known are those with the models of {', '.join(PIPELINES)}, and "
            f"its {', '.join(differing)} differ from {wanted}'s. Load its components one by one if "
            "their architectures are known."
        )
    return pipeline_class(wanted)


def published_name(config: Mapping[str, Any]) -> str | None:
    """The class in a `config.json`: diffusers' `_class_name`, transformers' `architectures`."""
    names = config.get("architectures")
    name = config.get("_class_name") or (names[0] if isinstance(names, list) and names else None)
    if name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero":
        return "DiTTransformer2DModel"  # under its first name
    return name if isinstance(name, str) else None


def model_class(name: str | None, source: str) -> Any:
    """The model class for a published name.

    Raises:
      CheckpointError: unknown or absent name; the message lists the known ones.
    """
    if name not in MODULES:
        received = "no class name" if name is None else f"the unknown architecture {name!r}"
        raise CheckpointError(
            f"{source} has {received}; known are {', '.join(sorted(MODULES))}. "
            "Pass architecture= if it is one of these under another name."
        )
    module = importlib.import_module(f"..flax_models.{MODULES[name]}", __package__)
    return getattr(module, name)


def pipeline_class(name: str) -> Any:
    """The pipeline class of one of `PIPELINES`."""
    module = importlib.import_module(f"..flax_models.pipelines.{PIPELINES[name]}", __package__)
    return getattr(module, name)
