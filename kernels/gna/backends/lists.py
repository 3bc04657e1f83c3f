"""Block lists as backends read them: tokens in blocks, whole lists, and these the other way round.

Additional keys are blocks that every list ends with.  What a list has no block for stands in the
place of one more block, of zeros and without any token: it may be gathered and multiplied like the
others, and nothing of a block that is not listed is ever touched.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..problem import ListProblem


class Inverse(NamedTuple):
    """For each block of keys the blocks of queries that list it, of all heads that read it.

    Queries of key head g are numbered r * query blocks + i, r the head among those that share g;
    block n of keys is listed by `queries[b, g, first[b, g, n] : first[b, g, n + 1]]`. Additional
    blocks follow the others; what comes after the last one's is no block.
    """

    queries: Int[Array, "B Hkv P"]
    first: Int[Array, "B Hkv E"]


def additional_blocks(problem: ListProblem) -> int:
    """Blocks of additional keys."""
    return -(-problem.additional // problem.key_block)


def key_limits(problem: ListProblem) -> Int[np.ndarray, " E"]:
    """Tokens of each block of keys, additional ones and the empty block included."""
    own = _limits(problem.keys, problem.key_block)
    return np.concatenate([own, _limits(problem.additional, problem.key_block), [0]]).astype("i4")


def query_limits(problem: ListProblem) -> Int[np.ndarray, " Q"]:
    """Tokens of each block of queries of the heads that share a key head, and of the empty one."""
    own = _limits(problem.tokens, problem.query_block)
    return np.append(np.tile(own, problem.repeats), 0).astype("i4")


def _limits(tokens: int, block: int) -> Int[np.ndarray, " n"]:
    return np.minimum(block, tokens - np.arange(0, tokens, block))


def query_blocks(
    problem: ListProblem, x: Float[Array, "B N Hq D"]
) -> Float[Array, "B Hq I block D"]:
    """Tokens of queries, by heads and in blocks, the last one filled up with zeros."""
    return _blocks(x, problem.query_block)


def key_blocks(
    problem: ListProblem, own: Float[Array, "B M Hkv D"], additional: Array | None
) -> Float[Array, "B Hkv E block D"]:
    """Tokens of keys likewise, then the additional ones, then the empty block."""
    parts = [_blocks(x, problem.key_block) for x in (own, additional) if x is not None]
    return _with_empty(jnp.concatenate(parts, axis=2))


def sharing_blocks(
    problem: ListProblem, x: Float[Array, "B N Hq D"]
) -> Float[Array, "B Hkv Q block D"]:
    """Tokens of queries as `Inverse` numbers their blocks, then the empty one."""
    x = query_blocks(problem, x)
    return _with_empty(x.reshape(x.shape[0], problem.kv_heads, -1, *x.shape[-2:]))


def _blocks(x: Float[Array, "B N H D"], block: int) -> Float[Array, "B H n block D"]:
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))
    x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
    return jnp.moveaxis(x, 3, 1)


def _with_empty(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 0), (0, 0)))


def tokens_of(x: Float[Array, "B H n block D"], tokens: int) -> Float[Array, "B N H D"]:
    """Blocks as tokens again, without what fills up the last one."""
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(x.shape[0], -1, *x.shape[-2:])[:, :tokens]


def key_gradients(
    problem: ListProblem, x: Float[Array, "B Hkv n block D"]
) -> tuple[Array, Array | None]:
    """Blocks of gradients of keys, without the empty one, as those of own and additional tokens."""
    own, more = jnp.split(x, [problem.key_blocks], axis=2)
    more = tokens_of(more, problem.additional) if problem.additional else None
    return tokens_of(own, problem.keys), more


def whole_lists(
    problem: ListProblem, blocks: Int[Array, "B Hq I most"], counts: Int[Array, "B Hq I"]
) -> tuple[Int[Array, "B Hq I S"], Int[Array, "B Hq I"]]:
    """The blocks that each query block sees, additional ones included, and their number.

    The rest of a list is the empty block.
    """
    extra = additional_blocks(problem)
    blocks = jnp.pad(blocks, ((0, 0), (0, 0), (0, 0), (0, extra)))
    place = jnp.arange(problem.most + extra, dtype=jnp.int32)[None, None, None]
    after = place - counts[..., None]
    more = problem.key_blocks + jnp.minimum(after, extra)
    return jnp.where(after < 0, blocks, more), counts + extra


def inverse(
    problem: ListProblem, blocks: Int[Array, "B Hq I most"], counts: Int[Array, "B Hq I"]
) -> Inverse:
    """The lists the other way round, whole ones."""
    lists, _ = whole_lists(problem, blocks, counts)
    batch, sharing = lists.shape[0], problem.repeats * problem.query_blocks
    lists = lists.reshape(batch, problem.kv_heads, sharing, -1)
    # Sorting numbers of pairs sorts by block of keys, and by block of queries where these are one.
    queries = jnp.arange(sharing, dtype=jnp.int32)[None, None, :, None]
    pairs = jnp.sort((lists * sharing + queries).reshape(batch, problem.kv_heads, -1))
    block, queries = pairs // sharing, pairs % sharing
    entry = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    head = jnp.arange(problem.kv_heads, dtype=jnp.int32)[None, :, None]
    size = problem.key_blocks + additional_blocks(problem) + 1
    found = jnp.zeros((batch, problem.kv_heads, size + 1), jnp.int32)
    first = jnp.cumsum(found.at[entry, head, block + 1].add(1), axis=-1, dtype=jnp.int32)
    return Inverse(queries, first[..., :size])
