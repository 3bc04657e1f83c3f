"""LoRA files (Hu et al. 2021): read under many programs' names, merged, kept apart, and written.

A LoRA changes the weight W [out, in] of a layer to W + scale * alpha/r * B A, with A [r, in] and
B [out, r]; for a convolution A is [r, in, h, w] and B is [out, r, 1, 1], or, in three parts, A is
[r, in, 1, 1] with a middle [r, r, h, w].  The names are

* PEFT's: `unet.<module>.lora_A.weight`, `.lora_B.weight` (what diffusers writes), or with
  `base_model.model.` in front, of a model that the settings beside the file tell;
* diffusers' older: `unet.<module>.lora.down.weight`, `<attention>.processor.to_q_lora.up.weight`;
* kohya's and OneTrainer's: `lora_unet_<module, with _ for .>.lora_down.weight`, with `.alpha`;
* ComfyUI's: `diffusion_model.<module>`, `clip_l.transformer.<module>`.

A module of the UNet may also have CompVis's name.  Alpha may be a tensor (kohya), or be noted in
the file's header (diffusers) or in `adapter_config.json` (PEFT); without any of them it is r.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import CheckpointError, OutputError, counted, listing
from ..files.output import atomic_file
from ..files.safetensors_file import (
    FLOAT_NAMES,
    FLOAT_TYPES,
    PendingTensor,
    StoredTensor,
    write_safetensors,
)
from ..files.weights import WeightFile, open_weights, opened, read_json
from ..hub import local
from ..parameters import changed, on_host, replaced
from ..tensors import TensorSpec, is_finite, tensor_specs, variables
from .compvis_parts import unet_names_of
from .names import renamed

FILES = tuple(
    f"{stem}.{form}"
    for stem in ("pytorch_lora_weights", "adapter_model")
    for form in ("safetensors", "bin")
)
_KEY = re.compile(
    r"(?P<module>.+?)(?:\.lora_(?P<new>A|B|down|mid|up)(?:(?:\.[^.]+)?\.weight)?"
    r"|(?:\.lora|\.lora_linear_layer|_lora)\.(?P<old>down|up|alpha)(?:\.weight)?"
    r"|\.(?P<alpha>alpha))"
)
_KINDS = {"A": "A", "down": "A", "B": "B", "up": "B", "mid": "mid", "alpha": "alpha"}
# What else such files hold, none of which is read.
_RELATIVES = {
    "LoHa": r".+\.hada_.+",
    "LoKr": r".+\.lokr_.+",
    "GLoRA": r"lora_.+\.[ab][12]\.weight",
    "DoRA": r".+\.(dora_scale|lora_magnitude_vector.*)",
    "OFT": r".+\.b?oft_.+",
    "IA3": r".+\.(on_input|ia3_l.*)",
    "VeRA": r".+\.vera_.+",
    "LoRA of embeddings": r".+\.lora_embedding_[AB].*",
    "LoRA with biases": r".+\.lora_(B|up)(\..+)?\.bias",
    "whole differences": r".+\.diff(_b)?",
    "embeddings within a LoRA": r"bundle_emb\..+",
}
# What a module's name begins with -> the pipeline's component.
_PREFIXES = {
    r"unet\.|lora_unet_|(model\.)?diffusion_model\.": "unet",
    r"text_encoder\.|lora_te1?_|(text_encoders\.)?clip_[lh]\.(transformer\.)?": "text_encoder",
    r"text_encoder_2\.|lora_te2_|(text_encoders\.)?clip_g\.(transformer\.)?": "text_encoder_2",
}
_COMPONENTS = tuple(_PREFIXES.values())
_PEFT = "base_model.model."
_TEXT = "text_model."
# The attention of text encoders, by diffusers' names of 2023.
_TEXT_2023 = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
_HEADER = "lora_adapter_metadata"  # where diffusers notes PEFT's settings
_CONFIG = "adapter_config.json"  # where PEFT does
# PEFT's settings that make of a LoRA something else; what is not named here serves training alone.
_REFUSED = re.compile(
    r"use_(dora|qalora|bdlora)|lora_bias|fan_in_fan_out|modules_to_save|layer_replication"
    r"|trainable_token_indices|target_parameters|(megatron|arrow)_config|alora_invocation_tokens"
)
_OTHER_BASES = ("pissa", "olora", "loftq", "corda", "lora_ga")  # initializations that change it
_PEFT_ALPHA = 8  # PEFT's own, where its settings name none
_MAX_PATTERN = 300

_WRAPPERS = ("state_dict",)  # what trainers pickle a LoRA under

Pair = tuple[np.ndarray, np.ndarray]
Noted = dict[str, Any]  # PEFT's settings


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


def is_lora(keys: Any) -> bool:
    """Whether tensors with these names are a LoRA, or a relative of it, of whatever program."""
    return any(
        ((found := _KEY.fullmatch(key)) and found["alpha"] is None) or _relative(key)
        for key in keys
    )


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
    _read(lora_file(path))


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
    path = lora_file(path)
    parts, noted = _read(path)
    targets = {name: _targets(pipeline, name) for name in _COMPONENTS}
    home = _home(path, noted, pipeline)
    pairs: dict[str, dict[str, Pair]] = {}
    unknown = []
    for (prefix, module), tensors in parts.items():
        name = prefix or home or _component(module, targets, path)
        if module not in targets[name]:
            unknown.append(f"{name}.{module}")
            continue
        target = targets[name][module]
        what = f"{path}: {name}.{target}"
        if target in pairs.setdefault(name, {}):
            raise CheckpointError(f"{what} is there under two names.")
        pairs[name][target] = _pair(tensors, noted.get(name, noted.get("")), target, what)
    if unknown:
        raise CheckpointError(
            f"{path} does not fit this pipeline: {len(unknown)} unexpected: "
            f"{listing(sorted(unknown))}. It was made for another model."
        )
    return pairs


def merge_lora(pipeline: Any, path: Path | str, scale: float = 1.0) -> Any:
    """The pipeline with a LoRA merged into its weights; it stays as it is.

    Args:
      pipeline: a `StableDiffusionPipeline` of the model it was made for.
      path: as for `load_lora`.
      scale: how much of it; sums are taken in float32 and stored in each parameter's own dtype.

    Raises:
      CheckpointError: as for `load_lora`, or a change of another shape than the weight.
    """

    def sums(model: Any, name: str, pairs: dict[str, Pair]) -> Iterator[tuple[TensorSpec, Any]]:
        specs, slots = _weights(model), variables(model)
        for module, pair in pairs.items():
            spec, change = specs[module], difference(*pair)
            if change.shape[:2] != spec.shape[:2] or change.size != np.prod(spec.shape):
                raise CheckpointError(
                    f"{path}: {name}.{module} changes a weight of shape {list(change.shape)}, this "
                    f"model's has {list(spec.shape)}. It was made for another model."
                )
            old = spec.to_torch(on_host(slots[spec.path].get_value())).astype(np.float32)
            yield spec, old + np.float32(scale) * change.reshape(spec.shape)

    merged = {}
    for name, pairs in load_lora(path, pipeline).items():
        model = getattr(pipeline, name)
        merged[name] = replaced(model, sums(model, name, pairs))
    return dataclasses.replace(pipeline, **merged)


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


def _relative(key: str) -> str | None:
    """What a tensor of this name belongs to, if it is one of `_RELATIVES`."""
    return next((kind for kind, form in _RELATIVES.items() if re.fullmatch(form, key)), None)


def _read(path: Path) -> tuple[dict[tuple[str, str], dict[str, StoredTensor]], dict[str, Noted]]:
    """(component or "", module) -> A, B, ... of it; and the settings by component or ""."""
    file = opened(path)
    stored = file.tensors(_WRAPPERS)
    parts: dict[tuple[str, str], dict[str, StoredTensor]] = {}
    strange: dict[str, list[str]] = {}
    for key, tensor in stored.items():
        found, kind = _KEY.fullmatch(key), _relative(key)
        if kind is not None or found is None:
            told = "unexpected" if kind is None else f"of {kind}, which is not supported"
            strange.setdefault(told, []).append(key)
            continue
        kind = _KINDS[found["new"] or found["old"] or found["alpha"]]
        place = _place(found["module"])
        if kind in parts.setdefault(place, {}):
            raise CheckpointError(f"{path} has {key} under two names.")
        parts[place][kind] = tensor
    if strange or not parts:
        told = counted(strange) or "it is empty"
        raise CheckpointError(f"{path} is no LoRA that can be read: {told}.")
    for place, tensors in parts.items():
        if lost := [f"lora_{kind}" for kind in "AB" if kind not in tensors]:
            module = ".".join(filter(None, place))
            raise CheckpointError(f"{path}: {module} lacks {lost[0]}. The file is incomplete.")
    noted = _noted(file)
    peft = [key for key in stored if key.startswith(_PEFT)]
    if not noted and (peft or path.stem == "adapter_model"):
        config = path.parent / _CONFIG
        if config.is_file():
            noted = {"": _supported(read_json(config), str(config))}
        elif path.stem == "adapter_model" and not any("alpha" in part for part in parts.values()):
            raise CheckpointError(
                f"{path} is PEFT's, which keeps the strength of a LoRA in {_CONFIG}: put that file "
                "beside it."
            )
    return parts, noted


def _place(module: str) -> tuple[str, str]:
    """The component, "" where the name does not tell, and the module's name in it."""
    module = module.removeprefix(_PEFT).replace(".processor.", ".")
    for prefix, name in _PREFIXES.items():
        if found := re.match(prefix, module):
            return name, module[found.end() :]
    return "", module


