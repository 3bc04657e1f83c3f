"""Flags of `conceptax gna simulate`, `search`, `explore` and `bench`, and how sizes are written."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from conceptax.cli.options import OptionalFloat, OptionalInt, OptionalPath, shown

Name = Literal["a100", "h100", "h200", "b200"]
Model = Annotated[
    Literal["flux-4k", "flux-2k", "hunyuan", "hunyuan-58", "cosmos-56", "cosmos-89", "wan-720p"]
    | None,
    shown("NAME"),
]
_INTS = "INT [INT ...]"
Ints = Annotated[tuple[int, ...], tyro.conf.arg(metavar=_INTS)]
OptionalInts = Annotated[tuple[int, ...] | None, shown(_INTS)]
OptionalText = Annotated[str | None, shown("TEXT")]
Stride = Annotated[tuple[int, ...] | None, shown(_INTS, "(default: 1)")]
Tile = Annotated[tuple[int, ...] | None, shown(_INTS, "(default: the GPU's)")]
HalfTheLayout = Annotated[tuple[int, ...] | None, shown(_INTS, "(default: half the layout)")]
EightOrTheWindow = Annotated[tuple[int, ...] | None, shown(_INTS, "(default: 8, or the window)")]
Bools = Annotated[tuple[bool, ...], tyro.conf.arg(metavar="BOOL [BOOL ...]")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None, shown("DTYPE", "(default: by device)")
]
Implementation = Annotated[
    Literal["xla", "triton", "cuda"] | None, shown("NAME", "(default: the preferred one)")
]


@dataclasses.dataclass(frozen=True)
class Simulate:
    """Count the tiles that a neighborhood attention visits and predict its time.

    Of one attention, by its layout and window; or of a whole model, with its text, its linear
    layers and its dense steps, by --model. Every list has one number for each dimension of the
    layout, or one for all.

    Attributes:
      model: predict a whole model: flux-4k, flux-2k, hunyuan, hunyuan-58, cosmos-56, cosmos-89 or
        wan-720p.
      attention: the window and stride: a model's name, or such as "window=32x32 stride=8x8".
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
      steps: of sampling with --model; by default as published.
      dense_steps: at the beginning, with --model; by default the published share of the steps.
      linear_rate: TFLOP/s of linear layers, measured, with --model; by default as is known.
      attention_rate: TFLOP/s of dense attention, measured, with --model; by default as is known.
      output: a .json file for the figures.
      force: replace an earlier file.
    """

    model: Model = None
    attention: OptionalText = None
    layout: OptionalInts = None
    window: OptionalInts = None
    stride: Stride = None
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
    steps: OptionalInt = None
    dense_steps: OptionalInt = None
    linear_rate: OptionalFloat = None
    attention_rate: OptionalFloat = None
    output: OptionalPath = None
    force: bool = False


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
class Explore:
    """Write a page that simulates while you choose, with the windows and tiles drawn.

    One HTML file, which opens from disk in any browser and needs no server. Its address holds what
    is chosen, to be passed on.

    Attributes:
      output: a .html file for the page.
      force: replace an earlier file.
    """

    output: Path = Path("explorer.html")
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
    window: HalfTheLayout = None
    stride: EightOrTheWindow = None
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


_PROBLEM = {
    "kernel_size": "window",
    "stride": "stride",
    "dilation": "dilation",
    "is_causal": "causal",
    "query_tile": "query_tile",
    "key_tile": "key_tile",
}


def problem_of(command: Any, *names: str) -> dict[str, Any]:
    """What a command's flags say of a problem, as arguments of `kernels.gna`; some or all of them.

    One value stands for all dimensions.
    """
    known = {name: flag for name, flag in _PROBLEM.items() if hasattr(command, flag)}
    given = {name: getattr(command, flag) for name, flag in known.items()}
    return {
        name: values[0] if values is not None and len(values) == 1 else values
        for name, values in given.items()
        if not names or name in names
    }
