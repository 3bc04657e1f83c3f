"""Evaluation of a segmenter on scenes: mIoU and its relatives, panoptic quality."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Int, Integer

from .datasets import Scene, SceneSource
from .metrics import (
    PanopticCounts,
    PanopticQuality,
    SemanticQuality,
    confusion_matrix,
    panoptic_counts,
    panoptic_quality,
    semantic_quality,
)
from .segmenter import Segmenter

Look = Callable[[int, Scene, Integer[np.ndarray, "H W"], Integer[np.ndarray, "H W"]], None]


@dataclasses.dataclass(frozen=True)
class Quality:
    """What was found on a set of scenes.

    Attributes:
      semantic: of label maps; in panoptic scenes, of the classes of their segments.
      panoptic: of all classes, of things and of stuff; empty for label maps.
      matrix: pixels by true and predicted class.
      counts: what panoptic quality is made of; None for label maps.
    """

    semantic: SemanticQuality
    panoptic: dict[str, PanopticQuality]
    matrix: Int[np.ndarray, "C C"]
    counts: PanopticCounts | None


def true_labels(scene: Scene, void: int) -> Int[np.ndarray, "H W"]:
    """The class of each pixel, `void` where it has none."""
    ids, places = np.unique(scene.ids, return_inverse=True)
    labels = [scene.segments[i].category if i in scene.segments else void for i in ids.tolist()]
    return np.asarray(labels)[places.reshape(scene.ids.shape)]


def evaluate(
    segmenter: Segmenter,
    scenes: SceneSource,
    *,
    least_score: float = 0.2,
    report: Callable[[int], None] | None = None,
    look: Look | None = None,
) -> Quality:
    """Look at every scene, at its original size, and count.

    Args:
      segmenter: of the scenes' vocabulary.
      scenes: the ground truth.
      least_score: of the segments of panoptic maps; label maps know no threshold.
      report: called with the number of scenes that are done.
      look: called with each scene's number, the scene, its labels and the true ones.

    Raises:
      ValueError: scenes of another number of classes.
    """
    classes = segmenter.classes
    if scenes.classes != classes:
        raise ValueError(
            f"the vocabulary has {classes} classes, but the scenes have {scenes.classes}."
        )
    matrix = np.zeros((classes + 1, classes + 1), np.int64)
    counts = PanopticCounts.zero(classes) if scenes.panoptic else None
    for number in range(len(scenes)):
        scene = scenes[number]
        seen = segmenter(scene.image)
        labels = seen.labels(masks_first=scenes.panoptic)
        truth = true_labels(scene, classes)
        matrix += confusion_matrix(labels, truth, classes, ignore=classes)
        if counts is not None:
            ids, segments = seen.panoptic(scenes.things, least_score=least_score)
            counts += panoptic_counts(ids, segments, scene.ids, scene.segments, classes)
        if look is not None:
            look(number, scene, labels, truth)
        if report is not None:
            report(number + 1)
    panoptic = {}
    if counts is not None:
        stuff = set(range(classes)) - scenes.things
        groups = {"all": None, "things": scenes.things, "stuff": stuff}
        panoptic = {name: panoptic_quality(counts, group) for name, group in groups.items()}
    return Quality(semantic_quality(matrix), panoptic, matrix, counts)
