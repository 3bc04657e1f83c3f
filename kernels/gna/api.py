"""Neighborhood attention's front-end: checks arguments, chooses a backend, defines gradients.

A backend is a module with three functions:

    unsupported(problem, platform) -> str | None     why it cannot do a problem, or None; what is
                                                     not at hand is said by `NEEDS`
    forward(problem, operands) -> (output, lse)
    backward(problem, residuals, d_output, delta) -> Operands, the gradients

and, for blocks of queries that see listed blocks of keys, a second such module (`LIST_BACKENDS`);
where something must be built before its first call,

    prepare(platform) -> None                        RuntimeError if that fails
    is_built(platform) -> bool                       whether it is there already

It sees raw operands in the layout of the call, with vmapped axes folded into the batch, and need
have neither derivatives nor batching rules of its own.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from . import cuda, cudnn
from .backends import reference, reference_lists, splash, triton, xla, xla_lists
from .cuda import lists as cuda_lists
from .partition import (
    BACKWARD,
    FORWARD,
    fold,
    is_in_mesh,
    partitioned,
    sharded_as,
    unfold,
    with_whole_tokens,
)
from .platforms import default_platform, platform_dependent, platforms_at_hand
from .problem import (
    AnyProblem,
    ListOperands,
    ListProblem,
    Number,
    Operands,
    PerDimension,
    Problem,
    Residuals,
    Size,
    describe,
    windows_of,
)
from .tiles import Window
from .varying import vary_alike

BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "xla": xla,
    "cuda": cuda,
    "triton": triton,
    "splash": splash,
}

# Those of a `ListProblem`.
LIST_BACKENDS: dict[str, ModuleType] = {
    "reference": reference_lists,
    "xla": xla_lists,
    "cuda": cuda_lists,
}

# An implementation, or one for each of several platforms.
Choice: TypeAlias = str | tuple[tuple[str, str], ...]

# What must be at hand beside jax, on a platform; what is not is said as `unsupported` does.
NEEDS: dict[str, Callable[[str], str | None]] = {
    "cuda": cuda.build.missing,
    "triton": triton.missing,
    "splash": splash.missing,
}

# What runs where, best first; the first that can do the problem is taken.
PREFERENCES = {
    "cpu": ("cuda", "xla", "reference"),
    "gpu": ("triton", "xla", "reference"),
    "tpu": ("splash", "xla", "reference"),
}


def unsupported(
    implementation: str, problem: AnyProblem, platform: str | None = None
) -> str | None:
    """Why an implementation cannot do a problem, or None if it can.

    Args:
      implementation: a key of `BACKENDS`.
      problem: what `describe` or `describe_lists` returns.
      platform: "cpu", "gpu" or "tpu"; by default that of jax's default device.

    Raises:
      ValueError: if `implementation` names none.
    """
    platform = platform or default_platform()
    reason = unable(implementation, problem, platform)
    if reason is None and implementation in NEEDS:
        reason = NEEDS[implementation](platform)
    return reason


def unable(implementation: str, problem: AnyProblem, platform: str) -> str | None:
    """`unsupported`, but for what is not at hand.

    Raises:
      ValueError: if `implementation` names none.
    """
    backend = _backend(implementation)
    if isinstance(problem, ListProblem):
        if implementation not in LIST_BACKENDS:
            return "it takes no block lists"
        backend = LIST_BACKENDS[implementation]
    return backend.unsupported(problem, platform)


def select(problem: AnyProblem, implementation: str | None = None) -> str:
    """The implementation that runs a problem on jax's default device.

    Raises:
      ValueError: if `implementation` names none.
      NotImplementedError: if the one asked for cannot do the problem; another is never taken.
    """
    if implementation is None:
        return _best(problem, default_platform())
    reason = unsupported(implementation, problem)
    if reason is not None:
        raise _refusal(implementation, reason)
    return implementation


def choose(problem: AnyProblem, implementation: str | None = None) -> Choice:
    """What runs a problem on each platform that it may be lowered for here.

    Raises:
      ValueError: if `implementation` names none.
      NotImplementedError: if the one asked for can do the problem on none of them.
    """
    platforms = platforms_at_hand()
    if implementation is None:
        chosen = {platform: _best(problem, platform) for platform in platforms}
    else:
        reasons = {each: unsupported(implementation, problem, each) for each in platforms}
        chosen = {each: implementation for each, reason in reasons.items() if reason is None}
        if not chosen:
            raise _refusal(implementation, reasons[default_platform()])
    return tuple(chosen.items()) if len(chosen) > 1 else next(iter(chosen.values()))


def _refusal(implementation: str, reason: str | None) -> NotImplementedError:
    return NotImplementedError(
        f"the implementation {implementation!r} cannot do this: {reason}. With "
        "implementation=None one that can is chosen."
    )


def _best(problem: AnyProblem, platform: str) -> str:
    """The first that can do a problem on a platform."""
    names = PREFERENCES.get(platform, ("xla", "reference"))
    able = (name for name in names if unsupported(name, problem, platform) is None)
    is_default = platform == default_platform()
    return next(name for name in able if _is_ready(name, platform, is_default))


@functools.cache
def _is_ready(implementation: str, platform: str, is_default: bool) -> bool:
    """Whether a backend that is not asked for by name can be built; it is said once if not.

    For devices that may never be used nothing is built, which takes its time.
    """
    prepare = getattr(BACKENDS[implementation], "prepare", None)
    if prepare is None:
        return True
    if not is_default and not BACKENDS[implementation].is_built(platform):
        return False
    try:
        prepare(platform)
    except (RuntimeError, OSError) as error:
        message = f"attention runs without the faster {implementation} implementation: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return False
    return True


def prepare(implementation: str = "cuda", platform: str | None = None) -> None:
    """Builds an implementation, unless it is there already, and makes its calls known to jax.

    Attention does so by itself. A program that was compiled or exported in another process is not
    traced again: on a CPU importing this package suffices for it where the library was built
    before, elsewhere this is to be called before the program is loaded.

    Args:
      implementation: a key of `BACKENDS`; most need nothing.
      platform: "cpu", "gpu" or "tpu"; by default that of jax's default device.

    Raises:
      ValueError: if `implementation` names none.
      RuntimeError: if it cannot be built.
    """
    build = getattr(_backend(implementation), "prepare", None)
    if build is not None:
        build(platform or default_platform())


def _backend(implementation: str) -> ModuleType:
    if implementation not in BACKENDS:
        raise ValueError(
            f"implementation must be one of {', '.join(BACKENDS)}, or None to choose; received "
            f"{implementation!r}."
        )
    return BACKENDS[implementation]


def seen_by_backends(problem: Problem) -> Problem:
    """The problem as backends get it: dense attention is over one row of tokens.

    There the order of tokens does not matter, nor is there a mask.
    """
    if not problem.is_dense:
        return problem
    return dataclasses.replace(problem, windows=(Window(problem.tokens, problem.tokens),))


def neighborhood_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    kernel_size: PerDimension,
    stride: PerDimension = 1,
    dilation: PerDimension = 1,
    is_causal: PerDimension = False,
    scale: Number | None = None,
    additional_keys: Array | None = None,
    additional_values: Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Array | tuple[Array, Array]:
    """Generalized Neighborhood Attention over 1, 2 or 3 dimensions (arXiv 2504.16922).

    Each query sees a window of `kernel_size` keys along each dimension, itself in the middle as far
    as the borders allow: there the window is shifted, never cut. Runs of `stride` queries share the
    window of their leader; `dilation` spaces a window's keys; a causal dimension shows no key
    behind the query. `kernel_size` of the whole layout is dense attention, `stride` equal to
    `kernel_size` attention within blocks.

    It works under jit, vmap, grad (once), jax.checkpoint, and in shard_map over batch and heads;
    for tokens spread over devices see `context_parallel_attention`.

    Args:
      query: [B, *X, Hq, D]; float32, bfloat16 or float16, as are the others.
      key: [B, *X, Hkv, D]; query head h reads key head h // (Hq / Hkv).
      value: [B, *X, Hkv, Dv].
      kernel_size: keys seen along each dimension, an integer or one per dimension, as all four;
        None among several is all of a dimension.
      stride: queries that share a window; at most `kernel_size`.
      dilation: distance between the keys of a window.
      is_causal: whether no key behind the query is seen.
      scale: factor of the scores, by default D ** -0.5.
      additional_keys: keys that every query sees, such as those of a text [B, A, Hkv, D].
      additional_values: their values [B, A, Hkv, Dv].
      return_lse: also return the log-sum-exp of the scores, which `merge_attentions` needs.
      implementation: a backend by name; by default the first in `PREFERENCES` that can.

    Returns:
      The output [B, *X, Hq, Dv] in the dtype of the operands; with `return_lse`, also the
      log-sum-exp of the scores [B, *X, Hq], natural logarithm, float32.

    Raises:
      ValueError: if the call is wrong; the message says what was received and what is accepted.
      NotImplementedError: if the implementation asked for cannot do the problem.
    """
    problem = describe(
        query,
        key,
        value,
        additional_keys,
        additional_values,
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        scale=scale,
    )
    chosen = choose(problem, implementation)
    problem = seen_by_backends(problem)
    layout = (problem.batch, *problem.layout)
    operands = [with_whole_tokens(x) for x in (query, key, value)]
    operands = [x.reshape(*layout, *x.shape[-2:]) for x in operands]
    operands = vary_alike(Operands._make((*operands, additional_keys, additional_values)))
    if not return_lse and implementation in (None, "xla") and _is_cudnns(problem, operands):
        output = _attend_by_cudnn(problem, chosen, operands)
        return output.reshape(*query.shape[:-1], problem.value_dim)
    output, lse = attend(problem, chosen, operands)
    output = output.reshape(*query.shape[:-1], problem.value_dim)
    output = sharded_as(output, query, query.ndim - 1)
    if not return_lse:
        return output
    return output, sharded_as(lse.reshape(query.shape[:-1]), query, query.ndim - 1)


def neighborhood_mask(
    token_layout: tuple[int, ...] | list[int],
    *,
    kernel_size: PerDimension,
    stride: PerDimension = 1,
    dilation: PerDimension = 1,
    is_causal: PerDimension = False,
) -> Bool[Array, "N N"]:
    """mask[i, j]: whether query i sees key j, tokens in row-major order (last dimension fastest).

    Raises:
      ValueError: as `neighborhood_attention`.
    """
    windows = windows_of(token_layout, kernel_size, stride, dilation, is_causal)
    return jnp.asarray(reference.mask_of(windows))


def joint_neighborhood_attention(
    image: tuple[Array, Array, Array],
    text: tuple[Array, Array, Array],
    *,
    token_layout: tuple[int, ...],
    kernel_size: PerDimension,
    stride: PerDimension = 1,
    dilation: PerDimension = 1,
    scale: Number | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Joint attention of image and text tokens, as in MMDiT (FLUX, HunyuanVideo, SD3).

    Image queries see their neighborhood of the image and the whole text; text queries see
    everything. The layout must be given, because flattened tokens no longer tell it.

    Args:
      image: query [B, N, Hq, D], key [B, N, Hkv, D] and value [B, N, Hkv, Dv] of the image tokens,
        in row-major order.
      text: those of the text tokens [B, A, ...].
      token_layout: tokens of the image along each dimension; their product is N.
      kernel_size: as the following, see `neighborhood_attention`.
      stride: of the image's windows.
      dilation: of the image's windows.
      scale: factor of the scores, by default D ** -0.5.
      implementation: see `neighborhood_attention`.

    Returns:
      The outputs of image tokens [B, N, Hq, Dv] and text tokens [B, A, Hq, Dv].

    Raises:
      ValueError: as `neighborhood_attention`, and where the layout does not fit the tokens.
    """
    windows = windows_of(token_layout, kernel_size, stride, dilation)
    tokens = math.prod(window.length for window in windows)
    for name, x in zip(("query", "key", "value"), image, strict=True):
        if x.ndim != 4 or x.shape[1] != tokens:
            raise ValueError(
                f"the image's {name} must be [batch, tokens, heads, head_dim] with {tokens} tokens "
                f"for the token layout {tuple(token_layout)}; received shape {x.shape}."
            )
    for name, x, own in zip(("query", "key", "value"), text, image, strict=True):
        shape = (own.shape[0], *text[0].shape[1:2], *own.shape[2:])
        if x.shape != shape or 0 in shape or x.dtype != own.dtype:
            raise ValueError(
                f"the text's {name} must be [batch, text tokens, heads, head_dim] as the image's "
                "but for its tokens, at least one and the same in query, key and value, here "
                f"{shape} of {own.dtype}; received shape {x.shape} of {x.dtype}."
            )
    query, key, value = (x.reshape(x.shape[0], *token_layout, *x.shape[-2:]) for x in image)
    shared: dict[str, Any] = {"scale": scale, "implementation": implementation}
    of_image = neighborhood_attention(
        query,
        key,
        value,
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        additional_keys=text[1],
        additional_values=text[2],
        **shared,
    )
    of_text = neighborhood_attention(
        *text,
        kernel_size=text[0].shape[1:2],
        additional_keys=image[1],
        additional_values=image[2],
        **shared,
    )
    assert isinstance(of_image, jax.Array) and isinstance(of_text, jax.Array)
    return of_image.reshape(*image[0].shape[:-1], -1), of_text


