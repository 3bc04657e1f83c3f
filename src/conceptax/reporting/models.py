"""Models that people give as folders and files: pipelines, edited ones, MAFT+, OpenCLIP."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from conceptax.converters import load_maft_plus, load_open_clip, load_personalized, load_pytorch
from conceptax.converters.errors import CheckpointError
from conceptax.converters.formats.identify import resolved
from conceptax.converters.formats.lora import holds_lora, merge_lora
from conceptax.converters.formats.personalized import personalized_files
from conceptax.converters.tensors import tensor_specs
from conceptax.converters.tokenizer import read_tokenizer
from conceptax.flax_models.clip import CLIPTextModel, CLIPTextModelWithProjection
from conceptax.flax_models.maft_plus import MaftPlus
from conceptax.flax_models.open_clip import OpenCLIP
from conceptax.flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from conceptax.flax_models.unet_2d_condition import UNet2DConditionModel
from conceptax.methods.text.phrases import ConceptError
from conceptax.reporting.instruments import TOKENIZER, check_vocabulary, has_tokenizer, load_as

_PARTS = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "unet": UNet2DConditionModel,
}


def load_pipeline(path: Path, dtype: str, purpose: str) -> StableDiffusionPipeline:
    """A whole pipeline, computing in `dtype`.

    Raises:
      ConceptError: the folder holds one component, or lacks one; `purpose` is what needs it.
      CheckpointError: what is wrong with the folder.
    """
    pipeline = load_pytorch(path, dtype=jnp.dtype(dtype))
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise ConceptError(
            f"{path} holds one component, and {purpose} needs the whole pipeline: pass the "
            "folder with model_index.json."
        )
    if lacking := [name for name in pipeline.MODELS if getattr(pipeline, name) is None]:
        raise ConceptError(
            f"{path} holds no {' and no '.join(lacking)}, and {purpose} needs the whole pipeline: "
            "pass a folder or file that has all of it."
        )
    if pipeline.tokenizer is None:
        raise ConceptError(
            f"{path} is a single file without a tokenizer: put the folder 'tokenizer' of a Stable "
            "Diffusion folder beside it, or make a folder of it with conceptax convert --tokenizer."
        )
    return pipeline


def load_edited(
    path: Path, original: StableDiffusionPipeline, dtype: str
) -> StableDiffusionPipeline:
    """A pipeline, or the original with what a folder or file of `conceptax erase --export` changes.

    Args:
      path: a pipeline; a folder with a text encoder, a UNet, or safetensors files of changed
        tensors; or such a file, or a LoRA.
      original: what the rest is taken from.
      dtype: computation dtype.

    Raises:
      CheckpointError: none of these, or a part that does not fit the original.
    """
    path = resolved(path)
    if (path / "model_index.json").is_file():
        return load_pipeline(path, dtype, "evaluating")
    folder = path if path.is_dir() else path.parent
    if path.exists() and not (folder / "config.json").is_file():
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files:
            raise CheckpointError(
                f"{path} holds no edited model: it takes a pipeline (model_index.json), a text "
                "encoder or UNet (config.json), or safetensors files of changed tensors."
            )
        return functools.reduce(merged, files, original)
    part = load_pytorch(path, dtype=jnp.dtype(dtype))
    name = next((name for name, kind in _PARTS.items() if isinstance(part, kind)), None)
    if name is None:
        raise CheckpointError(
            f"{path} is a {type(part).__name__}; an erasure edits the text encoder or the UNet."
        )
    if getattr(original, name, None) is None:
        raise CheckpointError(f"the original has no {name} that could be edited.")
    edited, own = (
        {spec.key: spec.shape for spec in tensor_specs(model)}
        for model in (part, getattr(original, name))
    )
    if edited != own:
        raise CheckpointError(f"the edited {name} has other sizes than the original's.")
    return dataclasses.replace(original, **{name: part})


def merged(
    pipeline: StableDiffusionPipeline, addition: Path, scale: float = 1.0
) -> StableDiffusionPipeline:
    """The pipeline with what was trained elsewhere, of any kind that `conceptax convert` adds.

    Args:
      pipeline: it stays as it is.
      addition: a file or folder: a LoRA, embeddings of new tokens, weights of Custom Diffusion,
        changed weights; or a LoRA and some of the others.
      scale: how much of a LoRA.

    Raises:
      CheckpointError: what is wrong with the addition, or does not fit the pipeline.
    """
    if holds_lora(addition):
        pipeline = merge_lora(pipeline, addition, scale)
        if personalized_files(addition) in ([], [addition.expanduser()]):
            return pipeline
    return load_personalized(pipeline, addition)


def load_segmenter_model(path: Path, *, form: str, token_order: str, dtype: str) -> MaftPlus:
    """A MAFT+ model, computing in `dtype`.

    Args:
      path: a folder that `conceptax segment train` wrote, or a detectron2 checkpoint.
      form, token_order: of a checkpoint, as for `load_maft_plus`; a folder tells them itself.

    Raises:
      CheckpointError: what is wrong with it.
    """
    read = functools.partial(load_maft_plus, form=form, token_order=token_order)
    read = load_pytorch if path.is_dir() else read
    return load_as(path, MaftPlus, "a MAFT+ model", read=read, dtype=jnp.dtype(dtype))


def load_open_clip_model(path: Path, *, dtype: str, prefix: str = "") -> OpenCLIP:
    """An OpenCLIP model with a ConvNeXt tower, computing in `dtype`.

    Args:
      path: a folder, or a file of weights.
      prefix: what its keys begin with in a larger file.

    Raises:
      CheckpointError: what is wrong with it.
    """
    read = load_pytorch if path.is_dir() else functools.partial(load_open_clip, prefix=prefix)
    return load_as(path, OpenCLIP, "an OpenCLIP model", read=read, dtype=jnp.dtype(dtype))


def load_segmentation_tokenizer(path: Path, given: Path | None, clip: OpenCLIP) -> Any:
    """The tokenizer in a folder or its tokenizer/, by default in that of the model at `path`.

    Raises:
      CheckpointError: there is none, or it is of another vocabulary.
    """
    folder = given or (path if path.is_dir() else path.parent)
    if not has_tokenizer(folder) and has_tokenizer(folder / "tokenizer"):
        folder /= "tokenizer"
    if not has_tokenizer(folder):
        raise CheckpointError(
            f"{folder} holds no tokenizer ({' or '.join(TOKENIZER)}): pass --tokenizer FOLDER, "
            "such as that of openai/clip-vit-base-patch32."
        )
    tokenizer = read_tokenizer(folder)
    check_vocabulary(path, clip, tokenizer, f"the tokenizer in {folder}")
    return tokenizer
