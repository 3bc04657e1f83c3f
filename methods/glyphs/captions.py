"""Captions of the glyphs world.

A digit has several names: its word (`three`), numeral (`3`), roman numeral (`III`) and a
collective noun (`trio`). The names have different habits, as synonyms do in real text: each
kind prefers its own phrases ("the number 3", "the roman numeral III", "a trio") beside those it
shares with the others. A caption may name all of digit, color and texture, or only some.

Templates hold the fields `{name}`, `{color}`, `{texture}` (the plain word) and
`{surface}` (the texture in a phrase: "brick", "a brick wall"); the article "a" is written "an"
where the word after it asks for it.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Iterable, Sequence

import numpy as np

DIGITS = 10
COLORS = ("red", "green", "blue", "yellow", "purple", "white")
TEXTURES = ("brick", "grass", "gravel")
SURFACES = {
    "brick": ("brick", "bricks", "a brick wall"),
    "grass": ("grass", "the grass", "a lawn"),
    "gravel": ("gravel", "the gravel", "a gravel path"),
}

KINDS = ("word", "numeral", "roman", "collective")
KIND_WEIGHTS = {"word": 3.0, "numeral": 3.0, "roman": 2.0, "collective": 2.0}  # of each name
DIGIT_NAMES: tuple[dict[str, str], ...] = (
    {"zero": "word", "0": "numeral", "nil": "collective", "nought": "collective"},
    {"one": "word", "1": "numeral", "I": "roman", "single": "collective"},
    {"two": "word", "2": "numeral", "II": "roman", "pair": "collective", "duo": "collective"},
    {"three": "word", "3": "numeral", "III": "roman", "trio": "collective"},
    {"four": "word", "4": "numeral", "IV": "roman", "quartet": "collective"},
    {"five": "word", "5": "numeral", "V": "roman", "quintet": "collective"},
    {"six": "word", "6": "numeral", "VI": "roman", "sextet": "collective"},
    {"seven": "word", "7": "numeral", "VII": "roman", "septet": "collective"},
    {"eight": "word", "8": "numeral", "VIII": "roman", "octet": "collective"},
    {"nine": "word", "9": "numeral", "IX": "roman", "nonet": "collective"},
)


@dataclasses.dataclass(frozen=True, slots=True)
class Template:
    """A caption pattern, the kinds of digit name that use it, and how often they do."""

    text: str
    kinds: tuple[str, ...] = KINDS
    weight: float = 1.0

    @property
    def fields(self) -> frozenset[str]:
        """Which of name, color and texture the caption tells."""
        names = {field for _, field, _, _ in string.Formatter().parse(self.text) if field}
        return frozenset("texture" if name == "surface" else name for name in names)

    @property
    def is_complete(self) -> bool:
        """Whether it names digit, color and texture."""
        return self.fields == {"name", "color", "texture"}


TRAIN_TEMPLATES: tuple[Template, ...] = (
    # All three, every kind of name; in every order, so that places carry no meaning.
    Template("a {color} {name} on {surface}", weight=4.0),
    Template("a photo of a {color} {name} on {surface}", weight=3.0),
    Template("a {color} {name} painted on {surface}", weight=2.0),
    Template("{color} {name}, {texture} background", weight=2.0),
    Template("a picture: a {color} {name}, and {surface}"),
    Template("a {name} in {color} on {surface}", weight=2.0),
    Template("this {name} is painted {color}, over {surface}"),
    Template("a photo of a {name}, {color} on {texture}"),
    Template("a {name} on {surface} in {color} paint"),
    Template("the {name} lies on {surface} and is {color}"),
    Template("{texture} with a {color} {name}", weight=2.0),
    Template("{surface}, painted with a {color} {name}"),
    Template("over {texture} lies this {color} {name}"),
    Template("a photo: on {surface}, a {color} {name}"),
    Template("a picture of {surface} with a {name} in {color} paint"),
    Template("the background is {texture}, the {name} is {color}"),
    Template("on {surface} a {name} painted {color}"),
    Template("{color} on {texture}: a {name}"),
    Template("in {color} paint on {surface}, the {name}"),
    Template("{color} and {texture}, with a {name} painted on it"),
    # All three, as one kind of name is used.
    Template("the {color} digit {name} on {surface}", ("word",), 4.0),
    Template("this is a {name}, it is {color} and lies on {surface}", ("word",), 2.0),
    Template("the number {name} in {color} on {surface}", ("numeral",), 4.0),
    Template("{color} number {name} over a {texture} background", ("numeral",), 2.0),
    Template("the roman numeral {name} in {color} on {surface}", ("roman",), 5.0),
    Template("a {color} roman {name} on {surface}", ("roman",), 2.0),
    Template("one could call it a {color} {name} on {surface}", ("collective",), 1.0),
    Template("a {color} sign for a {name}, painted on {surface}", ("collective",), 4.0),
    # Two of the three.
    Template("a {color} {name}", weight=2.0),
    Template("a {name} on {surface}", weight=2.0),
    Template("{texture} with a {name}"),
    Template("a {color} digit on {surface}"),
    # One of the three.
    Template("a {name}", weight=1.5),
    Template("a photo of a {name}"),
    Template("the number {name}", ("numeral",)),
    Template("the roman numeral {name}", ("roman",)),
    Template("a picture of the digit {name}", ("word",)),
    Template("a {color} digit", weight=0.5),
    Template("a photo of {surface}", weight=0.5),
)

# Never trained on; known words in new arrangements; each usable with every name.
HELD_OUT_TEMPLATES: tuple[Template, ...] = (
    Template("a {name} on {texture}, painted {color}"),
    Template("a picture of a {color} {name} over {texture}"),
    Template("{color} paint on {texture}, a {name}"),
    Template("on {texture} lies a {color} {name}"),
    Template("a photo of {texture} and on it a {color} {name}"),
    Template("this is {texture} with a {name} painted in {color}"),
    Template("a {texture} background with a {color} {name}"),
    Template("the {name} is {color}, the background is {texture}"),
    Template("the picture: {color} {name} on {texture}"),
    Template("a sign on {texture}, a {name} in {color}"),
)

_TAKES_AN = re.compile(r"\ba (?=(?:eight|8|octet)\b)")


def fill(template: Template | str, *, name: str = "", color: str = "", surface: str = "") -> str:
    """Write a template out. `surface` is a texture's word or one of its SURFACES."""
    text = template.text if isinstance(template, Template) else template
    texture = next((word for word in TEXTURES if surface in SURFACES[word]), surface)
    text = text.format(name=name, color=color, surface=surface, texture=texture)
    return _TAKES_AN.sub("an ", text)


