"""`AutoencoderKLCosmos`: Cosmos' continuous video tokenizer (NVIDIA 2025, arXiv 2501.03575).

Videos are `[B, F, H, W, 3]` in [-1, 1], latents `[B, T, h, w, latent_channels]` *before* scaling.
The first latent frame stands for the first frame, each other one for `temporal_downsampling`
frames: everything is causal. A video is first taken apart into Haar wavelets, and its latents
follow from it without noise. Attribute paths are diffusers' state-dict keys.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ..kernels.attention import dot_product_attention
from .configs import ModelConfig
from .layers.causal_conv import CausalConv3d
from .layers.checks import check_axes
from .layers.remat import Remat, recomputed
from .layers.resnet import group_norm
from .layers.tiling import tiled
from .pretrained import RecomputingModel

_EPSILON = 1e-6
_TILE = 512  # pixels along a tile's side, diffusers' default
_SPREAD = -30.0  # the log-variance of latents that have none

# Of the latents of Cosmos' tokenizer CV8x8x8: 16 frames of each of 16 channels.
_MEAN = """
0.11362758 -0.0171717 0.03071163 0.02046862 0.01931456 0.02138567 0.01999342 0.02189187 0.02011935
0.01872694 0.02168613 0.02207148 0.01986941 0.01770413 0.02067643 0.02028245 0.19125476 0.04556972
0.0595558 0.05315534 0.05496629 0.05356264 0.04856596 0.05327453 0.05410472 0.05597149 0.05524866
0.05181874 0.05071663 0.05204537 0.0564108 0.05518042 0.01306714 0.03341161 0.03847246 0.02810185
0.02790166 0.02920026 0.02823597 0.02631033 0.0278531 0.02880507 0.02977769 0.03145441 0.02888389
0.03280773 0.03484927 0.03049198 -0.00197727 0.07534957 0.04963879 0.05530893 0.05410828 0.05252541
0.05029899 0.05321025 0.05149245 0.0511921 0.04643495 0.04604527 0.04631618 0.04404101 0.04403536
0.04499495 -0.02994183 -0.04787003 -0.01064558 -0.01779824 -0.01490502 -0.02157517 -0.0204778
-0.02180816 -0.01945375 -0.02062863 -0.02192209 -0.02520639 -0.02246656 -0.02427533 -0.02683363
-0.02762006 0.08019473 -0.13005368 -0.07568636 -0.06082374 -0.06036175 -0.05875364 -0.05921887
-0.05869788 -0.05273941 -0.052565 -0.05346428 -0.05456541 -0.053657 -0.05656897 -0.05728589
-0.05321847 0.16718403 -0.00390146 0.0379406 0.0356561 0.03554131 0.03924074 0.03873615 0.04187329
0.04226924 0.04378717 0.04684274 0.05117614 0.04547792 0.05251586 0.05048339 0.04950784 0.09564418
0.0547128 0.08183969 0.07978633 0.08076023 0.08108605 0.08011818 0.07965573 0.08187773 0.08350263
0.08101469 0.0786941 0.0774442 0.07724521 0.07830418 0.07599796 -0.04987567 0.05923908 -0.01058746
-0.01177603 -0.01116162 -0.01364149 -0.01546014 -0.0117213 -0.01780043 -0.01648314 -0.02100247
-0.02104417 -0.02482123 -0.02611689 -0.02561143 -0.02597336 -0.05364667 0.08211684 0.04686937
0.04605641 0.04304186 0.0397355 0.03686767 0.04087112 0.03704741 0.03706401 0.03120073 0.03349091
0.03319963 0.03205781 0.03195127 0.03180481 0.16427967 -0.11048453 -0.04595276 -0.04982893
-0.05213465 -0.04809378 -0.05080318 -0.04992863 -0.04493337 -0.0467619 -0.04884703 -0.04627892
-0.04913311 -0.04955709 -0.04533982 -0.04570218 -0.10612928 -0.05121198 -0.06761009 -0.07251801
-0.07265285 -0.07417855 -0.07202412 -0.07499027 -0.07625481 -0.07535747 -0.07638787 -0.07920305
-0.07596069 -0.07959418 -0.08265036 -0.07955471 -0.16888915 0.0753242 0.04062594 0.03375093
0.03337452 0.03699376 0.03651138 0.03611023 0.03555622 0.03378554 0.0300498 0.03395559 0.02941847
0.03156432 0.03431173 0.03016853 -0.03415358 -0.01699573 -0.04029295 -0.04912157 -0.0498858
-0.04917918 -0.04918056 -0.0525189 -0.05325506 -0.05341973 -0.04983329 -0.04883146 -0.04985548
-0.04736718 -0.0462027 -0.04836091 0.02055675 0.03419799 -0.02907669 -0.04350509 -0.04156144
-0.04234421 -0.04446109 -0.04461774 -0.04882839 -0.04822346 -0.04502493 -0.0506244 -0.05146913
-0.04655267 -0.04862994 -0.04841615 0.20312774 -0.07208502 -0.03635615 -0.03556088 -0.04246174
-0.04195838 -0.04293778 -0.04071276 -0.04240569 -0.04125213 -0.04395144 -0.03959096 -0.04044993
-0.04015875 -0.04088107 -0.03885176
"""
_DEVIATION = """
0.56700271 0.65488982 0.65589428 0.66524369 0.66619784 0.6666382 0.6720838 0.66955978 0.66928875
0.67108786 0.67092526 0.67397463 0.67894882 0.67668313 0.67769569 0.67479557 0.85245121 0.8688373
0.87348086 0.88459337 0.89135885 0.8910504 0.89714909 0.89947474 0.90201765 0.90411824 0.90692616
0.90847772 0.90648711 0.91006982 0.91033435 0.90541548 0.84960359 0.85863352 0.86895317 0.88460612
0.89245003 0.89451706 0.89931005 0.90647358 0.90338236 0.90510076 0.91008312 0.90961218 0.9123717
0.91313171 0.91435546 0.91565102 0.91877103 0.85155135 0.857804 0.86998034 0.87365264 0.88161767
0.88151032 0.88758916 0.89015514 0.89245576 0.89276224 0.89450496 0.90054202 0.89994133 0.90136105
0.90114892 0.77755755 0.81456852 0.81911844 0.83137071 0.83820474 0.83890373 0.84401101 0.84425181
0.84739357 0.84798753 0.85249585 0.85114998 0.85160935 0.85626358 0.85677862 0.85641026 0.69903517
0.71697885 0.71696913 0.72583169 0.72931731 0.73254126 0.73586977 0.73734969 0.73664582 0.74084908
0.74399322 0.74471819 0.74493188 0.74824578 0.75024873 0.75274801 0.8187142 0.82251883 0.82616025
0.83164483 0.84072375 0.8396467 0.84143305 0.84880769 0.8503468 0.85196948 0.85211051 0.85386664
0.85410017 0.85439342 0.85847849 0.85385275 0.67583984 0.68259847 0.69198853 0.69928843 0.70194328
0.70467001 0.70755547 0.70917857 0.71007699 0.70963502 0.71064079 0.71027333 0.71291167 0.71537536
0.71902508 0.71604162 0.72450989 0.71979928 0.72057378 0.73035461 0.73329622 0.73660028 0.73891461
0.74279994 0.74105692 0.74002433 0.74257588 0.74416119 0.74543899 0.74694443 0.74747062 0.74586403
0.90176988 0.90990674 0.91106802 0.92163783 0.92390233 0.93056196 0.93482202 0.93642414 0.93858379
0.94064975 0.94078934 0.94325715 0.94955301 0.94814706 0.95144123 0.94923073 0.49853548 0.64968109
0.6427654 0.64966393 0.6487664 0.65203559 0.6584242 0.65351611 0.65464371 0.6574859 0.65626335
0.66123748 0.66121179 0.66077942 0.66040152 0.66474909 0.61986589 0.69138134 0.6884557 0.6955843
0.69765401 0.70015347 0.70529598 0.70468754 0.70399523 0.70479989 0.70887572 0.71126866 0.7097227
0.71249932 0.71231949 0.71175605 0.35586974 0.68723857 0.68973219 0.69958478 0.6943453 0.6995818
0.70980215 0.69899458 0.70271689 0.70095056 0.69912851 0.70522696 0.70392174 0.70916915 0.70585734
0.70373541 0.98101336 0.89024764 0.89607251 0.90678179 0.91308665 0.91812348 0.91980827 0.92480654
0.92635667 0.92887944 0.93338072 0.93468094 0.93619436 0.93906063 0.94191772 0.94471723 0.83202779
0.84106231 0.84463632 0.85829508 0.86319661 0.86751342 0.86914337 0.87085921 0.87286359 0.87537396
0.87931138 0.88054478 0.8811838 0.88872558 0.88942474 0.88934827 0.44025335 0.63061613 0.63110614
0.63601959 0.6395812 0.64104342 0.65019929 0.6502797 0.64355946 0.64657205 0.64847094 0.64728117
0.64972943 0.65162975 0.65328044 0.64914775
"""


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split()))


def _is_power_of_two(number: Any) -> bool:
    return isinstance(number, int) and number > 0 and number.bit_count() == 1


@dataclasses.dataclass(frozen=True)
class AutoencoderKLCosmosConfig(ModelConfig):
    """Settings of `AutoencoderKLCosmos`; the defaults are diffusers', of the published CV8x8x8.

    `attention_resolutions` are sides of a video of `resolution` pixels, at which blocks attend;
    `latents_mean` and `latents_std` have one number per latent frame of each channel.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decode_block_out_channels: tuple[int, ...] = (256, 512, 512, 512)
    attention_resolutions: tuple[int, ...] = (32,)
    resolution: int = 1024
    num_layers: int = 2
    patch_size: int = 4
    spatial_compression_ratio: int = 8
    temporal_compression_ratio: int = 8
    latents_mean: tuple[float, ...] | None = _numbers(_MEAN)
    latents_std: tuple[float, ...] | None = _numbers(_DEVIATION)

    FIXED: ClassVar[Mapping[str, Any]] = {"patch_type": "haar"}
    INERT: ClassVar[frozenset[str]] = frozenset({"scaling_factor"})  # no one reads it

    def __post_init__(self):
        self.require_positive("in_channels", "out_channels", "latent_channels", "num_layers")
        self.require_positive("encoder_block_out_channels", "decode_block_out_channels")
        self.require_positive("resolution")
        for name in ("encoder_block_out_channels", "decode_block_out_channels"):
            channels = getattr(self, name)
            self.require(len(channels) > 1, f"{name} takes at least two, received {channels!r}.")
        for name in ("patch_size", "spatial_compression_ratio", "temporal_compression_ratio"):
            value = getattr(self, name)
            self.require(
                _is_power_of_two(value), f"{name} must be a power of two, received {value!r}."
            )
            self.require(
                value >= self.patch_size,
                f"{name} {value} must be at least the {self.patch_size} of patch_size.",
            )
        for name in ("latents_mean", "latents_std"):
            numbers = getattr(self, name)
            self.require(
                numbers is None or (numbers and len(numbers) % self.latent_channels == 0),
                f"{name} takes as many numbers for each of {self.latent_channels} channels, "
                f"received {len(numbers or ())}.",
            )
        self.require(
            len(self.latents_mean or ()) == len(self.latents_std or ()),
            "latents_mean and latents_std take equally many numbers, or both none.",
        )

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along each side."""
        return self.spatial_compression_ratio

    @property
    def temporal_downsampling(self) -> int:
        """Frames per latent frame, but for the first one."""
        return self.temporal_compression_ratio

    @property
    def halvings(self) -> tuple[int, int]:
        """How many blocks halve sides, and how many time; wavelets do the rest."""
        side, time = self.spatial_compression_ratio, self.temporal_compression_ratio
        return int(math.log2(side // self.patch_size)), int(math.log2(time // self.patch_size))


# ---- wavelets ----


def haar(x: Float[Array, "B T H W C"]) -> Float[Array, "B t h w D"]:
    """Means and differences of pairs along time, height and width, each [..., 8 C] features.

    A feature's band is (time, height, width), low before high, time slowest, behind it the channel.
    """
    for axis in (3, 2, 1):
        even, odd = _pairs(x, axis)
        x = jnp.concatenate([even + odd, even - odd], axis=-1)
    return x / 8


def _pairs(x: Array, axis: int) -> tuple[Array, Array]:
    shape = (*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    x = x.reshape(shape)
    return jnp.take(x, 0, axis=axis + 1), jnp.take(x, 1, axis=axis + 1)


def inverse_haar(x: Float[Array, "B t h w D"]) -> Float[Array, "B T H W C"]:
    """Inverse of `haar`."""
    for axis in (1, 2, 3):
        low, high = jnp.split(x, 2, axis=-1)
        x = jnp.stack([low + high, low - high], axis=axis + 1)
        x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return x


# ---- layers ----


def _conv(in_channels: int, out_channels: int, size: Any, **options) -> CausalConv3d:
    return CausalConv3d(in_channels, out_channels, size, time="edge", **options)


class ConvProjection(nnx.Module):
    """A convolution of every frame, then one along time."""

    def __init__(self, in_channels: int, out_channels: int, **init):
        self.conv_s = _conv(in_channels, out_channels, (1, 3, 3), **init)
        self.conv_t = _conv(out_channels, out_channels, (3, 1, 1), **init)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W D"]:
        return self.conv_t(self.conv_s(x))


class FrameNorm(nnx.Module):
    """Normalization of every frame by itself, over all its pixels and channels."""

    def __init__(self, channels: int, **init):
        self.norm = group_norm(channels, 1, _EPSILON, **init)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        return self.norm(x.reshape(-1, *x.shape[2:])).reshape(x.shape)


class ResnetBlock(nnx.Module):
    """norm, SiLU, conv, norm, SiLU, conv, + shortcut."""

    def __init__(self, in_channels: int, out_channels: int, **init):
        self.norm1 = FrameNorm(in_channels, **init)
        self.conv1 = ConvProjection(in_channels, out_channels, **init)
        self.norm2 = FrameNorm(out_channels, **init)
        self.conv2 = ConvProjection(out_channels, out_channels, **init)
        if in_channels != out_channels:
            self.conv_shortcut = _conv(in_channels, out_channels, 1, **init)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W D"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class FrameAttention(nnx.Module):
    """Single-head attention of a frame's pixels to each other, added to its input."""

    def __init__(self, channels: int, **init):
        self.norm = FrameNorm(channels, **init)
        self.to_q, self.to_k, self.to_v = (_conv(channels, channels, 1, **init) for _ in range(3))
        self.to_out = nnx.List([_conv(channels, channels, 1, **init)])

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        h = self.norm(x)
        return x + self.to_out[0](self.attend(*(to(h) for to in (self.to_q, self.to_k, self.to_v))))

    def attend(self, query: Array, key: Array, value: Array) -> Array:
        """Of [B, T, H, W, C]."""
        parts = (x.reshape(-1, math.prod(x.shape[2:4]), 1, x.shape[4]) for x in (query, key, value))
        return dot_product_attention(*parts).reshape(value.shape)


