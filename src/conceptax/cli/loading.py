"""Models that commands are given as folders and files."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from conceptax.converters import load_changes, load_maft_plus, load_open_clip, load_pytorch
from conceptax.converters.errors import CheckpointError
from conceptax.converters.identify import read_config, resolved
from conceptax.converters.tensors import tensor_specs
from conceptax.converters.tokenizer import read_tokenizer
from conceptax.converters.weights import open_weights, read_json
from conceptax.flax_models.blip import BlipForImageTextRetrieval
from conceptax.flax_models.blip_2 import Blip2ForImageTextRetrieval
from conceptax.flax_models.clip import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection
from conceptax.flax_models.dinov2 import Dinov2Model
from conceptax.flax_models.maft_plus import MaftPlus
from conceptax.flax_models.open_clip import OpenCLIP
from conceptax.flax_models.stable_diffusion import StableDiffusionPipeline
from conceptax.flax_models.unet_2d_condition import UNet2DConditionModel
from conceptax.methods.concepts import ConceptError
from conceptax.methods.evaluation import ClipClassifier
from conceptax.methods.evaluation.instruments import Blip, Clip, Dino
from conceptax.methods.evaluation.preprocessing import Preprocessing
from conceptax.methods.glyphs.evaluation import GlyphsClassifier
from conceptax.methods.glyphs.judge import load_judge

_TOKENIZER = ("tokenizer.json", "vocab.json")
_PARTS = {
    "text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection,
    "unet": UNet2DConditionModel,
}  # fmt: skip


def load_pipeline(path: Path, dtype: str, purpose: str) -> StableDiffusionPipeline:
    """A whole pipeline, computing in `dtype`.

    Raises:
      ConceptError: the folder holds one component.
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
      path: a pipeline; a folder with a text encoder, a UNet, or one safetensors file of changed
        tensors; or such a file.
      original: what the rest is taken from.
      dtype: computation dtype.

    Raises:
      CheckpointError: none of these, or a part that does not fit the original.
    """
    path = resolved(path)
    if (path / "model_index.json").is_file():
        return load_pipeline(path, dtype, "evaluating")
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise CheckpointError(
                f"{path} holds no edited model: it takes a pipeline (model_index.json), a text "
                "encoder or UNet (config.json), or one safetensors file of changed tensors "
                f"(found {len(files)})."
            )
        path = files[0]
    if path.is_file():
        in_text = any(key.startswith(CLIPTextModel.pytorch_prefix) for key in open_weights(path))
        second = path.stem.startswith("text_encoder_2")  # as `conceptax erase` names it
        name = ("text_encoder_2" if second else "text_encoder") if in_text else "unet"
        return _with(original, name, load_changes(path, getattr(original, name)))
    part = load_pytorch(path, dtype=jnp.dtype(dtype))
    for name, kind in _PARTS.items():
        if isinstance(part, kind):
            return _with(original, name, part)
    raise CheckpointError(
        f"{path} is a {type(part).__name__}; an erasure edits the text encoder or the UNet."
    )


def _with(original: StableDiffusionPipeline, name: str, part: Any) -> StableDiffusionPipeline:
    if getattr(original, name, None) is None:
        raise CheckpointError(f"the original has no {name} that could be edited.")
    shapes = [
        {spec.key: spec.shape for spec in tensor_specs(model)}
        for model in (part, getattr(original, name))
    ]
    if shapes[0] != shapes[1]:
        raise CheckpointError(f"the edited {name} has other sizes than the original's.")
    return dataclasses.replace(original, **{name: part})


def load_clip(path: Path, tokenizer: Any, name: str) -> Clip:
    """A CLIP folder.

    Args:
      path: the folder.
      tokenizer: taken where the folder has none; None takes the one in tokenizer/ beside it, as the
        bundled model has it.
      name: what to call it in records.

    Raises:
      CheckpointError: what is wrong with it, or a tokenizer of another vocabulary.
    """
    path = resolved(path)
    model = _load(path, CLIPModel, "a CLIP with both towers")
    if any((path / file).is_file() for file in _TOKENIZER):
        tokenizer = read_tokenizer(path)
    elif tokenizer is None:
        beside = path.resolve().parent / "tokenizer"
        tokenizer = read_tokenizer(beside if beside.is_dir() else path)
    rows = model.config.text_config.vocab_size
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"{path} embeds {rows} tokens and the tokenizer has {len(tokenizer)}: put the "
            "tokenizer's files that belong to it into the folder."
        )
    own = Preprocessing.clip(model.config.vision_config.image_size)
    return Clip(model, tokenizer, name, _preprocessing(path, own))


def load_dino(path: Path, name: str) -> Dino:
    """A DINOv2 folder.

    Raises:
      CheckpointError: what is wrong with it.
    """
    path = resolved(path)
    model = _load(path, Dinov2Model, "a DINOv2")
    return Dino(model, name, _preprocessing(path, Preprocessing.dinov2()))


def load_blip(path: Path, name: str, *, second: bool = False) -> Blip:
    """A folder of BLIP, or of the second one, with its contrastive head and tokenizer.

    Raises:
      CheckpointError: what is wrong with it.
    """
    path = resolved(path)
    kind = Blip2ForImageTextRetrieval if second else BlipForImageTextRetrieval
    model = _load(path, kind, f"a {kind.__name__}")
    tokenizer = read_tokenizer(path, "BertTokenizer")
    own = Preprocessing.blip(model.config.vision_config.image_size)
    return Blip(model, tokenizer, name, _preprocessing(path, own))


def _load(path: Path, kind: Any, wanted: str) -> Any:
    model = load_pytorch(path)
    if not isinstance(model, kind):
        raise CheckpointError(f"{path} is a {type(model).__name__}, not {wanted}.")
    return model


def _preprocessing(path: Path, own: Preprocessing) -> Preprocessing:
    """What the folder says about images, where it says anything."""
    if (file := path / "preprocessor_config.json").is_file():
        return own.updated(read_json(file), str(file))
    if (file := path / "processor_config.json").is_file():
        return own.updated(read_json(file).get("image_processor") or {}, str(file))
    return own


def load_classifier(path: Path, tokenizer: Any, name: str) -> GlyphsClassifier | ClipClassifier:
    """The classifier in a folder, by its config.json: a judge of glyphs, or a CLIP.

    Raises:
      CheckpointError: it is neither.
    """
    path = resolved(path)
    takes = (
        "it takes a judge that `conceptax glyphs train` built, or a CLIP with both towers "
        "(config.json with model_type clip)."
    )
    if (path / "model_index.json").is_file():
        inside = [name for name in ("judge", "clip") if (path / name / "config.json").is_file()]
        hint = f" Pass {path / inside[0]}, which is in it." if inside else ""
        raise CheckpointError(f"{path} is a pipeline, no classifier: {takes}{hint}")
    if not ((path if path.is_dir() else path.parent) / "config.json").is_file():
        raise CheckpointError(f"{path} is no classifier, for it has no config.json: {takes}")
    config, _ = read_config(path if path.is_dir() else path.parent)
    if config.get("_class_name") == "Judge":
        return GlyphsClassifier(load_judge(path))
    if config.get("model_type") == "clip":
        return ClipClassifier(load_clip(path, tokenizer, name))
    raise CheckpointError(f"{path} is no classifier: {takes}")


def load_segmenter_model(path: Path, *, form: str, token_order: str, dtype: str) -> MaftPlus:
    """A MAFT+ model.

    Args:
      path: a folder that `conceptax segment train` wrote, or a detectron2 checkpoint.
      form, token_order: of a checkpoint, as for `load_maft_plus`; a folder with config.json tells
        them itself.
      dtype: computation dtype.

    Raises:
      CheckpointError: what is wrong with it.
    """
    if path.is_dir():
        model = load_pytorch(path, dtype=jnp.dtype(dtype))
    else:
        model = load_maft_plus(path, form=form, token_order=token_order, dtype=jnp.dtype(dtype))
    if not isinstance(model, MaftPlus):
        raise CheckpointError(f"{path} is a {type(model).__name__}, not a MAFT+ model.")
    return model


def load_open_clip_model(path: Path, *, dtype: str, prefix: str = "") -> OpenCLIP:
    """An OpenCLIP model with a ConvNeXt tower, from a folder or from a weight file.

    Args:
      path: the folder or file.
      dtype: computation dtype.
      prefix: what its keys begin with in a larger file.

    Raises:
      CheckpointError: what is wrong with it.
    """
    if path.is_dir():
        model = load_pytorch(path, dtype=jnp.dtype(dtype))
    else:
        model = load_open_clip(path, prefix=prefix, dtype=jnp.dtype(dtype))
    if not isinstance(model, OpenCLIP):
        raise CheckpointError(f"{path} is a {type(model).__name__}, not an OpenCLIP model.")
    return model


def load_segmentation_tokenizer(path: Path, given: Path | None, clip: OpenCLIP) -> Any:
    """The tokenizer in a folder, by default in that of the model at `path`.

    Raises:
      CheckpointError: there is none, or it is of another vocabulary.
    """
    folder = given or (path if path.is_dir() else path.parent)
    if not any((folder / file).is_file() for file in _TOKENIZER):
        raise CheckpointError(
            f"{folder} holds no tokenizer ({' or '.join(_TOKENIZER)}): pass --tokenizer FOLDER, "
            "such as that of openai/clip-vit-base-patch32."
        )
    tokenizer = read_tokenizer(folder)
    rows = clip.config.text_config.vocab_size
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"{path} embeds {rows} tokens and the tokenizer in {folder} has {len(tokenizer)}."
        )
    return tokenizer
