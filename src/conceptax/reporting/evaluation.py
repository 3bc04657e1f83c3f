"""Evaluations for people: their tables, and a page with every image that was counted."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from conceptax.methods.evaluation import Counted, Evaluation
from conceptax.reporting.pictures import Block, Row, before_after, png_bytes, sheet, thumbnails
from conceptax.reporting.report import Gallery, Number, Picture, Table, counted, html_report

_ROWS = 5  # prompts in each block of the main picture
_SIDE = 96  # pixels of an image in a gallery
_FIGURES = ("concepts", "attacks", "retention", "clip_score", "frechet", "classifier")


def report_tables(metrics: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Table]:
    """Attacks, retention, quality, and the attacks' budgets where there are any."""
    tables = [_attacks(metrics, settings), _retention(metrics), _quality(metrics)]
    if budgets := _budget_rows(metrics["attacks"]):
        columns = ("attack", "concept", "budget", "model", "images that show it")
        note = "The last budget is the strongest; it is the one in the first table."
        tables.append(Table("What an attack gets for its budget", columns, budgets, note))
    return [table for table in tables if table.rows]


def _attacks(metrics: Mapping[str, Any], settings: Mapping[str, Any]) -> Table:
    rows = []
    for each in metrics["attacks"]:
        rows.append((each["title"], each["concept"], *_pair(each)))
        rows += [(f"· “{w}”", each["concept"], *_pair(part)) for w, part in _words(each)]
    measured = metrics["classifier"].get("measured", {}).get("digit", {}).get("accuracy")
    note = (
        "Images that show the erased concept, with 95 % Wilson intervals: in the edited model, the "
        f"fewer the better. {settings['images']} images per figure, {settings['steps']} steps, "
        f"guidance {settings['guidance']:g}, seed {settings['seed']}. "
        f"Classifier: {metrics['classifier']['kind']}"
        + ("." if measured is None else f", right on {100 * measured:.1f} % of its test digits.")
    )
    title = "Is the concept gone, and who can bring it back?"
    return Table(title, ("asked for by", "concept", "original", "edited"), rows, note)


