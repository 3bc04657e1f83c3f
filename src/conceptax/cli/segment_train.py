"""`conceptax segment train`: MAFT+ on scenes of one's own."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import tyro
from flax import nnx

from conceptax.cli.loading import (
    load_open_clip_model,
    load_segmentation_tokenizer,
    load_segmenter_model,
)
from conceptax.cli.options import Mesh, OptionalInt, OptionalPath, device_mesh
from conceptax.cli.runs import Run, kept_run, new_folder
from conceptax.converters import save_maft_plus, save_pytorch
from conceptax.converters.files.output import CHECKPOINT_FILES
from conceptax.converters.files.weights import open_weights
from conceptax.converters.formats.segmentation import TEACHER, WRAPPERS
from conceptax.converters.tokenizer import write_tokenizer
from conceptax.flax_models.maft_plus import MaftPlus, MaftPlusConfig
from conceptax.flax_models.open_clip import OpenCLIP
from conceptax.methods.memory import require_memory, segmenter_bytes
from conceptax.methods.segmentation.augmentation import LargeScaleJitter, ResizeFlip
from conceptax.methods.segmentation.batches import scene_batches
from conceptax.methods.segmentation.datasets import LAYOUTS, open_scenes
from conceptax.methods.segmentation.maft_plus import MaftPlusTraining, fit
from conceptax.methods.segmentation.vocabulary import Vocabulary, text_rows
from conceptax.methods.training import RULES

RECORD = "segmenting.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train MAFT+ on scenes: around an OpenCLIP (--open-clip), or an earlier one (--model).

    Writes a folder that `segment run` and `segment evaluate` take: the model, its tokenizer,
    segmenting.json, which records settings, seed, versions and the last losses, and training.jsonl.

    Attributes:
      data: a folder with images/ and annotations/, or the root of a published layout.
      vocabulary: classes separated by ; and synonyms by , or a .txt file of lines id:name,synonym.
      open_clip: OpenCLIP's weights (convnext_base_w_320, convnext_large_d_320; .bin or
        .safetensors), or a folder.
      model: a MAFT+ folder or checkpoint to go on from.
      teacher: the CLIP that compensation holds on to; by default the one in the checkpoint, or the
        model as it starts.
      tokenizer: a CLIP tokenizer's folder; by default the model's own.
      layout: how the data are laid out.
      ignore: label of pixels that count nowhere; by default 255, and 65535 in maps of 16 bits.
      form: of a new model's or a checkpoint's transfer; panoptic starts as the identity.
      token_order: of a new model's or a checkpoint's transfer; "reference" repeats the layout of
        the published weights.
      decoder: of a new model: the published sizes, or small ones.
      augmentation: resize and mirror, or large-scale jitter; by default the latter for panoptic
        scenes.
      short_side: of a resized scene, in pixels.
      long_side: at most so many along the longer side.
      crop: side of a jittered scene.
      batch_size: scenes in an update.
      multiple: of which the padded sides are multiples; a larger one has fewer shapes to compile.
      targets: room for so many segments in a scene; by default what the fullest needs.
      output: the folder to write.
      export: a folder with config.json, or one detectron2 file (pth needs torch) with the teacher.
      seed: of everything random in the run.
      text_cache: folder to keep the text embeddings of vocabularies in.
      checkpoint_dir: keep checkpoints here, and go on from the newest one. Without it they are kept
        beside the output, as .OUTPUT.checkpoints, until the output is there: after Ctrl-C the same
        command goes on where it was.
      checkpoint_every: save after every n-th step, and when interrupted; 0 keeps none.
      mesh: devices that split the batch, and devices that split the parameters.
      dtype: computation dtype; the pixel decoder and what is trained are always float32.
      force: replace an earlier result at the output.
      settings: of the training.
    """

    data: Path
    vocabulary: str
    open_clip: OptionalPath = None
    model: OptionalPath = None
    teacher: OptionalPath = None
    tokenizer: OptionalPath = None
    layout: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(LAYOUTS)}}}")] = "folder"
    ignore: OptionalInt = None
    form: Literal["semantic", "panoptic"] = "semantic"
    token_order: Literal["reference", "raster"] = "reference"
    decoder: Literal["published", "tiny"] = "published"
    augmentation: Literal["resize", "jitter"] | None = None
    short_side: int = 800
    long_side: int = 1333
    crop: int = 1024
    batch_size: int = 8
    multiple: int = 32
    targets: OptionalInt = None
    output: Path = Path("segmenter")
    export: Literal["folder", "pth", "safetensors"] = "folder"
    seed: int = 0
    text_cache: OptionalPath = None
    checkpoint_dir: OptionalPath = None
    checkpoint_every: int = 1000
    mesh: Mesh = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    force: bool = False
    settings: Annotated[MaftPlusTraining, tyro.conf.arg(name="")] = MaftPlusTraining()  # noqa: RUF009


