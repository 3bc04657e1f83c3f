"""Settings of methods: their checks, and a registry of the methods that they belong to."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to erase, to personalize or to attack: an entry of a registry.

    Attributes:
      title: its name for people.
      config: the type of its settings, which no other entry has.
    """

    title: str
    config: type


M = TypeVar("M", bound=Method)


def method_of(methods: Mapping[str, M], config: Any) -> M:
    """The entry of a registry that some settings belong to.

    Raises:
      ValueError: they are of none.
    """
    for method in methods.values():
        if type(config) is method.config:
            return method
    names = sorted(method.config.__name__ for method in methods.values())
    raise ValueError(f"settings are one of {names}, received {type(config).__name__}.")


def fixed(value: Any) -> Any:
    """A setting that makes a method what it is: a field that is not for choosing."""
    return dataclasses.field(default=value, init=False)


def check_settings(
    settings: Any, *, least: Mapping[str, int], positive: Sequence[str] = ()
) -> None:
    """Check numbers against their least values, and choices against their types.

    Args:
      settings: a dataclass; a field of a `Literal` type takes its values alone.
      least: name of a setting -> its least value.
      positive: names of settings without which nothing changes.

    Raises:
      ValueError: names the setting, what it takes and what was received.
    """
    for name, value in least.items():
        if not (given := getattr(settings, name)) >= value:
            raise ValueError(f"{name} must be at least {value}, received {given}.")
    for name in positive:
        if not (given := getattr(settings, name)) > 0:
            raise ValueError(
                f"{name} must be positive, received {given}: with none, nothing changes."
            )
    for name, values in _choices(type(settings)).items():
        if (given := getattr(settings, name)) not in values:
            raise ValueError(f"{name} accepts {values}, received {given!r}.")


def check_min_timestep(value: float) -> None:
    """Refuse a lowest time that is no fraction of the schedule.

    Raises:
      ValueError: it is not.
    """
    if not 0 <= value < 1:
        raise ValueError(f"min_timestep is a fraction in [0, 1), received {value}.")


@functools.cache
def _choices(kind: type) -> dict[str, tuple[str, ...]]:
    """Field -> the values of its type, of those that are a `Literal`."""
    hints = get_type_hints(kind)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
