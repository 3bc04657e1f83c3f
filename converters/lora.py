"""LoRA files (Hu et al. 2021): read under three programs' names, merged, kept apart, and written.

A LoRA changes the weight W [out, in] of a layer to W + scale * alpha/r * B A, with A [r, in] and
B [out, r]; for a convolution A is [r, in, h, w] and B is [out, r, 1, 1].  The names are

* PEFT's: `unet.<module>.lora_A.weight`, `.lora_B.weight` (what diffusers writes);
* diffusers' older: `unet.<module>.lora.down.weight`, `<attention>.processor.to_q_lora.up.weight`;
* kohya's: `lora_unet_<module, with _ for .>.lora_down.weight`, with `.alpha`; the module may also
  have CompVis's name.

In the file alpha may be a tensor (kohya) or be noted in the header (PEFT); without either it is r.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from .compvis_names import renamed
from .compvis_parts import unet_names_of
from .errors import CheckpointError, OutputError, listing
from .output import atomic_file
from .parameters import on_host
from .safetensors_file import (
    FLOAT_NAMES,
    FLOAT_TYPES,
    PendingTensor,
    StoredTensor,
    read_metadata,
    write_safetensors,
)
from .tensors import TensorSpec, is_finite, tensor_specs, variables
from .weights import open_weights

FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
_KEY = re.compile(
    r"(?P<module>.+?)(?:\.lora_(?P<peft>A|B)(?:\.default(?:_\d+)?)?\.weight"
    r"|(?:\.lora|\.lora_linear_layer|(?P<processor>_lora))\.(?P<old>down|up)\.weight"
    r"|\.lora_(?P<kohya>down|up)\.weight|(?P<alpha>\.alpha))"
)
# What a module's name begins with -> the pipeline's component.
_PREFIXES = {
    "unet.": "unet", "text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2",
    "lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}  # fmt: skip
_TEXT = "text_model."
_HEADER = "lora_adapter_metadata"  # where diffusers notes PEFT's settings

Pair = tuple[np.ndarray, np.ndarray]


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
    """Whether tensors with these names are a LoRA, of whatever program."""
    return any((found := _KEY.fullmatch(key)) and not found["alpha"] for key in keys)


def holds_lora(path: Path | str) -> bool:
    """Whether a path is a LoRA file, or a folder with one."""
    path = Path(path).expanduser()
    if path.is_dir():
        return any((path / name).is_file() for name in FILES)
    try:
        return path.is_file() and is_lora(open_weights(path))
    except CheckpointError:
        return False  # whoever reads it as something else says what is wrong with it


def load_lora(path: Path | str, pipeline: Any) -> dict[str, dict[str, Pair]]:
    """Read a LoRA without merging it.

    Args:
      path: the file, or a folder with `pytorch_lora_weights.safetensors`.
      pipeline: a `StableDiffusionPipeline` of the model it was made for.

    Returns:
      component -> module path -> (A [r, in, ...], B [out, r, ...]) in float32 and PyTorch's layout,
      alpha/r folded into B: the change of the module's weight is B A.

    Raises:
      CheckpointError: a damaged file, another kind of file, modules that the pipeline lacks.
    """
    path = lora_file(path)
    stored = open_weights(path)
    noted = _noted_alphas(path)
    parts: dict[tuple[str, str], dict[str, StoredTensor]] = {}
    strange = []
    for key, tensor in stored.items():
        found = _KEY.fullmatch(key)
        if found is None:
            strange.append(key)
            continue
        down = found["peft"] == "A" or "down" in (found["old"], found["kohya"])
        kind = "alpha" if found["alpha"] else "A" if down else "B"
        place = _place(found["module"], processor=bool(found["processor"]))
        if kind in parts.setdefault(place, {}):
            raise CheckpointError(f"{path} has {key} under two names.")
        parts[place][kind] = tensor
    if strange:
        raise CheckpointError(
            f"{path} is no LoRA that can be read: {len(strange)} unexpected: "
            f"{listing(sorted(strange))}. LoHa, LoKr, DoRA and other relatives are not supported."
        )

    pairs: dict[str, dict[str, Pair]] = {}
    targets = {name: _targets(pipeline, name) for name in sorted({name for name, _ in parts})}
    unknown = sorted(f"{name}.{module}" for name, module in parts if module not in targets[name])
    if unknown:
        raise CheckpointError(
            f"{path} does not fit this pipeline: {len(unknown)} unexpected: {listing(unknown)}. It "
            "was made for another model."
        )
    for (name, module), tensors in parts.items():
        target = targets[name][module]
        what = f"{path}: {name}.{target}"
        if target in pairs.setdefault(name, {}):
            raise CheckpointError(f"{what} is there under two names.")
        pairs[name][target] = _pair(tensors, noted.get(name), module, what)
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
    merged = {}
    for name, pairs in load_lora(path, pipeline).items():
        model = nnx.clone(getattr(pipeline, name))
        specs = _weights(model)
        slots = variables(model)
        for module, pair in pairs.items():
            spec = specs[module]
            change = difference(*pair)
            flat = change.shape[:2] == spec.shape[:2] and change.size == np.prod(spec.shape)
            if not flat:
                raise CheckpointError(
                    f"{path}: {name}.{module} changes a weight of shape {list(change.shape)}, this "
                    f"model's has {list(spec.shape)}. It was made for another model."
                )
            slot = slots[spec.path]
            old = slot.get_value()
            new = spec.to_torch(on_host(old)).astype(np.float32)
            new += np.float32(scale) * change.reshape(spec.shape)
            new = spec.to_nnx(new).astype(old.dtype, order="C")
            slot.set_value(jax.device_put(new, getattr(old, "sharding", None)))
        merged[name] = model
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
    path = Path(path).expanduser()
    if path.is_dir():
        found = next((path / name for name in FILES if (path / name).is_file()), None)
        if found is None:
            raise CheckpointError(f"{path} holds neither {' nor '.join(FILES)}. Pass the file.")
        return found
    return path


def _place(module: str, *, processor: bool) -> tuple[str, str]:
    """The component, and the module's name in it as the file has it."""
    module = module.removeprefix("base_model.model.")
    component = "unet"
    for prefix, name in _PREFIXES.items():
        if module.startswith(prefix):
            component, module = name, module.removeprefix(prefix)
            break
    if processor:
        module = module.replace(".processor.", ".")
        module += ".0" if module.endswith(".to_out") else ""
    if component != "unet":
        module = module.removeprefix(_TEXT).removeprefix(_TEXT.replace(".", "_"))
    return component, module


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
    modules = list(_weights(model))
    names = {module.replace(".", "_"): module for module in modules}
    if component == "unet":
        back = {new: old for old, new in unet_names_of(model.config.to_dict()).items()}
        for module in modules:
            if (old := renamed(module, back)) is not None:
                names |= {old: module, old.replace(".", "_"): module}
    return names | {module: module for module in modules}


