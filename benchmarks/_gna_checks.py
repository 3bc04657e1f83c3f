"""Whether neighborhood attention computes what it should, before `gna.py` measures it."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conceptax.kernels.gna import describe, unsupported
from conceptax.kernels.gna.api import attend, seen_by_backends
from conceptax.kernels.gna.problem import Operands, Problem
from conceptax.kernels.gna.simulator import measure

# Error of a result against float64 over the largest number in it: rounding of operands' products
# and of results to the dtype.
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}

# The first are for tools under which everything is slow. Dimensions (of queries and values) and
# dtypes are the run's own unless they are given.
SMALL: tuple[dict[str, Any], ...] = (
    {"layout": (24, 20), "kernel_size": (12, 9), "stride": (4, 1), "kv_heads": 2},
    {"layout": (6, 8, 10), "kernel_size": (4, 5, 6), "stride": (2, 5, 3), "additional": 40},
    {"layout": (200,), "kernel_size": 64, "stride": 16, "additional": 5, "dims": (64, 64)},
    {"layout": (70,), "kernel_size": 12, "stride": 5, "dilation": 3, "is_causal": True},
    {"layout": (9, 30), "kernel_size": (4, 5), "dilation": (2, 3), "is_causal": (False, True)},
    {"layout": (8, 8), "kernel_size": (8, 8), "kv_heads": 1},  # dense
    {"layout": (16, 16), "kernel_size": (8, 8), "stride": (8, 8), "dtype": "float32"},
    {"layout": (4, 8, 8), "kernel_size": (2, 4, 4), "dtype": "float16"},
    {"layout": (40,), "kernel_size": 9, "dims": (72, 40)},
    {"layout": (7, 30), "kernel_size": (5, 5), "dims": (20, 20)},
    {"layout": (12, 16), "kernel_size": (6, 8), "stride": (3, 1), "dims": (256, 256)},
)

# Given a name, a function and what it takes: the function, compiled; see `_exports.py`.
Programs = Callable[[str, Callable[..., Any], Sequence[Any]], Callable[..., Any]]


def just_jit(name: str, function: Callable[..., Any], given: Sequence[Any]) -> Callable[..., Any]:
    return jax.jit(function)


def relative_error(received: Any, expected: Any) -> float:
    received, expected = np.asarray(received, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(received - expected).max() / np.abs(expected).max())


def worst(errors: Sequence[float]) -> float:
    """The largest; of numbers one of which is none, none."""
    return float(np.max(errors))


# Programs


def attention(problem: Problem, implementation: str) -> Callable[..., Any]:
    """Output and log-sum-exp of query, key, value and maybe additional keys and values.

    An implementation for another device than this may be named, to be exported.
    """
    seen = seen_by_backends(problem)

    def run(*operands):
        *own, more_keys, more_values = (*operands, None, None)[:5]
        own = [x.reshape(seen.batch, *seen.layout, *x.shape[-2:]) for x in own]
        output, lse = attend(seen, implementation, Operands(*own, more_keys, more_values))
        shape = (problem.batch, *problem.layout, problem.heads)
        return output.reshape(*shape, problem.value_dim), lse.reshape(shape)

    return run


def forward(problem: Problem, implementation: str) -> Callable[..., Any]:
    """The output alone."""
    run = attention(problem, implementation)
    return lambda *operands: run(*operands)[0]


def step(problem: Problem, implementation: str) -> Callable[..., Any]:
    """Output, log-sum-exp and gradients, given cotangents of the former and operands."""
    run = attention(problem, implementation)

    def both(d_output, d_lse, *operands):
        results, pull = jax.vjp(run, *operands)
        return *results, *pull((d_output, d_lse))

    return both


# Small problems


def small_problems(
    dtypes: Sequence[str], dim: int, count: int | None = None
) -> Iterator[tuple[str, Problem]]:
    """Problems whose every result is compared, by name."""
    for row in SMALL[:count]:
        settings = dict(row)
        layout, kv_heads = settings.pop("layout"), settings.pop("kv_heads", 4)
        additional, dims = settings.pop("additional", 0), settings.pop("dims", (dim, dim))
        given = settings.pop("dtype", None)
        for dtype in (given,) if given else dtypes:

            def array(*shape, kind=dtype):
                return jax.ShapeDtypeStruct((1, *shape), jnp.dtype(kind))

            operands = [array(*layout, 4, dims[0])]
            operands += [array(*layout, kv_heads, size) for size in dims]
            if additional:
                operands += [array(additional, kv_heads, size) for size in dims]
            name = f"{'x'.join(map(str, layout))}, {'/'.join(map(str, dims))}, {dtype}"
            yield name, describe(*operands, **settings)


def shapes_of(problem: Problem) -> list[jax.ShapeDtypeStruct]:
    """Of what `step` takes."""
    rows, kv = (problem.batch, *problem.layout, problem.heads), problem.kv_heads
    dims, dtype = (problem.head_dim, problem.value_dim), jnp.dtype(problem.dtype)
    shapes = [(*rows, problem.value_dim), rows, (*rows, problem.head_dim)]
    shapes += [(*rows[:-1], kv, size) for size in dims]
    if problem.additional:
        shapes += [(problem.batch, problem.additional, kv, size) for size in dims]
    kinds = [jnp.dtype("float32") if shape == rows else dtype for shape in shapes]
    return [jax.ShapeDtypeStruct(*each) for each in zip(shapes, kinds, strict=True)]


def program_of(problem: Problem, implementation: str, programs: Programs) -> Callable[..., Any]:
    """`step`, compiled here or exported."""
    name = f"{implementation} step {problem}"
    return programs(name, step(problem, implementation), shapes_of(problem))


def check_small(
    implementation: str,
    problems: Sequence[tuple[str, Problem]],
    programs: Programs = just_jit,
) -> dict[str, float | str]:
    """Largest error over what is allowed, of values and gradients; or why there is none."""
    found: dict[str, float | str] = {}
    for number, (name, problem) in enumerate(problems):
        reason = unsupported(implementation, problem)
        if reason is not None:
            found[name] = reason
            continue
        rng = np.random.default_rng(number)
        given = [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in shapes_of(problem)]
        results = program_of(problem, implementation, programs)(*given)
        wanted = exact(problem, *(np.asarray(x, np.float64) for x in given))
        errors = [
            relative_error(np.asarray(one, np.float64), other)
            for one, other in zip(results, wanted, strict=True)
        ]
        found[name] = worst(errors) / TOLERANCE[problem.dtype]
    return found


def exact(problem: Problem, d_output: Any, d_lse: Any, *operands: Any) -> list[np.ndarray]:
    """What `step` computes, in float64 and of all pairs at once; a batch of one."""
    d_output, d_lse, query, *rest = (x[0] for x in (d_output, d_lse, *operands))
    mask = functools.reduce(np.kron, [window.mask() for window in problem.windows]).astype(bool)
    mask = np.pad(mask, ((0, 0), (0, problem.additional)), constant_values=True)
    tokens = problem.tokens
    keys, values = (
        np.concatenate([x.reshape(tokens, *x.shape[-2:]), *more])
        for x, *more in (rest[0::2], rest[1::2])
    )
    q, do = (x.reshape(tokens, problem.heads, -1) for x in (query, d_output))
    dl = d_lse.reshape(tokens, problem.heads)
    out, lse, dq = np.zeros_like(do), np.zeros_like(dl), np.zeros_like(q)
    dk, dv = np.zeros_like(keys), np.zeros_like(values)
    for head in range(problem.heads):
        of = head // problem.repeats
        scores = np.where(mask, problem.scale * q[:, head] @ keys[:, of].T, -np.inf)
        top = scores.max(-1, keepdims=True)
        lse[:, head] = (top + np.log(np.exp(scores - top).sum(-1, keepdims=True)))[:, 0]
        p = np.exp(scores - lse[:, head, None])
        out[:, head] = p @ values[:, of]
        delta = (do[:, head] * out[:, head]).sum(-1) - dl[:, head]
        ds = problem.scale * p * (do[:, head] @ values[:, of].T - delta[:, None])
        dq[:, head] = ds @ keys[:, of]
        dk[:, of] += ds.T @ q[:, head]
        dv[:, of] += p.T @ do[:, head]
    split = [x[:tokens] for x in (dk, dv)]
    split += [x[tokens:] for x in (dk, dv)] if problem.additional else []
    layout = (1, *problem.layout)
    shaped = [x.reshape(*layout, *x.shape[1:]) for x in (out, lse, dq, *split[:2])]
    return shaped + [x[None] for x in split[2:]]


# Large problems


def check_rows(implementation: str, problem: Problem, programs: Programs = just_jit) -> float:
    """Largest error over what is allowed, at some tokens, of a large problem against float64.

    Of some queries the output and dQ, and of some keys dK and dV, for which the log-sum-exps of the
    queries that see them are taken as computed.
    """
    query, key, value, d_output = measure.operands(problem, seed=1)
    no_d_lse = jnp.zeros(query.shape[:-1], jnp.float32)
    results = program_of(problem, implementation, programs)(d_output, no_d_lse, query, key, value)
    rng = np.random.default_rng(0)
    head = int(rng.integers(problem.heads))
    rows = functools.partial(rows_of, head=head)
    q, k, v, do = (rows(x) for x in (query, key, value, d_output))
    output, d_query, d_key, d_value = (rows(results[n]) for n in (0, 2, 3, 4))
    lse = rows(results[1][..., None])[:, 0]
    found: dict[str, list] = {name: [] for name in ("O", "LSE", "dQ", "dK", "dV")}
    for token in [0, problem.tokens - 1, *rng.integers(problem.tokens, size=4)]:
        keys, p, exact = probabilities(problem, q, k, token)
        out = p @ v[keys]
        ds = p * (v[keys] @ do[token] - out @ do[token])
        found["O"].append((output[token], out))
        found["LSE"].append((lse[token, None], exact[None]))
        found["dQ"].append((d_query[token], problem.scale * ds @ k[keys]))
        by = seen(problem, token, by_key=True)
        p = np.exp(problem.scale * (q[by] @ k[token]) - lse[by])
        ds = p * (do[by] @ v[token] - (do[by] * output[by]).sum(-1))
        found["dK"].append((d_key[token], problem.scale * ds @ q[by]))
        found["dV"].append((d_value[token], p @ do[by]))
    errors = [relative_error(*map(np.stack, zip(*pairs, strict=True))) for pairs in found.values()]
    return worst(errors) / TOLERANCE[problem.dtype]


def check_output(problem: Problem, given: measure.Operands, output: Any) -> float:
    """Error over what is allowed of a forward pass alone, at some tokens of a head."""
    rng = np.random.default_rng(0)
    head = int(rng.integers(problem.heads))
    q, k, v, out = (rows_of(x, head) for x in (*given[:3], output))
    pairs = []
    for token in [0, problem.tokens - 1, *rng.integers(problem.tokens, size=8)]:
        keys, p, _ = probabilities(problem, q, k, token)
        pairs.append((out[token], p @ v[keys]))
    return relative_error(*map(np.stack, zip(*pairs, strict=True))) / TOLERANCE[problem.dtype]


def rows_of(x: Any, head: int) -> np.ndarray:
    """[tokens, dim] of one head, in float64."""
    one = np.asarray(x[0, ..., head, :].astype(jnp.float32), np.float64)
    return one.reshape(math.prod(one.shape[:-1]), -1)


def seen(problem: Problem, token: int, by_key: bool = False) -> np.ndarray:
    """Which keys a query sees, or which queries see a key."""
    place = np.unravel_index(token, problem.layout)
    masks = [w.mask().T if by_key else w.mask() for w in problem.windows]
    return functools.reduce(np.kron, [m[x] for m, x in zip(masks, place, strict=True)])


def probabilities(problem: Problem, q: Any, k: Any, token: int) -> tuple[Any, Any, Any]:
    """Of a query: which keys it sees, their probabilities, and the log-sum-exp."""
    keys = seen(problem, token)
    scores = problem.scale * (k[keys] @ q[token])
    exact = scores.max() + np.log(np.exp(scores - scores.max()).sum())
    return keys, np.exp(scores - exact), exact
