"""Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952): a UNet that reads two text encoders.

It attends to the penultimate states of both, side by side, and its embedding of time takes the
second one's projected, pooled state and the sizes of the image in (`TextCondition`).
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ..clip import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from ..unet_2d_condition import TextCondition
from .stable_diffusion import StableDiffusionPipeline
from .tokenizers import tokenize


class TextEncodersOutput(NamedTuple):
    """What the two encoders say about texts, under the names of `CLIPTextOutput`.

    Attributes:
      last_hidden_state: [B, L, C1 + C2] what the UNet attends to: penultimate states, in spite of
        the name.
      pooled: [B, C1 + P] pooled states of both, each of unit length, so that cosines of texts are
        the mean of the two encoders'.
      condition: all that the UNet reads.
    """

    last_hidden_state: Float[Array, "B L C"]
    pooled: Float[Array, "B P"]
    condition: TextCondition


class TextEncoders(nnx.Module):
    """The two text encoders of SDXL as one, called as `CLIPTextModel` is.

    Token ids are those of the first tokenizer, [B, L], from which the second's differ in the
    padding; or [B, 2, L] of both.  (They also differ in a "!" of the text, where that is the second
    one's padding: where images are to be exactly diffusers', give both.)

    Args:
      text_encoder, text_encoder_2: the encoders; they are used, not copied.
      pad_tokens: the id that each tokenizer pads with.
      end_token: the id at a text's end.
      size: height and width, in pixels, of the images that texts are encoded for.
    """

    def __init__(
        self,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        *,
        pad_tokens: tuple[int, int],
        end_token: int,
        size: tuple[int, int],
    ):
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.pad_tokens = pad_tokens
        self.end_token = end_token
        self.size = size

    @property
    def config(self) -> CLIPTextConfig:
        """The first encoder's."""
        return self.text_encoder.config

    @property
    def towers(self) -> tuple[CLIPTextModel, CLIPTextModel]:
        """The two text towers."""
        return self.text_encoder, self.text_encoder_2.text_model

    def embed_tokens(self, input_ids: Int[Array, "B *two L"]) -> Float[Array, "B L C"]:
        """Embeddings of tokens, both encoders' side by side: [B, L, C1 + C2]."""
        both = zip(self.towers, self._ids(input_ids), strict=True)
        return jnp.concatenate([tower.embed_tokens(ids) for tower, ids in both], axis=-1)

    def __call__(
        self,
        input_ids: Int[Array, "B *two L"] | None = None,
        *,
        inputs_embeds: Float[Array, "B L C"] | None = None,
        eos_positions: Int[Array, " B"] | None = None,
    ) -> TextEncodersOutput:
        """Encode token ids, or in their place what `embed_tokens` gives."""
        parts: Any = (None, None)
        if inputs_embeds is not None:
            parts = jnp.split(inputs_embeds, [self.config.hidden_size], axis=-1)
        ids = (None, None) if input_ids is None else self._ids(input_ids)
        first, second = (
            encoder(i, inputs_embeds=part, eos_positions=eos_positions)
            for encoder, i, part in zip(
                (self.text_encoder, self.text_encoder_2), ids, parts, strict=True
            )
        )
        states = jnp.concatenate([first.penultimate, second.penultimate], axis=-1)
        pooled = jnp.concatenate([_unit(first.pooled), _unit(second.pooled)], axis=-1)
        sizes = jnp.asarray([*self.size, 0, 0, *self.size], jnp.float32)
        sizes = jnp.broadcast_to(sizes, (len(states), 6))
        return TextEncodersOutput(states, pooled, TextCondition(states, second.pooled, sizes))

    def _ids(self, input_ids: Array) -> tuple[Array, Array]:
        if input_ids.ndim == 3:
            return input_ids[:, 0], input_ids[:, 1]
        first, second = self.pad_tokens
        # The run of padding at the end; the first of it ends the text where it is padded with that.
        pads = jnp.cumprod((input_ids == first)[:, ::-1], axis=1)[:, ::-1].astype(bool)
        if first == self.end_token:
            pads = pads & jnp.pad(pads, ((0, 0), (1, 0)))[:, :-1]
        return input_ids, jnp.where(pads, second, input_ids)


