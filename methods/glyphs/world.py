"""The glyphs world: real handwritten digits, colored, on real photographed textures.

An image is 64x64x3 uint8: one of scikit-learn's 1,797 handwritten digits (`load_digits`, 8x8),
interpolated by a cubic spline and filled with one of six colors, over a crop of one of
scikit-image's photographs `brick`, `grass` and `gravel`. Everything comes inside two PyPI
packages; nothing is downloaded.

The 1,797 handwritten samples are split, stratified by digit and always the same way, into three
disjoint parts: `generator` (what the text-to-image model learns from), `judge` (what the
classifier that judges its images learns from) and `judge_test` (what that classifier is
measured on). An image is a pure function of (seed, split, index).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
from scipy import ndimage

from ...errors import optional
from .captions import COLORS, DIGITS, TEXTURES, caption

IMAGE_SIZE = 64
SPLITS = ("generator", "judge", "judge_test")
SPLIT_FRACTIONS = (0.50, 0.35, 0.15)
_SPLIT_SEED = 20240607

# sRGB fill of each color, in the order of COLORS.
COLOR_VALUES = np.array(
    [
        [0.90, 0.13, 0.13],  # red
        [0.15, 0.80, 0.20],  # green
        [0.16, 0.32, 0.95],  # blue
        [0.98, 0.85, 0.12],  # yellow
        [0.62, 0.20, 0.85],  # purple
        [0.97, 0.97, 0.97],  # white
    ],
    np.float32,
)
# How a texture is brought to 64x64, in the order of TEXTURES: its zoom, the low-pass (sigma in
# output pixels), and the mean color and contrast (standard deviation) it is normalized to.
_TEXTURE_ZOOM = (0.40, 0.55, 0.75)
_TEXTURE_BLUR = (0.5, 0.7, 0.7)
_TEXTURE_MEAN = np.array([[0.44, 0.35, 0.30], [0.33, 0.40, 0.28], [0.40, 0.42, 0.46]], np.float32)
_TEXTURE_CONTRAST = (0.095, 0.10, 0.11)

_PIXELS_PER_CELL = 5.2  # a digit's 8 cells span about 42 of the 64 pixels
_SHARPENING = 2.0  # of the 8x8 digit, in units of its difference from its own blur
_PADDING = 2  # empty cells around the 8x8 digit, so that strokes at its border stay round


@dataclasses.dataclass(frozen=True, slots=True)
class Jitter:
    """How much a digit varies between two renders of one handwritten sample.

    `shift` in pixels, `scale`, `stretch` and `shear` as ratios, `rotation` in radians
    (each the largest deviation of a uniform draw); `weight` is the largest deviation of the
    ink threshold, which makes strokes bolder or finer; `color` that of each color channel.
    """

    shift: float = 2.0
    scale: float = 0.07
    stretch: float = 0.0
    shear: float = 0.0
    rotation: float = 0.09
    weight: float = 0.02
    color: float = 0.02


@dataclasses.dataclass(frozen=True, slots=True)
class Digits:
    """The handwritten samples of one split: ids [N], labels [N], spline coefficients [N,12,12]."""

    ids: np.ndarray
    labels: np.ndarray
    splines: np.ndarray

    def of(self, digit: int) -> np.ndarray:
        """Positions within this split of the samples showing `digit`."""
        return np.flatnonzero(self.labels == digit)


@functools.cache
def load_split(split: str) -> Digits:
    """The handwritten samples of `split`; the three splits share none.

    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    datasets = optional("sklearn.datasets", "demo", "the handwriting of the bundled world")
    bunch: Any = datasets.load_digits()
    images = np.asarray(bunch.images, np.float32) / 16.0
    labels = np.asarray(bunch.target)
    rng = np.random.default_rng(_SPLIT_SEED)
    ends = np.cumsum(SPLIT_FRACTIONS)
    part = SPLITS.index(split)
    chosen = []
    for digit in range(DIGITS):
        samples = rng.permutation(np.flatnonzero(labels == digit))
        first = round(len(samples) * (ends[part - 1] if part else 0.0))
        last = round(len(samples) * ends[part])
        chosen.append(samples[first:last])
    ids = np.sort(np.concatenate(chosen))
    padded = np.pad(images[ids], ((0, 0), (_PADDING, _PADDING), (_PADDING, _PADDING)))
    # Unsharp masking opens the holes that the pencil and the 8x8 grid have half filled.
    padded += _SHARPENING * (padded - ndimage.gaussian_filter(padded, (0.0, 1.0, 1.0)))
    splines = np.stack([ndimage.spline_filter(image, order=3) for image in padded])
    return Digits(ids, labels[ids], splines.astype(np.float32))


