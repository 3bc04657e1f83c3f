"""The Fréchet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

With Inception's features it is the FID; any other features make it another number, so whoever
reports it names them.
"""

import numpy as np
from jaxtyping import Float


def frechet_distance(
    first: Float[np.ndarray, "N F"], second: Float[np.ndarray, "M G"]
) -> float:  # fmt: skip
    """|m₁ − m₂|² + tr(S₁ + S₂ − 2 (S₁ S₂)^½) of the means m and covariances S, in float64.

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
    distance = (
        np.sum((mean - other_mean) ** 2)
        + np.trace(covariance)
        + np.trace(other_covariance)
        - 2 * overlap
    )
    return float(max(distance, 0.0))  # rounding may take equal sets below zero
