"""`conceptax gna simulate`, `gna search` and `gna bench`: what neighborhood attention saves.

The first two need no GPU; the last one measures where it runs (`gna_bench`).
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from conceptax.cli.options import OptionalInt, OptionalPath

Name = Literal["h100", "h200", "b200"]
Ints = Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")]
Tile = Annotated[
    tuple[int, ...] | None,
    tyro.conf.arg(metavar="INT [INT ...]", help_behavior_hint="(default: the GPU's)"),
]
Bools = Annotated[tuple[bool, ...], tyro.conf.arg(metavar="BOOL [BOOL ...]")]
OptionalInts = Annotated[
    tuple[int, ...] | None,
    tyro.conf.arg(metavar="INT [INT ...]", help_behavior_hint="(optional)"),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    tyro.conf.arg(metavar="DTYPE", help_behavior_hint="(default: by device)"),
]
Implementation = Annotated[
    Literal["xla", "triton", "cuda"] | None,
    tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the preferred one)"),
]
OptionalFloat = Annotated[
    float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(optional)")
]


@dataclasses.dataclass(frozen=True)
class Simulate:
    """Count the tiles that a neighborhood attention visits and predict its time.

    Every list has one number for each dimension of the layout, or one for all.

    Attributes:
      layout: tokens along each of one to three dimensions.
      window: keys that a query sees along each dimension.
      stride: neighbouring queries that share a window.
      dilation: distance between a window's keys.
      causal: whether queries see no key behind them (True or False).
      query_tile: tokens of a query tile along each dimension.
      key_tile: tokens of a key tile.
      tiling: tiles of the layout, key tiles that start at the window, or runs of flattened tokens.
      batch: sequences in the call.
      heads: query heads.
      kv_heads: key and value heads; by default as many.
      head_dim: channels of a head.
      additional: further tokens (text) that every query sees.
      additional_queries: these tokens are queries too, and see everything.
      mask_every_tile: mask all tiles unless none needs it, as NATTEN does.
      gpu: what to predict times for.
      attention_share: of the dense model's run time, to predict the whole model's speed-up.
      replaced: share of the attention calls (layers times steps) that become sparse.
    """

    layout: Ints
    window: Ints
    stride: Ints = (1,)
    dilation: Ints = (1,)
    causal: Bools = (False,)
    query_tile: Tile = None
    key_tile: Tile = None
    tiling: Literal["permuted", "fused", "single-dim"] = "permuted"
    batch: int = 1
    heads: int = 1
    kv_heads: OptionalInt = None
    head_dim: int = 128
    additional: int = 0
    additional_queries: bool = False
    mask_every_tile: bool = False
    gpu: Name = "h200"
    attention_share: OptionalFloat = None
    replaced: float = 1.0


@dataclasses.dataclass(frozen=True)
class Search:
    """List the windows and strides that no other choice beats, and draw them.

    A choice beats another if it sees no fewer pairs, is no slower and its strides' product is no
    larger. Search the strides of one window, or all windows at a sparsity.

    Attributes:
      layout: tokens along each of one to three dimensions.
      window: search this window's strides.
      sparsity: or search all windows that leave out this share of the pairs.
      tolerance: how far from the sparsity a choice may be.
      dilation: distance between a window's keys.
      causal: whether queries see no key behind them (True or False).
      query_tile: tokens of a query tile along each dimension.
      key_tile: tokens of a key tile.
      block_sparse: leave out everything that needs masks.
      gpu: whose tile shapes and cost of masks to take.
      limit: how many choices to print.
      output: a .png file: speed-up over window and stride, and the key tiles one query tile visits.
      force: replace an earlier picture.
    """

    layout: Ints
    window: OptionalInts = None
    sparsity: OptionalFloat = None
    tolerance: float = 0.01
    dilation: Ints = (1,)
    causal: Bools = (False,)
    query_tile: Tile = None
    key_tile: Tile = None
    block_sparse: bool = False
    gpu: Name = "h200"
    limit: int = 20
    output: OptionalPath = None
    force: bool = False


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure neighborhood attention here and now, beside what the simulator predicts.

    Dense attention and the window with its largest stride and with stride 1 are measured to fit
    what the prediction needs to know of this machine: seconds of a step (c), of starting a tile
    (t0), and what masks add (mu). Then the problem asked for is measured and predicted.

    Attributes:
      layout: tokens along each of one to three dimensions.
      window: keys that a query sees along each dimension.
      stride: neighbouring queries that share a window.
      dilation: distance between a window's keys.
      causal: whether queries see no key behind them (True or False).
      batch: sequences in the call.
      heads: query, key and value heads.
      head_dim: channels of a head.
      dtype: of the operands; by default float32 on a CPU, else bfloat16.
      implementation: what to measure; by default what is taken here for such a problem.
      training: measure the forward and the backward pass together, instead of the forward pass.
      rounds: how often all take their turn.
      output: a .json file for the figures.
      force: replace an earlier file.
    """

    layout: Ints = (64, 64)
    window: Annotated[
        tuple[int, ...] | None,
        tyro.conf.arg(metavar="INT [INT ...]", help_behavior_hint="(default: half the layout)"),
    ] = None
    stride: Annotated[
        tuple[int, ...] | None,
        tyro.conf.arg(metavar="INT [INT ...]", help_behavior_hint="(default: 8, or the window)"),
    ] = None
    dilation: Ints = (1,)
    causal: Bools = (False,)
    batch: int = 1
    heads: int = 4
    head_dim: int = 64
    dtype: Dtype = None
    implementation: Implementation = None
    training: bool = False
    rounds: int = 7
    output: OptionalPath = None
    force: bool = False


