"""Files of textual inversion and Custom Diffusion, as diffusers and the authors exchange them.

* Textual inversion: one file per token, `{"<new1>": [dim]}`, for `pipe.load_textual_inversion`.
  Those of others may hold several vectors [n, dim], and may leave the token to the file's name:
  A1111's (`string_to_param`), kohya's (`emb_params`), and SDXL's (`clip_l` and `clip_g`).
* Custom Diffusion and ClassDiffusion: `pytorch_custom_diffusion_weights.bin`, the trained part of
  the cross-attention under the names of diffusers' attention processors, with an empty dict for
  each self-attention, for `unet.load_attn_procs(folder, weight_name=CUSTOM_DIFFUSION,
  _pipeline=pipe)`; without `_pipeline` diffusers 0.29 and later ignore it in silence.
* Custom Diffusion's first form, `delta.bin`: `{"unet": {...}, "modifier_token": {...}}`.
* Changed weights of a UNet or a text encoder under their own names, as ESD and UCE are published
  and as `save_changes` writes.

The authors' safe form of the first has safetensors bytes under a `.bin` name, so the content of a
file decides, not its suffix.
"""

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from ..errors import CheckpointError, OutputError, counted, listing
from ..files.safetensors_file import FLOAT_TYPES, PendingTensor, StoredTensor, write_safetensors
from ..files.weights import (
    BARE,
    GGUF,
    SAFETENSORS,
    Parameters,
    WeightFile,
    opened,
    save_pickle,
    stored_tensor,
)
from ..hub import local
from ..parameters import check_finite, pending, replaced
from ..tensors import compare, is_finite, tensor_specs
from .compvis_parts import is_single_file, unet_names_of
from .lora import is_lora
from .names import renamed

CUSTOM_DIFFUSION = "pytorch_custom_diffusion_weights.bin"
_PART = "_custom_diffusion"
# What each `trained` part of the cross-attention holds.
_TRAINED = {"crossattn_kv": ("*.attn2.to_k.*", "*.attn2.to_v.*"), "crossattn": ("*.attn2.*",)}
# What such files are called in a folder.
_PATTERNS = (
    CUSTOM_DIFFUSION,
    "delta*.bin",
    "learned_embeds.*",
    "learned_embeds_2.*",
    "<*>.*",
    "*_emb.safetensors",
    "*_changes.safetensors",
)
_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".safetensors")
_TEXT = "text_model."
# What files of SDXL call the embeddings for its two text encoders -> their usual name.
_CLIPS = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}
_FIRST, _SECOND = "learned_embeds", "learned_embeds_2"  # or, of diffusers, a file for each encoder
# Keys of a UNet and of a text encoder, by diffusers', transformers' and CompVis's names.
_CHANGED = re.compile(
    r"(?:unet\.|(?:model\.)?diffusion_model\.)?(?P<unet>(?:(?:down|up|input|output)_blocks"
    r"|mid_block|middle_block|conv_in|conv_norm_out|conv_out|time_embed(?:ding)?|add_embedding"
    r"|label_emb|out)\..+)"
    r"|(?P<second>text_encoder_2\.)?(?:text_encoder\.)?(?:text_model\.)?"
    r"(?P<text>(?:encoder\.layers|embeddings|final_layer_norm|text_projection)\..+)"
)
_COUNTED = "*.position_ids"  # older transformers stored them; they are no weights
_INVERSION, _CROSS = "a textual inversion", "weights of Custom Diffusion"
_WEIGHTS = "changed weights of a model"
Array = Any


