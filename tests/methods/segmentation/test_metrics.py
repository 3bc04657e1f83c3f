"""Segmentation measures against definitions that are written another way: pixel by pixel, set by
set, in exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest

from conceptax.methods.segmentation.metrics import (
    PanopticCounts,
    Segment,
    confusion_matrix,
    panoptic_counts,
    panoptic_quality,
    semantic_quality,
)

IGNORE = 255


def pixels(labels, value):
    return {tuple(place) for place in np.argwhere(labels == value)}


def semantic_by_sets(predictions, targets, classes):
    """Every measure from sets of pixels over all images."""
    true = [set() for _ in range(classes)]
    seen = [set() for _ in range(classes)]
    for image, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
        ignored = pixels(target, IGNORE)
        for k in range(classes):
            true[k] |= {(image, *place) for place in pixels(target, k)}
            seen[k] |= {(image, *place) for place in pixels(prediction, k) - ignored}
    everything = sum(len(t) for t in true)
    present = [k for k in range(classes) if true[k]]
    either = [k for k in range(classes) if true[k] or seen[k]]
    iou = {k: Fraction(len(true[k] & seen[k]), len(true[k] | seen[k])) for k in present}
    return {
        "miou": sum(iou.values()) / len(present),
        "miou_predicted": sum(iou.values()) / len(either),
        "fwiou": sum(iou[k] * len(true[k]) for k in present) / everything,
        "macc": sum(Fraction(len(true[k] & seen[k]), len(true[k])) for k in present) / len(present),
        "pacc": Fraction(sum(len(true[k] & seen[k]) for k in present), everything),
    }


@pytest.mark.parametrize("seed", range(6))
def test_semantic_measures(seed):
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(2, 6))
    shape = (2, 5, 7)
    # The last class is never true, the first never predicted; some pixels have no label.
    predictions = rng.integers(1, classes + (seed % 2), shape)
    targets = rng.integers(0, max(classes - 1, 1), shape)
    targets[rng.random(shape) < 0.2] = IGNORE
    matrix = sum(
        confusion_matrix(p, t, classes, ignore=IGNORE)
        for p, t in zip(predictions, targets, strict=True)
    )
    assert matrix.sum() == predictions.size
    quality = semantic_quality(matrix)
    expected = semantic_by_sets(predictions, targets, classes)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(quality, name), 100 * float(value), err_msg=name)
    assert quality.miou_predicted <= quality.miou
    assert math.isnan(quality.iou[classes - 1])


def test_both_denominators():
    """A class that is seen but not there counts in one of them only."""
    target = np.array([[0, 0, 1, 1]])
    prediction = np.array([[0, 0, 1, 2]])
    quality = semantic_quality(confusion_matrix(prediction, target, 4, ignore=IGNORE))
    np.testing.assert_allclose(quality.miou, 100 * (1 + 0.5) / 2)
    np.testing.assert_allclose(quality.miou_predicted, 100 * (1 + 0.5) / 3)


def test_unlabeled_pixels_count_as_wrong():
    matrix = confusion_matrix(np.array([[0, 2]]), np.array([[0, 0]]), 2, ignore=IGNORE)
    quality = semantic_quality(matrix)
    assert quality.pacc == quality.macc == quality.miou == 50


def test_sixteen_bit_labels():
    target = np.array([[0, 300, 65535]], np.uint16)
    matrix = confusion_matrix(np.array([[0, 300, 7]]), target, 459, ignore=65535)
    assert semantic_quality(matrix).miou == 100
    assert matrix[459, 7] == 1


def test_nothing_to_compare():
    quality = semantic_quality(np.zeros((4, 4), np.int64))
    assert all(math.isnan(x) for x in (quality.miou, quality.fwiou, quality.pacc))


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        ([[0, 1]], [[0], [1]], r"the prediction is \(1, 2\), but the ground truth is \(2, 1\)"),
        ([[0, 1]], [[0, 254]], r"ground truth holds labels \[254\]; accepted are 0 to 2 and 255"),
        ([[0, 4]], [[0, 1]], r"the prediction holds labels \[4\]; accepted are 0 to 2 and 3"),
        ([[0, -1]], [[0, 1]], r"the prediction holds labels \[-1\]"),
    ],
)
def test_labels_that_do_not_fit(prediction, target, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(np.array(prediction), np.array(target), 3, ignore=IGNORE)


# ---- panoptic ----


def panoptic_by_sets(images, classes):
    """PQ, SQ and RQ per class from sets of pixels and the three definitions of the paper."""
    results = {}
    for k in range(classes):
        total, tp, fp, fn = Fraction(0), 0, 0, 0
        for prediction, segments, target, truths in images:
            void = pixels(target, 0)
            guesses = {p: pixels(prediction, p) for p, s in segments.items() if s.category == k}
            real = {
                g: pixels(target, g)
                for g, s in truths.items()
                if s.category == k and not s.is_crowd
            }
            crowds = [
                pixels(target, g) for g, s in truths.items() if s.category == k and s.is_crowd
            ]
            pairs = [
                (p, g, Fraction(len(one & two), len((one - void) | two)))
                for p, one in guesses.items()
                for g, two in real.items()
            ]
            pairs = [(p, g, iou) for p, g, iou in pairs if iou > Fraction(1, 2)]
            used = {p for p, _, _ in pairs}
            assert len(used) == len(pairs) == len({g for _, g, _ in pairs})
            total += sum(iou for _, _, iou in pairs)
            tp += len(pairs)
            fn += len(real) - len(pairs)
            for p, one in guesses.items():
                excused = void | crowds[-1] if crowds else void
                fp += p not in used and Fraction(len(one & excused), len(one)) <= Fraction(1, 2)
        if tp + fp + fn:
            weight = tp + Fraction(fp + fn, 2)
            results[k] = (total / weight, total / tp if tp else Fraction(0), tp / weight)
    return results


def random_map(rng, size, classes, *, noise_of=None, crowds=False):
    """Rectangles with ids from a wide range; or a disturbed copy of another map."""
    ids = np.zeros(size, np.int64)
    segments = {}
    if noise_of is not None:
        other, known = noise_of
        for old, segment in known.items():
            if rng.random() < 0.15 or not (other == old).any():
                continue
            mask = np.roll(other == old, rng.integers(-1, 2, 2), (0, 1))
            new = int(rng.integers(1, 1 << 24))
            ids[mask] = new
            wrong = rng.random() < 0.15
            category = int(rng.integers(classes)) if wrong else segment.category
            segments[new] = Segment(category)
    for _ in range(int(rng.integers(2, 7))):
        top, left = rng.integers(0, size[0] - 3), rng.integers(0, size[1] - 3)
        height, width = rng.integers(2, 7, 2)
        new = int(rng.integers(1, 1 << 24))
        ids[top : top + height, left : left + width] = new
        segments[new] = Segment(int(rng.integers(classes)), bool(crowds and rng.random() < 0.3))
    there = set(np.unique(ids).tolist())
    return ids, {key: segment for key, segment in segments.items() if key in there}


@pytest.mark.parametrize("seed", range(8))
def test_panoptic_measures(seed):
    rng = np.random.default_rng(seed)
    classes, images = 4, []
    counts = PanopticCounts.zero(classes)
    for _ in range(3):
        target, truths = random_map(rng, (14, 17), classes, crowds=True)
        prediction, segments = random_map(rng, (14, 17), classes, noise_of=(target, truths))
        images.append((prediction, segments, target, truths))
        counts += panoptic_counts(prediction, segments, target, truths, classes)
    expected = panoptic_by_sets(images, classes)
    for chosen in (None, {0, 2}, {1, 3}):
        kept = [value for k, value in expected.items() if chosen is None or k in chosen]
        quality = panoptic_quality(counts, chosen)
        assert quality.classes == len(kept)
        for name, values in zip(("pq", "sq", "rq"), zip(*kept, strict=True), strict=True):
            mean = 100 * float(sum(values) / len(values))
            np.testing.assert_allclose(getattr(quality, name), mean, err_msg=name)
    assert counts.true_positives.sum() > 0


def test_equal_maps_are_perfect():
    rng = np.random.default_rng(0)
    ids, segments = random_map(rng, (14, 17), 3)
    quality = panoptic_quality(panoptic_counts(ids, segments, ids, segments, 3))
    assert (quality.pq, quality.sq, quality.rq) == (100, 100, 100)


def test_void_and_crowds_excuse():
    """Half a segment in void is a mistake still; more than half is none."""
    target = np.array([[0, 0, 0, 5, 5, 5, 7, 7]])
    truths = {5: Segment(0), 7: Segment(1, is_crowd=True)}
    for prediction, mistakes in (([1, 1, 0, 0, 0, 0, 0, 0], 0), ([0, 1, 1, 1, 1, 0, 0, 0], 1)):
        counts = panoptic_counts(np.array([prediction]), {1: Segment(1)}, target, truths, 2)
        assert counts.false_positives.tolist() == [0, mistakes]
        assert counts.false_negatives.tolist() == [1, 0]
    crowd = panoptic_counts(np.array([[0] * 6 + [3, 3]]), {3: Segment(1)}, target, truths, 2)
    assert crowd.false_positives.tolist() == [0, 0]
    other = panoptic_counts(np.array([[0] * 6 + [3, 3]]), {3: Segment(0)}, target, truths, 2)
    assert other.false_positives.tolist() == [1, 0]


def test_no_class_occurs():
    quality = panoptic_quality(PanopticCounts.zero(3))
    assert quality.classes == 0
    assert math.isnan(quality.pq)


@pytest.mark.parametrize(
    ("prediction", "segments", "message"),
    [
        ([[1, 2]], {1: Segment(0)}, r"ids \[2\] are in the map, but not among its segments"),
        ([[1, 0]], {1: Segment(0), 9: Segment(0)}, r"ids \[9\] are among the segments, but not"),
        ([[1, 0]], {1: Segment(3)}, "category 3 is unknown; accepted are 0 to 2"),
        ([[1]], {1: Segment(0)}, r"the prediction is \(1, 1\)"),
    ],
)
def test_segments_that_do_not_fit(prediction, segments, message):
    with pytest.raises(ValueError, match=message):
        panoptic_counts(np.array(prediction), segments, np.array([[0, 0]]), {}, 3)
