"""Wan's autoencoders piece by piece, in one pass and in tiles, their sizes, and their errors.

Parity of the whole with diffusers is in `test_models.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

from conceptax.converters import load_pytorch
from conceptax.converters.tensors import tensor_specs
from conceptax.flax_models import autoencoder_kl_wan
from conceptax.flax_models.abstract import OneKey
from conceptax.flax_models.autoencoder_kl_wan import AutoencoderKLWan, AutoencoderKLWanConfig


@pytest.fixture(scope="module", params=["2.1", "2.2"])
def both(request, tmp_path_factory, torch):
    """diffusers' model and ours."""
    changes = oracles.WAN_2_2_AUTOENCODER if request.param == "2.2" else {}
    module = oracles.autoencoder_wan(**changes).module
    folder = tmp_path_factory.mktemp(request.param)
    module.save_pretrained(folder)
    return module, load_pytorch(folder)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def run(model, method, x, **options):
    with jax.default_matmul_precision("highest"):
        call = jax.jit(lambda x: getattr(model, method)(x, **options))
        return [np.asarray(each) for each in jax.tree.leaves(call(x))]


def assert_close(received, expected):
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(np.abs(other).max()), rtol=0)


def test_pieces_are_one_pass(both):
    model = both[1]
    side = 2 * model.config.downsampling
    video = normal(2, 7, side, side + model.config.downsampling, 3)
    moments = run(model, "encode", video)
    assert moments[0].shape == (2, 4, 2, 3, 4)
    assert_close(run(model, "encode", video, in_one_pass=True), moments)
    assert_close(run(model, "encode", video[:, :1]), [each[:, :1] for each in moments])
    decoded = run(model, "decode", moments[0])
    assert decoded[0].shape == video.shape and model.config.frames_of(4) == 7
    assert_close(run(model, "decode", moments[0], in_one_pass=True), decoded)
    assert_close(run(model, "decode", moments[0][:, :1]), [decoded[0][:, :1]])


def test_tiles_are_diffusers(both, torch, monkeypatch):
    """Of 32 pixels, which overlap by a quarter."""
    module, model = both
    monkeypatch.setattr(autoencoder_kl_wan, "_TILE", 32)
    monkeypatch.setattr(module, "use_tiling", False)
    patch, factor = model.config.patch_size or 1, model.config.downsampling
    module.enable_tiling(32, 32, 24, 24)
    video = normal(1, 5, 32 * patch + factor, 16 * factor, 3)
    latents = normal(1, 3, 32 // factor + 1, 16, 4)
    options = {"tiling": True, "in_one_pass": True}
    with torch.no_grad():
        posterior = module.encode(torch.tensor(video).permute(0, 4, 1, 2, 3)).latent_dist
        decoded = module.decode(torch.tensor(latents).permute(0, 4, 1, 2, 3)).sample
    expected = [x.permute(0, 2, 3, 4, 1).numpy() for x in (posterior.mean, posterior.logvar)]
    assert_close(run(model, "encode", video, **options), expected)
    expected = [decoded.permute(0, 2, 3, 4, 1).numpy()]
    assert_close(run(model, "decode", latents, **options), expected)
    (whole,) = run(model, "decode", latents, in_one_pass=True)
    assert np.abs(whole - expected[0]).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "parameters", "keys"),
    [("wan_2_1", 126_892_531, 194), ("wan_2_2", 704_688_668, 196)],
)
def test_published_sizes_have_diffusers_keys_and_shapes(name, parameters, keys, torch):
    import diffusers

    config, rngs = getattr(AutoencoderKLWanConfig, name)(), OneKey()
    ours = nnx.eval_shape(lambda: AutoencoderKLWan(config, rngs=rngs))
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLWan(**config.to_dict())
    expected = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert {spec.key: spec.shape for spec in tensor_specs(ours)} == expected
    assert len(expected) == keys
    assert sum(int(np.prod(shape)) for shape in expected.values()) == parameters


def test_inputs_that_do_not_fit(both):
    model = both[1]
    side = 2 * model.config.downsampling
    for shape in ((1, 6, side, side, 3), (1, 5, side + 1, side, 3), (1, 5, side, side, 4)):
        with pytest.raises(ValueError, match=r"1 \+ a multiple of 2 frames, whose sides are mult"):
            model.encode(jnp.zeros(shape))
    with pytest.raises(ValueError, match=r"decodes \[B, T, h, w, 4\] latents, received"):
        model.decode(jnp.zeros((1, 2, 2, 2, 3)))
