"""`CosmosTransformer3DModel`: the diffusion transformer of Cosmos (NVIDIA 2025, arXiv 2501.03575).

Of Cosmos-Predict1, from text and from video to world, and of Predict2.  Latents are
`[B, T, Y, X, C]`, frames of rows of columns, which it cuts into patches by itself.  Attribute paths
are diffusers' state-dict keys.  The self-attention over a video's tokens may be sparse, block by
block (`GNA`), which changes no parameter; all tokens see all of the text.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Num

from ..kernels.attention import dot_product_attention
from .configs import ModelConfig
from .layers import slabs
from .layers.attention import GNA, Neighborhoods, per_layer
from .layers.checks import check_axes
from .layers.embeddings import sinusoidal_embedding
from .layers.joint_attention import JointSequence, SelfProjections
from .layers.linear import linear
from .layers.modulation import plain_layer_norm, zero_linear
from .layers.remat import recomputed
from .layers.rotary import Rotary
from .layers.transformer import GELU, FeedForward
from .pretrained import AttendingModel

_THETA = 10000.0
_FPS = 24  # frames per second at which positions along time are those of the latents' frames
_POSITIONS = ("pos_emb_t", "pos_emb_h", "pos_emb_w")


@dataclasses.dataclass(frozen=True)
class CosmosTransformer3DConfig(ModelConfig):
    """Settings of `CosmosTransformer3DModel`; the defaults are diffusers', at Predict1 7B's size.

    `in_channels` counts the mask of conditioned frames, where a model has it, and not that of
    padding. `max_size` is the largest video, in latents, whose tokens have learned positions, and
    `rope_scale` stretches the rotary ones, both along frames, rows and columns. `qk_norm_eps` is of
    the norms of queries and keys, 1e-5 in diffusers, which has no such setting, and 1e-6 where
    NVIDIA trained them.
    """

    in_channels: int = 16
    out_channels: int = 16
    num_attention_heads: int = 32
    attention_head_dim: int = 128
    num_layers: int = 28
    mlp_ratio: float = 4.0
    text_embed_dim: int = 1024
    adaln_lora_dim: int = 256
    max_size: tuple[int, ...] = (128, 240, 240)
    patch_size: tuple[int, ...] = (1, 2, 2)
    rope_scale: tuple[float, ...] = (2.0, 1.0, 1.0)
    concat_padding_mask: bool = True
    extra_pos_embed_type: str | None = "learnable"
    qk_norm_eps: float = 1e-5

    FIXED: ClassVar[Mapping[str, Any]] = {
        "use_crossattn_projection": False,
        "controlnet_block_every_n": None,
        "img_context_dim_in": None,
    }
    INERT: ClassVar[frozenset[str]] = frozenset(  # of what is fixed to be absent
        {
            "crossattn_proj_in_channels",
            "encoder_hidden_states_channels",
            "img_context_num_tokens",
            "img_context_dim_out",
        }
    )

    def __post_init__(self):
        self.require_positive("in_channels", "out_channels", "num_attention_heads", "num_layers")
        self.require_positive("text_embed_dim", "adaln_lora_dim", "max_size", "patch_size")
        dim = self.attention_head_dim
        self.require(
            isinstance(dim, int) and dim >= 12 and dim % 2 == 0,
            f"attention_head_dim must be an even number from 12 on, received {dim!r}: a head's "
            "features are split among frames, rows and columns.",
        )
        for name in ("max_size", "patch_size", "rope_scale"):
            value = getattr(self, name)
            self.require(
                isinstance(value, tuple) and len(value) == 3 and min(value) > 0,
                f"{name} takes three positive numbers, for frames, rows and columns; received "
                f"{value!r}.",
            )
        self.require(
            self.mlp_ratio > 0, f"mlp_ratio must be positive, received {self.mlp_ratio!r}."
        )
        self.require_one_of("extra_pos_embed_type", (None, "learnable"))

    def to_dict(self) -> dict[str, Any]:
        settings = super().to_dict()
        if self.qk_norm_eps == type(self).qk_norm_eps:
            del settings["qk_norm_eps"]  # which diffusers does not know
        return settings

    @property
    def features(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def axes_dims_rope(self) -> tuple[int, int, int]:
        """A head's features for frames, rows and columns."""
        side = self.attention_head_dim // 6 * 2
        return self.attention_head_dim - 2 * side, side, side

    @classmethod
    def text_to_world_7b(cls) -> "CosmosTransformer3DConfig":
        """The published Cosmos-Predict1-7B-Text2World: 7,236,192,256 parameters."""
        return cls()

    @classmethod
    def video_to_world_7b(cls) -> "CosmosTransformer3DConfig":
        """The published Cosmos-Predict1-7B-Video2World: 7,236,208,640 parameters."""
        return cls(in_channels=17)

    @classmethod
    def text_to_world_14b(cls) -> "CosmosTransformer3DConfig":
        """The published Cosmos-Predict1-14B-Text2World: 14,267,149,312 parameters."""
        return cls(num_attention_heads=40, num_layers=36, rope_scale=(2.0, 2.0, 2.0))

    @classmethod
    def video_to_world_14b(cls) -> "CosmosTransformer3DConfig":
        """The published Cosmos-Predict1-14B-Video2World: 14,267,169,792 parameters."""
        return dataclasses.replace(cls.text_to_world_14b(), in_channels=17)

    @classmethod
    def _predict2(cls, scale: tuple[float, ...], **settings: Any) -> "CosmosTransformer3DConfig":
        return cls(rope_scale=scale, extra_pos_embed_type=None, **settings)

    @classmethod
    def predict2_2b_text_to_image(cls) -> "CosmosTransformer3DConfig":
        """The published Cosmos-Predict2-2B-Text2Image: 1,956,405,248 parameters."""
        return cls._predict2((1.0, 4.0, 4.0), num_attention_heads=16)

    @classmethod
    def predict2_2b_video_to_world(cls) -> "CosmosTransformer3DConfig":
        """The published Cosmos-Predict2-2B-Video2World: 1,956,413,440 parameters."""
        return cls._predict2((1.0, 3.0, 3.0), num_attention_heads=16, in_channels=17)

    @classmethod
    def predict2_14b_text_to_image(cls) -> "CosmosTransformer3DConfig":
        """The published Cosmos-Predict2-14B-Text2Image."""
        return cls._predict2((1.0, 4.0, 4.0), num_attention_heads=40, num_layers=36)

    @classmethod
    def predict2_14b_video_to_world(cls) -> "CosmosTransformer3DConfig":
        """The published Cosmos-Predict2-14B-Video2World."""
        scale = (20 / 24, 2.0, 2.0)
        return cls._predict2(scale, num_attention_heads=40, num_layers=36, in_channels=17)


