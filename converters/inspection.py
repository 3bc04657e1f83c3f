"""Inspect a checkpoint by its headers alone: no tensor is read."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from . import architectures
from .architectures import class_in
from .components import abstract
from .errors import CheckpointError, listing
from .files.safetensors_file import FLOAT_TYPES, PARAMETER_TYPES, StoredTensor
from .files.weight_names import weight_name
from .files.weights import WeightFile, find_weights, open_weights
from .formats.compvis import open_single_file
from .formats.compvis_parts import read_single_file
from .formats.identify import (
    LORA,
    PERSONALIZATION,
    PIPELINE,
    SEGMENTATION,
    SINGLE,
    WEIGHTS,
    identify,
    read_config,
)
from .formats.lora import check_lora, load_drawn_with, lora_file
from .formats.personalized import read_personalization
from .formats.segmentation import plan_of
from .parameters import CONVERT
from .pipeline_folder import (
    CLIPS_OWN,
    carried_parts,
    check_vocabulary,
    is_part,
    pipeline_components,
    pipeline_tokenizer,
    read_index,
    read_scheduler,
    takes_clips,
    tokenizer_kind,
)
from .tensors import compare, tensor_specs

_FLOAT = {"dtype": jnp.float32, "param_dtype": jnp.float32}  # shapes are the same in every type
Problems = dict[str, list[str]]


class Part(NamedTuple):
    """One set of tensors.

    Attributes:
      name: the component, or empty for a checkpoint that is one.
      architecture: the published class name, or what kind of file it is.
      parameters: numbers stored.
      dtypes: type's name, or that of a quantization, -> numbers stored in it.
      nbytes: size of the tensors.
      problems: what is wrong with it -> the tensors' names, or messages; empty if it can be loaded.
      variant: of the weight file that is read, such as "fp16"; empty for the plain one.
      quantized: those of `dtypes` that are converted to float32 as they are read.
    """

    name: str
    architecture: str
    parameters: int
    dtypes: dict[str, int]
    nbytes: int
    problems: dict[str, list[str]]
    variant: str = ""
    quantized: frozenset[str] = frozenset()


class Inspection(NamedTuple):
    """A checkpoint.

    Attributes:
      kind: such as "pipeline folder (StableDiffusionPipeline)".
      parts: its models.
      leftovers: what it holds beside them, harmless -> the names.
      problems: what is missing or extra beside what its parts say.
      advice: of what `load_pytorch` refuses as it is, a LoRA or weights in float64 or 8 bits, why
        and what takes it; of a folder without a tokenizer, what takes its place.
    """

    kind: str
    parts: list[Part]
    leftovers: dict[str, list[str]]
    problems: dict[str, list[str]]
    advice: str = ""

    @property
    def healthy(self) -> bool:
        """Whether nothing is missing, extra or of another shape."""
        return not self.problems and not any(part.problems for part in self.parts)


def inspect_checkpoint(path: Path | str) -> Inspection:
    """Tell what a folder or file is, and whether anything is missing or extra.

    Reads settings and headers; of a pickle, whatever torch reads to map it, executing nothing.

    Raises:
      CheckpointError: there is nothing that can be recognized, or a damaged file.
    """
    told = _inspect(path)
    others = {kind for part in told.parts for kind in part.dtypes.keys() - part.quantized}
    others -= PARAMETER_TYPES.keys()
    loadable = not told.advice or told.advice.endswith(f"{CLIPS_OWN}.")
    if others and told.healthy and loadable:
        advice = f"It holds {listing(sorted(others))}, in which no parameter is kept. {CONVERT}"
        return told._replace(advice=f"{told.advice} {advice}".strip())
    return told


def _inspect(path: Path | str) -> Inspection:
    found = identify(path)
    path, stored, file = found.path, found.stored, found.file
    if found.kind == PIPELINE:
        return _pipeline(path)
    if found.kind == PERSONALIZATION:
        return _personalization(path)._replace(advice=found.advice)
    if found.kind == SEGMENTATION and file is not None:
        return _segmentation(file)
    if found.kind == LORA:
        path = lora_file(path)
        problems = _refusal(lambda: check_lora(path))
        tensors = open_weights(path) if stored is None else stored
        part = _part("", "LoRA", tensors.values(), problems)
        stated = "" if problems else load_drawn_with(path)
        kind = f"LoRA, drawn with {stated}" if stated else "LoRA"
        return Inspection(kind, [part], {}, {}, found.advice)
    if found.kind == SINGLE and file is not None:
        return _single(file)
    if found.kind == WEIGHTS:
        part = _part("", "no config.json beside it tells", (stored or {}).values(), {})
        return Inspection("weight file", [part], {}, {"no model": [found.advice]})
    return Inspection("component", [_component(path, "", None, stored)], {}, {})


def _refusal(read: Callable[[], Any], kind: str = "not supported here") -> Problems:
    """What `read` refuses, as a problem of that kind."""
    try:
        read()
    except CheckpointError as error:
        return {kind: [str(error)]}
    return {}


def _pipeline(path: Path) -> Inspection:
    index = read_index(path)
    named = index.get("_class_name")
    kind = f"pipeline ({', '.join(map(str, named)) if isinstance(named, list) else named})"
    try:
        pipeline = architectures.class_of_pipeline(index, str(path))
    except CheckpointError as error:
        return Inspection(kind, [], {}, {"not supported here": [str(error)]})
    known = pipeline_components(pipeline, index)
    kinds = {name: tokenizer_kind(index, name) for name in pipeline.TOKENIZERS if name in known}
    clips = [name for name, kind in kinds.items() if takes_clips(path, name, kind)]
    missing = sorted(n for n in known if not (path / n).is_dir() and n not in clips)
    parts = [
        _component(path / name, name, class_in(index.get(name)), None)
        for name in sorted(pipeline.MODELS)
        if name in known and name not in missing
    ]
    carried: dict[str, Path] = {}

    def check_tokenizer(name: str) -> None:
        tokenizer = pipeline_tokenizer(path, name, kinds[name])
        encoder = name.replace("tokenizer", "text_encoder")
        if encoder not in missing and (rows := _vocabulary(path / encoder)):
            check_vocabulary(path, tokenizer, rows)

    def check_rest() -> None:
        if "scheduler" not in missing:
            read_scheduler(path, index)
        carried.update(carried_parts(path.resolve(), index, known))

    checks = [
        partial(check_tokenizer, name)
        for name in pipeline.TOKENIZERS
        if name in known and name not in missing
    ]
    refusals = [_refusal(check, "") for check in (*checks, check_rest)]
    problems = {
        "missing": missing,
        "not readable": [text for refusal in refusals for (text,) in refusal.values()],
    }
    others = {name for name, entry in index.items() if name not in known and is_part(name, entry)}
    absent = sorted(name for name in others if not (path / name).is_dir() and "/" not in name)
    leftovers = {
        "parts that are not loaded": sorted((others | set(carried)) - set(absent)),
        "parts that are named and not there": absent,
    }
    advice = f"It holds no {' and no '.join(clips)}: {CLIPS_OWN}." if clips else ""
    return Inspection(kind, parts, _told(leftovers), _told(problems), advice)


def _told(lists: Problems) -> Problems:
    return {kind: names for kind, names in lists.items() if names}


def _vocabulary(folder: Path) -> int | None:
    """How many tokens a text encoder's settings say it embeds."""
    try:
        rows = read_config(folder)[0].get("vocab_size")
    except CheckpointError:
        return None  # told of the component
    return rows if isinstance(rows, int) else None


