"""Read tokenizers, make and write CLIP's; transformers is imported when one is used."""

import gzip
import json
from pathlib import Path
from typing import Any

from ..bundled import ASSETS
from ..text import write_json
from .errors import CheckpointError, first_line

_FILES = {"CLIPTokenizer": "vocab.json and merges.txt", "BertTokenizer": "vocab.txt"}


def read_tokenizer(folder: Path, kind: str = "CLIPTokenizer") -> Any:
    """The `CLIPTokenizer`, or the `BertTokenizer`, of a folder.

    Raises:
      CheckpointError: absent or unreadable.
    """
    import transformers

    fast, slow = ["tokenizer.json"], _FILES[kind].split(" and ")
    if not any(all((folder / name).is_file() for name in names) for names in (fast, slow)):
        raise CheckpointError(
            f"{folder} holds no tokenizer (tokenizer.json, or {_FILES[kind]}). "
            "Check that the download is complete."
        )
    try:
        return getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises many types, some from Rust
        name = kind.removesuffix("Tokenizer")
        raise CheckpointError(
            f"{folder} is not a {name} tokenizer: {first_line(error)} Download it again."
        ) from error


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
    """Write a `CLIPTokenizer` so that transformers 4.57 and 5 both load it.

    Version 5 reads and writes `tokenizer.json`; the slow tokenizer of 4.57, which diffusers
    pipelines name, needs `vocab.json`, `merges.txt` and the added tokens in files of their own.

    Raises:
      OSError: what the file system reports.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tokenizer.save_pretrained(folder)
        tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    except OSError:
        raise
    except Exception as error:  # Rust's input/output errors have no type of their own
        raise OSError(str(error)) from error
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    for leftover in ("is_local", "local_files_only"):  # how it was loaded, not what it is
        config.pop(leftover, None)
    write_json(folder / "tokenizer_config.json", config)
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
