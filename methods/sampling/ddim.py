"""DDIM (Song 2021, arXiv 2010.02502): deterministic sampling, or with fresh noise.

Tables of `linear.LinearSampler`, equal to diffusers' `DDIMScheduler`: equations 12 and 16 of the
paper, with s = t−Δ: x_s = √ᾱ_s·x₀ + √(1−ᾱ_s−σ²)·ε + σ·z, where
σ = η·√((1−ᾱ_s)/(1−ᾱ_t))·√(1−ᾱ_t/ᾱ_s). η = 0 is deterministic, η = 1 is ancestral (DDPM) sampling.
"""

from __future__ import annotations

import numpy as np

from .linear import LinearSampler, clipping, estimate_of, linear_sampler
from .schedule import NoiseSchedule, alphas_cumprod, inference_timesteps


def ddim_sampler(
    schedule: NoiseSchedule, num_inference_steps: int, *, eta: float = 0.0
) -> LinearSampler:
    """Tables of a DDIM run; `eta` in [0, 1] scales the fresh noise of each step.

    Raises:
      ValueError: `eta` outside [0, 1]; step counts the schedule does not allow; an ε-model at zero
        signal (`rescale_betas_zero_snr`), where x₀ is undefined.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie between 0 (DDIM) and 1 (DDPM); got {eta}.")
    spacing = schedule.timestep_spacing or "leading"
    timesteps = inference_timesteps(schedule, num_inference_steps, spacing)
    timesteps = np.round(timesteps).astype(np.int32)
    # A constant stride back from every timestep, even if their spacing is uneven: as in diffusers.
    following = timesteps - schedule.num_train_timesteps // num_inference_steps
    table = alphas_cumprod(schedule)
    final = table[0] if schedule.set_alpha_to_one is False else np.float32(1)
    alpha = table[timesteps]
    alpha_next = np.where(following >= 0, table[np.maximum(following, 0)], final)

    signal, sigma = np.sqrt(alpha), np.sqrt(1 - alpha)
    variance = (1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)
    noise_scale = np.float32(eta) * np.sqrt(variance)
    direction = np.sqrt(1 - alpha_next - np.square(noise_scale))
    # ε as the model's output and x give it, whatever becomes of x₀
    of_x, of_output = {
        "epsilon": (0.0, 1.0),
        "sample": (1 / sigma, -signal / sigma),
        "v_prediction": (sigma, signal),
    }[schedule.prediction_type]
    clips = clipping(schedule, default=True)
    return linear_sampler(
        timesteps=timesteps,
        estimate=estimate_of(schedule, signal, sigma, timesteps, bounded=bool(clips)),
        keep=direction * of_x,
        output_weight=direction * of_output,
        weights=np.sqrt(alpha_next),
        noise_scale=noise_scale if eta > 0 else None,
        **clips,
    )
