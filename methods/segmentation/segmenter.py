"""Segment images of any size with one vocabulary."""

import functools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from ...flax_models.maft_plus import MaftPlus, class_logits
from ..memory import require_memory, segmenter_bytes
from .augmentation import resize_image, shortest_edge
from .batches import normalize_image, padded_size
from .inference import ImageSizes, class_scores, panoptic_map, semantic_labels
from .metrics import Segment
from .vocabulary import TEMPLATES, Vocabulary, text_rows


class Seen(NamedTuple):
    """What a model sees in an image.

    Attributes:
      scores: [Q, K + 1] probabilities of each query's classes and of void.
      mask_logits: [Q, h, w].
      sizes: of the image.
    """

    scores: Float[Array, "Q C"]
    mask_logits: Float[Array, "Q h w"]
    sizes: ImageSizes

    def labels(
        self, *, least_score: float = 0.0, masks_first: bool = False
    ) -> Int[np.ndarray, "H W"]:
        """`inference.semantic_labels` of the image, on the host."""
        return np.asarray(semantic_labels(*self, least_score, masks_first))

    def panoptic(
        self, things: Collection[int], *, least_score: float = 0.2
    ) -> tuple[Int[np.ndarray, "H W"], dict[int, Segment]]:
        """`inference.panoptic_map` of the image."""
        return panoptic_map(*self, things, least_score=least_score)


class Segmenter:
    """A model and a vocabulary.

    Args:
      model: read, never changed.
      rows: its text rows of the vocabulary, of unit length.
      synonyms: the rows of each class.
      short, longest: pixels along the shorter side of what the model sees, and at most along the
        longer one.
    """

    def __init__(
        self,
        model: MaftPlus,
        rows: Float[Array, "N D"],
        synonyms: Int[np.ndarray, "K S"],
        *,
        short: int = 800,
        longest: int = 1333,
    ):
        self.rows, self.synonyms = jnp.asarray(rows), jnp.asarray(synonyms)
        self.short, self.longest, self._config = short, longest, model.config
        graphdef, state = nnx.split(model)
        self._look = functools.partial(_look, graphdef, state)

    @property
    def classes(self) -> int:
        """How many the vocabulary has."""
        return len(self.synonyms)

    def __call__(self, image: UInt8[np.ndarray, "H W 3"]) -> Seen:
        """Look at an image of any size."""
        height, width = image.shape[:2]
        size = shortest_edge((height, width), self.short, self.longest)
        padded = padded_size(size)
        needed = segmenter_bytes(self._config, 1, *padded)
        what = f"looking at an image of {padded[0]}x{padded[1]} pixels"
        require_memory(needed, what, "take a smaller short side")
        pixels = normalize_image(resize_image(image, size), padded)
        scores, masks = self._look(jnp.asarray(pixels)[None], self.rows, self.synonyms)
        return Seen(scores, masks, ImageSizes(padded, size, (height, width)))


def segment(
    model: MaftPlus,
    images: Sequence[UInt8[np.ndarray, "H W 3"]],
    vocabulary: Vocabulary | str,
    *,
    tokenizer: Any,
    templates: Sequence[str] = TEMPLATES,
    short: int = 800,
    longest: int = 1333,
) -> list[Seen]:
    """Find the classes of a vocabulary in images.

    Args:
      model: read, never changed.
      images: of any sizes.
      vocabulary: classes, or text such as "cat; sofa, couch; wall".
      tokenizer: CLIP's, as `conceptax.converters.tokenizer.read_tokenizer` gives it.
      templates: sentences with `{}` for a name.
      short, longest: as for `Segmenter`.

    Returns:
      what the model sees in each image: its `labels()` are [H, W] numbers of classes, and the
      number of classes where there is none.
    """
    if isinstance(vocabulary, str):
        vocabulary = Vocabulary.named(vocabulary)
    rows = text_rows(model.backbone.clip_model, tokenizer, vocabulary, templates=templates)
    look = Segmenter(model, rows, vocabulary.synonyms(), short=short, longest=longest)
    return [look(image) for image in images]


@functools.partial(jax.jit, static_argnums=0)
def _look(
    graphdef: nnx.GraphDef[Any], state: Any, image: Array, rows: Array, synonyms: Array
) -> tuple[Array, Array]:
    output = nnx.merge(graphdef, state)(image, rows)
    last = output.layers[-1]
    parts = last.row_logits, output.open_logits, last.mask_logits
    inside, opened, masks = (part[0].astype(jnp.float32) for part in parts)
    return class_scores(class_logits(inside, synonyms), class_logits(opened, synonyms)), masks
