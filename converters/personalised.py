"""What personalising leaves behind, in the files that diffusers and the authors exchange.

* Textual inversion: one file per token, `{"<new1>": [dim]}`, for `pipe.load_textual_inversion`.
* Custom Diffusion and ClassDiffusion: `pytorch_custom_diffusion_weights.bin`, the trained part of
  the cross-attention under the names of diffusers' attention processors, with an empty dict for
  each self-attention, for `unet.load_attn_procs(folder, weight_name=CUSTOM_DIFFUSION,
  _pipeline=pipe)`; without `_pipeline` diffusers 0.29 and later ignore it in silence.
* Custom Diffusion's first form, `delta.bin`: `{"unet": {...}, "modifier_token": {...}}`.

The authors' safe form of the first has safetensors bytes under a `.bin` name, so the content of a
file decides, not its suffix.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from .errors import CheckpointError, OutputError, listing
from .safetensors_file import (
    FLOAT_NAMES,
    FLOAT_TYPES,
    PendingTensor,
    open_safetensors,
    write_safetensors,
)
from .tensors import TensorSpec, is_finite, tensor_specs, variables
from .weights import load_pickle, tensor_values

CUSTOM_DIFFUSION = "pytorch_custom_diffusion_weights.bin"
_PART = "_custom_diffusion"
# What each `trained` part of the cross-attention holds.
_TRAINED = {
    "crossattn_kv": ("*.attn2.to_k.*", "*.attn2.to_v.*"),
    "crossattn": ("*.attn2.*",),
}
Array = Any


class Personalisation(NamedTuple):
    """New tokens with their embeddings, and UNet tensors by their state-dict key."""

    rows: dict[str, np.ndarray]
    unet: dict[str, np.ndarray]


# ---- out ----


def save_textual_inversion(rows: Mapping[str, Array], folder: Path | str) -> list[Path]:
    """Write one safetensors file per token, named for it, into an existing folder.

    Args:
      rows: token -> embedding [dim], float32, float16 or bfloat16.
      folder: where to.

    Returns:
      the files.

    Raises:
      OutputError: a token that is no file name, or an embedding that is NaN or infinite.
    """
    files = []
    for token, row in rows.items():
        path = Path(folder) / embedding_file(token)
        values = _finite(np.asarray(row), token)
        pending = PendingTensor(token, values.dtype, values.shape, lambda values=values: values)
        write_safetensors(path, [pending], {"format": "pt"})
        files.append(path)
    return files


def embedding_file(token: str) -> str:
    """The name of the file with a token's embedding.

    Raises:
      OutputError: the token cannot be a file's name.
    """
    if {"/", "\\", "\0"} & set(token):
        raise OutputError(f"the token {token!r} cannot be the name of a file: choose another.")
    return f"{token}.safetensors"


def save_custom_diffusion(unet: nnx.Module, path: Path | str, *, trained: str) -> None:
    """Write the cross-attention of a UNet as `pytorch_custom_diffusion_weights.bin`.

    Args:
      unet: the personalised UNet.
      path: the file; its folder exists.
      trained: "crossattn_kv" (keys and values) or "crossattn" (queries and outputs too).

    Raises:
      OutputError: torch is not installed, or a parameter is NaN or infinite.
      ValueError: another `trained`.
    """
    if trained not in _TRAINED:
        raise ValueError(f"trained accepts {sorted(_TRAINED)}, received {trained!r}.")
    try:
        import torch
    except ImportError as error:
        raise OutputError(f"writing {path} needs torch: install conceptax[torch].") from error
    slots = variables(unet)
    state: dict[str, Any] = {}
    for spec in tensor_specs(unet):
        if ".attn1.to_q." in spec.key:  # diffusers counts the processors
            state[spec.key.partition(".to_q.")[0] + ".processor"] = {}
        if any(fnmatch.fnmatchcase(spec.key, pattern) for pattern in _TRAINED[trained]):
            values = spec.to_torch(np.asarray(slots[spec.path].get_value()))
            values = np.array(_finite(values, spec.key), order="C")  # torch wants its own
            if FLOAT_NAMES[values.dtype] == "BF16":  # torch's bfloat16 is unknown to NumPy
                tensor = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
            else:
                tensor = torch.from_numpy(values)
            state[_processor_key(spec.key)] = tensor
    torch.save(state, path)


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype not in FLOAT_NAMES:
        raise OutputError(f"{name} is {values.dtype}, which is not stored as a weight.")
    if not is_finite(np.ascontiguousarray(values), FLOAT_NAMES[values.dtype]):
        raise OutputError(
            f"{name} holds NaN or infinite values, so nothing was written. The training has "
            "diverged; lower its learning rate."
        )
    return values


def _processor_key(key: str) -> str:
    """...attn2.to_k.weight -> ...attn2.processor.to_k_custom_diffusion.weight"""
    before, _, after = key.partition(".attn2.")
    layer, _, leaf = after.partition(".")
    return f"{before}.attn2.processor.{layer}{_PART}.{leaf}"


# ---- in ----


def read_personalisation(path: Path | str) -> Personalisation:
    """Read a file, or all such files of a folder.

    In a folder those are `pytorch_custom_diffusion_weights.bin`, `delta*.bin`, `learned_embeds.*`
    and the files named for a token, `<...>.safetensors` or `<...>.bin`.

    Raises:
      CheckpointError: nothing of the kind, damaged or unsafe files, a token that comes twice.
    """
    path = Path(path).expanduser()
    files = [path]
    if path.is_dir():
        patterns = (CUSTOM_DIFFUSION, "delta*.bin", "learned_embeds.*", "<*>.*")
        files = sorted(
            file for file in path.iterdir()
            if file.suffix in (".bin", ".safetensors")
            and any(fnmatch.fnmatchcase(file.name, pattern) for pattern in patterns)
        )  # fmt: skip
    if not files:
        raise CheckpointError(
            f"{path} holds neither {CUSTOM_DIFFUSION}, nor delta.bin, nor embeddings of tokens "
            "such as '<new1>.safetensors'. Pass the file itself if it has another name."
        )
    rows: dict[str, np.ndarray] = {}
    unet: dict[str, np.ndarray] = {}
    for file in files:
        found = _interpret(_open(file), file)
        if twice := sorted(rows.keys() & found.rows.keys()):
            raise CheckpointError(f"{path} has the token {twice[0]!r} in more than one file.")
        rows |= found.rows
        unet |= found.unet
    return Personalisation(rows, unet)


def is_personalised(path: Path) -> bool:
    """Whether the names in a file are those of new tokens or of Custom Diffusion.

    Raises:
      CheckpointError: a damaged or unsafe file.
    """
    with open(path, "rb") as file:
        start = file.read(9)
    safe = path.suffix == ".safetensors" or start[8:] == b"{"
    content = open_safetensors(path) if safe else load_pickle(path)
    return any(
        isinstance(key, str)
        and (
            fnmatch.fnmatchcase(key, "<*>")
            or key == "emb_params"
            or _PART in key
            or key == "modifier_token"
        )
        for key in content
    )


def load_personalised(pipeline: Any, path: Path | str) -> Any:
    """The pipeline with new tokens and cross-attention weights from files merged into it.

    Args:
      pipeline: a `StableDiffusionPipeline` of the model that was personalised; it stays as it is.
      path: a file or a folder, as for `read_personalisation`.

    Raises:
      CheckpointError: unusable files, or weights of another model.
      TokenError: a token that the tokenizer already has.
    """
    from ..flax_models.stable_diffusion import add_tokens

    rows, tensors = read_personalisation(path)
    if tensors:
        pipeline = dataclasses.replace(
            pipeline, unet=_with_tensors(pipeline.unet, tensors, str(path))
        )
    return add_tokens(pipeline, rows) if rows else pipeline


def _open(path: Path) -> dict[str, Any]:
    """The content of a file: name -> array, or a nested dict of them."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.")
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        stored = open_safetensors(path)
        wrong = [key for key, tensor in stored.items() if tensor.dtype not in FLOAT_TYPES]
        if wrong:
            raise CheckpointError(f"{path}: {listing(wrong)} are no floating-point tensors.")
        return {key: np.array(tensor.read()) for key, tensor in stored.items()}
    content = load_pickle(path)
    import torch

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): convert(each) for key, each in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        if value.layout != torch.strided or value.is_meta:
            raise CheckpointError(f"{path} holds a tensor that is not dense.")
        return tensor_values(value)

    return convert(content)


