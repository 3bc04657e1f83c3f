"""`conceptax sample`: draw images, or videos, from prompts."""

import contextlib
import dataclasses
import json
import os
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
    computed_in,
    shown,
)
from conceptax.reporting.videos import SUFFIXES, encoder, read_frames, save_frames, save_video
from conceptax.text import write_json

_OF_VIDEOS = ("frames", "fps", "betas", "png", "image", "video")


@dataclasses.dataclass(frozen=True)
class Command:
    """Draw images or videos from prompts.

    Attributes:
      prompt: what to draw; repeat for several.
      prompts: a file of more, one a line; blank lines and those that start with # are skipped.
      output: a .png file (several images become one sheet), or a folder for one file per image. Of
        videos a .gif or .mp4 file for one, or a folder with both files of each.
      model: a folder of Stable Diffusion 1, 2, XL or 3, of FLUX.1, or of FLUX.2 klein; of Wan,
        HunyuanVideo or Cosmos, which draw videos.
      add: a part to draw with, a file or folder: what `conceptax erase` and `conceptax personalize`
        write with --export, a LoRA, an embedding of new tokens; repeat for several.
      add_scale: how much of each LoRA in --add.
      add_settings: that images of a LoRA of FLUX.1 in --add are drawn with, where it does not state
        them: urae-4k, or "ntk-factor=10 attention-scale=proportional shift=3".
      negative_prompt: what guidance steers away from; empty, it is what the model takes for no
        text, which for SDXL are zeros.
      steps: denoising steps per image, to which PNDM adds one; by default as the model was
        published: 50 of Stable Diffusion 1, 2 and XL, of Wan and HunyuanVideo, 36 of Cosmos, 28 of
        Stable Diffusion 3 and of FLUX.1 dev, 4 of schnell and of distilled klein.
      guidance: strength of the prompt, by default 7.5 for Stable Diffusion 1, 2 and XL, 7 for 3 and
        Cosmos, 6 for HunyuanVideo, 5 for Wan, 3.5 for FLUX.1 dev; 1 is none and takes half the time
        where the model did not learn it.
      guidance_2: that of the second of two models, which Wan 2.2 has for low noise; by default as
        published, or --guidance where that is given.
      true_cfg_scale: of FLUX.1 and HunyuanVideo, which learnt their guidance, another one on top
        of it, away from the negative prompt: above 1 it takes twice the time.
      sampler: by default what the model's scheduler asks for; with a motion adapter DDIM. Models on
        a flow have one of their own.
      attention: of a transformer, neighborhood attention in place of the dense one: the name of a
        preset, such as flux-4k or hunyuan, or windows of your own, "window=32x32 stride=8x8", in
        tokens, of videos with frames first: "window=allx24x24 stride=1x8x8".
      dense_steps: how many steps are dense before; by default the preset's share of them.
      count: images per prompt.
      seed: of the noise; image n depends on the prompt, the seed and n alone.
      batch_size: images drawn at a time, by each device; videos are drawn one by one.
      devices: that draw a batch each, at the same time; by default all accelerators, or one CPU.
        Of a model of videos, that draw each video together, a part of its frames each; by default
        one.
      vae_tiling: decode images larger than the autoencoder was trained on in overlapping tiles, in
        the memory of one tile; they differ a little from those decoded whole. Of videos this is
        done where memory asks for it.
      height: in pixels; by default the model's own.
      width: in pixels; by default the model's own.
      size: both, such as 480x832.
      motion_adapter: an AnimateDiff adapter's folder: draw videos with a model of images.
      frames: of a video; by default the model's own, with a motion adapter 16.
      fps: frames per second of a video; by default the model's own, with a motion adapter 8.
      png: of videos in a folder, also every frame as a .png file.
      image: that a video begins with, for models that go on from images.
      video: whose frames a video begins with, for models that go on from videos: a .gif or .mp4
        file, or a folder of .png files.
      betas: the noise schedule that the adapter was trained on: linear, as AnimateDiff's are, or
        the model's own.
      dtype: computation dtype; auto takes the one that is fastest here, and says which.
      stream: bring the blocks of a transformer and of its text encoders from their files as they
        run, for models larger than memory: FLUX, SD 3 and those of videos, also of 8 bits or GGUF.
      force: replace an earlier result.
    """

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    prompts: OptionalPath = None
    output: Annotated[Path | None, shown("PATH", "(default: sample.png, videos: sample)")] = None
    model: Model = None
    add: Additions = ()
    add_scale: float = 1.0
    add_settings: OptionalText = None
    negative_prompt: str = ""
    steps: OptionalInt = None
    guidance: OptionalFloat = None
    guidance_2: OptionalFloat = None
    true_cfg_scale: OptionalFloat = None
    sampler: (
        Literal["ddim", "ddpm", "euler", "euler-ancestral", "dpm++", "unipc", "lcm", "pndm", "lms"]
        | None
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
    size: OptionalText = None
    motion_adapter: OptionalModel = None
    frames: OptionalInt = None
    fps: OptionalInt = None
    png: bool = False
    image: OptionalPath = None
    video: OptionalPath = None
    betas: Literal["linear", "model"] = "linear"
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    stream: bool = False
    force: bool = False


def run(command: Command) -> None:
    """Draw, then write one file, or one folder with files of each image and `sample.json`."""
    from conceptax.cli.runs import new_file, new_folder
    from conceptax.methods.diffusion.kept_samples import KeptSamples
    from conceptax.methods.memory import require_images
    from conceptax.methods.text.phrases import read_phrases

    if command.prompts is not None:
        read = read_phrases(command.prompts)
        command = dataclasses.replace(command, prompt=(*command.prompt, *read))
    if not command.prompt:
        raise ValueError("there is nothing to draw: pass at least one --prompt, or --prompts FILE.")
    if command.count < 1:
        raise ValueError(f"--count must be at least 1, received {command.count}.")
    command = _sized(command)
    require_images(
        len(command.prompt) * command.count,
        "take a smaller --count, --height or --width",
        height=command.height or 8,
        width=command.width or 8,
    )
    prompts = [prompt for prompt in command.prompt for _ in range(command.count)]
    family = _video_family(command.model)
    draws_videos = family is not None or command.motion_adapter is not None
    output = command.output or Path("sample" if draws_videos else "sample.png")
    _check_output(command, output, len(prompts), family)
    beside = Path(os.path.abspath(output.expanduser()))
    by_steps = family is not None or command.stream
    with contextlib.ExitStack() as stack:
        kept = None
        if by_steps:  # which ends when the output is in place
            kept = stack.enter_context(KeptSamples(beside.with_name(f".{beside.name}.sampling")))
        if output.suffix:
            with new_file(command, output) as file:
                images, fps = _draw(command, prompts, kept)
                # One row per prompt where each has several images.
                columns = command.count if command.count > 1 and len(command.prompt) > 1 else None
                _save(command, images, file, fps, columns)
        else:
            with new_folder(command, output, markers=["sample.json"]) as folder:
                images, fps = _draw(command, prompts, kept)
                files = {}
                for number, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
                    for suffix in (".png",) if fps is None else SUFFIXES:
                        name = f"{number:04d}_{_slug(prompt)}{suffix}"
                        files[name] = prompt
                        _save(command, image[None], folder / name, fps)
                    if command.png:
                        name = f"{number:04d}_{_slug(prompt)}"
                        files[name] = prompt
                        save_frames(image, folder / name)
                record = _record(command, images, fps)
                write_json(folder / "sample.json", record | {"files": files})
    height, width = images.shape[-3:-1]
    what = "images" if fps is None else f"videos of {images.shape[1]} frames"
    print(f"{output}: {len(images)} {what} of {height}x{width} pixels")


def _sized(command: Command) -> Command:
    """The command with the height and width that --size gives."""
    if command.size is None:
        return command
    found = re.fullmatch(r"(\d+)x(\d+)", command.size)
    if found is None or command.height is not None or command.width is not None:
        raise ValueError(
            "--size takes height and width in pixels, such as 480x832, and goes without --height "
            f"and --width; received {command.size!r}."
        )
    return dataclasses.replace(command, height=int(found[1]), width=int(found[2]))


def _video_family(model: Path | None) -> Any:
    """The class of a folder's pipeline, if it draws videos; None of other folders and files."""
    from conceptax.converters.architectures import class_of_pipeline
    from conceptax.converters.pipeline_folder import read_index
    from conceptax.flax_models.pipelines.video import VideoPipeline

    if model is None or not (model.expanduser() / "model_index.json").is_file():
        return None
    folder = model.expanduser()
    family = class_of_pipeline(read_index(folder), str(model))
    return family if issubclass(family, VideoPipeline) else None


def _save(
    command: Command, images: Any, file: Path, fps: int | None, columns: int | None = None
) -> None:
    """Write one video, or one picture of all images."""
    from conceptax.reporting.pictures import save_png, sheet

    if fps is not None:
        save_video(images[0], file, fps)
        return
    image = images[0] if len(images) == 1 else sheet(images, columns=columns)
    save_png(image, file, {"conceptax": json.dumps(_record(command, images, fps))})


def _record(command: Command, images: Any, fps: int | None) -> dict[str, Any]:
    from conceptax.cli.runs import settings_of

    left_out = ["size", *(["add", "add_scale"] if not command.add else [])]
    optional = ("add_settings", "guidance_2", "true_cfg_scale", "png")
    left_out += [name for name in optional if not getattr(command, name)]
    if fps is None:
        left_out += ["motion_adapter", *_OF_VIDEOS]
    elif command.motion_adapter is None:
        left_out += ["motion_adapter", "betas"]
    record = settings_of(command, "output", "force", "prompts", *left_out)
    if fps is not None:
        record |= {"frames": images.shape[1], "fps": fps}
    return record | {"model": record["model"] or "bundled"}


def _check_output(command: Command, output: Path, count: int, family: Any) -> None:
    """Raise ValueError for a place that the result does not fit in, and for wants of videos."""
    suffix = output.suffix.lower()
    if command.motion_adapter is None and family is None:
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
        "--batch-size": command.batch_size != Command.batch_size,
    }
    named = getattr(family, "__name__", "")
    if family is None:
        unfit = {
            "--sampler": command.sampler not in (None, "ddim"),
            "--devices": command.devices is not None,
            **unfit,
            "--vae-tiling": command.vae_tiling,
            "--attention": command.attention is not None,
            "--image": command.image is not None,
            "--video": command.video is not None,
        }
        how = "with a motion adapter videos are drawn by DDIM, one by one, whole"
    else:
        unfit |= {
            "--motion-adapter": command.motion_adapter is not None,
            "--betas": command.betas != Command.betas,
        }
        how = f"{named} draws videos by itself, one by one"
    if given := ", ".join(option for option, is_given in unfit.items() if is_given):
        raise ValueError(f"{how}: leave out {given}.")
    if command.fps is not None and command.fps < 1:
        raise ValueError(f"--fps must be at least 1, received {command.fps}.")
    if command.png and suffix:
        raise ValueError("--png is for an --output that is a folder: its frames are put there.")
    begins = [name for name in ("image", "video") if getattr(command, name) is not None]
    takes = getattr(family, "TAKES_FRAMES", False)
    if len(begins) != takes:
        given = " and ".join(f"--{name}" for name in begins)
        raise ValueError(
            f"{named} goes on from frames: pass one of --image and --video."
            if takes
            else f"{named} draws from texts alone: leave out {given}."
        )
    if suffix != ".gif":
        encoder()


