"""STEREO: find words that bring the concept back, thoroughly; then erase it once, against all.

Source: Srivatsan et al. 2024, "STEREO: A Two-Stage Framework for Adversarially Robust Concept
Erasing from Text-to-Image Diffusion Models" (arXiv 2408.16807).

1. Search thoroughly enough.  In each of K rounds the UNet is erased from the word found last (the
concept's own at first), as `esd` does, and goes on from round to round; then new token embeddings
in the concept's place are learnt by textual inversion, so that the erased UNet denoises images of
the concept, min |noise - e_k(x_t, c_k)|^2 with x drawn by the original. 2. Robustly erase once.
The original is trained afresh: at the concept's prompt or one of those found,    c_k, drawn by
chance, its prediction is to become

       e(x_t) + s_p [e(x_t, a) - e(x_t)] - eta mean_k [e(x_t, c_k) - e(x_t)]

   with a the prompts of the anchor, and all predictions those of the original.

What differs from the authors' code: their guidance is projected (APG) with a parallel share of 1,
which is the sum above; their scale of 2 means s_p = 1 and eta = 3.  Their anchors are prompts of a
language model around the concept; here they are the concept's own prompts with the anchor in its
place.  In the search each round erases towards the original's predictions, not the last round's.
The search is part of `prepare`: a run that resumes does it again, with the same result, and the
time told before a run does not count it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ...flax_models.clip import pooling_positions
from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..diffusion.objectives import prediction_loss
from ..sampling import noised_latents
from ..seeds import seed_key
from ..settings import check_settings
from ..text.phrases import Retained, TemplatedConcepts, embedding_scale, empty_condition
from ..training import TrainState, constrain_batch, cosine_adamw, init_state
from . import esd
from .common import (
    ErasingStatic,
    Frozen,
    UnetSettings,
    assembled,
    descended,
    draw_latents,
    draw_prompts,
    drawn_images,
    erasing_prompts,
    latent_sources,
    prompt_conditions,
    schedule_and_shape,
    stepped,
)


@dataclasses.dataclass(frozen=True)
class StereoConfig(UnetSettings):
    """All settings of a STEREO run.

    It retains the anchor alone: words of the vocabulary fill `contexts`.

    Attributes:
      anchor_guidance: s_p.
      search_rounds: K.
      search_cycles: updates of the UNet in each round.
      search_eta: negative guidance of its erasing.
      inversion_steps: of the token embeddings in each round.
      inversion_rate: their step size, relative to the root mean square of the token embeddings'
        entries.
    """

    cycles: int = 200
    prompts: int = 4
    latents: Literal["edited", "noise"] = "edited"
    eta: float = 3.0
    anchor_guidance: float = 1.0
    search_rounds: int = 2
    search_cycles: int = 60
    search_eta: float = 1.0
    inversion_steps: int = 100
    inversion_rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"search_rounds": 1, "search_cycles": 1, "search_eta": 0, "inversion_steps": 0}
        check_settings(self, least=least | {"anchor_guidance": 0, "inversion_rate": 0})


def compositional_target(
    empty: Float[Array, " P *S"],
    anchor: Float[Array, " P *S"],
    found: Float[Array, "K P *S"],
    anchor_guidance: float,
    eta: float,
) -> Float[Array, " P *S"]:
    """What the prediction is to become (see above)."""
    away = jnp.mean(found - empty, axis=0)
    return empty + anchor_guidance * (anchor - empty) - eta * away


def stereo_step(
    static: ErasingStatic, state: TrainState, frozen: Frozen, batch: None, key: PRNGKeyArray
) -> tuple[TrainState, dict[str, Array]]:
    """One update of the second stage, at prompts of one concept or words found for it.

    The metrics are the loss.
    """
    del batch
    config, size = static.config, static.config.prompts
    concept_key, prompt_key, word_key, latent_key = jax.random.split(key, 4)
    names = ("found_states", "anchor_states")
    _, (found, anchor) = draw_prompts(static, frozen, names, concept_key, prompt_key)
    words = config.search_rounds + 1
    one_word = jax.random.randint(word_key, (), 0, words)
    erased = jax.tree.map(lambda leaf: leaf[:, one_word], found)  # of [P, K + 1, L, D]
    current = static.edited(jax.lax.stop_gradient(state.params), frozen)
    latents, times = constrain_batch(
        draw_latents(static, frozen, latent_key, size, model=current, condition=erased)
    )
    context = jax.tree.map(
        lambda empty, anchors, every: jnp.concatenate(
            [jnp.broadcast_to(empty, anchors.shape), anchors, *jnp.moveaxis(every, 1, 0)]
        ),
        frozen["no_text"],
        anchor,
        found,
    )
    places = jnp.arange((words + 2) * size) % size
    every = static.original(frozen)(*constrain_batch((latents[places], times[places], context)))
    empty, towards, *away = jnp.split(every, words + 2)
    target = compositional_target(
        empty, towards, jnp.stack(away), config.anchor_guidance, config.eta
    )

    def loss_of(params: Any) -> tuple[Array, dict[str, Array]]:
        loss = prediction_loss(static.edited(params, frozen)(latents, times, erased), target)
        return loss, {"loss": loss}

    return stepped(static, state, loss_of)


def prepare(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: StereoConfig,
    *,
    retain: Sequence[str] | Retained | None = None,
    seed: int = 0,
) -> tuple[ErasingStatic, TrainState, dict[str, Any]]:
    """Everything `stereo_step` needs, computed once; the search is part of it.

    Arguments and errors as of `esd.prepare`.
    """
    rows = (config.search_rounds + 2) * config.prompts
    what = f" with search_rounds {config.search_rounds}"
    static, state, frozen = assembled(pipeline, config, rows=rows, what=what)
    prompts, _ = erasing_prompts(pipeline, concepts, config, retain, seed)
    texts = {
        "anchor_states": prompt_conditions(pipeline, prompts.without),  # [C, T, L, D]
        "no_text": empty_condition(pipeline),  # [L, D]
        **latent_sources(pipeline, config),
    }
    frozen |= jax.tree.map(jnp.asarray, texts)
    found = search(pipeline, prompts, static, state, frozen, seed)
    return static, state, frozen | {"found_states": found}  # [C, T, K + 1, L, D]


def search(
    pipeline: StableDiffusionPipeline,
    prompts: TemplatedConcepts,
    static: ErasingStatic,
    state: TrainState,
    frozen: Frozen,
    seed: int,
) -> Any:
    """The first stage: what the UNet reads of the concepts' prompts, and of those of words found.

    Args:
      pipeline, prompts: the model, and the concepts' prompts.
      static, state, frozen: of the run.
      seed: of all that is random.

    Returns:
      leaves [C, T, K + 1, ...].
    """
    config = static.config
    images = drawn_images(pipeline, prompts.tokens, config, seed)  # [C, T, h, w, c]
    optimizer = cosine_adamw(config.learning_rate, config.weight_decay, config.search_cycles)
    erasing = dataclasses.replace(
        static,
        optimizer=optimizer,
        config=dataclasses.replace(config, eta=config.search_eta),
    )
    erase = jax.jit(lambda state, known, key: esd.esd_step(erasing, state, known, None, key))
    found, params = [prompt_conditions(pipeline, prompts.tokens)], state.params
    for number in range(config.search_rounds):
        current, key = init_state(params, optimizer), seed_key(seed + 1 + number)
        known = {**frozen, "states": found[-1]}
        for n in range(config.search_cycles):
            current, _ = erase(current, known, jax.random.fold_in(key, n))
        params = current.params
        unet = static.edited(params, frozen)
        each = [
            inverted(pipeline, unet, own, images[c], config, seed + number)
            for c, own in enumerate(_of_each(prompts))
        ]
        found.append(jax.tree.map(lambda *parts: jnp.stack(parts), *each))
    return jax.tree.map(lambda *parts: jnp.stack(parts, axis=2), *found)


def _of_each(prompts: TemplatedConcepts) -> list[TemplatedConcepts]:
    """The prompts of each concept alone, [T, L]."""
    arrays = zip(*prompts[:4], strict=True)
    return [TemplatedConcepts(*each, prompts.templates) for each in arrays]


def with_words(
    embeddings: Float[Array, "T L C"], places: Int[Array, "T L"], words: Float[Array, "W C"]
) -> Float[Array, "T L C"]:
    """Prompts with learnt embeddings in the concept's place, the n-th in its n-th token's."""
    number = jnp.cumsum(places, axis=1) - 1
    return jnp.where(places[..., None] > 0, words[number], embeddings)


def inverted(
    pipeline: StableDiffusionPipeline,
    unet: nnx.Module,
    prompts: TemplatedConcepts,
    images: Float[Array, "T h w c"],
    config: StereoConfig,
    seed: int,
) -> Any:
    """What the UNet reads of prompts with words that bring images back, leaves [T, ...].

    Args:
      pipeline: the original, whose text encoder reads the words.
      unet: the erased one.
      prompts: of one concept, [T, L].
      images: latents of it, one for each prompt.
      config: of the run.
      seed: of the start, prompts, times and noise.
    """
    text, text_params = nnx.split(pipeline.prompt_encoder)
    graphdef, params = nnx.split(unet)
    encoder = pipeline.prompt_encoder
    tokens, places = jnp.asarray(prompts.tokens), jnp.asarray(prompts.concept, jnp.int32)
    start_key, steps_key = jax.random.split(seed_key(seed))
    count = int(prompts.concept.sum(axis=1).max())
    ordinary = jax.random.randint(start_key, (1, count), 0, encoder.config.vocab_size)
    start = encoder.embed_tokens(ordinary).astype(jnp.float32)[0]  # [W, C]
    unit, ends = embedding_scale(encoder), pooling_positions(encoder.config, tokens)
    schedule, _ = schedule_and_shape(pipeline)

    @jax.jit
    def invert(text_params: Any, params: Any, images: Array, start: Array) -> Any:
        encode, denoise = nnx.merge(text, text_params), nnx.merge(graphdef, params)
        plain = encode.embed_tokens(tokens).astype(jnp.float32)

        def objective(words: Array, key: Array) -> Array:
            row_key, noise_key = jax.random.split(key)
            rows = jax.random.choice(row_key, len(tokens), (config.prompts,))
            embeddings = with_words(plain[rows], places[rows], words)
            states = encode(inputs_embeds=embeddings, eos_positions=ends[rows]).condition
            noisy, times, noise = noised_latents(
                schedule, images[rows], noise_key, 0, schedule.num_train_timesteps
            )
            return prediction_loss(denoise(noisy, times, states), noise)

        optimizer = optax.adam(config.inversion_rate)
        keys = jax.random.split(steps_key, config.inversion_steps)
        words, _ = descended(objective, start, keys, optimizer, unit)
        return encode(inputs_embeds=with_words(plain, places, words), eos_positions=ends).condition

    return invert(text_params, params, images, start)
