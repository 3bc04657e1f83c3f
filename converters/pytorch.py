"""Load and save PyTorch checkpoints in the folder layouts of diffusers and transformers.

A *component* folder holds `config.json` and weights; a *pipeline* folder holds `model_index.json`
and one folder per component.  Weights travel a few tensors at a time, so the peak of memory is
the model itself plus about those, in both directions.
"""

import dataclasses
import inspect
import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path as FilePath
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..flax_models import streaming
from ..flax_models.layers.linear import fastest_dtype
from ..text import write_json
from . import architectures
from .architectures import class_in
from .components import build
from .errors import CheckpointError, OutputError, listing
from .files.output import atomic_folder
from .files.safetensors_file import (
    FLOAT_NAMES,
    PendingTensor,
    StoredTensor,
    file_order,
    write_safetensors,
)
from .files.weight_names import STEMS
from .files.weights import find_weights, holds_variant, open_weights
from .formats.compvis import load_single_file, require_streamable
from .formats.identify import (
    COMPONENT,
    PIPELINE,
    SEGMENTATION,
    SINGLE,
    Identity,
    identify,
    read_config,
    resolved,
)
from .formats.segmentation import loader_of
from .parameters import ShardingRule, changed, fill, pending, pending_unread
from .pipeline_folder import (
    CLIPS_OWN,
    carried_parts,
    check_vocabulary,
    copy_carried,
    is_part,
    pipeline_components,
    pipeline_tokenizer,
    read_index,
    read_scheduler,
    takes_clips,
    tokenizer_entry,
    tokenizer_kind,
)
from .tensors import tensor_specs
from .tokenizer import write_tokenizer

_OF_SINGLE_FILES = {"tokenizer", "prediction_type"}  # options for what such files do not tell


