"""NATTEN's forward kernel for Hopper GPUs, to measure beside; see `natten_hopper.cu`."""

import ctypes
import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conceptax.kernels.gna.problem import Problem

CALL = "natten_hopper_forward"
TILES = {2: (16, 8), 3: (2, 8, 8)}
SCHEDULES = {"cooperative": False, "ping-pong": True}


@functools.cache
def register(library: Path) -> None:
    """Makes the call known to jax.

    Raises:
      OSError: if the library does not load.
    """
    symbol = ctypes.CDLL(str(library)).NattenForward
    jax.ffi.register_ffi_target(CALL, jax.ffi.pycapsule(symbol), platform="CUDA")


def unsupported(problem: Problem) -> str | None:
    """Why the instances that are built do not do a problem; None if they do."""
    tile = TILES.get(len(problem.windows))
    if tile is None or any(n % t for n, t in zip(problem.layout, tile, strict=True)):
        return f"NATTEN is built for layouts in whole tiles of {list(TILES.values())}"
    if problem.dtype != "bfloat16" or (problem.head_dim, problem.value_dim) != (128, 128):
        return "NATTEN is built for bfloat16 and heads of 128"
    plain = not problem.additional and problem.heads == problem.kv_heads
    if not plain or any(w.is_causal for w in problem.windows):
        return "NATTEN's Hopper kernel takes as many key heads, no additional keys"
    return None


def permuted(problem: Problem, x: jax.Array) -> jax.Array:
    """[B, *X, H, D] to [B, tokens, H, D], tile by tile, the first dimension fastest."""
    rank = len(problem.windows)
    cut = [(n // t, t) for n, t in zip(problem.layout, TILES[rank], strict=True)]
    x = x.reshape(x.shape[0], *itertools.chain(*cut), *x.shape[-2:])
    outer = [2 * n + 1 for n in reversed(range(rank))]
    order = (0, *outer, *(n + 1 for n in outer), 2 * rank + 1, 2 * rank + 2)
    return x.transpose(order).reshape(x.shape[0], math.prod(problem.layout), *x.shape[-2:])


def restored(problem: Problem, x: jax.Array) -> jax.Array:
    """What `permuted` was given."""
    rank = len(problem.windows)
    cut = [(n // t, t) for n, t in zip(problem.layout, TILES[rank], strict=True)]
    outer, inner = ([each[n] for each in reversed(cut)] for n in (0, 1))
    tiles = x.reshape(x.shape[0], *outer, *inner, *x.shape[-2:])
    places = itertools.chain(*((rank - n, 2 * rank - n) for n in range(rank)))
    order = (0, *places, 2 * rank + 1, 2 * rank + 2)
    return tiles.transpose(order).reshape(x.shape[0], *problem.layout, *x.shape[-2:])


def kernel(problem: Problem, schedule: str) -> Callable[..., Any]:
    """Output and log-sum-exp of permuted operands."""
    windows = problem.windows
    named = ("kernel_size", "stride", "dilation")
    sizes = [problem.layout, problem.layout]
    sizes += [[getattr(window, name) for window in windows] for name in named]
    attributes = {
        "sizes": np.array(sizes, np.int64).reshape(-1),
        "pingpong": SCHEDULES[schedule],
        "scale": np.float32(problem.scale),
    }

    def run(query, key, value):
        results = [
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32),
        ]
        return jax.ffi.ffi_call(CALL, results)(query, key, value, **attributes)

    return run


def attention(problem: Problem, schedule: str) -> Callable[..., jax.Array]:
    """The output of operands as they are: permuted before and after."""

    def run(query, key, value):
        output, _ = kernel(problem, schedule)(*(permuted(problem, x) for x in (query, key, value)))
        return restored(problem, output)

    return run
