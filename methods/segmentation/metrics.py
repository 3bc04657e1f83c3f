"""Segmentation metrics: mIoU and its relatives, panoptic quality.  All results in percent.

Everything is counted on the host in integers, so that counts of images add up to those of a set.
Label maps are `[H, W]` integers.
"""

import collections
import dataclasses
from collections.abc import Collection, Mapping

import numpy as np
from jaxtyping import Float, Int, Integer

# ---- semantic ----


@dataclasses.dataclass(frozen=True)
class SemanticQuality:
    """Measures of a confusion matrix, in percent; NaN where no pixel has a true class.

    Attributes:
      miou: mean IoU over the classes that are in the ground truth (detectron2 since 2022, and, it
        seems, the published figures).
      miou_predicted: the same sum, divided by the number of classes that are in the ground truth
        *or* predicted (the evaluator in MAFT+'s repository); lower where absent classes are seen.
      fwiou: IoU weighted by the class's share of true pixels.
      macc: mean recall over the classes in the ground truth.
      pacc: share of pixels that are right.
      iou: IoU of each class, NaN where the class is not in the ground truth.
    """

    miou: float
    miou_predicted: float
    fwiou: float
    macc: float
    pacc: float
    iou: Float[np.ndarray, " K"]


def confusion_matrix(
    prediction: Integer[np.ndarray, "H W"],
    target: Integer[np.ndarray, "_ _"],
    classes: int,
    *,
    ignore: int,
) -> Int[np.ndarray, "C C"]:
    """Pixels by true (rows) and predicted class (columns), K + 1 of each.

    Args:
      prediction: 0 to K - 1, or K for pixels without a label, which count as wrong.
      target: 0 to K - 1, or `ignore`, which goes to the last row and counts nowhere.
      classes: K.
      ignore: usually 255, or 65535 in maps of 16 bits.

    Raises:
      ValueError: the maps differ in size or hold other labels.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"the prediction is {prediction.shape}, but the ground truth is {target.shape}: resize "
            "predictions to the original image."
        )
    true = np.where(target == ignore, classes, target).astype(np.int64)
    seen = prediction.astype(np.int64)
    for name, labels in (("ground truth", true), ("prediction", seen)):
        wrong = np.unique(labels[(labels < 0) | (labels > classes)])
        if wrong.size:
            raise ValueError(
                f"the {name} holds labels {wrong[:10].tolist()}; accepted are 0 to {classes - 1} "
                f"and {ignore if name == 'ground truth' else classes}."
            )
    counts = np.bincount((true * (classes + 1) + seen).ravel(), minlength=(classes + 1) ** 2)
    return counts.reshape(classes + 1, classes + 1)


def semantic_quality(matrix: Int[np.ndarray, "C C"]) -> SemanticQuality:
    """Measures of a confusion matrix, or of a sum of them."""
    right = np.diagonal(matrix)[:-1].astype(np.float64)
    true = matrix[:-1].sum(axis=1).astype(np.float64)
    predicted = matrix[:-1, :-1].sum(axis=0).astype(np.float64)
    present, seen = true > 0, true + predicted > 0
    iou = np.full(true.shape, np.nan)
    iou[present] = right[present] / (true + predicted - right)[present]
    if not present.any():
        nan = float("nan")
        return SemanticQuality(nan, nan, nan, nan, nan, iou)
    total = np.nansum(iou)
    return SemanticQuality(
        miou=100 * total / present.sum(),
        miou_predicted=100 * total / seen.sum(),
        fwiou=100 * np.nansum(iou * true) / true.sum(),
        macc=100 * (right[present] / true[present]).mean(),
        pacc=100 * right.sum() / true.sum(),
        iou=100 * iou,
    )


# ---- panoptic ----


@dataclasses.dataclass(frozen=True)
class Segment:
    """One region of a panoptic map: its class, and whether it is a crowd of things."""

    category: int
    is_crowd: bool = False


@dataclasses.dataclass(frozen=True)
class PanopticCounts:
    """What panoptic quality is made of, per class; counts of images are added with `+`."""

    iou: Float[np.ndarray, " K"]
    true_positives: Int[np.ndarray, " K"]
    false_positives: Int[np.ndarray, " K"]
    false_negatives: Int[np.ndarray, " K"]

    @classmethod
    def zero(cls, classes: int) -> "PanopticCounts":
        """Counts of no image."""
        return cls(np.zeros(classes), *(np.zeros(classes, np.int64) for _ in range(3)))

    def __add__(self, other: "PanopticCounts") -> "PanopticCounts":
        names = [field.name for field in dataclasses.fields(self)]
        return PanopticCounts(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclasses.dataclass(frozen=True)
class PanopticQuality:
    """Means over the classes that occur, in percent; NaN if none does."""

    pq: float
    sq: float
    rq: float
    classes: int


def panoptic_counts(
    prediction: Integer[np.ndarray, "H W"],
    segments: Mapping[int, Segment],
    target: Integer[np.ndarray, "_ _"],
    target_segments: Mapping[int, Segment],
    classes: int,
) -> PanopticCounts:
    """Match the segments of one image (Kirillov et al. 2019, as panopticapi counts them).

    A predicted and a true segment of one class match if their IoU, void pixels apart, exceeds 1/2.
    True crowds match nothing and are not missed; a prediction without a match is no mistake if more
    than half of it lies in void or in a crowd of its class (the last one, if there are several).

    Args:
      prediction, target: segment ids, 0 for void.
      segments, target_segments: what each id is; in the target, ids that are not listed are
        neither void nor anything.
      classes: K; categories are 0 to K - 1.

    Raises:
      ValueError: the maps differ in size, or ids and segments of the prediction do not correspond,
        or a category is unknown.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"the prediction is {prediction.shape}, but the ground truth is {target.shape}."
        )
    present = set(np.unique(prediction).tolist()) - {0}
    for message, wrong in (
        ("are in the map, but not among its segments", present - segments.keys()),
        ("are among the segments, but not in the map", segments.keys() - present),
    ):
        if wrong:
            raise ValueError(f"the prediction's ids {sorted(wrong)[:10]} {message}.")
    for segment in (*segments.values(), *target_segments.values()):
        if not 0 <= segment.category < classes:
            raise ValueError(
                f"category {segment.category} is unknown; accepted are 0 to {classes - 1}."
            )

    pairs = np.stack([target.ravel(), prediction.ravel()]).astype(np.int64)
    found, sizes = np.unique(pairs, axis=1, return_counts=True)
    shared = {(int(g), int(p)): int(n) for (g, p), n in zip(found.T, sizes, strict=True)}
    true_area, area = collections.Counter[int](), collections.Counter[int]()
    for (g, p), n in shared.items():
        true_area[g] += n
        area[p] += n

    counts = PanopticCounts.zero(classes)
    matched, matched_true = set[int](), set[int]()
    for (g, p), n in shared.items():
        truth, guess = target_segments.get(g), segments.get(p)
        if truth is None or guess is None or truth.is_crowd or truth.category != guess.category:
            continue
        iou = n / (area[p] + true_area[g] - n - shared.get((0, p), 0))
        if iou > 0.5:
            counts.iou[truth.category] += iou
            counts.true_positives[truth.category] += 1
            matched.add(p)
            matched_true.add(g)
    crowds: dict[int, int] = {}
    for g, truth in target_segments.items():
        if truth.is_crowd:
            crowds[truth.category] = g
        elif g not in matched_true:
            counts.false_negatives[truth.category] += 1
    for p, guess in segments.items():
        excused = shared.get((0, p), 0)
        if guess.category in crowds:
            excused += shared.get((crowds[guess.category], p), 0)
        if p not in matched and 2 * excused <= area[p]:
            counts.false_positives[guess.category] += 1
    return counts


def panoptic_quality(
    counts: PanopticCounts, categories: Collection[int] | None = None
) -> PanopticQuality:
    """PQ, SQ and RQ over some categories (things, stuff), or over all."""
    chosen = list(range(len(counts.iou))) if categories is None else sorted(categories)
    iou, tp, fp, fn = (getattr(counts, f.name)[chosen] for f in dataclasses.fields(counts))
    occurs = tp + fp + fn > 0
    if not occurs.any():
        return PanopticQuality(float("nan"), float("nan"), float("nan"), 0)
    weight = (tp + 0.5 * fp + 0.5 * fn)[occurs]
    iou, tp = iou[occurs], tp[occurs]
    return PanopticQuality(
        pq=100 * float((iou / weight).mean()),
        sq=100 * float((iou / np.maximum(tp, 1)).mean()),
        rq=100 * float((tp / weight).mean()),
        classes=int(occurs.sum()),
    )
