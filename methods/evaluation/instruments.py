"""Feature extractors for metrics: images of any sizes in, features out, a batch at a time.

Where a folder has no `preprocessor_config.json`, images are prepared as the published models of its
kind are (`preprocessing.Preprocessing`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ...flax_models.blip import BlipForImageTextRetrieval
from ...flax_models.blip_2 import Blip2Config, Blip2ForImageTextRetrieval
from ...flax_models.clip import CLIPModel
from ...flax_models.dinov2 import Dinov2Model
from ...flax_models.pipelines.tokenizers import context_length, tokenize
from ..text.phrases import phrase_ids
from .preprocessing import Images, Preprocessing

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
