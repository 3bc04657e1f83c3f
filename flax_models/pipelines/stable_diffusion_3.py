"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206): a transformer on a flow.

It attends to the penultimate states of two CLIPs, side by side and padded to the width of T5's,
which follow them, and is told the projected, pooled states of both CLIPs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from ..autoencoder_kl import AutoencoderKL
from ..clip import CLIPTextModelWithProjection
from ..layers.joint_attention import JointTextCondition
from ..sd3_transformer_2d import SD3Transformer2DModel
from ..t5 import T5EncoderModel
from .pipeline import Pipeline
from .tokenizers import context_length, tokenize


class SD3TextEncoders(nnx.Module):
    """The three text encoders as one; without T5 zeros stand for its states.

    Args:
      text_encoder, text_encoder_2, text_encoder_3: the encoders, the last one or None.
      width: features of a text token.
      length: tokens of T5.
    """

    def __init__(
        self,
        text_encoder: CLIPTextModelWithProjection,
        text_encoder_2: CLIPTextModelWithProjection,
        text_encoder_3: T5EncoderModel | None,
        *,
        width: int,
        length: int,
    ):
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.text_encoder_3 = text_encoder_3
        self.width = width
        self.length = length

    def __call__(self, token_ids: tuple[Int[Array, "B _"], ...]) -> JointTextCondition:
        """Conditions of the token ids of the tokenizers."""
        first, second = self.text_encoder(token_ids[0]), self.text_encoder_2(token_ids[1])
        states = jnp.concatenate([first.penultimate, second.penultimate], axis=-1)
        states = jnp.pad(states, ((0, 0), (0, 0), (0, self.width - states.shape[-1])))
        if self.text_encoder_3 is None:
            last = jnp.zeros((len(states), self.length, self.width), states.dtype)
        else:
            last = self.text_encoder_3(token_ids[2])
        states = jnp.concatenate([states, last], axis=1)
        pooled = jnp.concatenate([first.pooled, second.pooled], axis=-1)
        return JointTextCondition(states, pooled, None)


@dataclasses.dataclass
class StableDiffusion3Pipeline(Pipeline):
    """Parts of a Stable Diffusion 3 or 3.5 model.

    Attributes:
      transformer, vae, text_encoder, text_encoder_2, text_encoder_3: NNX modules, or None where a
        subset was loaded; the last one, T5, may be left out.
      tokenizer, tokenizer_2: of `transformers.CLIPTokenizer`.
      tokenizer_3: T5's, or None.
      scheduler_config, model_index, carried: as every `Pipeline` has them.
      max_sequence_length: tokens that T5 reads, padding included.
    """

    transformer: SD3Transformer2DModel | Any
    vae: AutoencoderKL | Any
    text_encoder: CLIPTextModelWithProjection | Any
    text_encoder_2: CLIPTextModelWithProjection | Any
    text_encoder_3: T5EncoderModel | Any
    tokenizer: Any
    tokenizer_2: Any
    tokenizer_3: Any
    scheduler_config: Mapping[str, Any]
    model_index: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    carried: Mapping[str, Path] = dataclasses.field(default_factory=dict, kw_only=True)
    max_sequence_length: int = dataclasses.field(default=256, kw_only=True)

    MODELS: ClassVar[tuple[str, ...]] = (
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
    )
    TOKENIZERS: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2", "tokenizer_3")
    OPTIONAL: ClassVar[tuple[str, ...]] = ("text_encoder_3", "tokenizer_3")
    NOT_CARRIED: ClassVar[tuple[str, ...]] = ("feature_extractor", "image_encoder")
    DENOISER: ClassVar[str] = "transformer"
    PATCH: ClassVar[int] = 2

    @property
    def defaults(self) -> tuple[int, float]:
        """28 steps, guidance 7."""
        return 28, 7.0

    @property
    def prompt_encoder(self) -> SD3TextEncoders | None:
        """The text encoders as one module; None without CLIP's or the transformer."""
        if None in (self.text_encoder, self.text_encoder_2, self.transformer):
            return None
        return SD3TextEncoders(
            self.text_encoder,
            self.text_encoder_2,
            self.text_encoder_3,
            width=self.transformer.config.joint_attention_dim,
            length=self.max_sequence_length,
        )

    def tokenize(self, prompts: Sequence[str]) -> tuple[Int[np.ndarray, "N _"], ...]:
        """Token ids of the tokenizers, CLIP's and T5's."""
        length = context_length(self.tokenizer, self.text_encoder.config.max_position_embeddings)
        ids = [
            tokenize(each, prompts, max_length=length)
            for each in (self.tokenizer, self.tokenizer_2)
        ]
        if self.text_encoder_3 is not None:
            ids.append(tokenize(self.tokenizer_3, prompts, max_length=self.max_sequence_length))
        return tuple(ids)

    @staticmethod
    def encode(prompt_encoder: SD3TextEncoders, token_ids: Any) -> JointTextCondition:
        """Conditions of N prompts' token ids."""
        return prompt_encoder(token_ids)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the latents that the transformer was made for."""
        config = self.transformer.config
        return config.sample_size, config.sample_size, config.in_channels