COMMANDS = {"simulate": Simulate, "search": Search, "bench": Bench}


def run(command: Simulate | Search | Bench) -> None:
    """Print what was asked for; a search with an output draws it, too.

    Raises:
      ValueError: a flag does not suit the others; the message calls it as it was typed.
    """
    try:
        if isinstance(command, Simulate):
            print(_simulated(command))
        elif isinstance(command, Search):
            _search(command)
        else:
            from conceptax.cli.gna_bench import bench

            bench(command)
    except ValueError as error:
        if type(error) is not ValueError:  # of files, in words of their own
            raise
        raise ValueError(_in_flags(str(error))) from error


def _in_flags(message: str) -> str:
    """A message of `kernels.gna` with its arguments called as the flags that give them."""
    flags = {"kernel_size": "--window", "token_layout": "--layout", "token layout": "--layout"}
    flags |= {"is_causal": "--causal"}
    for name in ("query_tile", "key_tile", "kv_heads", "head_dim", "attention_share"):
        flags[name] = "--" + name.replace("_", "-")
    # Names that are words, too, are meant where a message says what they must be or are.
    plain = "stride|dilation|batch|heads|additional|sparsity|tolerance|replaced"
    message = re.sub(rf"(?<![-\w])({'|'.join(flags)})\b", lambda m: flags[m[1]], message)
    return re.sub(rf"(?<![-\w])({plain})(?= must\b|=)", r"--\1", message)


def _simulated(command: Simulate) -> str:
    from conceptax.kernels.gna.simulator import simulate

    if command.replaced != 1 and command.attention_share is None:
        raise ValueError("--replaced goes with --attention-share: pass both.")
    result = simulate(
        command.layout,
        kernel_size=_each(command.window),
        stride=_each(command.stride),
        dilation=_each(command.dilation),
        is_causal=_each(command.causal),
        query_tile=_each(command.query_tile),
        key_tile=_each(command.key_tile),
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
        f"tokens       {_by(w.length for w in windows)} = "
        f"{math.prod(w.length for w in windows):,}{extra}; batch {result.batch}, "
        f"{result.heads} heads of {result.head_dim}",
        f"window       {_by(w.kernel_size for w in windows)}, stride "
        f"{_by(w.stride for w in windows)}, dilation {_by(w.dilation for w in windows)}"
        + (f", causal in dimension {', '.join(causal)}" if causal else ""),
        f"tiles        queries {_by(result.query_tile)}, keys {_by(result.key_tile)}, "
        f"{result.tiling}; {result.query_tiles:,} query tiles",
        f"masks        {masks}",
        f"sparsity     {100 * result.sparsity:.2f} % of the pairs do not attend",
        "",
        f"{'':22}{'dense':>16}{'sparse':>16}{'speed-up':>12}",
        _row("pairs (the bound)", f"{result.dense_pairs:,}", f"{result.pairs:,}",
             result.flop_speedup),
        _row("tile pairs", f"{result.dense_tiles:,}", f"{result.visited_tiles:,}",
             result.tile_speedup, f"{100 * result.bound_share:.1f} % of the bound"),
        _row(f"kernel on {command.gpu}", _ms(result.dense_seconds), _ms(result.seconds),
             result.wave_speedup, "predicted; dense is the same kernel"),
    ]  # fmt: skip
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


def _search(command: Search) -> None:
    if (command.window is None) == (command.sparsity is None):
        given = "neither" if command.window is None else "both"
        raise ValueError(f"Search needs either --window or --sparsity; received {given}.")
    if command.limit < 1:
        raise ValueError(f"--limit must be at least 1, received {command.limit}.")
    if command.output is None:
        _print_choices(_choices(command), command.limit)
        return
    from conceptax.cli.results import new_file
    from conceptax.errors import optional

    optional("matplotlib", "demo", "--output")
    from conceptax.cli.gna_pictures import draw_search

    if command.output.suffix.lower() != ".png":
        raise ValueError(f"--output takes a .png file, received {command.output}.")
    with new_file(command.output, force=command.force, command=command) as file:
        choices = _choices(command)
        dilation, causal = _each(command.dilation), _each(command.causal)
        draw_search(file, command.layout, choices, dilation=dilation, is_causal=causal)
    _print_choices(choices, command.limit)
    print(f"\n{command.output}: the fastest choice and the finest stride, drawn")


def _choices(command: Search) -> Sequence[Any]:
    from conceptax.kernels.gna.simulator import search

    return search(
        command.layout,
        kernel_size=_each(command.window),
        sparsity=command.sparsity,
        tolerance=command.tolerance,
        dilation=_each(command.dilation),
        is_causal=_each(command.causal),
        query_tile=_each(command.query_tile),
        key_tile=_each(command.key_tile),
        block_sparse=command.block_sparse,
        gpu=command.gpu,
    )


def _print_choices(choices: Sequence[Any], limit: int) -> None:
    head = ("window", "stride", "query tile", "key tile")
    shown = choices[:limit]
    cells = [tuple(map(_by, (c.kernel_size, c.stride, c.query_tile, c.key_tile))) for c in shown]
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


def _row(name: str, dense: str, sparse: str, speedup: float, note: str = "") -> str:
    return f"{name:22}{dense:>16}{sparse:>16}{speedup:>10.2f} x  {note}".rstrip()


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f} ms"


def _by(sizes: Any) -> str:
    return "x".join(map(str, sizes))


def _each(values: tuple[Any, ...] | None) -> Any:
    """One value stands for all dimensions."""
    return values[0] if values is not None and len(values) == 1 else values
