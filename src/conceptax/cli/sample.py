"""`conceptax sample`: draw images from prompts."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Literal

import tyro

from conceptax.cli.options import Model, OptionalInt


@dataclasses.dataclass(frozen=True)
class Command:
    """Draw images from prompts.

    Attributes:
      prompt: what to draw; repeat for several.
      output: a .png file (several images become one sheet), or a folder for one file per image.
      model: a Stable Diffusion folder.
      negative_prompt: what guidance steers away from.
      steps: denoising steps per image.
      guidance: strength of the prompt; 1 is none and takes half the time.
      sampler: by default what the model's scheduler asks for.
      count: images per prompt.
      seed: of the noise; image n depends on the prompt, the seed and n alone.
      batch_size: images drawn at a time.
      height: in pixels; by default the model's own.
      width: in pixels; by default the model's own.
      dtype: computation dtype.
      force: replace an earlier result.
    """

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]]
    output: Path = Path("sample.png")
    model: Model = None
    negative_prompt: str = ""
    steps: int = 25
    guidance: float = 5.0
    sampler: Literal["ddim", "ddpm", "euler", "euler-ancestral", "dpm++", "unipc", "lcm"] | None = (
        None
    )
    count: int = 1
    seed: int = 0
    batch_size: int = 8
    height: OptionalInt = None
    width: OptionalInt = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    force: bool = False


def run(command: Command) -> None:
    """Draw, then write one file, or one folder with a file per image and `sample.json`."""
    from conceptax.cli.pictures import save_png, sheet
    from conceptax.cli.results import new_file, new_folder, write_json

    if not command.prompt:
        raise ValueError("there is nothing to draw: pass at least one --prompt.")
    if command.count < 1:
        raise ValueError(f"--count must be at least 1, received {command.count}.")
    prompts = [prompt for prompt in command.prompt for _ in range(command.count)]
    record = _record(command)
    if command.output.suffix:
        if command.output.suffix.lower() != ".png":
            raise ValueError(
                f"--output takes a .png file or a folder without a suffix, received "
                f"{command.output}."
            )
        with new_file(command.output, force=command.force) as file:
            images = _draw(command, prompts)
            image = images[0] if len(images) == 1 else sheet(images, columns=_columns(command))
            save_png(image, file, {"conceptax": json.dumps(record)})
    else:
        with new_folder(command.output, force=command.force, markers=["sample.json"]) as folder:
            images = _draw(command, prompts)
            files = [f"{n:04d}_{_slug(prompt)}.png" for n, prompt in enumerate(prompts)]
            for image, name in zip(images, files, strict=True):
                save_png(image, folder / name, {"conceptax": json.dumps(record)})
            record["files"] = dict(zip(files, prompts, strict=True))
            write_json(folder / "sample.json", record)
    print(f"{command.output}: {len(images)} images of {images.shape[1]}x{images.shape[2]} pixels")


def _draw(command: Command, prompts: list[str]) -> Any:
    import jax.numpy as jnp

    import conceptax
    from conceptax.converters import load_pytorch
    from conceptax.methods.text_to_image import text_to_image

    pipeline = load_pytorch(
        command.model or conceptax.bundled_model(), dtype=jnp.dtype(command.dtype)
    )
    if not hasattr(pipeline, "scheduler_config"):
        raise ValueError(f"{command.model} is no pipeline: sampling needs all its components.")
    return text_to_image(
        pipeline,
        prompts,
        seed=command.seed,
        num_inference_steps=command.steps,
        guidance_scale=command.guidance,
        sampler=command.sampler,
        negative_prompt=command.negative_prompt,
        batch_size=command.batch_size,
        height=command.height,
        width=command.width,
    )


def _columns(command: Command) -> int | None:
    """One row per prompt where each has several images."""
    return command.count if command.count > 1 and len(command.prompt) > 1 else None


def _record(command: Command) -> dict[str, Any]:
    fields = dataclasses.asdict(command)
    fields["model"] = str(command.model) if command.model else "bundled"
    for name in ("output", "force"):
        del fields[name]
    return fields


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "image"
