"""`conceptax gna simulate`, `search`, `explore` and `bench`: what neighborhood attention saves.

All but the last need no GPU; that one measures where it runs.
"""

from importlib import import_module

from .commands import Bench, Explore, Search, Simulate

COMMANDS = {"simulate": Simulate, "search": Search, "explore": Explore, "bench": Bench}


def run(command: Simulate | Search | Explore | Bench) -> None:
    """Print what was asked for; a search with an output draws it, too."""
    import_module(f".{type(command).__name__.lower()}", __name__).run(command)