def _draw(command: Command, prompts: list[str], kept: Any) -> tuple[Any, int | None]:
    """The images, or the videos and their frames per second."""
    import jax.numpy as jnp

    import conceptax
    from conceptax.cli.bars import Steps
    from conceptax.cli.confirm import announcing, counting
    from conceptax.cli.streams import print_stage
    from conceptax.converters import load_pytorch
    from conceptax.flax_models.pipelines.video import VideoPipeline
    from conceptax.methods.diffusion.text_to_image import text_to_image
    from conceptax.methods.diffusion.text_to_video import text_to_video
    from conceptax.reporting.models import require_whole, with_additions

    source = command.model or conceptax.bundled_model()
    print_stage(f"loading {command.model or 'the bundled model'}")
    pipeline = load_pytorch(
        source, dtype=jnp.dtype(computed_in(command.dtype)), stream=command.stream
    )
    if not hasattr(pipeline, "scheduler_config"):
        raise ValueError(
            f"{command.model} is no pipeline: sampling needs all its components. Name the model "
            f"that it is a part of with --model, and add it to that with --add {command.model}."
        )
    require_whole(pipeline, command.model or conceptax.bundled_model(), "sampling")
    pipeline = with_additions(pipeline, command.add, command.add_scale, command.add_settings)
    steps = pipeline.defaults[0]
    options: dict[str, Any] = {
        "seed": command.seed,
        "num_inference_steps": steps if command.steps is None else command.steps,
        "guidance_scale": _guidance(command, pipeline),
        "negative_prompt": command.negative_prompt or None,
        "true_cfg_scale": command.true_cfg_scale,
        "height": command.height,
        "width": command.width,
        "on_estimate": announcing("drawing"),
    }
    if command.motion_adapter is not None:
        from conceptax.flax_models.unet_motion import MotionAdapter
        from conceptax.reporting.instruments import load_as  # with all of evaluation behind it

        adapter = load_as(command.motion_adapter, MotionAdapter, "a motion adapter")
        videos = text_to_video(
            pipeline,
            prompts,
            motion_adapter=adapter,
            num_frames=command.frames,
            beta_schedule="linear" if command.betas == "linear" else None,
            on_progress=counting("videos"),
            **options,
        )
        return videos, 8 if command.fps is None else command.fps
    options |= {"vae_tiling": command.vae_tiling, "sampler": command.sampler}
    draws_videos = isinstance(pipeline, VideoPipeline)
    size = (command.height, command.width, *([command.frames] if draws_videos else []))
    if command.attention is not None or command.dense_steps is not None:
        options |= _attention(command, options["num_inference_steps"], pipeline, size)
    with Steps("videos" if draws_videos else "images") as bar:
        if kept is not None:
            options |= {"kept": kept, "on_step": bar.step, "on_progress": bar.finished}
        if isinstance(pipeline, VideoPipeline):
            given = command.image or command.video
            videos = text_to_video(
                pipeline,
                prompts,
                num_frames=command.frames,
                fps=command.fps if pipeline.TAKES_FPS else None,
                conditioning=None if given is None else read_frames(given),
                mesh=_mesh(command.devices, alone=True, axis="context"),
                **options,
            )
            return videos, pipeline.video_size.fps if command.fps is None else command.fps
        images = text_to_image(
            pipeline,
            prompts,
            batch_size=command.batch_size,
            mesh=_mesh(command.devices, alone=kept is not None),
            **{"on_progress": counting("images"), **options},
        )
        return images, None