def _home(path: Path, noted: Mapping[str, Noted], pipeline: Any) -> str | None:
    """The component that an adapter of one model belongs to, where its settings or folder tell."""
    mapping = noted.get("", {}).get("auto_mapping")
    kind = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    for name in _COMPONENTS:
        if kind is not None and getattr(getattr(pipeline, name, None), "pytorch_class", 0) == kind:
            return name
    folder = path.resolve().parent.name
    return folder if folder in _COMPONENTS else None


def _component(module: str, targets: Mapping[str, Mapping[str, str]], path: Path) -> str:
    """The component that has a module."""
    found = [name for name in _COMPONENTS if module in targets[name]]
    if len(found) > 1 and "unet" not in found:
        raise CheckpointError(
            f"{path} does not tell whether it is for {' or '.join(found)}: put it into a folder of "
            "that name."
        )
    return found[0] if found else "unet"


def _weights(model: Any) -> dict[str, TensorSpec]:
    """The weights of linear and convolutional layers by module path."""
    specs = tensor_specs(model)
    return {
        spec.key.removesuffix(".weight"): spec
        for spec in specs
        if spec.key.endswith(".weight") and spec.axes != tuple(range(len(spec.axes)))
    }


def _targets(pipeline: Any, component: str) -> dict[str, str]:
    """Every name that a file may have for a module -> its path."""
    model = getattr(pipeline, component, None)
    if model is None:
        return {}
    back: dict[str, str] = {}
    if component == "unet":
        back = {new: old for old, new in unet_names_of(model.config.to_dict()).items()}
    targets: dict[str, str] = {}
    for module in _weights(model):
        bare = module.removeprefix(_TEXT)
        *inside, last = bare.rsplit(".", 1)
        names = [bare, bare.removesuffix(".0"), renamed(bare, back) or bare]
        if inside and inside[0].endswith("self_attn"):
            names.append(f"{inside[0]}.{_TEXT_2023[last]}")
        if component != "unet":
            names += [_TEXT + name for name in names]
        for name in names:
            targets |= {name: module, name.replace(".", "_"): module}
    return targets


