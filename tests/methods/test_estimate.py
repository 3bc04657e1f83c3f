"""Work counted in jaxprs, beside what can be counted by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest

from conceptax.kernels.memory import compiler_options
from conceptax.methods.estimate import about, compile_seconds, matmul_rate, run_seconds, work


def shape(*sides):
    return jax.ShapeDtypeStruct(sides, jnp.float32)


def test_products_and_convolutions_are_counted():
    assert work(jnp.matmul, shape(3, 5), shape(5, 7)).flops == 2 * 3 * 5 * 7
    assert work(jax.vmap(jnp.dot), shape(4, 3, 5), shape(4, 5, 7)).flops == 2 * 4 * 3 * 5 * 7

    def convolve(image, kernel, stride, groups=1):
        return jax.lax.conv_general_dilated(
            image,
            kernel,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    image, kernel = shape(2, 8, 8, 6), shape(3, 3, 6, 10)
    assert work(lambda x, k: convolve(x, k, 2), image, kernel).flops == 2 * 2 * 16 * 10 * 54
    deep = work(lambda x, k: convolve(x, k, 1, 6), image, shape(3, 3, 1, 6))
    assert deep.flops == 2 * 2 * 64 * 6 * 9


def test_loops_count_as_often_as_they_go_around():
    def steps(x, a):
        return jax.lax.scan(lambda x, _: (jnp.dot(a, x), None), x, length=9)[0]

    assert work(jax.jit(steps), shape(5), shape(5, 5)).flops == 9 * 50
    either = work(
        lambda p, x, a: jax.lax.cond(p, lambda: jnp.dot(a, x), lambda: x),
        jax.ShapeDtypeStruct((), jnp.bool_),
        shape(5),
        shape(5, 5),
    )
    assert either.flops == 50
    backward = work(jax.grad(lambda x, a: jnp.sum(steps(x, a))), shape(5), shape(5, 5))
    assert backward.flops == 2 * 9 * 50  # forward, and back to x alone


def test_a_jitted_function_keeps_its_trace_and_its_options():
    traced = []

    @functools.partial(jax.jit, static_argnums=0, compiler_options=compiler_options())
    def power(times, x):
        traced.append(times)
        for _ in range(times):
            x = x @ x
        return x

    bound = functools.partial(power, 3)
    assert work(bound, jnp.ones((4, 4))).flops == 3 * 2 * 4**3
    bound(jnp.ones((4, 4)))
    assert traced == [3]


def test_a_device_has_a_rate():
    rate = matmul_rate()
    assert rate > 1e8 and run_seconds(rate) == pytest.approx(1 / 0.55)
    assert compile_seconds(700) == pytest.approx(2)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "about 1 s"),
        (41.7, "about 42 s"),
        (89.0, "about 89 s"),
        (100.0, "about 1.7 min"),
        (4000.0, "about 67 min"),
        (79.4 * 3600, "about 79 h"),
        (512.0 * 3600, "about 510 h"),
    ],
)
def test_durations_in_words(seconds, words):
    assert about(seconds) == words
