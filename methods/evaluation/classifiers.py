"""Classifiers of what an image shows: any CLIP, without training.

A classifier is asked about one phrase per image.  It has to be independent of the model that it
judges; the erased model's own text encoder is not.
"""

import functools
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, UInt8

from .instruments import Clip
from .statistics import unit

Images = UInt8[np.ndarray, "N H W 3"]

# Phrases around a label, whose text features are averaged (Radford et al. 2021, section 3.1.4).
_LABEL_TEMPLATES = ("{}", "a photo of {}", "a picture of {}")
# What an image may show when it shows none of the phrases; each competes on its own.
_SOMETHING_ELSE = ("something else", "an object", "a person", "a scene", "a blank picture")


@runtime_checkable
class Classifier(Protocol):
    """What an evaluation asks of a classifier."""

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
        if unknown := sorted(set(phrases) - set(self.phrases)):
            raise ValueError(
                f"this classifier tells {list(self.phrases)} apart, asked for {unknown}: add them "
                "with `among`."
            )
        nearest = (unit(self.clip.features(images)) @ self._labels.T).argmax(-1)
        return nearest == np.asarray([self.phrases.index(phrase) for phrase in phrases], np.intp)

    def features(self, images: Images) -> Float[np.ndarray, "N P"]:
        return self.clip.features(images)
