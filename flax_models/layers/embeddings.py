"""Timestep embeddings (Ho et al. 2020, section 3.3; Vaswani et al. 2017, section 3.5).

`ConditionEmbedding` adds to the timestep's what else a whole image is told: guidance, pooled text.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

from .linear import linear

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
    """Two-layer SiLU perceptron: [B, in] -> [B, out].

    It embeds sinusoidal features, or a pooled text (diffusers' `PixArtAlphaTextProjection`).
    """

    def __init__(self, in_features: int, out_features: int, **init):
        self.linear_1 = linear(in_features, out_features, **init)
        self.linear_2 = linear(out_features, out_features, **init)

    def __call__(self, features: Float[Array, "B in"]) -> Float[Array, "B out"]:
        return self.linear_2(jax.nn.silu(self.linear_1(features)))


class ConditionEmbedding(nnx.Module):
    """Timestep, and guidance and pooled text where a model takes them, as one vector [B, D].

    With diffusers' names for the parts: `CombinedTimestepTextProjEmbeddings`,
    `CombinedTimestepGuidanceTextProjEmbeddings` and `Flux2TimestepGuidanceEmbeddings`.

    Args:
      features: D.
      pooled_features: of the pooled text; None if the model takes none.
      guidance: whether the model takes a strength of guidance.
      time_features: sinusoidal features of the timestep, and of the guidance.
      init: options of the linear layers.
    """

    def __init__(
        self,
        features: int,
        *,
        pooled_features: int | None = None,
        guidance: bool = False,
        time_features: int = 256,
        **init: Any,
    ):
        self.time_features = time_features
        self.dtype = init["dtype"]
        self.timestep_embedder = TimestepEmbedding(time_features, features, **init)
        if guidance:
            self.guidance_embedder = TimestepEmbedding(time_features, features, **init)
        if pooled_features is not None:
            self.text_embedder = TimestepEmbedding(pooled_features, features, **init)

    def __call__(
        self,
        timesteps: Num[Array, " B"],
        guidance: Float[Array, " B"] | None = None,
        pooled: Float[Array, "B P"] | None = None,
    ) -> Float[Array, "B D"]:
        """Embed.

        Args:
          timesteps: in units of training timesteps.
          guidance: its strength, as pipelines count it (3.5); read if the model takes one.
          pooled: the text's pooled state; read if the model takes one.

        Raises:
          ValueError: the model takes guidance or a pooled text, and there is none.
        """
        embedded = self.timestep_embedder(self._sinusoids(timesteps))
        if hasattr(self, "guidance_embedder"):
            strength = 1000 * _given(guidance, "guidance")
            embedded = embedded + self.guidance_embedder(self._sinusoids(strength))
        if hasattr(self, "text_embedder"):
            pooled = _given(pooled, "pooled").astype(self.dtype)
            embedded = embedded + self.text_embedder(pooled)
        return embedded

    def _sinusoids(self, values: Num[Array, " B"]) -> Float[Array, "B T"]:
        features = sinusoidal_embedding(
            values, self.time_features, flip_sin_to_cos=True, freq_shift=0
        )
        return features.astype(self.dtype)


def _given(value: Array | None, name: str) -> Array:
    if value is None:
        raise ValueError(
            f"this model is conditioned on {name} too, which its condition lacks: pass "
            f"JointTextCondition(states, {name}=...)."
        )
    return jnp.asarray(value)
