"""`Blip2ForImageTextRetrieval`: BLIP-2's contrastive and matching heads (Li et al. 2023, arXiv
2301.12597, stage 1).

Learned queries read a frozen vision transformer through the Q-Former, whose self-attention also
reads text.  An image is as many vectors as there are queries; the one nearest to the text counts.
Images are `[B, H, W, 3]` normalized with CLIP's mean and standard deviation, text is `[B, L]` token
ids of BERT's uncased tokenizer.  Attribute paths are those of transformers' state dicts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from .blip import BlipVisionConfig, BlipVisionModel, unit
from .configs import ModelConfig
from .layers.bert import BertAttention, Dense, Mask, Output, token_mask
from .layers.checks import check_axes
from .layers.encoder import ACTIVATIONS, EncoderConfig, layer_norm
from .layers.linear import linear
from .pretrained import PretrainedModel


@dataclasses.dataclass(frozen=True)
class Blip2VisionConfig(BlipVisionConfig):
    """Settings of the vision tower; the defaults are ViT-g's."""

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-6
    image_size: int = 224
    patch_size: int = 14

    MODEL_TYPE: ClassVar[str | None] = "blip_2_vision_model"
    FIXED: ClassVar[Mapping[str, Any]] = {"qkv_bias": True}


@dataclasses.dataclass(frozen=True)
class Blip2QFormerConfig(EncoderConfig):
    """Settings of the Q-Former."""

    intermediate_size: int = 3072
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    cross_attention_frequency: int = 2

    MODEL_TYPE: ClassVar[str | None] = "blip_2_qformer"
    FIXED: ClassVar[Mapping[str, Any]] = {"use_qformer_text_input": True}

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("intermediate_size", "vocab_size")
        self.require_positive("max_position_embeddings", "cross_attention_frequency")


@dataclasses.dataclass(frozen=True)
class Blip2Config(ModelConfig):
    """The vision tower, the Q-Former and the shared space."""

    vision_config: Blip2VisionConfig = Blip2VisionConfig()
    qformer_config: Blip2QFormerConfig = Blip2QFormerConfig()
    num_query_tokens: int = 32
    image_text_hidden_size: int = 256

    MODEL_TYPE: ClassVar[str | None] = "blip-2"
    STRICT: ClassVar[bool] = False

    def __post_init__(self):
        self.require_positive("num_query_tokens", "image_text_hidden_size")

    def to_dict(self) -> dict[str, Any]:
        raw = super().to_dict()
        raw["qformer_config"]["encoder_hidden_size"] = self.vision_config.hidden_size
        return raw


class Blip2TextEmbeddings(nnx.Module):
    """Token plus learned position embeddings; the Q-Former normalizes them."""

    def __init__(self, config: Blip2QFormerConfig, **init):
        self.longest = config.max_position_embeddings
        self.word_embeddings = nnx.Embed(config.vocab_size, config.hidden_size, **init)
        self.position_embeddings = nnx.Embed(self.longest, config.hidden_size, **init)

    def __call__(self, input_ids: Int[Array, "B L"]) -> Float[Array, "B L C"]:
        check_axes(input_ids, "B L", "this model's input_ids")
        length = input_ids.shape[1]
        if length > self.longest:
            raise ValueError(f"this model reads {self.longest} tokens, received {length}.")
        return self.word_embeddings(input_ids) + self.position_embeddings(jnp.arange(length))


class Blip2QFormerLayer(nnx.Module):
    """Joint self-attention; then queries read the image, in some layers, and each kind of token has
    a perceptron of its own."""

    def __init__(self, config: Blip2QFormerConfig, index: int, image_features: int, **init):
        width, hidden = config.hidden_size, config.intermediate_size
        self.activation = config.hidden_act
        self.reads_image = index % config.cross_attention_frequency == 0
        self.attention = BertAttention(config, "attention", **init)
        if self.reads_image:
            self.crossattention = BertAttention(config, "attention", image_features, **init)
        self.intermediate = Dense(width, hidden, **init)
        self.output = Output(config, hidden, **init)
        self.intermediate_query = Dense(width, hidden, **init)
        self.output_query = Output(config, hidden, **init)

    def __call__(
        self,
        x: Float[Array, "B L C"],
        queries: int,
        image: Float[Array, "B T E"] | None,
        mask: Mask | None,
    ) -> Float[Array, "B L C"]:
        activation = ACTIVATIONS[self.activation]
        x = self.attention(x, mask=mask)
        query, text = x[:, :queries], x[:, queries:]
        if queries and self.reads_image:
            query = self.crossattention(query, image)
        query = self.output_query(activation(self.intermediate_query(query)), query)
        text = self.output(activation(self.intermediate(text)), text)
        return jnp.concatenate([query, text], axis=1)


