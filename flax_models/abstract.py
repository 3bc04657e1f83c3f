"""Models without values: `nnx.eval_shape(lambda: Model(config, rngs=keys))`, with `OneKey` keys."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_kernel_init


class OneKey(nnx.Rngs):
    """Gives the same key every time: enough for shapes, and without a counter, whose updates make
    the tracing of a large model slow (its time grows with the square of the parameters)."""

    def __init__(self):
        self._key = _one_key()

    def __getattr__(self, name: str) -> Callable[[], jax.Array]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda: self._key


@functools.cache
def _one_key() -> jax.Array:
    with jax.ensure_compile_time_eval():  # no tracer, whoever asks first
        return jax.random.key(0)


def kernel_init(key: jax.Array, shape: Any, dtype: Any = None, **options: Any) -> jax.Array:
    """Flax's initial values; of the one key zeros, since to trace the others takes much longer."""
    if key is _one_key():
        return jnp.zeros(shape, dtype)
    return default_kernel_init(key, shape, dtype, **options)
