"""Rotary position embeddings (RoFormer, Su et al. 2021) of tokens with several positions each.

A head's features are split among the axes of positions; each pair of an axis' features is turned
by an angle that grows with the token's position there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Rotary(NamedTuple):
    """Cosines and sines of the tokens' angles, float32.

    Attributes:
      cos: one for each pair of a head's features [L, D / 2]; or [B, L, D / 2], where the members of
        a batch have angles of their own.
      sin: as many.
    """

    cos: Float[Array, "*B L half"]
    sin: Float[Array, "*B L half"]


def rotary_table(
    positions: Sequence[np.ndarray],
    dims: Sequence[int],
    theta: float | int,
    *,
    dtype: type[np.floating] = np.float64,
) -> Rotary:
    """The angles of tokens: position / theta ** (2 i / dim) for the pair i of an axis' features.

    Computed on the host, rounded to float32, each axis by itself: a large grid is put together
    where the program runs.

    Args:
      positions: of the tokens along each axis, arrays that broadcast to the tokens' layout: rows
        [h, 1] and columns [1, w] give h * w tokens, row by row.
      dims: features of each axis, even numbers.
      theta: the longest wavelength is about theta * 2 pi.
      dtype: of frequencies and angles, as the model was trained.
    """
    layout = np.broadcast_shapes(*(np.shape(each) for each in positions))
    parts: tuple[list[Array], list[Array]] = ([], [])
    for axis, dim in zip(positions, dims, strict=True):
        wavelengths = (theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)).astype(dtype)
        angles = np.asarray(axis, dtype)[..., None] * (dtype(1) / wavelengths)
        for part, function in zip(parts, (np.cos, np.sin), strict=True):
            values = jnp.asarray(function(angles).astype(np.float32))
            part.append(jnp.broadcast_to(values, (*layout, dim // 2)))
    half = sum(dims) // 2
    return Rotary(*(jnp.concatenate(part, axis=-1).reshape(-1, half) for part in parts))


def concatenate(*tables: Rotary) -> Rotary:
    """The table of all tokens, one table's after the other's."""
    return Rotary(*(jnp.concatenate(parts) for parts in zip(*tables, strict=True)))


def rotate_pairs(x: Float[Array, "B L H D"], rotary: Rotary) -> Float[Array, "B L H D"]:
    """Turn the pairs (x_2i, x_2i+1) of every head's features; computed in float32."""
    cos, sin = (part[..., None, :] for part in rotary)  # [*B, L, 1, D / 2]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def rotate_halves(x: Float[Array, "B L H D"], rotary: Rotary) -> Float[Array, "B L H D"]:
    """Turn the pairs (x_i, x_i+D/2) of every head's features; computed in float32."""
    cos, sin = (part[..., None, :] for part in rotary)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
