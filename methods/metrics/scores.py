"""Scores from features, with their intervals: pure functions of arrays."""

from typing import TypedDict

import numpy as np
from jaxtyping import Float

_Z = 1.959964  # standard errors to either side of a mean: 95 %


class Interval(TypedDict):
    """A mean with its 95 % interval, and of how many values it is."""

    mean: float
    low: float
    high: float
    of: int


def unit(features: Float[np.ndarray, "*N P"]) -> Float[np.ndarray, "*N P"]:
    """Rows of length one."""
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def text_alignment(
    images: Float[np.ndarray, "N *Q P"], texts: Float[np.ndarray, "N P"]
) -> Float[np.ndarray, " N"]:
    """Cosine of each image and its own text: CLIP-T, BLIP-ITC, BLIP2-T.

    Where an image is Q vectors (BLIP-2's queries), the one nearest to the text counts: the largest
    cosine (arXiv 2301.12597, section 3.1).
    """
    if images.ndim == 2:
        images = images[:, None]  # [N, Q, P]
    cosines: Float[np.ndarray, "N Q"] = np.einsum("nqp,np->nq", unit(images), unit(texts))
    return cosines.max(axis=1)


def image_similarity(
    images: Float[np.ndarray, "N P"], references: Float[np.ndarray, "M P"]
) -> Float[np.ndarray, " N"]:
    """Mean cosine of each image and every reference: CLIP-I, DINO-I (arXiv 2208.12242)."""
    return (unit(images) @ unit(references).T).mean(axis=1)


def mutual_similarity(references: Float[np.ndarray, "M P"]) -> Float[np.ndarray, " M"]:
    """Mean cosine of each image and every other one of its set; M is at least 2."""
    rows = unit(references)
    cosines: Float[np.ndarray, "M M"] = rows @ rows.T
    return (cosines.sum(axis=1) - cosines.diagonal()) / (len(rows) - 1)


def frame_consistency(frames: Float[np.ndarray, "N F P"]) -> Float[np.ndarray, " N"]:
    """Mean cosine of consecutive frames of each video; F is at least 2."""
    rows = unit(frames)
    return np.sum(rows[..., 1:, :] * rows[..., :-1, :], axis=-1).mean(axis=-1)


def clip_score(
    images: Float[np.ndarray, "N P"], texts: Float[np.ndarray, "N P"]
) -> Float[np.ndarray, " N"]:
    """100 · max(cos, 0) of each image with its own text.

    Hessel et al. 2021 (arXiv 2104.08718, eq. 1) in the scale in which it is reported (theirs is
    w = 2.5).
    """
    return 100.0 * np.maximum(text_alignment(images, texts), 0.0)


def mean_interval(values: Float[np.ndarray, " N"]) -> Interval:
    """The mean and its 95 % interval: mean ± 1.96 · s / √N.

    Raises:
      ValueError: fewer than two values, or NaN or infinite ones.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"an interval needs at least 2 finite values, received {values}.")
    mean, half = float(values.mean()), float(_Z * values.std(ddof=1) / np.sqrt(len(values)))
    return {"mean": mean, "low": mean - half, "high": mean + half, "of": len(values)}
