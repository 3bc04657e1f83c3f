"""`HunyuanVideoTransformer3DModel`: the rectified-flow transformer of HunyuanVideo, text to video.

(Kong et al. 2024, arXiv 2412.03603.)  Latents are `[B, T, Y, X, C]`, which it cuts into patches by
itself.  Attribute paths are diffusers' state-dict keys.  Blocks are FLUX.1's over [video; text]:
positions are the video's alone, and padding of the text is seen by none.  What the video sees of
itself may be sparse, block by block (`GNA`), which changes no parameter.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Num

from .configs import ModelConfig
from .layers import slabs
from .layers.attention import Attention, Neighborhoods
from .layers.embeddings import ConditionEmbedding
from .layers.joint_attention import JointSequence, JointTextCondition, check_inputs
from .layers.joint_blocks import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
    of_blocks,
    through_blocks,
)
from .layers.linear import linear
from .layers.modulation import AdaLayerNormContinuous, Modulation, gated, zero_linear
from .layers.rotary import Rotary, concatenate, rotary_table
from .layers.transformer import FeedForward, LinearSiLU, layer_norm
from .pretrained import AttendingModel


@dataclasses.dataclass(frozen=True)
class HunyuanVideoTransformer3DConfig(ModelConfig):
    """Settings of `HunyuanVideoTransformer3DModel`; the defaults are the published model's.

    `num_layers` counts the double blocks, whose video and text have parameters of their own,
    `num_single_layers` the blocks behind them, `num_refiner_layers` those that the text goes
    through before it meets the video. `rope_axes_dim` splits a head's features among frame, row
    and column.
    """

    in_channels: int = 16
    out_channels: int | None = 16
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    num_layers: int = 20
    num_single_layers: int = 40
    num_refiner_layers: int = 2
    patch_size: int = 2
    patch_size_t: int = 1
    guidance_embeds: bool = True
    text_embed_dim: int = 4096
    pooled_projection_dim: int = 768
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, ...] = (16, 56, 56)

    FIXED: ClassVar[Mapping[str, Any]] = {
        "image_condition_type": None,
        "mlp_ratio": 4.0,
        "qk_norm": "rms_norm",
    }

    def __post_init__(self):
        self.require_positive("in_channels", "num_attention_heads", "attention_head_dim")
        self.require_positive("num_layers", "num_single_layers", "num_refiner_layers")
        self.require_positive("patch_size", "patch_size_t", "text_embed_dim")
        self.require_positive("pooled_projection_dim", "rope_axes_dim")
        if self.out_channels is not None:
            self.require_positive("out_channels")
        axes = self.rope_axes_dim
        self.require(
            len(axes) == 3 and not any(dim % 2 for dim in axes),
            f"rope_axes_dim takes three even numbers, received {axes!r}.",
        )
        self.require(
            sum(axes) == self.attention_head_dim,
            f"rope_axes_dim {axes!r} must add up to attention_head_dim {self.attention_head_dim}.",
        )

    @property
    def features(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of latents that are a token."""
        return self.patch_size_t, self.patch_size, self.patch_size


class HunyuanVideoPatchEmbed(nnx.Module):
    """Patches to tokens: [B, T, Y, X, C] -> [B, t, y, x, D]."""

    def __init__(self, config: HunyuanVideoTransformer3DConfig, **init):
        size = {"kernel_size": config.patch, "strides": config.patch, "padding": "VALID"}
        self.proj = nnx.Conv(config.in_channels, config.features, **size, **init)

    def __call__(self, latents: Float[Array, "B T Y X C"]) -> Float[Array, "B t y x D"]:
        return self.proj(latents)


class HunyuanVideoIndividualTokenRefinerBlock(nnx.Module):
    """Pre-norm transformer block over the text, whose residuals are gated by the condition."""

    def __init__(self, features: int, heads: int, **init):
        self.norm1, self.norm2 = (layer_norm(features, 1e-6, **init) for _ in range(2))
        self.attn = Attention(features, heads, use_bias=True, **init)
        self.ff = FeedForward(features, LinearSiLU, **init)
        self.norm_out = Modulation(features, 2, **init)

    def __call__(
        self,
        x: Float[Array, "B A D"],
        condition: Float[Array, "B D"],
        mask: Bool[Array, "B 1 A A"] | None,
    ) -> Float[Array, "B A D"]:
        attention, perceptron = self.norm_out.vectors(condition)
        x = x + gated(attention, self.attn(self.norm1(x), mask=mask))
        return x + gated(perceptron, self.ff(self.norm2(x)))


class HunyuanVideoIndividualTokenRefiner(nnx.Module):
    """The blocks of the token refiner."""

    def __init__(self, features: int, heads: int, layers: int, **init):
        self.refiner_blocks = nnx.List(
            [
                HunyuanVideoIndividualTokenRefinerBlock(features, heads, **init)
                for _ in range(layers)
            ]
        )


