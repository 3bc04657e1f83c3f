"""Which model class reads which published class name."""

import importlib
from collections.abc import Mapping
from typing import Any

from .errors import CheckpointError

# Published class name -> module of `flax_models` with the class of that name; imported when needed.
MODULES = {
    "UNet2DConditionModel": "unet_2d_condition",
    "UNetMotionModel": "unet_motion",
    "MotionAdapter": "unet_motion",
    "AutoencoderKL": "autoencoder_kl",
    "CLIPTextModel": "clip",
    "CLIPTextModelWithProjection": "clip",
    "CLIPVisionModel": "clip",
    "CLIPModel": "clip",
    "DiTTransformer2DModel": "dit_transformer_2d",
    "Dinov2Model": "dinov2",
    "BlipForImageTextRetrieval": "blip",
    "Blip2ForImageTextRetrieval": "blip_2",
    "OpenCLIP": "open_clip",
    "MaftPlus": "maft_plus",
}
PIPELINES = {
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "stable_diffusion_xl",
}


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
    module = importlib.import_module(f"..flax_models.{PIPELINES[name]}", __package__)
    return getattr(module, name)