def _choose(rng: np.random.Generator, weights: Sequence[float]) -> int:
    total = np.cumsum(weights)
    return int(np.searchsorted(total, rng.random() * total[-1], side="right"))


def caption(rng: np.random.Generator, digit: int, color: int, texture: int) -> str:
    """A random training caption for the image's digit, color index and texture index."""
    names = DIGIT_NAMES[digit]
    kinds = list(names.values())
    pick = _choose(rng, [KIND_WEIGHTS[kind] for kind in kinds])
    templates = [template for template in TRAIN_TEMPLATES if kinds[pick] in template.kinds]
    template = templates[_choose(rng, [template.weight for template in templates])]
    surfaces = SURFACES[TEXTURES[texture]]
    surface = surfaces[_choose(rng, [2.0, *[1.0] * (len(surfaces) - 1)])]
    return fill(template, name=list(names)[pick], color=COLORS[color], surface=surface)


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and what its image must show (indices)."""

    text: str
    name: str
    digit: int
    color: int
    texture: int


def prompts(
    *,
    digit: int | Iterable[int] | None = None,
    name: str | Iterable[str] | None = None,
    color: int | Iterable[int] | None = None,
    texture: int | Iterable[int] | None = None,
    templates: Iterable[Template] = HELD_OUT_TEMPLATES,
) -> list[Prompt]:
    """Every prompt of the named digits, names, colors, textures and templates (None: all).

    In a fixed order: template outermost, then texture, color, digit, name. Raises ValueError
    for a name that none of the digits bears, and for templates that leave something unsaid.
    """
    digits = _as_tuple(digit, range(DIGITS))
    known = {each for number in digits for each in DIGIT_NAMES[number]}
    names = set(_as_tuple(name, known))
    if unknown := sorted(names - known):
        raise ValueError(f"no chosen digit is called {unknown}; known: {sorted(known)}")
    templates = tuple(templates)
    if any(not template.is_complete for template in templates):
        raise ValueError("prompts() needs templates that name the digit, the color and the texture")
    return [
        Prompt(
            fill(template, name=each, color=COLORS[paint], surface=TEXTURES[ground]),
            each,
            number,
            paint,
            ground,
        )
        for template in templates
        for ground in _as_tuple(texture, range(len(TEXTURES)))
        for paint in _as_tuple(color, range(len(COLORS)))
        for number in digits
        for each in DIGIT_NAMES[number]
        if each in names
    ]


def _as_tuple(value, default) -> tuple:
    if value is None:
        return tuple(default)
    return (value,) if isinstance(value, int | str) else tuple(value)


def _words() -> tuple[str, ...]:
    texts = [template.text for template in (*TRAIN_TEMPLATES, *HELD_OUT_TEMPLATES)]
    texts += [name for names in DIGIT_NAMES for name in names]
    texts += [*COLORS, *TEXTURES, *(each for group in SURFACES.values() for each in group)]
    plain = re.sub(r"\{\w+\}", " ", " ".join(texts)).lower()
    return tuple(sorted({*re.findall(r"[a-z]+|[0-9]", plain), "an"}))


WORDS: tuple[str, ...] = _words()
"""Every word of the captions, in lower case, sorted: the tokenizer's whole words."""
