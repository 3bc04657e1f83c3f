"""Cosmos-Predict1 from text to world (NVIDIA 2025, arXiv 2501.03575): a video transformer with
EDM's preconditioning, told texts by T5."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ..autoencoder_kl_cosmos import AutoencoderKLCosmos
from ..cosmos_transformer_3d import CosmosCondition, CosmosTransformer3DModel
from ..t5 import T5EncoderModel
from .guidance import Predictor, classifier_free
from .tokenizers import masked_tokenize
from .video import PaddedTextEncoder, VideoPipeline, VideoSize

EDM_CLASS = "EDMEulerScheduler"


@dataclasses.dataclass
class CosmosTextToWorldPipeline(VideoPipeline):
    """Parts of a Cosmos-Predict1 model that draws videos from texts.

    The checker of safety is not computed with, and carried along where a folder holds it.

    Attributes:
      transformer, vae, text_encoder: NNX modules, or None where a subset was loaded.
      tokenizer: T5's.
      scheduler_config, model_index, carried: as every `Pipeline` has them.
      max_sequence_length: tokens that T5 reads, padding included.
    """

    transformer: CosmosTransformer3DModel | Any
    vae: AutoencoderKLCosmos | Any
    text_encoder: T5EncoderModel | Any
    tokenizer: Any
    scheduler_config: Mapping[str, Any]
    model_index: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    carried: Mapping[str, Path] = dataclasses.field(default_factory=dict, kw_only=True)
    max_sequence_length: int = dataclasses.field(default=512, kw_only=True)

    MODELS: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder")
    TOKENIZERS: ClassVar[tuple[str, ...]] = ("tokenizer",)
    TAKES_FPS: ClassVar[bool] = True

    @property
    def defaults(self) -> tuple[int, float]:
        """36 steps, guidance 7 on top of the conditional model, as NVIDIA counts it."""
        return 36, 7.0

    @property
    def video_size(self) -> VideoSize:
        """4 s of 704 x 1280 pixels."""
        return VideoSize(121, 704, 1280, 30)

    @property
    def data_scale(self) -> float:
        """The standard deviation of what the transformer's latents are without noise."""
        return float(self.scheduler_config.get("sigma_data", 0.5))

    @property
    def schedule_config(self) -> Mapping[str, Any]:
        """The scheduler's settings.

        Raises:
          ValueError: they are not of EDM's steps, which Predict1's transformers were trained for.
        """
        kind = self.scheduler_config.get("_class_name")
        if kind != EDM_CLASS:
            raise ValueError(
                f"Cosmos-Predict1 is drawn with by the steps of an {EDM_CLASS}, received {kind}: "
                "Predict2, whose steps are others, is converted, but not drawn with."
            )
        return super().schedule_config

    @property
    def prompt_encoder(self) -> PaddedTextEncoder | None:
        """The text encoder, behind which padding becomes zeros; None without it."""
        return None if self.text_encoder is None else PaddedTextEncoder(self.text_encoder)

    def tokenize(
        self, prompts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "N A"], Int[np.ndarray, "N A"]]:
        """Token ids of prompts, and which of them are no padding."""
        return masked_tokenize(self.tokenizer, prompts, self.max_sequence_length)

    @staticmethod
    def encode(prompt_encoder: PaddedTextEncoder, token_ids: Any) -> Any:
        """Conditions of N prompts' token ids."""
        return CosmosCondition(prompt_encoder(token_ids))

    def given(self, keys: Key[Array, " B"], *, fps: int | None, known: Any) -> Any:
        """The frame rate, for which positions along time are."""
        del known
        rate = self.video_size.fps if fps is None else fps
        return {"fps": jnp.full((len(keys),), rate, jnp.float32)}

    @staticmethod
    def with_given(condition: Any, given: Any) -> Any:
        """A condition with the frame rate."""
        return condition._replace(fps=given["fps"])

    @staticmethod
    def predictor(
        denoiser: Any,
        condition: Any,
        negative: Any,
        guidance_scale: Float[Array, ""] | float,
    ) -> Predictor:
        """(scaled latents, timestep) -> the network's output, cond + g (cond − uncond)."""
        return classifier_free(denoiser, condition, negative, guidance_scale + 1)
