"""Concepts as token arrays: prompts around a concept, and a vocabulary of everything else.

Texts are `[N, L]` int32 token ids, padded to the tokenizer's context length.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from ..errors import ConceptaxError
from ..flax_models.stable_diffusion import expanded
from ..text import TextError, read_text

# Neutral phrases around a concept; "{}" is the concept's place.
TEMPLATES = (
    "{}", "a {}", "the {}", "a photo of {}", "a photo of a {}", "a photo of the {}",
    "a picture of {}", "a picture of a {}", "this is a {}", "a painted {}", "a {} on a background",
    "a photo with a {} on it",
)  # fmt: skip
# The same with words of the vocabulary in them: "{w}" stands for one each.
_CONTEXTS = (
    "a {w} {}", "{} on {w}", "a {} and a {w}", "{w} with a {}", "a {w} {} on {w}",
    "a photo of a {w} {}", "{w}, a {} in {w}", "the {} is {w}",
)  # fmt: skip


class ConceptError(ConceptaxError, ValueError):
    """A concept, template or phrase that cannot be used as text for this model."""


class ConceptPrompts(NamedTuple):
    """One concept in T templates.

    Attributes:
      tokens: [T, L] prompts.
      free: [T, L] true at the template's own tokens, false at the concept, specials and padding.
      concept: [T, L] true at the concept's tokens.
      without: [T, L] the templates with the anchor in the concept's place.
      phrase: [L] the bare concept.
    """

    tokens: Int[np.ndarray, "T L"]
    free: Bool[np.ndarray, "T L"]
    concept: Bool[np.ndarray, "T L"]
    without: Int[np.ndarray, "T L"]
    phrase: Int[np.ndarray, " L"]


def context_templates(words: Sequence[str], count: int, seed: int) -> tuple[str, ...]:
    """`count` templates that put random `words` around a concept, so that it is met in company."""
    rng = np.random.default_rng(seed)
    templates = []
    for _ in range(count):
        pattern = _CONTEXTS[rng.integers(len(_CONTEXTS))]
        while "{w}" in pattern:
            pattern = pattern.replace("{w}", words[int(rng.integers(len(words)))], 1)
        templates.append(pattern)
    return tuple(templates)


def context_length(tokenizer: Any, max_positions: int) -> int:
    """Tokens in a prompt: the tokenizer's limit, bounded by the text encoder's positions."""
    return min(int(tokenizer.model_max_length), max_positions)


def phrase_ids(tokenizer: Any, phrases: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """Token ids of phrases, unpadded and uncut; a word of several vectors stands for all of them.

    Args:
      tokenizer: of the model.
      phrases: texts, as people write them.
      special: with the tokens of start and end.
    """
    phrases = expanded(tokenizer, phrases)
    return tokenizer(phrases, truncation=False, add_special_tokens=special)["input_ids"]


def encode_phrases(
    tokenizer: Any, phrases: Sequence[str], length: int
) -> Int[np.ndarray, "N L"]:  # fmt: skip
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
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return np.asarray([[*row, *[pad] * (length - len(row))] for row in ids], np.int32)


def concept_prompts(
    tokenizer: Any,
    concept: str,
    length: int,
    templates: Sequence[str] = TEMPLATES,
    anchor: str = "",
) -> ConceptPrompts:
    """Put a concept, and the anchor, into templates and mark which tokens are whose.

    Raises:
      ConceptError: an empty concept, one that is too long for the context, or templates without
        exactly one "{}". Templates that do not fit around a long concept are left out.
    """
    concept = " ".join(concept.split())
    if not concept:
        raise ConceptError("the concept is empty: name what to erase, for example 'three'.")
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        raise ConceptError(
            f"templates need exactly one '{{}}' each; received {wrong or templates}."
        )
    phrase = encode_phrases(tokenizer, [concept], length)[0]
    (inner,) = phrase_ids(tokenizer, [concept], special=False)
    if not inner:
        raise ConceptError(f"the tokenizer knows no token of the concept {concept!r}.")
    rows, free, places, without = [], [], [], []
    for template in templates:
        (ids,) = phrase_ids(tokenizer, [template.format(concept)])
        start = _find(ids, inner)
        if len(ids) > length or start is None:
            continue
        place = np.zeros(length, bool)
        place[start : start + len(inner)] = True
        words = np.zeros(length, bool)
        words[1 : len(ids) - 1] = True  # between the start and the end token
        rows.append(encode_phrases(tokenizer, [template.format(concept)], length)[0])
        places.append(place)
        without.append(
            encode_phrases(tokenizer, [" ".join(template.format(anchor).split())], length)[0]
        )
        free.append(words & ~place)
    if not rows:
        raise ConceptError(
            f"no template fits around {concept!r} in a context of {length} tokens; shorten it."
        )
    return ConceptPrompts(
        np.stack(rows), np.stack(free), np.stack(places), np.stack(without), phrase
    )


def _find(ids: Sequence[int], part: Sequence[int]) -> int | None:
    for start in range(len(ids) - len(part) + 1):
        if list(ids[start : start + len(part)]) == list(part):
            return start
    return None


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
        lines = read_text(path).splitlines()
    except OSError as error:
        raise ConceptError(f"cannot read the phrases in {path}: {error.strerror}.") from error
    except TextError as error:
        raise ConceptError(str(error)) from error
    phrases = [line.strip() for line in lines]
    phrases = [phrase for phrase in phrases if phrase and not phrase.startswith("#")]
    if not phrases:
        raise ConceptError(f"{path} holds no phrases; write one a line.")
    return phrases
