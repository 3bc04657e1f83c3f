"""Dense attention where a program is lowered for CUDA; its values are tested with the models."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conceptax.kernels import attention
from conceptax.kernels.attention import dot_product_attention, frame_causal_attention
from conceptax.kernels.gna import cudnn as by_cudnn

FORWARD, BACKWARD = "custom_call @__cudnn$fmhaSoftmax(", "custom_call @__cudnn$fmhaSoftmaxBackward("
FLUX_4K = (1, 256**2 + 512, 24, 128)


@pytest.fixture
def cudnn(monkeypatch):
    """As if cuDNN were installed: its version is all that jax asks of it before a program runs."""
    from jax._src.cudnn import fused_attention_stablehlo

    takes = by_cudnn.takes
    takes.cache_clear()
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    yield
    takes.cache_clear()


def gradient(**options):
    def loss(*operands):
        return dot_product_attention(*operands, **options).astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1, 2))


def text_of(function, *operands, platform="cuda"):
    return jax.jit(function).trace(*operands).lower(lowering_platforms=(platform,)).as_text()


def of(shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def largest_gib(text):
    shapes = re.findall(r"tensor<((?:\d+x)+)(?:f32|bf16|f16|i1)>", text)
    return 4 * max(math.prod(map(int, shape[:-1].split("x"))) for shape in shapes) / 2**30


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "scale": 0.25}])
def test_large_attention_of_16_bits_is_cudnns(dtype, options, cudnn):
    operands = (of(FLUX_4K, dtype),) * 3
    forward = text_of(functools.partial(dot_product_attention, **options), *operands)
    both = text_of(gradient(**options), *operands)
    assert FORWARD in forward and BACKWARD not in forward
    assert both.count(FORWARD) == both.count(BACKWARD) == 1
    for text in (forward, both):
        kind = "CAUSAL" if options else "NO_MASK"
        scale = options.get("scale", 128**-0.5)
        assert f"mask_type\\22: \\22{kind}\\22" in text and f"fmha_scale\\22: {scale}," in text
        assert largest_gib(text) < 1  # logits of everything are 390


def test_other_numbers_of_keys_are_cudnns(cudnn):
    query, keys = of((2, 4096, 8, 40)), of((2, 512, 8, 40))
    text = text_of(gradient(), query, keys, keys)
    assert FORWARD in text and BACKWARD in text


@pytest.mark.parametrize("axes", [(0, 0, 0), (2, None, 1), (None, 0, None)])
@pytest.mark.parametrize("inside", [True, False])
def test_mapped_axes_become_part_of_the_batch(axes, inside, cudnn):
    shape = (2, 1024, 2, 64)
    operands = [of(shape if n is None else (*shape[:n], 3, *shape[n:])) for n in axes]
    if inside:
        function = jax.grad(
            lambda *each: jax.vmap(dot_product_attention, axes)(*each).astype(jnp.float32).sum(),
            argnums=(0, 1, 2),
        )
    else:
        function = jax.vmap(gradient(), axes)
    text = text_of(function, *operands)
    assert "tensor<6x1024x2x64xbf16>" in text and FORWARD in text and BACKWARD in text


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (FLUX_4K, jnp.float32),
        ((1, 66_048, 24, 12), jnp.bfloat16),
        ((1, 66_048, 24, 512), jnp.bfloat16),
        ((1, 66_047, 24, 128), jnp.bfloat16),
    ],
    ids=["float32", "a head of 12", "a head of 512", "an odd length"],
)
def test_what_cudnn_does_not_take_is_never_in_memory_at_once(shape, dtype, cudnn):
    text = text_of(gradient(), *(of(shape, dtype),) * 3)
    assert "cudnn" not in text
    assert largest_gib(text) < 4  # the operands of the widest are 3, logits of everything 390


def test_masked_attention_is_never_in_memory_at_once(cudnn):
    def function(query, key, value, mask):
        return gradient(mask=mask, is_causal=True)(query, key, value)

    text = text_of(function, *(of(FLUX_4K),) * 3, of((1, 1, 1, FLUX_4K[1]), jnp.bool_))
    assert "cudnn" not in text
    assert largest_gib(text) < 1


def test_without_cudnn_there_is_another_way(cudnn, monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    def missing():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", missing)
    text = text_of(gradient(), *(of(FLUX_4K),) * 3)
    assert "cudnn" not in text
    assert largest_gib(text) < 1


@pytest.mark.parametrize("keys", [64, 32], ids=["self", "cross"])
def test_a_cpus_program_is_the_same_with_and_without_cudnn(keys, cudnn, monkeypatch):
    monkeypatch.setattr(attention, "_MANY_LOGITS", 1 << 12)
    random = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, 64, 2, 8), (2, keys, 2, 8), (2, keys, 2, 8))
    operands = [jax.random.normal(*each, jnp.bfloat16) for each in zip(random, shapes, strict=True)]
    assert FORWARD in text_of(gradient(), *operands)

    def compiled():
        jax.clear_caches()
        program = jax.jit(gradient()).lower(*operands).compile()
        body = re.sub(r", metadata=\{[^}]*\}", "", program.as_text().split("\n\nFileNames")[0])
        return body, jax.device_get(program(*operands))

    program, gradients = compiled()
    monkeypatch.setattr(by_cudnn, "takes", lambda *_: False)
    before, expected = compiled()
    assert "cudnn" not in program and program == before
    for one, other in zip(gradients, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_chunks_are_exported_with_any_batch():
    (batch,) = jax.export.symbolic_shape("batch")
    query, keys = of((batch, 4099, 1, 8)), of((batch, 4096, 1, 8))
    exported = jax.export.export(jax.jit(dot_product_attention), platforms=("cpu", "cuda"))
    text = exported(query, keys, keys).mlir_module()
    assert "1x256x4096xf32>" in text and "4099x4096xf32>" not in text


@pytest.mark.parametrize("many", [1, 1 << 30])
def test_frames_attend_to_themselves_and_earlier_ones(many, monkeypatch):
    monkeypatch.setattr(attention, "_MANY_LOGITS", many)
    operands = [
        jax.random.normal(key, (2, 3, 5, 2, 4)) for key in jax.random.split(jax.random.key(0), 3)
    ]
    frames = jnp.repeat(jnp.arange(3), 5)
    mask = (frames[None] <= frames[:, None])[None, None]

    def masked(*operands):
        flat = (x.reshape(2, 15, 2, 4) for x in operands)
        return attention._attend(*flat, mask, 0.5).reshape(2, 3, 5, 2, 4)

    def both(function):
        out, pull = jax.vjp(function, *operands)
        return out, *pull(jnp.cos(jnp.arange(float(out.size))).reshape(out.shape))

    received = both(jax.jit(frame_causal_attention))
    for one, other in zip(received, both(masked), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
