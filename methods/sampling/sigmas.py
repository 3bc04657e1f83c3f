"""Noise levels σ: those of training, √((1−ᾱ)/ᾱ), and ways to space them anew; shifts of a flow's.

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
    if schedule.use_karras_sigmas:
        return karras_sigmas(high, low, num_steps)
    if schedule.use_exponential_sigmas:
        return np.exp(np.linspace(math.log(high), math.log(low), num_steps))
    if schedule.use_beta_sigmas:
        import scipy.stats

        ramp = 1 - np.linspace(0, 1, num_steps)
        return low + scipy.stats.beta.ppf(ramp, 0.6, 0.6) * (high - low)
    return None


def karras_sigmas(high: float, low: float, num_steps: int, rho: float = 7.0) -> np.ndarray:
    """Equation 5 of the paper, with its rho: σ evenly spaced in their rho-th root, float64 [n]."""
    ramp = np.linspace(0, 1, num_steps)
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def shifted_by(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """σ of a flow moved towards noise (Esser 2024, arXiv 2403.03206, equation 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def shifted(schedule: Any, sigmas: np.ndarray, shift: float, mu: float | None) -> np.ndarray:
    """σ of a flow, descending, as its schedule moves them; in their dtype.

    By `shift`, or with `use_dynamic_shifting` by e^mu (mu itself, if `time_shift_type` is
    "linear"); then stretched, that the last is `shift_terminal`.

    Raises:
      ValueError: `mu` missing or given in vain, or nothing to stretch.
    """
    if (mu is not None) != schedule.use_dynamic_shifting:
        raise ValueError(
            "use_dynamic_shifting=True needs `mu`: see FlowMatchSchedule.mu_of."
            if schedule.use_dynamic_shifting
            else "`mu` belongs to use_dynamic_shifting=True; this schedule has a fixed shift."
        )
    if mu is None:
        sigmas = shifted_by(sigmas, shift)
    else:
        factor = math.exp(mu) if schedule.time_shift_type == "exponential" else mu
        sigmas = factor / (factor + (1 / sigmas - 1))
    if schedule.shift_terminal:
        rest = 1 - sigmas
        if rest[-1] == 0:
            raise ValueError(
                f"shift_terminal={schedule.shift_terminal} needs num_inference_steps of at least "
                f"2; got {len(sigmas)}."
            )
        sigmas = 1 - rest / (rest[-1] / (1 - schedule.shift_terminal))
    return sigmas


def timestep_of(sigmas: np.ndarray, log_trained: np.ndarray) -> np.ndarray:
    """The fractional training timestep of each σ, linear in log σ, held at the ends."""
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), log_trained, np.arange(len(log_trained)))
