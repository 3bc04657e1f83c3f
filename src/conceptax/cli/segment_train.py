"""`conceptax segment train`: MAFT+ on scenes of one's own."""

import dataclasses
import importlib.util
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import tyro
from flax import nnx

from conceptax.cli.options import (
    CheckpointDir,
    Mesh,
    OptionalInt,
    OptionalModel,
    OptionalPath,
    shown,
)
from conceptax.cli.runs import kept_run, new_folder, settings_of
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
from conceptax.methods.segmentation.usage import Usage, read_usage, write_usage
from conceptax.methods.segmentation.vocabulary import Vocabulary, text_rows
from conceptax.methods.training import RULES
from conceptax.reporting.models import (
    load_open_clip_model,
    load_segmentation_tokenizer,
    load_segmenter_model,
)
from conceptax.reporting.runs import Run

RECORD = "segmenting.json"
# Flags about where and how a run is executed, not what it computes.
_PLACES = ("output", "export", "text_cache", "checkpoint_dir", "checkpoint_every", "mesh", "force")


ShortSide = Annotated[int | None, shown("INT", "(default: the model's own, or 800)")]
LongSide = Annotated[int | None, shown("INT", "(default: the model's own, or 1333)")]


def sized(command: Any, model: Path) -> tuple[Any, Usage]:
    """The command and how its model is used, with the sizes of the command or else the model's."""
    usage = read_usage(model)
    given = {name: getattr(command, name) for name in ("short_side", "long_side")}
    given = {name: getattr(usage, name) if side is None else side for name, side in given.items()}
    return dataclasses.replace(command, **given), dataclasses.replace(usage, **given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train MAFT+ on scenes: around an OpenCLIP (--open-clip), or an earlier one (--model).

    Writes a folder that `segment run` and `segment evaluate` take: the model, its tokenizer,
    segmenter.json, which states its classes, the sentences that its text tower knows and the size
    at which it sees images; segmenting.json, which records settings, seed, versions and the last
    losses; and training.jsonl.

    Attributes:
      data: a folder with images/ and annotations/, or the root of a published layout.
      vocabulary: classes separated by ; and synonyms by , or a .txt file of lines id:name,synonym.
      open_clip: OpenCLIP's weights (convnext_base_w_320, convnext_large_d_320; .bin or
        .safetensors), or a folder.
      model: a MAFT+ folder or checkpoint to go on from, with the sentences of its segmenter.json.
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
      checkpoint_every: save after every n-th step, and when interrupted; 0 keeps none.
      dtype: computation dtype; the pixel decoder and what is trained are always float32.
      force: replace an earlier result at the output.
      settings: of the training.
    """

    data: Path
    vocabulary: str
    open_clip: OptionalModel = None
    model: OptionalModel = None
    teacher: OptionalModel = None
    tokenizer: OptionalModel = None
    layout: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(LAYOUTS)}}}")] = "folder"
    ignore: OptionalInt = None
    form: Literal["semantic", "panoptic"] = "semantic"
    token_order: Literal["reference", "raster"] = "reference"
    decoder: Literal["published", "tiny"] = "published"
    augmentation: Literal["resize", "jitter"] | None = None
    short_side: ShortSide = None
    long_side: LongSide = None
    crop: int = 1024
    batch_size: int = 8
    multiple: int = 32
    targets: OptionalInt = None
    output: Path = Path("segmenter")
    export: Literal["folder", "pth", "safetensors"] = "folder"
    seed: int = 0
    text_cache: OptionalPath = None
    checkpoint_dir: CheckpointDir = None
    checkpoint_every: int = 1000
    mesh: Mesh = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    force: bool = False
    settings: Annotated[MaftPlusTraining, tyro.conf.arg(name="")] = MaftPlusTraining()  # noqa: RUF009


def train(command: Train) -> None:
    """Load, train, save; the output is claimed first."""
    if (command.open_clip is None) == (command.model is None):
        raise ValueError("pass either --open-clip, to start around it, or --model, to go on.")
    if command.export == "pth" and importlib.util.find_spec("torch") is None:
        raise ValueError("--export pth needs torch; install conceptax[torch], or take safetensors.")
    source = command.model or command.open_clip
    assert source is not None
    command, usage = sized(command, source)
    short, long = usage.short_side, usage.long_side
    vocabulary, settings = Vocabulary.named(command.vocabulary), command.settings
    with (
        kept_run(command, settings.steps) as kept,
        new_folder(command, markers=(*CHECKPOINT_FILES, RECORD)) as folder,
    ):
        scenes = open_scenes(
            command.data, len(vocabulary), layout=command.layout, ignore=command.ignore
        )
        model, original, tokenizer = _start(command, source)
        usual = "jitter" if scenes.panoptic else "resize"
        if (command.augmentation or usual) == "jitter":
            augmentation, side, flag = LargeScaleJitter(command.crop), command.crop, "--crop"
        else:
            augmentation, side, flag = ResizeFlip(short, long), min(short, long), "--short-side"
        require_memory(
            segmenter_bytes(model.config, command.batch_size, side, side),
            f"training on {command.batch_size} scenes of {side} pixels",
            f"take a smaller --batch-size or {flag}",
            spread=True,
        )
        rows = text_rows(
            model.backbone.clip_model,
            tokenizer,
            vocabulary,
            templates=usage.templates,
            cache=command.text_cache,
        )
        batches = scene_batches(
            scenes,
            augmentation,
            command.batch_size,
            command.seed,
            room=command.targets,
            multiple=command.multiple,
        )
        record = settings_of(command, *_PLACES, "settings", "vocabulary") | {
            "vocabulary": [list(names) for names in vocabulary.classes],
            "scenes": len(scenes),
            "settings": settings_of(settings),
        }
        run = Run(folder, RECORD, record)
        with run.training(kept, rules=RULES["MaftPlus"]) as options:
            trained = fit(
                model,
                rows,
                vocabulary.synonyms(),
                batches,
                settings,
                seed=command.seed,
                teacher=original.visual.trunk,
                **options,
            )
        file = "" if command.export == "folder" else f"maft_plus.{command.export}"
        if file:
            save_maft_plus(trained, folder / file, teacher=original, classes=len(vocabulary))
        else:
            save_pytorch(trained, folder)
        write_tokenizer(tokenizer, folder)
        names = enumerate(vocabulary.names)
        if scenes.panoptic:
            stuff = tuple(name for k, name in names if k not in scenes.things)
        else:
            stuff = tuple(name for _, name in names if name in usage.stuff)
        write_usage(dataclasses.replace(usage, vocabulary=vocabulary, stuff=stuff), folder)
        run.write(last="last_step")
    done = f"{settings.steps} steps on {len(scenes)} scenes"
    print(f"{command.output}: {done} in {run.record['seconds']:.0f} s")
    place, config = shlex.quote(str(command.output / file)), trained.config
    form = f" --form {config.form} --token-order {config.token_order}" if file else ""
    print(f"next: conceptax segment run --model {place}{form} IMAGES")


def _start(command: Train, source: Path) -> tuple[MaftPlus, OpenCLIP, Any]:
    """The model to train, the CLIP it is held to, and its tokenizer."""
    form, token_order, dtype = command.form, command.token_order, command.dtype
    if command.open_clip is not None:
        original = load_open_clip_model(source, dtype=dtype)
        sizes = MaftPlusConfig.tiny if command.decoder == "tiny" else MaftPlusConfig.of
        config = sizes(original.config, form=form, token_order=token_order)
        rngs = nnx.Rngs(command.seed)
        model = MaftPlus.around(original, config, dtype=jnp.dtype(dtype), rngs=rngs)
    else:
        model = load_segmenter_model(source, form=form, token_order=token_order, dtype=dtype)
        original = model.backbone.clip_model
        keys = open_weights(source, wrappers=WRAPPERS) if source.is_file() else ()
        if any(key.startswith(TEACHER) for key in keys):
            original = load_open_clip_model(source, dtype=dtype, prefix=TEACHER)
    if command.teacher is not None:
        original = load_open_clip_model(command.teacher, dtype=dtype)
    tokenizer = load_segmentation_tokenizer(source, command.tokenizer, model.backbone.clip_model)
    return model, original, tokenizer
