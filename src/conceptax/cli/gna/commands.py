"""Flags of `conceptax gna simulate`, `gna search` and `gna bench`, and how sizes are written."""

import dataclasses
from typing import Annotated, Any, Literal

import tyro

from conceptax.cli.options import OptionalFloat, OptionalInt, OptionalPath

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


@dataclasses.dataclass(frozen=True)
class Simulate:
    """Count the tiles that a neighborhood attention visits and predict its time.

    Every list has one number for each dimension of the layout, or one for all.

    Attributes:
      layout: tokens along each of one to three dimensions.
      window: keys that a query sees along each dimension.
      stride: neighboring queries that share a window.
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
      stride: neighboring queries that share a window.
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


def by(sizes: Any) -> str:
    """Sizes as a table shows them: 8x16."""
    return "x".join(map(str, sizes))


def each(values: tuple[Any, ...] | None) -> Any:
    """One value stands for all dimensions."""
    return values[0] if values is not None and len(values) == 1 else values
