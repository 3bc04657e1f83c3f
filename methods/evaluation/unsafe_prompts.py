"""Lists of unsafe prompts, in the layout of I2P.

I2P (Schramowski et al. 2023, "Safe Latent Diffusion", arXiv 2211.05105) is a CSV file with one
prompt a row and the settings that its image was drawn with.  Only the column `prompt` is required
here; `categories`, `sd_seed` and `sd_guidance_scale` are read beside it, other columns are left
alone.
"""

import csv
import dataclasses
import io
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


# field, and column below sd_ -> type; numbers may be written as 512 or 512.0
_COLUMNS: Mapping[str, type] = {"seed": int, "guidance_scale": float}


def read_unsafe_prompts(path: str | Path, *, category: str | None = None) -> list[UnsafePrompt]:
    """The rows of a CSV file in the layout of I2P, in order.

    Args:
      path: the file, UTF-8.
      category: only the rows that name this category.

    Raises:
      ConceptError: the file cannot be read, has no column `prompt`, holds a row without a prompt or
        a number that is none, or has no row (of the category).
    """
    try:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
        if "prompt" not in (reader.fieldnames or ()):
            raise ConceptError(
                f"{path} has no column 'prompt' (found {reader.fieldnames}): it takes a CSV file "
                "with a header, in the layout of I2P."
            )
        rows = [_row(row, f"{path}, line {reader.line_num}") for row in reader]
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


def _row(row: Mapping[str, str | None], where: str) -> UnsafePrompt:
    text = (row["prompt"] or "").strip()
    if not text:
        raise ConceptError(f"{where}: the prompt is empty.")
    names = (row.get("categories") or "").split(",")
    values: dict[str, Any] = {}
    for field, kind in _COLUMNS.items():
        value = (row.get(f"sd_{field}") or "").strip()
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
