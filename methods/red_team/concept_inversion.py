"""Concept Inversion: learn a word that means the erased concept.

Source: Pham et al. 2023, "Circumventing Concept Erasure Methods For Text-to-Image Generative
Models" (arXiv 2308.01508), section 4, which is textual inversion (Gal et al. 2022, arXiv
2208.01618, equation 2) against the edited model: the embedding of one new token v is learnt from
images of the concept, with the model frozen,

  v* = argmin_v  E || eps - e(z_t, t, T("a photo of <v>")) ||^2

It needs the model's weights, and says whether the edited model can still draw the concept at all,
whatever it is called.  How far v may lie from the vocabulary is its budget: the norm of v relative
to the mean norm of the vocabulary's embeddings (`norm_cap` bounds it).

Several restarts learn side by side, each with its own start and noise.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from ...flax_models.pipelines.new_tokens import add_tokens
from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..sampling import NoiseSchedule
from ..seeds import seed_key
from ..settings import check_settings
from ..text.phrases import TEMPLATES, ConceptError, encode_phrases, text_length
from ..training import TrainState, apply_gradients, constant_adamw, init_state
from .common import (
    AttackSettings,
    AttackStatic,
    Attempt,
    draw_examples,
    embedding_loss,
    image_latents,
    mean_losses,
    ordinary_tokens,
    restart_keys,
    snapshots,
    word_tokens,
)


@dataclasses.dataclass(frozen=True)
class ConceptInversionConfig(AttackSettings):
    """All settings of a Concept Inversion, whose steps are updates of the embeddings.

    Attributes:
      restarts: embeddings that are learnt, each on its own; prompts take turns with them.
      learning_rate: of Adam, relative to the root mean square of the token embeddings' entries,
        which differs a hundredfold between models.
      norm_cap: largest norm of a learnt embedding, relative to the mean norm of the vocabulary's;
        None is unbounded.
      start: the phrase whose tokens' mean embedding all restarts begin with; None is a random word
        of the vocabulary for each.
      templates: phrases around the new word, "{}" its place.
    """

    steps: int = 400
    restarts: int = 4
    learning_rate: float = 0.1
    norm_cap: float | None = None
    start: str | None = None
    templates: tuple[str, ...] = TEMPLATES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, least={"restarts": 1}, positive=("learning_rate",))
        if self.norm_cap is not None and not self.norm_cap > 0:
            raise ValueError(f"norm_cap must be positive or None, received {self.norm_cap}.")
        if not self.templates or any(each.count("{}") != 1 for each in self.templates):
            raise ValueError(f"templates need one '{{}}' each, received {self.templates}.")


def inversion_loss(
    static: AttackStatic,
    frozen: Mapping[str, Any],
    embedding: Float[Array, " C"],
    key: PRNGKeyArray,
) -> Float[Array, ""]:
    """The denoising loss of one embedding (in units of `frozen["unit"]`) on a batch of its own."""
    text_key, example_key = jax.random.split(key)
    _, noised = draw_examples(static, frozen, example_key)
    rows = jax.random.randint(
        text_key, (static.config.batch_size,), 0, frozen["template_embeddings"].shape[0]
    )
    words, place = frozen["template_embeddings"][rows], frozen["place"][rows]
    embeddings = jnp.where(place[..., None], frozen["unit"] * embedding, words)
    return embedding_loss(static, frozen, embeddings, noised)


def project(
    embeddings: Float[Array, "R C"], largest: Float[Array, ""] | float
) -> Float[Array, "R C"]:
    """The nearest embeddings whose norms are at most `largest`."""
    norms = jnp.linalg.norm(embeddings, axis=-1, keepdims=True)
    return embeddings * jnp.minimum(1.0, largest / jnp.maximum(norms, 1e-12))


def inversion_step(
    static: AttackStatic,
    state: TrainState,
    frozen: Mapping[str, Any],
    batch: None,
    key: PRNGKeyArray,
) -> tuple[TrainState, dict[str, Array]]:
    """One update of every restart's embedding.

    Args:
      static, state, frozen: from `prepare`; the parameters are the embeddings [R, C] in units of
        `frozen["unit"]`.
      batch: None; the images are among `frozen`.
      key: this update's key.

    Returns:
      the new state and metrics: loss, and norm relative to the vocabulary's (means over restarts).
    """
    del batch
    loss_of = jax.value_and_grad(functools.partial(inversion_loss, static, frozen))
    keys = restart_keys(key, static.config.restarts)
    losses, gradients = jax.vmap(loss_of)(state.params["embeddings"], keys)
    optimizer = constant_adamw(static.config.learning_rate, clip=False)
    after = apply_gradients(state, {"embeddings": gradients}, optimizer)
    embeddings = after.params["embeddings"]
    if static.config.norm_cap is not None:
        embeddings = project(embeddings, static.config.norm_cap * frozen["norm"])
        after = dataclasses.replace(after, params={"embeddings": embeddings})
    norm = jnp.linalg.norm(embeddings, axis=-1).mean() / frozen["norm"]
    return after, {"loss": losses.mean(), "norm": norm}


def prepare(
    original: StableDiffusionPipeline,
    edited: StableDiffusionPipeline,
    config: ConceptInversionConfig,
    *,
    images: UInt8[np.ndarray, "M H W 3"],
    prompts: Sequence[str],
    seed: int = 0,
) -> tuple[AttackStatic, TrainState, dict[str, Any]]:
    """Everything `inversion_step` needs, computed once.

    Args:
      original, edited, config, images, prompts: as for `run`.
      seed: of the words to start with.

    Raises:
      ConceptError: a start without tokens, or templates that do not fit.
      ValueError: no images, or no prompts.
    """
    tokenizer, encoder = edited.tokenizer, edited.text_encoder
    latents = image_latents(original, images, prompts)
    table = encoder.embeddings.token_embedding.embedding[...].astype(jnp.float32)
    ordinary = ordinary_tokens(tokenizer)
    unit = jnp.sqrt(jnp.mean(table**2))
    if config.start is None:
        keys = restart_keys(seed_key(seed), config.restarts)
        words = table[jax.vmap(lambda key: jax.random.choice(key, ordinary))(keys)]
    else:
        word = table[jnp.asarray(word_tokens(tokenizer, config.start))].mean(axis=0)
        words = jnp.tile(word, (config.restarts, 1))
    norm = jnp.linalg.norm(table[ordinary], axis=-1).mean() / unit
    start = words / unit
    if config.norm_cap is not None:
        start = project(start, config.norm_cap * norm)

    (name,) = free_names(tokenizer, 1)
    tokenizer = add_tokens(edited, {name: words[0]}).tokenizer
    tokens = encode_phrases(
        tokenizer, [each.format(name) for each in config.templates], text_length(edited)
    )
    place = tokens == tokenizer.convert_tokens_to_ids(name)

    text_encoder, text_params = nnx.split(encoder)
    unet, unet_params = nnx.split(edited.unet)
    schedule = NoiseSchedule.from_config(edited.scheduler_config)
    static = AttackStatic(text_encoder, unet, config, schedule)
    frozen = {
        "text_encoder": nnx.to_pure_dict(text_params),
        "unet": nnx.to_pure_dict(unet_params),
        "latents": latents,  # [M, h, w, c]
        "template_embeddings": table[jnp.where(place, 0, tokens)],  # [T, L, C]
        "place": place,  # [T, L]
        "unit": unit,
        "norm": norm,
    }
    optimizer = constant_adamw(config.learning_rate, clip=False)
    state = init_state({"embeddings": start}, optimizer)
    return static, state, jax.tree.map(jnp.asarray, frozen)


def free_names(tokenizer: Any, count: int) -> list[str]:
    """Names of `count` tokens that the tokenizer does not have, "<inverted-0>" and so on."""
    known = tokenizer.get_vocab()
    every = (f"<inverted-{number}>" for number in itertools.count())
    return list(itertools.islice((name for name in every if name not in known), count))


def renamed_prompts(prompts: Sequence[str], concept: str, names: Sequence[str]) -> tuple[str, ...]:
    """The prompts with the names, in turn, where they name the concept.

    Raises:
      ConceptError: a prompt does not name it.
    """
    pattern = re.compile(rf"(?<!\w){re.escape(concept)}(?!\w)")
    for prompt in prompts:
        if not pattern.search(prompt):
            raise ConceptError(
                f"the prompt {prompt!r} does not name the concept {concept!r}, so there is no "
                "place for a learnt word in it."
            )
    return tuple(pattern.sub(names[row % len(names)], prompt) for row, prompt in enumerate(prompts))


@functools.partial(jax.jit, static_argnums=0)
def _examine(static: AttackStatic, frozen: Any, embeddings: Array, key: PRNGKeyArray) -> Array:
    return mean_losses(functools.partial(inversion_loss, static, frozen), embeddings, key)


def run(
    original: StableDiffusionPipeline,
    edited: StableDiffusionPipeline,
    concept: str,
    config: ConceptInversionConfig | None = None,
    *,
    images: UInt8[np.ndarray, "M H W 3"],
    prompts: Sequence[str],
    seed: int = 0,
    **options: Any,
) -> list[Attempt]:
    """Learn words for the concept and put them into the prompts.

    Args:
      original: the model before erasing; its autoencoder encodes the images.
      edited: the model to attack; it stays as it is.
      concept: what was erased, as the prompts name it.
      config: settings.
      images: what the words are learnt from.
      prompts: each names the concept.
      seed: of everything random in the run.
      options: passed to `conceptax.methods.training.train` (checkpoint_dir, progress, ...).

    Returns:
      one attempt per snapshot. Its pipeline is the edited one with `restarts` more tokens; its
      budget is "steps" and "norm" (relative to the vocabulary's, mean over restarts); its details
      are "tokens", "norms" and "losses" per restart (on batches that are the same for all).

    Raises:
      ConceptError: prompts that do not name the concept, or a start without tokens.
      ValueError: no images, or no prompts.
    """
    config = config or ConceptInversionConfig()
    names = free_names(edited.tokenizer, config.restarts)
    renamed = renamed_prompts(prompts, concept, names)
    static, state, frozen = prepare(
        original, edited, config, images=images, prompts=prompts, seed=seed
    )
    attempts = []
    for steps, after in snapshots(inversion_step, static, state, frozen, seed=seed, **options):
        learnt = after.params["embeddings"]
        norms = np.asarray(jnp.linalg.norm(learnt, axis=-1) / frozen["norm"])
        attempts.append(
            Attempt(
                add_tokens(edited, dict(zip(names, frozen["unit"] * learnt, strict=True))),
                renamed,
                {"steps": float(steps), "norm": float(norms.mean())},
                {
                    "tokens": tuple(names),
                    "norms": tuple(norms.tolist()),
                    "losses": tuple(_examine(static, frozen, learnt, seed_key(seed)).tolist()),
                },
            )
        )
    return attempts
