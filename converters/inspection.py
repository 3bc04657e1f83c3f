"""What a checkpoint is, told from its headers alone: no tensor is read."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from . import architectures
from .components import abstract
from .compvis_parts import is_single_file, read_single_file
from .errors import CheckpointError
from .lora import FILES, check_lora, is_lora
from .personalised import describe, is_personalised, read_personalisation
from .safetensors_file import FLOAT_NAMES, FLOAT_TYPES, ITEM_SIZES, StoredTensor
from .segmentation import Plan, plan_of
from .tensors import compare, tensor_specs
from .weights import find_weights, open_weights, read_json

_OTHERS = ("tokenizer", "scheduler")
_NO_MODEL = (*_OTHERS, "feature_extractor", "image_encoder", "safety_checker")


class Part(NamedTuple):
    """One set of tensors.

    Attributes:
      name: the component, or empty for a checkpoint that is one.
      architecture: the published class name, or what kind of file it is.
      parameters: numbers stored.
      dtypes: type's name -> numbers stored in it.
      nbytes: size of the tensors.
      problems: what is wrong with it -> the tensors' names, or messages; empty if it can be loaded.
    """

    name: str
    architecture: str
    parameters: int
    dtypes: dict[str, int]
    nbytes: int
    problems: dict[str, list[str]]


class Inspection(NamedTuple):
    """A checkpoint.

    Attributes:
      kind: such as "pipeline folder (StableDiffusionPipeline)".
      parts: its models.
      leftovers: what it holds beside them, harmless -> the names.
      problems: what is missing or extra beside what its parts say.
    """

    kind: str
    parts: list[Part]
    leftovers: dict[str, list[str]]
    problems: dict[str, list[str]]

    @property
    def healthy(self) -> bool:
        """Whether nothing is missing, extra or of another shape."""
        return not self.problems and not any(part.problems for part in self.parts)


def inspect_checkpoint(path: Path | str) -> Inspection:
    """Tell what a folder or file is, and whether anything is missing or extra.

    Reads settings and headers; of a pickle, whatever torch reads to map it, executing nothing.

    Raises:
      CheckpointError: there is nothing that can be recognised, or a damaged file.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    if (path / "model_index.json").is_file():
        return _pipeline(path)
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and not (path / "config.json").is_file():
        found = next((path / name for name in FILES if (path / name).is_file()), None)
        if found is None and describe(path) is not None:
            return _personalisation(path)
        if found is None:
            raise CheckpointError(
                f"{path} holds neither model_index.json, nor config.json, nor {FILES[0]}. Pass the "
                "weight file itself."
            )
        path = found
    stored = None
    if path.is_file():
        if path.suffix.lower() in (".bin", ".pt", ".safetensors") and is_personalised(path):
            return _personalisation(path)
        if (plan := plan_of(path)) is not None:
            return _plan(plan, str(path))
        stored = open_weights(path, wrappers=("state_dict",) if path.suffix == ".ckpt" else ())
        if is_single_file(stored):
            return _single(stored, str(path))
        if is_lora(stored):
            return _lora(path, stored)
        if not (folder / "config.json").is_file():
            part = _part("", "no config.json beside it tells", stored.values(), {})
            return Inspection("weight file", [part], {}, {})
    return Inspection("component", [_component(folder, "", None, stored)], {}, {})


def _pipeline(path: Path) -> Inspection:
    index = architectures.without_flax(read_json(path / "model_index.json"))
    kind = index.get("_class_name")
    parts, missing, unused = [], [], []
    for name, entry in sorted(index.items()):
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
            continue
        if "/" in name or "\\" in name or name.startswith("."):
            unused.append(name)
        elif not (path / name).is_dir():
            missing.append(name)
        elif name not in _NO_MODEL:
            parts.append(_component(path / name, name, entry[1], None))
        elif name not in _OTHERS:
            unused.append(name)
    missing += [name for name in _OTHERS if name not in index and not (path / name).is_dir()]
    problems: dict[str, list[str]] = {"missing": missing} if missing else {}
    if kind not in architectures.PIPELINES:
        problems["not supported here"] = [str(kind)]
    leftovers = {"parts that are not loaded": unused} if unused else {}
    return Inspection(f"pipeline ({kind})", parts, leftovers, problems)


def _single(stored: Mapping[str, StoredTensor], source: str) -> Inspection:
    file = read_single_file(dict(stored), source)
    parts = []
    for name, part in file.parts.items():
        problems = _compare(part.class_name, part.raw, part.tensors, source)
        parts.append(_part(name, part.class_name, part.tensors.values(), problems))
    problems = {"unexpected": file.unknown} if file.unknown else {}
    if lost := [name for name in ("unet", "vae", "text_encoder") if name not in file.parts]:
        problems["missing"] = lost
    return Inspection(f"single file of {file.family}", parts, file.leftovers, problems)


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


def _lora(path: Path, stored: Mapping[str, StoredTensor]) -> Inspection:
    """A LoRA, or a relative of it that cannot be merged."""
    problems = {}
    try:
        check_lora(path)
    except CheckpointError as error:
        problems = {"not supported here": [str(error)]}
    return Inspection("LoRA", [_part("", "LoRA", stored.values(), problems)], {}, {})


def _personalisation(path: Path) -> Inspection:
    """New tokens and cross-attention weights: a few megabytes, which are read."""
    found = read_personalisation(path)
    named = {"new tokens": found.rows, "UNet": found.unet}
    parts = [
        _part(
            name, f"{len(arrays)} tensors" if name == "UNet" else ", ".join(sorted(arrays)),
            [StoredTensor(FLOAT_NAMES[a.dtype], a.shape, lambda a=a: a) for a in arrays.values()],
            {},
        )
        for name, arrays in named.items()
        if arrays
    ]  # fmt: skip
    return Inspection("personalisation", parts, {}, {})


def _component(
    folder: Path, name: str, published: str | None, stored: Mapping[str, StoredTensor] | None
) -> Part:
    """A component folder; what is wrong with it becomes a problem of the part."""
    architecture = published
    try:
        raw = architectures.without_flax(read_json(folder / "config.json"))
        architecture = architectures.published_name(raw) or published
        if stored is None:
            model_class = architectures.model_class(architecture, str(folder / "config.json"))
            stored = open_weights(find_weights(folder, model_class.pytorch_library))
        problems = _compare(architecture, raw, stored, str(folder / "config.json"))
    except CheckpointError as error:
        problems = {"not readable": [str(error)]}
    return _part(name, architecture or "unknown", (stored or {}).values(), problems)


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