def _noted(file: WeightFile) -> dict[str, Noted]:
    """PEFT's settings by component, or "" of a model alone, where the header has them."""
    path = file.path
    try:
        settings = json.loads(file.metadata.get(_HEADER, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the {_HEADER} in its header is no JSON.") from error
    noted: dict[str, Noted] = {}
    for name, value in settings.items() if isinstance(settings, dict) else ():
        component, _, setting = name.partition(".")
        if component not in _COMPONENTS:
            component, setting = "", name
        noted.setdefault(component, {})[setting] = value
    return {
        name: _supported(own, str(path), f" ({name})" if name else "")
        for name, own in noted.items()
    }


def _supported(settings: Noted, source: str, where: str = "") -> Noted:
    """PEFT's settings, if the LoRA is one that W + alpha/r B A describes."""
    odd = [name for name, value in settings.items() if value and _REFUSED.fullmatch(name)]
    if settings.get("bias") not in (None, "none"):
        odd.append(f"bias={settings['bias']!r}")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASES):
        odd.append(f"init_lora_weights={start!r}")
    kind = settings.get("peft_type")
    if kind is not None and str(kind).upper().removeprefix("PEFTTYPE.") != "LORA":
        odd.append(f"peft_type={kind!r}")
    if odd:
        raise CheckpointError(
            f"{source} was trained with {listing(odd)}{where}, which is not supported."
        )
    patterns = {name: settings.get(name) or {} for name in ("alpha_pattern", "rank_pattern")}
    numbers = {name: settings.get(name, _PEFT_ALPHA) for name in ("lora_alpha", "r")}
    for name, value in (numbers | patterns).items():
        values = list(value.values()) if name in patterns and isinstance(value, dict) else [value]
        if not all(map(_is_number, values)):
            raise CheckpointError(f"{source}: {name} is {str(value)[:80]!r}, expected numbers.")
    return {**settings, **patterns}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _setting(noted: Noted, pattern: str, default: Any, module: str, what: str) -> Any:
    """A setting of a module: the first pattern that its name ends with, or the default."""
    for form, value in noted[pattern].items():
        try:
            if len(form) <= _MAX_PATTERN and re.match(rf"(.*\.)?({form})$", module):
                return value
        except re.error as error:
            raise CheckpointError(f"{what}: {pattern} has {form[:80]!r}: {error}.") from error
    return default


def _scale(noted: Noted | None, rank: int, module: str, what: str) -> float:
    """What B A is multiplied by, where no tensor says so."""
    if noted is None:
        return 1.0
    module = _TEXT + module if module.startswith(("encoder.", "embeddings.")) else module
    alpha = _setting(noted, "alpha_pattern", noted.get("lora_alpha", _PEFT_ALPHA), module, what)
    told = _setting(noted, "rank_pattern", noted.get("r"), module, what)
    if told not in (None, rank):
        raise CheckpointError(f"{what} has rank {rank}, and its settings say {told}.")
    return alpha / (np.sqrt(rank) if noted.get("use_rslora") else rank)


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
        scale = _scale(noted, rank, module, what)
    return down, up * np.float32(scale)


# ---- out ----


def save_lora(
    edited: Any,
    original: Any,
    path: Path | str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: Any = None,
    force: bool = False,
) -> LoraSummary:
    """Write the difference of two models as a LoRA, by truncated singular value decomposition.

    By Eckart and Young (1936), no other matrices of that rank come nearer to the difference.

    Args:
      edited, original: pipelines, UNets or text encoders of one architecture.
      path: the file, `.safetensors`, with PEFT's names as diffusers writes them.
      rank: of every module, or as much as the module has.
      energy: in place of the rank, the fraction in (0, 1] of each difference's squared norm that is
        kept, with the smallest rank that does.
      dtype: dtype to store; default float32.
      force: replace an existing file.

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
    kind = np.dtype(np.float32 if dtype is None else dtype)
    if kind not in FLOAT_NAMES:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, received {dtype}.")
    summary = LoraSummary({}, 0.0, [])
    tensors: list[PendingTensor] = []
    whole = lost = 0.0
    for component, after, before in _components(edited, original):
        prefix = f"{component}." + getattr(after, "pytorch_prefix", "")
        weights = {spec.key for spec in _weights(after).values()}
        for spec, new, old in changed(after, before, component):
            change = spec.to_torch(new).astype(np.float32) - spec.to_torch(old)
            if not np.isfinite(change).all():
                raise OutputError(f"{component}.{spec.key} holds NaN or infinite values.")
            if spec.key not in weights:
                summary.left_out.append(prefix + spec.key)
                continue
            module = prefix + spec.key.removesuffix(".weight")
            down, up, kept, norm = _truncated(change, rank, energy)
            summary.ranks[module] = len(down)
            whole, lost = whole + norm, lost + norm - kept
            for name, values in (("lora_A", down), ("lora_B", up)):
                values = values.astype(kind)
                if not is_finite(values, FLOAT_NAMES[kind]):
                    raise OutputError(f"{module} does not fit into {kind.name}. Use float32.")
                tensors.append(PendingTensor.of(f"{module}.{name}.weight", values))
    if not tensors:
        told = f" but for {listing(summary.left_out)}" if summary.left_out else ""
        raise OutputError(f"the edited model equals the original{told}: a LoRA would be empty.")
    with atomic_file(path, force=force) as partial:
        write_safetensors(partial, tensors, {"format": "pt"})
    return summary._replace(error=float(np.sqrt(max(lost, 0.0) / whole)))


def _components(edited: Any, original: Any) -> list[tuple[str, Any, Any]]:
    if hasattr(edited, "unet"):
        models = {name: getattr(edited, name, None) for name in _COMPONENTS}
        return [
            (name, model, getattr(original, name, None))
            for name, model in models.items()
            if model is not None
        ]
    name = "text_encoder" if hasattr(edited, "final_layer_norm") else "unet"
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
