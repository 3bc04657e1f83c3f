"""Measure with which tiles the Triton kernels are fastest on the GPU at hand.

What was found is kept in the cache folder, for each device, problem and version of what compiles.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .api import attend
from .backends import triton
from .backends.triton_blocks import TUNED, Blocks, tuning_key
from .cuda import build
from .partition import _sources
from .platforms import local_devices
from .problem import Operands, Problem, Residuals

KERNELS = ("forward", "backward_query", "backward_keys")

Times = dict[str, dict[Blocks, float]]


def tune(
    problem: Problem,
    candidates: Mapping[str, Sequence[Blocks]] | None = None,
    repeats: int = 20,
) -> Times:
    """Times the kernels on this GPU, and uses the fastest for such problems from now on.

    Functions that are compiled already keep what they have. What was found is kept in the cache
    folder (`conceptax` in $XDG_CACHE_HOME or ~/.cache): where it is there already, as in another
    process, it is used without measuring. A damaged file is measured again.

    Args:
      problem: what to tune for; see `describe`.
      candidates: what to try for each kernel, by default at most four that the compiler has shown
        not to spill; those that do not fit the GPU are left out.
      repeats: calls that are timed together, after one that is not.

    Returns:
      Milliseconds of each candidate that ran, the fastest first, by kernel; of the two kernels of
      the backward pass together, while one of them is tuned.
    """
    if candidates is None:
        candidates = {kernel: triton.candidates_here(problem, kernel) for kernel in KERNELS}
    path = _path(problem, candidates)
    times = _read(path, candidates)
    if times is None:
        times = _measure(problem, candidates, repeats)
        _write(path, times)
    for kernel, found in times.items():
        if found:
            TUNED[tuning_key(problem, kernel)] = next(iter(found))
    attend.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]; traced for earlier tiles
    return times


def _measure(problem: Problem, candidates: Mapping[str, Sequence[Blocks]], repeats: int) -> Times:
    times: Times = {}
    operands = _random_operands(problem)
    for kernel in KERNELS:
        key = tuning_key(problem, kernel)
        found: dict[Blocks, float] = {}
        for blocks in dict.fromkeys(candidates[kernel]):
            TUNED[key] = blocks
            # What is too large for the GPU fails as it is compiled or started.
            with contextlib.suppress(ValueError, RuntimeError):
                found[blocks] = _milliseconds(problem, kernel, operands, repeats)
        TUNED.pop(key)
        times[kernel] = dict(sorted(found.items(), key=lambda item: item[1]))
        if found:
            TUNED[key] = next(iter(times[kernel]))
    return times


# What is kept


def _path(problem: Problem, candidates: Mapping[str, Sequence[Blocks]]) -> Path | None:
    """Where the times are kept; None if there is no place."""
    versions = []
    for package in ("jaxlib", "jax-triton", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append((package, importlib.metadata.version(package)))
    device = next((device.device_kind for device in local_devices("gpu")), None)
    tried = [(kernel, [tuple(blocks) for blocks in candidates[kernel]]) for kernel in KERNELS]
    known = (device, versions, _sources(), dataclasses.replace(problem, batch=1), tried)
    with contextlib.suppress(RuntimeError):  # the home folder is unknown
        digest = hashlib.sha256(repr(known).encode()).hexdigest()
        return build._cache_folder() / f"tiles-{digest[:20]}.json"
    return None


def _read(path: Path | None, candidates: Mapping[str, Sequence[Blocks]]) -> Times | None:
    """The times in a file; None if it is not there, or damaged."""
    if path is None:
        return None
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        kept = json.loads(path.read_text())
        times = {
            kernel: {Blocks(*blocks): float(time) for *blocks, time in kept[kernel]}
            for kernel in KERNELS
        }
        if all(set(times[kernel]) <= set(candidates[kernel]) for kernel in KERNELS):
            return times
    return None


def _write(path: Path | None, times: Times) -> None:
    """Keeps the times, if the folder can be written; whole, or not at all."""
    if path is None:
        return
    rows = {
        kernel: [(*blocks, x) for blocks, x in found.items()] for kernel, found in times.items()
    }
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as scratch:
            file = Path(scratch) / path.name
            file.write_text(json.dumps(rows))
            os.replace(file, path)


# Measuring


def _random_operands(problem: Problem) -> tuple[Residuals, Array, Array]:
    """What `backward` takes; operands of `forward` are among the residuals."""
    keys = iter(jax.random.split(jax.random.key(0), 6))

    def draw(*shape: int) -> Array:
        return jax.random.normal(next(keys), (problem.batch, *shape), problem.dtype)

    tokens, heads, kv_heads = problem.layout, problem.heads, problem.kv_heads
    query, key = draw(*tokens, heads, problem.head_dim), draw(*tokens, kv_heads, problem.head_dim)
    value, d_output = (draw(*tokens, n, problem.value_dim) for n in (kv_heads, heads))
    more_keys = more_values = None
    if problem.additional:
        more_keys = draw(problem.additional, kv_heads, problem.head_dim)
        more_values = draw(problem.additional, kv_heads, problem.value_dim)
    lse = jnp.full(query.shape[:-1], 10.0, jnp.float32)
    operands = Operands(query, key, value, more_keys, more_values)
    return Residuals(operands, d_output, lse), d_output, jnp.zeros_like(lse)


def _milliseconds(problem: Problem, kernel: str, operands: Any, repeats: int) -> float:
    if kernel == "forward":
        run, operands = triton.forward, (operands[0].operands,)
    else:
        run = triton.backward
    run = jax.jit(functools.partial(run, problem))
    jax.block_until_ready(run(*operands))
    start = time.perf_counter()
    jax.block_until_ready([run(*operands) for _ in range(repeats)])
    return (time.perf_counter() - start) / repeats * 1000
