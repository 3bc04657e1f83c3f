"""The file of Inception-v3 that the Fréchet inception distance is measured with.

pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`, or the same tensors as safetensors.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from ..errors import CheckpointError
from ..files.weights import WeightFile, open_weights, opened
from .segmentation import Plan

_FIRST = "Conv2d_1a_3x3.conv.weight"  # [32, 3, 3, 3]


def load_inception(path: Path | str | WeightFile, *, dtype: Any = jnp.float32) -> Any:
    """Load the Inception-v3 of Fréchet distances from its weight file.

    Args:
      path: the file; `~` is expanded.
      dtype: computation dtype.

    Returns:
      A `flax_models.inception_v3.FIDInceptionV3`.

    Raises:
      CheckpointError: the file is absent, damaged, or of another network.
    """
    from ...flax_models.inception_v3 import FIDInceptionV3, InceptionV3Config

    file = opened(Path(path).expanduser() if isinstance(path, str | Path) else path)
    stored = dict(open_weights(file))
    told = f"{file.path} is not the Inception-v3 of Fréchet distances"
    wants = "it takes pytorch-fid's pt_inception-2015-12-05-6726825d.pth."
    if _FIRST not in stored or "Mixed_7c.branch_pool.conv.weight" not in stored:
        raise CheckpointError(f"{told}: it has no {_FIRST}; {wants}")
    if any(key.startswith("AuxLogits.") for key in stored):
        raise CheckpointError(
            f"{told}: it is torchvision's, whose weights and pools differ; {wants}"
        )
    classes = stored["fc.bias"].shape[0] if "fc.bias" in stored else 1008
    divisor, rest = divmod(32, max(stored[_FIRST].shape[0], 1))
    if rest or divisor not in (1, 2, 4, 8, 16):
        raise CheckpointError(f"{told}: {_FIRST} is {stored[_FIRST].shape}; {wants}")
    plan = Plan(FIDInceptionV3, InceptionV3Config(divisor, classes), stored)
    return plan.load(str(file.path), dtype=dtype, param_dtype=None, sharding=None)
