"""MAFT+'s parts against transformers' modules and the authors' own outputs.

The exact values are torch's in float64; every tensor is within 1e-5 of them, or within twice
torch's own float32 error where that is larger.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import segmentation_oracles
from flax import nnx
from jax.extend.core import Literal
from segmentation_oracles import random_model

from conceptax.converters.parameters import OneKey
from conceptax.flax_models.convnext import ConvNeXt, ConvNeXtConfig
from conceptax.flax_models.layers.bilinear import resize, sample_levels, sample_points
from conceptax.flax_models.maft_plus import (
    ContentDependentTransfer,
    MaftPlus,
    MaftPlusConfig,
    class_logits,
    ensemble,
)
from conceptax.flax_models.mask2former import (
    Mask2FormerConfig,
    MSDeformAttnPixelDecoder,
    MultiScaleMaskedTransformerDecoder,
    PixelFeatures,
    mask_pool,
    normalize,
    sine_positions,
)
from conceptax.flax_models.open_clip import OpenCLIP, OpenCLIPConfig, OpenCLIPTextConfig
from conceptax.methods.training import leaf_paths

SMALL = Mask2FormerConfig(
    feature_channels=segmentation_oracles.CHANNELS,
    class_dim=12,
    hidden_dim=segmentation_oracles.WIDTH,
    heads=4,
    encoder_layers=2,
    encoder_ffn=32,
    decoder_layers=4,
    decoder_ffn=32,
    num_queries=6,
)
INIT = {"dtype": jnp.float32, "param_dtype": jnp.float32}


def clip_config(**vision):
    trunk = ConvNeXtConfig(**({"depths": (1, 2, 1, 1), "dims": (8, 12, 16, 24)} | vision))
    return OpenCLIPConfig(OpenCLIPTextConfig(16, 2, 2, 99, 9), trunk, embed_dim=12)


MODELS = {
    "convnext": lambda rngs: ConvNeXt(clip_config().vision_config, rngs=rngs),
    "open_clip_text": lambda rngs: OpenCLIP(clip_config(), rngs=rngs),
    "pixel_decoder": lambda rngs: MSDeformAttnPixelDecoder(
        SMALL, param_dtype=jnp.float32, rngs=rngs
    ),
    "mask_decoder": lambda rngs: MultiScaleMaskedTransformerDecoder(SMALL, **INIT, rngs=rngs),
}


@pytest.mark.parametrize("name", MODELS)
def test_parity(name, torch, monkeypatch):
    monkeypatch.setattr("conceptax.kernels.memory._TOKENS_IN_CACHE", 64)  # so that there are parts
    oracle, translate = getattr(segmentation_oracles, name)()
    tensors = translate(segmentation_oracles.state(oracle.module))
    model = segmentation_oracles.fill(random_model(MODELS[name]), tensors)
    received = oracles.jax_results(oracle, model)
    single = oracles.torch_results(oracle, torch.float32)
    exact = oracles.torch_results(oracle, torch.float64)

    def check(what, ours, theirs, reference):
        allowed = max(1e-5, 2 * oracles.relative_error(theirs, reference))
        assert oracles.relative_error(ours, reference) <= allowed, what

    check("output", received[0], single[0], exact[0])
    for key in oracle.inputs:
        check(f"gradient of {key}", received[1][key], single[1][key], exact[1][key])
    singles, exacts = translate(single[2]), translate(exact[2])
    assert set(tensors) == set(exacts) <= set(received[2])
    largest = max(np.linalg.norm(gradient) for gradient in exacts.values())
    for key, gradient in exacts.items():
        if np.linalg.norm(gradient) > 1e-6 * largest:  # keys' biases: exactly zero in theory
            check(f"gradient of {key}", received[2][key], singles[key], gradient)


def test_the_temporaries_of_a_trunk_are_few_of_its_largest_map():
    """They were 27 where XLA stored each of a depthwise kernel's taps and what an Mlp widens."""
    size, width = 320, 16
    config = ConvNeXtConfig(depths=(2, 1, 1, 1), dims=(width, 32, 64, 128))
    graphdef, state = nnx.split(nnx.eval_shape(lambda: ConvNeXt(config, rngs=OneKey())))
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    run = jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))
    needs = run.lower(state, images).compile().memory_analysis()
    assert needs.temp_size_in_bytes < 8 * (size // 4) ** 2 * width * 4


@pytest.mark.parametrize("form", ["semantic", "panoptic"])
@pytest.mark.parametrize("token_order", ["reference", "raster"])
def test_transfer_equals_the_authors(form, token_order, golden):
    stored = np.load(golden(f"maft_plus_cdt_{form}.npz"))
    dim, heads = stored["in.text_rows"].shape[1], int(stored["meta.heads"])
    model = ContentDependentTransfer(
        dim, heads, form=form, token_order=token_order, rngs=nnx.Rngs(0)
    )
    parameters = {
        key.removeprefix("param."): stored[key] for key in stored if key.startswith("param.")
    }
    oracle = oracles.Oracle(
        None,
        {"image": stored["in.image_tokens_bchw"].transpose(0, 2, 3, 1)},
        {},
        None,
        lambda model, image: model(jnp.asarray(stored["in.text_rows"]), image),
    )
    graphdef, state = nnx.split(segmentation_oracles.fill(model, parameters))

    @jax.jit
    def run(state, image):
        def weighted(state, image):
            output = oracle.jax_call(nnx.merge(graphdef, state), image)
            return jnp.sum(output * stored["cotangent"]), output

        return jax.grad(weighted, argnums=(0, 1), has_aux=True)(state, image)

    with jax.default_matmul_precision("highest"):
        (by_parameter, by_image), output = run(state, oracle.inputs["image"])
    np.testing.assert_allclose(output, stored["out.text_rows"], atol=2e-5, rtol=1e-5)
    expected = stored["grad.image_tokens_bchw"].transpose(0, 2, 3, 1)
    assert oracles.relative_error(by_image, expected) < 1e-5
    gradients = nnx.merge(graphdef, by_parameter)
    specs = {spec.key: spec for spec in segmentation_oracles.tensor_specs(gradients)}
    values = segmentation_oracles.variables(gradients)
    for key, spec in specs.items():
        ours = spec.to_torch(np.asarray(values[spec.path][...]))
        theirs = stored[f"grad_param.{key}"]
        allowed = 2e-5 * np.abs(theirs).max() + 1e-5  # keys' biases: zero but for rounding
        np.testing.assert_allclose(ours, theirs, atol=allowed, rtol=0, err_msg=key)


def test_token_orders():
    features = jnp.arange(2 * 2 * 3 * 4, dtype=jnp.float32).reshape(2, 2, 3, 4)
    by_order = {
        order: ContentDependentTransfer(8, 2, token_order=order, rngs=nnx.Rngs(0)).arrange(features)
        for order in ("reference", "raster")
    }
    np.testing.assert_array_equal(by_order["raster"], features)
    channels_first = np.asarray(features).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(
        by_order["reference"].reshape(2 * 6, 4), channels_first.reshape(2 * 6, 4)
    )


def test_the_panoptic_transfer_starts_as_the_identity():
    model = ContentDependentTransfer(8, 2, form="panoptic", rngs=nnx.Rngs(0))
    rows = jax.random.normal(jax.random.key(0), (3, 8))
    adapted = model(rows, jax.random.normal(jax.random.key(1), (2, 2, 3, 8)))
    np.testing.assert_array_equal(adapted, jnp.stack([rows, rows]))


def test_wrong_options():
    with pytest.raises(ValueError, match=r"form accepts semantic and panoptic, received 'both'"):
        ContentDependentTransfer(8, 2, form="both", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="token_order accepts reference and raster"):
        MaftPlusConfig(token_order="natural")
    with pytest.raises(ValueError, match="8 features do not divide into 3 heads"):
        ContentDependentTransfer(8, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="the decoder reads"):
        MaftPlusConfig(decoder_config=SMALL)


def test_sampling_equals_grid_sample(torch):
    from transformers.models.mask2former import modeling_mask2former as hf

    rng = np.random.default_rng(0)
    layout, heads, width, queries, count = ((3, 4), (5, 2)), 2, 3, 7, 4
    values = rng.normal(size=(2, 22, heads, width)).astype(np.float32)
    places = rng.uniform(-0.4, 1.4, (2, queries, heads, 2, count, 2)).astype(np.float32)
    weights = rng.uniform(size=places.shape[:-1]).astype(np.float32)
    leaves = [torch.tensor(x, requires_grad=True) for x in (values, places, weights)]
    expected = hf.multi_scale_deformable_attention(leaves[0], layout, leaves[1], leaves[2])
    cotangent = rng.normal(size=expected.shape).astype(np.float32)
    (expected * torch.tensor(cotangent)).sum().backward()

    sizes = np.array([(columns, rows) for rows, columns in layout])[:, None]

    def ours(values, places, weights):
        out = sample_levels(values, layout, places * sizes - 0.5, weights)
        return jnp.sum(out.reshape(cotangent.shape) * cotangent), out

    gradients, out = jax.jit(jax.grad(ours, argnums=(0, 1, 2), has_aux=True))(
        values, places, weights
    )
    np.testing.assert_allclose(
        out.reshape(expected.shape), expected.detach().numpy(), atol=1e-5, rtol=1e-5
    )
    for received, leaf in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(received, leaf.grad.numpy(), atol=5e-5, rtol=1e-4)

    one = rng.normal(size=(5, 6, 3)).astype(np.float32)
    points = rng.uniform(-0.1, 1.1, (9, 2)).astype(np.float32)
    expected = torch.nn.functional.grid_sample(
        torch.tensor(one).permute(2, 0, 1)[None],
        torch.tensor(2 * points - 1)[None, :, None],
        align_corners=False,
    )
    received = sample_points(jnp.asarray(one), jnp.asarray(points))
    np.testing.assert_allclose(received, expected[0, :, :, 0].numpy().T, atol=1e-5)
    plain = sample_points(jnp.asarray(one[..., 0]), jnp.asarray(points))
    np.testing.assert_allclose(plain, received[:, 0], atol=1e-6)


def test_a_layout_that_does_not_fit():
    with pytest.raises(ValueError, match=r"hold 12 tokens; received 11 tokens and points in 1"):
        sample_levels(
            jnp.zeros((1, 11, 1, 2)),
            ((3, 4),),
            jnp.zeros((1, 1, 1, 1, 1, 2)),
            jnp.zeros((1, 1, 1, 1, 1)),
        )


@pytest.mark.parametrize("size", [(9, 14), (4, 5), (2, 9)])
def test_resize_equals_interpolate(size, torch):
    x = np.random.default_rng(0).normal(size=(2, 5, 7, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.tensor(x).permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False
    )
    received = resize(jnp.asarray(x), size)
    np.testing.assert_allclose(received, expected.permute(0, 2, 3, 1).numpy(), atol=5e-6)
    swapped = resize(jnp.asarray(x).transpose(0, 3, 1, 2), size, axis=-2)
    np.testing.assert_allclose(swapped, expected.numpy(), atol=5e-6)


def test_positions_equal_the_definition(torch):
    from transformers.models.mask2former import modeling_mask2former as hf

    embed = hf.Mask2FormerSinePositionEmbedding(num_position_features=6, normalize=True)
    expected = embed((1, 12, 5, 3), torch.device("cpu"), torch.float32)
    np.testing.assert_allclose(
        sine_positions((5, 3), 12), expected[0].permute(1, 2, 0).numpy(), atol=2e-6
    )


def test_mask_pool_is_a_mean_inside():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(1, 3, 4, 5)).astype(np.float32)
    masks = rng.normal(size=(1, 2, 3, 4)).astype(np.float32)
    masks[0, 1] = -1.0
    masks[0, 0, 0, 0] = 0.0  # not inside
    pooled = mask_pool(jnp.asarray(features), jnp.asarray(masks))
    np.testing.assert_allclose(pooled[0, 0], features[0][masks[0, 0] > 0].mean(0), rtol=1e-5)
    np.testing.assert_array_equal(pooled[0, 1], 0)


def test_class_rows_of_the_decoder():
    """The class head, written out in NumPy."""
    model = random_model(MODELS["mask_decoder"], 3)
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(1, *size, 64)) for size in ((8, 12), (2, 3), (3, 4), (4, 6))]
    maps = [jnp.asarray(x, jnp.float32) for x in maps]
    rows = normalize(jnp.asarray(rng.normal(size=(5, 12)), jnp.float32))
    first = model(PixelFeatures(maps[0], tuple(maps[1:])), rows)[0]

    def norm(layer, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * np.asarray(layer.scale[...]) + np.asarray(layer.bias[...])

    def linear(layer, x):
        return x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])

    def mlp(module, x):
        one, two, three = module.layers
        return linear(three, np.maximum(linear(two, np.maximum(linear(one, x), 0)), 0))

    queries = norm(model.decoder_norm, np.asarray(model.query_feat.embedding[...]))
    features = np.asarray(maps[0][0])
    masks = np.einsum("qc,hwc->qhw", mlp(model.mask_embed, queries), features)
    np.testing.assert_allclose(first.mask_logits[0], masks, atol=1e-4)
    pooled = np.stack([features[mask > 0].mean(0) for mask in masks])
    before, behind = model._mask_pooling_proj
    embedded = mlp(model.class_embed, queries + linear(behind, norm(before, pooled)))
    embedded /= np.linalg.norm(embedded, axis=-1, keepdims=True)
    np.testing.assert_allclose(first.row_logits[0], embedded @ np.asarray(rows).T / 0.07, atol=1e-3)


