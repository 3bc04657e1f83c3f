"""A Stable-Diffusion-style text-to-image pipeline: the parts of one diffusers folder."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .autoencoder_kl import AutoencoderKL
from .clip import CLIPTextModel
from .unet_2d_condition import UNet2DConditionModel


@dataclasses.dataclass
class StableDiffusionPipeline:
    """Parts of a text-to-image model; how they sample and train is in `conceptax.methods`.

    Attributes:
      unet, vae, text_encoder: NNX modules, or None where a subset was loaded.
      tokenizer: a `transformers.CLIPTokenizer`.
      scheduler_config: the parsed `scheduler_config.json`.
      model_index: the parsed `model_index.json`, kept so that a saved folder names the same parts.
    """

    unet: UNet2DConditionModel | Any
    vae: AutoencoderKL | Any
    text_encoder: CLIPTextModel | Any
    tokenizer: Any
    scheduler_config: Mapping[str, Any]
    model_index: Mapping[str, Any] = dataclasses.field(default_factory=dict)
