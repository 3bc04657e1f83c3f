"""Mask2Former (Cheng et al. 2022) with a text classifier, as FC-CLIP and MAFT+ use it.

`MSDeformAttnPixelDecoder` turns a backbone's four feature maps into mask features and three
memories; `MultiScaleMaskedTransformerDecoder` turns these into masks and their similarities to the
rows of a text classifier.  Maps are `[B, H, W, C]`, tokens `[B, L, C]`, masks `[B, Q, H, W]`.
Attribute paths are those of detectron2 checkpoints.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from .configs import ModelConfig
from .layers.attention import MultiheadAttention
from .layers.bilinear import Layout, resize, sample_levels
from .layers.linear import linear
from .layers.resnet import group_norm
from .layers.transformer import layer_norm

_LEVELS = 3  # maps that are attended to: strides 32, 16, 8
_GROUPS = 32
_XAVIER = nnx.initializers.xavier_uniform()
_KAIMING = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform")


@dataclasses.dataclass(frozen=True)
class Mask2FormerConfig(ModelConfig):
    """Settings of both decoders; the defaults are MAFT+'s with ConvNeXt-Base.

    `feature_channels` are the backbone's, strides 4 to 32; `class_dim` is the text rows' width.
    """

    feature_channels: tuple[int, ...] = (128, 256, 512, 1024)
    class_dim: int = 640
    hidden_dim: int = 256
    heads: int = 8
    num_points: int = 4
    encoder_layers: int = 6
    encoder_ffn: int = 1024
    decoder_layers: int = 9
    decoder_ffn: int = 2048
    num_queries: int = 100

    def __post_init__(self):
        self.require_positive(*(field.name for field in dataclasses.fields(self)))
        self.require(
            len(self.feature_channels) == 4,
            f"feature_channels names four maps, received {self.feature_channels}.",
        )
        self.require(
            self.hidden_dim % math.lcm(_GROUPS, self.heads) == 0,
            f"hidden_dim must be a multiple of {_GROUPS} and of heads={self.heads}, received "
            f"{self.hidden_dim}.",
        )


def sine_positions(layout: Sequence[int], features: int) -> Float[Array, "H W F"]:
    """Sine-cosine positions (Vaswani et al. 2017) on a grid, normalized to (0, 2 pi].

    Args:
      layout: rows and columns.
      features: half for the row, then half for the column; sine and cosine take turns.
    """
    half = features // 2
    rates = 10000.0 ** (-2.0 * (np.arange(half) // 2) / half)

    def codes(count: int) -> np.ndarray:
        angles = 2 * math.pi * np.arange(1, count + 1)[:, None] / (count + 1e-6) * rates
        even = np.arange(half) % 2 == 0
        return np.where(even, np.sin(angles), np.cos(angles)).astype(np.float32)

    rows, columns = (codes(count) for count in layout)
    shape = (*layout, half)
    return jnp.concatenate(
        [jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None], shape)], axis=-1
    )


def torch_linear(
    inputs: int, outputs: int, *, kernel_init: Callable[..., Array] | None = None, **init: Any
) -> nnx.Linear:
    """Linear layer that starts as torch's: uniform in +-1/sqrt(inputs), unless told otherwise."""
    bound = inputs**-0.5

    def uniform(key: Array, shape: Sequence[int], dtype: Any, *_: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return linear(inputs, outputs, kernel_init=kernel_init or uniform, bias_init=uniform, **init)


# ---- pixel decoder ----


class MSDeformAttn(nnx.Module):
    """Multi-scale deformable self-attention (Zhu et al. 2021)."""

    def __init__(self, config: Mask2FormerConfig, **init: Any):
        width, heads, points = config.hidden_dim, config.heads, config.num_points
        self.heads, self.points = heads, points
        count = heads * _LEVELS * points
        zeros = nnx.initializers.zeros

        def star(key: Array, shape: Sequence[int], dtype: Any, *_: Any) -> Array:
            """Point k of head m lies k steps away in the head's own direction."""
            angles = 2 * math.pi * np.arange(heads) / heads
            ways = np.stack([np.cos(angles), np.sin(angles)], axis=-1)  # [M, 2]
            ways /= np.abs(ways).max(axis=-1, keepdims=True)
            steps = np.arange(1, points + 1)[:, None]
            grid = np.broadcast_to(ways[:, None, None] * steps, (heads, _LEVELS, points, 2))
            return jnp.asarray(grid.reshape(shape), dtype)

        self.sampling_offsets = linear(width, 2 * count, kernel_init=zeros, bias_init=star, **init)
        self.attention_weights = linear(width, count, kernel_init=zeros, **init)
        self.value_proj = linear(width, width, kernel_init=_XAVIER, **init)
        self.output_proj = linear(width, width, kernel_init=_XAVIER, **init)

    def __call__(
        self, query: Float[Array, "B L C"], tokens: Float[Array, "B L C"], layout: Layout
    ) -> Float[Array, "B L C"]:
        batch, length, _ = tokens.shape
        grid = (batch, length, self.heads, _LEVELS, self.points)
        values = self.value_proj(tokens).reshape(batch, length, self.heads, -1)
        offsets = self.sampling_offsets(query).reshape(*grid, 2)
        weights = self.attention_weights(query).reshape(batch, length, self.heads, -1)
        weights = jax.nn.softmax(weights, axis=-1).reshape(grid)
        centers = _centers(layout)[None, :, None, :, None]  # [1, L, 1, N, 1, 2]
        attended = sample_levels(values, layout, centers + offsets, weights)
        return self.output_proj(attended.reshape(tokens.shape))


def _centers(layout: Layout) -> Float[Array, "L N 2"]:
    """Where each token's own place is in every map: (x, y) in that map's pixels."""
    places = []
    for rows, columns in layout:
        y, x = np.meshgrid(
            (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij"
        )
        places.append(np.stack([x, y], axis=-1).reshape(-1, 2))
    sizes = np.array([(columns, rows) for rows, columns in layout])  # [N, 2]
    return jnp.asarray(np.concatenate(places)[:, None] * sizes - 0.5, jnp.float32)


class MSDeformAttnLayer(nnx.Module):
    """Deformable attention, then a perceptron, each with its norm behind."""

    def __init__(self, config: Mask2FormerConfig, **init: Any):
        width = config.hidden_dim
        self.self_attn = MSDeformAttn(config, **init)
        self.norm1 = layer_norm(width, **init)
        self.linear1 = torch_linear(width, config.encoder_ffn, kernel_init=_XAVIER, **init)
        self.linear2 = torch_linear(config.encoder_ffn, width, kernel_init=_XAVIER, **init)
        self.norm2 = layer_norm(width, **init)

    def __call__(self, x: Array, codes: Float[Array, "1 L C"], layout: Layout) -> Array:
        x = self.norm1(x + self.self_attn(x + codes, x, layout))
        return self.norm2(x + self.linear2(jax.nn.relu(self.linear1(x))))


class _Layers(nnx.Module):
    def __init__(self, config: Mask2FormerConfig, **init: Any):
        self.layers = nnx.List(
            [MSDeformAttnLayer(config, **init) for _ in range(config.encoder_layers)]
        )


class _Transformer(nnx.Module):
    def __init__(self, config: Mask2FormerConfig, **init: Any):
        shape = (_LEVELS, config.hidden_dim)
        self.level_embed = nnx.Param(
            jax.random.normal(init["rngs"].params(), shape, init["param_dtype"])
        )
        self.encoder = _Layers(config, **init)


class NormedConv(nnx.Conv):
    """Convolution without bias and a group norm behind, named as detectron2 does."""

    def __init__(self, inputs: int, outputs: int, size: int, **init: Any):
        pads = ((size // 2, size // 2),) * 2
        super().__init__(
            inputs,
            outputs,
            (size, size),
            padding=pads,
            use_bias=False,
            kernel_init=_KAIMING,
            **init,
        )
        self.norm = group_norm(outputs, _GROUPS, 1e-5, **init)

    def __call__(self, inputs: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:  # type: ignore[override]
        return self.norm(super().__call__(inputs))


class PixelFeatures(NamedTuple):
    """`mask_features` [B, H/4, W/4, C] and the memories of strides 32, 16 and 8."""

    mask_features: Float[Array, "B H W C"]
    memories: tuple[Float[Array, "B h w C"], ...]


class MSDeformAttnPixelDecoder(nnx.Module):
    """Deformable attention over three maps, one more level behind; always in float32."""

    def __init__(self, config: Mask2FormerConfig, *, param_dtype: Any, rngs: nnx.Rngs):
        init = {"dtype": jnp.float32, "param_dtype": param_dtype, "rngs": rngs}
        width = config.hidden_dim
        self.input_proj = nnx.List(
            [
                nnx.List(
                    [
                        nnx.Conv(channels, width, (1, 1), kernel_init=_XAVIER, **init),
                        group_norm(width, _GROUPS, 1e-5, **init),
                    ]
                )
                for channels in config.feature_channels[:0:-1]
            ]
        )
        self.transformer = _Transformer(config, **init)
        self.adapter_1 = NormedConv(config.feature_channels[0], width, 1, **init)
        self.layer_1 = NormedConv(width, width, 3, **init)
        self.mask_features = nnx.Conv(width, width, (1, 1), kernel_init=_KAIMING, **init)

    def __call__(self, features: Sequence[Float[Array, "B _ _ _"]]) -> PixelFeatures:
        """From maps of strides 4, 8, 16 and 32."""
        finest, *others = (x.astype(jnp.float32) for x in features)
        maps = [
            norm(conv(x)) for (conv, norm), x in zip(self.input_proj, others[::-1], strict=True)
        ]
        batch, width = finest.shape[0], maps[0].shape[-1]
        layout = tuple(x.shape[1:3] for x in maps)
        tokens = jnp.concatenate([x.reshape(batch, -1, width) for x in maps], axis=1)
        embed = self.transformer.level_embed[...].astype(jnp.float32)
        codes = jnp.concatenate(
            [
                sine_positions(size, width).reshape(-1, width) + embed[level]
                for level, size in enumerate(layout)
            ]
        )[None]
        for layer in self.transformer.encoder.layers:
            tokens = layer(tokens, codes, layout)
        ends = np.cumsum([rows * columns for rows, columns in layout])[:-1].tolist()
        memories = tuple(
            part.reshape(batch, *size, width)
            for part, size in zip(jnp.split(tokens, ends, axis=1), layout, strict=True)
        )
        y = self.adapter_1(finest) + resize(memories[-1], finest.shape[1:3])
        return PixelFeatures(self.mask_features(jax.nn.relu(self.layer_1(y))), memories)


# ---- transformer decoder ----


class SelfAttentionLayer(nnx.Module):
    """Queries attend to each other; the norm comes behind."""

    def __init__(self, width: int, heads: int, **init: Any):
        self.self_attn = MultiheadAttention(width, heads, **init)
        self.norm = layer_norm(width, **init)

    def __call__(self, x: Array, places: Array) -> Array:
        return self.norm(x + self.self_attn(x + places, x + places, x))


class CrossAttentionLayer(nnx.Module):
    """Queries attend to a memory where their masks were; the norm comes behind."""

    def __init__(self, width: int, heads: int, **init: Any):
        self.multihead_attn = MultiheadAttention(width, heads, **init)
        self.norm = layer_norm(width, **init)

    def __call__(
        self, x: Array, places: Array, memory: Array, codes: Array, mask: Bool[Array, "B 1 Q K"]
    ) -> Array:
        return self.norm(x + self.multihead_attn(x + places, memory + codes, memory, mask=mask))


class FFNLayer(nnx.Module):
    """Perceptron; the norm comes behind."""

    def __init__(self, width: int, hidden: int, **init: Any):
        self.linear1 = torch_linear(width, hidden, kernel_init=_XAVIER, **init)
        self.linear2 = torch_linear(hidden, width, kernel_init=_XAVIER, **init)
        self.norm = layer_norm(width, **init)

    def __call__(self, x: Array) -> Array:
        return self.norm(x + self.linear2(jax.nn.relu(self.linear1(x))))


class MLP(nnx.Module):
    """Three linear layers with ReLUs between them."""

    def __init__(self, width: int, out: int, **init: Any):
        sizes = ((width, width), (width, width), (width, out))
        self.layers = nnx.List([torch_linear(*size, **init) for size in sizes])

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... D"]:
        for layer in list(self.layers)[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class MaskPrediction(NamedTuple):
    """What one layer predicts: a scaled cosine per text row, and mask logits."""

    row_logits: Float[Array, "B Q R"]
    mask_logits: Float[Array, "B Q H W"]


def mask_pool(
    features: Float[Array, "B H W C"], mask_logits: Float[Array, "B Q H W"]
) -> Float[Array, "B Q C"]:
    """Mean feature where a mask's logits are positive, else zero; masks get no gradient."""
    inside = (mask_logits > 0).astype(features.dtype)
    total = jnp.einsum("bqhw,bhwc->bqc", inside, features)
    return total / (inside.sum(axis=(2, 3))[..., None] + 1e-8)


def normalize(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """x / max(|x|, 1e-12) along the last axis, with a gradient of zero where x is zero."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(square, 1e-24))


class MultiScaleMaskedTransformerDecoder(nnx.Module):
    """Queries look at three memories in turn, where their masks of the layer before were."""

    def __init__(self, config: Mask2FormerConfig, **init: Any):
        width, heads, depth = config.hidden_dim, config.heads, config.decoder_layers
        normal = nnx.initializers.normal(1.0)
        self.transformer_self_attention_layers = nnx.List(
            [SelfAttentionLayer(width, heads, **init) for _ in range(depth)]
        )
        self.transformer_cross_attention_layers = nnx.List(
            [CrossAttentionLayer(width, heads, **init) for _ in range(depth)]
        )
        self.transformer_ffn_layers = nnx.List(
            [FFNLayer(width, config.decoder_ffn, **init) for _ in range(depth)]
        )
        self.decoder_norm = layer_norm(width, **init)
        self.query_feat = nnx.Embed(config.num_queries, width, embedding_init=normal, **init)
        self.query_embed = nnx.Embed(config.num_queries, width, embedding_init=normal, **init)
        self.level_embed = nnx.Embed(_LEVELS, width, embedding_init=normal, **init)
        self.mask_embed = MLP(width, width, **init)
        self._mask_pooling_proj = nnx.List(
            [layer_norm(width, **init), torch_linear(width, width, **init)]
        )
        self.class_embed = MLP(width, config.class_dim, **init)
        self.logit_scale = nnx.Param(jnp.asarray(jnp.log(1 / 0.07), init["param_dtype"]))

    def __call__(
        self, pixels: PixelFeatures, rows: Float[Array, "R D"]
    ) -> tuple[MaskPrediction, ...]:
        """Predictions of the initial queries and of every layer behind them.

        Args:
          pixels: from the pixel decoder.
          rows: text classifier, rows of unit length, the last one for void.
        """
        batch, width = pixels.mask_features.shape[0], pixels.mask_features.shape[-1]
        sizes = [memory.shape[1:3] for memory in pixels.memories]
        memories = [
            memory.reshape(batch, -1, width) + self.level_embed.embedding[...][level]
            for level, memory in enumerate(pixels.memories)
        ]
        codes = [sine_positions(size, width).reshape(1, -1, width) for size in sizes]
        shape = (batch, *self.query_feat.embedding.shape)
        x = jnp.broadcast_to(self.query_feat.embedding[...], shape)
        places = jnp.broadcast_to(self.query_embed.embedding[...], shape)

        predictions = [self._predict(x, pixels.mask_features, rows)]
        for number, (cross, own, ffn) in enumerate(
            zip(
                self.transformer_cross_attention_layers,
                self.transformer_self_attention_layers,
                self.transformer_ffn_layers,
                strict=True,
            )
        ):
            level = number % _LEVELS
            mask = _attention_mask(predictions[-1].mask_logits, sizes[level])
            x = cross(x, places, memories[level], codes[level], mask)
            x = ffn(own(x, places))
            predictions.append(self._predict(x, pixels.mask_features, rows))
        return tuple(predictions)

    def _predict(self, x: Array, mask_features: Array, rows: Array) -> MaskPrediction:
        x = self.decoder_norm(x)
        mask_logits = jnp.einsum("bqc,bhwc->bqhw", self.mask_embed(x), mask_features)
        norm, linear = self._mask_pooling_proj
        pooled = linear(norm(mask_pool(mask_features, mask_logits)))
        queries = normalize(self.class_embed(x + pooled))
        scale = jnp.minimum(jnp.exp(self.logit_scale[...]), 100.0)
        return MaskPrediction(scale * jnp.einsum("bqd,rd->bqr", queries, rows), mask_logits)


def _attention_mask(
    mask_logits: Float[Array, "B Q H W"], size: Sequence[int]
) -> Bool[Array, "B 1 Q K"]:
    """Where a query may look: inside its mask, or anywhere if that is empty."""
    logits = resize(jax.lax.stop_gradient(mask_logits), size, axis=2)
    inside = jax.nn.sigmoid(logits).reshape(*logits.shape[:2], -1) >= 0.5
    return (inside | ~inside.any(axis=-1, keepdims=True))[:, None]
