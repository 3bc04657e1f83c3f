"""A small convolutional classifier with three heads: the judge of the glyphs world.

It reads 64x64 RGB images, NHWC in [0, 1], and says which digit, color and texture they show. It
exists to measure text-to-image models, not to be part of one.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .configs import ModelConfig
from .layers.checks import check_axes
from .layers.linear import linear
from .layers.resnet import conv3x3, group_norm


@dataclasses.dataclass(frozen=True)
class GlyphClassifierConfig(ModelConfig):
    """Sizes of the classifier.

    `channels` are the widths of the convolutions, whose strides are `strides`; the features
    that remain are flattened into `features` units, from which the three heads read.
    """

    image_size: int = 64
    channels: tuple[int, ...] = (16, 32, 48, 64, 64)
    strides: tuple[int, ...] = (2, 2, 1, 2, 2)
    groups: int = 8
    features: int = 48
    digits: int = 10
    colors: int = 6
    textures: int = 3

    def __post_init__(self) -> None:
        self.require_positive(*(field.name for field in dataclasses.fields(self)))
        self.require(
            len(self.channels) == len(self.strides),
            f"channels {self.channels} and strides {self.strides} must have the same length.",
        )


class GlyphClassifier(nnx.Module):
    """Convolution, group norm, GELU per stage; one hidden layer; a linear head per attribute."""

    config_class = GlyphClassifierConfig

    def __init__(
        self,
        config: GlyphClassifierConfig,
        *,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        init = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        widths = (3, *config.channels)
        side = config.image_size
        self.convs, self.norms = nnx.List(), nnx.List()
        for inputs, outputs, stride in zip(widths, widths[1:], config.strides, strict=False):
            self.convs.append(conv3x3(inputs, outputs, stride=stride, **init))
            self.norms.append(group_norm(outputs, config.groups, 1e-5, **init))
            side = (side - 1) // stride + 1
        self.hidden = linear(side * side * widths[-1], config.features, **init)
        self.digit = linear(config.features, config.digits, **init)
        self.color = linear(config.features, config.colors, **init)
        self.texture = linear(config.features, config.textures, **init)

    def features(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B F"]:
        """What the heads read: the hidden layer after its activation."""
        check_axes(images, "B H W C", "GlyphClassifier's images")
        x = 4.0 * (images - 0.45)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.gelu(norm(conv(x)))  # [B, H/s, W/s, C]
        return jax.nn.gelu(self.hidden(x.reshape(x.shape[0], -1)))

    def __call__(self, images: Float[Array, "B H W 3"]) -> dict[str, Float[Array, "B N"]]:
        """Logits by attribute, `digit` [B,10], `color` [B,6], `texture` [B,3]."""
        x = self.features(images)
        return {"digit": self.digit(x), "color": self.color(x), "texture": self.texture(x)}
