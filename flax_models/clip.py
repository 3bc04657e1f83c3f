"""CLIP (Radford et al. 2021): text transformer, vision transformer, and the contrastive model.

Text is `[B, L]` token ids, images are `[B, H, W, 3]` normalized with the processor's mean and
standard deviation.  Attribute paths are those of transformers' state dicts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..kernels.memory import in_parts
from .configs import ModelConfig
from .layers.attention import dot_product_attention
from .layers.checks import check_axes
from .layers.embeddings import Dtype
from .layers.encoder import MLP, EncoderConfig, layer_norm
from .layers.linear import linear
from .layers.remat import Remat, recomputed
from .pretrained import Pretrained, RecomputingModel


@dataclasses.dataclass(frozen=True)
class _TowerConfig(EncoderConfig):
    """What the two towers share."""

    intermediate_size: int = 3072
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    FIXED: ClassVar[Mapping[str, Any]] = {"attention_dropout": 0.0}

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("intermediate_size")


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(_TowerConfig):
    """Settings of the text tower; the defaults are those of SD 1.x's text encoder.

    `eos_token_id` decides where the sequence is pooled: 2 (the published SD 1.x value) pools at the
    largest token id, any other value at that token's first position.
    """

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407
    pad_token_id: int | None = 1

    MODEL_TYPE: ClassVar[str | None] = "clip_text_model"

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("vocab_size", "max_position_embeddings")

    @classmethod
    def stable_diffusion_1_5(cls) -> "CLIPTextConfig":
        """The published SD 1.x text encoder (CLIP ViT-L/14's): 123,060,480 parameters."""
        return cls(projection_dim=768, eos_token_id=2, bos_token_id=0)

    @classmethod
    def stable_diffusion_2(cls) -> "CLIPTextConfig":
        """The published SD 2.x text encoder (OpenCLIP ViT-H/14's without its last layer):
        340,387,840 parameters."""
        return cls(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=23,
            num_attention_heads=16,
            hidden_act="gelu",
            eos_token_id=2,
            bos_token_id=0,
        )

    @classmethod
    def stable_diffusion_xl_2(cls) -> "CLIPTextConfig":
        """SDXL's published second text encoder (OpenCLIP ViT-bigG/14's): 694,659,840 parameters."""
        return cls(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            hidden_act="gelu",
            projection_dim=1280,
            eos_token_id=2,
            bos_token_id=0,
        )


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(_TowerConfig):
    """Settings of the vision tower; the defaults are ViT-B/32's."""

    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3

    MODEL_TYPE: ClassVar[str | None] = "clip_vision_model"

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("image_size", "patch_size", "num_channels")
        self.require(
            self.image_size % self.patch_size == 0,
            f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}.",
        )


@dataclasses.dataclass(frozen=True)
class CLIPConfig(ModelConfig):
    """Both towers and the shared space."""

    text_config: CLIPTextConfig = CLIPTextConfig()
    vision_config: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592

    MODEL_TYPE: ClassVar[str | None] = "clip"
    STRICT: ClassVar[bool] = False


class CLIPTextOutput(NamedTuple):
    """What a text tower says about texts.

    Attributes:
      last_hidden_state: [B, L, C] after the final layer norm.
      pooled: its row at the end of each text: [B, C], or projected [B, P].
      penultimate: [B, L, C] what the last layer reads (transformers' `hidden_states[-2]`).
    """

    last_hidden_state: Float[Array, "B L C"]
    pooled: Float[Array, "B P"]
    penultimate: Float[Array, "B L C"]

    @property
    def condition(self) -> Float[Array, "B L C"]:
        """What a UNet of Stable Diffusion 1 and 2 reads."""
        return self.last_hidden_state


class CLIPVisionOutput(NamedTuple):
    """`last_hidden_state` [B, 1+P, C] before, `pooled` [B, C] after the final layer norm."""

    last_hidden_state: Float[Array, "B T C"]
    pooled: Float[Array, "B C"]


