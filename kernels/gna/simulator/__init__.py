"""What Generalized Neighborhood Attention can gain, counted and predicted without a GPU."""

from .schedule import GPUS, Gpu, attention_share_of, end_to_end_speedup, fit, scaled_share
from .search import Choice, search
from .simulate import Simulation, simulate
from .whole_model import RATES, WholeModel, simulate_model

__all__ = [
    "GPUS",
    "RATES",
    "Choice",
    "Gpu",
    "Simulation",
    "WholeModel",
    "attention_share_of",
    "end_to_end_speedup",
    "fit",
    "scaled_share",
    "search",
    "simulate",
    "simulate_model",
]
