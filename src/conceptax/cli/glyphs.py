"""`conceptax glyphs train`: build the bundled model from scratch, measure it, describe it."""

import dataclasses
import functools
import string
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import tyro

import conceptax
from conceptax.cli.runs import claim_run, new_folder
from conceptax.converters import load_pytorch, save_pytorch
from conceptax.flax_models.clip import CLIPModel
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
from conceptax.methods.glyphs.recipe import Recipe
from conceptax.methods.memory import require_images
from conceptax.reporting.results import environment
from conceptax.text import write_json

_CARD = Path(conceptax.__file__).parent / "assets" / "glyphs_card.md"  # of a built model


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


def run(command: Command) -> None:
    """Train what is not yet trained, then publish."""
    _check(command)
    with new_folder(command.output, force=command.force, command=command) as folder:
        settings = {"build": dataclasses.asdict(command.build)}
        settings["judge"] = dataclasses.asdict(command.judge)
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
    folder: Path,
    pipeline: StableDiffusionPipeline,
    clip: CLIPModel,
    judge: Judge,
    command: Command,
) -> dict[str, Any]:
    """Write the models into an empty `folder`, measure them as written, and describe them."""
    save_pytorch(pipeline, folder, dtype=jnp.float16)
    save_pytorch(clip, folder / "clip", dtype=jnp.float16)
    save_judge(judge, folder / "judge", command.judge)
    draw = functools.partial(
        TextToImage.from_pipeline(load_pytorch(folder)),
        num_inference_steps=25,
        guidance_scale=5.0,
        batch_size=16,
    )
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


def quality_table(quality: dict[str, Any]) -> str:
    """The measured proportions as a Markdown table."""
    lines = ["| prompts | images | digit | color | texture |", "|---|---|---|---|---|"]
    for name, found in quality["sets"].items():
        cells = [_percent(found[each]) for each in ("digit", "color", "texture")]
        lines.append(f"| {name} | {found['digit']['of']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(figure: dict[str, Any]) -> str:
    low, high = 100 * figure["low"], 100 * figure["high"]
    return f"{100 * figure['rate']:.1f} % ({low:.1f}–{high:.1f})"


def model_card(build: BuildConfig, quality: dict[str, Any]) -> str:
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
