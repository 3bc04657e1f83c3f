"""SPEED: rewrite the values of cross-attention in the null space of what is retained.

Source: Li et al. 2025, "SPEED: Scalable, Precise, and Efficient Concept Erasure for Diffusion
Models" (arXiv 2503.07392), equation 10: for every value projection W of the cross-attention,

    min_D  |(W + D P) C1 - W C*|^2 + l |D P|^2   with  (D P) C2 = 0

for states C1 of the concepts, C* of the anchor, and C2 that no prompt changes (the start token and
the empty prompt).  P projects onto the directions that the retained states R hardly have: those
eigenvectors of the mean of c c^T over R whose eigenvalue is below a threshold.  By Lagrange
multipliers (equation 11),

    D P = W (C* - C1) C1^T P Q M,   M = (C1 C1^T P + l I)^-1,
                                    Q = I - M C2 (C2^T P M C2)^-1 C2^T P

R is refined for each W: of all retained states those which erasing alone would move farther than
the mean (`prior_shift`, equations 5 and 6) are kept; they are joined by copies of theirs, moved
along the directions in which W changes least (equations 7 to 9), filtered in the same way.

What differs from the paper: C1 C1^T is a mean; l and the threshold are relative to the mean squared
entry of the retained states (the paper's are 1 and 0.1, absolute; the defaults here are those that
erased on the bundled model); the null text
stands in C2 with its leading directions in place of k-means centroids; and a phrase stands for
itself with the states of its last word, of the end token and of the last position, the concept with
all from its last word on (the paper takes the last word alone, and all of them for nudity).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from ...flax_models.clip import pooling_positions
from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..settings import check_settings
from ..text.phrases import Retained, encode_phrases, hidden_states
from .closed_form import EditSettings, paired_states, rewritten
from .common import erasing_prompts

_RCOND = 1e-10  # directions of C2 that P leaves nothing of are no constraint


@dataclasses.dataclass(frozen=True)
class SpeedConfig(EditSettings):
    """All settings of a SPEED edit.

    Attributes:
      threshold: eigenvalues of the retained states below it are none, relative to their mean.
      augmentations: copies of each retained state that are moved (N_A).
      directions: in which a copy is moved (r).
      null_directions: of the empty prompt that stay as they are.
    """

    edited: tuple[str, ...] = ("*.attn2.to_v",)
    regularization: float = 0.01
    threshold: float = 0.5
    augmentations: int = 10
    directions: int = 1
    null_directions: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"augmentations": 0, "directions": 1, "null_directions": 0}
        check_settings(self, least=least, positive=("threshold",))


def null_space(moment: Float[np.ndarray, "D D"], threshold: float) -> Float[np.ndarray, "D D"]:
    """P: onto the eigenvectors of a second moment with an eigenvalue below the threshold."""
    values, vectors = np.linalg.eigh(moment)
    inside = vectors[:, values < threshold]
    return inside @ inside.T


def constrained_update(
    concept: Float[np.ndarray, "N D"],
    anchor: Float[np.ndarray, "N D"],
    invariant: Float[np.ndarray, "K D"],
    projection: Float[np.ndarray, "D D"],
    regularization: float,
) -> Float[np.ndarray, "D D"]:
    """U of D P = W U (equation 11), in float64.

    Args:
      concept, anchor, invariant: states C1, C* and C2, one a row.
      projection: P.
      regularization: l.
    """
    square, moved = concept.T @ concept / len(concept), (anchor - concept).T @ concept
    size = np.eye(len(projection))
    inverse = np.linalg.inv(square @ projection + regularization * size)  # M
    free = invariant @ projection @ inverse @ invariant.T
    fixed = inverse @ invariant.T @ np.linalg.pinv(free, rcond=_RCOND) @ invariant @ projection
    return moved / len(concept) @ projection @ (size - fixed) @ inverse


def prior_shift(
    weight: Float[np.ndarray, "O D"],
    states: Float[np.ndarray, "R D"],
    concept: Float[np.ndarray, "N D"],
    anchor: Float[np.ndarray, "N D"],
    regularization: float,
) -> Float[np.ndarray, " R"]:
    """How far erasing alone would move each state: |D_erase c| (equation 5)."""
    square, moved = (each.T @ concept / len(concept) for each in (concept, anchor - concept))
    alone = moved @ np.linalg.inv(square + regularization * np.eye(len(square)))
    return np.linalg.norm(states @ (weight @ alone).T, axis=1)


def refined(
    weight: Float[np.ndarray, "O D"],
    states: Float[np.ndarray, "R D"],
    concept: Float[np.ndarray, "N D"],
    anchor: Float[np.ndarray, "N D"],
    regularization: float,
    *,
    augmentations: int,
    directions: int,
    rng: np.random.Generator,
) -> Float[np.ndarray, "K D"]:
    """The retained states that count for W, and moved copies of them (equations 6 to 9)."""

    def influenced(some: np.ndarray) -> np.ndarray:
        shifts = prior_shift(weight, some, concept, anchor, regularization)
        return some[shifts >= shifts.mean()]

    kept = influenced(states)
    if not augmentations:
        return kept
    least = np.linalg.svd(weight, full_matrices=False)[2][-directions:]
    copies = np.repeat(kept, augmentations, axis=0)
    noise = rng.normal(size=copies.shape) @ least.T @ least
    return np.concatenate([kept, influenced(copies + noise)])


def erase(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: SpeedConfig | None = None,
    *,
    retain: Sequence[str] | Retained | None = None,
    seed: int = 0,
    **options: Any,
) -> StableDiffusionPipeline:
    """Erase concepts and return the pipeline with the edited UNet in its place.

    Arguments and errors as of `uce.erase`.
    """
    del options
    config = config or SpeedConfig()
    prompts, rows = erasing_prompts(pipeline, concepts, config, retain, seed, frames=config.frames)
    concept, anchor = (each.astype(np.float64) for each in paired_states(pipeline, prompts))
    states, invariant = phrase_states(pipeline, rows), invariant_states(pipeline, config)
    unit, rng = float(np.mean(states**2)), np.random.default_rng(seed)
    regularization = config.regularization * unit

    def rewrite(_: str, weight: np.ndarray) -> np.ndarray:
        sizes = {"augmentations": config.augmentations, "directions": config.directions}
        kept = refined(weight, states, concept, anchor, regularization, **sizes, rng=rng)
        projection = null_space(kept.T @ kept / len(kept), config.threshold * unit)
        update = constrained_update(concept, anchor, invariant, projection, regularization)
        return weight + weight @ update

    unet = rewritten(pipeline.unet, config.edited, states.shape[1], rewrite)
    return dataclasses.replace(pipeline, unet=unet)


def phrase_states(
    pipeline: StableDiffusionPipeline, rows: Int[np.ndarray, "N L"]
) -> Float[np.ndarray, "R D"]:
    """States of phrases at their last word, at the end token and at the last position, float64."""
    encoder, found = pipeline.prompt_encoder, []
    for start in range(0, len(rows), 256):
        part = rows[start : start + 256]
        states = np.asarray(hidden_states(encoder, part), np.float64)
        end = np.asarray(pooling_positions(encoder.config, jnp.asarray(part)))
        every = np.arange(len(part))
        found += [states[every, place] for place in (end - 1, end, np.full_like(end, -1))]
    return np.concatenate(found)


def invariant_states(
    pipeline: StableDiffusionPipeline, config: SpeedConfig
) -> Float[np.ndarray, "K D"]:
    """C2: the start token's state, and the leading directions of the other states of no text."""
    empty = encode_phrases(pipeline.tokenizer, [""], pipeline.max_length)
    start, *others = np.asarray(hidden_states(pipeline.prompt_encoder, empty)[0], np.float64)
    leading = np.linalg.svd(np.stack(others), full_matrices=False)[2]
    return np.stack([start, *leading[: config.null_directions]])