class Personalization(NamedTuple):
    """What is merged into a model.

    Attributes:
      rows: new tokens -> embeddings [dim], of SDXL the two encoders' one after the other.
      unet: cross-attention tensors of the UNet by their state-dict key.
      changes: component -> its other tensors by key, without `text_model.`; perhaps CompVis's.
    """

    rows: dict[str, np.ndarray]
    unet: dict[str, np.ndarray]
    changes: Mapping[str, dict[str, np.ndarray]] = MappingProxyType({})


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
        path, values = Path(folder) / embedding_file(token), np.asarray(row)
        check_finite(values, token)
        write_safetensors(path, [PendingTensor.of(token, values)], {"format": "pt"})
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
      unet: the personalized UNet.
      path: the file; its folder exists.
      trained: "crossattn_kv" (keys and values) or "crossattn" (queries and outputs too).

    Raises:
      OutputError: torch is not installed, or a parameter is NaN or infinite.
      ValueError: another `trained`.
    """
    if trained not in _TRAINED:
        raise ValueError(f"trained accepts {sorted(_TRAINED)}, received {trained!r}.")
    specs = tensor_specs(unet)
    state: dict[str, Any] = {
        spec.key.partition(".to_q.")[0] + ".processor": {}  # diffusers counts the processors
        for spec in specs
        if ".attn1.to_q." in spec.key
    }
    for each in pending(unet, [s for s in specs if _any_of(s.key, _TRAINED[trained])], None):
        before, _, after = each.key.partition(".attn2.")
        layer, _, leaf = after.partition(".")
        state[f"{before}.attn2.processor.{layer}{_PART}.{leaf}"] = each.produce()
    save_pickle(Path(path), state)


def _any_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


# ---- in ----


def personalized_files(path: Path | str) -> list[Path]:
    """The files that `read_personalization` reads: the path itself, or those of a folder.

    In a folder they are `pytorch_custom_diffusion_weights.bin`, `delta*.bin`, `learned_embeds.*`,
    `*_emb.safetensors`, `*_changes.safetensors`, and those named for a token, `<...>.safetensors`
    or `<...>.bin`.
    """
    path = local(path)
    if not path.is_dir():
        return [path]
    return sorted(
        file
        for file in path.iterdir()
        if file.suffix.lower() in _SUFFIXES and _any_of(file.name, _PATTERNS)
    )


def read_personalization(path: Path | str) -> Personalization:
    """Read a file, or all `personalized_files` of a folder.

    Raises:
      CheckpointError: nothing of the kind, damaged or unsafe files, a token that comes twice.
    """
    path = local(path)
    files = personalized_files(path)
    if not files:
        raise CheckpointError(
            f"{path} holds neither {CUSTOM_DIFFUSION}, nor delta.bin, nor embeddings of tokens "
            "such as '<new1>.safetensors', nor changed weights such as 'unet_changes.safetensors'. "
            "Pass the file itself if it has another name."
        )
    rows: dict[str, np.ndarray] = {}
    unet: dict[str, np.ndarray] = {}
    changes: dict[str, dict[str, np.ndarray]] = {}
    for file in files:
        found = _interpret(_open(opened(file)), file)
        if file.stem == _SECOND and any(other.stem == _FIRST for other in files):
            found = found._replace(rows=_joined(rows, found.rows, file))
            rows = {token: row for token, row in rows.items() if token not in found.rows}
        if twice := sorted(rows.keys() & found.rows.keys()):
            raise CheckpointError(f"{path} has the token {twice[0]!r} in more than one file.")
        rows |= found.rows
        unet |= found.unet
        for name, tensors in found.changes.items():
            changes.setdefault(name, {}).update(tensors)
    return Personalization(rows, unet, changes)


def _joined(
    first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray], file: Path
) -> dict[str, np.ndarray]:
    """Rows for SDXL's two text encoders as one."""
    if lost := sorted(second.keys() - first.keys()):
        raise CheckpointError(
            f"{file} has the token {lost[0]!r}, and the {_FIRST} beside it, for the first text "
            "encoder, has not."
        )
    return {token: np.concatenate([first[token], row]) for token, row in second.items()}


def personal_kind(file: WeightFile | Path) -> str | None:
    """What a file is that adds to a model: "a textual inversion", "weights of Custom Diffusion".

    None for all others, which includes changed weights under a model's own names.

    Raises:
      CheckpointError: a damaged or unsafe file.
    """
    kind = _kind(_open(opened(file)))
    return kind if kind in (_INVERSION, _CROSS) else None


def holds_changes(file: WeightFile | Path) -> bool:
    """Whether a file holds weights of a UNet or a text encoder alone, all or some, by their names.

    Raises:
      CheckpointError: a damaged or unsafe file.
    """
    return _kind(_open(opened(file))) == _WEIGHTS


def load_personalized(pipeline: Any, path: Path | str) -> Any:
    """The pipeline with new tokens, cross-attention and changed weights from files merged into it.

    Args:
      pipeline: a `StableDiffusionPipeline` of the model that was personalized; it stays as it is.
      path: a file or a folder, as for `read_personalization`.

    Raises:
      CheckpointError: unusable files, or weights of another model.
      TokenError: a token that the tokenizer already has.
    """
    from ...flax_models.pipelines.new_tokens import add_tokens

    rows, cross, changes = read_personalization(path)
    if cross:
        needed = _TRAINED["crossattn_kv"]
        unet = _with_tensors(pipeline.unet, cross, f"{path} does not fit this UNet", needed)
        pipeline = dataclasses.replace(pipeline, unet=unet)
    for name, tensors in changes.items():
        model = getattr(pipeline, name, None)
        if model is None:
            raise CheckpointError(f"{path} changes a {name}, which this pipeline has not.")
        told = f"{path} does not fit this pipeline's {name}"
        model = _with_tensors(model, _own_names(model, tensors, name), told)
        pipeline = dataclasses.replace(pipeline, **{name: model})
    return add_tokens(pipeline, rows) if rows else pipeline


