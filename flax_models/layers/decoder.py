"""Causal language models as text encoders, read before their end: Llama's and Qwen3's layers.

Text is `[B, L]` token ids, padded on the right.  Only the layers up to the last one that is read
are built; the others travel with a checkpoint, unread, so that its folder can be written again.
Attribute paths are those of transformers' state dicts.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..configs import ModelConfig
from ..pretrained import Pretrained
from .attention import dot_product_attention
from .checks import check_axes
from .embeddings import Dtype
from .linear import linear
from .remat import Remat, recomputed
from .rotary import Rotary, rotary_table, rotate_halves

Config = TypeVar("Config", bound="DecoderConfig")


@dataclasses.dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """Settings that both have; the defaults are transformers' for Llama.

    `num_key_value_heads` of keys and values are shared by as many groups of query heads; 0, the
    default, is one for each. `head_dim` 0 splits the width among the heads.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0
    head_dim: int = 0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4
    attention_bias: bool = False

    STRICT: ClassVar[bool] = False
    FIXED: ClassVar[Mapping[str, Any]] = {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "rope_scaling": None,
    }

    def __post_init__(self):
        self.require_positive("vocab_size", "hidden_size", "intermediate_size")
        self.require_positive("num_hidden_layers", "num_attention_heads")
        heads = self.num_attention_heads
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // heads)
        self.require_positive("num_key_value_heads", "head_dim")
        self.require(
            heads % self.num_key_value_heads == 0,
            f"{heads} heads do not divide into groups for "
            f"{self.num_key_value_heads} heads of keys and values.",
        )
        self.require(
            self.head_dim % 2 == 0,
            f"head_dim must be even, received {self.head_dim}: its halves "
            "are turned against each other.",
        )

    @classmethod
    def from_dict(cls: type[Config], raw: Mapping[str, Any]) -> Config:
        """Read a parsed `config.json`, of transformers 4 or 5, which name the rotation's settings
        differently."""
        rotation = raw.get("rope_parameters") or {}
        kind, theta = rotation.get("rope_type", "default"), rotation.get("rope_theta")
        if kind != "default":
            raise ValueError(
                f"{cls.__name__} cannot represent these settings: rope_type={kind!r} (supported: "
                "'default')."
            )
        unset = ("num_key_value_heads", "head_dim")
        told = {k: v for k, v in raw.items() if not (k in unset and v is None)}
        return super().from_dict(told if theta is None else {**told, "rope_theta": theta})

    def to_dict(self) -> dict[str, Any]:
        rotation = {"rope_type": "default", "rope_theta": self.rope_theta}
        return {**super().to_dict(), "rope_parameters": rotation}


def _rms_norm(features: int, config: DecoderConfig, **init) -> nnx.RMSNorm:
    return nnx.RMSNorm(features, epsilon=config.rms_norm_eps, **init)


