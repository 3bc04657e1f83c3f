"""Convolutions of bfloat16 on CPUs, by a custom call into C++ (`gna/cuda/bfloat16_cpu.cc`).

XLA widens them to float32.  The call multiplies by AMX or AVX512-BF16 and adds up in float32; the
machine's compiler builds it on first use.  Programs for other platforms, for several devices, and
those that are exported hold XLA's own convolution instead.
"""

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from .gna.cuda import build

_CONVOLVE, _CORRELATE = build.CALLS["bfloat16"]
_FEWEST_CHANNELS = 16  # with fewer, panels of 32 columns and steps of 32 terms are mostly zeros


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """A convolution of videos [B, T, H, W, C], of which an image is one frame.

    Attributes:
      image, kernel, result: shapes; the kernel's is [t, h, w, C, D].
      strides: along time, height and width.
      padding: before and after, along the same.
    """

    image: tuple[int, ...]
    kernel: tuple[int, ...]
    result: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    def shape(self, kind: str) -> tuple[int, ...]:
        return {"image": self.image, "kernel": self.kernel, "result": self.result}[kind]


# A convolution is linear in two of three arrays, and gives the third or its cotangent: operands are
# the other two, in this order.
_OTHERS = {
    "result": ("image", "kernel"),
    "image": ("result", "kernel"),
    "kernel": ("image", "result"),
}
convolution_p = Primitive("bfloat16_convolution")


@functools.cache
def available() -> bool:
    """Whether the call's library is there; it is built if need be, and a failure warned of."""
    if build.missing("bfloat16") is not None:
        return False
    try:
        build.register("bfloat16")
    except RuntimeError as error:
        warnings.warn(f"Convolutions of bfloat16 are XLA's: {error}", stacklevel=2)
        return False
    return True


def convolved(
    x: Array, kernel: Array, strides: Sequence[int], padding: Sequence[tuple[int, int]]
) -> Array | None:
    """The convolution [B, *Y, D] of [B, *X, C] with [*k, C, D]; None where the call takes it not.

    That is of few or odd channels, under a mesh of devices, and without a compiler.
    """
    axes = x.ndim - 2
    shapes = (*x.shape, *kernel.shape)
    if not 1 <= axes <= 3 or not all(isinstance(size, int) and size > 0 for size in shapes):
        return None
    channels, features = kernel.shape[-2:]
    if min(channels, features) < _FEWEST_CHANNELS or channels % 2 or features % 2:
        return None
    pads = tuple((int(before), int(after)) for before, after in padding)
    if x.shape[-1] != channels or min(map(min, pads)) < 0 or _meshes(x, kernel):
        return None
    strides = tuple(strides)
    sizes = tuple(
        (size + sum(pad) - tap) // stride + 1
        for size, pad, tap, stride in zip(x.shape[1:-1], pads, kernel.shape, strides, strict=False)
    )
    if min(sizes) < 1 or not available():
        return None
    ones = (1,) * (3 - axes)
    form = Form(
        (x.shape[0], *ones, *x.shape[1:]),
        (*ones, *kernel.shape),
        (x.shape[0], *ones, *sizes, features),
        (*ones, *strides),
        (*((0, 0) for _ in ones), *pads),
    )
    made = _bind(x.reshape(form.image), kernel.reshape(form.kernel), form, "result")
    return made.reshape(x.shape[0], *sizes, features)


def rows_product(x: Array, g: Array) -> Array | None:
    """[K, N], the sum over rows of [..., K] times [..., N]; None where the call takes it not."""
    rows = math.prod(x.shape[:-1])
    sizes = (x.shape[-1], g.shape[-1])
    if not all(isinstance(size, int) for size in (rows, *sizes)) or rows < 1:
        return None
    if min(sizes) < _FEWEST_CHANNELS or any(size % 2 for size in sizes) or _meshes(x, g):
        return None
    if not available():
        return None
    images = tuple((1, 1, 1, rows, size) for size in sizes)
    form = Form(images[0], (1, 1, 1, *sizes), images[1], (1, 1, 1), ((0, 0),) * 3)
    return _bind(x.reshape(images[0]), g.reshape(images[1]), form, "kernel").reshape(sizes)


def _meshes(*arrays: Array) -> bool:
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in arrays)]
    return not all(mesh.empty for mesh in meshes)


