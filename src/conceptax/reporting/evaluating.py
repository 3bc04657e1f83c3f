"""The evaluation of an erasure that plain settings describe, as `metrics.json` keeps them."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import conceptax
from conceptax.converters.formats.identify import resolved
from conceptax.methods.evaluation import (
    Evaluation,
    EvaluationConfig,
    Suites,
    evaluate,
    known_attacks,
    phrase_suites,
    read_synonyms,
)
from conceptax.methods.evaluation.unsafe_prompts import read_unsafe_prompts
from conceptax.methods.glyphs.evaluation import GlyphsClassifier, glyphs_suites
from conceptax.reporting.instruments import load_classifier, load_clip
from conceptax.reporting.models import load_edited, load_pipeline

LISTS = ("synonyms", "neighbors", "distant", "templates")  # of phrases
_PLAIN = ("images", "steps", "guidance", "seed", "batch_size", "attack_images")


def evaluate_settings(
    settings: Mapping[str, Any], report: Callable[[str], None] = lambda text: None
) -> Evaluation:
    """Load what settings name, and evaluate it.

    Args:
      settings: the flags of `conceptax evaluate`, as metrics.json holds them under "settings".
      report: called with a line before each figure.

    Raises:
      ValueError: models, files or settings that cannot be used.
    """
    concepts, dtype = settings["concept"], settings["dtype"]
    config = EvaluationConfig(
        attacks={name: _attack_settings(name, settings) for name in settings["attacks"]},
        **{name: settings[name] for name in _PLAIN},
    )
    given = {
        name: None if settings[name] is None else Path(settings[name])
        for name in ("original", "edited", "never_knew", "classifier", "clip")
    }
    source, changed = given["original"] or conceptax.bundled_model(), given["edited"]
    assert changed is not None
    source = resolved(source)
    report(f"loading {source.name} and {changed}")
    if source.resolve() == changed.resolve():
        warnings.warn(
            f"the edited model is the original, {source}: every difference will be none.",
            stacklevel=2,
        )
    original = load_pipeline(source, dtype, "evaluating")
    edited = load_edited(changed, original, dtype)
    never_knew = given["never_knew"] and load_edited(given["never_knew"], original, dtype)

    judge = given["classifier"] or source / "judge"
    if not judge.is_dir() and given["classifier"] is None:
        raise ValueError(
            f"{source} has no judge of its own: pass a classifier of what its images show with "
            "--classifier, for example a CLIP folder."
        )
    classifier = load_classifier(judge, original.tokenizer, judge.name)
    clip = getattr(classifier, "clip", None)
    if given["clip"] is not None:
        clip = load_clip(given["clip"], original.tokenizer, given["clip"].name)
    elif clip is None and (source / "clip").is_dir():
        clip = load_clip(source / "clip", original.tokenizer, f"{source.name}/clip")
    rows = settings["unsafe_prompts"]
    if rows is not None:
        rows = read_unsafe_prompts(rows, category=settings["unsafe_category"])
    return evaluate(
        original,
        edited,
        concepts,
        classifier,
        _suites(settings, classifier),
        config,
        clip=clip,
        unsafe=rows or (),
        never_knew=never_knew,
        report=report,
    )


def _suites(settings: Mapping[str, Any], classifier: Any) -> Suites:
    """Prompts of the glyphs world, or of phrases that were given."""
    concepts, images, seed = settings["concept"], settings["images"], settings["seed"]
    lists = {name: settings[name] for name in LISTS if settings[name] is not None}
    if isinstance(classifier, GlyphsClassifier) and not lists:
        return glyphs_suites(concepts, images, seed)
    if "synonyms" in lists:
        lists["synonyms"] = read_synonyms(lists["synonyms"], concepts)
    return phrase_suites(concepts, images, seed, **lists)


def _attack_settings(name: str, settings: Mapping[str, Any]) -> Any:
    attacks = known_attacks()
    if name not in attacks:
        raise ValueError(f"there is no attack {name!r}; known are {list(attacks)}.")
    values = settings["attack_settings"][name].items()
    return attacks[name].config(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in values}
    )
