"""Samplers that draw fresh noise at every step: DDPM, ancestral Euler, LCM.

Tables of `linear.LinearSampler`, equal to diffusers' `DDPMScheduler`,
`EulerAncestralDiscreteScheduler` and `LCMScheduler`.
"""

from __future__ import annotations

import numpy as np

from .linear import LinearSampler, clipping, estimate_of, linear_sampler
from .schedule import NoiseSchedule, alphas_cumprod, inference_timesteps
from .sigmas import initial_sigma, trained_sigmas

_SIGMA_DATA = 0.5  # LCM's boundary conditions, arXiv 2310.04378, appendix B


def ddpm_sampler(schedule: NoiseSchedule, num_inference_steps: int) -> LinearSampler:
    """Ancestral sampling (Ho 2020, arXiv 2006.11239, equations 6 and 7).

    With ᾱ' that of the next timestep (1 after the last) and β = 1 − ᾱ/ᾱ':
    x' = √ᾱ'·β/(1−ᾱ)·x₀ + √(ᾱ/ᾱ')·(1−ᾱ')/(1−ᾱ)·x + √v·z, where v is β·(1−ᾱ')/(1−ᾱ) ("fixed_small")
    or β ("fixed_large"). No noise is added at t = 0.

    Raises:
      ValueError: a step count or variance that is not supported, or an ε-model at zero signal.
    """
    if schedule.variance_type == "fixed_large_log":
        raise ValueError(
            "DDPM sampling with variance_type='fixed_large_log' is not supported; accepted: "
            "fixed_small, fixed_small_log, fixed_large."
        )
    spacing = schedule.timestep_spacing or "leading"
    timesteps = np.round(inference_timesteps(schedule, num_inference_steps, spacing))
    timesteps = timesteps.astype(np.int32)
    table = alphas_cumprod(schedule).astype(np.float64)
    alpha = table[timesteps]
    alpha_next = np.append(alpha[1:], 1.0)
    ratio = alpha / alpha_next
    beta = 1 - ratio
    variance = beta
    if schedule.variance_type != "fixed_large":
        variance = np.maximum((1 - alpha_next) / (1 - alpha) * beta, 1e-20)
    return linear_sampler(
        timesteps=timesteps,
        estimate=estimate_of(schedule, np.sqrt(alpha), np.sqrt(1 - alpha), timesteps),
        keep=np.sqrt(ratio) * (1 - alpha_next) / (1 - alpha),
        weights=np.sqrt(alpha_next) * beta / (1 - alpha),
        noise_scale=np.where(timesteps > 0, np.sqrt(variance), 0.0),
        **clipping(schedule, default=True),
    )


def euler_ancestral_sampler(schedule: NoiseSchedule, num_inference_steps: int) -> LinearSampler:
    """Euler steps down to σ↓, then noise of σ↑ with σ↓² + σ↑² = σ'².

    σ↑² = σ'²·(σ² − σ'²)/σ², k-diffusion's ancestral step at η = 1, as in diffusers; the sample
    carries noise of standard deviation σ, as in `euler`.

    Raises:
      ValueError: a step count that the schedule does not allow, or a model that predicts x₀.
    """
    if schedule.prediction_type == "sample":
        raise ValueError(
            "euler-ancestral takes models of prediction_type epsilon or v_prediction, not sample."
        )
    spacing = schedule.timestep_spacing or "linspace"
    timesteps = inference_timesteps(schedule, num_inference_steps, spacing).astype(np.float32)
    trained = trained_sigmas(schedule)
    sigmas = np.append(np.interp(timesteps, np.arange(len(trained)), trained), 0).astype(np.float32)
    sigma, sigma_next = sigmas[:-1].astype(np.float64), sigmas[1:].astype(np.float64)
    up = np.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)
    down = np.sqrt(sigma_next**2 - up**2)
    scale = 1 / np.sqrt(sigma**2 + 1)
    # x here is x_t of `estimate_of` over √ᾱ, that is √(σ²+1) times it.
    of_x, of_output = (
        (1.0, -sigma) if schedule.prediction_type == "epsilon" else (scale**2, -sigma * scale)
    )
    return linear_sampler(
        timesteps=timesteps,
        init_noise_sigma=initial_sigma(sigmas, spacing),
        input_scale=scale,
        estimate=(of_x, of_output, 1.0),
        keep=down / sigma,
        weights=1 - down / sigma,
        noise_scale=up,
    )


def lcm_sampler(schedule: NoiseSchedule, num_inference_steps: int) -> LinearSampler:
    """Latent consistency sampling (Luo 2023, arXiv 2310.04378, algorithm 3).

    Each step denoises all the way, f = c_skip·x + c_out·x₀, and noises it again to the next
    timestep; the last one is f itself. Timesteps are a part of those that the model was distilled
    on, `original_inference_steps` of them.

    Raises:
      ValueError: more steps than the model was distilled on, or an ε-model at zero signal.
    """
    original, count = schedule.original_inference_steps, schedule.num_train_timesteps
    if not 1 <= num_inference_steps <= min(original, count):
        raise ValueError(
            f"num_inference_steps must be between 1 and original_inference_steps={original}; "
            f"got {num_inference_steps}."
        )
    distilled = (np.arange(1, original + 1) * (count // original) - 1)[::-1]
    rows = np.floor(np.linspace(0, original, num_inference_steps, endpoint=False)).astype(int)
    timesteps = distilled[rows].astype(np.int32)
    table = alphas_cumprod(schedule).astype(np.float64)
    alpha = table[timesteps]
    alpha_next = np.append(alpha[1:], 1.0)  # after the last step there is no noise
    scaled = timesteps * schedule.timestep_scaling
    skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
    out = scaled / np.sqrt(scaled**2 + _SIGMA_DATA**2)
    return linear_sampler(
        timesteps=timesteps,
        estimate=estimate_of(schedule, np.sqrt(alpha), np.sqrt(1 - alpha), timesteps),
        keep=np.sqrt(alpha_next) * skip,
        weights=np.sqrt(alpha_next) * out,
        noise_scale=np.sqrt(1 - alpha_next),
        **clipping(schedule, default=False),
    )
