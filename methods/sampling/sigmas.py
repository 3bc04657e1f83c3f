"""Noise levels σ = √((1−ᾱ)/ᾱ): those of training, and ways to space them anew.

Karras 2022 (arXiv 2206.00364); the names are diffusers'. Host-side numpy.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .schedule import NoiseSchedule, alphas_cumprod


def trained_sigmas(schedule: NoiseSchedule) -> np.ndarray:
    """σ of every training timestep, float32 [num_train_timesteps], ascending."""
    alpha = alphas_cumprod(schedule)
    if schedule.rescale_betas_zero_snr:
        alpha = alpha.copy()
        alpha[-1] = 2**-24  # keeps the last σ finite
    return np.sqrt((1 - alpha) / alpha)


def initial_sigma(sigmas: np.ndarray, spacing: str) -> float:
    """The standard deviation of what a run starts from, as diffusers has it.

    σ_max, and √(σ_max²+1), which counts the image itself, for "leading" timesteps.
    """
    largest = sigmas.max()
    return float(np.sqrt(largest**2 + 1) if spacing == "leading" else largest)


def respaced_sigmas(
    schedule: NoiseSchedule, sigmas: np.ndarray, num_steps: int
) -> np.ndarray | None:
    """σ spaced anew between the ends of `sigmas` (or sigma_min and sigma_max), float64 [n]."""
    low = float(sigmas[-1]) if schedule.sigma_min is None else schedule.sigma_min
    high = float(sigmas[0]) if schedule.sigma_max is None else schedule.sigma_max
    return respaced(schedule, high, low, num_steps)


def respaced(schedule: Any, high: float, low: float, num_steps: int) -> np.ndarray | None:
    """`num_steps` levels from high to low as the schedule's `use_*_sigmas` asks; None: as none."""
    ramp = np.linspace(0, 1, num_steps)
    if schedule.use_karras_sigmas:
        rho = 7.0  # the paper's value
        return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    if schedule.use_exponential_sigmas:
        return np.exp(np.linspace(math.log(high), math.log(low), num_steps))
    if schedule.use_beta_sigmas:
        import scipy.stats

        return low + scipy.stats.beta.ppf(1 - ramp, 0.6, 0.6) * (high - low)
    return None


def timestep_of(sigmas: np.ndarray, log_trained: np.ndarray) -> np.ndarray:
    """The fractional training timestep of each σ, linear in log σ, held at the ends."""
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), log_trained, np.arange(len(log_trained)))
