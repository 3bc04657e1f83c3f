"""Attention over a union of keys, from attentions over its parts."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array


def merge_attentions(outputs: Sequence[Array], lses: Sequence[Array]) -> tuple[Array, Array]:
    """Merges attentions of the same queries over disjoint sets of keys.

    With partial results (O1, l1) and (O2, l2), w = sigmoid(l2 - l1), O = O1 - w (O1 - O2) and
    l = log(exp l1 + exp l2), in float32, further ones from left to right. It differentiates, the
    log-sum-exps included. A part without any keys has the log-sum-exp -inf and counts for nothing.

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
    merged, total = (x.astype(jnp.float32) for x in (outputs[0], lses[0]))
    for output, lse in zip(outputs[1:], lses[1:], strict=True):
        lse = lse.astype(jnp.float32)
        # Infinities are equal where neither part has keys, and have no difference.
        difference = jnp.where(lse == -jnp.inf, -jnp.inf, lse - total)
        weight = jax.nn.sigmoid(difference)[..., None]
        merged = merged - weight * (merged - output.astype(jnp.float32))
        total = jnp.logaddexp(total, lse)
    return merged.astype(outputs[0].dtype), total
