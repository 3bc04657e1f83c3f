"""What each backend can do: the table of `docs/gna.md`, from the functions that dispatch reads.

Print it with `python -m conceptax.kernels.gna.features`, or write it into a page with
`python -m conceptax.kernels.gna.features docs/gna.md`.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from .api import BACKENDS, PREFERENCES, unable
from .problem import AnyProblem, Attention, ListProblem, Problem, windows_of

BEGIN, END = "<!-- features: begin -->", "<!-- features: end -->"
PLATFORMS = {"cpu": "CPU", "gpu": "NVIDIA GPU", "tpu": "TPU"}

BASE = Problem(
    batch=1,
    windows=windows_of((32, 32), 8),
    heads=4,
    kv_heads=4,
    head_dim=64,
    value_dim=64,
    dtype="bfloat16",
    additional=0,
    scale=0.125,
)


def _window(layout: tuple[int, ...], *settings: Any) -> dict[str, Any]:
    return {"windows": windows_of(layout, *settings)}


def _dims(dim: int, value_dim: int | None = None) -> dict[str, Any]:
    return {"head_dim": dim, "value_dim": dim if value_dim is None else value_dim}


# What is asked of a backend: changes to the problem above.
FEATURES: dict[str, dict[str, Any]] = {
    "1-D": _window((1024,), 128),
    "2-D": {},
    "3-D": _window((8, 16, 16), 4),
    "strides": _window((32, 32), (8, 9), (4, 3)),
    "dilation": _window((32, 33), 8, 1, (2, 3)),
    "causal dimensions": _window((32, 32), 8, 1, 1, (True, False)),
    "grouped and multi-query heads": {"kv_heads": 1},
    "additional keys and values": {"additional": 77},
    "tokens over several devices": {"shards": 8, "axis_name": "context"},
    "bfloat16": {},
    "float16": {"dtype": "float16"},
    "float32": {"dtype": "float32"},
    "head_dim 32": _dims(32),
    "head_dim 128": _dims(128),
    "head_dim 256": _dims(256),
    "head_dim 512": _dims(512),
    "head_dim 256, float32": _dims(256) | {"dtype": "float32"},
    "head_dim 72 (a multiple of 8)": _dims(72),
    "head_dim 20 (any)": _dims(20),
    "values of another dimension": _dims(64, 96),
}

# Another problem that is asked of it.
LISTS = "block lists"


def _problem(feature: str) -> AnyProblem:
    if feature != LISTS:
        return dataclasses.replace(BASE, **FEATURES[feature])
    shared = {field.name: getattr(BASE, field.name) for field in dataclasses.fields(Attention)}
    return ListProblem(tokens=1024, keys=1024, query_block=64, key_block=64, most=4, **shared)


def table() -> str:
    """The features of every backend in Markdown, and what is taken where."""
    columns: dict[tuple[str, tuple[str | None, ...]], list[str]] = {}
    features = [*FEATURES, LISTS]
    problems = [_problem(feature) for feature in features]
    for name in BACKENDS:
        for platform in PLATFORMS:
            reasons = tuple(unable(name, problem, platform) for problem in problems)
            if any(reason is None for reason in reasons):
                columns.setdefault((name, reasons), []).append(PLATFORMS[platform])
    heads = [
        f"`{name}` ({'any' if len(platforms) == len(PLATFORMS) else ', '.join(platforms)})"
        for (name, _), platforms in columns.items()
    ]
    notes: dict[str, int] = {}
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for n, feature in enumerate(features):
        cells = [
            "✓" if reason is None else f"– ({_note(reason, notes)})"
            for reason in (reasons[n] for _, reasons in columns)
        ]
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    lines += ["", *(f"{n}. {reason}" for reason, n in notes.items())]
    lines += ["", "Taken if none is asked for, the first that can:", ""]
    for platform, names in PREFERENCES.items():
        lines.append(f"- {PLATFORMS[platform]}: {', '.join(f'`{name}`' for name in names)}")
    return "\n".join(lines)


def _note(reason: str, notes: dict[str, int]) -> int:
    """The number of a reason, without what it says of the problem at hand."""
    return notes.setdefault(reason.split(", not ")[0], len(notes) + 1)


def write(page: Path) -> None:
    """Puts the table into a page, between the two marks."""
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write(Path(sys.argv[1]))
    else:
        print(table())
