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
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ...flax_models.clip import pooling_positions
from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..diffusion.objectives import erase_target, prediction_loss
from ..memory import require_unet_memory
from ..sampling import NoiseSchedule
from ..settings import check_settings
from ..text.phrases import (
    ConceptError,
    Retained,
    embedding_scale,
    encode_phrases,
    encoder_patterns,
    framed_phrases,
    retained_phrases,
    stacked_prompts,
    text_length,
    with_prefix,
)
from ..training import (
    TrainState,
    apply_gradients,
    constrain_batch,
    cosine_adamw,
    init_state,
    split_trainable,
)
from .common import EncoderSettings, EncoderStatic, draw_latents, latent_sources, trained


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
        check_settings(
            self,
            least={
                "warmup": 0,
                "attack_tokens": 1,
                "attack_steps": 0,
                "attack_rate": 0,
                "guidance": 0,
                "retain_rows": 1,
                "retain_weight": 0,
            },
        )


def attack(
    static: EncoderStatic,
    params: Any,
    frozen: Mapping[str, Any],
    tokens: Int[Array, "P L"],
    key: PRNGKeyArray,
) -> tuple[Float[Array, "P L C"], Float[Array, ""]]:
    """The lower level: prefixes under which the edited encoder gives the concept back.

    Args:
      static: structures and settings.
      params: the trained parameters of T.
      frozen: as `prepare` makes it.
      tokens: [P, L] prompts of the concept.
      key: of the start, the latents and the times.

    Returns:
      token embeddings [P, L, C] of the attacked prompts, without gradient, and the loss of the last
      step (0 without steps).
    """
    config = static.config
    start_key, steps_key = jax.random.split(key)
    now = nnx.merge(static.text, jax.lax.stop_gradient(params), frozen["text"])
    before = nnx.merge(static.text, frozen["original"])
    unet = nnx.merge(static.unet, frozen["unet"])
    embeddings = before.embed_tokens(tokens).astype(jnp.float32)
    ends = pooling_positions(now.config, tokens) + config.attack_tokens
    concept = before(tokens).condition
    drawn = now(tokens).condition  # what the edited model draws the latents under
    words = jax.random.randint(
        start_key, (tokens.shape[0], config.attack_tokens), 0, now.config.vocab_size
    )
    start = before.embed_tokens(words).astype(jnp.float32)

    def objective(prefix: Array, latents: Array, times: Array) -> Array:
        states = now(inputs_embeds=with_prefix(embeddings, prefix), eos_positions=ends)
        return prediction_loss(
            unet(latents, times, states.condition), unet(latents, times, concept)
        )

    optimizer = (
        optax.adam(config.attack_rate)
        if config.attack_optimizer == "adam"
        else optax.sign_sgd(config.attack_rate)
    )

    def advance(carry: tuple[Array, Any], key: Array) -> tuple[tuple[Array, Any], Array]:
        prefix, memory = carry
        latents, times = constrain_batch(
            draw_latents(static, frozen, key, len(tokens), model=unet, condition=drawn)
        )
        loss, gradient = jax.value_and_grad(objective)(prefix, latents, times)
        updates, memory = optimizer.update(gradient, memory)
        return (prefix + frozen["embedding_rms"] * updates, memory), loss

    keys = jax.random.split(steps_key, config.attack_steps)
    (prefix, _), losses = jax.lax.scan(advance, (start, optimizer.init(start)), keys)
    last = losses[-1].astype(jnp.float32) if config.attack_steps else jnp.zeros(())
    return jax.lax.stop_gradient(with_prefix(embeddings, prefix)), last


def adversarial_step(
    static: EncoderStatic,
    state: TrainState,
    frozen: Mapping[str, Any],
    batch: None,
    key: PRNGKeyArray,
) -> tuple[TrainState, dict[str, Array]]:
    """One cycle: an attack (none in the warm-up), then `erase_updates` updates of the text encoder.

    Args:
      static, state, frozen: from `prepare`.
      batch: None; a cycle needs no data.
      key: this cycle's key.

    Returns:
      the new state and metrics: loss, erase, retain (of the last update), attack (the attack's last
      loss, 0 in the warm-up).
    """
    del batch
    config = static.config
    concept_key, prompt_key, attack_key, update_key = jax.random.split(key, 4)
    which = jax.random.randint(concept_key, (), 0, frozen["tokens"].shape[0])
    rows = jax.random.choice(prompt_key, frozen["tokens"].shape[1], (config.prompts,))
    tokens, without = constrain_batch(
        tuple(frozen[name][which, rows] for name in ("tokens", "without"))
    )

    def plain() -> tuple[Array, Array]:
        text = nnx.merge(static.text, frozen["original"])
        return text.embed_tokens(tokens).astype(jnp.float32), jnp.zeros(())

    attacked, last = jax.lax.cond(
        state.step < config.warmup,
        plain,
        lambda: attack(static, state.params, frozen, tokens, attack_key),
    )

    def update(state: TrainState, key: PRNGKeyArray) -> tuple[TrainState, dict[str, Array]]:
        loss_of = functools.partial(_loss, static, frozen, tokens, without, attacked, key)
        (_, parts), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        return apply_gradients(state, gradients, static.optimizer), parts

    keys = jax.random.split(update_key, config.erase_updates)
    after, parts = jax.lax.scan(update, state, keys)
    metrics = jax.tree.map(lambda series: series[-1], parts) | {"attack": last}
    return dataclasses.replace(after, step=state.step + 1), metrics


