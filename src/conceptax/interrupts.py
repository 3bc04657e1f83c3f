"""SIGINT and SIGTERM: at once where nothing would be kept, after the step where something can be.

A command is inside `Stopper` from its first line on.  There a thread sees each signal when it
comes, also while the main thread is inside a compiler, says so, removes what `temporary` names and
ends the process: no exception that a library could swallow, or that C++ cannot bear, is raised.
A loop that can stop between two steps is inside `noting`: the first signal is then only noted.
"""

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WAIT_SECONDS = 5.0  # for a block inside `whole`

_stopper: "Stopper | None" = None
_temporary: list[tuple[Path, tuple[Path, ...], Callable[[], Any]]] = []
_whole = threading.RLock()


class Stopper:
    """Context of a command that owns its process; the main thread enters it.

    Args:
      name: what the messages begin with.

    Attributes:
      stopping: whether a signal is ending the process.
    """

    def __init__(self, name: str) -> None:
        self.stopping = False
        self._name = name
        self._noted: list[int] | None = None  # of the loop that may finish its step

    def __enter__(self) -> "Stopper":
        global _stopper
        self._outer, _stopper = _stopper, self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        self.arm()
        return self

    def arm(self) -> None:
        """Have the signals written to the thread's pipe, again where a library took them."""
        for signum in _SIGNALS:
            signal.signal(signum, lambda *_: None)

    def __exit__(self, *_: Any) -> None:
        global _stopper
        for signum in _SIGNALS:
            signal.signal(signum, signal.SIG_DFL)  # what is left of the process ends in silence
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)
        self._thread.join()  # which returns at the pipe's end, unless it ends the process
        os.close(self._read)
        _stopper = self._outer

    @contextlib.contextmanager
    def noting(self, received: list[int]) -> Iterator[None]:
        """Append the first signal to `received` instead; another one ends the process."""
        self._noted = received
        try:
            yield
        finally:
            self._noted = None

    def _watch(self) -> None:
        while numbers := os.read(self._read, 64):
            for signum in numbers:
                if signum not in _SIGNALS:
                    continue
                noted = self._noted
                if noted is None or noted:
                    self._end(signum)
                else:
                    noted.append(signum)
                    say(f"{self._name}: {acknowledgement(signum)}")

    def _end(self, signum: int) -> None:
        self.stopping = True
        what = "interrupted" if signum == signal.SIGINT else "ended by SIGTERM"
        say(f"{self._name}: {what}.")
        end(128 + signum)


def end(status: int) -> NoReturn:
    """End the process from any thread, without what `temporary` names."""
    _whole.acquire(timeout=_WAIT_SECONDS)  # and kept: nothing is put in place any more
    _remove_temporary()
    os._exit(status)


def arm() -> None:
    """Handle the signals of the command again, if there is one, after a library took them."""
    if _stopper is not None:
        _stopper.arm()


@contextlib.contextmanager
def noting(received: list[int]) -> Iterator[None]:
    """Append the first SIGINT or SIGTERM to `received` and say so; the next acts as outside."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _stopper is not None:
        with _stopper.noting(received):
            yield
        return
    previous: dict[int, Any] = {}

    def restore() -> None:
        while previous:
            signal.signal(*previous.popitem())

    def handle(signum: int, _: Any) -> None:
        received.append(signum)
        restore()
        say(acknowledgement(signum))

    for signum in _SIGNALS:
        previous[signum] = signal.signal(signum, handle)
    try:
        yield
    finally:
        restore()


def acknowledgement(signum: int) -> str:
    """What to say when a loop finishes its step first."""
    again = "press Ctrl-C again" if signum == signal.SIGINT else "send it again"
    return f"{signal.Signals(signum).name} received: finishing the step; {again} to stop now."


@contextlib.contextmanager
def temporary(
    path: Path, parents: Sequence[Path] = (), unless: Callable[[], Any] | None = None
) -> Iterator[None]:
    """Have `path`, and `parents` that are then empty, removed if a signal ends the process here.

    Args:
      path, parents: files or folders; they need not be there.
      unless: whether `path` has become worth keeping, asked when the signal comes.
    """
    entry = (path, tuple(parents), unless or bool)
    _temporary.append(entry)
    try:
        yield
    finally:
        _temporary.remove(entry)


def whole() -> contextlib.AbstractContextManager[Any]:
    """Context of what a signal must not stop half-way, such as two renames; brief."""
    return _whole


def say(message: str) -> None:
    """A line on stderr at once, whatever another thread is writing there."""
    with contextlib.suppress(OSError):
        start = "\n" if os.isatty(2) else ""  # after ^C, or a bar
        os.write(2, f"{start}{message}\n".encode(errors="replace"))


def _remove_temporary() -> None:
    for path, parents, worth_keeping in list(_temporary):
        if worth_keeping():
            continue
        for _ in range(5):  # the main thread may be writing there
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            if not path.exists():
                break
        for folder in parents:
            with contextlib.suppress(OSError):
                folder.rmdir()
