"""Attention maps: what the cross-attention of a UNet looks at in one call, and where a word is.

`watched` makes every cross-attention of a merged UNet note its weights.  It computes them dense,
and keeps all activations for the backward pass, since notes cannot leave what is recomputed.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ...flax_models.layers.remat import set_remat

Grid = tuple[int, int]


class Seen(NamedTuple):
    """What one cross-attention did.

    Attributes:
      weights: [B, H, L, K] of H heads, from L cells of the image to K tokens.
      gathered: [B, L, C] values under these weights: the input of `to_out`.
    """

    weights: Float[Array, "B H L K"]
    gathered: Float[Array, "B L C"]


class _Watched:
    """A cross-attention that notes what it does."""

    def __init__(self, attention: Any, name: str, seen: dict[str, Seen]):
        self.attention, self.name, self.seen = attention, name, seen

    def __call__(self, x: Array, context: Array) -> Array:
        attention = self.attention
        heads = (attention.heads, -1)
        query = attention.to_q(x).reshape(*x.shape[:2], *heads)
        key, value = (
            project(context).reshape(*context.shape[:2], *heads)
            for project in (attention.to_k, attention.to_v)
        )
        logits = jnp.einsum("blhd,bkhd->bhlk", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits / math.sqrt(query.shape[-1]), axis=-1)
        gathered = jnp.einsum("bhlk,bkhd->blhd", weights.astype(value.dtype), value)
        gathered = gathered.reshape(x.shape)
        self.seen[self.name] = Seen(weights, gathered)
        return attention.to_out[0](gathered)


def watched(unet: nnx.Module) -> dict[str, Seen]:
    """Make a merged UNet note what its cross-attentions do; their paths -> notes of the last call.

    The UNet is changed: it is for calling, not for splitting.
    """
    set_remat(unet, False)
    seen: dict[str, Seen] = {}
    blocks = [(path, node) for path, node in nnx.iter_graph(unet) if hasattr(node, "attn2")]
    for path, block in blocks:
        name = ".".join(map(str, (*path, "attn2")))
        block.attn2 = _Watched(block.attn2, name, seen)
    return seen


def grid_of(cells: int, latent: Grid) -> Grid:
    """Height and width of an image of so many cells, which halving the latent's sides makes."""
    height, width = latent
    while height * width > cells:
        height, width = -(-height // 2), -(-width // 2)
    return height, width


def word_mask(
    seen: dict[str, Seen], places: Bool[Array, "B K"], latent: Grid, threshold: float
) -> Float[Array, "B h w"]:
    """Where the words at `places` are: 1 where their normalized map reaches the threshold, else 0.

    The map is the mean over heads, words and the layers whose side is nearest to a quarter of the
    latent's (16 of 64 in Stable Diffusion 1), scaled to [0, 1] in each image.
    """
    grids = {name: grid_of(each.weights.shape[2], latent) for name, each in seen.items()}
    side = min((g[0] for g in grids.values()), key=lambda s: abs(math.log(4 * s / latent[0])))
    share = (places / places.sum(axis=1, keepdims=True))[:, None, None]  # [B, 1, 1, K]
    maps = [
        (each.weights * share).sum(axis=-1).mean(axis=1)
        for name, each in seen.items()
        if grids[name][0] == side
    ]
    grid = next(g for g in grids.values() if g[0] == side)
    mean = jnp.mean(jnp.stack(maps), axis=0).reshape(-1, *grid)
    low, high = (pick(mean, axis=(1, 2), keepdims=True) for pick in (jnp.min, jnp.max))
    return ((mean - low) >= threshold * (high - low)).astype(jnp.float32)


def mask_at(mask: Float[Array, "B h w"], cells: int, latent: Grid) -> Float[Array, "B L"]:
    """A mask over the cells of a layer, by nearest neighbors."""
    grid = grid_of(cells, latent)
    return jax.image.resize(mask, (len(mask), *grid), "nearest").reshape(len(mask), cells)
