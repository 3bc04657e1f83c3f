"""Read text files that people give, and write records, each in one way everywhere."""

import codecs
import json
from pathlib import Path
from typing import Any

from .errors import ConceptaxError

_OTHERS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


class TextError(ConceptaxError, ValueError):
    """A file that is no text in UTF-8; the message names the file and the place in it."""


def read_text(path: Path | str) -> str:
    """The content of a text file in UTF-8, with a byte order mark or without.

    Raises:
      TextError: it is in another encoding, or no text.
      OSError: it cannot be read.
    """
    return decode(Path(path).read_bytes(), path)


def decode(data: bytes, path: Path | str) -> str:
    """The text in a file's bytes, as `read_text` gives it; `path` is for the message.

    Raises:
      TextError: they are in another encoding, or no text.
    """
    for mark, name in _OTHERS:
        if data.startswith(mark):
            raise TextError(f"{path} is in {name}; save it as UTF-8.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line = before.count(b"\n") + 1
        column = error.start - before.rfind(b"\n")
        raise TextError(
            f"{path} is not in UTF-8: line {line}, byte {column} of it is 0x{data[error.start]:02x}"
            "; save it as UTF-8."
        ) from error
    if "\0" in text:
        raise TextError(f"{path} is no text: it holds zero bytes. Save it as text in UTF-8.")
    return text


def write_json(path: Path, content: Any) -> None:
    """Write JSON, indented, ending with a line break; the file's folder is made."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