# Where and how a run is executed, not what it computes.
_ELSEWHERE = (
    "output",
    "export",
    "text_cache",
    "checkpoint_dir",
    "checkpoint_every",
    "mesh",
    "force",
)


def train(command: Train) -> None:
    """Load, train, save; the output is claimed first."""
    if (command.open_clip is None) == (command.model is None):
        raise ValueError("pass either --open-clip, to start around it, or --model, to go on.")
    if command.export == "pth" and importlib.util.find_spec("torch") is None:
        raise ValueError("--export pth needs torch; install conceptax[torch], or take safetensors.")
    vocabulary = Vocabulary.named(command.vocabulary)
    mesh = device_mesh(command.mesh)
    markers = (*CHECKPOINT_FILES, RECORD)
    with (
        kept_run(command, command.settings.steps) as kept,
        new_folder(command.output, force=command.force, command=command, markers=markers) as folder,
    ):
        scenes = open_scenes(
            command.data, len(vocabulary), layout=command.layout, ignore=command.ignore
        )
        model, original, tokenizer = _start(command)
        small, name = (
            (command.crop, "--crop")
            if _jitters(command, scenes.panoptic)
            else (min(command.short_side, command.long_side), "--short-side")
        )
        require_memory(
            segmenter_bytes(model.config, command.batch_size, small, small),
            f"training on {command.batch_size} scenes of {small} pixels",
            f"take a smaller --batch-size or {name}",
            spread=True,
        )
        rows = text_rows(model.backbone.clip_model, tokenizer, vocabulary, cache=command.text_cache)
        batches = scene_batches(
            scenes,
            _augmentation(command, scenes.panoptic),
            command.batch_size,
            command.seed,
            room=command.targets,
            multiple=command.multiple,
        )
        run = Run(folder, RECORD, _record(command, vocabulary, len(scenes)))
        with run.training(kept, mesh=mesh, rules=RULES["MaftPlus"]) as options:
            trained = fit(
                model,
                rows,
                vocabulary.synonyms(),
                batches,
                command.settings,
                seed=command.seed,
                teacher=original.visual.trunk,
                **options,
            )
        _save(command, folder, trained, original, tokenizer, len(vocabulary))
        run.write(last="last_step")
    print(
        f"{command.output}: {command.settings.steps} steps on {len(scenes)} scenes in "
        f"{run.record['seconds']:.0f} s"
    )


def _start(command: Train) -> tuple[MaftPlus, OpenCLIP, Any]:
    """The model to train, the CLIP it is held to, and its tokenizer."""
    source = command.model or command.open_clip
    assert source is not None
    if command.open_clip is not None:
        original = load_open_clip_model(command.open_clip, dtype=command.dtype)
        sizes = MaftPlusConfig.tiny if command.decoder == "tiny" else MaftPlusConfig.of
        config = sizes(original.config, form=command.form, token_order=command.token_order)
        model = MaftPlus.around(
            original, config, dtype=jnp.dtype(command.dtype), rngs=nnx.Rngs(command.seed)
        )
    else:
        model = load_segmenter_model(
            source, form=command.form, token_order=command.token_order, dtype=command.dtype
        )
        original = model.backbone.clip_model
        if source.is_file() and _holds_teacher(source):
            original = load_open_clip_model(source, dtype=command.dtype, prefix=TEACHER)
    if command.teacher is not None:
        original = load_open_clip_model(command.teacher, dtype=command.dtype)
    tokenizer = load_segmentation_tokenizer(source, command.tokenizer, model.backbone.clip_model)
    return model, original, tokenizer


def _holds_teacher(path: Path) -> bool:
    return any(key.startswith(TEACHER) for key in open_weights(path, wrappers=WRAPPERS))


def _jitters(command: Train, panoptic: bool) -> bool:
    return (command.augmentation or ("jitter" if panoptic else "resize")) == "jitter"


def _augmentation(command: Train, panoptic: bool) -> ResizeFlip | LargeScaleJitter:
    if _jitters(command, panoptic):
        return LargeScaleJitter(command.crop)
    return ResizeFlip(command.short_side, command.long_side)


def _record(command: Train, vocabulary: Vocabulary, scenes: int) -> dict[str, Any]:
    fields = {
        field.name: getattr(command, field.name)
        for field in dataclasses.fields(command)
        if field.name not in (*_ELSEWHERE, "settings", "vocabulary")
    }
    record = {
        **fields,
        "vocabulary": vocabulary.classes,
        "scenes": scenes,
        "settings": dataclasses.asdict(command.settings),
    }
    return json.loads(json.dumps(record, default=str))


def _save(
    command: Train, folder: Path, model: MaftPlus, original: OpenCLIP, tokenizer: Any, classes: int
) -> None:
    if command.export == "folder":
        save_pytorch(model, folder)
    else:
        file = folder / f"maft_plus.{command.export}"
        save_maft_plus(model, file, teacher=original, classes=classes)
    write_tokenizer(tokenizer, folder)
