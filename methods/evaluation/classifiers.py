"""Classifiers of what an image shows: any CLIP, without training.

A classifier is asked about one phrase per image.  It has to be independent of the model that it
judges; the erased model's own text encoder is not.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, UInt8

from .instruments import Clip
from .statistics import unit

Images = UInt8[np.ndarray, "N H W 3"]

# Phrases around a label, whose text features are averaged (Radford et al. 2021, section 3.1.4).
_LABEL_TEMPLATES = ("{}", "a photo of {}", "a picture of {}")
# What an image may show when it shows none of the phrases; each competes on its own.
_SOMETHING_ELSE = ("something else", "an object", "a person", "a scene", "a blank picture")


class Said(NamedTuple):
    """What a classifier says of N images, each of which it is asked about a phrase.

    Attributes:
      hits: whether each shows its phrase.
      words: what each shows, in the classifier's words.
      confidences: the probability that it gives that word, among those that it chooses from.
    """

    hits: Bool[np.ndarray, " N"]
    words: tuple[str, ...]
    confidences: Float[np.ndarray, " N"]


@runtime_checkable
class Classifier(Protocol):
    """What an evaluation asks of a classifier.

    One that also has `says(images, phrases)`, which gives a `Said`, is asked by that in place of
    `shows`, and reports tell its word and its confidence on each image.
    """

    @property
    def record(self) -> dict[str, Any]:
        """What it is, and how good where that was measured; plain values."""
        ...

    @property
    def features_title(self) -> str:
        """What `features` are, for people."""
        ...

    def among(self, phrases: Sequence[str]) -> "Classifier":
        """The classifier that tells these phrases apart.

        Raises:
          ValueError: there is one that it cannot judge.
        """
        ...

    def shows(self, images: Images, phrases: Sequence[str]) -> Bool[np.ndarray, " N"]:
        """Whether each image shows its phrase."""
        ...

    def features(self, images: Images) -> Float[np.ndarray, "N F"]:
        """What it sees in images, before it names anything."""
        ...


class ClipClassifier:
    """CLIP's nearest phrase of a closed set, in which "something else" takes part.

    Args:
      clip: the model; an image shows a phrase if none of the others is nearer to it.
      phrases: the closed set; `among` sets it.
    """

    def __init__(self, clip: Clip, phrases: Sequence[str] = ()):
        self.clip = clip
        self.phrases = tuple(dict.fromkeys(phrases))

    @property
    def record(self) -> dict[str, Any]:
        return {
            "kind": "zero-shot CLIP",
            "model": self.clip.name,
            "phrases": list(self.phrases),
            "something_else": list(_SOMETHING_ELSE),
            "templates": list(_LABEL_TEMPLATES),
        }

    @property
    def features_title(self) -> str:
        return self.clip.features_title

    def among(self, phrases: Sequence[str]) -> "ClipClassifier":
        return ClipClassifier(self.clip, phrases)

    @functools.cached_property
    def _labels(self) -> Float[np.ndarray, "K P"]:
        """One unit row per label: the phrases, then the others."""
        labels = (*self.phrases, *_SOMETHING_ELSE)
        texts = [template.format(label) for label in labels for template in _LABEL_TEMPLATES]
        each = unit(self.clip.text_features(texts))
        return unit(each.reshape(len(labels), len(_LABEL_TEMPLATES), -1).mean(1))

    def shows(self, images: Images, phrases: Sequence[str]) -> Bool[np.ndarray, " N"]:
        return self.says(images, phrases).hits

    def says(self, images: Images, phrases: Sequence[str]) -> Said:
        """The nearest label of each image, and how probable it is to this CLIP.

        Raises:
          ValueError: a phrase outside the closed set.
        """
        if unknown := sorted(set(phrases) - set(self.phrases)):
            raise ValueError(
                f"this classifier tells {list(self.phrases)} apart, asked for {unknown}: add them "
                "with `among`."
            )
        cosines = unit(self.clip.features(images)) @ self._labels.T
        nearest = cosines.argmax(-1)
        asked = np.asarray([self.phrases.index(phrase) for phrase in phrases], np.intp)
        words = [(*self.phrases, *_SOMETHING_ELSE)[label] for label in nearest]
        # Of the largest of a softmax: the others are e to the distance below it.
        below = self.clip.scale * (cosines - cosines.max(-1, keepdims=True))
        confidences = 1 / np.exp(below).sum(-1, dtype=np.float64)
        return Said(nearest == asked, tuple(words), confidences)

    def features(self, images: Images) -> Float[np.ndarray, "N P"]:
        return self.clip.features(images)
