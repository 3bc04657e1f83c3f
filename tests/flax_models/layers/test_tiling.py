"""Large images through the autoencoder in tiles: diffusers' result, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conceptax.converters import load_pytorch
from conceptax.flax_models.layers.tiling import tiled


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    pytest.importorskip("diffusers")
    import oracles

    folder = tmp_path_factory.mktemp("vae")
    module = oracles.autoencoder(sample_size=8).module
    module.save_pretrained(folder)
    return module, load_pytorch(folder)


def test_tiles_are_those_of_diffusers(torch, models):
    theirs, ours = models
    rng = np.random.default_rng(0)
    # Tiles of 4 latents at 0, 3 and 6 of 7 rows, and at 0 and 3 of 5 columns.
    latents = rng.normal(size=(2, 7, 5, 4)).astype(np.float32)
    images = rng.normal(size=(1, 14, 10, 3)).astype(np.float32)
    theirs.enable_tiling()
    try:
        with torch.no_grad():
            decoded = theirs.decode(torch.from_numpy(latents).permute(0, 3, 1, 2)).sample
            posterior = theirs.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist
    finally:
        theirs.disable_tiling()
    with jax.default_matmul_precision("highest"):
        received = jax.jit(lambda x: ours.decode(x, tiling=True))(latents)
        mean, logvar = jax.jit(lambda x: ours.encode(x, tiling=True))(images)
    for one, other in ((received, decoded), (mean, posterior.mean), (logvar, posterior.logvar)):
        np.testing.assert_allclose(one, other.permute(0, 2, 3, 1), atol=2e-5)
    assert np.abs(received - ours.decode(jnp.asarray(latents))).max() > 1e-3  # it is another image
    small = jnp.asarray(latents[:, :4, :4])
    np.testing.assert_allclose(ours.decode(small, tiling=True), ours.decode(small), atol=1e-5)


def test_memory_is_that_of_a_tile(models):
    _, ours = models

    def temporary(tiling, batch):
        latents = jax.ShapeDtypeStruct((batch, 24, 24, 4), jnp.float32)
        compiled = jax.jit(lambda x: ours.decode(x, tiling=tiling)).lower(latents).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, pieces, two = temporary(False, 1), temporary(True, 1), temporary(True, 2)
    assert pieces < whole / 2, (pieces, whole)
    assert two < 1.5 * pieces, (two, pieces)


def test_blending_keeps_what_tiles_agree_on():
    """A function of each pixel alone gives the same in tiles, whatever their number."""
    images = jax.random.normal(jax.random.key(0), (2, 11, 9, 3))

    def double(x):
        return 2 * jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)

    received = tiled(double, images, tile=8, stride=6, output=16, kept=12)
    np.testing.assert_allclose(received, double(images), atol=1e-6)
    with pytest.raises(ValueError, match="at least 2 pixels"):
        tiled(double, images, tile=1, stride=1, output=2, kept=2)
