"""OpenCLIP (Ilharco et al. 2021) with a ConvNeXt image tower, Base (`_w`) or Large (`_d`).

Text is `[B, L]` token ids, images are `[B, H, W, 3]` normalized with CLIP's mean and standard
deviation, of any size in multiples of 32.  Attribute paths are open_clip's state-dict keys, whose
text tower has other names and a stacked attention projection, but computes what `clip.py`'s does
with the exact GELU.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from .configs import ModelConfig
from .convnext import ConvNeXt, ConvNeXtConfig, Mlp
from .layers.attention import MultiheadAttention
from .layers.checks import check_axes
from .layers.linear import linear
from .layers.remat import Remat
from .layers.transformer import layer_norm
from .pretrained import RecomputingModel

# Of pixel values 0 to 255.
IMAGE_MEAN = (122.7709383, 116.7460125, 104.09373615)
IMAGE_STD = (68.5005327, 66.6321579, 70.32316305)


@dataclasses.dataclass(frozen=True)
class OpenCLIPTextConfig(ModelConfig):
    """Settings of the text tower; the defaults are `convnext_base_w`'s."""

    width: int = 640
    heads: int = 10
    layers: int = 12
    vocab_size: int = 49408
    context_length: int = 77

    def __post_init__(self):
        self.require_positive(*(field.name for field in dataclasses.fields(self)))
        self.require(
            self.width % self.heads == 0,
            f"width {self.width} does not divide into {self.heads} heads.",
        )


@dataclasses.dataclass(frozen=True)
class OpenCLIPConfig(ModelConfig):
    """Both towers and the shared space.

    `projection` is what follows the trunk's pooled, normalized features: one matrix, or two with a
    GELU between them.
    """

    text_config: OpenCLIPTextConfig = OpenCLIPTextConfig()
    vision_config: ConvNeXtConfig = dataclasses.field(default_factory=ConvNeXtConfig)
    embed_dim: int = 640
    projection: str = "linear"

    FIXED: ClassVar[Mapping[str, Any]] = {"model_type": "open_clip_convnext"}
    INERT: ClassVar[frozenset[str]] = frozenset({"architectures", "dtype", "torch_dtype"})

    def __post_init__(self):
        self.require_positive("embed_dim")
        self.require_one_of("projection", ("linear", "mlp"))

    @classmethod
    def base(cls) -> "OpenCLIPConfig":
        """`convnext_base_w_320`: 179.39M parameters."""
        return cls()

    @classmethod
    def large(cls) -> "OpenCLIPConfig":
        """`convnext_large_d_320`: 351.77M parameters."""
        text = OpenCLIPTextConfig(width=768, heads=12, layers=16)
        return cls(text, ConvNeXtConfig.large(), embed_dim=768, projection="mlp")

    @classmethod
    def tiny(cls, *, vocab_size: int = 49408, context_length: int = 77) -> "OpenCLIPConfig":
        """For tests and small worlds."""
        text = OpenCLIPTextConfig(64, 4, 2, vocab_size, context_length)
        return cls(text, ConvNeXtConfig.tiny(), embed_dim=64)


class _MLP(nnx.Module):
    def __init__(self, width: int, **init: Any):
        self.c_fc = linear(width, 4 * width, **init)
        self.c_proj = linear(4 * width, width, **init)

    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        return self.c_proj(jax.nn.gelu(self.c_fc(x), approximate=False))


class ResidualAttentionBlock(nnx.Module):
    """Pre-norm transformer layer, causal."""

    def __init__(self, config: OpenCLIPTextConfig, **init: Any):
        self.ln_1 = layer_norm(config.width, **init)
        self.attn = MultiheadAttention(config.width, config.heads, **init)
        self.ln_2 = layer_norm(config.width, **init)
        self.mlp = _MLP(config.width, **init)

    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, is_causal=True)
        return x + self.mlp(self.ln_2(x))


class Transformer(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: OpenCLIPTextConfig, **init: Any):
        self.resblocks = nnx.List(
            [ResidualAttentionBlock(config, **init) for _ in range(config.layers)]
        )


class _LinearHead(nnx.Module):
    def __init__(self, features: int, out: int, **init: Any):
        self.proj = linear(features, out, use_bias=False, **init)

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... D"]:
        return self.proj(x)


class _MlpHead(nnx.Module):
    def __init__(self, features: int, out: int, **init: Any):
        self.mlp = Mlp(features, 2 * out, out, last_bias=False, **init)

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... D"]:
        return self.mlp(x)


class VisionTower(nnx.Module):
    """Trunk and projection."""

    def __init__(self, config: OpenCLIPConfig, *, remat: Remat, **init: Any):
        head = _LinearHead if config.projection == "linear" else _MlpHead
        self.trunk = ConvNeXt(config.vision_config, remat=remat, **init)
        self.head = head(config.vision_config.dims[-1], config.embed_dim, **init)

    def project(self, features: Float[Array, "... C"]) -> Float[Array, "... D"]:
        """Pooled features (or any map's vectors) into the shared space, not normalized."""
        return self.head(self.trunk.head.norm(features))


class OpenCLIP(RecomputingModel):
    """Both towers; `remat` is for the blocks of the image tower."""

    config: OpenCLIPConfig
    config_class = OpenCLIPConfig
    pytorch_class = "OpenCLIP"
    pytorch_library = "transformers"

    def _build(self, config: OpenCLIPConfig, *, remat: Remat, **init):
        text, rngs, param_dtype = config.text_config, init["rngs"], init["param_dtype"]

        def normal(shape: tuple[int, ...], std: float) -> nnx.Param[jax.Array]:
            return nnx.Param(std * jax.random.normal(rngs.params(), shape, param_dtype))

        self.visual = VisionTower(config, remat=remat, **init)
        self.token_embedding = nnx.Embed(
            text.vocab_size, text.width, embedding_init=nnx.initializers.normal(0.02), **init
        )
        self.positional_embedding = normal((text.context_length, text.width), 0.01)
        self.transformer = Transformer(text, **init)
        self.ln_final = layer_norm(text.width, **init)
        self.text_projection = normal((text.width, config.embed_dim), text.width**-0.5)
        self.logit_scale = nnx.Param(jnp.asarray(jnp.log(1 / 0.07), param_dtype))

    def encode_text(self, input_ids: Int[Array, "B L"]) -> Float[Array, "B D"]:
        """Text embeddings, not normalized, read at the largest token id (the end of the text).

        Raises:
          ValueError: more tokens than `context_length`.
        """
        check_axes(input_ids, "B L", "OpenCLIP's input_ids")
        length = input_ids.shape[1]
        if length > self.config.text_config.context_length:
            raise ValueError(
                f"OpenCLIP takes at most {self.config.text_config.context_length} tokens, "
                f"received {length}."
            )
        x = self.token_embedding(input_ids)  # [B, L, W]
        x = x + self.positional_embedding[...][:length].astype(x.dtype)
        for block in self.transformer.resblocks:
            x = block(x)
        ends = jnp.argmax(input_ids, axis=-1)
        pooled = jnp.take_along_axis(self.ln_final(x), ends[:, None, None], axis=1)[:, 0]
        return pooled @ self.text_projection[...].astype(pooled.dtype)

    def encode_image(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """Image embeddings, not normalized."""
        return self.visual.project(self.visual.trunk(images)[-1].mean(axis=(1, 2)))

    def temperature(self) -> Float[Array, ""]:
        """The factor of cosines: exp(logit_scale), at most 100."""
        return jnp.minimum(jnp.exp(self.logit_scale[...]), 100.0)
