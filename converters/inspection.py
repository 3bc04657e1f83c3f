"""Inspect a checkpoint by its headers alone: no tensor is read."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from . import architectures
from .components import abstract
from .errors import CheckpointError, listing
from .files.safetensors_file import (
    FLOAT_NAMES,
    FLOAT_TYPES,
    ITEM_SIZES,
    PARAMETER_TYPES,
    StoredTensor,
)
from .files.weights import WeightFile, find_weights, open_weights, variant_of
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
from .formats.lora import check_lora, lora_file
from .formats.personalized import read_personalization
from .formats.segmentation import Plan, plan_of
from .pipeline_folder import (
    carried_parts,
    check_vocabulary,
    class_in,
    is_part,
    pipeline_components,
    read_index,
    read_scheduler,
)
from .tensors import CONVERT, compare, tensor_specs
from .tokenizer import read_tokenizer


class Part(NamedTuple):
    """One set of tensors.

    Attributes:
      name: the component, or empty for a checkpoint that is one.
      architecture: the published class name, or what kind of file it is.
      parameters: numbers stored.
      dtypes: type's name -> numbers stored in it.
      nbytes: size of the tensors.
      problems: what is wrong with it -> the tensors' names, or messages; empty if it can be loaded.
      variant: of the weight file that is read, such as "fp16"; empty for the plain one.
    """

    name: str
    architecture: str
    parameters: int
    dtypes: dict[str, int]
    nbytes: int
    problems: dict[str, list[str]]
    variant: str = ""


class Inspection(NamedTuple):
    """A checkpoint.

    Attributes:
      kind: such as "pipeline folder (StableDiffusionPipeline)".
      parts: its models.
      leftovers: what it holds beside them, harmless -> the names.
      problems: what is missing or extra beside what its parts say.
      advice: of what `load_pytorch` refuses as it is, a LoRA or weights in float64 or 8 bits, why
        and what takes it.
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
    others = {kind for part in told.parts for kind in part.dtypes} - PARAMETER_TYPES.keys()
    if others and told.healthy and not told.advice:
        advice = f"It holds {listing(sorted(others))}, in which no parameter is kept. {CONVERT}"
        return told._replace(advice=advice)
    return told


def _inspect(path: Path | str) -> Inspection:
    found = identify(path)
    path, stored = found.path, found.stored
    if found.kind == PIPELINE:
        return _pipeline(path)
    if found.kind == PERSONALIZATION:
        return _personalization(path)._replace(advice=found.advice)
    if found.kind == SEGMENTATION:
        assert found.file is not None
        plan = plan_of(found.file)
        assert plan is not None
        return _plan(plan, str(path))
    if found.kind == LORA:
        return _lora(lora_file(path), stored)._replace(advice=found.advice)
    if found.kind == SINGLE:
        assert found.file is not None
        return _single(found.file)
    if found.kind == WEIGHTS:
        part = _part("", "no config.json beside it tells", (stored or {}).values(), {})
        return Inspection("weight file", [part], {}, {"no model": [found.advice]})
    return Inspection("component", [_component(path, "", None, stored)], {}, {})


