"""Convolutions of images `[B, H, W, C]` and videos `[B, T, H, W, C]`, where XLA's own are slow."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .bfloat16 import convolved
from .products import dot_general, native

_LAYOUT = ("NHWC", "HWIO", "NHWC")

# Pixels of an image, with its batch, from which the convolution of the doubled one is done from it.
_REPAYS_ADDING_TAPS = 256


def convolve(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "h w C D"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    *,
    precision: jax.lax.PrecisionLike = None,
    **options,
) -> Float[Array, "B Y X D"]:
    """`jax.lax.conv_general_dilated`; on a CPU one product, where the kernel exceeds the image.

    There the gradient of XLA's convolution spends its time on turning the kernel around.  On a CPU
    that is fast at bfloat16, convolutions of it are those of `kernels.bfloat16`.
    """
    fast = _in_bfloat16(x, kernel, strides, padding, precision, options)
    if fast is not None:
        return fast

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
    if kernel.shape[:2] == (1, 1):  # nothing is to be turned around
        return convolution(x, kernel)
    if batch * out[0] * out[1] > features:  # then the patches would exceed the kernel
        return convolution(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=product, default=convolution)


def _in_bfloat16(
    x: Array, kernel: Array, strides: Any, padding: Any, precision: Any, options: dict[str, Any]
) -> Array | None:
    """A convolution without further options, on a CPU that is fast at bfloat16; or else None."""
    axes = x.ndim - 2
    plain = precision is None and all(
        value is None or name == "dimension_numbers" or value == 1 or value == (1,) * axes
        for name, value in options.items()
    )
    if not plain or isinstance(padding, str) or not native(x, kernel):
        return None
    ones = (1,) * axes
    if kernel.shape[:axes] == tuple(strides) == ones and not any(map(any, padding)):
        dimensions = (((axes + 1,), (0,)), ((), ()))
        return dot_general(x, kernel.reshape(kernel.shape[axes:]), dimensions)
    return convolved(x, kernel, strides, padding)


def halves(kernel: Array, axis: int) -> tuple[Array, Array]:
    """The two taps along an axis that each of two equal neighbors has, of a kernel's three."""
    before, here, after = jnp.split(kernel, 3, axis)
    pairs = ((before, here + after), (before + here, after))
    first, second = (jnp.concatenate(pair, axis) for pair in pairs)
    return first, second


def convolve_doubled(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"], precision: jax.lax.PrecisionLike
) -> Float[Array, "B 2*H 2*W D"]:
    """The 3x3 convolution of an image whose pixels are doubled, with one pixel of zeros around it.

    A large one is done from the image as it is. Each of the four pixels that come of one sees 2x2
    others, and the kernel's taps that meet there add up: 4 products, the doubled image takes 9.
    """
    batch, height, width, channels = x.shape
    if batch * height * width < _REPAYS_ADDING_TAPS:
        shape = (batch, height, 2, width, 2, channels)
        x = jnp.broadcast_to(x[:, :, None, :, None], shape)
        x = x.reshape(batch, 2 * height, 2 * width, channels)
        return convolve(
            x, kernel, (1, 1), ((1, 1), (1, 1)), precision=precision, dimension_numbers=_LAYOUT
        )
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    taps = [quarter for half in halves(wide, 0) for quarter in halves(half, 1)]
    pixels = convolve(
        x,
        jnp.concatenate(taps, -1).astype(kernel.dtype),
        (1, 1),
        ((1, 1), (1, 1)),
        precision=precision,
        dimension_numbers=_LAYOUT,
    )
    # [B, H + 1, W + 1, 4 D]: the second of two neighbors starts one pixel later.
    parts = jnp.split(pixels, 4, -1)
    parts = [parts[2 * i + j][:, i : i + height, j : j + width] for i in (0, 1) for j in (0, 1)]
    rows = [jnp.stack(parts[i : i + 2], axis=3) for i in (0, 2)]
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, -1)


_PIXELS_AT_ONCE = 512  # of a video, whose products with a kernel's taps stay in a CPU's cache
_MANY_PIXELS = 2048  # of a video, from which that pays for its compilation
_VIDEOS = ("NDHWC", "DHWIO", "NDHWC")


