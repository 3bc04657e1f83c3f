"""Whether neighborhood attention computes what it should, before `gna.py` measures it."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conceptax.kernels.gna import neighborhood_attention
from conceptax.kernels.gna.problem import Problem
from conceptax.kernels.gna.simulator import measure

# Error of a result against float64 over the largest number in it: rounding of operands' products
# and of results to the dtype.
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}

SMALL: tuple[dict[str, Any], ...] = (
    {"layout": (200,), "kernel_size": 64, "stride": 16, "additional": 5},
    {"layout": (70,), "kernel_size": 12, "stride": 5, "dilation": 3, "is_causal": True},
    {"layout": (24, 20), "kernel_size": (12, 9), "stride": (4, 1), "kv_heads": 2},
    {"layout": (9, 30), "kernel_size": (4, 5), "dilation": (2, 3), "is_causal": (False, True)},
    {"layout": (6, 8, 10), "kernel_size": (4, 5, 6), "stride": (2, 5, 3), "additional": 40},
    {"layout": (8, 8), "kernel_size": (8, 8), "kv_heads": 1},  # dense
)


def relative_error(received: Any, expected: Any) -> float:
    received, expected = np.asarray(received, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(received - expected).max() / np.abs(expected).max())


def check_small(implementation: str, dtypes: Sequence[str], dim: int) -> float:
    """Largest error over what is allowed, of values and gradients of small problems."""
    worst = 0.0
    for number, (settings, dtype) in enumerate(itertools.product(SMALL, dtypes)):
        rest = dict(settings)
        layout, kv_heads = rest.pop("layout"), rest.pop("kv_heads", 4)
        additional = rest.pop("additional", 0)
        rng = np.random.default_rng(number)
        shapes = [(1, *layout, heads, dim) for heads in (4, kv_heads, kv_heads)]
        shapes += [(1, additional, kv_heads, dim)] * (2 if additional else 0)
        inputs = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
        cotangents = rng.standard_normal(shapes[0]), rng.standard_normal(shapes[0][:-1])

        def results(name, inputs, rest=rest, cotangents=cotangents):
            def call(q, k, v, ak=None, av=None):
                return neighborhood_attention(
                    q,
                    k,
                    v,
                    additional_keys=ak,
                    additional_values=av,
                    return_lse=True,
                    implementation=name,
                    **rest,
                )

            (output, lse), pull = jax.vjp(jax.jit(call), *inputs)
            d_output, d_lse = cotangents
            return output, lse, *pull((jnp.asarray(d_output, output.dtype), jnp.float32(d_lse)))

        with jax.default_matmul_precision("highest"):
            expected = results("reference", [x.astype(jnp.float32) for x in inputs])
        for one, other in zip(results(implementation, inputs), expected, strict=True):
            worst = max(worst, relative_error(one, other) / TOLERANCE[dtype])
    return worst


def check_rows(implementation: str, problem: Problem) -> float:
    """Largest error over what is allowed, at some tokens, of a large problem against float64.

    Of some queries the output and dQ, and of some keys dK and dV, for which the log-sum-exps of the
    queries that see them are taken as computed.
    """
    rng = np.random.default_rng(0)
    given = measure.operands(problem, seed=1)
    run = functools.partial(measure.attention(problem, implementation), return_lse=True)

    @jax.jit
    def step(query, key, value, d_output):
        (output, lse), pull = jax.vjp(run, query, key, value)
        return output, lse, *pull((d_output, jnp.zeros_like(lse)))

    def rows(x, head):  # [tokens, dim] of one head
        return np.asarray(x[0, ..., head, :].astype(jnp.float32), np.float64).reshape(
            problem.tokens, -1
        )

    results = step(*given)
    head = int(rng.integers(problem.heads))
    q, k, v, do = (rows(x, head) for x in given)
    output, d_query, d_key, d_value = (rows(results[n], head) for n in (0, 2, 3, 4))
    lse = rows(results[1][..., None], head)[:, 0]
    seen = [window.mask() for window in problem.windows]
    found: dict[str, list] = {name: [] for name in ("O", "LSE", "dQ", "dK", "dV")}
    for token in [0, problem.tokens - 1, *rng.integers(problem.tokens, size=4)]:
        place = np.unravel_index(token, problem.layout)
        keys = functools.reduce(np.kron, [m[x] for m, x in zip(seen, place, strict=True)])
        scores = problem.scale * (k[keys] @ q[token])
        exact = scores.max() + np.log(np.exp(scores - scores.max()).sum())
        p = np.exp(scores - exact)
        out = p @ v[keys]
        ds = p * (v[keys] @ do[token] - out @ do[token])
        found["O"].append((output[token], out))
        found["LSE"].append((lse[token, None], exact[None]))
        found["dQ"].append((d_query[token], problem.scale * ds @ k[keys]))
        by = functools.reduce(np.kron, [m[:, x] for m, x in zip(seen, place, strict=True)])
        p = np.exp(problem.scale * (q[by] @ k[token]) - lse[by])
        ds = p * (do[by] @ v[token] - (do[by] * output[by]).sum(-1))
        found["dK"].append((d_key[token], problem.scale * ds @ q[by]))
        found["dV"].append((d_value[token], p @ do[by]))
    errors = [relative_error(*map(np.stack, zip(*pairs, strict=True))) for pairs in found.values()]
    return max(errors) / TOLERANCE[problem.dtype]
