"""FLUX.1 (Black Forest Labs 2024): a transformer on a flow, told texts by CLIP and T5."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ..autoencoder_kl import AutoencoderKL, patchify, unpatchify
from ..clip import CLIPTextModel
from ..flux_transformer_2d import FluxTransformer2DModel
from ..layers.joint_attention import JointTextCondition
from ..t5 import T5EncoderModel
from .guidance import Guidance, Predictor, told
from .pipeline import Pipeline
from .tokenizers import context_length, tokenize

_SIDE = 128  # latents along each side that the model was trained on


class FluxTextEncoders(nnx.Module):
    """CLIP, of which the transformer reads the pooled state, and T5, of which it reads all.

    T5 is given no mask: padding is read too, as in training.
    """

    def __init__(self, text_encoder: CLIPTextModel, text_encoder_2: T5EncoderModel):
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2

    def __call__(
        self, token_ids: tuple[Int[Array, "B L"], Int[Array, "B A"]]
    ) -> JointTextCondition:
        """Conditions of the token ids of both tokenizers."""
        first, second = token_ids
        pooled = self.text_encoder(first).pooled
        return JointTextCondition(self.text_encoder_2(second), pooled, None)


def over_tokens(denoiser: Any) -> Any:
    """A denoiser of latents packed by 2 x 2 as one of latents."""

    def run(latents: Array, timestep: Array, condition: Any) -> Array:
        return unpatchify(denoiser(patchify(latents, 2), timestep, condition), 2)

    return run


@dataclasses.dataclass
class FluxPipeline(Pipeline):
    """Parts of a FLUX.1 model, dev or schnell.

    Dev learnt its guidance and is told how strong it is to be; schnell has none.

    Attributes:
      transformer, vae, text_encoder, text_encoder_2: NNX modules, or None where a subset was
        loaded.
      tokenizer: a `transformers.CLIPTokenizer`.
      tokenizer_2: T5's.
      scheduler_config, model_index, carried: as every `Pipeline` has them.
      max_sequence_length: tokens that T5 reads, padding included.
    """

    transformer: FluxTransformer2DModel | Any
    vae: AutoencoderKL | Any
    text_encoder: CLIPTextModel | Any
    text_encoder_2: T5EncoderModel | Any
    tokenizer: Any
    tokenizer_2: Any
    scheduler_config: Mapping[str, Any]
    model_index: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    carried: Mapping[str, Path] = dataclasses.field(default_factory=dict, kw_only=True)
    max_sequence_length: int = dataclasses.field(default=512, kw_only=True)

    MODELS: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder", "text_encoder_2")
    TOKENIZERS: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")
    NOT_CARRIED: ClassVar[tuple[str, ...]] = ("feature_extractor", "image_encoder")
    DENOISER: ClassVar[str] = "transformer"
    PATCH: ClassVar[int] = 2
    LEARNT_GUIDANCE: ClassVar[bool] = True

    @property
    def defaults(self) -> tuple[int, float]:
        """Steps and guidance: 28 and 3.5 of dev, 4 and none of schnell."""
        return (28, 3.5) if self.transformer.config.guidance_embeds else (4, 0.0)

    @property
    def prompt_encoder(self) -> FluxTextEncoders | None:
        """Both text encoders as one module; None without them."""
        if self.text_encoder is None or self.text_encoder_2 is None:
            return None
        return FluxTextEncoders(self.text_encoder, self.text_encoder_2)

    def tokenize(
        self, prompts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "N L"], Int[np.ndarray, "N A"]]:
        """Token ids of both tokenizers: CLIP's, and T5's up to `max_sequence_length`."""
        length = context_length(self.tokenizer, self.text_encoder.config.max_position_embeddings)
        return (
            tokenize(self.tokenizer, prompts, max_length=length),
            tokenize(self.tokenizer_2, prompts, max_length=self.max_sequence_length),
        )

    @staticmethod
    def encode(prompt_encoder: FluxTextEncoders, token_ids: Any) -> JointTextCondition:
        """Conditions of N prompts' token ids."""
        return prompt_encoder(token_ids)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Of images of 1024 x 1024 pixels.

        Raises:
          ValueError: the transformer reads more than latents (a model that fills or edits).
        """
        config = self.transformer.config
        if config.out_channels not in (None, config.in_channels):
            raise ValueError(
                f"A text-to-image transformer maps latents to latents: in_channels="
                f"{config.in_channels} and out_channels={config.out_channels} must be equal. "
                "Models that read images, such as FLUX.1 Fill, are converted, but not drawn with."
            )
        return _SIDE, _SIDE, config.in_channels // 4

    @staticmethod
    def predictor(
        denoiser: Any,
        condition: JointTextCondition,
        negative: JointTextCondition | None,
        guidance_scale: Guidance,
    ) -> Predictor:
        """(latents, timestep) -> velocity; dev is told the guidance, schnell of none."""
        return told(denoiser, condition, negative, guidance_scale, over_tokens(denoiser))

    def flow_sigmas(self, steps: int) -> Float[np.ndarray, " steps"]:
        """From 1 down to 1 / steps."""
        return np.linspace(1.0, 1.0 / steps, steps)
