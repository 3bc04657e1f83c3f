"""Noise schedules and samplers: pure steps over tables, equal to diffusers' schedulers."""

from __future__ import annotations

from .ddim import DDIMSampler, ddim_sampler, ddim_step
from .euler import EulerSampler, euler_sampler, euler_step
from .latents import denoise_until, encode_images, noise_latents, noised_latents, to_unit
from .schedule import (
    NoiseSchedule,
    add_noise,
    alphas_cumprod,
    prediction_to_epsilon,
    prediction_to_x0,
    training_target,
    velocity,
)

Sampler = DDIMSampler | EulerSampler
SAMPLER_KINDS = ("ddim", "euler")


def make_sampler(
    schedule: NoiseSchedule,
    kind: str | None = None,
    *,
    num_inference_steps: int,
    eta: float = 0.0,
    s_churn: float = 0.0,
) -> Sampler:
    """The tables of one sampling run over this schedule.

    Args:
        schedule: the model's noise schedule.
        kind: "ddim" or "euler". By default Euler for the configuration of an
            EulerDiscreteScheduler and DDIM for every other: a PNDMScheduler or DDPMScheduler
            shares its betas but not its steps.
        num_inference_steps: model evaluations per sample.
        eta: DDIM's fresh noise, 0 (none) to 1 (DDPM).
        s_churn: Euler's fresh noise over the whole run, 0 for none.

    Returns:
        a pytree with `timesteps`, `init_noise_sigma`, `stochastic`, `scale(x, i)` and
        `step(x, output, i, noise)`.

    Raises:
        ValueError: an unknown kind, a setting that belongs to the other kind, or too many steps.
    """
    if kind is None:
        kind = "euler" if schedule.scheduler_class == "EulerDiscreteScheduler" else "ddim"
    if kind == "ddim":
        if s_churn:
            raise ValueError(
                f"s_churn={s_churn} is a setting of the 'euler' sampler; 'ddim' takes eta."
            )
        return ddim_sampler(schedule, num_inference_steps, eta=eta)
    if kind == "euler":
        if eta:
            raise ValueError(
                f"eta={eta} is a setting of the 'ddim' sampler; 'euler' takes s_churn."
            )
        return euler_sampler(schedule, num_inference_steps, s_churn=s_churn)
    raise ValueError(f"sampler={kind!r} is not known; accepted: {', '.join(SAMPLER_KINDS)}.")


__all__ = [
    "SAMPLER_KINDS",
    "DDIMSampler",
    "EulerSampler",
    "NoiseSchedule",
    "Sampler",
    "add_noise",
    "alphas_cumprod",
    "ddim_sampler",
    "ddim_step",
    "denoise_until",
    "encode_images",
    "euler_sampler",
    "euler_step",
    "make_sampler",
    "noise_latents",
    "noised_latents",
    "prediction_to_epsilon",
    "prediction_to_x0",
    "to_unit",
    "training_target",
    "velocity",
]
