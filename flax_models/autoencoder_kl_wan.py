"""`AutoencoderKLWan`: the causal video autoencoder of Wan 2.1 and 2.2 (Wan Team 2025, section 4.1).

(arXiv 2503.20314.)  Videos are `[B, F, H, W, 3]` in [-1, 1], latents `[B, T, h, w, Z]` *before*
scaling: `scale` brings them to what the diffusion model sees, `unscale` back.  The first latent
frame stands for the first frame, each later one for four.  A frame depends on earlier ones alone,
so a video goes through piece by piece: what the convolutions remember is carried from one to the
next.  Wan 2.2's (`is_residual`) sees patches of 2 x 2 pixels, and has shortcuts around its blocks.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..kernels.attention import dot_product_attention
from .configs import ModelConfig
from .layers.causal_conv import CausalConv3d
from .layers.checks import check_axes
from .layers.remat import Remat, recomputed
from .layers.resnet import conv1x1, conv3x3, convolved_doubled
from .layers.tiling import tiled
from .layers.transformer import Identity
from .pretrained import RecomputingModel

_TILE = 256  # pixels along a tile's side; patches of pixels, when Wan 2.2's encodes

# What the layers carry from one piece of a video to the next: a pytree, None before the first.
Past = Any
Video = Float[Array, "B T H W C"]
Step = Callable[[Array, Past], tuple[Array, Past]]


@dataclasses.dataclass(frozen=True)
class AutoencoderKLWanConfig(ModelConfig):
    """Settings of `AutoencoderKLWan`; the defaults are those of Wan 2.1 and 2.2 A14B.

    `temperal_downsample` (so published) tells which of the encoder's levels but the last halve
    time. `in_channels` and `out_channels` count those of a patch, where there is a `patch_size`.
    `latents_mean` and `latents_std` are of each channel of the latents.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None  # as the encoder's
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    )
    latents_std: tuple[float, ...] = (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    )
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int | None = 4
    scale_factor_spatial: int | None = 8

    FIXED: ClassVar[Mapping[str, Any]] = {"attn_scales": ()}
    INERT: ClassVar[frozenset[str]] = frozenset({"dropout"})

    def __post_init__(self):
        self.require_positive("base_dim", "z_dim", "dim_mult", "num_res_blocks")
        self.require_positive("in_channels", "out_channels")
        for name in ("decoder_base_dim", "patch_size"):
            if getattr(self, name) is not None:
                self.require_positive(name)
        levels = len(self.dim_mult)
        self.require(
            len(self.temperal_downsample) == levels - 1,
            f"temperal_downsample takes {levels - 1} entries for {levels} levels, received "
            f"{self.temperal_downsample!r}.",
        )
        for name in ("latents_mean", "latents_std"):
            given = len(getattr(self, name))
            self.require(
                given == self.z_dim,
                f"{name} takes {self.z_dim} numbers, one per channel of the latents; received "
                f"{given}.",
            )
        for name in ("in_channels", "out_channels"):
            value, patch = getattr(self, name), self.patch_size or 1
            self.require(
                value % patch**2 == 0,
                f"{name} {value} is not a multiple of the {patch**2} pixels of a patch.",
            )
        for name, factor in (
            ("scale_factor_temporal", self.temporal_downsampling),
            ("scale_factor_spatial", self.downsampling),
        ):
            self.require(
                getattr(self, name) in (None, factor),
                f"{name} is {factor} with these levels, received {getattr(self, name)!r}.",
            )

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.z_dim

    @property
    def channels(self) -> int:
        """Channels of a video's pixels."""
        return self.in_channels // (self.patch_size or 1) ** 2

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.dim_mult) - 1) * (self.patch_size or 1)

    @property
    def temporal_downsampling(self) -> int:
        """Frames per latent frame, but for the first, which stands for one."""
        return 2 ** sum(self.temperal_downsample)

    def frames_of(self, latent_frames: int) -> int:
        """Frames that so many latent frames stand for."""
        return 1 + self.temporal_downsampling * (latent_frames - 1)

    @classmethod
    def wan_2_1(cls) -> "AutoencoderKLWanConfig":
        """The published one of Wan 2.1 and of Wan 2.2 A14B: 126,892,531 parameters."""
        return cls()

    @classmethod
    def wan_2_2(cls) -> "AutoencoderKLWanConfig":
        """The published one of Wan 2.2 TI2V-5B: 704,688,668 parameters."""
        return cls(
            base_dim=160,
            decoder_base_dim=256,
            z_dim=48,
            latents_mean=(
                *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
                *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
                *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
                *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
                *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
                *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
            ),
            latents_std=(
                *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
                *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
                *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
                *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
                *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
                *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
            ),
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
        )


