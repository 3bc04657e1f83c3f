"""Sheets of images, drawn with Pillow: contact sheets and the before/after grid.

Images are uint8 [N, H, W, 3].
"""

import contextlib
import functools
import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

Images = UInt8[np.ndarray, "N H W 3"]

INK, QUIET, PAPER, LINE = "#1b1f24", "#6a737d", "#ffffff", "#d8dee4"


class Row(NamedTuple):
    """One prompt of a grid: its text, its images before and after [N, H, W, 3]."""

    prompt: str
    before: Images
    after: Images


class Block(NamedTuple):
    """Rows of a grid under a common title."""

    title: str
    rows: Sequence[Row]


def save_png(image: Any, file: Path | io.BytesIO, text: Mapping[str, str] | None = None) -> None:
    """Write one image (an array [H, W, 3] or a Pillow image), with text fields in the file."""
    info = PngInfo()
    for name, value in (text or {}).items():
        info.add_text(name, value)
    _as_image(image).save(file, format="PNG", pnginfo=info)


def sheet(
    images: Images,
    *,
    columns: int | None = None,
    gap: int = 4,
) -> Image.Image:
    """All images in rows, in their order."""
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count * 1.5 * height / width))
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    canvas = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), PAPER)
    for n, image in enumerate(images):
        left, top = gap + n % columns * (width + gap), gap + n // columns * (height + gap)
        canvas.paste(Image.fromarray(image), (left, top))
    return canvas


def before_after(
    blocks: Sequence[Block], *, title: str, note: str, cell: int = 192, gap: int = 6
) -> Image.Image:
    """Blocks side by side; each row shows a prompt, its images before, and those after.

    Args:
      blocks: with equally many images per row.
      title, note: above everything.
      cell: pixels an image is enlarged to.
      gap: pixels between images.
    """
    margin, head, label = 28, 172, 30
    each = len(blocks[0].rows[0].before)
    half = each * cell + (each - 1) * gap
    block_width = 2 * half + 3 * gap
    rows = max(len(block.rows) for block in blocks)
    width = len(blocks) * block_width + (len(blocks) + 1) * margin
    canvas = Image.new("RGB", (width, head + rows * (cell + label + 12) + margin), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, 22), title, INK, label_font(30, bold=True))
    draw.text((margin, 64), note, QUIET, label_font(18))
    for b, block in enumerate(blocks):
        left = margin + b * (block_width + margin)
        right = left + half + 3 * gap
        draw.text((left, 104), block.title, INK, label_font(20, bold=True))
        for x, name in ((left, "before"), (right, "after")):
            draw.text((x, 132), name, QUIET, label_font(18))
            draw.line((x, 158, x + half, 158), LINE, 2)
        for r, row in enumerate(block.rows):
            top = head + r * (cell + label + 12)
            draw.text((left, top), _shorten(row.prompt, block_width), INK, label_font(18))
            for x, images in ((left, row.before), (right, row.after)):
                for n, image in enumerate(images):
                    big = Image.fromarray(image).resize((cell, cell), Image.Resampling.BICUBIC)
                    canvas.paste(big, (x + n * (cell + gap), top + label))
    return canvas


def _as_image(image: Any) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))


def _shorten(text: str, width: int) -> str:
    font = label_font(18)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


@functools.cache
def label_font(size: int, bold: bool = False) -> Any:
    """DejaVu Sans, matplotlib's or the system's; without either Pillow's own, which knows less."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    places = [name]
    if (found := importlib.util.find_spec("matplotlib")) is not None and found.origin:
        places.insert(0, str(Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / name))
    for place in places:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(place, size)
    return ImageFont.load_default(size)
