"""`conceptax gna search`: the windows and strides that save most, as a table and drawn."""

from collections.abc import Sequence

from conceptax.cli.runs import new_file
from conceptax.errors import optional
from conceptax.kernels.gna.simulator import search
from conceptax.kernels.gna.simulator.search import Choice
from conceptax.reporting.gna_tables import choices_table

from .commands import Search, problem_of


def run(command: Search) -> None:
    """Print the choices, and draw them if asked to."""
    if (command.window is None) == (command.sparsity is None):
        given = "neither" if command.window is None else "both"
        raise ValueError(f"Search needs either --window or --sparsity; received {given}.")
    if command.limit < 1:
        raise ValueError(f"--limit must be at least 1, received {command.limit}.")
    if command.output is None:
        print(choices_table(_choices(command), command.limit))
        return
    optional("matplotlib", "demo", "--output")
    from conceptax.reporting.gna_pictures import draw_search

    if command.output.suffix.lower() != ".png":
        raise ValueError(f"--output takes a .png file, received {command.output}.")
    with new_file(command) as file:
        choices = _choices(command)
        given = problem_of(command, "dilation", "is_causal")
        draw_search(file, command.layout, choices, **given)
    print(choices_table(choices, command.limit))
    print(f"\n{command.output}: the fastest choice and the finest stride, drawn")


def _choices(command: Search) -> Sequence[Choice]:
    same = ("sparsity", "tolerance", "block_sparse", "gpu")
    options = {name: getattr(command, name) for name in same}
    return search(command.layout, **problem_of(command), **options)
