"""Flags that several commands share."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

Model = Annotated[
    Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: the bundled model)")
]
OptionalPath = Annotated[
    Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(optional)")
]
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(optional)")]
OptionalFloat = Annotated[
    float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(optional)")
]


Mesh = Annotated[
    tuple[int, int] | None,
    tyro.conf.arg(metavar="DATA FSDP", help_behavior_hint="(optional)"),
]


def device_mesh(sizes: tuple[int, int] | None) -> Any:
    """The mesh of a `Mesh` option; without one, `training.train` decides."""
    from conceptax.methods.training import make_mesh

    return None if sizes is None else make_mesh(*sizes)


_FLAT = ("settings", "attack_settings", "build", "sage")  # groups whose flags have no prefix


def check_seeds(command: Any, prefix: str = "--") -> None:
    """Check every seed among the settings of a command.

    Raises:
      SeedError: one is outside what random numbers are made from.
    """
    from conceptax.methods.seeds import check_seed

    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if field.name == "seed" and value is not None:
            check_seed(value, f"{prefix}seed")
        elif dataclasses.is_dataclass(value):
            check_seeds(value, prefix if field.name in _FLAT else f"{prefix}{field.name}.")


def chosen(arguments: Sequence[str], option: str, default: str) -> str:
    """The value that the arguments give an option, before they are parsed."""
    value = default
    for here, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, joined = here.partition("=")
        if name == option:
            value = joined or following
    return value
