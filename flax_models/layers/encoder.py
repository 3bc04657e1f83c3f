"""What the transformers that encode texts and images share: CLIP, BLIP, BLIP-2, DINOv2."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float

from ..configs import ModelConfig
from .linear import linear

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig(ModelConfig):
    """Settings that all of them have."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12

    STRICT: ClassVar[bool] = False

    def __post_init__(self):
        self.require_positive("hidden_size", "num_hidden_layers", "num_attention_heads")
        self.require_one_of("hidden_act", ACTIVATIONS)
        self.require(
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size {self.hidden_size} does not divide into "
            f"{self.num_attention_heads} heads.",
        )


class MLP(nnx.Module):
    """Two-layer perceptron with the activation of a config."""

    def __init__(self, config: EncoderConfig, hidden: int, **init):
        self.activation = config.hidden_act
        self.fc1 = linear(config.hidden_size, hidden, **init)
        self.fc2 = linear(hidden, config.hidden_size, **init)

    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


def layer_norm(config: EncoderConfig, **init) -> nnx.LayerNorm:
    """A layer norm of an encoder's width."""
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, **init
    )
