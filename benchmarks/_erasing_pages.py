"""docs/erasing_results.md and its plots, from the cells that erasing_studies.py kept."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from conceptax.methods.erasing import METHODS
from conceptax.methods.evaluation.statistics import rate

PAGE = """# What SAGE withstands, and what it does not

![Erasing against retention](erasing_pareto.png)

`python benchmarks/erasing_studies.py table pareto ablations concepts --write` makes this page.

## All methods, all attacks
<!-- table -->
<!-- end of table -->

![Success against the attacker's budget](erasing_budgets.png)

## SAGE with one setting changed
<!-- ablations -->
<!-- end of ablations -->

## Several concepts, and a color
<!-- concepts -->
<!-- end of concepts -->

## Coming back
<!-- relapse -->
<!-- end of relapse -->

## The same text encoder in another UNet
<!-- transfer -->
<!-- end of transfer -->
"""

TITLES = {name: method.title for name, method in METHODS.items()} | {"original": "no erasing"}
MARKS = dict(zip(METHODS, "osD^vP<>X*pdhH", strict=True))
COLORS = {name: f"C{n}" for n, name in enumerate(METHODS)} | {"original": "0.5"}


def load(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The kept cells of a study by the name of their row."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        rows.setdefault(record["cell"]["name"], []).append(record)
    return rows


def pooled(figures: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The proportion of several seeds together, with its 95 % Wilson interval."""
    present = [each for each in figures if each]
    if not present:
        return None
    count, of = (sum(each[key] for each in present) for key in ("count", "of"))
    value, low, high = rate(count, of)
    return {"count": count, "of": of, "rate": value, "low": low, "high": high}


def attack(cells: Sequence[dict[str, Any]], name: str, when: str = "after") -> dict | None:
    """Success of an attack over the cells of a row and their concepts; the largest budget's."""
    return pooled(
        [row[when] for cell in cells for row in cell["metrics"]["attacks"] if row["attack"] == name]
    )


def kept(cells: Sequence[dict[str, Any]], group: str, when: str = "after") -> dict | None:
    """Retention of a group over the cells of a row."""
    return pooled(
        [
            row[when]
            for cell in cells
            for row in cell["metrics"]["retention"]
            if row["group"] == group
        ]
    )


def budgets(cells: Sequence[dict[str, Any]], name: str, key: str = "budgets") -> list[dict]:
    """An attack's pooled success at each of its budgets, whose figures are means over the cells."""
    runs = [
        row[key]
        for cell in cells
        for row in cell["metrics"]["attacks"]
        if row["attack"] == name and key in row
    ]
    points = []
    for column in zip(*runs, strict=True):
        names = column[0]["budget"]
        mean = {each: sum(one["budget"][each] for one in column) / len(column) for each in names}
        points.append({"budget": mean, **(pooled(column) or {})})
    return points


def percent(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "–"
    low, high = 100 * figure["low"], 100 * figure["high"]
    return f"{100 * figure['rate']:.1f} ({low:.0f}–{high:.0f})"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def mean(values: Sequence[float | None]) -> float:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else float("nan")


def main_table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """All methods, all attacks, retention."""
    header = (
        "method",
        "plain",
        "synonyms",
        "Concept Inversion",
        "token search",
        "relapse",
        "neighbors kept",
        "distant kept",
        "CLIP score kept",
        "Fréchet",
        "seconds",
    )
    body = []
    for name in [name for name in (*TITLES,) if name in rows]:
        cells = rows[name]
        scores = [cell["metrics"]["clip_score"]["retained"]["after"]["mean"] for cell in cells]
        body.append(
            [
                TITLES[name],
                *(
                    percent(attack(cells, each))
                    for each in (
                        "plain",
                        "synonyms",
                        "concept-inversion",
                        "token-search",
                        "relapse",
                    )
                ),
                *(percent(kept(cells, group)) for group in ("neighbors", "distant")),
                f"{mean(scores):.1f}",
                f"{mean([cell['metrics']['frechet']['distance'] for cell in cells]):.2f}",
                f"{mean([cell['seconds_to_erase'] for cell in cells]):.0f}",
            ]
        )
    return markdown(header, body)


def ablation_table(rows: dict[str, list[dict[str, Any]]], order: Sequence[str]) -> str:
    """SAGE with one setting changed."""
    header = (
        "change",
        "plain",
        "synonyms",
        "Concept Inversion",
        "neighbors kept",
        "distant kept",
    )
    return markdown(
        header,
        [
            [
                name,
                *(
                    percent(attack(rows[name], each))
                    for each in ("plain", "synonyms", "concept-inversion")
                ),
                *(percent(kept(rows[name], group)) for group in ("neighbors", "distant")),
            ]
            for name in order
            if name in rows
        ],
    )


def simple_table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Before and after of each concept, and what stayed."""
    body = []
    for name, cells in rows.items():
        for concept in cells[0]["cell"]["concepts"]:
            for kind in ("plain", "synonyms"):
                found = [
                    row
                    for cell in cells
                    for row in cell["metrics"]["attacks"]
                    if row["attack"] == kind and row["concept"] == concept
                ]
                if found:
                    figures = (
                        percent(pooled([row[when] for row in found]))
                        for when in ("before", "after")
                    )
                    body.append([name, f"“{concept}”, {kind}", *figures])
        for group in ("neighbors", "distant"):
            figures = [percent(kept(cells, group, when)) for when in ("before", "after")]
            if figures[0] != "–":
                body.append([name, f"{group} kept", *figures])
    return markdown(("run", "figure", "before", "after"), body)


def relapse_table(rows: dict[str, list[dict[str, Any]]], never: list[dict[str, Any]]) -> str:
    """How soon fine-tuning brings the concept back, and how soon it teaches it."""
    runs = [(TITLES[name], budgets(rows[name], "relapse")) for name in TITLES if name in rows]
    if never:
        runs.append(("never knew it", budgets(never, "relapse", "never_knew")))
    updates = [f"{point['budget']['steps']:.0f} updates" for point in runs[0][1]]
    return markdown(
        ("method", *updates), [[title, *map(percent, points)] for title, points in runs]
    )


def plot_pareto(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Erasing (how much is left) against retention, a point per setting."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, mark in MARKS.items():
        points = []
        for cells in rows.values():
            if cells[0]["cell"]["method"] == name:
                left = [attack(cells, each) for each in ("plain", "synonyms")]
                stays = [kept(cells, group) for group in ("neighbors", "distant")]
                points.append((100 * pooled(left)["rate"], 100 * pooled(stays)["rate"]))
        if points:
            axes.scatter(
                *zip(*sorted(points), strict=True),
                marker=mark,
                color=COLORS[name],
                label=TITLES[name],
            )
    axes.set(xlabel="concept still drawn, by any name (%)", ylabel="other things drawn right (%)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def plot_budgets(
    rows: dict[str, list[dict[str, Any]]], never: list[dict[str, Any]], path: Path
) -> None:
    """Success against the budget of Concept Inversion (steps, norm) and of relapse (steps)."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, name, key, label in zip(
        panels,
        ("concept-inversion", "concept-inversion", "relapse"),
        ("steps", "norm", "steps"),
        ("Concept Inversion: steps", "… norm, relative to the vocabulary's", "relapse: steps"),
        strict=True,
    ):
        for row in [each for each in COLORS if each in rows]:
            cells = rows[row]
            points = budgets(cells, name)
            x = [point["budget"][key] for point in points]
            y = [100 * point["rate"] for point in points]
            axes.plot(x, y, marker=MARKS.get(row, "."), color=COLORS[row], label=TITLES[row])
        axes.set(xlabel=label, ylim=(-3, 103))
    if anew := budgets(never, "relapse", "never_knew"):
        panels[2].plot(
            [point["budget"]["steps"] for point in anew],
            [100 * point["rate"] for point in anew],
            "k--",
            label="never knew it",
        )
    panels[0].set_ylabel("images that show the concept (%)")
    panels[2].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)


def write_page(results: Path, docs: Path, ablations: Sequence[str]) -> None:
    """Write the page's tables between its markers, and the plots; the text around them stays."""
    studies = {name: load(results / name) for name in ("table", "pareto", "ablations")}
    never = load(results / "relapse").get("never knew", [])
    parts = {
        "table": main_table(studies["table"]),
        "ablations": ablation_table(studies["ablations"], ablations),
        "concepts": simple_table(load(results / "concepts")),
        "relapse": relapse_table(studies["table"], never),
        "transfer": simple_table(load(results / "transfer")),
    }
    page = docs / "erasing_results.md"
    text = page.read_text(encoding="utf-8") if page.exists() else PAGE
    for name, content in parts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        first, last = text.index(begin) + len(begin), text.index(end)
        measured = content.count("\n") > 1  # more than a table's head
        text = text[:first] + (content if measured else "Not measured yet.") + "\n" + text[last:]
    page.write_text(text, encoding="utf-8")
    plot_pareto(studies["pareto"] | studies["table"], docs / "erasing_pareto.png")
    plot_budgets(studies["table"], never, docs / "erasing_budgets.png")