class CosmosCondition(NamedTuple):
    """All that a `CosmosTransformer3DModel` is conditioned on beside the timestep.

    Attributes:
      states: [B, A, E] states of the text's tokens.
      fps: [B] frames of the video per second; None for images, and where positions along time are
        to count frames.
      mask: [B, T] 1 for the latents' frames that are given and 0 for those to be made, for models
        from video to world.
      padding: [B, H, W] 1 where a video of another aspect is padded, at any resolution; None, as
        the published pipelines have it, is nowhere.
    """

    states: Float[Array, "B A E"]
    fps: Float[Array, " B"] | None = None
    mask: Float[Array, "B T"] | Bool[Array, "B T"] | None = None
    padding: Float[Array, "B H W"] | None = None


class Time(NamedTuple):
    """What the blocks are told of the timestep, one for all tokens or one for each frame's.

    Attributes:
      shared: [B, F, 3 D] shift, scale and gate that all layers have in common.
      embedded: [B, F, D] of which each layer makes what is its own.
    """

    shared: Float[Array, "B F M"]
    embedded: Float[Array, "B F D"]


class TimestepEmbedding(nnx.Module):
    """Two-layer SiLU perceptron without biases, three times as wide at its end."""

    def __init__(self, features: int, **init):
        self.linear_1 = linear(features, features, use_bias=False, **init)
        self.linear_2 = linear(features, 3 * features, use_bias=False, **init)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B M"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class TimeEmbedding(nnx.Module):
    """`Time` of timesteps [B, F]."""

    def __init__(self, features: int, **init):
        self.t_embedder = TimestepEmbedding(features, **init)
        self.norm = nnx.RMSNorm(features, epsilon=1e-6, **init)
        self.dtype = init["dtype"]

    def __call__(self, timesteps: Num[Array, "B F"]) -> Time:
        features = sinusoidal_embedding(
            timesteps.reshape(-1), self.norm.num_features, flip_sin_to_cos=True, freq_shift=0
        )
        features = features.astype(self.dtype).reshape(*timesteps.shape, -1)
        return Time(self.t_embedder(features), self.norm(features))


