"""Scenes on disk: images with label maps, or with panoptic maps in COCO's form.

A label map is a single-channel image of 8 or 16 bits, whose pixels are classes; a panoptic map is
an RGB image whose pixels are segment ids (R + 256 G + 65536 B), with a JSON file that says what
each segment is.  Both are read as a `Scene`: in one of labels, every class is a segment.

Everything is looked at before it is used: what is missing, unknown, of a wrong depth or of another
size is told in one error.
"""

import concurrent.futures
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from ...errors import ConceptaxError
from ...text import TextError, read_text
from ..subjects.images import SUFFIXES, read_image
from .metrics import Segment

_MAPS = (".png", ".tif", ".tiff")
_BITS = {"L": 8, "P": 8, "I;16": 16, "I;16B": 16, "I": 16}
IGNORE = {8: 255, 16: 65535}
_ORIENTATION = 0x0112  # EXIF; 5 to 8 lie on their side
_TOLD = 10


class DataError(ConceptaxError, ValueError):
    """Scenes that cannot be used; the message names the first of what is wrong with them."""


class Scene(NamedTuple):
    """An image and what is in it.

    Attributes:
      image: [H, W, 3].
      ids: [H, W] segment ids, 0 for void.
      segments: what each id is.
    """

    image: UInt8[np.ndarray, "H W 3"]
    ids: Int32[np.ndarray, "H W"]
    segments: Mapping[int, Segment]


@runtime_checkable
class SceneSource(Protocol):
    """What training and evaluation read: `Scenes`, or scenes that are made."""

    @property
    def classes(self) -> int:
        """How many there are; labels are 0 to `classes` - 1."""
        ...

    @property
    def things(self) -> frozenset[int]:
        """Classes whose instances are told apart."""
        ...

    @property
    def panoptic(self) -> bool:
        """Whether instances are told apart."""
        ...

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """Rows and columns of each image."""
        ...

    @property
    def targets(self) -> Sequence[int]:
        """Segments in each, crowds apart."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Scene: ...


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a scene lies; `segments` is None if its map holds labels."""

    image: Path
    target: Path
    segments: Mapping[int, Segment] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Scenes:
    """Scenes that were looked at and found good.

    Attributes:
      entries: where they lie, by name.
      classes: how many there are; labels are 0 to `classes` - 1.
      things: classes whose instances are told apart.
      category_ids: the number of each class in the panoptic JSON; empty for label maps.
      ignore: label of pixels that count nowhere; None is 255 or 65535, by the depth of the map.
      sizes: [N] rows and columns of each image.
      targets: [N] segments in each, crowds apart.
    """

    entries: tuple[Entry, ...]
    classes: int
    things: frozenset[int] = frozenset()
    category_ids: tuple[int, ...] = ()
    ignore: int | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    targets: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def panoptic(self) -> bool:
        """Whether instances are told apart."""
        return bool(self.entries) and self.entries[0].segments is not None

    def __getitem__(self, index: int) -> Scene:
        entry = self.entries[index]
        ids, segments, _ = _read_map(entry, self.classes, self.ignore)
        return Scene(read_image(entry.image), ids, segments)


def label_maps(
    images: Path | str,
    labels: Path | str,
    classes: int,
    *,
    ignore: int | None = None,
    bits: int | None = None,
    unlabeled_images: bool = False,
) -> Scenes:
    """Images and label maps of the same names, in two folders.

    Args:
      images, labels: the folders.
      classes: of the vocabulary.
      ignore: see `Scenes`.
      bits: depth that every map must have, 8 or 16; None takes either.
      unlabeled_images: whether images without a label map are passed over.

    Raises:
      DataError: images or maps without a partner, unknown labels, wrong depths, unequal sizes.
    """
    pictures, maps = _files(images, SUFFIXES), _files(labels, _MAPS)
    wrong = [f"{path} has no image" for stem, path in maps.items() if stem not in pictures]
    if not unlabeled_images:
        wrong += [f"{path} has no labels" for stem, path in pictures.items() if stem not in maps]
    entries = [Entry(pictures[stem], path) for stem, path in maps.items() if stem in pictures]
    return _checked(Scenes(tuple(entries), classes, ignore=ignore), wrong, str(labels), bits)