class CLIPAttention(nnx.Module):
    """Multi-head self-attention with biases; a text's is causal."""

    def __init__(self, config: _TowerConfig, **init):
        width = config.hidden_size
        self.is_causal = isinstance(config, CLIPTextConfig)
        self.heads = config.num_attention_heads
        self.q_proj = linear(width, width, **init)
        self.k_proj = linear(width, width, **init)
        self.v_proj = linear(width, width, **init)
        self.out_proj = linear(width, width, **init)

    def __call__(
        self, x: Float[Array, "B L C"], mask: Bool[Array, "B 1 1 L"] | None
    ) -> Float[Array, "B L C"]:
        shape = (*x.shape[:2], self.heads, -1)
        query, key, value = (
            proj(x).reshape(shape) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = dot_product_attention(query, key, value, mask=mask, is_causal=self.is_causal)
        return self.out_proj(attended.reshape(x.shape))


class CLIPEncoderLayer(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: _TowerConfig, **init):
        self.self_attn = CLIPAttention(config, **init)
        self.layer_norm1 = layer_norm(config, **init)
        self.mlp = MLP(config, config.intermediate_size, **init)
        self.layer_norm2 = layer_norm(config, **init)

    def __call__(self, x: Array, mask: Array | None) -> Array:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nnx.Module):
    """The stack of layers; `remat` recomputes each one in the backward pass.

    Returns the output of the last layer and, second, its input.  On a CPU a large batch goes
    through the stack in parts, one after another, whose activations stay in the cache.
    """

    def __init__(self, config: _TowerConfig, *, remat: Remat, **init):
        self.remat = remat
        self.layers = nnx.List(
            [CLIPEncoderLayer(config, **init) for _ in range(config.num_hidden_layers)]
        )

    def __call__(self, x: Array, mask: Array | None) -> tuple[Array, Array]:
        return in_parts(self.stack, x, mask, tokens=x.shape[1])

    def stack(self, x: Array, mask: Array | None) -> tuple[Array, Array]:
        """All layers on all of `x`."""
        before = x
        for layer in self.layers:
            before = x
            x = recomputed(layer.__call__, self.remat)(x, mask)
        return x, before


