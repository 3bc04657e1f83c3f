"""Composition after an erasure: objects, colors, counts and places asked for together.

An erasure can leave every concept that is asked for alone and break how they go together
("Erasure or Erosion?", arXiv 2604.04575).  A prompt comes with its foils, which say the same words
put together in another way; an image shows it if a CLIP finds none of the foils nearer, or, for a
classifier of attributes, if the image shows every part.  CLIP tells counts and places badly: the
original model's column says how far the figure can be trusted.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from .classifiers import ClipClassifier
from .instruments import Clip
from .statistics import unit
from .suites import choose

OBJECTS = ("apple", "backpack", "bench", "bird", "book", "bowl", "car", "chair", "cup", "vase")
COLORS = ("red", "blue", "green", "yellow", "black", "white")
PLACES = (("to the left of", "to the right of"), ("above", "below"))
NUMBERS = ("one", "two", "three", "four")


class Composed(NamedTuple):
    """A prompt of several parts.

    Attributes:
      text: of the prompt.
      kind: what is put together: "colors", "counts", "positions", "objects" or "attributes".
      foils: the same words, put together otherwise.
      parts: phrases, each of which its image should show.
    """

    text: str
    kind: str
    foils: tuple[str, ...]
    parts: tuple[str, ...]


def compositions(
    count: int,
    seed: int,
    *,
    objects: Sequence[str] = OBJECTS,
    colors: Sequence[str] = COLORS,
    without: Sequence[str] = (),
) -> list[Composed]:
    """Prompts for any model, as many of each kind, to within one.

    Args:
      count: how many.
      seed: of the choice.
      objects, colors: what they are made of.
      without: words that are left out: what was erased.

    Raises:
      ValueError: fewer than two objects or colors are left.
    """
    gone = {word.lower() for phrase in without for word in phrase.split()}
    objects = [each for each in objects if each not in gone]
    colors = [each for each in colors if each not in gone]
    if len(objects) < 2 or len(colors) < 2:
        raise ValueError(f"at least 2 objects and colors go together, left: {objects}, {colors}.")
    found = []
    for a, b in itertools.permutations(objects, 2):
        one, other = _a(a), _a(b)
        found.append(Composed(f"a photo of {one} and {other}", "objects", (one, other), (a, b)))
        for c, d in itertools.permutations(colors, 2):
            text = f"a photo of {_a(f'{c} {a}')} and {_a(f'{d} {b}')}"
            foils = (
                f"a photo of {_a(f'{d} {a}')} and {_a(f'{c} {b}')}",
                f"a photo of {_a(f'{c} {a}')} and {_a(f'{c} {b}')}",
                f"a photo of {_a(f'{d} {a}')} and {_a(f'{d} {b}')}",
            )
            found.append(Composed(text, "colors", foils, (f"{c} {a}", f"{d} {b}")))
        for there, back in (*PLACES, *(pair[::-1] for pair in PLACES)):
            text, foil = (f"a photo of {one} {place} {other}" for place in (there, back))
            found.append(Composed(text, "positions", (foil,), (a, b)))
    for a, number in itertools.product(objects, NUMBERS):
        texts = {n: f"a photo of {n} {a if n == 'one' else _plural(a)}" for n in NUMBERS}
        foils = tuple(text for n, text in texts.items() if n != number)
        found.append(Composed(texts[number], "counts", foils, (a,)))
    return choose(found, count, seed, lambda each: each.kind)


def shows_composed(
    judge: Any, images: UInt8[np.ndarray, "N H W 3"], asked: Sequence[Composed]
) -> Bool[np.ndarray, " N"]:
    """Whether each image shows its prompt, parts and all; `judge` is a `Clip` or a `Classifier`."""
    if isinstance(judge, ClipClassifier):
        judge = judge.clip
    if not isinstance(judge, Clip):
        parts = max(len(each.parts) for each in asked)
        shown = np.ones(len(images), bool)
        for n in range(parts):  # a prompt of fewer parts is asked for its last one again
            phrases = [each.parts[min(n, len(each.parts) - 1)] for each in asked]
            shown &= judge.among(phrases).shows(images, phrases)
        return shown
    seen = unit(judge.features(images))
    texts = list(dict.fromkeys(text for each in asked for text in (each.text, *each.foils)))
    read = dict(zip(texts, unit(judge.text_features(texts)), strict=True))
    return np.asarray(
        [
            bool(all(image @ read[each.text] > image @ read[foil] for foil in each.foils))
            for image, each in zip(seen, asked, strict=True)
        ]
    )


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(word: str) -> str:
    return word + ("es" if word.endswith(("ch", "s", "x")) else "s")
