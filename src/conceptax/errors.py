"""The base of all errors that conceptax raises on purpose."""


class ConceptaxError(Exception):
    """A call, a file or a machine that does not do; the message says what to do about it.

    Its subclasses are also what they would be without it: `ValueError`, `OSError`, ….
    """
