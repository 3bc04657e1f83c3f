"""The SD-1.5 UNet at its published size (860 M parameters) against diffusers, once.

Torch runs and is freed before JAX starts, its gradients waiting on disk: about 12 GB of memory at
the peak, and a few minutes.
"""

import gc

import jax
import numpy as np
import pytest
from flax import nnx

from conceptax.converters import load_pytorch
from conceptax.converters.tensors import tensor_specs

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
