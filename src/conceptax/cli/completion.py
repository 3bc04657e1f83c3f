"""`conceptax completion`: a script that completes commands, flags and their values in a shell."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

import tyro

from conceptax.cli import commands
from conceptax.cli.describe import Flag, described

_COMMON = ("--help", "--help-all", "--debug", "--offline", "--yes")


@dataclasses.dataclass(frozen=True)
class Command:
    """Print what completes conceptax in a shell.

    Attributes:
      shell: which one.
    """

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]


def run(command: Command) -> None:
    """Print the script."""
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[command.shell]())


def _flags() -> dict[str, dict[str, Flag]]:
    """Each command's flags by name, those of all its methods; "" is what stands without one."""
    found: dict[str, dict[str, Flag]] = {}
    for name in commands.COMMANDS:
        module, kind = commands.load(name, [])
        kinds = [kind, *getattr(module, "types", dict)().values()]
        found[name] = {flag.name: flag for each in kinds for flag in described(each)}
    return found


def _words(known: Mapping[str, Mapping[str, Flag]]) -> dict[str, list[str]]:
    """What the first words may be followed by: "" and every first word of two.

    Args:
      known: from `_flags`.
    """
    found: dict[str, list[str]] = {"": []}
    for name, flags in known.items():
        first, *second = name.split()
        if first not in found[""]:
            found[""].append(first)
        if second := second or (list(flags[""].choices) if "" in flags else []):
            found.setdefault(first, []).extend(second)
    return found


def _bash() -> str:
    known, cases, values = _flags(), [], []
    for name, flags in known.items():
        names = " ".join((*filter(None, flags), *_COMMON))
        cases.append(f'    "{name}") flags="{names}" ;;')
        values += [
            f'    "{name} {flag.name}") offered="{" ".join(flag.choices)}" ;;'
            for flag in flags.values()
            if flag.name and flag.choices
        ]
    second = [f'    "{one}") offered="{" ".join(more)}" ;;' for one, more in _words(known).items()]
    return "\n".join(
        (
            "_conceptax() {",
            '  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"',
            '  local name="${COMP_WORDS[1]}" offered="" flags=""',
            '  [ "$before" = "=" ] && before="${COMP_WORDS[COMP_CWORD-2]}"',
            '  case "${COMP_WORDS[1]} ${COMP_WORDS[2]}" in',
            *(f'    "{name}") name="{name}" ;;' for name in commands.COMMANDS if " " in name),
            "  esac",
            '  [ "$COMP_CWORD" = 1 ] && name=""',
            '  case "$name" in',
            *cases,
            "  esac",
            '  case "$name $before" in',
            *values,
            "  esac",
            '  if [ -z "$offered" ] && [ "$COMP_CWORD" -le 2 ]; then',
            '    case "$name" in',
            *second,
            "    esac",
            "  fi",
            '  [[ "$word" == -* ]] && offered="$flags"',
            '  COMPREPLY=($(compgen -W "$offered" -- "$word"))',
            "}",
            "complete -o default -F _conceptax conceptax",
        )
    )


def _zsh() -> str:
    """Bash's, which zsh understands once its own completion runs."""
    own = "(( $+functions[compdef] )) || { autoload -U +X compinit && compinit; }"
    return f"{own}\nautoload -U +X bashcompinit && bashcompinit\n{_bash()}"


def _fish() -> str:
    known, lines = _flags(), ["complete -c conceptax -f"]
    lines += [f"complete -c conceptax -l {flag[2:]}" for flag in _COMMON]
    for first, words in _words(known).items():
        when = f"__fish_seen_subcommand_from {first}" if first else "__fish_use_subcommand"
        for word in words:
            told = commands.COMMANDS.get(f"{first} {word}".strip())
            about = f" -d {_quoted(told.what)}" if told else ""
            lines.append(f"complete -c conceptax -n '{when}' -a {word}{about}")
    for name, flags in known.items():
        when = " && ".join(f"__fish_seen_subcommand_from {word}" for word in name.split())
        for flag in flags.values():
            if not flag.name:  # files, where the words above are not all
                lines += [] if flag.choices else [f"complete -c conceptax -n '{when}' -F"]
                continue
            takes = "" if not flag.value else " -x" if flag.choices else " -r -F"
            choices = f" -a {_quoted(' '.join(flag.choices))}" if flag.choices else ""
            lines.append(
                f"complete -c conceptax -n '{when}' -l {flag.name[2:]}{takes}{choices} "
                f"-d {_quoted(flag.text)}"
            )
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
