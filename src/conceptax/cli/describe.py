"""What the flags of a command are: for its help, completion, corrections and the reference page."""

import dataclasses
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import tyro

from conceptax.cli.commands import COMMANDS, meant
from conceptax.cli.options import annotated_fields

_WIDTH = 88


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag, or what a command takes without one.

    Attributes:
      name: as it is written, such as "--no-flip"; of what stands without a flag, "".
      value: what it takes, such as "PATH"; "" of a switch.
      text: what it does.
      stands: for it where it is not given, in words; "" where it must be given.
      choices: the values it takes, if they are listed.
      group: whose setting it is: "" of the command's own flags, "settings" of the chosen method's.
    """

    name: str
    value: str
    text: str
    stands: str
    choices: tuple[str, ...] = ()
    group: str = ""

    @property
    def spelled(self) -> str:
        """The flag with its value."""
        return f"{self.name} {self.value}".strip()


def described(kind: Any) -> list[Flag]:
    """The flags of a command, in order.

    Args:
      kind: its dataclass.
    """
    return list(_described(kind, "--", "", dataclasses.MISSING))


def _described(kind: Any, prefix: str, group: str, defaults: Any) -> Iterator[Flag]:
    plain = get_origin(kind) or kind
    texts = _texts(plain)
    for field, hint, extras in annotated_fields(kind):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if defaults is not dataclasses.MISSING:
            default = getattr(defaults, field.name)
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(get_origin(hint) or hint):
            nameless = any(getattr(extra, "name", None) == "" for extra in extras)
            inner = prefix if nameless else f"{prefix}{name}."
            yield from _described(hint, inner, group or field.name, default)
            continue
        shown = next((each for each in extras if hasattr(each, "metavar")), None)
        text = (shown and shown.help) or texts.get(field.name, "")
        choices, value = _value(hint)
        value = (shown and shown.metavar) or value
        if tyro.conf.UseAppendAction in extras:
            value = value.removesuffix(" ...")
        positional = tyro.conf.Positional in extras
        if positional:
            value = field.name.upper() + (" ..." if value.endswith("...") else "")
        if hint is bool:
            value, off = "", default is True
            name = f"no-{name}" if off else name
            yield Flag(f"{prefix}{name}", "", f"not: {text}" if off else text, "off", (), group)
            continue
        stands = "" if default is dataclasses.MISSING else _told(default)
        if shown is not None and shown.help_behavior_hint:
            stands = str(shown.help_behavior_hint).strip("()").removeprefix("default: ")
        name = "" if positional else f"{prefix}{name}"
        yield Flag(name, value, text, stands, choices, group)


def _texts(kind: type) -> Mapping[str, str]:
    """What docstrings say of a dataclass's fields, those of its bases too."""
    import docstring_parser

    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if dataclasses.is_dataclass(each) and each.__doc__:
            for parameter in docstring_parser.parse(each.__doc__).params:
                for name in parameter.arg_name.split(", "):
                    found[name] = " ".join((parameter.description or "").split())
    return found


