"""The backward kernels for sm_90a without a GPU: on the emulator, and by the compiler's log."""

import functools
import math

import hopper_machine
import jax.numpy as jnp
import numpy as np
import pytest
from gna_oracle import attention, full_mask, operands, random_case
from hopper_machine import EmulatorError, Spoiled

from conceptax.kernels.gna.tiles import shapes_of

# Against float64: rounding of results, of probabilities and of their gradients.
TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2}
ROWS = 128
DIMS = (8, 16, 24, 32, 64, 64, 72, 128)


def columns(heads):
    """Queries that a tile of keys meets at a time; see `HopperBackward`."""
    return 64 if max(heads["dim"], heads["value_dim"]) > 64 else 128


def with_cotangents(case, heads, arrays, dtype):
    """Operands of 16 bits, cotangent, log-sum-exp and delta, and the gradients by the oracle."""
    *given, d_lse = arrays
    given = [None if x is None else np.asarray(x).astype(dtype) for x in given]
    exact = [None if x is None else x.astype(float) for x in given]
    output, lse, *gradients = attention(case, *exact, d_lse)
    delta = (exact[5] * output).sum(-1) - d_lse
    return [*given, lse.astype(np.float32), delta.astype(np.float32)], gradients


def random_problem(seed):
    """Settings, sizes, arrays, gradients, shapes of tiles: few blocks, for time's sake."""
    rng = np.random.default_rng(seed)
    while True:
        case = random_case(rng, most=260)
        kv_heads = int(rng.integers(1, 3))
        heads = {
            "batch": int(rng.integers(1, 3)),
            "heads": kv_heads * int(rng.integers(1, 3)),
            "kv_heads": kv_heads,
            "dim": int(rng.choice(DIMS)),
            "value_dim": int(rng.choice(DIMS)),
            "additional": int(rng.choice([0, 0, 0, 3, 130])),
        }
        shapes = [shapes_of(n, len(case["layout"])) for n in (ROWS, ROWS, ROWS, columns(heads))]
        tiles = [one[rng.integers(len(one))] for one in shapes]
        lengths = [-(-x // d) for x, d in zip(case["layout"], case["dilation"], strict=True)]
        blocks = heads["batch"] * heads["heads"] * math.prod(case["dilation"])
        for one in tiles[::2]:
            for n, length in zip(one, lengths, strict=True):
                blocks *= -(-length // n)
        if min(tiles[1][-1], tiles[3][-1]) >= 8 and blocks <= 24:
            break
    dtype = jnp.bfloat16 if rng.integers(2) else jnp.float16
    arrays, gradients = with_cotangents(case, heads, operands(rng, case, heads), dtype)
    return case, heads, arrays, gradients, tiles


def compare(got, expected, dtype, message=""):
    for n, (one, other) in enumerate(zip(got, expected, strict=True)):
        np.testing.assert_allclose(
            np.asarray(one, float),
            other,
            rtol=TOLERANCE[dtype],
            atol=TOLERANCE[dtype] * max(1, np.abs(other).max()),
            err_msg=f"gradient {n} of {message}",
        )


@pytest.mark.parametrize("part", range(6))
def test_random_problems(part):
    for seed in range(part * 1000, part * 1000 + 18):
        case, heads, arrays, gradients, tiles = random_problem(seed)
        hopper_machine.begin(seed)
        got = hopper_machine.backward(case, heads, arrays, tiles)
        compare(got, gradients, arrays[0].dtype.name, f"{seed}: {case} {heads} {tiles}")
