"""ClassDiffusion (arXiv 2405.17532): the stable names of `personalization.class_diffusion`."""

from .personalization.class_diffusion import (
    ClassDiffusionConfig,
    PersonalisingStatic,
    masked_reconstruction_loss,
    new_rows,
    personalize,
    personalize_step,
    personalized,
    prepare,
    semantic_preservation_loss,
    spl_positions,
)

__all__ = [
    "ClassDiffusionConfig",
    "PersonalisingStatic",
    "masked_reconstruction_loss",
    "new_rows",
    "personalize",
    "personalize_step",
    "personalized",
    "prepare",
    "semantic_preservation_loss",
    "spl_positions",
]
