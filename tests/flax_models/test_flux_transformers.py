"""FLUX.1's and FLUX.2's transformers with neighborhood attention, their files, and their errors.

Parity of the dense models with diffusers is in `test_models.py`.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gna_oracle import dense_under, full_mask

from conceptax.converters import load_pytorch, save_pytorch
from conceptax.converters.tensors import tensor_specs
from conceptax.flax_models.abstract import OneKey
from conceptax.flax_models.flux_2_transformer_2d import (
    Flux2Transformer2DConfig,
    Flux2Transformer2DModel,
)
from conceptax.flax_models.flux_transformer_2d import (
    FluxTransformer2DConfig,
    FluxTransformer2DModel,
)
from conceptax.flax_models.layers.attention import GNA
from conceptax.flax_models.layers.joint_attention import JointTextCondition
from conceptax.kernels.gna.presets import PRESETS, Preset
from conceptax.kernels.gna.problem import windows_of

GRID, TEXT = (4, 6), 3
WINDOWS = ({"window": (2, 3), "stride": (2, 1)}, {"window": (2, 3), "dilation": (2, 1)})
SPARSE = tuple(GNA(**each) for each in WINDOWS)
TINY: dict[str, Any] = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
}


@dataclasses.dataclass
class Family:
    model: Any
    config: Any
    params: Any

    def graph(self, attention=None, **options):
        return nnx.split(
            nnx.eval_shape(
                lambda: self.model(self.config, attention=attention, **options, rngs=nnx.Rngs(0))
            )
        )[0]

    def run(self, attention=None, **options):
        """Output, and gradients of latents and text states, under jit."""
        graphdef = self.graph(attention, **options)

        @jax.jit
        def both(params, latents, states):
            def loss(latents, states):
                condition = JointTextCondition(states, *INPUTS[2:])
                output = nnx.merge(graphdef, params)(latents, jnp.array([3, 700]), condition)
                return jnp.sum(jnp.sin(output)), output

            return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(latents, states)

        with jax.default_matmul_precision("highest"):
            (_, output), gradients = both(self.params, *INPUTS[:2])
        return output, *gradients


def _inputs():
    rng = np.random.default_rng(1)
    shapes = (2, *GRID, 4), (2, TEXT, 12), (2, 10)
    arrays = [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]
    return *arrays, jnp.array([3.5, 1.0])


INPUTS = _inputs()  # latents, states, pooled, guidance


@pytest.fixture(scope="module", params=["FLUX.1", "FLUX.2"])
def family(request):
    """A model with one set of parameters, none of them zero."""
    if request.param == "FLUX.1":
        settings = {"pooled_projection_dim": 10, "axes_dims_rope": (4, 4, 8)}
        config = FluxTransformer2DConfig(**TINY, **settings, guidance_embeds=True)
        model: Any = FluxTransformer2DModel
    else:
        config = Flux2Transformer2DConfig(**TINY, axes_dims_rope=(2, 4, 4, 6))
        model = Flux2Transformer2DModel
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(nnx.state(model(config, rngs=nnx.Rngs(0)))))
    rng = np.random.default_rng(0)
    values = [leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    return Family(model, config, jax.tree.unflatten(tree, values))


@pytest.fixture(scope="module")
def dense(family):
    return family.run()


@pytest.fixture(scope="module")
def sparse(family):
    return family.run(SPARSE)


def neighborhoods(model):
    """Of the double block and the single one."""
    (double,), (single,) = model.transformer_blocks, model.single_transformer_blocks
    owner = single if isinstance(model, FluxTransformer2DModel) else single.attn
    return double.attn.neighborhood, owner.neighborhood


def assert_close(received, expected):
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * float(jnp.abs(other).max()), rtol=0)


def test_a_window_of_the_whole_grid_is_dense(family, dense):
    assert_close(family.run(GNA(window=GRID, stride=2)), dense)


def test_each_block_sees_its_neighborhoods_and_the_text(family, sparse, dense, monkeypatch):
    """The dense model under explicit masks on [text; image], one per block, is the sparse one."""
    ones, masks = (1, 1), []
    for each in WINDOWS:
        case = {"layout": GRID, "kernel_size": each["window"], "is_causal": (False, False)}
        case |= {"stride": each.get("stride", ones), "dilation": each.get("dilation", ones)}
        masks.append(np.pad(full_mask(case), (TEXT, 0), constant_values=True))
    order = iter(masks)
    monkeypatch.setattr(
        "conceptax.flax_models.layers.joint_attention.dot_product_attention", dense_under(order)
    )
    assert_close(family.run(), sparse)
    assert next(order, None) is None
    assert float(jnp.abs(sparse[0] - dense[0]).max()) > 1e-3


def test_double_blocks_come_before_single_ones(family):
    graphdef = family.graph([SPARSE[0], None])
    model = nnx.merge(graphdef, family.params)
    assert neighborhoods(model) == (SPARSE[0], None)
    same = family.graph((GNA(window=[2, 3], stride=[2, 1]), None))
    assert hash(graphdef) == hash(same) and graphdef == same


def test_bfloat16(family, sparse):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), family.params)
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    output, *_ = dataclasses.replace(family, params=half).run(SPARSE, **options)
    assert output.dtype == jnp.bfloat16
    difference = output.astype(jnp.float32) - sparse[0]
    assert jnp.linalg.norm(difference) < 0.05 * jnp.linalg.norm(sparse[0])


def test_files_go_to_diffusers_and_back(family, tmp_path, torch):
    import diffusers

    folder = save_pytorch(nnx.merge(family.graph(), family.params), tmp_path / "dense")
    theirs, info = getattr(diffusers, family.model.__name__).from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_pytorch(tmp_path / "theirs", attention=SPARSE, remat=True)
    assert model.config == family.config and model.remat
    received = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))
    for one, other in zip(received, jax.tree.leaves(family.params), strict=True):
        np.testing.assert_array_equal(one, other)
    assert neighborhoods(model) == SPARSE
    again = save_pytorch(model, tmp_path / "again")
    name = "diffusion_pytorch_model.safetensors"
    assert (again / name).read_bytes() == (folder / name).read_bytes()
    settings = [json.loads((at / "config.json").read_text()) for at in (again, tmp_path / "theirs")]
    assert settings[0] == settings[1]


def test_settings_of_adapters_to_4k(torch, tmp_path, monkeypatch):
    """Diffusers with another base of its rotary embedding and another scale of its logits."""
    import oracles
    from diffusers.models.transformers import transformer_flux

    oracle = oracles.flux(num_layers=1, num_single_layers=1)
    oracle.module.save_pretrained(tmp_path)
    oracle.module.pos_embed.theta *= 10
    scale = (np.log(26) / np.log(4608) / 16) ** 0.5  # 20 tokens of the image, 6 of the text

    def scaled(query, key, value, **options):
        heads = (x.transpose(1, 2) for x in (query, key, value))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(*heads, scale=scale).transpose(1, 2)

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", scaled)
    with torch.no_grad():
        given = {k: torch.tensor(v) for k, v in {**oracle.inputs, **oracle.fixed}.items()}
        expected = oracle.torch_call(**given).numpy()
    model = load_pytorch(tmp_path, ntk_factor=10, attention_scale="proportional")
    graphdef, params = nnx.split(model)
    inputs = {**oracle.inputs, **{key: jnp.asarray(value) for key, value in oracle.fixed.items()}}
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda params, inputs: oracle.jax_call(nnx.merge(graphdef, params), **inputs))
        assert oracles.relative_error(np.asarray(run(params, inputs)), expected) < 1e-5
    plain = load_pytorch(tmp_path)
    assert (plain.config.ntk_factor, plain.config.attention_scale) == (1, None)


@pytest.mark.parametrize(
    ("name", "config", "parameters", "keys"),
    [
        ("FluxTransformer2DModel", FluxTransformer2DConfig.dev(), 11_901_408_320, 1160),
        pytest.param(
            *("FluxTransformer2DModel", FluxTransformer2DConfig.schnell(), 11_891_178_560, 1156),
            marks=pytest.mark.slow,
        ),
        ("Flux2Transformer2DModel", Flux2Transformer2DConfig.klein_4b(), 3_875_544_576, 169),
        ("Flux2Transformer2DModel", Flux2Transformer2DConfig.klein_9b(), 9_078_581_248, 233),
    ],
    ids=["dev", "schnell", "klein 4B", "klein 9B"],
)
def test_published_sizes_have_diffusers_keys_and_shapes(name, config, parameters, keys, torch):
    import diffusers

    kind, rngs = {"1": FluxTransformer2DModel, "2": Flux2Transformer2DModel}, OneKey()
    ours = nnx.eval_shape(lambda: kind["2" if "2T" in name else "1"](config, rngs=rngs))
    with torch.device("meta"):
        theirs = getattr(diffusers, name)(**config.to_dict())
    expected = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert {spec.key: spec.shape for spec in tensor_specs(ours)} == expected
    assert len(expected) == keys
    assert sum(int(np.prod(shape)) for shape in expected.values()) == parameters


def test_older_folders_do_not_tell_the_axes():
    raw = FluxTransformer2DConfig.dev().to_dict()
    del raw["axes_dims_rope"]
    assert FluxTransformer2DConfig.from_dict(raw) == FluxTransformer2DConfig.dev()


def test_a_preset_is_the_settings_of_its_layers(family):
    settings = (None, GNA(window=(None, 2), stride=(1, 2)))
    asked = Preset(layers=(None, Preset((None, 2), (1, 2))))
    assert family.graph(asked) == family.graph(settings)
    assert family.graph("window=allx2 stride=1x2") == family.graph(settings[1])
    layouts = windows_of((4, 6), (None, 2), (1, 2)), windows_of((4, 6), (4, 2), (1, 2))
    assert layouts[0] == layouts[1]


class TestErrors:
    @pytest.mark.parametrize(
        ("attention", "message"),
        [
            (SPARSE[:1], "or 2, one per block, the 1 double blocks before the single ones; rec"),
            ((), "received 0"),
            (PRESETS["cosmos-predict2-2b"], "received 28"),
            ("window=8 strides=4", "has one window and at most one stride"),
            ([None, 8], r"GNA\(\.\.\.\), or None .*; received 8 for layer 1"),
        ],
    )
    def test_settings(self, family, attention, message):
        with pytest.raises(ValueError, match=message):
            family.graph(attention)

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            (GNA(window=5), r"GNA\(window=5\) does not fit a grid of 4x6 tokens: window must"),
            (
                GNA(window=(None, 4), dilation=(1, 2)),
                r"6\)\); the nearest grid that it fits is 4x8\.",
            ),
            (GNA(window=2, stride=3), "4x6 tokens: stride must not exceed window; received 3 > 2"),
        ],
    )
    def test_windows(self, family, setting, message):
        with pytest.raises(ValueError, match=message):
            family.run((None, setting))

    def test_inputs(self, family):
        model = nnx.merge(family.graph(), family.params)
        name = family.model.__name__
        latents, states, pooled, guidance = INPUTS

        def refused(message, latents=latents, states=states, **others):
            others = {"pooled": pooled, "guidance": guidance} | others
            with pytest.raises(ValueError, match=message):
                jax.eval_shape(model, latents, 5, JointTextCondition(states, **others))

        refused(rf"{name} takes \[B, h, w, 4\] latents, received \(2, 4, 6, 3\)", latents[..., :3])
        refused(
            r"takes text states \[2, A, 12\] for a batch of 2, .*\(2, 3, 11\)",
            states=states[..., 1:],
        )
        refused(r"text states \[2, A, 12\] .* received \(1, 3, 12\)", states=states[:1])
        refused("reads padding as text, .*: pass no mask", mask=jnp.ones((2, 3), bool))
        refused(r"conditioned on guidance too.*guidance=\.\.\.", guidance=None)
        if family.model is FluxTransformer2DModel:
            refused(r"conditioned on pooled too.*pooled=\.\.\.", pooled=None)

    def test_factors(self, family):
        if family.model is FluxTransformer2DModel:
            with pytest.raises(ValueError, match="ntk_factor takes a positive number, received 0"):
                family.graph(ntk_factor=0)
            with pytest.raises(ValueError, match="attention_scale takes a positive number"):
                family.graph(attention_scale="large")

    @pytest.mark.parametrize(
        ("config", "raw", "message"),
        [
            (FluxTransformer2DConfig, {"axes_dims_rope": [16, 56]}, "three even numbers"),
            (FluxTransformer2DConfig, {"axes_dims_rope": [16, 56, 50]}, "add up to .* 128"),
            (FluxTransformer2DConfig, {"patch_size": 2}, "patch_size=2"),
            (FluxTransformer2DConfig, {"num_single_layers": 0}, "num_single_layers"),
            (Flux2Transformer2DConfig, {"axes_dims_rope": [32, 48, 48]}, "four even numbers"),
            (Flux2Transformer2DConfig, {"attention_head_dim": 64}, "add up to .* 64"),
            (Flux2Transformer2DConfig, {"no_such_setting": 1}, "no_such_setting"),
        ],
    )
    def test_configs(self, config, raw, message):
        with pytest.raises(ValueError, match=message):
            config.from_dict(raw)
