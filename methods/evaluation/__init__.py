"""Metrics of images and of erasures, and the models that measure them.

evaluate(original, edited, ["three"], classifier, suites, EvaluationConfig()) -> Evaluation
measure(...)  # how well a personalized model draws its subject
Clip(model, tokenizer).features(images)  # and Dino, Blip
"""

from .classifiers import Classifier, ClipClassifier, Said
from .figures import Counted, Drawn, Evaluation, EvaluationConfig, evaluate, known_attacks
from .instruments import Blip, Clip, Dino, Inception
from .personalization import Instruments, Subject, measure, without_tokens
from .preprocessing import Preprocessing
from .statistics import (
    clip_score,
    frame_consistency,
    frechet_distance,
    image_similarity,
    mean_interval,
    mutual_similarity,
    text_alignment,
)
from .suites import Asked, Suites, phrase_suites, read_synonyms

__all__ = [
    "Asked",
    "Blip",
    "Classifier",
    "Clip",
    "ClipClassifier",
    "Counted",
    "Dino",
    "Drawn",
    "Evaluation",
    "EvaluationConfig",
    "Inception",
    "Instruments",
    "Preprocessing",
    "Said",
    "Subject",
    "Suites",
    "clip_score",
    "evaluate",
    "frame_consistency",
    "frechet_distance",
    "image_similarity",
    "known_attacks",
    "mean_interval",
    "measure",
    "mutual_similarity",
    "phrase_suites",
    "read_synonyms",
    "text_alignment",
    "without_tokens",
]
