"""The `conceptax` command: one module per subcommand, imported only when it is asked for."""

import contextlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import conceptax
from conceptax.interrupts import Stopper, arm

from .commands import COMMANDS, load, meant, named
from .failures import in_flags, readable, sentence, unboxed
from .processes import join_processes, leave_processes
from .programs import kept_programs
from .streams import prepare_streams, print_error, reader_left, silence

_OVERVIEW = """\
usage: conceptax COMMAND [OPTIONS]

Erase, learn and locate visual concepts in JAX.

commands:
{}

`conceptax COMMAND --help` shows examples and the options that most people use, --help-all
every one. For a model an id of the Hugging Face Hub does too: org/name[@revision];
--offline takes it from the cache. --yes answers questions, --debug shows the traceback of
any error, --version the version. `conceptax completion bash` completes in the shell."""
_READER_LEFT = 128 + signal.SIGPIPE  # as if it had ended by that signal, in silence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0 is success, 1 a failure that is told in one sentence on stderr, 2 a wrong command line,
    128 + n the end by signal n.  With `--debug` a failure keeps its traceback; with `--offline` the
    Hub is not asked, and models of it come from its cache; with `--yes` no question is asked.

    Args:
      argv: the arguments; None takes those of this process, which then is the command's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or bool(os.environ.get("CONCEPTAX_DEBUG"))
    if "--offline" in arguments:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if "--yes" in arguments:
        os.environ["CONCEPTAX_YES"] = "1"
    arguments = [each for each in arguments if each not in ("--debug", "--offline", "--yes")]
    name = named(arguments)
    label = f"conceptax {name}" if name else "conceptax"
    if argv is not None:
        return _answer(name, label, arguments, debug)
    with Stopper(label) as stopper:
        return _answer(name, label, arguments, debug, stopper)


def _answer(
    name: str | None, label: str, arguments: Sequence[str], debug: bool, stopper: Any = None
) -> int:
    """Run what the arguments ask for and turn whatever goes wrong into a status and a sentence."""
    prepare_streams()
    flags: list[str] = []  # of the command, once it is known
    try:
        status = _command(name, arguments, flags)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:  # in a process that is not the command's own
        print_error(f"{label}: interrupted.")
        return 128 + signal.SIGINT
    except SystemExit as stop:  # a signal that ended training
        if stop.args and not isinstance(stop.code, int):
            raise
        print(f"{label}: {stop}", file=sys.stderr)
        return int(stop.code or 0)
    except BaseException as error:  # also what Rust raises, which is no Exception
        silence(sys.stdout)
        if reader_left(error):
            return _READER_LEFT
        if stopper is not None and stopper.stopping:
            return 1  # in vain: a signal is ending the process
        leave_processes()
        if debug:
            raise
        print_error(f"{label}: error: {sentence(error, flags, arguments)}")
        return 1


def _command(name: str | None, arguments: Sequence[str], flags: list[str]) -> int:
    if arguments[:1] == ["--version"]:
        print(f"conceptax {conceptax.__version__}")
        return 0
    if name is None:
        return _overview(arguments)
    with _quiet(flags), kept_programs():
        return _run(name, arguments[len(name.split()) :], flags)


def _run(name: str, arguments: Sequence[str], names: list[str]) -> int:
    import tyro

    from .describe import correction, described, help_text, lacking
    from .options import check_numbers, check_paths, fetched, note_typed

    module, kind = load(name, arguments)
    flags = described(kind)
    names += [flag.name for flag in flags if flag.name]
    if asked := {"-h", "--help", "--help-all"} & set(arguments):
        print(help_text(name, kind, everything="--help-all" in asked))
        return 0
    check_paths(kind, arguments)
    if wrong := correction(name, kind, arguments, getattr(module, "types", dict)()):
        return _wrong(name, wrong)
    options: Any = {"args": arguments, "config": (tyro.conf.FlagCreatePairsOff,)}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            command = tyro.cli(kind, prog=f"conceptax {name}", **options)
    except SystemExit:  # the command line was wrong
        ask = f"`conceptax {name} --help-all` lists what it takes."
        return _wrong(name, lacking(name, kind, arguments) or f"{unboxed(said.getvalue())}; {ask}")
    sys.stderr.write(said.getvalue())
    join_processes()
    arm()  # jax takes SIGTERM where there are several processes
    check_numbers(command, flags)
    note_typed(["conceptax", *name.split(), *arguments])
    module.run(fetched(command))
    return 0


def _overview(arguments: Sequence[str]) -> int:
    """Answer what is no command: a call for help, a group of commands, another word."""
    first = next(iter(arguments), "--help")
    if first in ("-h", "--help", "--help-all"):
        print(_OVERVIEW.format(_table(COMMANDS)))
        return 0
    group = [name for name in COMMANDS if name.split()[0] == first]
    if group and len(arguments) > 1 and arguments[1] not in ("-h", "--help", "--help-all"):
        words = [name.split()[1] for name in group]
        return _wrong(
            first, f"there is no {arguments[1]!r}{meant(arguments[1], words)}; {_of(words)}"
        )
    if group:
        print(f"usage: conceptax {first} COMMAND [OPTIONS]\n\ncommands:\n{_table(group)}\n")
        print(f"`conceptax {group[0]} --help` shows examples and options.")
        return 0
    words = list(dict.fromkeys(name.split()[0] for name in COMMANDS))
    return _wrong("", f"there is no command {first!r}{meant(first, words)}; {_of(words)}")


def _table(names: Collection[str]) -> str:
    width = max(map(len, names))
    return "\n".join(f"  {name:{width}}  {COMMANDS[name].what}" for name in names)


def _of(words: Sequence[str]) -> str:
    return f"choose one of: {', '.join(words)}."


def _wrong(name: str, sentence: str) -> int:
    label = f"conceptax {name}".strip()
    print_error(f"{label}: error: {sentence}")
    return 2


@contextlib.contextmanager
def _quiet(flags: Collection[str]) -> Iterator[None]:
    """Libraries keep their advice, and warnings take one line each."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    def show(message: Any, *_: Any) -> None:
        print_error(f"conceptax: warning: {readable(in_flags(str(message), flags))}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
