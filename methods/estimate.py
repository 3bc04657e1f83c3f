"""Estimates: how long a program takes on this device, before it is compiled or run.

Its matrix products and convolutions are counted in its jaxpr, loops as often as they go around, and
divided by the rate at which this device multiplies matrices.  That is right to a factor of two for
models of Stable Diffusion's size, whose time goes there, and too low for tiny ones.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Models reach this share of the rate of a large matrix product: measured with Stable Diffusion
# 1.5's UNet on CPUs.
_EFFICIENCY = 0.55
_COMPILED_PER_SECOND = 350.0  # equations, by XLA for a CPU

# Told before a program is compiled: about how long that takes, and then the whole run, in seconds.
OnEstimate = Callable[[float, float], None]


class Work(NamedTuple):
    """What a program consists of.

    Attributes:
      flops: floating-point operations of its products and convolutions; a multiply-add is two.
      equations: in its jaxpr, bodies of loops once: what a compiler has to read.
    """

    flops: float
    equations: int


def work(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Work:
    """What a function does with such arguments; it is traced, not run.

    Args:
      function: a jitted one, also with some of its arguments bound, whose trace is kept for the
        call itself; or any that jax can trace.
      args, kwargs: arrays, or `jax.ShapeDtypeStruct` in their place.
    """
    bound = functools.partial(function, *args, **kwargs)  # of another partial, one partial
    if hasattr(bound.func, "trace"):
        return _work(bound.func.trace(*bound.args, **bound.keywords).jaxpr.jaxpr)
    return _work(jax.make_jaxpr(function)(*args, **kwargs).jaxpr)


def run_seconds(flops: float) -> float:
    """About how long so many operations take on the default device."""
    return flops / (_EFFICIENCY * matmul_rate())


def compile_seconds(equations: int) -> float:
    """About how long XLA takes to compile so many equations for a CPU."""
    return equations / _COMPILED_PER_SECOND


@functools.cache
def matmul_rate() -> float:
    """Floating-point operations per second of a matrix product here; measured once.

    In float32 on a CPU, which widens smaller numbers, and in bfloat16 elsewhere.
    """
    side, dtype = (1024, jnp.float32) if jax.default_backend() == "cpu" else (8192, jnp.bfloat16)
    matrix = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


def about(seconds: float) -> str:
    """A duration in words, to two digits: "about 40 s", "about 12 min", "about 79 h"."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"about {float(f'{seconds / size:.2g}'):g} {unit}"
    return f"about {max(1, float(f'{seconds:.2g}')):.0f} s"


def _work(jaxpr: Any) -> Work:
    flops, equations = 0.0, 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        found = [_work(inner) for inner in _inner(parameters)]
        equations += 1 + sum(each.equations for each in found)
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            summed = math.prod(shape[axis] for axis in contracted)
            flops += 2.0 * math.prod(equation.outvars[0].aval.shape) * summed
        elif name == "conv_general_dilated":
            kernel, layout = equation.invars[1].aval.shape, parameters["dimension_numbers"]
            summed = math.prod(kernel) / kernel[layout.rhs_spec[0]]
            holes = math.prod(parameters["lhs_dilation"])  # zeros between the inputs
            flops += 2.0 * math.prod(equation.outvars[0].aval.shape) * summed / holes
        elif name == "cond":
            flops += max(each.flops for each in found)
        else:
            flops += parameters.get("length", 1) * sum(each.flops for each in found)
    return Work(flops, equations)


def _inner(parameters: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in parameters.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = getattr(each, "jaxpr", each)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr
