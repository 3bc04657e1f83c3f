"""`BlipForImageTextRetrieval`: how well a text says what an image shows (Li et al. 2022, BLIP,
arXiv 2201.12086).

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

from .configs import ModelConfig
from .layers.attention import dot_product_attention
from .layers.bert import BertAttention, Dense, Mask, Output, token_mask
from .layers.checks import check_axes
from .layers.encoder import ACTIVATIONS, MLP, EncoderConfig, layer_norm
from .layers.linear import linear
from .pretrained import PretrainedModel


@dataclasses.dataclass(frozen=True)
class BlipVisionConfig(EncoderConfig):
    """Settings of the vision tower; the defaults are those of the base model."""

    intermediate_size: int = 3072
    layer_norm_eps: float = 1e-5
    image_size: int = 384
    patch_size: int = 16

    MODEL_TYPE: ClassVar[str | None] = "blip_vision_model"

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("intermediate_size", "image_size", "patch_size")


@dataclasses.dataclass(frozen=True)
class BlipTextConfig(EncoderConfig):
    """Settings of the text tower; the defaults are those of the base model."""

    intermediate_size: int = 3072
    num_attention_heads: int = 8
    vocab_size: int = 30524
    max_position_embeddings: int = 512

    MODEL_TYPE: ClassVar[str | None] = "blip_text_model"
    FIXED: ClassVar[Mapping[str, Any]] = {"is_decoder": True}  # it has cross-attention

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("intermediate_size", "vocab_size", "max_position_embeddings")


@dataclasses.dataclass(frozen=True)
class BlipConfig(ModelConfig):
    """Both towers and the shared space."""

    text_config: BlipTextConfig = BlipTextConfig()
    vision_config: BlipVisionConfig = BlipVisionConfig()
    image_text_hidden_size: int = 256

    MODEL_TYPE: ClassVar[str | None] = "blip"
    STRICT: ClassVar[bool] = False

    def to_dict(self) -> dict[str, Any]:
        raw = super().to_dict()
        raw["text_config"]["encoder_hidden_size"] = self.vision_config.hidden_size
        return raw


def unit(x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    """Normalized along the last axis."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


# ---- vision ----


class BlipVisionEmbeddings(nnx.Module):
    """Patches, a class token in front, learned positions."""

    def __init__(self, config: BlipVisionConfig, **init):
        width, patch = config.hidden_size, (config.patch_size,) * 2
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        rngs, dtype = init["rngs"], init["param_dtype"]
        self.class_embedding = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (1, 1, width), dtype)
        )
        self.patch_embedding = nnx.Conv(3, width, patch, strides=patch, padding="VALID", **init)
        self.position_embedding = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (1, tokens, width), dtype)
        )

    def __call__(self, pixel_values: Float[Array, "B H W 3"]) -> Float[Array, "B T C"]:
        patches = self.patch_embedding(pixel_values)
        batch, width = patches.shape[0], patches.shape[-1]
        first = jnp.broadcast_to(self.class_embedding[...], (batch, 1, width)).astype(patches.dtype)
        tokens = jnp.concatenate([first, patches.reshape(batch, -1, width)], axis=1)
        return tokens + self.position_embedding[...].astype(tokens.dtype)


class BlipVisionAttention(nnx.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, config: BlipVisionConfig, **init):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.qkv = linear(width, 3 * width, **init)
        self.projection = linear(width, width, **init)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        parts = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1)  # [B, T, 3, H, D]
        attended = dot_product_attention(parts[:, :, 0], parts[:, :, 1], parts[:, :, 2])
        return self.projection(attended.reshape(x.shape))


class BlipVisionLayer(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: BlipVisionConfig, **init):
        self.self_attn = BlipVisionAttention(config, **init)
        self.layer_norm1 = layer_norm(config, **init)
        self.mlp = MLP(config, config.intermediate_size, **init)
        self.layer_norm2 = layer_norm(config, **init)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class BlipVisionEncoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: BlipVisionConfig, **init):
        self.layers = nnx.List(
            [BlipVisionLayer(config, **init) for _ in range(config.num_hidden_layers)]
        )

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        for layer in self.layers:
            x = layer(x)
        return x


class BlipVisionModel(nnx.Module):
    """The vision transformer that BLIP and BLIP-2 share."""

    def __init__(self, config: BlipVisionConfig, **init):
        self.size = config.image_size
        self.embeddings = BlipVisionEmbeddings(config, **init)
        self.encoder = BlipVisionEncoder(config, **init)
        self.post_layernorm = layer_norm(config, **init)

    def __call__(self, pixel_values: Float[Array, "B H W 3"]) -> Float[Array, "B T C"]:
        """Normalized states of all tokens, the class token's first."""
        if pixel_values.shape[1:] != (self.size, self.size, 3):
            raise ValueError(
                f"this model takes [B, {self.size}, {self.size}, 3] images, received "
                f"{pixel_values.shape}."
            )
        return self.post_layernorm(self.encoder(self.embeddings(pixel_values)))


