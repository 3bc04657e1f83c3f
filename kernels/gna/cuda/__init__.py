"""Custom calls into C++ and CUDA through XLA's foreign function interface.

One call, two targets: on a CPU it runs threads and vectors (`gna_cpu.cc`), on an NVIDIA GPU tensor
cores (`gna_gpu.cu`).  The libraries are built by the machine's own compilers on first use (`build`).
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..problem import Gradients, Problem, Residuals
from ..windows import Window, tile_visits
from . import build

FORWARD, BACKWARD = "conceptax_gna_forward", "conceptax_gna_backward"
PLATFORMS = {"cpu": "cpu", "gpu": "CUDA"}

# The CPU target takes tiles of at most 64 queries, in vectors of 16: what a key then costs, relative
# to its products at full speed, by vectors of a tile.
VECTOR_COSTS = (1.3, 2.1, 3.0, 4.0)
TILE_COST = 64  # preparing a tile, in keys


def unsupported(problem: Problem, platform: str) -> str | None:
    """Why this backend cannot do a problem on a platform, or None if it can."""
    if platform not in PLATFORMS:
        return f"it runs on CPUs and NVIDIA GPUs, not on a {platform}"
    if problem.shards > 1:
        return "it does not attend from a shard of the tokens"
    return build.missing(platform)


def forward(
    problem: Problem,
    query: Array,
    key: Array,
    value: Array,
    additional_keys: Array | None,
    additional_values: Array | None,
) -> tuple[Array, Array]:
    """Output [B, *X, Hq, Dv] in the dtype of the query, and its log-sum-exp [B, *X, Hq]."""
    _register(jax.default_backend())
    operands = _operands(query, key, value, additional_keys, additional_values)
    shape = (*query.shape[:-1], problem.value_dim)
    results = (_like(query, shape), _like(query, shape[:-1], jnp.float32))
    output, lse = jax.ffi.ffi_call(FORWARD, results, vmap_method="sequential")(
        *operands, **_attributes(problem)
    )
    return output, lse


def backward(problem: Problem, residuals: Residuals, d_output: Array, delta: Array) -> Gradients:
    """Gradients of the inputs; see `reference.backward`."""
    _register(jax.default_backend())
    operands = _operands(*residuals[:5])
    results = [_like(x, x.shape) for x in operands]
    call = jax.ffi.ffi_call(BACKWARD, results, vmap_method="sequential")
    gradients = call(*operands, residuals.lse, d_output, delta, **_attributes(problem))
    return Gradients(*gradients[:3], *(gradients[3:] if problem.additional else (None, None)))


@functools.cache
def _register(platform: str) -> None:
    library = build.load(platform)
    for name, symbol in ((FORWARD, library.GnaForward), (BACKWARD, library.GnaBackward)):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(symbol), platform=PLATFORMS[platform])


def _like(x: Array, shape: tuple[int, ...], dtype: Any = None) -> jax.ShapeDtypeStruct:
    """A result that varies over the mesh axes that `x` varies over."""
    axes = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype or x.dtype, manual_axis_type=axes)


def _operands(query: Array, key: Array, value: Array, *additional: Array | None) -> list[Array]:
    """The call always takes additional keys and values, maybe none of them."""
    given = zip((key, value), additional, strict=True)
    return [
        query,
        key,
        value,
        *(x[:, :0].reshape(x.shape[0], 0, *x.shape[-2:]) if a is None else a for x, a in given),
    ]


def _attributes(problem: Problem) -> dict[str, Any]:
    windows = [
        (w.length, w.kernel_size, w.stride, w.dilation, w.is_causal) for w in problem.windows
    ]
    return {
        "windows": np.array(windows, np.int64).reshape(-1),
        "tile": np.array(cpu_tile(problem.windows), np.int64),
        "scale": np.float32(problem.scale),
    }


@functools.lru_cache(maxsize=1024)
def cpu_tile(windows: tuple[Window, ...]) -> tuple[int, ...]:
    """Queries of a tile along each dimension, at most 64: the tile whose work is least."""
    choices = [[(tile, *_visits(window, tile)) for tile in _sizes(window)] for window in windows]

    def cost(combination: tuple[tuple[int, int, int], ...]) -> float:
        sizes, tiles, keys = zip(*combination, strict=True)
        queries = math.prod(sizes)
        if queries > 64:
            return math.inf
        work = math.prod(keys) + TILE_COST * math.prod(tiles)
        return VECTOR_COSTS[-(-queries // 16) - 1] * work

    return tuple(one[0] for one in min(itertools.product(*choices), key=cost))


def _sizes(window: Window) -> list[int]:
    """Tiles worth trying along a dimension: powers of two, and those that fit the stride groups."""
    longest = -(-window.length // window.dilation)
    sizes = {1 << n for n in range(7)} | {n * window.stride for n in (1, 2, 4)} | {longest}
    return sorted(size for size in sizes if size <= min(64, longest))


def _visits(window: Window, tile: int) -> tuple[int, int]:
    """Tiles along a dimension, and the keys that they see together."""
    tiles = keys = 0
    for length in window.group_lengths():
        count = -(-length // tile)
        visits = tile_visits(
            np.arange(count), length, window.kernel_size, window.stride, window.is_causal, tile, 1
        )
        tiles += count
        keys += int((visits.last - visits.first).sum())
    return tiles, keys