def _single(source: WeightFile) -> Inspection:
    path, stored = source.path, open_single_file(source) or {}
    file = read_single_file(stored, str(path), source.metadata)
    parts = []
    for name, part in file.parts.items():
        problems = _compare(part.class_name, part.raw, part.tensors, str(path))
        parts.append(_part(name, part.class_name, part.tensors.values(), problems))
    return Inspection(file.kind, parts, file.leftovers, _told({"unexpected": file.unknown}))


def _segmentation(file: WeightFile) -> Inspection:
    """A file of OpenCLIP or MAFT+, which may hold more than the model: a teacher, an optimizer."""
    plan = plan_of(file)
    assert plan is not None
    name = getattr(plan.model_class, "__name__", "")
    try:
        _, specs = plan.specs(**_FLOAT)
        used = plan.wanted(specs)
        problems = compare(specs, used, plan.model_class, double=True).problems
    except (ValueError, TypeError) as error:
        used, problems = {}, {"not supported here": [f"{file.path}: {error}"]}
    leftovers = _told({"tensors that are not loaded": sorted(set(plan.stored) - set(used))})
    part = _part("", name, used.values(), problems)
    return Inspection(f"single file of {name}", [part], leftovers, {})


def _personalization(path: Path) -> Inspection:
    """New tokens and cross-attention weights: a few megabytes, which are read."""
    rows, unet, _ = read_personalization(path)
    parts = [
        _part(name, told, map(StoredTensor.of, arrays.values()), {})
        for name, told, arrays in (
            ("new tokens", ", ".join(sorted(rows)), rows),
            ("UNet", f"{len(unet)} tensors", unet),
        )
        if arrays
    ]
    return Inspection("personalization", parts, {}, {})


def _component(
    folder: Path, name: str, published: str | None, stored: Mapping[str, StoredTensor] | None
) -> Part:
    """A component folder; what is wrong with it becomes a problem of the part."""
    architecture, variant = published, ""
    try:
        raw, source = read_config(folder.parent if folder.is_file() else folder)
        architecture = published or architectures.published_name(raw)
        model_class = architectures.model_class(architecture, source)
        if stored is None:
            file = find_weights(folder, model_class.pytorch_library)
            called = weight_name(file.name)
            variant = called.variant if called else ""
            stored = open_weights(file)
        problems = _compare(architecture, raw, stored, source)
    except CheckpointError as error:
        problems = {"not readable": [str(error)]}
    part = _part(name, architecture or "unknown", (stored or {}).values(), problems)
    return part._replace(variant=variant)


def _compare(
    architecture: str | None,
    raw: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    source: str,
) -> Problems:
    try:
        model_class = architectures.model_class(architecture, source)
        model = abstract(model_class, raw, source=source, **_FLOAT)
    except CheckpointError as error:
        return {"not supported here": [str(error)]}
    return compare(tensor_specs(model), stored, model, double=True).problems


def _part(
    name: str, architecture: str, tensors: Iterable[StoredTensor], problems: Problems
) -> Part:
    dtypes: Counter[str] = Counter()
    nbytes, quantized = 0.0, set()
    for tensor in tensors:
        count = math.prod(tensor.shape)
        nbytes += count * tensor.bytes_each
        if tensor.dtype in FLOAT_TYPES:
            dtypes[tensor.kept or tensor.dtype] += count
            quantized |= {tensor.kept} - {""}
    part = Part(name, architecture, sum(dtypes.values()), dict(dtypes), int(nbytes), problems)
    return part._replace(quantized=frozenset(quantized))
