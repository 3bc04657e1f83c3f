"""MAFT+ (Jiao et al. 2024): the stable names of `segmentation.maft_plus`."""

from .segmentation.maft_plus import (
    MaftPlusStatic,
    MaftPlusTraining,
    fit,
    mask_aware_loss,
    poly_adamw,
    prepare,
    representation_compensation_loss,
    train_step,
)

__all__ = [
    "MaftPlusStatic",
    "MaftPlusTraining",
    "fit",
    "mask_aware_loss",
    "poly_adamw",
    "prepare",
    "representation_compensation_loss",
    "train_step",
]
