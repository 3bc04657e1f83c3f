"""The bundled model described: how often it draws what is asked for, and its model card."""

import dataclasses
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import conceptax
from conceptax.methods.glyphs.build import BuildConfig
from conceptax.methods.glyphs.recipe import Recipe

_CARD = Path(conceptax.__file__).parent / "assets" / "glyphs_card.md"


def quality_table(quality: Mapping[str, Any]) -> str:
    """The measured proportions as a Markdown table."""
    lines = ["| prompts | images | digit | color | texture |", "|---|---|---|---|---|"]
    for name, found in quality["sets"].items():
        cells = [_percent(found[each]) for each in ("digit", "color", "texture")]
        lines.append(f"| {name} | {found['digit']['of']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(figure: Mapping[str, Any]) -> str:
    low, high = 100 * figure["low"], 100 * figure["high"]
    return f"{100 * figure['rate']:.1f} % ({low:.1f}–{high:.1f})"


def model_card(build: BuildConfig, quality: Mapping[str, Any]) -> str:
    """README.md of a built model."""
    held_out = quality["sets"]["held-out wordings"]
    kinds = "\n".join(
        f"| {kind} | {value['of']} | {_percent(value)} |"
        for kind, value in held_out["by_kind"].items()
    )
    trainings = "\n".join(
        f"| {name} | {plan.steps:,} | {plan.batch_size} |"
        for name, plan in ((f.name, getattr(build, f.name)) for f in dataclasses.fields(build))
        if isinstance(plan, Recipe)
    )
    accuracy = {
        each: f"{100 * quality['judge'][each]['accuracy']:.1f} %"
        for each in ("digit", "color", "texture")
        if each in quality["judge"]
    }
    return string.Template(_CARD.read_text(encoding="utf-8")).substitute(
        seed=build.seed,
        images=f"{build.images:,}",
        trainings=trainings,
        quality=quality_table(quality),
        kinds=kinds,
        accuracy=", ".join(f"{name} {value}" for name, value in accuracy.items()) or "not measured",
    )