def panoptic_maps(
    images: Path | str, annotations: Path | str, classes: int, *, maps: Path | str | None = None
) -> Scenes:
    """Images and panoptic maps, described by a JSON file in COCO's form.

    Args:
      images: folder of the images.
      annotations: the JSON file; its categories, in their order, are the classes.
      classes: of the vocabulary.
      maps: folder of the maps; default: the JSON file's path without its suffix.

    Raises:
      DataError: another layout, files that are missing, segments that the maps and the JSON do not
        share, unknown categories, wrong depths, unequal sizes.
    """
    path = Path(annotations)
    folder = Path(maps) if maps is not None else path.with_suffix("")
    try:
        content = json.loads(read_text(path))
        categories = content["categories"]
        numbers = {category["id"]: k for k, category in enumerate(categories)}
        things = frozenset(k for k, each in enumerate(categories) if each.get("isthing", 1))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        described = [
            (names.get(each["image_id"]), each["file_name"], each["segments_info"])
            for each in content["annotations"]
        ]
    except TextError as error:
        raise DataError(str(error)) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is no panoptic JSON file in COCO's form: {error!r}.") from error
    if len(numbers) != classes:
        raise DataError(
            f"{path} has {len(numbers)} categories, but the vocabulary has {classes} classes: pass "
            "one class for each category, in the same order."
        )
    pictures = _files(images, SUFFIXES)
    entries, wrong = [], []
    for image, target, segments in described:
        picture = pictures.get(Path(image).stem) if image else None
        if picture is None:
            wrong.append(f"{folder / target} has no image" + (f" ({image})" if image else ""))
        if not (folder / target).is_file():
            wrong.append(f"{folder / target} is missing")
        unknown = sorted({s["category_id"] for s in segments} - numbers.keys())
        if unknown:
            wrong.append(f"{target} has segments of the unknown categories {unknown[:5]}")
        elif picture is not None and (folder / target).is_file():
            known = {
                s["id"]: Segment(numbers[s["category_id"]], bool(s.get("iscrowd")))
                for s in segments
            }
            entries.append(Entry(picture, folder / target, MappingProxyType(known)))
    scenes = Scenes(tuple(entries), classes, things, tuple(numbers))
    return _checked(scenes, wrong, str(path), None)


# ---- what lies where ----


class Layout(NamedTuple):
    """A data set as it is published; of several places the first that exists is taken.

    Attributes:
      images, targets: below the root; a target that ends with .json is panoptic.
      bits: of the label maps.
      unlabeled_images: whether the folder of images holds others too.
    """

    images: tuple[str, ...]
    targets: tuple[str, ...]
    bits: int | None = None
    unlabeled_images: bool = True


def _below(roots: Sequence[str], *folders: str) -> tuple[str, ...]:
    return tuple(f"{root}/{folder}" for folder in folders for root in roots)


_ADE = _below(("ade20k", "ade"), "ADEChallengeData2016")
_ADE_FULL = _below(("ade20k", "ade"), "ADE20K_2021_17_01")
_VOC = ("pascal/VOCdevkit", "VOCdevkit", "pascal", ".")
_COCO = ("coco/coco17", "coco")
_CONTEXT = _below(_VOC, "VOC2010/val/image", "VOC2010/images")
_CONTEXT_MAPS = _below(_VOC, "VOC2010/annotations_detectron2_ovs")
_ADE_IMAGES, _COCO_IMAGES = _below(_ADE, "images/validation"), _below(_COCO, "train2017")
_VOC_MAPS = ("VOC2012/annotations_detectron2_ovs/val", "VOC2012/annotations_ovs/val")
_COCO_SEGMENTS = "panoptic/annotations/panoptic_train2017.json"

LAYOUTS: Mapping[str, Layout] = {
    "folder": Layout(("images",), ("annotations", "labels"), None, False),
    "panoptic": Layout(("images",), ("panoptic.json",)),
    "ade20k-150": Layout(_ADE_IMAGES, _below(_ADE, "annotations_detectron2/validation"), 8),
    "ade20k-847": Layout(
        _below(_ADE_FULL, "images_detectron2/validation"),
        _below(_ADE_FULL, "annotations_detectron2/validation"),
        16,
    ),
    "pascal-context-459": Layout(_CONTEXT, _below(_CONTEXT_MAPS, "pc459_val"), 16),
    "pascal-context-59": Layout(_CONTEXT, _below(_CONTEXT_MAPS, "pc59_val"), 8),
    "pascal-20": Layout(_below(_VOC, "VOC2012/JPEGImages"), _below(_VOC, *_VOC_MAPS), 8),
    "coco-stuff": Layout(_COCO_IMAGES, _below(_COCO, "stuffthingmaps_detectron2/train2017"), 8),
    "coco-panoptic": Layout(_COCO_IMAGES, _below(_COCO, _COCO_SEGMENTS)),
    "ade20k-panoptic": Layout(_ADE_IMAGES, _below(_ADE, "panoptic/ade20k_panoptic_val.json")),
}


def open_scenes(
    root: Path | str, classes: int, *, layout: str = "folder", ignore: int | None = None
) -> Scenes:
    """The scenes below a folder.

    Args:
      root: for the published layouts, what is otherwise called DETECTRON2_DATASETS.
      classes: of the vocabulary.
      layout: one of `LAYOUTS`: "folder" has `images` and `annotations`, "panoptic" has `images`,
        `panoptic.json` and `panoptic`.
      ignore: see `Scenes`; for label maps only.

    Raises:
      DataError: an unknown layout, no such folders, or scenes that cannot be used.
    """
    if layout not in LAYOUTS:
        raise DataError(f"there is no layout {layout!r}; choose one of {', '.join(LAYOUTS)}.")
    places = LAYOUTS[layout]

    def existing(candidates: Sequence[str]) -> Path:
        found = next((Path(root, each) for each in candidates if Path(root, each).exists()), None)
        if found is None:
            raise DataError(f"{root} has no {' or '.join(candidates)} (layout {layout!r}).")
        return found

    images, targets = existing(places.images), existing(places.targets)
    if targets.suffix == ".json":
        return panoptic_maps(images, targets, classes)
    options: dict[str, Any] = {"bits": places.bits, "unlabeled_images": places.unlabeled_images}
    return label_maps(images, targets, classes, ignore=ignore, **options)


