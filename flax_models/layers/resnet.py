"""Convolutional blocks of the UNet and the autoencoder; images are `[B, H, W, C]`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

# Pixels of an image, with its batch, from which the convolution of the doubled one is done from it.
_REPAYS_ADDING_TAPS = 256


def _convolve(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "h w C D"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    *,
    precision: jax.lax.PrecisionLike = None,
    **options,
) -> Float[Array, "B Y X D"]:
    """`jax.lax.conv_general_dilated`; on a CPU one product, where the kernel exceeds the image.

    There the gradient of XLA's convolution spends its time on turning the kernel around.
    """

    def convolution(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, precision=precision, **options
        )

    def product(x: Array, kernel: Array) -> Array:
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        rows, columns = ((size - 1) * stride + 1 for size, stride in zip(out, strides, strict=True))
        patches = jnp.concatenate(
            [
                x[:, i : i + rows : strides[0], j : j + columns : strides[1]]
                for i in range(kernel.shape[0])
                for j in range(kernel.shape[1])
            ],
            axis=-1,
        )
        return jnp.dot(patches, kernel.reshape(-1, kernel.shape[-1]), precision=precision)

    batch, *out, features = jax.eval_shape(convolution, x, kernel).shape
    if batch * out[0] * out[1] > features:  # then the patches would exceed the kernel
        return convolution(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=product, default=convolution)


def conv3x3(in_channels: int, out_channels: int, *, stride: int = 1, padding: int = 1, **init):
    """3x3 convolution with torch's symmetric integer padding (not `SAME`, which differs)."""
    pads = ((padding, padding),) * 2  # a tuple: static parts of a module are hashed
    return nnx.Conv(
        in_channels, out_channels, (3, 3), strides=stride, padding=pads,
        conv_general_dilated=_convolve, **init,
    )  # fmt: skip


def conv1x1(in_channels: int, out_channels: int, **init) -> nnx.Conv:
    """Pointwise convolution."""
    return nnx.Conv(in_channels, out_channels, (1, 1), padding="VALID", **init)


def group_norm(channels: int, groups: int, epsilon: float, **init) -> nnx.GroupNorm:
    """Group normalisation with torch's two-pass variance."""
    return nnx.GroupNorm(
        channels, num_groups=groups, epsilon=epsilon, use_fast_variance=False, **init
    )


class ResnetBlock2D(nnx.Module):
    """norm, SiLU, conv, (+ time), norm, SiLU, conv, + shortcut."""

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, epsilon: float,
        time_features: int | None = None, output_scale: float = 1.0, **init,
    ):  # fmt: skip
        self.output_scale = output_scale
        self.norm1 = group_norm(in_channels, groups, epsilon, **init)
        self.conv1 = conv3x3(in_channels, out_channels, **init)
        if time_features is not None:
            self.time_emb_proj = nnx.Linear(time_features, out_channels, **init)
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


def _halves(kernel: Array, axis: int) -> tuple[Array, Array]:
    """The two taps along an axis that each of two equal neighbours has, of a kernel's three."""
    before, here, after = jnp.split(kernel, 3, axis)
    pairs = ((before, here + after), (before + here, after))
    first, second = (jnp.concatenate(pair, axis) for pair in pairs)
    return first, second


def _convolve_doubled(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"], precision: jax.lax.PrecisionLike
) -> Float[Array, "B 2*H 2*W D"]:
    """The 3x3 convolution of an image whose pixels are doubled, from the image as it is.

    Each of the four pixels that come of one sees 2x2 others, and the kernel's taps that meet there
    add up: 4 products where the doubled image takes 9.
    """
    batch, height, width, _ = x.shape
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    taps = [quarter for half in _halves(wide, 0) for quarter in _halves(half, 1)]
    pixels = _convolve(
        x, jnp.concatenate(taps, -1).astype(kernel.dtype), (1, 1), ((1, 1), (1, 1)),
        precision=precision, dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    # [B, H + 1, W + 1, 4 D]: the second of two neighbours starts one pixel later.
    parts = jnp.split(pixels, 4, -1)
    parts = [parts[2 * i + j][:, i : i + height, j : j + width] for i in (0, 1) for j in (0, 1)]
    rows = [jnp.stack(parts[i : i + 2], axis=3) for i in (0, 2)]
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, -1)


class Upsample2D(nnx.Module):
    """Nearest-neighbour resize to `size`, then a convolution."""

    def __init__(self, channels: int, **init):
        self.conv = conv3x3(channels, channels, **init)

    def __call__(self, x: Float[Array, "B H W C"], size: tuple[int, int]) -> Array:
        batch, height, width, _ = x.shape
        doubled = size == (2 * height, 2 * width)
        if doubled and batch * height * width >= _REPAYS_ADDING_TAPS:
            conv = self.conv
            assert conv.bias is not None
            x, kernel, bias = conv.promote_dtype(
                (x, conv.kernel[...], conv.bias[...]), dtype=conv.dtype
            )
            return _convolve_doubled(x, kernel, conv.precision) + bias
        if doubled:  # [B, H, 2, W, 2, C]
            x = jnp.broadcast_to(
                x[:, :, None, :, None], (batch, height, 2, width, 2, x.shape[3])
            ).reshape(batch, *size, x.shape[3])
        else:  # an odd skip connection: torch's interpolate takes floor(i * in / out)
            x = x[:, jnp.arange(size[0]) * height // size[0]]
            x = x[:, :, jnp.arange(size[1]) * width // size[1]]
        return self.conv(x)
