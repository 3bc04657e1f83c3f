"""`SD3Transformer2DModel`: the rectified-flow transformer of Stable Diffusion 3 and 3.5.

(Esser et al. 2024, arXiv 2403.03206.)  Latents are `[B, H, W, C]`, which it cuts into patches by
itself.  Attribute paths are diffusers' state-dict keys.  Image and text attend jointly; what the
image sees of itself may be sparse, block by block (`GNA`), which changes no parameter.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from .configs import ModelConfig
from .dit_transformer_2d import axis_embedding
from .layers import slabs
from .layers.attention import GNA, Neighborhoods, per_layer
from .layers.embeddings import ConditionEmbedding
from .layers.joint_attention import (
    JointAttention,
    JointSequence,
    JointTextCondition,
    SelfProjections,
    check_inputs,
)
from .layers.linear import linear
from .layers.modulation import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    SD35AdaLayerNormZeroX,
    gated,
    plain_layer_norm,
    with_residual,
    zero_linear,
)
from .layers.remat import recomputed
from .layers.transformer import GELU, FeedForward
from .pretrained import AttendingModel, Buffer


@dataclasses.dataclass(frozen=True)
class SD3Transformer2DConfig(ModelConfig):
    """Settings of `SD3Transformer2DModel`; the defaults are diffusers'.

    `dual_attention_layers` are the blocks whose image attends to itself a second time, and
    `qk_norm` normalizes queries and keys, both new in SD 3.5. `pos_embed_max_size` is the number of
    tokens along each side of the table of positions, from whose middle an image takes its own.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self):
        self.require_positive("sample_size", "patch_size", "in_channels", "num_layers")
        self.require_positive("attention_head_dim", "num_attention_heads", "joint_attention_dim")
        self.require_positive("pooled_projection_dim", "pos_embed_max_size")
        if self.out_channels is not None:
            self.require_positive("out_channels")
        self.require_one_of("qk_norm", (None, "rms_norm"))
        self.require(
            self.features % 4 == 0,
            f"{self.num_attention_heads} heads of {self.attention_head_dim} are {self.features} "
            "features; positions need a multiple of 4.",
        )
        self.require(
            self.caption_projection_dim == self.features,
            f"caption_projection_dim {self.caption_projection_dim} must be the {self.features} "
            f"features of {self.num_attention_heads} heads of {self.attention_head_dim}.",
        )
        unknown = [i for i in self.dual_attention_layers if i not in range(self.num_layers)]
        self.require(
            not unknown,
            f"dual_attention_layers {unknown} are not among the {self.num_layers} layers.",
        )

    @property
    def features(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def _published(cls, heads: int, **settings: Any) -> "SD3Transformer2DConfig":
        return cls(
            num_layers=heads,
            num_attention_heads=heads,
            caption_projection_dim=64 * heads,
            **{"pos_embed_max_size": 192, **settings},
        )

    @classmethod
    def sd3_medium(cls) -> "SD3Transformer2DConfig":
        """The published Stable Diffusion 3 medium: 2,028,328,000 parameters."""
        return cls._published(24)

    @classmethod
    def sd3_5_medium(cls) -> "SD3Transformer2DConfig":
        """The published Stable Diffusion 3.5 medium: 2,243,171,520 parameters."""
        return cls._published(
            24,
            pos_embed_max_size=384,
            qk_norm="rms_norm",
            dual_attention_layers=tuple(range(13)),
        )

    @classmethod
    def sd3_5_large(cls) -> "SD3Transformer2DConfig":
        """The published Stable Diffusion 3.5 large: 8,056,627,520 parameters."""
        return cls._published(38, qk_norm="rms_norm")


class PatchEmbed(nnx.Module):
    """Patches as tokens, with positions from a table: [B, H, W, C] -> [B, h, w, D]."""

    def __init__(self, config: SD3Transformer2DConfig, **init):
        patch, side = (config.patch_size,) * 2, config.pos_embed_max_size
        self.side = side
        self.proj = nnx.Conv(
            config.in_channels, config.features, patch, strides=patch, padding="VALID", **init
        )
        one = jnp.asarray(
            axis_embedding(side, config.features // 2, config.sample_size // config.patch_size),
            init["param_dtype"],
        )
        shape = (side, side, config.features // 2)
        halves = [jnp.broadcast_to(one[None], shape), jnp.broadcast_to(one[:, None], shape)]
        self.pos_embed = Buffer(jnp.concatenate(halves, axis=-1).reshape(1, side * side, -1))

    def __call__(self, latents: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        tokens = self.proj(latents)
        grid = slabs.whole(tokens.shape[1:3])
        top, left = ((self.side - count) // 2 for count in grid)
        table = self.pos_embed[...].reshape(self.side, self.side, -1)
        positions = slabs.own(table[top : top + grid[0], left : left + grid[1]])
        return (tokens + positions).astype(tokens.dtype)


class SelfAttention(SelfProjections):
    """The second attention of a block, of the image alone."""

    def __init__(self, features: int, heads: int, neighborhood: GNA | None, **options):
        super().__init__(features, heads, **options)
        self.neighborhood = neighborhood
        init = {name: options[name] for name in ("dtype", "param_dtype", "rngs")}
        self.to_out = nnx.List([linear(features, features, **init)])

    def __call__(self, x: Float[Array, "B N D"], sequence: JointSequence) -> Float[Array, "B N D"]:
        attended = sequence.attend(*self.project(x), self.neighborhood)
        return self.to_out[0](attended.reshape(x.shape))


class JointTransformerBlock(nnx.Module):
    """Image and text attend jointly, each with parameters of its own.

    In a `dual` block the image attends to itself too; the `last` one needs no output of the text.
    """

    def __init__(
        self,
        config: SD3Transformer2DConfig,
        neighborhood: GNA | None,
        *,
        dual: bool,
        last: bool,
        **init,
    ):
        features = config.features
        attention = (features, config.num_attention_heads, neighborhood)
        normed = {"qk_norm": config.qk_norm is not None, **init}
        self.norm1 = (SD35AdaLayerNormZeroX if dual else AdaLayerNormZero)(features, **init)
        self.norm1_context = (AdaLayerNormContinuous if last else AdaLayerNormZero)(
            features, **init
        )
        self.attn = JointAttention(*attention, text_output=not last, **normed)
        if dual:
            self.attn2 = SelfAttention(*attention, **normed)
        self.norm2 = plain_layer_norm(features, **init)
        self.ff = FeedForward(features, GELU, **init)
        if not last:
            self.norm2_context = plain_layer_norm(features, **init)
            self.ff_context = FeedForward(features, GELU, **init)

    def __call__(
        self,
        image: Float[Array, "B N D"],
        text: Float[Array, "B A D"],
        condition: Float[Array, "B D"],
        sequence: JointSequence,
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B A D"]]:
        image_in, image_gate, image_perceptron, *second = self.norm1(image, condition)
        last = isinstance(self.norm1_context, AdaLayerNormContinuous)
        text_norm: Any = self.norm1_context(text, condition)
        text_in = text_norm if last else text_norm[0]
        seen_by_image, seen_by_text = self.attn(image_in, text_in, sequence)
        image = image + gated(image_gate, seen_by_image)
        if hasattr(self, "attn2"):
            second_in, second_gate = second
            image = image + gated(second_gate, self.attn2(second_in, sequence))
        image = with_residual(image, self.norm2, self.ff, *image_perceptron)
        if last:
            return image, text
        _, text_gate, text_perceptron = text_norm
        text = text + gated(text_gate, seen_by_text)
        text = with_residual(text, self.norm2_context, self.ff_context, *text_perceptron)
        return image, text


class SD3Transformer2DModel(AttendingModel):
    """Rectified-flow transformer: the velocity of latents, given a text.

    The setting of a block's `attention` is that of its second one too, where no text joins in.
    """

    BLOCKS: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    SPREADS: ClassVar[bool] = True
    config: SD3Transformer2DConfig
    config_class = SD3Transformer2DConfig
    pytorch_class = "SD3Transformer2DModel"
    pytorch_library = "diffusers"

    def _build(self, config: SD3Transformer2DConfig, attention: Neighborhoods, **init):
        features, layers = config.features, config.num_layers
        self.pos_embed = PatchEmbed(config, **init)
        self.time_text_embed = ConditionEmbedding(
            features, pooled_features=config.pooled_projection_dim, **init
        )
        self.context_embedder = linear(config.joint_attention_dim, features, **init)
        self.transformer_blocks = nnx.List(
            [
                JointTransformerBlock(
                    config,
                    setting,
                    dual=index in config.dual_attention_layers,
                    last=index == layers - 1,
                    **init,
                )
                for index, setting in enumerate(per_layer(attention, layers, "one per block"))
            ]
        )
        self.norm_out = AdaLayerNormContinuous(features, **init)
        self.proj_out = zero_linear(
            features, config.patch_size**2 * (config.out_channels or config.in_channels), **init
        )

    def __call__(
        self,
        latents: Float[Array, "B H W C"],
        timesteps: Num[Array, "*B"] | float | int,
        condition: JointTextCondition,
    ) -> Float[Array, "B H W O"]:
        """Predict the velocity, noise minus image.

        Args:
          latents: noisy latents [B, H, W, in_channels], H and W multiples of `patch_size`.
          timesteps: scalar or [B], in units of training timesteps, 0 to 1000.
          condition: states [B, A, joint_attention_dim] and pooled state [B, pooled_projection_dim]
            of the text.

        Returns:
          [B, H, W, out_channels] in the computation dtype.

        Raises:
          ValueError: inputs of another shape, more tokens than positions, a condition that lacks a
            part, or a window larger than the grid of tokens.
        """
        patch, most = self.config.patch_size, self.config.pos_embed_max_size
        check_inputs(self, latents, condition)
        batch, height, width, _ = latents.shape
        if height % patch or width % patch or max(slabs.whole((height, width))) > patch * most:
            raise ValueError(
                f"SD3Transformer2DModel takes latents whose sides are multiples of patch_size "
                f"{patch} and at most {patch * most}, its table of positions; received "
                f"{latents.shape}."
            )
        grid = (height // patch, width // patch)
        sequence = JointSequence(grid, text_first=False)
        timesteps = jnp.broadcast_to(jnp.asarray(timesteps), (batch,))
        embedded = self.time_text_embed(timesteps, pooled=condition.pooled)
        image = self.pos_embed(latents.astype(self.dtype)).reshape(batch, grid[0] * grid[1], -1)
        text = self.context_embedder(condition.states.astype(self.dtype))
        for block in self.transformer_blocks:
            run = recomputed(functools.partial(block.__call__, sequence=sequence), self.remat)
            image, text = run(image, text, embedded)
        x = self.proj_out(self.norm_out(image, embedded))  # [B, h*w, p*p*O]
        x = x.reshape(batch, *grid, patch, patch, -1)
        return x.swapaxes(2, 3).reshape(batch, height, width, -1)
