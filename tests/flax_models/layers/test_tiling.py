"""Large images through the autoencoder in tiles: diffusers' result, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conceptax.converters import load_pytorch
from conceptax.flax_models.layers.tiling import tiled, tiled_in_time


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

    received = tiled(double, images, tile=8, output=16)
    np.testing.assert_allclose(received, double(images), atol=1e-6)
    with pytest.raises(ValueError, match="at least 2 pixels"):
        tiled(double, images, tile=1, output=2)


def test_videos_are_cut_in_time_and_space_as_diffusers_cuts_them(torch, tmp_path, monkeypatch):
    """Of 6 latent frames pieces at 0 and 3, of 6 columns tiles at 0 and 3."""
    import oracles

    theirs = oracles.autoencoder_hunyuan_video(mid_block_add_attention=False).module
    theirs.save_pretrained(tmp_path)
    ours = load_pytorch(tmp_path)
    monkeypatch.setattr(type(ours.config), "tile_size", 32)
    theirs.enable_tiling(32, 32, None, 24, 24)
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(2, 6, 3, 6, 4)).astype(np.float32)
    videos = rng.normal(size=(1, 5, 24, 48, 3)).astype(np.float32)
    with torch.no_grad():
        decoded = theirs.decode(torch.from_numpy(latents).permute(0, 4, 1, 2, 3)).sample
        posterior = theirs.encode(torch.from_numpy(videos).permute(0, 4, 1, 2, 3)).latent_dist
    with jax.default_matmul_precision("highest"):
        received = jax.jit(lambda x: ours.decode(x, tiling=True))(latents)
        mean, logvar = jax.jit(lambda x: ours.encode(x, tiling=True))(videos)
    assert received.shape[1] == ours.config.frames_of(6) == 21
    for one, other in ((received, decoded), (mean, posterior.mean), (logvar, posterior.logvar)):
        np.testing.assert_allclose(one, other.permute(0, 2, 3, 4, 1), atol=5e-5)


def test_memory_of_long_videos_is_that_of_a_piece():
    def temporary(frames):
        def run(x):
            wide = jnp.sin(jnp.repeat(x, 64, axis=-1))
            return jnp.cumsum(wide, axis=1).reshape(*x.shape, 64).sum(-1)

        cut = {"tile": 5, "stride": 3, "kept": 3, "overlap": 1}
        video = jax.ShapeDtypeStruct((1, frames, 16, 16, 3), jnp.float32)
        compiled = jax.jit(lambda x: tiled_in_time(run, x, **cut)).lower(video).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(62) < 1.5 * temporary(11)


@pytest.mark.parametrize("frames", [5, 6, 7, 8, 12])
def test_pieces_in_time_that_agree_are_the_whole(frames):
    video = jax.random.normal(jax.random.key(0), (2, frames, 2, 3, 1))
    received = tiled_in_time(lambda x: 2 * x, video, tile=5, stride=3, kept=3, overlap=1)
    np.testing.assert_allclose(received[:, :frames], 2 * video, atol=1e-6)
