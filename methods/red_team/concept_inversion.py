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
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ...flax_models.pipelines.new_tokens import add_tokens
from ..seeds import seed_key
from ..settings import check_settings
from ..text.phrases import TEMPLATES, ConceptError, encode_phrases
from ..training import TrainState, apply_gradients, constant_adamw, init_state
from .common import (
    AttackSettings,
    AttackStatic,
    Attempt,
    Frozen,
    Target,
    assembled,
    draw_examples,
    embedding_loss,
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
    static: AttackStatic, frozen: Frozen, embedding: Float[Array, " C"], key: PRNGKeyArray
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
    static: AttackStatic, state: TrainState, frozen: Frozen, batch: None, key: PRNGKeyArray
) -> tuple[TrainState, dict[str, Array]]:
    """One update of every restart's embedding.

    The parameters are the embeddings [R, C] in units of `frozen["unit"]`; the metrics are the loss,
    and the norm relative to the vocabulary's (means over restarts).
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
    target: Target, config: ConceptInversionConfig, *, seed: int = 0
) -> tuple[AttackStatic, TrainState, dict[str, Any]]:
    """Everything `inversion_step` needs, computed once.

    The seed is of the words to start with.

    Raises:
      ConceptError: a start without tokens, or templates that do not fit.
    """
    edited, tokenizer = target.edited, target.edited.tokenizer
    static, _, frozen = assembled(target, config)
    table = edited.text_encoder.embeddings.token_embedding.embedding[...].astype(jnp.float32)
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
    texts = [each.format(name) for each in config.templates]
    tokens = encode_phrases(tokenizer, texts, edited.max_length)
    place = tokens == tokenizer.convert_tokens_to_ids(name)

    frozen |= {
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
    target: Target, config: ConceptInversionConfig, *, seed: int = 0, **options: Any
) -> Iterator[Attempt]:
    """Learn words for the concept and put them into the prompts, each of which names it.

    Yields:
      one attempt per snapshot. Its pipeline is the edited one with `restarts` more tokens; its
      budget is "steps" and "norm" (relative to the vocabulary's, mean over restarts); its details
      are "tokens", "norms" and "losses" per restart (on batches that are the same for all).

    Raises:
      ConceptError: prompts that do not name the concept, or a start without tokens.
    """
    names = free_names(target.edited.tokenizer, config.restarts)
    renamed = renamed_prompts(target.prompts, target.concept, names)
    static, state, frozen = prepare(target, config, seed=seed)
    for steps, after in snapshots(inversion_step, static, state, frozen, seed=seed, **options):
        learnt = after.params["embeddings"]
        norms = np.asarray(jnp.linalg.norm(learnt, axis=-1) / frozen["norm"])
        model = add_tokens(target.edited, dict(zip(names, frozen["unit"] * learnt, strict=True)))
        losses = _examine(static, frozen, learnt, seed_key(seed))
        numbers = {"norms": tuple(norms.tolist()), "losses": tuple(losses.tolist())}
        budget = {"steps": float(steps), "norm": float(norms.mean())}
        yield Attempt(model, renamed, budget, {"tokens": tuple(names), **numbers})
