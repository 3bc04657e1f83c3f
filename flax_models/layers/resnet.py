"""Convolutional blocks of the UNet and the autoencoder; images are `[B, H, W, C]`."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ...kernels.convolution import convolve, convolve_doubled
from ..abstract import kernel_init
from .linear import linear


def conv3x3(in_channels: int, out_channels: int, *, stride: int = 1, padding: int = 1, **init):
    """3x3 convolution with torch's symmetric integer padding (not `SAME`, which differs)."""
    pads = ((padding, padding),) * 2  # a tuple: static parts of a module are hashed
    return nnx.Conv(
        in_channels,
        out_channels,
        (3, 3),
        strides=stride,
        padding=pads,
        conv_general_dilated=convolve,
        **{"kernel_init": kernel_init, **init},
    )


def conv1x1(in_channels: int, out_channels: int, **init) -> nnx.Conv:
    """Pointwise convolution."""
    return nnx.Conv(
        in_channels,
        out_channels,
        (1, 1),
        padding=((0, 0), (0, 0)),
        conv_general_dilated=convolve,
        **{"kernel_init": kernel_init, **init},
    )


def group_norm(channels: int, groups: int, epsilon: float, **init) -> nnx.GroupNorm:
    """Group normalization with torch's two-pass variance."""
    return nnx.GroupNorm(
        channels, num_groups=groups, epsilon=epsilon, use_fast_variance=False, **init
    )


class ResnetBlock2D(nnx.Module):
    """norm, SiLU, conv, (+ time), norm, SiLU, conv, + shortcut."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        epsilon: float,
        time_features: int | None = None,
        output_scale: float = 1.0,
        **init,
    ):
        self.output_scale = output_scale
        self.norm1 = group_norm(in_channels, groups, epsilon, **init)
        self.conv1 = conv3x3(in_channels, out_channels, **init)
        if time_features is not None:
            self.time_emb_proj = linear(time_features, out_channels, **init)
        self.norm2 = group_norm(out_channels, groups, epsilon, **init)
        self.conv2 = conv3x3(out_channels, out_channels, **init)
        if in_channels != out_channels:
            self.conv_shortcut = conv1x1(in_channels, out_channels, **init)

    def __call__(
        self, x: Float[Array, "B H W C"], time: Float[Array, "B T"] | None = None
    ) -> Float[Array, "B H W D"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        if time is not None:
            h = h + self.time_emb_proj(jax.nn.silu(time))[:, None, None, :]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        shortcut = self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x
        return (shortcut + h) / self.output_scale


class Downsample2D(nnx.Module):
    """Stride-2 convolution; `padding=0` pads one row and column at the end, as the VAE does."""

    def __init__(self, channels: int, *, padding: int, **init):
        self.padding = padding
        self.conv = conv3x3(channels, channels, stride=2, padding=padding, **init)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
        if self.padding == 0:
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        return self.conv(x)


def convolved_doubled(conv: nnx.Conv, x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W D"]:
    """A 3x3 convolution, with padding 1, of an image whose pixels are doubled."""
    assert conv.bias is not None
    x, kernel, bias = conv.promote_dtype((x, conv.kernel[...], conv.bias[...]), dtype=conv.dtype)
    return convolve_doubled(x, kernel, conv.precision) + bias


class Upsample2D(nnx.Module):
    """Nearest-neighbor resize to `size`, then a convolution."""

    def __init__(self, channels: int, **init):
        self.conv = conv3x3(channels, channels, **init)

    def __call__(self, x: Float[Array, "B H W C"], size: tuple[int, int]) -> Array:
        height, width = x.shape[1:3]
        if size == (2 * height, 2 * width):
            return convolved_doubled(self.conv, x)
        # An odd skip connection: torch's interpolate takes floor(i * in / out).
        x = x[:, jnp.arange(size[0]) * height // size[0]]
        x = x[:, :, jnp.arange(size[1]) * width // size[1]]
        return self.conv(x)