def _loss(
    static: EncoderStatic,
    frozen: Mapping[str, Any],
    tokens: Array,
    without: Array,
    attacked: Array,
    key: PRNGKeyArray,
    params: Any,
) -> tuple[Array, dict[str, Array]]:
    """The upper level: l_ESD at the attacked prompts + gamma times retention, and its parts."""
    config, prompts = static.config, tokens.shape[0]
    rows_key, latent_key = jax.random.split(key)
    now = nnx.merge(static.text, params, frozen["text"])
    before = nnx.merge(static.text, frozen["original"])
    unet = nnx.merge(static.unet, frozen["unet"])
    retained = frozen["retained_tokens"]
    rows = retained[jax.random.choice(rows_key, retained.shape[0], (config.retain_rows,))]

    plain = now(jnp.concatenate([tokens, rows])).condition
    latents, times = constrain_batch(
        draw_latents(
            static,
            frozen,
            latent_key,
            prompts + config.retain_rows,
            model=unet,
            condition=jax.lax.stop_gradient(plain),
        )
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

    Args:
      pipeline: the model; its parts are read, never changed.
      concepts: what to erase, one phrase each.
      config: settings.
      retain: phrases to preserve; default: whole words of the tokenizer's own vocabulary. Those
        closer to a concept than `config.similarity_cap` are set aside in either case.
      seed: of the templates around words.

    Raises:
      ConceptError: no or unusable concepts, no room for the attack, or nothing left to retain.
      ValueError: a pattern of trainable parameters that matches nothing.
    """
    trainable = encoder_patterns(pipeline, config.trainable, config.edit)
    tokenizer, encoder, length = pipeline.tokenizer, pipeline.prompt_encoder, text_length(pipeline)
    room = length - config.attack_tokens
    if room < 3:  # start, one token, end
        raise ConceptError(
            f"attack_tokens={config.attack_tokens} leave no room for a prompt in a context of "
            f"{length} tokens."
        )
    words = retained_phrases(pipeline, concepts, config, retain).kept
    require_unet_memory(
        pipeline, config.prompts, f"a cycle of {config.prompts} prompts", "take fewer"
    )
    prompts = stacked_prompts(tokenizer, concepts, words, config, length=room, seed=seed)
    framed = framed_phrases(words, prompts.templates, config.frames, seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def padded(rows: np.ndarray) -> np.ndarray:
        return np.pad(rows, ((0, 0), (0, 0), (0, length - room)), constant_values=pad)

    text, trained, rest = split_trainable(encoder, trainable)
    trained = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trained)
    unet, unet_params = nnx.split(pipeline.unet)
    optimizer = cosine_adamw(
        config.learning_rate, config.weight_decay, config.cycles * config.erase_updates
    )
    schedule = NoiseSchedule.from_config(pipeline.scheduler_config)
    static = EncoderStatic(
        unet, optimizer, config, schedule.num_train_timesteps, pipeline.latent_shape, text
    )
    frozen = {
        "text": rest,
        "original": nnx.to_pure_dict(nnx.state(encoder)),
        "unet": nnx.to_pure_dict(unet_params),
        "tokens": padded(prompts.tokens),  # [C, T, L]
        "without": padded(prompts.without),
        "embedding_rms": embedding_scale(encoder),
        "retained_tokens": encode_phrases(tokenizer, framed, length),  # [N, L]
        **latent_sources(pipeline, config),
    }
    return static, init_state(trained, optimizer), jax.tree.map(jnp.asarray, frozen)


def erase(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: AdvUnlearnConfig | None = None,
    *,
    retain: Sequence[str] | Retained | None = None,
    seed: int = 0,
    **options: Any,
) -> StableDiffusionPipeline:
    """Erase concepts and return the pipeline with the edited text encoder in its place.

    Args:
      pipeline, concepts, config, retain: as for `prepare`; the pipeline itself stays as it is.
      seed: of everything random in the run.
      options: passed to `conceptax.methods.training.train` (mesh, checkpoint_dir, progress, ...).
    """
    static, state, frozen = trained(
        adversarial_step,
        prepare,
        pipeline,
        concepts,
        config or AdvUnlearnConfig(),
        retain=retain,
        seed=seed,
        **options,
    )
    return pipeline.with_prompt_encoder(nnx.merge(static.text, state.params, frozen["text"]))
