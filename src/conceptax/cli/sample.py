"""`conceptax sample`: draw images, or videos, from prompts."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from conceptax.cli.options import (
    Additions,
    Model,
    OptionalFloat,
    OptionalInt,
    OptionalModel,
    OptionalPath,
    OptionalText,
    shown,
)
from conceptax.reporting.videos import SUFFIXES, encoder, save_video
from conceptax.text import write_json

_OF_VIDEOS = ("frames", "fps", "betas")


@dataclasses.dataclass(frozen=True)
class Command:
    """Draw images from prompts, or with a motion adapter videos.

    Attributes:
      prompt: what to draw; repeat for several.
      prompts: a file of more, one a line; blank lines and those that start with # are skipped.
      output: a .png file (several images become one sheet), or a folder for one file per image. Of
        videos a .gif or .mp4 file for one, or a folder with both files of each.
      model: a folder of Stable Diffusion 1, 2, XL or 3, of FLUX.1, or of FLUX.2 klein.
      add: a part to draw with, a file or folder: what `conceptax erase` and `conceptax personalize`
        write with --export, a LoRA, an embedding of new tokens; repeat for several.
      add_scale: how much of each LoRA in --add.
      negative_prompt: what guidance steers away from; empty, it is what the model takes for no
        text, which for SDXL are zeros.
      steps: denoising steps per image, to which PNDM adds one; by default as the model was
        published: 50 of Stable Diffusion 1, 2 and XL, 28 of 3 and of FLUX.1 dev, 4 of schnell and
        of distilled klein.
      guidance: strength of the prompt, by default 7.5 for Stable Diffusion 1, 2 and XL, 7 for 3,
        3.5 for FLUX.1 dev; 1 is none and takes half the time where the model did not learn it.
      sampler: by default what the model's scheduler asks for; videos are drawn by DDIM. Models on a
        flow have one of their own.
      attention: of a transformer, neighborhood attention in place of the dense one: the name of a
        preset, such as flux-4k or hunyuan, or windows of your own, "window=32x32 stride=8x8", in
        tokens, of videos with frames first: "window=allx24x24 stride=1x8x8".
      dense_steps: how many steps are dense before; by default the preset's share of them.
      count: images per prompt.
      seed: of the noise; image n depends on the prompt, the seed and n alone.
      batch_size: images drawn at a time, by each device; videos are drawn one by one.
      devices: that draw a batch each, at the same time; by default all accelerators, or one CPU.
      vae_tiling: decode images larger than the autoencoder was trained on in overlapping tiles, in
        the memory of one tile; they differ a little from those decoded whole.
      height: in pixels; by default the model's own.
      width: in pixels; by default the model's own.
      motion_adapter: an AnimateDiff adapter's folder: draw videos.
      frames: of a video.
      fps: frames per second of a video.
      betas: the noise schedule that the adapter was trained on: linear, as AnimateDiff's are, or
        the model's own.
      dtype: computation dtype.
      stream: bring the blocks of a transformer and of its text encoders from their files as they
        run, for models larger than memory; the model is a folder of FLUX.1, FLUX.2 klein or SD 3.
      force: replace an earlier result.
    """

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    prompts: OptionalPath = None
    output: Annotated[Path | None, shown("PATH", "(default: sample.png, videos: sample)")] = None
    model: Model = None
    add: Additions = ()
    add_scale: float = 1.0
    negative_prompt: str = ""
    steps: OptionalInt = None
    guidance: OptionalFloat = None
    sampler: (
        Literal["ddim", "ddpm", "euler", "euler-ancestral", "dpm++", "unipc", "lcm", "pndm"] | None
    ) = None
    attention: OptionalText = None
    dense_steps: OptionalInt = None
    count: int = 1
    seed: int = 0
    batch_size: int = 8
    devices: OptionalInt = None
    vae_tiling: bool = False
    height: OptionalInt = None
    width: OptionalInt = None
    motion_adapter: OptionalModel = None
    frames: int = 16
    fps: int = 8
    betas: Literal["linear", "model"] = "linear"
    dtype: Literal["float32", "bfloat16"] = "float32"
    stream: bool = False
    force: bool = False


def run(command: Command) -> None:
    """Draw, then write one file, or one folder with files of each image and `sample.json`."""
    from conceptax.cli.runs import new_file, new_folder
    from conceptax.methods.memory import require_images
    from conceptax.methods.text.phrases import read_phrases

    if command.prompts is not None:
        read = read_phrases(command.prompts)
        command = dataclasses.replace(command, prompt=(*command.prompt, *read))
    if not command.prompt:
        raise ValueError("there is nothing to draw: pass at least one --prompt, or --prompts FILE.")
    if command.count < 1:
        raise ValueError(f"--count must be at least 1, received {command.count}.")
    require_images(
        len(command.prompt) * command.count,
        "take a smaller --count, --height or --width",
        height=command.height or 8,
        width=command.width or 8,
    )
    prompts = [prompt for prompt in command.prompt for _ in range(command.count)]
    video = command.motion_adapter is not None
    output = command.output or Path("sample" if video else "sample.png")
    _check_output(command, output, len(prompts))
    if output.suffix:
        with new_file(command, output) as file:
            images = _draw(command, prompts)
            # One row per prompt where each has several images.
            columns = command.count if command.count > 1 and len(command.prompt) > 1 else None
            _save(command, images, file, columns)
    else:
        with new_folder(command, output, markers=["sample.json"]) as folder:
            images = _draw(command, prompts)
            files = {}
            for number, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
                for suffix in SUFFIXES if video else (".png",):
                    name = f"{number:04d}_{_slug(prompt)}{suffix}"
                    files[name] = prompt
                    _save(command, image[None], folder / name)
            write_json(folder / "sample.json", _record(command) | {"files": files})
    height, width = images.shape[-3:-1]
    what = f"videos of {command.frames} frames" if video else "images"
    print(f"{output}: {len(images)} {what} of {height}x{width} pixels")


def _save(command: Command, images: Any, file: Path, columns: int | None = None) -> None:
    """Write one video, or one picture of all images."""
    from conceptax.reporting.pictures import save_png, sheet

    if command.motion_adapter is not None:
        save_video(images[0], file, command.fps)
        return
    image = images[0] if len(images) == 1 else sheet(images, columns=columns)
    save_png(image, file, {"conceptax": json.dumps(_record(command))})


def _record(command: Command) -> dict[str, Any]:
    from conceptax.cli.runs import settings_of

    left_out = [] if command.motion_adapter else ["motion_adapter", *_OF_VIDEOS]
    left_out += [] if command.add else ["add", "add_scale"]
    record = settings_of(command, "output", "force", "prompts", *left_out)
    return record | {"model": record["model"] or "bundled"}


def _check_output(command: Command, output: Path, count: int) -> None:
    """Raise ValueError for a place that the result does not fit in, and for wants of videos."""
    suffix = output.suffix.lower()
    if command.motion_adapter is None:
        if suffix not in ("", ".png"):
            raise ValueError(
                f"--output takes a .png file or a folder without a suffix, received {output}"
                + ("; videos need a --motion-adapter." if suffix in SUFFIXES else ".")
            )
        if given := [
            f"--{name}" for name in _OF_VIDEOS if getattr(command, name) != getattr(Command, name)
        ]:
            raise ValueError(
                f"videos need a --motion-adapter: pass one, or leave out {', '.join(given)}."
            )
        return
    if suffix not in ("", *SUFFIXES) or (suffix and count > 1):
        raise ValueError(
            "--output of videos takes a folder without a suffix, or for a single one a .gif or "
            f".mp4 file, received {output} for {count}."
        )
    unfit = {
        "--sampler": command.sampler not in (None, "ddim"),
        "--devices": command.devices is not None,
        "--vae-tiling": command.vae_tiling,
        "--attention": command.attention is not None,
        "--batch-size": command.batch_size != Command.batch_size,
    }
    if given := ", ".join(option for option, is_given in unfit.items() if is_given):
        raise ValueError(f"videos are drawn by DDIM, one by one, whole: leave out {given}.")
    if command.fps < 1:
        raise ValueError(f"--fps must be at least 1, received {command.fps}.")
    if suffix != ".gif":
        encoder()


def _draw(command: Command, prompts: list[str]) -> Any:
    import jax.numpy as jnp

    import conceptax
    from conceptax.cli.confirm import announcing, counting
    from conceptax.cli.streams import print_stage
    from conceptax.converters import load_pytorch
    from conceptax.flax_models.unet_motion import MotionAdapter
    from conceptax.methods.diffusion.text_to_image import text_to_image
    from conceptax.methods.diffusion.text_to_video import text_to_video
    from conceptax.reporting.instruments import load_as
    from conceptax.reporting.models import require_whole, with_additions

    source = command.model or conceptax.bundled_model()
    print_stage(f"loading {command.model or 'the bundled model'}")
    pipeline = load_pytorch(source, dtype=jnp.dtype(command.dtype), stream=command.stream)
    if not hasattr(pipeline, "scheduler_config"):
        raise ValueError(
            f"{command.model} is no pipeline: sampling needs all its components. Name the model "
            f"that it is a part of with --model, and add it to that with --add {command.model}."
        )
    require_whole(pipeline, command.model or conceptax.bundled_model(), "sampling")
    pipeline = with_additions(pipeline, command.add, command.add_scale)
    steps, guidance = pipeline.defaults
    options: dict[str, Any] = {
        "seed": command.seed,
        "num_inference_steps": steps if command.steps is None else command.steps,
        "guidance_scale": guidance if command.guidance is None else command.guidance,
        "negative_prompt": command.negative_prompt or None,
        "height": command.height,
        "width": command.width,
        "on_estimate": announcing("drawing"),
        "on_progress": counting("images" if command.motion_adapter is None else "videos"),
    }
    if command.motion_adapter is None:
        return text_to_image(
            pipeline,
            prompts,
            sampler=command.sampler,
            batch_size=command.batch_size,
            mesh=_mesh(command.devices),
            vae_tiling=command.vae_tiling,
            **_attention(command, options["num_inference_steps"]),
            **options,
        )
    adapter = load_as(command.motion_adapter, MotionAdapter, "a motion adapter")
    betas = "linear" if command.betas == "linear" else None
    return text_to_video(
        pipeline, adapter, prompts, frames=command.frames, beta_schedule=betas, **options
    )


def _attention(command: Command, steps: int) -> dict[str, Any]:
    """What `text_to_image` takes of neighborhood attention; nothing where it is dense."""
    from conceptax.kernels.gna.presets import attention_preset

    if command.attention is None:
        if command.dense_steps is not None:
            raise ValueError("--dense-steps is for an --attention, before which steps are dense.")
        return {}
    preset = attention_preset(command.attention)
    dense = command.dense_steps
    if dense is None:
        dense = preset.dense_steps_of(steps)
    return {"attention": preset, "dense_steps": dense}


def _mesh(devices: int | None) -> Any:
    """A mesh of devices that draw a batch each; None where there is one."""
    import jax

    from conceptax.methods.training import make_mesh

    if devices is None:
        devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    elif not 1 <= devices <= jax.device_count():
        raise ValueError(f"--devices accepts 1 to {jax.device_count()} here, received {devices}.")
    return None if devices == 1 else make_mesh(devices)


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "image"
