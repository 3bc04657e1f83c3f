"""An erasure from the glyphs world: its judge as a classifier, and its prompts as suites."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ..evaluation.classifiers import Images, Said
from ..evaluation.composition import Composed
from ..evaluation.suites import Asked, Suites, choose
from .captions import COLORS, DIGIT_NAMES, TEXTURES, Prompt, prompts
from .judge import ATTRIBUTES, Judge
from .quality import attribute_called

_DIGITS = [next(iter(names)) for names in DIGIT_NAMES]
_WORDS = {"digit": _DIGITS, "color": COLORS, "texture": TEXTURES}


class GlyphsClassifier:
    """The judge of the glyphs world: an image shows the digit, color and texture it names."""

    features_title = "the glyphs judge's hidden layer"

    def __init__(self, judge: Judge):
        self.judge = judge

    @property
    def record(self) -> dict[str, Any]:
        return {"kind": "the glyphs judge", "measured": self.judge.measured}

    def among(self, phrases: Sequence[str]) -> "GlyphsClassifier":
        for phrase in phrases:
            attribute_called(phrase)
        return self

    def shows(self, images: Images, phrases: Sequence[str]) -> Bool[np.ndarray, " N"]:
        return self.says(images, phrases).hits

    def says(self, images: Images, phrases: Sequence[str]) -> Said:
        """The digit, color or texture of each image, whichever of them its phrase is about.

        Raises:
          ValueError: a phrase that is nothing of the glyphs world.
        """
        found, hits, words, confidences = self.judge(images), [], [], []
        for n, (attribute, value) in enumerate(map(attribute_called, phrases)):
            seen = int(found[attribute][n])
            hits.append(seen == value)
            words.append(_WORDS[attribute][seen])
            confidences.append(found[f"{attribute}_probabilities"][n, seen])
        return Said(np.asarray(hits, bool), tuple(words), np.asarray(confidences, np.float64))

    def features(self, images: Images) -> Float[np.ndarray, "N F"]:
        return self.judge.features(images)


def glyphs_suites(concepts: Sequence[str], images: int, seed: int) -> Suites:
    """Prompts of the glyphs world, in its held-out wordings.

    A digit's synonyms are its other names; colors and textures have none.  Neighbors are the
    other values of the attributes that concepts are of (the other digits, for "three"); distant are
    the values of the other attributes.  Retained prompts ask for no erased thing by any name.

    Args:
      concepts: names of digits, colors or textures.
      images: prompts of each kind, for each concept or for each retained group.
      seed: of the choice.

    Raises:
      ValueError: a concept that is not of that world, or nothing left to retain.
    """
    meant = {concept: attribute_called(concept) for concept in concepts}
    gone = set(meant.values())

    # what of the erased each prompt asks for
    asks = {
        prompt: {each for each in gone if getattr(prompt, each[0]) == each[1]}
        for prompt in prompts()
    }
    plain, synonyms = {}, {}
    for concept, meaning in meant.items():
        those = [prompt for prompt, asked in asks.items() if asked == {meaning}]
        if meaning[0] == "digit":
            others = [Asked(p.text, p.name, concept) for p in those if p.name not in concepts]
            if others:
                synonyms[concept] = choose(others, images, seed, lambda asked: asked.word)
            those = [each for each in those if each.name == concept]
        mine = [Asked(each.text, concept, concept) for each in those]
        plain[concept] = choose(mine, images, seed, lambda asked: asked.word)

    kinds = {attribute for attribute, _ in gone}
    clean = [prompt for prompt, asked in asks.items() if not asked]
    retained = {}
    for group, among in (("neighbors", kinds), ("distant", set(ATTRIBUTES) - kinds)):
        candidates = [_about(each, p) for each in ATTRIBUTES if each in among for p in clean]
        if candidates:
            retained[group] = choose(candidates, images, seed, lambda asked: asked.phrase)
    if not retained:
        raise ValueError(f"erasing {list(concepts)} leaves nothing of the glyphs world to retain.")
    return Suites(plain, synonyms, retained)


def glyphs_compositions(concepts: Sequence[str], images: int, seed: int) -> list[Composed]:
    """Prompts for a digit, a color and a texture together, none of which was erased.

    Args:
      concepts: what was erased, by names of that world.
      images: prompts in all; digits are equally frequent.
      seed: of the choice.

    Raises:
      ValueError: a concept that is not of that world.
    """
    gone = [attribute_called(concept) for concept in concepts]
    found = []
    for each in prompts():
        if all(getattr(each, attribute) != value for attribute, value in gone):
            parts = tuple(_WORDS[name][getattr(each, name)] for name in ATTRIBUTES)
            found.append(Composed(each.text, "attributes", (), parts))
    return choose(found, images, seed, lambda asked: asked.parts[0])


def _about(attribute: str, prompt: Prompt) -> Asked:
    phrase = _WORDS[attribute][getattr(prompt, attribute)]
    return Asked(prompt.text, prompt.name if attribute == "digit" else phrase, phrase)
