"""`AutoencoderKLHunyuanVideo`: HunyuanVideo's causal video autoencoder (arXiv 2412.03603, 4.1).

Videos are `[B, F, H, W, 3]` in [-1, 1], latents `[B, T, h, w, 16]` *before* scaling: 8 x 8 pixels
and 4 frames each, but for the first frame, which has latents of its own.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..kernels.attention import frame_causal_attention
from .configs import ModelConfig
from .layers.attention import Attention
from .layers.causal_conv import CausalConv3d
from .layers.checks import check_axes
from .layers.remat import Remat, recomputed
from .layers.resnet import group_norm
from .layers.tiling import tiled, tiled_in_time
from .pretrained import RecomputingModel

_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class AutoencoderKLHunyuanVideoConfig(ModelConfig):
    """Settings of `AutoencoderKLHunyuanVideo`; the defaults are the published 246,478,803."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    down_block_types: tuple[str, ...] = ("HunyuanVideoDownBlock3D",) * 4
    up_block_types: tuple[str, ...] = ("HunyuanVideoUpBlock3D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.476986
    spatial_compression_ratio: int = 8
    mid_block_add_attention: bool = True

    FIXED: ClassVar[Mapping[str, Any]] = {"act_fn": "silu", "temporal_compression_ratio": 4}

    # Of the tiles, in pixels and frames; diffusers' own.
    tile_size: ClassVar[int] = 256
    tile_frames: ClassVar[int] = 16
    tile_frames_stride: ClassVar[int] = 12

    def __post_init__(self):
        self.require_positive("in_channels", "out_channels", "block_out_channels")
        self.require_positive("layers_per_block", "latent_channels", "norm_num_groups")
        depth = len(self.block_out_channels)
        for name, kind in (("down_block_types", "Down"), ("up_block_types", "Up")):
            wanted = (f"HunyuanVideo{kind}Block3D",) * depth
            types = getattr(self, name)
            self.require(
                types == wanted, f"{name} must be {depth} x {wanted[0]!r}, received {types}."
            )
        ratios = tuple(2**power for power in range(depth + 1))
        self.require(depth >= 3, f"block_out_channels must be 3 or more, received {depth}.")
        self.require_one_of("spatial_compression_ratio", ratios)
        bad = [c for c in self.block_out_channels if c % self.norm_num_groups]
        self.require(not bad, f"channels {bad} do not divide into {self.norm_num_groups} groups.")

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along each side."""
        return self.spatial_compression_ratio

    @property
    def temporal_downsampling(self) -> int:
        """Frames per latent, after the first."""
        return 4

    def latent_frames_of(self, frames: int) -> int:
        """Of a video."""
        return (frames - 1) // self.temporal_downsampling + 1

    def frames_of(self, latent_frames: int) -> int:
        """Of the video that so many are decoded to."""
        return (latent_frames - 1) * self.temporal_downsampling + 1

    @property
    def factors(self) -> tuple[tuple[int, int, int], ...]:
        """What each block of either coder changes time, height and width by."""
        depth = len(self.block_out_channels)
        side = [1 + (i < math.log2(self.spatial_compression_ratio)) for i in range(depth)]
        time = [1 + (depth - 3 <= i < depth - 1) for i in range(depth)]
        return tuple(zip(time, side, side, strict=True))


class Conv(nnx.Module):
    """A causal convolution under the name `conv`, with borders that repeat."""

    def __init__(self, in_channels: int, out_channels: int, size: int = 3, **options):
        self.conv = CausalConv3d(
            in_channels, out_channels, size, time="edge", space="edge", **options
        )

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B S Y X D"]:
        return self.conv(x)


class Downsample(nnx.Module):
    """A convolution with strides."""

    def __init__(self, channels: int, factors: tuple[int, int, int], **init):
        self.conv = Conv(channels, channels, strides=factors, **init)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B S Y X C"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbor resize, in which the first frame stays one, then a convolution."""

    def __init__(self, channels: int, factors: tuple[int, int, int], **init):
        self.factors = factors
        self.conv = Conv(channels, channels, **init)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B S Y X C"]:
        return self.conv.conv.of_doubled(x, self.factors)


class ResnetBlock(nnx.Module):
    """norm, SiLU, conv, norm, SiLU, conv, + shortcut."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, **init):
        self.norm1 = group_norm(in_channels, groups, _EPSILON, **init)
        self.conv1 = Conv(in_channels, out_channels, **init)
        self.norm2 = group_norm(out_channels, groups, _EPSILON, **init)
        self.conv2 = Conv(out_channels, out_channels, **init)
        if in_channels != out_channels:
            self.conv_shortcut = Conv(in_channels, out_channels, 1, **init)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W D"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class AttentionBlock(Attention):
    """Single-head self-attention over the pixels of a frame and of those before, + its input."""

    def __init__(self, channels: int, groups: int, **init):
        super().__init__(channels, 1, use_bias=True, **init)
        self.group_norm = group_norm(channels, groups, _EPSILON, **init)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        tokens = self.group_norm(x).reshape(*x.shape[:2], -1, 1, x.shape[-1])  # [B, T, H*W, 1, C]
        query, key, value = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        attended = frame_causal_attention(query, key, value)
        return x + self.to_out[0](attended.reshape(x.shape))


class MidBlock(nnx.Module):
    """Resnet, attention, resnet at the coarsest resolution."""

    def __init__(self, channels: int, groups: int, *, attends: bool, **init):
        self.resnets = nnx.List([ResnetBlock(channels, channels, groups, **init) for _ in "12"])
        if attends:
            self.attentions = nnx.List([AttentionBlock(channels, groups, **init)])

    def __call__(self, x: Array) -> Array:
        x = self.resnets[0](x)
        if hasattr(self, "attentions"):
            x = self.attentions[0](x)
        return self.resnets[1](x)


class Block(nnx.Module):
    """`HunyuanVideoDownBlock3D` or `HunyuanVideoUpBlock3D`: resnets, then another size, or not."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        layers: int,
        groups: int,
        factors: tuple[int, int, int],
        *,
        up: bool,
        **init,
    ):
        inputs = (in_channels,) + (channels,) * (layers - 1)
        self.resnets = nnx.List([ResnetBlock(c, channels, groups, **init) for c in inputs])
        if factors == (1, 1, 1):
            return
        if up:
            self.upsamplers = nnx.List([Upsample(channels, factors, **init)])
        else:
            self.downsamplers = nnx.List([Downsample(channels, factors, **init)])

    def __call__(self, x: Array) -> Array:
        for layer in (
            *self.resnets,
            *getattr(self, "upsamplers", getattr(self, "downsamplers", ())),
        ):
            x = layer(x)
        return x


