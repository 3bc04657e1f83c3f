"""Objectives that several methods share: pure functions of arrays."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def erase_target(
    anchor: Float[Array, " P *S"], concept: Float[Array, " P *S"], eta: float
) -> Float[Array, " P *S"]:
    """y = e(a) - eta (e(p) - e(a)): the anchor's prediction, pushed away from the concept's."""
    return anchor - eta * (concept - anchor)


def prediction_loss(
    prediction: Float[Array, " P *S"], target: Float[Array, " P *S"]
) -> Float[Array, ""]:
    """Mean squared difference of predictions; the target carries no gradient."""
    return jnp.mean((prediction - jax.lax.stop_gradient(target)) ** 2)
