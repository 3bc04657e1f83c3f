"""What is found out about neighborhood attention, as text: simulated, searched for, measured."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from conceptax.kernels.gna.simulator import Simulation
from conceptax.kernels.gna.simulator.search import Choice


def by(sizes: Iterable[int], sign: str = "x") -> str:
    """Sizes as a table shows them: 8x16."""
    return sign.join(map(str, sizes))


def simulation_table(
    result: Simulation, gpu: str, share: float | None = None, replaced: float = 1.0
) -> str:
    """What `simulate` says of one problem.

    Args:
      result: of the simulator.
      gpu: the name that it was asked about.
      share: of the dense model's run time that is attention, for a line about the whole model.
      replaced: share of the attention calls that become sparse.
    """
    windows = result.windows
    lengths = [window.length for window in windows]
    causal = [str(m) for m, window in enumerate(windows) if window.is_causal]
    extra = f" and {result.additional:,} additional" if result.additional else ""
    masks = f"{100 * (1 - result.free_share):.1f} % of the visited tiles"
    if result.block_sparse and result.free_share == 1:
        masks = "none: block-sparse"

    def row(name: str, dense: str, sparse: str, speedup: float, note: str = "") -> str:
        return f"{name:22}{dense:>16}{sparse:>16}{speedup:>10.2f} x  {note}".rstrip()

    def ms(seconds: float) -> str:
        return f"{1e3 * seconds:.3f} ms"

    dense = ms(result.dense_seconds)
    lines = [
        f"tokens       {by(lengths)} = {math.prod(lengths):,}{extra}; batch {result.batch}, "
        f"{result.heads} heads of {result.head_dim}",
        f"window       {by(w.kernel_size for w in windows)}, stride "
        f"{by(w.stride for w in windows)}, dilation {by(w.dilation for w in windows)}"
        + (f", causal in dimension {', '.join(causal)}" if causal else ""),
        f"tiles        queries {by(result.query_tile)}, keys {by(result.key_tile)}, "
        f"{result.tiling}; {result.query_tiles:,} query tiles",
        f"masks        {masks}",
        f"sparsity     {100 * result.sparsity:.2f} % of the pairs do not attend",
        "",
        f"{'':22}{'dense':>16}{'sparse':>16}{'speed-up':>12}",
        row(
            "pairs (the bound)", f"{result.dense_pairs:,}", f"{result.pairs:,}", result.flop_speedup
        ),
        row(
            "tile pairs",
            f"{result.dense_tiles:,}",
            f"{result.visited_tiles:,}",
            result.tile_speedup,
            f"{100 * result.bound_share:.1f} % of the bound",
        ),
        row(
            f"kernel on {gpu}",
            dense,
            ms(result.seconds),
            result.wave_speedup,
            "predicted; dense is the same kernel",
        ),
    ]
    if result.permutation:
        total = ms(result.seconds + result.permutation)
        lines.append(row("with permutation", dense, total, result.speedup))
    if share is not None:
        note = f"attention is {100 * share:.4g} % of the dense model"
        lines.append(row("whole model", "", "", result.end_to_end(share, replaced), note))
    return "\n".join(lines)


def choices_table(choices: Sequence[Choice], limit: int) -> str:
    """The first `limit` choices of a search."""
    head = ("window", "stride", "query tile", "key tile")
    shown = choices[:limit]
    cells = [tuple(map(by, (c.kernel_size, c.stride, c.query_tile, c.key_tile))) for c in shown]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]

    def padded(texts: Sequence[str]) -> str:
        return "  ".join(f"{text:{width}}" for text, width in zip(texts, widths, strict=True))

    lines = [f"{padded(head)}  sparsity   bound   tiles  masked  masks"]
    lines += [
        f"{padded(row)}  {100 * choice.sparsity:6.2f} %  {choice.flop_speedup:6.2f}  "
        f"{choice.tile_speedup:6.2f}  {choice.speedup:6.2f}  "
        f"{'none' if choice.block_sparse else 'some'}"
        for choice, row in zip(shown, cells, strict=True)
    ]
    if len(choices) > limit:
        lines.append(f"… and {len(choices) - limit} slower ones; --limit shows more.")
    lines += [
        "",
        "Speed-ups over dense attention: by pairs (the bound), by whole tiles, and with the time "
        "that masks take.",
    ]
    return "\n".join(lines)


def bench_table(record: Mapping[str, Any]) -> str:
    """What was measured beside what is predicted: a record of `conceptax gna bench`."""
    lines = [
        f"tokens       {by(record['layout'])}; batch {record['batch']}, "
        f"{record['heads']} heads of {record['head_dim']}, {record['dtype']}",
        f"measured     {record['pass']}, {record['implementation']} on {record['device']} "
        f"({record['cpu_cores']} cores)",
        "",
        f"{'':14}{'stride':>12}{'query tile':>12}{'bound':>8}{'measured':>13}{'predicted':>13}"
        f"{'x dense':>9}{'of bound':>10}",
    ]
    for row in record["rows"]:
        measured = f"{1e3 * row['median_s']:.3f} ms"
        if "bound" not in row:
            lines.append(f"{row['run']:14}{'':32}{measured:>13}")
            continue
        seconds = row["predicted_s"]
        predicted = "" if seconds is None else f"{1e3 * seconds:.3f} ms"
        lines.append(
            f"{row['run']:14}{by(row['stride']):>12}{by(row['query_tile']):>12}"
            f"{row['bound']:8.2f}{measured:>13}{predicted:>13}{row['over_dense']:9.2f}"
            f"{100 * row['bound_share']:8.0f} %"
        )
    fitted = record["fit"]
    if fitted is None:
        return "\n".join([*lines, "", f"no prediction: {record['not_fitted']}"])
    asked = any(not row.get("fitted", True) for row in record["rows"])
    lines += [
        "",
        f"c   {1e6 * fitted['c_s']:9.2f} µs for 128 x 128 pairs of 128 channels "
        f"({fitted['flops'] / 1e12:.3g} TFLOP/s in all)",
        f"t0  {1e6 * fitted['t0_s']:9.2f} µs for starting a tile of queries",
        f"mu  {fitted['mu']:9.2f}    of a step's time for its mask",
        "fitted to the runs dense, no masks and stride 1"
        + ("; what was asked for is predicted from them." if asked else "."),
    ]
    return "\n".join(lines)
