"""Wan 2.1 and 2.2 (Alibaba 2025, arXiv 2503.20314): a video transformer on a flow, told texts by
UMT5.

Wan 2.2's larger model is two of them: one for high noise, and one that takes over below a boundary.
"""

import dataclasses
import html
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Array, Float, Int

from ..autoencoder_kl_wan import AutoencoderKLWan
from ..t5 import UMT5EncoderModel
from ..wan_transformer_3d import WanTransformer3DModel
from .tokenizers import masked_tokenize
from .video import PaddedTextEncoder, VideoPipeline, VideoSize


def cleaned(prompt: str) -> str:
    """A prompt as Wan was trained on it: entities of HTML and runs of white space resolved, and
    what the package ftfy repairs, where that is installed."""
    if importlib.util.find_spec("ftfy") is not None:
        import ftfy  # type: ignore[import-not-found]

        prompt = ftfy.fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


@dataclasses.dataclass
class WanPipeline(VideoPipeline):
    """Parts of a Wan model, 2.1 or 2.2, that draws videos from texts.

    Attributes:
      transformer, vae, text_encoder: NNX modules, or None where a subset was loaded.
      tokenizer: UMT5's.
      scheduler_config, model_index, carried: as every `Pipeline` has them; the index also holds the
        `boundary_ratio` of noise below which `transformer_2` takes over.
      transformer_2: Wan 2.2's for low noise, or None.
      max_sequence_length: tokens that UMT5 reads, padding included.
    """

    transformer: WanTransformer3DModel | Any
    vae: AutoencoderKLWan | Any
    text_encoder: UMT5EncoderModel | Any
    tokenizer: Any
    scheduler_config: Mapping[str, Any]
    model_index: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    carried: Mapping[str, Path] = dataclasses.field(default_factory=dict, kw_only=True)
    transformer_2: WanTransformer3DModel | Any = dataclasses.field(default=None, kw_only=True)
    max_sequence_length: int = dataclasses.field(default=512, kw_only=True)

    MODELS: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder", "transformer_2")
    TOKENIZERS: ClassVar[tuple[str, ...]] = ("tokenizer",)
    OPTIONAL: ClassVar[tuple[str, ...]] = ("transformer_2",)
    DENOISER_2: ClassVar[str | None] = "transformer_2"

    @property
    def boundary_ratio(self) -> float | None:
        """Share of the training timesteps below which `transformer_2` is asked; None for never."""
        return self.model_index.get("boundary_ratio")

    @property
    def defaults(self) -> tuple[int, float | tuple[float, ...]]:
        """Steps and guidance: 50 and 5; of the pair 40, and 4 and 3."""
        return (50, 5.0) if self.boundary_ratio is None else (40, (4.0, 3.0))

    @property
    def video_size(self) -> VideoSize:
        """5 s of 480 x 832 pixels; of 720 x 1280 for the pair, of 704 x 1280 for the model of 5
        billion parameters."""
        if self.model_index.get("expand_timesteps"):
            return VideoSize(121, 704, 1280, 24)
        return VideoSize(81, *((480, 832) if self.boundary_ratio is None else (720, 1280)), 16)

    @property
    def denoisers(self) -> tuple[Any, ...]:
        """`transformer`, and `transformer_2` where there is a boundary between them.

        Raises:
          ValueError: there is a boundary, and nothing beyond it.
        """
        if self.boundary_ratio is None:
            return (self.transformer,)
        if self.transformer_2 is None:
            raise ValueError(
                "Sampling needs the pipeline's transformer_2, which was not loaded: its "
                f"boundary_ratio={self.boundary_ratio} says that it draws at low noise."
            )
        return self.transformer, self.transformer_2

    def steps_of(self, timesteps: Float[np.ndarray, " n"] | Int[np.ndarray, " n"]) -> Sequence[int]:
        """Steps at or above the boundary, and those below."""
        if self.boundary_ratio is None:
            return super().steps_of(timesteps)
        trained = self.scheduler_config.get("num_train_timesteps", 1000)
        high = int((timesteps >= self.boundary_ratio * trained).sum())
        return high, len(timesteps) - high

    @property
    def prompt_encoder(self) -> PaddedTextEncoder | None:
        """The text encoder, behind which padding becomes zeros; None without it."""
        return None if self.text_encoder is None else PaddedTextEncoder(self.text_encoder)

    def tokenize(
        self, prompts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "N A"], Int[np.ndarray, "N A"]]:
        """Token ids of cleaned prompts, and which of them are no padding."""
        prompts = [cleaned(prompt) for prompt in prompts]
        return masked_tokenize(self.tokenizer, prompts, self.max_sequence_length)

    @staticmethod
    def encode(prompt_encoder: PaddedTextEncoder, token_ids: Any) -> Float[Array, "N A E"]:
        """States of N prompts' token ids."""
        return prompt_encoder(token_ids)
