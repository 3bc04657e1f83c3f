"""Causal convolutions of videos against those of diffusers' three autoencoders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conceptax.converters.tensors import tensor_specs
from conceptax.flax_models.layers.causal_conv import CausalConv3d

# diffusers' autoencoder, its settings, ours
CASES = {
    "hunyuan": ("hunyuan_video", "HunyuanVideo", (3, 1), {"time": "edge", "space": "edge"}),
    "hunyuan, halving": (
        "hunyuan_video",
        "HunyuanVideo",
        (3, (2, 2, 2)),
        {"strides": 2, "time": "edge", "space": "edge"},
    ),
    "cosmos": (
        "cosmos",
        "Cosmos",
        ((3, 1, 1), 1, (2, 1, 1), 0),
        {"strides": (2, 1, 1), "padding": (1, 0, 0), "time": "edge"},
    ),
    "cosmos, of space": ("cosmos", "Cosmos", ((1, 3, 3), 1, 1, 1), {"time": "edge"}),
    "wan": ("wan", "Wan", (3, 1, 1), {}),
    "wan, of time": ("wan", "Wan", ((3, 1, 1), 1, (1, 0, 0)), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_parity(case, torch):
    import importlib

    from oracles import randomized

    module, name, arguments, options = CASES[case]
    module = importlib.import_module(f"diffusers.models.autoencoders.autoencoder_kl_{module}")
    theirs = randomized(getattr(module, f"{name}CausalConv3d")(4, 5, *arguments), 0)
    ours = CausalConv3d(4, 5, arguments[0], **options, rngs=nnx.Rngs(0))
    stored = {key.removeprefix("conv."): x for key, x in theirs.state_dict().items()}
    for spec in tensor_specs(ours):
        getattr(ours, spec.path[0]).set_value(jnp.asarray(spec.to_nnx(stored[spec.key].numpy())))
    x = np.random.default_rng(0).standard_normal((2, 5, 7, 6, 4), np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x).permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
    with jax.default_matmul_precision("highest"):
        received = jax.jit(lambda x: ours(x))(x)
    np.testing.assert_allclose(received, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "first"), [({}, 1), ({"strides": (2, 1, 1), "padding": (1, 1, 1)}, 2)]
)
def test_a_video_in_pieces_is_the_whole(options, first):
    conv = CausalConv3d(3, 4, 3, **options, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, first + 4, 5, 6, 3))
    whole, last = conv.continued(x)
    before, past = conv.continued(x[:, :first])
    assert past.shape == last.shape  # what a scan carries
    middle, past = conv.continued(x[:, first : first + 2], past)
    after, past = conv.continued(x[:, first + 2 :], past)
    np.testing.assert_allclose(jnp.concatenate([before, middle, after], 1), whole, atol=1e-5)
    np.testing.assert_array_equal(past, last)
    with pytest.raises(ValueError, match=f"continues after {conv.before} frames, received 4"):
        conv(x, x[:, :4])


@pytest.mark.parametrize("factors", [(2, 2, 2), (1, 2, 2), (2, 1, 1)])
def test_a_doubled_video_is_convolved_before_it_is_doubled(factors):
    conv = CausalConv3d(3, 4, 3, time="edge", space="edge", rngs=nnx.Rngs(0))
    conv.bias.set_value(jnp.arange(4.0))
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5, 3))
    doubled = x
    for axis, factor in enumerate(factors, 1):
        doubled = jnp.repeat(doubled, factor, axis=axis)
    expected = conv(doubled[:, factors[0] - 1 :])
    np.testing.assert_allclose(conv.of_doubled(x, factors), expected, atol=1e-5)


@pytest.mark.parametrize(("size", "sides"), [((3, 3, 3), (3, 27, 26)), ((2, 1, 1), (4, 9, 300))])
def test_a_large_video_is_convolved_by_products(size, sides):
    conv = CausalConv3d(16, 5, size, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, *sides, 16))
    graphdef, params = nnx.split(conv)

    def expected(params, x):
        padding = [(each - 1, 0) if i == 0 else (each // 2,) * 2 for i, each in enumerate(size)]
        y = jax.lax.conv_general_dilated(
            x,
            params["kernel"][...],
            (1, 1, 1),
            padding,
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )
        return y + params["bias"][...]

    def both(function):
        out, pull = jax.vjp(function, params, x)
        return jax.tree.leaves((out, pull(jnp.cos(jnp.arange(float(out.size))).reshape(out.shape))))

    call = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))
    if jax.default_backend() == "cpu":
        assert " convolution(" not in call.lower(params, x).compile().as_text()
    for received, wanted in zip(both(call), both(expected), strict=True):
        np.testing.assert_allclose(received, wanted, rtol=1e-5, atol=2e-5 * np.abs(wanted).max())
