"""What to say about an exception: one sentence, and whether it is a fault of this program."""

import os
import re
import sys
import traceback
from collections.abc import Collection, Sequence

from conceptax.errors import ConceptaxError

_LONGEST = 1000  # characters
_BUG = "This is a bug in conceptax or in a library; run again with --debug for the traceback."


# Names in Python -> names of the flags that set the same.
_ALIASES = {
    "num_inference_steps": ("steps",),
    "guidance_scale": ("guidance",),
    "num_frames": ("frames",),
    "num_steps": ("cycles", "steps"),
    "max_shard_size": ("shard_size",),
    "kernel_size": ("window",),
    "token_layout": ("layout",),
    "is_causal": ("causal",),
}
_ELSEWHERE = ("prediction_type", "tokenizer")  # which `conceptax convert` has flags for
_SIZES = "prompts|height|width|size"  # words that are also what memory depends on


def sentence(
    error: BaseException, flags: Collection[str] = (), arguments: Sequence[str] = ()
) -> str:
    """An exception in one line: what to do about it, or where to find out more.

    Args:
      error: the exception.
      flags: of the command, which take the place of the names that they have in Python.
      arguments: that were given.
    """
    found = (_about_platforms() if not isinstance(error, ConceptaxError) else None) or _about(error)
    return readable(in_flags(found, flags, arguments))


def readable(text: str) -> str:
    """Text on one line, without control characters, cut to a length that can be read."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 2]} …"


def unboxed(text: str) -> str:
    """What the parser of arguments says in a box under a title, on one line."""
    plain = re.sub(r"\x1b\[[\d;]*m|[│|]", " ", text)
    parts = [part for part in re.split(r"[─╭╮╰╯]{2,}|-{9,}", plain) if part.strip()]
    said = readable(parts[min(1, len(parts) - 1)] if parts else "the call is wrong")
    return said.removeprefix("Error parsing ").rstrip(".")


def in_flags(message: str, flags: Collection[str], arguments: Sequence[str] = ()) -> str:
    """A message that names arguments in Python, with the flags of a command in their place.

    Of flags in several groups that set the same name, the one among the `arguments` is meant;
    where there is none or several, the name stays as it is.  Advice about an argument that no flag
    sets is left out.
    """
    if not flags:
        return message
    given = {each.partition("=")[0].replace("_", "-") for each in arguments}
    known: dict[str, list[str]] = {}
    alone: dict[str, str] = {}
    for flag in flags:
        group, _, last = flag.removeprefix("--").removeprefix("no-").rpartition(".")
        name = last.replace("-", "_")
        known.setdefault(name, []).append(flag)
        if not group:
            alone[name] = flag

    def flag_of(name: str) -> str | None:
        found = known.get(name, [])
        if len(found) > 1:
            found = [flag for flag in found if flag in given]
        if len(found) == 1:
            return found[0]
        return next((alone[other] for other in _ALIASES.get(name, ()) if other in alone), None)

    def assigned(match: re.Match[str]) -> str:
        if match[1] is None:  # what was received or may be typed, word for word
            return match[0]
        name, value = match[1], match[2].strip("'")
        if flag := flag_of(name):
            return f"{flag}{'=' if value == 'None' or value[:1] == '(' else ' '}{value}".strip()
        if name not in _ELSEWHERE:
            return match[0]
        flag = f"--{name.replace('_', '-')} {value}".strip()
        return f"`conceptax convert {flag}`"

    def named(match: re.Match[str]) -> str:
        return flag_of(match[0]) or match[0]

    message = message.replace("force=True (--force)", "--force")
    message = message.replace("token layout", flag_of("token_layout") or "token layout")
    if " of memory, and " in message:
        message = re.sub(rf"(?<![-\w])({_SIZES})\b", named, message)
    message = re.sub(r"\s*Pass (components|architecture)=[^.]*\.", "", message)
    quoted = r"(?<![\w=])'[^']*'"
    assignment = r"(?<![\w./-])([a-z]\w*)=((?:[^\s,;]*[^\s,;:.])?)"
    message = re.sub(f"{quoted}|{assignment}", assigned, message)
    message = re.sub(r"(?<![\w./'\"=-])[a-z]+(_[a-z0-9]+)+(?![\w./'\"=-])", named, message)
    return re.sub(r"^[a-z]+(?= (must|accepts|is an?)\b)", named, message)


def _about(error: BaseException) -> str:
    message = str(error)
    if isinstance(error, ConceptaxError):
        return message or type(error).__name__
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in message[:200]:
        reason = f" ({readable(message)[:200]})" if message else ""
        return f"there is not enough memory{reason}; smaller batches, images or models take less."
    if isinstance(error, ImportError):
        return f"a library is missing or does not fit: {message}. Install conceptax again."
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}." if error.strerror else message or type(error).__name__
    if isinstance(error, ValueError | ArithmeticError) and message and _is_ours(error):
        return message
    return f"{type(error).__name__}{f': {message}' if message else ''}".rstrip(".") + f". {_BUG}"


def _is_ours(error: BaseException) -> bool:
    """Whether a function of this package raised the error, and not a library it called."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").startswith("conceptax.")


def _about_platforms() -> str | None:
    """What is wrong with the platforms that the environment asks jax for, if something is."""
    wanted = os.environ.get("JAX_PLATFORMS")
    jax = sys.modules.get("jax")
    if not wanted or jax is None:
        return None
    try:
        jax.devices()
        return None
    except Exception as error:
        reason = f" ({readable(str(error))[:200]})" if str(error) else ""
    try:
        jax.config.update("jax_platforms", None)
        found = ", ".join(sorted({device.platform for device in jax.devices()}))
    except Exception:
        found = "cpu"
    return (
        f"JAX_PLATFORMS is {wanted!r}, and jax cannot use that here{reason}. It finds: {found}. "
        f"Set JAX_PLATFORMS={found.split(', ')[0]}, or leave it unset."
    )
