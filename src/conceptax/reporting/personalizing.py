"""Learnt subjects as folders with a record, and the images of their class that the model draws."""

import dataclasses
import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from conceptax.converters import (
    save_changes,
    save_custom_diffusion,
    save_pytorch,
    save_textual_inversion,
)
from conceptax.converters.formats.personalized import CUSTOM_DIFFUSION
from conceptax.flax_models.pipelines.new_tokens import embedding_rows
from conceptax.flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from conceptax.flax_models.pipelines.tokenizers import token_ids
from conceptax.methods.estimate import OnEstimate
from conceptax.methods.personalization import draw_class_images, method_of, personalize
from conceptax.methods.personalization.class_diffusion import ClassDiffusionConfig
from conceptax.methods.subjects.images import Concept, ImageError, image_files
from conceptax.methods.training import RULES
from conceptax.reporting.pictures import save_png
from conceptax.reporting.runs import NOT_KEPT, Kept, Run

RECORD = "personalizing.json"
_AT_ONCE = 8  # class images that are drawn before they are written

Export = Literal["pipeline", "weights"]


def personalize_into(
    folder: Path,
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[Concept],
    config: ClassDiffusionConfig,
    *,
    seed: int,
    source: str,
    export: Export = "pipeline",
    dtype: str = "float32",
    kept: Kept = NOT_KEPT,
) -> StableDiffusionPipeline:
    """Learn, write the result and its record into an empty `folder`, and return the pipeline.

    Args:
      folder: where to.
      pipeline, concepts, seed: as for `conceptax.methods.personalization.personalize`.
      config: settings of one of the methods; they say which.
      source: what to call the model in the record.
      export: what to write.
      dtype: what the pipeline computes in.
      kept: how the training is run.
    """
    one_encoder = len(pipeline.TOKENIZERS) == 1
    if export != "pipeline" and not one_encoder:
        raise ValueError(
            "a token of SDXL has an embedding in each of two text encoders, for which there is no "
            "file of its own here: leave --export at pipeline."
        )
    cross_attention = config.trained in ("crossattn", "crossattn_kv")
    torch = importlib.util.find_spec("torch") is not None
    record = {
        "method": method_of(config).title,
        "concepts": [_describe(concept) for concept in concepts],
        "model": source,
        "seed": seed,
        "dtype": dtype,
        "settings": dataclasses.asdict(config),
    }
    run = Run(folder, RECORD, record)
    rules = RULES["StableDiffusionPipeline"]
    with run.training(kept, rules=rules, length="steps") as options:
        learnt = personalize(pipeline, concepts, config, seed=seed, **options)
    if export == "pipeline":
        save_pytorch(learnt, folder)
    elif config.trained == "unet" or (cross_attention and not torch):
        save_changes(learnt.unet, pipeline.unet, folder / "unet_changes.safetensors")
    tokens = [concept.token for concept in concepts]
    if one_encoder:
        rows = embedding_rows(learnt, token_ids(learnt.tokenizer, tokens))
        save_textual_inversion(dict(zip(tokens, rows, strict=True)), folder)
    if cross_attention and torch:
        save_custom_diffusion(learnt.unet, folder / CUSTOM_DIFFUSION, trained=config.trained)
    elif cross_attention:
        run.record["not_written"] = f"{CUSTOM_DIFFUSION}: it needs torch"
    run.write(last="last_step")
    return learnt


def _describe(concept: Concept) -> dict[str, Any]:
    """A concept in a record; the images by a digest, so that others are noticed."""
    digest = hashlib.sha256()
    for image in (*concept.images, *concept.class_images):
        digest.update(repr(image.shape).encode() + image.tobytes())
    return {
        "token": concept.token,
        "class_word": concept.word,
        "prompt": concept.prompt,
        "class_prompt": concept.class_prompt,
        "initializer": concept.initializer,
        "images": len(concept.images),
        "class_images": len(concept.class_images),
        "digest": digest.hexdigest()[:16],
    }


def class_image_folder(output: Path, source: str, prompt: str, seed: int) -> Path:
    """Where the class images of a result are kept that names no folder for them: beside it.

    Each model, prompt and seed has a folder of its own, so that none is taken for another's.

    Args:
      output: the result's folder.
      source: what to call the model.
      prompt: of the class.
      seed: of the noise.
    """
    output = Path(os.path.abspath(output.expanduser()))
    digest = hashlib.sha256(repr((source, prompt, seed)).encode()).hexdigest()[:8]
    name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "class"
    return output.with_name(f"{output.name or 'output'}.class_images") / f"{name}-{digest}"


def complete_class_images(
    pipeline: StableDiffusionPipeline,
    folders: Sequence[tuple[Path, str]],
    count: int,
    seed: int,
    *,
    report: Callable[[str], None] = lambda text: None,
    on_estimate: OnEstimate | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> int:
    """Draw images for prior preservation until every folder has `count`.

    Image n of a folder is drawn from the noise of the seed's image n, and written at once, so a
    folder that was completed in two runs, or goes on after an interruption, holds what one run
    would have drawn.

    Args:
      pipeline: the model before it is personalized.
      folders: each with the prompt of its class; one that does not exist is made.
      count: images that each should have.
      seed: of the noise.
      report: called with a line about each folder that lacks some.
      on_estimate: called with about how long compiling and drawing take for each of them.
      on_progress: called with (images drawn, images to draw) of a folder.
      options: of `draw_class_images`: steps and guidance.

    Returns:
      how many were drawn.
    """
    drawn = 0
    for folder, prompt in folders:
        try:
            have = len(image_files(folder))
        except ImageError:  # none yet
            have = 0
        if have >= count:
            continue
        report(
            f"drawing {count - have} class images of {prompt!r} into {folder} (another run takes "
            "them again with --class-images, --class-count draws fewer)"
        )
        folder.mkdir(parents=True, exist_ok=True)
        for first in range(have, count, _AT_ONCE):
            number = min(_AT_ONCE, count - first)
            if on_estimate is not None and first == have:
                options["on_estimate"] = _of_all(on_estimate, (count - have) / number)
            images = draw_class_images(pipeline, prompt, number, seed=seed, first=first, **options)
            options.pop("on_estimate", None)
            for place, image in enumerate(images, start=first):
                partial = folder / f".drawn_{place:04d}.png"
                save_png(image, partial, {"prompt": prompt})
                partial.replace(folder / partial.name[1:])
            on_progress(first + number - have, count - have)
        drawn += count - have
    return drawn


def _of_all(on_estimate: OnEstimate, parts: float) -> OnEstimate:
    """What takes the estimate of one part and tells that of all."""
    return lambda compiling, running: on_estimate(compiling, running * parts)
