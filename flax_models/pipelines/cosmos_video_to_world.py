"""Cosmos-Predict1 from video to world (NVIDIA 2025, arXiv 2501.03575): a world that goes on from
the frames of an image or a video."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, UInt8
from PIL import Image

from ..cosmos_transformer_3d import CosmosCondition
from .cosmos_text_to_world import CosmosTextToWorldPipeline
from .guidance import Predictor, classifier_free

_NOISE = 1e-3  # standard deviation of what known latents are given, as in training


class KnownFrames(NamedTuple):
    """A text, and the latent frames that a video begins with.

    Attributes:
      text: what the transformer is told.
      latents: [B, T, h, w, C] known ones, in its scale; of other frames anything.
      noised: the same with a little noise, as the transformer sees them.
      deviation: [B] that of the latents, without noise.
    """

    text: CosmosCondition
    latents: Float[Array, "B T h w C"]
    noised: Float[Array, "B T h w C"]
    deviation: Float[Array, " B"]


@dataclasses.dataclass
class CosmosVideoToWorldPipeline(CosmosTextToWorldPipeline):
    """Parts of a Cosmos-Predict1 model that draws what follows an image, or frames of a video."""

    TAKES_FRAMES: ClassVar[bool] = True

    @property
    def latent_channels(self) -> int:
        """Those that it predicts: it reads one more, which tells known frames.

        Raises:
          ValueError: it reads something else.
        """
        config = self.denoiser.config
        if config.in_channels != config.out_channels + 1:
            raise ValueError(
                "A transformer from video to world reads latents and one channel that tells which "
                f"are known; received in_channels={config.in_channels} and out_channels="
                f"{config.out_channels}."
            )
        return config.out_channels

    def conditioning_frames(
        self, frames: UInt8[np.ndarray, "K Y X 3"], times: int, size: tuple[int, int]
    ) -> tuple[Float[np.ndarray, "1 F H W 3"], int]:
        """Frames in [-1, 1] of that size, gray ones behind them, and the latent frames they fill.

        Of more frames than a video has the last are taken, and all of it is known.
        """
        each = self.vae.config.temporal_downsampling
        total = (times - 1) * each + 1
        frames, height, width = frames[-total:], *size
        sized = [
            np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))
            for frame in frames
        ]
        video = np.zeros((1, total, height, width, 3), np.float32)
        video[0, : len(sized)] = np.stack(sized).astype(np.float32) / 127.5 - 1
        return video, (len(sized) - 1) // each + 1

    @staticmethod
    def encode_frames(vae: Any, frames: Float[Array, "1 F H W 3"]) -> Float[Array, "1 T h w C"]:
        """Latents of frames, without the scale of `data_scale`."""
        return vae.scale(vae.encode(frames)[0]).astype(jnp.float32)

    def given(self, keys: Key[Array, " B"], *, fps: int | None, known: Any) -> Any:
        """The frame rate, and of the known frames mask, latents and noised latents.

        Their noise is drawn once for a video, where NVIDIA draws it anew in every step.
        """
        latents, count = known
        shape = (len(keys), *latents.shape[1:])
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1 << 30), shape[1:]))
        latents = jnp.broadcast_to(latents, shape)
        mask = jnp.broadcast_to(jnp.arange(shape[1]) < count, shape[:2])
        return super().given(keys, fps=fps, known=None) | {
            "mask": mask,
            "latents": latents,
            "noised": latents + _NOISE * noise(keys),
            "deviation": jnp.full((len(keys),), self.data_scale, jnp.float32),
        }

    @staticmethod
    def with_given(condition: Any, given: Any) -> KnownFrames:
        """A condition with what `given` made."""
        text = condition._replace(fps=given["fps"], mask=given["mask"])
        return KnownFrames(text, *(given[name] for name in ("latents", "noised", "deviation")))

    @staticmethod
    def predictor(
        denoiser: Any,
        condition: KnownFrames,
        negative: KnownFrames | None,
        guidance_scale: Float[Array, ""] | float,
    ) -> Predictor:
        """(scaled latents, timestep) -> the network's output, cond + g (cond − uncond).

        At known frames the transformer sees them, and its output is what makes them of the latents.
        """
        without = None if negative is None else negative.text
        predict = classifier_free(denoiser, condition.text, without, guidance_scale + 1)
        assert condition.text.mask is not None
        is_known: Bool[Array, "B T 1 1 1"] = condition.text.mask[..., None, None, None]
        data = condition.deviation[:, None, None, None, None]

        def replaced(x: Array, timestep: Array) -> Array:
            sigma = jnp.exp(4 * timestep)
            known = is_known & (sigma > _NOISE)
            seen = jnp.where(known, condition.noised / jnp.hypot(_NOISE, data), x)
            wanted = condition.latents * jnp.hypot(sigma, data) - data**2 * x
            return jnp.where(known, wanted / (sigma * data), predict(seen, timestep))

        return replaced
