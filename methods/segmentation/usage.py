"""How a segmenter is used where nobody says: `segmenter.json` in a model's folder.

A model that was trained for one small world states its classes there, the sentences that its text
tower knows, and the size at which it sees images; `conceptax segment run` takes them as defaults.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ...errors import ConceptaxError
from ...text import TextError, read_text, write_json
from .vocabulary import TEMPLATES, Vocabulary

USAGE = "segmenter.json"


class UsageError(ConceptaxError, ValueError):
    """A `segmenter.json` that cannot be used; the message names the file."""


@dataclasses.dataclass(frozen=True)
class Usage:
    """Defaults of a model.

    Attributes:
      vocabulary: its classes; None if it has none of its own.
      stuff: names of classes whose regions are one segment.
      templates: sentences with `{}` for a name.
      short_side: pixels along the shorter side of what the model sees.
      long_side: at most so many along the longer one.
    """

    vocabulary: Vocabulary | None = None
    stuff: tuple[str, ...] = ()
    templates: tuple[str, ...] = TEMPLATES
    short_side: int = 800
    long_side: int = 1333


def write_usage(usage: Usage, folder: Path) -> None:
    """Write `segmenter.json` into a folder."""
    classes = usage.vocabulary.classes if usage.vocabulary else None
    write_json(folder / USAGE, {**dataclasses.asdict(usage), "vocabulary": classes})


def read_usage(model: Path) -> Usage:
    """What a model's folder states; what it leaves out, or all without such a file, is usual.

    Args:
      model: the folder, or a checkpoint in it.

    Raises:
      UsageError: a `segmenter.json` of another form.
    """
    file = (model.parent if model.is_file() else model) / USAGE
    if not file.is_file():
        return Usage()
    try:
        return _usage(json.loads(read_text(file)))
    except (TextError, ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"{file} does not say how a segmenter is used: {error}") from error


def _usage(stated: Any) -> Usage:
    if not isinstance(stated, dict):
        raise ValueError("it must be an object.")
    if unknown := sorted(stated.keys() - {field.name for field in dataclasses.fields(Usage)}):
        raise ValueError(f"it has unknown {', '.join(unknown)}.")
    values = dict(stated)
    if (classes := values.pop("vocabulary", None)) is not None:
        values["vocabulary"] = Vocabulary(tuple(_texts(names, "vocabulary") for names in classes))
    for name in {"stuff", "templates"} & values.keys():
        values[name] = _texts(values[name], name)
    for name in {"short_side", "long_side"} & values.keys():
        if not isinstance(values[name], int) or values[name] < 1:
            raise ValueError(f"{name} is a number of pixels, received {values[name]!r}.")
    if wrong := [each for each in values.get("templates", ()) if "{}" not in each]:
        raise ValueError(f"the template {wrong[0]!r} lacks {{}}.")
    return Usage(**values)


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"{name} lists texts, received {value!r}.")
    return tuple(value)
