"""`Dinov2Model`: a self-supervised vision transformer (Oquab et al. 2023, arXiv 2304.07193).

Images are `[B, H, W, 3]`, normalized with ImageNet's mean and standard deviation.  Attribute paths
are those of the published files, which transformers 5 renames when it loads them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from .layers.bert import Dense, Projections
from .layers.checks import check_axes
from .layers.encoder import MLP, EncoderConfig, layer_norm
from .layers.remat import Remat, recomputed
from .pretrained import RecomputingModel


@dataclasses.dataclass(frozen=True)
class Dinov2Config(EncoderConfig):
    """Settings of `Dinov2Model`; the defaults are ViT-B/14's."""

    mlp_ratio: int = 4
    layer_norm_eps: float = 1e-6
    image_size: int = 518
    patch_size: int = 14
    num_channels: int = 3
    qkv_bias: bool = True
    use_mask_token: bool = True

    MODEL_TYPE: ClassVar[str | None] = "dinov2"
    FIXED: ClassVar[Mapping[str, Any]] = {"use_swiglu_ffn": False, "hidden_dropout_prob": 0.0}

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("mlp_ratio", "image_size", "patch_size", "num_channels")


class Dinov2Output(NamedTuple):
    """`last_hidden_state` [B, 1+P, C] after the final layer norm; `pooled` [B, C], its first."""

    last_hidden_state: Float[Array, "B T C"]
    pooled: Float[Array, "B C"]


def bicubic_weights(size: int, out: int) -> Float[np.ndarray, "out size"]:
    """Weights of torch's bicubic resize (a = -0.75, no antialiasing, border repeated), float32."""
    a = -0.75

    def kernel(x: np.ndarray) -> np.ndarray:  # Keys 1981
        x = np.abs(x)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        return np.where(x <= 1, near, np.where(x < 2, far, 0.0))

    weights = np.zeros((out, size))
    center = (np.arange(out) + 0.5) * size / out - 0.5
    for offset in range(-1, 3):
        at = np.floor(center) + offset
        column = np.clip(at, 0, size - 1).astype(int)
        weights[np.arange(out), column] += kernel(center - at)
    return weights.astype(np.float32)


class Dinov2PatchEmbeddings(nnx.Module):
    """Patches as tokens."""

    def __init__(self, config: Dinov2Config, **init):
        patch = (config.patch_size,) * 2
        self.projection = nnx.Conv(
            config.num_channels, config.hidden_size, patch, strides=patch, padding="VALID", **init
        )

    def __call__(self, pixel_values: Float[Array, "B H W 3"]) -> Float[Array, "B P C"]:
        patches = self.projection(pixel_values)
        return patches.reshape(patches.shape[0], -1, patches.shape[-1])


class Dinov2Embeddings(nnx.Module):
    """Patches, a class token in front, learned positions resized to the image."""

    def __init__(self, config: Dinov2Config, **init):
        width, dtype = config.hidden_size, init["param_dtype"]
        self.grid = config.image_size // config.patch_size
        self.patch = config.patch_size
        self.cls_token = nnx.Param(jnp.zeros((1, 1, width), dtype))
        if config.use_mask_token:
            self.mask_token = nnx.Param(jnp.zeros((1, width), dtype))
        self.patch_embeddings = Dinov2PatchEmbeddings(config, **init)
        self.position_embeddings = nnx.Param(
            jax.random.normal(init["rngs"].params(), (1, self.grid**2 + 1, width), dtype)
        )

    def __call__(
        self, pixel_values: Float[Array, "B H W 3"], masked: Bool[Array, "B P"] | None
    ) -> Float[Array, "B T C"]:
        tokens = self.patch_embeddings(pixel_values)
        if masked is not None:
            mask_token = self.mask_token[...].astype(tokens.dtype)
            tokens = jnp.where(masked[..., None], mask_token, tokens)
        first = self.cls_token[...].astype(tokens.dtype)
        first = jnp.broadcast_to(first, (tokens.shape[0], 1, tokens.shape[-1]))
        tokens = jnp.concatenate([first, tokens], axis=1)
        return tokens + self.positions(*pixel_values.shape[1:3]).astype(tokens.dtype)

    def positions(self, height: int, width: int) -> Float[Array, "1 T C"]:
        """The position embeddings for an image of this size, in pixels."""
        table = self.position_embeddings[...]
        rows, columns = height // self.patch, width // self.patch
        if (rows, columns) == (self.grid, self.grid):
            return table
        square = table[0, 1:].reshape(self.grid, self.grid, -1).astype(jnp.float32)
        resized = jnp.einsum(
            "rh,cw,hwd->rcd",
            bicubic_weights(self.grid, rows),
            bicubic_weights(self.grid, columns),
            square,
            precision="highest",
        )
        flat = resized.reshape(1, rows * columns, -1).astype(table.dtype)
        return jnp.concatenate([table[:, :1], flat], axis=1)


