"""The linear layer, flax's with the product that is fast where a program runs, and its dtype."""

from flax import nnx

from ...kernels.products import dot_general, fastest_dtype
from ..abstract import kernel_init

__all__ = ["fastest_dtype", "linear"]


def linear(in_features: int, out_features: int, **init) -> nnx.Linear:
    """A layer `[..., in_features]` to `[..., out_features]`; `init` is as for `nnx.Linear`."""
    init = {"kernel_init": kernel_init, **init}
    return nnx.Linear(in_features, out_features, dot_general=dot_general, **init)
