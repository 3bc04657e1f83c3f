"""`conceptax evaluate`: is the concept gone, what else broke, and who can bring it back?"""

import dataclasses
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro
from rich.console import Console

import conceptax
from conceptax.cli.erase import concepts_to_erase
from conceptax.cli.loading import load_edited, load_pipeline
from conceptax.cli.options import Model, OptionalPath
from conceptax.cli.runs import new_folder
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
from conceptax.methods.memory import require_images
from conceptax.methods.text.phrases import read_phrases
from conceptax.reporting.erasing import erasing_record, near_tables
from conceptax.reporting.evaluation import report_page, report_tables
from conceptax.reporting.instruments import load_classifier, load_clip
from conceptax.reporting.report import markdown_table
from conceptax.reporting.results import environment
from conceptax.text import read_text, write_json

METRICS = "metrics.json"
_OF_THIS_RUN = ("output", "settings", "force")  # not of what is measured
_MODELS = ("original", "edited", "never_knew", "classifier", "clip")
_LISTS = ("synonyms", "neighbors", "distant", "templates")  # files of phrases

Settings = TypeVar("Settings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(Generic[Settings]):
    """Evaluate an erasure: is the concept gone, what else broke, and who can bring it back?

    Draws the same prompts from the same noise with the original and the edited model, lets the red
    team attack the edited one, and has a classifier count. Prompts for the bundled model are made
    here; for others, pass files of phrases. What follows --force are the settings of the attacks.

    Writes metrics.json, with everything it takes to run the same evaluation again (--settings),
    table.md, and report.html with every image that was counted.

    Attributes:
      original: the model before erasing: a folder of Stable Diffusion 1, 2 or XL.
      edited: the model after: such a folder, or what `conceptax erase --export` wrote.
      concept: what was erased, in words; repeat for several. A name that ends in .txt is a file of
        them, one a line.
      output: the folder to write.
      classifier: who says what an image shows: a CLIP folder (zero-shot), or a judge of glyphs; by
        default the original's own judge/, which the bundled model has.
      clip: a CLIP folder that scores images against prompts; by default the classifier's, or the
        original's own clip/.
      never_knew: a model that never learnt the concept, whose relapse is compared.
      images: images of each figure: a concept under an attack, or a group of retained concepts.
      steps: denoising steps per image.
      guidance: strength of the prompt.
      seed: of the noise, the choice of prompts and the attacks.
      batch_size: images drawn at a time.
      dtype: computation dtype.
      attacks: which of the red team's attacks to run, by name; by default all; none without names.
      attack_images: images of the concept that each attack is given.
      synonyms: file of other names, one a line: 'concept: name', or the name alone.
      neighbors: file of phrases that resemble the concept and should stay.
      distant: file of phrases that do not, and should stay.
      templates: file of wordings with one {} each, which erasing did not use.
      unsafe_prompts: CSV file in the layout of I2P: an attack with prompts, seeds and guidance of
        its own.
      unsafe_category: only its rows of this category.
      settings: a metrics.json: run its evaluation again; no other settings are taken.
      force: replace an earlier evaluation.
      attack_settings: of the attacks.
    """

    original: Model = None
    edited: OptionalPath = None
    concept: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    output: Path = Path("evaluation")
    classifier: OptionalPath = None
    clip: OptionalPath = None
    never_knew: OptionalPath = None
    images: int = 200
    steps: int = 25
    guidance: float = 5.0
    seed: int = 0
    batch_size: int = 16
    dtype: Literal["float32", "bfloat16"] = "float32"
    attacks: Annotated[
        tuple[str, ...] | None, tyro.conf.arg(metavar="[NAME ...]", help_behavior_hint="(optional)")
    ] = None
    attack_images: int = 16
    synonyms: OptionalPath = None
    neighbors: OptionalPath = None
    distant: OptionalPath = None
    templates: OptionalPath = None
    unsafe_prompts: OptionalPath = None
    unsafe_category: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(optional)")
    ] = None
    settings: OptionalPath = None
    force: bool = False
    attack_settings: Annotated[Settings, tyro.conf.arg(name="")]


def command_type(arguments: Sequence[str]) -> Any:
    """The command with the settings of every attack, each below its name."""
    attacks = [
        (name.replace("-", "_"), attack.config, dataclasses.field(default_factory=attack.config))
        for name, attack in known_attacks().items()
    ]
    return Command[dataclasses.make_dataclass("AttackSettings", attacks, frozen=True)]


