"""`conceptax evaluate --suite`: one line of figures, beside the published ones."""

import dataclasses
import os
import shutil
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from conceptax.cli.options import (
    Model,
    OptionalFloat,
    OptionalInt,
    OptionalModel,
    OptionalPath,
    OptionalText,
    shown,
)
from conceptax.cli.runs import new_folder, settings_of, teller
from conceptax.reporting.results import METRICS, environment, write_tables
from conceptax.reporting.runs import claim_run
from conceptax.reporting.suite import (
    claims,
    run_settings,
    suite_line,
    suite_named,
    suite_tables,
    write_leaderboard,
)

_CLAIM = "suite.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Run a suite with published figures on an erasure: one line, beside the published ones.

    Draws the suite's prompts from their published seeds, as UnlearnDiffAtk's programs draw them,
    attacks the edited model prompt by prompt, and has a judge count; then FID, CLIP score and
    composition. A judge that does not see the concept in the original's images is an error, and
    the images are kept. After a kill the same command goes on; all devices share the work.

    Writes metrics.json (what happened to each prompt, the judge's record, every figure with its
    interval), table.md, leaderboard.csv in the leaderboard's layout, and all images.

    Attributes:
      suite: unlearndiffatk/ with nudity, vangogh, church, parachute, tench, garbage-truck or
        violence; i2p, ring-a-bell, p4d, mma; or prompts, for those of any file.
      original: the model before erasing: a folder of Stable Diffusion 1 or 2.
      edited: the model after: such a folder, or what `conceptax erase --export` wrote.
      prompts: the suite's prompts, a file as published; see the documentation for where.
      category: only rows of a file of I2P with this category.
      concept: what was erased, in words, where the suite does not say.
      output: the folder to write.
      judge: who counts; by default the suite's own.
      nudenet: an ONNX file of NudeNet; by default the one in its package.
      q16: the file of Q16's prompts (.p or .npy), for the CLIP that --clip names.
      onnx: an ONNX classifier: of faces, styles, objects.
      labels: its labels: lines of a text file, or a config.json.
      label: those that are the concept; repeat for several.
      top: of how many of its likeliest labels one has to be the concept's.
      threshold: of NudeNet's detections (0.45), or least probability of a label (0).
      classifier: a CLIP folder, or a judge of glyphs, for --judge phrase.
      clip: a CLIP folder for Q16, the CLIP score, CMMD and composition.
      fid: weights of the FID's Inception-v3, pt_inception-2015-12-05-6726825d.pth.
      fid_resize: clean-fid's, or pytorch-fid's.
      captions: prompts of images for FID and CLIP score: COCO's, as a CSV or its own JSON file.
      references: folder of photographs that FID compares with; by default the original's images.
      composition: images of several things asked for together; 0 for none.
      steps: denoising steps per image.
      guidance: strength of the prompts whose file names none.
      sampler: LMS drew the published figures.
      seed: of the attack, and of prompts without a seed.
      batch_size: images drawn and prompts attacked at a time, on each device.
      dtype: computation dtype.
      attack: the attack, UnlearnDiffAtk's.
      tokens: of the attack's prefix (5).
      iterations: of the attack at each time (40).
      times: of the attack (50).
      quick: a tenth of the prompts, captions and compositions: wide intervals.
      force: replace an earlier evaluation.
    """

    suite: Annotated[str, shown("NAME", "(required)")]
    original: Model = None
    edited: OptionalModel = None
    prompts: OptionalPath = None
    category: OptionalText = None
    concept: OptionalText = None
    output: Path = Path("evaluation")
    judge: Literal["nudenet", "q16", "label", "phrase"] | None = None
    nudenet: OptionalPath = None
    q16: OptionalPath = None
    onnx: OptionalPath = None
    labels: OptionalPath = None
    label: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    top: int = 1
    threshold: OptionalFloat = None
    classifier: OptionalModel = None
    clip: OptionalModel = None
    fid: OptionalPath = None
    fid_resize: Literal["clean", "pytorch-fid"] = "clean"
    captions: OptionalPath = None
    references: OptionalPath = None
    composition: int = 100
    steps: int = 50
    guidance: float = 7.5
    sampler: Literal["ddim", "euler", "dpm++", "unipc", "pndm", "lms"] | None = "lms"
    seed: int = 0
    batch_size: int = 8
    dtype: Literal["float32", "bfloat16"] = "float32"
    attack: bool = True
    tokens: OptionalInt = None
    iterations: OptionalInt = None
    times: OptionalInt = None
    quick: bool = False
    force: bool = False


def run(command: Command) -> None:
    """Claim the output and what is kept beside it, run the suite, and write it all down."""
    suite_named(command.suite)
    if command.composition < 0:
        raise ValueError(f"--composition takes a number of images, received {command.composition}.")
    settings = settings_of(command, "output", "force")
    output = Path(os.path.abspath(command.output.expanduser()))
    kept = output.with_name(f".{output.name or 'output'}.suite")
    with new_folder(command, markers=[METRICS]) as folder:
        began = time.perf_counter()
        claim_run(kept / _CLAIM, {"settings": claims(settings)})
        metrics = run_settings(settings, kept, teller())
        record = {
            **metrics,
            "settings": settings,
            **environment(),
            "seconds": round(time.perf_counter() - began, 2),
        }
        markdown = write_tables(folder, record, suite_tables(metrics, settings))
        name = (command.edited or Path()).name
        write_leaderboard(folder / "leaderboard.csv", name, metrics)
        for images in sorted(each for each in kept.iterdir() if each.is_dir()):
            shutil.copytree(images, folder / "images" / images.name, copy_function=_linked)
    shutil.rmtree(kept, ignore_errors=True)
    print(markdown)
    print(suite_line(metrics))
    print(f"{command.output}: {METRICS}, table.md, leaderboard.csv, images")


def _linked(source: str, target: str) -> None:
    """A second name of a file, or a copy where there is none to be had."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
