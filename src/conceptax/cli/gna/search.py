"""`conceptax gna search`: the windows and strides that save most, as a table and drawn."""

from collections.abc import Sequence
from typing import Any

from conceptax.cli.runs import new_file
from conceptax.errors import optional
from conceptax.kernels.gna.simulator import search as find

from .commands import Search, by, each


def search(command: Search) -> None:
    """Print the choices, and draw them if asked to."""
    if (command.window is None) == (command.sparsity is None):
        given = "neither" if command.window is None else "both"
        raise ValueError(f"Search needs either --window or --sparsity; received {given}.")
    if command.limit < 1:
        raise ValueError(f"--limit must be at least 1, received {command.limit}.")
    if command.output is None:
        _print_choices(_choices(command), command.limit)
        return
    optional("matplotlib", "demo", "--output")
    from conceptax.reporting.gna_pictures import draw_search

    if command.output.suffix.lower() != ".png":
        raise ValueError(f"--output takes a .png file, received {command.output}.")
    with new_file(command.output, force=command.force, command=command) as file:
        choices = _choices(command)
        dilation, causal = each(command.dilation), each(command.causal)
        draw_search(file, command.layout, choices, dilation=dilation, is_causal=causal)
    _print_choices(choices, command.limit)
    print(f"\n{command.output}: the fastest choice and the finest stride, drawn")


def _choices(command: Search) -> Sequence[Any]:
    return find(
        command.layout,
        kernel_size=each(command.window),
        sparsity=command.sparsity,
        tolerance=command.tolerance,
        dilation=each(command.dilation),
        is_causal=each(command.causal),
        query_tile=each(command.query_tile),
        key_tile=each(command.key_tile),
        block_sparse=command.block_sparse,
        gpu=command.gpu,
    )


def _print_choices(choices: Sequence[Any], limit: int) -> None:
    head = ("window", "stride", "query tile", "key tile")
    shown = choices[:limit]
    cells = [tuple(map(by, (c.kernel_size, c.stride, c.query_tile, c.key_tile))) for c in shown]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    titles = "  ".join(f"{name:{width}}" for name, width in zip(head, widths, strict=True))
    print(f"{titles}  sparsity   bound   tiles  masked  masks")
    for choice, row in zip(shown, cells, strict=True):
        text = "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        print(
            f"{text}  {100 * choice.sparsity:6.2f} %  {choice.flop_speedup:6.2f}  "
            f"{choice.tile_speedup:6.2f}  {choice.speedup:6.2f}  "
            f"{'none' if choice.block_sparse else 'some'}"
        )
    if len(choices) > limit:
        print(f"… and {len(choices) - limit} slower ones; --limit shows more.")
    print(
        "\nSpeed-ups over dense attention: by pairs (the bound), by whole tiles, and with the time "
        "that masks take."
    )
