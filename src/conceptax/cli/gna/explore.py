"""`conceptax gna explore`: the explorer of neighborhood attention, as a file."""

from conceptax.cli.runs import new_file
from conceptax.reporting.gna_explorer import explorer_page

from .commands import Explore


def run(command: Explore) -> None:
    """Write the page."""
    if command.output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output takes a .html file, received {command.output}.")
    with new_file(command) as file:
        file.write_text(explorer_page(), encoding="utf-8")
    print(f"{command.output}: open it in a browser; it needs nothing beside it")
