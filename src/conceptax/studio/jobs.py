"""Jobs: work in a thread that tells how far it is, shows pictures meanwhile, and can be stopped."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8


class Picture(NamedTuple):
    """An image and what stands below it."""

    caption: str
    image: UInt8[np.ndarray, "H W 3"]


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """Pictures beside each other under a title."""

    title: str
    pictures: tuple[Picture, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Told:
    """What a job tells.

    Attributes:
      said: a sentence.
      done: share of the work, 0 to 1.
      rows: the pictures so far.
      ended: whether nothing follows.
    """

    said: str
    done: float = 0.0
    rows: tuple[Row, ...] = ()
    ended: bool = False


class Stopped(Exception):
    """Somebody stopped the job; raised where it tells something, which is between two steps."""


class Line:
    """Jobs that take turns, in the order in which they came."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._moved = threading.Condition()

    @contextlib.contextmanager
    def turn(self, job: "Job") -> Iterator[None]:
        """Wait for a job's turn, and hold it; `Stopped` comes while it waits, too."""
        with self._moved:
            self._jobs.append(job)
        try:
            with self._moved:
                while ahead := self._jobs.index(job):
                    job.tell(f"waiting for {ahead} other job{'s' * (ahead > 1)} to end")
                    self._moved.wait(0.2)
            yield
        finally:
            with self._moved:
                self._jobs.remove(job)
                self._moved.notify_all()


class Job:
    """Work that is under way.

    Args:
      line: of jobs, one of which runs at a time.
    """

    def __init__(self, line: Line | None = None) -> None:
        self._line = line or Line()
        self._stop = threading.Event()
        self._news = threading.Condition()
        self._told = Told("starting")
        self._fresh = True
        self._error: BaseException | None = None

    def stop(self) -> None:
        """Have the work stop before its next step."""
        self._stop.set()

    def tell(self, said: str, done: float | None = None, rows: Any = None) -> None:
        """Tell how far the work is; what is None stays as it was.

        Args:
          said: a sentence without its full stop.
          done: share of the work.
          rows: all pictures so far, a sequence of `Row`.

        Raises:
          Stopped: it shall stop.
        """
        if self._stop.is_set():
            raise Stopped
        last = self._told
        done = last.done if done is None else min(max(done, 0.0), 1.0)
        if (said, done) != (last.said, last.done) or rows is not None:
            self._say(Told(said, done, last.rows if rows is None else tuple(rows)))

    def run(self, work: Callable[["Job"], str]) -> Iterator[Told]:
        """Do the work in a thread of its own, and give the newest that it tells.

        What is told in between, while nobody asks, is passed by. Who closes the iterator stops the
        job.

        Args:
          work: takes the job; what it returns is the last thing told.

        Raises:
          BaseException: what the work raised, but for `Stopped`.
        """
        thread = threading.Thread(target=self._work, args=(work,), daemon=True)
        thread.start()
        try:
            while True:
                with self._news:
                    self._news.wait_for(lambda: self._fresh)
                    told, self._fresh = self._told, False
                if told.ended and self._error is not None:
                    raise self._error
                yield told
                if told.ended:
                    return
        finally:
            self.stop()

    def _work(self, work: Callable[["Job"], str]) -> None:
        said, done = "", 1.0
        try:
            with self._line.turn(self):
                said = work(self)
        except Stopped:
            said, done = f"Stopped. The last was: {self._told.said}.", self._told.done
        except BaseException as error:  # SystemExit too, which no loop here may end a thread with
            self._error = error
        self._say(Told(said, done, self._told.rows, ended=True))

    def _say(self, told: Told) -> None:
        with self._news:
            self._told, self._fresh = told, True
            self._news.notify_all()
