"""`FluxTransformer2DModel`: the rectified-flow transformer of FLUX.1 (Black Forest Labs 2024).

Latents are packed, `[B, h, w, 64]`: the 2 x 2 x 16 values that a token stands for, channels
slowest.  Attribute paths are diffusers' state-dict keys.  Image and text attend jointly; what the
image sees of itself may be sparse, block by block (`GNA`), which changes no parameter.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

from .configs import ModelConfig
from .layers import slabs
from .layers.attention import Neighborhoods
from .layers.embeddings import ConditionEmbedding, Dtype
from .layers.joint_attention import (
    JointSequence,
    JointTextCondition,
    check_inputs,
    proportional_scale,
)
from .layers.joint_blocks import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
    of_blocks,
    through_blocks,
)
from .layers.linear import linear
from .layers.modulation import AdaLayerNormContinuous, zero_linear
from .layers.remat import Remat
from .layers.rotary import Rotary, concatenate, rotary_table
from .pretrained import Pretrained

_THETA = 10000.0


@dataclasses.dataclass(frozen=True)
class FluxTransformer2DConfig(ModelConfig):
    """Settings of `FluxTransformer2DModel`; the defaults are diffusers', at FLUX.1's size.

    `num_layers` counts the double blocks, whose image and text have parameters of their own,
    `num_single_layers` the blocks behind them. `axes_dims_rope` splits a head's features among
    image index, row and column.

    Two more are for images larger than those of training, such as URAE's of 4096 x 4096 pixels;
    diffusers does not know them, and they are written where they are set. `ntk_factor` multiplies
    the base of the rotary embedding, so that more tokens than in training span the same angles
    (NTK-aware scaling). `attention_scale` is the factor of the attention's logits: None is
    attention_head_dim ** -0.5, and "proportional" grows with the number of tokens
    (`layers.joint_attention.proportional_scale`).
    """

    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    ntk_factor: float | int = 1.0
    attention_scale: float | int | str | None = None

    FIXED: ClassVar[Mapping[str, Any]] = {"patch_size": 1}

    def __post_init__(self):
        self.require_positive("in_channels", "num_layers", "num_single_layers")
        self.require_positive("attention_head_dim", "num_attention_heads", "joint_attention_dim")
        self.require_positive("pooled_projection_dim", "axes_dims_rope")
        if self.out_channels is not None:
            self.require_positive("out_channels")
        axes = self.axes_dims_rope
        self.require(
            len(axes) == 3 and not any(dim % 2 for dim in axes),
            f"axes_dims_rope takes three even numbers, received {axes!r}.",
        )
        self.require(
            sum(axes) == self.attention_head_dim,
            f"axes_dims_rope {axes!r} must add up to attention_head_dim {self.attention_head_dim}.",
        )
        self.require(
            0 < self.ntk_factor < math.inf,
            f"ntk_factor takes a positive number, received {self.ntk_factor!r}.",
        )
        proportional_scale(self.attention_scale, 1, self.attention_head_dim)

    def to_dict(self) -> dict[str, Any]:
        """The settings under their published names, diffusers' own and others that are set."""
        settings = super().to_dict()
        for name, usual in (("ntk_factor", 1), ("attention_scale", None)):
            if settings[name] == usual:
                del settings[name]
        return settings

    @property
    def features(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def dev(cls) -> "FluxTransformer2DConfig":
        """FLUX.1-dev: distilled from guidance, whose strength it takes."""
        return cls(guidance_embeds=True)

    @classmethod
    def schnell(cls) -> "FluxTransformer2DConfig":
        """FLUX.1-schnell: distilled to few steps, without guidance."""
        return cls()


def rotary_of(
    config: FluxTransformer2DConfig, grid: tuple[int, int], text: int, spacing: float = 1.0
) -> Rotary:
    """Angles of [text; image]: the text stays at (0, 0, 0), the image is at (0, row, column).

    A spacing below 1 puts more rows and columns into the same span, whose middle stays where it is:
    position interpolation (Chen et al. 2023, arXiv 2306.15595).
    """
    rows, columns = (spacing * (np.arange(each) + 0.5) - 0.5 for each in slabs.whole(grid))
    image = (np.zeros((1, 1)), rows[:, None], columns[None])
    settings = (config.axes_dims_rope, _THETA * config.ntk_factor)
    return concatenate(
        rotary_table((np.zeros(text),) * 3, *settings), slabs.own(rotary_table(image, *settings))
    )


class FluxTransformer2DModel(Pretrained, nnx.Module):
    """Rectified-flow transformer: the velocity of packed latents, given a text.

    Args:
      config: architecture.
      attention: `GNA` settings of what the image's queries see of the image: one for all blocks, or
        a sequence of one per block, the double blocks before the single ones, in which None is
        dense. None, the default, is dense everywhere. Every image query sees all of the text, and
        the text sees everything. Parameters are the same whatever it is.
      ntk_factor, attention_scale: in place of the config's.
      dtype: computation dtype; norms and softmax accumulate in float32.
      param_dtype: dtype of the parameters.
      remat: recompute each block's activations in the backward pass; or a policy
        of `layers.remat`.
      rngs: source of the initial parameters.

    Raises:
      ValueError: `attention` has another number of blocks than the config, or a factor is none.
    """

    BLOCKS: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")
    SPREADS: ClassVar[bool] = True
    config_class = FluxTransformer2DConfig
    pytorch_class = "FluxTransformer2DModel"
    pytorch_library = "diffusers"

    def __init__(
        self,
        config: FluxTransformer2DConfig,
        *,
        attention: Neighborhoods = None,
        ntk_factor: float | int | None = None,
        attention_scale: float | int | str | None = None,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        remat: Remat = False,
        rngs: nnx.Rngs,
    ):
        given = {"ntk_factor": ntk_factor, "attention_scale": attention_scale}
        given = {name: value for name, value in given.items() if value is not None}
        config = dataclasses.replace(config, **given)
        init = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        features, heads = config.features, config.num_attention_heads
        doubles, singles = of_blocks(attention, config.num_layers, config.num_single_layers)
        self.config, self.dtype, self.remat = config, dtype, remat
        self.time_text_embed = ConditionEmbedding(
            features,
            pooled_features=config.pooled_projection_dim,
            guidance=config.guidance_embeds,
            **init,
        )
        self.x_embedder = linear(config.in_channels, features, **init)
        self.context_embedder = linear(config.joint_attention_dim, features, **init)
        self.transformer_blocks = nnx.List(
            [FluxTransformerBlock(features, heads, setting, **init) for setting in doubles]
        )
        self.single_transformer_blocks = nnx.List(
            [FluxSingleTransformerBlock(features, heads, setting, **init) for setting in singles]
        )
        self.norm_out = AdaLayerNormContinuous(features, **init)
        self.proj_out = zero_linear(features, config.out_channels or config.in_channels, **init)

    def rotary(self, grid: tuple[int, int], text: int) -> Rotary:
        """Where the tokens are: `rotary_of` this model's config."""
        return rotary_of(self.config, grid, text)

    def __call__(
        self,
        latents: Float[Array, "B h w C"],
        timesteps: Num[Array, "*B"] | float | int,
        condition: JointTextCondition,
    ) -> Float[Array, "B h w O"]:
        """Predict the velocity, noise minus image.

        Args:
          latents: noisy packed latents [B, h, w, in_channels], on h x w tokens of 16 x 16 pixels.
          timesteps: scalar or [B], in units of training timesteps, 0 to 1000.
          condition: states [B, A, joint_attention_dim] and pooled state [B, pooled_projection_dim]
            of the text; with `guidance_embeds` also the guidance [B].

        Returns:
          [B, h, w, out_channels] in the computation dtype.

        Raises:
          ValueError: inputs of another shape, a condition that lacks a part, or a window larger
            than the grid of tokens.
        """
        config = self.config
        check_inputs(self, latents, condition)
        batch, height, width, _ = latents.shape
        tokens, text_tokens = height * width, condition.states.shape[1]
        rotary = self.rotary((height, width), text_tokens)
        keys, dim = tokens * slabs.count() + text_tokens, config.attention_head_dim
        scale = proportional_scale(config.attention_scale, keys, dim)
        sequence = JointSequence((height, width), rotary=rotary, scale=scale)
        timesteps = jnp.broadcast_to(jnp.asarray(timesteps), (batch,))
        embedded = self.time_text_embed(timesteps, condition.guidance, condition.pooled)
        image = self.x_embedder(latents.astype(self.dtype)).reshape(batch, tokens, -1)
        text = self.context_embedder(condition.states.astype(self.dtype))
        image = through_blocks(self, image, text, (embedded,), (embedded,), sequence)
        return self.proj_out(self.norm_out(image, embedded)).reshape(batch, height, width, -1)
