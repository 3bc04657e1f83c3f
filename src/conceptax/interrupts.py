"""SIGINT and SIGTERM: at once where nothing would be kept, after the step where something can be.

A command is inside `Stopper` from its first line on.  There a thread sees each signal when it
comes, also while the main thread is inside a compiler, says so, and has the main thread raise
`Interrupted`; where that is too busy to, or something swallows the exception, the thread removes
what `temporary` names and ends the process.  A loop that can stop between two steps is inside
`noting`: the first signal is then only noted.
"""

import contextlib
import os
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GRACE_SECONDS = 1.0  # for the main thread to unwind; then the process is ended

_stopper: "Stopper | None" = None
_temporary: list[tuple[Path, tuple[Path, ...]]] = []


class Interrupted(KeyboardInterrupt):
    """A signal ends the command."""


class Stopper:
    """Context of a command in the main thread: signals end it.

    Args:
      name: what the messages begin with.

    Attributes:
      signum: the signal that ends the command; None so far.
    """

    def __init__(self, name: str) -> None:
        self.signum: int | None = None
        self._name = name
        self._noted: list[int] | None = None  # of the loop that may finish its step
        self._lock = threading.RLock()  # a handler may come while the main thread holds it
        self._raised = self._again = self._done = False

    def __enter__(self) -> "Stopper":
        global _stopper
        self._active = threading.current_thread() is threading.main_thread()
        if not self._active:
            return self
        self._outer, _stopper = _stopper, self
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._previous = {each: signal.getsignal(each) for each in _SIGNALS}
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        self.arm()
        return self

    def arm(self) -> None:
        """Handle the signals, again where a library took them."""
        if self._active:
            for signum in self._previous:
                signal.signal(signum, self._handle)

    def __exit__(self, *_: Any) -> None:
        global _stopper
        if not self._active:
            return
        self._raised = True  # nothing is left to unwind
        for signum, handler in self._previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup)
        self._done = True
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)
        sys.unraisablehook = self._hook
        _stopper = self._outer
        if self.signum is not None:
            _remove_temporary()

    @contextlib.contextmanager
    def noting(self, received: list[int]) -> Iterator[None]:
        """Append the first signal to `received` instead; another one ends the command."""
        self._noted = received
        try:
            yield
        finally:
            self._noted = None

    def _handle(self, signum: int, frame: Any) -> None:
        """In the main thread, as soon as it runs Python: its part of ending the command."""
        self._receive()
        os.write(self._write, b"\0")  # the watching thread may have missed what was read here
        if self.signum is not None and not self._raised:
            self._raised = True
            raise Interrupted

    def _watch(self) -> None:
        deadline = None
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._read], [], [], left)
            self._receive()
            if self._done:
                return
            if self._again or (deadline is not None and not ready):
                _remove_temporary()
                os._exit(128 + (self.signum or signal.SIGINT))
            if self.signum is not None and deadline is None:
                deadline = time.monotonic() + _GRACE_SECONDS

    def _receive(self) -> None:
        """Decide about the signals that came, in the thread that notices them first."""
        with self._lock:
            try:
                numbers = os.read(self._read, 64)
            except BlockingIOError:
                return
            for signum in numbers:
                if signum not in self._previous:
                    continue
                if self.signum is not None:
                    self._again = True
                elif self._noted is not None and not self._noted:
                    self._noted.append(signum)
                    say(f"{self._name}: {acknowledgement(signum)}")
                else:
                    self.signum = signum
                    what = "interrupted" if signum == signal.SIGINT else "ended by SIGTERM"
                    say(f"{self._name}: {what}.")

    def _unraisable(self, unraisable: Any) -> None:
        """Nothing is said about an exception of ours that something swallowed."""
        if not issubclass(unraisable.exc_type, Interrupted):
            self._hook(unraisable)


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
def temporary(path: Path, parents: Sequence[Path] = ()) -> Iterator[None]:
    """Have `path`, and `parents` that are then empty, removed if a signal ends the process here."""
    entry = (path, tuple(parents))
    _temporary.append(entry)
    try:
        yield
    finally:
        _temporary.remove(entry)


def say(message: str) -> None:
    """A line on stderr at once, whatever another thread is writing there."""
    with contextlib.suppress(OSError, ValueError):
        start = "\n" if os.isatty(2) else ""  # after ^C, or a bar
        os.write(2, f"{start}{message}\n".encode(errors="replace"))


def _remove_temporary() -> None:
    for path, parents in list(_temporary):
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
