"""Directions of vectors: rows of length one, and their cosines."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def unit(x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    """Rows of length one; a row of zeros stays as it is."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def cosine(first: Float[Array, "... C"], second: Float[Array, "... C"]) -> Float[Array, "..."]:
    """Cosine similarity along the last axis; the others broadcast."""
    return jnp.sum(unit(first) * unit(second), axis=-1)
