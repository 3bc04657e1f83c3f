"""Errors that conceptax raises on purpose, their base, and packages that may be missing."""


class ConceptaxError(Exception):
    """A call, a file or a machine that does not do; the message says what to do about it.

    Its subclasses are also what they would be without it: `ValueError`, `OSError`, ….
    """


class ConversionError(ConceptaxError, ValueError):
    """Base of the next two: what was received, and what to do next."""


class CheckpointError(ConversionError):
    """A checkpoint that cannot be read (absent, damaged, unsafe, of another model), or kept."""


class OutputError(ConversionError):
    """A result that cannot be written; nothing of it is left on disk."""


class MissingPackageError(ConceptaxError, ImportError):
    """A package that only some uses need is not installed; the message says how to install it."""


def optional(module: str, extra: str, what: str):
    """Import a module that comes with an extra of this package, and return it.

    Args:
      module: its full name, such as "skimage.data".
      extra: of `pip install conceptax[...]`.
      what: what needs it, the subject of the message.

    Raises:
      MissingPackageError: it is not installed.
    """
    from importlib import import_module

    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if (error.name or "").split(".")[0] != package:
            raise
        raise MissingPackageError(
            f"{what} needs the package {package}, which is not installed: "
            f"pip install 'conceptax[{extra}]'."
        ) from error
