"""Joint attention of an image's and a text's tokens (MMDiT, Esser et al. 2024, section 4).

Both are one sequence, [B, L, D], in which a model puts the text before or behind the image, which
may be a video. The image's tokens lie on a grid, row by row: with `GNA` its queries see their
window and all of the text, while the text's queries see everything.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Shaped

from ...kernels.attention import dot_product_attention
from . import slabs
from .attention import GNA
from .checks import check_axes
from .linear import linear
from .rotary import Rotary, rotate_halves, rotate_pairs

Heads = Float[Array, "B L H D"]


class JointTextCondition(NamedTuple):
    """All that a transformer with joint attention is conditioned on beside the timestep.

    Attributes:
      states: [B, A, E] states of the text's tokens.
      pooled: [B, P] the text's pooled state, for models that take one.
      guidance: [B] strength of guidance as pipelines count it (3.5), for models distilled from it.
      mask: [B, A] the text that is there, before padding on its right, for models that take one;
        None is all of it.
    """

    states: Float[Array, "B A E"]
    pooled: Float[Array, "B P"] | None = None
    guidance: Float[Array, " B"] | None = None
    mask: Bool[Array, "B A"] | None = None


def _static(**options: Any) -> Any:
    return dataclasses.field(metadata={"static": True}, **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class JointSequence:
    """What the attentions of a forward pass share: where tokens lie, and how they are compared.

    Attributes:
      grid: rows and columns of the image's tokens, or frames, rows and columns of a video's, here
        those of one slab of them (`slabs`); the rest of a sequence is text, or none of it.
      text_first: whether the text comes before the image.
      rotary: angles of all tokens, in the sequence's order; None turns nothing.
      mask: [B, A] the text's tokens that are seen, by default all.
      scale: factor of the logits, by default D ** -0.5.
      halves: whether an angle turns a feature of a head's first half with that of the second half,
        or else two neighbors.
    """

    grid: tuple[int, ...] = _static()
    text_first: bool = _static(default=True)
    rotary: Rotary | None = None
    mask: Bool[Array, "B A"] | None = None
    scale: float | None = _static(default=None)
    halves: bool = _static(default=False)

    def join(self, image: Shaped[Array, "B N *X"], text: Shaped[Array, "B A *X"]) -> Array:
        """One sequence of the two."""
        return jnp.concatenate((text, image) if self.text_first else (image, text), axis=1)

    def split(self, x: Float[Array, "B L *X"]) -> tuple[Array, Array]:
        """The image's tokens and the text's."""
        image = math.prod(self.grid)
        text = x.shape[1] - image
        return (x[:, text:], x[:, :text]) if self.text_first else (x[:, :image], x[:, image:])

    def attend(self, query: Heads, key: Heads, value: Heads, neighborhood: GNA | None) -> Heads:
        """Attention of the sequence to itself.

        Args:
          query: [B, L, H, D], as are the others.
          key: what queries are compared with; both are turned by their positions first.
          value: what is averaged.
          neighborhood: what the image's queries see of the image; None is all of it.

        Raises:
          ValueError: the neighborhood does not fit the grid.
        """
        if self.rotary is not None:
            rotate = rotate_halves if self.halves else rotate_pairs
            query, key = (rotate(x, self.rotary) for x in (query, key))
        if neighborhood is None:
            shown = self.mask
            if slabs.count() > 1:
                key, value = map(self._of_all_slabs, (key, value))
            if shown is not None:
                image = jnp.ones((len(shown), math.prod(slabs.whole(self.grid))), bool)
                shown = self.join(image, shown)[:, None, None]
            return dot_product_attention(query, key, value, mask=shown, scale=self.scale)
        image, text = zip(*map(self.split, (query, key, value)), strict=True)
        if text[0].shape[1] == 0:
            on_grid = (x.reshape(x.shape[0], *self.grid, *x.shape[2:]) for x in image)
            return neighborhood(*on_grid, scale=self.scale).reshape(value.shape)
        options = {"grid": self.grid, "text_mask": self.mask, "scale": self.scale}
        return self.join(*neighborhood.joint(image, text, **options))

    def _of_all_slabs(self, x: Heads) -> Float[Array, "B K H D"]:
        image, text = self.split(x)
        return self.join(slabs.gathered(image), text)


def proportional_scale(setting: float | int | str | None, keys: int, dim: int) -> float | None:
    """The factor of the logits of an attention to `keys` tokens in heads of `dim` features.

    Args:
      setting: None for the usual D ** -0.5, a factor, or "proportional": sqrt(log_4608(keys) / D),
        which is the usual one for 64 x 64 tokens and 512 of text, and makes up for the flatter
        softmax over more (URAE, Yu et al. 2025, after Jin et al. 2023).
      keys: tokens of image and text.
      dim: features of a head.

    Raises:
      ValueError: another setting.
    """
    if setting is None:
        return None
    if setting == "proportional":
        return math.sqrt(math.log(keys) / math.log(4608) / dim)
    if isinstance(setting, str) or not setting > 0:
        raise ValueError(
            "attention_scale takes a positive number, 'proportional' or None; received "
            f"{setting!r}."
        )
    return float(setting)


def check_inputs(
    model: Any,
    latents: Array,
    condition: JointTextCondition,
    *,
    axes: str = "B h w C",
    text_features: int | None = None,
    masked: bool = False,
) -> None:
    """Raise ValueError unless latents and the text's states suit a model and each other.

    Args:
      model: whose config has `in_channels` and, unless told here, `joint_attention_dim`.
      latents: [B, h, w, in_channels], or of other axes.
      condition: of the same batch.
      axes: of the latents.
      text_features: of a token's state.
      masked: whether the model takes a mask of the text.
    """
    name, config = type(model).__name__, model.config
    check_axes(latents, axes, f"{name}'s latents")
    check_axes(condition.states, "B A E", f"{name}'s text states")
    if latents.shape[-1] != config.in_channels:
        shape = ", ".join([*axes.split()[:-1], str(config.in_channels)])
        raise ValueError(f"{name} takes [{shape}] latents, received {latents.shape}.")
    batch, words, features = condition.states.shape
    wanted = config.joint_attention_dim if text_features is None else text_features
    if (batch, features) != (len(latents), wanted):
        raise ValueError(
            f"{name} takes text states [{len(latents)}, A, {wanted}] for a "
            f"batch of {len(latents)}, received {condition.states.shape}."
        )
    if condition.mask is not None and not masked:
        raise ValueError(f"{name} reads padding as text, as it learnt to: pass no mask.")
    if condition.mask is not None and condition.mask.shape != (batch, words):
        raise ValueError(
            f"{name} takes a mask [{batch}, {words}] of the text's tokens, received "
            f"{condition.mask.shape}."
        )


def within_half(x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """float16 that overflowed becomes its largest number, as in diffusers; others are unchanged."""
    if x.dtype != jnp.float16:
        return x
    largest = float(jnp.finfo(jnp.float16).max)
    return jnp.clip(x, -largest, largest)


def in_heads(x: Float[Array, "B L C"], heads: int) -> Heads:
    """[B, L, H * D] -> [B, L, H, D]."""
    return x.reshape(*x.shape[:2], heads, -1)


class SelfProjections(nnx.Module):
    """Queries, keys and values of tokens, the first two normalized head by head.

    Args:
      features: width of a token.
      heads: parts of it that attend by themselves.
      context_features: width of the tokens that are attended to, where those are others.
      use_bias: of the projections.
      qk_norm: whether there are the norms.
      epsilon: of the norms.
      init: options of the layers.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        context_features: int | None = None,
        use_bias: bool = True,
        qk_norm: bool = True,
        epsilon: float = 1e-6,
        **init: Any,
    ):
        self.heads = heads
        attended = context_features or features
        self.to_q, self.to_k, self.to_v = (
            linear(width, features, use_bias=use_bias, **init)
            for width in (features, attended, attended)
        )
        if qk_norm:
            self.norm_q, self.norm_k = (
                nnx.RMSNorm(features // heads, epsilon=epsilon, **init) for _ in range(2)
            )

    def project(
        self, x: Float[Array, "B L C"], context: Float[Array, "B K E"] | None = None
    ) -> tuple[Heads, Float[Array, "B K H D"], Float[Array, "B K H D"]]:
        """Queries of the tokens, keys and values of the same or of those of a context."""
        context = x if context is None else context
        layers = ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        query, key, value = (in_heads(layer(tokens), self.heads) for layer, tokens in layers)
        if hasattr(self, "norm_q"):
            query, key = self.norm_q(query), self.norm_k(key)
        return query, key, value


class JointAttention(SelfProjections):
    """Image and text attend to both, each by projections and norms of its own.

    Args:
      features: width of a token, of either.
      heads: parts of it that attend by themselves.
      neighborhood: what the image's queries see of the image; None is all of it.
      text_output: whether the text goes on: what it attends to is projected only then.
      use_bias: of the projections.
      qk_norm: whether queries and keys are normalized.
      epsilon: of these norms.
      init: options of the layers.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        neighborhood: GNA | None,
        *,
        text_output: bool = True,
        use_bias: bool = True,
        qk_norm: bool = True,
        epsilon: float = 1e-6,
        **init: Any,
    ):
        super().__init__(
            features, heads, use_bias=use_bias, qk_norm=qk_norm, epsilon=epsilon, **init
        )
        self.neighborhood = neighborhood
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (
            linear(features, features, use_bias=use_bias, **init) for _ in range(3)
        )
        if qk_norm:
            self.norm_added_q, self.norm_added_k = (
                nnx.RMSNorm(features // heads, epsilon=epsilon, **init) for _ in range(2)
            )
        self.to_out = nnx.List([linear(features, features, use_bias=use_bias, **init)])
        if text_output:
            self.to_add_out = linear(features, features, use_bias=use_bias, **init)

    def project_text(self, text: Float[Array, "B A C"]) -> tuple[Heads, Heads, Heads]:
        """Query, key and value of the text's tokens."""
        query, key, value = (
            in_heads(layer(text), self.heads)
            for layer in (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        )
        if hasattr(self, "norm_added_q"):
            query, key = self.norm_added_q(query), self.norm_added_k(key)
        return query, key, value

    def __call__(
        self, image: Float[Array, "B N C"], text: Float[Array, "B A C"], sequence: JointSequence
    ) -> tuple[Float[Array, "B N C"], Float[Array, "B A C"]]:
        """What the image attends to, and what the text does."""
        parts = zip(self.project(image), self.project_text(text), strict=True)
        query, key, value = (sequence.join(*part) for part in parts)
        attended = sequence.attend(query, key, value, self.neighborhood)
        image, text = (x.reshape(*x.shape[:2], -1) for x in sequence.split(attended))
        return self.to_out[0](image), self.to_add_out(text) if hasattr(self, "to_add_out") else text
