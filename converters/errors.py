"""Errors of reading and writing checkpoints, in sentences for people."""

from collections.abc import Sequence

from ..errors import ConceptaxError

_SHOWN = 8


class ConversionError(ConceptaxError, ValueError):
    """Base of this package's errors; its message says what was received and what to do next."""


class CheckpointError(ConversionError):
    """A checkpoint that cannot be read: absent, damaged, unsafe, or of another model."""


class TypeToConvert(CheckpointError):
    """Weights of a type that no parameter keeps: they can be read only by converting them."""


class OutputError(ConversionError):
    """A result that cannot be written; nothing of it is left on disk."""


def listing(names: Sequence[str], shown: int = _SHOWN) -> str:
    """Names joined by commas, cut to a readable length with the number left out."""
    head = ", ".join(names[:shown])
    return head if len(names) <= shown else f"{head}, … and {len(names) - shown} more"
