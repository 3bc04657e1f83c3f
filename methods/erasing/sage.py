"""SAGE: semantic-augment erasing of a concept *domain* from a text encoder.

Source: arXiv 2506.09363.  The authors published no code; the paper and its public summaries fix the
components (self-check, self-erasure, global and local retention, inside-out exploration), and the
exact equations below are this project's formulation of them.

Frozen are the original text encoder T0 and the UNet e; trained is T, a copy of T0.  For a concept
phrase c, an anchor phrase a (default: the empty prompt) and prompts p around c, one *cycle* is

1. self-check: K steps on the input embeddings E of a prompt's template words, starting at the
   prompt itself, towards min_E J(E) (`self_check_objective`);
2. self-erasure: M updates of T on L_erase + lambda_g L_global + lambda_l L_local, for the plain
   prompts and the attacked ones;

and one cycle is one pure step of `conceptax.methods.training.train`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ...flax_models.clip import pooling_positions
from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..diffusion.objectives import erase_target, prediction_loss
from ..settings import check_settings
from ..text.phrases import (
    Retained,
    concept_states,
    embedding_scale,
    encode_phrases,
    hidden_states,
    pooled_states,
)
from ..training import TrainState, constrain_batch
from ..vectors import cosine, unit
from .common import (
    OPTIMIZERS,
    EncoderSettings,
    EncoderStatic,
    Frozen,
    assembled,
    draw_latents,
    draw_prompts,
    erasing_prompts,
    latent_sources,
    trained,
    updated,
)


@dataclasses.dataclass(frozen=True)
class SageConfig(EncoderSettings):
    """All settings of a SAGE run: those of `PhraseSettings`, `TrainedSettings` and
    `EncoderSettings`, and its own.

    Attributes:
      check: what an attack looks for besides what T0 takes for the concept: "anchor" (T is far
        from the anchor), "recall" (T still encodes what T0 encodes) or "guided" (through the UNet:
        what T encodes still makes it predict the concept; several times as slow).
      check_steps: steps of the self-check (K); 0 is word erasure.
      check_rate: step size of the self-check (alpha), relative to the root mean square of the token
        embeddings' entries, which differs a hundredfold between models.
      check_optimizer: "adam" or "sign" (sign-gradient descent).
      check_weight: weight of the second term of J (gamma).
      check_radius: largest change of an embedding entry (delta, l-infinity), in the same unit; None
        is unbounded.
      check_start: where the attack starts: "prompt" (inside-out, one random step from the prompt)
        or "random" (outside-in, at normal noise of the token embeddings' size in place of what may
        move).
      check_states: what the self-check compares: "pooled" states, or all "tokens" of a prompt, as
        the UNet reads them.
      free_concept: let the attack move the concept's own token embeddings too.
      ddim_samples: number of the cached trajectories.
      global_rows: retained phrases per update in the global loss.
      global_form: "cross" (U U0^T, keeps the frame that the UNet reads) or "self" (U U^T).
      global_states: what it relates: "pooled" states, or those of all "tokens", which takes their
        number times the memory.
      global_weight: lambda_g.
      local_rows: retained phrases per update in the local loss.
      local_weight: lambda_l.
    """

    learning_rate: float = 1.75e-3
    eta: float = 4.0
    latents: Literal["noise", "ddim"] = "noise"
    check: Literal["anchor", "recall", "guided"] = "recall"
    check_steps: int = 30
    check_rate: float = 0.1
    check_optimizer: Literal["adam", "sign"] = "adam"
    check_weight: float = 1.0
    check_radius: float | None = None
    check_start: Literal["prompt", "random"] = "prompt"
    check_states: Literal["pooled", "tokens"] = "tokens"
    free_concept: bool = True
    ddim_samples: int = 16
    global_rows: int = 128
    global_form: Literal["cross", "self"] = "cross"
    global_states: Literal["pooled", "tokens"] = "pooled"
    global_weight: float = 20.0
    local_rows: int = 6
    local_weight: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"check_steps": 0, "check_rate": 0, "check_weight": 0, "global_weight": 0}
        counts = {"ddim_samples": 1, "global_rows": 1, "local_rows": 1, "local_weight": 0}
        check_settings(self, least=least | counts)
        if self.check_radius is not None and not self.check_radius > 0:
            raise ValueError(f"check_radius must be positive or None, got {self.check_radius}.")


# ---- losses: functions of arrays ----


def self_check_objective(
    original: Float[Array, "P C"],
    current: Float[Array, "P C"],
    concept: Float[Array, "*P C"],
    anchor: Float[Array, "*P C"],
    *,
    form: str,
    weight: float,
) -> Float[Array, " P"]:
    """J(E) of each attacked prompt; the attack minimizes it.

    form "anchor":  -cos(T0(E), T0(c)) + weight cos(T(E), T0(a))
    form "recall":  -cos(T0(E), T0(c)) + weight (1 - cos(T(E), T0(c)))

    Args:
      original, current: states T0(E) and T(E) of the attacked prompts, [P, C].
      concept, anchor: states T0(c) and T0(a), [C], or those of each prompt, [P, C].
    """
    still = -cosine(original, concept)
    if form == "anchor":
        return still + weight * cosine(current, anchor)
    return still + weight * (1.0 - cosine(current, concept))


def guided_check_objective(
    original: Float[Array, "P C"],
    concept: Float[Array, "*P C"],
    prediction: Float[Array, " P *S"],
    wanted: Float[Array, " P *S"],
    unwanted: Float[Array, " P *S"],
    *,
    weight: float,
) -> Float[Array, " P"]:
    """J(E) through the UNet e, at one latent for each prompt.

    -cos(T0(E), T0(c)) + weight |e(T(E)) - e(T0(p))|^2 / |e(T0(a)) - e(T0(p))|^2

    Args:
      original, concept: states T0(E) [P, C] and T0(c).
      prediction, wanted, unwanted: e under T(E), under the prompts and under the anchor in them.
    """

    def distance(first: Array, second: Array) -> Array:
        return jnp.mean((first - second) ** 2, axis=range(1, first.ndim))

    relative = distance(prediction, wanted) / (distance(unwanted, wanted) + 1e-12)
    return weight * relative - cosine(original, concept)


def phrase_states(output: Any, form: str) -> Float[Array, "P C"]:
    """What stands for phrases: their pooled states, or those of all their tokens side by side."""
    if form == "pooled":
        return output.pooled
    return output.last_hidden_state.reshape(len(output.pooled), -1)


def global_retention_loss(
    rows: Float[Array, "R C"],
    original_rows: Float[Array, "R C"],
    original: Float[Array, "N C"],
    current: Float[Array, "N C"] | None = None,
) -> Float[Array, ""]:
    """Mean over (i, j) of (U_i . V_j - U0_i . U0_j)^2 for pooled states, normalized here.

    Args:
      rows, original_rows: trained and original states of the same R phrases.
      original: original states of the N phrases they are related to.
      current: V: None relates to the original states (cross form); the self form passes the
        trained states of those N phrases.
    """
    related = unit(original if current is None else current)
    now = unit(rows) @ related.T
    before = unit(original_rows) @ unit(original).T
    return jnp.mean((now - before) ** 2)


# ---- the step ----


SageStatic = EncoderStatic  # its public name


def self_check(
    static: SageStatic,
    params: Any,
    frozen: Frozen,
    which: Int[Array, ""] | int,
    tokens: Int[Array, "P L"],
    without: Int[Array, "P L"],
    free: Bool[Array, "P L"],
    key: PRNGKeyArray,
) -> tuple[Float[Array, "P L C"], dict[str, Array]]:
    """Walk from prompts of the concept to the edge of what T still takes for it.

    Args:
      static, frozen: as `prepare` makes them.
      params: the trained parameters of T.
      which: number of the concept.
      tokens, without: [P, L] prompts to start from, with the concept and with the anchor.
      free: [P, L] positions whose embeddings may move.
      key: of a random start and of the latents of a guided check.

    Returns:
      token embeddings [P, L, C] of the attacked prompts, without gradient, and the mean cosines
      to T0(c) after the attack, as T0 and as T see them.
    """
    config = static.config
    now, before, unet = static.models(jax.lax.stop_gradient(params), frozen)
    ends = pooling_positions(now.config, tokens)
    start = before.embed_tokens(tokens).astype(jnp.float32)
    unit = frozen["embedding_rms"]
    if config.check_start == "random":
        start = jnp.where(free[..., None], unit * jax.random.normal(key, start.shape), start)
    # At the prompt itself J is nearly flat, and where T is T0 its gradient is rounding noise, of
    # which Adam would make whole steps that differ between meshes: the walk begins a step away.
    away = config.check_rate * unit * jax.random.normal(jax.random.fold_in(key, 1), start.shape)
    begin = jnp.where(free[..., None], start + away, start) if config.check_steps else start

    prompts, anchors = before(tokens), before(without)
    if config.check_states == "pooled":
        concept, anchor = frozen["concept_pooled"][which], frozen["anchor_pooled"]
    else:
        concept, anchor = (phrase_states(each, config.check_states) for each in (prompts, anchors))

    def encoded(embeddings: Array) -> tuple[Any, Any]:
        return tuple(model(inputs_embeds=embeddings, eos_positions=ends) for model in (before, now))

    def objective(embeddings: Array, key: Array) -> Array:
        outputs = encoded(embeddings)
        original, current = (phrase_states(each, config.check_states) for each in outputs)
        if config.check != "guided":
            return self_check_objective(
                original, current, concept, anchor, form=config.check, weight=config.check_weight
            ).sum()
        size = tokens.shape[0]
        latents, times = (each[:size] for each in _latents_of(static, frozen, which, key, size))
        predictions = [
            unet(latents, times, each.condition) for each in (outputs[1], prompts, anchors)
        ]
        return guided_check_objective(
            original, concept, *predictions, weight=config.check_weight
        ).sum()

    optimizer = OPTIMIZERS[config.check_optimizer](config.check_rate)

    def advance(step: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        embeddings, memory = carry
        gradient = jax.grad(objective)(embeddings, jax.random.fold_in(key, step))
        gradient = jnp.where(free[..., None], gradient, 0.0)
        updates, memory = optimizer.update(gradient, memory)
        embeddings = jnp.where(free[..., None], embeddings + unit * updates, start)
        if config.check_radius is not None:
            radius = unit * config.check_radius
            embeddings = jnp.clip(embeddings, start - radius, start + radius)
        return embeddings, memory

    attacked, _ = jax.lax.fori_loop(0, config.check_steps, advance, (begin, optimizer.init(begin)))
    attacked = jax.lax.stop_gradient(attacked)
    original, current = (phrase_states(each, config.check_states) for each in encoded(attacked))
    return attacked, {
        "check_original": cosine(original, concept).mean(),
        "check_current": cosine(current, concept).mean(),
    }


def erase_step(
    static: SageStatic, state: TrainState, frozen: Frozen, batch: None, key: PRNGKeyArray
) -> tuple[TrainState, dict[str, Array]]:
    """One SAGE cycle: one self-check, then `erase_updates` updates of the text encoder.

    Returns:
      the new state and metrics: loss, erase, global_, local (of the last update), check_original
      and check_current (cosines to T0(c) after the attack).
    """
    del batch
    concept_key, prompt_key, update_key = jax.random.split(key, 3)
    check_key = jax.random.fold_in(key, 3)
    names = ("tokens", "without", "free")
    which, (tokens, without, free) = draw_prompts(static, frozen, names, concept_key, prompt_key)
    attacked, metrics = self_check(
        static, state.params, frozen, which, tokens, without, free, check_key
    )
    loss_of = functools.partial(_erase_loss, static, frozen, which, tokens, without, attacked)
    after, parts = updated(static, state, loss_of, update_key)
    return after, metrics | parts


def _erase_loss(
    static: SageStatic,
    frozen: Frozen,
    which: Array,
    tokens: Array,
    without: Array,
    attacked: Array,
    key: PRNGKeyArray,
    params: Any,
) -> tuple[Array, dict[str, Array]]:
    """L_erase + lambda_g L_global + lambda_l L_local, and its parts."""
    config = static.config
    latent_key, local_key, global_key = jax.random.split(key, 3)
    now, before, unet = static.models(params, frozen)
    ends = pooling_positions(now.config, tokens)
    retained = frozen["retained_tokens"]
    local = retained[jax.random.choice(local_key, retained.shape[0], (config.local_rows,))]
    some = jax.random.choice(global_key, retained.shape[0], (config.global_rows,))

    # One latent per prompt, shared by its plain and its attacked form; one per retained phrase.
    prompts = tokens.shape[0]
    latents, timesteps = _latents_of(static, frozen, which, latent_key, prompts)

    # Targets, all without gradient: the anchor, the concept, the retained phrases.
    original = before(jnp.concatenate([without, tokens, local]))
    order = jnp.concatenate([jnp.arange(prompts), jnp.arange(latents.shape[0])])
    targets = jax.lax.stop_gradient(
        unet(*constrain_batch((latents[order], timesteps[order], original.condition)))
    )
    target_anchor, target_concept, target_local = jnp.split(targets, [prompts, 2 * prompts])
    target = erase_target(target_anchor, target_concept, config.eta)

    # Predictions: plain prompts, attacked prompts, retained phrases.
    plain = now(jnp.concatenate([tokens, local, retained[some]]))
    perturbed = now(inputs_embeds=attacked, eos_positions=ends)
    context = jax.tree.map(
        lambda states, moved: jnp.concatenate(
            [states[:prompts], moved, states[prompts : prompts + config.local_rows]]
        ),
        plain.condition,
        perturbed.condition,
    )
    predictions = unet(*constrain_batch((latents[order], timesteps[order], context)))
    erased, kept = predictions[: 2 * prompts], predictions[2 * prompts :]

    erase = prediction_loss(erased, jnp.concatenate([target, target]))
    local_loss = prediction_loss(kept, target_local)
    rows = phrase_states(plain, config.global_states)[prompts + config.local_rows :]
    every = frozen["retained_states"]
    before_rows = every[some]
    related = (every,) if config.global_form == "cross" else (before_rows, rows)
    global_loss = global_retention_loss(rows, before_rows, *related)
    loss = erase + config.global_weight * global_loss + config.local_weight * local_loss
    return loss, {"loss": loss, "erase": erase, "global_": global_loss, "local": local_loss}


def _latents_of(
    static: SageStatic, frozen: Frozen, which: Array | int, key: PRNGKeyArray, prompts: int
) -> tuple[Array, Array]:
    """Latents [P + R, h, w, c] and timesteps [P + R]: P for a concept, R for what is retained."""
    size = prompts + static.config.local_rows
    retained = frozen["tokens"].shape[0]  # the number after the concepts'
    subjects = jnp.where(jnp.arange(size) < prompts, which, retained)
    return draw_latents(static, frozen, key, size, subjects=subjects)


# ---- from a pipeline to a run, and back ----


def prepare(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: SageConfig,
    *,
    retain: Sequence[str] | Retained | None = None,
    seed: int = 0,
) -> tuple[SageStatic, TrainState, dict[str, Any]]:
    """Everything `erase_step` needs, computed once.

    Args:
      pipeline, concepts, config, retain: as for `erasing.erase`; a result of
        `phrases.retained_phrases` is taken too.
      seed: of the cached trajectories and the templates around retained phrases.

    Raises:
      ConceptError: no or unusable concepts, or nothing left to retain.
      ValueError: a pattern of trainable parameters that matches nothing, or an encoder to edit that
        the model does not have.
    """
    what, rows = f" with local_rows {config.local_rows}", config.prompts + config.local_rows
    static, state, frozen = assembled(pipeline, config, rows=rows, what=what)
    prompts, retained = erasing_prompts(
        pipeline, concepts, config, retain, seed, frames=config.frames
    )
    encoder = pipeline.prompt_encoder
    anchor = encode_phrases(pipeline.tokenizer, [config.anchor], pipeline.max_length)
    states = pooled_states if config.global_states == "pooled" else hidden_states
    texts = {
        "tokens": prompts.tokens,  # [C, T, L]
        "without": prompts.without,
        "free": prompts.free | prompts.concept if config.free_concept else prompts.free,
        "concept_pooled": concept_states(pipeline, concepts),  # [C, D]
        "anchor_pooled": pooled_states(encoder, anchor)[0],
        "embedding_rms": embedding_scale(encoder),
        "retained_tokens": retained,  # [N, L]
        "retained_states": states(encoder, retained).reshape(len(retained), -1),  # [N, D]
        **latent_sources(
            pipeline, config, [*prompts.tokens, retained], samples=config.ddim_samples, seed=seed
        ),
    }
    return static, state, frozen | jax.tree.map(jnp.asarray, texts)


def edited_text_encoder(static: SageStatic, state: TrainState, frozen: Frozen) -> Any:
    """The trained text encoder as a module, of SDXL both."""
    return static.models(state.params, frozen)[0]


def erase(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: SageConfig | None = None,
    **options: Any,
) -> StableDiffusionPipeline:
    """Erase concepts and return the pipeline with the edited text encoder in its place.

    Only the text encoder differs; it can be plugged into any model that shares it. Arguments and
    options (`retain`, `seed`, those of the training loop) are as for `erasing.erase`.
    """
    return trained(erase_step, prepare, pipeline, concepts, config or SageConfig(), **options)
