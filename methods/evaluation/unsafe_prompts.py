"""Lists of prompts that attack an erasure, in the layouts in which they are published.

A CSV file with one prompt a row, and whatever of the settings that its image was drawn with:

    I2P (Schramowski et al. 2023, arXiv 2211.05105)  prompt, categories, sd_seed, sd_guidance_scale
    UnlearnDiffAtk's nudity, styles and objects      prompt, evaluation_seed, evaluation_guidance
    P4D (Chin et al. 2023, arXiv 2309.06135)         prompt, evaluation_seed
    Ring-A-Bell (Tsai et al. 2023, arXiv 2310.10012) sensitive prompt
    MMA-Diffusion (Yang et al. 2023, arXiv 2311.17516)  adv_prompt
    COCO's captions, as UnlearnDiffAtk chose them    prompt, evaluation_seed

Other columns are left alone.  A text file has one prompt a line; a JSON file is COCO's own
`captions_*.json`.
"""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...text import TextError, read_text
from ..text.phrases import ConceptError


@dataclasses.dataclass(frozen=True)
class UnsafePrompt:
    """One row. What the file does not say is None.

    Attributes:
      text: the prompt.
      categories: what is unsafe about it, such as ("sexual", "violence").
      seed, guidance_scale: that its image was drawn with.
    """

    text: str
    categories: tuple[str, ...] = ()
    seed: int | None = None
    guidance_scale: float | None = None


# field -> its type, and the columns that may hold it; numbers may be written as 512 or 512.0
_COLUMNS: Mapping[str, tuple[type, tuple[str, ...]]] = {
    "seed": (int, ("evaluation_seed", "sd_seed")),
    "guidance_scale": (float, ("evaluation_guidance", "sd_guidance_scale")),
}
_TEXTS = ("prompt", "adv_prompt", "sensitive prompt")


def read_unsafe_prompts(path: str | Path, *, category: str | None = None) -> list[UnsafePrompt]:
    """The prompts of a file in one of the layouts above, in order.

    Args:
      path: the file, UTF-8: .txt, .json, or else a CSV.
      category: only the rows that name this category.

    Raises:
      ConceptError: the file cannot be read, has no column `prompt`, holds a row without a prompt or
        a number that is none, no captions, or has no row (of the category).
    """
    try:
        text = read_text(path)
        if (kind := Path(path).suffix.lower()) == ".txt":
            rows = [UnsafePrompt(line.strip()) for line in text.splitlines() if line.strip()]
        else:
            rows = _captions(text, path) if kind == ".json" else _table(text, path)
    except TextError as error:
        raise ConceptError(str(error)) from error
    except (OSError, csv.Error) as error:
        raise ConceptError(f"cannot read the prompts in {path}: {error}.") from error
    known = sorted({name for row in rows for name in row.categories})
    if category is not None:
        rows = [row for row in rows if category in row.categories]
    if not rows:
        of = f" of category {category!r}; it has {known}" if category is not None else ""
        raise ConceptError(f"{path} holds no prompts{of}.")
    return rows


def _table(text: str, path: str | Path) -> list[UnsafePrompt]:
    """The rows of a CSV file."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    column = next((name for name in _TEXTS if name in (reader.fieldnames or ())), None)
    if column is None:
        raise ConceptError(
            f"{path} has no column 'prompt' (found {reader.fieldnames}): it takes a CSV file "
            "with a header, in the layout of I2P; 'adv_prompt' and 'sensitive prompt' will do too."
        )
    return [_row(row, column, f"{path}, line {reader.line_num}") for row in reader]


def _captions(text: str, path: str | Path) -> list[UnsafePrompt]:
    """One caption of each image in COCO's layout: the first, in the order of the images."""
    told = f"{path} is not in the layout of COCO's captions"
    try:
        content = json.loads(text)
        first: dict[int, str] = {}
        for each in content["annotations"]:
            first.setdefault(int(each["image_id"]), str(each["caption"]).strip())
        return [UnsafePrompt(first[each["id"]]) for each in content["images"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ConceptError(f"{told}: {type(error).__name__}, {error}.") from error


def _row(row: Mapping[str, str | None], column: str, where: str) -> UnsafePrompt:
    text = (row[column] or "").strip()
    if not text:
        raise ConceptError(f"{where}: the prompt is empty.")
    names = (row.get("categories") or "").split(",")
    values: dict[str, Any] = {}
    for field, (kind, columns) in _COLUMNS.items():
        found = ((row.get(name) or "").strip() for name in columns)
        value = next(filter(None, found), "")
        values[field] = kind(_number(value, where)) if value else None
    return UnsafePrompt(text, tuple(name.strip() for name in names if name.strip()), **values)


def _number(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConceptError(f"{where}: {text!r} is no number.")
    return number
