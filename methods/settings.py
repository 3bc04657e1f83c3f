"""Checks that the settings of several methods share."""

from collections.abc import Mapping
from typing import Any


def check_settings(
    settings: Any, *, least: Mapping[str, int], accepted: Mapping[str, tuple[str, ...]]
) -> None:
    """Check numbers against their least values, names against those known, and common ranges.

    Args:
      settings: a dataclass; `min_timestep` and `similarity_cap` are checked wherever it has them.
      least: name of a setting -> its least value.
      accepted: name of a setting -> the values it takes.

    Raises:
      ValueError: names the setting, what it takes and what was received.
    """
    for name, value in least.items():
        if not getattr(settings, name) >= value:
            raise ValueError(
                f"{name} must be at least {value}, received {getattr(settings, name)}."
            )
    for name, values in accepted.items():
        if getattr(settings, name) not in values:
            raise ValueError(f"{name} accepts {values}, received {getattr(settings, name)!r}.")
    if not 0 <= getattr(settings, "min_timestep", 0) < 1:
        raise ValueError(f"min_timestep is a fraction in [0, 1), received {settings.min_timestep}.")
    if not -1 <= getattr(settings, "similarity_cap", 0) <= 1:
        raise ValueError(f"similarity_cap is a cosine, received {settings.similarity_cap}.")
