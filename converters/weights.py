"""Where the weights of a component folder are, and how to open each kind of file.

Everything in a folder is untrusted: names in an index may not leave it, pickles are read with
`weights_only=True` (which executes nothing), and files are checked before their data is used.
"""

import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..text import TextError, decode
from .errors import CheckpointError, listing
from .msgpack_file import open_flax
from .safetensors_file import FLOAT_TYPES, StoredTensor, open_safetensors, parse_json

_MAX_JSON = 64 << 20
# Library -> name of the weight files it writes, or wrote: safetensors, pickle, Flax.
STEMS = {
    "diffusers": ("diffusion_pytorch_model", "diffusion_pytorch_model", "diffusion_flax_model"),
    "transformers": ("model", "pytorch_model", "flax_model"),
}
_ORBAX = {"_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"}
# In the order of preference; full precision first.
_LAYOUTS = (
    "{safe}.safetensors", "{safe}.safetensors.index.json", "{safe}.fp16.safetensors",
    "{safe}.safetensors.index.fp16.json", "{safe}.fp16.safetensors.index.json",
    "{pickle}.bin", "{pickle}.bin.index.json", "{pickle}.fp16.bin",
    "{pickle}.bin.index.fp16.json", "{flax}.msgpack",
)  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint.

    Raises:
      CheckpointError: absent, unreadable, oversized or not a JSON object.
    """
    _require_file(path)
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_JSON + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if len(text) > _MAX_JSON:
        raise CheckpointError(f"{path} is larger than {_MAX_JSON >> 20} MiB, which no config is.")
    try:
        return parse_json(decode(text, path).encode(), str(path))
    except TextError as error:
        raise CheckpointError(str(error)) from error


def _require_file(path: Path) -> None:
    """A regular file, or a symlink to one: the Hub's cache links every file to a blob store."""
    if not path.exists():
        dangling = " (a symlink to nothing)" if path.is_symlink() else ""
        raise CheckpointError(
            f"{path} does not exist{dangling}: the checkpoint is incomplete. Download it again."
        )
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file. Replace it by the file itself.")


def find_weights(folder: Path, library: str) -> Path:
    """The weight file or index of a component folder.

    Raises:
      CheckpointError: there is none; the message lists what is there.
    """
    first, *others = [library, *(name for name in STEMS if name != library)]
    layouts = [
        layout.format(safe=STEMS[name][0], pickle=STEMS[name][1], flax=STEMS[name][2])
        for layout in _LAYOUTS
        for name in (first, *others)
    ]
    for name in layouts:
        if (folder / name).is_file():
            return folder / name
    there = sorted(entry.name for entry in folder.iterdir())
    if _ORBAX & set(there):
        raise CheckpointError(
            f"{folder} is an Orbax checkpoint. Restore it with Orbax and write its parameters with "
            f"flax.serialization.to_bytes into {STEMS[library][2]}.msgpack, which is read here."
        )
    raise CheckpointError(
        f"{folder} holds no weights: expected {layouts[0]}, {layouts[0]}.index.json or "
        f"{STEMS[library][1]}.bin, found {listing(there) or 'nothing'}. "
        "Check that the download is complete."
    )


