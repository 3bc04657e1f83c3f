"""Models that people give as folders and files: pipelines, edited ones, MAFT+, OpenCLIP."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from conceptax.converters import load_maft_plus, load_open_clip, load_pytorch, merge_parts
from conceptax.converters.additions import is_whole
from conceptax.converters.errors import CheckpointError
from conceptax.converters.formats.lora import holds_lora
from conceptax.converters.tokenizer import read_tokenizer
from conceptax.flax_models.layers.remat import set_remat
from conceptax.flax_models.maft_plus import MaftPlus
from conceptax.flax_models.open_clip import OpenCLIP
from conceptax.flax_models.pipelines.pipeline import Pipeline
from conceptax.flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from conceptax.methods.text.phrases import ConceptError

Recompute = Literal["auto", "on", "off"]
_LARGE = 100_000_000  # parameters of a UNet whose activations fill a usual machine


def load_pipeline(
    path: Path, dtype: str, purpose: str, *, remat: Recompute = "off"
) -> StableDiffusionPipeline:
    """A whole pipeline, computing in `dtype`.

    With `remat` it recomputes activations in the backward pass, "auto" where its UNet is large.

    Raises:
      ConceptError: the folder holds one component, or lacks one; `purpose` is what needs it.
      CheckpointError: what is wrong with the folder.
    """
    pipeline = load_pytorch(path, dtype=jnp.dtype(dtype))
    if isinstance(pipeline, Pipeline) and not isinstance(pipeline, StableDiffusionPipeline):
        raise ConceptError(
            f"{path} is a {type(pipeline).__name__}, and {purpose} takes Stable Diffusion 1, 2 or "
            "XL, whose UNet reads CLIP; `conceptax sample` draws with it."
        )
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise ConceptError(
            f"{path} holds one component, and {purpose} needs the whole pipeline: pass the "
            "folder with model_index.json."
        )
    require_whole(pipeline, path, purpose)
    recompute(pipeline, remat)
    return pipeline


def recompute(pipeline: StableDiffusionPipeline, remat: Recompute) -> None:
    """Have models recompute activations in the backward pass; "auto" where the UNet is large."""
    large = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(pipeline.unet))) > _LARGE
    if remat == "on" or (remat == "auto" and large):
        for name in pipeline.MODELS:
            set_remat(getattr(pipeline, name), True)


def require_whole(pipeline: Pipeline, path: Path, purpose: str) -> None:
    """Refuse a pipeline from a folder or file that lacks something.

    Raises:
      ConceptError: it does; `purpose` is what needs it.
    """
    needed = [name for name in pipeline.MODELS if name not in pipeline.OPTIONAL]
    if lacking := [name for name in needed if getattr(pipeline, name) is None]:
        raise ConceptError(
            f"{path} holds no {' and no '.join(lacking)}, and {purpose} needs the whole pipeline: "
            "pass a folder or file that has all of it."
        )
    needed = [name for name in pipeline.TOKENIZERS if name not in pipeline.OPTIONAL]
    if any(getattr(pipeline, name) is None for name in needed):
        raise ConceptError(
            f"{path} is a single file without a tokenizer, and its tokens are not CLIP's: put the "
            "folder 'tokenizer' that belongs to it beside it, or make a folder of both with "
            "conceptax convert --tokenizer."
        )


def load_edited(
    path: Path, original: StableDiffusionPipeline, dtype: str, purpose: str = "evaluating"
) -> StableDiffusionPipeline:
    """A pipeline, or the original with what `conceptax erase --export` writes in its place.

    Args:
      path: a pipeline, as a folder or a single file; or a part, as `converters.merge_parts` takes
        it.
      original: what the rest is taken from.
      dtype: computation dtype.
      purpose: as for `load_pipeline`.

    Raises:
      CheckpointError: none of these, a part that does not fit the original, or one that no erasure
        edits.
    """
    if is_whole(path):
        return load_pipeline(path, dtype, purpose)
    edited = merge_parts(original, path)
    if edited.vae is not original.vae:
        raise CheckpointError(
            f"{path} is a {type(edited.vae).__name__}; an erasure edits the text encoder or the "
            "UNet."
        )
    return edited


def with_additions(
    pipeline: Any, additions: Sequence[Path], scale: float = 1.0, settings: str | None = None
) -> Any:
    """The pipeline with parts from elsewhere, one after the other; new words are printed.

    Args:
      pipeline: it stays as it is.
      additions: files and folders, as for `converters.merge_parts`.
      scale: how much of each LoRA, which is among them where it is not 1.
      settings: that images of each LoRA are drawn with, as for `converters.merge_parts`.

    Raises:
      CheckpointError: what is wrong with one, or does not fit the pipeline.
      ValueError: a scale that says nothing.
    """
    if scale == 0:
        raise ValueError("--add-scale 0 adds nothing: pass another scale, or leave out --add.")
    loras = [addition for addition in additions if holds_lora(addition)]
    for flag, given in (("--add-scale", scale != 1), ("--add-settings", settings is not None)):
        if given and not loras:
            raise ValueError(f"{flag} is for LoRA files, and --add names none.")
    for addition in additions:
        own = settings if addition in loras else None
        before, pipeline = pipeline.tokenizer, merge_parts(pipeline, addition, scale, settings=own)
        if pipeline.tokenizer is not before:
            new = pipeline.tokenizer.get_added_vocab().keys() - before.get_vocab().keys()
            print(f"{addition}: new words for prompts: {', '.join(sorted(new))}")
    return pipeline


def load_segmenter_model(path: Path, *, form: str, token_order: str, dtype: str) -> MaftPlus:
    """A MAFT+ model, computing in `dtype`.

    Args:
      path: a folder that `conceptax segment train` wrote, or a detectron2 checkpoint.
      form, token_order: of a checkpoint, as for `load_maft_plus`; a folder tells them itself.

    Raises:
      CheckpointError: what is wrong with it.
    """
    from conceptax.reporting.instruments import load_as  # with all of evaluation behind it

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
    from conceptax.reporting.instruments import load_as

    read = load_pytorch if path.is_dir() else functools.partial(load_open_clip, prefix=prefix)
    return load_as(path, OpenCLIP, "an OpenCLIP model", read=read, dtype=jnp.dtype(dtype))


def load_segmentation_tokenizer(path: Path, given: Path | None, clip: OpenCLIP) -> Any:
    """The tokenizer in a folder or its tokenizer/, by default in that of the model at `path`.

    Raises:
      CheckpointError: there is none, or it is of another vocabulary.
    """
    from conceptax.reporting.instruments import TOKENIZER, check_vocabulary, has_tokenizer

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
