"""Llama (Touvron et al. 2023, arXiv 2302.13971; Llama 3: 2407.21783) as a text encoder.

HunyuanVideo reads the third-last hidden states of the language model in llava-llama-3-8b, so that
its last two layers and its final norm are never built.  Attribute paths are those of transformers'
state dicts, behind `model.` in a `LlamaForCausalLM`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from .layers.decoder import DecoderConfig, DecoderModel


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """Settings of `LlamaModel`; the defaults are transformers'."""

    MODEL_TYPE: ClassVar[str | None] = "llama"
    FIXED: ClassVar[Mapping[str, Any]] = {**DecoderConfig.FIXED, "mlp_bias": False}

    @classmethod
    def hunyuan_video(cls) -> "LlamaConfig":
        """HunyuanVideo's text encoder: Llama 3 8B with 64 more tokens, of which LLaVA uses some."""
        return cls(
            vocab_size=128320,
            intermediate_size=14336,
            num_key_value_heads=8,
            rms_norm_eps=1e-5,
            rope_theta=5e5,
        )


class LlamaModel(DecoderModel):
    """Llama up to the last hidden states that are read, by default HunyuanVideo's third-last."""

    READ: ClassVar[tuple[int, ...]] = (-3,)
    config: LlamaConfig
    config_class = LlamaConfig
    pytorch_class = "LlamaModel"


class LlamaForCausalLM(LlamaModel):
    """`LlamaModel` beside the head of a language model."""

    pytorch_class = "LlamaForCausalLM"
    pytorch_prefix = "model."
