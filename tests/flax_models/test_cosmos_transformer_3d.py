"""Cosmos' transformer with neighborhood attention, its files, and its errors.

Parity of the dense model with diffusers is in `test_models.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gna_oracle import dense_under, full_mask

from conceptax.converters import load_pytorch, save_pytorch
from conceptax.converters.tensors import tensor_specs
from conceptax.flax_models.abstract import OneKey
from conceptax.flax_models.cosmos_transformer_3d import (
    CosmosCondition,
    CosmosTransformer3DConfig,
    CosmosTransformer3DModel,
    rotary_of,
)
from conceptax.flax_models.layers.attention import GNA

GRID = (4, 4, 6)  # of tokens
WINDOWS = ({"window": (2, 2, 3), "stride": (2, 2, 1)}, {"window": (3, 2, 3), "dilation": (1, 2, 1)})
SPARSE = tuple(GNA(**each) for each in WINDOWS)
CONFIG = CosmosTransformer3DConfig(
    in_channels=5,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    text_embed_dim=10,
    adaln_lora_dim=4,
    max_size=(4, 12, 12),
)


def graph(attention=None, **options):
    make = lambda: CosmosTransformer3DModel(  # noqa: E731
        CONFIG, attention=attention, **options, rngs=nnx.Rngs(0)
    )
    return nnx.split(nnx.eval_shape(make))[0]


@pytest.fixture(scope="module")
def params():
    """None of them zero."""
    model = CosmosTransformer3DModel(CONFIG, rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(nnx.state(model)))
    rng = np.random.default_rng(0)
    values = [leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, values)


def _inputs():
    rng = np.random.default_rng(1)
    latents, states = (
        jnp.asarray(rng.standard_normal(shape, np.float32))
        for shape in ((2, 4, 8, 12, 4), (2, 3, 10))
    )
    mask = jnp.array([[True, False, False, False]] * 2)
    return latents, CosmosCondition(states, jnp.array([24.0, 30.0]), mask)


LATENTS, CONDITION = _inputs()


def run(params, attention=None, times=(0.3, -1.0), **options):
    """Output, and gradients of latents and text states, under jit."""
    graphdef = graph(attention, **options)

    @jax.jit
    def both(params, latents, states):
        def loss(latents, states):
            condition = CONDITION._replace(states=states)
            output = nnx.merge(graphdef, params)(latents, jnp.asarray(times), condition)
            return jnp.sum(jnp.sin(output)), output

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(latents, states)

    with jax.default_matmul_precision("highest"):
        (_, output), gradients = both(params, LATENTS, CONDITION.states)
    return output, *gradients


@pytest.fixture(scope="module")
def dense(params):
    return run(params)


@pytest.fixture(scope="module")
def sparse(params):
    return run(params, SPARSE)


def assert_close(received, expected):
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * float(jnp.abs(other).max()), rtol=0)


def test_a_window_of_the_whole_grid_is_dense(params, dense):
    assert_close(run(params, GNA(window=GRID, stride=2), remat=True), dense)


def test_each_block_sees_its_neighborhoods_and_the_text(params, sparse, dense, monkeypatch):
    """The dense model under explicit masks of the video's tokens is the sparse one."""
    ones = (1, 1, 1)
    masks = iter(
        full_mask(
            {
                "layout": GRID,
                "kernel_size": each["window"],
                "stride": each.get("stride", ones),
                "dilation": each.get("dilation", ones),
                "is_causal": (False,) * 3,
            }
        )
        for each in WINDOWS
    )

    monkeypatch.setattr(
        "conceptax.flax_models.layers.joint_attention.dot_product_attention", dense_under(masks)
    )
    assert_close(run(params), sparse)
    assert next(masks, None) is None
    assert float(jnp.abs(sparse[0] - dense[0]).max()) > 1e-3


def test_timesteps_alike_in_all_frames_are_one(params, dense):
    assert_close(run(params, times=[[0.3] * 4, [-1.0] * 4]), dense)


