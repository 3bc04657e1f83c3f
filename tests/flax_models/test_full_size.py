"""The SD-1.5 UNet and DiT-XL/2 at their published sizes against diffusers, once.

Torch runs and is freed before JAX starts, the UNet's gradients waiting on disk: about 12 GB of
memory at the peak, and a few minutes.
"""

import gc

import jax
import numpy as np
import pytest
from flax import nnx

from conceptax.converters import load_pytorch
from conceptax.converters.tensors import tensor_specs
from conceptax.flax_models.dit_transformer_2d import (
    GNA,
    DiTTransformer2DConfig,
    DiTTransformer2DModel,
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
