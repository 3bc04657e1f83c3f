"""Qwen3 (Yang et al. 2025, arXiv 2505.09388) as a text encoder: FLUX.2-klein reads its layers.

Attribute paths are those of transformers' state dicts, behind `model.` in a `Qwen3ForCausalLM`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from .layers.decoder import DecoderConfig, DecoderModel


@dataclasses.dataclass(frozen=True)
class Qwen3Config(DecoderConfig):
    """Settings of `Qwen3Model`; the defaults are Qwen3-4B's, FLUX.2-klein 4B's text encoder."""

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_key_value_heads: int = 8
    head_dim: int = 128
    rope_theta: float = 1e6

    MODEL_TYPE: ClassVar[str | None] = "qwen3"
    FIXED: ClassVar[Mapping[str, Any]] = {**DecoderConfig.FIXED, "use_sliding_window": False}

    @classmethod
    def qwen3_8b(cls) -> "Qwen3Config":
        """The published Qwen3-8B, FLUX.2-klein 9B's text encoder."""
        return cls(hidden_size=4096, intermediate_size=12288)


class Qwen3Model(DecoderModel):
    """Qwen3 up to the last hidden states that are read, by default FLUX.2-klein's three."""

    QK_NORM: ClassVar[bool] = True
    READ: ClassVar[tuple[int, ...]] = (9, 18, 27)
    config: Qwen3Config
    config_class = Qwen3Config
    pytorch_class = "Qwen3Model"


class Qwen3ForCausalLM(Qwen3Model):
    """`Qwen3Model` as FLUX.2-klein's folders have it, beside the head of a language model."""

    pytorch_class = "Qwen3ForCausalLM"
    pytorch_prefix = "model."
