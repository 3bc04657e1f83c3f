"""The glyphs world's CLIP tokenizer: byte-level BPE whose merges make each world word one token.

The layout is CLIP's own (Radford et al. 2021): 256 byte symbols, the same 256 closing a word
(`</w>`), one entry per merge, then `<|startoftext|>` and `<|endoftext|>`. The end of text
has the highest id, so pooling at the highest id and pooling at the first end of text agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from .captions import WORDS

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_LENGTH = 24
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte, in CLIP's vocabulary order."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [*map(chr, visible), *map(chr, range(256, 512 - len(visible)))]


def _segment(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair-encode one word of ASCII letters: always the earliest-learnt merge first."""
    parts = [*word[:-1], word[-1] + "</w>"]
    while len(parts) > 1:
        rank, at = min(
            (ranks.get(pair, len(ranks)), i) for i, pair in enumerate(itertools.pairwise(parts))
        )
        if rank == len(ranks):
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def build_merges(words: Sequence[str] = WORDS) -> list[tuple[str, str]]:
    """Merges under which every word is one token.

    Word by word, whatever pieces the merges so far leave are joined from the left. A merge ranks
    after those of all earlier words, so it cannot change how they are split.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        parts = _segment(word, ranks)
        while len(parts) > 1:
            ranks[parts[0], parts[1]] = len(ranks)
            parts[:2] = [parts[0] + parts[1]]
    return list(ranks)


def build_vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Token -> id, in CLIP's order."""
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    tokens += [first + second for first, second in merges]
    return {token: index for index, token in enumerate([*tokens, START, END])}


def build_tokenizer(words: Sequence[str] = WORDS, max_length: int = MAX_LENGTH) -> CLIPTokenizer:
    """A `transformers.CLIPTokenizer` of these words, padding with the end of text like CLIP."""
    from transformers import CLIPTokenizer

    merges = build_merges(words)
    return CLIPTokenizer(
        vocab=build_vocabulary(merges),
        merges=cast(Any, merges),  # pairs; the annotation there knows files only
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=max_length,
    )
