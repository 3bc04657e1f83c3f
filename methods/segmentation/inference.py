"""From a model's outputs to label maps (section 7 of MAFT+'s evaluation code).

Masks are `[Q, h, w]` logits of one image, which was resized to `size`, padded at the bottom and the
right to `padded`, and has `original` rows and columns in its file.
"""

import functools
from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ...flax_models.layers.bilinear import resize
from .metrics import Segment

_BAND = 2**24  # numbers that are held at once for a band of rows


class ImageSizes(NamedTuple):
    """Rows and columns of an image: padded for the model, before padding, and in its file."""

    padded: tuple[int, int]
    size: tuple[int, int]
    original: tuple[int, int]


def class_scores(
    class_logits: Float[Array, "*B Q C"], open_logits: Float[Array, "*B Q C"]
) -> Float[Array, "*B Q C"]:
    """Probabilities of K classes and void, which sum to 1.

    Void is as likely as the decoder's own head says; the classes share the rest as the
    open-vocabulary logits say.
    """
    void = jax.nn.softmax(class_logits, axis=-1)[..., -1:]
    classes = jax.nn.softmax(open_logits[..., :-1], axis=-1)
    return jnp.concatenate([classes * (1 - void), void], axis=-1)


@functools.partial(jax.jit, static_argnums=(2, 4))
def semantic_labels(
    scores: Float[Array, "Q C"],
    mask_logits: Float[Array, "Q h w"],
    sizes: ImageSizes,
    least_score: Float[Array, ""] | float = 0.0,
    masks_first: bool = False,
) -> Int[Array, "H W"]:
    """The class of each pixel, found a few rows at a time; K where none has `least_score`.

    Queries vote for classes inside their masks, and votes are resized to the original image; with
    `masks_first`, as is done for panoptic maps, masks are instead.
    """
    rows, columns = sizes.size
    maps = resize(mask_logits, sizes.padded)[:, :rows, :columns]
    if not masks_first:
        maps = jnp.einsum("qk,qhw->khw", scores[:, :-1], jax.nn.sigmoid(maps))
    height, width = sizes.original
    band = max(1, min(height, _BAND // (width * len(scores))))
    weights = resize(jnp.eye(rows), (height, rows), axis=0)  # [H, h]
    weights = jnp.pad(weights, ((0, -height % band), (0, 0))).reshape(-1, band, rows)

    def of_band(weights: Array) -> Array:
        part = resize(jnp.einsum("bh,nhw->nbw", weights, maps), (band, width))
        if masks_first:
            part = jnp.einsum("qk,qbw->kbw", scores[:, :-1], jax.nn.sigmoid(part))
        return jnp.where(part.max(axis=0) >= least_score, part.argmax(axis=0), len(part))

    return jax.lax.map(of_band, weights).reshape(-1, width)[:height]


@functools.partial(jax.jit, static_argnums=1)
def _full_mask(mask_logits: Array, sizes: ImageSizes) -> Array:
    """One mask, of the original size."""
    rows, columns = sizes.size
    logits = resize(mask_logits, sizes.padded, axis=0)[:rows, :columns]
    return jax.nn.sigmoid(resize(logits, sizes.original, axis=0))


def panoptic_map(
    scores: Float[Array, "Q C"],
    mask_logits: Float[Array, "Q h w"],
    sizes: ImageSizes,
    things: Collection[int],
    *,
    least_score: float = 0.2,
    least_overlap: float = 0.7,
) -> tuple[Int[np.ndarray, "H W"], dict[int, Segment]]:
    """Segments that do not overlap; what no query wins is void.

    A query whose best class is not void and scores more than `least_score` competes for pixels with
    its score times its mask. It keeps those inside its own mask, unless it won less than
    `least_overlap` of as many pixels as that mask has. Stuff of one class is one segment.

    Args:
      scores: from `class_scores`.
      mask_logits: of the same queries.
      sizes: of the image.
      things: classes whose instances are told apart.

    Returns:
      ids from 1 on, 0 for void, at the original size; and what each id is.
    """
    chances, logits = np.asarray(scores), np.asarray(mask_logits)
    label, best = chances.argmax(axis=-1), chances.max(axis=-1)
    kept = np.flatnonzero((label != chances.shape[1] - 1) & (best > least_score))
    ids = np.zeros(sizes.original, np.int32)
    segments: dict[int, Segment] = {}
    if not kept.size:
        return ids, segments
    winner, most = np.full(sizes.original, -1), np.zeros(sizes.original, np.float32)
    inside = []  # each mask's pixels
    for place, query in enumerate(kept):
        mask = np.asarray(_full_mask(logits[query], sizes))
        inside.append(mask >= 0.5)
        vote = best[query] * mask
        winner[vote > most] = place
        np.maximum(most, vote, out=most)
    stuff: dict[int, int] = {}
    for place, query in enumerate(kept):
        category = int(label[query])
        won, own = winner == place, inside[place]
        region = won & own
        if not region.any() or won.sum() / own.sum() < least_overlap:
            continue
        if category in stuff:
            ids[region] = stuff[category]
            continue
        new = len(segments) + 1
        ids[region] = new
        segments[new] = Segment(category)
        if category not in things:
            stuff[category] = new
    return ids, segments
