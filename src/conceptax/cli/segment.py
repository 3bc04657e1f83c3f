"""`conceptax segment run`, `evaluate`, `train` and `coco-stuff`: open-vocabulary segmentation."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress

from conceptax.bundled import EXAMPLES, bundled_segmenter
from conceptax.cli.options import HUB, OptionalInt, OptionalModel, OptionalPath, shown, typed
from conceptax.cli.runs import new_folder, settings_of
from conceptax.cli.segment_train import LongSide, ShortSide, Train, sized, train
from conceptax.methods.segmentation import coco_stuff
from conceptax.methods.segmentation.datasets import LAYOUTS, open_scenes
from conceptax.methods.segmentation.evaluation import evaluate
from conceptax.methods.segmentation.segmenter import Segmenter
from conceptax.methods.segmentation.usage import Usage
from conceptax.methods.segmentation.vocabulary import Vocabulary, text_rows
from conceptax.methods.subjects.images import image_files, read_image
from conceptax.reporting.gallery import REPORT, Images, write_report
from conceptax.reporting.models import load_segmentation_tokenizer, load_segmenter_model
from conceptax.reporting.results import METRICS, environment, write_tables
from conceptax.reporting.segmentation import (
    LEGEND,
    PANOPTIC,
    Scenery,
    figures,
    segment_into,
    segmentation_page,
    tables,
)

Form = Literal["semantic", "panoptic"]
TokenOrder = Literal["reference", "raster"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Looking:
    """What looking at images takes.

    Attributes:
      model: a MAFT+ folder, or a checkpoint of MAFT+ or FC-CLIP (.pth, .bin, .safetensors).
      vocabulary: classes separated by ; and synonyms by , or a .txt file of lines id:name,synonym;
        a model whose folder states none needs it.
      tokenizer: a CLIP tokenizer's folder; by default the model's own.
      form: what a checkpoint was trained for, which its file does not tell.
      token_order: as a checkpoint was trained; the published ones are "reference".
      short_side: pixels along the shorter side of what the model sees.
      long_side: at most so many along the longer one.
      text_cache: folder to keep the text embeddings of vocabularies in.
      dtype: computation dtype.
    """

    model: Annotated[Path | None, shown("PATH", "(default: the bundled segmenter)"), HUB] = None
    vocabulary: Annotated[str | None, shown("STR", "(default: the model's own)")] = None
    tokenizer: OptionalModel = None
    form: Form = "semantic"
    token_order: TokenOrder = "reference"
    short_side: ShortSide = None
    long_side: LongSide = None
    text_cache: OptionalPath = None
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(_Looking):
    """Find the classes of a vocabulary in images of any size.

    Without arguments: the digits in the bundled example scenes, by the bundled segmenter.
    For each image NAME: NAME_segments.png, each segment outlined and named, to look at;
    NAME_overlay.png, the image tinted by class; NAME_labels.png, 16 bits, the number of each
    pixel's class, 65535 where there is none; NAME_panoptic.png, segment ids in COCO's form.
    legend.json says what the numbers are, panoptic.json what the segments are.

    Attributes:
      images: what to look at: images, and folders of images, whose own folders are not entered; by
        default the examples that come with the model.
      output: the folder to write.
      stuff: classes, named as in the vocabulary and separated by ; whose regions are one segment;
        those of all others are told apart.
      least_score: a region that no class claims with so much is void.
      force: replace an earlier result.
    """

    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], shown("PATH", "")] = ()
    output: Path = Path("segmented")
    stuff: Annotated[str | None, shown("STR", "(default: the model's own)")] = None
    least_score: float = 0.2
    force: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(_Looking):
    """Measure a model on scenes: mIoU, fwIoU, mACC, pACC; on panoptic scenes PQ, SQ and RQ too.

    Writes metrics.json, with the IoU of each class, table.md, and report.html, which shows every
    scene as it is labeled and as the model sees it; many of them lie beside it, in
    report-images/.

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


Looking = TypeVar("Looking", Run, Evaluate)


def _settled(command: Looking) -> tuple[Looking, Usage, Vocabulary]:
    """The command with its model and sizes, how the model is used, and the classes to find."""
    model = command.model or bundled_segmenter()
    command, usage = sized(dataclasses.replace(command, model=model), model)
    if command.vocabulary is not None:
        vocabulary = Vocabulary.named(command.vocabulary)
    elif usage.vocabulary is not None:
        vocabulary = usage.vocabulary
    else:
        raise ValueError(
            f"{model} has no vocabulary of its own: name the classes to find, such as "
            "--vocabulary 'cat; sofa, couch; wall'."
        )
    return command, usage, vocabulary


