"""Euler sampling with EDM's preconditioning (Karras 2022, arXiv 2206.00364), as Cosmos asks for.

Tables of `linear.LinearSampler`, equal to diffusers' `EDMEulerScheduler`. The sample carries noise
of standard deviation σ, x = x₀ + σ·ε; the model sees x/√(σ²+σd²) and, in place of a timestep,
¼·ln σ, and its output F stands for x₀ = σd²/(σ²+σd²)·x + σ·σd/√(σ²+σd²)·F. One step from σ to σ':
x' = x + (x − x₀)/σ·(σ' − σ).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from .linear import LinearSampler, linear_sampler
from .schedule import float32_linspace, read_settings
from .sigmas import karras_sigmas

EDM_CLASS = "EDMEulerScheduler"
_ACCEPTED = {
    "sigma_schedule": ("karras", "exponential"),
    "prediction_type": ("epsilon", "v_prediction"),
    "final_sigmas_type": ("zero", "sigma_min"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class EDMSchedule:
    """Settings of diffusers' EDMEulerScheduler, under the same names.

    Hashable, so it may be a static argument of `jax.jit`. Raises `ValueError` for a setting out of
    range, at construction.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5  # standard deviation of the data
    sigma_schedule: str = "karras"
    num_train_timesteps: int = 1000
    prediction_type: str = "epsilon"  # F as above; "v_prediction" has its sign turned
    rho: float = 7.0  # of "karras"
    final_sigmas_type: str = "zero"

    closest_sampler: ClassVar[None] = None  # its own steps are known

    def __post_init__(self) -> None:
        for name, accepted in _ACCEPTED.items():
            if (value := getattr(self, name)) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {value!r}.")
        if not (0 < self.sigma_min < self.sigma_max and self.sigma_data > 0 and self.rho > 0):
            raise ValueError(
                "sigma_min must be below sigma_max, and both, sigma_data and rho positive; got "
                f"{self.sigma_min}, {self.sigma_max}, {self.sigma_data} and {self.rho}."
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> EDMSchedule:
        """Reads the dictionary of a diffusers `scheduler_config.json`.

        Raises:
          ValueError: another class, an unknown setting, or a value that is not supported.
        """
        return read_settings(cls, EDM_CLASS, config)

    def to_config(self) -> dict[str, Any]:
        """The `scheduler_config.json` dictionary."""
        return {"_class_name": EDM_CLASS, **dataclasses.asdict(self)}


def edm_sampler(
    schedule: EDMSchedule, num_inference_steps: int, *, start: float | None = None
) -> LinearSampler:
    """Tables of an Euler run of n steps.

    With `final_sigmas_type="sigma_min"` the last of them goes nowhere, whatever the model says: it
    is left out, and the model evaluated n − 1 times. It starts from `start` times unit normal
    noise, by default √(σmax²+1), as the scheduler has it; the Cosmos pipelines of diffusers take
    σmax.

    Raises:
      ValueError: a step count below 1, or below 2 where the last step is left out.
    """
    void = schedule.final_sigmas_type == "sigma_min"
    if num_inference_steps < 1 + void:
        raise ValueError(
            f"num_inference_steps must be at least {1 + void}; got {num_inference_steps}."
        )
    high, low = schedule.sigma_max, schedule.sigma_min
    if schedule.sigma_schedule == "karras":
        levels = karras_sigmas(high, low, num_inference_steps, schedule.rho)
    else:
        levels = np.exp(float32_linspace(math.log(low), math.log(high), num_inference_steps))[::-1]
    levels = levels.astype(np.float32)
    if not void:
        levels = np.append(levels, np.float32(0))
    sigma, after = levels[:-1].astype(np.float64), levels[1:]
    total = np.hypot(sigma, schedule.sigma_data)
    sign = 1 if schedule.prediction_type == "epsilon" else -1
    keep = after / sigma
    return linear_sampler(
        timesteps=np.float32(0.25) * np.log(levels[:-1]),
        init_noise_sigma=math.hypot(high, 1) if start is None else start,
        input_scale=1 / total,
        estimate=(
            (schedule.sigma_data / total) ** 2,
            sign * sigma * schedule.sigma_data / total,
            1,
        ),
        keep=keep,
        weights=1 - keep,
    )