def convolve_video(
    x: Float[Array, "B T H W C"],
    kernel: Float[Array, "t h w C D"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    *,
    precision: jax.lax.PrecisionLike = None,
    **options,
) -> Float[Array, "B S Y X D"]:
    """`jax.lax.conv_general_dilated`; on a CPU, where it is slow, a sum of products.

    That sum is of large videos of many channels, without strides.  Of bfloat16 see `convolve`.
    """
    fast = _in_bfloat16(x, kernel, strides, padding, precision, options)
    if fast is not None:
        return fast

    def convolution(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, precision=precision, **options
        )

    batch, *out, _ = jax.eval_shape(convolution, x, kernel).shape
    many = batch * math.prod(out) >= _MANY_PIXELS and kernel.shape[3] >= 16
    if not many or any(stride != 1 for stride in strides) or math.prod(kernel.shape[:3]) == 1:
        return convolution(x, kernel)
    products = functools.partial(_tap_products, padding=tuple(padding), precision=precision)
    return jax.lax.platform_dependent(x, kernel, cpu=products, default=convolution)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _tap_products(
    x: Array, kernel: Array, padding: tuple[tuple[int, int], ...], precision: jax.lax.PrecisionLike
) -> Array:
    """Of a few rows at a time, the sum of the kernel's taps times the pixels that they see."""
    anything = x[0, 0, 0, 0, 0]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    batch, *sides, channels = x.shape
    depth, height, width, _, features = kernel.shape
    frames, rows, columns = (
        side - size + 1 for side, size in zip(sides, kernel.shape, strict=False)
    )
    count = -(-rows // max(1, _PIXELS_AT_ONCE // columns))  # of pieces, of equal rows
    piece = -(-rows // count)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, count * piece - rows), (0, 0), (0, 0)))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    taps = kernel.astype(wide)

    def store(index: Array, pieces: Array) -> Array:
        video, place = index // (frames * count), index % (frames * count)
        start = (video, place // count, place % count * piece, 0, 0)
        shape = (1, depth, piece + height - 1, sides[2], channels)
        seen = jax.lax.dynamic_slice(x, start, shape)[0].astype(wide)
        terms = (
            jnp.dot(
                seen[t, i : i + piece, j : j + columns].reshape(-1, channels),
                taps[t, i, j],
                precision=precision,
            )
            for t, i, j in itertools.product(range(depth), range(height), range(width))
        )
        made = functools.reduce(jnp.add, terms).astype(x.dtype)
        return jax.lax.dynamic_update_index_in_dim(pieces, made, index, 0)

    # Were it filled with a constant, XLA would make the results of all layers at the beginning.
    pieces = jnp.full((batch * frames * count, piece * columns, features), anything)
    pieces = jax.lax.fori_loop(0, len(pieces), store, pieces)
    return pieces.reshape(batch, frames, count * piece, columns, features)[:, :, :rows]


def _tap_products_forward(x: Array, kernel: Array, *settings: Any) -> tuple[Array, Any]:
    return _tap_products(x, kernel, *settings), (x, kernel)


def _tap_products_backward(
    padding: Any, precision: Any, saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    def convolution(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1, 1), padding, dimension_numbers=_VIDEOS, precision=precision
        )

    return jax.vjp(convolution, *saved)[1](g)


_tap_products.defvjp(_tap_products_forward, _tap_products_backward)


def _padded(x: Array, kernel: Array) -> Array:
    """An image with half a kernel of zeros around it."""
    top, left = (size // 2 for size in kernel.shape[:2])
    return jnp.pad(x, ((0, 0), (top, top), (left, left), (0, 0)))


@jax.custom_vjp
def _shifted_products(
    x: Float[Array, "B H W C"], kernel: Float[Array, "k k C"]
) -> Float[Array, "B H W C"]:
    """Depthwise convolution with zero padding, as a sum over the kernel's positions."""
    height, width = x.shape[1:3]
    padded = _padded(x, kernel)
    terms = (
        padded[:, i : i + height, j : j + width] * kernel[i, j]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    )
    return functools.reduce(jnp.add, terms)


def _products_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _shifted_products(x, kernel), (x, kernel)


def _products_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    padded, (rows, columns) = _padded(x, kernel), kernel.shape[:2]

    def product(place: Array) -> Array:
        start = (0, place // columns, place % columns, 0)
        return jnp.sum(jax.lax.dynamic_slice(padded, start, x.shape) * g, axis=(0, 1, 2))

    by_kernel = jax.lax.map(product, jnp.arange(rows * columns)).reshape(kernel.shape)
    return _shifted_products(g, kernel[::-1, ::-1]), by_kernel


_shifted_products.defvjp(_products_forward, _products_backward)


def convolve_depthwise(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "k k 1 C"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "B Y X C"]:
    """`jax.lax.conv_general_dilated` by channel; on a CPU, where it is slow, one fused sum.

    That sum is of an odd kernel over an image padded to give one of its size.
    """

    def convolution(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)

    def products(x: Array, kernel: Array) -> Array:
        return _shifted_products(x, kernel[:, :, 0])

    sides = zip(kernel.shape[:2], padding, strict=True)
    keeps_size = all(2 * one == size - 1 for size, pads in sides for one in pads)
    if tuple(strides) != (1, 1) or not keeps_size:
        return convolution(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=products, default=convolution)
