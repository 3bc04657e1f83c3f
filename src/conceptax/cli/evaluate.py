"""`conceptax evaluate`: is the concept gone, what else broke, and who can bring it back?"""

import dataclasses
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro

from conceptax.cli import evaluate_suite
from conceptax.cli.options import (
    Model,
    OptionalModel,
    OptionalPath,
    OptionalText,
    concepts_in,
    shown,
    typed,
)
from conceptax.cli.runs import new_folder, settings_of, teller
from conceptax.methods.evaluation import known_attacks
from conceptax.methods.memory import require_images
from conceptax.methods.text.phrases import read_phrases
from conceptax.reporting.erasing import erasing_record, near_tables
from conceptax.reporting.evaluating import LISTS, evaluate_settings
from conceptax.reporting.evaluation import erasure_page, report_tables
from conceptax.reporting.gallery import REPORT, Images, write_report
from conceptax.reporting.results import METRICS, environment, write_tables
from conceptax.text import read_text

_OF_THIS_RUN = ("output", "settings", "force", "suite")  # not of what is measured

Settings = TypeVar("Settings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(Generic[Settings]):
    """Evaluate an erasure: is the concept gone, what else broke, and who can bring it back?

    Draws the same prompts from the same noise with the original and the edited model, lets the red
    team attack the edited one, and has a classifier count. Prompts for the bundled model are made
    here; for others, pass files of phrases. What follows --force are the settings of the attacks.

    Writes metrics.json, with everything it takes to run the same evaluation again (--settings),
    table.md, and report.html with every image that was counted, before and after; where they are
    many they lie beside it, in report-images/. `conceptax report` shows several such folders side
    by side.

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
      steps: denoising steps per image; half of what `conceptax sample` takes, to save time.
      guidance: strength of the prompt; `conceptax sample` takes 7.5.
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
      suite: instead, a suite with published figures, such as unlearndiffatk/nudity; with it
        --help-all lists what it takes.
      settings: a metrics.json: run its evaluation again; no other settings are taken.
      force: replace an earlier evaluation.
      attack_settings: of the attacks.
    """

    original: Model = None
    edited: OptionalModel = None
    concept: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    output: Path = Path("evaluation")
    classifier: OptionalModel = None
    clip: OptionalModel = None
    never_knew: OptionalModel = None
    images: int = 200
    steps: int = 25
    guidance: float = 5.0
    seed: int = 0
    batch_size: int = 16
    dtype: Literal["float32", "bfloat16"] = "float32"
    attacks: Annotated[tuple[str, ...] | None, shown("[NAME ...]")] = None
    attack_images: int = 16
    synonyms: OptionalPath = None
    neighbors: OptionalPath = None
    distant: OptionalPath = None
    templates: OptionalPath = None
    unsafe_prompts: OptionalPath = None
    unsafe_category: Annotated[str | None, shown("NAME")] = None
    suite: OptionalText = None
    settings: OptionalPath = None
    force: bool = False
    attack_settings: Annotated[Settings, tyro.conf.arg(name="")]


def command_type(arguments: Sequence[str]) -> Any:
    """The command with the settings of every attack, each below its name; or that of a suite."""
    if any(each.partition("=")[0] == "--suite" for each in arguments):
        return evaluate_suite.Command
    attacks = [
        (name.replace("-", "_"), attack.config, dataclasses.field(default_factory=attack.config))
        for name, attack in known_attacks().items()
    ]
    return Command[dataclasses.make_dataclass("AttackSettings", attacks, frozen=True)]


def types() -> dict[str, Any]:
    """The command of suites."""
    return {"--suite": evaluate_suite.Command}


def run(command: Command[Any] | evaluate_suite.Command) -> None:
    """Settle the settings, evaluate, and write it all down; the output is claimed first."""
    if isinstance(command, evaluate_suite.Command):
        evaluate_suite.run(command)
        return
    settings = _recorded(command) if command.settings else _stated(command)
    for flag, name in (("--images", "images"), ("--attack-images", "attack_images")):
        require_images(settings[name], f"take a smaller {flag}")
    models = ("original", "edited", "never_knew", "classifier", "clip")
    named = [Path(settings[name]) for name in models if settings[name] is not None]
    with new_folder(command, markers=[METRICS], sources=named) as folder:
        began = time.perf_counter()
        result = evaluate_settings(settings, teller())
        erasing = erasing_record(Path(settings["edited"]))
        record = {
            **result.metrics,
            "settings": settings,
            "erasing": erasing,
            **environment(),
            "seconds": {**result.seconds, "total": round(time.perf_counter() - began, 2)},
        }
        tables = [*report_tables(result.metrics, settings), *near_tables(erasing)]
        markdown = write_tables(folder, record, tables)
        images, output = Images(folder), command.output
        again = ["--settings", output / METRICS, "--output", f"{output}-again"]
        page = erasure_page(
            result,
            tables,
            record,
            images,
            label=(erasing or {}).get("method") or Path(settings["edited"]).name,
            command=typed(),
            again=shlex.join(["conceptax", "evaluate", *map(str, again)]),
        )
        write_report(folder, page, images)
    print(markdown)
    print(f"{command.output}: {METRICS}, table.md, {REPORT}")


def _stated(command: Command[Any]) -> dict[str, Any]:
    """The settings of the command line, in plain values."""
    if command.edited is None:
        raise ValueError("there is nothing to evaluate: pass the edited model with --edited.")
    known = list(known_attacks())
    names = known if command.attacks is None else list(command.attacks)
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"--attacks takes names of {known}, received {unknown}.")
    if command.unsafe_category is not None and command.unsafe_prompts is None:
        raise ValueError("--unsafe-category chooses among --unsafe-prompts: pass that file too.")
    settings = settings_of(command, *_OF_THIS_RUN)
    files = {name: getattr(command, name) for name in LISTS}
    settings |= {name: read_phrases(file) for name, file in files.items() if file is not None}
    attacks = {name: settings["attack_settings"][name.replace("-", "_")] for name in names}
    concepts = concepts_in(command.concept)
    return settings | {"concept": concepts, "attacks": names, "attack_settings": attacks}


def _recorded(command: Command[Any]) -> dict[str, Any]:
    """The settings of an earlier evaluation."""
    settings_file = command.settings
    assert settings_file is not None
    default = type(command)(attack_settings=type(command.attack_settings)())
    names = [f.name for f in dataclasses.fields(command) if f.name not in _OF_THIS_RUN]
    given = [
        f"--{name.replace('_', '-')}"
        for name in names
        if getattr(command, name) != getattr(default, name)
    ]
    if given:
        raise ValueError(f"--settings brings all settings: leave out {', '.join(given)}.")
    try:
        settings = json.loads(read_text(settings_file))["settings"]
        missing = set(names) - {*settings}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{settings_file} is no record of an evaluation.") from error
    if missing:
        raise ValueError(f"{settings_file} lacks the settings {sorted(missing)}.")
    return settings
