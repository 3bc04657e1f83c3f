"""The diffusion transformer with neighborhood attention: the same parameters, fewer keys.

Parity of the dense model with diffusers is in `test_models.py`.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conceptax.converters import CheckpointError, load_pytorch, save_pytorch
from conceptax.flax_models.dit_transformer_2d import (
    GNA,
    DiTTransformer2DConfig,
    DiTTransformer2DModel,
)
from conceptax.methods.diffusion.text_to_image import sample_latents
from conceptax.methods.sampling import NoiseSchedule, ddim_sampler

CONFIG = DiTTransformer2DConfig(
    num_attention_heads=2,
    attention_head_dim=4,
    num_layers=2,
    sample_size=12,
    num_embeds_ada_norm=5,
    in_channels=3,
)
GRID = (6, 6)
SPARSE = (GNA(window=(4, 3), stride=(2, 1)), GNA(window=3, stride=3, dilation=2))


@pytest.fixture(scope="module")
def params():
    """One set of parameters for all models, none of them zero."""
    model = DiTTransformer2DModel(CONFIG, rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(nnx.state(model)))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(
        tree, [leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    )


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    latents = jnp.asarray(rng.standard_normal((2, 12, 12, 3), np.float32))
    return latents, jnp.array([3.0, 700.0]), jnp.array([1, CONFIG.null_class])


def graph(attention):
    model = nnx.eval_shape(
        lambda: DiTTransformer2DModel(CONFIG, attention=attention, rngs=nnx.Rngs(0))
    )
    return nnx.split(model)[0]


def forward(graphdef, params, inputs):
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs))(
            params, *inputs
        )


def run(attention, params, inputs):
    """Output, and gradients of the parameters and the latents, under jit."""
    graphdef = graph(attention)

    @jax.jit
    def both(params, latents, timesteps, labels):
        def loss(params, latents):
            output = nnx.merge(graphdef, params)(latents, timesteps, labels)
            return jnp.sum(jnp.sin(output)), output

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, latents)

    with jax.default_matmul_precision("highest"):
        gradients, output = both(params, *inputs)
    return output, gradients


@pytest.fixture(scope="module")
def dense(params, inputs):
    return run(None, params, inputs)


@pytest.fixture(scope="module")
def sparse(params, inputs):
    return run(SPARSE, params, inputs)


def assert_close(received, expected):
    received, expected = jax.tree.leaves(received), jax.tree.leaves(expected)
    largest = max(float(jnp.abs(leaf).max()) for leaf in expected)
    for one, other in zip(received, expected, strict=True):
        # Keys' biases have gradients that are zero but for rounding.
        allowed = 2e-5 * float(jnp.abs(other).max()) + 1e-7 * largest
        np.testing.assert_allclose(one, other, atol=allowed, rtol=0)


def test_a_window_of_the_whole_grid_is_dense(params, inputs, dense):
    assert_close(run(GNA(window=GRID, stride=2), params, inputs), dense)


def seen(length, window, stride, dilation):
    """The definition, token by token: groups, leaders, and windows shifted at the borders."""
    mask = np.zeros((length, length), bool)
    for query in range(length):
        members = range(query % dilation, length, dilation)
        place, count = query // dilation, len(members)
        leader = min(place // stride * stride + stride // 2, count - 1)
        first = min(max(leader - window // 2, 0), count - window)
        mask[query, [members[first + n] for n in range(window)]] = True
    return mask


def masked_attention(query, key, value, *, kernel_size, stride, dilation, scale, implementation):
    assert implementation is None and scale is None
    pairs = (x if isinstance(x, tuple) else (x, x) for x in (kernel_size, stride, dilation))
    rows, columns = (seen(*one) for one in zip(GRID, *pairs, strict=True))
    mask = np.kron(rows, columns)  # token = row * columns + column
    flat = [x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (query, key, value)]
    logits = jnp.einsum("bqhd,bkhd->bhqk", *flat[:2]) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, flat[2]).reshape(value.shape)


def test_each_layer_sees_its_neighborhoods(params, inputs, sparse, dense, monkeypatch):
    monkeypatch.setattr(
        "conceptax.flax_models.layers.attention.neighborhood_attention", masked_attention
    )
    assert_close(sparse, run(SPARSE, params, inputs))
    assert float(jnp.abs(sparse[0] - dense[0]).max()) > 1e-3


def test_layers_may_differ(params, inputs, sparse, dense):
    settings = [SPARSE[0], None]
    graphdef = graph(settings)
    model = nnx.merge(graphdef, params)
    assert [block.attn1.neighborhood for block in model.transformer_blocks] == settings
    output = forward(graphdef, params, inputs)
    for other in (sparse, dense):
        assert float(jnp.abs(output - other[0]).max()) > 1e-3
    same = graph((GNA(window=[4, 3], stride=[2, 1]), None))
    assert hash(graphdef) == hash(same)
    assert graphdef == same


def test_latents_need_not_be_square(params):
    model = nnx.merge(graph(GNA(window=(2, 5))), params)
    latents = jnp.ones((1, 8, 16, 3))
    output = jax.jit(lambda x: model(x, 5, jnp.array([0])))(latents)
    assert output.shape == latents.shape
    assert bool(jnp.isfinite(output).all())


def test_a_checkpoint_of_the_dense_model_runs_sparse(params, inputs, sparse, tmp_path):
    save_pytorch(nnx.merge(graph(None), params), tmp_path / "dense")
    model = load_pytorch(tmp_path / "dense", attention=SPARSE, remat=True)
    assert model.config == CONFIG
    assert model.remat
    assert_close(forward(*nnx.split(model), inputs), sparse[0])
    save_pytorch(model, tmp_path / "again")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()


def test_diffusers_loads_what_is_saved(params, inputs, dense, tmp_path, torch):
    import diffusers

    save_pytorch(nnx.merge(graph(None), params), tmp_path / "dit")
    restored, info = diffusers.DiTTransformer2DModel.from_pretrained(
        tmp_path / "dit", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    latents, timesteps, labels = (torch.from_numpy(np.array(x)) for x in inputs)
    with torch.no_grad():
        expected = restored(latents.permute(0, 3, 1, 2), timesteps, labels.long()).sample
    assert_close(dense[0], jnp.asarray(expected.permute(0, 2, 3, 1).numpy()))


def test_guided_samples_are_those_of_diffusers(tmp_path, torch):
    import diffusers
    import oracles

    module = oracles.dit().module  # predicts noise and variance, of which DDIM takes the noise
    module.save_pretrained(tmp_path)
    schedule = {"num_train_timesteps": 100, "clip_sample": False}
    scheduler = diffusers.DDIMScheduler(**schedule)
    scheduler.set_timesteps(3)
    noise = np.random.default_rng(2).standard_normal((2, 8, 8, 4), np.float32)
    labels = np.array([4, 7])
    x = torch.from_numpy(noise).permute(0, 3, 1, 2)
    both = torch.tensor([*labels, 10, 10])
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            output = module(torch.cat([x, x]), timestep.expand(4), both).sample[:, :4]
            given, without = output.chunk(2)
            x = scheduler.step(without + 4 * (given - without), timestep, x).prev_sample

    model = load_pytorch(tmp_path)
    graphdef, state = nnx.split(model)
    sampler = ddim_sampler(NoiseSchedule.from_config(schedule), 3)
    null = jnp.asarray(model.config.null_class)
    with jax.default_matmul_precision("highest"):
        received = jax.jit(sample_latents, static_argnums=0)(
            graphdef, state, jnp.asarray(labels), null, jnp.asarray(noise), sampler, 4.0
        )
    expected = x.permute(0, 2, 3, 1).numpy()
    assert oracles.relative_error(np.asarray(received), expected) < 1e-5


def test_folders_of_the_first_release_load(params, tmp_path):
    folder = save_pytorch(nnx.merge(graph(None), params), tmp_path / "dit")
    config = json.loads((folder / "config.json").read_text())
    old = {
        **config,
        "_class_name": "Transformer2DModel",
        "cross_attention_dim": None,
        "double_self_attention": False,
        "norm_num_groups": 32,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "upcast_attention": False,
        "use_linear_projection": False,
    }
    (folder / "config.json").write_text(json.dumps(old))
    model = load_pytorch(folder)
    assert isinstance(model, DiTTransformer2DModel)
    assert model.config == CONFIG
    save_pytorch(model, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text()) == old
    (folder / "config.json").write_text(json.dumps({**old, "norm_type": "ada_norm_single"}))
    with pytest.raises(CheckpointError, match="unknown architecture 'Transformer2DModel'"):
        load_pytorch(folder)


def test_bfloat16(params, inputs, sparse):
    options = {"attention": SPARSE, "dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    model = nnx.eval_shape(lambda: DiTTransformer2DModel(CONFIG, **options, rngs=nnx.Rngs(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("bfloat16")}
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    output = forward(nnx.split(model)[0], half, inputs)
    assert output.dtype == jnp.bfloat16
    difference = output.astype(jnp.float32) - sparse[0]
    assert jnp.linalg.norm(difference) < 0.03 * jnp.linalg.norm(sparse[0])


class TestErrors:
    @pytest.mark.parametrize(
        ("attention", "message"),
        [
            (SPARSE[:1], "or 2, one per layer; received 1"),
            ((), "received 0"),
            (8, r"GNA\(\.\.\.\), or None .*; received 8 for layer 0"),
        ],
    )
    def test_layers(self, attention, message):
        with pytest.raises(ValueError, match=message):
            graph(attention)

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            (
                GNA(window=7),
                r"GNA\(window=7\) does not fit a grid of 6x6 tokens: window must .*d 7 > 6",
            ),
            (GNA(window=4, dilation=2), r"4 \* 2 = 8 > 6"),
            (GNA(window=(3, 3, 3)), "a sequence of 2"),
            (GNA(window=2, stride=3), "stride must not exceed window; received 3 > 2"),
            (GNA(window=2.5), "an integer of at least 1"),
        ],
    )
    def test_settings(self, setting, message, params, inputs):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(nnx.merge(graph(setting), params), *inputs)

    @pytest.mark.parametrize("shape", [(1, 12, 12, 4), (1, 12, 11, 3)])
    def test_latents(self, shape, params):
        with pytest.raises(ValueError, match=r"\[B, H, W, 3\] latents .* patch_size 2, received"):
            jax.eval_shape(nnx.merge(graph(None), params), jnp.zeros(shape), 0, jnp.array([0]))

    def test_options_of_loading(self, params, tmp_path):
        folder = save_pytorch(nnx.merge(graph(None), params), tmp_path / "dit")
        with pytest.raises(ValueError, match=r"takes no atention; .* takes attention, .*remat"):
            load_pytorch(folder, atention=SPARSE)
        with pytest.raises(ValueError, match=r"with attention=\[\]: attention takes one setting"):
            load_pytorch(folder, attention=[])
        (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        with pytest.raises(ValueError, match="is a pipeline: attention= is for a component"):
            load_pytorch(folder, attention=SPARSE)
