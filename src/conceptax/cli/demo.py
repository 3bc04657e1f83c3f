"""`conceptax demo`: erase 'three' from the bundled model and show what changed."""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table as PrintedTable

import conceptax
from conceptax.cli.erase import erase_into, erasing_record, near_tables
from conceptax.cli.options import Model
from conceptax.cli.pictures import Block, Row, before_after, png_bytes, save_png, sheet
from conceptax.cli.report import Gallery, Picture, Table, counted, html_report, interval, share
from conceptax.cli.results import environment, new_folder, write_json
from conceptax.converters import load_pytorch
from conceptax.methods.erasing.sage import SageConfig
from conceptax.methods.glyphs.judge import load_judge
from conceptax.methods.glyphs.quality import (
    FIGURES,
    Findings,
    digit_called,
    erasure_figures,
    erasure_prompts,
    examine_all,
)
from conceptax.methods.memory import require_images
from conceptax.methods.text_to_image import TextToImage

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
_PER_PROMPT = 2  # images of each prompt in the grid
_SETS = {
    "plain": "Asked for by the erased word",
    "synonyms": "Asked for by names that erasing was never told",
    "others": "Other digits",
}


@dataclasses.dataclass(frozen=True)
class Command:
    """Erase 'three' from the bundled model with SAGE, and count what the model draws then.

    The bundled model draws handwritten digits on textures. Erasing is told one word; a classifier
    trained on other handwriting then counts threes asked for by that word, threes asked for by
    names it was never told (3, III, trio), and everything that should have stayed.

    Writes grid.png, metrics.json, report.html and erased/, the edited model as a folder that
    diffusers loads.

    Attributes:
      output: the folder to write.
      images: images per figure, before and after each.
      steps: denoising steps per image.
      guidance: strength of the prompt.
      seed: of erasing, prompts and noise.
      model: a model built by `conceptax glyphs train`.
      force: replace an earlier demo.
      sage: settings of the method.
    """

    output: Path = Path("demo-output")
    images: int = 48
    steps: int = 25
    guidance: float = 5.0
    seed: int = 0
    model: Model = None
    force: bool = False
    sage: Annotated[SageConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=SageConfig
    )


def run(command: Command) -> None:
    """Draw, erase, draw again with the same seeds, count, and write it all down."""
    if command.images < 1:
        raise ValueError(f"--images must be at least 1, received {command.images}.")
    require_images(6 * command.images, "take fewer --images")
    console, progress = Console(), Console(stderr=True)
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(name: str, text: str) -> Iterator[None]:
        progress.print(f"{text} …", highlight=False)
        began = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - began, 1)

    with new_folder(
        command.output, force=command.force, command=command, markers=["metrics.json"]
    ) as folder:
        source = command.model or conceptax.bundled_model()
        pipeline = load_pytorch(source)
        judge = load_judge(source / "judge")
        original = TextToImage.from_pipeline(pipeline)
        sets = erasure_prompts(CONCEPT, command.images, command.seed)
        look = functools.partial(_look, command, judge, sets)

        count = 3 * command.images
        with stage("before", f"drawing {count} images with the original model"):
            before = look(original)
        with stage("erase", f"erasing {CONCEPT!r} from the text encoder"):
            (folder / "erased").mkdir()
            edited = erase_into(
                folder / "erased", pipeline, [CONCEPT], command.sage, seed=command.seed,
                source=str(command.model or "bundled"),
            )  # fmt: skip
        with stage("after", f"drawing {count} images with the edited model"):
            after = look(TextToImage.from_pipeline(edited))
        seconds["total"] = round(sum(seconds.values()), 1)

        figures = {
            "before": erasure_figures(before.found, CONCEPT),
            "after": erasure_figures(after.found, CONCEPT),
        }
        record = _record(command, judge, figures, seconds)
        write_json(folder / "metrics.json", record)
        grid = _grid(before, after)
        save_png(grid, folder / "grid.png")
        near = near_tables(erasing_record(folder / "erased"))
        report = _report(command, before.found, after.found, png_bytes(grid), record, near)
        (folder / "report.html").write_text(report, encoding="utf-8")
    _show(console, command, record)


@dataclasses.dataclass(frozen=True, eq=False)
class _Look:
    """What one model draws: findings of every set, and the grid's images per prompt."""

    found: dict[str, Findings]
    asked: list[np.ndarray]
    kept: list[np.ndarray]


