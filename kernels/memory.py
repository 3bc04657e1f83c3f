"""What a CPU's caches and memory need: a batch in parts, and recomputation that stays one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

# So many tokens keep two cores busy, and a layer's activations are a few MiB.
_TOKENS_IN_CACHE = 1024


def in_parts(
    run: Callable[..., PyTree], *operands: PyTree[Array | None], tokens: int
) -> PyTree[Array]:
    """`run(*operands)`; on a CPU a large batch goes through it in parts, one after another.

    The activations of a part stay in the cache.

    Args:
      run: a function of arrays whose rows do not depend on each other.
      operands: arrays [B, ...], or trees of such.
      tokens: of a row.

    Returns:
      What `run` does, arrays [B, ...].
    """
    batch = jax.tree.leaves(operands)[0].shape[0]
    parts = _parts(batch, tokens) if jax.default_backend() == "cpu" else 1
    if parts == 1:
        return run(*operands)

    def split(each: Array) -> Array:  # every part has rows of all devices that share the batch
        return jnp.moveaxis(each.reshape(-1, parts, *each.shape[1:]), 1, 0)

    outputs = jax.lax.map(lambda part: run(*part), jax.tree.map(split, operands))
    return jax.tree.map(
        lambda each: jnp.moveaxis(each, 1, 0).reshape(batch, *each.shape[2:]), outputs
    )


def _parts(batch: int, tokens: int) -> int:
    """How many equal parts of a batch are some `_TOKENS_IN_CACHE` tokens each."""
    wanted = max(1, batch * tokens // _TOKENS_IN_CACHE)
    return max(parts for parts in range(1, wanted + 1) if batch % parts == 0)


def compiler_options() -> dict[str, str] | None:
    """What to hand to `jax.jit` so that recomputing saves memory on this device.

    On a CPU, XLA takes away the barriers between an activation and its recomputation, and then
    merges the two: as much is kept as without recomputing. Without that pass the barriers stay.
    """
    if jax.default_backend() != "cpu":
        return None
    return {"xla_disable_hlo_passes": "cse_barrier_expander"}
