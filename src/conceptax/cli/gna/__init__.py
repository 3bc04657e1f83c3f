"""`conceptax gna simulate`, `gna search` and `gna bench`: what neighborhood attention saves.

The first two need no GPU; the last one measures where it runs.
"""

import re

from .commands import Bench, Search, Simulate

COMMANDS = {"simulate": Simulate, "search": Search, "bench": Bench}


def run(command: Simulate | Search | Bench) -> None:
    """Print what was asked for; a search with an output draws it, too.

    Raises:
      ValueError: a flag does not suit the others; the message calls it as it was typed.
    """
    try:
        if isinstance(command, Simulate):
            from .simulate import simulated

            print(simulated(command))
        elif isinstance(command, Search):
            from .search import search

            search(command)
        else:
            from .bench import bench

            bench(command)
    except ValueError as error:
        if type(error) is not ValueError:  # of files, in words of their own
            raise
        raise ValueError(_in_flags(str(error))) from error


def _in_flags(message: str) -> str:
    """A message of `kernels.gna` with its arguments called as the flags that give them."""
    flags = {"kernel_size": "--window", "token_layout": "--layout", "token layout": "--layout"}
    flags |= {"is_causal": "--causal"}
    for name in ("query_tile", "key_tile", "kv_heads", "head_dim"):
        flags[name] = "--" + name.replace("_", "-")
    # Names that are words, too, are meant where a message says what they must be or are.
    plain = "stride|dilation|batch|heads|additional|sparsity|tolerance|attention_share|replaced"
    message = re.sub(rf"(?<![-\w])({'|'.join(flags)})\b", lambda m: flags[m[1]], message)
    written = re.compile(rf"(?<![-\w])({plain})(?= must\b|=)")
    return written.sub(lambda match: "--" + match[1].replace("_", "-"), message)