def _look(command: Command, judge: Any, sets: dict[str, list[Any]], model: TextToImage) -> _Look:
    draw = functools.partial(
        model, num_inference_steps=command.steps, guidance_scale=command.guidance, batch_size=16
    )
    found = examine_all(draw, judge, sets, seed=command.seed)
    texts = [text for text in (*ASKED, *KEPT) for _ in range(_PER_PROMPT)]
    images = np.split(draw(texts, seed=command.seed), len(texts) // _PER_PROMPT)
    return _Look(found, images[: len(ASKED)], images[len(ASKED) :])


def _record(
    command: Command, judge: Any, figures: dict[str, Any], seconds: dict[str, float]
) -> dict[str, Any]:
    return {
        "concept": CONCEPT,
        "model": str(command.model or "bundled"),
        "seed": command.seed,
        "images_per_figure": command.images,
        "prompts": "held-out wordings; every name of a digit equally often",
        "sampling": {
            "sampler": "the model's own", "steps": command.steps, "guidance": command.guidance,
        },
        "figures": figures,
        "judge": judge.measured,
        "settings": dataclasses.asdict(command.sage),
        "seconds": seconds,
        **environment(),
    }  # fmt: skip


def _grid(before: _Look, after: _Look) -> Any:
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


def _report(
    command: Command, before: dict[str, Findings], after: dict[str, Findings], grid: bytes,
    record: dict[str, Any], near: Sequence[Table],
) -> str:  # fmt: skip
    digit = digit_called(CONCEPT)
    galleries = []
    for name, title in _SETS.items():
        pictures = []
        for when, found in (("before", before[name]), ("after", after[name])):
            wrong = found.digit == digit if name != "others" else ~found.right("digit")
            png = png_bytes(sheet(found.images, columns=8, marked=wrong))
            pictures.append(Picture(png, when))
        frames = (
            "Red frames: the classifier sees a three. Green: it sees another digit."
            if name != "others"
            else "Green frames: the classifier sees the digit that was asked for. Red: another."
        )
        galleries.append(Gallery(title, f"Every image that was counted. {frames}", pictures))
    shown = {name: value for name, value in record.items() if name not in ("figures", "judge")}
    figures = record["figures"]
    rows = [
        (_label(name), counted(figures["before"][name]), counted(figures["after"][name]))
        for name in _shown(figures["before"])
    ]
    note = (
        f"{command.images} images per figure, {command.steps} steps each, prompts in wordings "
        f"that the model was never trained on; seed {command.seed}; in grey the 95 % Wilson "
        "intervals. The classifier learnt from handwriting that the model never saw"
        + _judge_accuracy(record["judge"])
        + ". It always names some digit: an image that shows none counts as another digit."
    )
    return html_report(
        title=f"conceptax: “{CONCEPT}” erased",
        lead=(
            f"SAGE was told one word, “{CONCEPT}”, and edited the text encoder of a small "
            "text-to-image model that draws handwritten digits on textures. Left of each pair: "
            "before. Right: after, with the same prompt and the same noise."
        ),
        grid=Picture(grid, "The same prompts before and after."),
        tables=[
            Table("What an independent classifier sees", ("images", "before", "after"), rows, note),
            *near,
        ],
        galleries=galleries,
        record=json.dumps(shown, indent=2, ensure_ascii=False),
    )


def _judge_accuracy(measured: dict[str, Any]) -> str:
    accuracy = measured.get("digit", {}).get("accuracy")
    return "" if accuracy is None else f" and names {100 * accuracy:.1f} % of its renders right"


def _shown(figures: dict[str, Any]) -> list[str]:
    """The figures in the order of the table: each synonym below their sum."""
    single = [name for name in figures if name.startswith("synonym ")]
    return ["plain", "synonyms", *single, *(n for n in FIGURES if n not in ("plain", "synonyms"))]


def _label(name: str) -> str:
    if name.startswith("synonym "):
        return f"· “{name.removeprefix('synonym ')}”"
    return FIGURES[name].format(CONCEPT)


def _show(console: Console, command: Command, record: dict[str, Any]) -> None:
    table = PrintedTable(title=f"“{CONCEPT}” erased by SAGE", title_justify="left")
    table.add_column("images")
    for name in ("before", "after", "after, 95 %"):
        table.add_column(name, justify="right")
    figures = record["figures"]
    for name in _shown(figures["before"]):
        now = figures["after"][name]
        table.add_row(_label(name), share(figures["before"][name]), share(now), interval(now))
    console.print(table)
    console.print(
        f"{command.images} images per figure in held-out wordings, {command.steps} steps, seed "
        f"{command.seed}; {record['seconds']['erase']:.0f} s to erase, "
        f"{record['seconds']['total']:.0f} s in all.\n"
        f"{command.output}: grid.png, report.html, metrics.json, and the edited model in erased/",
        highlight=False,
        soft_wrap=True,
    )
