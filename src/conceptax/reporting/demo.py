"""The page and the picture of `conceptax demo`."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table as PrintedTable

from conceptax.methods.glyphs.captions import DIGIT_NAMES
from conceptax.methods.glyphs.evaluation import GlyphsClassifier
from conceptax.methods.glyphs.judge import Judge
from conceptax.methods.glyphs.quality import FIGURES, Findings
from conceptax.methods.glyphs.world import IMAGE_SIZE
from conceptax.reporting.evaluation import proportion_fact
from conceptax.reporting.gallery import Front, Group, Images, Item, Page, Ran, Shot
from conceptax.reporting.pictures import Block, Row, before_after
from conceptax.reporting.report import Table, counted, interval, share

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
_DIGITS = [next(iter(names)) for names in DIGIT_NAMES]
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
    before: Look,
    after: Look,
    record: Mapping[str, Any],
    near: Sequence[Table],
    judge: Judge,
    images: Images,
    *,
    command: str = "",
) -> Page:
    """The page, with every image that was counted.

    Args:
      before, after: what was drawn.
      record: of the demo.
      near: tables of what was not retained.
      judge: says what each image shows.
      images: takes them.
      command: that made it.
    """
    groups, items = [], list[Item]()
    seed, classifier = record["seed"], GlyphsClassifier(judge)

    def add(group: int, prompt: str, concept: str, number: int, shots: Sequence[Shot]) -> None:
        first, second = shots
        items.append(
            Item(
                group, prompt, (concept,), (IMAGE_SIZE, IMAGE_SIZE), first, (second,), seed, number
            )
        )

    number = 0
    for name, title in _SETS.items():
        groups.append(Group(name, title, "retention" if name == "others" else "attack"))
        pair = before.found[name], after.found[name]
        asked = [_DIGITS[each.digit] for each in pair[0].prompts]
        said = [classifier.says(found.images, asked) for found in pair]
        for n, prompt in enumerate(pair[0].prompts):
            shots = [
                Shot(
                    images.add(found.images[n]),
                    bool(told.hits[n]),
                    told.words[n],
                    round(float(told.confidences[n]), 4),
                )
                for found, told in zip(pair, said, strict=True)
            ]
            add(len(groups) - 1, prompt.text, asked[n], number, shots)
            number += 1
    front, number = [], 0
    for title, texts, firsts, seconds in (
        (f"{CONCEPT}, by any name", ASKED, before.asked, after.asked),
        ("everything else", KEPT, before.kept, after.kept),
    ):
        groups.append(Group(title, f"Chosen prompts, not counted: {title}", "shown"))
        start = len(items)
        for text, first, second in zip(texts, firsts, seconds, strict=True):
            for one, other in zip(first, second, strict=True):
                shots = [Shot(images.add(one)), Shot(images.add(other))]
                add(len(groups) - 1, text, title, number, shots)
                number += 1
        front.append(Front(title, tuple(range(start, len(items)))))
    shown = {name: value for name, value in record.items() if name not in ("figures", "judge")}
    figures = record["figures"]
    rows, facts = [], []
    for name in _shown_figures(figures["before"]):
        one, other = figures["before"][name], figures["after"][name]
        rows.append((_label(name), counted(one), counted(other)))
        if name in FIGURES:
            kind = "attack" if name in ("plain", "synonyms") else "retention"
            facts.append(proportion_fact(_label(name), kind, one, other))
    note = (
        f"{record['images_per_figure']} images per figure, {record['sampling']['steps']} steps "
        "each, prompts in wordings that the model was never trained on; seed "
        f"{record['seed']}; in gray the 95 % Wilson "
        "intervals. The classifier learnt from handwriting that the model never saw"
        + _judge_accuracy(record["judge"])
        + ". It always names some digit: an image that shows none counts as another digit."
    )
    return Page(
        kind="demo",
        title=f"conceptax: “{CONCEPT}” erased",
        lead=(
            f"SAGE was told one word, “{CONCEPT}”, and edited the text encoder of a small "
            "text-to-image model that draws handwritten digits on textures. Before and after are "
            "of the same prompt and the same noise."
        ),
        sides=("before", "after"),
        legend=(
            "Every image that was counted. Asked for a three, red: the classifier sees a three; "
            "green: it sees another digit. Asked for another, green: it sees the digit that was "
            "asked for; red: another. The percentage is the probability that the classifier gives "
            "the digit that it sees."
        ),
        groups=tuple(groups),
        items=tuple(items),
        front=tuple(front),
        runs=(
            Ran(
                "SAGE",
                command,
                "",
                tuple(facts),
                (
                    Table(
                        "What an independent classifier sees",
                        ("images", "before", "after"),
                        rows,
                        note,
                    ),
                    *near,
                ),
                json.dumps(shown, indent=2, ensure_ascii=False),
            ),
        ),
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
