"""What runs as the `conceptax` command, and as `python -m conceptax`."""

import os
import signal
import sys


def main() -> int:
    """Run the command with the arguments of this process; signals end it from here on."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _stop)
    from conceptax import cli

    return cli.main()


def _stop(signum: int, _: object) -> None:
    os.write(2, b"conceptax: interrupted.\n")
    os._exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
