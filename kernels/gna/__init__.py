"""Generalized Neighborhood Attention (arXiv 2504.16922): sparse multi-dimensional attention."""

from . import cuda
from .api import (
    BACKENDS,
    PREFERENCES,
    joint_neighborhood_attention,
    neighborhood_attention,
    neighborhood_mask,
    prepare,
    unsupported,
)
from .context_parallel import context_parallel_attention
from .merge import merge_attentions
from .problem import Problem, describe

# A program that was compiled or exported elsewhere is not traced here: its calls must be known.
cuda.prepare_what_is_built()

__all__ = [
    "BACKENDS",
    "PREFERENCES",
    "Problem",
    "context_parallel_attention",
    "describe",
    "joint_neighborhood_attention",
    "merge_attentions",
    "neighborhood_attention",
    "neighborhood_mask",
    "prepare",
    "unsupported",
]
