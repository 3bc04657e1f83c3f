"""Checks that the settings of several methods share."""

import functools
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_settings(settings: Any, *, least: Mapping[str, int]) -> None:
    """Check numbers against their least values, choices against their types, and common ranges.

    Args:
      settings: a dataclass; a field of a `Literal` type takes its values alone, `learning_rate`,
        `erase_weight`, `min_timestep` and `similarity_cap` are checked wherever it has them.
      least: name of a setting -> its least value.

    Raises:
      ValueError: names the setting, what it takes and what was received.
    """
    for name, value in least.items():
        if not getattr(settings, name) >= value:
            raise ValueError(
                f"{name} must be at least {value}, received {getattr(settings, name)}."
            )
    for name in ("learning_rate", "erase_weight"):
        if not getattr(settings, name, 1) > 0:
            raise ValueError(
                f"{name} must be positive, received {getattr(settings, name)}: with none, nothing "
                "changes."
            )
    for name, values in _choices(type(settings)).items():
        if getattr(settings, name) not in values:
            raise ValueError(f"{name} accepts {values}, received {getattr(settings, name)!r}.")
    if not 0 <= getattr(settings, "min_timestep", 0) < 1:
        raise ValueError(f"min_timestep is a fraction in [0, 1), received {settings.min_timestep}.")
    if not -1 <= getattr(settings, "similarity_cap", 0) <= 1:
        raise ValueError(f"similarity_cap is a cosine, received {settings.similarity_cap}.")


@functools.cache
def _choices(kind: type) -> dict[str, tuple[str, ...]]:
    """Field -> the values of its type, of those that are a `Literal`."""
    hints = get_type_hints(kind)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