@functools.cache
def _textures() -> tuple[np.ndarray, ...]:
    """The three photographs as float32 [h,w], zoomed to image scale, zero mean, unit contrast."""
    data: Any = optional("skimage.data", "demo", "the textures of the bundled world")
    photographs = (np.rot90(data.brick()), data.grass(), data.gravel())
    result = []
    for photograph, zoom, blur in zip(photographs, _TEXTURE_ZOOM, _TEXTURE_BLUR, strict=True):
        gray = photograph.astype(np.float32) / 255.0
        gray = gray - ndimage.gaussian_filter(gray, 0.12 * gray.shape[0])  # even lighting
        gray = ndimage.gaussian_filter(gray, blur / zoom)
        gray = np.asarray(ndimage.zoom(gray, zoom, order=1))
        gray = (gray - gray.mean()) / gray.std()
        result.append(np.clip(gray, -2.5, 2.5).astype(np.float32))
    return tuple(result)


def background(rng: np.random.Generator, texture: int, size: int = IMAGE_SIZE) -> np.ndarray:
    """A random, randomly mirrored crop of a texture, [size,size,3] in [0,1]; size <= 200."""
    photograph = _textures()[texture]
    top = rng.integers(photograph.shape[0] - size + 1)
    left = rng.integers(photograph.shape[1] - size + 1)
    crop = photograph[top : top + size, left : left + size]
    flip_rows, flip_columns = rng.random(2) < 0.5
    crop = crop[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    # Even each crop towards the same mean, so that no crop is so bright that it hides a digit.
    crop = crop - 0.7 * crop.mean()
    mean = _TEXTURE_MEAN[texture]
    shade = _TEXTURE_CONTRAST[texture] / mean.mean() * crop
    return np.clip(mean * (1.0 + shade[..., None]), 0.0, 1.0)


def _smoothstep(field: np.ndarray, low: float, high: float) -> np.ndarray:
    t = np.clip((field - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def ink(rng: np.random.Generator, spline: np.ndarray, jitter: Jitter) -> np.ndarray:
    """Antialiased coverage [64,64] in [0,1] of a digit under a random small affine map."""
    angle, shear = rng.uniform(-1, 1, 2) * (jitter.rotation, jitter.shear)
    scale = 1.0 + rng.uniform(-1, 1) * jitter.scale
    stretch = 1.0 + rng.uniform(-1, 1) * jitter.stretch
    shift = rng.uniform(-1, 1, 2) * jitter.shift
    weight = rng.uniform(-1, 1) * jitter.weight
    cosine, sine = np.cos(angle), np.sin(angle)
    rotation = np.array([[cosine, -sine], [sine, cosine]])
    form = np.array([[1.0 / stretch, 0.0], [shear, stretch]])
    matrix = rotation @ form / (_PIXELS_PER_CELL * scale)  # output pixel -> digit cell
    center = np.full(2, (spline.shape[0] - 1) / 2)
    offset: Any = center - matrix @ (np.full(2, (IMAGE_SIZE - 1) / 2) + shift)
    shape = (IMAGE_SIZE, IMAGE_SIZE)
    field = ndimage.affine_transform(spline, matrix, offset, shape, order=3, prefilter=False)
    return _smoothstep(field, 0.42 + weight, 0.62 + weight)


def render(
    rng: np.random.Generator,
    spline: np.ndarray,
    color: int | np.ndarray,
    texture: int,
    *,
    jitter: Jitter | None = None,
) -> np.ndarray:
    """Draw one image, uint8 [64,64,3].

    `spline` is a row of `Digits.splines`; `color` and `texture` index COLORS and TEXTURES; in place
    of a color may stand sRGB values in [0,1], [3] or [64,64,3]. All choices come from `rng`.
    """
    jitter, fill = jitter or Jitter(), COLOR_VALUES[color] if np.ndim(color) == 0 else color
    image, coverage = background(rng, texture), ink(rng, spline, jitter)
    return to_bytes(paint(image, coverage, varied(rng, np.asarray(fill), jitter)))


def varied(rng: np.random.Generator, fill: np.ndarray, jitter: Jitter) -> np.ndarray:
    """sRGB values in [0,1] as one image has them."""
    return np.clip(fill + rng.uniform(-1, 1, 3).astype(np.float32) * jitter.color, 0.0, 1.0)


def paint(image: np.ndarray, coverage: np.ndarray, fill: np.ndarray) -> np.ndarray:
    """The image [h,w,3] in [0,1] with a dark halo, filled where `coverage` [h,w] says."""
    halo = np.clip(1.8 * ndimage.gaussian_filter(coverage, 1.6, truncate=2.5), 0.0, 1.0)
    image = image * (1.0 - 0.75 * halo[..., None])
    return image + coverage[..., None] * (fill - image)


def to_bytes(image: np.ndarray) -> np.ndarray:
    """[0,1] -> uint8."""
    return np.round(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)


def _generator(seed: int, split: str, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, SPLITS.index(split), index])


def render_many(
    digits: Sequence[int] | np.ndarray,
    colors: Sequence[int] | np.ndarray,
    textures: Sequence[int] | np.ndarray,
    *,
    split: str,
    seed: int,
    jitter: Jitter | None = None,
    samples: Sequence[int] | np.ndarray | None = None,
) -> np.ndarray:
    """Draw many images, uint8 [N,64,64,3]: one per (digit, color, texture).

    The handwritten sample is drawn at random among those of `split` that show the digit, or
    named by `samples`, positions within the split (their labels must equal `digits`).
    Deterministic per (seed, split, position). Raises ValueError when the lengths differ or a
    named sample shows another digit.
    """
    if not len(digits) == len(colors) == len(textures):
        counts = f"{len(digits)}, {len(colors)} and {len(textures)}"
        raise ValueError(f"render_many needs as many digits as colors and textures, got {counts}")
    source = load_split(split)
    if samples is not None and not np.array_equal(source.labels[np.asarray(samples)], digits):
        raise ValueError("the named samples do not show the named digits")
    images = np.empty((len(digits), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for index in range(len(digits)):
        rng = _generator(seed, split, index)
        drawn = rng.choice(source.of(int(digits[index])))
        spline = source.splines[drawn if samples is None else samples[index]]
        color, texture = int(colors[index]), int(textures[index])
        images[index] = render(rng, spline, color, texture, jitter=jitter)
    return images


@functools.cache
def held_out_combinations() -> frozenset[tuple[int, int, int]]:
    """The (digit, color, texture) triples that the generator never sees in training.

    30 of the 180, balanced: each digit lacks one of six colors per texture, each color five
    triples, each texture ten; every single value and every pair of values stays seen.
    """
    return frozenset(
        (digit, color, (color // 2 + digit) % len(TEXTURES))
        for digit in range(DIGITS)
        for color in range(digit % 2, len(COLORS), 2)
    )


@functools.cache
def seen_combinations() -> tuple[tuple[int, int, int], ...]:
    """The 150 triples the generator is trained on, sorted."""
    every = itertools.product(range(DIGITS), range(len(COLORS)), range(len(TEXTURES)))
    return tuple(triple for triple in every if triple not in held_out_combinations())


class GlyphWorld:
    """Captioned images as a random-access data source (`grain.sources`' protocol).

    `size` images of `split`, each a pure function of (seed, split, index). The generator's
    split leaves out `held_out_combinations()`; the judge's two hold every combination.
    An item is a dict: `image` uint8 [64,64,3], `caption` str, the integers `digit`, `color`,
    `texture` (indices) and `sample`, the position in scikit-learn's data set.
    """

    def __init__(self, split: str, size: int, seed: int = 0):
        if size < 1:
            raise ValueError(f"a world needs at least one image, got size={size}")
        load_split(split)  # names an unknown split at once
        self.split, self.size, self.seed = split, size, seed

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"GlyphWorld(split={self.split!r}, size={self.size}, seed={self.seed})"

    def __getitem__(self, record_key: SupportsIndex) -> dict[str, Any]:
        index = operator.index(record_key)
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside 0..{self.size - 1}")
        rng = _generator(self.seed, self.split, index)
        if self.split == "generator":
            triples = seen_combinations()
            shown = triples[rng.integers(len(triples))]
        else:
            shown = tuple(int(rng.integers(each)) for each in (DIGITS, len(COLORS), len(TEXTURES)))
        digit, color, texture = shown
        source = load_split(self.split)
        sample = int(rng.choice(source.of(digit)))
        image = render(rng, source.splines[sample], color, texture)
        item = {"image": image, "caption": caption(rng, *shown), "sample": int(source.ids[sample])}
        return item | {"digit": digit, "color": color, "texture": texture}