def _in_rows(operands: Operands) -> tuple[Any, ...]:
    """Queries, all keys and all values of dense attention, [B, L, H, D]."""
    query, key, value, *additional = operands
    query, key, value = (x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (query, key, value))
    keys, values = (
        x if more is None else jnp.concatenate([x, more], axis=1)
        for x, more in zip((key, value), additional, strict=True)
    )
    return query, keys, values


def _is_cudnns(problem: Problem, operands: Operands) -> bool:
    """Whether cuDNN is to do a problem where it is lowered for CUDA."""
    if not problem.is_dense or is_in_mesh(*jax.tree.leaves(operands)):
        return False
    query, key, value = jax.eval_shape(_in_rows, operands)
    return "gpu" in platforms_at_hand() and cudnn.takes(query, key, value, False)


def _attend_by_cudnn(problem: Problem, chosen: Choice, operands: Operands) -> Array:
    """The output of dense attention, by cuDNN where it is lowered for CUDA."""

    def by_cudnn(operands: Operands) -> Array:
        output: Any = cudnn.attend(False, problem.scale, *_in_rows(operands))
        return output.reshape(*operands.query.shape[:-1], problem.value_dim)

    # What is not run must leave nothing for the backward pass but the operands.
    @jax.checkpoint
    def by_backends(operands: Operands) -> Array:
        return attend(problem, chosen, operands)[0]

    return jax.lax.platform_dependent(operands, cuda=by_cudnn, default=by_backends)


