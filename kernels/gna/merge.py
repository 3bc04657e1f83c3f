"""Attention over a union of keys, from attentions over its parts."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array


def merge_attentions(outputs: Sequence[Array], lses: Sequence[Array]) -> tuple[Array, Array]:
    """Merges attentions of the same queries over disjoint sets of keys.

    With partial results (O1, l1) and (O2, l2), w = sigmoid(l2 - l1), O = O1 - w (O1 - O2) and
    l = log(exp l1 + exp l2), in float32, further ones from left to right. It differentiates, the
    log-sum-exps included. A part without any keys has the log-sum-exp -inf and counts for nothing;
    where no part has any, the output is 0, its log-sum-exp -inf and all gradients are 0.

    Args:
      outputs: partial outputs [..., H, Dv].
      lses: their log-sum-exps [..., H], natural logarithm.

    Returns:
      The output in the dtype of the first one, and its log-sum-exp in float32.

    Raises:
      ValueError: if there are none, or numbers or shapes do not match.
    """
    if len(outputs) == 0 or len(outputs) != len(lses):
        raise ValueError(
            "merge_attentions needs one log-sum-exp for each of at least one output; received "
            f"{len(outputs)} outputs and {len(lses)} log-sum-exps."
        )
    for n, (output, lse) in enumerate(zip(outputs, lses, strict=True)):
        if output.shape != outputs[0].shape or lse.shape != output.shape[:-1]:
            raise ValueError(
                f"all outputs must have the same shape, here {outputs[0].shape}, and log-sum-exps "
                f"that shape without its last dimension; received {output.shape} and {lse.shape} "
                f"at position {n}."
            )
    lses = [lse.astype(jnp.float32) for lse in lses]
    parts = [_counted(output, lse) for output, lse in zip(outputs, lses, strict=True)]
    merged, total = parts[0], lses[0]
    for output, lse in zip(parts[1:], lses[1:], strict=True):
        # Infinities are equal where neither part has keys, and have no difference; the derivative
        # of what is not taken there must be finite, too.
        neither = (lse == -jnp.inf) & (total == -jnp.inf)
        some = jnp.where(neither, 0, total)
        weight = jax.nn.sigmoid(lse - some)[..., None]
        merged = merged - weight * (merged - output)
        total = jnp.where(neither, -jnp.inf, jnp.logaddexp(some, lse))
    return merged.astype(outputs[0].dtype), total


def _counted(output: Array, lse: Array) -> Array:
    """The output in float32, zero where the part has no keys, whatever stands there."""
    return jnp.where(lse[..., None] == -jnp.inf, 0, output.astype(jnp.float32))
