"""UnlearnDiffAtk as published: for each prompt, a prefix of its own, judged as it is searched.

Source: Zhang et al. 2023 (arXiv 2310.11868), section 4, and the settings of its public program.
Each of a prefix's k tokens is drawn from a distribution over the vocabulary; with an image of the
concept that the original model drew from the prompt as the target,

    min_P  E || eps - e(z_t, t, T([d, p])) ||^2,   d_i ~ P_i

is descended by Adam, whose gradient takes the draw for its distribution and is cut to [-1, 1]
(straight through), and P is projected onto the simplex after each step.  Times are taken one after
the other: at each, `iterations` steps with fresh noise; then the likeliest tokens are put in front
of the prompt and the image is judged, until one shows the concept.

`token_search` finds prefixes that serve several prompts; its steps differ.  Here rows are prompts,
and each may be at another time, so that a batch stays full whichever of them are done.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, UInt8

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..sampling import NoiseSchedule, add_noise, encode_images, training_target
from ..settings import check_settings
from ..text.phrases import with_prefix

Frozen = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class UnlearnDiffAtkConfig:
    """Settings of the attack; the defaults are published.

    Attributes:
      tokens: of a prefix (k).
      iterations: steps at each time.
      times: how many times there are, evenly over the schedule, of which the first that brings the
        concept back ends the search.
      learning_rate: of Adam.
      weight_decay: added to the gradient, times the distribution.
    """

    tokens: int = 5
    iterations: int = 40
    times: int = 50
    learning_rate: float = 0.01
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        least = {"tokens": 1, "iterations": 1, "times": 1}
        check_settings(self, least=least, positive=("learning_rate",))

    def timesteps(self, count: int) -> list[int]:
        """The times, of a schedule of `count`: the middles of equal parts, ascending."""
        part = max(count // self.times, 1)
        return list(range(part // 2, count, part))[: self.times]


@dataclasses.dataclass(frozen=True)
class AttackedModel:
    """What a search needs of the edited model and never changes: structures and settings."""

    text_encoder: nnx.GraphDef[Any]
    unet: nnx.GraphDef[Any]
    schedule: NoiseSchedule
    config: UnlearnDiffAtkConfig


def attacked(
    edited: StableDiffusionPipeline, config: UnlearnDiffAtkConfig
) -> tuple[AttackedModel, Frozen]:
    """The edited model's structures, and its parameters by part."""
    structures, frozen = {}, {}
    for name in ("text_encoder", "unet"):
        structures[name], params = nnx.split(getattr(edited, name))
        frozen[name] = nnx.to_pure_dict(params)
    schedule = NoiseSchedule.from_config(edited.scheduler_config)
    return AttackedModel(**structures, schedule=schedule, config=config), frozen


def targets(
    original: StableDiffusionPipeline, images: UInt8[np.ndarray, "N H W 3"]
) -> Float[np.ndarray, "N h w Z"]:
    """Images of the original model as its UNet sees them: the mean of the posterior."""
    mean, _ = encode_images(original.vae, images)
    return np.asarray(original.vae.scale(jnp.asarray(mean)))


def begin(static: AttackedModel, frozen: Frozen, rows: int) -> Any:
    """The state of `rows` searches: even distributions, and the optimizer's."""
    size = _table(frozen).shape[0]
    choices = jnp.full((rows, static.config.tokens, size), 1 / size, jnp.float32)
    return {"choices": choices, "optimizer": jax.vmap(_optimizer(static.config).init)(choices)}


def likeliest(state: Any) -> Int[np.ndarray, "B K"]:
    """The tokens that a search has come to."""
    return np.asarray(state["choices"].argmax(-1), np.int32)