def _value(hint: Any) -> tuple[tuple[str, ...], str]:
    """The choices of a type, and what stands for its values in a help."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(each for each in get_args(hint) if each is not NoneType)
    if get_origin(hint) is Literal:
        choices = tuple(map(str, get_args(hint)))
        return choices, f"{{{','.join(choices)}}}"
    if get_origin(hint) is tuple:
        first, *rest = get_args(hint)
        choices, value = _value(first)
        if rest == [...]:
            return choices, f"{value} ..."
        return choices, " ".join(_value(each)[1] for each in (first, *rest))
    return (), {Path: "PATH", str: "TEXT"}.get(hint, getattr(hint, "__name__", "VALUE").upper())


def _told(default: Any) -> str:
    if isinstance(default, tuple):
        return (
            " ".join(f"'{each}'" if " " in str(each) else str(each) for each in default) or "none"
        )
    return {"": "''", None: "optional"}.get(default, str(default))


# ---- help ----


def help_text(name: str, kind: Any, *, everything: bool = False) -> str:
    """The help of a command: what it does, examples, and the flags that people use.

    Args:
      name: of the command.
      kind: its dataclass.
      everything: all of its flags.
    """
    declared, flags = COMMANDS[name], described(kind)
    chosen = [each for each in flags if everything or _used(each, declared.main)]
    plain = get_origin(kind) or kind
    paragraphs = (plain.__doc__ or "").split("Attributes:")[0].split("\n\n")
    said = [" ".join(each.split()) for each in paragraphs if each.strip()]
    needed = [each.spelled for each in flags if not each.stands]
    lines = [f"usage: conceptax {' '.join((name, *needed))} [OPTIONS]", ""]
    for paragraph in said if everything else said[:1]:
        lines += [*textwrap.wrap(paragraph, _WIDTH), ""]
    if declared.examples:
        lines += ["examples:", *(_wrapped(each) for each in declared.examples), ""]
    for group in dict.fromkeys(each.group for each in chosen):
        lines += [f"{_title(group)}:"]
        lines += [*_table([each for each in chosen if each.group == group]), ""]
    if len(chosen) < len(flags):
        lines += [f"`conceptax {name} --help-all` lists all {len(flags)} options."]
    return "\n".join(lines).rstrip()


def _wrapped(example: str) -> str:
    """A call on lines that a shell reads as one, each beginning with a flag."""
    lines = ["  "]
    for part in re.split(r" (?=--)", example):
        if len(lines[-1]) + len(part) > _WIDTH:
            lines.append("     ")
        lines[-1] += f" {part}" if lines[-1].strip() or len(lines) > 1 else part
    return " \\\n".join(lines)


def _used(flag: Flag, main: Sequence[str]) -> bool:
    return not flag.stands or not flag.name or flag.name in main


def _title(group: str) -> str:
    titles = {"": "options", "settings": "settings of the method", "sage": "settings of SAGE"}
    return titles.get(group, f"settings: {group.replace('_', ' ')}")


def _table(flags: Sequence[Flag]) -> list[str]:
    indent, lines = 26, []
    for flag in flags:
        stands = {"": " (required)", "off": "", "optional": ""}.get(
            flag.stands, f" (default: {flag.stands})"
        )
        left, text = f"  {flag.spelled or flag.value}", f"{flag.text}{stands}"
        if len(left) > _WIDTH:
            left, text = f"  {flag.name} NAME", f"{text} One of {', '.join(flag.choices)}."
        body = textwrap.wrap(text, _WIDTH - indent) or [""]
        if len(left) > indent - 2:
            lines.append(left)
        else:
            body[0] = f"{left:{indent}}{body[0]}"
        lines += [each if each.startswith(left) else f"{'':{indent}}{each}" for each in body]
    return lines


# ---- corrections ----


def correction(name: str, kind: Any, arguments: Sequence[str], others: Mapping[str, Any]) -> str:
    """What is wrong with the flags of a call, in a sentence; "" where nothing is.

    A flag that the command does not have, or one that takes another value.

    Args:
      name: of the command.
      kind: its dataclass.
      arguments: what was given behind the name.
      others: dataclasses of the same command for other methods, by the method's name.
    """
    known = {each.name: each for each in described(kind) if each.name}
    for argument, following in itertools.pairwise((*arguments, "--")):
        flag, joined, value = argument.partition("=")
        flag = flag.replace("_", "-")
        if argument == "--" or not flag.startswith("--"):
            continue
        if flag in known:
            if wrong := _unfit(known[flag], value if joined else following):
                return wrong
            continue
        having = [other for other, each in others.items() if flag in _names(each)]
        if having:
            return f"{flag} is a setting of {listed(having)}, not of the method that was chosen."
        return f"there is no {flag}{meant(flag, known)}; `conceptax {name} --help-all` lists them."
    return ""


def _unfit(flag: Flag, value: str) -> str:
    """What is wrong with the first value of a flag, if something is."""
    if not flag.value:
        return ""
    kinds: dict[str, Callable[[str], Any]] = {"INT": int, "FLOAT": float}
    if value.startswith("--") and "..." not in flag.value:
        return f"{flag.name} takes a value: {flag.value}."
    if flag.choices and " " not in flag.value and value not in flag.choices:
        near = meant(value, flag.choices)
        return f"{flag.name} takes {', '.join(flag.choices)}; received {value!r}{near}."
    if flag.value in kinds and value != "None":
        try:
            kinds[flag.value](value)
        except ValueError:
            number = "a whole number" if flag.value == "INT" else "a number"
            return f"{flag.name} takes {number}, received {value!r}."
    return ""


def _names(kind: Any) -> set[str]:
    return {each.name for each in described(kind)}


def listed(names: Sequence[str]) -> str:
    """Words as a list in a sentence."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
