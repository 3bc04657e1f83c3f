"""Label maps as pictures: an image tinted by class, or with each segment outlined and named."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image, ImageDraw

from conceptax.reporting.pictures import INK, PAPER, QUIET, label_font

_SMALLEST = 0.002  # share of an image that a region needs for its name
_PLACING = 384  # pixels along the longer side at which places for names are sought
_APART = 0.1  # distance in OKLab at which two colors are not mistaken for each other
_CANDIDATES = 24  # colors of a name, the first of which that is far from those taken is its own
_LEAST_SIDE = 512  # pixels along the longer side of a picture of segments, at least about that


def class_colors(names: Sequence[str]) -> UInt8[np.ndarray, "K 3"]:
    """Colors that follow from the names of classes, and differ.

    A name has one color whatever else is in the vocabulary, and wherever it stands there, unless
    that of another name is too near; one of the two, always the same, then takes another.

    Args:
      names: of K classes. Of equal names each has a color of its own.

    Returns:
      sRGB, in the order of the names.
    """
    digests = [hashlib.shake_256(name.encode()).digest(3 * _CANDIDATES) for name in names]
    colors, taken = np.zeros((len(names), 3), np.uint8), np.zeros((0, 3))
    for _, place in sorted((digest, place) for place, digest in enumerate(digests)):
        candidates = _drawn(digests[place])
        places = _oklab(candidates)
        apart = np.linalg.norm(places[:, None] - taken, axis=-1).min(axis=-1, initial=np.inf)
        chosen = int(np.argmax(apart >= _APART) if apart.max() >= _APART else np.argmax(apart))
        colors[place] = candidates[chosen]
        taken = np.concatenate([taken, places[chosen : chosen + 1]])
    return colors


def _drawn(digest: bytes) -> UInt8[np.ndarray, "N 3"]:
    """Colors, neither pale nor dark, whose hue, saturation and value are bytes of a digest."""
    hue, saturation, value = (np.frombuffer(digest, np.uint8).reshape(-1, 3) / 255).T
    saturation, value = 0.6 + 0.4 * saturation, 0.6 + 0.4 * value
    turned = np.abs((6 * hue[:, None] + [0, 4, 2]) % 6 - 3) - 1  # HSV's three ramps
    pure = np.clip(turned, 0, 1)
    return np.rint(255 * value[:, None] * (1 + saturation[:, None] * (pure - 1))).astype(np.uint8)


def _linear(colors: UInt8[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 3"]:
    """Linear light of sRGB colors."""
    values = colors / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _oklab(colors: UInt8[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 3"]:
    """Where sRGB colors lie in OKLab (Ottosson 2020), in which equal distances look alike."""
    cones = np.cbrt(
        _linear(colors)
        @ np.array(
            [
                [0.4122214708, 0.2119034982, 0.0883024619],
                [0.5363325363, 0.6806995451, 0.2817188376],
                [0.0514459929, 0.1073969566, 0.6299787005],
            ]
        )
    )
    return cones @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )


def _readable_on(color: UInt8[np.ndarray, "3"]) -> str:
    """Black or white, whichever stands out more (its contrast is then above 4.5, as WCAG asks)."""
    light = float(_linear(color[None])[0] @ np.array([0.2126, 0.7152, 0.0722]))
    return "#000000" if (light + 0.05) / 0.05 > 1.05 / (light + 0.05) else PAPER


def overlay(
    image: UInt8[np.ndarray, "H W 3"],
    labels: Integer[np.ndarray, "H W"],
    names: Sequence[str],
    colors: UInt8[np.ndarray, "K 3"],
    *,
    strength: float = 0.55,
    letters: float = 1 / 40,
) -> Image.Image:
    """The image, tinted where it has a label, each larger region with its name.

    Args:
      image: in the background.
      labels: 0 to K - 1; whatever else is void and stays as it is.
      names, colors: of the K classes.
      strength: of the tint, 0 to 1.
      letters: their size, as a share of the longer side; at least 9 pixels.
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
    font = label_font(max(9, round(max(labels.shape) * letters)))
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


