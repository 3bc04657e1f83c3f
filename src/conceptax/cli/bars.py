"""The progress of a sample or a file, step by step: a bar, or lines without a terminal."""

import time
from pathlib import Path
from typing import Any

from conceptax.cli.confirm import about
from conceptax.cli.streams import print_error

_LINE_SECONDS = 10.0  # between lines where there is no terminal
_PATIENCE = 2.0  # seconds before anything is told of files


class Steps:
    """What `TextToImage` tells of steps and of finished batches; a context manager.

    Args:
      what: is drawn, such as "videos".
    """

    def __init__(self, what: str) -> None:
        self._what, self._finished, self._total = what, 0, 1
        self._bar: Any = None
        self._next_line = 0.0
        self._stage: Any = None
        self._began = (0, 0.0)  # steps that were done when it began, and when that was

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def finished(self, done: int, total: int) -> None:
        """So many of all videos are drawn."""
        self._finished, self._total = done, total

    def step(self, stage: str, done: int, total: int) -> None:
        """Of the next one so many steps are, at the stage "sampling" or "decoding"."""
        if self._stage != (stage, self._finished):  # it begins
            self._stage, self._began = (stage, self._finished), (done, time.monotonic())
            if stage == "sampling" and done:
                print_error(f"going on after step {done} of {total}")
        which = f" of {self._what[:-1]} {self._finished + 1}" if self._finished else ""
        if not self._show(f"{stage}{which}", done, total):
            self._print(f"{stage}{which}", done, total)

    def _show(self, text: str, done: int, total: int) -> bool:
        """On a terminal, where nothing can be compiled and shown before the first step."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        if self._bar is None:
            console = Console(stderr=True)
            if not console.is_terminal:
                return False
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(
                TextColumn("{task.description}"), *columns, TimeRemainingColumn(), console=console
            )
            self._task = self._bar.add_task(text, total=total)
            self._bar.start()
        self._bar.update(self._task, description=text, completed=done, total=total)
        return True

    def _print(self, text: str, done: int, total: int) -> None:
        now, (before, began) = time.monotonic(), self._began
        if now < self._next_line or done in (0, total):
            return
        self._next_line = now + _LINE_SECONDS
        left = (now - began) / max(done - before, 1) * (total - done)
        print_error(f"{text}: {done} of {total}, {about(left)} left")


class Bytes(Steps):
    """What is told of files that are written, in megabytes, once they take a while."""

    def __init__(self) -> None:
        super().__init__("files")
        self._from = float("inf")

    def wrote(self, file: Path, done: int, total: int) -> None:
        """So many bytes of all are in a file."""
        self._from = min(self._from, time.monotonic() + _PATIENCE)
        if time.monotonic() > self._from:
            self.step(f"writing {file.name}, MB", done // 10**6, total // 10**6)
