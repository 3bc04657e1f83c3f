"""The commands by name: what is known of them without importing one, and where each is.

A command's module holds a frozen dataclass `Command`, whose fields are the flags and whose
docstring is the help, and `run(command)`. A module of several commands has a dict `COMMANDS` of
such dataclasses by the command's second word instead; one whose flags depend on another flag also
has `command_type(arguments)`, which picks the dataclass.
"""

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple


class Declared(NamedTuple):
    """What is declared of a command.

    Attributes:
      what: it does, in a line of the overview.
      module: in `conceptax.cli`; by default its first word.
    """

    what: str
    module: str = ""


# Where a name begins another's, the longer one is meant.
COMMANDS = {
    "demo": Declared("erase 'three' from the bundled model and show what changed"),
    "erase": Declared("erase concepts from a Stable Diffusion folder, by one of several methods"),
    "evaluate": Declared(
        "say what an erasure did: is the concept gone, what else broke, who brings it back"
    ),
    "evaluate personalization": Declared(
        "say how well a personalized model draws its subject, and prompts",
        "evaluate_personalization",
    ),
    "personalize": Declared("learn a subject from a few images, by one of several methods"),
    "segment run": Declared("find the classes of any vocabulary in images"),
    "segment evaluate": Declared("measure a segmentation model: mIoU, panoptic quality"),
    "segment train": Declared("train a segmentation model, MAFT+, on scenes of one's own"),
    "segment coco-stuff": Declared("number the classes of COCO-Stuff's label maps without gaps"),
    "sample": Declared("draw images from prompts, or videos"),
    "convert": Declared(
        "load a checkpoint and write it again: other format, dtype, shards, checked"
    ),
    "inspect": Declared("say what a checkpoint is, without loading it"),
    "glyphs train": Declared("build the bundled model from scratch"),
    "glyphs segmenter": Declared("build the bundled segmenter from scratch"),
    "gna simulate": Declared("predict what a neighborhood attention saves, without a GPU"),
    "gna search": Declared("find the windows and strides that save most, and draw them"),
    "gna bench": Declared("measure a neighborhood attention here, beside what is predicted"),
    "doctor": Declared("say what is installed, and which kernel runs here and why"),
}


def named(arguments: Sequence[str]) -> str | None:
    """The command that arguments begin with, if they do."""
    names = (" ".join(arguments[:words]) for words in (2, 1))
    return next((name for name in names if name in COMMANDS), None)


def module_name(name: str) -> str:
    """The module of a command, below `conceptax.cli`."""
    return COMMANDS[name].module or name.split()[0]


def load(name: str, arguments: Sequence[str]) -> tuple[Any, Any]:
    """Import a command's module; give it, and the dataclass of the command with these arguments."""
    module: Any = importlib.import_module(f"conceptax.cli.{module_name(name)}")
    if hasattr(module, "COMMANDS"):
        return module, module.COMMANDS[name.split()[1]]
    choose = getattr(module, "command_type", None)
    return module, choose(arguments) if choose else module.Command