def segments_picture(
    image: UInt8[np.ndarray, "H W 3"],
    ids: Integer[np.ndarray, "H W"],
    segments: Mapping[int, int],
    names: Sequence[str],
    colors: UInt8[np.ndarray, "K 3"],
) -> Image.Image:
    """The image, each segment outlined in its color and named, and a legend beside it.

    Small images are enlarged, by a whole factor, so that names can be read.

    Args:
      image: in the background.
      ids: of segments; whatever else is void and stays as it is.
      segments: the class of each id.
      names, colors: of the K classes.
    """
    from scipy import ndimage

    factor = max(1, round(_LEAST_SIDE / max(ids.shape)))
    height, width = (factor * side for side in ids.shape)
    ids = ids.repeat(factor, axis=0).repeat(factor, axis=1)
    enlarged = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    pixels, line = np.array(enlarged), max(3, round(max(height, width) / 150))
    found = []
    for number, box in enumerate(ndimage.find_objects(ids), 1):
        if box is None or number not in segments:
            continue
        region, color = ids[box] == number, colors[segments[number]]
        depth = np.asarray(ndimage.distance_transform_edt(np.pad(region, 1)))[1:-1, 1:-1]
        part = pixels[box]  # a view
        part[region] = np.rint(0.7 * part[region] + 0.3 * color)
        part[region & (depth <= line + 1)] = color
        part[region & (depth <= 1)] = (0, 0, 0)
        row, column = np.unravel_index(depth.argmax(), depth.shape)
        middle = (box[1].start + int(column), box[0].start + int(row))
        found.append((int(region.sum()), float(depth.max()), number, middle, box))
    canvas = Image.fromarray(pixels)
    draw, font = ImageDraw.Draw(canvas), label_font(max(13, round(max(height, width) / 40)))
    taken: list[tuple[int, int, int, int]] = []
    for _, depth, number, middle, box in sorted(found, key=lambda each: each[0]):
        name, color = names[segments[number]], colors[segments[number]]
        _name_segment(draw, font, name, color, depth, middle, box, taken)
    return _with_legend(canvas, ids, segments, names, colors)


def _name_segment(
    draw: ImageDraw.ImageDraw,
    font: Any,
    name: str,
    color: UInt8[np.ndarray, "3"],
    depth: float,
    middle: tuple[int, int],
    box: tuple[slice, slice],
    taken: list[tuple[int, int, int, int]],
) -> None:
    """Write a name in the middle of its segment where there is room, or else above or below it."""
    canvas: Any = draw.im
    width, height = round(font.getlength(name)) + 8, font.size + 6
    inside = middle[0], middle[1] - height // 2
    center = (box[1].start + box[1].stop) // 2
    around = [(center, box[0].start - height), (center, box[0].stop), inside]
    frame = (0, 0, 0, 0)
    for x, y in [inside, *around] if depth > height else around:
        left = min(max(0, x - width // 2), max(0, canvas.size[0] - width))
        top = min(max(0, y), max(0, canvas.size[1] - height))
        frame = (left, top, left + width, top + height)
        if not any(_meet(frame, other) for other in taken):
            break
    taken.append(frame)
    draw.rectangle(frame, fill=tuple(color.tolist()), outline="#000000")
    place = (frame[0] + width / 2, frame[1] + height / 2)
    draw.text(place, name, _readable_on(color), font, "mm")


def _meet(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _with_legend(
    picture: Image.Image,
    ids: Integer[np.ndarray, "H W"],
    segments: Mapping[int, int],
    names: Sequence[str],
    colors: UInt8[np.ndarray, "K 3"],
) -> Image.Image:
    """The picture with the classes in it at its right, the largest first; how many, if several."""
    areas: dict[int, int] = {}
    sizes = np.bincount(ids.ravel(), minlength=max(segments, default=0) + 1)
    for number, category in segments.items():
        areas[category] = areas.get(category, 0) + int(sizes[number])
    counts = Counter(segments.values())
    classes = sorted(areas, key=lambda category: -areas[category])
    size = max(13, round(max(picture.size) / 40))
    font, step = label_font(size), round(1.7 * size)
    room = max(1, picture.height // step - 1)
    shown = classes if len(classes) <= room else classes[: room - 1]
    texts = [names[k] if counts[k] == 1 else f"{names[k]} × {counts[k]}" for k in shown]
    if len(shown) < len(classes):
        texts.append(f"and {len(classes) - len(shown)} more")
    if not classes:
        texts.append("nothing")
    wide = 3 * size + round(max(map(font.getlength, texts)))
    canvas = Image.new("RGB", (picture.width + wide, picture.height), PAPER)
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for n, text in enumerate(texts):
        left, top = picture.width + size, size // 2 + n * step
        if n < len(shown):
            square = (left, top, left + size, top + size)
            draw.rectangle(square, tuple(colors[shown[n]].tolist()), INK)
        ink = INK if n < len(shown) else QUIET
        draw.text((left + 1.5 * size, top + size / 2), text, ink, font, "lm")
    return canvas
