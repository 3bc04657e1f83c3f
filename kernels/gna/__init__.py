"""Generalized Neighborhood Attention (arXiv 2504.16922): sparse multi-dimensional attention."""

from .api import (
    BACKENDS,
    PREFERENCES,
    joint_neighborhood_attention,
    neighborhood_attention,
    neighborhood_mask,
    unsupported,
)
from .merge import merge_attentions
from .problem import Problem, describe

__all__ = [
    "BACKENDS",
    "PREFERENCES",
    "Problem",
    "describe",
    "joint_neighborhood_attention",
    "merge_attentions",
    "neighborhood_attention",
    "neighborhood_mask",
    "unsupported",
]
