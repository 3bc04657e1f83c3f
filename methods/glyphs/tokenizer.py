"""The glyphs world's CLIP tokenizer: byte-level BPE whose merges make each world word one token.

The layout is CLIP's own (Radford et al. 2021): 256 byte symbols, the same 256 closing a word
(`</w>`), one entry per merge, then `<|startoftext|>` and `<|endoftext|>`. The end of text
has the highest id, so pooling at the highest id and pooling at the first end of text agree.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .captions import WORDS

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_LENGTH = 24
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte, in CLIP's vocabulary order."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in visible] + [
        chr(256 + extra) for extra in range(256 - len(visible))
    ]


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


def save_tokenizer(tokenizer: CLIPTokenizer, folder: str | Path) -> None:
    """Write the folder that the fast tokenizer of transformers 5 and the slow one of 4 both read.

    `save_pretrained` alone omits `vocab.json`, `merges.txt` and
    `special_tokens_map.json`, which the slow one needs.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    vocabulary = dict(sorted(model["vocab"].items(), key=lambda entry: entry[1]))
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    _write(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False) + "\n")
    _write(folder / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
    _write(folder / "special_tokens_map.json", json.dumps(special, indent=2) + "\n")


def whole_words(tokenizer: CLIPTokenizer) -> list[str]:
    """The vocabulary's whole words and numbers, lower case, sorted (single letters count)."""
    closed = [token.removesuffix("</w>") for token in tokenizer.get_vocab() if "</w>" in token]
    return sorted(
        word for word in closed if word.isascii() and word.isalnum() and word == word.lower()
    )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
