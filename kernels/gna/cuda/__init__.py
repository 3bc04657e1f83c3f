"""Custom calls into C++ and CUDA through XLA's foreign function interface.

One call, two targets: on a CPU it runs threads and vectors (`gna_cpu.cc`), on an NVIDIA GPU tensor
cores (`gna_gpu.cu`).  The machine's own compilers build their libraries on first use (`build`).

Both list the keys that a tile of queries meets, first those that all queries see, which need no
mask, then the others, wherever they lie: windows of any size and stride fill whole tiles of keys.
"""

import contextlib
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..platforms import default_platform
from ..problem import ListOperands, Operands, Problem, Residuals
from ..tiles import Costs, Window, cheapest, cut, shapes_of, sizes_up_to
from ..varying import vary, varying_axes
from . import build

FORWARD, BACKWARD, LISTS_FORWARD, LISTS_BACKWARD = build.CALLS["cpu"]
PLATFORMS = ("cpu", "gpu")

# Places in what `tiles` returns, as in `TileKind` in `problem.h`.
CPU_TILE, FORWARD_TILE = 0, 1

# Meeting a key costs the CPU target its products with a tile of so many queries, in vectors of 16;
# short rows of vectors run below full speed.
CPU_WEIGHTS = {16: 1.3, 32: 2.1, 48: 3.0, 64: 4.0}
COSTS = Costs(start=64, met=1)  # preparing a tile, in tokens met

# On sm_90a a tile and what it meets come in boxes: of so many tokens, met by so many, and whether
# the tile's are keys. The last dimension of what is met has at least so many.
BOXES = [(128, 128, False), (128, 64, True), (128, 128, True)]
BOX_COSTS = Costs(start=2, step=1, mask=0.3)
LEAST_SEEN = 8
GPU_DTYPES = ("bfloat16", "float16")
GPU_MOST_DIM = 128
LEAST_CAPABILITY = 80


def unsupported(problem: Problem, platform: str) -> str | None:
    """Why this backend cannot do a problem on a platform, or None if it can."""
    if platform not in PLATFORMS:
        return f"it runs on CPUs and NVIDIA GPUs, not on a {platform}"
    if problem.shards > 1:
        return "it does not attend from a shard of the tokens"
    if platform == "gpu":
        dims = (problem.head_dim, problem.value_dim)
        least = min(map(int, build.capabilities()), default=LEAST_CAPABILITY)
        if least < LEAST_CAPABILITY:
            return (
                f"it needs NVIDIA GPUs of compute capability {LEAST_CAPABILITY / 10} or later, not "
                f"{least / 10}"
            )
        if problem.dtype not in GPU_DTYPES:
            return f"on a GPU it takes {' and '.join(GPU_DTYPES)}, not {problem.dtype}"
        if any(dim % 8 or dim > GPU_MOST_DIM for dim in dims):
            return (
                f"on a GPU it takes head dimensions that are multiples of 8 up to {GPU_MOST_DIM}, "
                f"not {dims[0]} for queries and {dims[1]} for values"
            )
    return None


def forward(problem: Problem, operands: Operands) -> tuple[Array, Array]:
    """Output [B, *X, Hq, Dv] in the dtype of the query, and its log-sum-exp [B, *X, Hq]."""
    query = operands.query
    shape = (*query.shape[:-1], problem.value_dim)
    results = [
        jax.ShapeDtypeStruct(shape, query.dtype),
        jax.ShapeDtypeStruct(shape[:-1], jnp.float32),
    ]
    output, lse = call(FORWARD, results, without_gaps(operands), _attributes(problem))
    return output, lse


def backward(problem: Problem, residuals: Residuals, d_output: Array, delta: Array) -> Operands:
    """Gradients of the inputs; see `reference.backward`."""
    operands = without_gaps(residuals.operands)
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
    given = [*operands, residuals.lse, d_output, delta]
    gradients = call(BACKWARD, results, given, _attributes(problem))
    return Operands(*gradients[:3], *(gradients[3:] if problem.additional else (None, None)))


