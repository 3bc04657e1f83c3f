"""Stable Diffusion 1 and 2 (Rombach et al. 2022): a UNet that reads one CLIP text encoder."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..autoencoder_kl import AutoencoderKL
from ..clip import CLIPTextModel
from ..pretrained import Pretrained
from ..unet_2d_condition import UNet2DConditionModel
from .guidance import Predictor, classifier_free
from .tokenizers import context_length, tokenize

LONGEST_SIDE = 1 << 16  # pixels of an image; attention over more would take days


@dataclasses.dataclass
class StableDiffusionPipeline(Pretrained):
    """Parts of a text-to-image model; how they sample and train is in `conceptax.methods`.

    Attributes:
      unet, vae, text_encoder: NNX modules, or None where a subset was loaded.
      tokenizer: a `transformers.CLIPTokenizer`.
      scheduler_config: the parsed `scheduler_config.json`.
      model_index: the parsed `model_index.json`, kept so that a saved folder names the same parts.
      carried: parts that nothing here computes with, such as the safety checker -> the folder (or
        file) that a saved pipeline gets an unchanged copy of.

    Class attributes:
      * `MODELS`, `TOKENIZERS`: the parts that are one or the other.
      * `TEXT_TOWERS`: parts that read text -> where in `prompt_encoder` their CLIP text model is.
      * `NOT_CARRIED`: parts of diffusers' pipeline that this one does without, unless carried.
      * `SIZES`: how many numbers tell the UNet of an image's size (`for_size`).
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
    SIZES: ClassVar[int] = 0

    force_zeros_for_empty_prompt: ClassVar[bool] = False  # of SDXL, where its folder says so

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

    @staticmethod
    def for_size(
        condition: Any, height: int, width: int, sizes: Float[Array, " S"] | None = None
    ) -> Any:
        """A condition for images of a size in pixels, of which this family's UNet is not told."""
        del height, width, sizes
        return condition

    @staticmethod
    def without_text(condition: Any) -> Any:
        """Zeros in place of what a condition says of texts."""
        return jax.tree.map(jnp.zeros_like, condition)

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

    def latent_shape_for(
        self, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """That of the latents of images of a size in pixels; by default the UNet's own.

        Raises:
          ValueError: not a positive multiple of the autoencoder's downsampling, or too large.
        """
        factor = self.vae.config.downsampling
        *own, channels = self.latent_shape
        sides = []
        for name, size, default in zip(("height", "width"), (height, width), own, strict=True):
            if size is not None and (not 1 <= size <= LONGEST_SIDE or size % factor):
                raise ValueError(
                    f"{name}={size} must be a positive multiple of {factor} pixels, at most "
                    f"{LONGEST_SIDE}."
                )
            sides.append(default if size is None else size // factor)
        return sides[0], sides[1], channels

    @staticmethod
    def predictor(
        denoiser: Any, condition: Any, negative: Any, guidance_scale: Float[Array, ""] | float
    ) -> Predictor:
        """(latents, timestep) -> the denoiser's prediction with guidance (`classifier_free`)."""
        return classifier_free(denoiser, condition, negative, guidance_scale)

    @staticmethod
    def decode(
        vae: AutoencoderKL, latents: Float[Array, "B *F h w C"], *, tiling: bool = False
    ) -> Float[Array, "B *F H W 3"]:
        """Images in [-1, 1], float32, of latents in the UNet's scale; of videos frame by frame.

        `tiling` is that of `AutoencoderKL.decode`.
        """

        def decode(latents: Array) -> Array:
            images = vae.decode(vae.unscale(latents), tiling=tiling)
            return jnp.clip(images.astype(jnp.float32), -1, 1)

        if latents.ndim == 4:
            return decode(latents)
        return jax.lax.map(decode, latents.swapaxes(0, 1)).swapaxes(0, 1)

    # ---- times ----

    @property
    def schedule_config(self) -> Mapping[str, Any]:
        """The scheduler's settings as diffusers' class of this name samples with them.

        It corrects old files: whatever they say, `steps_offset` becomes 1 and `clip_sample` false.
        Without the correction one folder would give other images here than there.
        """
        return {**self.scheduler_config, "steps_offset": 1, "clip_sample": False}