@functools.partial(jax.jit, static_argnums=0)
def search(
    static: AttackedModel,
    frozen: Frozen,
    state: Any,
    latents: Float[Array, "B h w Z"],
    prompts: Int[Array, "B L"],
    times: Int[Array, " B"],
    keys: Key[Array, " B"],
) -> tuple[Any, Float[Array, " B"]]:
    """All steps of B searches at one time each, and their mean losses.

    Args:
      static, frozen: of `attacked`.
      state: of `begin`, or after the times before.
      latents: the target of each, from `targets`.
      prompts: token ids with room for the prefix.
      times: of the schedule.
      keys: of what is drawn; those of one search do not depend on the others.
    """

    def step(carry: Any, number: Array) -> tuple[Any, Array]:
        chosen, noise = drawn(static, carry, latents, keys, number)
        noisy = add_noise(static.schedule, latents, noise, times)
        target = training_target(static.schedule, latents, noise, times)
        table = _table(frozen)

        def loss(prefix: Array) -> tuple[Array, Array]:
            rows = prefix_losses(static, frozen, prefix, prompts, (noisy, times, target))
            return rows.sum(), rows

        gradient, losses = jax.grad(loss, has_aux=True)(table[chosen])
        return updated(static.config, carry, gradient @ table.T), losses

    state, losses = jax.lax.scan(step, state, jnp.arange(static.config.iterations))
    return state, losses.mean(0)


def drawn(
    static: AttackedModel, state: Any, latents: Any, keys: Array, number: Any
) -> tuple[Int[Array, "B K"], Float[Array, "B h w Z"]]:
    """Tokens from each search's distributions, and the noise of its step."""

    def one(key: PRNGKeyArray, choices: Array, latent: Array) -> tuple[Array, Array]:
        token_key, noise_key = jax.random.split(jax.random.fold_in(key, number))
        tokens = jax.random.categorical(token_key, jnp.log(choices))
        return tokens, jax.random.normal(noise_key, latent.shape)

    return jax.vmap(one)(keys, state["choices"], latents)


def prefix_losses(
    static: AttackedModel,
    frozen: Frozen,
    prefix: Float[Array, "B K C"],
    prompts: Int[Array, "B L"],
    noised: tuple[Array, Array, Array],
) -> Float[Array, " B"]:
    """The denoising loss of each prompt behind its prefix, given as token embeddings."""
    latents, times, target = noised
    text_encoder = nnx.merge(static.text_encoder, frozen["text_encoder"])
    unet = nnx.merge(static.unet, frozen["unet"])
    embeddings = with_prefix(_table(frozen)[prompts], prefix)
    ends = jnp.zeros(len(prompts), jnp.int32)  # not read: the UNet attends to all states
    states = text_encoder(inputs_embeds=embeddings, eos_positions=ends).last_hidden_state
    return jnp.mean((unet(latents, times, states) - target) ** 2, axis=(1, 2, 3))


def updated(config: UnlearnDiffAtkConfig, state: Any, gradient: Float[Array, "B K V"]) -> Any:
    """The state after a step along a gradient with respect to choices."""
    optimizer = _optimizer(config)
    step = jax.vmap(optimizer.update)
    change, kept = step(jnp.clip(gradient, -1, 1), state["optimizer"], state["choices"])
    return {"choices": onto_simplex(state["choices"] + change), "optimizer": kept}


def onto_simplex(rows: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """The nearest distributions (Held, Wolfe and Crowder 1974; Duchi et al. 2008, figure 1)."""
    down = -jnp.sort(-rows, axis=-1)
    excess = (jnp.cumsum(down, axis=-1) - 1) / jnp.arange(1, rows.shape[-1] + 1)
    last = jnp.sum(down > excess, axis=-1, keepdims=True) - 1
    return jnp.maximum(rows - jnp.take_along_axis(excess, last, axis=-1), 0)


def _optimizer(config: UnlearnDiffAtkConfig) -> optax.GradientTransformation:
    """PyTorch's Adam, whose weight decay is part of the gradient."""
    decay = optax.add_decayed_weights(config.weight_decay)
    return optax.chain(decay, optax.adam(config.learning_rate))


def _table(frozen: Frozen) -> Float[Array, "V C"]:
    table = frozen["text_encoder"]["embeddings"]["token_embedding"]["embedding"]
    return table.astype(jnp.float32)
