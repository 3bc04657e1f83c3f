"""`UNetMotionModel`: AnimateDiff's video UNet (Guo et al. 2023, arXiv 2307.04725), and
`MotionAdapter`, what it adds to an image UNet.

A motion module attends along time: each pixel to the same pixel of the other frames.  One follows
each layer of the UNet, so a UNet that was trained (or personalized) on images and an adapter that
was trained on videos go together: `with_motion(unet, adapter)`.  Videos are `[B, F, H, W, C]`, text
is `[B, L, E]`.  Attribute paths are diffusers' state-dict keys.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Num

from .abstract import OneKey
from .configs import ModelConfig
from .layers.embeddings import Dtype
from .layers.linear import linear
from .layers.resnet import group_norm
from .layers.transformer import BasicTransformerBlock
from .pretrained import Buffer, PretrainedModel
from .unet_2d_condition import BlocksConfig, UNet2DConditionConfig, UNet2DConditionModel

PerLevel = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MotionAdapterConfig(BlocksConfig):
    """Settings of `MotionAdapter`; the defaults are those for Stable Diffusion 1.5."""

    motion_layers_per_block: PerLevel = 2
    motion_transformer_layers_per_block: PerLevel = 1
    motion_transformer_layers_per_mid_block: int | tuple[int] = 1
    motion_num_attention_heads: PerLevel = 8
    motion_norm_num_groups: int = 32
    motion_max_seq_length: int = 32
    use_motion_mid_block: bool = True

    FIXED: ClassVar[Mapping[str, Any]] = {
        "motion_mid_block_layers_per_block": 1,
        "conv_in_channels": None,
    }

    def __post_init__(self):
        self.require_positive("motion_transformer_layers_per_mid_block")
        self.require_positive("motion_norm_num_groups", "motion_max_seq_length")
        self.require_per_block(
            "motion_layers_per_block",
            "motion_transformer_layers_per_block",
            "motion_num_attention_heads",
        )
        for channels, heads in zip(
            self.block_out_channels, self.per_block("motion_num_attention_heads"), strict=True
        ):
            self.require(
                channels % heads == 0 and channels % self.motion_norm_num_groups == 0,
                f"{channels} channels do not divide into {heads} heads and "
                f"{self.motion_norm_num_groups} groups.",
            )

    def module(self, level: int | None) -> Callable[..., "AnimateDiffTransformer3D"]:
        """What makes the motion modules of a resolution, or of the middle (None)."""
        at = -1 if level is None else level
        depth = self.per_block("motion_transformer_layers_per_block")[at]
        if level is None:
            middle = self.motion_transformer_layers_per_mid_block
            depth = middle[0] if isinstance(middle, tuple) else middle
        return functools.partial(
            AnimateDiffTransformer3D,
            self.block_out_channels[at],
            self.per_block("motion_num_attention_heads")[at],
            layers=depth,
            groups=self.motion_norm_num_groups,
            max_frames=self.motion_max_seq_length,
        )


@dataclasses.dataclass(frozen=True)
class UNetMotionConfig(ModelConfig):
    """Settings of `UNetMotionModel`; the defaults are Stable Diffusion 1.5's with its adapter."""

    sample_size: int | tuple[int, ...] | None = 64
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlockMotion",) * 3 + ("DownBlockMotion",)
    up_block_types: tuple[str, ...] = ("UpBlockMotion",) + ("CrossAttnUpBlockMotion",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: PerLevel = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 768
    transformer_layers_per_block: PerLevel = 1
    temporal_transformer_layers_per_block: PerLevel = 1
    temporal_transformer_layers_per_mid_block: int | tuple[int] = 1
    use_linear_projection: bool = False
    num_attention_heads: PerLevel = 8
    motion_max_seq_length: int = 32
    motion_num_attention_heads: PerLevel = 8
    use_motion_mid_block: bool = True

    FIXED: ClassVar[Mapping[str, Any]] = {
        "act_fn": "silu",
        "reverse_transformer_layers_per_block": None,
        "reverse_temporal_transformer_layers_per_block": None,
        "reverse_motion_num_attention_heads": None,
        "transformer_layers_per_mid_block": None,
        "mid_block_layers": 1,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "addition_embed_type": None,
        "time_cond_proj_dim": None,
    }
    INERT: ClassVar[frozenset[str]] = frozenset(
        {"addition_time_embed_dim", "projection_class_embeddings_input_dim"}
    )

    def __post_init__(self):
        types = (*self.down_block_types, *self.up_block_types)
        unknown = sorted({kind for kind in types if not kind.endswith("Motion")})
        self.require(not unknown, f"block types end in 'Motion', received {unknown}.")
        try:
            _ = self.unet, self.adapter  # they check the rest
        except ValueError as error:
            raise ValueError(f"UNetMotionConfig: {error}") from error

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents it was made for."""
        return self.unet.latent_size

    @property
    def unet(self) -> UNet2DConditionConfig:
        """The image UNet inside."""
        same = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(UNet2DConditionConfig)
            if hasattr(self, field.name) and not field.name.endswith("_types")
        }
        return UNet2DConditionConfig(
            **same,
            attention_head_dim=self.num_attention_heads,
            down_block_types=tuple(f"{t.removesuffix('Motion')}2D" for t in self.down_block_types),
            up_block_types=tuple(f"{t.removesuffix('Motion')}2D" for t in self.up_block_types),
        )

    @property
    def adapter(self) -> MotionAdapterConfig:
        """What is added to it."""
        return MotionAdapterConfig(
            block_out_channels=self.block_out_channels,
            motion_layers_per_block=self.layers_per_block,
            motion_transformer_layers_per_block=self.temporal_transformer_layers_per_block,
            motion_transformer_layers_per_mid_block=self.temporal_transformer_layers_per_mid_block,
            motion_num_attention_heads=self.motion_num_attention_heads,
            motion_norm_num_groups=self.norm_num_groups,
            motion_max_seq_length=self.motion_max_seq_length,
            use_motion_mid_block=self.use_motion_mid_block,
        )

    @classmethod
    def of(cls, unet: UNet2DConditionConfig, adapter: MotionAdapterConfig) -> "UNetMotionConfig":
        """Of a UNet and an adapter that fits it.

        Raises:
          ValueError: it does not, or the UNet is of a kind that diffusers gives no motion.
        """
        layers = unet.per_block("layers_per_block"), adapter.per_block("motion_layers_per_block")
        for what, ours, theirs in (
            ("block_out_channels", unet.block_out_channels, adapter.block_out_channels),
            ("norm_num_groups", unet.norm_num_groups, adapter.motion_norm_num_groups),
            ("layers per block", *layers),
        ):
            unet.require(
                ours == theirs,
                f"the UNet has {what} {ours} and the motion adapter {theirs}: it is made for "
                "another model.",
            )
        unet.require(
            unet.mid_block_type is not None
            and unet.flip_sin_to_cos
            and unet.freq_shift == 0
            and not unet.center_input_sample
            and unet.addition_embed_type is None,
            "a UNet for videos has a middle block, cosines first in its embedding of time, no "
            "shift of its frequencies, no embedding added to it (SDXL), and an input that is not "
            "centered.",
        )
        same = {
            field.name: getattr(unet, field.name)
            for field in dataclasses.fields(cls)
            if hasattr(unet, field.name) and not field.name.endswith("_types")
        }
        return cls(
            **same,
            num_attention_heads=unet.attention_head_dim,
            down_block_types=tuple(f"{t.removesuffix('2D')}Motion" for t in unet.down_block_types),
            up_block_types=tuple(f"{t.removesuffix('2D')}Motion" for t in unet.up_block_types),
            temporal_transformer_layers_per_block=adapter.motion_transformer_layers_per_block,
            temporal_transformer_layers_per_mid_block=(
                adapter.motion_transformer_layers_per_mid_block
            ),
            motion_max_seq_length=adapter.motion_max_seq_length,
            motion_num_attention_heads=adapter.motion_num_attention_heads,
            use_motion_mid_block=adapter.use_motion_mid_block,
        )


# ---- motion modules ----


class SinusoidalPositionalEmbedding(nnx.Module):
    """Adds sines and cosines of a frame's number, alternating (Vaswani et al. 2017, sec. 3.5)."""

    def __init__(self, features: int, max_frames: int, *, param_dtype: Dtype):
        rates = np.exp(np.arange(0, features, 2) * (-math.log(10000.0) / features))
        angles = np.arange(max_frames)[:, None] * rates
        table = np.zeros((1, max_frames, features))
        table[0, :, 0::2] = np.sin(angles)
        table[0, :, 1::2] = np.cos(angles)[:, : features // 2]
        self.pe = Buffer(jnp.asarray(table, param_dtype))

    def __call__(self, x: Float[Array, "B F C"]) -> Float[Array, "B F C"]:
        return x + self.pe[...][:, : x.shape[1]].astype(x.dtype)


class MotionTransformerBlock(BasicTransformerBlock):
    """Pre-norm block: self-attention over the frames, twice, and feed-forward."""

    def __init__(self, features: int, heads: int, max_frames: int, **init):
        super().__init__(features, heads, features, **init)
        self.pos_embed = SinusoidalPositionalEmbedding(
            features, max_frames, param_dtype=init["param_dtype"]
        )

    def __call__(self, x: Float[Array, "B F C"]) -> Float[Array, "B F C"]:
        x = x + self.attn1(self.pos_embed(self.norm1(x)))
        x = x + self.attn2(self.pos_embed(self.norm2(x)))
        return x + self.ff(self.norm3(x))


class AnimateDiffTransformer3D(nnx.Module):
    """A motion module: transformer blocks over the frames of `[B*F, H, W, C]`, pixel by pixel."""

    def __init__(
        self, features: int, heads: int, *, layers: int, groups: int, max_frames: int, **init
    ):
        self.max_frames = max_frames
        self.norm = group_norm(features, groups, 1e-6, **init)
        self.proj_in = linear(features, features, **init)
        self.transformer_blocks = nnx.List(
            [MotionTransformerBlock(features, heads, max_frames, **init) for _ in range(layers)]
        )
        self.proj_out = linear(features, features, **init)

    def __call__(self, x: Float[Array, "N H W C"], frames: int) -> Float[Array, "N H W C"]:
        if frames > self.max_frames:
            raise ValueError(
                f"this motion adapter knows {self.max_frames} frames, received {frames}."
            )
        _, height, width, features = x.shape
        video = x.reshape(-1, frames, height, width, features)
        h = self.norm(video).transpose(0, 2, 3, 1, 4)  # [B, H, W, F, C]
        h = self.proj_in(h.reshape(-1, frames, features))  # [B*H*W, F, C]
        for block in self.transformer_blocks:
            h = block(h)
        h = self.proj_out(h).reshape(-1, height, width, frames, features)
        return x + h.transpose(0, 3, 1, 2, 4).reshape(x.shape)


class MotionModules(nnx.Module):
    """The motion modules of one resolution."""

    def __init__(self, make: Callable[..., AnimateDiffTransformer3D], count: int, **init):
        self.motion_modules = nnx.List([make(**init) for _ in range(count)])


class MotionAdapter(PretrainedModel):
    """What is added to an image UNet; it is no model by itself."""

    config: MotionAdapterConfig
    config_class = MotionAdapterConfig
    pytorch_class = "MotionAdapter"
    pytorch_library = "diffusers"

    def _build(self, config: MotionAdapterConfig, **init):
        layers = config.per_block("motion_layers_per_block")
        levels = range(len(layers))
        self.down_blocks = nnx.List(
            [MotionModules(config.module(level), layers[level], **init) for level in levels]
        )
        if config.use_motion_mid_block:
            self.mid_block = MotionModules(config.module(None), 1, **init)
        self.up_blocks = nnx.List(
            [
                MotionModules(config.module(level), layers[level] + 1, **init)
                for level in reversed(levels)
            ]
        )


# ---- the model ----


class UNetMotionModel(UNet2DConditionModel):
    """Text-conditioned UNet over videos.  Arguments as for `UNet2DConditionModel`."""

    config: UNetMotionConfig
    config_class = UNetMotionConfig
    pytorch_class = "UNetMotionModel"

    def _build(self, config: UNetMotionConfig, **init):
        self.adapter_config, self.unet_config = config.adapter, config.unet
        super()._build(self.unet_config, **init)

    def _motion(self, level: int | None) -> Callable[..., nnx.Module] | None:
        if level is None and not self.adapter_config.use_motion_mid_block:
            return None
        return self.adapter_config.module(level)

    def __call__(
        self,
        sample: Float[Array, "B F H W C"],
        timesteps: Num[Array, "*B"] | float | int,
        encoder_hidden_states: Float[Array, "B L E"],
    ) -> Float[Array, "B F H W O"]:
        """Predict the noise of all frames.

        Args:
          sample: noisy latents [B, F, H, W, in_channels]; F is at most `motion_max_seq_length`.
          timesteps: scalar or [B], in units of training timesteps.
          encoder_hidden_states: text states [B, L, cross_attention_dim], the same for every frame
            of a video (diffusers takes them repeated).

        Returns:
          [B, F, H, W, out_channels] in the computation dtype.
        """
        batch, frames = sample.shape[:2]
        flat = sample.reshape(batch * frames, *sample.shape[2:])
        timesteps = jnp.broadcast_to(jnp.asarray(timesteps), (batch,))
        output = self.denoise(
            self.unet_config,
            flat,
            jnp.repeat(timesteps, frames),
            jnp.repeat(encoder_hidden_states, frames, axis=0),
            frames=frames,
        )
        return output.reshape(batch, frames, *output.shape[1:])


def with_motion(unet: UNet2DConditionModel, adapter: MotionAdapter) -> UNetMotionModel:
    """An image UNet, personalized or not, with a motion adapter; it computes in the UNet's dtype.

    Parameters are shared, not copied.

    Raises:
      ValueError: the adapter is made for a UNet of other sizes.
    """
    config = UNetMotionConfig.of(unet.config, adapter.config)
    keys = OneKey()
    model = nnx.eval_shape(lambda: UNetMotionModel(config, dtype=unet.dtype, rngs=keys))
    graphdef, _ = nnx.split(model)
    return nnx.merge(graphdef, unflatten_dict(_leaves(unet) | _leaves(adapter)))


def motion_adapter(model: UNetMotionModel) -> MotionAdapter:
    """The adapter in a video UNet; parameters are shared, not copied."""
    config = model.config.adapter
    keys = OneKey()
    abstract = nnx.eval_shape(lambda: MotionAdapter(config, dtype=model.dtype, rngs=keys))
    leaves = _leaves(model)
    own = {path: leaves[path] for path in _leaves(abstract)}
    return nnx.merge(nnx.split(abstract)[0], unflatten_dict(own))


def _leaves(model: nnx.Module) -> dict[tuple[Any, ...], Any]:
    return flatten_dict(nnx.to_pure_dict(nnx.split(model)[1]))
