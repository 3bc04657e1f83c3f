"""`conceptax gna simulate`: the table of what a neighborhood attention visits and saves."""

from conceptax.kernels.gna.simulator import simulate
from conceptax.reporting.gna_tables import simulation_table

from .commands import Simulate, problem_of


def run(command: Simulate) -> None:
    """Print the table."""
    if command.replaced != 1 and command.attention_share is None:
        raise ValueError("--replaced goes with --attention-share: pass both.")
    same = ("tiling", "batch", "heads", "kv_heads", "head_dim", "additional", "additional_queries")
    options = {name: getattr(command, name) for name in (*same, "mask_every_tile", "gpu")}
    result = simulate(command.layout, **problem_of(command), **options)
    print(simulation_table(result, command.gpu, command.attention_share, command.replaced))
