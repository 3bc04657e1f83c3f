"""HunyuanVideo (Tencent 2024, arXiv 2412.03603): a video transformer on a flow, told texts by Llama
and CLIP."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ..autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from ..clip import CLIPTextModel
from ..hunyuan_video_transformer_3d import HunyuanVideoTransformer3DModel
from ..layers.joint_attention import JointTextCondition
from ..llama import LlamaModel
from .guidance import Guidance, Predictor, told
from .tokenizers import context_length, masked_tokenize, tokenize
from .video import VideoPipeline, VideoSize

TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\n"
    "Describe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the "
    "objects.4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
_BEFORE = 95  # tokens of the template before the prompt, whose states the transformer is not told


class HunyuanVideoTextEncoders(nnx.Module):
    """Llama, of which the transformer reads the states of the prompt, and CLIP's pooled state."""

    def __init__(self, text_encoder: LlamaModel, text_encoder_2: CLIPTextModel):
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2

    def __call__(
        self, token_ids: tuple[Int[Array, "B A"], Int[Array, "B A"], Int[Array, "B L"]]
    ) -> JointTextCondition:
        """Conditions of Llama's token ids and their mask, and of CLIP's token ids."""
        ids, mask, second = token_ids
        states = self.text_encoder(ids, mask)[-1][:, _BEFORE:]
        pooled = self.text_encoder_2(second).pooled
        return JointTextCondition(states, pooled, None, mask[:, _BEFORE:] != 0)


@dataclasses.dataclass
class HunyuanVideoPipeline(VideoPipeline):
    """Parts of HunyuanVideo, which learnt its guidance and is told how strong it is to be.

    Attributes:
      transformer, vae, text_encoder, text_encoder_2: NNX modules, or None where a subset was
        loaded.
      tokenizer: Llama's.
      tokenizer_2: a `transformers.CLIPTokenizer`.
      scheduler_config, model_index, carried: as every `Pipeline` has them.
      max_sequence_length: tokens of a prompt, padding included, behind the template's.
    """

    transformer: HunyuanVideoTransformer3DModel | Any
    vae: AutoencoderKLHunyuanVideo | Any
    text_encoder: LlamaModel | Any
    text_encoder_2: CLIPTextModel | Any
    tokenizer: Any
    tokenizer_2: Any
    scheduler_config: Mapping[str, Any]
    model_index: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    carried: Mapping[str, Path] = dataclasses.field(default_factory=dict, kw_only=True)
    max_sequence_length: int = dataclasses.field(default=256, kw_only=True)

    MODELS: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder", "text_encoder_2")
    TOKENIZERS: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")
    LEARNT_GUIDANCE: ClassVar[bool] = True

    @property
    def defaults(self) -> tuple[int, float]:
        """50 steps, guidance 6."""
        return 50, 6.0

    @property
    def video_size(self) -> VideoSize:
        """5 s of 720 x 1280 pixels."""
        return VideoSize(129, 720, 1280, 24)

    @property
    def prompt_encoder(self) -> HunyuanVideoTextEncoders | None:
        """Both text encoders as one module; None without them."""
        if self.text_encoder is None or self.text_encoder_2 is None:
            return None
        return HunyuanVideoTextEncoders(self.text_encoder, self.text_encoder_2)

    def tokenize(
        self, prompts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "N A"], Int[np.ndarray, "N A"], Int[np.ndarray, "N L"]]:
        """Token ids of prompts in the template and which of them are no padding; those of CLIP."""
        texts = [TEMPLATE.replace("{}", prompt) for prompt in prompts]
        length = context_length(
            self.tokenizer_2, self.text_encoder_2.config.max_position_embeddings
        )
        return (
            *masked_tokenize(
                self.tokenizer, prompts, _BEFORE + self.max_sequence_length, texts=texts
            ),
            tokenize(self.tokenizer_2, prompts, max_length=length),
        )

    @staticmethod
    def encode(prompt_encoder: HunyuanVideoTextEncoders, token_ids: Any) -> JointTextCondition:
        """Conditions of N prompts' token ids."""
        return prompt_encoder(token_ids)

    @staticmethod
    def predictor(
        denoiser: HunyuanVideoTransformer3DModel,
        condition: JointTextCondition,
        negative: JointTextCondition | None,
        guidance_scale: Guidance,
    ) -> Predictor:
        """(latents, timestep) -> velocity, told the guidance."""
        return told(denoiser, condition, negative, guidance_scale)

    def flow_sigmas(self, steps: int) -> Float[np.ndarray, " steps"]:
        """From 1 down, in steps of 1 / steps; 0 is left out."""
        return np.linspace(1.0, 0.0, steps + 1)[:-1]
