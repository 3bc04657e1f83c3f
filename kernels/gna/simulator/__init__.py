"""What Generalized Neighborhood Attention can gain, counted and predicted without a GPU."""

from .schedule import GPUS, Gpu, attention_share_of, end_to_end_speedup, fit, scaled_share
from .search import Choice, search
from .simulate import Simulation, simulate

__all__ = [
    "GPUS",
    "Choice",
    "Gpu",
    "Simulation",
    "attention_share_of",
    "end_to_end_speedup",
    "fit",
    "scaled_share",
    "search",
    "simulate",
]
