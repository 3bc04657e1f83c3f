"""LoRA files (Hu et al. 2021): read under many programs' names, merged, kept apart, and written.

A LoRA changes the weight W [out, in] of a layer to W + scale * alpha/r * B A, with A [r, in] and
B [out, r]; for a convolution A is [r, in, h, w] and B is [out, r, 1, 1], or, in three parts, A is
[r, in, 1, 1] with a middle [r, r, h, w].  The names are in `lora_names`.  One pair may be of a
layer that diffusers has as several (FLUX's queries, keys and values): its rows are cut.

Alpha may be a tensor (kohya), or be noted in the file's header (diffusers) or in
`adapter_config.json` (PEFT); without any of them it is r.  What else images are drawn with, such as
URAE's shift of the noise, is in `drawn_with`.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import CheckpointError, OutputError, counted, listing
from ..files.output import atomic_file
from ..files.safetensors_file import (
    FLOAT_NAMES,
    FLOAT_TYPES,
    StoredTensor,
    write_safetensors,
)
from ..files.weights import WeightFile, open_weights, opened, read_json
from ..hub import local
from ..parameters import changed, on_host, replaced
from ..tensors import TensorSpec, is_finite, variables
from .drawn_with import PUBLISHED, DrawnWith, difference_of, drawn_with, stated_by
from .lora_names import (
    COMPONENTS,
    NAMINGS,
    PEFT,
    Pair,
    Pairs,
    Place,
    component_of,
    is_lora,
    kohya_tensors,
    peft_tensors,
    place_of,
    targets,
    weights,
)
from .lora_settings import Noted, noted_in, scale_of, supported
from .names import Rows, swap
from .transformer_parts import CLASSES

FILES = tuple(
    f"{stem}.{form}"
    for stem in ("pytorch_lora_weights", "adapter_model")
    for form in ("safetensors", "bin")
)
_CONFIG = "adapter_config.json"  # where PEFT keeps its settings
_WRAPPERS = ("state_dict",)  # what trainers pickle a LoRA under


class LoraSummary(NamedTuple):
    """What a difference of two models became.

    Attributes:
      ranks: module, with its component -> rank.
      error: Frobenius norm of what the ranks leave out of those modules, relative to that of the
        whole difference.
      left_out: changed tensors that no LoRA can hold (biases, norms, embeddings).
    """

    ranks: dict[str, int]
    error: float
    left_out: list[str]


# ---- in ----


def holds_lora(path: Path | str) -> bool:
    """Whether a path is a LoRA file, or a folder with one."""
    path = local(path)
    if path.is_dir():
        return any((path / name).is_file() for name in FILES)
    try:
        return path.is_file() and is_lora(open_weights(path, wrappers=_WRAPPERS))
    except CheckpointError:
        return False  # whoever reads it as something else says what is wrong with it


def check_lora(path: Path | str) -> None:
    """Read all of a LoRA but its numbers, as `load_lora` does without knowing the model.

    Raises:
      CheckpointError: a damaged file, another kind of file, or settings that are not supported.
    """
    _read(opened(lora_file(path)))


def load_drawn_with(path: Path | str) -> DrawnWith:
    """What the images of a LoRA are drawn with, as it states, beside what `load_lora` reads of it.

    `load_drawn_with(path).applied(pipeline, path)` is a pipeline that draws so.

    Raises:
      CheckpointError: as for `check_lora`.
    """
    return _read(opened(lora_file(path)))[2]


def load_lora(path: Path | str, pipeline: Any) -> dict[str, dict[str, Pair]]:
    """Read a LoRA without merging it.

    Args:
      path: the file, or a folder with one of `FILES`; PEFT's `adapter_config.json` lies beside it.
      pipeline: a `StableDiffusionPipeline` of the model it was made for.

    Returns:
      component -> module path -> (A [r, in, ...], B [out, r, ...]) in float32 and PyTorch's layout,
      alpha/r folded into B: the change of the module's weight is B A.

    Raises:
      CheckpointError: a damaged file, another kind of file, modules that the pipeline lacks.
    """
    return _pairs(opened(lora_file(path)), pipeline)[0]


def _pairs(file: WeightFile, pipeline: Any) -> tuple[dict[str, dict[str, Pair]], DrawnWith]:
    path = file.path
    parts, noted, stated = _read(file)
    own = {name: targets(getattr(pipeline, name, None), name) for name in COMPONENTS}
    home = _home(path, noted, pipeline)
    pairs: dict[str, dict[str, Pair]] = {}
    unknown = []
    for (prefix, module), tensors in parts.items():
        name = component_of(prefix or home or _component(module, own, path), pipeline)
        if module not in own[name]:
            unknown.append(f"{name}.{module}")
            continue
        rows = own[name][module]
        of = next(iter(rows.parts)) if len(rows.parts) == 1 else module
        pair = _pair(tensors, noted.get(name, noted.get("")), of, f"{path}: {name}.{of}")
        for target, each in _cut(pair, rows, f"{path}: {name}.{of}").items():
            if target in pairs.setdefault(name, {}):
                raise CheckpointError(f"{path}: {name}.{target} is there under two names.")
            pairs[name][target] = each
    if unknown:
        raise CheckpointError(
            f"{path} does not fit this pipeline: {len(unknown)} unexpected: "
            f"{listing(sorted(unknown))}. It was made for another model."
        )
    return pairs, stated


def _cut(pair: Pair, rows: Rows, what: str) -> dict[str, Pair]:
    """What one pair is of each of the layers that it changes: A, and the layer's rows of B."""
    down, up = pair
    try:
        cuts = rows.cut(len(up))
    except ValueError as error:
        raise CheckpointError(f"{what} changes {error}, which do not divide so.") from error
    return {path: (down, swap(up) if rows.swapped else up[cut]) for path, cut in cuts.items()}


