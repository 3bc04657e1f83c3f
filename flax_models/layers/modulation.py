"""Adaptive layer norms: what a layer does with its tokens follows from a condition, [B, D].

The condition is an embedding of the timestep and of whatever else a whole image is told.  From it
each layer regresses shifts and scales, applied behind a norm without parameters, and gates of its
residuals (DiT, Peebles & Xie 2023, section 3.2).  All start at zero, so that a new model's layers
are identities.  Tokens may be a sequence, [B, L, D], or lie on a grid, [B, h, w, D].
"""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .linear import linear
from .transformer import layer_norm


def plain_layer_norm(features: int, epsilon: float = 1e-6, **init) -> nnx.LayerNorm:
    """Layer normalization without parameters."""
    return layer_norm(features, epsilon, use_bias=False, use_scale=False, **init)


def zero_linear(features: int, out_features: int, **init) -> nnx.Linear:
    """A linear layer that starts at zero."""
    return linear(features, out_features, kernel_init=nnx.initializers.zeros, **init)


def _for_tokens(vector: Float[Array, "B D"], x: Float[Array, "B *X D"]) -> Float[Array, "B ..."]:
    return vector.reshape(vector.shape[0], *(1,) * (x.ndim - 2), vector.shape[-1])


def modulate(
    x: Float[Array, "B *X D"], shift: Float[Array, "B D"], scale: Float[Array, "B D"]
) -> Float[Array, "B *X D"]:
    """x·(1 + scale) + shift, the same for all tokens of an image."""
    return x * (1 + _for_tokens(scale, x)) + _for_tokens(shift, x)


def gated(gate: Float[Array, "B D"], x: Float[Array, "B *X D"]) -> Float[Array, "B *X D"]:
    """gate·x, the same for all tokens of an image."""
    return _for_tokens(gate, x) * x


def with_residual(
    x: Float[Array, "B *X D"],
    norm: Callable[..., Float[Array, "B *X D"]],
    layer: Callable[..., Float[Array, "B *X D"]],
    shift: Float[Array, "B D"],
    scale: Float[Array, "B D"],
    gate: Float[Array, "B D"],
) -> Float[Array, "B *X D"]:
    """x + gate·layer(norm(x)·(1 + scale) + shift)."""
    return x + gated(gate, layer(modulate(norm(x), shift, scale)))


class Modulation(nnx.Module):
    """Vectors regressed from the condition: [B, D] -> `parts` times [B, D]."""

    def __init__(self, features: int, parts: int, *, use_bias: bool = True, **init):
        self.parts = parts
        self.linear = zero_linear(features, parts * features, use_bias=use_bias, **init)

    def vectors(self, condition: Float[Array, "B D"]) -> list[Float[Array, "B D"]]:
        """In the order of the checkpoint, which the classes below tell."""
        return jnp.split(self.linear(jax.nn.silu(condition)), self.parts, axis=-1)


class _AdaptiveLayerNorm(Modulation):
    PARTS: ClassVar[int]

    def __init__(self, features: int, *, use_bias: bool = True, epsilon: float = 1e-6, **init):
        super().__init__(features, self.PARTS, use_bias=use_bias, **init)
        self.norm = plain_layer_norm(features, epsilon, **init)


class AdaLayerNormZero(_AdaptiveLayerNorm):
    """Norm of a layer's input, and the modulations of its attention and its perceptron."""

    PARTS = 6

    def __call__(
        self, x: Float[Array, "B *X D"], condition: Float[Array, "B D"]
    ) -> tuple[Float[Array, "B *X D"], Float[Array, "B D"], tuple[Float[Array, "B D"], ...]]:
        """Input of the attention; its gate; shift, scale and gate of the perceptron."""
        shift, scale, gate, *perceptron = self.vectors(condition)
        return modulate(self.norm(x), shift, scale), gate, tuple(perceptron)


class SD35AdaLayerNormZeroX(_AdaptiveLayerNorm):
    """`AdaLayerNormZero` for a layer with a second attention, whose input has the same norm."""

    PARTS = 9

    def __call__(
        self, x: Float[Array, "B *X D"], condition: Float[Array, "B D"]
    ) -> tuple[
        Float[Array, "B *X D"],
        Float[Array, "B D"],
        tuple[Float[Array, "B D"], ...],
        Float[Array, "B *X D"],
        Float[Array, "B D"],
    ]:
        """What `AdaLayerNormZero` gives, then input and gate of the second attention."""
        shift, scale, gate, *perceptron, shift2, scale2, gate2 = self.vectors(condition)
        x = self.norm(x)
        first, second = modulate(x, shift, scale), modulate(x, shift2, scale2)
        return first, gate, tuple(perceptron), second, gate2


class AdaLayerNormZeroSingle(_AdaptiveLayerNorm):
    """Norm of a layer's input, and the gate of all that the layer adds."""

    PARTS = 3

    def __call__(
        self, x: Float[Array, "B *X D"], condition: Float[Array, "B D"]
    ) -> tuple[Float[Array, "B *X D"], Float[Array, "B D"]]:
        """Input of the layer, and its gate."""
        shift, scale, gate = self.vectors(condition)
        return modulate(self.norm(x), shift, scale), gate


class AdaLayerNormContinuous(_AdaptiveLayerNorm):
    """Norm without a gate; its scale comes before its shift."""

    PARTS = 2

    def __call__(
        self, x: Float[Array, "B *X D"], condition: Float[Array, "B D"]
    ) -> Float[Array, "B *X D"]:
        """Normalize and modulate."""
        scale, shift = self.vectors(condition)
        return modulate(self.norm(x), shift, scale)
