"""What the flags of a command are: for its help, completion, corrections and the reference page."""

import dataclasses
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from conceptax.cli.commands import COMMANDS, meant

_WIDTH = 88


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag, or what a command takes without one.

    Attributes:
      name: as it is written, such as "--no-flip"; of what stands without a flag, "".
      value: what it takes, such as "PATH"; "" of a switch.
      kinds: of its values, as their types are, such as ("INT", "INT").
      several: whether any number of these may follow.
      text: what it does.
      stands: for it where it is not given, in words; "" where it must be given.
      choices: the values it takes, if they are listed.
      path: names of the fields that lead to what it sets; the first of several is whose setting it
        is: "settings" of the chosen method's.
    """

    name: str
    value: str
    kinds: tuple[str, ...]
    several: bool
    text: str
    stands: str
    choices: tuple[str, ...]
    path: tuple[str, ...]

    @property
    def spelled(self) -> str:
        """The flag with its value."""
        return f"{self.name} {self.value}".strip()

    @property
    def group(self) -> str:
        """Whose setting it is; "" of the command's own flags."""
        return self.path[0] if len(self.path) > 1 else ""


def described(kind: Any) -> list[Flag]:
    """The flags of a command, in order.

    Args:
      kind: its dataclass.
    """
    return list(_described(kind, "--", (), dataclasses.MISSING))


def annotated_fields(kind: Any) -> Iterator[tuple[dataclasses.Field[Any], Any, Sequence[Any]]]:
    """The settable fields of a dataclass: each, its plain type, what else its annotation says."""
    plain = get_origin(kind) or kind
    bound = dict(zip(getattr(plain, "__parameters__", ()), get_args(kind), strict=False))
    hints = get_type_hints(plain, include_extras=True)
    for field in dataclasses.fields(plain):
        if not field.init:
            continue
        hint, extras = hints[field.name], ()
        if get_origin(hint) is Annotated:
            hint, *extras = get_args(hint)
        yield field, bound.get(hint, hint), extras


def _described(kind: Any, prefix: str, above: tuple[str, ...], defaults: Any) -> Iterator[Flag]:
    plain = get_origin(kind) or kind
    texts = _texts(plain)
    for field, hint, extras in annotated_fields(kind):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if defaults is not dataclasses.MISSING:
            default = getattr(defaults, field.name)
        name, path = field.name.replace("_", "-"), (*above, field.name)
        if dataclasses.is_dataclass(get_origin(hint) or hint):
            nameless = any(getattr(extra, "name", None) == "" for extra in extras)
            inner = prefix if nameless else f"{prefix}{name}."
            yield from _described(hint, inner, path, default)
            continue
        shown = next((each for each in extras if hasattr(each, "metavar")), None)
        text = (shown and shown.help) or texts.get(field.name, "")
        if hint is bool:
            name, text = (f"no-{name}", f"not: {text}") if default is True else (name, text)
            yield Flag(f"{prefix}{name}", "", (), False, text, "off", (), path)
            continue
        choices, value = _value(hint)
        if tyro.conf.UseAppendAction in extras:
            value = value.removesuffix(" ...")
        several, kinds = value.endswith(" ..."), tuple(value.removesuffix(" ...").split())
        value = (shown and shown.metavar) or value
        positional = tyro.conf.Positional in extras
        if positional:
            value = f"{field.name.upper()}{' ...' if several else ''}"
        stands = "" if default is dataclasses.MISSING else _told(default)
        if shown is not None and shown.help_behavior_hint:
            stands = str(shown.help_behavior_hint).strip("()").removeprefix("default: ")
        name = "" if positional else f"{prefix}{name}"
        yield Flag(name, value, kinds, several, text, stands, choices, path)


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

_NUMBERS: Mapping[str, tuple[Callable[[str], Any], str]] = {
    "INT": (int, "a whole number"),
    "FLOAT": (float, "a number"),
}


def correction(name: str, kind: Any, arguments: Sequence[str], others: Mapping[str, Any]) -> str:
    """What is wrong with the words of a call, in a sentence; "" where nothing is.

    A flag that the command does not have, a value that one does not take, a word too many.

    Args:
      name: of the command.
      kind: its dataclass.
      arguments: what was given behind the name.
      others: dataclasses of the same command for other methods, by the method's name.
    """
    flags = described(kind)
    ask = f"`conceptax {name} --help-all` lists"
    for word, flag, values in _said(flags, arguments):
        if flag is not None:
            if wrong := _unfit(flag, values):
                return wrong
        elif not word.startswith("--"):
            return f"there is no place for {word!r}; {ask} what it takes."
        elif having := [other for other, each in others.items() if word in _names(each)]:
            return f"{word} is a setting of {listed(having)}, not of the method that was chosen."
        else:
            return f"there is no {word}{meant(word, (each.name for each in flags))}; {ask} them."
    return ""


def lacking(name: str, kind: Any, arguments: Sequence[str]) -> str:
    """What a call needs and does not have, in a sentence; "" where nothing is.

    Args:
      name, kind, arguments: as for `correction`.
    """
    flags = described(kind)
    given = [flag for _, flag, _ in _said(flags, arguments)]
    absent = [flag.spelled for flag in flags if not flag.stands and flag not in given]
    if not absent:
        return ""
    are = "is" if len(absent) == 1 else "are"
    return f"{listed(absent)} {are} missing; `conceptax {name} --help` shows examples."


def _said(
    flags: Sequence[Flag], arguments: Sequence[str]
) -> Iterator[tuple[str, Flag | None, Sequence[str]]]:
    """The flags that arguments name, or fill without a name: the word, the flag, its values."""
    known = {flag.name: flag for flag in flags if flag.name}
    places = [flag for flag in flags if not flag.name]
    words = list(arguments)
    while words and words[0] != "--":  # behind which nothing is a flag
        word, joined, value = words[0].partition("=")
        if word.startswith("--"):
            word = word.replace("_", "-")
            flag, words = known.get(word), words[1:]
        else:
            word, joined, value = words[0], True, words[0]
            flag, words = places[0] if places else None, words[1:]
        several = flag is not None and flag.several
        end = next((n for n, each in enumerate(words) if each.startswith("--")), len(words))
        first = [value] if joined else []
        count = end if several else min(end, max(len(flag.kinds if flag else ()) - len(first), 0))
        if not word.startswith("--") and not several:
            places = places[1:]
        yield word, flag, [*first, *words[:count]]
        words = words[count:]


def _unfit(flag: Flag, values: Sequence[str]) -> str:
    """What is wrong with the values of a flag, if something is."""
    name, kinds = flag.name or flag.value, flag.kinds
    if len(values) < len(kinds) and not flag.several:
        return f"{name} takes {'a value' if len(kinds) == 1 else 'values'}: {flag.value}."
    if values and not kinds:
        return f"{name} is a switch and takes no value; received {values[0]!r}."
    for value, kind in zip(values, itertools.cycle(kinds), strict=False):
        if flag.choices and len(kinds) == 1 and value not in flag.choices:
            near = meant(value, flag.choices)
            return f"{name} takes {', '.join(flag.choices)}; received {value!r}{near}."
        if kind in _NUMBERS and value != "None":
            number, told = _NUMBERS[kind]
            try:
                number(value)
            except ValueError:
                return f"{name} takes {told}, received {value!r}."
    return ""


def _names(kind: Any) -> set[str]:
    return {each.name for each in described(kind)}


def listed(names: Sequence[str]) -> str:
    """Words as a list in a sentence."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
