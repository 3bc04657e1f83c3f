"""Progress and metrics of a run: a progress bar or plain lines, a JSONL file, TensorBoard."""

import collections
import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .tensorboard import TensorBoardWriter

_PLAIN_SECONDS = 10.0  # time between plain lines where there is no terminal
_RATE_WINDOW = 50  # steps over which the speed is averaged


class Reporter:
    """Reports the metrics of finished steps; a context manager, closed by `train`.

    Args:
      start, num_steps: completed steps at the start and at the end of the run.
      metrics_path: JSONL file; records of steps after `start` from an earlier, interrupted run
        are dropped, the others kept.
      tensorboard_dir: folder for a TensorBoard event file.
      log_every: write every n-th step (and the last) to the files.
      progress: show a bar on a terminal, a line every ten seconds elsewhere.
    """

    def __init__(
        self,
        start: int,
        num_steps: int,
        *,
        metrics_path: str | Path | None = None,
        tensorboard_dir: str | Path | None = None,
        log_every: int = 1,
        progress: bool = True,
        console: Console | None = None,
    ) -> None:
        self._num_steps, self._log_every, self._progress = num_steps, log_every, progress
        self._console = console or Console(stderr=True)
        self._file = _open_after(Path(metrics_path), start) if metrics_path else None
        self._tensorboard = TensorBoardWriter(tensorboard_dir) if tensorboard_dir else None
        self._began, self._next_line = time.monotonic(), 0.0
        self._times: collections.deque[float] = collections.deque(maxlen=_RATE_WINDOW + 1)
        self._bar: Progress | None = None
        if progress and self._console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
            self._bar = Progress(
                TextColumn("training"), *columns, TimeRemainingColumn(), console=self._console
            )
            self._task = self._bar.add_task("training", total=num_steps, completed=start, status="")

    def __enter__(self) -> "Reporter":
        return self

    def start(self) -> None:
        """Show the bar, from now on."""
        if self._bar is not None:
            self._bar.start()

    def __exit__(self, *_: object) -> None:
        for resource in (self._file, self._tensorboard):
            if resource is not None:
                resource.close()
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report that `step` steps are complete, the last one with these metrics."""
        now = time.monotonic()
        self._times.append(now)
        rate, span = None, now - self._times[0]
        if span > 0:
            rate = (len(self._times) - 1) / span
        finite = all(map(math.isfinite, metrics.values()))
        if step % self._log_every == 0 or step == self._num_steps or not finite:
            self._write(step, metrics, rate, now - self._began)
        status = f"loss {metrics['loss']:.4g}" + (f"  {rate:.3g} steps/s" if rate else "")
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
        elif self._progress and (now >= self._next_line or step == self._num_steps):
            self._next_line = now + _PLAIN_SECONDS
            self._console.print(f"step {step}/{self._num_steps}  {status}", highlight=False)

    def _write(
        self, step: int, metrics: Mapping[str, float], rate: float | None, seconds: float
    ) -> None:
        if self._file is not None:
            record: dict[str, Any] = {"step": step}
            # JSON has no NaN or infinity: those are the strings that `float` reads back
            record |= {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()}
            record |= {"steps_per_second": rate and round(rate, 4), "seconds": round(seconds, 3)}
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            self._tensorboard.scalars(step, metrics)


def _open_after(path: Path, start: int) -> Any:
    """Open a JSONL file for appending, keeping only whole records of steps up to `start`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    for line in path.read_text().splitlines() if start and path.exists() else ():
        # a line may be cut off where the earlier run was killed
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= start:
                kept.append(line + "\n")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)
    return path.open("a")
