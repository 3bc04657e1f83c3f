"""`conceptax gna simulate`: the table of what a neighborhood attention visits and saves."""

import math

from conceptax.kernels.gna.simulator import simulate

from .commands import Simulate, by, each


def simulated(command: Simulate) -> str:
    """The table."""
    if command.replaced != 1 and command.attention_share is None:
        raise ValueError("--replaced goes with --attention-share: pass both.")
    result = simulate(
        command.layout,
        kernel_size=each(command.window),
        stride=each(command.stride),
        dilation=each(command.dilation),
        is_causal=each(command.causal),
        query_tile=each(command.query_tile),
        key_tile=each(command.key_tile),
        tiling=command.tiling,
        batch=command.batch,
        heads=command.heads,
        kv_heads=command.kv_heads,
        head_dim=command.head_dim,
        additional=command.additional,
        additional_queries=command.additional_queries,
        mask_every_tile=command.mask_every_tile,
        gpu=command.gpu,
    )
    windows = result.windows
    causal = [str(m) for m, window in enumerate(windows) if window.is_causal]
    extra = f" and {result.additional:,} additional" if result.additional else ""
    masks = (
        "none: block-sparse"
        if result.block_sparse and result.free_share == 1
        else f"{100 * (1 - result.free_share):.1f} % of the visited tiles"
    )
    lines = [
        f"tokens       {by(w.length for w in windows)} = "
        f"{math.prod(w.length for w in windows):,}{extra}; batch {result.batch}, "
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
        _row(
            "pairs (the bound)", f"{result.dense_pairs:,}", f"{result.pairs:,}", result.flop_speedup
        ),
        _row(
            "tile pairs",
            f"{result.dense_tiles:,}",
            f"{result.visited_tiles:,}",
            result.tile_speedup,
            f"{100 * result.bound_share:.1f} % of the bound",
        ),
        _row(
            f"kernel on {command.gpu}",
            _ms(result.dense_seconds),
            _ms(result.seconds),
            result.wave_speedup,
            "predicted; dense is the same kernel",
        ),
    ]
    if result.permutation:
        total = result.seconds + result.permutation
        lines.append(
            _row("with permutation", _ms(result.dense_seconds), _ms(total), result.speedup)
        )
    if command.attention_share is not None:
        whole = result.end_to_end(command.attention_share, command.replaced)
        note = f"attention is {100 * command.attention_share:.4g} % of the dense model"
        lines.append(_row("whole model", "", "", whole, note))
    return "\n".join(lines)


def _row(name: str, dense: str, sparse: str, speedup: float, note: str = "") -> str:
    return f"{name:22}{dense:>16}{sparse:>16}{speedup:>10.2f} x  {note}".rstrip()


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f} ms"
