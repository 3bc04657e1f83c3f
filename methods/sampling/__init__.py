"""Noise schedules and samplers: pure steps over tables, equal to diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .ancestral import ddpm_sampler, euler_ancestral_sampler, lcm_sampler
from .ddim import ddim_sampler
from .edm import EDM_CLASS, EDMSchedule, edm_sampler
from .euler import euler_sampler
from .flow_matching import FLOW_CLASS, FlowMatchSchedule, empirical_mu, flow_euler_sampler
from .latents import denoise_until, encode_images, noise_latents, noised_latents, to_unit
from .linear import LinearSampler
from .lms import lms_sampler
from .multistep import dpm_sampler, unipc_sampler
from .pndm import pndm_sampler
from .schedule import NoiseSchedule, add_noise, alphas_cumprod, training_target, velocity

Sampler = LinearSampler

# Samplers over a table of betas, by the name that a user gives them, and the diffusers class whose
# configuration asks for them.
_MAKERS = {
    "ddim": (ddim_sampler, "DDIMScheduler"),
    "ddpm": (ddpm_sampler, "DDPMScheduler"),
    "euler": (euler_sampler, "EulerDiscreteScheduler"),
    "euler-ancestral": (euler_ancestral_sampler, "EulerAncestralDiscreteScheduler"),
    "dpm++": (dpm_sampler, "DPMSolverMultistepScheduler"),
    "unipc": (unipc_sampler, "UniPCMultistepScheduler"),
    "lcm": (lcm_sampler, "LCMScheduler"),
    "pndm": (pndm_sampler, "PNDMScheduler"),
    "lms": (lms_sampler, "LMSDiscreteScheduler"),
}
SAMPLER_KINDS = tuple(_MAKERS)
# Settings of a call, and the kinds that take them.
_TAKES = {"eta": ("ddim",), "s_churn": ("euler",)}


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
      kind: one of `SAMPLER_KINDS`; by default that of the schedule's configuration. Required where
        the configuration is of a class whose steps are not known.
      num_inference_steps: steps per sample, each with one evaluation of the model; PNDM adds one,
        or nine (`pndm_sampler`).
      eta: DDIM's fresh noise, 0 (none) to 1 (DDPM).
      s_churn: Euler's fresh noise over the whole run, 0 for none.

    Raises:
      ValueError: an unknown kind, a setting that belongs to another kind, or too many steps.
    """
    if kind is None and (closest := schedule.closest_sampler) is not None:
        raise ValueError(
            f"the model's scheduler asks for {schedule.scheduler_class}, whose steps are not "
            f"known here: choose a sampler (--sampler), such as {closest!r}; accepted: "
            f"{', '.join(SAMPLER_KINDS)}."
        )
    if kind is None:
        owner = schedule.scheduler_class.replace("Parallel", "")  # the same steps
        kind = next(name for name, (_, own) in _MAKERS.items() if own == owner)
    if kind not in _MAKERS:
        raise ValueError(f"sampler={kind!r} is not known; accepted: {', '.join(SAMPLER_KINDS)}.")
    given = {name: value for name, value in {"eta": eta, "s_churn": s_churn}.items() if value}
    for name, value in given.items():
        if kind not in _TAKES[name]:
            own = next((each for each, kinds in _TAKES.items() if kind in kinds), None)
            raise ValueError(
                f"{name}={value} is a setting of the {_TAKES[name][0]!r} sampler; {kind!r} takes "
                f"{own or 'neither eta nor s_churn'}."
            )
    return _MAKERS[kind][0](schedule, num_inference_steps, **given)


def schedule_of(config: Mapping[str, Any]) -> NoiseSchedule | FlowMatchSchedule | EDMSchedule:
    """The schedule of a diffusers `scheduler_config.json`: over a table of betas, of a flow, or
    with EDM's preconditioning.

    Raises:
      ValueError: what the schedule's `from_config` refuses.
    """
    kinds: dict[Any, Any] = {FLOW_CLASS: FlowMatchSchedule, EDM_CLASS: EDMSchedule}
    return kinds.get(config.get("_class_name"), NoiseSchedule).from_config(config)


__all__ = [
    "SAMPLER_KINDS",
    "EDMSchedule",
    "FlowMatchSchedule",
    "LinearSampler",
    "NoiseSchedule",
    "Sampler",
    "add_noise",
    "alphas_cumprod",
    "ddim_sampler",
    "ddpm_sampler",
    "denoise_until",
    "dpm_sampler",
    "edm_sampler",
    "empirical_mu",
    "encode_images",
    "euler_ancestral_sampler",
    "euler_sampler",
    "flow_euler_sampler",
    "lcm_sampler",
    "lms_sampler",
    "make_sampler",
    "noise_latents",
    "noised_latents",
    "pndm_sampler",
    "schedule_of",
    "to_unit",
    "training_target",
    "unipc_sampler",
    "velocity",
]
