"""Pipeline folders: the index, the scheduler, and other parts beside the models.

Parts that nothing here computes with, such as the safety checker and the feature extractor, are
carried along: found where a pipeline is loaded, and copied as they are where it is written.
"""

import shutil
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from . import architectures
from .architectures import class_in
from .errors import CheckpointError, OutputError, listing
from .files.weights import read_json
from .tokenizer import CLIP_TOKENS, clip_tokenizer, kind_of, read_tokenizer

CLIPS_OWN = "CLIP's own, which comes with conceptax, takes its place"  # of a tokenizer


def read_index(folder: Path) -> dict[str, Any]:
    """The `model_index.json` of a folder.

    Raises:
      CheckpointError: it is absent or damaged.
    """
    return architectures.without_flax(read_json(folder / "model_index.json"))


def pipeline_components(kind: Any, index: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """The parts that a pipeline, or its class, computes with.

    Without those that may be left out and that an index does not name.
    """
    absent = {n for n in kind.OPTIONAL if index is not None and class_in(index.get(n)) is None}
    return tuple(n for n in (*kind.MODELS, *kind.TOKENIZERS, "scheduler") if n not in absent)


def read_scheduler(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's settings, of the class that the index names, as diffusers reads them.

    Raises:
      CheckpointError: they are absent or damaged.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.exists() and (older := file.with_name("config.json")).is_file():
        file = older
    config = architectures.without_flax(read_json(file))
    if (named := class_in(index.get("scheduler"))) is not None:
        config["_class_name"] = named
    return config


_TOKENIZERS = {  # of text encoders; those of all others are CLIP's
    "T5EncoderModel": "T5Tokenizer",
    "UMT5EncoderModel": "T5Tokenizer",
    "Qwen3ForCausalLM": "Qwen2Tokenizer",
    "Qwen3Model": "Qwen2Tokenizer",
    "LlamaModel": "PreTrainedTokenizerFast",
    "LlamaForCausalLM": "PreTrainedTokenizerFast",
}


def tokenizer_kind(index: Mapping[str, Any], name: str) -> str:
    """The class of a pipeline's tokenizer, after the text encoder that it is for."""
    encoder = class_in(index.get(name.replace("tokenizer", "text_encoder")))
    return _TOKENIZERS.get(encoder or "", "CLIPTokenizer")


def tokenizer_entry(tokenizer: Any, entry: Any) -> Any:
    """What a `model_index.json` says of a tokenizer: what it said, if it is no CLIP's."""
    kind = kind_of(tokenizer)
    if kind not in _TOKENIZERS.values():
        return ["transformers", "CLIPTokenizer"]
    return ["transformers", kind] if class_in(entry) is None else entry


def takes_clips(folder: Path, name: str, kind: str = "CLIPTokenizer") -> bool:
    """Whether a pipeline's folder lacks a tokenizer, and its text encoder has CLIP's 49,408 tokens.

    Raises:
      CheckpointError: the settings of the text encoder are damaged.
    """
    config = _encoder_config(folder, name)
    if kind != "CLIPTokenizer" or (folder / name).exists() or not config.is_file():
        return False
    return read_json(config).get("vocab_size", CLIP_TOKENS) == CLIP_TOKENS


def pipeline_tokenizer(folder: Path, name: str, kind: str = "CLIPTokenizer") -> Any:
    """A tokenizer of a pipeline's folder, or CLIP's own where that `takes_clips`.

    The latter pads as in the published folders: with "!" for OpenCLIP's text encoders, which
    compute `gelu`.

    Raises:
      CheckpointError: it is absent, unreadable, or not of this kind.
    """
    if not takes_clips(folder, name, kind):
        return read_tokenizer(folder / name, kind)
    raw = read_json(_encoder_config(folder, name))
    openai = raw.get("hidden_act", "quick_gelu") == "quick_gelu"
    return clip_tokenizer("<|endoftext|>" if openai else "!")


def _encoder_config(folder: Path, name: str) -> Path:
    return folder / name.replace("tokenizer", "text_encoder") / "config.json"


def check_vocabulary(folder: Path, tokenizer: Any, rows: int, encoder: str = "") -> None:
    """Refuse a tokenizer that knows more tokens than its text encoder embeds.

    Args:
      folder: of the tokenizer, or of both.
      tokenizer: what was read from there.
      rows: of the encoder.
      encoder: such as " in model.safetensors", where the encoder lies elsewhere.

    Raises:
      CheckpointError: it does.
    """
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, but the text encoder"
            f"{encoder} embeds only {rows}. Use the tokenizer that belongs to it."
        )


def is_part(name: str, entry: Any) -> bool:
    """Whether an entry of a `model_index.json`, [library, class], names a part that exists."""
    return class_in(entry) is not None and not name.startswith("_")


def is_plain(name: str) -> bool:
    """Whether a name is that of a folder beside the index, and not somewhere else."""
    return not (name.startswith(".") or {"/", "\\", "\0"} & set(name))


def carried_parts(
    folder: Path, index: Mapping[str, Any], known: Collection[str]
) -> dict[str, Path]:
    """Name -> folder of each part that a pipeline's folder holds beside the known ones.

    A custom pipeline's code, `["file", "Class"]` as its `_class_name`, is carried too, as a file;
    nothing runs it.

    Raises:
      CheckpointError: such a part holds a link to a folder, or what is no file.
    """
    found = {
        name: folder / name
        for name, entry in index.items()
        if name not in known
        and is_part(name, entry)
        and is_plain(name)
        and (folder / name).is_dir()
    }
    for part in found.values():
        _check(part)
    flax = [name for name, part in found.items() if _only_flax(part)]
    if flax:
        warnings.warn(
            f"{folder}: {listing(flax)} is in Flax's format, which PyTorch's libraries do not "
            "read, and is not carried along.",
            stacklevel=4,
        )
        found = {name: part for name, part in found.items() if name not in flax}
    kind = index.get("_class_name")
    if isinstance(kind, list) and is_plain(kind[0]) and (folder / f"{kind[0]}.py").is_file():
        found[f"{kind[0]}.py"] = folder / f"{kind[0]}.py"
    return found


def _only_flax(part: Path) -> bool:
    suffixes = {file.suffix.lower() for file in part.rglob("*")}
    return ".msgpack" in suffixes and not suffixes & {".safetensors", ".bin"}


def _check(part: Path) -> None:
    """A link to a folder could lead to a whole disk, and a pipe never ends."""
    for file in part.rglob("*"):
        if (file.is_symlink() and file.is_dir()) or not (file.is_dir() or file.is_file()):
            raise CheckpointError(
                f"{file} is neither a file nor a folder of its own, so {part.name} cannot be "
                "carried along. Replace it by what it stands for."
            )


def copy_carried(carried: Mapping[str, Path], folder: Path) -> None:
    """Copy parts into the folder of a pipeline, byte for byte; links become what they lead to.

    Raises:
      OutputError: a part is no longer where it was found.
      OSError: what the file system reports.
    """
    for name, source in carried.items():
        if not source.exists():
            raise OutputError(
                f"{name} was to be carried along from {source}, which is no longer there. Put it "
                "back, or load the pipeline again without it."
            )
        if source.is_file():
            shutil.copyfile(source, folder / name)
            continue
        try:
            _check(source)
        except CheckpointError as error:
            raise OutputError(str(error)) from error
        (folder / name).mkdir()
        for file in sorted(source.rglob("*")):  # a folder comes before what is in it
            to = folder / name / file.relative_to(source)
            to.mkdir() if file.is_dir() else shutil.copyfile(file, to)
