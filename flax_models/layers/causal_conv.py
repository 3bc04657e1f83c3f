"""Causal 3-D convolution of videos `[B, T, H, W, C]`: a frame sees itself and earlier ones.

What precedes the first frame, and what surrounds a frame, differs between the autoencoders:

| autoencoder | before the first frame | around a frame |
|---|---|---|
| HunyuanVideo | the first frame, k - 1 times | its edge |
| Cosmos | the first frame, k - stride times | zeros |
| Wan | zeros, twice the padding | zeros |
"""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ...kernels.convolution import convolve_video

Borders = Literal["edge", "zeros"]


def _three(sizes: int | tuple[int, int, int]) -> tuple[int, int, int]:
    return (sizes, sizes, sizes) if isinstance(sizes, int) else sizes


class CausalConv3d(nnx.Conv):
    """It is the convolution, as Wan's and Cosmos' are; HunyuanVideo's has one as `conv`.

    Args:
      in_channels: features of a pixel.
      out_channels: of the result.
      kernel_size: along time, height and width; one number for all.
      strides: as `kernel_size`.
      padding: frames before, rows on either side, columns on either side; by default what keeps a
        video's size where strides are 1, which is k - 1 frames before.
      time: what is before the first frame: repetitions of it ("edge"), or "zeros".
      space: what is around each frame, likewise.
      init: dtypes and rngs, as `nnx.Conv`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        *,
        strides: int | tuple[int, int, int] = 1,
        padding: tuple[int, int, int] | None = None,
        time: Borders = "zeros",
        space: Borders = "zeros",
        **init,
    ):
        size = _three(kernel_size)
        self.before, *around = padding or (size[0] - 1, size[1] // 2, size[2] // 2)
        self.around = tuple((each, each) for each in around)
        self.time, self.space = time, space
        pads = ((0, 0), *(self.around if space == "zeros" else ((0, 0),) * 2))
        super().__init__(
            in_channels,
            out_channels,
            size,
            strides=_three(strides),
            padding=pads,
            conv_general_dilated=convolve_video,
            **init,
        )

    def __call__(  # type: ignore[override]
        self, x: Float[Array, "B T H W C"], past: Float[Array, "B P H W C"] | None = None
    ) -> Float[Array, "B S Y X D"]:
        """The convolution of a video from its first frame on, or of what follows `past`."""
        return self.continued(x, past)[0]

    def continued(
        self, x: Float[Array, "B T H W C"], past: Float[Array, "B P H W C"] | None = None
    ) -> tuple[Float[Array, "B S Y X D"], Float[Array, "B P H W C"]]:
        """A video in pieces, one after the other.

        Args:
          x: the next frames, a multiple of the stride.
          past: the `before` frames before them, as the last call returned them; None at the start
            of a video.

        Returns:
          The convolution of these frames, and `past` for the next ones.

        Raises:
          ValueError: `past` has another number of frames.
        """
        if past is None:
            first = x[:, :1] if self.time == "edge" else jnp.zeros_like(x[:, :1])
            past = jnp.repeat(first, self.before, axis=1)
        if past.shape[1] != self.before:
            raise ValueError(
                f"a causal convolution continues after {self.before} frames, received "
                f"{past.shape[1]} of them."
            )
        x = jnp.concatenate([past.astype(x.dtype), x], axis=1)
        y = x
        if self.space == "edge" and any(map(any, self.around)):
            y = jnp.pad(x, ((0, 0), (0, 0), *self.around, (0, 0)), mode="edge")
        return super().__call__(y), x[:, x.shape[1] - self.before :]