def test_synonyms_and_void():
    logits = jnp.asarray([[1.0, 5.0, 3.0, -2.0, 0.5]])
    synonyms = jnp.asarray([[0, 1], [2, 2], [3, 3]])
    np.testing.assert_array_equal(class_logits(logits, synonyms), [[5.0, 3.0, -2.0, 0.5]])


def test_ensemble_is_the_mean_direction():
    embeddings = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
    units = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
    mean = units.mean(1)
    expected = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    np.testing.assert_allclose(ensemble(jnp.asarray(embeddings)), expected, atol=1e-6)


def test_published_sizes():
    """Parameters and checkpoint keys of the two published models, part by part."""
    rngs = OneKey()

    def sizes(module):
        leaves = jax.tree.leaves(nnx.state(module))
        return sum(int(np.prod(leaf.shape)) for leaf in leaves), len(leaves)

    for config, clip, trunk, decoders, transfer, keys in (
        (MaftPlusConfig.base(), (179.39, 493), 87.56, (5.54, 14.82), 2_052_480, 803),
        (MaftPlusConfig.large(), (351.77, 543), 196.23, (5.79, 14.85), 2_954_496, 853),
    ):
        model = nnx.eval_shape(lambda config=config: MaftPlus(config, rngs=rngs))
        count, names = sizes(model.backbone.clip_model)
        assert (round(count / 1e6, 2), names) == clip
        tower = model.backbone.clip_model.visual.trunk
        trained = sizes(tower.stem)[0] + sizes(tower.stages)[0]
        assert round(trained / 1e6, 2) == trunk
        pixel, predictor = model.sem_seg_head.pixel_decoder, model.sem_seg_head.predictor
        assert (sizes(pixel)[1], sizes(predictor)[1]) == (117, 184)
        assert tuple(round(sizes(part)[0] / 1e6, 2) for part in (pixel, predictor)) == decoders
        assert sizes(model.cdt) == (transfer, 8)
        assert sizes(model)[1] == keys


