"""`conceptax gna simulate`, `gna search` and `gna bench`: what neighborhood attention saves.

The first two need no GPU; the last one measures where it runs.
"""

from importlib import import_module

from .commands import Bench, Search, Simulate

COMMANDS = {"simulate": Simulate, "search": Search, "bench": Bench}


def run(command: Simulate | Search | Bench) -> None:
    """Print what was asked for; a search with an output draws it, too."""
    import_module(f".{type(command).__name__.lower()}", __name__).run(command)
