"""Flags that several commands share, and what is true of flags."""

import dataclasses
import functools
import math
import shlex
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro

from conceptax.cli.describe import Flag, annotated_fields


def shown(metavar: str, hint: str = "(optional)", help: str | None = None) -> Any:
    """How the help shows a flag: its value, and what stands for it where it is not given."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint, help=help)


HUB = "also an id of the Hub"  # marks flags of models, parts of one, and what is added to one

Model = Annotated[Path | None, shown("PATH", "(default: the bundled model)"), HUB]
OptionalModel = Annotated[Path | None, shown("PATH"), HUB]
Additions = Annotated[tyro.conf.UseAppendAction[tuple[Path, ...]], HUB]
OptionalPath = Annotated[Path | None, shown("PATH")]
OptionalInt = Annotated[int | None, shown("INT")]
OptionalText = Annotated[str | None, shown("TEXT")]
OptionalFloat = Annotated[float | None, shown("FLOAT")]
CheckpointDir = Annotated[
    Path | None,
    shown(
        "PATH",
        help="keep checkpoints here, and go on from the newest one. Without it they are kept "
        "beside the output, as .OUTPUT.checkpoints, until the output is there: after Ctrl-C the "
        "same command goes on where it was.",
    ),
]
Mesh = Annotated[
    tuple[int, int] | None,
    shown("DATA FSDP", help="devices that split the batch, and devices that split the parameters."),
]


_TYPED: ContextVar[str] = ContextVar("typed", default="")


def typed() -> str:
    """The command line that is being run, as a shell takes it; "" of a command run from Python."""
    return _TYPED.get()


def note_typed(words: Sequence[str]) -> None:
    """Keep the words of a command line, for `typed`."""
    _TYPED.set(shlex.join(words))


def computed_in(dtype: str) -> str:
    """A command's --dtype; for "auto" that which is fastest here, and it is said."""
    if dtype != "auto":
        return dtype
    from conceptax.cli.streams import print_error
    from conceptax.flax_models.layers.linear import fastest_dtype

    dtype = fastest_dtype()
    print_error(f"computing in {dtype}, the fastest dtype on this machine")
    return dtype


def concepts_in(given: Sequence[str]) -> list[str]:
    """The concepts to erase that arguments name, each once; one ending in .txt is a file of them.

    Raises:
      ConceptError: there is none, or a file cannot be read or holds none.
    """
    from conceptax.methods.text.phrases import ConceptError, read_phrases

    concepts: list[str] = []
    for each in given:
        concepts += read_phrases(each) if each.endswith(".txt") else [each]
    if not any(concept.strip() for concept in concepts):
        raise ConceptError("no concept was given: name one with --concept, for example 'three'.")
    return list(dict.fromkeys(concepts))


def fetched(command: Any) -> Any:
    """The command with ids of the Hub in flags marked `HUB` replaced by where these models lie.

    Raises:
      CheckpointError: one cannot be had.
    """
    names = [field.name for field, _, extras in annotated_fields(type(command)) if HUB in extras]
    if not names:
        return command
    from conceptax.converters.hub import hub_id, local

    def place(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(place, value))
        return local(value) if isinstance(value, Path) and hub_id(value) else value

    given = {name: getattr(command, name) for name in names}
    found = {name: place(value) for name, value in given.items()}
    return dataclasses.replace(command, **found) if found != given else command


def check_numbers(command: Any, flags: Iterable[Flag]) -> None:
    """Check every number among the settings of a command, as its `flags` describe them.

    Raises:
      SeedError: a seed is outside what random numbers are made from.
      ValueError: a number is NaN or infinite.
    """
    from conceptax.methods.seeds import check_seed

    for flag in flags:
        value = functools.reduce(getattr, flag.path, command)
        if flag.path[-1] == "seed":
            check_seed(value, flag.name)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, float) and not math.isfinite(each):
                raise ValueError(f"{flag.name} takes a finite number, received {each}.")


def check_paths(kind: Any, arguments: Sequence[str]) -> None:
    """Refuse an empty path, which would be the working folder: often a variable that is not set.

    Args:
      kind: the command's type.
      arguments: before they are parsed.

    Raises:
      ValueError: names the flag.
    """
    taken = {
        f"--{field.name.replace('_', '-')}"
        for field, hint, _ in annotated_fields(kind)
        if Path in (hint, *get_args(hint))
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
