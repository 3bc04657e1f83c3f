"""Phrases: their tokens, their states in a text encoder, and which of them are retained.

Texts are `[N, L]` int32 token ids, padded to the tokenizer's context length.

A method that edits a model is told concepts to erase and phrases to retain. A phrase that the
original text encoder takes for a concept (cosine of the pooled states above a cap, kappa) belongs
to what is erased; it is set aside, and named in `Retained.near`, so that nobody believes it kept.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from ...errors import ConceptaxError
from ...flax_models.clip import pooling_positions
from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ...flax_models.pipelines.tokenizers import expanded
from ...text import TextError, read_text
from ..settings import check_settings
from ..vectors import unit

# Neutral phrases around a concept; "{}" is the concept's place.
TEMPLATES = (
    "{}",
    "a {}",
    "the {}",
    "a photo of {}",
    "a photo of a {}",
    "a photo of the {}",
    "a picture of {}",
    "a picture of a {}",
    "this is a {}",
    "a painted {}",
    "a {} on a background",
    "a photo with a {} on it",
)
# The same with words of the vocabulary in them: "{w}" stands for one each.
_CONTEXTS = (
    "a {w} {}",
    "{} on {w}",
    "a {} and a {w}",
    "{w} with a {}",
    "a {w} {} on {w}",
    "a photo of a {w} {}",
    "{w}, a {} in {w}",
    "the {} is {w}",
)

# Which of SDXL's text encoders a method edits; other models have one, which "both" means too.
Encoders = Literal["text_encoder", "text_encoder_2", "both"]

_CHUNK = 256  # rows at a time, so that one compiled program serves any number


# ---- tokens ----


class ConceptError(ConceptaxError, ValueError):
    """A concept, template or phrase that cannot be used as text for this model."""


class TemplatedConcepts(NamedTuple):
    """One concept in T templates, or C concepts in as many each.

    Attributes:
      tokens: [*C, T, L] prompts.
      without: [*C, T, L] the same with the anchor in the concept's place.
      free: [*C, T, L] true at the template's own tokens, not at concept, specials and padding.
      concept: [*C, T, L] true at the concept's tokens.
      templates: all of them; those that do not fit around a concept are left out of the arrays.
    """

    tokens: Int[np.ndarray, "*C T L"]
    without: Int[np.ndarray, "*C T L"]
    free: Bool[np.ndarray, "*C T L"]
    concept: Bool[np.ndarray, "*C T L"]
    templates: tuple[str, ...]


def phrase_ids(tokenizer: Any, phrases: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """Token ids of phrases, unpadded and uncut; a word of several vectors stands for all of them.

    `special` is with the tokens of start and end.
    """
    phrases = expanded(tokenizer, phrases)
    return tokenizer(phrases, truncation=False, add_special_tokens=special)["input_ids"]


def encode_phrases(tokenizer: Any, phrases: Sequence[str], length: int) -> Int[np.ndarray, "N L"]:
    """Token ids of phrases, padded to `length`.

    Raises:
      ConceptError: a phrase has more than `length` tokens, start and end included.
    """
    if not phrases:
        return np.zeros((0, length), np.int32)
    ids = phrase_ids(tokenizer, phrases)
    for phrase, row in zip(phrases, ids, strict=True):
        if len(row) > length:
            raise ConceptError(
                f"the phrase {phrase!r} takes {len(row)} tokens with start and end; this text "
                f"encoder reads {length}. Shorten it."
            )
    pad = padding(tokenizer)
    return np.asarray([[*row, *[pad] * (length - len(row))] for row in ids], np.int32)


def padding(tokenizer: Any) -> int:
    """The token that prompts are padded with."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def concept_tokens(
    tokenizer: Any, concept: str, length: int
) -> tuple[str, Int[np.ndarray, " L"], list[int]]:
    """A concept with single spaces, its token ids as a prompt, and those without start and end.

    Raises:
      ConceptError: an empty concept, or one that is too long for the context.
    """
    concept = " ".join(concept.split())
    if not concept:
        raise ConceptError("the concept is empty: name what to erase, for example 'three'.")
    phrase = encode_phrases(tokenizer, [concept], length)[0]
    (inner,) = phrase_ids(tokenizer, [concept], special=False)
    if not inner:
        raise ConceptError(f"the tokenizer knows no token of the concept {concept!r}.")
    return concept, phrase, inner


