"""Published suites: load what settings name, run them, and put their one line beside others'."""

import csv
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

import conceptax
from conceptax.converters.formats.identify import resolved
from conceptax.errors import ConceptaxError
from conceptax.methods.evaluation.composition import compositions
from conceptax.methods.evaluation.judges import Judge, PhraseJudge
from conceptax.methods.evaluation.leaderboard import SuiteConfig, Utility, evaluate_suite, tenth
from conceptax.methods.evaluation.published import SUITES, PublishedSuite
from conceptax.methods.evaluation.unsafe_prompts import read_unsafe_prompts
from conceptax.methods.glyphs.evaluation import GlyphsClassifier, glyphs_compositions
from conceptax.methods.red_team.unlearn_diff_atk import UnlearnDiffAtkConfig
from conceptax.methods.subjects.images import image_files, read_image
from conceptax.methods.training import make_mesh
from conceptax.reporting.instruments import load_classifier, load_clip, load_fid
from conceptax.reporting.judges import file_record, load_label_judge, load_nudenet, load_q16
from conceptax.reporting.models import load_edited, load_pipeline
from conceptax.reporting.report import Number, Table, counted

COLUMNS = ("Pre-ASR", "Post-ASR", "FID", "CLIP-Score")  # as the leaderboard names them
_ATTACK = ("tokens", "iterations", "times")


class SuiteError(ConceptaxError, ValueError):
    """A suite that is not known, or lacks what it needs."""


def suite_named(name: str) -> PublishedSuite:
    """The suite of this name.

    Raises:
      SuiteError: there is none.
    """
    if name not in SUITES:
        raise SuiteError(f"there is no suite {name!r}; known are {', '.join(SUITES)}.")
    return SUITES[name]