def _guidance(command: Command, pipeline: Any) -> Any:
    """Strength of the prompt: a number, or one for each model of a pair."""
    own = pipeline.defaults[1]
    pair = len(pipeline.denoisers) > 1
    if command.guidance_2 is not None and not pair:
        raise ValueError(
            f"--guidance-2 is for two models that take turns, and {type(pipeline).__name__} has "
            "one here: leave it out."
        )
    if not pair:
        return own if command.guidance is None else command.guidance
    first, second = own if isinstance(own, tuple) else (own, own)
    if command.guidance is not None:
        first = second = command.guidance
    return first, second if command.guidance_2 is None else command.guidance_2


def _attention(
    command: Command, steps: int, pipeline: Any, size: tuple[int | None, ...]
) -> dict[str, Any]:
    """What `text_to_image` takes of neighborhood attention, which fits the size; advice is told."""
    from conceptax.cli.streams import print_error
    from conceptax.kernels.gna.presets import attention_preset

    if command.attention is None:
        raise ValueError("--dense-steps is for an --attention, before which steps are dense.")
    preset = attention_preset(command.attention)
    dense = command.dense_steps
    if dense is None:
        dense = preset.dense_steps_of(steps)
    if hasattr(pipeline.denoiser, "BLOCKS"):  # of others, which are told, it is no question
        layout = pipeline.token_layout(pipeline.latent_shape_for(*size))
        for tiles in dict.fromkeys(preset.tiles.values()):
            if advice := preset.advice(layout, tiles):
                print_error(f"conceptax sample: {advice}")
                break
    return {"attention": preset, "dense_steps": dense}


def _mesh(devices: int | None, *, alone: bool = False, axis: str = "data") -> Any:
    """A mesh of devices that draw a batch each, or together; None where there is one, as for what
    is `alone` unless they are asked for."""
    import jax

    from conceptax.methods.training import make_mesh

    if devices is None and alone:
        return None
    if devices is None:
        devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    elif not 1 <= devices <= jax.device_count():
        raise ValueError(f"--devices accepts 1 to {jax.device_count()} here, received {devices}.")
    if devices == 1 or axis == "data":
        return None if devices == 1 else make_mesh(devices)
    return jax.make_mesh((devices,), (axis,), axis_types=(jax.sharding.AxisType.Auto,))


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "image"