def _unit(x: Float[Array, "B C"]) -> Float[Array, "B C"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@dataclasses.dataclass
class StableDiffusionXLPipeline(StableDiffusionPipeline):
    """Parts of an SDXL model.

    Attributes:
      text_encoder_2: the encoder whose pooled state the UNet reads too.
      tokenizer_2: its tokenizer: of the same vocabulary, and padding in its own way.
    """

    text_encoder_2: CLIPTextModelWithProjection | Any = None
    tokenizer_2: Any = None

    MODELS: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder", "text_encoder_2")
    TOKENIZERS: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")
    TEXT_TOWERS: ClassVar[Mapping[str, str]] = {
        "text_encoder": "text_encoder.",
        "text_encoder_2": "text_encoder_2.text_model.",
    }
    NOT_CARRIED: ClassVar[tuple[str, ...]] = ("feature_extractor", "image_encoder")
    SIZES: ClassVar[int] = 6

    @property
    def force_zeros_for_empty_prompt(self) -> bool:  # type: ignore[override]
        """Whether guidance without a negative prompt starts from zeros, not from an empty text."""
        return bool(self.model_index.get("force_zeros_for_empty_prompt", True))

    @property
    def prompt_encoder(self) -> Any:
        """Both text encoders as one, for images of the UNet's own size; None without them.

        Raises:
          ValueError: the tokenizers have different vocabularies.
        """
        parts = (self.text_encoder, self.text_encoder_2, self.tokenizer, self.tokenizer_2)
        if any(part is None for part in parts):
            return None
        lengths = [len(tokenizer) for tokenizer in parts[2:]]
        if lengths[0] != lengths[1]:
            raise ValueError(
                f"SDXL's two tokenizers share a vocabulary; received {lengths[0]} and "
                f"{lengths[1]} tokens."
            )
        # Of a pipeline without its UNet or autoencoder the encoders are of use too.
        factor = 8 if self.vae is None else self.vae.config.downsampling
        size = (None if self.unet is None else self.unet.config.sample_size) or 128
        height, width = size if isinstance(size, tuple) else (size, size)
        return TextEncoders(
            *parts[:2],
            pad_tokens=(self.tokenizer.pad_token_id, self.tokenizer_2.pad_token_id),
            end_token=self.tokenizer.eos_token_id,
            size=(height * factor, width * factor),
        )

    def with_prompt_encoder(self, encoder: Any) -> "StableDiffusionXLPipeline":
        """The pipeline with other text encoders."""
        return dataclasses.replace(
            self, text_encoder=encoder.text_encoder, text_encoder_2=encoder.text_encoder_2
        )

    def tokenize(self, prompts: Sequence[str]) -> Int[np.ndarray, "N two L"]:
        """Token ids of both tokenizers, [N, 2, L]."""
        first = super().tokenize(prompts)
        with warnings.catch_warnings():  # of a long prompt, told by the first
            warnings.simplefilter("ignore", UserWarning)
            second = tokenize(self.tokenizer_2, prompts, max_length=self.max_length)
        return np.stack([first, second], axis=1)

    @staticmethod
    def for_size(
        condition: TextCondition, height: int, width: int, sizes: Float[Array, " 6"] | None = None
    ) -> TextCondition:
        """A condition for images of a size, or with other `TextCondition.time_ids`.

        Those are in pixels: height and width of the original, top and left of the crop, height and
        width of the target; by default of an uncropped image.
        """
        if sizes is None:
            sizes = jnp.asarray([height, width, 0, 0, height, width], jnp.float32)
        return condition._replace(time_ids=jnp.broadcast_to(sizes, condition.time_ids.shape))

    @staticmethod
    def without_text(condition: TextCondition) -> TextCondition:
        """Zeros in place of texts; sizes stay."""
        zeros = jax.tree.map(jnp.zeros_like, condition)
        return zeros._replace(time_ids=condition.time_ids)

    @property
    def schedule_config(self) -> Mapping[str, Any]:
        """The scheduler's settings, which diffusers' class of this name takes as they are."""
        return self.scheduler_config
