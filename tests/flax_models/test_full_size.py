"""Models at their published sizes against diffusers and transformers, once.

Torch runs and is freed before JAX starts, the UNet's gradients waiting on disk: about 12 GB of
memory at the peak, 16 GB where a test says so, and a few minutes each.
"""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conceptax.converters import load_pytorch
from conceptax.converters.tensors import tensor_specs
from conceptax.flax_models.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideoConfig
from conceptax.flax_models.autoencoder_kl_wan import AutoencoderKLWanConfig
from conceptax.flax_models.dit_transformer_2d import (
    GNA,
    DiTTransformer2DConfig,
    DiTTransformer2DModel,
)
from conceptax.flax_models.layers.joint_attention import JointTextCondition
from conceptax.flax_models.qwen3 import Qwen3Config
from conceptax.flax_models.sd3_transformer_2d import (
    SD3Transformer2DConfig,
    SD3Transformer2DModel,
)
from conceptax.flax_models.wan_transformer_3d import (
    WanTransformer3DConfig,
    WanTransformer3DModel,
)

TOLERANCE = 1e-5  # relative, float32 at the highest matmul precision

pytestmark = pytest.mark.slow


def relative(received: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(received - expected) / np.linalg.norm(expected))


def test_sd15_unet_output_and_gradients(torch, tmp_path):
    import diffusers
    from safetensors import safe_open
    from safetensors.torch import save_file

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((1, 64, 64, 4), np.float32)
    text = rng.standard_normal((1, 77, 768), np.float32)
    weights = rng.standard_normal((1, 64, 64, 4), np.float32)

    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
    )
    unet.save_pretrained(tmp_path / "unet")
    inputs = [torch.tensor(sample, requires_grad=True), torch.tensor(text, requires_grad=True)]
    output = unet(inputs[0].permute(0, 3, 1, 2), 501, inputs[1]).sample.permute(0, 2, 3, 1)
    (output * torch.tensor(weights)).sum().backward()
    expected_output = output.detach().numpy()
    expected_inputs = [x.grad.numpy() for x in inputs]
    save_file({k: p.grad for k, p in unet.named_parameters()}, tmp_path / "gradients.safetensors")
    del unet, output, inputs
    gc.collect()

    model = load_pytorch(tmp_path / "unet")
    specs = tensor_specs(model)
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    del model, state

    @jax.jit
    def run(params, sample, text):
        def weighted(params, sample, text):
            out = nnx.merge(graphdef, params)(sample, 501, text)
            return (out * weights).sum(), out

        return jax.grad(weighted, argnums=(0, 1, 2), has_aux=True)(params, sample, text)

    with jax.default_matmul_precision("highest"):
        gradients, received_output = run(params, sample, text)
    assert relative(np.asarray(received_output), expected_output) < TOLERANCE
    assert relative(np.asarray(gradients[1]), expected_inputs[0]) < TOLERANCE
    assert relative(np.asarray(gradients[2]), expected_inputs[1]) < TOLERANCE

    errors = {}
    squares = np.zeros(2)
    with safe_open(tmp_path / "gradients.safetensors", "np") as stored:
        assert set(stored.keys()) == {spec.key for spec in specs}
        for spec in specs:
            leaf = gradients[0]
            for name in spec.path:
                leaf = leaf[name]
            received, expected = spec.to_torch(np.asarray(leaf)), stored.get_tensor(spec.key)
            squares += [np.sum((received - expected) ** 2), np.sum(expected**2)]
            errors[spec.key] = relative(received, expected)
    assert np.sqrt(squares[0] / squares[1]) < TOLERANCE
    worst = sorted(errors, key=errors.get)[-5:]
    # A single tensor sums fewer terms than all of them, so rounding averages out less.
    assert errors[worst[-1]] < 5 * TOLERANCE, {key: errors[key] for key in worst}