def _segmenter(command: _Looking, usage: Usage, vocabulary: Vocabulary) -> Segmenter:
    path = command.model
    assert path is not None
    model = load_segmenter_model(
        path, form=command.form, token_order=command.token_order, dtype=command.dtype
    )
    clip = model.backbone.clip_model
    tokenizer = load_segmentation_tokenizer(path, command.tokenizer, clip)
    rows = text_rows(
        clip, tokenizer, vocabulary, templates=usage.templates, cache=command.text_cache
    )
    return Segmenter(
        model, rows, vocabulary.synonyms(), short=usage.short_side, longest=usage.long_side
    )


def _images(command: Run) -> list[Path]:
    """The files to look at, those of a folder by name."""
    assert command.model is not None
    given, examples = command.images, command.model / EXAMPLES
    if not given and not examples.is_dir():
        raise ValueError("there is nothing to look at: pass at least one image.")
    files: list[Path] = []
    for path in given or (examples,):
        files += image_files(path) if path.is_dir() else [path]
    stems = [path.stem for path in files]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise ValueError(f"results are named like the images, but {', '.join(twice)} comes twice.")
    return files


def _things(command: Run, usage: Usage, vocabulary: Vocabulary) -> set[int]:
    """The classes whose regions are told apart: all but stuff."""
    if command.stuff is None:
        stuff = {*usage.stuff}
    else:
        stuff = {name.strip() for name in command.stuff.split(";") if name.strip()}
        if unknown := ", ".join(sorted(stuff - set(vocabulary.rows))):
            raise ValueError(f"--stuff names {unknown}, which the vocabulary does not have.")
    return {k for k, names in enumerate(vocabulary.classes) if not stuff & set(names)}


def _run(command: Run) -> None:
    command, usage, vocabulary = _settled(command)
    files = _images(command)
    things = _things(command, usage, vocabulary)
    info = {"model": str(command.model), "least_score": command.least_score}
    with new_folder(command, markers=[LEGEND], sources=files) as folder:
        images = {path: read_image(path) for path in files}  # a damaged one is told first
        pixels = segment_into(
            folder,
            _segmenter(command, usage, vocabulary),
            vocabulary,
            images,
            things=things,
            least_score=command.least_score,
            info=info | environment(),
        )
    for file, counts in zip(files, pixels, strict=True):
        print(f"{file.name}: {_told(counts, vocabulary)}")
    kinds = "NAME_segments.png to look at, NAME_overlay.png, NAME_labels.png, NAME_panoptic.png"
    images = "1 image" if len(files) == 1 else f"{len(files)} images"
    print(f"{command.output}: of {images} {kinds}; {LEGEND}, {PANOPTIC}")


def _told(pixels: np.ndarray, vocabulary: Vocabulary) -> str:
    """The classes in an image by their shares, the largest first, and how much is none of them."""
    shares = (100 * pixels / pixels.sum()).tolist()
    found = zip(shares, vocabulary.names, strict=False)
    shown = sorted((each for each in found if each[0] >= 0.05), reverse=True)[:8]
    told = ", ".join(f"{name} {share:.1f} %" for share, name in shown) or "nothing"
    return f"{told}; void {shares[-1]:.1f} %"


def _evaluate(command: Evaluate) -> None:
    command, usage, vocabulary = _settled(command)
    with new_folder(command, markers=[METRICS]) as folder:
        scenes = open_scenes(
            command.data, len(vocabulary), layout=command.layout, ignore=command.ignore
        )
        segmenter = _segmenter(command, usage, vocabulary)
        images = Images(folder)
        names = [entry.image.name for entry in scenes.entries]
        scenery = Scenery(names, vocabulary, images)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("scenes", total=len(scenes))
            quality = evaluate(
                segmenter,
                scenes,
                report=lambda done: progress.update(task, completed=done),
                look=scenery,
            )
        settings = settings_of(command, "output", "force", "text_cache")
        record = {
            **figures(quality, vocabulary),
            "scenes": len(scenes),
            "settings": settings,
            **environment(),
        }
        found = tables(quality, len(scenes))
        markdown = write_tables(folder, record, found)
        label = Path(settings["model"]).name
        page = segmentation_page(quality, record, scenery, found, label=label, command=typed())
        write_report(folder, page, images)
    print(markdown)
    print(f"{command.output}: {METRICS}, table.md, {REPORT}")