def _noted_alphas(path: Path) -> dict[str, dict[str, Any]]:
    """PEFT's settings by component, where the header has them."""
    if path.suffix != ".safetensors":
        return {}
    try:
        settings = json.loads(read_metadata(path).get(_HEADER, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the {_HEADER} in its header is no JSON.") from error
    noted: dict[str, dict[str, Any]] = {}
    for name, value in settings.items() if isinstance(settings, dict) else ():
        component, _, setting = name.partition(".")
        noted.setdefault(component, {})[setting] = value
    for component, own in noted.items():
        odd = [name for name in ("use_dora", "use_rslora", "lora_bias", "alpha_pattern")
               if own.get(name)]  # fmt: skip
        if odd:
            raise CheckpointError(
                f"{path} was trained with {listing(odd)} ({component}), which is not supported."
            )
    return noted


def _pair(
    tensors: Mapping[str, StoredTensor], noted: Mapping[str, Any] | None, module: str, what: str
) -> Pair:
    """A and B of one module, checked, with alpha/r in B."""
    lost = [f"lora_{kind}" for kind in "AB" if kind not in tensors]
    if lost:
        raise CheckpointError(f"{what} lacks {lost[0]}. The file is incomplete.")
    arrays = {}
    for kind, tensor in tensors.items():
        if tensor.dtype not in FLOAT_TYPES:
            raise CheckpointError(f"{what}: {kind} is {tensor.dtype}, expected floating point.")
        values = np.ascontiguousarray(tensor.read())
        if not is_finite(values, tensor.dtype) or not values.size:
            raise CheckpointError(f"{what}: {kind} is empty, or holds NaN or infinite values.")
        arrays[kind] = values.astype(np.float32)
    down, up = arrays["A"], arrays["B"]
    fits = down.ndim in (2, 4) and up.ndim == down.ndim and up.shape[1] == len(down)
    if not fits or up[0, 0].size != 1:
        raise CheckpointError(
            f"{what} has A {list(down.shape)} and B {list(up.shape)}; expected [r, in] and "
            "[out, r], or those of a convolution."
        )
    rank = len(down)
    alpha: Any = rank
    if "alpha" in arrays:
        if arrays["alpha"].size != 1:
            raise CheckpointError(f"{what}: alpha has shape {list(arrays['alpha'].shape)}.")
        alpha = float(arrays["alpha"].reshape(()))
    elif noted and isinstance(noted.get("lora_alpha"), int | float):
        alpha = noted["lora_alpha"]
    return down, up * np.float32(alpha / rank)


# ---- out ----


def save_lora(
    edited: Any, original: Any, path: Path | str, *, rank: int | None = None,
    energy: float | None = None, dtype: Any = None, force: bool = False,
) -> LoraSummary:  # fmt: skip
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
        for spec, change in _changes(after, before, component):
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
                key = f"{module}.{name}.weight"
                tensors.append(PendingTensor(key, kind, values.shape, lambda values=values: values))
    if not tensors:
        told = f" but for {listing(summary.left_out)}" if summary.left_out else ""
        raise OutputError(f"the edited model equals the original{told}: a LoRA would be empty.")
    with atomic_file(path, force=force) as partial:
        write_safetensors(partial, tensors, {"format": "pt"})
    return summary._replace(error=float(np.sqrt(max(lost, 0.0) / whole)))


def _components(edited: Any, original: Any) -> list[tuple[str, Any, Any]]:
    names = ("unet", "text_encoder", "text_encoder_2")
    if hasattr(edited, "unet"):
        return [
            (name, getattr(edited, name), getattr(original, name, None))
            for name in names
            if getattr(edited, name, None) is not None
        ]
    name = "text_encoder" if hasattr(edited, "final_layer_norm") else "unet"
    return [(name, edited, getattr(original, name, original))]


def _changes(after: Any, before: Any, name: str) -> Any:
    """Each tensor that differs, with the difference in float32 and PyTorch's layout."""
    specs, new = tensor_specs(after), variables(after)
    old = {} if before is None else variables(before)
    if before is None or {s.key: s.shape for s in specs} != {
        s.key: s.shape for s in tensor_specs(before)
    }:
        raise ValueError(f"the edited {name} and the original's are not of one architecture.")
    for spec in specs:
        one, other = (on_host(slots[spec.path].get_value()) for slots in (new, old))
        if not np.array_equal(one, other):
            change = spec.to_torch(one).astype(np.float32) - spec.to_torch(other)
            if not np.isfinite(change).all():
                raise OutputError(f"{name}.{spec.key} holds NaN or infinite values.")
            yield spec, change


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