def open_weights(path: Path, *, wrappers: Sequence[str] = ()) -> dict[str, StoredTensor]:
    """Open a weight file or an index of several: name -> stored tensor.

    Args:
      path: the file or index.
      wrappers: names under which a pickle may hold the dict of tensors beside other things, which
        are then passed over, as is everything in the dict that is no tensor.

    Raises:
      CheckpointError: damaged or unsafe files.
    """
    if path.name.endswith(".json"):
        return _open_index(path)
    _require_file(path)
    try:
        if path.suffix == ".safetensors":
            return open_safetensors(path)
        if path.suffix == ".msgpack":
            return open_flax(path)
        return _open_pickle(path, wrappers)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def _open_index(path: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not name or name in (".", "..") or "\0" in name or "/" in name or "\\" in name:
            raise CheckpointError(
                f"{path} points outside its folder: {name!r}. Shards must be plain file names "
                "beside the index; do not trust this checkpoint."
            )
        if not name.endswith((".safetensors", ".bin")):
            raise CheckpointError(f"{path} names {name!r}, which is neither .safetensors nor .bin.")
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        shard = open_weights(path.parent / name)
        mapped = {key for key, file in weight_map.items() if file == name}
        if mapped != shard.keys():
            odd = sorted(mapped ^ shard.keys())
            raise CheckpointError(
                f"{path} and {name} disagree about {len(odd)} tensors: {listing(odd)}. "
                "Download both again."
            )
        tensors |= shard
    return tensors


class _Inert:
    """Stands for a class that a pickle names and that nothing here needs."""


# Training code's classes that are keys of dicts in published checkpoints, such as `sd-v1-4.ckpt`.
_NAMED_CLASSES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
)


def _refuse_compression(path: Path) -> None:
    """`torch.save` stores plainly; a compressed entry could unpack to any size."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return  # torch refuses to map anything else
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [
                entry.filename
                for entry in archive.infolist()
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size
            ]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path} is not a PyTorch file of plain tensors: {error}. Use a fresh download."
        ) from error
    if packed:
        raise CheckpointError(
            f"{path} is compressed ({listing(sorted(packed))[:200]}), which no PyTorch file is: it "
            "could unpack to any size. Do not trust this checkpoint."
        )


def load_pickle(path: Path) -> dict[Any, Any]:
    """The dict in a file written by `torch.save`, mapped; nothing in it is executed.

    Raises:
      CheckpointError: torch is not installed, a damaged or an unsafe file, or no dict.
    """
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{path} is a PyTorch pickle, and reading it needs torch. Install conceptax[torch], or "
            "use the checkpoint's .safetensors files."
        ) from error
    _refuse_compression(path)
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in _NAMED_CLASSES]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many types for damaged and for unsafe files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} is not a PyTorch file of plain tensors: {reason[:200]} "
            "Use the checkpoint's .safetensors files, or a fresh download."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} must hold a dict of tensors, received {type(state).__name__}."
        )
    return state


def tensor_values(tensor: Any) -> np.ndarray:
    """A dense torch tensor's values.

    Raises:
      CheckpointError: it claims more elements than its storage has (strides may be zero).
    """
    import torch

    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"a tensor of shape {list(tensor.shape)} is stored in "
            f"{tensor.untyped_storage().nbytes()} bytes. Do not trust this checkpoint."
        )
    tensor = tensor.detach().contiguous()
    # NumPy knows no bfloat16, so the bits travel as int16.
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(FLOAT_TYPES["BF16"])
    return tensor.numpy()


def _open_pickle(path: Path, wrappers: Sequence[str]) -> dict[str, StoredTensor]:
    """A `.bin`, `.pth` or `.ckpt`."""
    state = load_pickle(path)
    import torch

    if wrappers:
        inner = next((state[name] for name in wrappers if isinstance(state.get(name), dict)), state)
        state = {key: value for key, value in inner.items() if type(value) is torch.Tensor}

    names = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.int64: "I64",
    }  # fmt: skip

    def stored(key: Any, value: Any) -> StoredTensor:
        if not isinstance(key, str):
            raise CheckpointError(f"{path} has a key that is a {type(key).__name__}, no name.")
        if type(value) is not torch.Tensor or value.layout != torch.strided or value.is_meta:
            raise CheckpointError(
                f"{path}: {key[:80]!r} is a {type(value).__name__}, expected a dense tensor. "
                "Use the file with the model's weights only."
            )
        dtype = names.get(value.dtype, str(value.dtype).removeprefix("torch."))

        return StoredTensor(dtype, tuple(value.shape), lambda: tensor_values(value))

    return {key: stored(key, value) for key, value in state.items()}
