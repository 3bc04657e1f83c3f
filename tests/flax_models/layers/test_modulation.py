"""Adaptive layer norms against diffusers' classes of the same names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import conceptax.flax_models.layers.modulation as modulation

INIT = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}


@pytest.mark.parametrize("on_grid", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "AdaLayerNormZero",
        "SD35AdaLayerNormZeroX",
        "AdaLayerNormZeroSingle",
        "AdaLayerNormContinuous",
    ],
)
def test_parity(name, on_grid, torch):
    from diffusers.models import normalization
    from oracles import randomized

    continuous = name == "AdaLayerNormContinuous"
    options = {"elementwise_affine": False, "eps": 1e-6} if continuous else {}
    theirs = getattr(normalization, name)(*(8,) * (1 + continuous), **options)
    randomized(theirs, 0)
    ours = getattr(modulation, name)(8, **INIT)
    assert not ours.linear.kernel[...].any()  # a new layer is an identity
    ours.linear.kernel.set_value(jnp.asarray(theirs.linear.weight.detach().numpy().T))
    ours.linear.bias.set_value(jnp.asarray(theirs.linear.bias.detach().numpy()))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 6, 8), np.float32)
    condition = rng.standard_normal((2, 8), np.float32)
    given = [torch.from_numpy(x), torch.from_numpy(condition)]
    expected = theirs(*given) if continuous or "Single" in name else theirs(given[0], emb=given[1])
    tokens = x.reshape(2, 2, 3, 8) if on_grid else x
    received = jax.tree.leaves(ours(jnp.asarray(tokens), jnp.asarray(condition)))
    expected = [expected] if continuous else expected
    for one, other in zip(received, expected, strict=True):
        other = other.detach().numpy()
        if one.ndim == 4:
            other = other.reshape(tokens.shape)
        np.testing.assert_allclose(one, other, atol=2e-6)
