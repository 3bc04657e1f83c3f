"""Latents of images, noised ones to denoise, and those at which two models are compared."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from ...flax_models.autoencoder_kl import AutoencoderKL
from .linear import LinearSampler
from .schedule import NoiseSchedule, add_noise, training_target

_BATCH = 50  # images encoded at once; the last batch is filled up, so one program serves all


def to_unit(images: Any) -> Any:
    """Bytes uint8 [..., 3] -> float32 [-1, 1], of numpy or of JAX as they came."""
    return images.astype(np.float32) / 127.5 - 1.0


def encode_images(
    vae: AutoencoderKL, images: UInt8[np.ndarray, "N H W 3"], dtype: Any = jnp.float32
) -> tuple[Float[np.ndarray, "N h w Z"], Float[np.ndarray, "N h w Z"]]:
    """Mean and standard deviation of the autoencoder's posterior, unscaled, in `dtype`."""
    graphdef, state = nnx.split(vae)
    params, parts = nnx.to_pure_dict(state), []
    size = min(_BATCH, len(images))
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        padded = np.concatenate([batch, np.zeros_like(images[: size - len(batch)])])
        encoded = _encode(graphdef, np.dtype(dtype), params, padded)
        parts.append([np.asarray(part)[: len(batch)] for part in encoded])
    mean, std = (np.concatenate(part) for part in zip(*parts, strict=True))
    return mean, std


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(graphdef: Any, dtype: np.dtype, params: Any, images: Array) -> tuple[Array, Array]:
    mean, logvar = nnx.merge(graphdef, params).encode(to_unit(images))
    return mean.astype(dtype), jnp.exp(0.5 * logvar).astype(dtype)


def noised_latents(
    schedule: NoiseSchedule,
    latents: Float[Array, "B h w C"],
    key: PRNGKeyArray,
    lowest: int,
    highest: int,
) -> tuple[Float[Array, "B h w C"], Int[Array, " B"], Float[Array, "B h w C"]]:
    """What the denoising loss compares: latents at random times, the times, and the targets.

    Args:
      schedule: of the noise; its prediction type decides what the target is.
      latents: of images, scaled.
      key: of the times and the noise.
      lowest, highest: times are drawn from [lowest, highest).
    """
    time_key, noise_key = jax.random.split(key)
    times = jax.random.randint(time_key, (latents.shape[0],), lowest, highest)
    noise = jax.random.normal(noise_key, latents.shape)
    noisy = add_noise(schedule, latents, noise, times)
    return noisy, times, training_target(schedule, latents, noise, times)


def noise_latents(
    key: PRNGKeyArray, size: int, shape: tuple[int, int, int], timesteps: int, lowest: float
) -> tuple[Float[Array, "B h w C"], Int[Array, " B"]]:
    """Unit normal noise for B = `size` latents of [h, w, C] = `shape`, and times of its place.

    Those lie in the upper part of the schedule: from `lowest`, a fraction, to 1 of `timesteps`.
    """
    first, second = jax.random.split(key)
    times = jax.random.randint(first, (size,), int(lowest * timesteps), timesteps)
    return jax.random.normal(second, (size, *shape)), times


def denoise_until(
    model: Callable[..., Array],
    sampler: LinearSampler,
    noise: Float[Array, "B h w C"],
    count: Int[Array, ""] | int,
    condition: Any,
    negative: Any,
    guidance: float,
) -> Float[Array, "B h w C"]:
    """Unit normal noise after the first `count` guided steps: latents at `timesteps[count]`.

    Args:
      model: `(latents, time, text states) -> prediction`.
      sampler: deterministic tables.
      noise: where to start.
      count: number of steps; may be traced.
      condition, negative: text states [B, L, D] of the prompts and [L, D] of what guidance steers
        away from, or what else the model reads of texts.
      guidance: g in e(negative) + g (e(condition) - e(negative)).
    """
    context = jax.tree.map(
        lambda without, text: jnp.concatenate([jnp.broadcast_to(without, text.shape), text]),
        negative,
        condition,
    )

    def step(i: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        x, memory = carry
        output = model(jnp.concatenate([x, x]), jnp.asarray(sampler.timesteps)[i], context)
        without, with_prompt = jnp.split(output.astype(jnp.float32), 2)
        return sampler.advance(x, without + guidance * (with_prompt - without), i, None, memory)

    start = noise * sampler.init_noise_sigma
    return jax.lax.fori_loop(0, count, step, (start, sampler.memory(start)))[0]
