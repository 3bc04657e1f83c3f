"""RECE: UCE, and again for the states that would bring the concept back, found in closed form.

Source: Gong et al. 2024, "Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models"
(arXiv 2407.12383), section 3.  After an edit of the projections W_i to W_i', the state c' that the
edited model projects as the original projected the concept's state c,

    min_c'  S_i |W_i' c' - W_i c|^2 + lambda |c'|^2

has the closed form

    c' = (lambda I + S_i W_i'^T W_i')^-1 (S_i W_i'^T W_i) c.

Each epoch finds c' of every state of the concept, and maps them onto the anchor as `uce` does, from
the projections that the last epoch left; the first edit is UCE's own.  lambda |c'|^2 is the paper's
term for keeping the rest: a small c' takes a small edit.

As all edits are W' = W M, the sums need only G = S_i W_i^T W_i (`adversarial_states`).  The
paper's lambda is absolute (by the authors' README 0.1 for nudity, 0.001 for objects and styles);
here it is relative to the mean diagonal entry of G, since models differ in their number of layers.
The authors preserve the empty prompt (or, for styles, as many artists as are erased) with s_p = 0.1
and l = 0.1; here the retained phrases are preserved, as in `uce`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..settings import check_settings
from ..text.phrases import Retained
from .closed_form import mean_square, paired_states, rewritten, second_moment
from .common import erasing_prompts
from .uce import UceConfig, edit


@dataclasses.dataclass(frozen=True)
class ReceConfig(UceConfig):
    """All settings of a RECE edit: those of UCE, and its own.

    Attributes:
      epochs: how often states are found and erased after the first edit.
      search_regularization: lambda, relative to the mean diagonal entry of S W^T W.
    """

    epochs: int = 1
    search_regularization: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, least={"epochs": 0}, positive=("search_regularization",))


def adversarial_states(
    concept: Float[np.ndarray, "N D"],
    matrix: Float[np.ndarray, "D D"],
    gram: Float[np.ndarray, "D D"],
    regularization: float,
) -> Float[np.ndarray, "N D"]:
    """c' of each c (see above), in float64.

    Args:
      concept: states c, one a row.
      matrix: M of the edit so far, W' = W M.
      gram: G = S W^T W over all edited projections.
      regularization: lambda.
    """
    now = matrix.T @ gram @ matrix + regularization * np.eye(len(matrix))
    return np.linalg.solve(now, matrix.T @ gram @ concept.T.astype(np.float64)).T


def erase(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: ReceConfig | None = None,
    *,
    retain: Sequence[str] | Retained | None = None,
    seed: int = 0,
    **options: Any,
) -> StableDiffusionPipeline:
    """Erase concepts and return the pipeline with the edited UNet in its place.

    Arguments and errors as of `uce.erase`.
    """
    del options
    config = config or ReceConfig()
    prompts, retained = erasing_prompts(
        pipeline, concepts, config, retain, seed, frames=config.frames
    )
    concept, anchor = paired_states(pipeline, prompts)
    preserved = second_moment(pipeline, retained)
    weights: list[np.ndarray] = []

    def kept(_: str, weight: np.ndarray) -> np.ndarray:
        weights.append(weight)
        return weight

    rewritten(pipeline.unet, config.edited, len(preserved), kept)
    gram = sum(weight.T @ weight for weight in weights)
    regularization = config.search_regularization * mean_square(np.asarray(gram))
    matrix = edit(config, concept, anchor, preserved)
    for _ in range(config.epochs):
        found = adversarial_states(concept, matrix, np.asarray(gram), regularization)
        matrix = matrix @ edit(config, found, anchor, preserved)
    unet = rewritten(pipeline.unet, config.edited, len(matrix), lambda _, weight: weight @ matrix)
    return dataclasses.replace(pipeline, unet=unet)