def load_pytorch(
    path: FilePath | str,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    sharding: ShardingRule = None,
    components: Collection[str] | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    architecture: str | type[nnx.Module] | None = None,
    stream: bool = False,
    **model_options: Any,
) -> Any:
    """Load a component folder, a pipeline folder, one weight file beside its `config.json`, a
    single file of Stable Diffusion, FLUX or HunyuanVideo (`.ckpt`, `.safetensors`, `.pt`, `.gguf`,
    with the publisher's names), or one of OpenCLIP (with a ConvNeXt tower), MAFT+ or FC-CLIP.

    The weights may be `.safetensors`, several of them behind an index, `.bin` pickles (these need
    torch; nothing in them is executed), or Flax's `.msgpack` of earlier versions.  They are
    memory-mapped and copied, so the files may change or vanish afterwards (but see `sharding`);
    tensors that a model does not read, such as a text encoder's last layers, stay mapped, for when
    it is saved again, so those files may vanish but not change.

    Args:
      path: the folder or file; `~` is expanded. Where there is none, a model of the Hugging Face
        Hub, `org/name` or `org/name@revision`: what loading it reads is fetched into the Hub's own
        cache.
      dtype: computation dtype of the models, or its name; "auto" is bfloat16 where that is faster,
        on accelerators and on CPUs with AMX or AMD's AVX512-BF16, and float32 elsewhere: `dtype` of
        a model says which.
      param_dtype: dtype to convert the parameters to; None keeps each as stored, so that
        `save_pytorch` gives back the same bits.
      sharding: where parameters go, straight from the file: one sharding for all, or a function of
        (attribute path, shape in NNX layout) that returns one, or None for the default device. In a
        pipeline the path begins with the component's name. "mapped" leaves them in the file, as
        NumPy views in NNX layout: for models to be written again, not to be run.
      components: of a pipeline, load only these of `unet`, `vae`, `text_encoder`, `tokenizer`,
        `scheduler` (and SDXL's `text_encoder_2`, `tokenizer_2`); the others are None.
      subfolder: a folder in it that is meant, such as "unet".
      variant: of the weights, such as "fp16"; parts of a pipeline that lack it are read as they
        are. Without it the plain weights are read, or, where there are none, another variant.
      architecture: of a component, the model class, or its published name, to use in place of the
        one in `config.json`.
      stream: leave the blocks of transformers and their text encoders in the file, which must stay,
        and bring each when it runs, converting what is quantized: for models larger than memory,
        which are called, not traced (`flax_models.streaming`). Other parts are loaded whole.
      model_options: of a component, further arguments of its model class: `remat=True`, or
        `attention=GNA(...)` for a diffusion transformer, `read=(9, 18, 27)` for a `Qwen3Model`. Of
        a single file, `tokenizer=` and `prediction_type=`, as for `compvis.load_single_file`, or
        what `load_open_clip` and `load_maft_plus` take.

    Returns:
      An NNX model, or a pipeline of the family that the folder or file is of, such as
      `flax_models.pipelines.stable_diffusion.StableDiffusionPipeline`.

    Raises:
      CheckpointError: whatever is wrong with the checkpoint, in one message: absent, damaged or
        unsafe files, an unknown architecture, tensors that are missing, unexpected, of the wrong
        shape or type, NaN or infinite.
      ValueError: an argument that does not apply to this checkpoint.
    """
    path = resolved(path, subfolder=subfolder, variant=variant, components=components)
    if isinstance(dtype, str) and dtype == "auto":
        dtype = fastest_dtype()
    dtype, param_dtype = (jnp.dtype(d) if isinstance(d, str) else d for d in (dtype, param_dtype))
    found = Identity(COMPONENT, path)
    if architecture is None or (path / "model_index.json").is_file():
        found = identify(path)
    if found.advice:
        raise CheckpointError(found.advice)
    if found.kind != SINGLE and (given := sorted(_OF_SINGLE_FILES & model_options.keys())):
        raise ValueError(
            f"{path} is no single file, for which {given[0]}= is: a folder tells that itself."
        )
    types = {"dtype": dtype, "param_dtype": param_dtype, "sharding": sharding}
    if stream:
        if param_dtype is not None or sharding is not None:
            raise ValueError(
                "stream=True leaves parameters in their file as they are: leave out param_dtype= "
                "and sharding=."
            )
        if found.kind not in (PIPELINE, COMPONENT, SINGLE):
            raise ValueError(f"stream=True is for transformers, and {path} is none: load it whole.")
        types["stream"] = True
    if found.kind == SINGLE:
        if unknown := sorted(set(model_options) - _OF_SINGLE_FILES):
            raise ValueError(f"{path} is a pipeline: {listing(unknown)} is for a component folder.")
        return load_single_file(found.file or path, components=components, **types, **model_options)
    if found.kind == SEGMENTATION and components is None:
        assert found.file is not None
        loader = loader_of(found.file)
        assert loader is not None
        if unknown := sorted(set(model_options) - set(inspect.signature(loader).parameters)):
            raise ValueError(f"{path} is for {loader.__name__}, which takes no {listing(unknown)}.")
        return loader(found.file, **types, **model_options)
    if found.kind == PIPELINE:
        given = ["architecture"] * (architecture is not None) or list(model_options)
        if given:
            names = ", ".join(f"{name}=" for name in given)
            raise ValueError(f"{path} is a pipeline: {names} is for a component folder.")
        return _load_pipeline(path, components, variant, types)
    if components is not None:
        raise ValueError(f"{path} is no pipeline folder: components= does not apply to it.")
    return _load_component(
        path, architecture, variant, found.stored, model_options=model_options, **types
    )


def _load_pipeline(
    path: FilePath,
    components: Collection[str] | None,
    variant: str | None,
    types: Mapping[str, Any],
) -> Any:
    index = read_index(path)
    kind = architectures.class_of_pipeline(index, str(path))
    known = pipeline_components(kind)
    wanted = set(known if components is None else components)
    if not wanted <= set(known):
        unknown = sorted(wanted - set(known))
        raise ValueError(f"components accepts {known}, received {unknown}.")
    if types.get("stream"):
        require_streamable(kind, path)
    parts: dict[str, Any] = dict.fromkeys((*kind.MODELS, *kind.TOKENIZERS))
    wanted &= set(pipeline_components(kind, index))
    models = [name for name in kind.MODELS if name in wanted]
    having = [name for name in models if variant and holds_variant(path / name, variant)]
    if variant and not having:
        raise CheckpointError(f"{path}: none of {listing(models)} has the variant {variant!r}.")
    for name in models:
        own = variant if name in having else None
        published = class_in(index.get(name))
        parts[name] = _load_component(path / name, published, own, prefix=(name,), **types)
    for name in kind.TOKENIZERS:
        if name in wanted:
            tokenizer = tokenizer_kind(index, name)
            parts[name] = pipeline_tokenizer(path, name, tokenizer)
            if takes_clips(path, name, tokenizer):
                warnings.warn(f"{path} holds no {name}: {CLIPS_OWN}.", stacklevel=3)
            encoder = parts[name.replace("tokenizer", "text_encoder")]
            if encoder is not None:
                check_vocabulary(path, parts[name], encoder.config.vocab_size)
    config = read_scheduler(path, index) if "scheduler" in wanted else {}
    carried = carried_parts(path.resolve(), index, known) if components is None else {}
    return kind(**parts, scheduler_config=config, model_index=index, carried=carried)


