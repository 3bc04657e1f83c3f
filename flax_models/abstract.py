"""Models without values: `nnx.eval_shape(lambda: Model(config, rngs=keys))`, with `OneKey` keys."""

from collections.abc import Callable

import jax
from flax import nnx


class OneKey(nnx.Rngs):
    """Gives the same key every time: enough for shapes, and without a counter, whose updates make
    the tracing of a large model slow (its time grows with the square of the parameters)."""

    def __init__(self):
        self._key = jax.random.key(0)

    def __getattr__(self, name: str) -> Callable[[], jax.Array]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda: self._key
