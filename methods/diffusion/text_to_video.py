"""Text to video: a text-to-image pipeline, personalized or not, whose frames a motion adapter ties
together (AnimateDiff, arXiv 2307.04725).

It is drawn as images are (`text_to_image`), from noise of one frame more dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
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
    pipeline: StableDiffusionPipeline,
    adapter: MotionAdapter,
    prompts: str | Sequence[str],
    *,
    frames: int = 16,
    beta_schedule: str | None = "linear",
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    batch_size: int = 1,
    **options: Any,
) -> UInt8[np.ndarray, "N F H W 3"]:
    """One uint8 video per prompt.

    Args:
      pipeline, adapter, frames, beta_schedule: as for `video_drawer`.
      prompts: one text or several.
      num_inference_steps, guidance_scale, batch_size, options: as for calling a `TextToImage`.
    """
    drawer = video_drawer(pipeline, adapter, frames=frames, beta_schedule=beta_schedule)
    return drawer(
        prompts,
        sampler="ddim",
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        **options,
    )
