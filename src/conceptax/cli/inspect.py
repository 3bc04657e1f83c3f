"""`conceptax inspect`: say what a checkpoint is, without loading it."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True)
class Command:
    """Say what a checkpoint is: architecture, parameters, dtypes, sizes, what is missing or extra.

    Takes what `conceptax convert` takes: pipeline and component folders, single files (`.ckpt`,
    `.safetensors`, `.gguf`), LoRA files, and Flax's `.msgpack`. Only settings and headers are read,
    never tensors, so it takes seconds whatever the size. Ends with status 1 if the checkpoint
    cannot be loaded.

    Attributes:
      path: the folder or file.
      names: how many names of each list to print.
    """

    path: Annotated[Path, tyro.conf.Positional]
    names: int = 8


def run(command: Command) -> None:
    """Print what `command.path` is."""
    from conceptax.converters import inspect_checkpoint
    from conceptax.converters.errors import CheckpointError, listing

    def told(problems: dict[str, list[str]], indent: str) -> None:
        for kind, names in problems.items():
            print(f"{indent}{len(names)} {kind}: {listing(names, command.names)}")

    found = inspect_checkpoint(command.path)
    print(f"{command.path}: {found.kind}")
    for part in found.parts:
        dtypes = ", ".join(
            name if len(part.dtypes) == 1 else f"{name} {count / part.parameters:.0%}"
            for name, count in sorted(part.dtypes.items())
        )
        print(
            f"  {part.name or 'model'}: {part.architecture}, {part.parameters:,} parameters"
            f"{dtypes and ', '}{dtypes}, {part.nbytes / 1e6:,.1f} MB"
            f"{part.variant and f' (from the {part.variant} files)'}"
        )
        told(part.problems, "    ")
    if len(found.parts) > 1:
        parameters = sum(part.parameters for part in found.parts)
        size = sum(part.nbytes for part in found.parts)
        print(f"  all: {parameters:,} parameters, {size / 1e6:,.1f} MB")
    for what, names in found.leftovers.items():
        print(f"  not loaded, {len(names)} of {what}: {listing(names, command.names)}")
    told(found.problems, "  ")
    if found.advice and found.healthy:
        print(f"  {found.advice}")
    if not found.healthy:
        raise CheckpointError(f"{command.path} cannot be loaded whole: see above.")
