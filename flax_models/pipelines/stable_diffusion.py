"""Stable Diffusion 1 and 2 (Rombach et al. 2022): a UNet that reads one CLIP text encoder."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from ..autoencoder_kl import AutoencoderKL
from ..clip import CLIPTextModel
from ..unet_2d_condition import UNet2DConditionModel
from .pipeline import Pipeline
from .tokenizers import context_length, tokenize


@dataclasses.dataclass
class StableDiffusionPipeline(Pipeline):
    """Parts of a Stable Diffusion model.

    Attributes:
      unet, vae, text_encoder: NNX modules, or None where a subset was loaded.
      tokenizer: a `transformers.CLIPTokenizer`.
      scheduler_config, model_index, carried: as every `Pipeline` has them.
    """

    unet: UNet2DConditionModel | Any
    vae: AutoencoderKL | Any
    text_encoder: CLIPTextModel | Any
    tokenizer: Any
    scheduler_config: Mapping[str, Any]
    model_index: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    carried: Mapping[str, Path] = dataclasses.field(default_factory=dict, kw_only=True)

    MODELS: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder")
    TOKENIZERS: ClassVar[tuple[str, ...]] = ("tokenizer",)
    TEXT_TOWERS: ClassVar[Mapping[str, str]] = {"text_encoder": ""}
    NOT_CARRIED: ClassVar[tuple[str, ...]] = (
        "safety_checker",
        "feature_extractor",
        "image_encoder",
    )
    DENOISER: ClassVar[str] = "unet"

    # ---- prompts ----

    @property
    def prompt_encoder(self) -> Any:
        """What turns token ids into what the UNet reads: the text encoder, or None without one."""
        return self.text_encoder

    def with_prompt_encoder(self, encoder: Any) -> "StableDiffusionPipeline":
        """The pipeline with another one."""
        return dataclasses.replace(self, text_encoder=encoder)

    @property
    def max_length(self) -> int:
        """Tokens in a prompt: the tokenizer's limit, bounded by the text encoder's positions."""
        return context_length(self.tokenizer, self.text_encoder.config.max_position_embeddings)

    def tokenize(self, prompts: Sequence[str]) -> Int[np.ndarray, "N *two L"]:
        """Token ids of prompts, as `prompt_encoder` takes them; overlong ones are told of."""
        return tokenize(self.tokenizer, prompts, max_length=self.max_length)

    def checked_token_ids(self, token_ids: Int[np.ndarray, "N L"]) -> Int[np.ndarray, "N L"]:
        """Token ids that stand for prompts, int32.

        Raises:
          ValueError: they are none of this pipeline.
        """
        length, vocabulary = self.max_length, self.text_encoder.config.vocab_size
        if token_ids.shape[1] != length or token_ids.min() < 0 or token_ids.max() >= vocabulary:
            raise ValueError(
                f"token ids must be [N, {length}], from 0 to {vocabulary - 1}; got "
                f"{token_ids.shape} from {token_ids.min()} to {token_ids.max()}."
            )
        return token_ids.astype(np.int32)

    # ---- latents ----

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the latents that the UNet was made for.

        Raises:
          ValueError: it denoises something other than latents (an inpainting model).
        """
        config = self.unet.config
        if config.in_channels != config.out_channels:
            raise ValueError(
                f"A text-to-image UNet maps latents to latents: in_channels={config.in_channels} "
                f"and out_channels={config.out_channels} must be equal. Models that read more than "
                "latents, such as those for inpainting, are converted, but not drawn with or "
                "trained."
            )
        height, width = config.latent_size
        return height, width, config.in_channels

    # ---- times ----

    @property
    def schedule_config(self) -> Mapping[str, Any]:
        """The scheduler's settings as diffusers' class of this name samples with them.

        It corrects old files: whatever they say, `steps_offset` becomes 1 and `clip_sample` false.
        Without the correction one folder would give other images here than there.
        """
        return {**self.scheduler_config, "steps_offset": 1, "clip_sample": False}
