"""Triton kernels called from jax: what to launch, and with which tiles.

Needs an NVIDIA GPU and jax-triton (`pip install 'conceptax[cuda]'`), which is imported at the first
call. Kernels are lowered for the GPU at hand, without one for compute capability 9.0.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..nonfinite import contained, contained_backward
from ..platforms import local_devices
from ..problem import Operands, Problem, Residuals
from ..varying import vary, varying_axes
from .triton_blocks import Blocks, blocks_of, candidates_of, largest_dim, padded, tiling

# Programs that keep any GPU busy; the additional keys alone may be too few.
ENOUGH_PROGRAMS = 512


def unsupported(problem: Problem, platform: str) -> str | None:
    """Why this backend cannot do a problem on a platform, or None if it can."""
    if platform != "gpu":
        return f"it runs on a GPU, not on {platform}"
    if problem.shards > 1:
        return "it does not attend from a shard of the tokens"
    if not isinstance(problem.batch, int):
        return "it takes a batch of known size, not a symbolic one"
    most = largest_dim(problem)
    if max(problem.head_dim, problem.value_dim) > most:
        return (
            f"head dimensions may be {most} at most in {problem.dtype}, not {problem.head_dim} "
            f"(queries and keys) and {problem.value_dim} (values)"
        )
    return None


@functools.cache
def missing(platform: str) -> str | None:
    """Why jax-triton is not to be had here, and what to do; None if it is."""
    try:
        import jax_triton  # noqa: F401
        import triton  # noqa: F401
    except Exception as error:  # whatever it is: without them this backend is not to be had
        reason = str(error).splitlines()[0]
        return f"jax-triton cannot be imported ({reason}); pip install 'conceptax[cuda]' brings it"
    return None


def forward(problem: Problem, operands: Operands) -> tuple[Array, Array]:
    """Output [B, *X, Hq, Dv] in the dtype of the query, and its log-sum-exp [B, *X, Hq]."""
    query, how = operands.query, launch(problem, "forward")
    if how.static["has_masked"]:
        operands = contained(operands)
    output, lse = call(
        "forward",
        how,
        _without_gaps(operands),
        [
            jax.ShapeDtypeStruct((*query.shape[:-1], problem.value_dim), query.dtype),
            jax.ShapeDtypeStruct((problem.batch, problem.heads, *problem.layout), jnp.float32),
        ],
    )
    return output, jnp.moveaxis(lse, 1, -1)


def backward(problem: Problem, residuals: Residuals, d_output: Array, delta: Array) -> Operands:
    """Gradients of the inputs; see `reference.backward`."""
    of_query, of_keys = (launch(problem, name) for name in ("backward_query", "backward_keys"))
    if of_query.static["has_masked"] or of_keys.static["has_masked"]:
        residuals, d_output, delta = contained_backward(residuals, d_output, delta)
    operands, _, lse = residuals
    query, key, value, *additional = _without_gaps(operands)
    lse, delta = (jnp.moveaxis(x, -1, 1) for x in (lse * math.log2(math.e), delta))
    d_output = d_output.astype(query.dtype)
    cotangents = (d_output, lse, delta)
    (d_query,) = call(
        "backward_query",
        of_query,
        (query, key, value, *additional, *cotangents),
        [jax.ShapeDtypeStruct(query.shape, query.dtype)],
    )
    d_key, d_value = call(
        "backward_keys",
        of_keys,
        (query, key, value, *cotangents),
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value)],
    )
    if not problem.additional:
        return Operands(d_query, d_key, d_value, None, None)
    how, parts = launch_additional(problem)
    partial = call(
        "backward_additional",
        how,
        (query, *additional, *cotangents),
        [jax.ShapeDtypeStruct((parts, *x.shape), jnp.float32) for x in additional],
    )
    d_additional = (x.sum(0).astype(query.dtype) for x in partial)
    return Operands(d_query, d_key, d_value, *d_additional)


def _without_gaps(operands: Operands) -> tuple[Array, ...]:
    """Keys and values stand for additional ones that there are not: kernels do not read them."""
    query, key, value, more_keys, more_values = operands
    more_keys = key if more_keys is None else more_keys
    return query, key, value, more_keys, value if more_values is None else more_values


# Launching


class Launch(NamedTuple):
    """Programs, resources and `triton_geometry.Static` of a kernel."""

    programs: int
    warps: int
    stages: int
    static: dict[str, Any]


def call(
    kernel: str, how: Launch, operands: Sequence[Array], results: list[jax.ShapeDtypeStruct]
) -> list[Array]:
    """Runs a kernel of `triton_kernels`: operands, then results, then `Static`."""
    import jax_triton

    from . import triton_kernels

    axes = varying_axes(*operands)
    outputs = jax_triton.triton_call(
        *operands,
        kernel=getattr(triton_kernels, kernel),
        name=f"gna_{kernel}",
        out_shape=results,
        grid=(how.programs,),
        num_warps=how.warps,
        num_stages=how.stages,
        compute_capability=_capability(),
        S=triton_kernels.Static(**how.static),
    )
    return [vary(x, axes) for x in outputs]


def blocks_here(problem: Problem, kernel: str) -> Blocks:
    """How a kernel is cut for a problem on this GPU."""
    return blocks_of(problem, kernel, _capability())


def candidates_here(problem: Problem, kernel: str) -> tuple[Blocks, ...]:
    """How a kernel may be cut for a problem on this GPU; see `tuning`."""
    return candidates_of(problem, kernel, _capability())


def _capability() -> int:
    """Compute capability to lower for, such as 90 for 9.0."""
    device = next(iter(local_devices("gpu")), None)
    if device is None:
        return 90
    major, minor = str(device.compute_capability).split(".")
    return 10 * int(major) + int(minor)


def launch(problem: Problem, kernel: str) -> Launch:
    """How to run one of the kernels "forward", "backward_query" and "backward_keys"."""
    blocks = blocks_here(problem, kernel)
    of_keys = kernel == "backward_keys"
    tiles = tiling(problem.windows, blocks.own, blocks.seen, inverse=of_keys)
    static = _static(problem) | {
        "query_tile": tiles.seen if of_keys else tiles.own,
        "key_tile": tiles.own if of_keys else tiles.seen,
        "tiles": tiles.grid,
        "has_free": tiles.free > 0,
        "has_masked": tiles.free < tiles.steps,
    }
    lanes = problem.batch * (problem.kv_heads if of_keys else problem.heads)
    groups = math.prod(w.dilation for w in problem.windows)
    return Launch(lanes * groups * math.prod(tiles.grid), blocks.warps, blocks.stages, static)


def launch_additional(problem: Problem) -> tuple[Launch, int]:
    """How to run the kernel "backward_additional", and the parts that the queries are cut into."""
    blocks = blocks_here(problem, "backward_keys")
    tiles = -(-problem.tokens // blocks.seen)
    programs = problem.batch * problem.kv_heads * -(-problem.additional // blocks.own)
    part = -(-tiles // min(tiles, -(-ENOUGH_PROGRAMS // programs)))
    parts = -(-tiles // part)
    static = _static(problem) | {
        "query_tile": (1, 1, blocks.seen),
        "key_tile": (1, 1, blocks.own),
        "part": part,
    }
    return Launch(programs * parts, blocks.warps, blocks.stages, static), parts


def _static(problem: Problem) -> dict[str, Any]:
    row = problem.heads * max(problem.head_dim, problem.value_dim)
    return {
        "windows": tuple(
            (w.length, w.kernel_size, w.stride, w.dilation, w.is_causal)
            for w in padded(problem.windows)
        ),
        "wide": problem.tokens * row >= 2**31,
        "batch": problem.batch,
        "heads": problem.heads,
        "kv_heads": problem.kv_heads,
        "additional": problem.additional,
        "dim": problem.head_dim,
        "value_dim": problem.value_dim,
        "block_dim": _block(problem.head_dim),
        "block_value_dim": _block(problem.value_dim),
        "scale": problem.scale,
        "precision": "tf32x3",  # of float32 only: about as precise, on tensor cores
    }


def _block(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())
