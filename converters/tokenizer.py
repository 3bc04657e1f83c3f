"""Read and write tokenizers, make CLIP's; transformers is imported when one is used."""

import dataclasses
import gzip
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..bundled import ASSETS
from ..text import write_json
from .errors import CheckpointError, first_line

_FILES = {
    "CLIPTokenizer": "vocab.json and merges.txt",
    "BertTokenizer": "vocab.txt",
    "T5Tokenizer": "spiece.model",
    "Qwen2Tokenizer": "vocab.json and merges.txt",
    "PreTrainedTokenizerFast": "nothing else",  # Llama's: its file tells all
}
# Kinds whose files are kept, to be written as they were, and the files that these may be.
_KEPT = ("T5Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast")
_NAMES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "vocab.json", "merges.txt", "chat_template.jinja"),
)


@dataclasses.dataclass(frozen=True)
class PublishedTokenizer:
    """What a tokenizer was read from, for when it is written again: name -> content, and what the
    tokenizer was like."""

    files: Mapping[str, bytes]
    state: tuple[Any, ...]


def _state(tokenizer: Any) -> tuple[Any, ...]:
    """All of a tokenizer that programs edit."""
    added, special = tokenizer.get_added_vocab(), tokenizer.special_tokens_map
    settings = (tokenizer.chat_template, tokenizer.model_max_length, tokenizer.padding_side)
    return (len(tokenizer), dict(added), {k: str(v) for k, v in special.items()}, *settings)


def kind_of(tokenizer: Any) -> str:
    """The class of a tokenizer, under its name in transformers 4 and 5."""
    name = type(tokenizer).__name__
    return "PreTrainedTokenizerFast" if name == "TokenizersBackend" else name


def _kind_of(folder: Path) -> str | None:
    """Which kind of tokenizer a folder holds, by its vocabulary; None where that does not tell."""
    try:
        if (file := folder / "tokenizer.json").is_file():
            model = json.loads(file.read_bytes())["model"]
            words, kind = model.get("vocab", {}), model.get("type")
        elif (file := folder / "vocab.json").is_file():
            words, kind = json.loads(file.read_bytes()), "BPE"
        else:
            return None
        if kind == "BPE":
            clips = any(word.endswith("</w>") for word in words)
            return "CLIPTokenizer" if clips else "Qwen2Tokenizer"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # damaged, which reading it tells
    return {"Unigram": "T5Tokenizer", "WordPiece": "BertTokenizer"}.get(kind)


def read_tokenizer(folder: Path, kind: str = "CLIPTokenizer") -> Any:
    """A folder's tokenizer: a `CLIPTokenizer`, `BertTokenizer`, `T5Tokenizer`, `Qwen2Tokenizer`, or
    `PreTrainedTokenizerFast`, which Llama's is: transformers 5 has a class of that name, which
    reads the bytes of Llama 3 as the words of Llama 2.

    Raises:
      CheckpointError: absent, unreadable, or of another kind.
    """
    import transformers

    fast, slow = ["tokenizer.json"], _FILES[kind].split(" and ")
    if not any(all((folder / name).is_file() for name in names) for names in (fast, slow)):
        raise CheckpointError(
            f"{folder} holds no tokenizer (tokenizer.json, or {_FILES[kind]}). "
            "Check that the download is complete."
        )
    llama = kind == "PreTrainedTokenizerFast"
    name = "Llama" if llama else kind.removesuffix("Tokenizer")
    found = _kind_of(folder)
    if found not in (kind, None) and not (llama and found == "Qwen2Tokenizer"):  # both of bytes
        raise CheckpointError(
            f"{folder} holds the tokenizer of a {str(found).removesuffix('Tokenizer')} model, and "
            f"what reads it takes that of a {name} model. Use the tokenizer that belongs to it."
        )
    alone = not (folder / "tokenizer.json").is_file() and slow == ["spiece.model"]
    if alone and importlib.util.find_spec("sentencepiece") is None:
        raise CheckpointError(
            f"{folder} holds spiece.model without tokenizer.json, which transformers reads with "
            "the package sentencepiece. Install it, or add the tokenizer.json."
        )
    try:
        tokenizer = getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises many types, some from Rust
        raise CheckpointError(
            f"{folder} is not a {name} tokenizer: {first_line(error)} Download it again."
        ) from error
    if kind in _KEPT:
        files = (folder / name for name in _NAMES)
        content = {file.name: file.read_bytes() for file in files if file.is_file()}
        tokenizer.published = PublishedTokenizer(content, _state(tokenizer))
    return tokenizer


CLIP_TOKENS = 49408  # of CLIP's own tokenizer, which Stable Diffusion 1, 2 and XL share


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    """CLIP's own `CLIPTokenizer`, of 49,408 tokens and prompts of 77, from what comes with us.

    Args:
      pad_token: "<|endoftext|>" as in Stable Diffusion 1 and the first tokenizer of XL, or "!" as
        in Stable Diffusion 2 and the second one of XL.
    """
    import transformers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges = gzip.decompress((ASSETS / "clip" / "merges.txt.gz").read_bytes()).decode("utf-8")
    pairs: Any = [tuple(line.split()) for line in merges.splitlines()]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, pairs)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(
        {word: index for index, word in enumerate(words)},
        pairs,
        pad_token=pad_token,
        model_max_length=77,
    )


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer so that transformers 4.57 and 5 both load it.

    T5's and Qwen's are written as they were read, byte for byte, unless something was added to
    them. Of CLIP's, version 5 reads and writes `tokenizer.json`; the slow tokenizer of 4.57, which
    diffusers pipelines name, needs `vocab.json`, `merges.txt` and the added tokens in files of
    their own.

    Raises:
      OSError: what the file system reports.
    """
    folder.mkdir(parents=True, exist_ok=True)
    published = getattr(tokenizer, "published", None)
    if published is not None and published.state == _state(tokenizer):
        for name, content in published.files.items():
            (folder / name).write_bytes(content)
        return
    clips = kind_of(tokenizer) not in _KEPT
    try:
        tokenizer.save_pretrained(folder)
        if clips:
            tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    except OSError:
        raise
    except Exception as error:  # Rust's input/output errors have no type of their own
        raise OSError(str(error)) from error
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    for leftover in ("is_local", "local_files_only"):  # how it was loaded, not what it is
        config.pop(leftover, None)
    write_json(folder / "tokenizer_config.json", config)
    if not clips:
        return
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    added = {
        token: index
        for token, index in tokenizer.get_added_vocab().items()
        if token not in vocabulary
    }
    if added:
        write_json(folder / "added_tokens.json", added)
    specials = {name: str(token) for name, token in _special_tokens(tokenizer).items()}
    write_json(folder / "special_tokens_map.json", specials)


def _special_tokens(tokenizer: Any) -> dict[str, Any]:
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    return {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name)}
