"""`Flux2Transformer2DModel`: the rectified-flow transformer of FLUX.2 (Black Forest Labs 2025).

Latents are packed, `[B, h, w, 128]`: the 2 x 2 x 32 values that a token stands for, channels
slowest, normalized.  Attribute paths are diffusers' state-dict keys.  Against FLUX.1: all blocks of
a kind share their modulations, single blocks have one projection into and one out of attention and
perceptron, nothing has a bias, and the text's tokens have positions.
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
from .layers import slabs
from .layers.attention import GNA, Neighborhoods
from .layers.embeddings import ConditionEmbedding
from .layers.joint_attention import (
    JointAttention,
    JointSequence,
    JointTextCondition,
    check_inputs,
    in_heads,
    within_half,
)
from .layers.joint_blocks import of_blocks, through_blocks
from .layers.linear import linear
from .layers.modulation import (
    AdaLayerNormContinuous,
    Modulation,
    gated,
    modulate,
    plain_layer_norm,
    with_residual,
    zero_linear,
)
from .layers.rotary import Rotary, concatenate, rotary_table
from .pretrained import AttendingModel

Modulations = list[Float[Array, "B D"]]


@dataclasses.dataclass(frozen=True)
class Flux2Transformer2DConfig(ModelConfig):
    """Settings of `Flux2Transformer2DModel`; the defaults are diffusers', those of FLUX.2-dev.

    `num_layers` counts the double blocks, whose image and text have parameters of their own,
    `num_single_layers` the blocks behind them. `axes_dims_rope` splits a head's features among
    image index, row, column and place in the text.
    """

    in_channels: int = 128
    out_channels: int | None = None
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: int = 2000
    eps: float = 1e-6
    guidance_embeds: bool = True

    FIXED: ClassVar[Mapping[str, Any]] = {"patch_size": 1}

    def __post_init__(self):
        self.require_positive("in_channels", "num_layers", "num_single_layers")
        self.require_positive("attention_head_dim", "num_attention_heads", "joint_attention_dim")
        self.require_positive("timestep_guidance_channels", "axes_dims_rope")
        if self.out_channels is not None:
            self.require_positive("out_channels")
        axes = self.axes_dims_rope
        self.require(
            len(axes) == 4 and not any(dim % 2 for dim in axes),
            f"axes_dims_rope takes four even numbers, received {axes!r}.",
        )
        self.require(
            sum(axes) == self.attention_head_dim,
            f"axes_dims_rope {axes!r} must add up to attention_head_dim {self.attention_head_dim}.",
        )

    @property
    def features(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        """Width of the perceptrons inside."""
        return int(self.features * self.mlp_ratio)

    @classmethod
    def klein_4b(cls) -> "Flux2Transformer2DConfig":
        """FLUX.2-klein with 4 billion parameters, distilled or not."""
        return cls(
            num_layers=5,
            num_single_layers=20,
            num_attention_heads=24,
            joint_attention_dim=7680,
            guidance_embeds=False,
        )

    @classmethod
    def klein_9b(cls) -> "Flux2Transformer2DConfig":
        """FLUX.2-klein with 9 billion parameters, distilled or not."""
        return cls(
            num_single_layers=24,
            num_attention_heads=32,
            joint_attention_dim=12288,
            guidance_embeds=False,
        )


def swiglu(x: Float[Array, "... twice"]) -> Float[Array, "... hidden"]:
    """The second half of the features, gated by a SiLU of the first (Shazeer 2020)."""
    gate, hidden = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * hidden


class Flux2FeedForward(nnx.Module):
    """Gated perceptron."""

    def __init__(self, config: Flux2Transformer2DConfig, **init):
        features, hidden = config.features, config.hidden
        self.linear_in = linear(features, 2 * hidden, use_bias=False, **init)
        self.linear_out = linear(hidden, features, use_bias=False, **init)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.linear_out(swiglu(self.linear_in(x)))


class Flux2TransformerBlock(nnx.Module):
    """Double block: image and text attend jointly, each with parameters of its own."""

    def __init__(self, config: Flux2Transformer2DConfig, neighborhood: GNA | None, **init):
        features, epsilon = config.features, config.eps
        self.norm1, self.norm1_context, self.norm2, self.norm2_context = (
            plain_layer_norm(features, epsilon, **init) for _ in range(4)
        )
        self.attn = JointAttention(
            features,
            config.num_attention_heads,
            neighborhood,
            use_bias=False,
            epsilon=epsilon,
            **init,
        )
        self.ff = Flux2FeedForward(config, **init)
        self.ff_context = Flux2FeedForward(config, **init)

    def __call__(
        self,
        image: Float[Array, "B N D"],
        text: Float[Array, "B A D"],
        image_modulations: Modulations,
        text_modulations: Modulations,
        sequence: JointSequence,
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B A D"]]:
        image_shift, image_scale, image_gate, *image_perceptron = image_modulations
        text_shift, text_scale, text_gate, *text_perceptron = text_modulations
        seen_by_image, seen_by_text = self.attn(
            modulate(self.norm1(image), image_shift, image_scale),
            modulate(self.norm1_context(text), text_shift, text_scale),
            sequence,
        )
        image = image + gated(image_gate, seen_by_image)
        text = text + gated(text_gate, seen_by_text)
        image = with_residual(image, self.norm2, self.ff, *image_perceptron)
        text = with_residual(text, self.norm2_context, self.ff_context, *text_perceptron)
        return image, within_half(text)


class Flux2ParallelSelfAttention(nnx.Module):
    """Attention and gated perceptron between two projections (Dehghani et al. 2023, ViT-22B)."""

    def __init__(self, config: Flux2Transformer2DConfig, neighborhood: GNA | None, **init):
        features, hidden = config.features, config.hidden
        self.heads, self.neighborhood = config.num_attention_heads, neighborhood
        self.to_qkv_mlp_proj = linear(features, 3 * features + 2 * hidden, use_bias=False, **init)
        self.norm_q, self.norm_k = (
            nnx.RMSNorm(config.attention_head_dim, epsilon=config.eps, **init) for _ in range(2)
        )
        self.to_out = linear(features + hidden, features, use_bias=False, **init)

    def __call__(self, x: Float[Array, "B L D"], sequence: JointSequence) -> Float[Array, "B L D"]:
        features = x.shape[-1]
        ends = (features, 2 * features, 3 * features)
        *heads, hidden = jnp.split(self.to_qkv_mlp_proj(x), ends, axis=-1)
        query, key, value = (in_heads(part, self.heads) for part in heads)
        attended = sequence.attend(self.norm_q(query), self.norm_k(key), value, self.neighborhood)
        parts = [attended.reshape(x.shape), swiglu(hidden)]
        return self.to_out(jnp.concatenate(parts, axis=-1))


class Flux2SingleTransformerBlock(nnx.Module):
    """Single block: attention and perceptron side by side, the same for image and text."""

    def __init__(self, config: Flux2Transformer2DConfig, neighborhood: GNA | None, **init):
        self.norm = plain_layer_norm(config.features, config.eps, **init)
        self.attn = Flux2ParallelSelfAttention(config, neighborhood, **init)

    def __call__(
        self, x: Float[Array, "B L D"], modulations: Modulations, sequence: JointSequence
    ) -> Float[Array, "B L D"]:
        layer = functools.partial(self.attn, sequence=sequence)
        return within_half(with_residual(x, self.norm, layer, *modulations))


def rotary_of(config: Flux2Transformer2DConfig, grid: tuple[int, int], text: int) -> Rotary:
    """Angles of [text; image]: the text at (0, 0, 0, place), the image at (0, row, column, 0)."""
    rows, columns = slabs.whole(grid)
    nowhere = np.zeros((1, 1))
    image = (nowhere, np.arange(rows)[:, None], np.arange(columns)[None], nowhere)
    settings = (config.axes_dims_rope, config.rope_theta)
    words = rotary_table((*(np.zeros(text),) * 3, np.arange(text)), *settings)
    return concatenate(words, slabs.own(rotary_table(image, *settings)))


class Flux2Transformer2DModel(AttendingModel):
    """Rectified-flow transformer: the velocity of packed latents, given a text.

    Of a sequence of `attention` the double blocks' settings come before the single ones'.
    """

    BLOCKS: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")
    SPREADS: ClassVar[bool] = True
    config: Flux2Transformer2DConfig
    config_class = Flux2Transformer2DConfig
    pytorch_class = "Flux2Transformer2DModel"
    pytorch_library = "diffusers"

    def _build(self, config: Flux2Transformer2DConfig, attention: Neighborhoods, **init):
        features = config.features
        doubles, singles = of_blocks(attention, config.num_layers, config.num_single_layers)
        self.time_guidance_embed = ConditionEmbedding(
            features,
            guidance=config.guidance_embeds,
            time_features=config.timestep_guidance_channels,
            use_bias=False,
            **init,
        )
        self.double_stream_modulation_img = Modulation(features, 6, use_bias=False, **init)
        self.double_stream_modulation_txt = Modulation(features, 6, use_bias=False, **init)
        self.single_stream_modulation = Modulation(features, 3, use_bias=False, **init)
        self.x_embedder = linear(config.in_channels, features, use_bias=False, **init)
        self.context_embedder = linear(config.joint_attention_dim, features, use_bias=False, **init)
        self.transformer_blocks = nnx.List(
            [Flux2TransformerBlock(config, setting, **init) for setting in doubles]
        )
        self.single_transformer_blocks = nnx.List(
            [Flux2SingleTransformerBlock(config, setting, **init) for setting in singles]
        )
        self.norm_out = AdaLayerNormContinuous(features, use_bias=False, epsilon=config.eps, **init)
        self.proj_out = zero_linear(
            features, config.out_channels or config.in_channels, use_bias=False, **init
        )

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
          condition: states [B, A, joint_attention_dim] of the text; with `guidance_embeds` also the
            guidance [B].

        Returns:
          [B, h, w, out_channels] in the computation dtype.

        Raises:
          ValueError: inputs of another shape, a condition that lacks a part, or a window larger
            than the grid of tokens.
        """
        check_inputs(self, latents, condition)
        batch, height, width, _ = latents.shape
        rotary = rotary_of(self.config, (height, width), condition.states.shape[1])
        sequence = JointSequence((height, width), rotary=rotary)
        timesteps = jnp.broadcast_to(jnp.asarray(timesteps), (batch,))
        embedded = self.time_guidance_embed(timesteps, condition.guidance)
        of_image = self.double_stream_modulation_img.vectors(embedded)
        of_text = self.double_stream_modulation_txt.vectors(embedded)
        of_both = self.single_stream_modulation.vectors(embedded)
        image = self.x_embedder(latents.astype(self.dtype)).reshape(batch, height * width, -1)
        text = self.context_embedder(condition.states.astype(self.dtype))
        image = through_blocks(self, image, text, (of_image, of_text), (of_both,), sequence)
        return self.proj_out(self.norm_out(image, embedded)).reshape(batch, height, width, -1)
