"""Latents at which the predictions of two models are compared."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .ddim import DDIMSampler


def noise_latents(
    key: PRNGKeyArray, size: int, shape: tuple[int, int, int], timesteps: int, lowest: float
) -> tuple[Float[Array, "B h w C"], Int[Array, " B"]]:
    """Unit normal noise, and times in the upper part of the schedule, where noise is in place.

    Args:
        key: of both.
        size: B.
        shape: [h, w, C] of a latent.
        timesteps: number of training timesteps.
        lowest: the least time, as a fraction of them.
    """
    first, second = jax.random.split(key)
    times = jax.random.randint(first, (size,), int(lowest * timesteps), timesteps)
    return jax.random.normal(second, (size, *shape)), times


def denoise_until(
    model: Callable[..., Array],
    sampler: DDIMSampler,
    noise: Float[Array, "B h w C"],
    count: Int[Array, ""] | int,
    condition: Float[Array, "B L D"],
    negative: Float[Array, "L D"],
    guidance: float,
) -> Float[Array, "B h w C"]:
    """Unit normal noise after the first `count` guided DDIM steps: latents at `timesteps[count]`.

    Args:
        model: `(latents, time, text states) -> prediction`.
        sampler: deterministic tables.
        noise: where to start.
        count: number of steps; may be traced.
        condition, negative: text states of the prompts and of what guidance steers away from.
        guidance: g in e(negative) + g (e(condition) - e(negative)).
    """
    context = jnp.concatenate([jnp.broadcast_to(negative, condition.shape), condition])

    def step(i: Array, x: Array) -> Array:
        output = model(jnp.concatenate([x, x]), jnp.asarray(sampler.timesteps)[i], context)
        without, with_prompt = jnp.split(output.astype(jnp.float32), 2)
        return sampler.step(x, without + guidance * (with_prompt - without), i, None)

    return jax.lax.fori_loop(0, count, step, noise * sampler.init_noise_sigma)
