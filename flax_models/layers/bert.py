"""Post-norm transformer layers of BERT (Devlin et al. 2019), under transformers' names."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from .attention import dot_product_attention
from .encoder import EncoderConfig, layer_norm
from .linear import linear

Mask = Bool[Array, "B K"]


class Projections(nnx.Module):
    """Multi-head attention without its output projection."""

    def __init__(
        self,
        config: EncoderConfig,
        *,
        context_features: int | None = None,
        use_bias: bool = True,
        **init,
    ):
        features = config.hidden_size
        context_features = context_features or features
        self.heads = config.num_attention_heads
        self.query = linear(features, features, use_bias=use_bias, **init)
        self.key = linear(context_features, features, use_bias=use_bias, **init)
        self.value = linear(context_features, features, use_bias=use_bias, **init)

    def __call__(
        self,
        x: Float[Array, "B L C"],
        context: Float[Array, "B K E"] | None = None,
        mask: Mask | None = None,
    ) -> Float[Array, "B L C"]:
        context = x if context is None else context
        query = self.query(x).reshape(*x.shape[:2], self.heads, -1)  # [B, L, H, D]
        key, value = (
            project(context).reshape(*context.shape[:2], self.heads, -1)
            for project in (self.key, self.value)
        )
        seen = None if mask is None else mask[:, None, None, :]
        return dot_product_attention(query, key, value, mask=seen).reshape(x.shape)


class Dense(nnx.Module):
    """A linear layer one name further down."""

    def __init__(self, features: int, out_features: int, **init):
        self.dense = linear(features, out_features, **init)

    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L D"]:
        return self.dense(x)


class Output(nnx.Module):
    """Project, add what came before, normalize."""

    def __init__(self, config: EncoderConfig, features: int, **init):
        self.dense = linear(features, config.hidden_size, **init)
        self.LayerNorm = layer_norm(config, **init)

    def __call__(
        self, x: Float[Array, "B L C"], before: Float[Array, "B L D"]
    ) -> Float[Array, "B L D"]:
        return self.LayerNorm(self.dense(x) + before)


class BertAttention(nnx.Module):
    """Attention with its residual; `inner` is the name that its projections bear on disk."""

    def __init__(
        self, config: EncoderConfig, inner: str, context_features: int | None = None, **init
    ):
        self.inner = inner
        setattr(self, inner, Projections(config, context_features=context_features, **init))
        self.output = Output(config, config.hidden_size, **init)

    def __call__(
        self,
        x: Float[Array, "B L C"],
        context: Float[Array, "B K E"] | None = None,
        mask: Mask | None = None,
    ) -> Float[Array, "B L C"]:
        return self.output(getattr(self, self.inner)(x, context, mask), x)


def token_mask(mask: Array | None) -> Mask | None:
    """A tokenizer's attention mask as booleans."""
    return None if mask is None else jnp.asarray(mask) != 0
