"""`conceptax evaluate personalization`: is it the subject, and is it what was asked for?"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

import conceptax
from conceptax.cli.options import Additions, OptionalModel, OptionalPath, typed
from conceptax.cli.runs import new_folder, settings_of
from conceptax.converters.files.weights import read_json
from conceptax.methods.diffusion.text_to_image import text_to_image
from conceptax.methods.evaluation.personalization import Instruments, Subject, measure
from conceptax.methods.memory import require_images
from conceptax.methods.subjects.images import image_files, read_image, read_images
from conceptax.methods.text.phrases import read_phrases
from conceptax.reporting.evaluation import personalization_page, personalization_tables
from conceptax.reporting.gallery import REPORT, Images, write_report
from conceptax.reporting.instruments import load_blip, load_clip, load_dino
from conceptax.reporting.models import load_pipeline, with_additions
from conceptax.reporting.personalizing import RECORD
from conceptax.reporting.pictures import save_png
from conceptax.reporting.results import METRICS, environment, write_tables
from conceptax.text import read_text, write_json

_SAMPLES = "sample.json"
_DRAWING = ("add", "add_scale", "count", "steps", "guidance", "eta", "seed", "batch_size", "dtype")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Evaluate a personalized model: is it the subject, and is it what was asked for?

    Images are compared with photographs of the subject (CLIP-I, DINO-I) and with their prompts
    (CLIP-T, BLIP-ITC, BLIP2-T), from which new tokens such as <new1> are left out for that. Each
    metric needs its model, as a folder in transformers' layout.

    Writes metrics.json, table.md, report.html, which shows every image and the photographs, and,
    with --model, the images.

    Attributes:
      images: folder of images to measure. One that `conceptax sample` wrote knows its prompts; in
        another, in the order of their names, each prompt has an equal share.
      model: or draw them with this model: a folder that `conceptax personalize` wrote.
      add: what was learnt, for --model to draw with: a folder or file that `conceptax personalize
        --export weights` wrote, a LoRA, an embedding of new tokens; repeat for several.
      add_scale: how much of each LoRA in --add.
      references: folder of photographs of the subject; repeat for several subjects.
      prompts: file of prompts, one a line.
      clip: a CLIP folder.
      dino: a DINOv2 folder.
      blip: a folder of BlipForImageTextRetrieval.
      blip2: a folder of Blip2ForImageTextRetrieval.
      output: the folder to write.
      count: images per prompt, with --model.
      steps: denoising steps per image; `conceptax sample` takes 50.
      guidance: strength of the prompt; `conceptax sample` takes 7.5.
      eta: DDIM's fresh noise, 0 to 1.
      seed: of the noise.
      batch_size: images drawn at a time.
      dtype: computation dtype of the model that draws.
      force: replace an earlier evaluation.
    """

    images: OptionalPath = None
    model: OptionalModel = None
    add: Additions = ()
    add_scale: float = 1.0
    references: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    prompts: OptionalPath = None
    clip: OptionalModel = None
    dino: OptionalModel = None
    blip: OptionalModel = None
    blip2: OptionalModel = None
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
    if command.add and command.model is None:
        raise ValueError("--add goes with --model, which draws with it: pass that too.")
    if not command.references:
        raise ValueError("pass photographs of the subject with --references.")
    if command.count < 1:
        raise ValueError(f"--count must be at least 1, received {command.count}.")
    if command.model is not None:
        require_images(command.count, "take a smaller --count")
    subjects = [Subject(path.resolve().name, read_images(path)) for path in command.references]
    began = time.perf_counter()
    with new_folder(command, markers=[METRICS]) as folder:
        instruments = _instruments(command)
        if command.images is not None:
            images, prompts = _found(command.images, command.prompts)
        else:
            images, prompts = _drawn(command, folder)
        record = {
            "images": len(images),
            **measure(images, prompts, subjects, instruments),
            "settings": settings_of(
                command, "output", "force", *(() if command.model else _DRAWING)
            ),
            **environment(),
            "seconds": round(time.perf_counter() - began, 2),
        }
        markdown = write_tables(folder, record, personalization_tables(record))
        kept = Images(folder)
        page = personalization_page(
            record, images, prompts, subjects, kept, label=_label(command), command=typed()
        )
        write_report(folder, page, kept)
    print(markdown)
    print(f"{command.output}: {METRICS}, table.md, {REPORT}")


def _label(command: Command) -> str:
    """The method that learnt what draws, or else the name of the folder."""
    path = command.model or command.images
    assert path is not None
    beside = [each if each.is_dir() else each.parent for each in (*command.add, path)]
    record = next((each / RECORD for each in beside if (each / RECORD).exists()), None)
    return (record and read_json(record).get("method")) or path.resolve().name


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
    pipeline = with_additions(pipeline, command.add, command.add_scale)
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
