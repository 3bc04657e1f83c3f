"""SAGE (arXiv 2506.09363): the stable names of `erasing.sage`."""

from .erasing.sage import (
    SageConfig,
    SageStatic,
    edited_text_encoder,
    erase,
    erase_step,
    global_retention_loss,
    guided_check_objective,
    prepare,
    self_check,
    self_check_objective,
)

__all__ = [
    "SageConfig",
    "SageStatic",
    "edited_text_encoder",
    "erase",
    "erase_step",
    "global_retention_loss",
    "guided_check_objective",
    "prepare",
    "self_check",
    "self_check_objective",
]
