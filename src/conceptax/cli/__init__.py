"""The `conceptax` command: one module per subcommand, imported only when it is asked for.

A command's module holds a frozen dataclass `Command`, whose fields are the flags and whose
docstring is the help, and `run(command)`. It is named after the command's first word, or is in
`_MODULES`. A module of several commands has a dict `COMMANDS` of such dataclasses by the command's
second word instead; one whose flags depend on another flag also has `command_type(arguments)`,
which picks the dataclass. Where a command's name begins another's, the longer one is meant.
"""

import contextlib
import dis
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import conceptax

from .processes import join_processes

COMMANDS = {
    "demo": "erase 'three' from the bundled model and show what changed",
    "erase": "erase concepts from a Stable Diffusion folder, by one of several methods",
    "evaluate": "say what an erasure did: is the concept gone, what else broke, who brings it back",
    "evaluate personalization": "say how well a personalised model draws its subject, and prompts",
    "personalize": "learn a subject from a few images, by one of several methods",
    "segment run": "find the classes of any vocabulary in images",
    "segment evaluate": "measure a segmentation model: mIoU, panoptic quality",
    "segment train": "train a segmentation model, MAFT+, on scenes of one's own",
    "segment coco-stuff": "number the classes of COCO-Stuff's label maps without gaps",
    "sample": "draw images from prompts, or videos",
    "convert": "load a checkpoint and write it again: other format, dtype, shards, checked",
    "inspect": "say what a checkpoint is, without loading it",
    "glyphs train": "build the bundled model from scratch",
    "gna simulate": "predict what a neighborhood attention saves, without a GPU",
    "gna search": "find the windows and strides that save most, and draw them",
    "gna bench": "measure a neighborhood attention here, beside what is predicted",
}
_MODULES = {"evaluate personalization": "evaluate_personalization"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0 is success, 1 a failure that is told in one sentence on stderr, 2 a wrong command line,
    128 + n the end by signal n.  A bug keeps its traceback, as does everything with `--debug`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if arguments[:1] == ["--version"]:
        print(f"conceptax {conceptax.__version__}")
        return 0
    name = next((" ".join(arguments[:n]) for n in (2, 1) if _is_command(arguments[:n])), None)
    if name is None:
        return _overview(arguments)
    try:
        with _quiet():
            return _run(name, arguments[len(name.split()) :])
    except SystemExit as stop:  # a signal that ended training
        if stop.args and not isinstance(stop.code, int):
            raise
        print(f"conceptax {name}: {stop}", file=sys.stderr)
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print(f"conceptax {name}: interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        if debug or not is_for_people(error):
            raise
        print(f"conceptax {name}: error: {sentence(error)}", file=sys.stderr)
        return 1


def is_for_people(error: BaseException) -> bool:
    """Whether an error describes bad input or a refusing system, and not a bug.

    Those are the operating system's errors, and the `ValueError`s and `ArithmeticError`s that a
    `raise` statement of this package raised; the same types from inside a library, or from an
    operation that went wrong, are bugs.
    """
    if isinstance(error, OSError):
        return True
    if not isinstance(error, ValueError | ArithmeticError) or error.__traceback__ is None:
        return False
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    module = last.tb_frame.f_globals.get("__name__", "")
    raised = dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
    return raised and module.split(".")[0] == "conceptax"


def sentence(error: BaseException) -> str:
    """An error's message on one line."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}."
    return " ".join(str(error).split()) or type(error).__name__


def _is_command(words: Sequence[str]) -> bool:
    return " ".join(words) in COMMANDS


def _run(name: str, arguments: Sequence[str]) -> int:
    import tyro

    word, *second = name.split()
    module: Any = importlib.import_module(f"conceptax.cli.{_MODULES.get(name, word)}")
    several = getattr(module, "COMMANDS", None)
    choose = getattr(module, "command_type", None)
    try:
        command = tyro.cli(
            several[second[0]] if several else choose(arguments) if choose else module.Command,
            prog=f"conceptax {name}",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except SystemExit as stop:  # help was shown, or the command line was wrong
        return int(stop.code or 0)
    join_processes()
    module.run(command)
    return 0


def _overview(arguments: Sequence[str]) -> int:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    text = "\n".join(
        [
            "usage: conceptax COMMAND [OPTIONS]",
            "",
            "Erase, learn and locate visual concepts in JAX.",
            "",
            "commands:",
            *lines,
            "",
            "`conceptax COMMAND --help` lists a command's options; --debug shows the traceback of",
            "any error; --version shows the version.",
        ]
    )
    first = next(iter(arguments), "--help")
    if first in ("-h", "--help") or {"-h", "--help"} & set(arguments[1:2]):
        print(text)
        return 0
    if any(command.split()[0] == first for command in COMMANDS):
        wrong = f"{first!r} needs a second word"
    else:
        wrong = f"there is no command {first!r}"
    print(f"conceptax: error: {wrong}; choose one of: {', '.join(COMMANDS)}.", file=sys.stderr)
    return 2


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing is downloaded, libraries keep their advice, and warnings take one line each.

    What XLA compiles is kept for the next run, unless `JAX_COMPILATION_CACHE_DIR` says otherwise.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(caches, "conceptax", "xla"))
    # What attention does over a mesh is told by its operands; the pointer is new in each process.
    os.environ.setdefault("JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    def show(message: Any, *_: Any) -> None:
        print(f"conceptax: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