def test_dit_xl_2_output(torch, tmp_path):
    import diffusers

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 32, 32, 4), np.float32)
    timesteps, labels = np.array([17, 901]), np.array([207, 1000])

    dit = diffusers.DiTTransformer2DModel(out_channels=8).eval()
    dit.save_pretrained(tmp_path / "dit")
    with torch.no_grad():
        expected = dit(
            torch.tensor(latents).permute(0, 3, 1, 2), torch.tensor(timesteps), torch.tensor(labels)
        ).sample.permute(0, 2, 3, 1)
    expected = expected.numpy().copy()
    del dit
    gc.collect()

    model = load_pytorch(tmp_path / "dit")
    assert model.config == DiTTransformer2DConfig.xl_2()
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))
    with jax.default_matmul_precision("highest"):
        received = run(state, latents, timesteps, labels)
    assert relative(np.asarray(received), expected) < TOLERANCE

    # A window of all 16x16 tokens is dense attention, through the kernels.
    sparse = nnx.eval_shape(
        lambda: DiTTransformer2DModel(model.config, attention=GNA(window=16), rngs=nnx.Rngs(0))
    )
    graphdef = nnx.split(sparse)[0]
    run = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))
    with jax.default_matmul_precision("highest"):
        assert relative(np.asarray(run(state, latents, timesteps, labels)), expected) < TOLERANCE


@pytest.mark.parametrize("layers", [2, 36])
def test_qwen3_4b_hidden_states(layers, torch, tmp_path):
    """FLUX.2-klein's text encoder, stored in bfloat16 and computed in float32; of two layers, one
    is read. About 16 GB with all 36."""
    import transformers

    read = (1,) if layers == 2 else (9, 18, 27)
    config = transformers.Qwen3Config(**Qwen3Config(num_hidden_layers=layers).to_dict())
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, (1, 512))
    mask = (np.arange(512) < 60).astype(np.int64)[None]

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = transformers.Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    module.save_pretrained(tmp_path / "qwen3")
    module = module.float().eval()
    with torch.no_grad():
        states = module.model(
            torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True
        ).hidden_states
    expected = [states[index].numpy().copy() for index in read]
    del module, states
    gc.collect()

    model = load_pytorch(tmp_path / "qwen3", read=read, param_dtype="float32")
    assert model.config == Qwen3Config(num_hidden_layers=layers)
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, ids, mask: nnx.merge(graphdef, state)(ids, mask))
    with jax.default_matmul_precision("highest"):
        received = run(state, ids, mask)
    for ours, theirs in zip(received, expected, strict=True):
        assert (
            relative(np.asarray(ours), theirs) < 5 * TOLERANCE
        )  # of torch's rotations, in float32


@pytest.mark.parametrize("layers", [2, 24])
def test_sd3_5_medium_output(layers, torch, tmp_path):
    """Half of the layers, and one of two, attend twice. About 10 GB with all 24."""
    import diffusers

    config = dataclasses.replace(
        SD3Transformer2DConfig.sd3_5_medium(),
        num_layers=layers,
        dual_attention_layers=tuple(range(layers // 2 + (layers == 24))),
    )
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    shapes = (1, 64, 64, 16), (1, 333, 4096), (1, 2048)
    latents, text, pooled = (rng.standard_normal(shape, np.float32) for shape in shapes)
    times = np.array([617])

    module = diffusers.SD3Transformer2DModel(**config.to_dict()).eval()
    module.save_pretrained(tmp_path / "sd3")
    inputs = (torch.tensor(latents).permute(0, 3, 1, 2), *map(torch.tensor, (text, pooled, times)))
    with torch.no_grad():
        expected = module(*inputs).sample.permute(0, 2, 3, 1).numpy().copy()
    del module
    gc.collect()

    model = load_pytorch(tmp_path / "sd3")
    assert model.config == config
    if layers == 24:
        assert config == SD3Transformer2DConfig.sd3_5_medium()
    state = nnx.state(model)
    del model
    for attention in (None, GNA(window=32)):  # of all 32x32 tokens: dense, through the kernels
        graphdef = nnx.split(
            nnx.eval_shape(
                lambda: SD3Transformer2DModel(config, attention=attention, rngs=nnx.Rngs(0))  # noqa: B023
            )
        )[0]
        run = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))  # noqa: B023
        condition = JointTextCondition(jnp.asarray(text), jnp.asarray(pooled))
        with jax.default_matmul_precision("highest"):
            received = run(state, latents, times, condition)
        assert relative(np.asarray(received), expected) < TOLERANCE


