"""Timestep embeddings (Ho et al. 2020, section 3.3; Vaswani et al. 2017, section 3.5)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

Dtype = jnp.dtype | type


def sinusoidal_embedding(
    timesteps: Num[Array, " B"], dim: int, *, flip_sin_to_cos: bool, freq_shift: float | int
) -> Float[Array, "B dim"]:
    """Sinusoidal features of (possibly fractional) timesteps, in float32.

    Args:
      timesteps: [B], in units of training timesteps.
      dim: number of features; an odd one gets a trailing zero.
      flip_sin_to_cos: cosines first, as Stable Diffusion was trained.
      freq_shift: shifts the lowest frequency: the exponent divides by `dim/2 - freq_shift`.
    """
    half = dim // 2
    exponent = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32)
    exponent /= np.float32(half - freq_shift)
    # Rounded once: timesteps of hundreds would magnify an error of the last bit.
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None]
    parts = [jnp.sin(angles), jnp.cos(angles)]
    features = jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)
    return jnp.pad(features, ((0, 0), (0, dim - 2 * half)))


class TimestepEmbedding(nnx.Module):
    """Two-layer SiLU perceptron on sinusoidal features: [B, in] -> [B, out]."""

    def __init__(self, in_features: int, out_features: int, **init):
        self.linear_1 = nnx.Linear(in_features, out_features, **init)
        self.linear_2 = nnx.Linear(out_features, out_features, **init)

    def __call__(self, features: Float[Array, "B in"]) -> Float[Array, "B out"]:
        return self.linear_2(jax.nn.silu(self.linear_1(features)))
