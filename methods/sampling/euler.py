"""Euler sampling of the probability-flow ODE (Karras 2022, arXiv 2206.00364).

Tables of `linear.LinearSampler`, equal to diffusers' `EulerDiscreteScheduler`. The sample carries
noise of standard deviation σ (x = x₀ + σ·ε, σ_t = √((1−ᾱ_t)/ᾱ_t)); the model sees x/√(σ²+1). One
step from σ̂ to σ': x ← x + (x − x₀)/σ̂·(σ' − σ̂). With `s_churn` > 0 noise is first raised from σ to
σ̂ (algorithm 2 of the paper).
"""

from __future__ import annotations

import math

import numpy as np

from .linear import LinearSampler, linear_sampler
from .schedule import NoiseSchedule, float32_linspace, inference_timesteps
from .sigmas import initial_sigma, respaced_sigmas, timestep_of, trained_sigmas


def euler_sampler(
    schedule: NoiseSchedule,
    num_inference_steps: int,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> LinearSampler:
    """Tables of an Euler run; the default is the deterministic one.

    `s_churn` ≥ 0 is the amount of fresh noise over the whole run, added where σ lies in
    [s_tmin, s_tmax] and scaled by `s_noise` (arXiv 2206.00364, algorithm 2).

    Raises:
      ValueError: `s_churn` negative, or step counts the schedule does not allow.
    """
    if s_churn < 0:
        raise ValueError(f"s_churn must not be negative; got {s_churn}.")
    spacing = schedule.timestep_spacing or "linspace"
    timesteps, sigmas = timesteps_and_sigmas(schedule, num_inference_steps, spacing)
    count = len(timesteps)
    sigma, sigma_next = sigmas[:count].astype(np.float64), sigmas[1 : count + 1].astype(np.float64)

    churn = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    gamma = np.where((s_tmin <= sigma) & (sigma <= s_tmax), churn, 0.0)
    sigma_hat = sigma * (gamma + 1)
    input_scale = 1 / np.sqrt(sigma**2 + 1)
    # x₀ of x and the output; those of v are the scalings of σ, also under churn, as in diffusers
    of_x, of_output = {
        "epsilon": (1.0, -sigma_hat),
        "sample": (0.0, 1.0),
        "v_prediction": (input_scale**2, -sigma * input_scale),
    }[schedule.prediction_type]
    keep = sigma_next / sigma_hat
    raised = s_noise * np.sqrt(sigma_hat**2 - sigma**2)  # which the step then takes along
    return linear_sampler(
        timesteps=timesteps,
        init_noise_sigma=initial_sigma(sigmas, spacing),
        input_scale=input_scale,
        estimate=(of_x, of_output, 1.0),
        keep=keep,
        weights=1 - keep,
        noise_scale=raised * (keep + (1 - keep) * of_x) if (gamma > 0).any() else None,
    )


def timesteps_and_sigmas(
    schedule: NoiseSchedule, num_steps: int, spacing: str
) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps [n] and σ [n + 1] (one more for "log_linear"), float32, descending."""
    trained = trained_sigmas(schedule)
    log_trained = np.log(trained)

    timesteps = inference_timesteps(schedule, num_steps, spacing).astype(np.float32)
    if schedule.interpolation_type == "linear":
        sigmas = np.interp(timesteps, np.arange(len(trained)), trained)
    else:
        high, low = float(log_trained[-1]), float(log_trained[0])
        sigmas = np.exp(float32_linspace(high, low, num_steps + 1))

    respaced = respaced_sigmas(schedule, sigmas, num_steps)
    if respaced is not None:
        sigmas = respaced
        timesteps = timestep_of(sigmas, log_trained)
    last = trained[0] if schedule.final_sigmas_type == "sigma_min" else 0
    sigmas = np.concatenate([sigmas, [last]]).astype(np.float32)
    if schedule.timestep_type == "continuous" and schedule.prediction_type == "v_prediction":
        timesteps = np.float32(0.25) * np.log(sigmas[:num_steps])
    return timesteps.astype(np.float32), sigmas