@functools.partial(jax.jit, static_argnums=(2, 3), inline=True)
def _bind(first: Array, second: Array, form: Form, kind: str) -> Array:
    return convolution_p.bind(first, second, form=form, kind=kind)


def _by_xla(first: Array, second: Array, *, form: Form, kind: str) -> Array:
    def convolution(image: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(
            image, kernel, form.strides, form.padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )

    if (
        kind == "kernel"
        and form.kernel[:3] == form.strides == (1, 1, 1)
        and form.image[:4] == form.result[:4]
    ):
        rows = (0, 1, 2, 3)
        return lax.dot_general(first, second, ((rows, rows), ((), ()))).reshape(form.kernel)
    if kind == "result":
        return convolution(first, second)
    if kind == "image":
        like = jax.ShapeDtypeStruct(form.image, first.dtype)
        return jax.linear_transpose(lambda image: convolution(image, second), like)(first)[0]
    like = jax.ShapeDtypeStruct(form.kernel, first.dtype)
    return jax.linear_transpose(lambda kernel: convolution(first, kernel), like)(second)[0]


def _integers(sizes: Sequence[int]) -> np.ndarray:
    return np.array(sizes, np.int64)


def _by_call(first: Array, second: Array, *, form: Form, kind: str) -> Array:
    like = jax.ShapeDtypeStruct(form.shape(kind), first.dtype)
    ones, before = (1, 1, 1), tuple(pad[0] for pad in form.padding)
    if kind == "kernel":
        call = jax.ffi.ffi_call(_CORRELATE, like)
        return call(first, second, strides=_integers(form.strides), padding=_integers(before))
    # The gradient of an image is a convolution of the result's, its pixels `strides` apart.
    turned = kind == "image"
    if turned:
        before = tuple(tap - 1 - pad for tap, pad in zip(form.kernel, before, strict=False))
    return jax.ffi.ffi_call(_CONVOLVE, like)(
        first,
        second,
        strides=_integers(ones if turned else form.strides),
        padding=_integers(before),
        dilation=_integers(form.strides if turned else ones),
        transposed=turned,
    )


def _on_cpu(ctx: Any, *operands: Any, form: Form, kind: str) -> Any:
    context = ctx.module_context
    devices = getattr(context.axis_context, "num_devices", None)
    alone = devices == 1 and not context.lowering_parameters.for_export
    run = _by_call if alone else _by_xla
    return mlir.lower_fun(run, multiple_results=False)(ctx, *operands, form=form, kind=kind)


def _abstract(first: Any, second: Any, *, form: Form, kind: str) -> Any:
    return ShapedArray(form.shape(kind), first.dtype)


def _pulled(place: int, g: Array, first: Any, second: Any, *, form: Form, kind: str) -> Array:
    """The cotangent of one operand: what its name makes of the other and of the result's."""
    names = _OTHERS[kind]
    known = {kind: g, names[1 - place]: (first, second)[1 - place]}
    made = names[place]
    return _bind(*(known[name] for name in _OTHERS[made]), form, made)


def _batched(operands: Any, axes: Any, *, form: Form, kind: str) -> tuple[Array, int]:
    first, second = operands
    if kind == "kernel" or axes[1] is not None:
        run = functools.partial(_by_xla, form=form, kind=kind)
        return jax.vmap(run, axes)(first, second), 0
    first = jnp.moveaxis(first, axes[0], 0)
    size, batch = first.shape[:2]
    larger = dataclasses.replace(
        form,
        image=(size * batch, *form.image[1:]),
        result=(size * batch, *form.result[1:]),
    )
    made = _bind(first.reshape(size * batch, *first.shape[2:]), second, larger, kind)
    return made.reshape(size, *form.shape(kind)), 0


convolution_p.def_impl(lambda first, second, *, form, kind: _bind(first, second, form, kind))
convolution_p.def_abstract_eval(_abstract)
ad.defbilinear(convolution_p, functools.partial(_pulled, 0), functools.partial(_pulled, 1))
batching.primitive_batchers[convolution_p] = _batched
mlir.register_lowering(convolution_p, mlir.lower_fun(_by_xla, multiple_results=False))
mlir.register_lowering(convolution_p, _on_cpu, platform="cpu")

# A program that was compiled in another process is not traced here: its calls must be known.
with contextlib.suppress(OSError, RuntimeError):
    if build.library_of("bfloat16") is not None:
        available()
