"""Runs in the making: a result's folder and record, its training's log and checkpoints."""

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from conceptax.converters.errors import listing
from conceptax.errors import CheckpointError
from conceptax.interrupts import temporary
from conceptax.reporting.results import environment
from conceptax.text import read_text, write_json

LOG = "training.jsonl"


class Kept(NamedTuple):
    """How a training is run, which is not what it computes.

    Attributes:
      directory: of the checkpoints, and of the record and the log beside them; None keeps none.
      every: steps between them.
      options: more for `conceptax.methods.training.train`.
    """

    directory: Path | None = None
    every: int = 0
    options: Mapping[str, Any] = {}


NOT_KEPT = Kept()


class Run:
    """A result in the making: a folder, its record, and the log of the training in it.

        run = Run(folder, "erasing.json", {"method": …, "settings": …})
        with run.training(kept, rules=rules) as options:
            trained = train(…, **options)
        … save what was trained into the folder …
        run.write(last="last_cycle")

    Args:
      folder: the empty folder of the result; None until there is one, which `write` needs.
      name: of the record.
      record: what the run is; more is added as it comes about.
    """

    def __init__(self, folder: Path | None, name: str, record: Mapping[str, Any]) -> None:
        self.folder, self.name, self.record = folder, name, dict(record)
        self._log = ""  # also where another process writes it

    @contextlib.contextmanager
    def training(
        self, kept: Kept, *, rules: Any, length: str | None = None
    ) -> Iterator[dict[str, Any]]:
        """Options of the loop that trains in the block; then its log and how long it took.

        Args:
          kept: where its checkpoints are, which are claimed for what the record holds by now.
          rules: of sharding.
          length: as for `claim_run`.
        """
        options: dict[str, Any] = {"rules": rules, **kept.options}
        with contextlib.ExitStack() as stack:
            logs = kept.directory
            if logs is None:
                logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                stack.enter_context(temporary(logs))
            else:
                claim_run(logs / self.name, self.record, length=length)
                options |= {"checkpoint_dir": logs, "checkpoint_every": kept.every}
            log = logs / LOG
            with self.timed():
                yield options | {"metrics_path": log}
            if log.exists():
                self._log = log.read_text(encoding="utf-8")

    @contextlib.contextmanager
    def timed(self) -> Iterator[dict[str, Any]]:
        """Note how long the block takes, which trains nothing: no options."""
        began = time.perf_counter()
        yield {}
        self.record["seconds"] = round(time.perf_counter() - began, 1)

    def write(self, *, last: str, **more: Any) -> None:
        """Write the log, its last line as `last` in the record, and the record with `more`."""
        assert self.folder is not None
        if self._log:
            self.record[last] = json.loads(self._log.splitlines()[-1])
            (self.folder / LOG).write_text(self._log, encoding="utf-8")
        write_json(self.folder / self.name, self.record | more | environment())


def claim_run(path: Path, record: Mapping[str, Any], *, length: str | None = None) -> None:
    """Refuse checkpoints of another run; note this one's settings beside them.

    Args:
      path: the record beside the checkpoints, written here.
      record: what the run is, its settings under "settings".
      length: the setting that says how long it runs, where a run may go on for longer: nothing in
        it depends on its end.

    Raises:
      ValueError: the record there differs, or is damaged, or the folder holds something else.
      OSError: the folder cannot be made or written.
    """
    folder = path.parent
    _check_kept(folder, path)
    if path.exists():
        try:
            earlier = json.loads(read_text(path))
            before, now = _flat(earlier), _flat(json.loads(json.dumps(record)))
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}); choose another folder.") from error
        before.setdefault("dtype", now.get("dtype"))  # earlier versions did not tell
        differing = [
            f"{_flag(name)} ({_short(before.get(name))} before, {_short(now.get(name))} now)"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name) and name != f"settings.{length}"
        ]
        begun = [each for each in _content(folder, path) if each.suffix != ".jsonl"]
        if differing and begun:
            raise ValueError(
                f"{folder} holds checkpoints of a run with other settings: "
                f"{'; '.join(differing[:_SHOWN])}. A run goes on with the settings that it began "
                f"with: take those, remove {folder} to begin anew, or choose another place for "
                "the checkpoints."
            )
        if steps := checkpoints_in(folder):
            print(f"resuming from step {steps[-1]}, kept in {folder}", file=sys.stderr)
    import jax

    if jax.process_index() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(work := path.with_name(f".{path.name}"), record)
            work.replace(path)  # at once, since other processes read it
        except OSError as error:
            raise _not_kept(folder, error.strerror or str(error)) from error


def _check_kept(folder: Path, path: Path) -> None:
    """Refuse a place of checkpoints that is no folder, or somebody's own."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise _not_kept(folder, f"{there} is not a folder")
    if not path.exists() and (content := _content(folder, path)):
        found = listing(sorted(each.name for each in content), 3)
        raise _not_kept(folder, f"it holds something else ({found}) and no {path.name}")


def _content(folder: Path, record: Path) -> list[Path]:
    """What a folder of checkpoints holds besides their record."""
    own = (record.name, f".{record.name}")
    return [each for each in folder.iterdir() if each.name not in own] if folder.is_dir() else []


def _not_kept(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoints cannot be kept in {folder}: {why}. Choose another place for them."
    )


_SHOWN = 4  # settings that differ
_FLAGS = {
    "concepts": "--concept",
    "retained_phrases": "--retain",
    "words_beside_the_concept": "--retain",
    "scenes": "the number of scenes",
}


def _flag(name: str) -> str:
    """The flag that a value of a record came from."""
    plain = name.removeprefix("settings.").removeprefix("build.")
    if plain.startswith("concepts."):  # of subjects to learn, each with several flags
        return plain
    return _FLAGS.get(plain) or "--" + plain.replace("_", "-")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def _flat(content: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def checkpoints_in(directory: Path) -> list[int]:
    """The steps whose checkpoints a folder holds; it need not be there."""
    if not directory.is_dir():
        return []
    return sorted(int(each.name) for each in directory.iterdir() if each.name.isdigit())
