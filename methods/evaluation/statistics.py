"""Scores from features, with their intervals, and distances: pure functions of arrays."""

from collections.abc import Callable
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Bool, Float

_Z = 1.959964  # standard errors to either side of a mean: 95 %
_BANDWIDTH = 10.0  # of the kernel of the maximum mean discrepancy


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


def proportion(hits: Bool[np.ndarray, " N"]) -> dict[str, Any]:
    """How many of N, as a rate with its 95 % Wilson interval (Wilson 1927).

    Raises:
      ValueError: N is 0.
    """
    value, low, high = rate(int(hits.sum()), len(hits))
    return {"count": int(hits.sum()), "of": len(hits), "rate": value, "low": low, "high": high}


def rate(successes: int, n: int) -> tuple[float, float, float]:
    """A proportion and the ends of its 95 % Wilson score interval.

    Raises:
      ValueError: unless 0 <= successes <= n and n > 0.
    """
    from scipy.stats import binomtest

    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n and n > 0, got {successes} of {n}")
    interval = binomtest(successes, n).proportion_ci(method="wilson")
    return successes / n, float(interval.low), float(interval.high)


def frechet_distance(first: Float[np.ndarray, "N F"], second: Float[np.ndarray, "M G"]) -> float:
    """The Fréchet distance of two sets of features (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    |m₁ − m₂|² + tr(S₁ + S₂ − 2 (S₁ S₂)^½) of the means m and covariances S, in float64.
    With Inception's features it is the FID; any other features make it another number, so whoever
    reports it names them.

    The covariances are those of samples (divided by N − 1), as in the published FID.  The trace of
    the root is the sum of the roots of the eigenvalues of S₁^½ S₂ S₁^½, which is symmetric, so no
    imaginary part arises where a covariance is singular.  Few samples make the distance larger.

    Raises:
      ValueError: fewer than two samples, sets of different widths, or NaN or infinite features.
    """
    moments = []
    for features in (first, second):
        if len(features) < 2:
            raise ValueError(
                f"a covariance needs at least 2 samples, received {len(first)} and {len(second)}."
            )
        if not np.isfinite(features).all():
            raise ValueError("the features hold NaN or infinite values.")
        features = np.asarray(features, np.float64)
        moments.append((features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))))
    (mean, covariance), (other_mean, other_covariance) = moments
    if mean.shape != other_mean.shape:
        raise ValueError(
            f"both sets need features of one width, received {len(mean)} and {len(other_mean)}."
        )
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    shared = np.linalg.eigvalsh(root @ other_covariance @ root)
    overlap = np.sqrt(np.clip(shared, 0, None)).sum()
    apart = np.sum((mean - other_mean) ** 2)
    distance = apart + np.trace(covariance) + np.trace(other_covariance) - 2 * overlap
    return float(max(distance, 0.0))  # rounding may take equal sets below zero


def maximum_mean_discrepancy(
    first: Float[np.ndarray, "N F"], second: Float[np.ndarray, "M G"]
) -> float:
    """The CMMD, where the features are CLIP's (Jayasumana et al. 2024, arXiv 2401.09603, eq. 5).

    1000 times the squared maximum mean discrepancy of unit features under a Gaussian kernel of
    bandwidth 10, by the biased estimate, as the published program computes it; in float64.

    Raises:
      ValueError: an empty set, sets of different widths, or NaN or infinite features.
    """
    if not (len(first) and len(second)) or first.shape[1] != second.shape[1]:
        raise ValueError(
            f"a discrepancy is of two sets of one width, received {first.shape} and {second.shape}."
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("the features hold NaN or infinite values.")
    first, second = unit(first.astype(np.float64)), unit(second.astype(np.float64))

    def kernel(left: np.ndarray, right: np.ndarray) -> float:
        total = 0.0
        for start in range(0, len(left), 1024):  # rows at a time: N·M may be large
            cosines = left[start : start + 1024] @ right.T
            total += np.exp((cosines - 1) / _BANDWIDTH**2).sum()  # |x − y|² = 2 − 2 cos
        return float(total / (len(left) * len(right)))

    return 1000 * (kernel(first, first) + kernel(second, second) - 2 * kernel(first, second))


def jackknife_interval(
    statistic: Callable[[np.ndarray], float], count: int, groups: int = 10
) -> Interval:
    """A statistic of `count` samples with its 95 % interval, by leaving out one group at a time.

    value ± 1.96 · √((G − 1) / G · Σ (θ₋ᵢ − mean θ₋)²) with samples i, i + G, … as group i
    (Quenouille 1949; Efron and Stein 1981).  Drawing with repetition, as a bootstrap does, would
    make Fréchet distances larger.

    Args:
      statistic: of the samples with these numbers, ascending.
      count: how many samples there are.
      groups: how many groups, at most.

    Raises:
      ValueError: fewer than two samples.
    """
    if count < 2:
        raise ValueError(f"an interval needs at least 2 samples, received {count}.")
    rows, groups = np.arange(count), min(groups, count)
    value = float(statistic(rows))
    without = np.asarray([statistic(rows[rows % groups != group]) for group in range(groups)])
    spread = np.sum((without - without.mean()) ** 2) * (groups - 1) / groups
    half = float(_Z * np.sqrt(spread))
    return {"mean": value, "low": value - half, "high": value + half, "of": count}
