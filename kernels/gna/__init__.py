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
from .block_sparse import (
    BlockMask,
    block_sparse_attention,
    describe_lists,
    from_tiles,
    pooled_scores,
    to_tiles,
)
from .context_parallel import context_parallel_attention
from .merge import merge_attentions
from .problem import Problem, describe

# A program that was compiled or exported elsewhere is not traced here: its calls must be known.
cuda.prepare_what_is_built()

__all__ = [
    "BACKENDS",
    "PREFERENCES",
    "BlockMask",
    "Problem",
    "block_sparse_attention",
    "context_parallel_attention",
    "describe",
    "describe_lists",
    "from_tiles",
    "joint_neighborhood_attention",
    "merge_attentions",
    "neighborhood_attention",
    "neighborhood_mask",
    "pooled_scores",
    "prepare",
    "to_tiles",
    "unsupported",
]
