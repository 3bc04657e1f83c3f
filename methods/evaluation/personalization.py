"""Evaluation of personalized models: how well they draw their subject, and what was asked for.

*Subject fidelity*: CLIP-I and DINO-I, the similarity to photographs of the subject.  *Prompt
fidelity*: CLIP-T, BLIP-ITC and BLIP2-T, each named for the model that it runs (arXiv 2405.17532
reports the last and its authors' script runs the one before).
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from .instruments import Blip, Clip, Dino
from .preprocessing import Images
from .statistics import image_similarity, mean_interval, mutual_similarity, text_alignment

# Metric -> the instrument that it needs.
_TEXT = {"CLIP-T": "clip", "BLIP-ITC": "blip", "BLIP2-T": "blip_2"}
_SUBJECT = {"CLIP-I": "clip", "DINO-I": "dino"}


class Instruments(NamedTuple):
    """The models that measure; those that are None leave their metrics out."""

    clip: Clip | None = None
    dino: Dino | None = None
    blip: Blip | None = None
    blip_2: Blip | None = None


class Subject(NamedTuple):
    """A subject's name in records, and photographs of it."""

    name: str
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]]


def without_tokens(prompt: str) -> str:
    """A prompt without its new tokens, which no other model knows: `a <new1> dog` -> `a dog`."""
    return " ".join(re.sub(r"<[^<>\s]+>", " ", prompt).split())


def measure(
    images: Images, prompts: Sequence[str], subjects: Sequence[Subject], instruments: Instruments
) -> dict[str, Any]:
    """All metrics of images that were drawn from prompts.

    Args:
      images: uint8 [H, W, 3] each, at least two.
      prompts: of each image; new tokens in it are left out for the texts that it is compared with.
      subjects: what the images should show.
      instruments: at least one.

    Returns:
      "text": metric -> mean with interval; "subjects": name -> metric -> the same, and under
      "references" how similar the photographs are among themselves (where there are two or more);
      "prompts": prompt -> metric -> mean; "scores": metric -> one value per image, in which
      subjects' metrics are named "CLIP-I, name"; "models": instrument -> its name.

    Raises:
      ValueError: nothing to measure, no instrument, images or prompts of unequal number, or two
        subjects of one name.
    """
    if len(images) < 2:
        raise ValueError(f"an interval needs at least 2 images, received {len(images)}.")
    if len(prompts) != len(images):
        raise ValueError(f"{len(images)} images need as many prompts, received {len(prompts)}.")
    if not any(instruments):
        raise ValueError("pass at least one model that measures: a CLIP, a DINOv2 or a BLIP.")
    names = [subject.name for subject in subjects]
    if len(set(names)) < len(names):
        raise ValueError(f"every subject needs a name of its own, received {names}.")

    texts = [without_tokens(prompt) for prompt in prompts]
    unique = list(dict.fromkeys(texts))
    rows = [unique.index(text) for text in texts]
    eyes = {name: eye for name, eye in instruments._asdict().items() if eye is not None}
    seen = {name: eye.features(images) for name, eye in eyes.items()}
    scores: dict[str, Float[np.ndarray, " N"]] = {}
    for title, name in _TEXT.items():
        if name in eyes:
            scores[title] = text_alignment(seen[name], eyes[name].text_features(unique)[rows])
    of_text = {title: mean_interval(values) for title, values in scores.items()}
    of_subjects: dict[str, dict[str, Any]] = {name: {} for name in names}
    for title, name in _SUBJECT.items():
        for subject in subjects if name in eyes else ():
            references = eyes[name].features(subject.images)
            similar = scores[f"{title}, {subject.name}"] = image_similarity(seen[name], references)
            figure: dict[str, Any] = {**mean_interval(similar)}
            if len(references) > 1:
                figure["references"] = float(mutual_similarity(references).mean())
            of_subjects[subject.name][title] = figure
    of_prompts = {}
    for prompt in dict.fromkeys(prompts):
        own = [each == prompt for each in prompts]
        of_prompts[prompt] = {name: float(values[own].mean()) for name, values in scores.items()}
    return {
        "text": of_text,
        "subjects": of_subjects,
        "prompts": of_prompts,
        "scores": {name: values.astype(float).tolist() for name, values in scores.items()},
        "models": {name: eye.name for name, eye in eyes.items()},
    }