def _open(file: WeightFile) -> dict[str, Any]:
    """What a file holds: name -> stored tensor, or a nested dict of them, or anything else."""
    path = file.path
    if file.content in (SAFETENSORS, GGUF) or path.suffix.lower() == ".safetensors":
        return dict(file.tensors())
    content = file.pickle
    import torch

    def convert(value: Any) -> Any:
        if isinstance(value, Parameters):
            value = getattr(value, "_parameters", None)
        if isinstance(value, dict):
            return {str(key): convert(each) for key, each in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        if value.layout != torch.strided or value.is_meta:
            raise CheckpointError(f"{path} holds a tensor that is not dense.")
        return stored_tensor(value)

    found = convert(content)
    inner = found.get("state_dict")
    return inner if isinstance(inner, dict) else found


def _kind(content: Mapping[str, Any]) -> str | None:
    """What a file is, from its names and shapes; None if it is nothing of the kind."""
    if isinstance(content.get("unet"), dict) or "modifier_token" in content:
        return _CROSS
    if any(_PART in key for key in content):
        return _CROSS
    if {"string_to_param", "emb_params", *_CLIPS, *_CLIPS.values()} & content.keys():
        return _INVERSION
    if content and all(_CHANGED.fullmatch(key) for key in content):
        return _WEIGHTS
    if any(fnmatch.fnmatchcase(key, "<*>") for key in content):
        return _INVERSION
    if len(content) == 1:
        ((key, value),) = content.items()
        shape = value.shape if _is_float(value) else ()
        named = not key.endswith(("weight", "bias")) and "." not in key and not is_lora([key])
        return _INVERSION if named and len(shape) in (1, 2) else None
    return None


def _interpret(content: Mapping[str, Any], path: Path) -> Personalization:
    kind = _kind(content)
    if kind == _INVERSION:
        return Personalization(_rows(_embeddings(content, path), path), {})
    if kind == _WEIGHTS:
        return Personalization({}, {}, _changes(content, path))
    if kind != _CROSS:
        raise CheckpointError(f"{path} {_what(content)}")
    tokens: Mapping[str, Any] = {}
    if not any(_PART in key for key in content):  # delta.bin
        if other := sorted(content.keys() - {"unet", "modifier_token"}):
            raise CheckpointError(f"{path} holds {listing(other)} too, which is not supported.")
        both = (content.get(name) for name in ("modifier_token", "unet"))
        tokens, content = (each if isinstance(each, dict) else {} for each in both)
    unet = {
        key.replace(".processor.", ".").replace(_PART, ""): value
        for key, value in content.items()
        if value != {}  # a self-attention
    }
    return Personalization(
        _rows(tokens, path) if tokens else {}, _tensors(unet, path) if unet or not tokens else {}
    )


def _what(content: Mapping[str, Any]) -> str:
    """The rest of a sentence on a file that is nothing of the kind."""
    if not content:
        return "holds no tensors."
    if is_lora(content):
        return "is a LoRA, for merge_lora."
    if is_single_file(dict(content)):
        return "is a whole model: use it in place of another one, not in addition to it."
    return (
        "is no LoRA, no textual inversion, no Custom Diffusion, and no changed weights of a UNet "
        f"or a text encoder; it holds {listing([key[:80] for key in sorted(content)])}."
    )


def _embeddings(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Token -> embeddings, under the names of every program; no token is the file's name."""
    content = dict(content)
    name = None
    if "string_to_param" in content:  # A1111, and the authors of textual inversion
        name, content = content.get("name"), content["string_to_param"]
        if not isinstance(content, dict) or not content:
            raise CheckpointError(f"{path}: string_to_param holds no embeddings.")
    content = {_CLIPS.get(key, key): value for key, value in content.items()}
    clips = {part: content.pop(part) for part in ("clip_l", "clip_g") if part in content}
    if clips:
        if len(clips) == 1:
            (lost,) = {"clip_l", "clip_g"} - clips.keys()
            raise CheckpointError(
                f"{path} has {next(iter(clips))} and no {lost}: an embedding of SDXL has a part "
                "for each of the two text encoders."
            )
        first, second = (np.atleast_2d(each) for each in _tensors(clips, path).values())
        if first.ndim != 2 or second.ndim != 2 or len(first) != len(second):
            raise CheckpointError(
                f"{path}: clip_l is {list(first.shape)} and clip_g {list(second.shape)}; an "
                "embedding of SDXL has as many vectors in both."
            )
        content["emb_params"] = StoredTensor.of(np.concatenate([first, second], axis=1))
    unnamed = [key for key in ("emb_params", BARE) if key in content]
    if unnamed and (other := sorted(content.keys() - {unnamed[0]})):
        raise CheckpointError(
            f"{path} is a textual inversion that holds {listing(other)} too, which is not read."
        )
    if not unnamed:
        return content
    if not isinstance(name, str) or name.split() != [name]:
        name = path.stem
    if name.split() != [name]:
        raise CheckpointError(
            f"{path} does not name its token, so that its file's name is it, which must be one "
            "word: rename the file."
        )
    return {name: content[unnamed[0]]}


def _changes(content: Mapping[str, Any], path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Component -> tensors, of changed weights."""
    content = {k: v for k, v in content.items() if not fnmatch.fnmatchcase(k, _COUNTED)}
    changes: dict[str, dict[str, np.ndarray]] = {}
    for key, value in _tensors(content, path).items():
        found = _CHANGED.fullmatch(key)
        assert found is not None
        second = found["second"] or path.stem.startswith("text_encoder_2")  # as it is exported
        name = "unet" if found["unet"] else "text_encoder_2" if second else "text_encoder"
        tensors = changes.setdefault(name, {})
        bare = found["unet"] or found["text"]
        if bare in tensors:
            raise CheckpointError(f"{path} has {key} under two names.")
        tensors[bare] = value
    return changes


def _own_names(
    model: Any, tensors: Mapping[str, np.ndarray], component: str
) -> dict[str, np.ndarray]:
    """Changed weights under the keys of the model, where it has such keys."""
    own = {spec.key.removeprefix(_TEXT): spec.key for spec in tensor_specs(model)}
    if component == "unet":
        old = unet_names_of(model.config.to_dict())
        tensors = {key if key in own else renamed(key, old) or key: tensors[key] for key in tensors}
    return {own.get(key, key): value for key, value in tensors.items()}


def _rows(content: Mapping[str, Any], path: Path) -> dict[str, np.ndarray]:
    """Embeddings by token; a table of n rows is `<t>`, `<t>_1`, ... as in diffusers."""
    rows: dict[str, np.ndarray] = {}
    for token, value in _tensors(content, path).items():
        if value.ndim not in (1, 2) or not value.size:
            raise CheckpointError(
                f"{path}: {token!r} has shape {list(value.shape)}; an embedding has one dimension, "
                "several have two. This is no textual inversion."
            )
        for number, row in enumerate(np.atleast_2d(value)):
            name = token if number == 0 else f"{token}_{number}"
            if name in rows:
                raise CheckpointError(f"{path} has the token {name!r} twice.")
            rows[name] = row
    return rows


def _tensors(content: Mapping[str, Any], path: Path) -> dict[str, np.ndarray]:
    """The values of floating-point tensors, checked."""
    values = {}
    for key, stored in content.items():
        if not _is_float(stored):
            kind = stored.dtype if isinstance(stored, StoredTensor) else type(stored).__name__
            raise CheckpointError(
                f"{path}: {key[:80]!r} is {kind}, expected a tensor of floating-point numbers. "
                f"Known are textual inversions, {CUSTOM_DIFFUSION}, delta.bin and changed weights."
            )
        value = np.array(stored.read())
        if not is_finite(np.ascontiguousarray(value), stored.dtype):
            raise CheckpointError(f"{path}: {key!r} holds NaN or infinite values.")
        values[key] = value
    if not values:
        raise CheckpointError(f"{path} holds no tensors.")
    return values


def _is_float(stored: Any) -> bool:
    return isinstance(stored, StoredTensor) and stored.dtype in FLOAT_TYPES


def _with_tensors(
    model: Any, tensors: Mapping[str, np.ndarray], told: str, needed: Iterable[str] = ()
) -> Any:
    """A model with some tensors replaced.

    Args:
      model: it stays as it is.
      tensors: by key.
      told: what an error begins with.
      needed: patterns of the keys that must be there.
    """
    specs = [s for s in tensor_specs(model) if s.key in tensors or _any_of(s.key, needed)]
    stored = {key: StoredTensor.of(value) for key, value in tensors.items()}
    if problems := compare(specs, stored, None, double=True).problems:
        raise CheckpointError(f"{told}: {counted(problems)}. It was made for another model.")
    return replaced(model, ((spec, tensors[spec.key]) for spec in specs))
