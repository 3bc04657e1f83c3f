"""Euler sampling of the probability-flow ODE (Karras 2022, arXiv 2206.00364) over tables.

Equal to diffusers' `EulerDiscreteScheduler.step`. The sample carries noise of standard deviation σ
(x = x₀ + σ·ε, σ_t = √((1−ᾱ_t)/ᾱ_t)); the model sees x/√(σ²+1). One step from σ̂ to σ':
x ← x + (x − x₀)/σ̂·(σ' − σ̂). With `s_churn` > 0 noise is first raised from σ to σ̂ (algorithm 2 of
the paper). Samples are `[B, *X, C]`, float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .schedule import NoiseSchedule, Table, float32_linspace, inference_timesteps
from .sigmas import respaced_sigmas, timestep_of, trained_sigmas


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "timesteps",
        "init_noise_sigma",
        "sigma",
        "sigma_hat",
        "sigma_next",
        "noise_scale",
    ],
    meta_fields=["prediction_type", "stochastic"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class EulerSampler:
    """Tables of one Euler run of n steps; a pytree, to be passed to jitted functions."""

    timesteps: Table  # float32 [n], as all below: what the model is told; need not be whole
    init_noise_sigma: Table  # float32 []: the start is this times unit normal noise
    sigma: Table
    sigma_hat: Table  # σ·(1+γ)
    sigma_next: Table
    noise_scale: Table  # s_noise·√(σ̂²−σ²)
    prediction_type: str
    stochastic: bool  # s_churn > 0: `step` needs noise

    @property
    def num_steps(self) -> int:
        """Model evaluations per sample."""
        return self.timesteps.shape[0]

    def scale(self, x: Float[Array, "B *X C"], i: Int[Array, ""] | int) -> Float[Array, "B *X C"]:
        """The model's input at step i: x/√(σ²+1)."""
        return x / jnp.sqrt(jnp.asarray(self.sigma)[i] ** 2 + 1)

    def step(
        self,
        x: Float[Array, "B *X C"],
        output: Float[Array, "B *X C"],
        i: Int[Array, ""] | int,
        noise: Float[Array, "B *X C"] | None = None,
    ) -> Float[Array, "B *X C"]:
        """See `euler_step`."""
        return euler_step(self, i, x, output, noise)

    def memory(self, x: Float[Array, "B *X C"]) -> tuple[()]:
        """A step needs nothing of those before it."""
        del x
        return ()

    def advance(
        self,
        x: Float[Array, "B *X C"],
        output: Float[Array, "B *X C"],
        i: Int[Array, ""] | int,
        noise: Float[Array, "B *X C"] | None,
        memory: tuple[()],
    ) -> tuple[Float[Array, "B *X C"], tuple[()]]:
        """The step as all samplers take it: with the memory, and back."""
        return self.step(x, output, i, noise), memory


def euler_sampler(
    schedule: NoiseSchedule,
    num_inference_steps: int,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> EulerSampler:
    """Tables of an Euler run; the default is the deterministic one.

    `s_churn` ≥ 0 is the amount of fresh noise over the whole run, added where σ lies in
    [s_tmin, s_tmax] and scaled by `s_noise` (arXiv 2206.00364, algorithm 2).

    Raises:
        ValueError: `s_churn` negative, or step counts the schedule does not allow.
    """
    if s_churn < 0:
        raise ValueError(f"s_churn must not be negative; got {s_churn}.")
    spacing = schedule.timestep_spacing or "linspace"
    timesteps, sigmas = _timesteps_and_sigmas(schedule, num_inference_steps, spacing)
    count = len(timesteps)
    sigma, sigma_next = sigmas[:count], sigmas[1 : count + 1]

    churn = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    gamma = np.where((s_tmin <= sigma) & (sigma <= s_tmax), churn, 0).astype(np.float32)
    sigma_hat = sigma * (gamma + 1)
    largest = sigmas.max()
    return EulerSampler(
        timesteps=timesteps,
        init_noise_sigma=np.asarray(
            np.sqrt(largest**2 + 1) if spacing == "leading" else largest, np.float32
        ),
        sigma=sigma,
        sigma_hat=sigma_hat,
        sigma_next=sigma_next,
        noise_scale=np.float32(s_noise) * np.sqrt(sigma_hat**2 - sigma**2),
        prediction_type=schedule.prediction_type,
        stochastic=bool((gamma > 0).any()),
    )


def euler_step(
    tables: EulerSampler,
    i: Int[Array, ""] | int,
    x: Float[Array, "B *X C"],
    output: Float[Array, "B *X C"],
    noise: Float[Array, "B *X C"] | None = None,
) -> Float[Array, "B *X C"]:
    """Step i of an Euler run: from x at σ_i and the model's output there to x at σ_{i+1}.

    `output` is the model's answer to `tables.scale(x, i)`. `noise` is unit normal, required exactly
    when the tables were made with s_churn > 0. Returns float32.

    Raises:
        ValueError: noise missing, or given to a deterministic run.
    """
    if (noise is not None) != tables.stochastic:
        raise ValueError(
            "This Euler run has s_churn > 0: pass unit normal `noise` to every step."
            if tables.stochastic
            else "This Euler run has s_churn = 0 and takes no noise; pass noise=None."
        )
    x, output = x.astype(jnp.float32), output.astype(jnp.float32)
    sigma, sigma_hat = jnp.asarray(tables.sigma)[i], jnp.asarray(tables.sigma_hat)[i]
    if noise is not None:
        x = x + jnp.asarray(tables.noise_scale)[i] * noise.astype(jnp.float32)
    if tables.prediction_type == "epsilon":
        x0 = x - sigma_hat * output
    elif tables.prediction_type == "sample":
        x0 = output
    else:  # v: the scalings are those of σ, also under churn, as in diffusers
        x0 = output * (-sigma / jnp.sqrt(sigma**2 + 1)) + x / (sigma**2 + 1)
    return x + (x - x0) / sigma_hat * (jnp.asarray(tables.sigma_next)[i] - sigma_hat)


def _timesteps_and_sigmas(
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