def _interpret(content: Mapping[str, Any], path: Path) -> Personalisation:
    if isinstance(content.get("unet"), dict):  # delta.bin
        tokens = content.get("modifier_token") or {}
        unet = {key.replace(".processor.", "."): value for key, value in content["unet"].items()}
        return Personalisation(_rows(tokens, path), _tensors(unet, path))
    if any(_PART in key for key in content):
        unet = {
            key.replace(".processor.", ".").replace(_PART, ""): value
            for key, value in content.items()
            if not (isinstance(value, dict) and not value)  # a self-attention
        }
        return Personalisation({}, _tensors(unet, path))
    if "emb_params" in content:  # the token is in the file's name alone
        return Personalisation(_rows({path.stem: content["emb_params"]}, path), {})
    return Personalisation(_rows(content, path), {})


def _rows(content: Mapping[str, Any], path: Path) -> dict[str, np.ndarray]:
    """Embeddings by token; a table of n rows is `<t>`, `<t>_1`, ... as in diffusers."""
    rows = {}
    for token, value in _tensors(content, path).items():
        if value.ndim not in (1, 2) or not value.size:
            raise CheckpointError(
                f"{path}: {token!r} has shape {list(value.shape)}; an embedding has one dimension, "
                "several have two. This is no textual inversion."
            )
        for number, row in enumerate(np.atleast_2d(value)):
            rows[token if number == 0 else f"{token}_{number}"] = row
    return rows


