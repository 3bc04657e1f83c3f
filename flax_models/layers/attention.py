"""Multi-head attention, heads second-to-last: `[B, L, H, D]`."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ...kernels.attention import attention_with_lse, dot_product_attention
from ...kernels.gna import (
    context_parallel_attention,
    joint_neighborhood_attention,
    merge_attentions,
    neighborhood_attention,
)
from ...kernels.gna.presets import Preset, attention_preset
from ...kernels.gna.problem import PerDimension, nearest_layout, windows_of
from . import slabs
from .linear import linear


class Attention(nnx.Module):
    """Self- or cross-attention over `[B, L, C]`, with diffusers' parameter names."""

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        context_features: int | None = None,
        use_bias: bool = False,
        **init,
    ):
        if features % heads:
            raise ValueError(f"Attention: {features} features do not divide into {heads} heads.")
        context_features = context_features or features
        self.heads = heads
        self.to_q = linear(features, features, use_bias=use_bias, **init)
        self.to_k = linear(context_features, features, use_bias=use_bias, **init)
        self.to_v = linear(context_features, features, use_bias=use_bias, **init)
        self.to_out = nnx.List([linear(features, features, **init)])

    def __call__(
        self,
        x: Float[Array, "B L C"],
        context: Float[Array, "B K E"] | None = None,
        *,
        mask: Bool[Array, "#B #H #L K"] | None = None,
    ) -> Float[Array, "B L C"]:
        """Attend to the context, or to itself; `mask` is that of `dot_product_attention`."""
        context = x if context is None else context
        heads = (self.heads, -1)
        query = self.to_q(x).reshape(*x.shape[:2], *heads)  # [B, L, H, D]
        key = self.to_k(context).reshape(*context.shape[:2], *heads)
        value = self.to_v(context).reshape(*context.shape[:2], *heads)
        attended = dot_product_attention(query, key, value, mask=mask)
        return self.to_out[0](attended.reshape(x.shape))


@dataclasses.dataclass(frozen=True)
class GNA:
    """Generalized Neighborhood Attention (arXiv 2504.16922) over a grid of tokens.

    It has no parameters: it takes the place of a dense self-attention with the same projections.
    Each setting is an integer for all dimensions of the grid, or one per dimension, rows first, of
    videos frames before them.

    Attributes:
      window: tokens that a query sees along each dimension, itself in the middle where the borders
        allow; None among them is all of a dimension, and the whole grid is dense attention.
      stride: neighboring queries that share a window, at most `window`. A multiple of a kernel's
        tiles skips most work; 1 is a sliding window.
      dilation: distance between the tokens of a window.
      implementation: a backend of `kernels.gna` by name; None takes the best one for the device.
    """

    window: PerDimension
    stride: PerDimension = 1
    dilation: PerDimension = 1
    implementation: str | None = None

    def __post_init__(self):
        for name in ("window", "stride", "dilation"):
            if isinstance(value := getattr(self, name), list):  # settings are hashed
                object.__setattr__(self, name, tuple(value))

    def require_fit(self, layout: tuple[int, ...]) -> None:
        """Raise ValueError unless the settings suit a grid of `layout` tokens."""
        names = {"kernel_size": "window"}
        others = self.stride, self.dilation
        try:
            windows_of(layout, self.window, *others, names=names)
        except ValueError as error:
            nearest = nearest_layout(layout, self.window, *others)
            remedy = f"; the nearest grid that it fits is {_by(nearest)}." if nearest else ""
            given = ", ".join(
                f"{field.name}={getattr(self, field.name)!r}"
                for field in dataclasses.fields(self)
                if getattr(self, field.name) != field.default
            )
            reason = str(error)[:-1] + remedy if remedy else error
            raise ValueError(
                f"GNA({given}) does not fit a grid of {_by(layout)} tokens: {reason}"
            ) from error

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "kernel_size": self.window,
            "stride": self.stride,
            "dilation": self.dilation,
            "implementation": self.implementation,
        }

    def __call__(
        self,
        query: Float[Array, "B *X H D"],
        key: Float[Array, "B *X H D"],
        value: Float[Array, "B *X H D"],
        *,
        scale: float | None = None,
    ) -> Float[Array, "B *X H D"]:
        """Attend; all three in one dtype: float32, bfloat16 or float16.

        Args:
          query: of the tokens on their grid X, as are the others.
          key: what queries are compared with.
          value: what is averaged.
          scale: factor of the logits, by default D ** -0.5.

        Raises:
          ValueError: the settings do not fit the grid X.
        """
        self.require_fit(slabs.whole(query.shape[1:-2]))
        return self._attend(query, key, value, scale=scale)

    def _attend(self, *operands: Array, **options: Any) -> Any:
        """Of tokens on their grid, or of a slab of them on its part of it."""
        if slabs.count() == 1:
            return neighborhood_attention(*operands, **options, **self._settings)
        options |= {"axis_name": slabs.AXIS, **self._settings}
        return context_parallel_attention(*operands, **options)

    def joint(
        self,
        image: tuple[Float[Array, "B N H D"], ...],
        text: tuple[Float[Array, "B A H D"], ...],
        *,
        grid: tuple[int, ...],
        text_mask: Bool[Array, "B A"] | None = None,
        scale: float | None = None,
    ) -> tuple[Float[Array, "B N H D"], Float[Array, "B A H D"]]:
        """Image queries see their window and all of the text; text queries see everything.

        Args:
          image: query, key and value of the image's tokens, row by row.
          text: those of the text.
          grid: the image's tokens along each dimension; their product is N.
          text_mask: the tokens of the text that are there; the others are seen by none.
          scale: factor of the logits, by default D ** -0.5.

        Returns:
          What the image's and the text's queries attend to.

        Raises:
          ValueError: the settings do not fit the grid.
        """
        self.require_fit(slabs.whole(grid))
        (query, key, value), (text_query, *of_text) = image, text
        if text_mask is None and slabs.count() == 1:
            return joint_neighborhood_attention(
                (query, key, value),
                (text_query, of_text[0], of_text[1]),
                token_layout=grid,
                scale=scale,
                **self._settings,
            )
        # Image and text apart: keys of the one are on several devices, some of the other hidden.
        shown = None if text_mask is None else text_mask[:, None, None]
        on_grid = (x.reshape(x.shape[0], *grid, *x.shape[2:]) for x in image)
        near, lse = self._attend(*on_grid, scale=scale, return_lse=True)
        near = near.reshape(value.shape), lse.reshape(value.shape[:-1])
        of_image = slabs.merged(*attention_with_lse(text_query, key, value, scale=scale))
        image_said, text_said = (
            attention_with_lse(each, *of_text, mask=shown, scale=scale)
            for each in (query, text_query)
        )
        pairs = ((near, image_said), (of_image, text_said))
        image_out, text_out = (merge_attentions(*zip(*pair, strict=True))[0] for pair in pairs)
        return image_out, text_out


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