class TimeAttention(FrameAttention):
    """The same of a pixel to itself in this and earlier frames."""

    def attend(self, query: Array, key: Array, value: Array) -> Array:
        """Of [B, T, H, W, C]."""
        parts = [x.transpose(0, 2, 3, 1, 4) for x in (query, key, value)]  # [B, H, W, T, C]
        flat = (x.reshape(-1, x.shape[3], 1, x.shape[4]) for x in parts)
        attended = dot_product_attention(*flat, is_causal=True).reshape(parts[0].shape)
        return attended.transpose(0, 3, 1, 2, 4)


class Downsample(nnx.Module):
    """Halves sides, time, or both: a convolution and the mean, whose sum is projected."""

    def __init__(self, channels: int, *, space: bool, time: bool, **init):
        if space:
            strided = {"strides": (1, 2, 2), "padding": (0, 0, 0), **init}
            self.conv1 = _conv(channels, channels, (1, 3, 3), **strided)
        if time:
            self.conv2 = _conv(channels, channels, (3, 1, 1), strides=(2, 1, 1), **init)
        self.conv3 = _conv(channels, channels, 1, **init)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B t h w C"]:
        if hasattr(self, "conv1"):
            sides = (x.shape[2] // 2, 2, x.shape[3] // 2, 2)
            mean = x.reshape(*x.shape[:2], *sides, -1).mean(axis=(3, 5))
            x = self.conv1(jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)))) + mean
        if hasattr(self, "conv2"):  # the first frame by itself, then pairs
            pairs = x[:, 1:].reshape(len(x), x.shape[1] // 2, 2, *x.shape[2:])
            x = self.conv2(x) + jnp.concatenate([x[:, :1], pairs.mean(axis=2)], axis=1)
        return self.conv3(x)


class Upsample(nnx.Module):
    """Doubles sides, time, or both, by repetition and a convolution; the sum is projected."""

    def __init__(self, channels: int, *, space: bool, time: bool, **init):
        if time:
            self.conv1 = _conv(channels, channels, (3, 1, 1), **init)
        if space:
            self.conv2 = _conv(channels, channels, (1, 3, 3), **init)
        self.conv3 = _conv(channels, channels, 1, **init)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B F Y X C"]:
        if hasattr(self, "conv1"):  # all but the first frame
            x = jnp.repeat(x, 2, axis=1)[:, 1:]
            x = x + self.conv1(x)
        if hasattr(self, "conv2"):
            x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
            x = x + self.conv2(x)
        return self.conv3(x)


class Block(nnx.Module):
    """Resnets, each with attention behind it or none, then what halves or doubles, or nothing."""

    def __init__(
        self, in_channels: int, channels: int, layers: int, *, attends: bool, resample: Any, **init
    ):
        inputs = (in_channels,) + (channels,) * (layers - 1)
        self.resnets = nnx.List([ResnetBlock(each, channels, **init) for each in inputs])
        if attends:
            self.attentions = nnx.List([FrameAttention(channels, **init) for _ in inputs])
            self.temp_attentions = nnx.List([TimeAttention(channels, **init) for _ in inputs])
        name, kind, sides = resample
        if any(sides.values()):
            setattr(self, name, nnx.List([kind(channels, **sides, **init)]))

    def __call__(self, x: Array) -> Array:
        for index, resnet in enumerate(self.resnets):
            x = resnet(x)
            if hasattr(self, "attentions"):
                x = self.temp_attentions[index](self.attentions[index](x))
        for name in ("downsamplers", "upsamplers"):
            if hasattr(self, name):
                x = getattr(self, name)[0](x)
        return x


class MidBlock(nnx.Module):
    """Resnet, attention in space and time, resnet."""

    def __init__(self, channels: int, **init):
        self.resnets = nnx.List([ResnetBlock(channels, channels, **init) for _ in range(2)])
        self.attentions = nnx.List([FrameAttention(channels, **init)])
        self.temp_attentions = nnx.List([TimeAttention(channels, **init)])

    def __call__(self, x: Array) -> Array:
        x = self.temp_attentions[0](self.attentions[0](self.resnets[0](x)))
        return self.resnets[1](x)


class Encoder(nnx.Module):
    """Video -> latents, before `quant_conv`."""

    def __init__(self, config: AutoencoderKLCosmosConfig, *, remat: Remat, **init):
        channels, patch = config.encoder_block_out_channels, config.patch_size
        spatial, temporal = config.halvings
        self.remat, self.levels = remat, int(math.log2(patch))
        self.conv_in = ConvProjection(config.in_channels * patch**3, channels[0], **init)
        blocks = []
        for index, pair in enumerate(itertools.pairwise(channels)):
            last = index == len(channels) - 2
            sides = {"space": not last and index < spatial, "time": not last and index < temporal}
            attends = config.resolution // patch // 2**index in config.attention_resolutions
            resample = ("downsamplers", Downsample, sides)
            block = Block(*pair, config.num_layers, attends=attends, resample=resample, **init)
            blocks.append(block)
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MidBlock(channels[-1], **init)
        self.norm_out = FrameNorm(channels[-1], **init)
        self.conv_out = ConvProjection(channels[-1], config.latent_channels, **init)

    def __call__(self, x: Float[Array, "B F H W C"]) -> Float[Array, "B T h w Z"]:
        x = jnp.concatenate([jnp.repeat(x[:, :1], 2**self.levels - 1, axis=1), x], axis=1)
        for _ in range(self.levels):
            x = haar(x)
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block):
            x = recomputed(block.__call__, self.remat)(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Decoder(nnx.Module):
    """Latents after `post_quant_conv` -> video."""

    def __init__(self, config: AutoencoderKLCosmosConfig, *, remat: Remat, **init):
        channels, patch = config.decode_block_out_channels[::-1], config.patch_size
        spatial, temporal = config.halvings
        self.remat, self.levels = remat, int(math.log2(patch))
        self.conv_in = ConvProjection(config.latent_channels, channels[0], **init)
        self.mid_block = MidBlock(channels[0], **init)
        coarsest, blocks = config.resolution // patch // 2 ** (len(channels) - 2), []
        for index, pair in enumerate(itertools.pairwise(channels)):
            last = index == len(channels) - 2
            time = not last and 0 < index < temporal + 1
            space = time or (not last and index < spatial and spatial > temporal)
            attends = coarsest * 2**index in config.attention_resolutions
            resample = ("upsamplers", Upsample, {"space": space, "time": time})
            layers = config.num_layers + 1
            blocks.append(Block(*pair, layers, attends=attends, resample=resample, **init))
        self.up_blocks = nnx.List(blocks)
        self.norm_out = FrameNorm(channels[-1], **init)
        self.conv_out = ConvProjection(channels[-1], config.out_channels * patch**3, **init)

    def __call__(self, x: Float[Array, "B T h w Z"]) -> Float[Array, "B F H W C"]:
        x = self.conv_in(x)
        for block in (self.mid_block, *self.up_blocks):
            x = recomputed(block.__call__, self.remat)(x)
        x = self.conv_out(jax.nn.silu(self.norm_out(x)))
        for _ in range(self.levels):
            x = inverse_haar(x)
        return x[:, 2**self.levels - 1 :]


class AutoencoderKLCosmos(RecomputingModel):
    """Autoencoder between videos and latents, causal in time."""

    config: AutoencoderKLCosmosConfig
    config_class = AutoencoderKLCosmosConfig
    pytorch_class = "AutoencoderKLCosmos"
    pytorch_library = "diffusers"

    def _build(self, config: AutoencoderKLCosmosConfig, *, remat: Remat, **init):
        latent = config.latent_channels
        self.encoder = Encoder(config, remat=remat, **init)
        self.decoder = Decoder(config, remat=remat, **init)
        self.quant_conv = _conv(latent, latent, 1, **init)
        self.post_quant_conv = _conv(latent, latent, 1, **init)

    def encode(
        self, videos: Float[Array, "B F H W C"], *, tiling: bool = False
    ) -> tuple[Float[Array, "B T h w Z"], Float[Array, "B T h w Z"]]:
        """Latents, of which there is no distribution but a point.

        Args:
          videos: [B, F, H, W, in_channels] in [-1, 1]; H and W multiples of `config.downsampling`,
            F one more than a multiple of `config.temporal_downsampling`.
          tiling: whether frames larger than 512 pixels are encoded in tiles of that size.

        Returns:
          mean, and as other autoencoders have it a log-variance, the least they have: each
          [B, T, h, w, latent_channels], unscaled.

        Raises:
          ValueError: videos of another shape.
        """
        config, name = self.config, type(self).__name__
        check_axes(videos, "B F H W C", f"{name}'s videos")
        _, frames, *sides, channels = videos.shape
        many, factor = config.temporal_downsampling, config.downsampling
        if channels != config.in_channels or (frames - 1) % many or any(s % factor for s in sides):
            raise ValueError(
                f"{name} encodes [B, F, H, W, {config.in_channels}] videos of one frame more than "
                f"a multiple of {many}, whose sides are multiples of {factor}; received "
                f"{videos.shape}."
            )
        encode = lambda videos: self.quant_conv(self.encoder(videos))  # noqa: E731
        output = _TILE // factor
        mean = _in_tiles(encode, videos.astype(self.dtype), tiling, tile=_TILE, output=output)
        return mean, jnp.full_like(mean, _SPREAD)

    def decode(
        self, latents: Float[Array, "B T h w Z"], *, tiling: bool = False
    ) -> Float[Array, "B F H W C"]:
        """Videos [B, F, H, W, out_channels], nominally in [-1, 1], from unscaled latents.

        Args:
          latents: [B, T, h, w, latent_channels].
          tiling: whether frames larger than 512 pixels are decoded in tiles of that size, and
            videos one at a time, in the memory that one tile takes. diffusers has no tiles here.

        Raises:
          ValueError: latents of another shape.
        """
        name = type(self).__name__
        check_axes(latents, "B T h w C", f"{name}'s latents")
        if latents.shape[-1] != self.config.latent_channels:
            raise ValueError(
                f"{name} decodes [B, T, h, w, {self.config.latent_channels}] latents, received "
                f"{latents.shape}."
            )
        decode = lambda latents: self.decoder(self.post_quant_conv(latents))  # noqa: E731
        tile = _TILE // self.config.downsampling
        return _in_tiles(decode, latents.astype(self.dtype), tiling, tile=tile, output=_TILE)

    def _statistics(self, frames: int) -> tuple[Array, Array]:
        """Mean and deviation [T, 1, 1, C] of the latents' frames."""
        means, deviations = self.config.latents_mean, self.config.latents_std
        if means is None or deviations is None:
            return jnp.zeros(()), jnp.ones(())
        known = len(means) // self.config.latent_channels
        if frames > known:
            raise ValueError(
                f"{type(self).__name__} knows the statistics of {known} latent frames, "
                f"{1 + (known - 1) * self.config.temporal_downsampling} frames of a video; "
                f"received {frames}."
            )
        mean, deviation = (
            jnp.asarray(np.reshape(each, (-1, known)).T[:frames, None, None], jnp.float32)
            for each in (means, deviations)
        )
        return mean, deviation

    def scale(self, latents: Float[Array, "B T h w Z"]) -> Float[Array, "B T h w Z"]:
        """Autoencoder latents -> those of unit variance; the diffusion model sees them times its
        schedule's `sigma_data`.

        Raises:
          ValueError: more latent frames than there are statistics of.
        """
        mean, deviation = self._statistics(latents.shape[1])
        return ((latents - mean) / deviation).astype(latents.dtype)

    def unscale(self, latents: Float[Array, "B T h w Z"]) -> Float[Array, "B T h w Z"]:
        """Inverse of `scale`."""
        mean, deviation = self._statistics(latents.shape[1])
        return (latents * deviation + mean).astype(latents.dtype)


def _in_tiles(
    function: Callable[[Array], Array], x: Array, tiling: bool, *, tile: int, output: int
) -> Array:
    """A function of videos, of one after the other and in tiles of their frames if `tiling`."""
    if not tiling:
        return function(x)

    def one(video: Array) -> Array:
        if max(video.shape[1:3]) <= tile:
            return function(video[None])[0]
        return tiled(function, video[None], tile=tile, output=output)[0]

    return jax.lax.map(one, x)
