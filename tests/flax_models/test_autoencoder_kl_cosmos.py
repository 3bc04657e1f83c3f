"""Cosmos' video autoencoder: wavelets, causality, tiles, statistics, and its errors.

Parity with diffusers is in `test_models.py`.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conceptax.converters import load_pytorch, save_pytorch
from conceptax.converters.tensors import tensor_specs
from conceptax.flax_models.abstract import OneKey
from conceptax.flax_models.autoencoder_kl_cosmos import (
    AutoencoderKLCosmos,
    AutoencoderKLCosmosConfig,
    haar,
    inverse_haar,
)

CONFIG = AutoencoderKLCosmosConfig(
    latent_channels=4,
    encoder_block_out_channels=(8, 8, 8, 8),
    decode_block_out_channels=(8, 8, 8, 8),
    num_layers=1,
    latents_mean=tuple(np.linspace(-0.2, 0.3, 12)),
    latents_std=tuple(np.linspace(0.5, 0.9, 12)),
)


def normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(len(shape)), shape)


@pytest.fixture(scope="module")
def model():
    return AutoencoderKLCosmos(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def encode(model):
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state).encode(x))
    return lambda x: run(state, x)


def test_wavelets_are_diffusers_and_come_back(torch):
    from diffusers.models.autoencoders.autoencoder_kl_cosmos import CosmosPatchEmbed3d

    video = normal(1, 4, 4, 8, 3)
    theirs = CosmosPatchEmbed3d(4, "haar")(torch.tensor(np.asarray(video[:, 3:])).movedim(-1, 1))
    ours = haar(haar(video.at[:, :3].set(video[:, 3:])))
    np.testing.assert_allclose(ours, theirs.movedim(1, -1), atol=1e-6)
    np.testing.assert_allclose(inverse_haar(inverse_haar(haar(haar(video)))), video, atol=1e-6)


def test_latents_follow_from_earlier_frames_alone(encode):
    video = normal(1, 9, 16, 24, 3)
    later = video.at[:, 1:].set(0)
    (one, spread), (other, _) = encode(video), encode(later)
    assert one.shape == spread.shape == (1, 2, 2, 3, 4) and float(spread.max()) == -30
    np.testing.assert_array_equal(one[:, 0], other[:, 0])
    assert jnp.abs(one[:, 1] - other[:, 1]).max() > 1e-3


def test_scaling_knows_each_frame_and_channel(model):
    latents = normal(2, 2, 3, 2, 4)
    scaled = model.scale(latents)
    mean, deviation = CONFIG.latents_mean[2 * 3 + 1], CONFIG.latents_std[2 * 3 + 1]
    np.testing.assert_allclose(scaled[:, 1, ..., 2], (latents[:, 1, ..., 2] - mean) / deviation)
    np.testing.assert_allclose(model.unscale(scaled), latents, atol=1e-6)
    with pytest.raises(ValueError, match="statistics of 3 latent frames, 17 frames of a video"):
        model.scale(normal(1, 4, 1, 1, 4))


def test_published_statistics_are_diffusers(torch):
    import diffusers

    theirs = inspect.signature(diffusers.AutoencoderKLCosmos.__init__).parameters
    config = AutoencoderKLCosmosConfig()
    for name in ("latents_mean", "latents_std"):
        assert getattr(config, name) == tuple(theirs[name].default)


def test_tiles_cover_a_large_video_and_change_no_small_one(model, monkeypatch):
    monkeypatch.setattr("conceptax.flax_models.autoencoder_kl_cosmos._TILE", 32)
    graphdef, state = nnx.split(model)
    latents = normal(2, 2, 5, 3, 4)

    def run(latents, tiling):
        return jax.jit(lambda s, x: nnx.merge(graphdef, s).decode(x, tiling=tiling))(state, latents)

    tiles, small = run(latents, True), run(latents[:, :, :4], True)
    assert tiles.shape == (2, 9, 40, 24, 3)
    np.testing.assert_allclose(small, run(latents[:, :, :4], False), atol=1e-5)
    # Before the first tile's end fades into the second.
    np.testing.assert_allclose(tiles[:, :, :24], small[:, :, :24], atol=1e-5)
    video = jnp.zeros((1, 9, 40, 24, 3))
    mean, _ = jax.eval_shape(lambda x: model.encode(x, tiling=True), video)
    assert mean.shape == (1, 2, 5, 3, 4)


def test_files_round_trip(model, tmp_path, torch):
    import diffusers

    folder = save_pytorch(model, tmp_path / "ours")
    theirs, info = diffusers.AutoencoderKLCosmos.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_pytorch(tmp_path / "theirs")
    assert again.config == CONFIG
    name = "diffusion_pytorch_model.safetensors"
    written = save_pytorch(again, tmp_path / "again") / name
    assert written.read_bytes() == (folder / name).read_bytes()


def test_the_published_size_has_diffusers_keys_and_shapes(torch):
    import diffusers

    config, rngs = AutoencoderKLCosmosConfig(), OneKey()
    ours = nnx.eval_shape(lambda: AutoencoderKLCosmos(config, rngs=rngs))
    original = diffusers.AutoencoderKLCosmos
    with torch.device("meta"):  # not the import, which makes wavelets for all that come after
        theirs = original(**config.to_dict())
    expected = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert {spec.key: spec.shape for spec in tensor_specs(ours)} == expected
    assert sum(int(np.prod(shape)) for shape in expected.values()) == 105_653_696


@pytest.mark.slow
def test_the_published_size_on_a_short_clip(torch, tmp_path):
    import diffusers

    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLCosmos().eval()
    theirs.save_pretrained(tmp_path)
    video = np.random.default_rng(0).uniform(-1, 1, (1, 9, 64, 96, 3)).astype(np.float32)
    with torch.no_grad():
        latents = theirs.encode(torch.tensor(video).permute(0, 4, 1, 2, 3)).latent_dist.mode()
        decoded = theirs.decode(latents).sample
    expected = [x.permute(0, 2, 3, 4, 1).numpy() for x in (latents, decoded)]
    model = load_pytorch(tmp_path)
    assert model.config == AutoencoderKLCosmosConfig()
    with jax.default_matmul_precision("highest"):
        received = jax.jit(model.encode)(video)[0], jax.jit(model.decode)(expected[0])
    for ours, wanted in zip(received, expected, strict=True):
        assert np.linalg.norm(ours - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_inputs_and_settings_that_do_not_fit(model):
    for shape in ((1, 8, 16, 16, 3), (1, 9, 16, 12, 3), (1, 9, 16, 16, 4)):
        with pytest.raises(ValueError, match=r"one frame more than a multiple of 8, whose sides"):
            model.encode(jnp.zeros(shape))
    with pytest.raises(ValueError, match=r"decodes \[B, T, h, w, 4\] latents, received"):
        model.decode(jnp.zeros((1, 2, 2, 2, 3)))
    for settings, message in (
        ({"patch_type": "rearrange"}, r"patch_type='rearrange' \(supported: 'haar'\)"),
        ({"patch_size": 3}, "patch_size must be a power of two, received 3"),
        ({"spatial_compression_ratio": 2}, "at least the 4 of patch_size"),
        ({"latents_mean": [0.0] * 15}, "for each of 16 channels, received 15"),
        ({"latents_mean": None}, "equally many numbers, or both none"),
        ({"encoder_block_out_channels": [8]}, "takes at least two"),
    ):
        with pytest.raises(ValueError, match=message):
            AutoencoderKLCosmosConfig.from_dict(settings)