class _Coder(nnx.Module):
    """What encoder and decoder share: blocks between two convolutions."""

    def __init__(
        self,
        config: AutoencoderKLHunyuanVideoConfig,
        sizes: tuple[int, int],
        *,
        up: bool,
        remat: Remat,
        **init,
    ):
        channels, groups = config.block_out_channels[:: -1 if up else 1], config.norm_num_groups
        layers = config.layers_per_block + up
        self.remat = remat
        self.conv_in = Conv(sizes[0], channels[0], **init)
        middle = MidBlock(
            config.block_out_channels[-1], groups, attends=config.mid_block_add_attention, **init
        )
        pairs = zip((channels[0], *channels), channels, config.factors, strict=False)
        blocks = [
            Block(first, last, layers, groups, factors, up=up, **init)
            for first, last, factors in pairs
        ]
        self.mid_block = middle
        if up:
            self.up_blocks = nnx.List(blocks)
        else:
            self.down_blocks = nnx.List(blocks)
        self.conv_norm_out = group_norm(channels[-1], groups, _EPSILON, **init)
        self.conv_out = Conv(channels[-1], sizes[1], **init)

    def _run(self, blocks: Sequence[nnx.Module], x: Array) -> Array:
        x = self.conv_in(x)
        for block in blocks:
            x = recomputed(block.__call__, self.remat)(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Encoder(_Coder):
    """Video -> mean and log-variance, before `quant_conv`."""

    def __init__(self, config: AutoencoderKLHunyuanVideoConfig, **init):
        super().__init__(config, (config.in_channels, 2 * config.latent_channels), up=False, **init)

    def __call__(self, x: Float[Array, "B F H W C"]) -> Float[Array, "B T h w Z"]:
        return self._run((*self.down_blocks, self.mid_block), x)


class Decoder(_Coder):
    """Latents after `post_quant_conv` -> video."""

    def __init__(self, config: AutoencoderKLHunyuanVideoConfig, **init):
        super().__init__(config, (config.latent_channels, config.out_channels), up=True, **init)

    def __call__(self, x: Float[Array, "B T h w Z"]) -> Float[Array, "B F H W C"]:
        return self._run((self.mid_block, *self.up_blocks), x)


class AutoencoderKLHunyuanVideo(RecomputingModel):
    """Variational autoencoder between videos and latents.

    Long videos are coded in pieces of `config.tile_frames` frames and blended where those overlap,
    which is what diffusers does by default and changes what comes out.
    """

    config: AutoencoderKLHunyuanVideoConfig
    config_class = AutoencoderKLHunyuanVideoConfig
    pytorch_class = "AutoencoderKLHunyuanVideo"
    pytorch_library = "diffusers"

    def _build(self, config: AutoencoderKLHunyuanVideoConfig, *, remat: Remat, **init):
        latent = config.latent_channels
        self.encoder = Encoder(config, remat=remat, **init)
        self.decoder = Decoder(config, remat=remat, **init)
        self.quant_conv = CausalConv3d(2 * latent, 2 * latent, 1, **init)
        self.post_quant_conv = CausalConv3d(latent, latent, 1, **init)

    def encode(
        self, videos: Float[Array, "B F H W C"], *, tiling: bool = False
    ) -> tuple[Float[Array, "B T h w Z"], Float[Array, "B T h w Z"]]:
        """Posterior of the latents.

        Args:
          videos: [B, F, H, W, in_channels] in [-1, 1]; H and W multiples of `config.downsampling`.
          tiling: whether frames larger than `config.tile_size` are encoded in tiles of that size.

        Returns:
          mean and log-variance (clipped to [-30, 20]), each [B, T, h, w, latent_channels] with
          `config.latent_frames_of(F)` frames, unscaled.
        """
        channels, factor = self.config.in_channels, self.config.downsampling
        check_axes(videos, "B F H W C", "AutoencoderKLHunyuanVideo's videos")
        if videos.shape[-1] != channels or any(side % factor for side in videos.shape[2:4]):
            raise ValueError(
                f"AutoencoderKLHunyuanVideo encodes [B, F, H, W, {channels}] videos whose sides "
                f"are multiples of {factor}, received {videos.shape}."
            )
        videos = videos.astype(self.dtype)
        moments = self._coded(lambda x: self.quant_conv(self.encoder(x)), videos, tiling, up=False)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(
        self, latents: Float[Array, "B T h w Z"], *, tiling: bool = False
    ) -> Float[Array, "B F H W C"]:
        """Videos [B, F, H, W, out_channels], nominally in [-1, 1], from unscaled latents.

        Args:
          latents: [B, T, h, w, latent_channels].
          tiling: whether frames larger than `config.tile_size` are decoded in tiles of that size,
            and videos one at a time, in the memory that one tile takes.

        Returns:
          `config.frames_of(T)` frames.
        """
        channels = self.config.latent_channels
        check_axes(latents, "B T h w C", "AutoencoderKLHunyuanVideo's latents")
        if latents.shape[-1] != channels:
            raise ValueError(
                f"AutoencoderKLHunyuanVideo decodes [B, T, h, w, {channels}] latents, received "
                f"{latents.shape}."
            )

        def decode(latents: Array) -> Array:
            code = lambda x: self.decoder(self.post_quant_conv(x))  # noqa: E731
            return self._coded(code, latents, tiling, up=True)

        latents = latents.astype(self.dtype)
        return jax.lax.map(lambda x: decode(x[None])[0], latents) if tiling else decode(latents)

    def _coded(self, code: Callable[[Array], Array], x: Array, tiling: bool, *, up: bool) -> Array:
        """`code` of a video or its latents, in pieces of time where it is long, of space if asked.

        `up` is whether `x` are latents, and the result is a video.
        """
        config = self.config

        def sizes(large: int, factor: int) -> tuple[int, int]:
            """Of what is given, and of what is made."""
            return (large // factor, large) if up else (large, large // factor)

        tile, output = sizes(config.tile_size, config.downsampling)

        def code_frames(x: Array) -> Array:
            if not tiling or max(x.shape[2:4]) <= tile:
                return code(x)
            return tiled(code, x, tile=tile, output=output)

        frames, made = sizes(config.tile_frames, config.temporal_downsampling)
        stride, kept = sizes(config.tile_frames_stride, config.temporal_downsampling)
        if x.shape[1] <= frames:
            return code_frames(x)
        total = (config.frames_of if up else config.latent_frames_of)(x.shape[1])
        return tiled_in_time(
            code_frames, x, tile=frames + 1, stride=stride, kept=kept, overlap=made - kept
        )[:, :total]

    def scale(self, latents: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Autoencoder latents -> the unit-variance latents that the diffusion model sees."""
        return latents * self.config.scaling_factor

    def unscale(self, latents: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Inverse of `scale`."""
        return latents / self.config.scaling_factor
