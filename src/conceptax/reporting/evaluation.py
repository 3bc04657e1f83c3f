"""Evaluations for people: their tables, and a page with every image that was counted."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from conceptax.methods.evaluation import Counted, Drawn, Evaluation, Subject
from conceptax.methods.evaluation.preprocessing import Images as Pixels
from conceptax.reporting.gallery import Fact, Front, Group, Images, Item, Page, Ran, Shot
from conceptax.reporting.report import (
    Number,
    Table,
    attack_meaning,
    counted,
    interval,
    retention_meaning,
    share,
)

_ROWS = 5  # prompts in each block in front
_CONFIDENCE = "The percentage is the probability that the classifier gives its own word."
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


def erasure_page(
    result: Evaluation,
    tables: Sequence[Table],
    record: Mapping[str, Any],
    images: Images,
    *,
    label: str,
    command: str = "",
    again: str = "",
) -> Page:
    """The page of an evaluation.

    Args:
      result: the evaluation.
      tables: all figures.
      record: of the run, with its settings.
      images: takes those that were counted.
      label: of the method.
      command, again: that made it, and that repeats it.
    """
    metrics = result.metrics
    names = ", ".join(f"“{concept}”" for concept in metrics["concepts"])
    titles = {row["attack"]: row["title"] for row in metrics["attacks"]}
    titles |= {row["group"]: row["title"] for row in metrics["retention"]}
    groups = {each.name: Group(each.name, titles[each.name], each.kind) for each in result.counted}
    places = {name: place for place, name in enumerate(groups)}
    items: list[Item] = []
    first: list[int] = []  # the place of each figure's first item
    for each in result.counted:
        first.append(len(items))
        own = each.before is None and each.kind == "attack"
        for n, (text, phrase, noise) in enumerate(
            zip(each.texts, each.phrases, each.noise, strict=True)
        ):
            asked = (phrase,) if each.name != "unsafe prompts" else tuple(metrics["concepts"])
            before = None if each.before is None else _shot(each.before, n, images)
            after = _shot(each.after, n, images)._replace(prompt=text if own else "")
            height, width = each.after.images[n].shape[:2]
            place = places[each.name]
            items.append(Item(place, text, asked, (width, height), before, (after,), *noise))
    shown = {name: value for name, value in record.items() if name not in _FIGURES}
    return Page(
        kind="erasure",
        title=f"conceptax: the erasure of {names}",
        lead=(
            "The original and the edited model drew the same prompts from the same noise, and the "
            "red team attacked the edited one."
        ),
        sides=("original", "edited"),
        legend=(
            "Every image that was counted. Where an attack asks for the erased concept, red: the "
            "classifier sees it; green: it does not. In what should stay, green: the classifier "
            f"sees what was asked for; red: it does not. {_CONFIDENCE}"
        ),
        groups=tuple(groups.values()),
        items=tuple(items),
        front=tuple(_front(result.counted, first, names)),
        runs=(
            Ran(
                label,
                command,
                again,
                tuple(_facts(metrics)),
                tuple(tables),
                json.dumps(shown, indent=2, ensure_ascii=False),
            ),
        ),
    )


def _shot(drawn: Drawn, n: int, images: Images) -> Shot:
    told = drawn.confidences is not None
    return Shot(
        images.add(drawn.images[n]),
        bool(drawn.hits[n]),
        drawn.words[n] if told else "",
        round(float(drawn.confidences[n]), 4) if drawn.confidences is not None else None,
    )


def _front(figures: Sequence[Counted], first: Sequence[int], names: str) -> Iterator[Front]:
    """The first prompts of all figures of a kind in turn, where both models drew."""
    for kind, title in (("attack", f"{names}, by any name"), ("retention", "what should stay")):
        own = [
            (place, len(each.texts))
            for each, place in zip(figures, first, strict=True)
            if each.kind == kind and each.before is not None
        ]
        rows = [place + n for n in range(_ROWS) for place, count in own if n < count]
        if rows:
            yield Front(title, tuple(rows[:_ROWS]))


def _facts(metrics: Mapping[str, Any]) -> Iterator[Fact]:
    """Every figure with its interval, and what it means."""
    for each in metrics["attacks"]:
        yield proportion_fact(
            f"{each['title']} for “{each['concept']}”", "attack", each["before"], each["after"]
        )
    for each in metrics["retention"]:
        yield proportion_fact(each["title"], "retention", each["before"], each["after"])
    scores, distance = metrics["clip_score"], metrics["frechet"]
    if scores is not None and scores["retained"] is not None:
        before, after = (scores["retained"][when] for when in ("before", "after"))
        apart = after["high"] < before["low"] or after["low"] > before["high"]
        meaning = (
            "Images of what should stay fit their prompts "
            + ("worse than" if after["mean"] < before["mean"] else "better than")
            + " before, by more than chance explains."
            if apart
            else "Images of what should stay fit their prompts as before: the intervals overlap."
        )
        told, was = _mean(after), _mean(before)
        aside = f"{told.aside}; before {was.text}, {was.aside}"
        yield Fact(f"CLIP score, what should stay ({scores['model']})", told.text, aside, meaning)
    if distance is not None:
        yield Fact(
            "Fréchet distance to the original's samples",
            f"{distance['distance']:.4g}",
            f"{distance['features']}, {distance['images']} images",
            "How far images of what should stay moved from the original's; 0 is not at all. It has "
            "no interval: compare it only with distances of the same features and as many images.",
        )


def proportion_fact(
    title: str,
    kind: Literal["attack", "retention"],
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any],
) -> Fact:
    """A proportion in front, with both intervals and what they mean."""
    was = "" if before is None else f"; before {share(before)}, {interval(before)}"
    aside = f"{after['count']} of {after['of']} images, 95 % interval {interval(after)}{was}"
    if kind == "retention" and before is not None:
        meaning = retention_meaning(before, after)
    else:
        meaning = attack_meaning(before, after)
    return Fact(title[:1].upper() + title[1:], f"{100 * after['rate']:.0f} %", aside, meaning)


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


def personalization_page(
    record: Mapping[str, Any],
    drawn: Pixels,
    prompts: Sequence[str],
    subjects: Sequence[Subject],
    images: Images,
    *,
    label: str,
    command: str = "",
) -> Page:
    """The page of an evaluation of a learnt subject.

    Args:
      record: what was measured, and the settings.
      drawn, prompts: the images and what each was asked for.
      subjects: with their photographs.
      images: takes all of them.
      label: of the method.
      command: that made it.
    """
    groups = [Group("drawn", "drawn images", "shown")]
    items, scores = [], record["scores"]
    for n, (image, prompt) in enumerate(zip(drawn, prompts, strict=True)):
        told = " · ".join(f"{name} {values[n]:.3f}" for name, values in scores.items())
        shot = Shot(images.add(image), told=told)
        size = image.shape[1], image.shape[0]
        items.append(Item(0, prompt, (), size, None, (shot,), record["settings"].get("seed"), n))
    front = [Front("Drawn", tuple(prompts.index(p) for p in [*dict.fromkeys(prompts)][:_ROWS]))]
    photographs: list[int] = []
    for subject in subjects:
        title = f"photographs of {subject.name}"
        groups.append(Group(title, title, "shown"))
        for n, image in enumerate(subject.images):
            if n < _ROWS:
                photographs.append(len(items))
            shot, size = Shot(images.add(image)), (image.shape[1], image.shape[0])
            place, told = len(groups) - 1, f"a photograph of {subject.name}"
            items.append(Item(place, told, (subject.name,), size, shot, (None,), None, n))
    front.insert(0, Front("Photographs", tuple(photographs)))
    shown = {k: v for k, v in record.items() if k not in ("scores", "prompts", "subjects", "text")}
    names = " and ".join(subject.name for subject in subjects)
    return Page(
        kind="personalization",
        title=f"conceptax: {names}, learnt",
        lead=(
            "What the model draws of its subject, beside photographs of it: the same subject, and "
            "what was asked for?"
        ),
        sides=("photograph", "drawn"),
        legend=(
            "Every image that was measured, with its cosines: -I with the photographs, -T and -ITC "
            "with the prompt without its new tokens."
        ),
        groups=tuple(groups),
        items=tuple(items),
        front=tuple(front),
        runs=(
            Ran(
                label,
                command,
                "",
                tuple(_subject_facts(record)),
                tuple(personalization_tables(record)),
                json.dumps(shown, indent=2, ensure_ascii=False),
            ),
        ),
    )


def _subject_facts(record: Mapping[str, Any]) -> Iterator[Fact]:
    figures = [
        (f"{metric}, {name}", figure)
        for name, metrics in record["subjects"].items()
        for metric, figure in metrics.items()
    ]
    for title, figure in (*figures, *record["text"].items()):
        among = figure.get("references")
        if among is not None:
            reached = "reach" if figure["high"] >= among else "stay below"
            meaning = (
                f"Photographs of the subject are {among:.3f} alike among themselves, which the "
                f"images {reached}."
            )
        elif title in record["text"]:
            meaning = (
                "How well images fit their prompts; only differences from other models mean "
                "something, where the intervals are apart."
            )
        else:
            meaning = "How alike images and the photograph are; compare it with other models'."
        mean = _mean(figure, 3)
        aside = f"mean cosine of {figure['of']} images, 95 % interval {mean.aside}"
        yield Fact(title, mean.text, aside, meaning)
