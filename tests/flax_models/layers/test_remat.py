"""Activations that are recomputed: told after loading, and the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import conceptax
from conceptax.flax_models.layers.remat import set_remat
from conceptax.reporting.models import load_pipeline


@pytest.fixture(scope="module")
def encoder():
    return conceptax.load(conceptax.bundled_model(), components=["text_encoder"]).text_encoder


def gradients(encoder):
    graphdef, state = nnx.split(encoder)
    ids = jnp.arange(6)[None]

    def loss(state):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, state)(ids).last_hidden_state))

    return jax.jit(jax.grad(loss))(state), str(jax.make_jaxpr(jax.grad(loss))(state))


def test_layers_recompute_when_told_after_loading(encoder):
    kept, kept_program = gradients(encoder)
    copy = nnx.clone(encoder)
    set_remat(copy, True)
    recomputed, program = gradients(copy)
    assert "prevent_cse" not in kept_program and "prevent_cse" in program
    for one, other in zip(jax.tree.leaves(recomputed), jax.tree.leaves(kept), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("remat", "expected"), [("on", True), ("off", False), ("auto", False)])
def test_a_pipeline_recomputes_where_it_is_large_or_told_to(remat, expected):
    pipeline = load_pipeline(conceptax.bundled_model(), "float32", "erasing", remat=remat)
    assert pipeline.text_encoder.encoder.remat is expected
    assert pipeline.unet.down_blocks[0].remat is expected
