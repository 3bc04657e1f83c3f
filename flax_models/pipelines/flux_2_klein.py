"""FLUX.2 klein (Black Forest Labs 2026): a transformer on a flow that reads layers of Qwen3."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..autoencoder_kl import AutoencoderKLFlux2, patchify
from ..flux_2_transformer_2d import Flux2Transformer2DModel
from ..layers.joint_attention import JointTextCondition
from ..qwen3 import Qwen3Model
from .flux import over_tokens
from .guidance import Predictor, classifier_free
from .pipeline import Pipeline
from .tokenizers import masked_tokenize

_SIDE = 128  # latents along each side that the model was trained on


@dataclasses.dataclass
class Flux2KleinPipeline(Pipeline):
    """Parts of a FLUX.2 klein model, distilled to four steps or not.

    Attributes:
      transformer, vae, text_encoder: NNX modules, or None where a subset was loaded.
      tokenizer: Qwen's, whose chat template prompts are put into.
      scheduler_config, model_index, carried: as every `Pipeline` has them.
      max_sequence_length: tokens of a prompt, padding included.
    """

    transformer: Flux2Transformer2DModel | Any
    vae: AutoencoderKLFlux2 | Any
    text_encoder: Qwen3Model | Any
    tokenizer: Any
    scheduler_config: Mapping[str, Any]
    model_index: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    carried: Mapping[str, Path] = dataclasses.field(default_factory=dict, kw_only=True)
    max_sequence_length: int = dataclasses.field(default=512, kw_only=True)

    MODELS: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder")
    TOKENIZERS: ClassVar[tuple[str, ...]] = ("tokenizer",)
    DENOISER: ClassVar[str] = "transformer"
    PATCH: ClassVar[int] = 2
    SHIFT: ClassVar[str] = "empirical"

    @property
    def is_distilled(self) -> bool:
        """Whether the model learnt to draw in four steps without guidance, as its index says."""
        return bool(self.model_index.get("is_distilled", False))

    @property
    def defaults(self) -> tuple[int, float]:
        """Steps and guidance: 4 and none where distilled, else 50 and 4."""
        return (4, 1.0) if self.is_distilled else (50, 4.0)

    @property
    def prompt_encoder(self) -> Any:
        """The text encoder."""
        return self.text_encoder

    def tokenize(
        self, prompts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "N A"], Int[np.ndarray, "N A"]]:
        """Token ids of prompts, as what a user says in a chat, and which of them are no padding."""
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = [
            self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            for chat in chats
        ]
        return masked_tokenize(self.tokenizer, prompts, self.max_sequence_length, texts=texts)

    @staticmethod
    def encode(prompt_encoder: Qwen3Model, token_ids: Any) -> JointTextCondition:
        """States of the layers that are read, side by side."""
        states = jnp.concatenate(prompt_encoder(*token_ids), axis=-1)
        return JointTextCondition(states, None, None)

    def guides(self, guidance_scale: float) -> bool:
        """Whether the transformer is also asked without the prompt; never where distilled."""
        return guidance_scale > 1 and not self.is_distilled

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Of images of 1024 x 1024 pixels."""
        return _SIDE, _SIDE, self.transformer.config.in_channels // 4

    @staticmethod
    def predictor(
        denoiser: Any,
        condition: JointTextCondition,
        negative: JointTextCondition | None,
        guidance_scale: Float[Array, ""] | float,
    ) -> Predictor:
        """(latents, timestep) -> velocity with guidance (`classifier_free`)."""
        return classifier_free(over_tokens(denoiser), condition, negative, guidance_scale)

    @staticmethod
    def decode(
        vae: AutoencoderKLFlux2, latents: Float[Array, "B h w C"], *, tiling: bool = False
    ) -> Float[Array, "B H W 3"]:
        """Images in [-1, 1], float32; the autoencoder unscales latents by patches."""
        images = vae.decode(vae.unscale(patchify(latents, 2)), tiling=tiling)
        return jnp.clip(images.astype(jnp.float32), -1, 1)

    def flow_sigmas(self, steps: int) -> Float[np.ndarray, " steps"]:
        """From 1 down to 1 / steps."""
        return np.linspace(1.0, 1.0 / steps, steps)
