"""What each part of MAFT+ is good for, on scenes of glyphs: seen digits, unseen ones, zero-shot.

    python benchmarks/segmentation_glyphs.py            # 5 rows, 3 seeds
    python benchmarks/segmentation_glyphs.py --write    # page and picture, from what is kept

A tiny CLIP learns all ten digits from captions, once.  Segmentation is trained on scenes of the
digits 0 to 6 and tested on scenes of all ten, each with a 7, 8 or 9 in it; the handwriting of
tests is in no training.  The decoders of a seed learn first, on the frozen CLIP; every row goes on
from there.  A cell's figures are kept as JSON under --results, the CLIP and the decoders under
--work; what is there is not run again, so the study may be stopped and started.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from conceptax.converters import load_pytorch, save_pytorch
from conceptax.converters.files.weights import read_json
from conceptax.converters.tokenizer import read_tokenizer, write_tokenizer
from conceptax.flax_models.maft_plus import MaftPlus
from conceptax.flax_models.open_clip import OpenCLIP
from conceptax.methods.glyphs.open_clip import Lessons, pretrain, zero_shot_accuracy
from conceptax.methods.glyphs.recipe import Recipe
from conceptax.methods.glyphs.scenes import SCENE_SIZE, UNSEEN
from conceptax.methods.glyphs.segmenter import (
    FROZEN,
    MAFT_PLUS,
    SegmenterRecipe,
    Tuning,
    measure_segmenter,
    new_decoders,
    segmenter_of,
    tune,
    unseen_scenes,
)
from conceptax.methods.segmentation.augmentation import resize_image
from conceptax.reporting.overlay import class_colors, overlay
from conceptax.reporting.report import Number, Table, markdown_table
from conceptax.reporting.results import environment, write_records

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "segmentation"
SEEDS = (0, 1, 2)

# The transfer starts as the identity, and stays it where it does not train.
ROWS: Mapping[str, Tuning] = {
    "frozen CLIP": FROZEN,
    "fine-tuned CLIP": Tuning(True),
    "+ compensation": Tuning(True, compensation=True),
    "+ transfer": Tuning(True, transfer=True),
    "MAFT+": MAFT_PLUS,
}


@dataclasses.dataclass(frozen=True)
class Settings(SegmenterRecipe):
    """The recipe of the bundled segmenter, and what is measured.

    Attributes:
      tests: scenes to test on.
      zero_shot: images of single digits that are classified.
    """

    tests: int = 100
    zero_shot: int = 600


SMALL = Settings(
    pretraining=Lessons(*[Recipe(steps=2, batch_size=4, learning_rate=2e-3)] * 3),
    scale=1,
    scenes=8,
    tests=4,
    zero_shot=50,
    batch_size=2,
    decoder_steps=2,
    steps=2,
    points=32,
    decoder_layers=1,
)


def clip_of(work: Path, settings: Settings) -> tuple[OpenCLIP, Any]:
    """The pretrained CLIP and its tokenizer, from the work folder where they are there."""
    lengths = "-".join(str(lesson.steps) for lesson in vars(settings.pretraining).values())
    folder = work / f"clip-{lengths}-{settings.scale}"
    if not (folder / "tokenizer.json").exists():
        clip, tokenizer = pretrain(
            settings.pretraining, scale=settings.scale, metrics_dir=_made(work), progress=False
        )
        save_pytorch(clip, folder)
        write_tokenizer(tokenizer, folder)
    return load_pytorch(folder), read_tokenizer(folder)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def start_of(work: Path, seed: int, settings: Settings) -> tuple[MaftPlus, Any]:
    """A seed's decoders, trained around the frozen CLIP, and the tokenizer."""
    folder = work / f"decoders-{settings.decoder_steps}-{settings.width}-{seed}"
    clip, tokenizer = clip_of(work, settings)
    if not folder.exists():
        model = new_decoders(clip, settings, seed)
        steps = settings.decoder_steps
        model = tune(model, tokenizer, FROZEN, settings, seed=seed, steps=steps, progress=False)
        save_pytorch(model, folder)
    return load_pytorch(folder), tokenizer


def run(
    row: Tuning, seed: int, start: MaftPlus, tokenizer: Any, settings: Settings
) -> dict[str, Any]:
    """A cell's figures, in percent.

    Args:
      row: what trains.
      seed: of the scenes and the training.
      start: from `start_of`.
      tokenizer: the CLIP's.
      settings: lengths and sizes.
    """
    began = time.perf_counter()
    steps = settings.steps
    model = tune(start, tokenizer, row, settings, seed=seed, steps=steps, progress=False)
    seconds = time.perf_counter() - began
    clip = start.backbone.clip_model
    quality = measure_segmenter(model, tokenizer, settings, scenes=settings.tests)
    accuracy = {
        when: zero_shot_accuracy(
            each, tokenizer, images=settings.zero_shot, scale=settings.scale, digits=digits
        )
        for when, each, digits in (
            ("zero_shot_before", clip, range(10)),
            ("zero_shot", model.backbone.clip_model, range(10)),
            ("zero_shot_unseen_before", clip, UNSEEN),
            ("zero_shot_unseen", model.backbone.clip_model, UNSEEN),
        )
    }
    return {
        "seen": quality["seen"],
        "unseen": quality["unseen"],
        "harmonic": harmonic_mean(quality["seen"], quality["unseen"]),
        "pacc": quality["pacc"],
        **accuracy,
        "iou": quality["iou"],
        "seconds": round(seconds, 1),
    }


