"""Which activations a backward pass recomputes instead of keeping."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from ...kernels.bfloat16 import convolution_p
from ...kernels.products import product_p

# False keeps everything, True recomputes a layer from its input; a name is that of a policy in
# `jax.checkpoint_policies` without arguments, such as "dots_saveable", which keeps the results of
# matrix products.
Remat = bool | str

POLICIES = (
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "checkpoint_dots",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots_with_no_batch_dims",
)


_OF_LINEAR = {"dimension_numbers": (((1,), (0,)), ((), ()))}


def recomputed(run: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`run`, whose backward pass recomputes what `remat` says.

    Raises:
      ValueError: an unknown name.
    """
    if isinstance(remat, bool):
        return jax.checkpoint(run) if remat else run
    if remat not in POLICIES:
        raise ValueError(
            f"remat accepts True, False, or one of {', '.join(POLICIES)}; received {remat!r}."
        )
    policy = getattr(jax.checkpoint_policies, remat)

    def keeps(primitive: Any, *operands: Any, **settings: Any) -> Any:
        if primitive in (product_p, convolution_p):  # of one batch, whatever their own settings
            primitive, settings = jax.lax.dot_general_p, _OF_LINEAR
        return policy(primitive, *operands, **settings)

    return jax.checkpoint(run, policy=keeps)


def set_remat(model: nnx.Module, remat: Remat) -> None:
    """Make every layer of a model that can recompute its activations do what `remat` says."""
    for _, node in nnx.iter_graph(model):
        if hasattr(node, "remat"):
            node.remat = remat
