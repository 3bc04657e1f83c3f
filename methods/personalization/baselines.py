"""What ClassDiffusion is compared with: the same step under other settings."""

import dataclasses
from typing import Literal

from ..settings import fixed
from .class_diffusion import ClassDiffusionConfig


@dataclasses.dataclass(frozen=True)
class CustomDiffusionConfig(ClassDiffusionConfig):
    """Custom Diffusion (Kumari et al. 2023, arXiv 2212.04488): no semantic preservation loss.

    Its prior preservation takes class images, which the model draws where a concept has none;
    `prior_weight=0` does without.
    """

    spl_weight: float = fixed(0.0)
    prior_weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class DreamBoothConfig(ClassDiffusionConfig):
    """DreamBooth (Ruiz et al. 2023, arXiv 2208.12242): all of the UNet, and a rare identifier.

    The identifier is the new token, whose embedding stays that of the rare word. Prior preservation
    takes class images, which the model draws where a concept has none; `prior_weight=0` does
    without.
    """

    steps: int = 800
    learning_rate: float = 5e-6
    scale_lr: bool = False
    trained: Literal["crossattn_kv", "crossattn", "unet", "nothing"] = fixed("unet")
    train_tokens: bool = fixed(False)
    prompt: str = "a photo of a {token} {word}"
    spl_weight: float = fixed(0.0)
    prior_weight: float = 1.0
    augment: bool = False
    flip: bool = False
    center_crop: bool = True


@dataclasses.dataclass(frozen=True)
class TextualInversionConfig(ClassDiffusionConfig):
    """Textual inversion (Gal et al. 2023, arXiv 2208.01618): the new embeddings alone.

    A token takes the class word's place in the prompt and starts from its embedding.
    """

    steps: int = 3000
    batch_size: int = 4
    learning_rate: float = 5e-4
    trained: Literal["crossattn_kv", "crossattn", "unet", "nothing"] = fixed("nothing")
    train_tokens: bool = fixed(True)
    initialize: Literal["rare", "class"] = "class"
    prompt: str = "a photo of a {token}"
    spl_weight: float = fixed(0.0)
    prior_weight: float = fixed(0.0)
    augment: bool = False
    center_crop: bool = True