# ---- text ----


class BlipTextEmbeddings(nnx.Module):
    """Token plus learned position embeddings, normalized."""

    def __init__(self, config: BlipTextConfig, **init):
        width = config.hidden_size
        self.word_embeddings = nnx.Embed(config.vocab_size, width, **init)
        self.position_embeddings = nnx.Embed(config.max_position_embeddings, width, **init)
        self.LayerNorm = layer_norm(config, **init)

    def __call__(self, input_ids: Int[Array, "B L"]) -> Float[Array, "B L C"]:
        positions = self.position_embeddings(jnp.arange(input_ids.shape[1]))
        return self.LayerNorm(self.word_embeddings(input_ids) + positions)


class BlipTextLayer(nnx.Module):
    """Post-norm layer; where there is an image, it is attended to after the text."""

    def __init__(self, config: BlipTextConfig, image_features: int, **init):
        width, hidden = config.hidden_size, config.intermediate_size
        self.activation = config.hidden_act
        self.attention = BertAttention(config, "self", **init)
        self.crossattention = BertAttention(config, "self", image_features, **init)
        self.intermediate = Dense(width, hidden, **init)
        self.output = Output(config, hidden, **init)

    def __call__(
        self, x: Float[Array, "B L C"], image: Float[Array, "B T E"] | None, mask: Mask | None
    ) -> Float[Array, "B L C"]:
        x = self.attention(x, mask=mask)
        if image is not None:
            x = self.crossattention(x, image)
        return self.output(ACTIVATIONS[self.activation](self.intermediate(x)), x)


class BlipTextEncoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: BlipTextConfig, image_features: int, **init):
        self.layer = nnx.List(
            [BlipTextLayer(config, image_features, **init) for _ in range(config.num_hidden_layers)]
        )

    def __call__(self, x: Array, image: Array | None, mask: Mask | None) -> Array:
        for layer in self.layer:
            x = layer(x, image, mask)
        return x


class BlipTextModel(nnx.Module):
    """BLIP's text transformer, reading in both directions."""

    def __init__(self, config: BlipTextConfig, image_features: int, **init):
        self.longest = config.max_position_embeddings
        self.embeddings = BlipTextEmbeddings(config, **init)
        self.encoder = BlipTextEncoder(config, image_features, **init)

    def __call__(
        self,
        input_ids: Int[Array, "B L"],
        mask: Mask | None,
        image: Float[Array, "B T E"] | None = None,
    ) -> Float[Array, "B L C"]:
        check_axes(input_ids, "B L", "this model's input_ids")
        if input_ids.shape[1] > self.longest:
            raise ValueError(
                f"this model reads {self.longest} tokens, received {input_ids.shape[1]}."
            )
        return self.encoder(self.embeddings(input_ids), image, mask)


# ---- the model ----


class BlipForImageTextRetrieval(PretrainedModel):
    """BLIP's contrastive and matching heads."""

    config: BlipConfig
    config_class = BlipConfig
    pytorch_class = "BlipForImageTextRetrieval"
    pytorch_library = "transformers"
    pytorch_ignored = ("*embeddings.position_ids",)

    def _build(self, config: BlipConfig, **init):
        image, text = config.vision_config.hidden_size, config.text_config.hidden_size
        shared = config.image_text_hidden_size
        self.vision_model = BlipVisionModel(config.vision_config, **init)
        self.text_encoder = BlipTextModel(config.text_config, image, **init)
        self.vision_proj = linear(image, shared, **init)
        self.text_proj = linear(text, shared, **init)
        self.itm_head = linear(text, 2, **init)

    def get_image_features(self, pixel_values: Float[Array, "B H W 3"]) -> Float[Array, "B P"]:
        """Unit vectors in the shared space."""
        return unit(self.vision_proj(self.vision_model(pixel_values)[:, 0]))

    def get_text_features(
        self, input_ids: Int[Array, "B L"], attention_mask: Int[Array, "B L"] | None = None
    ) -> Float[Array, "B P"]:
        """Unit vectors in the shared space."""
        states = self.text_encoder(input_ids, token_mask(attention_mask))
        return unit(self.text_proj(states[:, 0]))

    def matching_logits(
        self,
        input_ids: Int[Array, "B L"],
        pixel_values: Float[Array, "B H W 3"],
        attention_mask: Int[Array, "B L"] | None = None,
    ) -> Float[Array, "B 2"]:
        """Logits of "no match" and "match" for each pair."""
        image = self.vision_model(pixel_values)
        states = self.text_encoder(input_ids, token_mask(attention_mask), image)
        return self.itm_head(states[:, 0])

    def __call__(
        self,
        input_ids: Int[Array, "T L"],
        pixel_values: Float[Array, "I H W 3"],
        attention_mask: Int[Array, "T L"] | None = None,
    ) -> Float[Array, "I T"]:
        """Cosine of every image and every text."""
        text = self.get_text_features(input_ids, attention_mask)
        return self.get_image_features(pixel_values) @ text.T
