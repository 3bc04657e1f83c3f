"""AdvUnlearn: erase a concept from the text encoder against prompts that bring it back.

Source: Zhang et al. 2024, "Defensive Unlearning with Adversarial Training for Robust Concept
Erasure in Diffusion Models" (arXiv 2405.15234), its bi-level problem for the text encoder T:

    upper level   min_T   l_ESD(T, c*) + gamma E_r |e(x_t | T(r)) - e(x_t | T0(r))|^2
    lower level   c* = argmin_c'  |e(x_t | T(c')) - e(x_t | T0(c))|^2

where l_ESD is the loss of `esd` at the adversarial prompt, gamma the weight of utility retention
over retained phrases r, and c' the prompt with k free token embeddings in front.  The attack comes
from outside in: it starts at random words and pulls the edited model's prediction towards the
original's for the concept, through the UNet.  (SAGE starts at the concept and moves out, in the
text encoder alone.)  The first `warmup` cycles erase plain prompts; signed gradients make it the
paper's fast variant.

One cycle is one attack and `erase_updates` updates of T.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ...flax_models.clip import pooling_positions
from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..diffusion.objectives import erase_target, prediction_loss
from ..settings import check_settings
from ..text.phrases import (
    ConceptError,
    Retained,
    embedding_scale,
    padding,
    with_prefix,
)
from ..training import TrainState, constrain_batch
from .common import (
    OPTIMIZERS,
    EncoderSettings,
    EncoderStatic,
    Frozen,
    assembled,
    descended,
    draw_latents,
    draw_prompts,
    erasing_prompts,
    latent_sources,
    updated,
)


@dataclasses.dataclass(frozen=True)
class AdvUnlearnConfig(EncoderSettings):
    """All settings of an AdvUnlearn run. The paper's anchor is empty, its latents "edited".

    Attributes:
      warmup: cycles before the first attack, which erase plain prompts.
      attack_tokens: free token embeddings in front of a prompt (k).
      attack_steps: steps of an attack, each at latents and times of its own.
      attack_rate: step size of the attack, relative to the root mean square of the token
        embeddings' entries.
      attack_optimizer: "adam" or "sign" (signed gradients, the fast variant).
      guidance: of the runs that draw "edited" latents.
      retain_rows: retained phrases per update.
      retain_weight: gamma.
    """

    cycles: int = 100
    latents: Literal["edited", "noise"] = "noise"
    ddim_steps: int = 20
    warmup: int = 20
    attack_tokens: int = 3
    attack_steps: int = 5
    attack_rate: float = 0.1
    attack_optimizer: Literal["adam", "sign"] = "adam"
    guidance: float = 3.0
    retain_rows: int = 8
    retain_weight: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"warmup": 0, "attack_steps": 0, "attack_rate": 0, "guidance": 0}
        rest = {"attack_tokens": 1, "retain_rows": 1, "retain_weight": 0}
        check_settings(self, least=least | rest)


def attack(
    static: EncoderStatic, params: Any, frozen: Frozen, tokens: Int[Array, "P L"], key: PRNGKeyArray
) -> tuple[Float[Array, "P L C"], Float[Array, ""]]:
    """The lower level: prefixes under which the edited encoder gives the concept back.

    Args:
      static, frozen: as `prepare` makes them.
      params: the trained parameters of T.
      tokens: [P, L] prompts of the concept.
      key: of the start, the latents and the times.

    Returns:
      token embeddings [P, L, C] of the attacked prompts, without gradient, and the loss of the last
      step (0 without steps).
    """
    config = static.config
    start_key, steps_key = jax.random.split(key)
    now, before, unet = static.models(jax.lax.stop_gradient(params), frozen)
    embeddings = before.embed_tokens(tokens).astype(jnp.float32)
    ends = pooling_positions(now.config, tokens) + config.attack_tokens
    concept = before(tokens).condition
    drawn = now(tokens).condition  # what the edited model draws the latents under
    size = len(tokens), config.attack_tokens
    words = jax.random.randint(start_key, size, 0, now.config.vocab_size)
    start = before.embed_tokens(words).astype(jnp.float32)

    def objective(prefix: Array, key: Array) -> Array:
        latents, times = constrain_batch(
            draw_latents(static, frozen, key, len(tokens), model=unet, condition=drawn)
        )
        states = now(inputs_embeds=with_prefix(embeddings, prefix), eos_positions=ends)
        predicted = unet(latents, times, states.condition)
        return prediction_loss(predicted, unet(latents, times, concept))

    optimizer = OPTIMIZERS[config.attack_optimizer](config.attack_rate)
    keys = jax.random.split(steps_key, config.attack_steps)
    prefix, last = descended(objective, start, keys, optimizer, frozen["embedding_rms"])
    return jax.lax.stop_gradient(with_prefix(embeddings, prefix)), last


def adversarial_step(
    static: EncoderStatic, state: TrainState, frozen: Frozen, batch: None, key: PRNGKeyArray
) -> tuple[TrainState, dict[str, Array]]:
    """One cycle: an attack (none in the warm-up), then `erase_updates` updates of the text encoder.

    Returns:
      the new state and metrics: loss, erase, retain (of the last update), attack (the attack's last
      loss, 0 in the warm-up).
    """
    del batch
    concept_key, prompt_key, attack_key, update_key = jax.random.split(key, 4)
    names = ("tokens", "without")
    _, (tokens, without) = draw_prompts(static, frozen, names, concept_key, prompt_key)

    def plain() -> tuple[Array, Array]:
        _, original, _ = static.models(state.params, frozen)
        return original.embed_tokens(tokens).astype(jnp.float32), jnp.zeros(())

    def attacked_now() -> tuple[Array, Array]:
        return attack(static, state.params, frozen, tokens, attack_key)

    attacked, last = jax.lax.cond(state.step < static.config.warmup, plain, attacked_now)
    loss_of = functools.partial(_loss, static, frozen, tokens, without, attacked)
    after, metrics = updated(static, state, loss_of, update_key)
    return after, metrics | {"attack": last}


def _loss(
    static: EncoderStatic,
    frozen: Frozen,
    tokens: Array,
    without: Array,
    attacked: Array,
    key: PRNGKeyArray,
    params: Any,
) -> tuple[Array, dict[str, Array]]:
    """The upper level: l_ESD at the attacked prompts + gamma times retention, and its parts."""
    config, prompts = static.config, tokens.shape[0]
    rows_key, latent_key = jax.random.split(key)
    now, before, unet = static.models(params, frozen)
    retained = frozen["retained_tokens"]
    rows = retained[jax.random.choice(rows_key, retained.shape[0], (config.retain_rows,))]

    plain = now(jnp.concatenate([tokens, rows])).condition
    size, drawn = prompts + config.retain_rows, jax.lax.stop_gradient(plain)
    latents, times = constrain_batch(
        draw_latents(static, frozen, latent_key, size, model=unet, condition=drawn)
    )
    original = before(jnp.concatenate([without, tokens, rows])).condition
    order = jnp.concatenate([jnp.arange(prompts), jnp.arange(latents.shape[0])])
    targets = unet(*constrain_batch((latents[order], times[order], original)))
    anchor, concept, kept = jnp.split(targets, [prompts, 2 * prompts])

    ends = pooling_positions(now.config, tokens)  # not read: the UNet attends to all states
    states = now(inputs_embeds=attacked, eos_positions=ends).condition
    context = jax.tree.map(
        lambda moved, unmoved: jnp.concatenate([moved, unmoved[prompts:]]), states, plain
    )
    predictions = unet(latents, times, context)
    erase = prediction_loss(predictions[:prompts], erase_target(anchor, concept, config.eta))
    retain = prediction_loss(predictions[prompts:], kept)
    loss = erase + config.retain_weight * retain
    return loss, {"loss": loss, "erase": erase, "retain": retain}


def prepare(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: AdvUnlearnConfig,
    *,
    retain: Sequence[str] | Retained | None = None,
    seed: int = 0,
) -> tuple[EncoderStatic, TrainState, dict[str, Any]]:
    """Everything `adversarial_step` needs, computed once.

    Arguments as of `sage.prepare`.

    Raises:
      ConceptError: no or unusable concepts, no room for the attack, or nothing left to retain.
      ValueError: a pattern of trainable parameters that matches nothing.
    """
    static, state, frozen = assembled(pipeline, config)
    length = pipeline.max_length
    room = length - config.attack_tokens
    if room < 3:  # start, one token, end
        raise ConceptError(
            f"attack_tokens={config.attack_tokens} leave no room for a prompt in a context of "
            f"{length} tokens."
        )
    prompts, retained = erasing_prompts(
        pipeline, concepts, config, retain, seed, frames=config.frames, length=room
    )
    pad = padding(pipeline.tokenizer)

    def padded(rows: np.ndarray) -> np.ndarray:
        return np.pad(rows, ((0, 0), (0, 0), (0, length - room)), constant_values=pad)

    texts = {
        "tokens": padded(prompts.tokens),  # [C, T, L]
        "without": padded(prompts.without),
        "embedding_rms": embedding_scale(pipeline.prompt_encoder),
        "retained_tokens": retained,  # [N, L]
        **latent_sources(pipeline, config),
    }
    return static, state, frozen | jax.tree.map(jnp.asarray, texts)
