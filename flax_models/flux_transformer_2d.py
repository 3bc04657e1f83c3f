"""`FluxTransformer2DModel`: the rectified-flow transformer of FLUX.1 (Black Forest Labs 2024).

Latents are packed, `[B, h, w, 64]`: the 2 x 2 x 16 values that a token stands for, channels
slowest.  Attribute paths are diffusers' state-dict keys.  Image and text attend jointly; what the
image sees of itself may be sparse, block by block (`GNA`), which changes no parameter.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

from .configs import ModelConfig
from .layers.attention import GNA, Neighborhoods, per_layer
from .layers.embeddings import ConditionEmbedding, Dtype
from .layers.joint_attention import (
    JointAttention,
    JointSequence,
    JointTextCondition,
    SelfProjections,
    check_inputs,
    proportional_scale,
    within_half,
)
from .layers.modulation import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    gated,
    plain_layer_norm,
    with_residual,
    zero_linear,
)
from .layers.remat import Remat, recomputed
from .layers.rotary import Rotary, concatenate, rotary_table
from .layers.transformer import GELU, FeedForward
from .pretrained import Pretrained

_THETA = 10000.0


@dataclasses.dataclass(frozen=True)
class FluxTransformer2DConfig(ModelConfig):
    """Settings of `FluxTransformer2DModel`; the defaults are diffusers', at FLUX.1's size.

    `num_layers` counts the double blocks, whose image and text have parameters of their own,
    `num_single_layers` the blocks behind them. `axes_dims_rope` splits a head's features among
    image index, row and column.
    """

    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    FIXED: ClassVar[Mapping[str, Any]] = {"patch_size": 1}

    def __post_init__(self):
        self.require_positive("in_channels", "num_layers", "num_single_layers")
        self.require_positive("attention_head_dim", "num_attention_heads", "joint_attention_dim")
        self.require_positive("pooled_projection_dim", "axes_dims_rope")
        if self.out_channels is not None:
            self.require_positive("out_channels")
        axes = self.axes_dims_rope
        self.require(
            len(axes) == 3 and not any(dim % 2 for dim in axes),
            f"axes_dims_rope takes three even numbers, received {axes!r}.",
        )
        self.require(
            sum(axes) == self.attention_head_dim,
            f"axes_dims_rope {axes!r} must add up to attention_head_dim {self.attention_head_dim}.",
        )

    @property
    def features(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def dev(cls) -> "FluxTransformer2DConfig":
        """FLUX.1-dev: distilled from guidance, whose strength it takes."""
        return cls(guidance_embeds=True)

    @classmethod
    def schnell(cls) -> "FluxTransformer2DConfig":
        """FLUX.1-schnell: distilled to few steps, without guidance."""
        return cls()


class FluxTransformerBlock(nnx.Module):
    """Double block: image and text attend jointly, each with parameters of its own."""

    def __init__(self, config: FluxTransformer2DConfig, neighborhood: GNA | None, **init):
        features = config.features
        self.norm1 = AdaLayerNormZero(features, **init)
        self.norm1_context = AdaLayerNormZero(features, **init)
        self.attn = JointAttention(features, config.num_attention_heads, neighborhood, **init)
        self.norm2 = plain_layer_norm(features, **init)
        self.ff = FeedForward(features, GELU, **init)
        self.norm2_context = plain_layer_norm(features, **init)
        self.ff_context = FeedForward(features, GELU, **init)

    def __call__(
        self,
        image: Float[Array, "B N D"],
        text: Float[Array, "B A D"],
        condition: Float[Array, "B D"],
        sequence: JointSequence,
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B A D"]]:
        image_in, image_gate, image_perceptron = self.norm1(image, condition)
        text_in, text_gate, text_perceptron = self.norm1_context(text, condition)
        seen_by_image, seen_by_text = self.attn(image_in, text_in, sequence)
        image = image + gated(image_gate, seen_by_image)
        text = text + gated(text_gate, seen_by_text)
        image = with_residual(image, self.norm2, self.ff, *image_perceptron)
        text = with_residual(text, self.norm2_context, self.ff_context, *text_perceptron)
        return image, within_half(text)


class FluxSingleTransformerBlock(nnx.Module):
    """Single block: attention and perceptron side by side, the same for image and text."""

    def __init__(self, config: FluxTransformer2DConfig, neighborhood: GNA | None, **init):
        features = config.features
        self.neighborhood = neighborhood
        self.norm = AdaLayerNormZeroSingle(features, **init)
        self.attn = SelfProjections(features, config.num_attention_heads, **init)
        self.proj_mlp = nnx.Linear(features, 4 * features, **init)
        self.proj_out = nnx.Linear(5 * features, features, **init)

    def __call__(
        self, x: Float[Array, "B L D"], condition: Float[Array, "B D"], sequence: JointSequence
    ) -> Float[Array, "B L D"]:
        x_in, gate = self.norm(x, condition)
        attended = sequence.attend(*self.attn.project(x_in), self.neighborhood)
        hidden = jax.nn.gelu(self.proj_mlp(x_in), approximate=True)
        parts = jnp.concatenate([attended.reshape(x.shape), hidden], axis=-1)
        return within_half(x + gated(gate, self.proj_out(parts)))


def rotary_of(
    config: FluxTransformer2DConfig, grid: tuple[int, int], text: int, ntk_factor: float
) -> Rotary:
    """Angles of [text; image]: the text stays at (0, 0, 0), the image is at (0, row, column)."""
    rows, columns = grid
    image = (np.zeros((1, 1)), np.arange(rows)[:, None], np.arange(columns)[None])
    settings = (config.axes_dims_rope, _THETA * ntk_factor)
    return concatenate(
        rotary_table((np.zeros(text),) * 3, *settings), rotary_table(image, *settings)
    )


class FluxTransformer2DModel(Pretrained, nnx.Module):
    """Rectified-flow transformer: the velocity of packed latents, given a text.

    Args:
      config: architecture.
      attention: `GNA` settings of what the image's queries see of the image: one for all blocks, or
        a sequence of one per block, the double blocks before the single ones, in which None is
        dense. None, the default, is dense everywhere. Every image query sees all of the text, and
        the text sees everything. Parameters are the same whatever it is.
      ntk_factor: multiplies the base of the rotary embedding, so that more tokens than in training
        span the same angles (NTK-aware scaling); 10 for URAE's adapters to 4096 x 4096 pixels.
      attention_scale: factor of the attention's logits: None is attention_head_dim ** -0.5, and
        "proportional" grows with the number of tokens, as URAE's adapters to 4096 x 4096 pixels ask
        (`layers.joint_attention.proportional_scale`).
      dtype: computation dtype; norms and softmax accumulate in float32.
      param_dtype: dtype of the parameters.
      remat: recompute each block's activations in the backward pass; or a policy
        of `layers.remat`.
      rngs: source of the initial parameters.

    Raises:
      ValueError: `attention` has another number of blocks than the config, or a factor is none.
    """

    BLOCKS: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")
    config_class = FluxTransformer2DConfig
    pytorch_class = "FluxTransformer2DModel"
    pytorch_library = "diffusers"

    def __init__(
        self,
        config: FluxTransformer2DConfig,
        *,
        attention: Neighborhoods = None,
        ntk_factor: float | int = 1.0,
        attention_scale: float | int | str | None = None,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        remat: Remat = False,
        rngs: nnx.Rngs,
    ):
        if not ntk_factor > 0:
            raise ValueError(f"ntk_factor takes a positive number, received {ntk_factor!r}.")
        proportional_scale(attention_scale, 1, config.attention_head_dim)
        init = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        features, double = config.features, config.num_layers
        settings = per_layer(
            attention,
            double + config.num_single_layers,
            f"one per block, the {double} double blocks before the single ones",
        )
        self.config, self.dtype, self.remat = config, dtype, remat
        self.ntk_factor, self.attention_scale = float(ntk_factor), attention_scale
        self.time_text_embed = ConditionEmbedding(
            features,
            pooled_features=config.pooled_projection_dim,
            guidance=config.guidance_embeds,
            **init,
        )
        self.x_embedder = nnx.Linear(config.in_channels, features, **init)
        self.context_embedder = nnx.Linear(config.joint_attention_dim, features, **init)
        self.transformer_blocks = nnx.List(
            [FluxTransformerBlock(config, setting, **init) for setting in settings[:double]]
        )
        self.single_transformer_blocks = nnx.List(
            [FluxSingleTransformerBlock(config, setting, **init) for setting in settings[double:]]
        )
        self.norm_out = AdaLayerNormContinuous(features, **init)
        self.proj_out = zero_linear(features, config.out_channels or config.in_channels, **init)

    def __call__(
        self,
        latents: Float[Array, "B h w C"],
        timesteps: Num[Array, "*B"] | float | int,
        condition: JointTextCondition,
    ) -> Float[Array, "B h w O"]:
        """Predict the velocity, noise minus image.

        Args:
          latents: noisy packed latents [B, h, w, in_channels], on h x w tokens of 16 x 16 pixels.
          timesteps: scalar or [B], in units of training timesteps, 0 to 1000.
          condition: states [B, A, joint_attention_dim] and pooled state [B, pooled_projection_dim]
            of the text; with `guidance_embeds` also the guidance [B].

        Returns:
          [B, h, w, out_channels] in the computation dtype.

        Raises:
          ValueError: inputs of another shape, a condition that lacks a part, or a window larger
            than the grid of tokens.
        """
        config = self.config
        check_inputs(self, latents, condition)
        batch, height, width, _ = latents.shape
        tokens, text_tokens = height * width, condition.states.shape[1]
        rotary = rotary_of(config, (height, width), text_tokens, self.ntk_factor)
        keys, dim = tokens + text_tokens, config.attention_head_dim
        scale = proportional_scale(self.attention_scale, keys, dim)
        sequence = JointSequence((height, width), rotary=rotary, scale=scale)
        timesteps = jnp.broadcast_to(jnp.asarray(timesteps), (batch,))
        embedded = self.time_text_embed(timesteps, condition.guidance, condition.pooled)
        image = self.x_embedder(latents.astype(self.dtype)).reshape(batch, tokens, -1)
        text = self.context_embedder(condition.states.astype(self.dtype))
        for block in self.transformer_blocks:
            run = recomputed(functools.partial(block.__call__, sequence=sequence), self.remat)
            image, text = run(image, text, embedded)
        x = sequence.join(image, text)
        for block in self.single_transformer_blocks:
            run = recomputed(functools.partial(block.__call__, sequence=sequence), self.remat)
            x = run(x, embedded)
        image, _ = sequence.split(x)
        return self.proj_out(self.norm_out(image, embedded)).reshape(batch, height, width, -1)
