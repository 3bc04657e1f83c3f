"""What it would save to bring a video's tokens into tiles once per model (arXiv 2504.16922, B.2).

    python benchmarks/gna_permutation.py

The kernels here read tokens where they lie, and permute nothing.  With windows that are the tiles
(stride = window) a permuted layout can be asked of them all the same: it is attention within blocks
of one row of tokens.  So blocks of Wan run both ways, with equal results: on the grid, and on
tokens, and rotary angles, that were permuted before the first block and are put back behind the
last.  That is the most that can be saved, as no window is cut by a tile.  Contenders take turns.
"""

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from conceptax.flax_models.layers.attention import GNA, with_attention
from conceptax.flax_models.layers.joint_attention import JointSequence
from conceptax.flax_models.wan_transformer_3d import (
    WanTransformer3DConfig,
    WanTransformer3DModel,
    rotary_of,
)

CASES = (  # heads, their dimension, layers, layout, window
    (4, 64, 4, (8, 16, 16), (4, 8, 8)),
    (4, 64, 4, (8, 16, 16), (4, 16, 16)),
    (12, 128, 1, (4, 16, 32), (4, 8, 16)),
)


def in_tiles(layout: tuple[int, ...], tile: tuple[int, ...]) -> np.ndarray:
    """The place on the grid of each token of the permuted row."""
    split = [n for side, own in zip(layout, tile, strict=True) for n in (side // own, own)]
    places = np.arange(math.prod(layout)).reshape(split)
    return places.transpose(0, 2, 4, 1, 3, 5).ravel()


def runs(
    heads: int, dim: int, layers: int, layout: tuple[int, ...], window: tuple[int, ...], kind: str
) -> dict[str, tuple[Callable[..., Any], Any]]:
    """Blocks in both ways, forward and backward."""
    features = heads * dim
    config = WanTransformer3DConfig(
        num_attention_heads=heads,
        attention_head_dim=dim,
        text_dim=64,
        ffn_dim=4 * features,
        num_layers=layers,
    )
    model = WanTransformer3DModel(config, rngs=nnx.Rngs(0))
    order, size = in_tiles(layout, window), math.prod(window)
    rotary = rotary_of(config, layout)
    permuted = jax.tree.map(lambda table: table[order], rotary)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (1, len(order), features))
    text = jax.random.normal(keys[1], (1, 64, features))
    of_time = jax.random.normal(keys[2], (1, 1, 6, features))
    found = {}
    for name, grid, setting in (
        ("in place", layout, GNA(window, window, implementation=kind)),
        ("permuted", (len(order),), GNA(size, size, implementation=kind)),
    ):
        graphdef, params = nnx.split(with_attention(model, setting).blocks)

        def forward(params: Any, x: Any, graphdef: Any = graphdef, grid: Any = grid) -> Any:
            row = len(grid) == 1
            x = x[:, order] if row else x
            sequence = JointSequence(grid, rotary=permuted if row else rotary)
            for block in nnx.merge(graphdef, params):
                x = block(x, text, of_time, sequence)
            return x[:, np.argsort(order)] if row else x

        def loss(params: Any, x: Any, forward: Any = forward) -> Any:
            return (forward(params, x) ** 2).sum()

        found[f"{name}, forward"] = jax.jit(forward), (params, x)
        found[f"{name}, step"] = jax.jit(jax.grad(loss, (0, 1))), (params, x)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    for case in CASES:
        for kind in ("cuda", "xla") if jax.default_backend() == "cpu" else ("triton", "xla"):
            found = runs(*case, kind)
            one, other = (found[f"{name}, forward"] for name in ("in place", "permuted"))
            np.testing.assert_allclose(one[0](*one[1]), other[0](*other[1]), atol=2e-3)
            times: dict[str, list[float]] = {name: [] for name in found}
            for turn in range(rounds + 1):
                for name, (run, arguments) in found.items():
                    begun = time.perf_counter()
                    jax.block_until_ready(run(*arguments))
                    if turn:
                        times[name].append(1e3 * (time.perf_counter() - begun))
            heads, dim, layers, layout, window = case
            shape = "x".join(map(str, layout)), "x".join(map(str, window))
            print(f"{heads} heads of {dim}, {layers} layers, {' in '.join(shape[::-1])}, {kind}")
            for part in ("forward", "step"):
                here, there = (times[f"{name}, {part}"] for name in ("in place", "permuted"))
                ratio = np.median(np.array(here) / np.array(there))
                print(
                    f"  {part:8} in place {min(here):8.1f} ms, permuted {min(there):8.1f} ms "
                    f"(least of {rounds}); median ratio of rounds {ratio:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
