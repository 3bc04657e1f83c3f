"""`VideoPipeline`: what every family of text-to-video transformers answers beside `Pipeline`."""

from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from .pipeline import Pipeline

MOST_FRAMES = 1 << 14  # of a video; more would take years


class VideoSize(NamedTuple):
    """What a family draws unless told otherwise: frames, pixels of each, frames per second."""

    frames: int
    height: int
    width: int
    fps: int


class PaddedTextEncoder(nnx.Module):
    """States of texts by T5 or UMT5, which reads no padding, and zeros in place of that."""

    def __init__(self, text_encoder: Any):
        self.text_encoder = text_encoder

    def __call__(
        self, token_ids: tuple[Int[Array, "B A"], Int[Array, "B A"]]
    ) -> Float[Array, "B A E"]:
        """States of token ids, given with the mask of those that are no padding."""
        ids, mask = token_ids
        return jnp.where(mask[..., None] != 0, self.text_encoder(ids, mask), 0)


class VideoPipeline(Pipeline):
    """Parts of a text-to-video model: latents are [B, T, h, w, C], videos [B, F, H, W, 3].

    The first of the T latent frames stands for one frame of the video, each other one for
    `vae.config.temporal_downsampling`.
    """

    DENOISER: ClassVar[str] = "transformer"
    PATCH: ClassVar[int] = 2
    TAKES_FRAMES: ClassVar[bool] = False  # that a video begins with
    TAKES_FPS: ClassVar[bool] = False  # the frame rate, as the denoiser was told in training

    @property
    def video_size(self) -> VideoSize:
        """That of videos which are drawn unless told otherwise."""
        raise NotImplementedError

    @property
    def latent_channels(self) -> int:
        """Of the latents that the denoiser was made for.

        Raises:
          ValueError: it denoises something other than latents.
        """
        config = self.denoiser.config
        if config.in_channels != config.out_channels:
            raise ValueError(
                f"A text-to-video transformer maps latents to latents: in_channels="
                f"{config.in_channels} and out_channels={config.out_channels} must be equal. "
                "Models that read images beside them are converted, but not drawn with."
            )
        return config.in_channels

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """That of the latents of a video of `video_size`: [T, h, w, C]."""
        frames, height, width, _ = self.video_size
        vae = self.vae.config
        times = (frames - 1) // vae.temporal_downsampling + 1
        sides = (side // vae.downsampling for side in (height, width))
        return times, *sides, self.latent_channels

    def latent_shape_for(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        """[T, h, w, C] of the latents of videos of a size, by default `video_size`.

        Raises:
          ValueError: sides that are no positive multiple of a token's, frames that are not one
            more than a multiple of those that a latent stands for, or too many.
        """
        *sides, channels = super().latent_shape_for(height, width)
        each = self.vae.config.temporal_downsampling
        count = self.video_size.frames if frames is None else frames
        if not 1 <= count <= MOST_FRAMES or (count - 1) % each:
            below = (min(max(count, 1), MOST_FRAMES) - 1) // each * each + 1
            near = [below, below + each] if 1 < count < MOST_FRAMES - each else [below]
            raise ValueError(
                f"num_frames={count} must be one more than a multiple of {each}, at most "
                f"{MOST_FRAMES}: {' or '.join(map(str, near))} may do."
            )
        return (count - 1) // each + 1, *sides, channels

    def conditioning_frames(
        self, frames: UInt8[np.ndarray, "K Y X 3"], times: int, size: tuple[int, int]
    ) -> tuple[Float[np.ndarray, "1 F H W 3"], int]:
        """Of families that `TAKES_FRAMES`: the frames as `encode_frames` takes them, and how many
        latent frames they make known, of `times` latent frames of videos of `size`."""
        raise NotImplementedError

    @staticmethod
    def encode_frames(vae: Any, frames: Float[Array, "1 F H W 3"]) -> Float[Array, "1 T h w C"]:
        """Of such: latents of frames in [-1, 1], in the denoiser's scale."""
        raise NotImplementedError

    @staticmethod
    def decode(
        vae: Any, latents: Float[Array, "B T h w C"], *, tiling: bool = False
    ) -> Float[Array, "B F H W 3"]:
        """Videos in [-1, 1], float32, of latents in the denoiser's scale; `tiling` as the
        autoencoder's."""
        videos = vae.decode(vae.unscale(latents), tiling=tiling)
        return jnp.clip(videos.astype(jnp.float32), -1, 1)
