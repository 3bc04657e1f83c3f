"""What is found out about neighborhood attention, as text: simulated, searched for, measured."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from conceptax.kernels.gna.simulator import Simulation, WholeModel
from conceptax.kernels.gna.simulator.search import Choice
from conceptax.kernels.gna.simulator.whole_model import speedups


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
        f"visits       {result.mean_visits:,.1f} of {result.all_visits:,} key tiles by the mean "
        f"query tile, {result.worst_visits:,} by the worst",
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
            f"{100 * result.bound_share:.1f} % of the bound, the mean",
        ),
        row(
            "worst query tile",
            f"{result.all_visits:,}",
            f"{result.worst_visits:,}",
            result.worst_tile_speedup,
            "as NATTENSim counts",
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


def simulation_record(result: Simulation) -> dict[str, Any]:
    """What `simulate` says of one problem, in plain values; times in seconds."""
    windows = result.windows
    record = {
        "layout": [window.length for window in windows],
        "window": [window.kernel_size for window in windows],
        "stride": [window.stride for window in windows],
        "dilation": [window.dilation for window in windows],
        "causal": [window.is_causal for window in windows],
    }
    names = (
        *("batch", "heads", "kv_heads", "head_dim", "additional", "tiling", "query_tile"),
        *("key_tile", "sparsity", "block_sparse", "free_share", "pairs", "dense_pairs"),
        *("query_tiles", "dense_tiles", "visited_tiles", "mean_visits", "worst_visits"),
        *("all_visits", "flop_speedup", "tile_speedup", "worst_tile_speedup", "wave_speedup"),
        *("speedup", "seconds", "dense_seconds", "permutation"),
    )
    return record | {name: getattr(result, name) for name in names}


def model_record(result: WholeModel, gpu: str) -> dict[str, Any]:
    """What `simulate_model` says, in plain values; times in seconds, operations of one forward."""
    preset, model = result.preset, result.model
    shares = {"rates": result.attention_share}
    if preset.attention_share is not None:
        shares = {"published": preset.attention_share} | shares
    simulations = {"image alone": result.image_alone}
    if model.joint:
        simulations["with text"] = result.with_text
    rows = [
        {
            "tokens": tokens,
            "counted": counted,
            "speedup": speedup,
            "end_to_end": {
                name: {
                    "all_steps": result.end_to_end(speedup, share, all_steps=True),
                    "after_dense_steps": result.end_to_end(speedup, share),
                }
                for name, share in shares.items()
            },
        }
        for tokens, simulation in simulations.items()
        for counted, speedup in speedups(simulation).items()
    ]
    steps, dense = preset.steps, preset.dense_steps
    return {
        "model": model.name,
        "size": model.size(result.layout),
        "attention": preset.name,
        "source": preset.source,
        "gpu": gpu,
        "layers": model.layers,
        "text": model.text,
        "joint": model.joint,
        "forwards": model.forwards,
        "steps": steps,
        "dense_steps": dense,
        "operations": result.operations._asdict(),
        "rates": {name: rate._asdict() for name, rate in result.rates._asdict().items()},
        "attention_shares": shares,
        "rows": rows,
        "forward_s": {
            "dense": result.forward_seconds(),
            "sparse": result.forward_seconds(result.kernel_speedup),
        },
        "sample_s": {
            "dense": result.sample_seconds(steps),
            "after_dense_steps": result.sample_seconds(dense),
            "all_steps": result.sample_seconds(0),
        },
        "image_alone": simulation_record(result.image_alone),
        "with_text": simulation_record(result.with_text),
        "advice": result.advice,
    }


def model_table(record: Mapping[str, Any]) -> str:
    """A record of `model_record`."""
    one, work, rates = record["with_text"], record["operations"], record["rates"]
    steps, dense = record["steps"], record["dense_steps"]
    text = f" and {record['text']} of text" + (
        "" if record["joint"] else ", read by cross-attention"
    )
    twice = ", twice a step" if record["forwards"] == 2 else ""
    own = f" ({record['attention']})" if record["attention"] else ""
    total = sum(work.values())
    lines = [
        f"model        {record['model']}, {record['size']}; {record['layers']} self-attentions, "
        f"{one['heads']} heads of {one['head_dim']}{twice}",
        f"tokens       {by(one['layout'])} = {math.prod(one['layout']):,}{text}",
        f"attention    window {by(one['window'])}, stride {by(one['stride'])}{own}; {steps} steps, "
        f"the first {dense} dense",
        f"tiles        queries {by(one['query_tile'])}, keys {by(one['key_tile'])}; "
        f"{one['mean_visits']:,.1f} of {one['all_visits']:,} key tiles visited by the mean query "
        f"tile, {one['worst_visits']:,} by the worst",
        f"operations   {total / 1e12:,.1f} TFLOP per forward: {work['linear'] / 1e12:,.1f} linear, "
        f"{work['attention'] / 1e12:,.1f} self-attention ({100 * work['attention'] / total:.1f} %)"
        + (f", {work['cross'] / 1e12:,.1f} cross-attention" if work["cross"] else ""),
        *(
            f"{title:13}{kind}, {rate['flops'] / 1e12:,.0f} TFLOP/s, {rate['basis']}: "
            f"{rate['source']}"
            for title, (kind, rate) in zip(("rates", ""), rates.items(), strict=True)
        ),
    ]
    if record["advice"]:
        lines.append(f"masks        {record['advice']}")
    shares = record["attention_shares"]
    told = {"published": "whole run, B200, published", "rates": f"transformer on {record['gpu']}"}
    after = f"{dense} of {steps} dense"
    lines += [
        "",
        f"{'':26}{'attention':>11}" + "".join(f"{told[name]:>27}" for name in shares),
        f"{'self-attention takes':37}" + "".join(f"{100 * s:>25.1f} %" for s in shares.values()),
        f"{'':37}" + f"{'all sparse':>12}{after:>15}" * len(shares),
    ]
    tokens = None
    for row in record["rows"]:
        if row["tokens"] != tokens:
            tokens = row["tokens"]
            lines.append(tokens)
        ends = "".join(
            f"{end['all_steps']:10.2f} x{end['after_dense_steps']:13.2f} x"
            for end in row["end_to_end"].values()
        )
        lines.append(f"  {row['counted']:24}{row['speedup']:9.2f} x{ends}")
    forward, sample = record["forward_s"], record["sample_s"]
    return "\n".join(
        [
            *lines,
            "",
            f"a forward    {forward['dense']:.2f} s dense, {forward['sparse']:.2f} s sparse, on "
            f"{record['gpu']}, by the rates and the kernel",
            f"a sample     {sample['dense']:.4g} s dense, {sample['after_dense_steps']:.4g} s with "
            f"{after}, {sample['all_steps']:.4g} s all sparse; without VAE and text encoders",
        ]
    )


def choices_table(choices: Sequence[Choice], limit: int) -> str:
    """The first `limit` choices of a search."""
    head = ("window", "stride", "query tile", "key tile")
    shown = choices[:limit]
    cells = [tuple(map(by, (c.kernel_size, c.stride, c.query_tile, c.key_tile))) for c in shown]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]

    def padded(texts: Sequence[str]) -> str:
        return "  ".join(f"{text:{width}}" for text, width in zip(texts, widths, strict=True))

    lines = [f"{padded(head)}  sparsity   bound   tiles   worst  masked  masks"]
    lines += [
        f"{padded(row)}  {100 * choice.sparsity:6.2f} %  {choice.flop_speedup:6.2f}  "
        f"{choice.tile_speedup:6.2f}  {choice.worst_tile_speedup:6.2f}  {choice.speedup:6.2f}  "
        f"{'none' if choice.block_sparse else 'some'}"
        for choice, row in zip(shown, cells, strict=True)
    ]
    if len(choices) > limit:
        lines.append(f"… and {len(choices) - limit} slower ones; --limit shows more.")
    lines += [
        "",
        "Speed-ups over dense attention: by pairs (the bound), by whole tiles, of the query tile "
        "that visits most, and with the time that masks take.",
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
        f"{'':14}{'stride':>12}{'query tile':>12}{'bound':>8}{'worst':>8}{'measured':>13}"
        f"{'predicted':>13}"
        f"{'x dense':>9}{'of bound':>10}",
    ]
    for row in record["rows"]:
        measured = f"{1e3 * row['median_s']:.3f} ms"
        if "bound" not in row:
            lines.append(f"{row['run']:14}{'':40}{measured:>13}")
            continue
        seconds = row["predicted_s"]
        predicted = "" if seconds is None else f"{1e3 * seconds:.3f} ms"
        lines.append(
            f"{row['run']:14}{by(row['stride']):>12}{by(row['query_tile']):>12}"
            f"{row['bound']:8.2f}{row['worst_bound']:8.2f}{measured:>13}{predicted:>13}"
            f"{row['over_dense']:9.2f}"
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
