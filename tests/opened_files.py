"""How often files of weights are opened."""

import contextlib
import sys
from collections import Counter
from pathlib import Path

WEIGHTS = (".safetensors", ".bin", ".msgpack")
_watched: list[Counter] = []


def _note(event: str, arguments: tuple) -> None:
    if event == "open" and _watched and str(arguments[0]).endswith(WEIGHTS):
        _watched[-1][Path(arguments[0]).name] += 1


@contextlib.contextmanager
def opened_files():
    """Counts what the interpreter opens; hooks stay for good, so there is one."""
    if not hasattr(sys, "_conceptax_watches"):
        sys._conceptax_watches = True
        sys.addaudithook(_note)
    _watched.append(Counter())
    try:
        yield _watched[-1]
    finally:
        _watched.pop()
