"""Find and open weight files: safetensors, pickles, Flax's, GGUF, and indexes of several.

Everything in a folder is untrusted: names in an index may not leave it, pickles are read with
`weights_only=True` (which executes nothing), and files are checked before their data is used.
"""

import functools
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...text import TextError, decode
from ..errors import CheckpointError, OutputError, first_line, listing
from .gguf_file import open_gguf
from .msgpack_file import open_flax
from .quantized import dequantized
from .safetensors_file import (
    FLOAT_TYPES,
    NUMPY_NAMES,
    Content,
    StoredTensor,
    begins_as_safetensors,
    mapped,
    open_safetensors,
    parse_json,
    read_metadata,
)
from .weight_names import STEMS, weight_name

_MAX_JSON = 64 << 20
_ORBAX = {"_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"}


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


def visible(folder: Path) -> list[str]:
    """What is in a folder, for messages: without hidden entries and those still being written."""
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))


def is_orbax(names: Sequence[str]) -> bool:
    """Whether a folder with these entries is a checkpoint of Orbax."""
    return not _ORBAX.isdisjoint(names)


def find_weights(folder: Path, library: str, variant: str | None = None) -> Path:
    """The weight file or index of a component folder.

    As in diffusers, the plain file comes first, safetensors before a pickle; where there is none,
    a variant is taken, such as `model.fp16.safetensors`, and last Flax's.

    Args:
      folder: the component's.
      library: "diffusers" or "transformers", whose names come first.
      variant: the only one to take, such as "fp16".

    Raises:
      CheckpointError: there is none; the message lists what is there.
    """
    found = [
        (name.rank(library), entry.name)
        for entry in folder.iterdir()
        if (name := weight_name(entry.name)) is not None
        and name.libraries
        and not name.shard
        and entry.is_file()
        and variant in (None, name.variant)
    ]
    if found:
        return folder / min(found)[1]
    there = visible(folder)
    safe, pickled, flax = STEMS[library]
    if variant is not None:
        problem = f"holds no weights of the variant {variant!r} (found {listing(there)})."
    elif is_orbax(there):
        problem = (
            "is an Orbax checkpoint. Restore it with Orbax and write its parameters with "
            f"flax.serialization.to_bytes into {flax}.msgpack, which is read here."
        )
    else:
        problem = (
            f"holds no weights: expected {safe}.safetensors, that with .index.json, or "
            f"{pickled}.bin, found {listing(there) or 'nothing'}. "
            "Check that the download is complete."
        )
    raise CheckpointError(f"{folder} {problem}")


def holds_variant(folder: Path, variant: str) -> bool:
    """Whether a component folder has weights of a variant."""
    names = [weight_name(file) for file in visible(folder)] if folder.is_dir() else []
    return any(name is not None and name.variant == variant for name in names)


class WeightFile:
    """A weight file, opened once whatever is asked of it: what it is, its tensors, its header.

    Attributes:
      path: the file, or an index of several.
    """

    def __init__(self, path: Path):
        """Take a file, which is opened once something is asked of it.

        Raises:
          CheckpointError: it is absent, or no regular file.
        """
        _require_file(path)
        self.path = path

    @functools.cached_property
    def bytes(self) -> Content:
        """What is in it, mapped."""
        return mapped(self.path)

    @property
    def start(self) -> "bytes":
        """Its first bytes."""
        return self.bytes[:512]

    @property
    def content(self) -> str:
        """What weights it begins as: `SAFETENSORS`, `PICKLE`, `GGUF`, or "" where nothing tells.

        Raises:
          CheckpointError: it is something else, which the message names, or it cannot be read.
        """
        start = self.start
        if begins_as_safetensors(start):
            return SAFETENSORS
        if re.match(rb"PK\x03\x04|\x80[\x02-\x05]", start):
            return PICKLE
        if start.startswith(b"GGUF"):
            return GGUF
        if what := _other(start):
            raise CheckpointError(f"{self.path} is {what}")
        return ""

    @property
    def is_index(self) -> bool:
        """Whether it is an index of several files."""
        return self.path.name.endswith(".json") and ".index." in self.path.name

    @property
    def metadata(self) -> dict[str, str]:
        """The free text in its header; nothing where it has none."""
        safe = not self.is_index and self.content == SAFETENSORS
        return read_metadata(self.path, self.bytes) if safe else {}

    @functools.cached_property
    def _safetensors(self) -> dict[str, StoredTensor]:
        return open_safetensors(self.path, self.bytes)

    @functools.cached_property
    def _dequantized(self) -> dict[str, StoredTensor]:
        return dequantized(self._safetensors, self.path)

    @functools.cached_property
    def _gguf(self) -> dict[str, StoredTensor]:
        return open_gguf(self.path, self.bytes)

    @functools.cached_property
    def pickle(self) -> dict[Any, Any]:
        """The dict in a file written by `torch.save`; nothing in it is executed.

        Raises:
          CheckpointError: torch is not installed, a damaged or an unsafe file, or no dict.
        """
        return _load_pickle(self)

    @functools.cached_property
    def _indexed(self) -> dict[str, StoredTensor]:
        return _open_index(self.path)

    def tensors(
        self, wrappers: Sequence[str] = (), *, scaled: bool = True
    ) -> dict[str, StoredTensor]:
        """Name -> stored tensor, as for `open_weights`; `scaled` False leaves scales apart."""
        path, suffix = self.path, self.path.suffix.lower()
        if suffix == ".json":
            return dict(self._indexed)
        if suffix == ".msgpack":
            return open_flax(path, self.bytes)
        content = self.content
        if content == SAFETENSORS or (suffix == ".safetensors" and not content):
            return dict(self._dequantized if scaled else self._safetensors)
        if content == GGUF:
            return dict(self._gguf)
        if suffix == ".safetensors":
            raise CheckpointError(
                f"{path} is not a safetensors file: it is {content}. Name it .ckpt or .bin: it is "
                "read with torch, and nothing in it is executed."
            )
        return _of_pickle(self, wrappers)