def concept_prompts(
    tokenizer: Any,
    concept: str,
    length: int,
    templates: Sequence[str] = TEMPLATES,
    anchor: str = "",
) -> TemplatedConcepts:
    """Put a concept, and the anchor, into templates and mark which tokens are whose.

    Raises:
      ConceptError: an empty concept, one that is too long for the context, or templates without
        exactly one "{}". Templates that do not fit around a long concept are left out.
    """
    concept, _, inner = concept_tokens(tokenizer, concept, length)
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        raise ConceptError(
            f"templates need exactly one '{{}}' each; received {wrong or templates}."
        )
    prompts, anchors, positions = [], [], np.arange(length)
    free, places = [], []
    for template in templates:
        (ids,) = phrase_ids(tokenizer, [template.format(concept)])
        starts = range(len(ids) - len(inner) + 1)
        start = next((n for n in starts if ids[n : n + len(inner)] == inner), None)
        if len(ids) > length or start is None:
            continue
        place = (start <= positions) & (positions < start + len(inner))
        words = (positions > 0) & (positions < len(ids) - 1)  # between the start and the end token
        prompts.append(template.format(concept))
        anchors.append(" ".join(template.format(anchor).split()))
        places.append(place)
        free.append(words & ~place)
    if not prompts:
        raise ConceptError(
            f"no template fits around {concept!r} in a context of {length} tokens; shorten it."
        )
    tokens, without = (encode_phrases(tokenizer, texts, length) for texts in (prompts, anchors))
    return TemplatedConcepts(tokens, without, np.stack(free), np.stack(places), tuple(templates))


def vocabulary_words(tokenizer: Any, limit: int) -> list[str]:
    """Whole words of the tokenizer's own vocabulary, at most `limit`, in order of token id.

    In a byte-pair vocabulary that order is roughly the order of frequency, so a limit keeps the
    commonest words. Fragments, single letters and specials are left out; numerals are kept.
    """
    words = []
    for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        word = token.removesuffix("</w>")
        if token.endswith("</w>") and re.fullmatch(r"[a-z]{2,}|[0-9]+", word):
            words.append(word)
    return words[:limit]


def read_phrases(path: str | Path) -> list[str]:
    """Phrases from a text file, one a line; blank lines and lines starting with '#' are skipped.

    Raises:
      ConceptError: the file cannot be read or holds no phrase.
    """
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except OSError as error:
        raise ConceptError(f"cannot read the phrases in {path}: {error.strerror}.") from error
    except TextError as error:
        raise ConceptError(str(error)) from error
    phrases = [line for line in lines if line and not line.startswith("#")]
    if not phrases:
        raise ConceptError(f"{path} holds no phrases; write one a line.")
    return phrases


# ---- states, and what is retained ----


class Near(NamedTuple):
    """A phrase that was to be retained and means a concept: their cosine is above the cap."""

    phrase: str
    concept: str
    similarity: float


class Retained(NamedTuple):
    """What `retained_phrases` finds.

    Attributes:
      kept: phrases to retain.
      near: those that were set aside, nearest first.
      own: whether they are the tokenizer's own words, since none were named.
    """

    kept: tuple[str, ...]
    near: tuple[Near, ...] = ()
    own: bool = False


@dataclasses.dataclass(frozen=True)
class PhraseSettings:
    """The settings of a method that say which phrases it works with.

    Attributes:
      anchor: what the concept is turned into; the empty phrase means "nothing in particular". It
        takes the concept's place in each prompt, so that the other words keep their effect.
      templates: phrases around the concept, "{}" its place.
      contexts: how many templates are added with retained words in them ("a {word} {}").
      vocabulary: how many of the tokenizer's whole words are retained, or put around the concept.
      similarity_cap: retained phrases more similar to a concept than this (cosine of the original
        text encoder's pooled states, kappa) are taken for the concept and dropped.
    """

    anchor: str = ""
    templates: tuple[str, ...] = TEMPLATES
    contexts: int = 96
    vocabulary: int = 2000
    similarity_cap: float = 0.95

    def __post_init__(self) -> None:
        check_settings(self, least={"contexts": 0, "vocabulary": 1})
        if not -1 <= self.similarity_cap <= 1:
            raise ValueError(f"similarity_cap is a cosine, received {self.similarity_cap}.")


