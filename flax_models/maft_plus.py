"""MAFT+ (Jiao et al. 2024): open-vocabulary segmentation, vision and text optimized together.

An OpenCLIP tower gives the features; Mask2Former's decoders, which take no gradient into it,
propose masks; pooled over them, the tower's own embeddings are compared with the rows of a text
classifier that Content-Dependent Transfer has adapted to the image.  Maps are `[B, H, W, C]`, masks
`[B, Q, H, W]`; attribute paths are those of the published detectron2 checkpoints.

A text classifier has one row per synonym, grouped by class; `synonyms` [K, S] lists each class's
rows, repeating one of them where a class has fewer than S.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from .configs import ModelConfig
from .layers.attention import MultiheadAttention
from .layers.bilinear import resize
from .layers.embeddings import Dtype
from .layers.linear import linear
from .layers.remat import Remat
from .layers.transformer import layer_norm
from .mask2former import (
    Mask2FormerConfig,
    MaskPrediction,
    MSDeformAttnPixelDecoder,
    MultiScaleMaskedTransformerDecoder,
    mask_pool,
    normalize,
    sine_positions,
    torch_linear,
)
from .open_clip import OpenCLIP, OpenCLIPConfig
from .pretrained import RecomputingModel

FORMS = ("semantic", "panoptic")
TOKEN_ORDERS = ("reference", "raster")


def _check_options(form: str, token_order: str) -> None:
    for name, value, accepted in (
        ("form", form, FORMS),
        ("token_order", token_order, TOKEN_ORDERS),
    ):
        if value not in accepted:
            raise ValueError(f"{name} accepts {' and '.join(accepted)}, received {value!r}.")


@dataclasses.dataclass(frozen=True)
class MaftPlusConfig(ModelConfig):
    """Settings of the whole model.

    `form` and `token_order` are those of `ContentDependentTransfer`; released weights are
    "semantic" or "panoptic" by the task they were trained for, and "reference".
    """

    clip_config: OpenCLIPConfig = dataclasses.field(default_factory=OpenCLIPConfig)
    decoder_config: Mask2FormerConfig = dataclasses.field(default_factory=Mask2FormerConfig)
    transfer_heads: int = 8
    form: str = "semantic"
    token_order: str = "reference"

    FIXED: ClassVar[Mapping[str, Any]] = {"model_type": "maft_plus"}
    INERT: ClassVar[frozenset[str]] = frozenset({"architectures", "dtype", "torch_dtype"})

    def __post_init__(self):
        self.require_positive("transfer_heads")
        _check_options(self.form, self.token_order)
        clip, decoder = self.clip_config, self.decoder_config
        self.require(
            decoder.feature_channels == clip.vision_config.dims
            and decoder.class_dim == clip.embed_dim,
            f"the decoder reads {decoder.feature_channels} channels and {decoder.class_dim} wide "
            f"text rows, but CLIP has {clip.vision_config.dims} and {clip.embed_dim}.",
        )
        self.require(
            clip.embed_dim % self.transfer_heads == 0 and clip.embed_dim % 4 == 0,
            f"embed_dim {clip.embed_dim} must be a multiple of 4 and of "
            f"transfer_heads={self.transfer_heads}.",
        )

    @classmethod
    def of(
        cls,
        clip: OpenCLIPConfig,
        *,
        form: str = "semantic",
        token_order: str = "reference",
        **decoder: Any,
    ) -> "MaftPlusConfig":
        """Settings around a CLIP; `decoder` overrides those of `Mask2FormerConfig`."""
        sizes = {"feature_channels": clip.vision_config.dims, "class_dim": clip.embed_dim}
        return cls(
            clip, Mask2FormerConfig(**{**sizes, **decoder}), form=form, token_order=token_order
        )

    @classmethod
    def base(cls, form: str = "semantic") -> "MaftPlusConfig":
        """MAFT+ with ConvNeXt-Base."""
        return cls.of(OpenCLIPConfig.base(), form=form)

    @classmethod
    def large(cls, form: str = "semantic") -> "MaftPlusConfig":
        """MAFT+ with ConvNeXt-Large."""
        return cls.of(OpenCLIPConfig.large(), form=form)

    @classmethod
    def tiny(
        cls,
        clip: OpenCLIPConfig | None = None,
        *,
        form: str = "semantic",
        token_order: str = "reference",
    ) -> "MaftPlusConfig":
        """For tests and small worlds."""
        return cls.of(
            clip or OpenCLIPConfig.tiny(),
            form=form,
            token_order=token_order,
            hidden_dim=64,
            heads=4,
            encoder_layers=1,
            encoder_ffn=128,
            decoder_layers=3,
            decoder_ffn=128,
            num_queries=16,
        )


class _CrossAttention(nnx.Module):
    """What the transfer is made of, under its published names."""

    def __init__(self, dim: int, heads: int, form: str, **init: Any):
        zero = {"kernel_init": nnx.initializers.zeros, "bias_init": nnx.initializers.zeros}
        self.multihead_attn = MultiheadAttention(dim, heads, **init)
        self.norm = layer_norm(dim, **init)
        self.MLP = (
            linear(dim, dim, **zero, **init)
            if form == "panoptic"
            else torch_linear(dim, dim, **init)
        )


class ContentDependentTransfer(nnx.Module):
    """Text rows look at the image and change with it (section 3.3 of the paper).

    Args:
      dim: width of rows and image features, a multiple of 4.
      num_heads: attention heads.
      form: "semantic" is LN(T + Z); "panoptic" is T + LN(Z), which starts as the identity. Z is a
        linear layer of the attended image features.
      token_order: how `arrange` lays a map out before it is projected. "raster" is the natural
        order; "reference" is that of the authors' code, which reads a channels-first buffer as if
        channels came last. Released weights were trained with it.
      dtype: computation dtype.
      param_dtype: dtype of the parameters.
      rngs: source of the initial parameters.

    Raises:
      ValueError: an unknown form or order, or a dim that does not suit the heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        form: str = "semantic",
        token_order: str = "reference",
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _check_options(form, token_order)
        self.form, self.token_order = form, token_order
        init = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.cross_atten = _CrossAttention(dim, num_heads, form, **init)

    def arrange(self, features: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """The map in this transfer's token order, before its vectors are projected one by one."""
        if self.token_order == "raster":
            return features
        return features.transpose(0, 3, 1, 2).reshape(features.shape)

    def __call__(
        self,
        text_rows: Float[Array, "R D"] | Float[Array, "B R D"],
        image_features: Float[Array, "B h w D"],
    ) -> Float[Array, "B R D"]:
        """Rows adapted to each image; they are not of unit length.

        Args:
          text_rows: [R, D] for all images, or [B, R, D].
          image_features: projected features, arranged and projected by the caller.
        """
        batch, *size, dim = image_features.shape
        rows = jnp.broadcast_to(text_rows, (batch, *text_rows.shape[-2:]))
        tokens = image_features.reshape(batch, -1, dim)  # [B, h*w, D]
        places = sine_positions((size[0], size[1]), dim).reshape(1, -1, dim)
        parts = self.cross_atten
        change = parts.MLP(parts.multihead_attn(rows, tokens + places, tokens))
        return parts.norm(rows + change) if self.form == "semantic" else rows + parts.norm(change)


class MaftPlusOutput(NamedTuple):
    """What the model sees in images.

    Attributes:
      layers: mask logits and in-vocabulary row logits of the decoder's queries and layers; the
        last one counts.
      open_logits: open-vocabulary row logits of the last layer's masks.
      features: the image tower's last map, stride 32.
    """

    layers: tuple[MaskPrediction, ...]
    open_logits: Float[Array, "B Q R"]
    features: Float[Array, "B h w C"]


class _Backbone(nnx.Module):
    def __init__(self, config: OpenCLIPConfig, **init: Any):
        self.clip_model = OpenCLIP(config, **init)


class _SegmentationHead(nnx.Module):
    def __init__(self, config: Mask2FormerConfig, **init: Any):
        exact = {name: value for name, value in init.items() if name != "dtype"}
        self.pixel_decoder = MSDeformAttnPixelDecoder(config, **exact)
        self.predictor = MultiScaleMaskedTransformerDecoder(config, **init)


class MaftPlus(RecomputingModel):
    """The whole model; the frozen teacher of its training is no part of it.

    The pixel decoder is always float32; `remat` is for the blocks of the image tower.
    """

    config: MaftPlusConfig
    config_class = MaftPlusConfig
    pytorch_class = "MaftPlus"
    pytorch_library = "transformers"

    def _build(self, config: MaftPlusConfig, *, remat: Remat, **init):
        dim = config.clip_config.embed_dim
        self.backbone = _Backbone(config.clip_config, remat=remat, **init)
        self.sem_seg_head = _SegmentationHead(config.decoder_config, **init)
        self.void_embedding = nnx.Embed(1, dim, embedding_init=nnx.initializers.normal(1.0), **init)
        self.cdt = ContentDependentTransfer(
            dim, config.transfer_heads, form=config.form, token_order=config.token_order, **init
        )

    @classmethod
    def around(
        cls, clip: OpenCLIP, config: MaftPlusConfig, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs
    ) -> "MaftPlus":
        """A new model around a CLIP, which becomes a part of it."""
        model = cls(config, dtype=dtype, rngs=rngs)
        model.backbone.clip_model = clip
        return model

    def with_void(self, rows: Float[Array, "N D"]) -> Float[Array, "R D"]:
        """Text rows of unit length, and the row of everything unnamed behind them."""
        void = normalize(self.void_embedding.embedding[...])
        return jnp.concatenate([rows.astype(void.dtype), void])

    def __call__(
        self, images: Float[Array, "B H W 3"], rows: Float[Array, "N D"]
    ) -> MaftPlusOutput:
        """Propose masks and compare them with text rows.

        Gradients part here: the decoder's predictions reach the decoders and the void row only,
        the open-vocabulary logits reach the image tower and the transfer only.

        Args:
          images: normalized, padded with zeros at the bottom and the right to multiples of 32.
          rows: text rows of unit length, synonyms of a class side by side, without void.

        Raises:
          ValueError: sides that are not multiples of 32.
        """
        clip = self.backbone.clip_model
        text = self.with_void(rows)
        maps = clip.visual.trunk(images)
        pixels = self.sem_seg_head.pixel_decoder(
            tuple(jax.lax.stop_gradient(features) for features in maps)
        )
        layers = self.sem_seg_head.predictor(pixels, text)
        features = maps[-1]
        masks = jax.lax.stop_gradient(layers[-1].mask_logits)
        masks = resize(masks, features.shape[1:3], axis=2)
        queries = normalize(clip.visual.project(mask_pool(features, masks)))
        tokens = clip.visual.project(self.cdt.arrange(features))
        adapted = self.cdt(text, tokens)
        open_logits = clip.temperature() * jnp.einsum("bqd,brd->bqr", queries, adapted)
        return MaftPlusOutput(layers, open_logits, features)


def ensemble(embeddings: Float[Array, "R T D"]) -> Float[Array, "R D"]:
    """One row of unit length per synonym: the mean of its T normalized prompts, normalized."""
    return normalize(normalize(embeddings).mean(axis=1))


def class_logits(
    row_logits: Float[Array, "*B R"], synonyms: Int[Array, "K S"]
) -> Float[Array, "*B C"]:
    """Logits of K classes and void: the maximum over each class's rows, and the last row."""
    classes = row_logits[..., synonyms].max(axis=-1)  # [..., K]
    return jnp.concatenate([classes, row_logits[..., -1:]], axis=-1)