class CLIPTextEmbeddings(nnx.Module):
    """Token plus learned position embeddings."""

    def __init__(self, config: CLIPTextConfig, **init):
        self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, **init)
        self.position_embedding = nnx.Embed(
            config.max_position_embeddings, config.hidden_size, **init
        )

    def __call__(self, token_embeddings: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        return token_embeddings + self.position_embedding(jnp.arange(token_embeddings.shape[1]))


def pooling_positions(config: CLIPTextConfig, input_ids: Int[Array, "B L"]) -> Int[Array, " B"]:
    """Where CLIP pools each sequence: see `CLIPTextConfig.eos_token_id`."""
    if config.eos_token_id == 2:
        return jnp.argmax(input_ids, axis=-1)
    return jnp.argmax(input_ids == config.eos_token_id, axis=-1)


class CLIPTextModel(RecomputingModel):
    """CLIP's text tower, the text encoder of Stable Diffusion."""

    config: CLIPTextConfig
    config_class = CLIPTextConfig
    pytorch_class = "CLIPTextModel"
    pytorch_library = "transformers"
    pytorch_prefix = "text_model."
    pytorch_ignored = ("*embeddings.position_ids",)

    def _build(self, config: CLIPTextConfig, *, remat: Remat, **init):
        self.embeddings = CLIPTextEmbeddings(config, **init)
        self.encoder = CLIPEncoder(config, remat=remat, **init)
        self.final_layer_norm = layer_norm(config, **init)

    @property
    def towers(self) -> "tuple[CLIPTextModel, ...]":
        """The text towers inside: this one alone."""
        return (self,)

    def embed_tokens(self, input_ids: Int[Array, "B L"]) -> Float[Array, "B L C"]:
        """Embeddings of tokens, as `inputs_embeds` takes them."""
        return self.embeddings.token_embedding(input_ids)

    def __call__(
        self,
        input_ids: Int[Array, "B L"] | None = None,
        *,
        inputs_embeds: Float[Array, "B L C"] | None = None,
        attention_mask: Bool[Array, "B L"] | Int[Array, "B L"] | None = None,
        eos_positions: Int[Array, " B"] | None = None,
    ) -> CLIPTextOutput:
        """Encode token ids, or token embeddings in their place.

        Args:
          input_ids: [B, L] int32; L at most `max_position_embeddings`.
          inputs_embeds: [B, L, C] token embeddings (positions are added here); they override the
            lookup of `input_ids`, which then only say where to pool.
          attention_mask: [B, L], non-zero for tokens that may be attended to. Stable Diffusion
            attends to all, padding included, and passes none.
          eos_positions: [B] pooling positions; default: found in `input_ids`.

        Raises:
          ValueError: neither ids nor embeddings, a sequence that is too long, or embeddings
            without a place to pool.
        """
        if input_ids is None and inputs_embeds is None:
            raise ValueError("CLIPTextModel needs input_ids or inputs_embeds.")
        if inputs_embeds is None:
            assert input_ids is not None
            check_axes(input_ids, "B L", "CLIPTextModel's input_ids")
            inputs_embeds = self.embed_tokens(input_ids)
        check_axes(inputs_embeds, "B L C", "CLIPTextModel's inputs_embeds")
        length = inputs_embeds.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"CLIPTextModel takes at most {self.config.max_position_embeddings} tokens, "
                f"received {length}."
            )
        if eos_positions is None:
            if input_ids is None:
                raise ValueError(
                    "inputs_embeds alone do not say where to pool: pass eos_positions."
                )
            eos_positions = pooling_positions(self.config, input_ids)
        mask = None if attention_mask is None else (attention_mask != 0)[:, None, None, :]
        x, penultimate = self.encoder(self.embeddings(inputs_embeds), mask)
        x = self.final_layer_norm(x)
        pooled = jnp.take_along_axis(x, eos_positions[:, None, None], axis=1)[:, 0]
        return CLIPTextOutput(x, pooled, penultimate)


class CLIPTextModelWithProjection(Pretrained, nnx.Module):
    """A text tower whose pooled state is projected: SDXL's second text encoder.

    Arguments of making and of calling it are those of `CLIPTextModel`; so is its output, whose
    `pooled` is the projection (transformers' `text_embeds`), [B, projection_dim].
    """

    config_class = CLIPTextConfig
    pytorch_class = "CLIPTextModelWithProjection"
    pytorch_library = "transformers"
    pytorch_ignored = ("*embeddings.position_ids",)

    def __init__(
        self,
        config: CLIPTextConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        remat: Remat = False,
        rngs: nnx.Rngs,
    ):
        init = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.text_model = CLIPTextModel(config, remat=remat, **init)
        self.text_projection = linear(
            config.hidden_size, config.projection_dim, use_bias=False, **init
        )

    @property
    def config(self) -> CLIPTextConfig:
        """The text tower's."""
        return self.text_model.config

    def __call__(
        self, input_ids: Int[Array, "B L"] | None = None, **inputs: Array | None
    ) -> CLIPTextOutput:
        """Encode token ids, or token embeddings in their place, as `CLIPTextModel` does."""
        output = self.text_model(input_ids, **inputs)
        return output._replace(pooled=self.text_projection(output.pooled))


class CLIPVisionEmbeddings(nnx.Module):
    """Patches, a class token in front, learned positions."""

    def __init__(self, config: CLIPVisionConfig, **init):
        patch = (config.patch_size,) * 2
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        rngs, param_dtype = init["rngs"], init["param_dtype"]
        self.class_embedding = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (config.hidden_size,), param_dtype)
        )
        self.patch_embedding = nnx.Conv(
            config.num_channels,
            config.hidden_size,
            patch,
            strides=patch,
            padding="VALID",
            use_bias=False,
            **init,
        )
        self.position_embedding = nnx.Embed(tokens, config.hidden_size, **init)

    def __call__(self, pixel_values: Float[Array, "B H W 3"]) -> Float[Array, "B T C"]:
        patches = self.patch_embedding(pixel_values)
        batch, width = patches.shape[0], patches.shape[-1]
        patches = patches.reshape(batch, -1, width)  # [B, P, C]
        first = jnp.broadcast_to(self.class_embedding[...].astype(patches.dtype), (batch, 1, width))
        tokens = jnp.concatenate([first, patches], axis=1)
        return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))