@functools.partial(jax.jit, static_argnums=0)
def _encode(text: Any, params: Any, rows: Array) -> Any:
    output = nnx.merge(text, params)(rows)
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), output)


def _encoded_chunks(encoder: Any, rows: np.ndarray):
    text, params = nnx.split(encoder)
    params = nnx.to_pure_dict(params)
    padded = np.pad(rows, ((0, -len(rows) % _CHUNK), (0, 0)), mode="edge")
    for start in range(0, len(padded), _CHUNK):
        output = _encode(text, params, padded[start : start + _CHUNK])
        yield jax.tree.map(lambda leaf, start=start: leaf[: len(rows) - start], output)


def pooled_states(encoder: Any, rows: Int[np.ndarray, "N L"]) -> Float[Array, "N C"]:
    """The text encoder's pooled state of each row, float32.

    What follows the token that is pooled does not reach it, since attention is causal; rows are
    read as far as the longest needs, of 77 tokens a few.
    """
    every = jnp.asarray(rows.reshape(-1, rows.shape[-1]))  # SDXL has two rows for a phrase
    ends = [pooling_positions(tower.config, every).max() for tower in encoder.towers]
    rows = rows[..., : 1 + int(max(ends))]
    return jnp.concatenate([chunk.pooled for chunk in _encoded_chunks(encoder, rows)])


def hidden_states(encoder: Any, rows: Int[np.ndarray, "N L"]) -> Float[Array, "N L C"]:
    """What a UNet attends to for each row, float32."""
    return jnp.concatenate([chunk.last_hidden_state for chunk in _encoded_chunks(encoder, rows)])


def conditions(encoder: Any, rows: Int[np.ndarray, "N L"]) -> Any:
    """All that a UNet reads for each row, float32: hidden states, or SDXL's `TextCondition`."""
    chunks = [chunk.condition for chunk in _encoded_chunks(encoder, rows)]
    return concatenated(*chunks)


def concatenated(*trees: Any) -> Any:
    """One after the other along the first axis, leaf by leaf."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def empty_condition(pipeline: StableDiffusionPipeline) -> Any:
    """What guidance starts from, without the first dimension: an empty prompt, or SDXL's zeros."""
    rows = encode_phrases(pipeline.tokenizer, [""], pipeline.max_length)
    empty = jax.tree.map(lambda leaf: leaf[0], conditions(pipeline.prompt_encoder, rows))
    return pipeline.without_text(empty) if pipeline.force_zeros_for_empty_prompt else empty


def embedding_scale(encoder: Any) -> Float[Array, "..."]:
    """Root mean square of the token embeddings' entries; of two encoders [C], each its own."""
    scales = []
    for tower in encoder.towers:
        table = tower.embeddings.token_embedding.embedding[...].astype(jnp.float32)
        scales.append(jnp.full(table.shape[1:], jnp.sqrt(jnp.mean(table**2))))
    return scales[0][0] if len(scales) == 1 else jnp.concatenate(scales)


def edited_encoders(pipeline: StableDiffusionPipeline, edit: Encoders) -> tuple[str, ...]:
    """The text encoders that a method's setting `edit` means.

    Raises:
      ValueError: the second one of a model that has one.
    """
    parts = tuple(pipeline.TEXT_TOWERS)
    if edit != "both" and edit not in parts:
        raise ValueError(f"edit={edit!r} is for SDXL; this model has one text encoder.")
    return parts if edit == "both" else (edit,)


def encoder_patterns(
    pipeline: StableDiffusionPipeline, patterns: Sequence[str], edit: Encoders
) -> tuple[str, ...]:
    """Patterns of a text tower's parameters as those of the pipeline's `prompt_encoder`."""
    chosen = edited_encoders(pipeline, edit)
    return tuple(f"{pipeline.TEXT_TOWERS[name]}{each}" for name in chosen for each in patterns)


