"""`Problem`: the checked, hashable description of one neighborhood attention.

Everything a kernel's shape depends on is static and stands in `Problem`, so that backends may build
tables, compile and cache by it.  Arguments are checked here, once, for all backends.  A
`ListProblem` is that of attention whose queries see listed blocks of keys in place of a window.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Required, TypeAlias, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .tiles import Window

# An integer (or bool) for all dimensions, or one per dimension; what else may come is refused by
# name in `per_dimension`, which says more than a type checker would.
PerDimension: TypeAlias = Any

Number: TypeAlias = float | int | np.floating | np.integer

# An integer, or an expression of symbolic dimensions (`jax.export.symbolic_shape`).
Size: TypeAlias = Any

# Descriptions need shapes and dtypes only.
Operand: TypeAlias = Array | jax.ShapeDtypeStruct

DTYPES = ("float32", "bfloat16", "float16")


class Settings(TypedDict, total=False):
    """What `neighborhood_attention` is told beside arrays."""

    kernel_size: Required[PerDimension]
    stride: PerDimension
    dilation: PerDimension
    is_causal: PerDimension
    scale: Number | None


class Operands(NamedTuple):
    """What is attended with, or the gradients of it, in its shapes and dtype."""

    query: Array  # [B, *X, Hq, D]
    key: Array  # [B, *X, Hkv, D]
    value: Array  # [B, *X, Hkv, Dv]
    additional_keys: Array | None  # [B, A, Hkv, D]
    additional_values: Array | None  # [B, A, Hkv, Dv]


class ListOperands(NamedTuple):
    """The operands of a `ListProblem`, or the gradients of them, None for the lists.

    The first `counts` of a list are blocks of keys in their order, each once.
    """

    query: Array  # [B, N, Hq, D]
    key: Array  # [B, M, Hkv, D]
    value: Array  # [B, M, Hkv, Dv]
    additional_keys: Array | None  # [B, A, Hkv, D]
    additional_values: Array | None  # [B, A, Hkv, Dv]
    blocks: Array | None  # [B, Hq, query blocks, most], int32
    counts: Array | None  # [B, Hq, query blocks], int32


class Residuals(NamedTuple):
    """What the forward pass leaves for the backward pass; the probabilities are computed again."""

    operands: Any  # Operands or ListOperands
    output: Array  # [B, *X, Hq, Dv]
    lse: Array  # [B, *X, Hq], float32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """What `Problem` and `ListProblem` have in common.

    Attributes:
      batch: B; vmapped axes are folded into it. It may be symbolic.
      heads: query heads Hq.
      kv_heads: key and value heads Hkv; query head h reads key head h // (Hq / Hkv).
      head_dim: D, of queries and keys.
      value_dim: Dv, of values and output.
      dtype: of all operands: "float32", "bfloat16" or "float16".
      additional: number of additional keys, seen by every query; 0 is none.
      scale: factor of the scores.
    """

    batch: Size
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    additional: int
    scale: float

    @property
    def known_batch(self) -> int:
        """What the batch is known to be a multiple of: itself, or 1 where it is symbolic."""
        return self.batch if isinstance(self.batch, int) else 1

    @property
    def repeats(self) -> int:
        """Query heads per key head."""
        return self.heads // self.kv_heads


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Problem(Attention):
    """One neighborhood attention.

    Attributes:
      windows: the token layout and what is seen along each of its 1 to 3 dimensions.
      shards: devices that share the first dimension. Above 1, queries are a device's own rows and
        keys are these and its neighbors' (`context_parallel`).
      axis_name: the mesh axis of these devices.
    """

    windows: tuple[Window, ...]
    shards: int = 1
    axis_name: str | None = None

    @property
    def layout(self) -> tuple[int, ...]:
        """Tokens along each dimension."""
        return tuple(w.length for w in self.windows)

    @property
    def tokens(self) -> int:
        """All tokens."""
        return math.prod(self.layout)

    @property
    def is_dense(self) -> bool:
        """Whether every query sees every key."""
        return self.shards == 1 and all(w.is_dense() for w in self.windows)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ListProblem(Attention):
    """One attention of blocks of queries to listed blocks of keys; the last ones may be ragged.

    Attributes:
      tokens: queries N, in a row.
      keys: keys M, likewise.
      query_block: queries that share a list.
      key_block: keys of a block.
      most: blocks that a list has room for.
    """

    tokens: int
    keys: int
    query_block: int
    key_block: int
    most: int

    @property
    def layout(self) -> tuple[int, ...]:
        """Queries along their only dimension."""
        return (self.tokens,)

    @property
    def query_blocks(self) -> int:
        """Blocks of queries, so many lists for each head."""
        return -(-self.tokens // self.query_block)

    @property
    def key_blocks(self) -> int:
        """Blocks of keys."""
        return -(-self.keys // self.key_block)


AnyProblem: TypeAlias = Problem | ListProblem


def describe(
    query: Operand,
    key: Operand,
    value: Operand,
    additional_keys: Operand | None = None,
    additional_values: Operand | None = None,
    *,
    kernel_size: PerDimension,
    stride: PerDimension = 1,
    dilation: PerDimension = 1,
    is_causal: PerDimension = False,
    scale: Number | None = None,
) -> Problem:
    """Checks the arguments of `neighborhood_attention` and describes them.

    Raises:
      ValueError: naming the argument, what was received and what is accepted.
    """
    fields = checked(query, key, value, additional_keys, additional_values, scale)
    windows = windows_of(query.shape[1:-2], kernel_size, stride, dilation, is_causal)
    return Problem(windows=windows, **fields)


def checked(
    query: Operand,
    key: Operand,
    value: Operand,
    additional_keys: Operand | None,
    additional_values: Operand | None,
    scale: Number | None,
    *,
    in_rows: bool = False,
) -> dict[str, Any]:
    """Checks the operands of an attention; the fields of `Attention`.

    Args:
      in_rows: queries and keys are rows of tokens [B, N, H, D] and [B, M, H, D], instead of lying
        on one layout of 1 to 3 dimensions.

    Raises:
      ValueError: as `describe`.
    """
    operands = {"query": query, "key": key, "value": value}
    given = {"additional_keys": additional_keys, "additional_values": additional_values}
    additional = {name: x for name, x in given.items() if x is not None}
    for name, x in (operands | additional).items():
        if not all(isinstance(size, (int, np.integer)) for size in x.shape[1:]):
            raise ValueError(
                f"only the batch may be symbolic, {name}'s other sizes must be numbers; received "
                f"shape {x.shape}."
            )
    for name, x in operands.items():
        if in_rows and x.ndim != 4:
            raise ValueError(
                f"{name} must be [batch, tokens, heads, head_dim]; received shape {x.shape}."
            )
        if not 4 <= x.ndim <= 6:
            raise ValueError(
                f"{name} must be [batch, *layout, heads, head_dim] with a layout of 1 to 3 "
                f"dimensions, that is of rank 4 to 6; received shape {x.shape}."
            )
        if 0 in x.shape:
            raise ValueError(f"{name} must not be empty; received shape {x.shape}.")
    for name, x in (("key", key), ("value", value)):
        if x.ndim != query.ndim or x.shape[:-2] != query.shape[:-2]:
            if in_rows and x.shape[:2] == (query.shape[0], key.shape[1]):
                continue
            what = (
                "batch, and key and value the same tokens" if in_rows else "batch and token layout"
            )
            raise ValueError(
                f"query and {name} must have the same {what}; received shapes {query.shape} and "
                f"{x.shape}."
            )
    heads, head_dim = query.shape[-2:]
    kv_heads, value_dim = value.shape[-2:]
    if key.shape[-1] != head_dim:
        raise ValueError(
            f"query and key must have the same head_dim; received {head_dim} and {key.shape[-1]}."
        )
    if key.shape[-2] != kv_heads:
        raise ValueError(
            f"key and value must have the same number of heads; received {key.shape[-2]} and "
            f"{kv_heads}."
        )
    if heads % kv_heads:
        raise ValueError(
            "the number of query heads must be a multiple of the number of key heads; received "
            f"{heads} and {kv_heads}."
        )
    if len(additional) == 1:
        (only,), (missing,) = additional, given.keys() - additional
        raise ValueError(
            "additional_keys and additional_values come together; received "
            f"{only} without {missing}."
        )
    for (name, x), dim in zip(additional.items(), (head_dim, value_dim), strict=False):
        keys = additional["additional_keys"]
        tokens = keys.shape[1] if keys.ndim == 4 else "additional"
        shape = (key.shape[0], tokens, kv_heads, dim)
        if x.ndim != 4 or x.shape != shape or 0 in x.shape:
            raise ValueError(
                f"{name} must be [batch, additional, kv_heads, head_dim], here "
                f"[{', '.join(map(str, shape))}] with at least 1 token, the same for keys and "
                f"values; received shape {x.shape}."
            )
    operands |= additional
    dtypes = {name: jnp.dtype(x.dtype).name for name, x in operands.items()}
    if len(set(dtypes.values())) > 1 or dtypes["query"] not in DTYPES:
        raise ValueError(
            f"all operands must have the same dtype, one of {', '.join(DTYPES)}; received "
            f"{', '.join(f'{name} {dtype}' for name, dtype in dtypes.items())}."
        )
    if scale is None:
        scale = head_dim**-0.5
    if isinstance(scale, bool) or not (isinstance(scale, Number) and 0 < scale < math.inf):
        raise ValueError(
            f"scale must be a positive number, or None for head_dim ** -0.5; received {scale!r}."
        )
    return {
        "batch": query.shape[0],
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "value_dim": value_dim,
        "dtype": dtypes["query"],
        "additional": 0 if additional_keys is None else additional_keys.shape[1],
        "scale": float(scale),
    }


def windows_of(
    layout: Sequence[int],
    kernel_size: PerDimension,
    stride: PerDimension = 1,
    dilation: PerDimension = 1,
    is_causal: PerDimension = False,
    *,
    names: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Window, ...]:
    """Checks the settings of each dimension of a token layout; see `Window`.

    None among the sizes of `kernel_size` is all tokens of a dimension.

    `names` are what messages call the arguments, where the caller knows them by other names.

    Raises:
      ValueError: for settings of another type or number than the layout's dimensions, and where not
        1 <= kernel_size, kernel_size * dilation <= length, 1 <= stride <= kernel_size.
    """
    rank = len(layout) if isinstance(layout, (tuple, list)) else 0
    if not 1 <= rank <= 3:
        raise ValueError(
            f"a token layout is a tuple of the tokens along 1 to 3 dimensions; received {layout!r}."
        )
    arguments = ("token_layout", "kernel_size", "stride", "dilation", "is_causal")
    names = {name: names.get(name, name) for name in arguments}
    of_layout = names["token_layout"].replace("_", " ")
    lengths = per_dimension(names["token_layout"], layout, rank)
    sizes = per_dimension(names["kernel_size"], _without_all(kernel_size, lengths), rank)
    strides = per_dimension(names["stride"], stride, rank)
    dilations = per_dimension(names["dilation"], dilation, rank)
    causal = per_dimension(names["is_causal"], is_causal, rank, convert=_as_bool)
    for m, (x, k, s, d) in enumerate(zip(lengths, sizes, strides, dilations, strict=True)):
        # Windows and dilations of 1, and strides, fit every layout: what is 1 may not be given.
        if k * d > x:
            given = {"kernel_size": (k, sizes), "dilation": (d, dilations)}
            given = {names[name]: each for name, each in given.items() if each[0] > 1}
            numbers = " * ".join(str(one) for one, _ in given.values())
            received = f"{numbers} = {k * d}" if len(given) > 1 else numbers
            settings = ", ".join(f"{name}={every}" for name, (_, every) in given.items())
            raise ValueError(
                f"{' times '.join(given)} must not exceed the tokens along a dimension; "
                f"received {received} > {x} in dimension {m} ({settings}, {of_layout} {lengths})."
            )
        if s > k:
            raise ValueError(
                f"{names['stride']} must not exceed {names['kernel_size']}; received {s} > {k} in "
                f"dimension {m} ({names['stride']}={strides}, {names['kernel_size']}={sizes})."
            )
    return tuple(map(Window, lengths, sizes, strides, dilations, causal))


def nearest_layout(
    layout: Sequence[int], window: PerDimension, stride: PerDimension, dilation: PerDimension
) -> tuple[int, ...] | None:
    """The smallest layout not below `layout` that holds its windows; None if there is none."""
    rank = len(layout)
    try:
        sizes = per_dimension("window", _without_all(window, (1,) * rank), rank)
        spans = map(math.prod, zip(sizes, per_dimension("dilation", dilation, rank), strict=True))
        nearest = tuple(map(max, layout, spans))
        windows_of(nearest, window, stride, dilation)
    except ValueError:
        return None
    return nearest


def _without_all(sizes: PerDimension, lengths: Sequence[int]) -> PerDimension:
    """Windows in which None, for all tokens of a dimension, is their number."""
    if not isinstance(sizes, (tuple, list)) or len(sizes) != len(lengths):
        return sizes
    return tuple(n if size is None else size for size, n in zip(sizes, lengths, strict=True))


def _as_size(value: Any) -> int | None:
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return int(value) if is_integer and value >= 1 else None


def _as_bool(value: Any) -> bool | None:
    return bool(value) if isinstance(value, (bool, np.bool_)) else None


def per_dimension(
    name: str, value: Any, rank: int, convert: Callable[[Any], Any] = _as_size
) -> tuple[Any, ...]:
    """One setting per dimension, from one for all or a sequence.

    Raises:
      ValueError: unless there are `rank` settings, all integers of at least 1 (or all bools).
    """
    kind = "a bool" if convert is _as_bool else "an integer of at least 1"
    values = value if isinstance(value, (tuple, list, np.ndarray)) else (value,) * rank
    converted = tuple(convert(v) for v in values)
    if len(converted) != rank or None in converted:
        raise ValueError(
            f"{name} must be {kind}, or a sequence of {rank}, one for each dimension of the token "
            f"layout; received {value!r}."
        )
    return converted