def _tensors(content: Mapping[str, Any], path: Path) -> dict[str, np.ndarray]:
    for key, value in content.items():
        if not isinstance(value, np.ndarray) or value.dtype not in FLOAT_NAMES:
            kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            raise CheckpointError(
                f"{path}: {key[:80]!r} is {kind}, expected a tensor of floating-point numbers. "
                f"Known are textual inversions, {CUSTOM_DIFFUSION} and delta.bin."
            )
        if not is_finite(np.ascontiguousarray(value), FLOAT_NAMES[value.dtype]):
            raise CheckpointError(f"{path}: {key!r} holds NaN or infinite values.")
    if not content:
        raise CheckpointError(f"{path} holds no tensors.")
    return dict(content)


def _with_tensors(unet: Any, tensors: Mapping[str, np.ndarray], source: str) -> Any:
    """A UNet with some tensors replaced: all keys and values of its cross-attention at least."""
    specs: dict[str, TensorSpec] = {spec.key: spec for spec in tensor_specs(unet)}
    needed = [
        key for key in specs
        if any(fnmatch.fnmatchcase(key, pattern) for pattern in _TRAINED["crossattn_kv"])
    ]  # fmt: skip
    problems = {
        "missing": sorted(set(needed) - tensors.keys()),
        "unexpected": sorted(tensors.keys() - specs.keys()),
        "of the wrong shape": [
            f"{key} {list(value.shape)} instead of {list(specs[key].shape)}"
            for key, value in sorted(tensors.items())
            if key in specs and value.shape != specs[key].shape
        ],
    }
    told = [f"{len(names)} {kind}: {listing(names)}" for kind, names in problems.items() if names]
    if told:
        raise CheckpointError(
            f"{source} does not fit this UNet: {'; '.join(told)}. It was made for another model."
        )
    unet = nnx.clone(unet)
    slots = variables(unet)
    for key, value in tensors.items():
        slot = slots[specs[key].path]
        slot.set_value(jnp.asarray(specs[key].to_nnx(value), slot.get_value().dtype))
    return unet
