"""Samplers whose every step is linear, as one recurrence over precomputed tables.

DDIM, DDPM, Euler, ancestral Euler, DPM-Solver++, UniPC, LCM, PNDM, EDM's Euler and Euler over a
flow differ in their coefficients alone.  At step i the model's output becomes an estimate of the
image (PNDM and flows keep the output itself),

    m_i = (a_i x + b_i output) / d_i                          (clipped, where the schedule says so)

a corrector may improve x with it, and the next sample is

    x' = p_i x + q_i output + sum_k w_ik m_{i-k} + s_i z      (z unit normal noise)

q is for samplers whose estimate of the noise is not clipped along with that of the image.

The estimates of earlier steps and the last corrected x are the memory that a step hands to the
next.  Samples are `[B, *X, C]`, float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .schedule import NoiseSchedule, Table

Memory = tuple[Float[Array, "K B *X C"], Float[Array, "B *X C"] | None]


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LinearSampler:
    """Tables of one run of n steps that remembers K estimates; a pytree."""

    timesteps: Table  # [n]: what the model is told, descending
    init_noise_sigma: Table  # float32 []: the start is this times unit normal noise
    input_scale: Table  # float32 [n], as all below: the model sees x times this
    estimate: Table  # [n, 3]: a_i, b_i, d_i
    correct: Table  # [n, 2]: the corrected x has this of x, and of the last corrected x
    correct_weights: Table  # [n, K + 1]: and this of the estimates, newest first
    keep: Table  # [n]: p_i
    output_weight: Table  # [n]: q_i
    weights: Table  # [n, K]: w_i0 (newest) to w_i,K-1
    noise_scale: Table  # [n]: s_i
    clip_range: float | None = _static()  # estimates are clipped to ± this
    threshold: tuple[float, float] | None = _static()  # dynamic: (quantile, largest value)
    corrects: bool = _static()  # whether there is a corrector
    stochastic: bool = _static()  # `advance` needs noise

    @property
    def num_steps(self) -> int:
        """Model evaluations per sample."""
        return self.timesteps.shape[0]

    def scale(self, x: Float[Array, "B *X C"], i: Int[Array, ""] | int) -> Float[Array, "B *X C"]:
        """The model's input at step i."""
        return x * jnp.asarray(self.input_scale)[i]

    def memory(self, x: Float[Array, "B *X C"]) -> Memory:
        """What the first step is handed: no estimates yet."""
        kept = self.weights.shape[1] - (0 if self.corrects else 1)
        estimates = jnp.zeros((kept, *x.shape), jnp.float32)
        return estimates, x.astype(jnp.float32) if self.corrects else None

    def advance(
        self,
        x: Float[Array, "B *X C"],
        output: Float[Array, "B *X C"],
        i: Int[Array, ""] | int,
        noise: Float[Array, "B *X C"] | None,
        memory: Memory,
    ) -> tuple[Float[Array, "B *X C"], Memory]:
        """Step i: from x, the model's output there and the memory to the next x and memory.

        Raises:
          ValueError: noise missing, or given to a deterministic run.
        """
        if (noise is not None) != self.stochastic:
            raise ValueError(
                "This sampler needs fresh noise: pass unit normal `noise` to every step."
                if self.stochastic
                else "This sampler takes no noise; pass noise=None."
            )
        # the tables' rows of this step
        (of_x, of_output, divisor), correct, correct_weights = (
            jnp.asarray(each)[i] for each in (self.estimate, self.correct, self.correct_weights)
        )
        keep, output_weight, weights, noise_scale = (
            jnp.asarray(each)[i]
            for each in (self.keep, self.output_weight, self.weights, self.noise_scale)
        )
        x, output = x.astype(jnp.float32), output.astype(jnp.float32)
        before, last = memory
        estimate = (of_x * x + of_output * output) / divisor
        if self.threshold is not None:
            estimate = dynamic_threshold(estimate, *self.threshold)
        elif self.clip_range is not None:
            estimate = jnp.clip(estimate, -self.clip_range, self.clip_range)
        known = jnp.concatenate([estimate[None], before])

        if last is not None:
            x = correct[0] * x + correct[1] * last
            x = x + jnp.tensordot(correct_weights, known, 1)
            last, known = x, known[:-1]
        x = keep * x + output_weight * output
        x = x + jnp.tensordot(weights, known, 1)
        if noise is not None:
            x = x + noise_scale * noise.astype(jnp.float32)
        kept = known if self.corrects else known[:-1]
        return x, (kept, last)


