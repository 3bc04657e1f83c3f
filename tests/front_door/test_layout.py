"""Every public module is in the API pages, once."""

import re
from collections import Counter

ROOMS = {
    "src/conceptax": "conceptax",
    "flax_models": "conceptax.flax_models",
    "methods": "conceptax.methods",
    "kernels": "conceptax.kernels",
    "converters": "conceptax.converters",
}


def public_modules(repository):
    """The dotted names of what programs import: all but the command line and empty packages."""
    for room, package in ROOMS.items():
        for path in sorted((repository / room).rglob("*.py")):
            parts = path.relative_to(repository / room).with_suffix("").parts
            if parts[-1] == "__init__" and path.read_bytes():
                parts = parts[:-1]
            if parts[:1] != ("cli",) and not any(part.startswith("_") for part in parts):
                yield ".".join((package, *parts))


def test_every_public_module_is_in_the_api_pages(repository):
    text = "".join(path.read_text() for path in (repository / "docs" / "api").glob("*.md"))
    described = Counter(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    assert described == Counter(public_modules(repository))