@pytest.fixture(scope="module")
def whole():
    return random_model(lambda rngs: MaftPlus(segmentation_oracles.MINIMAL, rngs=rngs))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(2, 64, 96, 3)), jnp.float32)
    return images, normalize(jnp.asarray(rng.normal(size=(5, 8)), jnp.float32))


def test_whole_model(whole, inputs):
    graphdef, state = nnx.split(whole)
    out = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))(state, *inputs)
    assert len(out.layers) == 2
    assert out.layers[-1].row_logits.shape == out.open_logits.shape == (2, 5, 6)
    assert out.layers[-1].mask_logits.shape == (2, 5, 16, 24)
    assert out.features.shape == (2, 2, 3, 8)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(out))


def reached(loss, params):
    """Paths whose gradient is more than zeros, by the program of the gradient, which is not run."""
    program = jax.make_jaxpr(jax.grad(loss))(params)
    made = {out: eqn for eqn in program.eqns for out in eqn.outvars}
    constants = dict(zip(program.jaxpr.constvars, program.consts, strict=True))

    def is_zero(atom):
        if isinstance(atom, Literal):
            return not np.any(atom.val)
        if atom in constants:
            return not np.any(constants[atom])
        eqn = made[atom]
        return eqn.primitive.name == "broadcast_in_dim" and is_zero(eqn.invars[0])

    paths = leaf_paths(params)
    return {
        path for path, out in zip(paths, program.jaxpr.outvars, strict=True) if not is_zero(out)
    }


