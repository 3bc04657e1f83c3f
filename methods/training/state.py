"""Training state: what a step carries to the next one, a plain pytree."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class TrainState:
    """Everything a step changes, and nothing else.

    Attributes:
      step: number of completed steps, int32 scalar.
      params: the trained parameters, nested dict of arrays (list indices are int keys).
      opt_state: the optax optimizer's state for `params`.
    """

    step: Any  # shapes and shardings can take the place of the arrays
    params: Any
    opt_state: Any


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step: step 0, `params` as given, a fresh optimizer state."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def apply_gradients(
    state: TrainState, gradients: Any, optimizer: optax.GradientTransformation
) -> TrainState:
    """One optimizer update: new parameters and optimizer state, step number plus one."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state)


@functools.lru_cache
def accumulated(
    optimizer: optax.GradientTransformation, batches: int
) -> optax.GradientTransformation:
    """The optimizer fed with the mean gradient of that many batches: one update for all of them.

    One object per setting. Takes the memory of one more gradient, and of no larger batch.
    """
    if batches == 1:
        return optimizer
    return optax.MultiSteps(optimizer, batches).gradient_transformation()


def step_key(key: PRNGKeyArray, step: int | Int[Array, ""]) -> PRNGKeyArray:
    """The key of step `step`, from 0: `fold_in(key, step)`; so a resumed run draws as any other."""
    return jax.random.fold_in(key, step)


@functools.lru_cache
def cosine_adamw(
    learning_rate: float, weight_decay: float, updates: int
) -> optax.GradientTransformation:
    """AdamW on gradients clipped to norm 1, its rate falling to 0 along a cosine.

    One object per setting, so that equal runs share their compiled step.
    """
    rate = optax.cosine_decay_schedule(learning_rate, updates)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=weight_decay))


@functools.lru_cache
def constant_adamw(
    learning_rate: float, weight_decay: float = 0.0, *, clip: bool = True
) -> optax.GradientTransformation:
    """AdamW at a constant rate, so that a state is what a shorter run would have ended with.

    One object per setting, so that equal runs share their compiled step.

    With `clip` gradients are clipped to norm 1, all together; what is learnt side by side stays
    independent without.
    """
    optimizer = optax.adamw(learning_rate, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer) if clip else optimizer
