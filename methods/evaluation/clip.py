"""A CLIP model as a measuring instrument: features of images and texts, and CLIPScore.

Images come as bytes and are prepared as transformers' `CLIPImageProcessor` prepares them with the
published settings: the shorter side resized to the model's size (bicubic), the centre cut out, the
channels normalised.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from PIL import Image

from ...flax_models.clip import CLIPModel
from ..concepts import context_length
from ..glyphs.judge import in_batches
from ..glyphs.recipe import to_clip_pixels
from ..text_to_image import tokenize

_BATCH = 16  # images or texts at a time


@functools.partial(jax.jit, static_argnums=0)
def _image_features(graphdef: Any, params: Any, images: Array) -> Array:
    pixels = to_clip_pixels(images)
    return nnx.merge(graphdef, params).get_image_features(pixels).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _text_features(graphdef: Any, params: Any, ids: Array) -> Array:
    return nnx.merge(graphdef, params).get_text_features(ids).astype(jnp.float32)


class Clip:
    """A CLIP with its tokenizer.

    Args:
      model: both towers.
      tokenizer: the one that its text tower learnt with.
      name: what to call it in records.
    """

    def __init__(self, model: CLIPModel, tokenizer: Any, name: str = "CLIP"):
        self.graphdef, state = nnx.split(model)
        self.params = nnx.to_pure_dict(state)
        self.tokenizer, self.name = tokenizer, name
        self.size = model.config.vision_config.image_size
        self.length = context_length(tokenizer, model.config.text_config.max_position_embeddings)

    @property
    def features_title(self) -> str:
        """What `features` are, for people."""
        return f"image features of {self.name}"

    def features(self, images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N P"]:
        """Projected, unnormalised embeddings of images."""
        function = functools.partial(_image_features, self.graphdef, self.params)
        return in_batches(function, prepare_images(images, self.size), _BATCH)

    def text_features(self, texts: Sequence[str]) -> Float[np.ndarray, "N P"]:
        """Projected, unnormalised embeddings of texts; one that is too long is cut, and told."""
        ids = tokenize(self.tokenizer, texts, max_length=self.length)
        function = functools.partial(_text_features, self.graphdef, self.params)
        return in_batches(function, ids, _BATCH)


def prepare_images(
    images: UInt8[np.ndarray, "N H W 3"], size: int
) -> UInt8[np.ndarray, "N size size 3"]:  # fmt: skip
    """The shorter side brought to `size` by bicubic interpolation, then the centre square."""
    height, width = images.shape[1:3]
    if (height, width) == (size, size):
        return images
    short = min(height, width)
    new_height, new_width = int(size * height / short), int(size * width / short)
    top, left = (new_height - size) // 2, (new_width - size) // 2
    prepared = np.empty((len(images), size, size, 3), np.uint8)
    for n, image in enumerate(images):
        resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC)
        prepared[n] = np.asarray(resized)[top : top + size, left : left + size]
    return prepared


def unit(features: Float[np.ndarray, "N P"]) -> Float[np.ndarray, "N P"]:
    """Rows of length one."""
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def clip_score(
    image_features: Float[np.ndarray, "N P"], text_features: Float[np.ndarray, "N P"]
) -> Float[np.ndarray, " N"]:
    """100 · max(cos, 0) of each image with its own text.

    Hessel et al. 2021 (arXiv 2104.08718, eq. 1) in the scale in which it is reported (theirs is
    w = 2.5).
    """
    cosines = np.sum(unit(image_features) * unit(text_features), axis=-1)
    return 100.0 * np.maximum(cosines, 0.0)
