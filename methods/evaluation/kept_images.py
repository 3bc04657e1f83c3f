"""Images kept as they are drawn, so that a run that was killed goes on where it was.

One PNG file for each, by its number: `17_0.png` is the image of prompt 17, as ESD's and
UnlearnDiffAtk's programs name them, so that other evaluators can read the folder.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image


class KeptImages:
    """A folder of images by number; a file is there only when it is complete."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, number: int) -> Path:
        """Of an image."""
        return self.folder / f"{number}_0.png"

    def missing(self, count: int) -> list[int]:
        """Which of the first `count` images are not there."""
        return [number for number in range(count) if not self.path(number).is_file()]

    def complete(
        self,
        count: int,
        size: int,
        draw: Callable[[Int[np.ndarray, " B"]], UInt8[np.ndarray, "B H W 3"]],
        done: Callable[[int, int], None] = lambda drawn, of: None,
    ) -> None:
        """Draw what is missing, `size` at a time; each is kept as soon as its batch is drawn.

        Args:
          count: how many images there are.
          size: of a batch.
          draw: gives the images of these numbers.
          done: told how many of those that were missing are drawn, after each batch.
        """
        missing = self.missing(count)
        for start in range(0, len(missing), size):
            numbers = missing[start : start + size]
            for number, image in zip(numbers, draw(np.asarray(numbers)), strict=True):
                self.keep(number, image)
            done(start + len(numbers), len(missing))

    def keep(self, number: int, image: UInt8[np.ndarray, "H W 3"]) -> None:
        """Write one image, at once."""
        path = self.path(number)
        unfinished = path.with_name(f".{path.name}")
        Image.fromarray(image).save(unfinished, format="PNG")
        os.replace(unfinished, path)

    def read(self, numbers: Sequence[int] | Int[np.ndarray, " B"]) -> UInt8[np.ndarray, "B H W 3"]:
        """Images by their numbers."""
        found = []
        for number in numbers:
            with Image.open(self.path(int(number))) as image:
                found.append(np.asarray(image.convert("RGB")))
        return np.stack(found)

    def batches(self, count: int, size: int) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
        """The first `count` images, `size` at a time."""
        for start in range(0, count, size):
            yield self.read(range(start, min(start + size, count)))
