"""Label maps as pictures: an image tinted by class, with names and borders."""

import colorsys
from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, ImageDraw

from conceptax.reporting.pictures import PAPER, label_font

_SMALLEST = 0.002  # share of an image that a region needs for its name
_PLACING = 384  # pixels along the longer side at which places for names are sought


def class_colors(count: int) -> UInt8[np.ndarray, "K 3"]:
    """Colors that differ, neighbors in the vocabulary above all."""
    turns = [0.61803398875 * n % 1 for n in range(count)]
    shades = [(0.95, 0.75), (0.65, 0.95), (0.85, 0.55)]
    found = [
        colorsys.hsv_to_rgb(turn, *shades[n // 7 % len(shades)]) for n, turn in enumerate(turns)
    ]
    return np.rint(255 * np.asarray(found)).astype(np.uint8).reshape(count, 3)


def overlay(
    image: UInt8[np.ndarray, "H W 3"],
    labels: Integer[np.ndarray, "H W"],
    names: Sequence[str],
    colors: UInt8[np.ndarray, "K 3"],
    *,
    strength: float = 0.55,
) -> Image.Image:
    """The image, tinted where it has a label, each larger region with its name.

    Args:
      image: in the background.
      labels: 0 to K - 1; whatever else is void and stays as it is.
      names, colors: of the K classes.
      strength: of the tint, 0 to 1.
    """
    known = (labels >= 0) & (labels < len(names))
    tint = colors[np.where(known, labels, 0)]
    mixed = np.rint((1 - strength) * image + strength * tint).astype(np.uint8)
    border = np.zeros(labels.shape, bool)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    pixels = np.where(known[..., None], mixed, image)
    pixels[border] = 255
    canvas = Image.fromarray(pixels)
    draw = ImageDraw.Draw(canvas)
    font = label_font(max(9, round(max(labels.shape) / 40)))
    for label, (row, column) in _places(labels, len(names)):
        outline = {"stroke_width": 2, "stroke_fill": "#000000"}
        draw.text((column, row), names[label], PAPER, font, "mm", **outline)
    return canvas


def _places(labels: Integer[np.ndarray, "H W"], classes: int) -> list[tuple[int, tuple[int, int]]]:
    """The innermost pixel of each class's largest region, unless that is too small."""
    from scipy import ndimage

    step = max(1, -(-max(labels.shape) // _PLACING))
    small = labels[::step, ::step]
    found = []
    for label in np.unique(small):
        regions, _ = ndimage.label(small == label)
        sizes = np.bincount(regions.ravel())[1:]
        if not 0 <= label < classes or sizes.max() < _SMALLEST * small.size:
            continue
        region = np.pad(regions == 1 + sizes.argmax(), 1)
        depth = np.asarray(ndimage.distance_transform_edt(region))
        row, column = np.unravel_index(depth.argmax(), region.shape)
        found.append((int(label), (step * (int(row) - 1), step * (int(column) - 1))))
    return found