def test_where_gradients_go(whole, inputs):
    """The decoders' predictions train the decoders, open-vocabulary logits tower and transfer."""
    graphdef, state = nnx.split(whole)
    params = nnx.to_pure_dict(state)

    def run(params):
        return nnx.merge(graphdef, params)(*inputs)

    def proposals(params):
        return sum(p.row_logits.sum() + p.mask_logits.sum() for p in run(params).layers)

    paths = set(leaf_paths(params))
    decoders = {path for path in paths if path.startswith("sem_seg_head")}
    void = {"void_embedding.embedding"}
    assert reached(proposals, params) == decoders | void
    moved = reached(lambda params: run(params).open_logits.sum(), params)
    tower = {path for path in paths if path.startswith("backbone.clip_model.visual")}
    transfer = {path for path in paths if path.startswith("cdt")}
    assert moved == tower | transfer | void | {"backbone.clip_model.logit_scale"}


def test_sides_must_fit(whole):
    with pytest.raises(ValueError, match=r"multiples of 32, received \(1, 64, 80, 3\)"):
        whole(jnp.zeros((1, 64, 80, 3)), jnp.zeros((2, 8)))


def test_config_round_trip():
    config = MaftPlusConfig.large("panoptic")
    assert MaftPlusConfig.from_dict(config.to_dict()) == config
    assert config.clip_config.projection == "mlp"
