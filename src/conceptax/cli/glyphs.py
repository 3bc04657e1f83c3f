"""`conceptax glyphs train` and `segmenter`: build the bundled models from scratch, measure them."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import tyro

from conceptax.bundled import EXAMPLES
from conceptax.cli.runs import new_folder, settings_of
from conceptax.converters import load_pytorch, save_pytorch
from conceptax.converters.tokenizer import write_tokenizer
from conceptax.flax_models.clip import CLIPModel
from conceptax.flax_models.maft_plus import MaftPlus
from conceptax.flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from conceptax.methods.diffusion.text_to_image import TextToImage
from conceptax.methods.glyphs.build import BuildConfig, build
from conceptax.methods.glyphs.judge import (
    Judge,
    JudgeConfig,
    load_judge,
    measure_judge,
    save_judge,
    train_judge,
)
from conceptax.methods.glyphs.quality import measure_quality
from conceptax.methods.glyphs.segmenter import (
    SegmenterRecipe,
    build_segmenter,
    example_scenes,
    measure_segmenter,
    usage_of,
)
from conceptax.methods.memory import require_images
from conceptax.methods.segmentation.usage import write_usage
from conceptax.reporting.glyphs import model_card, quality_table
from conceptax.reporting.pictures import save_png
from conceptax.reporting.results import environment
from conceptax.reporting.runs import claim_run
from conceptax.text import write_json


@dataclasses.dataclass(frozen=True)
class Command:
    """Build the glyphs model from scratch: world, tokenizer, CLIP, autoencoder, UNet, judge.

    Everything follows from the seed. An interrupted build goes on where it stopped. The result is
    a diffusers folder in float16 with clip/, judge/, quality.json and a model card.

    Attributes:
      output: the folder to write.
      workdir: where the trainings keep their checkpoints and logs; of one build alone.
      measure: images per measured set of prompts.
      force: replace an earlier model at the output.
      build: seed, data and the trainings.
      judge: the training of the classifier that measures.
    """

    output: Path = Path("glyphs")
    workdir: Path = Path("glyphs-work")
    measure: int = 390
    force: bool = False
    build: Annotated[BuildConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=BuildConfig
    )
    judge: JudgeConfig = dataclasses.field(default_factory=JudgeConfig)


@dataclasses.dataclass(frozen=True)
class Segmenter:
    """Build the bundled segmenter from scratch: a tiny CLIP, decoders on it, then both together.

    Everything follows from the seed; it takes about an hour on two cores. An
    interrupted build goes on where it stopped. The result is a folder that `segment run` takes:
    MAFT+, tokenizer/, segmenter.json, examples/ to look at, and quality.json.

    Attributes:
      output: the folder to write.
      workdir: where the trainings keep their checkpoints and logs; of one build alone.
      seed: of everything random.
      measure: scenes of unseen handwriting to measure it on.
      force: replace an earlier model at the output.
      recipe: lengths and sizes.
    """

    output: Path = Path("glyph-segmenter")
    workdir: Path = Path("glyph-segmenter-work")
    seed: int = 0
    measure: int = 100
    force: bool = False
    recipe: Annotated[SegmenterRecipe, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=SegmenterRecipe
    )


COMMANDS = {"train": Command, "segmenter": Segmenter}


def run(command: Command | Segmenter) -> None:
    """Train what is not yet trained, then publish."""
    if isinstance(command, Segmenter):
        _segmenter(command)
    else:
        _train(command)


def _segmenter(command: Segmenter) -> None:
    if command.measure < 1:
        raise ValueError(f"--measure must be at least 1, received {command.measure}.")
    with new_folder(command) as folder:
        record = settings_of(command, "output", "workdir", "measure", "force")
        claim_run(command.workdir / "building.json", {"settings": record})
        model, tokenizer = build_segmenter(command.recipe, command.seed, workdir=command.workdir)
        quality = publish_segmenter(folder, model, tokenizer, command)
    size = sum(file.stat().st_size for file in command.output.rglob("*") if file.is_file())
    told = ", ".join(f"{title} {quality[key]:.1f} %" for key, title in _FIGURES.items())
    print(f"{command.output}: {size / 1e6:.1f} MB; {told}")


_FIGURES = {"seen": "mIoU seen", "unseen": "unseen", "pacc": "pACC"}


def publish_segmenter(
    folder: Path, model: MaftPlus, tokenizer: Any, command: Segmenter
) -> dict[str, Any]:
    """Write the model into an empty `folder`, measure it, and add how it is used and examples."""
    save_pytorch(model, folder)
    write_tokenizer(tokenizer, folder / "tokenizer")
    write_usage(usage_of(command.recipe), folder)
    (folder / EXAMPLES).mkdir()
    for name, scene in example_scenes():
        save_png(scene.image, folder / EXAMPLES / f"{name}.png")
    quality = measure_segmenter(model, tokenizer, command.recipe, scenes=command.measure)
    record = {
        "quality": {**quality, "iou": {k: _plain(v) for k, v in quality["iou"].items()}},
        "scenes": command.measure,
        "build": settings_of(command, "output", "workdir", "measure", "force"),
        **environment(),
    }
    write_json(folder / "quality.json", record)
    return quality


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _train(command: Command) -> None:
    _check(command)
    with new_folder(command) as folder:
        settings = {name: dataclasses.asdict(getattr(command, name)) for name in ("build", "judge")}
        claim_run(command.workdir / "building.json", {"settings": settings})
        pipeline, clip = build(command.build, command.workdir)
        judge = _judge(command)
        quality = publish(folder, pipeline, clip, judge, command)
    size = sum(file.stat().st_size for file in command.output.rglob("*") if file.is_file())
    print(f"{command.output}: {size / 1e6:.1f} MB")
    print(quality_table(quality))


def _check(command: Command) -> None:
    """Raise ValueError for numbers with which hours of training would be for nothing."""
    for flag, count in (("--measure", command.measure), ("--images", command.build.images)):
        if count < 1:
            raise ValueError(f"{flag} must be at least 1, received {count}.")
        require_images(count, f"take a smaller {flag}", height=64, width=64)


def publish(
    folder: Path, pipeline: StableDiffusionPipeline, clip: CLIPModel, judge: Judge, command: Command
) -> dict[str, Any]:
    """Write the models into an empty `folder`, measure them as written, and describe them."""
    save_pytorch(pipeline, folder, dtype=jnp.float16)
    save_pytorch(clip, folder / "clip", dtype=jnp.float16)
    save_judge(judge, folder / "judge", command.judge)
    options = {"num_inference_steps": 25, "guidance_scale": 5.0, "batch_size": 16}
    draw = functools.partial(TextToImage.from_pipeline(load_pytorch(folder)), **options)
    quality = measure_quality(draw, judge, images=command.measure, seed=command.build.seed)
    quality["judge"] = judge.measured
    record = {
        "quality": quality,
        "sampling": {"steps": 25, "guidance": 5.0},
        "build": dataclasses.asdict(command.build),
        **environment(),
    }
    write_json(folder / "quality.json", record)
    (folder / "README.md").write_text(model_card(command.build, quality), encoding="utf-8")
    return quality


def _judge(command: Command) -> Judge:
    """The judge in the work folder, trained there if it is missing."""
    folder = command.workdir / "judge"
    if not (folder / "config.json").exists():
        judge = train_judge(command.judge)
        judge.measured = measure_judge(judge)
        save_judge(judge, folder, command.judge)
    return load_judge(folder)
