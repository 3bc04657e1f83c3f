"""`conceptax segment run`, `evaluate`, `train` and `coco-stuff`: open-vocabulary segmentation."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import Progress

from conceptax.cli.options import HUB, OptionalInt, OptionalModel, OptionalPath
from conceptax.cli.runs import new_folder, settings_of
from conceptax.cli.segment_train import Train, train
from conceptax.methods.segmentation import coco_stuff
from conceptax.methods.segmentation.datasets import LAYOUTS, open_scenes
from conceptax.methods.segmentation.evaluation import evaluate
from conceptax.methods.segmentation.segmenter import Segmenter
from conceptax.methods.segmentation.vocabulary import Vocabulary, text_rows
from conceptax.methods.subjects.images import read_image
from conceptax.reporting.models import load_segmentation_tokenizer, load_segmenter_model
from conceptax.reporting.results import METRICS, environment, write_tables
from conceptax.reporting.segmentation import LEGEND, figures, segment_into, tables

Form = Literal["semantic", "panoptic"]
TokenOrder = Literal["reference", "raster"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Looking:
    """What looking at images takes.

    Attributes:
      model: a MAFT+ folder, or a checkpoint of MAFT+ or FC-CLIP (.pth, .bin, .safetensors).
      vocabulary: classes separated by ; and synonyms by , or a .txt file of lines id:name,synonym.
      tokenizer: a CLIP tokenizer's folder; by default the model's own.
      form: what a checkpoint was trained for, which its file does not tell.
      token_order: as a checkpoint was trained; the published ones are "reference".
      short_side: pixels along the shorter side of what the model sees.
      long_side: at most so many along the longer one.
      text_cache: folder to keep the text embeddings of vocabularies in.
      dtype: computation dtype.
    """

    model: Annotated[Path, HUB]
    vocabulary: str
    tokenizer: OptionalModel = None
    form: Form = "semantic"
    token_order: TokenOrder = "reference"
    short_side: int = 800
    long_side: int = 1333
    text_cache: OptionalPath = None
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(_Looking):
    """Find the classes of a vocabulary in images of any size.

    For each image NAME: NAME_overlay.png, the image tinted by class; NAME_labels.png, 16 bits, the
    number of each pixel's class, 65535 where there is none; NAME_panoptic.png, segment ids in
    COCO's form. legend.json says what the numbers are, panoptic.json what the segments are.

    Attributes:
      images: what to look at.
      output: the folder to write.
      stuff: classes, named as in the vocabulary and separated by ; whose regions are one segment;
        those of all others are told apart.
      least_score: a region that no class claims with so much is void.
      force: replace an earlier result.
    """

    images: tyro.conf.Positional[tuple[Path, ...]]
    output: Path = Path("segmented")
    stuff: str = ""
    least_score: float = 0.2
    force: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(_Looking):
    """Measure a model on scenes: mIoU, fwIoU, mACC, pACC; on panoptic scenes PQ, SQ and RQ too.

    Writes metrics.json, with the IoU of each class, and table.md.

    Attributes:
      data: a folder with images/ and annotations/, or the root of a published layout.
      layout: how it is laid out.
      ignore: label of pixels that count nowhere; by default 255, and 65535 in maps of 16 bits.
      output: the folder to write.
      force: replace an earlier result.
    """

    data: Path
    layout: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(LAYOUTS)}}}")] = "folder"
    ignore: OptionalInt = None
    output: Path = Path("segmentation")
    force: bool = False


@dataclasses.dataclass(frozen=True)
class CocoStuff:
    """Number the classes of COCO-Stuff's label maps 0 to 170, as training and evaluation take them.

    Attributes:
      source: folder of stuffthingmaps (8-bit PNG).
      output: folder to write; it must be empty or new.
    """

    source: tyro.conf.Positional[Path]
    output: tyro.conf.Positional[Path]


COMMANDS = {"run": Run, "evaluate": Evaluate, "train": Train, "coco-stuff": CocoStuff}


def run(command: Run | Evaluate | Train | CocoStuff) -> None:
    """Do what was asked for."""
    if isinstance(command, Run):
        _run(command)
    elif isinstance(command, Evaluate):
        _evaluate(command)
    elif isinstance(command, Train):
        train(command)
    else:
        with new_folder(command) as folder:
            count = coco_stuff.convert(command.source, folder)
        print(f"{command.output}: {count} label maps")


def _segmenter(command: _Looking, vocabulary: Vocabulary) -> Segmenter:
    model = load_segmenter_model(
        command.model, form=command.form, token_order=command.token_order, dtype=command.dtype
    )
    clip = model.backbone.clip_model
    tokenizer = load_segmentation_tokenizer(command.model, command.tokenizer, clip)
    rows = text_rows(clip, tokenizer, vocabulary, cache=command.text_cache)
    return Segmenter(
        model, rows, vocabulary.synonyms(), short=command.short_side, longest=command.long_side
    )


def _run(command: Run) -> None:
    vocabulary = Vocabulary.named(command.vocabulary)
    if not command.images:
        raise ValueError("there is nothing to look at: pass at least one image.")
    stems = [path.stem for path in command.images]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise ValueError(f"results are named like the images, but {', '.join(twice)} comes twice.")
    stuff = {name.strip() for name in command.stuff.split(";") if name.strip()}
    if unknown := ", ".join(sorted(stuff - set(vocabulary.rows))):
        raise ValueError(f"--stuff names {unknown}, which the vocabulary does not have.")
    things = {k for k, names in enumerate(vocabulary.classes) if not stuff & set(names)}
    info = {"model": str(command.model), "least_score": command.least_score}
    with new_folder(command, markers=[LEGEND]) as folder:
        images = {path: read_image(path) for path in command.images}  # a damaged one is told first
        pixels = segment_into(
            folder,
            _segmenter(command, vocabulary),
            vocabulary,
            images,
            things=things,
            least_score=command.least_score,
            info=info | environment(),
        )
    shares = zip(pixels / pixels.sum(), vocabulary.names, strict=False)
    shown = sorted((each for each in shares if each[0]), reverse=True)[:8]
    told = ", ".join(f"{name} {100 * share:.1f} %" for share, name in shown) or "nothing"
    print(f"{command.output}: {told}; void {100 * pixels[-1] / pixels.sum():.1f} %")


def _evaluate(command: Evaluate) -> None:
    vocabulary = Vocabulary.named(command.vocabulary)
    with new_folder(command, markers=[METRICS]) as folder:
        scenes = open_scenes(
            command.data, len(vocabulary), layout=command.layout, ignore=command.ignore
        )
        segmenter = _segmenter(command, vocabulary)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("scenes", total=len(scenes))
            quality = evaluate(
                segmenter, scenes, report=lambda done: progress.update(task, completed=done)
            )
        record = {
            **figures(quality, vocabulary),
            "scenes": len(scenes),
            "settings": settings_of(command, "output", "force", "text_cache"),
            **environment(),
        }
        markdown = write_tables(folder, record, tables(quality, len(scenes)))
    print(markdown)
    print(f"{command.output}: {METRICS}, table.md")