class DecoderAttention(nnx.Module):
    """Causal self-attention with grouped queries, turned and, of some, normalized head by head."""

    def __init__(self, config: DecoderConfig, *, qk_norm: bool, **init):
        width, dim = config.hidden_size, config.head_dim
        inner, shared = config.num_attention_heads * dim, config.num_key_value_heads * dim
        project = functools.partial(linear, use_bias=config.attention_bias, **init)
        self.dim = dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = project(width, inner)
        self.k_proj = project(width, shared)
        self.v_proj = project(width, shared)
        self.o_proj = project(inner, width)
        if qk_norm:
            self.q_norm, self.k_norm = (_rms_norm(dim, config, **init) for _ in range(2))

    def __call__(
        self, x: Float[Array, "B L C"], mask: Bool[Array, "B 1 1 L"] | None, rotary: Rotary
    ) -> Float[Array, "B L C"]:
        query, key, value = (
            project(x).reshape(*x.shape[:2], -1, self.dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = (rotate_halves(each, rotary) for each in (query, key))
        key, value = (jnp.repeat(each, self.groups, axis=2) for each in (key, value))
        attended = dot_product_attention(query, key, value, mask=mask, is_causal=True)
        return self.o_proj(attended.reshape(*x.shape[:2], -1))


class DecoderMLP(nnx.Module):
    """Perceptron gated by a SiLU (Shazeer 2020), without biases."""

    def __init__(self, config: DecoderConfig, **init):
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(width, hidden, use_bias=False, **init)
        self.up_proj = linear(width, hidden, use_bias=False, **init)
        self.down_proj = linear(hidden, width, use_bias=False, **init)

    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: DecoderConfig, *, qk_norm: bool, **init):
        self.self_attn = DecoderAttention(config, qk_norm=qk_norm, **init)
        self.mlp = DecoderMLP(config, **init)
        self.input_layernorm = _rms_norm(config.hidden_size, config, **init)
        self.post_attention_layernorm = _rms_norm(config.hidden_size, config, **init)

    def __call__(self, x: Array, mask: Array | None, rotary: Rotary) -> Array:
        x = x + self.self_attn(self.input_layernorm(x), mask, rotary)
        return x + self.mlp(self.post_attention_layernorm(x))


class DecoderModel(Pretrained, nnx.Module):
    """A language model up to the last hidden states that are read.

    Args:
      config: architecture, of the whole model.
      read: which hidden states: n is what layer n puts out, 0 the embeddings, and the number of
        layers the last ones behind the final norm; negative ones count from there, -1 the last.
        None is what the class is read for, `READ`.
      dtype: computation dtype; norms, rotations and softmax compute in float32.
      param_dtype: dtype of the parameters.
      remat: recompute each layer's activations in the backward pass; or a policy
        of `layers.remat`.
      rngs: source of the initial parameters.

    Raises:
      ValueError: `read` names no hidden states of the config.
    """

    BLOCKS: ClassVar[tuple[str, ...]] = ("layers",)
    QK_NORM: ClassVar[bool] = False
    READ: ClassVar[tuple[int, ...]]
    config_class: ClassVar[Any]
    pytorch_class: ClassVar[str]
    pytorch_library = "transformers"

    def __init__(
        self,
        config: Any,
        *,
        read: Sequence[int] | None = None,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        remat: Remat = False,
        rngs: nnx.Rngs,
    ):
        last = config.num_hidden_layers
        read = self.READ if read is None else tuple(read)
        if not read or not all(
            isinstance(each, int) and -last - 1 <= each <= last for each in read
        ):
            raise ValueError(
                f"read takes numbers of hidden states from 0 to {last}, the model's layers, or "
                f"negative ones from its end; received {read}."
            )
        init = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config, self.dtype, self.remat = config, dtype, remat
        self.read = tuple(each % (last + 1) for each in read)
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, **init)
        self.layers = nnx.List(
            [DecoderLayer(config, qk_norm=self.QK_NORM, **init) for _ in range(max(self.read))]
        )
        if max(self.read) == last:
            self.norm = _rms_norm(config.hidden_size, config, **init)

    @property
    def pytorch_unread(self) -> tuple[str, ...]:
        """Patterns of the keys of what a checkpoint holds beyond the states that are read."""
        later = range(len(self.layers), self.config.num_hidden_layers)
        norm = () if hasattr(self, "norm") else ("norm.weight",)
        return (*(f"layers.{index}.*" for index in later), *norm, "lm_head.weight")

    def __call__(
        self,
        input_ids: Int[Array, "B L"],
        attention_mask: Bool[Array, "B L"] | Int[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L C"], ...]:
        """The hidden states of `read`, in its order, each [B, L, hidden_size].

        Args:
          input_ids: [B, L] int32.
          attention_mask: [B, L], non-zero for tokens that may be attended to.
        """
        check_axes(input_ids, "B L", f"{type(self).__name__}'s input_ids")
        mask = None if attention_mask is None else (attention_mask != 0)[:, None, None, :]
        dim, places = self.config.head_dim, np.arange(input_ids.shape[1])
        rotary = rotary_table((places,), (dim,), self.config.rope_theta, dtype=np.float32)
        x = self.embed_tokens(input_ids)
        states = [x]
        for layer in self.layers:
            x = recomputed(layer.__call__, self.remat)(x, mask, rotary)
            states.append(x)
        if hasattr(self, "norm"):
            states[-1] = self.norm(x)
        return tuple(states[index] for index in self.read)
