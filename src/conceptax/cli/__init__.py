"""The `conceptax` command: one module per subcommand, imported only when it is asked for.

A command's module holds a frozen dataclass `Command`, whose fields are the flags and whose
docstring is the help, and `run(command)`. It is named after the command's first word, or is in
`_MODULES`. A module of several commands has a dict `COMMANDS` of such dataclasses by the command's
second word instead; one whose flags depend on another flag also has `command_type(arguments)`,
which picks the dataclass. Where a command's name begins another's, the longer one is meant.
"""

import contextlib
import importlib
import os
import select
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import conceptax
from conceptax.interrupts import Stopper, arm

from .failures import in_flags, readable, sentence
from .processes import join_processes

COMMANDS = {
    "demo": "erase 'three' from the bundled model and show what changed",
    "erase": "erase concepts from a Stable Diffusion folder, by one of several methods",
    "evaluate": "say what an erasure did: is the concept gone, what else broke, who brings it back",
    "evaluate personalization": "say how well a personalized model draws its subject, and prompts",
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
    "doctor": "say what is installed, and which kernel runs here and why",
}
_READER_LEFT = 128 + signal.SIGPIPE  # as if it had ended by that signal, in silence
_MODULES = {"evaluate personalization": "evaluate_personalization"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0 is success, 1 a failure that is told in one sentence on stderr, 2 a wrong command line,
    128 + n the end by signal n.  With `--debug` a failure keeps its traceback; with `--offline` the
    Hub is not asked, and models of it come from its cache.

    Args:
      argv: the arguments; None takes those of this process, which then is the command's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or bool(os.environ.get("CONCEPTAX_DEBUG"))
    if "--offline" in arguments:
        os.environ["HF_HUB_OFFLINE"] = "1"
    arguments = [each for each in arguments if each not in ("--debug", "--offline")]
    name = next((" ".join(arguments[:n]) for n in (2, 1) if _is_command(arguments[:n])), None)
    label = f"conceptax {name}" if name else "conceptax"
    if argv is not None:
        return _answer(name, label, arguments, debug)
    with Stopper(label) as stopper:
        return _answer(name, label, arguments, debug, stopper)


def _answer(
    name: str | None, label: str, arguments: Sequence[str], debug: bool, stopper: Any = None
) -> int:
    """Run what the arguments ask for and turn whatever goes wrong into a status and a sentence."""
    _prepare_streams()
    flags: dict[tuple[str, ...], str] = {}  # of the command, once it is known
    try:
        status = _command(name, arguments, flags)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:  # in a process that is not the command's own
        _print_error(f"{label}: interrupted.")
        return 128 + signal.SIGINT
    except SystemExit as stop:  # a signal that ended training
        if stop.args and not isinstance(stop.code, int):
            raise
        print(f"{label}: {stop}", file=sys.stderr)
        return int(stop.code or 0)
    except BaseException as error:  # also what Rust raises, which is no Exception
        _silence(sys.stdout)
        if _reader_left(error):
            return _READER_LEFT
        if stopper is not None and stopper.stopping:
            return 1  # in vain: a signal is ending the process
        if debug:
            raise
        _print_error(f"{label}: error: {sentence(error, flags.values(), arguments)}")
        return 1


def _command(name: str | None, arguments: Sequence[str], flags: dict[tuple[str, ...], str]) -> int:
    if arguments[:1] == ["--version"]:
        print(f"conceptax {conceptax.__version__}")
        return 0
    if name is None:
        return _overview(arguments)
    with _quiet(flags):
        return _run(name, arguments[len(name.split()) :], flags)


def _prepare_streams() -> None:
    """What a terminal cannot show, or nobody reads, is no reason to fail."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _reader_left(error: BaseException | None) -> bool:
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


def _silence(stream: Any) -> None:
    """Drop what a stream holds that could not be written, lest it is tried again at the end."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _print_error(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _is_command(words: Sequence[str]) -> bool:
    return " ".join(words) in COMMANDS


def _run(name: str, arguments: Sequence[str], known: dict[tuple[str, ...], str]) -> int:
    import tyro

    from .options import check_numbers, check_paths, fetched, flags

    word, *second = name.split()
    module: Any = importlib.import_module(f"conceptax.cli.{_MODULES.get(name, word)}")
    several = getattr(module, "COMMANDS", None)
    choose = getattr(module, "command_type", None)
    kind = several[second[0]] if several else choose(arguments) if choose else module.Command
    known |= flags(kind)
    check_paths(kind, arguments)
    try:
        command = tyro.cli(
            kind,
            prog=f"conceptax {name}",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except SystemExit as stop:  # help was shown, or the command line was wrong
        return int(stop.code or 0)
    join_processes()
    arm()  # jax takes SIGTERM where there are several processes
    check_numbers(command, known)
    module.run(fetched(command) if known else command)
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
            "`conceptax COMMAND --help` lists the options of a command. For a model an id of the",
            "Hugging Face Hub does too: org/name[@revision]; --offline takes it from the cache.",
            "--debug shows the traceback of any error; --version shows the version.",
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
def _quiet(flags: Mapping[Any, str]) -> Iterator[None]:
    """Libraries keep their advice, and warnings take one line each.

    What XLA compiles is kept for the next run, unless `JAX_COMPILATION_CACHE_DIR` says otherwise.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(caches, "conceptax", "xla"))
    # What attention does over a mesh is told by its operands; the pointer is new in each process.
    os.environ.setdefault("JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    def show(message: Any, *_: Any) -> None:
        _print_error(f"conceptax: warning: {readable(in_flags(str(message), flags.values()))}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
