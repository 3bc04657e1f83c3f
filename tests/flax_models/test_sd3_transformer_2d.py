"""Stable Diffusion 3's transformer with neighborhood attention, its files, and its errors.

Parity of the dense model with diffusers is in `test_models.py`.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gna_oracle import dense_under, full_mask

from conceptax.converters import load_pytorch, save_pytorch
from conceptax.converters.tensors import tensor_specs
from conceptax.flax_models.abstract import OneKey
from conceptax.flax_models.layers.attention import GNA
from conceptax.flax_models.layers.joint_attention import JointTextCondition
from conceptax.flax_models.sd3_transformer_2d import (
    SD3Transformer2DConfig,
    SD3Transformer2DModel,
)
from conceptax.methods.training import split_trainable

GRID, TEXT = (4, 6), 3
WINDOWS = ({"window": (2, 3), "stride": (2, 1)}, {"window": (2, 3), "dilation": (2, 1)})
SPARSE = tuple(GNA(**each) for each in WINDOWS)
CONFIG = SD3Transformer2DConfig(  # the first block attends twice, the last one puts out no text
    sample_size=16,
    in_channels=4,
    out_channels=3,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    caption_projection_dim=16,
    pooled_projection_dim=10,
    pos_embed_max_size=8,
    qk_norm="rms_norm",
    dual_attention_layers=(0,),
)


def graph(attention=None, **options):
    make = lambda: SD3Transformer2DModel(  # noqa: E731
        CONFIG, attention=attention, **options, rngs=nnx.Rngs(0)
    )
    return nnx.split(nnx.eval_shape(make))[0]


@pytest.fixture(scope="module")
def params():
    """None of them zero."""
    model = SD3Transformer2DModel(CONFIG, rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(nnx.state(model)))
    rng = np.random.default_rng(0)
    values = [leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, values)


def _inputs():
    rng = np.random.default_rng(1)
    shapes = (2, 8, 12, 4), (2, TEXT, 12), (2, 10)
    return tuple(jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes)


INPUTS = _inputs()  # latents, states, pooled


def run(params, attention=None, **options):
    """Output, and gradients of latents and text states, under jit."""
    graphdef = graph(attention, **options)

    @jax.jit
    def both(params, latents, states):
        def loss(latents, states):
            condition = JointTextCondition(states, INPUTS[2])
            output = nnx.merge(graphdef, params)(latents, jnp.array([3, 700]), condition)
            return jnp.sum(jnp.sin(output)), output

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(latents, states)

    with jax.default_matmul_precision("highest"):
        (_, output), gradients = both(params, *INPUTS[:2])
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
    assert_close(run(params, GNA(window=GRID, stride=2)), dense)


def test_each_block_sees_its_neighborhoods_and_the_text(params, sparse, dense, monkeypatch):
    """The dense model under explicit masks on [image; text] is the sparse one; so is the second
    attention of a block, of the image alone."""
    ones, masks = (1, 1), []
    for each in WINDOWS:
        case = {"layout": GRID, "kernel_size": each["window"], "is_causal": (False, False)}
        case |= {"stride": each.get("stride", ones), "dilation": each.get("dilation", ones)}
        masks.append(full_mask(case))
    joint = [np.pad(mask, (0, TEXT), constant_values=True) for mask in masks]
    order = iter([joint[0], masks[0], joint[1]])
    monkeypatch.setattr(
        "conceptax.flax_models.layers.joint_attention.dot_product_attention", dense_under(order)
    )
    assert_close(run(params), sparse)
    assert next(order, None) is None
    assert float(jnp.abs(sparse[0] - dense[0]).max()) > 1e-3


def test_files_go_to_diffusers_and_back(params, tmp_path, torch):
    import diffusers

    folder = save_pytorch(nnx.merge(graph(), params), tmp_path / "dense")
    theirs, info = diffusers.SD3Transformer2DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_pytorch(tmp_path / "theirs", attention=SPARSE, remat=True)
    assert model.config == CONFIG and model.remat
    blocks = model.transformer_blocks
    assert tuple(block.attn.neighborhood for block in blocks) == SPARSE
    assert blocks[0].attn2.neighborhood == SPARSE[0]
    again = save_pytorch(model, tmp_path / "again")
    name = "diffusion_pytorch_model.safetensors"
    assert (again / name).read_bytes() == (folder / name).read_bytes()
    settings = [json.loads((at / "config.json").read_text()) for at in (again, tmp_path / "theirs")]
    assert settings[0] == settings[1]


def test_positions_are_stored_and_do_not_train(params):
    model = nnx.merge(graph(), params)
    _, trained, frozen = split_trainable(model)
    assert trained["pos_embed"].keys() == {"proj"}
    assert frozen["pos_embed"].keys() == {"pos_embed"}


def test_a_new_models_positions_are_diffusers(torch):
    import diffusers

    ours = SD3Transformer2DModel(CONFIG, rngs=nnx.Rngs(0)).pos_embed.pos_embed[...]
    theirs = diffusers.SD3Transformer2DModel(**CONFIG.to_dict()).pos_embed.pos_embed
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("sd3_medium", 2_028_328_000),
        ("sd3_5_medium", 2_243_171_520),
        pytest.param("sd3_5_large", 8_056_627_520, marks=pytest.mark.slow),
    ],
)
def test_published_sizes_have_diffusers_keys_and_shapes(name, parameters, torch):
    import diffusers

    config, rngs = getattr(SD3Transformer2DConfig, name)(), OneKey()
    ours = nnx.eval_shape(lambda: SD3Transformer2DModel(config, rngs=rngs))
    small = {**config.to_dict(), "pos_embed_max_size": 8}  # its table is made, even here
    with torch.device("meta"):
        theirs = diffusers.SD3Transformer2DModel(**small)
    expected = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    expected["pos_embed.pos_embed"] = (1, config.pos_embed_max_size**2, config.features)
    assert {spec.key: spec.shape for spec in tensor_specs(ours)} == expected
    del expected["pos_embed.pos_embed"]
    assert sum(int(np.prod(shape)) for shape in expected.values()) == parameters


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        ((1, 8, 11, 4), r"multiples of patch_size 2 and at most 16, .*received \(1, 8, 11, 4\)"),
        ((1, 18, 4, 4), r"at most 16, its table of positions; received \(1, 18, 4, 4\)"),
        ((1, 8, 12, 3), r"takes \[B, h, w, 4\] latents, received \(1, 8, 12, 3\)"),
    ],
)
def test_latents_that_do_not_fit(params, latents, message):
    model, condition = nnx.merge(graph(), params), JointTextCondition(*(x[:1] for x in INPUTS[1:]))
    with pytest.raises(ValueError, match=message):
        model(jnp.zeros(latents), 5, condition)


def test_other_errors(params):
    model = nnx.merge(graph(), params)
    with pytest.raises(ValueError, match=r"conditioned on pooled too.*pooled=\.\.\."):
        model(INPUTS[0], 5, JointTextCondition(INPUTS[1]))
    with pytest.raises(ValueError, match="or 2, one per block; received 1"):
        graph(SPARSE[:1])
    with pytest.raises(ValueError, match=r"GNA\(window=5\) does not fit a grid of 4x6 tokens"):
        run(params, (None, GNA(window=5)))
