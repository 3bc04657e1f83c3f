"""SAGE (arXiv 2506.09363): the stable names of `erasing.sage`."""

from .erasing.sage import (
    SageConfig,
    SageStatic,
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
    "erase",
    "erase_step",
    "global_retention_loss",
    "guided_check_objective",
    "prepare",
    "self_check",
    "self_check_objective",
]
