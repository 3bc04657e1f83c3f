"""Euler sampling of a flow from noise to images (Esser 2024, arXiv 2403.03206).

x_σ = (1 − σ)·x₀ + σ·ε for σ from 1 down to 0; the model predicts the velocity v = ε − x₀, and a
step is x' = x + (σ' − σ)·v.  Equal to diffusers' `FlowMatchEulerDiscreteScheduler`, its tables bit
for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from .linear import LinearSampler, linear_sampler
from .schedule import TIME_SHIFT_TYPES, read_settings
from .sigmas import respaced, shifted, shifted_by

FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"


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

    closest_sampler: ClassVar[None] = None  # its own steps are known

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
        return read_settings(cls, FLOW_CLASS, config)

    def to_config(self) -> dict[str, Any]:
        """The `scheduler_config.json` dictionary."""
        return {"_class_name": FLOW_CLASS, **dataclasses.asdict(self)}

    def mu_of(self, tokens: int) -> float:
        """The exponent of the shift for an image of so many tokens, linear between the two ends."""
        length = self.max_image_seq_len - self.base_image_seq_len
        slope = (self.max_shift - self.base_shift) / length
        return tokens * slope + (self.base_shift - slope * self.base_image_seq_len)


def empirical_mu(tokens: int, num_steps: int) -> float:
    """FLUX.2's exponent of the shift, for an image of so many tokens drawn in so many steps.

    That of `compute_empirical_mu` in diffusers' `pipelines/flux2`: lines in the tokens at 10 and at
    200 steps, and through both a line in the steps; of more than 4300 tokens, that at 200 steps.
    """
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    slope = (many - few) / 190.0
    return slope * num_steps + (many - 200.0 * slope)


def flow_euler_sampler(
    schedule: FlowMatchSchedule,
    num_inference_steps: int,
    *,
    sigmas: Sequence[float] | np.ndarray | None = None,
    mu: float | None = None,
) -> LinearSampler:
    """Tables of an Euler run over a flow.

    Args:
      schedule: settings.
      num_inference_steps: n.
      sigmas: n noise levels from 1 down, 0 left out, which the schedule then shifts: FLUX's are
        linspace(1, 1/n, n) and HunyuanVideo's linspace(1, 0, n + 1)[:-1]. By default those between
        the ends of training, as for Stable Diffusion 3; where the shift is fixed those ends are
        shifted, and the levels between them once more.
      mu: of the dynamic shift, required exactly when the schedule asks for one: `schedule.mu_of`,
        or for FLUX.2 `empirical_mu`.

    Raises:
      ValueError: a step count below 1, levels that are not n falling ones in (0, 1], or `mu`
        missing or given in vain.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1; got {num_inference_steps}.")
    count = schedule.num_train_timesteps
    if sigmas is None:
        ends = np.asarray([count, 1], np.float32) / count
        if not schedule.use_dynamic_shifting:
            ends = shifted_by(ends, schedule.shift)
        high, low = (float(end) * count for end in ends)
        levels = np.linspace(high, low, num_inference_steps) / count
    else:
        levels = np.asarray(sigmas, np.float32)
        falls = levels.shape == (num_inference_steps,) and (np.diff(levels) < 0).all()
        if not (falls and levels[-1] > 0 and levels[0] <= 1):
            raise ValueError(
                f"sigmas must be num_inference_steps={num_inference_steps} falling numbers, at "
                f"most 1 and above 0; got {np.asarray(sigmas).tolist()}."
            )
    levels = shifted(schedule, levels, schedule.shift, mu)
    again = respaced(schedule, float(levels[0]), float(levels[-1]), num_inference_steps)
    sigma = (levels if again is None else again).astype(np.float32)
    after = np.append(sigma[1:], np.float32(0))
    timesteps = sigma * count
    if schedule.stochastic_sampling:
        estimate = (1.0, -sigma, 1.0)
        return linear_sampler(
            timesteps=timesteps, estimate=estimate, keep=0.0, weights=1 - after, noise_scale=after
        )
    return linear_sampler(
        timesteps=timesteps,
        estimate=(0.0, 1.0, 1.0),  # v itself
        keep=1.0,
        weights=after - sigma,
    )