def _patchify(videos: Float[Array, "B F H W C"], size: int) -> Float[Array, "B F h w P"]:
    """Patches of `size` x `size` pixels as one, their features in the order (C, column, row)."""
    batch, frames, height, width, _ = videos.shape
    grid = (batch, frames, height // size, size, width // size, size, -1)
    patches = videos.reshape(grid).transpose(0, 1, 2, 4, 6, 5, 3)
    return patches.reshape(batch, frames, height // size, width // size, -1)


def _unpatchify(patches: Float[Array, "B F h w P"], size: int) -> Float[Array, "B F H W C"]:
    """Inverse of `_patchify`."""
    batch, frames, rows, columns, _ = patches.shape
    videos = patches.reshape(batch, frames, rows, columns, -1, size, size)
    videos = videos.transpose(0, 1, 2, 6, 3, 5, 4)
    return videos.reshape(batch, frames, size * rows, size * columns, -1)


def _averaged(x: Video, channels: int, time: int, space: int) -> Float[Array, "B S Y X D"]:
    """Groups of neighboring features of `time` x `space` x `space` pixels, as their means.

    Frames of zeros come before the first, where they do not divide.
    """
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    batch, frames, height, width, _ = x.shape
    grid = (batch, frames // time, time, height // space, space, width // space, space, -1)
    x = x.reshape(grid).transpose(0, 1, 3, 5, 7, 2, 4, 6)  # [B, T, H, W, C, time, space, space]
    return x.reshape(*x.shape[:4], channels, -1).mean(-1)


def _repeated(
    x: Video, channels: int, time: int, space: int, is_first: bool
) -> Float[Array, "B S Y X D"]:
    """Features, each several times, as those of `time` x `space` x `space` pixels.

    The first frame of a video becomes one frame, not `time` of them.
    """
    batch, frames, height, width, features = x.shape
    x = jnp.repeat(x, channels * time * space**2 // features, axis=-1)
    x = x.reshape(batch, frames, height, width, channels, time, space, space)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(batch, frames * time, height * space, width * space, channels)
    return x[:, time - 1 :] if is_first else x


def _frame_by_frame(function: Callable[[Array], Array], x: Video) -> Float[Array, "B T Y X D"]:
    """A function of images, applied to each frame."""
    images = function(x.reshape(-1, *x.shape[2:]))
    return images.reshape(*x.shape[:2], *images.shape[1:])


def _run(
    steps: Sequence[Step], x: Video, past: Past, remat: Remat = False
) -> tuple[Float[Array, "B S Y X D"], Past]:
    """One step after the other, each with its own past."""
    after = []
    for step, own in zip(steps, past or (None,) * len(steps), strict=True):
        x, own = recomputed(step, remat)(x, own)
        after.append(own)
    return x, tuple(after)


class RMSNorm(nnx.Module):
    """Norm over the channels without a mean; `gamma` has the axes that PyTorch's has."""

    def __init__(self, channels: int, axes: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.gamma = nnx.Param(jnp.ones((channels, *(1,) * axes), param_dtype))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        wide = x.astype(jnp.float32)
        square = jnp.sum(wide * wide, axis=-1, keepdims=True)
        normalized = (wide * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).astype(self.dtype)
        return normalized * x.shape[-1] ** 0.5 * self.gamma[...].reshape(-1).astype(self.dtype)


class ResidualBlock(nnx.Module):
    """norm, SiLU, conv, norm, SiLU, conv, + shortcut."""

    def __init__(self, in_channels: int, channels: int, **init):
        self.norm1 = RMSNorm(in_channels, 3, **init)
        self.conv1 = CausalConv3d(in_channels, channels, 3, **init)
        self.norm2 = RMSNorm(channels, 3, **init)
        self.conv2 = CausalConv3d(channels, channels, 3, **init)
        if in_channels != channels:
            self.conv_shortcut = CausalConv3d(in_channels, channels, 1, **init)

    def __call__(self, x: Video, past: Past) -> tuple[Array, Past]:
        first, second = past or (None, None)
        h, first = self.conv1.continued(jax.nn.silu(self.norm1(x)), first)
        h, second = self.conv2.continued(jax.nn.silu(self.norm2(h)), second)
        shortcut = self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x
        return shortcut + h, (first, second)


class AttentionBlock(nnx.Module):
    """Single-head self-attention of each frame's pixels, behind a norm, added to its input."""

    def __init__(self, channels: int, **init):
        self.norm = RMSNorm(channels, 2, **init)
        self.to_qkv = conv1x1(channels, 3 * channels, **init)
        self.proj = conv1x1(channels, channels, **init)

    def __call__(self, x: Video, past: Past) -> tuple[Video, Past]:
        def attend(images: Array) -> Array:
            parts = jnp.split(self.to_qkv(self.norm(images)), 3, axis=-1)
            heads = (x.reshape(x.shape[0], -1, 1, x.shape[-1]) for x in parts)  # [B, H*W, 1, C]
            return self.proj(dot_product_attention(*heads).reshape(images.shape))

        return x + _frame_by_frame(attend, x), ()


class MidBlock(nnx.Module):
    """Resnet, attention, resnet at the coarsest resolution."""

    def __init__(self, channels: int, **init):
        self.attentions = nnx.List([AttentionBlock(channels, **init)])
        self.resnets = nnx.List([ResidualBlock(channels, channels, **init) for _ in range(2)])

    def __call__(self, x: Video, past: Past) -> tuple[Video, Past]:
        return _run((self.resnets[0], self.attentions[0], self.resnets[1]), x, past)


class Downsample(nnx.Module):
    """Halves the sides of frames, then maybe their number: the first one stays."""

    def __init__(self, channels: int, in_time: bool, **init):
        conv = conv3x3(channels, channels, stride=2, padding=0, **init)
        self.resample = nnx.List([Identity(), conv])
        if in_time:
            settings = {"strides": (2, 1, 1), "padding": (1, 0, 0)}
            self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), **settings, **init)

    def __call__(self, x: Video, past: Past) -> tuple[Array, Past]:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)))  # behind the last row and column
        x = _frame_by_frame(self.resample[1], x)
        if not hasattr(self, "time_conv"):
            return x, ()
        if past is not None:
            return self.time_conv.continued(x, past)
        first, rest = x[:, :1], x[:, 1:]
        if rest.shape[1] == 0:
            return first, first
        rest, past = self.time_conv.continued(rest, first)
        return jnp.concatenate([first, rest], axis=1), past


