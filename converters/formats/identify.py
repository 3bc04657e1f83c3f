"""Identify a checkpoint by its content: told once, so that all readers say the same about it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .. import architectures
from ..errors import CheckpointError, listing
from ..files.safetensors_file import StoredTensor
from ..files.weights import (
    WeightFile,
    find_weights,
    is_orbax,
    open_weights,
    read_json,
    visible,
)
from ..hub import local
from .compvis import WRAPPERS, is_publishers, open_single_file
from .compvis_parts import stranger
from .lora import holds_lora, is_lora
from .personalized import personal_kind, personalized_files
from .segmentation import loader_of

PIPELINE, COMPONENT = "pipeline", "component"  # a component: its folder, or weights beside config
SINGLE, SEGMENTATION = "single file", "segmentation"  # of Stable Diffusion; of OpenCLIP or MAFT+
LORA, PERSONALIZATION, WEIGHTS = "LoRA", "personalization", "weight file"

_INDEX, _CONFIG = "model_index.json", "config.json"
_HUB = "models--"  # how the Hub's cache begins the name of a model's folder
_WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".gguf", ".msgpack")


class Identity(NamedTuple):
    """What a path is.

    Attributes:
      kind: one of this module's names.
      path: the folder or file; of a folder in the Hub's cache that of the model's files.
      file: the path, where it is a file, opened.
      stored: the tensors in it, of one that is no single file.
      advice: for what is no model by itself, a sentence that says what it is and what takes it.
    """

    kind: str
    path: Path
    file: WeightFile | None = None
    stored: Mapping[str, StoredTensor] | None = None
    advice: str = ""


def identify(path: Path | str) -> Identity:
    """Tell what a folder or file is, by its content.

    Raises:
      CheckpointError: it is absent, damaged, or nothing that is read here.
    """
    path = resolved(path)
    return _file(path) if path.is_file() else _folder(path)


def resolved(
    path: Path | str,
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    components: Iterable[str] | None = None,
) -> Path:
    """The path itself; of a model of the Hub, by its id or its folder in the cache, its files.

    In the cache, that is the version "main", or, where none is noted, the newest one.

    Args:
      path, subfolder, variant, components: as for `hub.local`.

    Raises:
      CheckpointError: there is nothing, or a cache whose version "main" is not there.
    """
    path = local(path, subfolder=subfolder, variant=variant, components=components)
    if not path.exists():
        dangling = " (a symlink to nothing)" if path.is_symlink() else ""
        raise CheckpointError(
            f"{path} does not exist{dangling}. Pass a folder with config.json or model_index.json, "
            "a single file, or a model of the Hub (org/name)."
        )
    snapshots = path / "snapshots"
    if not (path.name.startswith(_HUB) or (path / "refs").is_dir()) or not snapshots.is_dir():
        return path
    main = path / "refs" / "main"
    named = main.read_text("utf-8", "replace").strip() if main.is_file() else ""
    there = [name for name in visible(snapshots) if (snapshots / name).is_dir()]
    if named in there:
        return snapshots / named
    if there and not named:  # fetched by their commits: the newest
        return max((snapshots / name for name in there), key=lambda place: place.stat().st_mtime)
    raise CheckpointError(
        f"{path} is a folder of the Hub's cache whose version {named or 'main'!r} is not there "
        f"(found {listing(there) or 'none'}). Pass one of the folders in {snapshots}, or download "
        "the model again."
    )


def _folder(path: Path) -> Identity:
    if _present(path / _INDEX):
        return Identity(PIPELINE, path)
    if _present(path / _CONFIG):
        if not is_publishers(path):
            return Identity(COMPONENT, path)
        own = path / "pytorch_model.pt"  # as Tencent calls it
        return _file(own if own.is_file() else find_weights(path, "diffusers"))
    if holds_lora(path):
        return _lora(path)
    if files := personalized_files(path):
        return _personalization(path, next(filter(None, map(personal_kind, files)), None))
    there = visible(path)
    if is_orbax(there):
        raise CheckpointError(
            f"{path} is an Orbax checkpoint. Restore it with Orbax and write its parameters with "
            "flax.serialization.to_bytes into diffusion_flax_model.msgpack beside a config.json, "
            "which is read here."
        )
    files = [name for name in there if Path(name).suffix.lower() in _WEIGHT_SUFFIXES]
    inside = [name for name in there if (path / name / _INDEX).is_file()]
    advice = "Pass a diffusers or transformers folder."
    if files:
        advice = f"Pass the weight file itself: {path / files[0]}."
    elif inside:
        advice = f"Pass the folder inside it: {path / inside[0]}."
    raise CheckpointError(
        f"{path} is not a checkpoint: it holds neither {_INDEX} nor {_CONFIG} (found "
        f"{listing(there) or 'nothing'}). {advice}"
    )


def _present(file: Path) -> bool:
    """Whether there is something, be it a pipe or a link to nothing, which its reader reports."""
    return file.exists() or file.is_symlink()


def _file(path: Path) -> Identity:
    beside = (path.parent / _CONFIG).is_file()
    file = WeightFile(path)
    if not file.is_index:
        _ = file.content  # refuses what is no weights
    if open_single_file(file) is not None:
        return Identity(SINGLE, path, file)
    if not file.is_index:
        if loader_of(file) is not None:
            return Identity(SEGMENTATION, path, file)
        if path.suffix.lower() != ".msgpack" and (kind := personal_kind(file)):
            return _personalization(path, kind)
    stored = open_weights(file, wrappers=() if beside else WRAPPERS)
    if is_lora(stored):
        return _lora(path, stored)
    if beside:
        return Identity(COMPONENT, path, file, stored)
    what = stranger(stored) or (
        "No config.json beside it tells of which model. Put it beside the config.json it belongs "
        "to; a file of changed tensors is added to the model that it changes (--add, merge_parts)."
    )
    advice = f"{path} is no model that can be read alone. {what}"
    return Identity(WEIGHTS, path, file, stored, advice)


def _lora(path: Path, stored: Mapping[str, StoredTensor] | None = None) -> Identity:
    advice = (
        f"{path} is a LoRA, which is no model but changes one. Add it to that: conceptax sample "
        f"and conceptax convert take --add {path} beside the model (merge_parts)."
    )
    return Identity(LORA, path, None, stored, advice)


def _personalization(path: Path, kind: str | None) -> Identity:
    advice = (
        f"{path} is {kind or 'changed weights'}, which is no model but adds to one. Add it to "
        f"that: conceptax sample and conceptax convert take --add {path} beside the model "
        "(merge_parts)."
    )
    return Identity(PERSONALIZATION, path, advice=advice)


def read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """The settings of a component, and what to call them in messages.

    Raises:
      CheckpointError: they are absent or damaged.
    """
    file = folder / _CONFIG
    if not folder.is_dir():  # a part of a pipeline
        raise CheckpointError(f"{folder} does not exist. Check that the download is complete.")
    if not _present(file):
        raise CheckpointError(
            f"{folder} is not a checkpoint: it holds no {_CONFIG} (found "
            f"{listing(visible(folder)) or 'nothing'}). Check that the download is complete."
        )
    return architectures.without_flax(read_json(file)), str(file)
