"""The quality of a segmentation model: as plain numbers, and as tables for people."""

import dataclasses
from typing import Any

import numpy as np

from conceptax.methods.segmentation.evaluation import Quality
from conceptax.methods.segmentation.vocabulary import Vocabulary
from conceptax.reporting.report import Number, Table


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
            (
                name,
                *(Number(f"{value:.2f}") for value in (p.pq, p.sq, p.rq)),
                Number(f"{p.classes}"),
            )
            for name, p in quality.panoptic.items()
        ]
        found.append(Table("Segments", ("", "PQ", "SQ", "RQ", "classes"), lines))
    return found
