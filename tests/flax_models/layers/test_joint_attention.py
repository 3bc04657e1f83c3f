"""Joint attention and rotary positions, by their definitions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gna_oracle import full_mask

from conceptax.flax_models.layers.attention import GNA
from conceptax.flax_models.layers.joint_attention import (
    JointAttention,
    JointSequence,
    proportional_scale,
    within_half,
)
from conceptax.flax_models.layers.rotary import Rotary, concatenate, rotary_table, rotate_pairs

GRID, TEXT, HEADS, DIM = (3, 4), 5, 2, 8
WINDOW, STRIDE = (2, 3), (2, 1)


def joint_mask(text, text_first):
    """[text; image] or [image; text]: what each query sees."""
    case = {"layout": GRID, "kernel_size": WINDOW, "stride": STRIDE, "dilation": (1, 1)}
    mask = full_mask(case | {"is_causal": (False, False)})
    padding = (text, 0) if text_first else (0, text)
    return np.pad(mask, padding, constant_values=True)


@pytest.mark.parametrize("text", [TEXT, 0])
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
def test_image_queries_see_their_window_and_the_text(sparse, text_first, text):
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 2, 12 + text, HEADS, DIM), np.float32)
    mask = joint_mask(text, text_first) if sparse else True
    logits = np.einsum("bqhd,bkhd->bhqk", query, key, dtype=np.float64) * 0.7
    weights = np.exp(np.where(mask, logits, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, value)
    sequence = JointSequence(GRID, text_first=text_first, scale=0.7)
    neighborhood = GNA(window=WINDOW, stride=STRIDE) if sparse else None
    with jax.default_matmul_precision("highest"):
        received = sequence.attend(*map(jnp.asarray, (query, key, value)), neighborhood)
    np.testing.assert_allclose(received, expected, atol=2e-6)
    image, words = sequence.split(received)
    assert (image.shape[1], words.shape[1]) == (12, text)
    np.testing.assert_array_equal(sequence.join(image, words), received)


def test_rotary_is_diffusers(torch):
    from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed

    rng = np.random.default_rng(0)
    rows, columns = np.arange(3) + 400, np.arange(4)
    table = rotary_table((rows[:, None], columns[None]), (4, 6), 2000.0)
    positions = [np.repeat(rows, 4), np.tile(columns, 3)]
    tables = [
        get_1d_rotary_pos_embed(
            dim,
            torch.tensor(place, dtype=torch.float32),
            theta=2000.0,
            use_real=True,
            freqs_dtype=torch.float64,
        )
        for dim, place in zip((4, 6), positions, strict=True)
    ]
    cos, sin = (torch.cat(parts, -1) for parts in zip(*tables, strict=True))
    np.testing.assert_array_equal(table.cos, cos.numpy()[:, ::2])
    np.testing.assert_array_equal(table.sin, sin.numpy()[:, ::2])
    x = rng.standard_normal((2, 12, 3, 10), np.float32)
    expected = apply_rotary_emb(torch.from_numpy(x), (cos, sin), sequence_dim=1)
    np.testing.assert_allclose(rotate_pairs(jnp.asarray(x), table), expected, atol=5e-7)
    assert rotate_pairs(jnp.asarray(x, jnp.bfloat16), table).dtype == jnp.bfloat16
    joined = concatenate(rotary_table((np.zeros(2),) * 2, (4, 6), 2000.0), table)
    assert isinstance(joined, Rotary) and joined.cos.shape == (14, 5)
    np.testing.assert_array_equal(joined.cos[:2], 1)
    np.testing.assert_array_equal(joined.sin[2:], table.sin)


def test_scales():
    assert proportional_scale(None, 100, 8) is None
    assert proportional_scale(0.25, 100, 8) == 0.25
    assert proportional_scale("proportional", 4608, 128) == pytest.approx(128**-0.5)
    at_4k = proportional_scale("proportional", 66_048, 128)
    assert at_4k == pytest.approx(1.147 * 128**-0.5, rel=1e-3)  # URAE
    for wrong in ("large", 0, -1.0):
        with pytest.raises(ValueError, match=r"attention_scale takes a positive number.*received"):
            proportional_scale(wrong, 100, 8)


def test_projections_that_a_model_lacks():
    """Stable Diffusion 3: no norms of queries and keys; its last text is not projected."""
    init = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    attention = JointAttention(16, 2, None, qk_norm=False, text_output=False, **init)
    names = {str(path[0]) for path in nnx.to_flat_state(nnx.state(attention)).paths}
    assert names == {"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out"}
    image, text = jnp.ones((1, 12, 16)), jnp.ones((1, TEXT, 16))
    seen, _ = attention(image, text, JointSequence(GRID, text_first=False))
    assert seen.shape == image.shape


def test_overflow_is_cut_in_float16_alone():
    x = jnp.asarray([[[jnp.inf, -jnp.inf, 1.0]]])
    np.testing.assert_array_equal(within_half(x.astype(jnp.float16)), [[[65504, -65504, 1]]])
    np.testing.assert_array_equal(within_half(x), x)
