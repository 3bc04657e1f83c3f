"""Augmentation of scenes: resize and mirror (semantic), large-scale jitter (panoptic).

Images are resized by Pillow's antialiased bilinear filter and rounded, as the published loaders do;
ids take their nearest neighbor, found as each of the published loaders finds it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

Augmented = tuple[UInt8[np.ndarray, "h w 3"], Int32[np.ndarray, "h w"]]


def shortest_edge(size: Sequence[int], short: int, longest: int) -> tuple[int, int]:
    """Rows and columns whose shorter is `short`, unless the longer would exceed `longest`."""
    height, width = size
    scale = short / min(height, width)
    rows, columns = (short, scale * width) if height < width else (scale * height, short)
    if max(rows, columns) > longest:
        scale = longest / max(rows, columns)
        rows, columns = rows * scale, columns * scale
    return max(1, int(rows + 0.5)), max(1, int(columns + 0.5))


def resize_image(
    image: UInt8[np.ndarray, "H W 3"], size: Sequence[int]
) -> UInt8[np.ndarray, "h w 3"]:
    """Pillow's bilinear filter, antialiased where the image shrinks."""
    height, width = size
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def nearest(
    ids: Int32[np.ndarray, "H W"], size: Sequence[int], *, centers: bool
) -> Int32[np.ndarray, "h w"]:
    """Nearest neighbors: of pixel centers, as Pillow has it, or of corners, as torch has it."""
    rows, columns = (
        ((2 * np.arange(new) + 1) * old) // (2 * new) if centers else np.arange(new) * old // new
        for new, old in zip(size, ids.shape, strict=True)
    )
    return ids[rows[:, None], columns]


@dataclasses.dataclass(frozen=True)
class ResizeFlip:
    """Resize the shorter side, and mirror one scene in two.

    Attributes:
      short: pixels along the shorter side.
      longest: at most so many along the longer one.
      flip: whether to mirror.
    """

    short: int = 800
    longest: int = 1333
    flip: bool = True

    def __post_init__(self):
        if not 1 <= self.short <= self.longest:
            received = f"{self.short} and {self.longest}"
            raise ValueError(f"ResizeFlip accepts 1 <= short <= longest; received {received}.")

    def size(self, size: Sequence[int]) -> tuple[int, int]:
        """Of the result, for a scene of `size`."""
        return shortest_edge(size, self.short, self.longest)

    def __call__(
        self,
        image: UInt8[np.ndarray, "H W 3"],
        ids: Int32[np.ndarray, "H W"],
        rng: np.random.Generator,
    ) -> Augmented:
        """The scene resized and perhaps mirrored."""
        size = self.size(ids.shape)
        image, ids = resize_image(image, size), nearest(ids, size, centers=False)
        if self.flip and rng.random() < 0.5:
            image, ids = image[:, ::-1], ids[:, ::-1]
        return image, ids


@dataclasses.dataclass(frozen=True)
class LargeScaleJitter:
    """Mirror, resize by a random factor, crop a square somewhere (Ghiasi et al. 2021).

    A scene that is smaller than the square is padded at the bottom and the right with gray, which
    is void.

    Attributes:
      side: pixels along the square.
      least, most: the scene fits a box of `side` times a factor between these.
      flip: whether to mirror one scene in two.
    """

    side: int = 1024
    least: float = 0.1
    most: float = 2.0
    flip: bool = True

    def __post_init__(self):
        if self.side < 1 or not 0 < self.least <= self.most:
            raise ValueError(
                "LargeScaleJitter accepts side >= 1 and 0 < least <= most; received "
                f"{self.side}, {self.least} and {self.most}."
            )

    def size(self, size: Sequence[int]) -> tuple[int, int]:
        """Of the result, whatever the scene's."""
        del size
        return self.side, self.side

    def __call__(
        self,
        image: UInt8[np.ndarray, "H W 3"],
        ids: Int32[np.ndarray, "H W"],
        rng: np.random.Generator,
    ) -> Augmented:
        """A square part of the scene."""
        if self.flip and rng.random() < 0.5:
            image, ids = np.ascontiguousarray(image[:, ::-1]), ids[:, ::-1]
        box = self.side * rng.uniform(self.least, self.most)
        scale = min(box / edge for edge in ids.shape)
        size = [max(1, round(edge * scale)) for edge in ids.shape]
        share = rng.random()
        top, left = (round(max(edge - self.side, 0) * share) for edge in size)
        part = slice(top, top + self.side), slice(left, left + self.side)
        image = resize_image(image, size)[part]
        ids = nearest(ids, size, centers=True)[part]
        below, right = (self.side - edge for edge in ids.shape)
        image = np.pad(image, ((0, below), (0, right), (0, 0)), constant_values=128)
        return image, np.pad(ids, ((0, below), (0, right)))
