"""Add parts to a pipeline: components, LoRA, embeddings, Custom Diffusion, changed weights.

Whatever a command of this package writes beside whole pipelines is read here, and so is what other
programs write of the kind.  `merge_parts` tells them apart by their content.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..flax_models.pretrained import Published
from ..flax_models.streaming import is_streamed
from . import architectures
from .errors import CheckpointError, counted, listing
from .files.safetensors_file import StoredTensor
from .files.weight_names import weight_name
from .files.weights import WeightFile, find_weights, open_weights, visible
from .formats.compvis import open_single_file
from .formats.compvis_parts import read_single_file
from .formats.drawn_with import DrawnWith, drawn_with, of_config
from .formats.identify import COMPONENT, PIPELINE, SINGLE, Identity, identify, read_config, resolved
from .formats.lora import holds_lora, merge_lora
from .formats.personalized import holds_changes, load_personalized, personalized_files
from .parameters import replaced
from .tensors import TensorSpec, compare, is_finite, tensor_specs

# Settings in which a part may differ from the pipeline's own, which are kept: the usual size, the
# ids of tokens, which the tokenizer knows, and the width of a projection, which the tensors tell.
_FREE = ("sample_size", "bos_token_id", "eos_token_id", "pad_token_id", "projection_dim")


def merge_parts(
    pipeline: Any,
    path: Path | str,
    scale: float = 1.0,
    *,
    settings: DrawnWith | Mapping[str, Any] | str | None = None,
) -> Any:
    """A pipeline with a part of it that was trained or edited elsewhere, told by its content.

    What is merged takes the data types and the devices of the pipeline's own parameters.

    Args:
      pipeline: a `StableDiffusionPipeline`, or one of SDXL, of the model that the part was made
        for; it stays as it is.
      path: a file or folder, or an id of the Hub: a component, such as an edited text encoder or
        UNet with its config.json (`conceptax erase --export text-encoder`, or a pipeline's folder
        `unet`), or a single file of one; changed weights (`--export changes`); a LoRA; embeddings
        of new tokens; weights of Custom Diffusion. A folder may hold a LoRA and some of the last
        three, and is then that, also where a whole pipeline is beside them.
      scale: how much of a LoRA.
      settings: that the images of a LoRA are drawn with, as for `merge_lora`; by default those that
        it states.

    Returns:
      the pipeline, its tokenizer with the new tokens, if there are any.

    Raises:
      CheckpointError: nothing is there, or nothing that can be added (a whole pipeline, a model of
        another kind), or it was made for another model; one sentence says what does not fit.
      TokenError: a token that the tokenizer already has.
      ValueError: `pipeline` is no pipeline, or a streamed one; settings that are none, or are not
        of a LoRA.
    """
    if not hasattr(pipeline, "MODELS"):
        raise ValueError(f"parts are merged into a pipeline, received a {type(pipeline).__name__}.")
    if any(is_streamed(getattr(pipeline, name)) for name in pipeline.MODELS):
        raise ValueError(
            "a streamed model stays as it is in its file and takes no parts: merge them first, "
            "with conceptax convert --add, and stream the folder that it writes."
        )
    path = resolved(path)
    named = personalized_files(path) if path.is_dir() else []
    if holds_lora(path):
        pipeline = merge_lora(pipeline, path, scale, settings=settings)
        return load_personalized(pipeline, path) if named else pipeline
    if drawn_with(settings):
        raise ValueError(f"settings are of a LoRA, and {path} is none: leave them out.")
    if named:
        return load_personalized(pipeline, path)
    if path.is_dir() and not any((path / f).exists() for f in ("model_index.json", "config.json")):
        return functools.reduce(load_personalized, _changes_in(path), pipeline)
    found = identify(path)
    if found.kind == PIPELINE:
        parts = [path / name for name in pipeline.MODELS if (path / name).is_dir()]
        raise CheckpointError(
            f"{path} is a whole pipeline: use it in place of another one, not in addition to it"
            + (f", or pass a folder in it, such as {parts[0]}." if parts else ".")
        )
    if found.kind == SINGLE and found.file is not None and not holds_changes(found.file):
        return _with_single(pipeline, found.file)
    if found.kind == COMPONENT and (path.is_dir() or _is_component(path)):
        return _with_component(pipeline, found)
    return load_personalized(pipeline, path)


def is_whole(path: Path | str) -> bool:
    """Whether a path is a pipeline's folder, or a single file of more than one model.

    Raises:
      CheckpointError: it is absent, or damaged.
    """
    path = resolved(path)
    if path.is_dir():
        return (path / "model_index.json").is_file()
    if (stored := open_single_file(file := WeightFile(path))) is None or holds_changes(file):
        return False
    return len(read_single_file(stored, str(path), file.metadata).parts) > 1


def _changes_in(folder: Path) -> list[Path]:
    """The files of changed weights in a folder, whatever they are called."""
    files = sorted(folder.glob("*.safetensors"))
    if files and all(holds_changes(WeightFile(file)) for file in files):
        return files
    raise CheckpointError(
        f"{folder} holds no edited model, nor what else is added to one (found "
        f"{listing(visible(folder)) or 'nothing'}): it takes a text encoder or UNet (config.json), "
        "files of changed tensors, a LoRA, embeddings of tokens, or weights of Custom Diffusion. "
        "Pass the file itself if it has another name."
    )


def _is_component(file: Path) -> bool:
    """Whether a file is called as the weights of a component are."""
    name = weight_name(file.name)
    return name is not None and bool(name.libraries)


def _with_component(pipeline: Any, found: Identity) -> Any:
    path = found.path
    folder = path if path.is_dir() else path.parent
    raw, source = read_config(folder)
    kind = architectures.model_class(architectures.published_name(raw), source)
    own = {name: getattr(pipeline, name) for name in pipeline.MODELS}
    name = next((name for name, model in own.items() if type(model) is kind), None)
    if name is None:
        takes = [type(model).__name__ for model in own.values() if model is not None]
        raise CheckpointError(
            f"{path} is a {kind.__name__}, which is no part of this "
            f"{type(pipeline).__name__}: it takes {listing(takes)}."
        )
    stored = found.stored
    if stored is None:
        stored = open_weights(find_weights(folder, kind.pytorch_library))
    told = f"{path} does not fit this pipeline's {name}"
    model = _with_all(own[name], stored, told)
    try:
        theirs = kind.config_class.from_dict(raw).to_dict()
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    ours = own[name].config.to_dict()
    if other := [
        f"{setting} {theirs.get(setting)!r} instead of {value!r}"
        for setting, value in ours.items()
        if setting not in _FREE and not _alike(theirs.get(setting), value)
    ]:
        raise CheckpointError(f"{told}: {listing(other)}. It was made for another model.")
    return of_config(raw).applied(dataclasses.replace(pipeline, **{name: model}), path)


def _alike(one: Any, other: Any) -> bool:
    """Whether two settings say the same, of which one may be a number for all levels of a model."""
    if isinstance(one, list) == isinstance(other, list):
        return one == other
    several, single = (one, other) if isinstance(one, list) else (other, one)
    return all(each == single for each in several)


def _with_single(pipeline: Any, file: WeightFile) -> Any:
    """With the one model in a file under CompVis's names."""
    parts = read_single_file(open_single_file(file) or {}, str(file.path), file.metadata).parts
    if len(parts) != 1:
        raise CheckpointError(
            f"{file.path} is a whole model: use it in place of another one, not in addition to it."
        )
    ((name, part),) = parts.items()
    if (own := getattr(pipeline, name, None)) is None:
        raise CheckpointError(f"{file.path} holds a {name}, which this pipeline has not.")
    told = f"{file.path} does not fit this pipeline's {name}"
    pipeline = dataclasses.replace(pipeline, **{name: _with_all(own, part.tensors, told)})
    return of_config(part.raw).applied(pipeline, file.path)


def _with_all(own: Any, stored: Mapping[str, StoredTensor], told: str) -> Any:
    """A model with every parameter from stored tensors.

    Args:
      own: the model; it stays as it is.
      stored: by the names on disk.
      told: what an error begins with.

    Raises:
      CheckpointError: they are not those of the model, or damaged.
    """
    specs = tensor_specs(own)
    found, problems, unread = compare(specs, stored, own, double=True)
    if problems:
        raise CheckpointError(f"{told}: {counted(problems)}. It was made for another model.")

    def values() -> Iterator[tuple[TensorSpec, np.ndarray]]:
        for spec in specs:
            tensor = found[spec.key]
            value = np.ascontiguousarray(tensor.read())
            if not is_finite(value, tensor.dtype):
                raise CheckpointError(f"{told}: {spec.key} holds NaN or infinite values.")
            yield spec, value

    model = replaced(own, values())
    if unread:
        model.published_config = dataclasses.replace(
            getattr(own, "published_config", Published("{}")), unread=unread
        )
    return model