class HunyuanVideoTokenRefiner(nnx.Module):
    """The text's states, attending to each other in both directions, as tokens of the model."""

    def __init__(self, config: HunyuanVideoTransformer3DConfig, **init):
        features, states = config.features, config.text_embed_dim
        self.dtype = init["dtype"]
        self.time_text_embed = ConditionEmbedding(features, pooled_features=states, **init)
        self.proj_in = linear(states, features, **init)
        self.token_refiner = HunyuanVideoIndividualTokenRefiner(
            features, config.num_attention_heads, config.num_refiner_layers, **init
        )

    def __call__(
        self,
        states: Float[Array, "B A E"],
        timesteps: Num[Array, " B"],
        mask: Bool[Array, "B A"] | None,
    ) -> Float[Array, "B A D"]:
        shown, both = jnp.ones(states.shape[:2], bool) if mask is None else mask, None
        weights = shown[..., None].astype(jnp.float32)
        words = jnp.maximum(weights.sum(axis=1), 1)
        pooled = (states.astype(jnp.float32) * weights).sum(axis=1) / words
        condition = self.time_text_embed(timesteps, pooled=pooled.astype(states.dtype))
        if mask is not None:  # all queries see the first token: padding must see some
            both = (mask[:, :, None] & mask[:, None]).at[:, :, 0].set(True)[:, None]
        x = self.proj_in(states.astype(self.dtype))
        for block in self.token_refiner.refiner_blocks:
            x = block(x, condition, both)
        return x


def rotary_of(config: HunyuanVideoTransformer3DConfig, grid: tuple[int, ...], text: int) -> Rotary:
    """Angles of [video; text]: the video is at (frame, row, column), the text is not turned."""
    frames, rows, columns = slabs.whole(grid)
    video = (
        np.arange(frames)[:, None, None],
        np.arange(rows)[None, :, None],
        np.arange(columns)[None, None],
    )
    settings = (config.rope_axes_dim, config.rope_theta)
    return concatenate(
        slabs.own(rotary_table(video, *settings, dtype=np.float32)),
        rotary_table((np.zeros(text),) * 3, *settings),
    )


class HunyuanVideoTransformer3DModel(AttendingModel):
    """Rectified-flow transformer: the velocity of a video's latents, given a text.

    Of a sequence of `attention` the double blocks' settings come before the single ones'; windows
    are (frames, rows, columns) of tokens. Text goes to the video's queries as a whole, but for its
    padding.
    """

    BLOCKS: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")
    SPREADS: ClassVar[bool] = True
    config: HunyuanVideoTransformer3DConfig
    config_class = HunyuanVideoTransformer3DConfig
    pytorch_class = "HunyuanVideoTransformer3DModel"
    pytorch_library = "diffusers"

    def _build(self, config: HunyuanVideoTransformer3DConfig, attention: Neighborhoods, **init):
        features, heads = config.features, config.num_attention_heads
        doubles, singles = of_blocks(attention, config.num_layers, config.num_single_layers)
        self.x_embedder = HunyuanVideoPatchEmbed(config, **init)
        self.context_embedder = HunyuanVideoTokenRefiner(config, **init)
        self.time_text_embed = ConditionEmbedding(
            features,
            pooled_features=config.pooled_projection_dim,
            guidance=config.guidance_embeds,
            **init,
        )
        self.transformer_blocks = nnx.List(
            [FluxTransformerBlock(features, heads, setting, **init) for setting in doubles]
        )
        self.single_transformer_blocks = nnx.List(
            [FluxSingleTransformerBlock(features, heads, setting, **init) for setting in singles]
        )
        self.norm_out = AdaLayerNormContinuous(features, **init)
        values = int(np.prod(config.patch)) * (config.out_channels or config.in_channels)
        self.proj_out = zero_linear(features, values, **init)

    def __call__(
        self,
        latents: Float[Array, "B T Y X C"],
        timesteps: Num[Array, "*B"] | float | int,
        condition: JointTextCondition,
    ) -> Float[Array, "B T Y X O"]:
        """Predict the velocity, noise minus video.

        Args:
          latents: noisy latents [B, T, Y, X, in_channels], T a multiple of `patch_size_t`, Y and X
            of `patch_size`.
          timesteps: scalar or [B], in units of training timesteps, 0 to 1000.
          condition: states [B, A, text_embed_dim] and pooled state [B, pooled_projection_dim] of
            the text; with `guidance_embeds` also the guidance [B], as pipelines count it (6.0);
            and the mask [B, A] of the states that are no padding, on their right. A text without
            its padding gives the same at less cost.

        Returns:
          [B, T, Y, X, out_channels] in the computation dtype.

        Raises:
          ValueError: inputs of another shape, a condition that lacks a part, or a window larger
            than the grid of tokens.
        """
        config, patch = self.config, self.config.patch
        options = {"axes": "B T Y X C", "text_features": config.text_embed_dim, "masked": True}
        check_inputs(self, latents, condition, **options)
        batch, *sides, _ = latents.shape
        if any(side % size for side, size in zip(sides, patch, strict=True)):
            raise ValueError(
                f"HunyuanVideoTransformer3DModel takes latents [B, T, Y, X, C] whose frames, rows "
                f"and columns are multiples of {patch}, received {latents.shape}."
            )
        grid = tuple(side // size for side, size in zip(sides, patch, strict=True))
        sequence = JointSequence(
            grid,
            text_first=False,
            rotary=rotary_of(config, grid, condition.states.shape[1]),
            mask=condition.mask,
        )
        timesteps = jnp.broadcast_to(jnp.asarray(timesteps), (batch,))
        embedded = self.time_text_embed(timesteps, condition.guidance, condition.pooled)
        video = self.x_embedder(latents.astype(self.dtype)).reshape(batch, -1, config.features)
        text = self.context_embedder(condition.states, timesteps, condition.mask)
        video = through_blocks(self, video, text, (embedded,), (embedded,), sequence)
        x = self.proj_out(self.norm_out(video, embedded))
        x = x.reshape(batch, *grid, -1, *patch)  # [B, t, y, x, O, pt, py, px]
        return x.transpose(0, 1, 5, 2, 6, 3, 7, 4).reshape(batch, *sides, -1)
