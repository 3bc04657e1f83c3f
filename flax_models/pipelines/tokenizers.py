"""Tokenizers: prompts to token ids, and words of CLIP's that stand for several vectors."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from ...errors import ConceptaxError


class TokenError(ConceptaxError, ValueError):
    """A token that cannot be added to a tokenizer."""


def context_length(tokenizer: Any, max_positions: int) -> int:
    """Tokens in a prompt: the tokenizer's limit, bounded by the text encoder's positions."""
    return min(int(tokenizer.model_max_length), max_positions)


def tokenize(
    tokenizer: Any, prompts: Sequence[str], *, max_length: int | None = None
) -> Int[np.ndarray, "B L"]:
    """Token ids int32 [B, L], padded to the context length as diffusers pads them.

    A word of several vectors stands for all of them (`expanded`). `max_length` bounds the
    tokenizer's own limit (which some folders do not state). A longer prompt is cut with a warning
    that names the part which is lost.
    """
    length = min(tokenizer.model_max_length, max_length or tokenizer.model_max_length)
    prompts = expanded(tokenizer, prompts)
    ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True).input_ids
    for prompt, full in zip(prompts, tokenizer(prompts, truncation=False).input_ids, strict=True):
        if len(full) > length:
            lost = tokenizer.decode(full[length - 1 : -1])
            warnings.warn(
                f"The prompt {prompt!r} is {len(full)} tokens long and the text encoder reads "
                f"{length}; ignored: {lost!r}.",
                stacklevel=2,
            )
    return np.asarray(ids, np.int32)


def masked_tokenize(
    tokenizer: Any,
    prompts: Sequence[str],
    length: int,
    *,
    texts: Sequence[str] | None = None,
    **options: Any,
) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B L"]]:
    """Token ids int32 [B, L], padded to L = `length`, and 1 where they are no padding.

    `texts` are the prompts in their templates, where they have such, and `options` the tokenizer's.
    What is longer is cut, with a warning that names the part which is lost.
    """
    behind = "" if texts is None else " with its template"
    texts = list(prompts if texts is None else texts)
    found = tokenizer(texts, padding="max_length", truncation=True, max_length=length, **options)
    ids, mask = (np.asarray(found[name], np.int32) for name in ("input_ids", "attention_mask"))
    for prompt, kept, whole in zip(prompts, ids, tokenizer(texts)["input_ids"], strict=True):
        if len(whole) > length:
            same = next((n for n in range(length) if kept[n] != whole[n]), length)
            lost = tokenizer.decode(whole[same : same - length or None])  # not an end that is kept
            warnings.warn(
                f"The prompt {prompt!r} is {len(whole)} tokens long{behind} and the text encoder "
                f"reads {length}; ignored: {lost!r}.",
                stacklevel=3,
            )
    return ids, mask


def expanded(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Prompts with every word of several vectors spelt out, as diffusers reads them.

    Of a textual inversion of n vectors the tokenizer has `<t>`, `<t>_1`, ..., and a prompt names
    the first one alone. Every occurrence of its text is replaced, so this is done once and last.
    """
    spelt = {token: " ".join(names) for token, names in vectors(tokenizer).items()}
    prompts = list(prompts)
    for number, prompt in enumerate(prompts if spelt else ()):
        for token in dict.fromkeys(tokenizer.tokenize(prompt)):
            prompts[number] = prompts[number].replace(token, spelt.get(token) or token)
    return prompts


def vectors(tokenizer: Any) -> dict[str, list[str]]:
    """Added tokens of several vectors -> the names of all of them."""
    added = getattr(tokenizer, "added_tokens_encoder", {})
    found = {}
    for token in added:
        names = [token]
        while f"{token}_{len(names)}" in added:
            names.append(f"{token}_{len(names)}")
        if len(names) > 1:
            found[token] = names
    return found


def token_ids(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """The ids of added tokens.

    Raises:
      TokenError: the tokenizer does not read one of them as a single token.
    """
    ids = []
    for token in tokens:
        index = tokenizer.convert_tokens_to_ids(token)
        read = tokenizer(f"a {token} a", add_special_tokens=False)["input_ids"]
        if len(read) != 3 or read[1] != index:
            raise TokenError(
                f"the tokenizer does not read {token!r} as one token: choose a name in angle "
                "brackets and lower case, such as '<new1>'."
            )
        ids.append(index)
    return ids