def merge_lora(
    pipeline: Any,
    path: Path | str,
    scale: float = 1.0,
    *,
    settings: DrawnWith | Mapping[str, Any] | str | None = None,
) -> Any:
    """The pipeline with a LoRA merged into its weights; it stays as it is.

    Args:
      pipeline: a `StableDiffusionPipeline` of the model it was made for.
      path: as for `load_lora`.
      scale: how much of it; sums are taken in float32 and stored in each parameter's own dtype.
      settings: that its images are drawn with, such as "urae-4k" (`drawn_with`), in place of those
        that it states.

    Raises:
      CheckpointError: as for `load_lora`, a change of another shape than the weight, no change, or
        settings that this pipeline has not.
      ValueError: settings that are none.
    """
    given = drawn_with(settings)
    file = opened(lora_file(path))
    changes = []  # whether each is one

    def sums(model: Any, name: str, pairs: dict[str, Pair]) -> Iterator[tuple[TensorSpec, Any]]:
        specs, slots = weights(model), variables(model)
        for module, pair in pairs.items():
            spec, change = specs[module], difference(*pair)
            if change.shape[:2] != spec.shape[:2] or change.size != np.prod(spec.shape):
                raise CheckpointError(
                    f"{path}: {name}.{module} changes a weight of shape {list(change.shape)}, this "
                    f"model's has {list(spec.shape)}. It was made for another model."
                )
            changes.append(bool(change.any()))
            old = spec.to_torch(on_host(slots[spec.path].get_value())).astype(np.float32)
            yield spec, old + np.float32(scale) * change.reshape(spec.shape)

    merged = {}
    found, stated = _pairs(file, pipeline)
    for name, pairs in found.items():
        model = getattr(pipeline, name)
        merged[name] = replaced(model, sums(model, name, pairs))
    if not any(changes):
        raise CheckpointError(
            f"{path} changes nothing: every product of its matrices is zero. It was not trained."
        )
    return (given or stated).applied(dataclasses.replace(pipeline, **merged), path)


def difference(down: np.ndarray, up: np.ndarray) -> np.ndarray:
    """B A for A [r, in, ...] and B [out, r, ...]: [out, in, ...]."""
    flat = up.reshape(up.shape[:2]) @ down.reshape(len(down), -1)
    return flat.reshape(len(up), *down.shape[1:])


