"""What images are worth: features of models that look at them, and scores from these.

Clip(model, tokenizer).features(images)  # and Dino, Blip
text_alignment(image_features, text_features) -> [N]  # CLIP-T, BLIP-ITC, BLIP2-T
image_similarity(image_features, reference_features) -> [N]  # CLIP-I, DINO-I
"""

from .instruments import Blip, Clip, Dino
from .personalization import Instruments, Subject, measure, without_tokens
from .preprocessing import Preprocessing
from .scores import (
    clip_score,
    frame_consistency,
    image_similarity,
    mean_interval,
    mutual_similarity,
    text_alignment,
)

__all__ = [
    "Blip",
    "Clip",
    "Dino",
    "Instruments",
    "Preprocessing",
    "Subject",
    "clip_score",
    "frame_consistency",
    "image_similarity",
    "mean_interval",
    "measure",
    "mutual_similarity",
    "text_alignment",
    "without_tokens",
]
