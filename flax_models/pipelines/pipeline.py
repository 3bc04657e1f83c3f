"""`Pipeline`: what every family of models that draw answers, and most of them answer alike."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ..pretrained import Pretrained
from .guidance import Predictor, classifier_free

LONGEST_SIDE = 1 << 16  # pixels of an image; attention over more would take days


class Pipeline(Pretrained):
    """Parts of a text-to-image model; how they sample and train is in `conceptax.methods`.

    A family is a dataclass of its parts.

    Attributes:
      vae: the autoencoder, as other models an NNX module, or None where a subset was loaded.
      scheduler_config: the parsed `scheduler_config.json`.
      model_index: the parsed `model_index.json`, kept so that a saved folder names the same parts.
      carried: parts that nothing here computes with, such as the safety checker -> the folder (or
        file) that a saved pipeline gets an unchanged copy of.

    Class attributes:
      * `MODELS`, `TOKENIZERS`: the parts that are one or the other; `OPTIONAL`: those of them that
        a whole pipeline may lack.
      * `DENOISER`: which of the models is sampled; `DENOISER_2`: another that takes over from it.
      * `TEXT_TOWERS`: parts that read text -> where in `prompt_encoder` their CLIP text model is.
      * `NOT_CARRIED`: parts of diffusers' pipeline that this one does without, unless carried.
      * `SIZES`: how many numbers tell the denoiser of an image's size (`for_size`).
      * `PATCH`: latents along each side of a token.
      * `SHIFT`: of a flow whose shift follows the image's size, how: "linear", between two sizes
        that the schedule names, or "empirical", fitted for FLUX.2.
      * `LEARNT_GUIDANCE`: whether the denoiser is told the strength of guidance, and asked without
        the prompt on top of that only (`guidance.told`).
    """

    vae: Any
    scheduler_config: Mapping[str, Any]
    model_index: Mapping[str, Any]
    carried: Mapping[str, Path]

    MODELS: ClassVar[tuple[str, ...]]
    TOKENIZERS: ClassVar[tuple[str, ...]]
    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    DENOISER: ClassVar[str]
    DENOISER_2: ClassVar[str | None] = None
    TEXT_TOWERS: ClassVar[Mapping[str, str]] = {}
    NOT_CARRIED: ClassVar[tuple[str, ...]] = ()
    SIZES: ClassVar[int] = 0
    PATCH: ClassVar[int] = 1
    SHIFT: ClassVar[str] = "linear"
    LEARNT_GUIDANCE: ClassVar[bool] = False

    force_zeros_for_empty_prompt: ClassVar[bool] = False  # of SDXL, where its folder says so

    @property
    def denoiser(self) -> Any:
        """The model that is sampled."""
        return getattr(self, self.DENOISER)

    @property
    def denoisers(self) -> tuple[Any, ...]:
        """That model, and the one that takes over from it, if there is one."""
        second = None if self.DENOISER_2 is None else getattr(self, self.DENOISER_2)
        return (self.denoiser,) if second is None else (self.denoiser, second)

    def steps_of(self, timesteps: Float[np.ndarray, " n"] | Int[np.ndarray, " n"]) -> Sequence[int]:
        """How many steps of a run each of the `denoisers` takes, in their order."""
        return (len(timesteps),)

    @property
    def defaults(self) -> tuple[int, float | tuple[float, ...]]:
        """Steps and guidance that images are drawn with unless told otherwise.

        Guidance may be one for each of the `denoisers`.
        """
        return 50, 7.5

    # ---- prompts ----

    @property
    def prompt_encoder(self) -> Any:
        """What turns token ids into what the denoiser reads, one module; None without its parts."""
        raise NotImplementedError

    def tokenize(self, prompts: Sequence[str]) -> Any:
        """Token ids of N prompts, as `encode` takes them: arrays [N, ...]; overlong ones are told
        of."""
        raise NotImplementedError

    def checked_token_ids(self, token_ids: Int[np.ndarray, "N L"]) -> Int[np.ndarray, "N L"]:
        """Token ids that stand for prompts, int32.

        Raises:
          ValueError: they are none of this pipeline, or it has several tokenizers of its own kinds.
        """
        del token_ids
        raise ValueError(f"{type(self).__name__} takes prompts as texts, not as token ids.")

    @staticmethod
    def encode(prompt_encoder: Any, token_ids: Any) -> Any:
        """What the denoiser is told: of the `prompt_encoder` and N prompts, arrays [N, ...]."""
        return prompt_encoder(token_ids).condition

    def guides(self, guidance_scale: float) -> bool:
        """Whether the denoiser is also asked without the prompt, or with a negative one."""
        return guidance_scale > 1 and not self.LEARNT_GUIDANCE

    @staticmethod
    def for_size(
        condition: Any, height: int, width: int, sizes: Float[Array, " S"] | None = None
    ) -> Any:
        """A condition for images of a size in pixels, of which most denoisers are not told."""
        del height, width, sizes
        return condition

    def given(self, keys: Key[Array, " B"], *, fps: int | None, known: Any) -> Any:
        """What else the denoiser is told of B images or videos, arrays [B, ...], or None.

        Args:
          keys: one for each, of what is random in it.
          fps: frames per second that were asked for.
          known: what is known of a video's first frames, for families that go on from such.

        Raises:
          ValueError: it is told of no frame rate.
        """
        del keys, known
        if fps is not None:
            raise ValueError(
                f"{type(self).__name__} is told of no frame rate: leave out fps={fps}."
            )
        return None

    @staticmethod
    def with_given(condition: Any, given: Any) -> Any:
        """A condition with what `given` made."""
        del given
        return condition

    @staticmethod
    def without_text(condition: Any) -> Any:
        """Zeros in place of what a condition says of texts."""
        return jax.tree.map(jnp.zeros_like, condition)

    # ---- latents ----

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Height, width and channels of the latents that the denoiser was made for.

        Raises:
          ValueError: it denoises something other than latents.
        """
        raise NotImplementedError

    def latent_shape_for(
        self, height: int | None = None, width: int | None = None
    ) -> tuple[int, ...]:
        """That of the latents of images of a size in pixels; by default the denoiser's own.

        Raises:
          ValueError: not a positive multiple of a token's side, or too large.
        """
        factor = self.vae.config.downsampling
        *own, channels = self.latent_shape[-3:]
        sides = []
        for name, size, default in zip(("height", "width"), (height, width), own, strict=True):
            token = factor * self.PATCH
            if size is not None and (not 1 <= size <= LONGEST_SIDE or size % token):
                raise ValueError(
                    f"{name}={size} must be a positive multiple of {token} pixels, at most "
                    f"{LONGEST_SIDE}."
                )
            sides.append(default if size is None else size // factor)
        return sides[0], sides[1], channels

    def token_layout(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens along each dimension of latents of a shape [h, w, C] or [T, h, w, C]."""
        *times, rows, columns, _ = shape
        return (*times, rows // self.PATCH, columns // self.PATCH)

    @staticmethod
    def predictor(
        denoiser: Any, condition: Any, negative: Any, guidance_scale: Float[Array, ""] | float
    ) -> Predictor:
        """(latents, timestep) -> the denoiser's prediction with guidance (`classifier_free`)."""
        return classifier_free(denoiser, condition, negative, guidance_scale)

    @staticmethod
    def decode(
        vae: Any, latents: Float[Array, "B *F h w C"], *, tiling: bool = False
    ) -> Float[Array, "B *F H W 3"]:
        """Images in [-1, 1], float32, of latents in the denoiser's scale; of videos frame by frame.

        `tiling` is that of `AutoencoderKL.decode`.
        """

        def decode(latents: Array) -> Array:
            images = vae.decode(vae.unscale(latents), tiling=tiling)
            return jnp.clip(images.astype(jnp.float32), -1, 1)

        if latents.ndim == 4:
            return decode(latents)
        return jax.lax.map(decode, latents.swapaxes(0, 1)).swapaxes(0, 1)

    @property
    def data_scale(self) -> float:
        """What the denoiser's latents are divided by before they are decoded."""
        return 1.0

    # ---- times ----

    @property
    def schedule_config(self) -> Mapping[str, Any]:
        """The scheduler's settings, as diffusers' pipeline of this name samples with them."""
        return self.scheduler_config

    def flow_sigmas(self, steps: int) -> Float[np.ndarray, " steps"] | None:
        """Of a flow, the noise levels before any shift; None for the schedule's own."""
        del steps
        return None
