"""UCE: erase concepts by rewriting the cross-attention projections in closed form.

Source: Gandikota et al. 2024, "Unified Concept Editing in Diffusion Models" (arXiv 2308.14761),
equation 7: for every key and value projection W of the cross-attention,

    W' = (s_e S v_i* c_i^T + s_p S W c_j c_j^T + l W) (s_e S c_i c_i^T + s_p S c_j c_j^T + l I)^-1

with v_i* = W c_i*, the problem and the symbols of `closed_form`.  l is the regularization of the
authors' code.  Nothing is trained.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..settings import check_settings
from ..text.phrases import Retained
from .closed_form import (
    EditSettings,
    edit_matrix,
    mean_square,
    paired_states,
    rewritten,
    second_moment,
)
from .common import erasing_prompts


@dataclasses.dataclass(frozen=True)
class UceConfig(EditSettings):
    """All settings of a UCE edit.

    Attributes:
      erase_weight: weight of the concepts' states (s_e).
      preserve_weight: weight of the retained states (s_p).
    """

    erase_weight: float = 1.0
    preserve_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, least={"preserve_weight": 0}, positive=("erase_weight",))


def erase(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: UceConfig | None = None,
    *,
    retain: Sequence[str] | Retained | None = None,
    seed: int = 0,
    **options: Any,
) -> StableDiffusionPipeline:
    """Erase concepts and return the pipeline with the edited UNet in its place.

    Arguments as of `erasing.erase`; options of the training loop are not used.

    Raises:
      ConceptError: no or unusable concepts, or nothing left to retain.
      ValueError: a pattern of projections that matches nothing.
    """
    del options
    config = config or UceConfig()
    prompts, retained = erasing_prompts(
        pipeline, concepts, config, retain, seed, frames=config.frames
    )
    concept, anchor = paired_states(pipeline, prompts)
    matrix = edit(config, concept, anchor, second_moment(pipeline, retained))
    unet = rewritten(pipeline.unet, config.edited, len(matrix), lambda _, weight: weight @ matrix)
    return dataclasses.replace(pipeline, unet=unet)


def edit(
    config: UceConfig, concept: np.ndarray, anchor: np.ndarray, preserved: np.ndarray
) -> np.ndarray:
    """`edit_matrix` with the weights of some settings."""
    return edit_matrix(
        concept,
        anchor,
        preserved,
        erase_weight=config.erase_weight,
        preserve_weight=config.preserve_weight,
        regularization=config.regularization * mean_square(preserved),
    )
