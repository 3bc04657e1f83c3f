"""Training: a plain state, one loop for every pure step, checkpoints, and a sharding table."""

from ...errors import CheckpointError
from .checkpoints import Checkpoints
from .loop import NonFiniteLossError, TrainingInterrupted, abstract_state, compile_step, train
from .paths import check_patterns, dotted, leaf_paths, matches, path_filter, split_trainable
from .processes import ProcessLostError, gather, local_rows, place
from .sharding import (
    DEFAULT_RULES,
    LARGEST,
    RULES,
    constrain_batch,
    make_mesh,
    shard_batch,
    shard_state,
    shard_tree,
)
from .state import (
    TrainState,
    accumulated,
    apply_gradients,
    constant_adamw,
    cosine_adamw,
    init_state,
    step_key,
)

__all__ = [
    "DEFAULT_RULES",
    "LARGEST",
    "RULES",
    "CheckpointError",
    "Checkpoints",
    "NonFiniteLossError",
    "ProcessLostError",
    "TrainState",
    "TrainingInterrupted",
    "abstract_state",
    "accumulated",
    "apply_gradients",
    "check_patterns",
    "compile_step",
    "constant_adamw",
    "constrain_batch",
    "cosine_adamw",
    "dotted",
    "gather",
    "init_state",
    "leaf_paths",
    "local_rows",
    "make_mesh",
    "matches",
    "path_filter",
    "place",
    "shard_batch",
    "shard_state",
    "shard_tree",
    "split_trainable",
    "step_key",
    "train",
]