def test_files_go_to_diffusers_and_back(params, tmp_path, torch):
    import diffusers
    from safetensors.torch import load_file

    folder = save_pytorch(nnx.merge(graph(), params), tmp_path / "dense")
    kind = diffusers.CosmosTransformer3DModel
    theirs = kind.from_config(kind.load_config(folder))
    theirs.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_pytorch(tmp_path / "theirs", attention=SPARSE, remat=True)
    assert model.config == CONFIG and model.remat
    assert tuple(block.attn1.neighborhood for block in model.transformer_blocks) == SPARSE
    again = save_pytorch(model, tmp_path / "again")
    name = "diffusion_pytorch_model.safetensors"
    assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_nvidias_epsilon_is_written_and_read(params, tmp_path):
    config = dataclasses.replace(CONFIG, qk_norm_eps=1e-6)
    assert "qk_norm_eps" not in CONFIG.to_dict() and config.to_dict()["qk_norm_eps"] == 1e-6
    folder = save_pytorch(CosmosTransformer3DModel(config, rngs=nnx.Rngs(0)), tmp_path / "model")
    assert load_pytorch(folder).transformer_blocks[1].attn2.norm_k.epsilon == 1e-6


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("video_to_world_7b", 7_236_208_640),
        ("text_to_world_14b", 14_267_149_312),
        ("predict2_2b_video_to_world", 1_956_413_440),
    ],
)
def test_published_sizes_have_diffusers_keys_and_shapes(name, parameters, torch):
    import diffusers

    config, rngs = getattr(CosmosTransformer3DConfig, name)(), OneKey()
    ours = nnx.eval_shape(lambda: CosmosTransformer3DModel(config, rngs=rngs))
    with torch.device("meta"):
        theirs = diffusers.CosmosTransformer3DModel(**config.to_dict())
    expected = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert {spec.key: spec.shape for spec in tensor_specs(ours)} == expected
    assert sum(int(np.prod(shape)) for shape in expected.values()) == parameters


def test_a_new_models_positions_have_a_direction_and_zeros_a_gradient():
    model = CosmosTransformer3DModel(CONFIG, rngs=nnx.Rngs(0))
    positions = model.learnable_pos_embed((2, 2, 2))
    np.testing.assert_allclose(jnp.mean(positions**2, axis=-1), 1.0, rtol=1e-3)
    graphdef, state = nnx.split(model.learnable_pos_embed)
    zeros = jax.tree.map(jnp.zeros_like, nnx.to_pure_dict(state))
    run = lambda p: jnp.sum(jnp.cos(nnx.merge(graphdef, p)((2, 2, 2))))  # noqa: E731
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.grad(run)(zeros)))


def test_frames_per_second_stretch_the_angles_of_time():
    fast, slow = rotary_of(CONFIG, (3, 1, 1), jnp.array([48.0, 24.0])).sin
    np.testing.assert_allclose(fast[2, :2], slow[1, :2], atol=1e-7)
    image = rotary_of(CONFIG, (3, 1, 1)).sin
    np.testing.assert_array_equal(image[0], slow)
    assert image.shape == (1, 3, 6)


@pytest.mark.parametrize(
    ("latents", "condition", "message"),
    [
        ((2, 4, 8, 11, 4), {}, r"multiples of patch_size \(1, 2, 2\)"),
        ((2, 5, 8, 12, 4), {"mask": jnp.ones((2, 5))}, r"at most \(4, 12, 12\)"),
        ((2, 4, 8, 12, 5), {}, r"takes \[B, T, Y, X, 4\] latents with a mask of given frames"),
        ((2, 4, 8, 12, 4), {"mask": None}, "C?, 5.* latents without a mask of given frames"),
        ((2, 4, 8, 12, 4), {"mask": jnp.ones((2, 3))}, r"mask of given frames \[2, 4\], received"),
        (
            (2, 4, 8, 12, 4),
            {"states": jnp.ones((1, 3, 10))},
            r"text states \[2, A, 10\] for a batch",
        ),
        ((2, 4, 8, 12, 4), {"padding": jnp.ones((8, 12))}, "padding must have 3 axes"),
    ],
)
def test_inputs_that_do_not_fit(params, latents, condition, message):
    model = nnx.merge(graph(), params)
    with pytest.raises(ValueError, match=message):
        model(jnp.zeros(latents), 0.5, CONDITION._replace(**condition))


def test_other_errors(params):
    model = nnx.merge(graph(), params)
    with pytest.raises(ValueError, match=r"one per frame \[2, 4\] .* received \(2, 3\)"):
        model(LATENTS, jnp.zeros((2, 3)), CONDITION)
    with pytest.raises(ValueError, match="or 2, one per block; received 1"):
        graph(SPARSE[:1])
    with pytest.raises(ValueError, match=r"GNA\(window=5\) does not fit a grid of 4x4x6 tokens"):
        run(params, (None, GNA(window=5)))
    for settings, message in (
        ({"attention_head_dim": 10}, "an even number from 12 on, received 10"),
        ({"patch_size": [2, 2]}, r"patch_size takes three positive numbers.*received \(2, 2\)"),
        ({"extra_pos_embed_type": "sine"}, "None or 'learnable', received 'sine'"),
        ({"use_crossattn_projection": True}, r"use_crossattn_projection=True \(supported: False\)"),
        ({"mlp_ratio": 0}, r"mlp_ratio must be positive, received 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            CosmosTransformer3DConfig.from_dict(settings)
