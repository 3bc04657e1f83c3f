"""Outputs of commands, which appear only when complete, and the checkpoints of unfinished ones."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import conceptax
from conceptax.cli.confirm import announcing
from conceptax.cli.options import Model
from conceptax.converters import OutputError, atomic_folder
from conceptax.converters.files.output import CHECKPOINT_FILES, atomic_file
from conceptax.interrupts import temporary
from conceptax.reporting.runs import Kept, checkpoints_in


@contextlib.contextmanager
def new_folder(
    command: Any,
    path: Path | None = None,
    *,
    markers: Sequence[str] = CHECKPOINT_FILES,
    sources: Iterable[Path] = (),
) -> Iterator[Path]:
    """The folder that a command writes: `converters.atomic_folder`, entered before the work starts.

    So an occupied or unwritable place is refused before minutes are spent, and messages name it and
    not the temporary folder.

    Args:
      command: whose result it is, with `output` and `force`; what it names is read.
      path: of the result, if not its output.
      markers: as for `atomic_folder`.
      sources: more that is read.
    """
    path = Path(path or command.output)
    read = [*_sources_of(command), *sources]
    by = type(command).__module__.rsplit(".", 1)[-1].replace("_", " ")
    force = getattr(command, "force", False)
    with atomic_folder(
        path, force=force, markers=markers, sources=read, by=f"conceptax {by}"
    ) as folder:
        try:
            yield folder
        except OutputError as error:
            raise OutputError(str(error).replace(str(folder), str(path))) from error


def new_file(command: Any, path: Path | None = None) -> AbstractContextManager[Path]:
    """The file that a command writes, as `new_folder` for a folder."""
    path = Path(path or command.output)
    return atomic_file(path, force=command.force, sources=_sources_of(command))


def new_json(command: Any) -> AbstractContextManager[Path | None]:
    """The .json file that a command writes if it has an `output`, as `new_file`; None if not.

    Raises:
      ValueError: the output is another kind of file.
    """
    if command.output is None:
        return contextlib.nullcontext()
    if command.output.suffix.lower() != ".json":
        raise ValueError(f"--output takes a .json file, received {command.output}.")
    return new_file(command)


def settings_of(command: Any, *left_out: str) -> dict[str, Any]:
    """A command's flags as a record keeps them, in plain values, but for some."""
    values = dataclasses.asdict(command)
    kept = {name: value for name, value in values.items() if name not in left_out}
    return json.loads(json.dumps(kept, default=str))


def teller() -> Callable[[str], None]:
    """What tells the terminal, beside the output, what is being done."""
    from rich.console import Console

    progress = Console(stderr=True)
    return lambda text: progress.print(f"{text} …", highlight=False, soft_wrap=True)


def _sources_of(command: Any) -> list[Path]:
    """The files and folders that a command names, but for its result."""
    found: list[Path] = []
    for field in dataclasses.fields(command):
        if field.name in ("output", "dest"):
            continue
        value = getattr(command, field.name)
        if value is None and field.type == Model:
            value = conceptax.bundled_model()
        if dataclasses.is_dataclass(value):
            found += _sources_of(value)
            continue
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, str) and each.endswith((".txt", ".csv", ".json")):
                each = Path(each)
            if isinstance(each, Path):
                found.append(each)
    return found


@contextlib.contextmanager
def kept_run(command: Any, steps: int) -> Iterator[Kept]:
    """How a command's training is run: its checkpoints and, of --mesh, its devices.

    The checkpoints are in --checkpoint-dir, or beside the output until that is there.
    Entered before the output is claimed, and left after that is in place. Those beside the output
    are few and small for a short run: one is kept, and the last step only of a run that is longer
    than --checkpoint-every.

    Args:
      command: with output, checkpoint_dir, checkpoint_every, mesh.
      steps: of the training; 0 for none.

    Raises:
      ValueError: --checkpoint-every is negative, or is 0 while there is a --checkpoint-dir.
    """
    from conceptax.methods.training import make_mesh

    given, every = command.checkpoint_dir, command.checkpoint_every
    if every < 0 or (every == 0 and given is not None):
        raise ValueError(
            f"--checkpoint-every takes a number of steps, received {every}; 0 keeps no "
            "checkpoints, and goes without --checkpoint-dir."
        )
    # Without a mesh, `training.train` decides.
    devices: dict[str, Any] = {"mesh": None if command.mesh is None else make_mesh(*command.mesh)}
    devices["on_estimate"] = announcing("training")
    if given is not None or not (every and steps):
        yield Kept(given, every, devices)
        return
    output = Path(os.path.abspath(command.output.expanduser()))
    directory = output.with_name(f".{output.name or 'output'}.checkpoints")
    made = [place for place in (directory, *directory.parents) if not place.exists()]

    def worth_keeping() -> bool:
        return directory not in made or bool(checkpoints_in(directory))

    try:
        with temporary(directory, made[1:], worth_keeping):
            yield Kept(directory, every, {"keep": 1, "save_last": steps > every} | devices)
    except BaseException:
        if not worth_keeping():
            _discard(directory)
            for folder in made[1:]:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        raise
    _discard(directory)


def _discard(directory: Path) -> None:
    import jax

    if jax.process_index() == 0:
        shutil.rmtree(directory, ignore_errors=True)
