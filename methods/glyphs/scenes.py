"""Scenes of the glyphs world: one to four handwritten digits on a texture, every pixel labeled.

A scene is 128x128, as large as four of the world's images side by side; its digits have different
colors and lie each in a quarter of it, somewhere and a little larger or smaller.  Classes are
digits in a given order, then the textures.  A scene is a pure function of (seed, split, index).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..segmentation.datasets import Scene
from ..segmentation.metrics import Segment
from ..segmentation.vocabulary import Vocabulary
from .captions import COLORS, DIGIT_NAMES, DIGITS, TEXTURES
from .world import (
    COLOR_VALUES,
    IMAGE_SIZE,
    SPLITS,
    Jitter,
    background,
    ink,
    load_split,
    paint,
    to_bytes,
    varied,
)

SCENE_SIZE = 2 * IMAGE_SIZE
SEEN, UNSEEN = tuple(range(7)), (7, 8, 9)
JITTER = Jitter(shift=8.0, scale=0.15, rotation=0.12)


class Figure(NamedTuple):
    """A digit of a scene: what it is, its color's index, and its quarter, row by row."""

    digit: int
    color: int
    quarter: int


@dataclasses.dataclass(frozen=True)
class GlyphScenes:
    """Scenes as a source for training and evaluation (`segmentation.datasets.SceneSource`).

    Attributes:
      size: how many there are.
      digits: those that are shown and have a class; class k is `digits[k]`.
      among: of which every scene shows one at least; empty for any.
      split: whose handwriting (`world.SPLITS`).
      seed: of everything random.
    """

    size: int
    digits: tuple[int, ...] = tuple(range(DIGITS))
    among: tuple[int, ...] = ()
    split: str = "generator"
    seed: int = 0

    def __post_init__(self):
        known = set(range(DIGITS))
        if self.size < 1 or not self.digits or not set(self.digits) <= known:
            raise ValueError(
                f"GlyphScenes takes a size of 1 or more and digits 0 to {DIGITS - 1}; received "
                f"{self.size} and {self.digits}."
            )
        if not set(self.among) <= set(self.digits):
            raise ValueError(f"among is taken from digits {self.digits}, received {self.among}.")
        load_split(self.split)

    things: frozenset[int] = dataclasses.field(default=frozenset(), init=False)
    panoptic: bool = dataclasses.field(default=False, init=False)

    @property
    def classes(self) -> int:
        """Digits and textures."""
        return len(self.digits) + len(TEXTURES)

    @property
    def vocabulary(self) -> Vocabulary:
        """All names of each digit, and the textures' words."""
        return vocabulary_of(self.digits)

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """All the same."""
        return ((SCENE_SIZE, SCENE_SIZE),) * self.size

    @property
    def targets(self) -> Sequence[int]:
        """Room for four digits and a texture."""
        return (5,) * self.size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside 0..{self.size - 1}")
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index, 1])
        texture = int(rng.integers(len(TEXTURES)))
        return draw(rng, self._figures(rng), texture, self.digits, self.split)

    def _figures(self, rng: np.random.Generator) -> list[Figure]:
        count = int(rng.integers(1, 5))
        digits = rng.choice(self.digits, count)
        if self.among:
            digits[0] = rng.choice(self.among)
        colors, quarters = rng.permutation(len(COLORS)), rng.permutation(4)
        parts = zip(digits, colors[:count], quarters[:count], strict=True)
        return [Figure(*map(int, part)) for part in parts]


def vocabulary_of(digits: Sequence[int]) -> Vocabulary:
    """The classes of scenes with these digits, in order."""
    names = [tuple(DIGIT_NAMES[digit]) for digit in digits]
    return Vocabulary((*names, *((texture,) for texture in TEXTURES)))


def draw(
    rng: np.random.Generator,
    figures: Sequence[Figure],
    texture: int,
    digits: Sequence[int],
    split: str,
) -> Scene:
    """One scene; a pixel belongs to the last figure whose ink covers half of it.

    `digits` are the classes, in order; textures follow. Handwriting is of `split`.
    """
    source = load_split(split)
    image = background(rng, texture, SCENE_SIZE)
    labels = np.full((SCENE_SIZE, SCENE_SIZE), len(digits) + texture, np.int32)
    for figure in figures:
        top, left = (IMAGE_SIZE * place for place in divmod(figure.quarter, 2))
        quarter = slice(top, top + IMAGE_SIZE), slice(left, left + IMAGE_SIZE)
        spline = source.splines[rng.choice(source.of(figure.digit))]
        coverage = ink(rng, spline, JITTER)
        fill = varied(rng, COLOR_VALUES[figure.color], JITTER)
        image[quarter] = paint(image[quarter], coverage, fill)
        labels[quarter][coverage >= 0.5] = list(digits).index(figure.digit)
    present = {int(label) + 1: Segment(int(label)) for label in np.unique(labels)}
    return Scene(to_bytes(image), labels + 1, present)