def opened(file: Path | str | WeightFile) -> WeightFile:
    """A weight file, which may have been opened already; `~` is expanded."""
    return file if isinstance(file, WeightFile) else WeightFile(Path(file).expanduser())


def open_weights(
    path: Path | WeightFile, *, wrappers: Sequence[str] = ()
) -> dict[str, StoredTensor]:
    """Open a weight file or an index of several: name -> stored tensor.

    Args:
      path: the file or index.
      wrappers: names under which a pickle may hold the dict of tensors beside other things, which
        are then passed over, as is everything in the dict that is no tensor.

    Raises:
      CheckpointError: damaged or unsafe files.
    """
    return opened(path).tensors(wrappers)


BARE = "*"  # what a tensor is called that a pickle holds without a name
SAFETENSORS, PICKLE, GGUF = "a safetensors file", "a PyTorch pickle", "a GGUF file"
_AGAIN = "Download the file itself again."
_MODEL = "Pass a model's folder or weight file."
# What a file that is called weights may begin with instead -> what it is, and what to do.
_OTHERS = {
    rb"version https://git-lfs": "a pointer of Git LFS, not the file itself. Fetch it with git lfs "
    "pull.",
    rb"(?i)\s*<(!doctype html|html|\?xml|head)": "a web page, as a failed download leaves it. "
    + _AGAIN,
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF.{4}WEBP|BM.{4}\0{4}|II\*\0|MM\0\*": "a picture, no model. "
    + _MODEL,
    rb"\x89HDF": "an HDF5 file, which is not read here. Use the model's safetensors file.",
    rb"\x1f\x8b|7z\xbc\xaf|Rar!|.{257}ustar": "an archive. Unpack it first.",
    rb"\s*\{": "a file of settings (JSON), no weights. Pass the folder that it is in.",
    rb"\x00{512}": f"full of zeros, as an unfinished download leaves it. {_AGAIN}",
}


def _other(start: bytes) -> str:
    """What else a file is that begins so, and what to do; "" where it may be weights."""
    if not start:
        return "empty, truncated by an interrupted download. Download or copy it again."
    for form, what in _OTHERS.items():
        if re.match(form, start, re.DOTALL):
            return what
    text = start.decode("utf-8", "ignore")
    if len(text.encode()) >= len(start) - 3 and all(c.isprintable() or c.isspace() for c in text):
        return f"a text, no model. {_MODEL}"
    return ""


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
        if not name.lower().endswith((".safetensors", ".bin")):
            raise CheckpointError(f"{path} names {name!r}, which is neither .safetensors nor .bin.")
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        shard = WeightFile(path.parent / name).tensors(scaled=False)
        mapped = {key for key, file in weight_map.items() if file == name}
        if mapped != shard.keys():
            odd = sorted(mapped ^ shard.keys())
            raise CheckpointError(
                f"{path} and {name} disagree about {len(odd)} tensors: {listing(odd)}. "
                "Download both again."
            )
        tensors |= shard
    return dequantized(tensors, path)


class _Inert:
    """Stands for a class that a pickle names and that nothing here needs."""


class Parameters:
    """Stands for a `torch.nn.ParameterDict`: what is in it is a plain attribute."""