def harmonic_mean(seen: float, unseen: float) -> float:
    """Of the mIoU of seen and of unseen classes; 0 if one of them is 0."""
    return 2 * seen * unseen / (seen + unseen) if seen and unseen else 0.0


def cells(seeds: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Names of rows and seeds; a whole table of one seed first."""
    for seed in seeds:
        for name in ROWS:
            yield name, seed


def path_of(results: Path, name: str, seed: int) -> Path:
    """Where a cell is kept."""
    return results / f"{name.replace('+ ', 'plus-').replace(' ', '-')}-{seed}.json"


def study(
    work: Path,
    results: Path,
    settings: Settings,
    *,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> None:
    """Run what is not there yet."""
    for name, seed in cells(seeds or SEEDS):
        path = path_of(results, name, seed)
        if path.exists() or (only and name not in only):
            continue
        start, tokenizer = start_of(work, seed, settings)
        record = run(ROWS[name], seed, start, tokenizer, settings)
        _made(results)
        write_records(
            path,
            {
                "row": name,
                "seed": seed,
                "settings": dataclasses.asdict(settings),
                **record,
                **environment(),
            },
        )
        told = ", ".join(f"{title} {record[key]:.1f}" for key, title in FIGURES.items())
        print(f"{name}, seed {seed}: {told}", flush=True)


def picture(work: Path, settings: Settings, count: int = 5) -> Image.Image:
    """Test scenes above what the first seed's decoders and the frozen CLIP find in them."""
    model, tokenizer = start_of(work, SEEDS[0], settings)
    tests, side = unseen_scenes(count), (2 * SCENE_SIZE,) * 2
    segmenter = segmenter_of(model, tokenizer, tests.vocabulary, settings)
    names = tests.vocabulary.names
    columns = []
    for image in (resize_image(tests[index].image, side) for index in range(count)):
        tinted = overlay(image, segmenter(image).labels(), names, class_colors(names))
        columns.append(np.concatenate([image, tinted]))
    return Image.fromarray(np.concatenate(columns, axis=1))


FIGURES = {
    "seen": "mIoU seen",
    "unseen": "mIoU unseen",
    "harmonic": "harmonic mean",
    "zero_shot": "zero-shot",
    "zero_shot_unseen": "zero-shot, unseen digits",
    "seconds": "training, s",
}


def table_of(results: Path) -> Table:
    """The mean of each figure over the seeds, and its standard deviation."""
    lines: list[Sequence[str | Number]] = []
    seeds, before = set(), []
    for name in ROWS:
        records = [
            read_json(path) for seed in SEEDS if (path := path_of(results, name, seed)).exists()
        ]
        if not records:
            continue
        seeds.add(len(records))
        before += [record["zero_shot_before"] for record in records]
        columns = ([record[figure] for record in records] for figure in FIGURES)
        lines.append((name, *(_told(values) for values in columns)))
    if not lines:
        raise ValueError(f"{results} holds no cells; run the study first.")
    note = (
        f"Mean ± standard deviation of {'/'.join(map(str, sorted(seeds)))} seeds, in percent. The "
        f"CLIP itself classifies {statistics.mean(before):.1f} % of single digits."
    )
    return Table("Seen, unseen, zero-shot", ("", *FIGURES.values()), lines, note)


def _told(values: Sequence[float]) -> Number:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return Number(f"{statistics.mean(values):.1f}{spread}")


STUDY = """# Segmentation: what was measured

Written by `benchmarks/segmentation_glyphs.py --write` from the figures in `benchmarks/results`.

## What MAFT+'s parts are good for

A tiny OpenCLIP (ConvNeXt, four blocks) learnt all ten digits once, from captions of single digits
and of quarters of scenes. Segmentation was trained on scenes of the digits 0 to 6 on three
textures, and tested on scenes of all ten digits in other handwriting, a 7, 8 or 9 in each. Seen are
seven digits and the textures, unseen the digits 7, 8 and 9. Zero-shot is the share of images of a
single digit that the fine-tuned CLIP puts to the right one of ten. The transfer is in its panoptic
form, which starts as the identity, in raster order. The decoders of a seed learn first, around the
frozen CLIP, and every row goes on from there for {steps} steps, with the same scenes in the same
order; its time is that of one core, compilation included. Settings were chosen on a fourth seed.

![Scenes, and the names that were found in them](segmentation.png)

Above scenes of the test, below what the decoders of the first seed find with the frozen CLIP.

"""
SPEED = """
## A full-size forward pass

MAFT+-Base at {size}×{size} pixels with random weights, threads: {threads}; the fastest of {repeats}
calls ({clock}), and the peak of the process's resident memory, compilation included. PyTorch runs
what transformers has of the model (ConvNeXt and Mask2Former); JAX runs all of it: class heads, mask
pooling and the transfer of 404 text rows besides. Taken {date} with `benchmarks/maft_plus.py`.

"""
STREETS = """
## Real street scenes

A tiny model from random weights on 360×480 frames of CamVid, seen at 192×256 pixels, eleven
classes; measured on the scenes that it was trained on, with `benchmarks/street_scenes.py`.

"""


def page(results: Path) -> str:
    """The page of what is kept: this study, speed, street scenes."""
    steps = {read_json(path)["settings"]["steps"] for path in results.glob("*.json")}
    parts = [
        STUDY.format(steps=" or ".join(map(str, sorted(steps)))),
        markdown_table(table_of(results)),
    ]
    if (path := results.parent / "maft_plus_640.json").exists():
        speed = read_json(path)
        tables = "\n".join(map(markdown_table, speed_tables(speed["results"])))
        parts += [SPEED.format_map(speed), tables]
    if (path := results.parent / "street_scenes.json").exists():
        parts += [STREETS, markdown_table(street_table(read_json(path)["runs"]))]
    return "".join(parts)


def speed_tables(measured: Mapping[str, Mapping[str, float]]) -> tuple[Table, ...]:
    """A forward pass, one layer's sampling, and a step's matching, from `maft_plus.py`."""
    forward = [
        (title, Number(f"{one['best_s']:.2f}"), Number(f"{one['peak_gib']:.2f}"))
        for key, title in (("forward jax", "JAX, everything"), ("forward torch", "PyTorch, parts"))
        for one in (measured[key],)
    ]
    sampling = [
        (title, *(Number(f"{one[key]:.2f}" if key in one else "") for key in _SAMPLING))
        for name, title in _FORMS.items()
        for one in (measured[f"sampling {name}"],)
    ]
    matching = [
        (
            title,
            *(Number(f"{1e3 * measured[f'matching {name} {n}']['best_s']:.1f}") for n in _TARGETS),
        )
        for name, title in _SOLVERS.items()
    ]
    return (
        Table("Forward", ("", "seconds", "peak, GiB"), forward),
        Table("Deformable sampling of one layer", ("", *_SAMPLING.values()), sampling),
        Table(
            "Matching of ten layers and eight images, milliseconds",
            ("", *(f"{n} targets an image" for n in _TARGETS)),
            matching,
        ),
    )


_FORMS = {
    "jax linear": "point after point (used)",
    "jax dense": "all corners at once",
    "torch": "PyTorch, grid_sample",
}
_SOLVERS = {"scipy": "on the host, SciPy (used)", "optax": "on the device, optax"}
_TARGETS = (20, 60)
_SAMPLING = {
    "forward_s": "forward, s",
    "gradient_s": "with gradient, s",
    "forward_temporary_mib": "scratch, MiB",
    "gradient_temporary_mib": "with gradient, MiB",
}


def street_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """From `street_scenes.py`."""
    columns = (
        "scenes",
        "steps",
        "loss, first ten",
        "last ten",
        "pACC, %",
        "mIoU, %",
        "training, s",
    )
    rows = [
        (
            str(run["scenes"]),
            Number(str(run["steps"])),
            *(
                Number(f"{run[key]:.1f}")
                for key in ("first_losses", "last_losses", "pacc", "miou", "seconds")
            ),
        )
        for run in runs
    ]
    return Table("Training scenes", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(".cache/segmentation"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", default=(), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=())
    parser.add_argument("--small", action="store_true", help="of a few steps, to see that it runs")
    for field in dataclasses.fields(Settings):
        if field.name != "pretraining":
            flag = f"--{field.name.replace('_', '-')}"
            parser.add_argument(flag, type=type(field.default), default=None)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "segmentation_results.md")
    parser.add_argument("--write", action="store_true", help="write the page of what is kept")
    options = parser.parse_args()
    settings = SMALL if options.small else Settings()
    given = {
        field.name: value
        for field in dataclasses.fields(Settings)
        if (value := getattr(options, field.name, None)) is not None
    }
    settings = dataclasses.replace(settings, **given)
    if options.write:
        options.page.write_text(page(options.results), "utf-8")
        picture(options.work, settings).save(options.page.with_name("segmentation.png"))
        return
    study(options.work, options.results, settings, only=options.only, seeds=options.seeds)


if __name__ == "__main__":
    main()
