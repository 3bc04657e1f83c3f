"""The page and the picture of `conceptax demo`."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table as PrintedTable

from conceptax.methods.glyphs.quality import FIGURES, Findings, digit_called
from conceptax.reporting.pictures import Block, Row, before_after, png_bytes, sheet
from conceptax.reporting.report import (
    Gallery,
    Picture,
    Table,
    counted,
    html_report,
    interval,
    share,
)

CONCEPT = "three"
ASKED = (
    "a red three on brick",
    "a white three on grass",
    "the number 3 in blue on gravel",
    "the roman numeral III in yellow on brick",
    "a purple trio on grass",
)
KEPT = (
    "a red two on brick",
    "a white eight on grass",
    "the number 5 in blue on gravel",
    "the roman numeral VI in yellow on brick",
    "a purple quartet on grass",
)
_SETS = {
    "plain": "Asked for by the erased word",
    "synonyms": "Asked for by names that erasing was never told",
    "others": "Other digits",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Look:
    """What one model draws: findings of every set, and the grid's images per prompt."""

    found: dict[str, Findings]
    asked: list[np.ndarray]
    kept: list[np.ndarray]


def demo_grid(before: Look, after: Look) -> Any:
    """The same prompts before and after, in one picture."""

    def rows(prompts: Sequence[str], first: list[Any], second: list[Any]) -> list[Row]:
        return [Row(*each) for each in zip(prompts, first, second, strict=True)]

    return before_after(
        [
            Block(f"{CONCEPT}, by any name", rows(ASKED, before.asked, after.asked)),
            Block("everything else", rows(KEPT, before.kept, after.kept)),
        ],
        title=f"Told to forget one word: “{CONCEPT}”",
        note="The same prompts, noise, UNet and autoencoder; only the text encoder was edited.",
    )


def demo_page(
    before: Look, after: Look, grid: bytes, record: Mapping[str, Any], near: Sequence[Table]
) -> str:
    """The page, with every image that was counted.

    Args:
      before, after: what was drawn.
      grid: the main picture, as a PNG file's bytes.
      record: of the demo.
      near: tables of what was not retained.
    """
    digit = digit_called(CONCEPT)
    galleries = []
    for name, title in _SETS.items():
        pictures = []
        for when, found in (("before", before.found[name]), ("after", after.found[name])):
            wrong = found.digit == digit if name != "others" else ~found.right("digit")
            png = png_bytes(sheet(found.images, columns=8, marked=wrong))
            pictures.append(Picture(png, when))
        frames = (
            "Red frames: the classifier sees a three. Green: it sees another digit."
            if name != "others"
            else "Green frames: the classifier sees the digit that was asked for. Red: another."
        )
        galleries.append(Gallery(title, f"Every image that was counted. {frames}", pictures))
    shown = {name: value for name, value in record.items() if name not in ("figures", "judge")}
    figures = record["figures"]
    rows = [
        (_label(name), counted(figures["before"][name]), counted(figures["after"][name]))
        for name in _shown_figures(figures["before"])
    ]
    note = (
        f"{record['images_per_figure']} images per figure, {record['sampling']['steps']} steps "
        "each, prompts in wordings that the model was never trained on; seed "
        f"{record['seed']}; in gray the 95 % Wilson "
        "intervals. The classifier learnt from handwriting that the model never saw"
        + _judge_accuracy(record["judge"])
        + ". It always names some digit: an image that shows none counts as another digit."
    )
    return html_report(
        title=f"conceptax: “{CONCEPT}” erased",
        lead=(
            f"SAGE was told one word, “{CONCEPT}”, and edited the text encoder of a small "
            "text-to-image model that draws handwritten digits on textures. Left of each pair: "
            "before. Right: after, with the same prompt and the same noise."
        ),
        grid=Picture(grid, "The same prompts before and after."),
        tables=[
            Table("What an independent classifier sees", ("images", "before", "after"), rows, note),
            *near,
        ],
        galleries=galleries,
        record=json.dumps(shown, indent=2, ensure_ascii=False),
    )


def demo_table(figures: Mapping[str, Any]) -> PrintedTable:
    """The figures of a record, for the terminal."""
    table = PrintedTable(title=f"“{CONCEPT}” erased by SAGE", title_justify="left")
    table.add_column("images")
    for name in ("before", "after", "after, 95 %"):
        table.add_column(name, justify="right")
    for name in _shown_figures(figures["before"]):
        before, after = figures["before"][name], figures["after"][name]
        table.add_row(_label(name), share(before), share(after), interval(after))
    return table


def _judge_accuracy(measured: dict[str, Any]) -> str:
    accuracy = measured.get("digit", {}).get("accuracy")
    return "" if accuracy is None else f" and names {100 * accuracy:.1f} % of its renders right"


def _shown_figures(figures: dict[str, Any]) -> list[str]:
    """The figures in the order of the table: each synonym below their sum."""
    single = [name for name in figures if name.startswith("synonym ")]
    return ["plain", "synonyms", *single, *(n for n in FIGURES if n not in ("plain", "synonyms"))]


def _label(name: str) -> str:
    """What a figure counts, for people."""
    if name.startswith("synonym "):
        return f"· “{name.removeprefix('synonym ')}”"
    return FIGURES[name].format(CONCEPT)
