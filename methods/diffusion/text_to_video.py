"""Text to video: by a pipeline of videos, or by one of images, personalized or not, whose frames a
motion adapter ties together (AnimateDiff, arXiv 2307.04725).

Videos are drawn as images are (`text_to_image`), from noise of one more dimension, the frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ...flax_models.layers.attention import Neighborhoods
from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ...flax_models.pipelines.video import VideoPipeline
from ...flax_models.unet_motion import MotionAdapter, with_motion
from ..sampling import NoiseSchedule
from .text_to_image import TextToImage


def video_schedule(
    scheduler_config: Mapping[str, Any], beta_schedule: str | None = "linear"
) -> NoiseSchedule:
    """The schedule that AnimateDiff samples with, by DDIM.

    Whatever the pipeline's own configuration says: timesteps spaced from the first to the last, and
    no clipping.  The published adapters were trained on linear betas, between the pipeline's ends;
    `beta_schedule=None` keeps the pipeline's own, for an adapter that was trained on them.
    """
    schedule = NoiseSchedule.from_config(scheduler_config)
    return dataclasses.replace(
        schedule,
        scheduler_class="DDIMScheduler",
        timestep_spacing="linspace",
        steps_offset=1,
        clip_sample=False,
        beta_schedule=beta_schedule or schedule.beta_schedule,
    )


def video_drawer(
    pipeline: StableDiffusionPipeline,
    adapter: MotionAdapter,
    *,
    frames: int = 16,
    beta_schedule: str | None = "linear",
) -> TextToImage:
    """A pipeline and a motion adapter, made ready to draw videos of `frames` frames.

    Raises:
      ValueError: an adapter that does not fit the pipeline's UNet, or a number of frames that it
        does not know.
    """
    most = adapter.config.motion_max_seq_length
    if not 1 <= frames <= most:
        raise ValueError(f"this motion adapter draws 1 to {most} frames, received {frames}.")
    unet = with_motion(pipeline.unet, adapter)
    drawer = TextToImage.from_pipeline(dataclasses.replace(pipeline, unet=unet))
    schedule = video_schedule(pipeline.scheduler_config, beta_schedule)
    return dataclasses.replace(drawer, schedule=schedule, frames=frames)


def text_to_video(
    pipeline: VideoPipeline | StableDiffusionPipeline,
    *arguments: Any,
    prompts: str | Sequence[str] | None = None,
    num_frames: int | None = None,
    motion_adapter: MotionAdapter | None = None,
    beta_schedule: str | None = "linear",
    attention: Neighborhoods = None,
    dense_steps: int = 0,
    vae_tiling: bool = False,
    batch_size: int = 1,
    adapter: MotionAdapter | None = None,
    frames: int | None = None,
    **options: Any,
) -> UInt8[np.ndarray, "N F H W 3"]:
    """One uint8 video per prompt: `text_to_video(pipeline, prompts, num_frames=61, ...)`.

    Args:
      pipeline: of videos; or of Stable Diffusion, with a motion adapter.
      arguments: the prompts; as in earlier versions the motion adapter may be before them.
      prompts: one text or several.
      num_frames: by default the family's, with a motion adapter 16.
      motion_adapter, beta_schedule: as for `video_drawer`.
      attention, dense_steps, vae_tiling: of pipelines of videos, as for
        `TextToImage.from_pipeline`. What does not fit the memory whole is decoded in tiles anyway.
      batch_size: videos at a time.
      adapter, frames: names of `motion_adapter` and `num_frames` in earlier versions.
      options: as for calling a `TextToImage`, such as `height`, `num_inference_steps`, `on_step`,
        or `kept`.

    Raises:
      TypeError: no prompts, or more arguments.
      ValueError: an image pipeline without a motion adapter, or a video pipeline with one.
    """
    texts: list[Any] = [*arguments, *([] if prompts is None else [prompts])]
    if texts and isinstance(texts[0], MotionAdapter):
        adapter = texts.pop(0)
    if len(texts) != 1:
        raise TypeError(f"text_to_video takes prompts once; got them {len(texts)} times.")
    (text,) = texts
    motion_adapter = adapter if motion_adapter is None else motion_adapter
    num_frames = frames if num_frames is None else num_frames
    if isinstance(pipeline, VideoPipeline):
        if motion_adapter is not None:
            raise ValueError(
                f"{type(pipeline).__name__} draws videos by itself: leave out motion_adapter."
            )
        drawer = TextToImage.from_pipeline(
            pipeline, vae_tiling=vae_tiling, attention=attention, dense_steps=dense_steps
        )
        return drawer(text, num_frames=num_frames, batch_size=batch_size, **options)
    if motion_adapter is None:
        raise ValueError(
            f"{type(pipeline).__name__} draws images: pass a motion_adapter for videos."
        )
    if attention is not None or dense_steps or vae_tiling:
        raise ValueError(
            "videos of a motion adapter are drawn dense and decoded whole: leave out attention, "
            "dense_steps and vae_tiling."
        )
    drawer = video_drawer(
        pipeline,
        motion_adapter,
        frames=16 if num_frames is None else num_frames,
        beta_schedule=beta_schedule,
    )
    return drawer(text, batch_size=batch_size, **{"sampler": "ddim", **options})