# GNA, a sequence of GNA and None, None, or a preset or its text (`kernels.gna.presets`); anything
# else is refused by name in `per_layer`.
Neighborhoods: TypeAlias = Any


def with_attention(model: Any, attention: Neighborhoods) -> Any:
    """A transformer with the same parameters and another attention, as its class takes it.

    Raises:
      ValueError: a model that has no choice, or another number of settings than its layers.
    """
    copy = nnx.merge(*nnx.split(model))
    found: dict[Any, list[Any]] = {}  # (list, index of a layer) -> what attends in it
    for path, node in nnx.iter_graph(copy):
        if hasattr(node, "neighborhood"):
            found.setdefault(path[:2], []).append(node)
    if not found:
        raise ValueError(
            f"a {type(model).__name__} has no choice of attention: neighborhoods are for "
            "transformers."
        )
    order = list(vars(copy))  # lists of layers run in the order in which they are made
    layers = sorted(found, key=lambda path: (order.index(path[0]), path[1]))
    for layer, setting in zip(layers, per_layer(attention, len(layers)), strict=True):
        for node in found[layer]:
            node.neighborhood = setting
    return copy


def per_layer(
    attention: Neighborhoods, layers: int, order: str = "one per layer"
) -> tuple[GNA | None, ...]:
    """The setting of each of a model's attentions.

    Args:
      attention: one setting for all, `GNA` or None (dense), or a sequence of them; or a preset, or
        what `attention_preset` reads: "hunyuan", or "window=16x8x8 stride=4x4x4".
      layers: attentions of the model.
      order: what a sequence's entries are for, for the message.

    Raises:
      ValueError: another number of settings, or something else than a setting.
    """
    if isinstance(attention, str):
        attention = attention_preset(attention)
    if isinstance(attention, Preset):
        each = [
            one if one is None else GNA(one.window, one.stride, one.dilation)
            for one in attention.layers or (attention,)
        ]
        attention = each if attention.layers else each[0]
    one_each = isinstance(attention, Sequence)
    settings = tuple(attention) if one_each else (attention,) * layers
    if len(settings) != layers:
        raise ValueError(
            f"attention takes one setting for all layers or {layers}, {order}; received "
            f"{len(settings)}."
        )
    for index, setting in enumerate(settings):
        if not (setting is None or isinstance(setting, GNA)):
            raise ValueError(
                f"attention takes GNA(...), or None for dense attention; received {setting!r} for "
                f"layer {index}."
            )
    return settings


class MultiheadAttention(nnx.Module):
    """Multi-head attention over `[B, L, C]` with torch.nn.MultiheadAttention's parameters.

    The three input projections are stacked, in torch's layout [3 C, C].
    """

    def __init__(self, features: int, heads: int, **init):
        if features % heads:
            raise ValueError(
                f"MultiheadAttention: {features} features do not divide into {heads} heads."
            )
        rngs, param_dtype = init["rngs"], init["param_dtype"]
        xavier = nnx.initializers.xavier_uniform()
        self.heads = heads
        self.in_proj_weight = nnx.Param(
            xavier(rngs.params(), (3 * features, features), param_dtype)
        )
        self.in_proj_bias = nnx.Param(jnp.zeros((3 * features,), param_dtype))
        self.out_proj = linear(features, features, kernel_init=xavier, **init)

    def __call__(
        self,
        query: Float[Array, "B Q C"],
        key: Float[Array, "B K C"],
        value: Float[Array, "B K C"],
        *,
        mask: Bool[Array, "#B #H #Q K"] | None = None,
        is_causal: bool = False,
    ) -> Float[Array, "B Q C"]:
        """Attend; `mask` and `is_causal` are those of `dot_product_attention`."""
        dtype = self.out_proj.dtype or query.dtype
        weights = jnp.split(self.in_proj_weight[...].astype(dtype), 3)
        biases = jnp.split(self.in_proj_bias[...].astype(dtype), 3)
        parts = [
            (x.astype(dtype) @ weight.T + bias).reshape(*x.shape[:2], self.heads, -1)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        ]
        attended = dot_product_attention(*parts, mask=mask, is_causal=is_causal)
        return self.out_proj(attended.reshape(query.shape))
