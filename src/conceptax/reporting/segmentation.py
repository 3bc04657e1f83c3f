"""Segmentations as pictures and records; a model's quality as numbers, tables and a page."""

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer, UInt8
from PIL import Image

from conceptax.methods.evaluation.statistics import mean_interval
from conceptax.methods.segmentation.datasets import IGNORE, Scene
from conceptax.methods.segmentation.evaluation import Quality
from conceptax.methods.segmentation.metrics import Segment
from conceptax.methods.segmentation.segmenter import Segmenter
from conceptax.methods.segmentation.vocabulary import Vocabulary
from conceptax.reporting.gallery import SIDE, Fact, Front, Group, Images, Item, Page, Ran, Shot
from conceptax.reporting.overlay import class_colors, overlay, segments_picture
from conceptax.reporting.pictures import save_png
from conceptax.reporting.report import Number, Table
from conceptax.text import write_json

LEGEND, PANOPTIC = "legend.json", "panoptic.json"
VOID = IGNORE[16]
_LEAST_SIDE, _LETTERS = 384, 1 / 20  # of a scene in a page, whose names are read in the small


def segment_into(
    folder: Path,
    segmenter: Segmenter,
    vocabulary: Vocabulary,
    images: Mapping[Path, UInt8[np.ndarray, "H W 3"]],
    *,
    things: Collection[int],
    least_score: float = 0.2,
    info: Mapping[str, Any],
) -> Int[np.ndarray, "N C"]:
    """Look at images, and write into an empty `folder` what `conceptax segment run` promises.

    Args:
      folder: where to.
      segmenter: of the vocabulary.
      vocabulary: K classes.
      images: each by its file, whose names differ.
      things: classes whose regions are told apart.
      least_score: a region that no class claims with so much is void.
      info: about the run, for panoptic.json.

    Returns:
      pixels of each class and, last, of none, in each of N images: C is K + 1.
    """
    colors, void = class_colors(vocabulary.names), len(vocabulary)
    pixels = np.zeros((len(images), void + 1), np.int64)
    shown, annotations = [], []
    for number, (file, image) in enumerate(images.items(), 1):
        seen = segmenter(image)
        labels = seen.labels(least_score=least_score)
        ids, segments = seen.panoptic(things, least_score=least_score)
        pixels[number - 1] = np.bincount(labels.ravel(), minlength=void + 1)
        height, width = labels.shape
        name = f"{file.stem}_panoptic.png"
        stored = np.where(labels == void, VOID, labels).astype(np.uint16)
        coded = np.stack([ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)
        classes = {number: segment.category for number, segment in segments.items()}
        picture = segments_picture(image, ids, classes, vocabulary.names, colors)
        save_png(picture, folder / f"{file.stem}_segments.png")
        tinted = overlay(image, labels, vocabulary.names, colors)
        save_png(tinted, folder / f"{file.stem}_overlay.png")
        save_png(Image.fromarray(stored), folder / f"{file.stem}_labels.png")
        save_png(coded, folder / name)
        shown.append({"id": number, "file_name": file.name, "height": height, "width": width})
        told = _described(ids, segments)
        annotations.append({"image_id": number, "file_name": name, "segments_info": told})
    categories = [
        {"id": k, "name": name, "isthing": int(k in things), "color": colors[k].tolist()}
        for k, name in enumerate(vocabulary.names)
    ]
    content = {"images": shown, "annotations": annotations, "categories": categories}
    write_json(folder / PANOPTIC, {**content, "info": info})
    total = pixels.sum(axis=0).tolist()
    listed = [
        {"label": k, "names": list(names), "color": colors[k].tolist(), "pixels": total[k]}
        for k, names in enumerate(vocabulary.classes)
    ]
    legend = {"void": {"label": VOID, "pixels": total[-1]}, "classes": listed}
    write_json(folder / LEGEND, legend)
    return pixels


def _described(ids: np.ndarray, segments: Mapping[int, Segment]) -> list[dict[str, Any]]:
    """Segments in COCO's form."""
    found = []
    for number, segment in segments.items():
        rows, columns = np.nonzero(ids == number)
        left, top = int(columns.min()), int(rows.min())
        box = [left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1]
        place = {"area": len(rows), "iscrowd": 0, "bbox": box}
        found.append({"id": number, "category_id": segment.category, **place})
    return found


def figures(quality: Quality, vocabulary: Vocabulary) -> dict[str, Any]:
    """All measures as plain numbers, in percent; null where there is nothing to measure."""

    def plain(value: float) -> float | None:
        return None if np.isnan(value) else float(value)

    semantic = {
        field.name: plain(getattr(quality.semantic, field.name))
        for field in dataclasses.fields(quality.semantic)
        if field.name != "iou"
    }
    panoptic = {
        group: {"pq": plain(q.pq), "sq": plain(q.sq), "rq": plain(q.rq), "classes": q.classes}
        for group, q in quality.panoptic.items()
    }
    iou = zip(vocabulary.names, quality.semantic.iou, strict=True)
    return {
        "semantic": semantic,
        "panoptic": panoptic or None,
        "iou": [{"name": name, "iou": plain(value)} for name, value in iou],
    }


def tables(quality: Quality, scenes: int) -> list[Table]:
    """For people."""
    q = quality.semantic
    note = (
        f"{scenes} scenes. mIoU is the mean over the classes in the ground truth. In the second "
        "column the same sum is divided by the number of classes there or predicted, as the "
        "evaluator beside the published code does."
    )
    columns = ("", "mIoU", "mIoU, predicted classes too", "fwIoU", "mACC", "pACC")
    values = (q.miou, q.miou_predicted, q.fwiou, q.macc, q.pacc)
    rows = [("all classes", *(Number(f"{value:.2f}") for value in values))]
    found = [Table("Classes of pixels", columns, rows, note)]
    if quality.panoptic:
        lines = [
            (name, *(Number(f"{v:.2f}") for v in (p.pq, p.sq, p.rq)), Number(f"{p.classes}"))
            for name, p in quality.panoptic.items()
        ]
        found.append(Table("Segments", ("", "PQ", "SQ", "RQ", "classes"), lines))
    return found


class Scenery:
    """The scenes of an evaluation for its page: as they are labeled, and as the model sees them.

    Args:
      names: of the scenes.
      vocabulary: the classes.
      images: takes the pictures.
    """

    def __init__(self, names: Sequence[str], vocabulary: Vocabulary, images: Images):
        self.names, self.classes, self.images = names, vocabulary.names, images
        self.colors = class_colors(vocabulary.names)
        self.items: list[Item] = []
        self.right: list[float] = []  # shares of labeled pixels

    def __call__(
        self,
        number: int,
        scene: Scene,
        labels: Integer[np.ndarray, "H W"],
        truth: Integer[np.ndarray, "H W"],
    ) -> None:
        """Draw a scene, for `methods.segmentation.evaluation.evaluate` to look at."""
        labeled, told = truth < len(self.classes), "nothing is labeled"
        if labeled.any():
            self.right.append(float((labels == truth)[labeled].mean()))
            told = f"{100 * self.right[-1]:.1f} % of the labeled pixels right"
        height, width = truth.shape
        scale = min(SIDE / max(height, width), max(1.0, _LEAST_SIDE / max(height, width)))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        rows = np.arange(size[1]) * height // size[1]
        columns = np.arange(size[0]) * width // size[0]
        image = np.asarray(Image.fromarray(scene.image).resize(size))
        drawn = self.classes, self.colors
        before, after = (
            self.images.add(np.asarray(overlay(image, each, *drawn, letters=_LETTERS)))
            for each in (truth[rows][:, columns], labels[rows][:, columns])
        )
        there = np.unique(np.concatenate([truth[labeled], labels[labels < len(self.classes)]]))
        concepts = tuple(self.classes[k] for k in there.tolist())
        shots = Shot(before), Shot(after, told=told)
        item = Item(0, self.names[number], concepts, size, shots[0], (shots[1],), None, number)
        self.items.append(item)


def segmentation_page(
    quality: Quality,
    record: Mapping[str, Any],
    scenery: Scenery,
    found: Sequence[Table],
    *,
    label: str,
    command: str = "",
) -> Page:
    """The page of an evaluation.

    Args:
      quality: what was measured.
      record: of the run.
      scenery: which drew its scenes.
      found: all figures.
      label: of the model.
      command: that made it.
    """
    rows = [
        (each["name"], Number("–" if each["iou"] is None else f"{each['iou']:.2f}"))
        for each in record["iou"]
    ]
    note = "In percent; a dash where the class is not in the ground truth."
    every = Table("Each class", ("class", "IoU"), rows, note)
    shown = {k: v for k, v in record.items() if k not in ("semantic", "panoptic", "iou")}
    return Page(
        kind="segmentation",
        title=f"conceptax: {len(scenery.items)} scenes segmented",
        lead=(
            "The scenes as they are labeled, the ground truth, and in the classes that the model "
            "sees."
        ),
        sides=("ground truth", "model"),
        legend="Every scene that was counted, each class in its color.",
        groups=(Group("scenes", "scenes", "shown"),),
        items=tuple(scenery.items),
        front=(Front("The first scenes", tuple(range(min(4, len(scenery.items))))),),
        runs=(
            Ran(
                label,
                command,
                "",
                tuple(_facts(quality, scenery.right)),
                (*found, every),
                json.dumps(shown, indent=2, ensure_ascii=False),
            ),
        ),
    )


def _facts(quality: Quality, right: Sequence[float]) -> Iterator[Fact]:
    q = quality.semantic
    if len(right) > 1:
        each = mean_interval(100 * np.asarray(right))
        yield Fact(
            "Labeled pixels right, mean of scenes",
            f"{each['mean']:.1f} %",
            f"{each['of']} scenes, 95 % interval {each['low']:.1f}–{min(each['high'], 100):.1f} %",
            f"In such a scene about {each['mean']:.0f} in a hundred labeled pixels are right.",
        )
    if not np.isnan(q.miou):
        yield Fact(
            "mIoU",
            f"{q.miou:.2f}",
            "of 100",
            "Overlap of what is seen with what is there, the mean of all classes however rare; it "
            "is of the whole set and has no interval.",
        )
    if quality.panoptic and not np.isnan(quality.panoptic["all"].pq):
        p = quality.panoptic["all"]
        yield Fact(
            "PQ",
            f"{p.pq:.2f}",
            f"SQ {p.sq:.2f}, RQ {p.rq:.2f}",
            "How well segments are found and outlined: SQ is the overlap of those found, RQ how "
            "many are found and not invented; it is of the whole set and has no interval.",
        )
