"""What is printed, and to whom: terminals that cannot show a letter, readers that leave."""

import contextlib
import os
import select
import sys
from typing import Any


def prepare_streams() -> None:
    """What a terminal cannot show, or nobody reads, is no reason to fail."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def reader_left(error: BaseException | None) -> bool:
    """Whether the reason is that nobody reads what is printed: `conceptax … | head`."""
    reasons = []
    while error is not None:
        reasons.append(error)
        error = error.__cause__ or error.__context__
    if not any(isinstance(reason, BrokenPipeError) for reason in reasons):
        return False
    with contextlib.suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    return False


def silence(stream: Any) -> None:
    """Drop what a stream holds that could not be written, lest it is tried again at the end."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def print_stage(text: str) -> None:
    """What is being done, on a terminal: somebody waits for a sign of life."""
    if sys.stderr is not None and sys.stderr.isatty():
        print_error(f"{text} …")


def print_error(text: str) -> None:
    """A line on stderr, if anybody reads it."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
