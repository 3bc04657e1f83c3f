"""Blocks of transformers whose image and text attend jointly, and the way through them.

First come double blocks, in which image and text have parameters of their own, then single ones
over [text; image] or [image; text]. Those here are FLUX.1's and HunyuanVideo's.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .attention import GNA, Neighborhoods, per_layer
from .joint_attention import JointAttention, JointSequence, SelfProjections, within_half
from .linear import linear
from .modulation import (
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    gated,
    plain_layer_norm,
    with_residual,
)
from .remat import recomputed
from .transformer import GELU, FeedForward


class FluxTransformerBlock(nnx.Module):
    """Double block: image and text attend jointly, each with parameters of its own."""

    def __init__(self, features: int, heads: int, neighborhood: GNA | None, **init):
        self.norm1 = AdaLayerNormZero(features, **init)
        self.norm1_context = AdaLayerNormZero(features, **init)
        self.attn = JointAttention(features, heads, neighborhood, **init)
        self.norm2 = plain_layer_norm(features, **init)
        self.ff = FeedForward(features, GELU, **init)
        self.norm2_context = plain_layer_norm(features, **init)
        self.ff_context = FeedForward(features, GELU, **init)

    def __call__(
        self,
        image: Float[Array, "B N D"],
        text: Float[Array, "B A D"],
        condition: Float[Array, "B D"],
        sequence: JointSequence,
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B A D"]]:
        image_in, image_gate, image_perceptron = self.norm1(image, condition)
        text_in, text_gate, text_perceptron = self.norm1_context(text, condition)
        seen_by_image, seen_by_text = self.attn(image_in, text_in, sequence)
        image = image + gated(image_gate, seen_by_image)
        text = text + gated(text_gate, seen_by_text)
        image = with_residual(image, self.norm2, self.ff, *image_perceptron)
        text = with_residual(text, self.norm2_context, self.ff_context, *text_perceptron)
        return image, within_half(text)


class FluxSingleTransformerBlock(nnx.Module):
    """Single block: attention and perceptron side by side, the same for image and text."""

    def __init__(self, features: int, heads: int, neighborhood: GNA | None, **init):
        self.neighborhood = neighborhood
        self.norm = AdaLayerNormZeroSingle(features, **init)
        self.attn = SelfProjections(features, heads, **init)
        self.proj_mlp = linear(features, 4 * features, **init)
        self.proj_out = linear(5 * features, features, **init)

    def __call__(
        self, x: Float[Array, "B L D"], condition: Float[Array, "B D"], sequence: JointSequence
    ) -> Float[Array, "B L D"]:
        x_in, gate = self.norm(x, condition)
        attended = sequence.attend(*self.attn.project(x_in), self.neighborhood)
        hidden = jax.nn.gelu(self.proj_mlp(x_in), approximate=True)
        parts = jnp.concatenate([attended.reshape(x.shape), hidden], axis=-1)
        return within_half(x + gated(gate, self.proj_out(parts)))


def of_blocks(
    attention: Neighborhoods, double: int, single: int
) -> tuple[tuple[GNA | None, ...], tuple[GNA | None, ...]]:
    """The settings of so many double and single blocks, see `attention.per_layer`.

    Raises:
      ValueError: another number of settings, or something else than a setting.
    """
    order = f"one per block, the {double} double blocks before the single ones"
    settings = per_layer(attention, double + single, order)
    return settings[:double], settings[double:]


def through_blocks(
    model: Any,
    image: Float[Array, "B N D"],
    text: Float[Array, "B A D"],
    double: tuple[Any, ...],
    single: tuple[Any, ...],
    sequence: JointSequence,
) -> Float[Array, "B N D"]:
    """The image's tokens behind all blocks of a model.

    Args:
      model: with `transformer_blocks`, `single_transformer_blocks` and `remat`.
      image: its tokens.
      text: its tokens.
      double: what double blocks take beside image and text.
      single: what single blocks take beside the sequence.
      sequence: what all attentions share.
    """

    def run(block: nnx.Module, *args: Any) -> Any:
        return recomputed(functools.partial(block.__call__, sequence=sequence), model.remat)(*args)

    for block in model.transformer_blocks:
        image, text = run(block, image, text, *double)
    x = sequence.join(image, text)
    for block in model.single_transformer_blocks:
        x = run(block, x, *single)
    return sequence.split(x)[0]
