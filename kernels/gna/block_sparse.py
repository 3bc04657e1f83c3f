"""Block-sparse attention: queries see listed blocks of keys, whatever data chose the blocks.

Neighborhood attention knows before it runs which keys a query sees.  Its data-dependent rivals do
not: VSA (arXiv 2505.13389), for example, pools tokens into blocks, scores these, and attends within
the best ones.  Here their lists are arrays, so that they may be computed by the same program, and
the attention differentiates as neighborhood attention does.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from .api import attend, choose
from .partition import sharded_as, with_whole_tokens
from .problem import (
    ListOperands,
    ListProblem,
    Number,
    Operand,
    PerDimension,
    checked,
    per_dimension,
    windows_of,
)
from .varying import vary_alike


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("blocks", "counts"),
    meta_fields=("query_block", "key_block"),
)
@dataclasses.dataclass(frozen=True)
class BlockMask:
    """Which blocks of keys each block of queries sees: a list for each, in any order.

    A tree of arrays for `jax.jit`, `jax.vmap` and the like. Lists of one batch entry or head only
    are for all of them. The last block may have fewer tokens than the others.

    Attributes:
      blocks: numbers of blocks of keys [B or 1, Hq or 1, query blocks, most], int32. What comes
        after the first `counts`, or names no block, is ignored, and so is a block's second time.
      counts: how long each list is [B or 1, Hq or 1, query blocks], int32; 0 is a list of nothing.
      query_block: queries of a block.
      key_block: keys of a block.
    """

    blocks: Any  # arrays, or what stands for them in a tree
    counts: Any
    query_block: int
    key_block: int

    @classmethod
    def from_dense(
        cls,
        mask: Array | np.ndarray,
        *,
        query_block: int,
        key_block: int,
        most: int | None = None,
    ) -> "BlockMask":
        """Lists of the blocks where a mask is true.

        Args:
          mask: [B or 1, Hq or 1, query blocks, key blocks], or the last two for all.
          query_block: queries of a block.
          key_block: keys of a block.
          most: what a list has room for, at least what the mask needs. By default that, or all
            blocks where the mask is traced and cannot be looked at. A traced list that needs more
            keeps the first ones.

        Raises:
          ValueError: if the mask is not such, or `most` is less than it needs.
        """
        if mask.ndim not in (2, 4) or mask.dtype != bool or 0 in mask.shape:
            raise ValueError(
                "mask must be bool [batch or 1, heads or 1, query blocks, key blocks], or the last "
                f"two; received {mask.dtype} of shape {mask.shape}."
            )
        traced = isinstance(mask, Tracer)
        xp = jnp if traced else np
        mask = xp.asarray(mask).reshape((1, 1, *mask.shape)[-4:])
        counts = mask.sum(-1, dtype=xp.int32)
        if not traced:
            needed = max(int(counts.max()), 1)
            if most is not None and most < needed:
                raise ValueError(
                    f"most must be at least {needed}, the blocks of the longest list; received "
                    f"{most}."
                )
            most = most or needed
        room = min(most or mask.shape[-1], mask.shape[-1])
        blocks = xp.argsort(~mask, axis=-1, stable=True)[..., :room].astype(xp.int32)
        counts = xp.minimum(counts, room)
        return cls(jnp.asarray(blocks), jnp.asarray(counts), query_block, key_block)

    @classmethod
    def from_scores(
        cls, scores: Float[Array, "B H I J"], most: int, *, query_block: int, key_block: int
    ) -> "BlockMask":
        """Lists of the blocks with the highest scores.

        Args:
          scores: of blocks of keys for blocks of queries [B or 1, Hq or 1, query blocks, key
            blocks], such as `pooled_scores`; one of minus infinity is never listed.
          most: blocks of a list, or all if these are fewer.
          query_block: queries of a block.
          key_block: keys of a block.

        Raises:
          ValueError: if `most` is less than 1.
        """
        if most < 1:
            raise ValueError(f"most must be at least 1, the blocks of a list; received {most}.")
        found, blocks = jax.lax.top_k(scores, min(most, scores.shape[-1]))
        counts = (found > -jnp.inf).sum(-1, dtype=jnp.int32)
        return cls(blocks.astype(jnp.int32), counts, query_block, key_block)

    @classmethod
    def from_windows(
        cls,
        token_layout: Sequence[int],
        *,
        kernel_size: PerDimension,
        stride: PerDimension = 1,
        dilation: PerDimension = 1,
        query_tile: PerDimension,
        key_tile: PerDimension,
    ) -> "BlockMask":
        """Lists of what neighborhood attention sees, where that is whole tiles.

        Queries and keys are to be brought `to_tiles`. So rivals may start from a window, or be
        compared with one.

        Args:
          token_layout: tokens along each dimension.
          kernel_size: as the next two, see `neighborhood_attention`.
          stride: of the windows.
          dilation: of the windows.
          query_tile: queries of a tile along each dimension, or one number for all.
          key_tile: keys of a tile likewise.

        Raises:
          ValueError: if a setting is wrong, tiles do not divide the layout, or a query sees part of
            a tile or not what others of its tile see.
        """
        windows = windows_of(token_layout, kernel_size, stride, dilation)
        layout = tuple(window.length for window in windows)
        named = {"query_tile": query_tile, "key_tile": key_tile}
        tiles = [_tile(name, layout, tile) for name, tile in named.items()]
        some, every = [], []
        for window, own, seen in zip(windows, *tiles, strict=True):
            mask = window.mask().reshape(window.length // own, own, window.length // seen, seen)
            some.append(mask.any((1, 3)))
            every.append(mask.all((1, 3)))
        mask = functools.reduce(np.kron, some)
        if not np.array_equal(mask, functools.reduce(np.kron, every)):
            raise ValueError(
                "the windows must see whole tiles of keys, the same for all queries of a tile; "
                f"received kernel_size={kernel_size}, stride={stride}, dilation={dilation} with "
                f"query_tile={tiles[0]} and key_tile={tiles[1]} in layout {layout}. "
                "neighborhood_attention sees any window."
            )
        query_block, key_block = map(math.prod, tiles)
        return cls.from_dense(mask, query_block=query_block, key_block=key_block)


def block_sparse_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    block_mask: BlockMask,
    scale: Number | None = None,
    additional_keys: Array | None = None,
    additional_values: Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Array | tuple[Array, Array]:
    """Attention of blocks of queries to the blocks of keys that are listed for them.

    The lists are data: they may be computed from the operands under jit, and other lists of equal
    shape run the same program. Time and memory grow with what is listed. Numbers of keys that are
    not listed, NaN and infinity included, touch neither results nor gradients.

    It works under jit, vmap, grad (once), jax.checkpoint, and in shard_map over batch and heads.

    Args:
      query: [B, N, Hq, D]; float32, bfloat16 or float16, as are the others.
      key: [B, M, Hkv, D]; query head h reads key head h // (Hq / Hkv).
      value: [B, M, Hkv, Dv].
      block_mask: the lists, and how tokens lie in blocks.
      scale: factor of the scores, by default D ** -0.5.
      additional_keys: keys that every query sees, such as those of a text [B, A, Hkv, D].
      additional_values: their values [B, A, Hkv, Dv].
      return_lse: also return the log-sum-exp of the scores, which `merge_attentions` needs.
      implementation: a backend by name; by default the first in `PREFERENCES` that can.

    Returns:
      The output [B, N, Hq, Dv] in the dtype of the operands; with `return_lse`, also the
      log-sum-exp of the scores [B, N, Hq], natural logarithm, float32. A query that sees nothing
      has the output 0, the log-sum-exp -inf and no gradient.

    Raises:
      ValueError: if the call is wrong; the message says what was received and what is accepted.
      NotImplementedError: if the implementation asked for cannot do the problem.
    """
    problem = describe_lists(
        query, key, value, additional_keys, additional_values, block_mask=block_mask, scale=scale
    )
    shape = (problem.batch, problem.heads, problem.query_blocks)
    given = [with_whole_tokens(x) for x in (query, key, value)]
    lists = [jnp.broadcast_to(x, (*shape, *x.shape[3:])) for x in _in_order(problem, block_mask)]
    operands = ListOperands._make((*given, additional_keys, additional_values, *lists))
    output, lse = attend(problem, choose(problem, implementation), vary_alike(operands))
    output = sharded_as(output, query, query.ndim - 1)
    if not return_lse:
        return output
    return output, sharded_as(lse, query, query.ndim - 1)


def _in_order(problem: ListProblem, block_mask: BlockMask) -> tuple[Array, Array]:
    """The lists with each of their blocks once, in order, before what names no block."""
    blocks, none = block_mask.blocks, problem.key_blocks
    place = jnp.arange(problem.most, dtype=jnp.int32)[None, None, None]
    valid = (place < block_mask.counts[..., None]) & (blocks >= 0)
    blocks = jnp.sort(jnp.where(valid, jnp.minimum(blocks, none), none))
    again = jnp.pad(blocks[..., 1:] == blocks[..., :-1], ((0, 0), (0, 0), (0, 0), (1, 0)))
    blocks = jnp.sort(jnp.where(again, none, blocks))
    return blocks, (blocks < none).sum(-1, dtype=jnp.int32)


def describe_lists(
    query: Operand,
    key: Operand,
    value: Operand,
    additional_keys: Operand | None = None,
    additional_values: Operand | None = None,
    *,
    block_mask: BlockMask,
    scale: Number | None = None,
) -> ListProblem:
    """Checks the arguments of `block_sparse_attention` and describes them.

    Raises:
      ValueError: naming the argument, what was received and what is accepted.
    """
    fields = checked(query, key, value, additional_keys, additional_values, scale, in_rows=True)
    blocks, counts = block_mask.blocks, block_mask.counts
    (query_block,) = per_dimension("block_mask.query_block", block_mask.query_block, 1)
    (key_block,) = per_dimension("block_mask.key_block", block_mask.key_block, 1)
    tokens, keys = query.shape[1], key.shape[1]
    batch, heads, rows = fields["batch"], fields["heads"], -(-tokens // query_block)
    if (
        blocks.ndim != 4
        or blocks.shape[0] not in (1, batch)
        or blocks.shape[1] not in (1, heads)
        or blocks.shape[2] != rows
        or blocks.shape[3] < 1
        or counts.shape != blocks.shape[:3]
    ):
        raise ValueError(
            f"block_mask.blocks must be [{batch} or 1, {heads} or 1, {rows}, most] and its counts "
            f"the same without the last, for {tokens} queries in blocks of {query_block}; received "
            f"shapes {blocks.shape} and {counts.shape}."
        )
    if blocks.dtype != jnp.int32 or counts.dtype != jnp.int32:
        raise ValueError(
            "block_mask.blocks and counts must be int32; received "
            f"{blocks.dtype} and {counts.dtype}."
        )
    problem = ListProblem(
        tokens=tokens,
        keys=keys,
        query_block=query_block,
        key_block=key_block,
        most=blocks.shape[3],
        **fields,
    )
    # They are numbered in int32, those of the heads that share a key head together.
    blocks_of_keys = problem.key_blocks + -(-problem.additional // key_block) + 1
    pairs = problem.repeats * rows * blocks_of_keys
    if pairs >= 2**31:
        raise ValueError(
            f"pairs of blocks of queries and keys must be fewer than 2^31 for each key head; "
            f"received {pairs}. Larger blocks have fewer."
        )
    return problem


def pooled_scores(
    query: Array,
    key: Array,
    *,
    query_block: int,
    key_block: int,
) -> Float[Array, "B Hq I J"]:
    """How well the means of blocks of queries and keys match: what VSA lists blocks by.

    Args:
      query: [B, N, Hq, D].
      key: [B, M, Hkv, D]; query head h reads key head h // (Hq / Hkv).
      query_block: queries of a block; the last may have fewer.
      key_block: keys of a block, likewise.

    Returns:
      Products of the means times D ** -0.5 [B, Hq, query blocks, key blocks], float32.
    """

    def means(x: Array, block: int) -> Array:
        tokens = x.shape[1]
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -tokens % block), (0, 0), (0, 0)))
        x = x.reshape(x.shape[0], -1, block, *x.shape[2:]).sum(2)
        size = np.minimum(block, tokens - np.arange(0, tokens, block)).astype(np.float32)
        return x / size[None, :, None, None]

    queries, keys = means(query, query_block), means(key, key_block)
    keys = jnp.repeat(keys, query.shape[2] // key.shape[2], axis=2)
    return jnp.einsum("bihd,bjhd->bhij", queries, keys) * query.shape[-1] ** -0.5


def to_tiles(x: Array, tile: PerDimension) -> Float[Array, "B N H D"]:
    """Tokens of a layout as a row of tiles: each tile's tokens follow each other.

    Args:
      x: [B, *X, H, D] with a layout of 1 to 3 dimensions.
      tile: tokens of a tile along each dimension, or one number for all; they divide the layout.

    Raises:
      ValueError: if they do not.
    """
    layout = x.shape[1:-2]
    tile = _tile("tile", layout, tile)
    rank = len(layout)
    split = [n for size, own in zip(layout, tile, strict=True) for n in (size // own, own)]
    order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1, 2 * rank + 2]
    x = x.reshape(x.shape[0], *split, *x.shape[-2:]).transpose(order)
    return x.reshape(x.shape[0], math.prod(layout), *x.shape[-2:])


def from_tiles(
    x: Array, token_layout: Sequence[int], tile: PerDimension
) -> Float[Array, "B *X H D"]:
    """The inverse of `to_tiles`.

    Raises:
      ValueError: if tiles do not divide the layout, or tokens are not as many.
    """
    layout = tuple(token_layout)
    tile = _tile("tile", layout, tile)
    if x.ndim != 4 or x.shape[1] != math.prod(layout):
        raise ValueError(
            f"x must be [batch, {math.prod(layout)}, heads, head_dim] for token layout {layout}; "
            f"received shape {x.shape}."
        )
    rank = len(layout)
    counts = [size // own for size, own in zip(layout, tile, strict=True)]
    order = [n for m in range(rank) for n in (1 + m, 1 + rank + m)]
    x = x.reshape(x.shape[0], *counts, *tile, *x.shape[-2:])
    x = x.transpose([0, *order, 2 * rank + 1, 2 * rank + 2])
    return x.reshape(x.shape[0], *layout, *x.shape[-2:])


def _tile(name: str, layout: tuple[int, ...], tile: PerDimension) -> tuple[int, ...]:
    tile = per_dimension(name, tile, len(layout))
    if any(size % own for size, own in zip(layout, tile, strict=True)):
        raise ValueError(
            f"{name} must divide the token layout; received {tile} for layout {layout}."
        )
    return tile