def _run(problem: AnyProblem, chosen: Choice, name: str, axes: Any) -> Callable[..., Any]:
    """The `forward` or `backward` of what is chosen."""
    table = LIST_BACKENDS if isinstance(problem, ListProblem) else BACKENDS
    if isinstance(chosen, str):
        return _foldable(getattr(table[chosen], name), problem, axes[type(problem)])

    def run(problem: AnyProblem, *operands: Any) -> Any:
        branches = {
            platform: functools.partial(getattr(table[each], name), problem)
            for platform, each in chosen
        }
        return platform_dependent(branches, *operands)

    return _foldable(run, problem, axes[type(problem)])


def _attend(
    problem: AnyProblem, chosen: Choice, operands: Operands | ListOperands
) -> tuple[Array, Array]:
    run = _run(problem, chosen, "forward", FORWARD)
    query = operands.query
    output, lse = (sharded_as(x, query, query.ndim - 1) for x in run(operands))
    return output, lse


def _attend_forward(problem: AnyProblem, chosen: Choice, operands: Operands | ListOperands) -> Any:
    output, lse = _attend(problem, chosen, operands)
    return (output, lse), Residuals(operands, output, lse)


def _attend_backward(
    problem: AnyProblem, chosen: Choice, residuals: Residuals, cotangents: tuple[Array, Array]
) -> Any:
    d_output, d_lse = cotangents
    # P depends on the scores through the log-sum-exp, and the log-sum-exp is itself a result: its
    # own cotangent enters where the output's does, so merged attentions differentiate.
    product = d_output.astype(jnp.float32) * residuals.output.astype(jnp.float32)
    delta = product.sum(-1) - d_lse
    run = _run(problem, chosen, "backward", BACKWARD)
    gradients = run(residuals, d_output, delta)

    def laid_out(gradient: Array | None, x: Array | None) -> Array | None:
        return gradient if x is None or gradient is None else sharded_as(gradient, x, x.ndim)

    return (jax.tree.map(laid_out, gradients, residuals.operands, is_leaf=lambda g: g is None),)


