"""Errors of reading and writing checkpoints, in sentences for people."""

from collections.abc import Iterable, Mapping, Sequence

from .. import errors

__all__ = [
    "CheckpointError",
    "ConversionError",
    "OutputError",
    "TypeToConvert",
    "counted",
    "first_line",
    "listing",
]

ConversionError = errors.ConversionError
CheckpointError = errors.CheckpointError
OutputError = errors.OutputError


class TypeToConvert(CheckpointError):
    """Weights of a type that no parameter keeps: they can be read only by converting them."""


def listing(names: Sequence[str], shown: int = 8) -> str:
    """Names joined by commas, cut to a readable length with the number left out."""
    head = ", ".join(names[:shown])
    return head if len(names) <= shown else f"{head}, … and {len(names) - shown} more"


def counted(problems: Mapping[str, Iterable[str]]) -> str:
    """Kinds of problems with their tensors: "2 missing: a, b; 1 unexpected: c"."""
    each = {kind: sorted(names) for kind, names in problems.items()}
    return "; ".join(f"{len(names)} {kind}: {listing(names)}" for kind, names in each.items())


def first_line(error: Exception) -> str:
    """The beginning of a library's message, or its type's name."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