def _pipeline(path: Path) -> Inspection:
    index = read_index(path)
    named = index.get("_class_name")
    kind = f"pipeline ({', '.join(map(str, named)) if isinstance(named, list) else named})"
    try:
        pipeline = architectures.class_of_pipeline(index, str(path))
    except CheckpointError as error:
        return Inspection(kind, [], {}, {"not supported here": [str(error)]})
    parts, problems, tokenizers = [], dict[str, list[str]](), {}
    known = pipeline_components(pipeline)
    missing = [name for name in known if not (path / name).is_dir()]
    if missing:
        problems["missing"] = sorted(missing)
    for name in sorted(pipeline.MODELS):
        if name not in missing:
            published = class_in(index.get(name))
            parts.append(_component(path / name, name, published, None))
    unreadable = []
    for name in pipeline.TOKENIZERS:
        try:
            if name not in missing:
                tokenizers[name] = read_tokenizer(path / name)
                encoder = name.replace("tokenizer", "text_encoder")
                if encoder not in missing and (rows := _vocabulary(path / encoder)):
                    check_vocabulary(path, tokenizers[name], rows)
        except CheckpointError as error:
            unreadable.append(str(error))
    try:
        if "scheduler" not in missing:
            read_scheduler(path, index)
        carried = carried_parts(path.resolve(), index, known)
    except CheckpointError as error:
        unreadable.append(str(error))
        carried = {}
    if unreadable:
        problems["not readable"] = unreadable
    others = {name for name, entry in index.items() if name not in known and is_part(name, entry)}
    absent = sorted(name for name in others if not (path / name).is_dir() and "/" not in name)
    unused = sorted((others | set(carried)) - set(absent))
    leftovers = {"parts that are not loaded": unused} if unused else {}
    if absent:
        leftovers["parts that are named and not there"] = absent
    return Inspection(kind, parts, leftovers, problems)


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
    problems = {"unexpected": file.unknown} if file.unknown else {}
    return Inspection(file.kind, parts, file.leftovers, problems)


def _plan(plan: Plan, source: str) -> Inspection:
    """A file of OpenCLIP or MAFT+, which may hold more than the model: a teacher, an optimizer."""
    name = getattr(plan.model_class, "__name__", "")
    try:
        _, specs = plan.specs(dtype=jnp.float32, param_dtype=jnp.float32)
        used = plan.wanted(specs)
        problems = compare(specs, used, model_class=plan.model_class, double=True).problems
    except (ValueError, TypeError) as error:
        used, problems = {}, {"not supported here": [f"{source}: {error}"]}
    unused = sorted(set(plan.stored) - set(used))
    leftovers = {"tensors that are not loaded": unused} if unused else {}
    part = _part("", name, used.values(), problems)
    return Inspection(f"single file of {name}", [part], leftovers, {})


def _lora(path: Path, stored: Mapping[str, StoredTensor] | None) -> Inspection:
    """A LoRA, or a relative of it that cannot be merged."""
    problems = {}
    try:
        check_lora(path)
    except CheckpointError as error:
        problems = {"not supported here": [str(error)]}
    tensors = (open_weights(path) if stored is None else stored).values()
    return Inspection("LoRA", [_part("", "LoRA", tensors, problems)], {}, {})


def _personalization(path: Path) -> Inspection:
    """New tokens and cross-attention weights: a few megabytes, which are read."""
    found = read_personalization(path)
    named = {"new tokens": found.rows, "UNet": found.unet}
    parts = [
        _part(
            name,
            f"{len(arrays)} tensors" if name == "UNet" else ", ".join(sorted(arrays)),
            [StoredTensor(FLOAT_NAMES[a.dtype], a.shape, lambda a=a: a) for a in arrays.values()],
            {},
        )
        for name, arrays in named.items()
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
            variant = variant_of(file.name)
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
) -> dict[str, list[str]]:
    try:
        model_class = architectures.model_class(architecture, source)
        model = abstract(
            model_class, raw, source=source, dtype=jnp.float32, param_dtype=jnp.float32
        )
    except CheckpointError as error:
        return {"not supported here": [str(error)]}
    return compare(tensor_specs(model), stored, model_class=model_class, double=True).problems


def _part(
    name: str, architecture: str, tensors: Iterable[StoredTensor], problems: dict[str, list[str]]
) -> Part:
    dtypes: Counter[str] = Counter()
    nbytes = 0
    for tensor in tensors:
        count = math.prod(tensor.shape)
        nbytes += count * ITEM_SIZES.get(tensor.dtype, 0)
        if tensor.dtype in FLOAT_TYPES:
            dtypes[tensor.dtype] += count
    return Part(name, architecture, sum(dtypes.values()), dict(dtypes), nbytes, problems)
