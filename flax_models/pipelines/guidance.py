"""Guidance: a denoiser and what it is conditioned on become what a sampler asks for."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Predictor = Callable[[Float[Array, "B *X C"], Array], Float[Array, "B *X C"]]
_Strength: TypeAlias = Float[Array, "*n"] | np.ndarray | float
# How strong guidance is, a number or one for each step; of a model that learnt it (`told`) also two
# such, what it is told and g of `classifier_free`.
Guidance: TypeAlias = _Strength | tuple[_Strength, _Strength]


def classifier_free(
    model: Any, condition: Any, negative: Any, guidance_scale: Float[Array, ""] | float
) -> Predictor:
    """Classifier-free guidance (Ho & Salimans, arXiv 2207.12598): (x, timestep) -> prediction.

    ε_uncond + g (ε_cond − ε_uncond), so g = 1 is the plain conditional model.

    Args:
      model: called with x [B, ..., C], a timestep and a condition; channels of its output behind
        those of x, such as a DiT's variances, are not used.
      condition: what the model reads, a pytree of [B, ...].
      negative: the same without the prompt, each [B, ...] or [...] for all; None for no guidance,
        at half the cost, whatever `guidance_scale`.
      guidance_scale: g.

    Returns:
      A function of x and a timestep, whose predictions are float32 of x's shape.
    """
    if negative is not None:  # in front, as in diffusers
        condition = jax.tree.map(
            lambda without, text: jnp.concatenate([jnp.broadcast_to(without, text.shape), text]),
            negative,
            condition,
        )

    def predict(x: Array, timestep: Array) -> Array:
        inputs = x if negative is None else jnp.concatenate([x, x])
        output = model(inputs, timestep, condition)[..., : x.shape[-1]].astype(jnp.float32)
        if negative is None:
            return output
        without, prompted = jnp.split(output, 2)
        return without + guidance_scale * (prompted - without)

    return predict


def told(
    model: Any,
    condition: Any,
    negative: Any,
    guidance_scale: Guidance,
    run: Callable[..., Array] | None = None,
) -> Predictor:
    """Of a model that learnt its guidance, and is told how strong it is to be.

    Args:
      model: its config says whether it is told (`guidance_embeds`).
      condition: a `JointTextCondition`.
      negative: as for `classifier_free`, which comes on top.
      guidance_scale: the strength; with a negative the pair of it and g.
      run: what to call in place of the model.
    """
    given: Any = guidance_scale if isinstance(guidance_scale, tuple) else (guidance_scale, 1.0)
    strength, g = given
    if model.config.guidance_embeds:
        batch = condition.states.shape[0]
        guidance = jnp.full((batch,), strength, jnp.float32)
        condition = condition._replace(guidance=guidance)
        negative = None if negative is None else negative._replace(guidance=guidance)
    return classifier_free(model if run is None else run, condition, negative, g)
