"""Checks of what models are called with."""

from typing import Any


def check_axes(array: Any, axes: str, what: str) -> None:
    """Check how many axes an array has.

    Args:
      array: the array.
      axes: their names, separated by spaces, the batch's first: "B L".
      what: the model and its argument, for the message.

    Raises:
      ValueError: it has more or fewer.
    """
    names = axes.split()
    if array.ndim != len(names):
        missing = array.ndim == len(names) - 1
        raise ValueError(
            f"{what} must have {len(names)} axes, [{', '.join(names)}], received the shape "
            f"{tuple(array.shape)}" + (": add one for the batch, x[None]." if missing else ".")
        )