class Upsample(nnx.Module):
    """Doubles the number of frames, or not, then their sides; the first frame stays one."""

    def __init__(self, channels: int, out_channels: int, in_time: bool, **init):
        layers: list[Any] = [Identity(), conv3x3(channels, out_channels, **init)]
        self.resample = nnx.List(layers)
        if in_time:
            self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1), **init)

    def _doubled(self, x: Video, past: Past) -> tuple[Array, Past]:
        pairs, past = self.time_conv.continued(x, past)
        batch, frames, *side, features = pairs.shape
        pairs = jnp.moveaxis(pairs.reshape(batch, frames, *side, 2, features // 2), 4, 2)
        return pairs.reshape(batch, 2 * frames, *side, -1), past

    def __call__(self, x: Video, past: Past) -> tuple[Array, Past]:
        if not hasattr(self, "time_conv"):
            past = ()
        elif past is not None:
            x, past = self._doubled(x, past)
        else:  # what comes behind the first frame does not see it
            first, rest = x[:, :1], x[:, 1:]
            if rest.shape[1] == 0:
                past = jnp.repeat(jnp.zeros_like(first), self.time_conv.before, axis=1)
            else:
                rest, past = self._doubled(rest, None)
                x = jnp.concatenate([first, rest], axis=1)
        doubled = functools.partial(convolved_doubled, self.resample[1])
        return _frame_by_frame(doubled, x), past


class DownBlock(nnx.Module):
    """Wan 2.2's resnets and halving, with averages around them."""

    def __init__(
        self, in_channels: int, channels: int, layers: int, halves: bool, in_time: bool, **init
    ):
        inputs = (in_channels,) + (channels,) * (layers - 1)
        self.channels, self.factors = channels, (1 + in_time, 1 + halves)
        self.resnets = nnx.List([ResidualBlock(each, channels, **init) for each in inputs])
        if halves:
            self.downsampler = Downsample(channels, in_time, **init)

    def __call__(self, x: Video, past: Past) -> tuple[Array, Past]:
        last = (self.downsampler,) if hasattr(self, "downsampler") else ()
        y, past = _run((*self.resnets, *last), x, past)
        return y + _averaged(x, self.channels, *self.factors), past


class UpBlock(nnx.Module):
    """Resnets and doubling; in Wan 2.2 with repetitions around them."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        layers: int,
        doubles: bool,
        in_time: bool,
        is_residual: bool,
        **init,
    ):
        inputs = (in_channels,) + (channels,) * (layers - 1)
        self.channels, self.factors = channels, (1 + in_time, 2)
        self.resnets = nnx.List([ResidualBlock(each, channels, **init) for each in inputs])
        if doubles and is_residual:
            self.upsampler = Upsample(channels, channels, in_time, **init)
        elif doubles:
            self.upsamplers = nnx.List([Upsample(channels, channels // 2, in_time, **init)])

    def __call__(self, x: Video, past: Past) -> tuple[Array, Past]:
        is_first = past is None
        if not hasattr(self, "upsampler"):
            return _run((*self.resnets, *getattr(self, "upsamplers", ())), x, past)
        y, past = _run((*self.resnets, self.upsampler), x, past)
        return y + _repeated(x, self.channels, *self.factors, is_first), past


class _Coder(nnx.Module):
    conv_in: CausalConv3d
    norm_out: RMSNorm
    conv_out: CausalConv3d
    remat: Remat

    def _through(
        self, blocks: Sequence[Step], x: Video, past: Past
    ) -> tuple[Float[Array, "B S Y X D"], Past]:
        first, inner, last = past or (None,) * 3
        x, first = self.conv_in.continued(x, first)
        x, inner = _run(blocks, x, inner, self.remat)
        x, last = self.conv_out.continued(jax.nn.silu(self.norm_out(x)), last)
        return x, (first, inner, last)


class Encoder(_Coder):
    """Frames -> means and log-variances of latent frames, before `quant_conv`."""

    def __init__(self, config: AutoencoderKLWanConfig, *, remat: Remat, **init):
        channels = [config.base_dim * each for each in (1, *config.dim_mult)]
        layers, last = config.num_res_blocks, len(config.dim_mult) - 1
        self.remat = remat
        self.conv_in = CausalConv3d(config.in_channels, channels[0], 3, **init)
        blocks: list[Any] = []
        in_time = (*config.temperal_downsample, False)
        for level, (before, after) in enumerate(itertools.pairwise(channels)):
            halves = level != last
            if config.is_residual:
                blocks.append(DownBlock(before, after, layers, halves, in_time[level], **init))
                continue
            for each in (before,) + (after,) * (layers - 1):
                blocks.append(ResidualBlock(each, after, **init))
            if halves:
                blocks.append(Downsample(after, in_time[level], **init))
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MidBlock(channels[-1], **init)
        self.norm_out = RMSNorm(channels[-1], 3, **init)
        self.conv_out = CausalConv3d(channels[-1], 2 * config.z_dim, 3, **init)

    def __call__(self, x: Video, past: Past) -> tuple[Array, Past]:
        return self._through((*self.down_blocks, self.mid_block), x, past)


class Decoder(_Coder):
    """Latent frames after `post_quant_conv` -> frames."""

    def __init__(self, config: AutoencoderKLWanConfig, *, remat: Remat, **init):
        base, last = config.decoder_base_dim or config.base_dim, len(config.dim_mult) - 1
        channels = [base * each for each in (config.dim_mult[-1], *config.dim_mult[::-1])]
        self.remat = remat
        self.conv_in = CausalConv3d(config.z_dim, channels[0], 3, **init)
        self.mid_block = MidBlock(channels[0], **init)
        blocks = []
        in_time = (*config.temperal_downsample[::-1], False)
        for level, (before, after) in enumerate(itertools.pairwise(channels)):
            if level and not config.is_residual:
                before //= 2  # as the doubling before it leaves them
            settings = (config.num_res_blocks + 1, level != last, in_time[level])
            blocks.append(UpBlock(before, after, *settings, config.is_residual, **init))
        self.up_blocks = nnx.List(blocks)
        self.norm_out = RMSNorm(channels[-1], 3, **init)
        self.conv_out = CausalConv3d(channels[-1], config.out_channels, 3, **init)

    def __call__(self, x: Video, past: Past) -> tuple[Array, Past]:
        return self._through((self.mid_block, *self.up_blocks), x, past)


def _in_pieces(step: Step, x: Video, size: int, in_one_pass: bool) -> Float[Array, "B S Y X D"]:
    """A step's results of a whole video: of its first frame, then of `size` frames at a time."""
    if in_one_pass or x.shape[1] == 1:
        return step(x, None)[0]
    first, past = step(x[:, :1], None)
    pieces = x[:, 1:].reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

    def following(past: Past, piece: Array) -> tuple[Past, Array]:
        y, past = step(piece, past)
        return past, y

    _, rest = jax.lax.scan(following, past, pieces)
    rest = rest.swapaxes(0, 1).reshape(x.shape[0], -1, *rest.shape[3:])
    return jnp.concatenate([first, rest], axis=1)


class AutoencoderKLWan(RecomputingModel):
    """Variational autoencoder between videos and latents, causal in time."""

    config: AutoencoderKLWanConfig
    config_class = AutoencoderKLWanConfig
    pytorch_class = "AutoencoderKLWan"
    pytorch_library = "diffusers"

    def _build(self, config: AutoencoderKLWanConfig, *, remat: Remat, **init):
        self.encoder = Encoder(config, remat=remat, **init)
        self.decoder = Decoder(config, remat=remat, **init)
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1, **init)
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, 1, **init)

    def encode(
        self,
        videos: Float[Array, "B F H W C"],
        *,
        tiling: bool = False,
        in_one_pass: bool = False,
    ) -> tuple[Float[Array, "B T h w Z"], Float[Array, "B T h w Z"]]:
        """Posterior of the latents.

        Args:
          videos: [B, F, H, W, 3] in [-1, 1]; F is 1 more than a multiple of
            `config.temporal_downsampling`, H and W are multiples of `config.downsampling`.
          tiling: whether frames larger than 256 pixels are encoded in tiles, as diffusers does.
          in_one_pass: whether all frames are encoded together, not one latent frame at a time: as
            exact, maybe faster for short videos, and in the memory of all activations.

        Returns:
          mean and log-variance (clipped to [-30, 20]), each [B, T, h, w, latent_channels], where
          F = config.frames_of(T), unscaled.

        Raises:
          ValueError: videos of another shape.
        """
        config = self.config
        check_axes(videos, "B F H W C", "AutoencoderKLWan's videos")
        (frames, *sides), factor = videos.shape[1:4], config.temporal_downsampling
        fits = frames % factor == 1 % factor and not any(s % config.downsampling for s in sides)
        if videos.shape[-1] != config.channels or not fits:
            raise ValueError(
                f"AutoencoderKLWan encodes [B, F, H, W, {config.channels}] videos of 1 + a "
                f"multiple of {factor} frames, whose sides are multiples of {config.downsampling}; "
                f"received {videos.shape}."
            )

        def step(x: Array, past: Past) -> tuple[Array, Past]:
            moments, past = self.encoder(x, past)
            return self.quant_conv(moments), past

        def encode(x: Array) -> Array:
            return _in_pieces(step, x, factor, in_one_pass)

        x, patch = videos.astype(self.dtype), config.patch_size or 1
        x = _patchify(x, patch)
        if tiling and max(sides) > _TILE:
            output = _TILE * patch // config.downsampling
            moments = tiled(encode, x, tile=_TILE, output=output)
        else:
            moments = encode(x)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(
        self,
        latents: Float[Array, "B T h w Z"],
        *,
        tiling: bool = False,
        in_one_pass: bool = False,
    ) -> Float[Array, "B F H W C"]:
        """Videos [B, F, H, W, 3] in [-1, 1] from unscaled latents, F = config.frames_of(T).

        Args:
          latents: [B, T, h, w, latent_channels].
          tiling: whether frames larger than 256 pixels are decoded in tiles, as diffusers does, and
            videos one at a time.
          in_one_pass: whether all frames are decoded together, not one latent frame at a time, as
            in `encode`.

        Raises:
          ValueError: latents of another shape.
        """
        config = self.config
        check_axes(latents, "B T h w C", "AutoencoderKLWan's latents")
        if latents.shape[-1] != config.z_dim:
            raise ValueError(
                f"AutoencoderKLWan decodes [B, T, h, w, {config.z_dim}] latents, received "
                f"{latents.shape}."
            )

        def step(x: Array, past: Past) -> tuple[Array, Past]:
            return self.decoder(self.post_quant_conv(x), past)

        def decode(x: Array) -> Array:
            return _in_pieces(step, x, 1, in_one_pass)

        x, patch = latents.astype(self.dtype), config.patch_size or 1
        tile = _TILE // config.downsampling
        if tiling and max(x.shape[2:4]) > tile:

            def one(x: Array) -> Array:
                return tiled(decode, x[None], tile=tile, output=_TILE // patch)[0]

            y = jax.lax.map(one, x)
        else:
            y = decode(x)
        return jnp.clip(_unpatchify(y, patch), -1.0, 1.0)

    def _statistics(self) -> tuple[Float[Array, " Z"], Float[Array, " Z"]]:
        """Mean and standard deviation of each channel of the latents."""
        return jnp.asarray(self.config.latents_mean), jnp.asarray(self.config.latents_std)

    def scale(self, latents: Float[Array, "*s Z"]) -> Float[Array, "*s Z"]:
        """Autoencoder latents -> the unit-variance latents that the diffusion model sees."""
        mean, deviation = self._statistics()
        return ((latents - mean) / deviation).astype(latents.dtype)

    def unscale(self, latents: Float[Array, "*s Z"]) -> Float[Array, "*s Z"]:
        """Inverse of `scale`."""
        mean, deviation = self._statistics()
        return (latents * deviation + mean).astype(latents.dtype)
