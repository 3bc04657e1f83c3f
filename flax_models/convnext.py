"""ConvNeXt (Liu et al. 2022), the trunk of OpenCLIP's convolutional image towers.

Images and feature maps are `[B, H, W, C]`.  Attribute paths are timm's state-dict keys: `stem.0`,
`stages.1.downsample.1`, `stages.2.blocks.5.mlp.fc1`.  Stochastic depth is left out: a trunk is
fine-tuned here for few steps and with a small rate, and regularized by its original.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..kernels.convolution import convolve_depthwise
from ..kernels.memory import in_parts
from .configs import ModelConfig
from .layers.checks import check_axes
from .layers.embeddings import Dtype
from .layers.linear import linear
from .layers.remat import Remat, recomputed

_KERNEL = 7
_HALF = _KERNEL // 2
_TRUNCATED = nnx.initializers.truncated_normal(0.02)


@dataclasses.dataclass(frozen=True)
class ConvNeXtConfig(ModelConfig):
    """Settings of a trunk; the defaults are ConvNeXt-Base's.

    `layer_scale_init` is where each block's scale per channel starts; a trunk that is trained from
    scratch in few steps needs more than the published 1e-6.
    """

    depths: tuple[int, ...] = (3, 3, 27, 3)
    dims: tuple[int, ...] = (128, 256, 512, 1024)
    num_channels: int = 3
    layer_scale_init: float = 1e-6

    def __post_init__(self):
        self.require_positive("depths", "dims", "num_channels")
        self.require(
            len(self.depths) == len(self.dims) == 4,
            f"depths and dims name four stages, received {self.depths} and {self.dims}.",
        )

    @classmethod
    def base(cls) -> "ConvNeXtConfig":
        """The published ConvNeXt-Base: 87,564,416 parameters, its final layer norm apart."""
        return cls()

    @classmethod
    def large(cls) -> "ConvNeXtConfig":
        """The published ConvNeXt-Large: 196,227,264 parameters, its final layer norm apart."""
        return cls(dims=(192, 384, 768, 1536))

    @classmethod
    def tiny(cls) -> "ConvNeXtConfig":
        """A trunk for tests and small worlds: four blocks, 16 to 128 channels."""
        return cls(depths=(1, 1, 1, 1), dims=(16, 32, 64, 128), layer_scale_init=0.1)


def layer_norm(features: int, **init: Any) -> nnx.LayerNorm:
    """Layer norm over channels as timm's ConvNeXt has it everywhere."""
    return nnx.LayerNorm(features, epsilon=1e-6, use_fast_variance=False, **init)


class Mlp(nnx.Module):
    """Two linear layers around an exact GELU."""

    def __init__(
        self, features: int, hidden: int, out: int, *, last_bias: bool = True, **init: Any
    ):
        self.fc1 = linear(features, hidden, kernel_init=_TRUNCATED, **init)
        self.fc2 = linear(hidden, out, use_bias=last_bias, kernel_init=_TRUNCATED, **init)

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... D"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class ConvNeXtBlock(nnx.Module):
    """x + gamma * mlp(norm(depthwise(x)))."""

    def __init__(self, features: int, scale: float, **init: Any):
        self.gamma = nnx.Param(jnp.full((features,), scale, init["param_dtype"]))
        self.conv_dw = nnx.Conv(
            features,
            features,
            (_KERNEL, _KERNEL),
            padding=((_HALF, _HALF),) * 2,
            feature_group_count=features,
            kernel_init=_TRUNCATED,
            conv_general_dilated=convolve_depthwise,
            **init,
        )
        self.norm = layer_norm(features, **init)
        self.mlp = Mlp(features, 4 * features, features, **init)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        h = self.conv_dw(x)
        rows = h.reshape(-1, *h.shape[2:])  # of pixels; what widens them never sees all at once
        h = in_parts(lambda part: self.mlp(self.norm(part)), rows, tokens=h.shape[2])
        h = h.reshape(x.shape)
        return x + self.gamma[...].astype(h.dtype) * h


class ConvNeXtStage(nnx.Module):
    """Halve the map (not in the first stage), then blocks."""

    def __init__(
        self,
        inputs: int,
        features: int,
        depth: int,
        scale: float,
        *,
        first: bool,
        remat: Remat,
        **init: Any,
    ):
        self.remat = remat
        if not first:
            halve = nnx.Conv(
                inputs, features, (2, 2), strides=2, padding="VALID", kernel_init=_TRUNCATED, **init
            )
            self.downsample = nnx.List([layer_norm(inputs, **init), halve])
        self.blocks = nnx.List([ConvNeXtBlock(features, scale, **init) for _ in range(depth)])

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        if hasattr(self, "downsample"):
            x = self.downsample[1](self.downsample[0](x))
        for block in self.blocks:
            x = recomputed(block.__call__, self.remat)(x)
        return x


class _Head(nnx.Module):
    """Holds the norm of pooled features under its name in timm."""

    def __init__(self, features: int, **init: Any):
        self.norm = layer_norm(features, **init)


class ConvNeXt(nnx.Module):
    """The trunk: four feature maps, and the norm that pooled features pass.

    Args:
      config: architecture.
      dtype: computation dtype.
      param_dtype: dtype of the parameters.
      remat: recompute each block's activations in the backward pass; or a policy
        of `layers.remat`.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        config: ConvNeXtConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        remat: Remat = False,
        rngs: nnx.Rngs,
    ):
        init = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        patches = nnx.Conv(
            config.num_channels,
            config.dims[0],
            (4, 4),
            strides=4,
            padding="VALID",
            kernel_init=_TRUNCATED,
            **init,
        )
        self.stem = nnx.List([patches, layer_norm(config.dims[0], **init)])
        self.stages = nnx.List(
            [
                ConvNeXtStage(
                    config.dims[max(n - 1, 0)],
                    features,
                    depth,
                    config.layer_scale_init,
                    first=n == 0,
                    remat=remat,
                    **init,
                )
                for n, (features, depth) in enumerate(zip(config.dims, config.depths, strict=True))
            ]
        )
        self.head = _Head(config.dims[-1], **init)

    def __call__(self, images: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B h w C"], ...]:
        """Feature maps of strides 4, 8, 16 and 32, before the final norm.

        Raises:
          ValueError: height or width is not a multiple of 32.
        """
        check_axes(images, "B H W C", "ConvNeXt's images")
        if images.shape[1] % 32 or images.shape[2] % 32:
            raise ValueError(
                f"ConvNeXt takes images whose sides are multiples of 32, received {images.shape}: "
                "pad them at the bottom and the right."
            )
        x = self.stem[1](self.stem[0](images))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return tuple(maps)
