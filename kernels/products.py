"""Matrix products in bfloat16, by the instructions that a CPU has for them.

XLA widens a product of bfloat16 to float32 on CPUs, except where float32 is what it shall return:
then its library (YNNPACK) multiplies by AVX512-BF16 or AMX.  Asked so, a product keeps all that
XLA does with one (vmap, sharding, export).
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from .bfloat16 import rows_product
from .gna.platforms import default_platform

_CPU_INFO = Path("/proc/cpuinfo")


@functools.cache
def fast_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 faster than float32.

    Those with AMX do, and AMD's with AVX512-BF16. Of Intel's, which have that without AMX only
    where a virtual machine hides it, it reaches half of float32's speed.
    """
    try:
        text = _CPU_INFO.read_text()
    except OSError:
        return False
    lines: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        lines[name.strip()] = value.strip()
    flags = lines.get("flags", "").split()
    return "amx_bf16" in flags or (
        "avx512_bf16" in flags and lines.get("vendor_id") == "AuthenticAMD"
    )


def fastest_dtype() -> str:
    """The dtype in which models compute fastest where programs run: float32 on most CPUs."""
    return "bfloat16" if default_platform() != "cpu" or fast_bfloat16() else "float32"


def native(*operands: Any) -> bool:
    """Whether a CPU is to multiply these as bfloat16, in programs that are traced here."""
    return (
        all(x.dtype == jnp.bfloat16 for x in operands)
        and default_platform() == "cpu"
        and fast_bfloat16()
    )


def dot_general(
    lhs: Any, rhs: Any, dimension_numbers: Any, precision: lax.PrecisionLike = None, **options: Any
) -> Array:
    """`jax.lax.dot_general`; that of a linear layer, of bfloat16 on a CPU fast at it, not widened.

    A linear layer's is of `[..., K]` and `[K, N]`.  The gradient of its weights is that of
    `kernels.bfloat16`.
    """
    dimensions, batch = dimension_numbers
    of_linear = tuple(map(tuple, dimensions)) == ((lhs.ndim - 1,), (0,)) and not any(batch)
    plain = precision is None and all(option is None for option in options.values())
    if plain and of_linear and lhs.ndim > 1 and rhs.ndim == 2 and native(lhs, rhs):
        return _product(lhs, rhs)
    return lax.dot_general(lhs, rhs, dimension_numbers, precision, **options)


# A primitive, because jax cannot say it: a sum in float32 whose gradient is of bfloat16, on CPUs
# alone, that policies of `layers.remat` keep.  The second operand is [K, N], or [N, K] transposed.
product_p = Primitive("bfloat16_product")


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _product(lhs: Array, rhs: Array, transposed: bool = False) -> Array:
    return product_p.bind(lhs, rhs, transposed=transposed)


def _settings(lhs: Any, transposed: bool) -> Any:
    return (((lhs.ndim - 1,), (int(transposed),)), ((), ()))


def _widened(lhs: Array, rhs: Array, *, transposed: bool) -> Array:
    return lax.dot_general(lhs, rhs, _settings(lhs, transposed))


def _summed_wide(lhs: Array, rhs: Array, *, transposed: bool) -> Array:
    wide = lax.dot_general(lhs, rhs, _settings(lhs, transposed), preferred_element_type=jnp.float32)
    return wide.astype(lhs.dtype)


def _abstract(lhs: Any, rhs: Any, *, transposed: bool) -> Any:
    return lax.dot_general_p.abstract_eval(
        lhs,
        rhs,
        dimension_numbers=_settings(lhs, transposed),
        precision=None,
        preferred_element_type=lhs.dtype,
        out_sharding=None,
    )[0]


def _by_lhs(g: Array, _: Any, rhs: Array, *, transposed: bool) -> Array:
    return _product(g, rhs, not transposed)


def _by_rhs(g: Array, lhs: Array, _: Any, *, transposed: bool) -> Array:
    rows = tuple(range(lhs.ndim - 1))
    pair = (g, lhs) if transposed else (lhs, g)
    made = rows_product(*pair)
    return lax.dot_general(*pair, ((rows, rows), ((), ()))) if made is None else made


def _batched(operands: Any, axes: Any, *, transposed: bool) -> tuple[Array, int]:
    if axes[1] is None:
        return _product(jnp.moveaxis(operands[0], axes[0], 0), operands[1], transposed), 0
    widened = functools.partial(_widened, transposed=transposed)
    return jax.vmap(widened, axes)(*operands), 0


product_p.def_impl(lambda lhs, rhs, transposed: _product(lhs, rhs, transposed))
product_p.def_abstract_eval(_abstract)
ad.defbilinear(product_p, _by_lhs, _by_rhs)
batching.primitive_batchers[product_p] = _batched
mlir.register_lowering(product_p, mlir.lower_fun(_widened, multiple_results=False))
mlir.register_lowering(
    product_p, mlir.lower_fun(_summed_wide, multiple_results=False), platform="cpu"
)