class Blip2QFormerEncoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: Blip2QFormerConfig, image_features: int, **init):
        self.layer = nnx.List(
            [
                Blip2QFormerLayer(config, index, image_features, **init)
                for index in range(config.num_hidden_layers)
            ]
        )

    def __call__(self, x: Array, queries: int, image: Array | None, mask: Mask | None) -> Array:
        for layer in self.layer:
            x = layer(x, queries, image, mask)
        return x


class Blip2QFormerModel(nnx.Module):
    """The Q-Former."""

    def __init__(self, config: Blip2QFormerConfig, image_features: int, **init):
        self.layernorm = layer_norm(config, **init)
        self.encoder = Blip2QFormerEncoder(config, image_features, **init)

    def __call__(
        self,
        tokens: Float[Array, "B L C"],
        queries: int,
        *,
        image: Float[Array, "B T E"] | None = None,
        mask: Mask | None = None,
    ) -> Float[Array, "B L C"]:
        """Encode `queries` query tokens and, behind them, text; `mask` is over both."""
        return self.encoder(self.layernorm(tokens), queries, image, mask)


class Blip2ForImageTextRetrieval(PretrainedModel):
    """BLIP-2's contrastive and matching heads."""

    config: Blip2Config
    config_class = Blip2Config
    pytorch_class = "Blip2ForImageTextRetrieval"
    pytorch_library = "transformers"
    pytorch_ignored = ("*embeddings.position_ids",)

    def _build(self, config: Blip2Config, **init):
        width, shared = config.qformer_config.hidden_size, config.image_text_hidden_size
        self.vision_model = BlipVisionModel(config.vision_config, **init)
        tokens = (1, config.num_query_tokens, width)
        self.query_tokens = nnx.Param(
            0.02 * jax.random.normal(init["rngs"].params(), tokens, init["param_dtype"])
        )
        self.embeddings = Blip2TextEmbeddings(config.qformer_config, **init)
        self.qformer = Blip2QFormerModel(
            config.qformer_config, config.vision_config.hidden_size, **init
        )
        self.vision_projection = linear(width, shared, **init)
        self.text_projection = linear(width, shared, **init)
        self.itm_head = linear(width, 2, **init)

    def _queries(self, batch: int) -> Float[Array, "B Q C"]:
        tokens = self.query_tokens[...]
        return jnp.broadcast_to(tokens, (batch, *tokens.shape[1:]))

    def get_image_features(self, pixel_values: Float[Array, "B H W 3"]) -> Float[Array, "B Q P"]:
        """Unit vectors in the shared space, one per query."""
        image = self.vision_model(pixel_values)
        queries = self._queries(image.shape[0])
        return unit(self.vision_projection(self.qformer(queries, queries.shape[1], image=image)))

    def get_text_features(
        self, input_ids: Int[Array, "B L"], attention_mask: Int[Array, "B L"] | None = None
    ) -> Float[Array, "B P"]:
        """Unit vectors in the shared space."""
        states = self.qformer(self.embeddings(input_ids), 0, mask=token_mask(attention_mask))
        return unit(self.text_projection(states[:, 0]))

    def matching_logits(
        self,
        input_ids: Int[Array, "B L"],
        pixel_values: Float[Array, "B H W 3"],
        attention_mask: Int[Array, "B L"] | None = None,
    ) -> Float[Array, "B 2"]:
        """Logits of "no match" and "match" for each pair, mean over the queries."""
        image = self.vision_model(pixel_values)
        queries = self._queries(image.shape[0])
        count = queries.shape[1]
        mask = token_mask(attention_mask)
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (count, 0)), constant_values=True)
        tokens = jnp.concatenate([queries, self.embeddings(input_ids)], axis=1)
        states = self.qformer(tokens, count, image=image, mask=mask)
        return self.itm_head(states[:, :count]).mean(axis=1)

    def __call__(
        self,
        input_ids: Int[Array, "T L"],
        pixel_values: Float[Array, "I H W 3"],
        attention_mask: Int[Array, "T L"] | None = None,
    ) -> Float[Array, "I T"]:
        """Cosine of every image and every text, for the image's query that is nearest to it."""
        text = self.get_text_features(input_ids, attention_mask)
        image = self.get_image_features(pixel_values)
        return jnp.einsum("iqp,tp->iqt", image, text).max(axis=1)
