"""Euler sampling of a flow from noise to images (Esser 2024, arXiv 2403.03206).

x_σ = (1 − σ)·x₀ + σ·ε for σ from 1 down to 0; the model predicts the velocity v = ε − x₀, and a
step is x' = x + (σ' − σ)·v.  Equal to diffusers' `FlowMatchEulerDiscreteScheduler`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .linear import LinearSampler, linear_sampler
from .schedule import checked
from .sigmas import respaced

FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"
TIME_SHIFT_TYPES = ("exponential", "linear")


@dataclasses.dataclass(frozen=True, slots=True)
class FlowMatchSchedule:
    """Settings of diffusers' FlowMatchEulerDiscreteScheduler, under the same names.

    Hashable, so it may be a static argument of `jax.jit`. Raises `ValueError` for a setting out of
    range, at construction.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0  # spends more steps on high noise, equation 23
    use_dynamic_shifting: bool = False  # the shift follows the image's size, through `mu`
    base_shift: float = 0.5  # mu at base_image_seq_len tokens
    max_shift: float = 1.15  # mu at max_image_seq_len tokens
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    invert_sigmas: bool = False
    shift_terminal: float | None = None  # σ of the last step before 0
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    time_shift_type: str = "exponential"
    stochastic_sampling: bool = False  # noises the estimate of x₀ anew at every step

    def __post_init__(self) -> None:
        if self.time_shift_type not in TIME_SHIFT_TYPES:
            raise ValueError(
                f"time_shift_type must be one of {', '.join(TIME_SHIFT_TYPES)}; got "
                f"{self.time_shift_type!r}."
            )
        if self.invert_sigmas:
            raise ValueError("invert_sigmas=True is not supported.")
        if self.num_train_timesteps < 1 or not self.shift > 0:
            raise ValueError(
                "num_train_timesteps must be at least 1 and shift positive; got "
                f"{self.num_train_timesteps} and {self.shift}."
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FlowMatchSchedule:
        """Reads the dictionary of a diffusers `scheduler_config.json`.

        Raises:
          ValueError: another class, an unknown setting, or a value that is not supported.
        """
        if (name := config.get("_class_name", FLOW_CLASS)) != FLOW_CLASS:
            raise ValueError(f"a flow's schedule is of the class {FLOW_CLASS}; got {name!r}.")
        settings = {key: value for key, value in config.items() if not key.startswith("_")}
        known = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(settings.keys() - known):
            raise ValueError(
                f"Unknown scheduler settings {', '.join(unknown)} for {FLOW_CLASS}; known are "
                f"{', '.join(sorted(known))}."
            )
        return cls(**{name: checked(known[name], value) for name, value in settings.items()})

    def to_config(self) -> dict[str, Any]:
        """The `scheduler_config.json` dictionary."""
        return {"_class_name": FLOW_CLASS, **dataclasses.asdict(self)}

    def mu_of(self, tokens: int) -> float:
        """The exponent of the shift for an image of so many tokens, linear between the two ends."""
        length = self.max_image_seq_len - self.base_image_seq_len
        slope = (self.max_shift - self.base_shift) / length
        return self.base_shift + slope * (tokens - self.base_image_seq_len)


def flow_euler_sampler(
    schedule: FlowMatchSchedule, num_inference_steps: int, *, mu: float | None = None
) -> LinearSampler:
    """Tables of an Euler run over a flow.

    Args:
      schedule: settings.
      num_inference_steps: n.
      mu: of the dynamic shift, required exactly when the schedule asks for one.

    Raises:
      ValueError: a step count below 1, or `mu` missing or given in vain.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1; got {num_inference_steps}.")
    if (mu is not None) != schedule.use_dynamic_shifting:
        raise ValueError(
            "use_dynamic_shifting=True needs `mu`: see FlowMatchSchedule.mu_of."
            if schedule.use_dynamic_shifting
            else "`mu` belongs to use_dynamic_shifting=True; this schedule has a fixed shift."
        )
    count = schedule.num_train_timesteps

    def shifted(sigma: np.ndarray) -> np.ndarray:
        if mu is None:
            return schedule.shift * sigma / (1 + (schedule.shift - 1) * sigma)
        factor = math.exp(mu) if schedule.time_shift_type == "exponential" else mu
        return factor / (factor + 1 / sigma - 1)

    # The ends are those of training, shifted there once where the shift is fixed.
    ends = np.asarray([1.0, 1.0 / count])
    high, low = ends if schedule.use_dynamic_shifting else shifted(ends)
    sigmas = shifted(np.linspace(high, low, num_inference_steps))
    if schedule.shift_terminal:
        sigmas = 1 - (1 - sigmas) * (1 - schedule.shift_terminal) / (1 - sigmas[-1])
    again = respaced(schedule, float(sigmas[0]), float(sigmas[-1]), num_inference_steps)
    sigma = (sigmas if again is None else again).astype(np.float32)
    after = np.append(sigma[1:], 0).astype(np.float64)
    common = {"timesteps": sigma * count, "estimate": (1.0, -sigma.astype(np.float64), 1.0)}
    if schedule.stochastic_sampling:
        return linear_sampler(**common, keep=0.0, weights=1 - after, noise_scale=after)
    ratio = after / sigma
    return linear_sampler(**common, keep=ratio, weights=1 - ratio)
