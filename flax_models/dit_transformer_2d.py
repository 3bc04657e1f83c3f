"""`DiTTransformer2DModel`: the class-conditional diffusion transformer (Peebles & Xie 2023).

Latents are `[B, H, W, C]`, tokens stay on their grid, `[B, h, w, D]`.  Attribute paths are
diffusers' state-dict keys.  Self-attention may be sparse, layer by layer (`GNA`): that changes no
parameter, so a checkpoint of the dense model loads and runs.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from .configs import ModelConfig
from .layers import modulation
from .layers.attention import GNA, Attention, Neighborhoods, per_layer
from .layers.checks import check_axes
from .layers.embeddings import TimestepEmbedding, sinusoidal_embedding
from .layers.modulation import gated, modulate, plain_layer_norm, with_residual, zero_linear
from .layers.remat import recomputed
from .layers.transformer import GELU, FeedForward, layer_norm
from .pretrained import AttendingModel

_TIME_FEATURES = 256  # sinusoidal features of the timestep, for every size of model
# What the class of the first published DiT folders, `Transformer2DModel`, could do beside.
_TRANSFORMER_2D: Mapping[str, Any] = {
    "attention_type": "default",
    "caption_channels": None,
    "cross_attention_dim": None,
    "double_self_attention": False,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": False,
}


@dataclasses.dataclass(frozen=True)
class DiTTransformer2DConfig(ModelConfig):
    """Settings of `DiTTransformer2DModel`; the defaults are diffusers', at DiT-XL/2's size.

    `num_embeds_ada_norm` is the number of classes; one more embedding, `null_class`, stands for
    none of them and serves classifier-free guidance.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    num_embeds_ada_norm: int = 1000
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-5

    FIXED: ClassVar[Mapping[str, Any]] = {
        "activation_fn": "gelu-approximate",
        "dropout": 0.0,
        "norm_type": "ada_norm_zero",
        **_TRANSFORMER_2D,
    }
    INERT: ClassVar[frozenset[str]] = frozenset({"norm_num_groups", "upcast_attention"})

    def __post_init__(self):
        self.require_positive("num_attention_heads", "attention_head_dim", "in_channels")
        self.require_positive("num_layers", "sample_size", "patch_size", "num_embeds_ada_norm")
        if self.out_channels is not None:
            self.require_positive("out_channels")
        self.require(
            self.features % 4 == 0,
            f"{self.num_attention_heads} heads of {self.attention_head_dim} are {self.features} "
            "features; positions need a multiple of 4.",
        )
        self.require(
            self.sample_size % self.patch_size == 0,
            f"sample_size {self.sample_size} is not a multiple of patch_size {self.patch_size}.",
        )

    @property
    def features(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def null_class(self) -> int:
        """The class label that stands for no class."""
        return self.num_embeds_ada_norm

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().to_dict().items() if k not in _TRANSFORMER_2D}

    @classmethod
    def xl_2(cls, sample_size: int = 32) -> "DiTTransformer2DConfig":
        """The published DiT-XL/2: `sample_size` 32 for images of 256 pixels, 64 for 512.

        Its 8 output channels are the noise and, behind it, the interpolation of the variance.
        """
        return cls(sample_size=sample_size, out_channels=8)


