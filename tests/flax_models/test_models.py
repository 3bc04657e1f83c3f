"""Parity of the ports with diffusers and transformers: outputs and all gradients.

The exact values are torch's in float64.  Every tensor is within 1e-5 of them, or within twice
torch's own float32 error where that is larger; all parameters' gradients together are within twice
torch's error plus 1e-6.  Two float32 programs differ by their order of summation.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

from conceptax.converters import load_pytorch
from conceptax.converters.tensors import tensor_specs, variables
from conceptax.converters.verification import verify
from conceptax.flax_models.abstract import OneKey
from conceptax.flax_models.autoencoder_kl import (
    AutoencoderKL,
    AutoencoderKLConfig,
    AutoencoderKLFlux2,
    AutoencoderKLFlux2Config,
)
from conceptax.flax_models.autoencoder_kl_hunyuan_video import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideoConfig,
)
from conceptax.flax_models.autoencoder_kl_wan import AutoencoderKLWanConfig
from conceptax.flax_models.clip import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)
from conceptax.flax_models.configs import ModelConfig
from conceptax.flax_models.dit_transformer_2d import DiTTransformer2DConfig, DiTTransformer2DModel
from conceptax.flax_models.layers.attention import dot_product_attention
from conceptax.flax_models.layers.checks import check_axes
from conceptax.flax_models.layers.linear import linear
from conceptax.flax_models.layers.remat import recomputed
from conceptax.flax_models.layers.resnet import Upsample2D, conv1x1, conv3x3
from conceptax.flax_models.llama import LlamaConfig, LlamaModel
from conceptax.flax_models.pretrained import Buffer
from conceptax.flax_models.qwen3 import Qwen3Config, Qwen3Model
from conceptax.flax_models.sd3_transformer_2d import SD3Transformer2DConfig
from conceptax.flax_models.t5 import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel
from conceptax.flax_models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from conceptax.flax_models.wan_transformer_3d import WanTransformer3DConfig
from conceptax.kernels.convolution import convolve_depthwise

ORACLES = {
    "unet": ("unet", {}),
    "unet odd size": ("unet", {"size": (9, 7)}),
    "unet with other settings": (
        "unet",
        {
            "mid_block_type": None,
            "center_input_sample": True,
            "flip_sin_to_cos": False,
            "use_linear_projection": True,
            "attention_head_dim": (2, 4),
            "layers_per_block": (1, 2),
        },
    ),
    "unet of SDXL": ("unet_xl", {}),
    "video unet": ("unet_motion", {}),
    "video unet with other settings": (
        "unet_motion",
        {
            "size": (9, 7),
            "use_motion_mid_block": False,
            "use_linear_projection": True,
            "layers_per_block": (1, 2),
            "motion_num_attention_heads": (1, 2),
            "temporal_transformer_layers_per_block": (2, 1),
        },
    ),
    "dit": ("dit", {}),
    "dit with other settings": (
        "dit",
        {
            "norm_elementwise_affine": True,
            "norm_eps": 1e-3,
            "attention_bias": False,
            "patch_size": 1,
            "out_channels": None,
        },
    ),
    "dit beyond its size": ("dit", {"sample_size": 4}),
    "flux": ("flux", {}),
    "flux without guidance": (
        "flux",
        {"guidance_embeds": False, "out_channels": 2, "num_layers": 1, "num_single_layers": 1},
    ),
    "SD 3.5": ("sd3", {}),
    "SD 3": (
        "sd3",
        {
            "qk_norm": None,
            "dual_attention_layers": (),
            "num_layers": 2,
            "out_channels": 3,
            "pos_embed_max_size": 7,
        },
    ),
    "HunyuanVideo": ("hunyuan_video", {}),
    "HunyuanVideo with other settings": (
        "hunyuan_video",
        {
            "whole_text": True,
            "guidance_embeds": False,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "out_channels": 3,
            "patch_size": 1,
            "patch_size_t": 3,
            "rope_theta": 300,
        },
    ),
    "flux 2": ("flux_2", {}),
    "flux 2 with guidance": (
        "flux_2",
        {
            "guidance_embeds": True,
            "num_layers": 1,
            "num_single_layers": 1,
            "out_channels": 2,
            "mlp_ratio": 2.5,
            "rope_theta": 300,
            "eps": 1e-3,
            "timestep_guidance_channels": 64,
        },
    ),
    "Cosmos from text": ("cosmos", {"in_channels": 4, "concat_padding_mask": False}),
    "Cosmos from video": ("cosmos", {"patch_size": (3, 2, 2), "num_layers": 1}),
    "Cosmos-Predict2, of timesteps per frame": (
        "cosmos",
        {
            "frames": True,
            "fps": None,
            "out_channels": 3,
            "extra_pos_embed_type": None,
            "rope_scale": (1.0, 3.0, 2.0),
            "mlp_ratio": 2.5,
            "num_layers": 1,
        },
    ),
    "wan": ("wan", {}),
    "wan at one time": (
        "wan",
        {
            "times": (),
            "patch_size": (2, 2, 1),
            "cross_attn_norm": False,
            "out_channels": 3,
            "eps": 1e-3,
            "num_layers": 1,
        },
    ),
    "wan at times per token": ("wan", {"times": (2, 4, 2, 3)}),
    "autoencoder": ("autoencoder", {}),
    "autoencoder of FLUX.1 and SD 3": (
        "autoencoder",
        {
            "latent_channels": 16,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
        },
    ),
    "autoencoder of FLUX.2, without attention": (
        "autoencoder_flux_2",
        {"mid_block_add_attention": False},
    ),
    "autoencoder of HunyuanVideo": ("autoencoder_hunyuan_video", {}),
    "autoencoder of HunyuanVideo, in pieces": ("autoencoder_hunyuan_video", {"frames": 21}),
    "autoencoder of Wan 2.1": ("autoencoder_wan", {}),
    "autoencoder of Wan 2.2": (
        "autoencoder_wan",
        {"shape": (5, 16, 24), **oracles.WAN_2_2_AUTOENCODER},
    ),
    "autoencoder of Cosmos": ("autoencoder_cosmos", {}),
    "autoencoder of Cosmos, 16 pixels and 8 frames per latent": (
        "autoencoder_cosmos",
        {
            "spatial_compression_ratio": 16,
            "attention_resolutions": (),
            "encoder_block_out_channels": (8, 8, 8, 12),
        },
    ),
    "clip text": ("clip_text", {}),
    "clip text, published end of text": ("clip_text", {"eos_token_id": 2, "hidden_act": "gelu"}),
    "clip text of SD 2": (
        "clip_text",
        {"eos_token_id": 2, "hidden_act": "gelu", "num_hidden_layers": 1},
    ),
    "clip text with projection": (
        "clip_text",
        {"projection": True, "eos_token_id": 2, "hidden_act": "gelu"},
    ),
    "clip": ("clip", {}),
    "T5": ("t5", {}),
    "T5 1.0 with a mask": ("t5", {"feed_forward_proj": "relu", "masked": True}),
    "UMT5 with a mask": ("t5", {"name": "UMT5", "masked": True}),
    "Llama": ("llama", {}),
    "Llama with a head, to its end": (
        "llama",
        {"lm": True, "read": (-1, 0), "num_key_value_heads": None, "head_dim": 6},
    ),
    "Qwen3": ("qwen3", {}),
    "Qwen3 to its end": ("qwen3", {"read": (5, 0, 3), "lm": False, "attention_bias": True}),
}


# What the others cover in fewer programs.
SLOW = (
    "unet with other settings",
    "autoencoder of Wan 2.1",
    "unet odd size",
    "video unet with other settings",
    "autoencoder of HunyuanVideo, in pieces",
    "autoencoder of Cosmos, 16 pixels and 8 frames per latent",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ORACLES],
)
def test_parity(name, torch, tmp_path):
    kind, changes = ORACLES[name]
    oracle = getattr(oracles, kind)(**changes)
    oracle.module.save_pretrained(tmp_path)
    single = oracles.torch_results(oracle, torch.float32)
    exact = oracles.torch_results(oracle, torch.float64)
    model = load_pytorch(tmp_path, **oracle.options)
    received = oracles.jax_results(oracle, model)

    def check(what, ours, theirs, reference):
        allowed = max(1e-5, 2 * oracles.relative_error(theirs, reference))
        assert oracles.relative_error(ours, reference) <= allowed, what

    check("output", received[0], single[0], exact[0])
    for key in oracle.inputs:
        check(f"gradient of {key}", received[1][key], single[1][key], exact[1][key])
    prefix, unread = getattr(model, "pytorch_prefix", ""), model.published_config.unread
    assert not any(exact[2][key] is not None for key in unread.keys() & exact[2].keys())
    names = {key: key.removeprefix(prefix) for key in exact[2].keys() - unread.keys()}
    slots = variables(model)
    constants = {s.key for s in tensor_specs(model) if isinstance(slots[s.path], Buffer)}
    assert set(names.values()) == set(received[2]) - constants
    assert not any(received[2][name].any() for key, name in names.items() if exact[2][key] is None)
    gradients = {key: g for key, g in exact[2].items() if g is not None}
    largest = max(np.linalg.norm(gradient) for gradient in gradients.values())
    for key, gradient in gradients.items():
        if np.linalg.norm(gradient) > 1e-6 * largest:  # keys' biases: exactly zero in theory
            check(f"gradient of {key}", received[2][names[key]], single[2][key], gradient)
    ours, theirs, reference = (
        np.concatenate([np.ravel(part) for part in parts])
        for parts in (
            [received[2][names[key]] for key in gradients],
            [single[2][key] for key in gradients],
            gradients.values(),
        )
    )
    allowed = 2 * oracles.relative_error(theirs, reference) + 1e-6
    assert oracles.relative_error(ours, reference) <= allowed, "all gradients"


@pytest.mark.parametrize(
    ("kind", "remat"),
    [
        pytest.param("unet", True, marks=pytest.mark.slow),
        ("dit", "dots_saveable"),
        pytest.param("flux", True, marks=pytest.mark.slow),
        pytest.param("autoencoder", True, marks=pytest.mark.slow),
        ("clip_text", "dots_with_no_batch_dims_saveable"),
    ],
)
def test_remat_changes_nothing(kind, remat, torch, tmp_path):
    oracle = getattr(oracles, kind)()
    oracle.module.save_pretrained(tmp_path)
    plain = load_pytorch(tmp_path)
    graphdef, state = nnx.split(plain)
    shape = nnx.eval_shape(
        lambda: type(plain)(plain.config, remat=remat, rngs=nnx.Rngs(0))  # type: ignore[call-arg]
    )
    again = nnx.merge(nnx.split(shape)[0], state)
    output, inputs, parameters = oracles.jax_results(oracle, again)
    expected = oracles.jax_results(oracle, nnx.merge(graphdef, state))
    np.testing.assert_allclose(output, expected[0], rtol=1e-5, atol=1e-5)
    for received, wanted in ((inputs, expected[1]), (parameters, expected[2])):
        largest = max((np.abs(value).max() for value in wanted.values()), default=0)
        for key in wanted:
            # Gradients of keys' biases are zero but for rounding.
            scale = np.abs(wanted[key]).max() + 1e-2 * largest
            np.testing.assert_allclose(received[key], wanted[key], atol=2e-5 * scale, err_msg=key)


def test_remat_policies_keep_what_they_say():
    def products(remat):
        weight = jnp.ones((4, 4))
        layer = recomputed(lambda x: jnp.sin(jnp.sin(x @ weight) @ weight), remat)
        return str(jax.make_jaxpr(jax.grad(lambda x: layer(x).sum()))(jnp.ones((2, 4)))).count(
            "dot_"
        )

    assert products(False) == products("dots_saveable") == 4  # two forwards, two backwards
    assert products(True) == products("nothing_saveable") > 4
    with pytest.raises(ValueError, match=r"remat accepts True, False, .* received 'dots'"):
        recomputed(jnp.sin, "dots")


@pytest.mark.slow  # traces whole models; tests of families compare their keys and shapes too
def test_published_sizes():
    def count(model_class, config):
        keys = OneKey()
        model = nnx.eval_shape(lambda: model_class(config, rngs=keys))
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(model)))

    assert count(UNet2DConditionModel, UNet2DConditionConfig.stable_diffusion_1_5()) == 859_520_964
    assert count(DiTTransformer2DModel, DiTTransformer2DConfig()) == 749_808_016
    assert count(AutoencoderKL, AutoencoderKLConfig()) == 83_653_863
    assert count(CLIPTextModel, CLIPTextConfig.stable_diffusion_1_5()) == 123_060_480
    assert count(UNet2DConditionModel, UNet2DConditionConfig.stable_diffusion_2_1()) == 865_910_724
    assert count(UNet2DConditionModel, UNet2DConditionConfig.stable_diffusion_xl()) == 2_567_463_684
    assert count(CLIPTextModel, CLIPTextConfig.stable_diffusion_2()) == 340_387_840
    assert count(AutoencoderKL, AutoencoderKLConfig.flux_1()) == 83_819_683
    statistics = 2 * 128  # which PyTorch does not count
    assert count(AutoencoderKLFlux2, AutoencoderKLFlux2Config()) == 84_046_115 + statistics
    config = AutoencoderKLHunyuanVideoConfig()
    assert count(AutoencoderKLHunyuanVideo, config) == 246_478_803
    assert count(Qwen3Model, Qwen3Config()) == 3_114_088_192
    whole = functools.partial(LlamaModel, read=(-1,))
    assert count(whole, LlamaConfig.hunyuan_video()) == 7_505_186_816
    read = 2 * 218_112_000 + 4096  # without two layers and the norm
    assert count(LlamaModel, LlamaConfig.hunyuan_video()) == 7_505_186_816 - read
    assert count(T5EncoderModel, T5Config.xxl()) == 4_762_310_656
    assert count(T5EncoderModel, T5Config.t5_11b()) == 4_864_791_552
    assert count(UMT5EncoderModel, UMT5Config.xxl()) == 5_680_910_336
    second = CLIPTextConfig.stable_diffusion_xl_2()
    assert count(CLIPTextModelWithProjection, second) == 694_659_840


def test_bfloat16_computes_and_stores():
    config = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=50,
        max_position_embeddings=8,
        eos_token_id=49,
    )
    model = CLIPTextModel(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    ids = jnp.array([[3, 4, 49]])
    assert model(ids).pooled.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("bfloat16")}
    full = nnx.merge(
        nnx.split(CLIPTextModel(config, rngs=nnx.Rngs(0)))[0],
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), nnx.to_pure_dict(nnx.state(model))),
    )
    difference = model(ids).pooled.astype(jnp.float32) - full(ids).pooled
    assert jnp.linalg.norm(difference) < 0.03 * jnp.linalg.norm(full(ids).pooled)


@pytest.mark.parametrize("chunk", [4, 5, None])
@pytest.mark.parametrize(
    ("keys", "masked", "causal"),
    [
        (12, False, False),
        (10, False, False),
        (12, True, False),
        (12, False, True),
        (12, True, True),
    ],
    ids=["self", "cross", "masked", "causal", "masked causal"],
)
def test_long_attention_is_attention(keys, masked, causal, chunk, monkeypatch):
    random = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, 12, 2, 4), (2, keys, 2, 4), (2, keys, 2, 4))
    operands = [jax.random.normal(*each) for each in zip(random, shapes, strict=True)]
    mask = (jnp.arange(keys) != jnp.array([[3], [7]]))[:, None, None] if masked else None

    def expected(query, key, value):
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / 2.0
        if masked:
            logits = jnp.where(mask, logits, -jnp.inf)
        if causal:
            logits = jnp.where(jnp.tril(jnp.ones((12, keys), bool)), logits, -jnp.inf)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value)

    def both(function):
        out, pull = jax.vjp(function, *operands)
        return out, *pull(jnp.cos(jnp.arange(float(out.size))).reshape(out.shape))

    if chunk:
        monkeypatch.setattr("conceptax.kernels.attention._MANY_LOGITS", keys * chunk)
        monkeypatch.setattr("conceptax.kernels.attention._TOO_MANY_LOGITS", 0)
    received = both(lambda *each: dot_product_attention(*each, mask=mask, is_causal=causal))
    for one, other in zip(received, both(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


@pytest.mark.parametrize("long", [True, False])
def test_attention_is_the_same_at_any_size(long, monkeypatch):
    """Dtypes, promotion, empty batches, values of another dimension, and other platforms."""
    if long:
        monkeypatch.setattr("conceptax.kernels.attention._MANY_LOGITS", 96)
    random = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, 12, 2, 4), (2, 12, 2, 4), (2, 12, 2, 6))
    query, key, value = (jax.random.normal(*each) for each in zip(random, shapes, strict=True))
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / 2.0
    expected = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value)
    np.testing.assert_allclose(dot_product_attention(query, key, value), expected, atol=2e-6)
    dtypes = ((jnp.float32, jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32, jnp.float32))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for each in dtypes:
            for causal in (False, True):
                operands = [x.astype(t) for x, t in zip((query, key, value), each, strict=True)]
                attended = dot_product_attention(*operands, is_causal=causal)
                assert attended.dtype == each[2]
                if not causal:
                    np.testing.assert_allclose(attended.astype(jnp.float32), expected, atol=0.03)
    for tokens, keys in ((12, 12), (12, 0), (0, 0)):
        empty = query[:0, :tokens], key[:0, :keys], value[:0, :keys]
        assert dot_product_attention(*empty).shape == (0, tokens, 2, 6)
    assert jax.vmap(dot_product_attention)(*(x[None][:0] for x in empty)).shape == (0, 0, 0, 2, 6)
    traced = jax.jit(jax.grad(lambda *x: dot_product_attention(*x).sum())).trace(query, key, value)
    for platform in ("tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "custom_call @conceptax" not in text
    (batch,) = jax.export.symbolic_shape("batch")
    operands = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in (query, key, value)]
    exported = jax.export.export(jax.jit(dot_product_attention), platforms=("cpu", "tpu"))
    attended = exported(*operands).call(query, key, value)
    np.testing.assert_allclose(attended, expected, atol=2e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_a_large_batch_is_encoded_in_parts(masked, monkeypatch):
    config = CLIPTextConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=9,
        max_position_embeddings=4,
        eos_token_id=8,
    )
    model = CLIPTextModel(config, rngs=nnx.Rngs(0))
    ids = jax.random.randint(jax.random.key(1), (6, 4), 0, 8)
    mask = jax.random.bernoulli(jax.random.key(2), 0.7, (6, 4)).at[:, 0].set(True)
    graphdef, params = nnx.split(model)

    def encode(params):
        output = nnx.merge(graphdef, params)(ids, attention_mask=mask if masked else None)
        return jnp.concatenate([each.reshape(-1) for each in output])

    def both():
        run = jax.jit(lambda: encode(params))
        pull = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(encode(params)))))
        return "while" in run.lower().as_text(), run(), pull(params)

    in_parts, out, gradient = both()
    assert not in_parts
    monkeypatch.setattr("conceptax.kernels.memory._TOKENS_IN_CACHE", 8)
    in_parts, same_out, same_gradient = both()
    assert in_parts == (jax.default_backend() == "cpu")
    np.testing.assert_allclose(same_out, out, atol=1e-6)
    for one, other in zip(*map(jax.tree.leaves, (same_gradient, gradient)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)  # of up to 20


# Each writes a folder, for its class there, and reads it; parity is the business of others.
@pytest.mark.parametrize(
    "kind",
    [
        *("dit", "flux", "unet_motion", "t5", "cosmos", "autoencoder_cosmos"),
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in (
                *("flux_2", "sd3", "wan", "hunyuan_video", "llama", "qwen3"),
                *("autoencoder_flux_2", "autoencoder_hunyuan_video", "autoencoder_wan"),
            )
        ),
    ],
)
def test_verify_runs_both_frameworks(kind, torch, tmp_path):
    oracle = getattr(oracles, kind)()
    oracle.module.save_pretrained(tmp_path)
    model = load_pytorch(tmp_path, **oracle.options)
    (difference,) = verify(model, tmp_path).values()
    assert difference is not None and difference < 1e-5


def test_half_precision_keeps_its_range():
    """As in transformers: where T5's activations leave float16's range, products are in float32."""
    config = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    model = T5EncoderModel(config, dtype=jnp.float16, param_dtype=jnp.float16, rngs=nnx.Rngs(0))
    for block in model.encoder.block:
        last = block.layer[1].DenseReluDense.wo.kernel
        last[...] = jnp.float16(3e4) * last[...]
        first = block.layer[1].DenseReluDense.wi.kernel
        first[...] = jnp.float16(100) * first[...]
    ids = jnp.arange(6)[None]
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), nnx.to_pure_dict(nnx.state(model)))
    exact = nnx.merge(nnx.split(T5EncoderModel(config, rngs=nnx.Rngs(0)))[0], wide)
    inside, _ = exact.encoder.block[0](exact.shared(ids), None, None)
    assert jnp.abs(inside).max() > jnp.finfo(jnp.float16).max
    received = model(ids)
    assert received.dtype == jnp.float16
    np.testing.assert_allclose(received, exact(ids), atol=0.02)


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (2, 0)])
def test_a_kernel_larger_than_the_image_convolves(stride, padding):
    conv = conv3x3(3, 40, stride=stride, padding=padding, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 5, 4, 3))
    graphdef, params = nnx.split(conv)

    def expected(params, x):
        return jax.lax.conv_general_dilated(
            x,
            params["kernel"][...],
            (stride, stride),
            ((padding, padding),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def both(function):
        out, pull = jax.vjp(function, params, x)
        d_params, d_x = pull(jnp.cos(jnp.arange(float(out.size))).reshape(out.shape))
        return out, d_params["kernel"][...], d_x

    call = jax.jit(lambda: both(lambda params, x: nnx.merge(graphdef, params)(x)))
    if jax.default_backend() == "cpu":
        assert " convolution(" not in call.lower().compile().as_text()
    for received, wanted in zip(call(), both(expected), strict=True):
        np.testing.assert_allclose(received, wanted, rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 1, 1), (5, 1, 2), (3, 2, 1), (3, 1, 0), (2, 1, 1)]
)
def test_a_depthwise_convolution_of_any_settings(size, stride, padding):
    kernel = jax.random.normal(jax.random.key(0), (size, size, 1, 3))
    x = jax.random.normal(jax.random.key(1), (2, 5, 6, 3))
    settings = ((stride, stride), ((padding, padding),) * 2)
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 3}

    def both(convolve):
        out, pull = jax.vjp(lambda x, kernel: convolve(x, kernel, *settings, **options), x, kernel)
        return out, *pull(jnp.cos(jnp.arange(float(out.size))).reshape(out.shape))

    wanted = both(jax.lax.conv_general_dilated)
    for received, one in zip(both(convolve_depthwise), wanted, strict=True):
        np.testing.assert_allclose(received, one, rtol=1e-6, atol=3e-6)


def test_a_doubled_image_is_convolved_before_it_is_doubled():
    upsample = Upsample2D(5, rngs=nnx.Rngs(0))
    upsample.conv.bias.set_value(jnp.arange(5.0))
    x = jax.random.normal(jax.random.key(1), (2, 9, 15, 5))
    graphdef, params = nnx.split(upsample)

    def expected(params, x):
        return nnx.merge(graphdef, params).conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))

    def both(function):
        out, pull = jax.vjp(function, params, x)
        return [
            out,
            *jax.tree.leaves(pull(jnp.cos(jnp.arange(float(out.size))).reshape(out.shape))),
        ]

    call = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x, (18, 30)))
    convolved = [
        line for line in call.lower(params, x).as_text().splitlines() if "convolut" in line
    ]
    assert any("2x10x16x20" in line for line in convolved)
    for received, wanted in zip(both(call), both(expected), strict=True):
        np.testing.assert_allclose(received, wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("config", "raw", "names"),
    [
        (UNet2DConditionConfig, {"addition_embed_type": "image_hint"}, "addition_embed_type"),
        (UNet2DConditionConfig, {"addition_embed_type": "text_time"}, "addition_time_embed_dim"),
        (UNet2DConditionConfig, {"transformer_layers_per_block": [[1, 2]] * 4}, "transformer_lay"),
        (UNet2DConditionConfig, {"no_such_setting": 1}, "no_such_setting"),
        (UNet2DConditionConfig, {"block_out_channels": [30, 30, 30, 30]}, "32 groups"),
        (UNet2DConditionConfig, {"down_block_types": ["KDownBlock2D"] * 4}, "KDownBlock2D"),
        (UNet2DConditionConfig, {"layers_per_block": 0}, "layers_per_block"),
        (DiTTransformer2DConfig, {"norm_type": "ada_norm_single"}, "norm_type"),
        (DiTTransformer2DConfig, {"attention_head_dim": 9, "num_attention_heads": 2}, "18 feat"),
        (DiTTransformer2DConfig, {"sample_size": 9}, "multiple of patch_size"),
        (AutoencoderKLConfig, {"act_fn": "gelu"}, "act_fn"),
        (CLIPTextConfig, {"hidden_act": "relu"}, "relu"),
        (
            T5Config,
            {"feed_forward_proj": "gated-silu"},
            "'relu' or 'gated-gelu', received 'gated-s",
        ),
        (AutoencoderKLFlux2Config, {"decoder_block_out_channels": [32]}, "must be 4, one per bl"),
        (AutoencoderKLFlux2Config, {"patch_size": [2, 1]}, "two equal numbers"),
        (AutoencoderKLHunyuanVideoConfig, {"temporal_compression_ratio": 8}, "supported: 4"),
        (AutoencoderKLHunyuanVideoConfig, {"spatial_compression_ratio": 12}, "received 12"),
        (Qwen3Config, {"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
        (Qwen3Config, {"num_key_value_heads": 5}, "32 heads do not divide"),
        (Qwen3Config, {"use_sliding_window": True}, "use_sliding_window"),
        (LlamaConfig, {"rope_parameters": {"rope_type": "llama3"}}, "LlamaConfig.*'llama3'"),
        (LlamaConfig, {"mlp_bias": True}, "mlp_bias=True"),
        (LlamaConfig, {"num_attention_heads": 30, "hidden_size": 90}, "must be even, received 3"),
        (SD3Transformer2DConfig, {"qk_norm": "layer_norm"}, "None or 'rms_norm', received 'layer"),
        (SD3Transformer2DConfig, {"caption_projection_dim": 64}, "must be the 1152 features of 18"),
        (SD3Transformer2DConfig, {"dual_attention_layers": [0, 18]}, "18. are not among the 18"),
        (WanTransformer3DConfig, {"added_kv_proj_dim": 5120}, "reads an image too .added_kv_pro"),
        (WanTransformer3DConfig, {"patch_size": [2, 2]}, "three numbers, received .2, 2."),
        (WanTransformer3DConfig, {"attention_head_dim": 7}, "even number of at least 6, received"),
        (AutoencoderKLWanConfig, {"z_dim": 4}, "latents_mean takes 4 numbers, .*; received 16"),
        (AutoencoderKLWanConfig, {"temperal_downsample": [True]}, "takes 3 entries for 4 levels"),
        (AutoencoderKLWanConfig, {"patch_size": 2}, "in_channels 3 is not a multiple of the 4 pix"),
        (AutoencoderKLWanConfig, {"scale_factor_spatial": 16}, "spatial is 8 .* received 16"),
        (AutoencoderKLWanConfig, {"attn_scales": [1.0]}, "attn_scales"),
        (T5Config, {"relative_attention_num_buckets": 6}, "multiple of 4, received 6"),
        (T5Config, {"relative_attention_max_distance": 8}, "over 8, the distances"),
        (CLIPTextConfig, {"num_attention_heads": 7}, "7 heads"),
        (CLIPConfig, {"vision_config": {"image_size": 10, "patch_size": 3}}, "patch_size"),
    ],
)
def test_configs_refuse_what_they_cannot_represent(
    config: type[ModelConfig], raw: dict, names: str
):
    with pytest.raises(ValueError, match=names):
        config.from_dict(raw)


def test_inputs_of_the_wrong_shape_are_named():
    config = CLIPTextConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=9,
        max_position_embeddings=4,
        eos_token_id=8,
    )
    model = CLIPTextModel(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="at most 4 tokens, received 5"):
        model(jnp.zeros((1, 5), jnp.int32))
    with pytest.raises(ValueError, match="eos_positions"):
        model(inputs_embeds=jnp.zeros((1, 3, 8)))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()


def test_arrays_without_a_batch_are_told():
    """What annotations say is checked in tests alone; users get a sentence."""
    check_axes(np.zeros((1, 77)), "B L", "a model's input_ids")
    with pytest.raises(
        ValueError, match=r"a model's input_ids must have 2 axes, \[B, L\], received"
    ) as error:
        check_axes(np.zeros(77), "B L", "a model's input_ids")
    assert str(error.value).endswith("(77,): add one for the batch, x[None].")
    with pytest.raises(ValueError, match=r"received the shape \(1, 2, 3, 4\)\.$"):
        check_axes(np.zeros((1, 2, 3, 4)), "B L", "a model's input_ids")


def test_initial_values_are_those_of_flax():
    """And a model of shapes alone has the same shapes and dtypes without them."""
    layers = {linear: nnx.Linear, conv1x1: functools.partial(nnx.Conv, kernel_size=(1, 1))}
    for ours, theirs in layers.items():
        made, other = (kind(4, 3, rngs=nnx.Rngs(0)) for kind in (ours, theirs))
        np.testing.assert_array_equal(made.kernel[...], other.kernel[...])
        assert np.ptp(made.kernel[...]) > 0
        options = {"param_dtype": jnp.bfloat16, "rngs": OneKey()}
        made, other = (
            nnx.eval_shape(functools.partial(kind, 4, 3, **options)) for kind in (ours, theirs)
        )
        assert made.kernel.get_value() == other.kernel.get_value()