class Dinov2Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, config: Dinov2Config, **init):
        self.attention = Projections(config, use_bias=config.qkv_bias, **init)
        self.output = Dense(config.hidden_size, config.hidden_size, **init)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        return self.output(self.attention(x))


class Dinov2LayerScale(nnx.Module):
    """A learned factor per channel (Touvron et al. 2021)."""

    def __init__(self, features: int, **init):
        self.lambda1 = nnx.Param(jnp.ones((features,), init["param_dtype"]))

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        return x * self.lambda1[...].astype(x.dtype)


class Dinov2Layer(nnx.Module):
    """Pre-norm transformer layer with layer scale."""

    def __init__(self, config: Dinov2Config, **init):
        self.norm1 = layer_norm(config, **init)
        self.attention = Dinov2Attention(config, **init)
        self.layer_scale1 = Dinov2LayerScale(config.hidden_size, **init)
        self.norm2 = layer_norm(config, **init)
        self.mlp = MLP(config, config.hidden_size * config.mlp_ratio, **init)
        self.layer_scale2 = Dinov2LayerScale(config.hidden_size, **init)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class Dinov2Encoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: Dinov2Config, *, remat: Remat, **init):
        self.remat = remat
        self.layer = nnx.List(
            [Dinov2Layer(config, **init) for _ in range(config.num_hidden_layers)]
        )

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        for layer in self.layer:
            x = recomputed(layer.__call__, self.remat)(x)
        return x


class Dinov2Model(RecomputingModel):
    """DINOv2's vision transformer."""

    config: Dinov2Config
    config_class = Dinov2Config
    pytorch_class = "Dinov2Model"
    pytorch_library = "transformers"

    def _build(self, config: Dinov2Config, *, remat: Remat, **init):
        self.embeddings = Dinov2Embeddings(config, **init)
        self.encoder = Dinov2Encoder(config, remat=remat, **init)
        self.layernorm = layer_norm(config, **init)

    def __call__(
        self, pixel_values: Float[Array, "B H W 3"], masked: Bool[Array, "B P"] | None = None
    ) -> Dinov2Output:
        """Encode images whose sides are multiples of `patch_size`.

        Args:
          pixel_values: [B, H, W, num_channels], normalized.
          masked: [B, P] patches that the mask token replaces.

        Raises:
          ValueError: other channels or sides, or a mask where the model has no mask token.
        """
        patch, channels = self.config.patch_size, self.config.num_channels
        check_axes(pixel_values, "B H W C", "Dinov2Model's images")
        height, width = pixel_values.shape[1:3]
        if pixel_values.shape[-1] != channels or height % patch or width % patch:
            raise ValueError(
                f"Dinov2Model takes [B, H, W, {channels}] images whose sides are multiples of "
                f"{patch}, received {pixel_values.shape}."
            )
        if masked is not None and not self.config.use_mask_token:
            raise ValueError("this Dinov2Model has no mask token, so it takes no mask.")
        x = self.layernorm(self.encoder(self.embeddings(pixel_values, masked)))
        return Dinov2Output(x, x[:, 0])
