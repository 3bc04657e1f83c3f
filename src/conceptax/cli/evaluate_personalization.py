"""`conceptax evaluate personalization`: is it the subject, and is it what was asked for?"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

import conceptax
from conceptax.cli.loading import load_pipeline
from conceptax.cli.options import OptionalPath
from conceptax.cli.runs import new_folder
from conceptax.methods.diffusion.text_to_image import text_to_image
from conceptax.methods.evaluation.personalization import Instruments, Subject, measure
from conceptax.methods.memory import require_images
from conceptax.methods.subjects.images import image_files, read_image, read_images
from conceptax.methods.text.phrases import read_phrases
from conceptax.reporting.instruments import load_blip, load_clip, load_dino
from conceptax.reporting.pictures import save_png
from conceptax.reporting.report import Number, Table, markdown_table
from conceptax.reporting.results import environment
from conceptax.text import read_text, write_json

METRICS = "metrics.json"
_SAMPLES = "sample.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Evaluate a personalized model: is it the subject, and is it what was asked for?

    Images are compared with photographs of the subject (CLIP-I, DINO-I) and with their prompts
    (CLIP-T, BLIP-ITC, BLIP2-T), from which new tokens such as <new1> are left out for that. Each
    metric needs its model, as a folder in transformers' layout.

    Writes metrics.json, table.md and, with --model, the images.

    Attributes:
      images: folder of images to measure. One that `conceptax sample` wrote knows its prompts; in
        another, in the order of their names, each prompt has an equal share.
      model: or draw them with this model: a folder that `conceptax personalize` wrote.
      references: folder of photographs of the subject; repeat for several subjects.
      prompts: file of prompts, one a line.
      clip: a CLIP folder.
      dino: a DINOv2 folder.
      blip: a folder of BlipForImageTextRetrieval.
      blip2: a folder of Blip2ForImageTextRetrieval.
      output: the folder to write.
      count: images per prompt, with --model.
      steps: denoising steps per image.
      guidance: strength of the prompt.
      eta: DDIM's fresh noise, 0 to 1.
      seed: of the noise.
      batch_size: images drawn at a time.
      dtype: computation dtype of the model that draws.
      force: replace an earlier evaluation.
    """

    images: OptionalPath = None
    model: OptionalPath = None
    references: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    prompts: OptionalPath = None
    clip: OptionalPath = None
    dino: OptionalPath = None
    blip: OptionalPath = None
    blip2: OptionalPath = None
    output: Path = Path("evaluation")
    count: int = 4
    steps: int = 100
    guidance: float = 6.0
    eta: float = 1.0
    seed: int = 0
    batch_size: int = 8
    dtype: Literal["float32", "bfloat16"] = "float32"
    force: bool = False


def run(command: Command) -> None:
    """Read or draw the images, measure, and write it down; the output is claimed first."""
    if (command.images is None) == (command.model is None):
        raise ValueError("pass either --images, a folder of images, or --model, which draws them.")
    if not command.references:
        raise ValueError("pass photographs of the subject with --references.")
    if command.count < 1:
        raise ValueError(f"--count must be at least 1, received {command.count}.")
    if command.model is not None:
        require_images(command.count, "take a smaller --count")
    subjects = [Subject(path.resolve().name, read_images(path)) for path in command.references]
    began = time.perf_counter()
    with new_folder(
        command.output, force=command.force, command=command, markers=[METRICS]
    ) as folder:
        instruments = _instruments(command)
        if command.images is not None:
            images, prompts = _found(command.images, command.prompts)
        else:
            images, prompts = _drawn(command, folder)
        metrics = measure(images, prompts, subjects, instruments)
        record = {
            "images": len(images),
            **metrics,
            "settings": _settings(command),
            **environment(),
            "seconds": round(time.perf_counter() - began, 2),
        }
        write_json(folder / METRICS, record)
        markdown = "\n".join(map(markdown_table, _tables(record)))
        (folder / "table.md").write_text(markdown, encoding="utf-8")
    print(markdown)
    print(f"{command.output}: {METRICS}, table.md")


