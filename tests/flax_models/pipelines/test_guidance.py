"""Guidance, with a model whose predictions can be written down."""

import jax.numpy as jnp
import numpy as np

from conceptax.flax_models.pipelines.guidance import classifier_free


def model(x, timestep, condition):
    """x + c + t, and channels behind it that are not the prediction's."""
    return jnp.concatenate([x + condition[:, None] + timestep, 99 + x], axis=-1)


def test_classifier_free_guidance_goes_beyond_the_conditional_prediction():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)
    condition, negative = jnp.asarray([5.0, 7.0]), jnp.asarray(1.0)  # one negative for all
    for scale, expected in ((0.0, [1.0, 1.0]), (1.0, [5.0, 7.0]), (3.0, [13.0, 19.0])):
        predict = classifier_free(model, condition, negative, scale)
        np.testing.assert_allclose(
            predict(x, jnp.asarray(2.0)), x + 2 + jnp.asarray(expected)[:, None], rtol=1e-6
        )


def test_without_a_negative_the_model_is_asked_once():
    asked = []

    def counted(x, timestep, condition):
        asked.append(x.shape)
        return model(x, timestep, condition).astype(jnp.bfloat16)

    predict = classifier_free(counted, jnp.asarray([5.0, 7.0]), None, 7.5)
    found = predict(jnp.ones((2, 3)), jnp.asarray(2.0))
    assert asked == [(2, 3)] and found.dtype == jnp.float32
    np.testing.assert_array_equal(found, [[8.0] * 3, [10.0] * 3])