# Training code's classes that are keys of dicts in published checkpoints, such as `sd-v1-4.ckpt`,
# and one that the first textual inversions hold.
_CLASSES: Any = [
    (_Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (_Inert, "pytorch_lightning.callbacks.early_stopping.EarlyStopping"),
    (Parameters, "torch.nn.modules.container.ParameterDict"),
]


def _refuse_compression(file: WeightFile) -> None:
    """`torch.save` stores plainly; a compressed entry could unpack to any size."""
    content: Any = file.bytes
    path, size = file.path, len(content)
    try:
        with zipfile.ZipFile(content) as archive:
            packed = [
                entry.filename
                for entry in archive.infolist()
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size
            ]
            program = any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path} is not a PyTorch file of plain tensors: {error}. Use a fresh download."
        ) from error
    if program:
        raise CheckpointError(
            f"{path} is a TorchScript program, which is not run. Use a file of the same model's "
            "tensors, such as the model.pt or .safetensors beside it."
        )
    if packed:
        raise CheckpointError(
            f"{path} is compressed ({listing(sorted(packed))[:200]}), which no PyTorch file is: it "
            "could unpack to any size. Do not trust this checkpoint."
        )


def _load_pickle(file: WeightFile) -> dict[Any, Any]:
    """The dict in a file, which torch opens once more, by its name.

    Its tensors are mapped; those of a file from before torch 1.6, which is no archive, are read.
    """
    path, content = file.path, file.content
    told = f"{path} is not a PyTorch file of plain tensors"
    if content != PICKLE:
        raise CheckpointError(f"{told}: it is {content or 'of no known format'}. {_AGAIN}")
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{path} is a PyTorch pickle, and reading it needs torch. Install conceptax[torch], or "
            "use the checkpoint's .safetensors files."
        ) from error
    archive = file.start.startswith(b"PK")
    if archive:
        _refuse_compression(file)
    try:
        with torch.serialization.safe_globals(_CLASSES):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # torch raises many types for damaged and for unsafe files
        reason = first_line(error)
        if named := re.search(r"GLOBAL `?([\w.]{1,100})", str(error)):
            reason = f"it names {named[1]}, which could run a program and is not loaded."
        raise CheckpointError(
            f"{told}: {reason} Use the checkpoint's .safetensors files, a file with the model's "
            "state_dict alone, or a fresh download."
        ) from error
    if isinstance(state, torch.Tensor):  # an embedding that leaves its token to the file's name
        return {BARE: state}
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
    tensor = tensor.detach().resolve_neg().contiguous()
    # NumPy knows none of these, so the bits travel as integers.
    if (name := _type_of(tensor)).startswith(("BF", "F8")):
        bits = torch.int16 if name == "BF16" else torch.uint8
        return tensor.view(bits).numpy().view(FLOAT_TYPES[name])
    return tensor.numpy()


def save_pickle(path: Path, state: Mapping[str, Any]) -> None:
    """Write float arrays, in dicts that may be nested, with `torch.save`.

    Raises:
      OutputError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise OutputError(
            f"writing {path} needs torch: install conceptax[torch], or write .safetensors."
        ) from error

    def convert(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: convert(each) for key, each in value.items()}
        own = np.array(value, order="C")
        if own.dtype == FLOAT_TYPES["BF16"]:  # which NumPy does not know
            return torch.from_numpy(own.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(own)

    torch.save(convert(state), path)


def _type_of(tensor: Any) -> str:
    """The type's name in safetensors' format, or torch's own."""
    name = str(tensor.dtype).removeprefix("torch.")
    return NUMPY_NAMES.get(name, name)


def stored_tensor(tensor: Any) -> StoredTensor:
    """A dense tensor of torch's as what is read from it, as from other files."""
    return StoredTensor(_type_of(tensor), tuple(tensor.shape), lambda: tensor_values(tensor))


def _is_alpha(key: Any, value: Any) -> bool:
    """Whether an entry is a LoRA's strength as a plain number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and isinstance(key, str) and key.endswith(".alpha")


def _of_pickle(file: WeightFile, wrappers: Sequence[str]) -> dict[str, StoredTensor]:
    """A `.bin`, `.pth` or `.ckpt`."""
    path, state = file.path, file.pickle
    import torch

    for _ in wrappers:  # one may lie in the other
        inner = (state[name] for name in wrappers if isinstance(state.get(name), dict))
        state = next(inner, state)
    tensors = {}
    for key, value in state.items():
        alpha = _is_alpha(key, value)
        if wrappers and not (alpha or isinstance(value, torch.Tensor)):
            continue
        if not isinstance(key, str):
            raise CheckpointError(f"{path} has a key that is a {type(key).__name__}, no name.")
        if alpha:
            value = torch.tensor(float(value))
        dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
        if not dense or value.is_meta or value.is_quantized:
            raise CheckpointError(
                f"{path}: {key[:80]!r} is a {type(value).__name__}, expected a dense tensor. "
                "Use the file with the model's weights only."
            )
        tensors[key] = stored_tensor(value)
    return tensors