def _words(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return list(row.get("words", {}).items())


def _retention(metrics: Mapping[str, Any]) -> Table:
    rows = []
    for each in metrics["retention"]:
        rows.append((each["title"], *_pair(each)))
        rows += [(f"· {phrase}", *_pair(part)) for phrase, part in each["phrases"].items()]
    note = "Images that show what their prompt asks for: in the edited model, as in the original."
    return Table("What else broke?", ("asked for", "original", "edited"), rows, note)


def _quality(metrics: Mapping[str, Any]) -> Table:
    rows: list[Sequence[str | Number]] = []
    scores, distance = metrics["clip_score"], metrics["frechet"]
    if scores is not None:
        for name, title in (("retained", "what should stay"), ("concepts", "erased concepts")):
            if scores[name] is not None:
                pair = (scores[name][when] for when in ("before", "after"))
                rows.append((f"CLIP score, {title} ({scores['model']})", *map(_mean, pair)))
    if distance is not None:
        what = f"{distance['features']}, {distance['width']} wide, {distance['images']} images"
        rows.append(
            (
                f"Fréchet distance to the original's samples ({what})",
                Number("0"),
                Number(f"{distance['distance']:.4g}"),
            )
        )
    note = (
        "CLIP score: 100 · cosine of image and prompt, with the 95 % interval of its mean. Fréchet "
        "distance: of images of what should stay, drawn from the same noise; compare it only with "
        "distances of the same features and as many images."
    )
    return Table("Quality", ("", "original", "edited"), rows, note)


def _mean(figure: Mapping[str, Any], digits: int = 2) -> Number:
    mean, low, high = (f"{figure[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return Number(mean, f"{low}–{high}")


def _budget_rows(attacks: Sequence[Mapping[str, Any]]) -> list[Sequence[str | Number]]:
    rows: list[Sequence[str | Number]] = []
    for each in attacks:
        for model, key in (("edited", "budgets"), ("never knew it", "never_knew")):
            for attempt in each.get(key, ()):
                budget = ", ".join(f"{name} {value:g}" for name, value in attempt["budget"].items())
                rows.append((each["title"], each["concept"], budget, model, counted(attempt)))
    return rows


def _pair(figures: Mapping[str, Any]) -> tuple[Number, Number]:
    return counted(figures["before"]), counted(figures["after"])


def report_page(result: Evaluation, tables: Sequence[Table], record: Mapping[str, Any]) -> str:
    """The page of an evaluation."""
    names = ", ".join(f"“{concept}”" for concept in result.metrics["concepts"])
    shown = {name: value for name, value in record.items() if name not in _FIGURES}
    return html_report(
        title=f"conceptax: the erasure of {names}",
        lead=(
            "The original and the edited model drew the same prompts from the same noise, and the "
            "red team attacked the edited one. Left of each pair: original. Right: edited."
        ),
        grid=Picture(png_bytes(_grid(result.counted, names)), "The same prompts before and after."),
        tables=tables,
        galleries=[_gallery(each) for each in result.counted],
        record=json.dumps(shown, indent=2, ensure_ascii=False),
    )


def _grid(figures: Sequence[Counted], names: str) -> Any:
    blocks = []
    for kind, title in (("attack", f"{names}, by any name"), ("retention", "what should stay")):
        group = [each for each in figures if each.kind == kind and each.before is not None]
        rows = [row for n in range(_ROWS) for each in group for row in _row(each, n)]
        if rows:
            blocks.append(Block(title, rows[:_ROWS]))
    note = "The same prompts and noise, drawn by the original and by the edited model."
    return before_after(blocks, title=f"Told to forget {names}", note=note)


def _row(figure: Counted, n: int) -> list[Row]:
    """The n-th prompt of a figure and its image by each model; nothing where there are fewer."""
    if figure.before is None or n >= len(figure.texts):
        return []
    one = slice(n, n + 1)
    return [Row(figure.texts[n], figure.before.images[one], figure.after.images[one])]


def _gallery(figure: Counted) -> Gallery:
    attack = figure.kind == "attack"
    pictures = []
    for when, drawn in (("original", figure.before), ("edited", figure.after)):
        if drawn is not None:
            marked = drawn.hits if attack else np.logical_not(drawn.hits)
            small = sheet(thumbnails(drawn.images, _SIDE), columns=8, marked=marked)
            pictures.append(Picture(png_bytes(small), when))
    frames = (
        "Red frames: the classifier sees the erased concept. Green: it does not."
        if attack
        else "Green frames: the classifier sees what was asked for. Red: it does not."
    )
    title = figure.title[:1].upper() + figure.title[1:]
    return Gallery(title, f"Every image that was counted. {frames}", pictures)


def personalization_tables(record: Mapping[str, Any]) -> list[Table]:
    """How well a personalized model draws its subject, and each prompt."""
    models, settings = record["models"], record["settings"]
    rows: list[Sequence[str | Number]] = []
    for name, metrics in record["subjects"].items():
        for metric, figure in metrics.items():
            among = figure.get("references")
            photographs = Number("–" if among is None else f"{among:.4f}")
            rows.append((f"{metric}, {name}", _mean(figure, 4), photographs))
    rows += [(metric, _mean(figure, 4), Number("–")) for metric, figure in record["text"].items()]
    seed = f"; seed {settings['seed']}, {settings['steps']} steps" if "seed" in settings else ""
    note = (
        f"Mean cosines of {record['images']} images with their 95 % intervals, which are about the "
        "images and not about other runs of the training. -I: with the photographs, whose "
        "similarity among themselves is in the last column. -T, -ITC: with the prompt without its "
        f"new tokens. Models: {', '.join(f'{k} {v}' for k, v in models.items())}{seed}. "
        f"conceptax {record['versions'].get('conceptax', '?')}, jax {record['versions']['jax']}."
    )
    names = list(record["scores"])
    by_prompt = [
        (prompt, *(Number(f"{values[name]:.4f}") for name in names))
        for prompt, values in record["prompts"].items()
    ]
    title = "Is it the subject, and is it what was asked for?"
    return [
        Table(title, ("metric", "images", "photographs"), rows, note),
        Table("Each prompt", ("prompt", *names), by_prompt),
    ]