# ---- looking at files ----


def _files(folder: Path | str, suffixes: Iterable[str]) -> dict[str, Path]:
    """Files of a folder by name without suffix, sorted."""
    if not Path(folder).is_dir():
        raise DataError(f"{folder} is not a folder.")
    return {
        path.stem: path
        for path in sorted(Path(folder).iterdir())
        if path.suffix.lower() in suffixes and not path.name.startswith(".")
    }


def _checked(scenes: Scenes, wrong: list[str], source: str, bits: int | None) -> Scenes:
    """The scenes with their sizes and counts, unless something is wrong with them."""
    found = list(in_threads(lambda entry: _look(entry, scenes, bits), scenes.entries))
    wrong = [*wrong, *(problem for _, _, problems in found for problem in problems)]
    if not wrong and not found:
        wrong = ["there is no scene"]
    refuse(source, wrong)
    sizes, targets = (tuple(each[n] for each in found) for n in (0, 1))
    return dataclasses.replace(scenes, sizes=sizes, targets=targets)


def refuse(source: str, wrong: Sequence[str]) -> None:
    """Raise one `DataError` for all that is wrong, if anything is."""
    if wrong:
        count = f"{len(wrong)} problem" + ("s" if len(wrong) > 1 else "")
        more = [f"and {len(wrong) - _TOLD} more"] if len(wrong) > _TOLD else []
        raise DataError(f"{source}: {count}: {'; '.join([*wrong[:_TOLD], *more])}.")


def in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]:
    """`map`, several at a time: decoding images leaves Python's lock."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        yield from pool.map(function, items)


def _look(entry: Entry, scenes: Scenes, bits: int | None) -> tuple[tuple[int, int], int, list[str]]:
    """Size, number of targets and what is wrong with a scene."""
    try:
        with Image.open(entry.image) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
        size = (width, height) if turned else (height, width)
    except (OSError, ValueError) as error:
        return (0, 0), 0, [f"{entry.image} cannot be read ({error})"]
    try:
        ids, segments, problems = _read_map(entry, scenes.classes, scenes.ignore, bits)
    except (OSError, ValueError) as error:
        return (0, 0), 0, [f"{entry.target} cannot be read ({error})"]
    if not problems and ids.shape != size:
        here, there = (" x ".join(map(str, each)) for each in (ids.shape, size))
        problems = [f"{entry.target} is {here}, but its image is {there}"]
    return size, sum(not segment.is_crowd for segment in segments.values()), problems


def _read_map(
    entry: Entry, classes: int, ignore: int | None, bits: int | None = None
) -> tuple[np.ndarray, Mapping[int, Segment], list[str]]:
    """Segment ids, what they are, and what is wrong with them."""
    with Image.open(entry.target) as image:
        mode, values = image.mode, np.asarray(image)
    if entry.segments is None:
        return _read_labels(entry.target, mode, values, classes, ignore, bits)
    if mode != "RGB":
        return np.zeros((0, 0), np.int32), {}, [f"{entry.target} is {mode}, not 8-bit RGB"]
    red, green, blue = np.moveaxis(values.astype(np.int32), -1, 0)
    ids = red + 256 * green + 65536 * blue
    present = set(np.unique(ids).tolist()) - {0}
    wrong = {
        "has unknown ids": present - entry.segments.keys(),
        "lacks the segments": entry.segments.keys() - present,
    }
    problems = [f"{entry.target} {k} {sorted(which)[:5]}" for k, which in wrong.items() if which]
    return ids, entry.segments, problems


def _read_labels(
    path: Path, mode: str, values: np.ndarray, classes: int, ignore: int | None, bits: int | None
) -> tuple[np.ndarray, Mapping[int, Segment], list[str]]:
    depth = _BITS.get(mode)
    if depth is None or (bits and depth != bits):
        wanted = f"{bits} bits" if bits else "one channel of 8 or 16 bits"
        here = f"{depth} bits" if depth else mode
        return np.zeros((0, 0), np.int32), {}, [f"{path} has {here}, not {wanted}"]
    labels = values.astype(np.int32)
    counted = values.itemsize <= 2  # which is faster
    present = np.flatnonzero(np.bincount(labels.ravel())) if counted else np.unique(labels)
    void = IGNORE[depth] if ignore is None else ignore
    unknown = present[(present != void) & ((present < 0) | (present >= classes))]
    problems = [f"{path} has unknown labels {unknown[:5].tolist()}"] if unknown.size else []
    ids = np.where(labels == void, 0, labels + 1)
    return ids, {int(k) + 1: Segment(int(k)) for k in present if k != void}, problems