def axis_embedding(count: int, dim: int, base: int) -> Float[np.ndarray, "count dim"]:
    """Sines, then cosines, of `count` positions along one axis, `dim` features together; float32.

    Args:
      count: of positions.
      dim: features, an even number.
      base: positions at the size of training, to which others are stretched.
    """
    frequencies = 10000.0 ** -(np.arange(dim // 2) / (dim / 2))
    positions = np.arange(count, dtype=np.float32) / np.float32(count / base)
    angles = positions.astype(np.float64)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


@functools.lru_cache(maxsize=16)
def position_embedding(
    layout: tuple[int, int], dim: int, base: int
) -> Float[np.ndarray, "h w dim"]:
    """Fixed sine-cosine positions: `dim / 2` features of the column, then as many of the row.

    Args:
      layout: rows and columns of tokens.
      dim: features, a multiple of 4.
      base: tokens along each side at the size of training; other sizes are stretched to it.
    """
    rows, columns = (axis_embedding(count, dim // 2, base) for count in layout)
    shape = (*layout, dim // 2)
    halves = [np.broadcast_to(columns[None], shape), np.broadcast_to(rows[:, None], shape)]
    return np.concatenate(halves, axis=-1)


class PatchEmbed(nnx.Module):
    """Patches as tokens, with their positions: [B, H, W, C] -> [B, h, w, D]."""

    def __init__(self, config: DiTTransformer2DConfig, **init):
        patch = (config.patch_size,) * 2
        self.base = config.sample_size // config.patch_size
        self.proj = nnx.Conv(
            config.in_channels, config.features, patch, strides=patch, padding="VALID", **init
        )

    def __call__(self, latents: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        tokens = self.proj(latents)
        positions = position_embedding(tokens.shape[1:3], tokens.shape[3], self.base)
        return (tokens + positions).astype(tokens.dtype)


class LabelEmbedding(nnx.Module):
    """One vector per class and one for no class."""

    def __init__(self, classes: int, features: int, **init):
        self.embedding_table = nnx.Embed(classes + 1, features, **init)


class CombinedTimestepLabelEmbeddings(nnx.Module):
    """What a layer is told: timestep plus class, [B, D]."""

    def __init__(self, config: DiTTransformer2DConfig, **init):
        self.timestep_embedder = TimestepEmbedding(_TIME_FEATURES, config.features, **init)
        self.class_embedder = LabelEmbedding(config.num_embeds_ada_norm, config.features, **init)

    def __call__(
        self, time: Float[Array, "B T"], class_labels: Int[Array, " B"]
    ) -> Float[Array, "B D"]:
        return self.timestep_embedder(time) + self.class_embedder.embedding_table(class_labels)


class AdaLayerNormZero(modulation.AdaLayerNormZero):
    """Each layer embeds timestep and class by itself and regresses from them its modulations."""

    def __init__(self, config: DiTTransformer2DConfig, **init):
        self.emb = CombinedTimestepLabelEmbeddings(config, **init)
        super().__init__(config.features, **init)


class SelfAttention(Attention):
    """Self-attention over a grid of tokens: dense, or within neighborhoods."""

    def __init__(self, config: DiTTransformer2DConfig, neighborhood: GNA | None, **init):
        super().__init__(
            config.features, config.num_attention_heads, use_bias=config.attention_bias, **init
        )
        self.neighborhood = neighborhood

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        if self.neighborhood is None:
            return super().__call__(x.reshape(x.shape[0], -1, x.shape[-1])).reshape(x.shape)
        query, key, value = (
            project(x).reshape(*x.shape[:3], self.heads, -1)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out[0](self.neighborhood(query, key, value).reshape(x.shape))


class BasicTransformerBlock(nnx.Module):
    """Self-attention and perceptron, each normalized, modulated and gated by the condition."""

    def __init__(self, config: DiTTransformer2DConfig, neighborhood: GNA | None, **init):
        self.norm1 = AdaLayerNormZero(config, **init)
        self.attn1 = SelfAttention(config, neighborhood, **init)
        norm = layer_norm if config.norm_elementwise_affine else plain_layer_norm
        self.norm3 = norm(config.features, config.norm_eps, **init)
        self.ff = FeedForward(config.features, GELU, **init)

    def __call__(
        self, x: Float[Array, "B h w D"], time: Float[Array, "B T"], class_labels: Int[Array, " B"]
    ) -> Float[Array, "B h w D"]:
        x_in, gate, perceptron = self.norm1(x, self.norm1.emb(time, class_labels))
        x = x + gated(gate, self.attn1(x_in))
        return with_residual(x, self.norm3, self.ff, *perceptron)


class DiTTransformer2DModel(AttendingModel):
    """Class-conditional diffusion transformer."""

    config: DiTTransformer2DConfig
    config_class = DiTTransformer2DConfig
    pytorch_class = "DiTTransformer2DModel"
    pytorch_library = "diffusers"

    def _build(self, config: DiTTransformer2DConfig, attention: Neighborhoods, **init):
        features = config.features
        self.pos_embed = PatchEmbed(config, **init)
        self.transformer_blocks = nnx.List(
            [
                BasicTransformerBlock(config, setting, **init)
                for setting in per_layer(attention, config.num_layers)
            ]
        )
        self.norm_out = plain_layer_norm(features, **init)
        self.proj_out_1 = zero_linear(features, 2 * features, **init)
        self.proj_out_2 = zero_linear(
            features, config.patch_size**2 * (config.out_channels or config.in_channels), **init
        )

    def __call__(
        self,
        latents: Float[Array, "B H W C"],
        timesteps: Num[Array, "*B"] | float | int,
        class_labels: Int[Array, " B"],
    ) -> Float[Array, "B H W O"]:
        """Predict noise (or whatever the checkpoint was trained to predict).

        Args:
          latents: noisy latents [B, H, W, in_channels], H and W multiples of `patch_size`.
          timesteps: scalar or [B], in units of training timesteps.
          class_labels: [B], below `config.num_embeds_ada_norm`, or `config.null_class` for none.

        Returns:
          [B, H, W, out_channels] in the computation dtype.

        Raises:
          ValueError: latents of another shape, or a window larger than their grid of tokens.
        """
        patch = self.config.patch_size
        check_axes(latents, "B H W C", "DiTTransformer2DModel's latents")
        batch, height, width, channels = latents.shape
        if channels != self.config.in_channels or height % patch or width % patch:
            raise ValueError(
                f"DiTTransformer2DModel takes [B, H, W, {self.config.in_channels}] latents with H "
                f"and W multiples of patch_size {patch}, received {latents.shape}."
            )
        check_axes(class_labels, "B", "DiTTransformer2DModel's class_labels")
        timesteps = jnp.broadcast_to(jnp.asarray(timesteps), (batch,))
        time = sinusoidal_embedding(
            timesteps, _TIME_FEATURES, flip_sin_to_cos=True, freq_shift=1
        ).astype(self.dtype)
        x = self.pos_embed(latents.astype(self.dtype))
        for block in self.transformer_blocks:
            run = recomputed(block.__call__, self.remat)
            x = run(x, time, class_labels)

        # The output is modulated by what the first layer embeds.
        conditioning = self.transformer_blocks[0].norm1.emb(time, class_labels)
        shift, scale = jnp.split(self.proj_out_1(jax.nn.silu(conditioning)), 2, axis=-1)
        x = self.proj_out_2(modulate(self.norm_out(x), shift, scale))  # [B, h, w, p*p*O]
        x = x.reshape(batch, height // patch, width // patch, patch, patch, -1)
        return x.swapaxes(2, 3).reshape(batch, height, width, -1)