class AdaLayerNorm(nnx.Module):
    """Norm of a layer's input, shifted and scaled, and with three `parts` the layer's gate.

    What is common to all layers is corrected by what each makes of the timestep, through few
    features (AdaLN-LoRA).
    """

    def __init__(self, config: CosmosTransformer3DConfig, parts: int, **init):
        features, inner = config.features, config.adaln_lora_dim
        self.parts = parts
        self.linear_1 = linear(features, inner, use_bias=False, **init)
        self.linear_2 = zero_linear(inner, parts * features, use_bias=False, **init)
        self.norm = plain_layer_norm(features, **init)

    def __call__(self, x: Float[Array, "B N D"], time: Time) -> tuple[Array, ...]:
        vectors = self.linear_2(self.linear_1(jax.nn.silu(time.embedded)))
        vectors = vectors + time.shared[..., : vectors.shape[-1]]
        if (frames := vectors.shape[1]) > 1:
            vectors = jnp.repeat(vectors, x.shape[1] // frames, axis=1)
        shift, scale, *gate = jnp.split(vectors, self.parts, axis=-1)
        return self.norm(x) * (1 + scale) + shift, *gate


class SelfAttention(SelfProjections):
    """Attention of a video's tokens to each other: to all, or within neighborhoods."""

    def __init__(self, config: CosmosTransformer3DConfig, neighborhood: GNA | None, **init):
        super().__init__(**_attention(config), **init)
        self.neighborhood = neighborhood
        self.to_out = nnx.List([linear(config.features, config.features, **_plain(init))])

    def __call__(self, x: Float[Array, "B N D"], sequence: JointSequence) -> Float[Array, "B N D"]:
        attended = sequence.attend(*self.project(x), self.neighborhood)
        return self.to_out[0](attended.reshape(x.shape))


class CrossAttention(SelfProjections):
    """Attention of a video's tokens to a text's."""

    def __init__(self, config: CosmosTransformer3DConfig, **init):
        super().__init__(**_attention(config), context_features=config.text_embed_dim, **init)
        self.to_out = nnx.List([linear(config.features, config.features, **_plain(init))])

    def __call__(
        self, x: Float[Array, "B N D"], text: Float[Array, "B A E"]
    ) -> Float[Array, "B N D"]:
        attended = dot_product_attention(*self.project(x, text))
        return self.to_out[0](attended.reshape(x.shape))


def _plain(init: Mapping[str, Any]) -> dict[str, Any]:
    return {**init, "use_bias": False}


def _attention(config: CosmosTransformer3DConfig) -> dict[str, Any]:
    return {
        "features": config.features,
        "heads": config.num_attention_heads,
        "use_bias": False,
        "epsilon": config.qk_norm_eps,
    }


class CosmosTransformerBlock(nnx.Module):
    """Self-attention, cross-attention and perceptron, each normalized, modulated and gated."""

    def __init__(self, config: CosmosTransformer3DConfig, neighborhood: GNA | None, **init):
        self.norm1, self.norm2, self.norm3 = (AdaLayerNorm(config, 3, **init) for _ in range(3))
        self.attn1 = SelfAttention(config, neighborhood, **init)
        self.attn2 = CrossAttention(config, **init)
        exact = functools.partial(GELU, approximate=False)
        hidden = int(config.features * config.mlp_ratio)
        self.ff = FeedForward(config.features, exact, hidden=hidden, **_plain(init))

    def __call__(
        self,
        x: Float[Array, "B N D"],
        text: Float[Array, "B A E"],
        time: Time,
        positions: Float[Array, "1 N D"] | None,
        sequence: JointSequence,
    ) -> Float[Array, "B N D"]:
        if positions is not None:
            x = x + positions.astype(x.dtype)
        x_in, gate = self.norm1(x, time)
        x = x + gate * self.attn1(x_in, sequence)
        x_in, gate = self.norm2(x, time)
        x = x + gate * self.attn2(x_in, text)
        x_in, gate = self.norm3(x, time)
        return x + gate * self.ff(x_in)


class PatchEmbed(nnx.Module):
    """Patches as tokens: [B, T, Y, X, C] -> [B, t, y, x, D], the channels slowest in a patch."""

    def __init__(self, config: CosmosTransformer3DConfig, **init):
        self.patch = config.patch_size
        inputs = (config.in_channels + config.concat_padding_mask) * math.prod(self.patch)
        self.proj = linear(inputs, config.features, **_plain(init))

    def __call__(self, latents: Float[Array, "B T Y X C"]) -> Float[Array, "B t y x D"]:
        sides = zip(latents.shape[1:4], self.patch, strict=True)
        split = [number for side, p in sides for number in (side // p, p)]
        x = latents.reshape(latents.shape[0], *split, -1).transpose(0, 1, 3, 5, 7, 2, 4, 6)
        return self.proj(x.reshape(*x.shape[:4], -1))


class LearnablePositions(nnx.Module):
    """Learned positions along frames, rows and columns, whose sum is normalized."""

    def __init__(self, config: CosmosTransformer3DConfig, **init):
        draw = nnx.initializers.truncated_normal(0.02)
        rngs, dtype = init["rngs"], init["param_dtype"]
        for name, most in zip(_POSITIONS, _most_tokens(config), strict=True):
            setattr(self, name, nnx.Param(draw(rngs.params(), (most, config.features), dtype)))

    def __call__(self, grid: tuple[int, int, int]) -> Float[Array, "1 N D"]:
        """Of the tokens on a grid, in float32."""
        frames, rows, columns = (
            getattr(self, name)[:count].astype(jnp.float32)
            for name, count in zip(_POSITIONS, slabs.whole(grid), strict=True)
        )
        x = slabs.own(frames)[:, None, None] + rows[:, None] + columns
        square = jnp.mean(x * x, axis=-1, keepdims=True)
        there = square > 0  # a root has no gradient at zero
        length = jnp.where(there, jnp.sqrt(jnp.where(there, square, 1.0)), 0.0)
        return (x / (length + 1e-6)).reshape(1, -1, x.shape[-1])


def _most_tokens(config: CosmosTransformer3DConfig) -> tuple[int, ...]:
    """Along each dimension, for which there are learned positions."""
    return tuple(n // p for n, p in zip(config.max_size, config.patch_size, strict=True))


def rotary_of(
    config: CosmosTransformer3DConfig, grid: tuple[int, int, int], fps: Array | None = None
) -> Rotary:
    """Angles of a video's tokens, for pairs of a head's halves; computed in float32.

    Args:
      config: of the model.
      grid: frames, rows and columns of tokens.
      fps: [B] of `CosmosCondition`, whose videos have angles of their own.

    Returns:
      Cosines and sines [B, N, D / 2], or [1, N, D / 2] for all alike.
    """
    places = [jnp.arange(count, dtype=jnp.float32)[None] for count in slabs.whole(grid)]
    places[0] = slabs.own(places[0], axis=1)
    if fps is not None:
        places[0] = places[0] / jnp.asarray(fps, jnp.float32)[:, None] * _FPS
    parts = []
    for axis, (dim, scale) in enumerate(zip(config.axes_dims_rope, config.rope_scale, strict=True)):
        theta = _THETA * scale ** (dim / (dim - 2))
        frequencies = (theta ** -(np.arange(0, dim, 2) / dim)).astype(np.float32)
        angles = places[axis][..., None] * frequencies  # [B or 1, n, dim / 2]
        shape = [len(angles), 1, 1, 1, dim // 2]
        shape[1 + axis] = grid[axis]
        parts.append(jnp.broadcast_to(angles.reshape(shape), (len(places[0]), *grid, dim // 2)))
    angles = jnp.concatenate(parts, axis=-1).reshape(len(places[0]), math.prod(grid), -1)
    return Rotary(jnp.cos(angles), jnp.sin(angles))


class CosmosTransformer3DModel(AttendingModel):
    """Diffusion transformer of videos, given a text, and frames that are there."""

    BLOCKS: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    SPREADS: ClassVar[bool] = True
    config: CosmosTransformer3DConfig
    config_class = CosmosTransformer3DConfig
    pytorch_class = "CosmosTransformer3DModel"
    pytorch_library = "diffusers"

    def _build(self, config: CosmosTransformer3DConfig, attention: Neighborhoods, **init):
        features = config.features
        self.patch_embed = PatchEmbed(config, **init)
        if config.extra_pos_embed_type is not None:
            self.learnable_pos_embed = LearnablePositions(config, **init)
        self.time_embed = TimeEmbedding(features, **init)
        self.transformer_blocks = nnx.List(
            [
                CosmosTransformerBlock(config, setting, **init)
                for setting in per_layer(attention, config.num_layers, "one per block")
            ]
        )
        self.norm_out = AdaLayerNorm(config, 2, **init)
        outputs = math.prod(config.patch_size) * config.out_channels
        self.proj_out = zero_linear(features, outputs, **_plain(init))

    def __call__(
        self,
        latents: Float[Array, "B T Y X C"],
        timesteps: Num[Array, "*B"] | float | int,
        condition: CosmosCondition,
    ) -> Float[Array, "B T Y X O"]:
        """Predict what the sampler makes of a noisy video (`methods.sampling.edm`).

        Args:
          latents: noisy latents, scaled [B, T, Y, X, C], sides multiples of `patch_size`;
            `in_channels` of them, the condition's mask, where there is one, counted.
          timesteps: scalar or [B], or [B, T] where frames differ: a quarter of the logarithm of the
            noise's level for Predict1, and its share of the whole, 0 to 1, for Predict2.
          condition: the text's states [B, A, text_embed_dim], frames per second, masks.

        Returns:
          [B, T, Y, X, out_channels] in the computation dtype.

        Raises:
          ValueError: inputs of another shape, more tokens than positions, or a window larger than
            the grid of tokens.
        """
        patch = self.config.patch_size
        inputs = self._inputs(latents, condition)
        batch, *sides, _ = latents.shape
        grid: Any = tuple(side // p for side, p in zip(sides, patch, strict=True))
        rotary = rotary_of(self.config, grid, condition.fps)
        sequence = JointSequence(grid, rotary=rotary, halves=True)
        positions = None
        if self.config.extra_pos_embed_type is not None:
            positions = self.learnable_pos_embed(grid)
        time = self.time_embed(self._per_frame(timesteps, batch, sides[0]))
        text = condition.states.astype(self.dtype)
        x = self.patch_embed(inputs).reshape(batch, math.prod(grid), -1)
        for block in self.transformer_blocks:
            run = recomputed(functools.partial(block.__call__, sequence=sequence), self.remat)
            x = run(x, text, time, positions)
        (x,) = self.norm_out(x, time)
        x = self.proj_out(x).reshape(batch, *grid, *patch[1:], patch[0], -1)
        return x.transpose(0, 1, 6, 2, 4, 3, 5, 7).reshape(batch, *sides, -1)

    def _per_frame(self, timesteps: Any, batch: int, frames: int) -> Array:
        """[B, 1], or [B, T] where frames differ."""
        times = jnp.asarray(timesteps)
        if times.ndim < 2:
            return jnp.broadcast_to(times, (batch,))[:, None]
        if times.shape != (batch, frames) or self.config.patch_size[0] != 1:
            raise ValueError(
                f"{type(self).__name__} takes one timestep, one per video [{batch}], or one per "
                f"frame [{batch}, {frames}] where patches have one frame; received {times.shape}."
            )
        return times

    def _inputs(self, latents: Array, condition: CosmosCondition) -> Array:
        """Latents and masks, in the computation dtype, checked."""
        name, config = type(self).__name__, self.config
        check_axes(latents, "B T Y X C", f"{name}'s latents")
        check_axes(condition.states, "B A E", f"{name}'s text states")
        batch, *sides, channels = latents.shape
        masked = condition.mask is not None
        if channels + masked != config.in_channels:
            told = "with a mask of given frames" if masked else "without a mask of given frames"
            raise ValueError(
                f"{name} takes [B, T, Y, X, {config.in_channels - masked}] latents {told}, which "
                f"in_channels {config.in_channels} counts; received {latents.shape}."
            )
        most = _most_tokens(config) if config.extra_pos_embed_type is not None else (math.inf,) * 3
        fitting = zip(slabs.whole(tuple(sides)), config.patch_size, most, strict=True)
        if any(side % p or side // p > n for side, p, n in fitting):
            raise ValueError(
                f"{name} takes latents whose sides are multiples of patch_size "
                f"{config.patch_size} and, for its learned positions, at most {config.max_size}; "
                f"received {latents.shape}."
            )
        _, _, features = condition.states.shape
        if (len(condition.states), features) != (batch, config.text_embed_dim):
            raise ValueError(
                f"{name} takes text states [{batch}, A, {config.text_embed_dim}] for a batch of "
                f"{batch}, received {condition.states.shape}."
            )
        shape, parts = (batch, *sides, 1), [latents.astype(self.dtype)]
        if condition.mask is not None:
            frames = slabs.whole((sides[0],))[0]
            if condition.mask.shape != (batch, frames):
                raise ValueError(
                    f"{name} takes a mask of given frames [{batch}, {frames}], received "
                    f"{condition.mask.shape}."
                )
            mask = slabs.own(condition.mask, axis=1).astype(self.dtype)[..., None, None, None]
            parts.append(jnp.broadcast_to(mask, shape))
        if config.concat_padding_mask:
            padding: Array = jnp.zeros((), self.dtype)
            if condition.padding is not None:
                check_axes(condition.padding, "B H W", f"{name}'s padding")
                rows, columns = (  # the nearest, as torch has it
                    np.arange(new) * old // new
                    for new, old in zip(sides[1:], condition.padding.shape[1:], strict=True)
                )
                nearest = condition.padding[:, rows[:, None], columns]
                padding = nearest.astype(self.dtype)[:, None, :, :, None]
            parts.append(jnp.broadcast_to(padding, shape))
        return jnp.concatenate(parts, axis=-1)