_differentiable = jax.custom_vjp(_attend, nondiff_argnums=(0, 1))
_differentiable.defvjp(_attend_forward, _attend_backward)


# One function for all calls, so that a problem is traced and compiled once, also outside of `jit`.
@functools.partial(jax.jit, static_argnums=(0, 1))
def attend(
    problem: AnyProblem, chosen: Choice, operands: Operands | ListOperands
) -> tuple[Array, Array]:
    """Output and log-sum-exp of a checked problem by what `choose` says, with their derivatives."""
    return _differentiable(problem, chosen, operands)


def _foldable(run: Callable[..., Any], problem: AnyProblem, axes: Any) -> Callable[..., Any]:
    """A backend's function of arrays [B, ...], whose vmapped axes become part of B."""
    call = jax.custom_batching.custom_vmap(partitioned(run, problem, axes))

    @call.def_vmap
    def rule(size: Size, batched: Any, *operands: Any) -> Any:
        if size == 0:  # backends take a batch of at least one
            one = jax.tree.map(
                lambda x, is_batched: jax.ShapeDtypeStruct(x.shape[int(is_batched) :], x.dtype),
                operands,
                tuple(batched),
            )
            results = jax.eval_shape(call, *one)
            none = jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), results)
            return none, jax.tree.map(lambda _: True, none)
        larger = dataclasses.replace(problem, batch=size * problem.batch)
        everywhere = jax.tree.map(
            lambda x, is_batched: x if is_batched else jnp.broadcast_to(x[None], (size, *x.shape)),
            operands,
            tuple(batched),
        )
        results = _foldable(run, larger, axes)(*jax.tree.map(fold, everywhere))
        leaves = jax.tree.leaves(everywhere)
        mapped = next(
            x for x, is_one in zip(leaves, jax.tree.leaves(batched), strict=True) if is_one
        )
        shape = (size, problem.batch)
        results = jax.tree.map(lambda x: unfold(x, shape, mapped, leaves[0]), results)
        return results, jax.tree.map(lambda _: True, results)

    return call