def run(command: Command[Any]) -> None:
    """Settle the settings, evaluate, and write it all down; the output is claimed first."""
    settings = _recorded(command) if command.settings else _stated(command)
    for flag, name in (("--images", "images"), ("--attack-images", "attack_images")):
        require_images(settings[name], f"take a smaller {flag}")
    models = [settings[name] for name in _MODELS if settings[name] is not None]
    with new_folder(
        command.output,
        force=command.force,
        command=command,
        markers=[METRICS],
        sources=map(Path, models),
    ) as folder:
        began = time.perf_counter()
        result = evaluate_settings(settings, Console(stderr=True))
        seconds = {**result.seconds, "total": round(time.perf_counter() - began, 2)}
        erasing = erasing_record(Path(settings["edited"]))
        record = {
            **result.metrics,
            "settings": settings,
            "erasing": erasing,
            **environment(),
            "seconds": seconds,
        }
        write_json(folder / METRICS, record)
        tables = [*report_tables(result.metrics, settings), *near_tables(erasing)]
        page = report_page(result, tables, record)
        (folder / "report.html").write_text(page, encoding="utf-8")
        markdown = "\n".join(map(markdown_table, tables))
        (folder / "table.md").write_text(markdown, encoding="utf-8")
    print(markdown)
    print(f"{command.output}: {METRICS}, table.md, report.html")


# ---- settings: plain values, from the command line or from an earlier evaluation ----


def _stated(command: Command[Any]) -> dict[str, Any]:
    if command.edited is None:
        raise ValueError("there is nothing to evaluate: pass the edited model with --edited.")
    known = list(known_attacks())
    names = known if command.attacks is None else list(command.attacks)
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"--attacks takes names of {known}, received {unknown}.")
    if command.unsafe_category is not None and command.unsafe_prompts is None:
        raise ValueError("--unsafe-category chooses among --unsafe-prompts: pass that file too.")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if field.name in _OF_THIS_RUN:
            continue
        if field.name in _LISTS:
            value = None if value is None else read_phrases(value)
        values[field.name] = str(value) if isinstance(value, Path) else value
    values["concept"] = concepts_to_erase(command.concept)
    values["attacks"] = names
    values["attack_settings"] = {
        name: dataclasses.asdict(getattr(command.attack_settings, name.replace("-", "_")))
        for name in names
    }
    return json.loads(json.dumps(values))  # as it will be read again


def _recorded(command: Command[Any]) -> dict[str, Any]:
    settings_file = command.settings
    assert settings_file is not None
    default = type(command)(attack_settings=type(command.attack_settings)())
    given = [
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(command)
        if field.name not in _OF_THIS_RUN
        and getattr(command, field.name) != getattr(default, field.name)
    ]
    if given:
        raise ValueError(f"--settings brings all settings: leave out {', '.join(given)}.")
    try:
        settings = json.loads(read_text(settings_file))["settings"]
        missing = {field.name for field in dataclasses.fields(command)} - {*settings, *_OF_THIS_RUN}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{settings_file} is no record of an evaluation.") from error
    if missing:
        raise ValueError(f"{settings_file} lacks the settings {sorted(missing)}.")
    return settings


def evaluate_settings(settings: Mapping[str, Any], progress: Console | None = None) -> Evaluation:
    """The evaluation that recorded settings describe.

    Args:
      settings: the fields of `Command`, as metrics.json holds them under "settings".
      progress: told a line before each figure.

    Raises:
      ValueError: models, files or settings that cannot be used.
    """
    report = (lambda text: None) if progress is None else _teller(progress)
    concepts, dtype = settings["concept"], settings["dtype"]
    config = EvaluationConfig(
        attacks={name: _attack_settings(name, settings) for name in settings["attacks"]},
        **{
            name: settings[name]
            for name in ("images", "steps", "guidance", "seed", "batch_size", "attack_images")
        },
    )
    source = conceptax.bundled_model()
    if settings["original"] is not None:
        source = Path(settings["original"])
    report(f"loading {source.name} and {settings['edited']}")
    if source.resolve() == Path(settings["edited"]).resolve():
        warnings.warn(
            f"the edited model is the original, {source}: every difference will be none.",
            stacklevel=2,
        )
    original = load_pipeline(source, dtype, "evaluating")
    edited = load_edited(Path(settings["edited"]), original, dtype)
    never_knew = settings["never_knew"]
    if never_knew is not None:
        never_knew = load_edited(Path(never_knew), original, dtype)

    judge = _path(settings["classifier"]) or source / "judge"
    if not judge.is_dir() and settings["classifier"] is None:
        raise ValueError(
            f"{source} has no judge of its own: pass a classifier of what its images show with "
            "--classifier, for example a CLIP folder."
        )
    classifier = load_classifier(judge, original.tokenizer, judge.name)
    clip = getattr(classifier, "clip", None)
    if settings["clip"] is not None:
        clip = load_clip(Path(settings["clip"]), original.tokenizer, Path(settings["clip"]).name)
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
    lists = {name: settings[name] for name in _LISTS if settings[name] is not None}
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


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _teller(progress: Console) -> Any:
    return lambda text: progress.print(f"{text} …", highlight=False, soft_wrap=True)
