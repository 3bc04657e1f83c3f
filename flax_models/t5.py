"""T5's encoder (Raffel et al. 2020), 1.0 and 1.1, and UMT5's, which FLUX.1, SD 3 and others read.

Text is `[B, L]` token ids.  Positions enter as a learned bias of the attention logits alone, one
per head and bucket of distances, so that texts may be of any length.  Attribute paths are those of
transformers' state dicts.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from .configs import ModelConfig
from .layers.checks import check_axes
from .layers.embeddings import Dtype
from .layers.linear import linear
from .layers.remat import Remat, recomputed
from .pretrained import RecomputingModel


@dataclasses.dataclass(frozen=True)
class T5Config(ModelConfig):
    """Settings of `T5EncoderModel`; the defaults are transformers', at T5-small's size.

    `feed_forward_proj` is "relu" in T5 1.0 and "gated-gelu" in T5 1.1, whose GELU is the tanh
    approximation.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    MODEL_TYPE: ClassVar[str | None] = "t5"
    STRICT: ClassVar[bool] = False
    BIAS_PER_LAYER: ClassVar[bool] = False  # or that of the first layer in all of them

    def __post_init__(self):
        self.require_positive("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
        self.require_one_of("feed_forward_proj", ("relu", "gated-gelu"))
        buckets = self.relative_attention_num_buckets
        self.require(
            isinstance(buckets, int) and buckets >= 4 and buckets % 4 == 0,
            f"relative_attention_num_buckets must be a multiple of 4, received {buckets!r}.",
        )
        self.require(
            self.relative_attention_max_distance > buckets // 4,
            f"relative_attention_max_distance must be over {buckets // 4}, the distances with "
            f"buckets of their own, received {self.relative_attention_max_distance!r}.",
        )

    @classmethod
    def xxl(cls) -> "T5Config":
        """The published T5 1.1 XXL, which FLUX.1 and SD 3 read: 4,762,310,656 parameters."""
        return cls(
            d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
        )

    @classmethod
    def t5_11b(cls) -> "T5Config":
        """The published T5 1.0 of 11 billions, which Cosmos reads: 4,864,791,552 parameters."""
        return cls(d_model=1024, d_kv=128, d_ff=65536, num_layers=24, num_heads=128)


@dataclasses.dataclass(frozen=True)
class UMT5Config(T5Config):
    """Settings of `UMT5EncoderModel`; the defaults are transformers', at UMT5-small's size."""

    vocab_size: int = 250112
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    feed_forward_proj: str = "gated-gelu"

    MODEL_TYPE: ClassVar[str | None] = "umt5"
    BIAS_PER_LAYER: ClassVar[bool] = True

    @classmethod
    def xxl(cls) -> "UMT5Config":
        """The published UMT5-XXL, which Wan reads: 5,680,910,336 parameters."""
        return cls(vocab_size=256384, d_model=4096, d_ff=10240, num_layers=24, num_heads=64)


@functools.lru_cache(maxsize=16)
def relative_buckets(length: int, buckets: int, furthest: int) -> Int[np.ndarray, "L L"]:
    """The bucket of each key's distance from each query, [queries, keys].

    Half of them are for later keys. Of each half, the first half is for one distance each, the rest
    for ranges that grow logarithmically up to `furthest`, which the last one goes beyond.
    """
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    half, exact = buckets // 2, buckets // 4
    far = np.log(np.maximum(np.abs(distance), 1).astype(np.float32) / np.float32(exact))
    far = far / np.float32(math.log(furthest / exact)) * np.float32(half - exact)
    beyond = np.minimum(exact + far.astype(np.int32), half - 1)
    bucket = np.where(np.abs(distance) < exact, np.abs(distance), beyond)
    return (bucket + half * (distance > 0)).astype(np.int32)


class T5LayerNorm(nnx.RMSNorm):
    """Norm without a mean, in float32: what it is applied to may leave float16's range."""

    def __init__(self, config: T5Config, *, dtype: Dtype, **init):
        epsilon = config.layer_norm_epsilon
        super().__init__(config.d_model, epsilon=epsilon, dtype=jnp.float32, **init)
        self.result = dtype

    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        return super().__call__(x).astype(self.result)


class T5Attention(nnx.Module):
    """Self-attention without biases, whose logits are not scaled but biased by distance."""

    def __init__(self, config: T5Config, *, biased: bool, **init):
        width, inner = config.d_model, config.num_heads * config.d_kv
        unscaled = nnx.initializers.normal((width * config.d_kv) ** -0.5)
        self.heads = config.num_heads
        self.distances = config.relative_attention_max_distance
        self.q = linear(width, inner, use_bias=False, kernel_init=unscaled, **init)
        self.k = linear(width, inner, use_bias=False, **init)
        self.v = linear(width, inner, use_bias=False, **init)
        self.o = linear(inner, width, use_bias=False, **init)
        if biased:
            buckets = config.relative_attention_num_buckets
            self.relative_attention_bias = nnx.Embed(buckets, config.num_heads, **init)

    def bias(self, length: int) -> Float[Array, "H L L"]:
        """What is added to the logits of every text of that length."""
        table = self.relative_attention_bias
        bucket = relative_buckets(length, table.num_embeddings, self.distances)
        return table(jnp.asarray(bucket)).transpose(2, 0, 1)

    def __call__(
        self,
        x: Float[Array, "B L C"],
        mask: Bool[Array, "B 1 1 L"] | None,
        bias: Float[Array, "H L L"],
    ) -> Float[Array, "B L C"]:
        shape = (*x.shape[:2], self.heads, -1)
        query, key, value = (project(x).reshape(shape) for project in (self.q, self.k, self.v))
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        logits = logits + bias
        if mask is not None:
            logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
        attended = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return self.o(attended.reshape(*x.shape[:2], -1))


class T5LayerSelfAttention(nnx.Module):
    """Attention behind a norm, added to its input."""

    def __init__(self, config: T5Config, *, biased: bool, **init):
        self.SelfAttention = T5Attention(config, biased=biased, **init)
        self.layer_norm = T5LayerNorm(config, **init)

    def __call__(self, x: Array, mask: Array | None, bias: Array) -> Array:
        return x + self.SelfAttention(self.layer_norm(x), mask, bias)


class T5FeedForward(nnx.Module):
    """Perceptron without biases, gated or not.

    Its last product is in float32 where the others are in float16, whose range it would leave.
    """

    def __init__(self, config: T5Config, **init):
        wide = init | ({"dtype": jnp.float32} if init["dtype"] == jnp.float16 else {})
        sizes = {"in_features": config.d_model, "out_features": config.d_ff, "use_bias": False}
        if config.feed_forward_proj == "relu":
            self.wi = linear(**sizes, **init)
        else:
            self.wi_0 = linear(**sizes, **init)
            self.wi_1 = linear(**sizes, **init)
        self.wo = linear(config.d_ff, config.d_model, use_bias=False, **wide)

    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        if hasattr(self, "wi"):
            return self.wo(jax.nn.relu(self.wi(x)))
        return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class T5LayerFF(nnx.Module):
    """Perceptron behind a norm, added to its input."""

    def __init__(self, config: T5Config, **init):
        self.DenseReluDense = T5FeedForward(config, **init)
        self.layer_norm = T5LayerNorm(config, **init)

    def __call__(self, x: Array) -> Array:
        return x + self.DenseReluDense(self.layer_norm(x))


class T5Block(nnx.Module):
    """Attention, then perceptron; the logits' bias is its own, or that of the block before."""

    layer: Any  # a list of both

    def __init__(self, config: T5Config, *, biased: bool, **init):
        attention = T5LayerSelfAttention(config, biased=biased, **init)
        self.layer = nnx.List([attention, T5LayerFF(config, **init)])

    def __call__(
        self, x: Array, mask: Array | None, bias: Array | None
    ) -> tuple[Array, Array | None]:
        attends, perceives = self.layer
        if hasattr(attends.SelfAttention, "relative_attention_bias"):
            bias = attends.SelfAttention.bias(x.shape[1])
        return perceives(attends(x, mask, bias)), bias


class T5Stack(nnx.Module):
    """The stack of blocks and the last norm."""

    def __init__(self, config: T5Config, *, remat: Remat, **init):
        self.remat = remat
        self.block = nnx.List(
            [
                T5Block(config, biased=config.BIAS_PER_LAYER or index == 0, **init)
                for index in range(config.num_layers)
            ]
        )
        self.final_layer_norm = T5LayerNorm(config, **init)

    def __call__(self, x: Float[Array, "B L C"], mask: Array | None) -> Float[Array, "B L C"]:
        bias: Any = None
        for block in self.block:
            x, bias = recomputed(block.__call__, self.remat)(x, mask, bias)
        return self.final_layer_norm(x)


class T5EncoderModel(RecomputingModel):
    """T5's encoder."""

    BLOCKS: ClassVar[tuple[str, ...]] = ("encoder.block",)
    config: T5Config
    config_class = T5Config
    pytorch_class = "T5EncoderModel"
    pytorch_library = "transformers"
    pytorch_tied: ClassVar[Mapping[str, str]] = {"encoder.embed_tokens.weight": "shared.weight"}
    pytorch_ignored = ("decoder.*", "lm_head.weight")  # in files of the whole model

    def _build(self, config: T5Config, *, remat: Remat, **init):
        self.shared = nnx.Embed(config.vocab_size, config.d_model, **init)
        self.encoder = T5Stack(config, remat=remat, **init)

    def __call__(
        self,
        input_ids: Int[Array, "B L"],
        attention_mask: Bool[Array, "B L"] | Int[Array, "B L"] | None = None,
    ) -> Float[Array, "B L C"]:
        """Encode token ids: [B, L, d_model] after the last norm, in the computation dtype.

        Args:
          input_ids: [B, L] int32.
          attention_mask: [B, L], non-zero for tokens that may be attended to; FLUX.1 and SD 3
            attend to all, padding included, and pass none.
        """
        check_axes(input_ids, "B L", f"{type(self).__name__}'s input_ids")
        mask = None if attention_mask is None else (attention_mask != 0)[:, None, None, :]
        return self.encoder(self.shared(input_ids), mask)


class UMT5EncoderModel(T5EncoderModel):
    """UMT5's encoder (Chung et al. 2023): as T5's, with a bias of distances in every layer."""

    config: UMT5Config
    config_class = UMT5Config
    pytorch_class = "UMT5EncoderModel"