def concept_states(
    pipeline: StableDiffusionPipeline, concepts: Sequence[str]
) -> Float[Array, "C D"]:
    """Pooled states of the bare concepts.

    Raises:
      ConceptError: no concept, or an empty or overlong one.
    """
    if not concepts:
        raise ConceptError("no concept was given: name at least one, for example 'three'.")
    length = pipeline.max_length
    rows = [concept_tokens(pipeline.tokenizer, concept, length)[1] for concept in concepts]
    return pooled_states(pipeline.prompt_encoder, np.stack(rows))


def retained_phrases(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    settings: PhraseSettings,
    retain: Sequence[str] | Retained | None = None,
) -> Retained:
    """Which phrases are retained while `concepts` are erased.

    Args:
      pipeline: the model; its text encoder decides what is near.
      concepts: what is erased, one phrase each.
      settings: of the method; `vocabulary` and `similarity_cap` are read.
      retain: phrases to preserve; None takes whole words of the tokenizer's own vocabulary. A
        `Retained` is given back as it is, so that who needs it first computes it for all.

    Raises:
      ConceptError: no or unusable concepts, or nothing left to retain.
    """
    if isinstance(retain, Retained):
        return retain
    tokenizer, cap = pipeline.tokenizer, settings.similarity_cap
    pooled = concept_states(pipeline, concepts)
    own = retain is None
    phrases = vocabulary_words(tokenizer, settings.vocabulary) if own else list(retain)
    if not phrases:
        raise ConceptError("there is nothing to retain: pass phrases with `retain`.")
    rows = encode_phrases(tokenizer, phrases, pipeline.max_length)
    cosines = np.asarray(unit(pooled_states(pipeline.prompt_encoder, rows)) @ unit(pooled).T)
    kept, near = [], []
    for phrase, row in zip(phrases, cosines, strict=True):
        if row.max() <= cap and phrase not in concepts:
            kept.append(phrase)
        else:
            which = int(row.argmax())
            near.append(Near(phrase, concepts[which], round(float(row[which]), 4)))
    if not kept:
        raise ConceptError(
            f"all {len(phrases)} retained phrases are closer to {list(concepts)} than "
            f"similarity_cap={cap}: raise it, or retain other phrases."
        )
    near.sort(key=lambda each: -each.similarity)
    return Retained(tuple(kept), tuple(near), own)


def stacked_prompts(
    tokenizer: Any,
    concepts: Sequence[str],
    words: Sequence[str],
    settings: PhraseSettings,
    *,
    length: int,
    seed: int,
) -> TemplatedConcepts:
    """Every concept in the settings' templates, and in `contexts` more with `words` in them.

    Raises:
      ConceptError: no or unusable concepts, or an anchor that is a concept to the tokenizer.
    """
    rng, templates, anchor = np.random.default_rng(seed), [*settings.templates], settings.anchor
    for _ in range(settings.contexts):  # random words around it, so that it is met in company
        pattern = _CONTEXTS[rng.integers(len(_CONTEXTS))]
        while "{w}" in pattern:
            pattern = pattern.replace("{w}", words[int(rng.integers(len(words)))], 1)
        templates.append(pattern)
    each = [concept_prompts(tokenizer, name, length, templates, anchor) for name in concepts]
    for name, prompts in zip(concepts, each, strict=True):
        same = anchor.casefold().split() == name.casefold().split()
        if same or np.array_equal(prompts.tokens, prompts.without):
            raise ConceptError(
                f"the anchor {anchor!r} is the concept {name!r}: turning it into itself erases "
                "nothing. Choose another anchor."
            )
    least = min(len(prompts.tokens) for prompts in each)  # a long concept fits fewer templates
    arrays = zip(*(prompts[:4] for prompts in each), strict=True)
    tokens, without, free, concept = (np.stack([p[:least] for p in parts]) for parts in arrays)
    return TemplatedConcepts(tokens, without, free, concept, tuple(templates))


def with_prefix(rows: Shaped[Array, "P L *S"], prefix: Shaped[Array, "P K *S"]) -> Array:
    """Prompts with K more tokens after the start token; K of their padding fall off the end.

    Args:
      rows: P prompts, as token ids [P, L] or as embeddings [P, L, C].
      prefix: what is put in, of the same kind.
    """
    kept = rows[:, 1 : rows.shape[1] - prefix.shape[1]]
    return jnp.concatenate([rows[:, :1], prefix, kept], axis=1)