class CLIPVisionModel(RecomputingModel):
    """CLIP's vision tower (ViT)."""

    config: CLIPVisionConfig
    config_class = CLIPVisionConfig
    pytorch_class = "CLIPVisionModel"
    pytorch_library = "transformers"
    pytorch_prefix = "vision_model."
    pytorch_ignored = ("*embeddings.position_ids",)

    def _build(self, config: CLIPVisionConfig, *, remat: Remat, **init):
        self.embeddings = CLIPVisionEmbeddings(config, **init)
        self.pre_layrnorm = layer_norm(config, **init)  # sic: the published name
        self.encoder = CLIPEncoder(config, remat=remat, **init)
        self.post_layernorm = layer_norm(config, **init)

    def __call__(self, pixel_values: Float[Array, "B H W 3"]) -> CLIPVisionOutput:
        """Encode images [B, image_size, image_size, 3], normalized for CLIP."""
        size = self.config.image_size
        if pixel_values.shape[1:] != (size, size, self.config.num_channels):
            raise ValueError(
                f"CLIPVisionModel takes [B, {size}, {size}, {self.config.num_channels}] images, "
                f"received {pixel_values.shape}."
            )
        x, _ = self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)), None)
        return CLIPVisionOutput(x, self.post_layernorm(x[:, 0]))


class CLIPModel(RecomputingModel):
    """Both towers, projected into one space.  Arguments as for `CLIPTextModel`."""

    config: CLIPConfig
    config_class = CLIPConfig
    pytorch_class = "CLIPModel"
    pytorch_library = "transformers"
    pytorch_ignored = ("*embeddings.position_ids",)

    def _build(self, config: CLIPConfig, *, remat: Remat, **init):
        self.text_model = CLIPTextModel(config.text_config, remat=remat, **init)
        self.vision_model = CLIPVisionModel(config.vision_config, remat=remat, **init)
        self.text_projection = linear(
            config.text_config.hidden_size, config.projection_dim, use_bias=False, **init
        )
        self.visual_projection = linear(
            config.vision_config.hidden_size, config.projection_dim, use_bias=False, **init
        )
        self.logit_scale = nnx.Param(
            jnp.asarray(config.logit_scale_init_value, init["param_dtype"])
        )

    def get_text_features(
        self, input_ids: Int[Array, "B L"], attention_mask: Array | None = None
    ) -> Float[Array, "B P"]:
        """Projected, unnormalized text embeddings [B, projection_dim]."""
        return self.text_projection(
            self.text_model(input_ids, attention_mask=attention_mask).pooled
        )

    def get_image_features(self, pixel_values: Float[Array, "B H W 3"]) -> Float[Array, "B P"]:
        """Projected, unnormalized image embeddings [B, projection_dim]."""
        return self.visual_projection(self.vision_model(pixel_values).pooled)

    def __call__(
        self,
        input_ids: Int[Array, "T L"],
        pixel_values: Float[Array, "I H W 3"],
        attention_mask: Array | None = None,
    ) -> Float[Array, "I T"]:
        """Logits of every image against every text: scaled cosines [I, T]."""
        text = self.get_text_features(input_ids, attention_mask)
        image = self.get_image_features(pixel_values)
        text = text / jnp.linalg.norm(text, axis=-1, keepdims=True)
        image = image / jnp.linalg.norm(image, axis=-1, keepdims=True)
        return jnp.exp(self.logit_scale[...]) * image @ text.T