def lora_file(path: Path | str) -> Path:
    """The file of a LoRA, given itself or its folder.

    Raises:
      CheckpointError: there is none.
    """
    path = local(path)
    if not path.is_dir():
        return path
    found = next((path / name for name in FILES if (path / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{path} holds none of {', '.join(FILES)}. Pass the file.")
    return found


def _read(
    file: WeightFile,
) -> tuple[dict[tuple[str, str], dict[str, StoredTensor]], dict[str, Noted], DrawnWith]:
    """(component or "", module) -> A, B, ... of it; PEFT's settings by component or ""; others."""
    path = file.path
    stored = file.tensors(_WRAPPERS)
    parts: dict[tuple[str, str], dict[str, StoredTensor]] = {}
    strange: dict[str, list[str]] = {}
    for key, tensor in stored.items():
        place = place_of(key)
        if not isinstance(place, Place):
            strange.setdefault(place, []).append(key)
            continue
        own = parts.setdefault((place.component, place.module), {})
        if place.kind in own:
            raise CheckpointError(f"{path} has {key} under two names.")
        own[place.kind] = tensor
    if strange or not parts:
        told = counted(strange) or "it is empty"
        raise CheckpointError(f"{path} is no LoRA that can be read: {told}.")
    for place, tensors in parts.items():
        if lost := [f"lora_{kind}" for kind in "AB" if kind not in tensors]:
            module = ".".join(filter(None, place))
            raise CheckpointError(f"{path}: {module} lacks {lost[0]}. The file is incomplete.")
    noted = noted_in(file)
    peft = [key for key in stored if key.startswith(PEFT)]
    if not noted and (peft or path.stem == "adapter_model"):
        config = path.parent / _CONFIG
        if config.is_file():
            noted = {"": supported(read_json(config), str(config))}
        elif path.stem == "adapter_model" and not any("alpha" in part for part in parts.values()):
            raise CheckpointError(
                f"{path} is PEFT's, which keeps the strength of a LoRA in {_CONFIG}: put that file "
                "beside it."
            )
    stated = stated_by(path, file.metadata, *noted.values())
    return parts, noted, stated or PUBLISHED.get(path.stem, stated)


def _home(path: Path, noted: Mapping[str, Noted], pipeline: Any) -> str | None:
    """The component that an adapter of one model belongs to, where its settings or folder tell."""
    mapping = noted.get("", {}).get("auto_mapping")
    kind = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    for name in COMPONENTS:
        if kind is not None and getattr(getattr(pipeline, name, None), "pytorch_class", 0) == kind:
            return name
    folder = path.resolve().parent.name
    return folder if folder in COMPONENTS else None


def _component(module: str, own: Mapping[str, Collection[str]], path: Path) -> str:
    """The component that has a module."""
    found = [name for name in COMPONENTS if module in own[name]]
    if len(found) > 1 and not {"unet", "transformer"} & set(found):
        raise CheckpointError(
            f"{path} does not tell whether it is for {' or '.join(found)}: put it into a folder of "
            "that name."
        )
    return found[0] if found else "unet"


def _pair(tensors: Mapping[str, StoredTensor], noted: Noted | None, module: str, what: str) -> Pair:
    """A and B of one module, checked, with what multiplies them in B."""
    arrays = {}
    for kind, tensor in tensors.items():
        if kind == "alpha":
            if int(np.prod(tensor.shape)) != 1:
                raise CheckpointError(f"{what}: alpha has shape {list(tensor.shape)}.")
        elif tensor.dtype not in FLOAT_TYPES:
            raise CheckpointError(f"{what}: {kind} is {tensor.dtype}, expected floating point.")
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(tensor.read()).astype(np.float32)
        if not values.size or not is_finite(values, "F32"):
            raise CheckpointError(f"{what}: {kind} is empty, or holds NaN or infinite values.")
        arrays[kind] = values
    down, up, rank = arrays["A"], arrays["B"], len(arrays["A"])
    if (mid := arrays.get("mid")) is not None:
        one = down.ndim in (2, 4) and down[0, 0].size == 1
        if not one or mid.ndim != 4 or mid.shape[:2] != (rank, rank):
            raise CheckpointError(
                f"{what} has A {list(down.shape)} and a middle {list(mid.shape)}; expected "
                "[r, in, 1, 1] and [r, r, h, w]."
            )
        down = np.einsum("ijhw,jc->ichw", mid, down.reshape(down.shape[:2]))
    fits = down.ndim in (2, 4) and up.ndim in (2, 4) and up.shape[1] == rank
    if not fits or up[0, 0].size != 1:
        raise CheckpointError(
            f"{what} has A {list(down.shape)} and B {list(up.shape)}; expected [r, in] and "
            "[out, r], or those of a convolution."
        )
    up = up.reshape(up.shape[:2] + (1,) * (down.ndim - 2))
    if "alpha" in arrays:
        scale = float(arrays["alpha"].reshape(())) / rank
    else:
        scale = scale_of(noted, rank, module, what)
    return down, up * np.float32(scale)


# ---- out ----


def save_lora(
    edited: Any,
    original: Any,
    path: Path | str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    naming: str = "peft",
    dtype: Any = None,
    force: bool = False,
) -> LoraSummary:
    """Write the difference of two models as a LoRA, by truncated singular value decomposition.

    By Eckart and Young (1936), no other matrices of that rank come nearer to the difference. Where
    the settings differ that images are drawn with (`drawn_with`), it states them.

    Args:
      edited, original: pipelines, UNets, transformers or text encoders of one architecture.
      path: the file, `.safetensors`.
      rank: of every module, or as much as the module has.
      energy: in place of the rank, the fraction in (0, 1] of each difference's squared norm that is
        kept, with the smallest rank that does.
      naming, dtype, force: as for `write_lora`.

    Raises:
      ValueError: neither or both of rank and energy, or a value out of range; other architectures.
      OutputError: no weight differs, `path` is occupied or unwritable; nothing is left on disk.
    """
    if (rank is None) == (energy is None):
        raise ValueError("save_lora takes rank= or energy=, one of them.")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be positive, received {rank}.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], received {energy}.")
    kind = _checked(naming, dtype)
    summary = LoraSummary({}, 0.0, [])
    pairs: dict[str, dict[str, Pair]] = {}
    whole = lost = 0.0
    for component, after, before in _components(edited, original):
        prefix = f"{component}." + getattr(after, "pytorch_prefix", "")
        layers = {spec.key for spec in weights(after).values()}
        for spec, new, old in changed(after, before, component):
            change = spec.to_torch(new).astype(np.float32) - spec.to_torch(old)
            if not np.isfinite(change).all():
                raise OutputError(f"{component}.{spec.key} holds NaN or infinite values.")
            if spec.key not in layers:
                summary.left_out.append(prefix + spec.key)
                continue
            module = spec.key.removesuffix(".weight")
            down, up, kept, norm = _truncated(change, rank, energy)
            summary.ranks[prefix + module] = len(down)
            whole, lost = whole + norm, lost + norm - kept
            pairs.setdefault(component, {})[module] = down, up
    if not pairs:
        told = f" but for {listing(summary.left_out)}" if summary.left_out else ""
        raise OutputError(f"the edited model equals the original{told}: a LoRA would be empty.")
    models = {component: after for component, after, _ in _components(edited, original)}
    stated = difference_of(edited, original)
    _write(pairs, models, path, stated, naming=naming, dtype=kind, force=force)
    return summary._replace(error=float(np.sqrt(max(lost, 0.0) / whole)))


def write_lora(
    pairs: Pairs,
    pipeline: Any,
    path: Path | str,
    *,
    naming: str = "peft",
    settings: DrawnWith | Mapping[str, Any] | str | None = None,
    dtype: Any = None,
    force: bool = False,
) -> None:
    """Write a LoRA that was kept apart, such as `load_lora` returns.

    Args:
      pairs: component -> module path -> (A, B), with everything that multiplies them.
      pipeline: of the model that it changes; only the names and sizes of its layers are read.
      path: the file, `.safetensors`.
      naming: "peft", as diffusers writes LoRAs, or "kohya", as most other programs do, in which
        FLUX's and SD 3's layers have their publishers' names.
      settings: that its images are drawn with, such as `load_drawn_with` returns.
      dtype: dtype to store; default float32.
      force: replace an existing file.

    Raises:
      ValueError: another naming or dtype, or settings that are none.
      OutputError: no pair, one of a layer that the pipeline lacks or that does not fit it, values
        that are not finite, or a path that is occupied or unwritable; nothing is left on disk.
    """
    kind = _checked(naming, dtype)
    models = {name: getattr(pipeline, name, None) for name in COMPONENTS}
    models = {name: model for name, model in models.items() if model is not None}
    for name, own in pairs.items():
        layers = weights(models[name]) if name in models else {}
        for module, (down, up) in own.items():
            shape = layers[module].shape if module in layers else ()
            if (len(up), *down.shape[1:]) != shape or up.shape[1] != len(down):
                raise OutputError(
                    f"{name}.{module} with A {list(down.shape)} and B {list(up.shape)} does not "
                    f"fit this pipeline, whose weight has shape {list(shape)}."
                )
    if not any(pairs.values()):
        raise OutputError("there is no pair of matrices to write: a LoRA would be empty.")
    _write(pairs, models, path, drawn_with(settings), naming=naming, dtype=kind, force=force)


def _checked(naming: str, dtype: Any) -> np.dtype:
    kind = np.dtype(np.float32 if dtype is None else dtype)
    if kind not in FLOAT_NAMES:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, received {dtype}.")
    if naming not in NAMINGS:
        raise ValueError(f"naming takes {NAMINGS}, received {naming!r}.")
    return kind


def _write(
    pairs: Pairs,
    models: Mapping[str, Any],
    path: Path | str,
    stated: DrawnWith,
    *,
    naming: str,
    dtype: np.dtype,
    force: bool,
) -> None:
    several = sum(name.startswith("text_encoder") for name in models) > 1
    tensors = []
    for name, own in pairs.items():
        cast = {
            module: (_cast(down, dtype, f"{name}.{module}"), _cast(up, dtype, f"{name}.{module}"))
            for module, (down, up) in own.items()
        }
        if naming == "peft":
            tensors += peft_tensors(name, models[name], cast)
        else:
            tensors += kohya_tensors(name, models[name], cast, several=several)
    with atomic_file(path, force=force) as partial:
        write_safetensors(partial, tensors, {"format": "pt", **stated.header})


def _cast(values: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(values).astype(dtype)
    if not is_finite(values, FLOAT_NAMES[dtype]):
        raise OutputError(f"{what} does not fit into {dtype.name}. Use float32.")
    return values


def _components(edited: Any, original: Any) -> list[tuple[str, Any, Any]]:
    if any(hasattr(edited, name) for name in ("unet", "transformer")):
        models = {name: getattr(edited, name, None) for name in COMPONENTS}
        return [
            (name, model, getattr(original, name, None))
            for name, model in models.items()
            if model is not None
        ]
    name = "text_encoder" if hasattr(edited, "final_layer_norm") else "unet"
    if getattr(edited, "pytorch_class", "") in CLASSES.values():
        name = "transformer"
    return [(name, edited, getattr(original, name, original))]


def _truncated(
    change: np.ndarray, rank: int | None, energy: float | None
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """A, B, and the squared norms of B A and of the change."""
    left, singular, right = np.linalg.svd(change.reshape(len(change), -1), full_matrices=False)
    squares = np.cumsum(singular.astype(np.float64) ** 2)
    if energy is not None:
        rank = int(np.searchsorted(squares, energy * squares[-1] * (1 - 1e-12))) + 1
    rank = min(rank or 1, len(singular))
    root = np.sqrt(singular[:rank])
    down = (root[:, None] * right[:rank]).reshape(rank, *change.shape[1:])
    up = (left[:, :rank] * root).reshape(len(change), rank, *[1] * (change.ndim - 2))
    return down, up, float(squares[rank - 1]), float(squares[-1])
