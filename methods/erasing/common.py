"""What the erasers that train a network have in common."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ...flax_models.stable_diffusion import StableDiffusionPipeline
from ..sampling import NoiseSchedule, denoise_until, make_sampler, noise_latents
from ..text.phrases import empty_condition


@runtime_checkable
class LatentSettings(Protocol):
    """The settings of a method that say at which latents predictions are compared."""

    @property
    def latents(self) -> str: ...
    @property
    def ddim_steps(self) -> int: ...
    @property
    def guidance(self) -> float: ...
    @property
    def min_timestep(self) -> float: ...


@dataclasses.dataclass(frozen=True)
class ErasingStatic:
    """What a step needs and never changes: structures, optimizer, settings.

    Attributes:
      unet: structure of the UNet.
      optimizer: of the trained parameters.
      config: the method's settings.
      timesteps: number of training timesteps of the schedule.
      latent_shape: [h, w, c] of a latent.
    """

    unet: nnx.GraphDef[Any]
    optimizer: optax.GradientTransformation
    config: Any
    timesteps: int
    latent_shape: tuple[int, int, int]


def latent_sources(
    pipeline: StableDiffusionPipeline, settings: LatentSettings
) -> tuple[int, tuple[int, int, int], dict[str, Any]]:
    """Timesteps, latent shape, and the frozen arrays that `draw_latents` reads."""
    schedule = NoiseSchedule.from_config(pipeline.scheduler_config)
    arrays = {
        "sampler": make_sampler(schedule, "ddim", num_inference_steps=settings.ddim_steps),
        "empty_states": empty_condition(pipeline),  # [L, D]
    }
    return schedule.num_train_timesteps, pipeline.latent_shape, arrays


def draw_latents(
    static: ErasingStatic, frozen: Mapping[str, Any], model: nnx.Module,
    condition: Any, key: PRNGKeyArray,
) -> tuple[Float[Array, "B h w C"], Int[Array, " B"]]:  # fmt: skip
    """Latents and times to compare predictions at, without gradient.

    `latents="edited"`: images that the model being edited draws under `condition`, with guidance,
    stopped at one random point of a DDIM run (Gandikota et al. 2023, section 4).
    `latents="noise"`: pure noise at high timesteps, at no cost.

    Args:
      static, frozen: as `prepare` makes them.
      model: the UNet being edited, or read through an edited text encoder.
      condition: what the UNet reads of the prompts.
      key: of the noise and of the times.
    """
    config, size = static.config, jax.tree.leaves(condition)[0].shape[0]
    if config.latents == "noise":
        return noise_latents(key, size, static.latent_shape, static.timesteps, config.min_timestep)
    noise_key, count_key = jax.random.split(key)
    sampler = frozen["sampler"]
    count = jax.random.randint(count_key, (), 0, config.ddim_steps)
    latents = denoise_until(
        model, sampler, jax.random.normal(noise_key, (size, *static.latent_shape)), count,
        condition, frozen["empty_states"], config.guidance,
    )  # fmt: skip
    times = jnp.full((size,), jnp.asarray(sampler.timesteps)[count])
    return jax.lax.stop_gradient(latents), times
