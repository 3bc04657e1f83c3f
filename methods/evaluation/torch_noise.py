"""The noise that a published seed stands for: PyTorch's `torch.randn` on a CPU, without PyTorch.

Prompt files name seeds of `torch.manual_seed`.  Its generator is the Mersenne Twister (Matsumoto
and Nishimura 1998), of whose 32-bit words the lower 24 bits make a uniform number, and sixteen of
those at a time become normal ones (Box and Muller 1958): eight radii, eight angles.
"""

import math

import numpy as np
from jaxtyping import Float

_AT_ONCE = 16  # numbers; fewer in all are drawn in another way


def torch_normal(seed: int, count: int) -> Float[np.ndarray, " N"]:
    """`torch.randn(count)` after `torch.manual_seed(seed)`, to rounding, float32.

    Raises:
      ValueError: fewer than 16 numbers, which PyTorch draws in double precision.
    """
    if count < _AT_ONCE:
        raise ValueError(f"at least {_AT_ONCE} numbers are drawn at a time, received {count}.")
    twister = np.random.RandomState(seed & 0xFFFFFFFF)

    def uniform(size: int) -> np.ndarray:
        words = twister.randint(0, 1 << 32, size, np.uint32)
        return (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def normal(values: np.ndarray) -> np.ndarray:
        pairs = values.reshape(-1, 2, _AT_ONCE // 2)
        radius = np.sqrt(-2 * np.log(1 - pairs[:, 0]))
        angle = np.float32(2 * math.pi) * pairs[:, 1]
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)

    whole = count - count % _AT_ONCE
    values = uniform(count)
    drawn = np.concatenate([normal(values[:whole]), values[whole:]])
    if whole != count:
        drawn[-_AT_ONCE:] = normal(uniform(_AT_ONCE))
    return drawn


def torch_latents(seed: int, shape: tuple[int, int, int]) -> Float[np.ndarray, "h w C"]:
    """The latents that a diffusers pipeline starts one image from with a generator of this seed.

    Args:
      seed: of `torch.manual_seed`.
      shape: [h, w, C]; PyTorch's own has the channels first.
    """
    height, width, channels = shape
    return torch_normal(seed, math.prod(shape)).reshape(channels, height, width).transpose(1, 2, 0)
