"""`WanTransformer3DModel`: the rectified-flow video transformer of Wan 2.1 and 2.2 (Wan Team 2025).

(arXiv 2503.20314.)  Latents are `[B, T, Y, X, C]`, which it cuts into patches by itself.  Attribute
paths are diffusers' state-dict keys.  Video attends to itself, maybe within neighborhoods, block by
block (`GNA`), which changes no parameter, and to the text by cross-attention.  Norms, modulation
and the sums of gated residuals are computed in float32 whatever the dtype.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

from ..kernels.attention import dot_product_attention
from .configs import ModelConfig
from .layers import slabs
from .layers.attention import GNA, Neighborhoods, per_layer
from .layers.checks import check_axes
from .layers.embeddings import TimestepEmbedding, sinusoidal_embedding
from .layers.joint_attention import JointSequence, in_heads
from .layers.linear import linear
from .layers.modulation import plain_layer_norm, zero_linear
from .layers.remat import recomputed
from .layers.rotary import Rotary, rotary_table
from .layers.transformer import GELU, FeedForward, layer_norm
from .pretrained import AttendingModel

_THETA = 10000.0
# Settings of what reads an image too; None in what is made from text alone.
_OF_IMAGES = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")

Config = TypeVar("Config", bound="WanTransformer3DConfig")


@dataclasses.dataclass(frozen=True)
class WanTransformer3DConfig(ModelConfig):
    """Settings of `WanTransformer3DModel`; the defaults are diffusers', at the size of 14B.

    `patch_size` is a token's extent in frames, rows and columns of latents, `rope_max_seq_len` the
    largest number of tokens along any axis, and `cross_attn_norm` tells whether what attends to the
    text is normalized.
    """

    patch_size: tuple[int, ...] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int | None = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    eps: float = 1e-6
    rope_max_seq_len: int = 1024

    FIXED: ClassVar[Mapping[str, Any]] = {
        "qk_norm": "rms_norm_across_heads",
        **dict.fromkeys(_OF_IMAGES),
    }

    def __post_init__(self):
        self.require_positive("patch_size", "num_attention_heads", "attention_head_dim")
        self.require_positive("in_channels", "text_dim", "freq_dim", "ffn_dim", "num_layers")
        self.require_positive("rope_max_seq_len")
        if self.out_channels is not None:
            self.require_positive("out_channels")
        patch = self.patch_size
        self.require(len(patch) == 3, f"patch_size takes three numbers, received {patch!r}.")
        dim = self.attention_head_dim
        self.require(
            dim % 2 == 0 and dim >= 6,
            f"attention_head_dim takes an even number of at least 6, received {dim!r}.",
        )

    @classmethod
    def from_dict(cls: type[Config], raw: Mapping[str, Any]) -> Config:
        given = [f"{name}={raw[name]!r}" for name in _OF_IMAGES if raw.get(name) is not None]
        if given:
            raise ValueError(
                f"this Wan transformer reads an image too ({', '.join(given)}); those that make "
                "videos from text alone are known (2.1 T2V, 2.2 T2V-A14B, 2.2 TI2V-5B), so load "
                "one of these."
            )
        return super().from_dict(raw)

    @property
    def features(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def axes_dims(self) -> tuple[int, int, int]:
        """Features of a head that tell its frame, its row and its column."""
        side = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * side, side, side

    @classmethod
    def t2v_1_3b(cls) -> "WanTransformer3DConfig":
        """The published Wan 2.1 T2V-1.3B: 1,418,996,800 parameters."""
        return cls(num_attention_heads=12, ffn_dim=8960, num_layers=30)

    @classmethod
    def t2v_14b(cls) -> "WanTransformer3DConfig":
        """Wan 2.1 T2V-14B, and each of the two of Wan 2.2 T2V-A14B: 14,288,491,584 parameters."""
        return cls()

    @classmethod
    def ti2v_5b(cls) -> "WanTransformer3DConfig":
        """Wan 2.2 TI2V-5B, whose tokens may have times of their own: 4,999,787,712 parameters."""
        return cls(
            num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48
        )


class TextProjection(TimestepEmbedding):
    """Two-layer perceptron with the tanh approximation of GELU: [B, A, E] -> [B, A, D]."""

    def __call__(self, features: Float[Array, "B A E"]) -> Float[Array, "B A D"]:
        return self.linear_2(jax.nn.gelu(self.linear_1(features), approximate=True))


class WanTimeTextImageEmbedding(nnx.Module):
    """Times and text as the blocks read them; times may be one per token, hence an axis K."""

    def __init__(self, config: WanTransformer3DConfig, **init):
        features, self.dtype = config.features, init["dtype"]
        self.time_features = config.freq_dim
        wide = init | {"dtype": jnp.float32}
        self.time_embedder = TimestepEmbedding(config.freq_dim, features, **wide)
        self.time_proj = linear(features, 6 * features, **init)
        self.text_embedder = TextProjection(config.text_dim, features, **init)

    def __call__(
        self, timesteps: Num[Array, "B K"], text: Float[Array, "B A E"]
    ) -> tuple[Float[Array, "B K D"], Float[Array, "B K 6 D"], Float[Array, "B A D"]]:
        """Embedded times, the modulations of every block, and the text."""
        sinusoids = sinusoidal_embedding(
            timesteps.reshape(-1), self.time_features, flip_sin_to_cos=True, freq_shift=0
        )
        embedded = self.time_embedder(sinusoids).astype(self.dtype)
        six = self.time_proj(jax.nn.silu(embedded))
        shape = timesteps.shape
        text = self.text_embedder(text.astype(self.dtype))
        return embedded.reshape(*shape, -1), six.reshape(*shape, 6, -1), text


class WanAttention(nnx.Module):
    """Attention whose queries and keys are normalized over all heads together."""

    def __init__(self, config: WanTransformer3DConfig, **init):
        features = config.features
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = (linear(features, features, **init) for _ in range(3))
        self.to_out = nnx.List([linear(features, features, **init)])
        self.norm_q, self.norm_k = (
            nnx.RMSNorm(features, epsilon=config.eps, **init) for _ in range(2)
        )

    def project(
        self, x: Float[Array, "B L C"], context: Float[Array, "B K C"]
    ) -> tuple[Float[Array, "B L H D"], Float[Array, "B K H D"], Float[Array, "B K H D"]]:
        """Query, key and value."""
        query, key = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(context))
        query, key = in_heads(query, self.heads), in_heads(key, self.heads)
        return query, key, in_heads(self.to_v(context), self.heads)


class WanSelfAttention(WanAttention):
    """Attention of the video to itself: dense, or within neighborhoods."""

    def __init__(self, config: WanTransformer3DConfig, neighborhood: GNA | None, **init):
        super().__init__(config, **init)
        self.neighborhood = neighborhood

    def __call__(self, x: Float[Array, "B N D"], sequence: JointSequence) -> Float[Array, "B N D"]:
        attended = sequence.attend(*self.project(x, x), self.neighborhood)
        return self.to_out[0](attended.reshape(x.shape))


class WanCrossAttention(WanAttention):
    """Attention of the video to the text, to all of it."""

    def __call__(
        self, x: Float[Array, "B N D"], text: Float[Array, "B A D"]
    ) -> Float[Array, "B N D"]:
        attended = dot_product_attention(*self.project(x, text))
        return self.to_out[0](attended.reshape(x.shape))


def _table(rows: int, features: int, **init: Any) -> nnx.Param:
    """Learned modulations, to which those of the time are added."""
    values = jax.random.normal(init["rngs"].params(), (1, rows, features), jnp.float32)
    return nnx.Param((values / math.sqrt(features)).astype(init["param_dtype"]))


def _modulations(table: nnx.Param, of_time: Float[Array, "B K R D"]) -> list[Array]:
    """R times [B, K, D], in float32."""
    rows = table[...].astype(jnp.float32) + of_time.astype(jnp.float32)
    return [rows[:, :, row] for row in range(rows.shape[2])]


class WanTransformerBlock(nnx.Module):
    """Attention to the video, attention to the text, perceptron; the text's is not modulated."""

    def __init__(self, config: WanTransformer3DConfig, neighborhood: GNA | None, **init):
        features = config.features
        wide = init | {"dtype": jnp.float32}
        self.cross_attn_norm = config.cross_attn_norm
        self.norm1 = plain_layer_norm(features, config.eps, **wide)
        self.attn1 = WanSelfAttention(config, neighborhood, **init)
        self.attn2 = WanCrossAttention(config, **init)
        if config.cross_attn_norm:
            self.norm2 = layer_norm(features, config.eps, **wide)
        self.ffn = FeedForward(features, GELU, hidden=config.ffn_dim, **init)
        self.norm3 = plain_layer_norm(features, config.eps, **wide)
        self.scale_shift_table = _table(6, features, **init)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        text: Float[Array, "B A D"],
        of_time: Float[Array, "B K 6 D"],
        sequence: JointSequence,
    ) -> Float[Array, "B N D"]:
        kind = x.dtype
        shift, scale, gate, *perceptron = _modulations(self.scale_shift_table, of_time)
        x_in = (self.norm1(x) * (1 + scale) + shift).astype(kind)
        x = (x + gate * self.attn1(x_in, sequence)).astype(kind)
        x_in = self.norm2(x).astype(kind) if self.cross_attn_norm else x
        x = x + self.attn2(x_in, text)
        shift, scale, gate = perceptron
        x_in = (self.norm3(x) * (1 + scale) + shift).astype(kind)
        return (x + gate * self.ffn(x_in)).astype(kind)


