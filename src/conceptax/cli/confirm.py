"""How long a job will take, told before it starts, and a question on a terminal if that is long."""

import os
import sys
import time
from collections.abc import Callable

from conceptax.errors import ConceptaxError
from conceptax.methods.estimate import about

from .streams import print_error, print_stage

_WORTH_TELLING = 20.0  # seconds
_WORTH_ASKING = 20 * 60.0
_WORTH_A_GPU = 3600.0


class Declined(ConceptaxError):
    """Somebody was asked whether to go on, and said no."""


def announcing(what: str) -> Callable[[float, float], None]:
    """What `train` and `text_to_image` call with their estimate.

    Args:
      what: is done, such as "erasing".
    """

    def told(compiling: float, running: float) -> None:
        import jax

        total = compiling + running
        print_stage(f"compiling, {about(compiling)}")
        if total < _WORTH_TELLING:
            return
        device = jax.devices()[0].platform.upper()
        advice = "; a GPU is advised" if device == "CPU" and total > _WORTH_A_GPU else ""
        print_error(f"{what} will take {about(total)} on this {device}{advice}.")
        asking = bool(sys.stdin) and sys.stdin.isatty() and not os.environ.get("CONCEPTAX_YES")
        if asking and total > _WORTH_ASKING:
            print("Go on? [y/N] ", end="", file=sys.stderr, flush=True)
            if sys.stdin.readline().strip().casefold() not in ("y", "yes"):
                raise Declined("nothing was done; with --yes it goes on without asking.")

    return told


def counting(what: str) -> Callable[[int, int], None]:
    """What `text_to_image` calls after each batch: how many are done, and the time left.

    Args:
      what: is counted, such as "images".
    """
    began, next_line = time.monotonic(), 0.0

    def told(done: int, total: int) -> None:
        nonlocal next_line
        now = time.monotonic()
        if done < total and now >= next_line:
            next_line = now + 5
            left = (now - began) / done * (total - done)
            print_error(f"{done} of {total} {what}, {about(left)} left")

    return told
