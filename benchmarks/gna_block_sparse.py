"""Block-sparse attention's speed, beside dense attention in the same run.

    python benchmarks/gna_block_sparse.py

Blocks are chosen from the data, as VSA does: means of blocks are scored, and each block of queries
attends within the best blocks of keys; choosing is part of what is timed.  Results are checked
against the float32 reference first, then contenders take turns.  Dense attention is
`jax.nn.dot_product_attention`.  A step is the forward and the backward pass.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conceptax.kernels import gna

BATCH, HEADS, DIM = 1, 4, 64


def listed(implementation: str, block: int, most: int) -> Callable[..., Any]:
    """Attention to the best blocks by one backend."""

    def attend(query: Any, key: Any, value: Any) -> Any:
        scores = gna.pooled_scores(query, key, query_block=block, key_block=block)
        block_mask = gna.BlockMask.from_scores(scores, most, query_block=block, key_block=block)
        return gna.block_sparse_attention(
            query, key, value, block_mask=block_mask, implementation=implementation
        )

    return attend


def step_of(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Gradients of all operands by a cotangent."""

    def step(query: Any, key: Any, value: Any, cotangent: Any) -> Any:
        return jax.vjp(attend, query, key, value)[1](cotangent)

    return step


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--most", type=int, nargs="*", default=[4, 8, 16, 64])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    shape = (BATCH, given.tokens, HEADS, DIM)
    keys = jax.random.split(jax.random.key(0), 4)
    operands = [jax.random.normal(key, shape, jnp.dtype(given.dtype)) for key in keys]
    names = ("cuda", "xla") if jax.default_backend() == "cpu" else ("xla",)
    contenders = {"dense": jax.nn.dot_product_attention}
    for most in given.most:
        for name in names:
            title = f"{name}, {most} of {given.tokens // given.block}"
            contenders[title] = listed(name, given.block, most)
    runs = {}
    for name, attend in contenders.items():
        runs[name, "forward"] = jax.jit(attend), operands[:3]
        runs[name, "step"] = jax.jit(step_of(attend)), operands
    few = [x[:, : 8 * given.block] for x in operands]
    expected = jax.jit(step_of(listed("reference", given.block, 2)))(*few)
    tolerance = 1e-4 if given.dtype == "float32" else 5e-2
    for name in names:
        got = jax.jit(step_of(listed(name, given.block, 2)))(*few)
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(
                np.asarray(one, np.float32), np.asarray(other, np.float32), atol=tolerance
            )
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for turn in range(given.rounds + 1):
        for name, (run, arguments) in runs.items():
            begun = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            if turn:
                times[name].append(1e3 * (time.perf_counter() - begun))
    device = jax.devices()[0].device_kind
    print(f"{given.tokens} tokens, {HEADS} heads of {DIM}, {given.dtype}, blocks of {given.block}")
    print(f"{device}, jax {jax.__version__}; medians of {given.rounds} rounds, ms")
    for part in ("forward", "step"):
        dense = np.array(times["dense", part])
        for name in contenders:
            own = np.array(times[name, part])
            print(f"{part:8} {name:20} {np.median(own):8.1f}  {np.median(dense / own):6.1f}x")


if __name__ == "__main__":
    main()