def rotary_of(config: WanTransformer3DConfig, grid: tuple[int, int, int]) -> Rotary:
    """Angles of a video's tokens, by frame, row and column."""
    frames, rows, columns = map(np.arange, slabs.whole(grid))
    positions = (frames[:, None, None], rows[:, None], columns)
    return slabs.own(rotary_table(positions, config.axes_dims, _THETA))


class WanTransformer3DModel(AttendingModel):
    """Rectified-flow transformer: the velocity of a video's latents, given a text.

    `attention` is what each block's video tokens see of the video, over (frames, rows, columns) of
    tokens.
    """

    BLOCKS: ClassVar[tuple[str, ...]] = ("blocks",)
    SPREADS: ClassVar[bool] = True
    config: WanTransformer3DConfig
    config_class = WanTransformer3DConfig
    pytorch_class = "WanTransformer3DModel"
    pytorch_library = "diffusers"

    def _build(self, config: WanTransformer3DConfig, attention: Neighborhoods, **init):
        features, patch = config.features, config.patch_size
        self.patch_embedding = nnx.Conv(
            config.in_channels, features, patch, strides=patch, padding="VALID", **init
        )
        self.condition_embedder = WanTimeTextImageEmbedding(config, **init)
        self.blocks = nnx.List(
            [
                WanTransformerBlock(config, setting, **init)
                for setting in per_layer(attention, config.num_layers, "one per block")
            ]
        )
        self.norm_out = plain_layer_norm(features, config.eps, **init | {"dtype": jnp.float32})
        out_channels = config.out_channels or config.in_channels
        self.proj_out = zero_linear(features, math.prod(patch) * out_channels, **init)
        self.scale_shift_table = _table(2, features, **init)

    def __call__(
        self,
        latents: Float[Array, "B T Y X C"],
        timesteps: Num[Array, "..."] | float | int,
        condition: Float[Array, "B A E"],
    ) -> Float[Array, "B T Y X O"]:
        """Predict the velocity, noise minus video.

        Args:
          latents: noisy latents [B, T, Y, X, in_channels], whose sides `patch_size` divides.
          timesteps: scalar, [B], or one per token [B, T', Y', X'], in units of training timesteps,
            0 to 1000. Tokens of frames that are given are at 0 (Wan 2.2 TI2V).
          condition: states of the text's tokens [B, A, text_dim], zeros behind the text's end.

        Returns:
          [B, T, Y, X, out_channels] in the computation dtype.

        Raises:
          ValueError: inputs of another shape, more tokens along an axis than `rope_max_seq_len`, or
            a window larger than the grid of tokens.
        """
        config, batch = self.config, latents.shape[0]
        grid = self._grid(latents, condition)
        times = jnp.asarray(timesteps)
        if times.ndim > 1 and times.shape != (batch, *grid):
            raise ValueError(
                "WanTransformer3DModel takes timesteps that are a scalar, [B], or one per token "
                f"{[batch, *grid]}, received {times.shape}."
            )
        times = times.reshape(batch, -1) if times.ndim > 1 else jnp.broadcast_to(times, (batch,))
        times = times.reshape(batch, -1)  # [B, 1 or N]
        embedded, of_time, text = self.condition_embedder(times, condition)
        sequence = JointSequence(grid, rotary=rotary_of(config, grid))
        x = self.patch_embedding(latents.astype(self.dtype))
        x = x.reshape(batch, -1, config.features)  # [B, N, D]
        for block in self.blocks:
            run = recomputed(functools.partial(block.__call__, sequence=sequence), self.remat)
            x = run(x, text, of_time)
        shift, scale = _modulations(self.scale_shift_table, embedded[:, :, None])
        x = (self.norm_out(x) * (1 + scale) + shift).astype(self.dtype)
        x = self.proj_out(x).reshape(batch, *grid, *config.patch_size, -1)
        return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(*latents.shape[:-1], -1)

    def _grid(self, latents: Array, condition: Array) -> tuple[int, int, int]:
        """Tokens along each axis, once the inputs are checked."""
        config, name = self.config, type(self).__name__
        check_axes(latents, "B T Y X C", f"{name}'s latents")
        check_axes(condition, "B A E", f"{name}'s text states")
        batch, *sides, channels = latents.shape
        patch, largest = config.patch_size, config.rope_max_seq_len
        grid = tuple(side // of for side, of in zip(sides, patch, strict=True))
        even = all(side == n * of for side, n, of in zip(sides, grid, patch, strict=True))
        if channels != config.in_channels or not even or max(slabs.whole(grid)) > largest:
            raise ValueError(
                f"{name} takes [B, T, Y, X, {config.in_channels}] latents whose sides are "
                f"multiples of {'x'.join(map(str, patch))}, with at most {largest} tokens along "
                f"each; received {latents.shape}."
            )
        if condition.shape != (batch, condition.shape[1], config.text_dim):
            raise ValueError(
                f"{name} takes text states [{batch}, A, {config.text_dim}] for a batch of {batch}, "
                f"received {condition.shape}."
            )
        frames, rows, columns = grid
        return frames, rows, columns
