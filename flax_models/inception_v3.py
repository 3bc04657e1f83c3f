"""Inception-v3 as the Fréchet inception distance uses it: images to 2,048 features, NHWC.

Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision" (arXiv 1512.00567),
with the weights of TensorFlow's `inception-2015-12-05`, which differ from later ones in the network
too: its average pools do not count what they pad, the last block pools the maximum, and there are
1,008 classes.  Attributes are the keys of pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .layers.embeddings import Dtype
from .layers.linear import linear
from .pretrained import Buffer


@dataclasses.dataclass(frozen=True)
class InceptionV3Config:
    """Settings of `FIDInceptionV3`; the defaults are the published network's.

    Attributes:
      divisor: of all numbers of channels; 16 at most.
      num_classes: of the last layer, which features do not need.
    """

    divisor: int = 1
    num_classes: int = 1008

    def __post_init__(self):
        if self.divisor not in (1, 2, 4, 8, 16):
            raise ValueError(f"divisor is 1, 2, 4, 8 or 16, received {self.divisor}.")

    @property
    def features(self) -> int:
        """The width of what it sees."""
        return 2048 // self.divisor


class BatchNorm(nnx.Module):
    """Normalization by the statistics that training found."""

    def __init__(self, channels: int, *, param_dtype: Dtype):
        self.weight = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))
        self.running_mean = Buffer(jnp.zeros((channels,), param_dtype))
        self.running_var = Buffer(jnp.ones((channels,), param_dtype))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        scale = self.weight[...] * jax.lax.rsqrt(self.running_var[...] + 1e-3)
        return x * scale + (self.bias[...] - self.running_mean[...] * scale)


class BasicConv2d(nnx.Module):
    """A convolution without bias, its normalization, and ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int] = 1,
        *,
        stride: int = 1,
        pad: bool = True,
        param_dtype: Dtype,
        **init,
    ):
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.conv = nnx.Conv(
            inputs,
            outputs,
            sides,
            strides=stride,
            padding=tuple((side // 2 * pad, side // 2 * pad) for side in sides),
            use_bias=False,
            param_dtype=param_dtype,
            **init,
        )
        self.bn = BatchNorm(outputs, param_dtype=param_dtype)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        return nnx.relu(self.bn(self.conv(x)))


def _chain(x: Array, *layers: BasicConv2d) -> Array:
    for layer in layers:
        x = layer(x)
    return x


def _average(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Means of 3x3 pixels, of which those outside do not count."""
    return nnx.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _halve(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    return nnx.max_pool(x, (3, 3), strides=(2, 2))


class InceptionA(nnx.Module):
    """1x1, 5x5, two 3x3 and a pool side by side."""

    def __init__(self, inputs: int, pooled: int, d: int, **init):
        def conv(i: int, o: int, kernel: int = 1) -> BasicConv2d:
            return BasicConv2d(i, o // d, kernel, **init)

        self.branch1x1 = conv(inputs, 64)
        self.branch5x5_1 = conv(inputs, 48)
        self.branch5x5_2 = conv(48 // d, 64, 5)
        self.branch3x3dbl_1 = conv(inputs, 64)
        self.branch3x3dbl_2 = conv(64 // d, 96, 3)
        self.branch3x3dbl_3 = conv(96 // d, 96, 3)
        self.branch_pool = conv(inputs, pooled)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        five = _chain(x, self.branch5x5_1, self.branch5x5_2)
        three = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return jnp.concatenate(
            [self.branch1x1(x), five, three, self.branch_pool(_average(x))], axis=-1
        )


class InceptionB(nnx.Module):
    """Halves the sides: 3x3, two 3x3, and a pool."""

    def __init__(self, inputs: int, d: int, **init):
        self.branch3x3 = BasicConv2d(inputs, 384 // d, 3, stride=2, pad=False, **init)
        self.branch3x3dbl_1 = BasicConv2d(inputs, 64 // d, **init)
        self.branch3x3dbl_2 = BasicConv2d(64 // d, 96 // d, 3, **init)
        self.branch3x3dbl_3 = BasicConv2d(96 // d, 96 // d, 3, stride=2, pad=False, **init)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        three = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return jnp.concatenate([self.branch3x3(x), three, _halve(x)], axis=-1)


class InceptionC(nnx.Module):
    """1x1, a 7x7 and two of them as rows and columns, and a pool."""

    def __init__(self, inputs: int, inner: int, d: int, **init):
        row, column, c, o = (1, 7), (7, 1), inner // d, 192 // d
        self.branch1x1 = BasicConv2d(inputs, o, **init)
        self.branch7x7_1 = BasicConv2d(inputs, c, **init)
        self.branch7x7_2 = BasicConv2d(c, c, row, **init)
        self.branch7x7_3 = BasicConv2d(c, o, column, **init)
        self.branch7x7dbl_1 = BasicConv2d(inputs, c, **init)
        self.branch7x7dbl_2 = BasicConv2d(c, c, column, **init)
        self.branch7x7dbl_3 = BasicConv2d(c, c, row, **init)
        self.branch7x7dbl_4 = BasicConv2d(c, c, column, **init)
        self.branch7x7dbl_5 = BasicConv2d(c, o, row, **init)
        self.branch_pool = BasicConv2d(inputs, o, **init)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        seven = _chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3)
        twice = _chain(
            x,
            self.branch7x7dbl_1,
            self.branch7x7dbl_2,
            self.branch7x7dbl_3,
            self.branch7x7dbl_4,
            self.branch7x7dbl_5,
        )
        return jnp.concatenate(
            [self.branch1x1(x), seven, twice, self.branch_pool(_average(x))], axis=-1
        )


class InceptionD(nnx.Module):
    """Halves the sides again: 3x3, a 7x7 before a 3x3, and a pool."""

    def __init__(self, inputs: int, d: int, **init):
        c = 192 // d
        self.branch3x3_1 = BasicConv2d(inputs, c, **init)
        self.branch3x3_2 = BasicConv2d(c, 320 // d, 3, stride=2, pad=False, **init)
        self.branch7x7x3_1 = BasicConv2d(inputs, c, **init)
        self.branch7x7x3_2 = BasicConv2d(c, c, (1, 7), **init)
        self.branch7x7x3_3 = BasicConv2d(c, c, (7, 1), **init)
        self.branch7x7x3_4 = BasicConv2d(c, c, 3, stride=2, pad=False, **init)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        three = _chain(x, self.branch3x3_1, self.branch3x3_2)
        seven = _chain(
            x, self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4
        )
        return jnp.concatenate([three, seven, _halve(x)], axis=-1)


class InceptionE(nnx.Module):
    """1x1, and a 3x3 and two of them that end in a row beside a column, and a pool.

    The pool is of averages, or of the maximum where `maximum` says so.
    """

    def __init__(self, inputs: int, d: int, *, maximum: bool, **init):
        row, column, c = (1, 3), (3, 1), 384 // d
        self.maximum = maximum
        self.branch1x1 = BasicConv2d(inputs, 320 // d, **init)
        self.branch3x3_1 = BasicConv2d(inputs, c, **init)
        self.branch3x3_2a = BasicConv2d(c, c, row, **init)
        self.branch3x3_2b = BasicConv2d(c, c, column, **init)
        self.branch3x3dbl_1 = BasicConv2d(inputs, 448 // d, **init)
        self.branch3x3dbl_2 = BasicConv2d(448 // d, c, 3, **init)
        self.branch3x3dbl_3a = BasicConv2d(c, c, row, **init)
        self.branch3x3dbl_3b = BasicConv2d(c, c, column, **init)
        self.branch_pool = BasicConv2d(inputs, 192 // d, **init)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        three = self.branch3x3_1(x)
        twice = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        pooled = nnx.max_pool(x, (3, 3), padding="SAME") if self.maximum else _average(x)
        branches: Sequence[Array] = [
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(twice),
            self.branch3x3dbl_3b(twice),
            self.branch_pool(pooled),
        ]
        return jnp.concatenate(branches, axis=-1)


class FIDInceptionV3(nnx.Module):
    """The network; `FIDInceptionV3(config, rngs=rngs)(pixels)` gives features."""

    def __init__(
        self,
        config: InceptionV3Config,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config, d = config, config.divisor
        init = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        c = [each // d for each in (32, 64, 80, 192, 256, 288, 768, 1280, 2048)]
        self.Conv2d_1a_3x3 = BasicConv2d(3, c[0], 3, stride=2, pad=False, **init)
        self.Conv2d_2a_3x3 = BasicConv2d(c[0], c[0], 3, pad=False, **init)
        self.Conv2d_2b_3x3 = BasicConv2d(c[0], c[1], 3, **init)
        self.Conv2d_3b_1x1 = BasicConv2d(c[1], c[2], **init)
        self.Conv2d_4a_3x3 = BasicConv2d(c[2], c[3], 3, pad=False, **init)
        self.Mixed_5b = InceptionA(c[3], 32, d, **init)
        self.Mixed_5c = InceptionA(c[4], 64, d, **init)
        self.Mixed_5d = InceptionA(c[5], 64, d, **init)
        self.Mixed_6a = InceptionB(c[5], d, **init)
        self.Mixed_6b = InceptionC(c[6], 128, d, **init)
        self.Mixed_6c = InceptionC(c[6], 160, d, **init)
        self.Mixed_6d = InceptionC(c[6], 160, d, **init)
        self.Mixed_6e = InceptionC(c[6], 192, d, **init)
        self.Mixed_7a = InceptionD(c[6], d, **init)
        self.Mixed_7b = InceptionE(c[7], d, maximum=False, **init)
        self.Mixed_7c = InceptionE(c[8], d, maximum=True, **init)
        self.fc = linear(c[8], config.num_classes, **init)

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B F"]:
        """The mean over places of what the last block sees.

        Args:
          pixels: about -1 to 1, of at least 75x75; published for 299x299.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        x = _halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halve(x))))  # [B, h, w, 192]
        for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a):
            x = block(x)
        for block in (self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e):
            x = block(x)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(axis=(1, 2))

    def logits(self, features: Float[Array, "B F"]) -> Float[Array, "B K"]:
        """What the features say of its 1,008 classes."""
        return self.fc(features)