def _load_component(
    path: FilePath,
    architecture: Any,
    variant: str | None,
    stored: Mapping[str, StoredTensor] | None = None,
    *,
    model_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> nnx.Module:
    """A component's folder, or its weight file; `options` are those of `build`."""
    model_options = model_options or {}
    folder = path.parent if path.is_file() else path
    raw, source = read_config(folder)
    model_class = architecture
    if architecture is None or isinstance(architecture, str):
        name = architecture or architectures.published_name(raw)
        model_class = architectures.model_class(name, source)
    accepted = set(inspect.signature(model_class.__init__).parameters) - {"self", "config", "rngs"}
    if unknown := sorted(set(model_options) - accepted):
        raise ValueError(
            f"{model_class.__name__} takes no {', '.join(unknown)}; beside the checkpoint it takes "
            f"{', '.join(sorted(accepted))}."
        )
    file = path if path.is_file() else find_weights(folder, model_class.pytorch_library, variant)
    stored = open_weights(file) if stored is None else stored
    options |= {"source": source, "file": str(file), "model_options": model_options}
    return build(model_class, raw, stored, **options)


def save_pytorch(
    model_or_pipeline: Any,
    path: FilePath | str,
    *,
    dtype: Any = None,
    max_shard_size: int | str = "10GB",
    force: bool = False,
) -> FilePath:
    """Write a model or a pipeline as a folder that diffusers and transformers load.

    The folder appears only when it is complete.  The same parameters give the same bytes.

    Args:
      model_or_pipeline: an NNX model of this package, or a pipeline; parts that are None are left
        out.
      path: the folder to make.
      dtype: dtype to store (float32, float16, bfloat16); None keeps each parameter's own.
      max_shard_size: bytes, or text such as "5GB"; larger weights are split over several files.
      force: replace an earlier checkpoint at `path`, once the new one is complete. Only a folder
        that this function or a command wrote is replaced, as its `conceptax.json` tells, and only
        while nothing was added to it.

    Returns:
      The folder's path.

    Raises:
      OutputError: `path` is occupied, unwritable or full, or a parameter is NaN or infinite.
        Nothing is left on disk, and an earlier checkpoint stays as it was.
    """
    from ..flax_models.pipelines.pipeline import Pipeline

    options = {"dtype": None if dtype is None else np.dtype(dtype), "limit": _bytes(max_shard_size)}
    if options["dtype"] not in (None, *FLOAT_NAMES):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, received {dtype}.")
    with atomic_folder(path, force=force, by="conceptax.converters.save_pytorch") as folder:
        if isinstance(model_or_pipeline, Pipeline):
            _write_pipeline(model_or_pipeline, folder, **options)
        elif hasattr(model_or_pipeline, "pytorch_class"):
            _write_component(model_or_pipeline, folder, **options)
        else:
            raise TypeError(
                "save_pytorch takes a model with a PyTorch counterpart or a pipeline, "
                f"received {type(model_or_pipeline).__name__}."
            )
    return FilePath(path)


def save_changes(
    edited: nnx.Module, original: nnx.Module, path: FilePath | str, *, dtype: Any = None
) -> list[str]:
    """Write the tensors in which an edited model differs from its original as a safetensors file.

    Its keys are those of the whole model's file, so `load_state_dict(..., strict=False)` of the
    PyTorch model accepts it: nothing unexpected, and what is missing stays as it was.

    Args:
      edited, original: models of one architecture.
      path: the file to make; its folder exists.
      dtype: dtype to store (float32, float16, bfloat16); None keeps each parameter's own.

    Returns:
      the keys that were written, sorted.

    Raises:
      ValueError: the models differ in their parameters' names or shapes.
      OutputError: no tensor differs, or a parameter is NaN or infinite.
    """
    specs = [spec for spec, _, _ in changed(edited, original)]
    if not specs:
        raise OutputError("the edited model equals the original: there is no change to write.")
    tensors = pending(edited, specs, None if dtype is None else np.dtype(dtype))
    write_safetensors(FilePath(path), tensors, {"format": "pt"})
    return sorted(tensor.key for tensor in tensors)


def load_changes(path: FilePath | str, original: nnx.Module) -> nnx.Module:
    """A copy of a model with some of its tensors replaced by those of a file.

    The inverse of `save_changes`; such files of other programs are read too, safetensors or
    pickles, as long as their keys are the model's.  Unchanged parameters are shared, not copied.

    Args:
      path: the file.
      original: the model; it stays as it is.

    Raises:
      CheckpointError: the file is absent or damaged, or holds no tensor of the model, one that is
        not the model's, or one of another shape.
    """
    stored = open_weights(FilePath(path))
    prefix = getattr(original, "pytorch_prefix", "")
    specs = [
        spec for spec in tensor_specs(original) if spec.key in stored or prefix + spec.key in stored
    ]
    if not specs:
        raise CheckpointError(
            f"{path} holds no tensor of a {type(original).__name__} (found "
            f"{listing(sorted(stored)) or 'nothing'})."
        )
    graphdef, state = nnx.split(original)
    model = nnx.merge(graphdef, nnx.to_pure_dict(state))
    fill(model, stored, source=str(path), specs=specs)
    return model


def _bytes(size: int | str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    if isinstance(size, str):
        try:
            size = int(float(size[:-2]) * units[size[-2:].upper()])
        except (KeyError, ValueError):
            raise ValueError(
                f"max_shard_size takes bytes or text such as '5GB', received {size!r}."
            ) from None
    if size <= 0:
        raise ValueError(f"max_shard_size must be positive, received {size}.")
    return size


def _write_pipeline(pipeline: Any, folder: FilePath, **options) -> None:
    own = type(pipeline).__name__
    index = {"_class_name": own, **pipeline.model_index}
    index["_class_name"] = index["_class_name"] or own
    carried = {}
    for name in pipeline.MODELS:
        model = getattr(pipeline, name)
        if model is not None:
            (folder / name).mkdir()
            _write_component(model, folder / name, **options)
            carried[name] = [model.pytorch_library, model.pytorch_class]
    for name in pipeline.TOKENIZERS:
        if getattr(pipeline, name) is not None:
            write_tokenizer(getattr(pipeline, name), folder / name)
            carried[name] = tokenizer_entry(getattr(pipeline, name), index.get(name))
    if pipeline.scheduler_config:
        config = dict(pipeline.scheduler_config)
        entry = index.get("scheduler") or ["diffusers", None]
        kind = config.setdefault("_class_name", entry[1] or "DDIMScheduler")
        write_json(folder / "scheduler" / "scheduler_config.json", config)
        carried["scheduler"] = ["diffusers", kind]
    copy_carried(pipeline.carried, folder)
    carried |= {name: index.get(name, [None, None]) for name in pipeline.carried if name in index}
    # What diffusers asks for and what the original named, as absent unless it is written here.
    named = [name for name, entry in index.items() if is_part(name, entry)]
    for name in dict.fromkeys((*pipeline_components(pipeline), *pipeline.NOT_CARRIED, *named)):
        index[name] = carried.get(name, [None, None])
    if "safety_checker" in pipeline.NOT_CARRIED and "safety_checker" not in carried:
        index["requires_safety_checker"] = False
    write_json(folder / "model_index.json", index)


def _published_config(model: Any, dtype: np.dtype | None) -> dict[str, Any]:
    """The config as it was loaded, unless it has been edited, and with what readers need."""
    raw = json.loads(model.published_config.text) if hasattr(model, "published_config") else {}
    if not raw or model.config_class.from_dict(raw) != model.config:
        own = {field.name for field in dataclasses.fields(model.config)}
        raw = {k: v for k, v in raw.items() if k not in own} | model.config.to_dict()
    if model.pytorch_library == "diffusers":
        raw = {"_class_name": model.pytorch_class, **raw}
    else:
        raw = {**raw, "architectures": [model.pytorch_class]}
        for name in ("dtype", "torch_dtype"):  # transformers loads in the type that is named here
            if dtype is not None and name in raw:
                raw[name] = dtype.name
    return raw


def _write_component(model: Any, folder: FilePath, *, dtype: np.dtype | None, limit: int) -> None:
    if streaming.is_streamed(model):
        raise OutputError(
            f"a streamed {type(model).__name__} is in its file already: copy that, or load it "
            "without stream=True to write it."
        )
    tensors = pending(model, tensor_specs(model), dtype) + pending_unread(model, dtype)
    write_json(folder / "config.json", _published_config(model, dtype))
    _write_weights(folder, STEMS[model.pytorch_library][0], tensors, limit)


def _write_weights(folder: FilePath, stem: str, tensors: list[PendingTensor], limit: int) -> None:
    shards: list[list[PendingTensor]] = [[]]
    size = 0
    for tensor in file_order(tensors):
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    metadata = {"format": "pt"}
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", shards[0], metadata)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, metadata)
        weight_map |= {tensor.key: name for tensor in shard}
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_json(folder / f"{stem}.safetensors.index.json", index)
