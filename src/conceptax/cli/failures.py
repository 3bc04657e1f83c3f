"""What to say about an exception: one sentence, and whether it is a fault of this program."""

import os
import sys
import traceback

from conceptax.errors import ConceptaxError

_LONGEST = 1000  # characters
_BUG = "This is a bug in conceptax or in a library; run again with --debug for the traceback."


def sentence(error: BaseException) -> str:
    """An exception in one line: what to do about it, or where to find out more."""
    found = (_about_platforms() if not isinstance(error, ConceptaxError) else None) or _about(error)
    return readable(found)


def readable(text: str) -> str:
    """Text on one line, without control characters, cut to a length that can be read."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 2]} …"


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
