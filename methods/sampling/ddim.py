"""DDIM (Song 2021, arXiv 2010.02502) as a pure step over precomputed tables.

Equal to diffusers' `DDIMScheduler.step`, equations 12 and 16 of the paper, with s = t−Δ:
x_s = √ᾱ_s·x₀ + √(1−ᾱ_s−σ²)·ε + σ·z, where σ = η·√((1−ᾱ_s)/(1−ᾱ_t))·√(1−ᾱ_t/ᾱ_s).
η = 0 is deterministic, η = 1 is ancestral (DDPM) sampling. Samples are `[B, *X, C]`, float32.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .schedule import NoiseSchedule, Table, alphas_cumprod, inference_timesteps


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "timesteps",
        "init_noise_sigma",
        "signal",
        "sigma",
        "signal_next",
        "direction",
        "noise_scale",
    ],
    meta_fields=["prediction_type", "clip_range", "threshold", "stochastic"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class DDIMSampler:
    """Tables of one DDIM run of n steps; a pytree, to be passed to jitted functions."""

    timesteps: Table  # int32 [n]: what the model is told, descending
    init_noise_sigma: Table  # float32 []: the start is this times unit normal noise
    signal: Table  # float32 [n], as all below: √ᾱ_t
    sigma: Table  # √(1−ᾱ_t)
    signal_next: Table  # √ᾱ_s
    direction: Table  # √(1−ᾱ_s−σ²)
    noise_scale: Table  # σ
    prediction_type: str
    clip_range: float | None  # x₀ is clipped to ± this
    threshold: tuple[float, float] | None  # dynamic thresholding: (quantile, largest value)
    stochastic: bool  # η > 0: `step` needs noise

    @property
    def num_steps(self) -> int:
        """Model evaluations per sample."""
        return self.timesteps.shape[0]

    def scale(self, x: Float[Array, "B *X C"], i: Int[Array, ""] | int) -> Float[Array, "B *X C"]:
        """The model's input at step i: x itself."""
        del i
        return x

    def step(
        self,
        x: Float[Array, "B *X C"],
        output: Float[Array, "B *X C"],
        i: Int[Array, ""] | int,
        noise: Float[Array, "B *X C"] | None = None,
    ) -> Float[Array, "B *X C"]:
        """See `ddim_step`."""
        return ddim_step(self, i, x, output, noise)

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


def ddim_sampler(
    schedule: NoiseSchedule, num_inference_steps: int, *, eta: float = 0.0
) -> DDIMSampler:
    """Tables of a DDIM run; `eta` in [0, 1] scales the fresh noise of each step.

    Raises:
        ValueError: `eta` outside [0, 1]; step counts the schedule does not allow; an ε-model at
            zero signal (`rescale_betas_zero_snr`), where x₀ is undefined.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie between 0 (DDIM) and 1 (DDPM); got {eta}.")
    spacing = schedule.timestep_spacing or "leading"
    timesteps = inference_timesteps(schedule, num_inference_steps, spacing)
    timesteps = np.round(timesteps).astype(np.int32)
    # A constant stride back from every timestep, even if their spacing is uneven: as in diffusers.
    following = timesteps - schedule.num_train_timesteps // num_inference_steps
    table = alphas_cumprod(schedule)
    final = np.float32(1) if schedule.set_alpha_to_one else table[0]
    alpha = table[timesteps]
    alpha_next = np.where(following >= 0, table[np.maximum(following, 0)], final)

    clips = schedule.clip_sample is not False  # also where the settings are silent
    free = not (clips or schedule.thresholding)
    if schedule.prediction_type == "epsilon" and alpha[0] == 0 and free:
        raise ValueError(
            "A noise-predicting model cannot start at zero signal (rescale_betas_zero_snr=True "
            f"reaches timestep {timesteps[0]}): use a v_prediction or sample model, or "
            "timestep_spacing='leading'."
        )
    variance = (1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)
    noise_scale = np.float32(eta) * np.sqrt(variance)
    return DDIMSampler(
        timesteps=timesteps,
        init_noise_sigma=np.asarray(1, np.float32),
        signal=np.sqrt(alpha),
        sigma=np.sqrt(1 - alpha),
        signal_next=np.sqrt(alpha_next),
        direction=np.sqrt(1 - alpha_next - np.square(noise_scale)),
        noise_scale=noise_scale,
        prediction_type=schedule.prediction_type,
        clip_range=schedule.clip_sample_range if clips and not schedule.thresholding else None,
        threshold=(schedule.dynamic_thresholding_ratio, schedule.sample_max_value)
        if schedule.thresholding
        else None,
        stochastic=eta > 0,
    )


def ddim_step(
    tables: DDIMSampler,
    i: Int[Array, ""] | int,
    x: Float[Array, "B *X C"],
    output: Float[Array, "B *X C"],
    noise: Float[Array, "B *X C"] | None = None,
) -> Float[Array, "B *X C"]:
    """Step i of a DDIM run: from x at `timesteps[i]` and the model's output there to the next x.

    `noise` is unit normal, required exactly when the tables were made with η > 0. Returns float32.

    Raises:
        ValueError: noise missing, or given to a deterministic run.
    """
    if (noise is not None) != tables.stochastic:
        raise ValueError(
            "This DDIM run has eta > 0: pass unit normal `noise` to every step."
            if tables.stochastic
            else "This DDIM run has eta = 0 and takes no noise; pass noise=None."
        )
    x, output = x.astype(jnp.float32), output.astype(jnp.float32)
    signal, sigma = jnp.asarray(tables.signal)[i], jnp.asarray(tables.sigma)[i]
    if tables.prediction_type == "epsilon":
        x0, epsilon = (x - sigma * output) / signal, output
    elif tables.prediction_type == "sample":
        x0, epsilon = output, (x - signal * output) / sigma
    else:
        x0, epsilon = signal * x - sigma * output, signal * output + sigma * x

    if tables.threshold is not None:
        x0 = dynamic_threshold(x0, *tables.threshold)
    elif tables.clip_range is not None:
        x0 = jnp.clip(x0, -tables.clip_range, tables.clip_range)

    x = jnp.asarray(tables.signal_next)[i] * x0 + jnp.asarray(tables.direction)[i] * epsilon
    if noise is not None:
        x = x + jnp.asarray(tables.noise_scale)[i] * noise.astype(jnp.float32)
    return x


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
