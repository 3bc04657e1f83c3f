"""Load the models that measure: CLIP, DINOv2, BLIP, Inception-v3, a classifier."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from conceptax.converters import load_pytorch
from conceptax.converters.errors import CheckpointError
from conceptax.converters.files.weights import read_json
from conceptax.converters.formats.identify import read_config, resolved
from conceptax.converters.formats.inception import load_inception
from conceptax.converters.tokenizer import read_tokenizer
from conceptax.flax_models.blip import BlipForImageTextRetrieval
from conceptax.flax_models.blip_2 import Blip2ForImageTextRetrieval
from conceptax.flax_models.clip import CLIPModel
from conceptax.flax_models.dinov2 import Dinov2Model
from conceptax.methods.evaluation import ClipClassifier
from conceptax.methods.evaluation.instruments import Blip, Clip, Dino, Inception
from conceptax.methods.evaluation.preprocessing import Preprocessing
from conceptax.methods.glyphs.evaluation import GlyphsClassifier
from conceptax.methods.glyphs.judge import load_judge

TOKENIZER = ("tokenizer.json", "vocab.json")  # files, one of which is there

Model = TypeVar("Model")


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
    model = load_as(path, CLIPModel, "a CLIP with both towers")
    if has_tokenizer(path):
        tokenizer = read_tokenizer(path)
    elif tokenizer is None:
        beside = path.resolve().parent / "tokenizer"
        tokenizer = read_tokenizer(beside if beside.is_dir() else path)
    check_vocabulary(path, model, tokenizer, "the tokenizer")
    own = Preprocessing.clip(model.config.vision_config.image_size)
    return Clip(model, tokenizer, name, _preprocessing(path, own))


def load_dino(path: Path, name: str) -> Dino:
    """A DINOv2 folder.

    Raises:
      CheckpointError: what is wrong with it.
    """
    path = resolved(path)
    model = load_as(path, Dinov2Model, "a DINOv2")
    return Dino(model, name, _preprocessing(path, Preprocessing.dinov2()))


def load_blip(path: Path, name: str, *, second: bool = False) -> Blip:
    """A folder of BLIP, or of the second one, with its contrastive head and tokenizer.

    Raises:
      CheckpointError: what is wrong with it.
    """
    path = resolved(path)
    kind = Blip2ForImageTextRetrieval if second else BlipForImageTextRetrieval
    model = load_as(path, kind, f"a {kind.__name__}")
    tokenizer = read_tokenizer(path, "BertTokenizer")
    own = Preprocessing.blip(model.config.vision_config.image_size)
    return Blip(model, tokenizer, name, _preprocessing(path, own))


def load_fid(path: Path, resize: Any) -> Inception:
    """The Inception-v3 of Fréchet inception distances, from its weight file.

    Args:
      path: pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`, or the same as safetensors.
      resize: as for `Inception`.

    Raises:
      CheckpointError: what is wrong with it.
    """
    return Inception(load_inception(path), path.name, resize)


def load_as(
    path: Path,
    kind: type[Model],
    wanted: str,
    *,
    read: Callable[..., Any] = load_pytorch,
    **options: Any,
) -> Model:
    """What `read` makes of a path, which must be a model of one kind.

    Raises:
      CheckpointError: it is of another one, or what else is wrong with it.
    """
    model = read(path, **options)
    if not isinstance(model, kind):
        raise CheckpointError(f"{path} is a {type(model).__name__}, not {wanted}.")
    return model


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return any((folder / file).is_file() for file in TOKENIZER)


def check_vocabulary(path: Path, clip: Any, tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer that has more tokens than the CLIP at `path` embeds.

    Raises:
      CheckpointError: it has.
    """
    rows = clip.config.text_config.vocab_size
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"{path} embeds {rows} tokens and {name} has {len(tokenizer)}: put the "
            "tokenizer's files that belong to it into the folder."
        )


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