def call(
    target: str,
    results: list[jax.ShapeDtypeStruct],
    operands: list[Array],
    attributes: dict[str, Any],
) -> list[Array]:
    """The results of a custom call, whose library is built if need be."""
    prepare(default_platform())
    run = jax.ffi.ffi_call(target, results, vmap_method="sequential")
    axes = varying_axes(*operands)
    return [vary(x, axes) for x in run(*operands, **attributes)]


@functools.cache
def prepare(platform: str) -> None:
    """Builds the library of a platform unless it is there already, and registers its calls.

    Raises:
      RuntimeError: if there is no compiler, or it fails.
    """
    build.register(platform)


def is_built(platform: str) -> bool:
    """Whether the library of a platform is there, so that nothing would be compiled."""
    with contextlib.suppress(OSError, RuntimeError):
        return build.library_of(platform) is not None
    return False


def prepare_what_is_built() -> None:
    """Registers the CPU's calls if their library is there, as programs that are not traced need.

    Such are programs that were compiled or exported in another process.
    """
    with contextlib.suppress(OSError, RuntimeError):
        if is_built("cpu"):
            prepare("cpu")


def without_gaps(operands: Operands | ListOperands) -> list[Array]:
    """The call always takes additional keys and values, maybe none of them."""
    query, key, value, *additional = operands[:5]
    given = zip((key, value), additional, strict=True)
    more = (x[:, :0].reshape(len(x), 0, *x.shape[-2:]) if a is None else a for x, a in given)
    return [query, key, value, *more]


def _attributes(problem: Problem) -> dict[str, Any]:
    windows = [
        (w.length, w.kernel_size, w.stride, w.dilation, w.is_causal) for w in problem.windows
    ]
    return {
        "windows": np.array(windows, np.int64).reshape(-1),
        "tiles": np.array(tiles(problem.windows), np.int64).reshape(-1),
        "scale": np.float32(problem.scale),
    }


@functools.lru_cache(maxsize=1024)
def tiles(windows: tuple[Window, ...]) -> list[tuple[int, ...]]:
    """Shapes of the tiles whose work is least, in the order of `TileKind` in `problem.h`.

    Queries on a CPU; on a GPU queries in the forward pass, queries and keys in the backward pass;
    then on sm_90a pairs of what a block works on and of the boxes in which the other side comes.
    """
    return [
        _best_tile(windows, CPU_WEIGHTS),
        _best_tile(windows, {128: 1.0}),
        _best_tile(windows, {64: 1.0}),
        _best_tile(windows, {64: 1.0}, by_key=True),
        *(shape for one in BOXES for shape in _best_boxes(windows, *one)),
    ]


def _best_boxes(
    windows: tuple[Window, ...], own: int, seen: int, by_key: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of tiles of `own` tokens, and of boxes of `seen` that they meet, for the least
    steps."""
    rank = len(windows)
    side = functools.cache(functools.partial(cut, inverse=by_key))
    boxes = [shape for shape in shapes_of(seen, rank) if shape[-1] >= LEAST_SEEN]
    pairs = itertools.product(shapes_of(own, rank), boxes)
    best = cheapest((tuple(map(side, windows, *pair)) for pair in pairs), BOX_COSTS)
    return tuple(one.own for one in best), tuple(one.seen for one in best)


def _best_tile(
    windows: tuple[Window, ...], weights: dict[int, float], by_key: bool = False
) -> tuple[int, ...]:
    """The shape that meets the fewest tokens of the other side, for all tiles together.

    `weights` is what meeting one costs, by the most tokens that a tile may have.
    """
    choices = []
    for window in windows:
        longest = -(-window.length // window.dilation)
        most = min(max(weights), longest)
        sizes = sizes_up_to(most, [n * window.stride for n in (1, 2, 4)])
        choices.append([cut(window, size, inverse=by_key) for size in sizes])

    def weight(tokens: int) -> float:
        return next((x for most, x in weights.items() if tokens <= most), math.inf)

    return tuple(one.own for one in cheapest(itertools.product(*choices), COSTS, weight))