def claims(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What images that are kept from before depend on: another run's are refused."""
    names = ("suite", "original", "edited", "steps", "guidance", "sampler", "seed", "dtype")
    found = {name: settings[name] for name in (*names, "quick", "composition", "concept")}
    for name in ("prompts", "captions"):
        path = settings[name]
        found[name] = None if path is None else file_record(Path(path))["sha256"]
    return found


def run_settings(
    settings: Mapping[str, Any], folder: Path, report: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Load what settings name, and run the suite.

    Args:
      settings: the flags of `conceptax evaluate --suite`, in plain values.
      folder: where images and searches are kept.
      report: called with lines of progress.

    Raises:
      SuiteError: what is missing for the suite.
      ValueError: models, files or settings that cannot be used.
    """
    suite = suite_named(settings["suite"])
    path = functools.partial(_path, settings)
    if settings["prompts"] is None:
        where = f" They are published at {suite.file}." if suite.file else ""
        raise SuiteError(f"{suite.title} takes its prompts as a file, --prompts FILE.{where}")
    prompts = read_unsafe_prompts(path("prompts"), category=settings["category"])
    expected = suite.prompts
    if expected is not None and len(prompts) != expected and settings["category"] is None:
        report(f"{path('prompts')} holds {len(prompts)} prompts, and the published file {expected}")
    captions = [] if settings["captions"] is None else read_unsafe_prompts(path("captions"))
    if settings["quick"]:
        prompts, captions = tenth(prompts), tenth(captions)
    chosen = {name: settings[name] for name in _ATTACK if settings[name] is not None}
    config = SuiteConfig(
        steps=settings["steps"],
        guidance=settings["guidance"],
        sampler=settings["sampler"],
        seed=settings["seed"],
        batch_size=settings["batch_size"],
        attack=UnlearnDiffAtkConfig(**chosen) if settings["attack"] else None,
    )

    source, changed = path("original") or conceptax.bundled_model(), path("edited")
    if changed is None:
        raise SuiteError("there is nothing to evaluate: pass the edited model with --edited.")
    source = resolved(source)
    clip_folder = path("clip")
    if clip_folder is None and (source / "clip").is_dir():
        clip_folder = source / "clip"
    clip = None if clip_folder is None else load_clip(clip_folder, None, clip_folder.name)
    classifier = _classifier(settings, source)
    judge = _judge(settings, suite, clip, classifier)
    report(f"loading {source.name} and {changed}")
    original = load_pipeline(source, settings["dtype"], "evaluating")
    edited = load_edited(changed, original, settings["dtype"])

    concept = settings["concept"] or suite.concept
    count = settings["composition"] // (10 if settings["quick"] else 1)
    composer = classifier or clip
    composed = []
    if count and isinstance(composer, GlyphsClassifier):
        composed = glyphs_compositions([concept], count, settings["seed"])
    elif count and composer is not None:
        composed = compositions(count, settings["seed"], without=[concept])
    elif count:
        report("composition is not measured: it takes a --clip")
    references = []
    if settings["references"] is not None:
        files = image_files(path("references"))
        references = [functools.partial(read_image, each) for each in files]
    fid = None if settings["fid"] is None else load_fid(path("fid"), settings["fid_resize"])
    if captions and clip is None and fid is None:
        raise SuiteError("captions are drawn to be measured: pass --fid, --clip or both.")
    utility = Utility(captions, clip, fid, references, composed, composer)
    devices = len(jax.local_devices())
    found = evaluate_suite(
        original,
        edited,
        prompts,
        judge,
        config,
        folder,
        utility=utility,
        mesh=make_mesh(devices) if devices > 1 else None,
        report=report,
    )
    attack = None if config.attack is None else dataclasses.asdict(config.attack)
    published = [line._asdict() for line in suite.lines]
    told = {"title": suite.title, "attack": attack, "prompts_file": file_record(path("prompts"))}
    return {**told, **found, "published": {"source": suite.source, "lines": published}}


def _path(settings: Mapping[str, Any], name: str) -> Any:
    return None if settings[name] is None else Path(settings[name])


def _classifier(settings: Mapping[str, Any], source: Path) -> Any:
    """The classifier of phrases that is named, or the original's own judge."""
    given = _path(settings, "classifier")
    if given is None and not (source / "judge").is_dir():
        return None
    given = given or source / "judge"
    return load_classifier(given, None, given.name)


def _judge(settings: Mapping[str, Any], suite: PublishedSuite, clip: Any, classifier: Any) -> Judge:
    """The judge that is asked for, or else the suite's own."""
    kind = settings["judge"] or suite.judge
    lacks = f"{suite.title} is judged by {kind}" if settings["judge"] is None else f"--judge {kind}"
    if kind == "nudenet":
        threshold = settings["threshold"]
        own = suite.threshold if suite.judge == "nudenet" else 0.45
        return load_nudenet(_path(settings, "nudenet"), own if threshold is None else threshold)
    if kind == "q16":
        if settings["q16"] is None or clip is None:
            raise SuiteError(
                f"{lacks}, which takes its file of prompts (--q16) and the CLIP they were tuned "
                "for (--clip, published for ViT-L/14); or choose another with --judge."
            )
        return load_q16(_path(settings, "q16"), clip)
    if kind == "label":
        wanted = list(settings["label"]) or ([suite.label] if suite.label else [])
        if settings["onnx"] is None or settings["labels"] is None or not wanted:
            raise SuiteError(
                f"{lacks}, a classifier in an ONNX file (--onnx) with its labels (--labels) and "
                "those of the concept (--label); or choose another with --judge."
            )
        options = {"top": settings["top"], "threshold": settings["threshold"] or 0.0}
        files = _path(settings, "onnx"), _path(settings, "labels")
        return load_label_judge(*files, wanted, **options)
    concept = settings["concept"] or suite.concept
    if classifier is None or not concept:
        raise SuiteError(
            f"{lacks}, which takes a --classifier (a CLIP folder, or a judge of glyphs) and a "
            "--concept; or choose another with --judge."
        )
    return PhraseJudge(classifier, concept)


# ---- for people ----


def suite_line(metrics: Mapping[str, Any]) -> str:
    """The figures in one line."""
    line = metrics["line"]
    parts = [f"Pre-ASR {_percent(line['Pre-ASR'])}"]
    if line["Post-ASR"] is not None:
        parts.append(f"Post-ASR {_percent(line['Post-ASR'])}")
    if line["FID"] is not None:
        parts.append(f"FID {_mean(line['FID'], 2)}")
    if line["CLIP-Score"] is not None:
        parts.append(f"CLIP {_mean(line['CLIP-Score'], 3, 100.0)}")
    if line.get("Composition") is not None:
        parts.append(f"composition {_percent(line['Composition'])}")
    return f"{metrics['title']}: {', '.join(parts)}"


def _percent(figure: Mapping[str, Any]) -> str:
    rate, low, high = (100 * figure[name] for name in ("rate", "low", "high"))
    return f"{rate:.2f} % ({low:.0f}–{high:.0f})"


def _mean(figure: Mapping[str, Any], digits: int, scale: float = 1.0) -> str:
    mean, low, high = (f"{figure[name] / scale:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low}–{high})"


def suite_tables(metrics: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Table]:
    """The line beside the published ones, and composition by its kinds."""
    line, published = metrics["line"], metrics["published"]
    composed = metrics["composition"] is not None
    dash = Number("–")

    def average(figure: Any, digits: int, scale: float = 1.0) -> Number:
        if figure is None:
            return dash
        mean, low, high = (f"{figure[n] / scale:.{digits}f}" for n in ("mean", "low", "high"))
        return Number(mean, f"{low}–{high}")

    own: list[str | Number] = [
        "this one",
        counted(line["Pre-ASR"]),
        counted(line["Post-ASR"]),
        average(line["FID"], 2),
        average(line["CLIP-Score"], 3, 100.0),
    ]
    rows = [[*own, counted(line["Composition"])] if composed else own]
    for each in published["lines"]:
        figures = (each["pre_asr"], each["post_asr"], each["fid"], each["clip_score"])
        texts = [f"{v:g} %" if n < 2 else f"{v:g}" for n, v in enumerate(figures)]
        rows.append([each["method"], *map(Number, texts), *([dash] if composed else [])])
    columns = ("method", *COLUMNS, *(["composition"] if composed else []))
    judge = metrics["judge"]
    told = ", ".join(
        f"{name} {judge[name]}" for name in ("file", "sha256", "threshold") if name in judge
    )
    seen, compared = judge["sees"], metrics["utility"].get("compared_with")
    note = (
        f"Judge: {judge['kind']}" + (f" ({told})" if told else "") + f", which sees the concept in "
        f"{seen['count']} of {seen['of']} images of the original. {len(metrics['prompts'])} "
        f"prompts, {settings['steps']} steps, sampler {settings['sampler'] or 'of the model'}. "
        "Brackets and small print are 95 % intervals."
        + (f" FID and CMMD compare with {compared}." if compared else "")
        + (" A tenth of the suite (--quick)." if settings["quick"] else "")
        + (f" Published lines: {published['source']}." if published["lines"] else "")
    )
    tables = [Table(metrics["title"], columns, rows, note)]
    if composed:
        kinds = {"together": metrics["composition"], **metrics["composition"]["kinds"]}
        pairs = [(k, counted(each["before"]), counted(each["after"])) for k, each in kinds.items()]
        note = "Images that show what was asked for together."
        tables.append(Table("Composition", ("asked for", "original", "edited"), pairs, note))
    return tables


def write_leaderboard(path: Path, name: str, metrics: Mapping[str, Any]) -> None:
    """The line as the leaderboard's own CSV files have it; -1 is what was not measured."""
    line = metrics["line"]

    def value(figure: Any, key: str, scale: float, digits: int) -> str:
        return "-1" if figure is None else f"{figure[key] * scale:.{digits}f}"

    scales = (("rate", 100.0, 2), ("rate", 100.0, 2), ("mean", 1.0, 2), ("mean", 0.01, 3))
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("Unlearned_Methods", *COLUMNS))
        figures = zip(COLUMNS, scales, strict=True)
        rows.writerow((name, *(value(line[column], *how) for column, how in figures)))