def _found(folder: Path, prompts_file: Path | None) -> tuple[list[np.ndarray], list[str]]:
    """Images of a folder and the prompt of each.

    Raises:
      ValueError: prompts that are not known, or do not share the images evenly.
    """
    known = folder / _SAMPLES
    if prompts_file is None and known.is_file():
        try:
            files = dict(json.loads(read_text(known))["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{known} does not say which image has which prompt.") from error
        return [read_image(folder / name) for name in files], list(map(str, files.values()))
    files = image_files(folder)
    if prompts_file is None:
        raise ValueError(f"{folder} has no {_SAMPLES}: say what was asked for with --prompts.")
    prompts = read_phrases(prompts_file)
    share, rest = divmod(len(files), len(prompts))
    if rest or not share:
        raise ValueError(
            f"{folder} holds {len(files)} images, which {len(prompts)} prompts do not share evenly."
        )
    return [read_image(file) for file in files], [p for p in prompts for _ in range(share)]


def _drawn(command: Command, folder: Path) -> tuple[np.ndarray, list[str]]:
    """Images of the model, written into `folder` too, and the prompt of each."""
    if command.prompts is None:
        raise ValueError("--model draws what a file of prompts asks for: pass --prompts.")
    prompts = [p for p in read_phrases(command.prompts) for _ in range(command.count)]
    assert command.model is not None
    pipeline = load_pipeline(command.model, command.dtype, "evaluating")
    images = text_to_image(
        pipeline,
        prompts,
        seed=command.seed,
        num_inference_steps=command.steps,
        guidance_scale=command.guidance,
        sampler="ddim",
        eta=command.eta,
        batch_size=command.batch_size,
    )
    (folder / "images").mkdir()
    files = [f"{n:04d}.png" for n in range(len(images))]
    for image, name in zip(images, files, strict=True):
        save_png(image, folder / "images" / name)
    write_json(folder / "images" / _SAMPLES, {"files": dict(zip(files, prompts, strict=True))})
    return images, prompts


def _instruments(command: Command) -> Instruments:
    clip, dino, blip, blip2 = command.clip, command.dino, command.blip, command.blip2
    if not any((clip, dino, blip, blip2)):
        raise ValueError(
            "pass at least one model that measures: --clip, --dino, --blip or --blip2; for the "
            f"bundled model's 64 pixels, its own CLIP: --clip {conceptax.bundled_model() / 'clip'}."
        )
    return Instruments(
        clip=load_clip(clip, None, clip.name) if clip else None,
        dino=load_dino(dino, dino.name) if dino else None,
        blip=load_blip(blip, blip.name) if blip else None,
        blip_2=load_blip(blip2, blip2.name, second=True) if blip2 else None,
    )


def _settings(command: Command) -> dict[str, Any]:
    """The flags, without those that only say where to write."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(each) for each in value]
        return str(value) if isinstance(value, Path) else value

    values = {name: plain(value) for name, value in dataclasses.asdict(command).items()}
    drawing = ("count", "steps", "guidance", "eta", "seed", "batch_size", "dtype")
    left_out = {"output", "force", *(() if command.model else drawing)}
    return {name: value for name, value in values.items() if name not in left_out}


def _tables(record: Mapping[str, Any]) -> list[Table]:
    models, settings = record["models"], record["settings"]
    rows: list[Sequence[str | Number]] = []
    for name, metrics in record["subjects"].items():
        for metric, figure in metrics.items():
            among = figure.get("references")
            rows.append(
                (
                    f"{metric}, {name}",
                    _number(figure),
                    Number("–" if among is None else f"{among:.4f}"),
                )
            )
    rows += [(metric, _number(figure), Number("–")) for metric, figure in record["text"].items()]
    seed = f"; seed {settings['seed']}, {settings['steps']} steps" if "seed" in settings else ""
    note = (
        f"Mean cosines of {record['images']} images with their 95 % intervals, which are about the "
        "images and not about other runs of the training. -I: with the photographs, whose "
        "similarity among themselves is in the last column. -T, -ITC: with the prompt without its "
        f"new tokens. Models: {', '.join(f'{k} {v}' for k, v in models.items())}{seed}. "
        f"conceptax {record['versions'].get('conceptax', '?')}, jax {record['versions']['jax']}."
    )
    title = "Is it the subject, and is it what was asked for?"
    names = list(record["scores"])
    by_prompt = [
        (prompt, *(Number(f"{values[name]:.4f}") for name in names))
        for prompt, values in record["prompts"].items()
    ]
    return [
        Table(title, ("metric", "images", "photographs"), rows, note),
        Table("Each prompt", ("prompt", *names), by_prompt),
    ]


def _number(figure: Mapping[str, Any]) -> Number:
    return Number(f"{figure['mean']:.4f}", f"{figure['low']:.4f}–{figure['high']:.4f}")
