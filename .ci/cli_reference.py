"""For the site: a page with every command and its flags, made from their dataclasses."""

from collections.abc import Iterator, Sequence
from typing import Any, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_INTRODUCTION = """\
# Commands

`conceptax COMMAND --help` says the same in the terminal. For a model that a command loads a folder,
a file or an id of the Hugging Face Hub does, `org/name[@revision]`; `--offline` takes it from the
cache. `--debug`, anywhere among the words, shows the traceback of an error.
"""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the page."""
    files.append(File.generated(config, "cli.md", content=page()))
    return files


def page() -> str:
    """The page in Markdown."""
    from conceptax.cli.commands import COMMANDS

    rows = [
        f"| [`{name}`](#conceptax-{_anchor(name)}) | {COMMANDS[name].what} |" for name in COMMANDS
    ]
    overview = ["| command | what it does |", "|---|---|", *rows]
    sections = [line for name in COMMANDS for line in _section(name)]
    return "\n".join([_INTRODUCTION, *overview, "", *sections])


def _anchor(name: str) -> str:
    return name.replace(" ", "-")


def _section(name: str) -> Iterator[str]:
    from conceptax.cli.commands import COMMANDS, load
    from conceptax.cli.describe import described

    _, kind = load(name, ())
    yield f"## conceptax {name}\n"
    told = (get_origin(kind) or kind).__doc__ or ""
    for paragraph in told.split("Attributes:")[0].split("\n\n"):
        if text := " ".join(paragraph.split()):
            yield f"{_escaped(text)}\n"
    if examples := COMMANDS[name].examples:
        yield "\n".join(["```sh", *examples, "```\n"])
    yield from _table([flag for flag in described(kind) if flag.group == ""])
    methods = _methods(name)
    for method, title in methods.items():
        _, kind = load(name, ("--method", method))
        yield f"### {name} --method {method}\n"
        yield f"Settings of {title}.\n"
        yield from _table([flag for flag in described(kind) if flag.group])
    if not methods:
        groups = dict.fromkeys(flag.group for flag in described(kind) if flag.group)
        for group in groups:
            of = group.replace("_", " ")
            yield f"### {name}: {of if 'settings' in of else f'settings of {of}'}\n"
            yield from _table([flag for flag in described(kind) if flag.group == group])


def _methods(name: str) -> dict[str, str]:
    """The methods that a command chooses from, with their titles."""
    from conceptax.methods import erasing, personalization

    families: dict[str, Any] = {"erase": erasing.METHODS, "personalize": personalization.METHODS}
    return {method: each.title for method, each in families.get(name, {}).items()}


def _table(flags: Sequence[Any]) -> Iterator[str]:
    if not flags:
        return
    yield "| flag | what it does | default |"
    yield "|---|---|---|"
    for flag in flags:
        text = _escaped(flag.text)
        value = flag.value
        if value.startswith("{"):
            listed = ", ".join(map(_code, value.strip("{}").split(",")))
            text += f"{'' if text.endswith('.') else '.'} One of {listed}."
            value = "NAME"
        default = {"": "must be given", "off": "off", "optional": ""}.get(flag.stands)
        if default is None:  # words of a hint are prose
            prose = " " in flag.stands and not set("'{_.*") & set(flag.stands)
            default = _escaped(flag.stands) if prose else _code(flag.stands)
        spelled = _code(f"{flag.name} {value}".strip())
        yield f'| <span class="flag">{spelled}</span> | {text} | {default} |'
    yield ""


def _code(text: str) -> str:
    return f"`{text}`"


def _escaped(text: str) -> str:
    """Text whose letters mean themselves in a table of Markdown; `code` stays code."""
    parts = text.split("`")
    for index in range(0, len(parts), 2):
        for letter in "\\*_<[|":
            parts[index] = parts[index].replace(letter, f"\\{letter}")
    return "`".join(parts).replace("``", "")
