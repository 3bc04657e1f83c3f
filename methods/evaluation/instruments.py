"""Feature extractors for metrics: images of any sizes in, features out, a batch at a time.

Where a folder has no `preprocessor_config.json`, images are prepared as the published models of its
kind are (`preprocessing.Preprocessing`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from PIL import Image

from ...flax_models.blip import BlipForImageTextRetrieval
from ...flax_models.blip_2 import Blip2Config, Blip2ForImageTextRetrieval
from ...flax_models.clip import CLIPModel
from ...flax_models.dinov2 import Dinov2Model
from ...flax_models.inception_v3 import FIDInceptionV3
from ...flax_models.pipelines.tokenizers import context_length, tokenize
from ..text.phrases import phrase_ids
from .preprocessing import Images, Preprocessing, bilinear

_BATCH = 16  # images or texts at a time
_ROUND = 16  # text lengths are rounded up to its multiples: few programs serve any texts


@functools.partial(jax.jit, static_argnums=(0, 1))
def _image_features(
    graphdef: Any, preprocessing: Preprocessing, params: Any, images: Array
) -> Array:
    model, pixels = nnx.merge(graphdef, params), preprocessing.normalize(images)
    dino = isinstance(model, Dinov2Model)
    features = model(pixels).pooled if dino else model.get_image_features(pixels)
    return features.astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _text_features(graphdef: Any, pad: int | None, params: Any, ids: Array) -> Array:
    mask = None if pad is None else (ids != pad).astype(jnp.int32)
    return nnx.merge(graphdef, params).get_text_features(ids, mask).astype(jnp.float32)


class _Eye:
    """A model that sees images; its parameters are not copied."""

    def __init__(self, model: nnx.Module, name: str, preprocessing: Preprocessing):
        self.graphdef, state = nnx.split(model)
        self.params = nnx.to_pure_dict(state)
        self.name, self.preprocessing = name, preprocessing

    @property
    def features_title(self) -> str:
        """What `features` are, for people."""
        return f"image features of {self.name}"

    def features(self, images: Images) -> Float[np.ndarray, "N *Q P"]:
        """Features of images, float32."""
        see = (self.graphdef, self.preprocessing, self.params)
        function = functools.partial(_image_features, *see)
        return in_batches(function, self.preprocessing.prepare(images), _BATCH)


class Clip(_Eye):
    """A CLIP with its own tokenizer; features are projected and unnormalized, [N, P].

    `name` is for records; the images' preprocessing is by default `Preprocessing.clip`. `scale` is
    what cosines are multiplied by to be logits: the model's own.
    """

    scale = 100.0  # the most that CLIPs are trained with

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: Any,
        name: str = "CLIP",
        preprocessing: Preprocessing | None = None,
    ):
        side = model.config.vision_config.image_size
        super().__init__(model, name, preprocessing or Preprocessing.clip(side))
        self.scale = float(np.exp(np.asarray(self.params["logit_scale"], np.float32)))
        self.tokenizer = tokenizer
        self.length = context_length(tokenizer, model.config.text_config.max_position_embeddings)

    def text_features(self, texts: Sequence[str]) -> Float[np.ndarray, "N P"]:
        """Projected, unnormalized embeddings of texts; one that is too long is cut, and told."""
        ids = tokenize(self.tokenizer, texts, max_length=self.length)
        function = functools.partial(_text_features, self.graphdef, None, self.params)
        return in_batches(function, ids, _BATCH)


class Dino(_Eye):
    """A DINOv2; features are its normalized class token, [N, C].

    `name` is for records; the images' preprocessing is by default `Preprocessing.dinov2`.
    """

    def __init__(
        self, model: Dinov2Model, name: str = "DINOv2", preprocessing: Preprocessing | None = None
    ):
        super().__init__(model, name, preprocessing or Preprocessing.dinov2())


class Blip(_Eye):
    """A BLIP, [N, P], or a BLIP-2, [N, Q, P], by its contrastive head: unit vectors.

    The tokenizer is BERT's, as it comes with the model; `name` is for records; the images'
    preprocessing is by default `Preprocessing.blip`.
    """

    def __init__(
        self,
        model: BlipForImageTextRetrieval | Blip2ForImageTextRetrieval,
        tokenizer: Any,
        name: str = "BLIP",
        preprocessing: Preprocessing | None = None,
    ):
        config = model.config
        side = config.vision_config.image_size
        super().__init__(model, name, preprocessing or Preprocessing.blip(side))
        text = config.qformer_config if isinstance(config, Blip2Config) else config.text_config
        self.tokenizer, self.rows = tokenizer, text.vocab_size
        self.length = context_length(tokenizer, text.max_position_embeddings)

    def text_features(self, texts: Sequence[str]) -> Float[np.ndarray, "N P"]:
        """Unit vectors of texts; one that is too long is cut, and told.

        Raises:
          ValueError: a token that the model does not embed.
        """
        longest = max(map(len, phrase_ids(self.tokenizer, texts)))
        length = min(-(-longest // _ROUND) * _ROUND, self.length)
        ids = tokenize(self.tokenizer, texts, max_length=length)
        if ids.max() >= self.rows:
            raise ValueError(
                f"{self.name} embeds {self.rows} tokens and its tokenizer gave {ids.max()}: put "
                "the tokenizer's files that belong to it into its folder."
            )
        pad = int(self.tokenizer.pad_token_id)
        function = functools.partial(_text_features, self.graphdef, pad, self.params)
        return in_batches(function, ids, _BATCH)


@functools.partial(jax.jit, static_argnums=0)
def _inception_features(graphdef: Any, params: Any, pixels: Array) -> Array:
    return nnx.merge(graphdef, params)(pixels).astype(jnp.float32)


class Inception:
    """The Inception-v3 of the Fréchet inception distance; features are [N, 2048].

    Args:
      model: the network.
      name: for records.
      resize: "clean" as clean-fid does it (Parmar et al. 2022, arXiv 2104.11222): bicubic with
        Pillow's filter, not rounded to bytes, then (x - 128) / 128; or "pytorch-fid", which
        interpolates between pixels, and 2 x / 255 - 1.
      side: pixels of what the network sees.
    """

    def __init__(
        self,
        model: FIDInceptionV3,
        name: str = "Inception-v3",
        resize: Literal["clean", "pytorch-fid"] = "clean",
        side: int = 299,
    ):
        if resize not in ("clean", "pytorch-fid"):
            raise ValueError(f"resize is 'clean' or 'pytorch-fid', received {resize!r}.")
        self.graphdef, state = nnx.split(model)
        self.params = nnx.to_pure_dict(state)
        self.name, self.resize, self.side = name, resize, side

    @property
    def features_title(self) -> str:
        """What `features` are, for people."""
        return f"features of {self.name}, {self.resize} resize"

    def features(self, images: Images) -> Float[np.ndarray, "N F"]:
        """Features of images of any sizes, float32."""
        parts = []
        for start in range(0, len(images), _BATCH):
            batch = images[start : start + _BATCH]
            pixels = np.stack([self.pixels(image) for image in batch])
            see = functools.partial(_inception_features, self.graphdef, self.params)
            parts.append(in_batches(see, pixels, _BATCH))
        return np.concatenate(parts)

    def pixels(self, image: np.ndarray) -> Float[np.ndarray, "h w 3"]:
        """One image as the network sees it."""
        side = (self.side, self.side)
        if self.resize == "pytorch-fid":
            return bilinear(image[None], side)[0] * np.float32(2 / 255) - 1
        planes = [Image.fromarray(image[..., n].astype(np.float32)) for n in range(3)]
        resized = [np.asarray(each.resize(side, Image.Resampling.BICUBIC)) for each in planes]
        return (np.stack(resized, -1) - 128) / 128


def in_batches(function: Callable[[Any], Any], rows: np.ndarray, size: int) -> Any:
    """`function` of `size` rows at a time, its results (arrays, or a tree of them) joined.

    The last batch is filled with zeros, so that one compiled program serves any number of rows.
    """
    parts = []
    for first in range(0, max(len(rows), 1), size):
        batch = rows[first : first + size]
        filled = np.zeros((size, *rows.shape[1:]), rows.dtype)
        filled[: len(batch)] = batch
        parts.append(jax.device_get(function(filled)))
    return jax.tree.map(lambda *values: np.concatenate(values)[: len(rows)], *parts)