def test_wan_1_3b_output(torch, tmp_path):
    """The whole transformer on 384 tokens: three latent frames of 16x32, a time for each token."""
    import diffusers

    config = WanTransformer3DConfig.t2v_1_3b()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, 3, 16, 32, 16), np.float32)
    text = rng.standard_normal((1, 512, 4096), np.float32)
    times = np.full((1, 3, 8, 16), 617)
    times[:, 0] = 0  # a frame that is given

    module = diffusers.WanTransformer3DModel(**config.to_dict()).eval()
    module.save_pretrained(tmp_path / "wan")
    inputs = torch.tensor(latents).permute(0, 4, 1, 2, 3), torch.tensor(text)
    expected = []
    for each in (torch.tensor([617]), torch.tensor(times).flatten(1)):
        with torch.no_grad():
            output = module(inputs[0], each, inputs[1]).sample
        expected.append(output.permute(0, 2, 3, 4, 1).numpy().copy())
    del module, output
    gc.collect()

    model = load_pytorch(tmp_path / "wan")
    assert model.config == config
    state = nnx.state(model)
    del model
    window = GNA(window=(3, 8, 16), stride=(1, 4, 8))  # of all tokens: dense, through the kernels
    for attention, each, wanted in (
        (None, 617, expected[0]),
        (None, times, expected[1]),
        (window, 617, expected[0]),
    ):
        make = lambda: WanTransformer3DModel(config, attention=attention, rngs=nnx.Rngs(0))  # noqa: B023, E731
        graphdef = nnx.split(nnx.eval_shape(make))[0]
        run = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))  # noqa: B023
        with jax.default_matmul_precision("highest"):
            received = run(state, latents, each, text)
        error = relative(np.asarray(received), wanted)
        print(f"{attention}, times of shape {np.shape(each)}: relative error {error:.1e}")
        assert error < TOLERANCE


@pytest.mark.parametrize("version", ["2_1", "2_2"])
def test_wan_autoencoder(version, torch, tmp_path):
    """Nine frames of 64x64, in pieces as diffusers and in one pass. About 7 GB for 2.2's."""
    import diffusers

    config = getattr(AutoencoderKLWanConfig, f"wan_{version}")()
    video = np.random.default_rng(0).standard_normal((1, 9, 64, 64, 3), np.float32).clip(-1, 1)
    torch.manual_seed(0)
    module = diffusers.AutoencoderKLWan(**config.to_dict()).eval()
    module.save_pretrained(tmp_path / "vae")
    with torch.no_grad():
        posterior = module.encode(torch.tensor(video).permute(0, 4, 1, 2, 3)).latent_dist
        decoded = module.decode(posterior.mean).sample
    parts = (posterior.mean, posterior.logvar, decoded)
    expected = [x.permute(0, 2, 3, 4, 1).numpy().copy() for x in parts]
    del module, posterior, decoded, parts
    gc.collect()

    model = load_pytorch(tmp_path / "vae")
    assert model.config == config
    graphdef, state = nnx.split(model)
    del model
    for in_one_pass in (False, True):

        @jax.jit
        def run(state, video, latents, in_one_pass=in_one_pass):
            model = nnx.merge(graphdef, state)
            mean, logvar = model.encode(video, in_one_pass=in_one_pass)
            return mean, logvar, model.decode(latents, in_one_pass=in_one_pass)

        with jax.default_matmul_precision("highest"):
            received = run(state, video, expected[0])
        for ours, theirs in zip(received, expected, strict=True):
            assert relative(np.asarray(ours), theirs) < TOLERANCE


def test_hunyuan_video_autoencoder(torch, tmp_path):
    """Nine frames of 64x64, and five latent frames, which are decoded in two pieces."""
    import diffusers

    rng = np.random.default_rng(0)
    video = rng.standard_normal((1, 9, 64, 64, 3), np.float32).clip(-1, 1)
    latents = rng.standard_normal((1, 5, 8, 8, 16), np.float32)
    torch.manual_seed(0)
    module = diffusers.AutoencoderKLHunyuanVideo().eval()
    module.save_pretrained(tmp_path / "vae")
    with torch.no_grad():
        posterior = module.encode(torch.tensor(video).permute(0, 4, 1, 2, 3)).latent_dist
        decoded = module.decode(torch.tensor(latents).permute(0, 4, 1, 2, 3)).sample
    parts = (posterior.mean, posterior.logvar, decoded)
    expected = [x.permute(0, 2, 3, 4, 1).numpy().copy() for x in parts]
    del module, posterior, decoded, parts
    gc.collect()

    model = load_pytorch(tmp_path / "vae")
    assert model.config == AutoencoderKLHunyuanVideoConfig()
    graphdef, state = nnx.split(model)
    del model

    @jax.jit
    def run(state, video, latents):
        model = nnx.merge(graphdef, state)
        return *model.encode(video), model.decode(latents)

    with jax.default_matmul_precision("highest"):
        received = run(state, video, latents)
    for ours, theirs in zip(received, expected, strict=True):
        assert relative(np.asarray(ours), theirs) < TOLERANCE
