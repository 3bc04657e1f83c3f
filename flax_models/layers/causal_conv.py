"""Causal 3-D convolution of videos `[B, T, H, W, C]`: a frame sees itself and earlier ones.

What precedes the first frame, and what surrounds a frame, differs between the autoencoders:

| autoencoder | before the first frame | around a frame |
|---|---|---|
| HunyuanVideo | the first frame, k - 1 times | its edge |
| Cosmos | the first frame, k - stride times | zeros |
| Wan | zeros, twice the padding | zeros |
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ...kernels.convolution import convolve_video, halves

Borders = Literal["edge", "zeros"]


def _three(sizes: int | tuple[int, int, int]) -> tuple[int, int, int]:
    return (sizes, sizes, sizes) if isinstance(sizes, int) else sizes


def _alternating(first: Array, second: Array, axis: int, size: int) -> Array:
    """Two arrays that take turns along an axis; in space, the second starts one pixel later."""
    starts = zip((first, second), (0, int(axis > 1)), strict=True)
    pair = [jax.lax.slice_in_dim(x, start, start + size, axis=axis) for x, start in starts]
    return jnp.stack(pair, axis + 1).reshape(
        *first.shape[:axis], 2 * size, *first.shape[axis + 1 :]
    )


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

    def of_doubled(
        self, x: Float[Array, "B T H W C"], factors: tuple[int, int, int]
    ) -> Float[Array, "B S Y X D"]:
        """The convolution of a video whose pixels and frames are doubled, its first frame is not.

        It is done from the video as it is.  Each of the eight pixels that come of one sees 2x2x2
        others, and the kernel's taps that meet there add up: 8 products, the doubled takes 27.

        Args:
          x: what to double, for a kernel of 3x3x3 and borders that repeat.
          factors: 2 or 1 along time, height and width, 1 for what stays as it is.
        """
        assert self.kernel_size == (3, 3, 3) and self.time == self.space == "edge"
        assert self.bias is not None
        x, kernel, bias = self.promote_dtype(
            (x, self.kernel[...], self.bias[...]), dtype=self.dtype
        )
        kernels = [kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))]
        for axis, factor in enumerate(factors):
            if factor == 2:  # of two frames the first sees more of those before
                step = -1 if axis == 0 else 1
                kernels = [half for each in kernels for half in halves(each, axis)[::step]]
        y = convolve_video(
            jnp.pad(x, ((0, 0), (3 - factors[0], 0), *((1, 1),) * 2, (0, 0)), mode="edge"),
            jnp.concatenate(kernels, -1).astype(kernel.dtype),
            (1, 1, 1),
            ((0, 0),) * 3,
            precision=self.precision,
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )
        parts = jnp.split(y, len(kernels), -1)
        for axis in (3, 2, 1):
            if factors[axis - 1] == 2:
                pairs = zip(parts[::2], parts[1::2], strict=True)
                parts = [_alternating(*pair, axis, x.shape[axis]) for pair in pairs]
        return parts[0][:, factors[0] - 1 :] + bias
