"""8-bit weights with scales of their own, read as what they stand for.

ComfyUI and others keep a weight W as 8-bit numbers beside a scale s, one number or one for each
row: `<module>.weight` and `<module>.scale_weight` (later `.weight_scale`), with W s for the values.
An empty `scaled_fp8` marks such a file, `.comfy_quant` says in JSON which form a module has, and
`.scale_input` (`.input_scale`) serves only those who multiply in 8 bits.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import CheckpointError, listing
from .safetensors_file import FLOAT_TYPES, StoredTensor, parse_json

_BESIDE = re.compile(
    r"(?P<module>.+)\.(?:(?P<scale>scale_weight|weight_scale)|(?P<form>comfy_quant)"
    r"|scale_input|input_scale)"
)
_MARKER = re.compile(r"(.+\.)?scaled_fp8")
_FORMS = ("float8_e4m3fn", "float8_e5m2")
_MOST = 4096  # bytes of a module's settings
# Forms that are not read -> what their keys match.
_UNKNOWN = {
    "bitsandbytes's 4 bits": r".+\.quant_state\.bitsandbytes__.+",
    "bitsandbytes's 8 bits": r".+\.SCB",
    "GPTQ or AWQ": r".+\.qweight",
    "two scales (NVFP4)": r".+\.weight_scale_2",
}


def dequantized(stored: Mapping[str, StoredTensor], path: Path) -> dict[str, StoredTensor]:
    """The tensors, those with scales as float32, which their values become as they are read.

    Args:
      stored: as they are in a file.
      path: the file, for messages.

    Raises:
      CheckpointError: a form of quantization that is not read here, or scales that fit no weight.
    """
    for what, form in _UNKNOWN.items():
        if odd := [key for key in stored if re.fullmatch(form, key)]:
            raise _unknown(path, what, odd)
    beside = {key: match for key in stored if (match := _BESIDE.fullmatch(key))}
    markers = {key for key in stored if _MARKER.fullmatch(key)}
    if not markers and not any(f"{m['module']}.weight" in stored for m in beside.values()):
        return dict(stored)
    tensors = {k: t for k, t in stored.items() if k not in beside and k not in markers}
    for key, match in beside.items():
        tensor, weight = stored[key], f"{match['module']}.weight"
        if match["form"]:
            _require_known(tensor, path, key)
        elif match["scale"]:
            if weight not in tensors:
                raise CheckpointError(f"{path} holds {key}, and no {weight} that it scales.")
            tensors[weight] = _scaled(tensors[weight], tensor, f"{path}: {key}")
    return tensors


def _unknown(path: Path, what: str, keys: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} is quantized in a form that is not read here: {what} ({listing(keys)}). Use a "
        "file in float16, bfloat16, 8 bits with scales, or GGUF."
    )


def _require_known(tensor: StoredTensor, path: Path, key: str) -> None:
    """Refuse settings of a module that ask for more than one scale."""
    text = b""
    if tensor.dtype == "U8" and len(tensor.shape) == 1 and tensor.shape[0] <= _MOST:
        text = tensor.read().tobytes()
    form = parse_json(text, f"{path}: {key}").get("format")
    if form not in _FORMS:
        raise _unknown(path, repr(form)[:80], [key])


def _scaled(weight: StoredTensor, scale: StoredTensor, what: str) -> StoredTensor:
    rows = weight.shape[:1]
    one = int(np.prod(scale.shape, dtype=object)) == 1
    each = scale.shape[:1] == rows and set(scale.shape[1:]) <= {1}
    floats = weight.dtype in FLOAT_TYPES and scale.dtype in FLOAT_TYPES
    if not (floats and weight.shape and (one or each)):
        raise CheckpointError(
            f"{what} is {scale.dtype} {list(scale.shape)}, which scales no {weight.dtype} weight "
            f"of shape {list(weight.shape)}: expected one floating-point number, or one a row."
        )
    name = f"{weight.dtype} with scales" if weight.dtype.startswith("F8") else ""
    cut = lambda part: _product(weight.rows(part), scale if one else scale.rows(part))  # noqa: E731
    read = functools.partial(_product, weight, scale)
    told = {"kept": name or weight.kept, "width": weight.bytes_each}
    return dataclasses.replace(weight, dtype="F32", read=read, cut=cut, **told)


def _product(weight: StoredTensor, scale: StoredTensor) -> np.ndarray:
    factors = np.ascontiguousarray(scale.read()).astype(np.float32)
    factors = factors.reshape(-1, *[1] * (len(weight.shape) - 1))
    values = np.ascontiguousarray(weight.read()).astype(np.float32)
    return np.multiply(values, factors, out=values)
