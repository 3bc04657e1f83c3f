"""Errors of reading and writing checkpoints, in sentences for people."""

from collections.abc import Sequence

from .. import errors

__all__ = ["CheckpointError", "ConversionError", "OutputError", "TypeToConvert", "listing"]

ConversionError = errors.ConversionError
CheckpointError = errors.CheckpointError
OutputError = errors.OutputError

_SHOWN = 8


class TypeToConvert(CheckpointError):
    """Weights of a type that no parameter keeps: they can be read only by converting them."""


def listing(names: Sequence[str], shown: int = _SHOWN) -> str:
    """Names joined by commas, cut to a readable length with the number left out."""
    head = ", ".join(names[:shown])
    return head if len(names) <= shown else f"{head}, … and {len(names) - shown} more"