def linear_sampler(
    *,
    timesteps: np.ndarray,
    estimate: tuple[Any, Any, Any],
    keep: Any,
    weights: Any,
    output_weight: Any = 0.0,
    init_noise_sigma: float = 1.0,
    input_scale: Any = 1.0,
    correct: Any = None,
    correct_weights: Any = None,
    noise_scale: Any = None,
    clip_range: float | None = None,
    threshold: tuple[float, float] | None = None,
) -> LinearSampler:
    """Tables from coefficients: arrays over the n steps, or values that all steps share.

    Args:
      timesteps: [n].
      estimate, keep, output_weight, init_noise_sigma, input_scale: a, b and d; p; q; of x.
      weights: [n, K], or [n] where K is 1.
      correct, correct_weights: [n, 2] and [n, K + 1] of a corrector; None is none.
      noise_scale: s; None takes no noise.
      clip_range, threshold: of the estimates.
    """
    n = len(timesteps)

    def table(values: Any, *shape: int) -> np.ndarray:
        return np.broadcast_to(np.asarray(values, np.float64), (n, *shape)).astype(np.float32)

    weights = np.asarray(weights, np.float64)
    weights = weights[:, None] if weights.ndim == 1 else weights
    order = weights.shape[1]
    return LinearSampler(
        timesteps=timesteps,
        init_noise_sigma=np.asarray(init_noise_sigma, np.float32),
        input_scale=table(input_scale),
        estimate=np.stack([table(each) for each in estimate], axis=1),
        correct=table([1, 0] if correct is None else correct, 2),
        correct_weights=table(0 if correct_weights is None else correct_weights, order + 1),
        keep=table(keep),
        output_weight=table(output_weight),
        weights=table(weights, order),
        noise_scale=table(0 if noise_scale is None else noise_scale),
        clip_range=clip_range,
        threshold=threshold,
        corrects=correct is not None,
        stochastic=noise_scale is not None,
    )


def estimate_of(
    schedule: NoiseSchedule,
    signal: np.ndarray,
    sigma: np.ndarray,
    timesteps: np.ndarray,
    *,
    bounded: bool = False,
) -> tuple[Any, Any, Any]:
    """a, b and d of x = signal x0 + sigma e [n], for what the model predicts.

    `bounded` says whether estimates are clipped, also those of an ε-model at zero signal, which are
    infinite.

    Raises:
      ValueError: an ε-model at zero signal, where x₀ is undefined, and nothing bounds it.
    """
    if schedule.prediction_type == "sample":
        return 0.0, 1.0, 1.0
    if schedule.prediction_type == "v_prediction":
        return signal, -sigma, 1.0
    if schedule.prediction_type == "flow_prediction":
        return 1.0, -sigma, 1.0
    if (signal == 0).any() and not bounded:
        raise ValueError(
            "A noise-predicting model cannot start at zero signal (rescale_betas_zero_snr=True "
            f"reaches timestep {timesteps[0]}): use a v_prediction or sample model, or "
            "timestep_spacing='leading'."
        )
    return 1.0, -sigma, signal


def clipping(schedule: NoiseSchedule, *, default: bool) -> dict[str, Any]:
    """What the schedule says of clipping, as arguments of `linear_sampler`; else the default."""
    clips = default if schedule.clip_sample is None else schedule.clip_sample
    if schedule.thresholding:
        ratio, largest = schedule.dynamic_thresholding_ratio, schedule.sample_max_value
        return {"threshold": (ratio, largest)}
    return {"clip_range": schedule.clip_sample_range} if clips else {}


def dynamic_threshold(
    x0: Float[Array, "B *X C"], ratio: float, max_value: float
) -> Float[Array, "B *X C"]:
    """Clips each sample to ±s and divides by s, s its `ratio` quantile in [1, max_value].

    Imagen, arXiv 2205.11487, section 2.3.
    """
    axes = tuple(range(1, x0.ndim))
    bound = jnp.quantile(jnp.abs(x0), ratio, axis=axes, keepdims=True)
    bound = jnp.minimum(jnp.maximum(bound, 1.0), max_value)
    return jnp.clip(x0, -bound, bound) / bound
