"""COCO-Stuff's label maps, with their classes numbered without gaps."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from .datasets import DataError, in_threads, refuse

# Categories 1 to 182 that no image has: they were dropped before the data were published.
_DROPPED = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91})
CATEGORIES = tuple(number for number in range(1, 183) if number not in _DROPPED)
IGNORE = 255
_NEW: Mapping[int, int] = {number - 1: k for k, number in enumerate(CATEGORIES)} | {IGNORE: IGNORE}


def convert(source: Path, target: Path) -> int:
    """Write each 8-bit map of one folder, pixel v for category v + 1, to another: classes 0 to 170.

    Maps in which nothing is labeled are left out.

    Returns:
      how many were written.

    Raises:
      DataError: maps of another depth or with other pixels; nothing is written then.
      OSError: what the file system reports.
    """
    paths = sorted(Path(source).glob("*.png"))
    if not paths:
        raise DataError(f"{source} holds no .png files.")
    unknown = np.ones(256, bool)
    unknown[list(_NEW)] = False
    table = np.full(256, IGNORE, np.uint8)
    table[list(_NEW)] = list(_NEW.values())

    def read(path: Path) -> np.ndarray | str:
        try:
            with Image.open(path) as image:
                mode, pixels = image.mode, np.asarray(image)
        except (OSError, ValueError) as error:
            return f"{path} cannot be read ({error})"
        if mode not in ("L", "P"):
            return f"{path} is {mode}, not 8 bits of one channel"
        wrong = np.unique(pixels[unknown[pixels]])
        return f"{path} has unknown labels {wrong[:5].tolist()}" if wrong.size else table[pixels]

    def look(path: Path) -> str | None:
        found = read(path)
        return found if isinstance(found, str) else None

    def write(path: Path) -> int:
        labels = read(path)
        if isinstance(labels, str) or (labels == IGNORE).all():
            return 0
        Image.fromarray(labels).save(Path(target) / path.name)
        return 1

    refuse(str(source), [problem for problem in in_threads(look, paths) if problem])
    Path(target).mkdir(parents=True, exist_ok=True)
    return sum(in_threads(write, paths))
