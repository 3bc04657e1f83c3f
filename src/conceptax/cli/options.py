"""Flags that several commands share."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

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


def flags(kind: Any, prefix: str = "--") -> dict[tuple[str, ...], str]:
    """The flags of a command: path of a setting in its dataclass -> how it is written."""
    plain = get_origin(kind) or kind
    bound = dict(zip(getattr(plain, "__parameters__", ()), get_args(kind), strict=False))
    hints = get_type_hints(plain, include_extras=True)
    found: dict[tuple[str, ...], str] = {}
    for field in dataclasses.fields(plain):
        hint, extras = hints[field.name], ()
        if get_origin(hint) is Annotated:
            hint, *extras = get_args(hint)
        hint = bound.get(hint, hint)
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(get_origin(hint) or hint):
            nameless = any(getattr(extra, "name", None) == "" for extra in extras)
            inner = flags(hint, prefix if nameless else f"{prefix}{name}.")
            found |= {(field.name, *path): flag for path, flag in inner.items()}
        elif tyro.conf.Positional not in extras:
            no = "no-" if hint is bool and field.default is True else ""
            found[(field.name,)] = f"{prefix}{no}{name}"
    return found


# Flags that name a model, a part of one, or what is added to one: also by an id of the Hub.
MODELS = frozenset(
    {
        "model",
        "source",
        "original",
        "edited",
        "never_knew",
        "classifier",
        "clip",
        "dino",
        "blip",
        "blip2",
        "motion_adapter",
        "open_clip",
        "teacher",
        "tokenizer",
        "add",
    }
)


def fetched(command: Any) -> Any:
    """The command with ids of the Hub in `MODELS` replaced by where these models lie.

    Raises:
      CheckpointError: one cannot be had.
    """
    from conceptax.converters.hub import hub_id, local

    def place(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(place, value))
        return local(value) if isinstance(value, Path) and hub_id(value) else value

    names = {field.name for field in dataclasses.fields(command)} & MODELS
    found = {name: place(value) for name in names if (value := getattr(command, name)) is not None}
    changed = {name: value for name, value in found.items() if value != getattr(command, name)}
    return dataclasses.replace(command, **changed) if changed else command


def check_numbers(command: Any, known: Mapping[tuple[str, ...], str]) -> None:
    """Check every number among the settings of a command, whose `flags` are `known`.

    Raises:
      SeedError: a seed is outside what random numbers are made from.
      ValueError: a number is NaN or infinite.
    """
    from conceptax.methods.seeds import check_seed

    for path, flag in known.items():
        value = functools.reduce(getattr, path, command)
        if path[-1] == "seed":
            check_seed(value, flag)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, float) and not math.isfinite(each):
                raise ValueError(f"{flag} takes a finite number, received {each}.")


def check_paths(kind: Any, arguments: Sequence[str]) -> None:
    """Refuse an empty path, which would be the working folder: often a variable that is not set.

    Args:
      kind: the command's type.
      arguments: before they are parsed.

    Raises:
      ValueError: names the flag.
    """
    plain = get_origin(kind) or kind
    hints = get_type_hints(plain)
    taken = {
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(plain)
        if Path in (hints[field.name], *get_args(hints[field.name]))
    }
    before = ""
    for each in arguments:
        flag = before if not each else each.removesuffix("=")
        if flag in taken and (not each or each.endswith("=")):
            raise ValueError(f"{flag} is empty: it takes a path.")
        if not each and not before.startswith("--"):
            raise ValueError("an argument is empty: leave it out, or name a path.")
        before = each


def chosen(arguments: Sequence[str], option: str, default: str) -> str:
    """The value that the arguments give an option, before they are parsed."""
    value = default
    for here, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, _, joined = here.partition("=")
        if name == option:
            value = joined or following
    return value
