"""`conceptax studio`: a page to draw, erase and attack in a browser."""

import contextlib
import dataclasses
import io
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import conceptax
from conceptax.cli.describe import correction, described
from conceptax.cli.failures import sentence, unboxed
from conceptax.cli.options import Model, OptionalModel, OptionalPath, computed_in
from conceptax.cli.streams import print_error, print_stage
from conceptax.studio.models import open_studio
from conceptax.studio.page import LOCAL, build_page, load_gradio, serve


@dataclasses.dataclass(frozen=True)
class Command:
    """Draw, erase and attack in a browser.

    A page on this machine, http://127.0.0.1:7860: draw with a model and an edited one from the same
    noise, try to bring a concept back, erase another one and watch, compare neighborhood attention
    with dense. It needs `pip install 'conceptax[ui]'`.

    The page reads no files; it writes below --output alone, and asks the network for nothing.

    Attributes:
      model: a folder or file; to erase from, of Stable Diffusion 1, 2 or XL.
      edited: a pipeline, or what `conceptax erase --export` wrote.
      output: a folder below which results may be saved; without it they are kept in memory.
      host: the address to serve at; others than 127.0.0.1 let other machines in, without a
        password.
      port: to serve at.
      dtype: computation dtype. auto takes the one that is fastest here, and says which.
    """

    model: Model = None
    edited: OptionalModel = None
    output: OptionalPath = None
    host: str = "127.0.0.1"
    port: int = 7860
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"


def run(command: Command) -> None:
    """Load, serve, and wait for Ctrl-C."""
    if not 1 <= command.port <= 65535:
        raise ValueError(f"--port takes a number from 1 to 65535, received {command.port}.")
    load_gradio()
    source = command.model or conceptax.bundled_model()
    print_stage(f"loading {command.model or 'the bundled model'}")
    studio = open_studio(
        source,
        command.edited,
        source="the bundled model" if command.model is None else str(command.model),
        output=command.output and Path(os.path.abspath(command.output.expanduser())),
        dtype=computed_in(command.dtype),
    )
    page = build_page(studio, sentence=_told, parse=parsed, explain=explained)
    try:
        address = serve(page, command.host, command.port)
    except OSError as error:
        raise ValueError(
            f"port {command.port} at {command.host} cannot be had: it is taken, or the address is "
            "none of this machine's. Choose another with --port or --host."
        ) from error
    if command.host not in LOCAL:
        print_error(
            f"conceptax studio: {command.host} lets in whoever reaches this machine, and there is "
            "no password."
        )
    print(f"{address.rstrip('/')}  (Ctrl-C ends it)", flush=True)
    threading.Event().wait()


def parsed(settings: Any, words: Sequence[str]) -> Any:
    """Settings, changed as flags of a command line say.

    Raises:
      ValueError: one sentence about what is wrong with them.
    """
    if not words:
        return settings
    import tyro

    kind = type(settings)
    if wrong := correction("studio", kind, words, {}):
        raise ValueError(wrong.replace("`conceptax studio --help-all` lists", "the table lists"))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options: Any = {"args": list(words), "config": (tyro.conf.FlagCreatePairsOff,)}
            return tyro.cli(kind, default=settings, **options)
    except SystemExit:
        raise ValueError(f"{unboxed(said.getvalue())}.") from None


def explained(kind: type) -> list[tuple[str, str, str]]:
    """Of each setting: how it is given, what stands for it otherwise, what it does."""
    return [(flag.spelled, flag.stands, flag.text) for flag in described(kind)]


def _told(error: BaseException) -> str:
    """What the page says of an error; with --debug its traceback is printed here."""
    if "--debug" in sys.argv or os.environ.get("CONCEPTAX_DEBUG"):
        traceback.print_exception(error)
    said = sentence(error)
    print_error(f"conceptax studio: {said}")
    return said
