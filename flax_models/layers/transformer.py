"""Spatial transformer of the UNet: self-attention, cross-attention and a gated perceptron."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .attention import Attention
from .linear import linear
from .resnet import conv1x1, group_norm


def layer_norm(features: int, epsilon: float = 1e-5, **init) -> nnx.LayerNorm:
    """Layer normalization with torch's two-pass variance."""
    return nnx.LayerNorm(features, epsilon=epsilon, use_fast_variance=False, **init)


class Identity(nnx.Module):
    """Holds the place of a parameterless PyTorch module, so that list indices agree."""


class GEGLU(nnx.Module):
    """Linear layer gated by an exact GELU (Shazeer 2020): [..., C] -> [..., hidden]."""

    def __init__(self, features: int, hidden: int, **init):
        self.proj = linear(features, 2 * hidden, **init)

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... hidden"]:
        hidden, gate = jnp.split(self.proj(x), 2, axis=-1)
        return hidden * jax.nn.gelu(gate, approximate=False)


class GELU(nnx.Module):
    """Linear layer and GELU, its tanh approximation or exact: [..., C] -> [..., hidden]."""

    def __init__(self, features: int, hidden: int, *, approximate: bool = True, **init):
        self.approximate = approximate
        self.proj = linear(features, hidden, **init)

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... hidden"]:
        return jax.nn.gelu(self.proj(x), approximate=self.approximate)


class LinearSiLU(nnx.Module):
    """Linear layer and SiLU: [..., C] -> [..., hidden]."""

    def __init__(self, features: int, hidden: int, **init):
        self.proj = linear(features, hidden, **init)

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... hidden"]:
        return jax.nn.silu(self.proj(x))


class FeedForward(nnx.Module):
    """Perceptron behind a layer with an activation, by default four times as wide inside."""

    def __init__(
        self,
        features: int,
        activated: Callable[..., nnx.Module] = GEGLU,
        *,
        hidden: int | None = None,
        **init,
    ):
        hidden = hidden or 4 * features
        first = activated(features, hidden, **init)
        last = linear(hidden, features, **init)
        self.net = nnx.List([first, Identity(), last])

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nnx.Module):
    """Pre-norm block: self-attention, cross-attention to the text, feed-forward."""

    def __init__(self, features: int, heads: int, context_features: int, **init):
        self.norm1 = layer_norm(features, **init)
        self.attn1 = Attention(features, heads, **init)
        self.norm2 = layer_norm(features, **init)
        self.attn2 = Attention(features, heads, context_features=context_features, **init)
        self.norm3 = layer_norm(features, **init)
        self.ff = FeedForward(features, **init)

    def __call__(
        self, x: Float[Array, "B L C"], context: Float[Array, "B K E"]
    ) -> Float[Array, "B L C"]:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """A stack of transformer blocks over the pixels of `[B, H, W, C]`.

    `linear_projection` chooses between a 1x1 convolution (SD 1.x) and a Linear (SD 2.x, SDXL) for
    `proj_in` and `proj_out`: the same key, a different rank on disk.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        context_features: int,
        *,
        layers: int,
        groups: int,
        linear_projection: bool,
        **init,
    ):
        project = linear if linear_projection else conv1x1
        self.norm = group_norm(features, groups, 1e-6, **init)
        self.proj_in = project(features, features, **init)
        self.transformer_blocks = nnx.List(
            [
                BasicTransformerBlock(features, heads, context_features, **init)
                for _ in range(layers)
            ]
        )
        self.proj_out = project(features, features, **init)

    def __call__(
        self, x: Float[Array, "B H W C"], context: Float[Array, "B K E"]
    ) -> Float[Array, "B H W C"]:
        h = self.proj_in(self.norm(x))
        h = h.reshape(x.shape[0], -1, x.shape[-1])  # [B, H*W, C]
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.reshape(x.shape))
