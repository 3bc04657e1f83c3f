"""For the API pages: an argument list's `a, b: what they are` describes each of them."""

import re
from typing import Any

import griffe

_GROUP = re.compile(r"^(\s*)(\*{0,2}\w+(?:, \*{0,2}\w+)+):(\s.*)?$")
_SECTION = re.compile(r"^\s*(Args|Arguments|Attributes|Keyword Args):\s*$")


class GroupedArguments(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Split the groups of an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = split_groups(obj.docstring.value)


def split_groups(docstring: str) -> str:
    """The docstring with an entry of its own for each name of a group."""
    lines, done, entry = docstring.splitlines(), [], None
    inside: str | None = None  # indentation of the entries of the section that a line is in
    names: list[str] = []

    def finish() -> None:
        nonlocal names, entry
        for name in names:
            done.append(f"{inside}{name}:{entry[0]}")
            done.extend(entry[1:])
        names, entry = [], None

    open_section = False
    for line in lines:
        indent = line[: len(line) - len(line.lstrip())]
        if names and line.strip() and len(indent) > len(inside or ""):
            entry.append(line)
            continue
        finish()
        if _SECTION.match(line):
            open_section, inside = True, None
        elif open_section and line.strip():
            inside = indent if inside is None else inside
            if len(indent) < len(inside):
                open_section = False
            elif (found := _GROUP.match(line)) and found[1] == inside:
                names, entry = found[2].split(", "), [found[3] or ""]
                continue
        done.append(line)
    finish()
    return "\n".join(done)
