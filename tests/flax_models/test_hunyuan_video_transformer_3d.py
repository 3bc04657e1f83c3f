"""HunyuanVideo's transformer with neighborhood attention and padded texts, its files, its errors.

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
from conceptax.flax_models.hunyuan_video_transformer_3d import (
    HunyuanVideoTransformer3DConfig,
    HunyuanVideoTransformer3DModel,
)
from conceptax.flax_models.layers.attention import GNA
from conceptax.flax_models.layers.joint_attention import JointTextCondition

GRID, TEXT = (2, 3, 4), 5
MASK = jnp.arange(TEXT) < jnp.array([[TEXT], [3]])
WINDOWS = (
    {"window": (2, 2, 3), "stride": (1, 2, 1)},
    {"window": (1, 3, 2), "dilation": (2, 1, 2)},
)
SPARSE = tuple(GNA(**each) for each in WINDOWS)
CONFIG = HunyuanVideoTransformer3DConfig(
    in_channels=4,
    out_channels=3,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=1,
    num_single_layers=1,
    num_refiner_layers=1,
    text_embed_dim=12,
    pooled_projection_dim=10,
    rope_axes_dim=(4, 4, 8),
)


def graph(attention=None, **options):
    make = lambda: HunyuanVideoTransformer3DModel(  # noqa: E731
        CONFIG, attention=attention, **options, rngs=nnx.Rngs(0)
    )
    return nnx.split(nnx.eval_shape(make))[0]


def _inputs():
    rng = np.random.default_rng(1)
    shapes = (2, 2, 6, 8, 4), (2, TEXT, 12), (2, 10)
    arrays = [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]
    return *arrays, jnp.array([3.5, 1.0])


INPUTS = _inputs()  # latents, states, pooled, guidance


@pytest.fixture(scope="module")
def params():
    """None of them zero."""
    model = HunyuanVideoTransformer3DModel(CONFIG, rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(nnx.state(model)))
    rng = np.random.default_rng(0)
    values = [leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, values)


def run(params, attention=None, mask=None, **options):
    """Output, and gradients of latents and text states, under jit."""
    graphdef = graph(attention, **options)

    @jax.jit
    def both(params, latents, states, others):
        def loss(latents, states):
            condition = JointTextCondition(states, *others)
            output = nnx.merge(graphdef, params)(latents, jnp.array([3, 700]), condition)
            return jnp.sum(jnp.sin(output)), output

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(latents, states)

    with jax.default_matmul_precision("highest"):
        (_, output), gradients = both(params, *INPUTS[:2], (*INPUTS[2:], mask))
    return output, *gradients


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(None, id="whole text", marks=pytest.mark.slow),
        pytest.param(MASK, id="padded text"),
    ],
)
def mask(request):
    return request.param


@pytest.fixture(scope="module")
def dense(params, mask):
    return run(params, mask=mask)


@pytest.fixture(scope="module")
def sparse(params, mask):
    return run(params, SPARSE, mask)


def assert_close(received, expected):
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * float(jnp.abs(other).max()), rtol=0)


def test_a_window_of_the_whole_grid_is_dense(params, dense, mask):
    assert_close(run(params, GNA(window=GRID, stride=2), mask), dense)


def test_each_block_sees_its_neighborhoods_and_the_text(params, sparse, dense, mask, monkeypatch):
    """The dense model under explicit masks on [video; text], one per block, is the sparse one."""
    ones, masks = (1, 1, 1), []
    shown = np.ones((2, TEXT), bool) if mask is None else mask
    shown = np.pad(shown, ((0, 0), (24, 0)), constant_values=True)[:, None, None]
    for each in WINDOWS:
        case = {"layout": GRID, "kernel_size": each["window"], "is_causal": (False,) * 3}
        case |= {"stride": each.get("stride", ones), "dilation": each.get("dilation", ones)}
        near = np.pad(full_mask(case), (0, TEXT), constant_values=True)
        masks.append(near & shown)
    order = iter(masks)
    monkeypatch.setattr(
        "conceptax.flax_models.layers.joint_attention.dot_product_attention", dense_under(order)
    )
    assert_close(run(params, mask=mask), sparse)
    assert next(order, None) is None
    assert float(jnp.abs(sparse[0] - dense[0]).max()) > 1e-3


@pytest.mark.parametrize("attention", [None, SPARSE], ids=["dense", "sparse"])
def test_a_text_without_its_padding_gives_the_same(params, attention):
    """Nor does it matter what the padding is."""
    graphdef = graph(attention)

    @jax.jit
    def predict(params, latents, condition):
        return nnx.merge(graphdef, params)(latents, 700, condition)

    latents, states, *others = INPUTS
    noised = jnp.where(MASK[..., None], states, 9.0)
    trimmed = [x[1:] for x in (latents, states[:, :3], *others)]
    with jax.default_matmul_precision("highest"):
        padded = predict(params, latents, JointTextCondition(states, *others, MASK))
        again = predict(params, latents, JointTextCondition(noised, *others, MASK))
        alone = predict(params, trimmed[0], JointTextCondition(*trimmed[1:]))
        whole = predict(params, latents, JointTextCondition(states, *others))
    np.testing.assert_array_equal(padded, again)
    assert_close([padded[1:]], [alone])
    assert float(jnp.abs(padded[1] - whole[1]).max()) > 1e-3


def test_no_text_at_all_leaves_the_video(params):
    """Of a mask that hides everything, as of gradients through it, no number is lost."""
    nothing = MASK.at[1].set(False)
    for each in (None, SPARSE):
        assert all(bool(jnp.isfinite(x).all()) for x in run(params, each, nothing))


def test_bfloat16(params, sparse, mask):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    output, *_ = run(half, SPARSE, mask, **options)
    assert output.dtype == jnp.bfloat16
    difference = output.astype(jnp.float32) - sparse[0]
    assert jnp.linalg.norm(difference) < 0.05 * jnp.linalg.norm(sparse[0])


def test_files_go_to_diffusers_and_back(params, tmp_path, torch):
    import diffusers

    folder = save_pytorch(nnx.merge(graph(), params), tmp_path / "dense")
    theirs, info = diffusers.HunyuanVideoTransformer3DModel.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_pytorch(tmp_path / "theirs", attention=SPARSE, remat=True)
    assert model.config == CONFIG and model.remat
    (double,), (single,) = model.transformer_blocks, model.single_transformer_blocks
    assert (double.attn.neighborhood, single.neighborhood) == SPARSE
    again = save_pytorch(model, tmp_path / "again")
    name = "diffusion_pytorch_model.safetensors"
    assert (again / name).read_bytes() == (folder / name).read_bytes()
    settings = [json.loads((at / "config.json").read_text()) for at in (again, tmp_path / "theirs")]
    assert settings[0] == settings[1]


def test_blocks_are_streamed(params, tmp_path, sparse, mask):
    save_pytorch(nnx.merge(graph(), params), tmp_path)
    model = load_pytorch(tmp_path, stream=True, attention=SPARSE)
    with jax.default_matmul_precision("highest"):
        streamed = model(INPUTS[0], jnp.array([3, 700]), JointTextCondition(*INPUTS[1:], mask))
    assert_close([streamed], sparse[:1])


def test_the_published_size_has_diffusers_keys_and_shapes(torch):
    import diffusers

    config, rngs = HunyuanVideoTransformer3DConfig(), OneKey()
    ours = nnx.eval_shape(lambda: HunyuanVideoTransformer3DModel(config, rngs=rngs))
    with torch.device("meta"):
        theirs = diffusers.HunyuanVideoTransformer3DModel(**config.to_dict())
    expected = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert {spec.key: spec.shape for spec in tensor_specs(ours)} == expected
    assert len(expected) == 1264
    assert sum(int(np.prod(shape)) for shape in expected.values()) == 12_821_012_544


class TestErrors:
    def test_settings(self):
        with pytest.raises(ValueError, match="or 2, one per block, the 1 double blocks before the"):
            graph(SPARSE[:1])

    def test_windows(self, params):
        with pytest.raises(
            ValueError, match=r"GNA\(window=3\) does not fit a grid of 2x3x4 tokens"
        ):
            run(params, GNA(window=3))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"latents": INPUTS[0][..., :3]},
                r"takes \[B, T, Y, X, 4\] latents, received \(2, 2, 6,",
            ),
            (
                {"latents": INPUTS[0][:, :, :5]},
                r"multiples of \(1, 2, 2\), received \(2, 2, 5, 8, 4\)",
            ),
            ({"states": INPUTS[1][..., 1:]}, r"takes text states \[2, A, 12\] .* \(2, 5, 11\)"),
            ({"mask": MASK[:, 1:]}, r"takes a mask \[2, 5\] of the text's tokens, .* \(2, 4\)"),
            ({"guidance": None}, r"conditioned on guidance too"),
            ({"pooled": None}, r"conditioned on pooled too"),
        ],
    )
    def test_inputs(self, params, changes, message):
        given = (
            dict(zip(("latents", "states", "pooled", "guidance"), INPUTS, strict=True)) | changes
        )
        latents, model = given.pop("latents"), nnx.merge(graph(), params)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model, latents, 5, JointTextCondition(**given))

    @pytest.mark.parametrize(
        ("raw", "message"),
        [
            (
                {"image_condition_type": "token_replace"},
                "image_condition_type='token_replace' .supp",
            ),
            ({"image_condition_type": "latent_concat"}, "image_condition_type='latent_concat'"),
            ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm'"),
            ({"rope_axes_dim": [64, 64]}, "three even numbers"),
            ({"rope_axes_dim": [16, 56, 50]}, "add up to attention_head_dim 128"),
            ({"num_refiner_layers": 0}, "num_refiner_layers"),
        ],
    )
    def test_configs(self, raw, message):
        with pytest.raises(ValueError, match=message):
            HunyuanVideoTransformer3DConfig.from_dict(raw)
