"""The models that metrics look through, against transformers: outputs, gradients, files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from metric_models_toy import blip, blip_2, dinov2, randomize
from oracles import nchw, relative_error

from conceptax.converters import load_pytorch, save_pytorch
from conceptax.converters.verification import verify
from conceptax.flax_models.dinov2 import Dinov2Config, Dinov2Model

IDS = np.random.default_rng(0).integers(3, 90, (3, 7))
MASK = np.array([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]])
TEXT, SEEN = jnp.asarray(IDS), jnp.asarray(MASK)


@pytest.fixture(scope="session")
def transformers(torch):
    return pytest.importorskip("transformers")


def pixels(side, seed=0, count=3):
    return np.random.default_rng(seed).normal(size=(count, side, side, 3)).astype(np.float32)


def agree(torch, module, model, torch_call, jax_call, image):
    """Output and image gradient, to twice torch's own float32 error against float64."""

    def run(dtype):
        module.to(dtype)
        x = torch.tensor(image, dtype=dtype, requires_grad=True)
        output = torch_call(module, x)
        weights = np.random.default_rng(7).normal(size=tuple(output.shape))
        (output * torch.tensor(weights, dtype=dtype)).sum().backward()
        return output.detach().numpy(), x.grad.numpy(), weights

    exact, exact_gradient, weights = run(torch.float64)
    single, single_gradient, _ = run(torch.float32)
    graphdef, state = nnx.split(model)

    @jax.jit
    def ours(params, image):
        def weighted(image):
            output = jax_call(nnx.merge(graphdef, params), image)
            return jnp.sum(output * weights), output

        return jax.grad(weighted, has_aux=True)(image)

    with jax.default_matmul_precision("highest"):
        gradient, output = ours(nnx.to_pure_dict(state), image)
    for received, theirs, wanted in (
        (output, single, exact),
        (gradient, single_gradient, exact_gradient),
    ):
        error = relative_error(np.asarray(received), wanted)
        assert error < 2 * relative_error(theirs, wanted) + 2e-6, error


CASES = {
    "dinov2": (
        dinov2,
        28,
        {
            "states": (
                lambda m, x: m(nchw(x)).last_hidden_state,
                lambda m, x: m(x).last_hidden_state,
            ),
            "other size": (
                lambda m, x: m(nchw(x[:, :21])).pooler_output,
                lambda m, x: m(x[:, :21]).pooled,
            ),
        },
    ),
    "blip": (
        blip,
        16,
        {
            "contrast": (
                lambda m, x: (
                    m(ids(), nchw(x), use_itm_head=False, attention_mask=ids(MASK)).itm_score
                ),
                lambda m, x: m(TEXT, x, SEEN),
            ),
            "matching": (
                lambda m, x: m(ids(), nchw(x), attention_mask=ids(MASK)).itm_score,
                lambda m, x: m.matching_logits(TEXT, x, SEEN),
            ),
        },
    ),
    "blip_2": (
        blip_2,
        16,
        {
            "contrast": (
                lambda m, x: m(nchw(x), ids(), ids(MASK)).logits_per_image,
                lambda m, x: m(TEXT, x, SEEN),
            ),
            "matching": (
                lambda m, x: (
                    m(nchw(x), ids(), ids(MASK), use_image_text_matching_head=True).logits_per_image
                ),
                lambda m, x: m.matching_logits(TEXT, x, SEEN),
            ),
        },
    ),
}


def ids(values=IDS):
    import torch

    return torch.tensor(values)


@pytest.mark.parametrize("name", CASES)
def test_verify_runs_both_frameworks(torch, transformers, tmp_path, name):
    module = CASES[name][0](transformers)
    module.save_pretrained(tmp_path)
    model = load_pytorch(tmp_path)
    (difference,) = verify(model, tmp_path).values()
    assert difference is not None and difference < 1e-5
    randomize(module).save_pretrained(tmp_path)
    assert verify(model, tmp_path)[type(model).__name__] > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_agree_with_transformers(torch, transformers, tmp_path, name):
    build, side, calls = CASES[name]
    module = build(transformers)
    module.save_pretrained(tmp_path / "theirs")
    model = load_pytorch(tmp_path / "theirs")
    for torch_call, jax_call in calls.values():
        agree(torch, module, model, torch_call, jax_call, pixels(side))

    save_pytorch(model, tmp_path / "ours")  # and back, bit for bit
    again = type(module).from_pretrained(tmp_path / "ours", local_files_only=True)
    for key, value in module.float().state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def published(transformers, name):
    """One layer of each tower at the size that is published."""
    one = {"num_hidden_layers": 1}
    if name == "dinov2":
        config = transformers.Dinov2Config(**one, image_size=518)
        return transformers.Dinov2Model(config), 224  # positions go from 37x37 to 16x16
    if name == "blip":
        config = transformers.BlipConfig(text_config=one, vision_config=one)
        return transformers.BlipForImageTextRetrieval(config), 384
    if name == "clip":
        vision = {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "patch_size": 14,
        }
        text = {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "vocab_size": 99,
        }
        config = transformers.CLIPConfig(
            text_config=text | one, vision_config=vision | one, projection_dim=768
        )
        return transformers.CLIPModel(config), 224
    config = transformers.Blip2Config(
        vision_config=one,
        qformer_config={**one, "use_qformer_text_input": True},
    )
    return transformers.Blip2ForImageTextRetrieval(config), 224


LAYERS = {name: next(iter(calls.values())) for name, (_, _, calls) in CASES.items()} | {
    "clip": (lambda m, x: m(ids(), nchw(x)).logits_per_image, lambda m, x: m(TEXT, x)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_the_published_size_agrees(torch, transformers, tmp_path, name):
    module, side = published(transformers, name)
    module.eval().save_pretrained(tmp_path)
    model = load_pytorch(tmp_path)
    assert model.config == type(model.config).from_dict(model.config.to_dict())
    agree(torch, module, model, *LAYERS[name], pixels(side, count=1))


def test_masked_patches_and_unfit_images(torch, transformers, tmp_path):
    module = dinov2(transformers)
    module.save_pretrained(tmp_path)
    model = load_pytorch(tmp_path)
    masked = np.random.default_rng(2).random((3, 16)) < 0.4
    image = pixels(28)
    expected = module(nchw(torch.tensor(image)), bool_masked_pos=torch.tensor(masked))
    received = model(jnp.asarray(image), jnp.asarray(masked)).last_hidden_state
    assert relative_error(np.asarray(received), expected.last_hidden_state.detach().numpy()) < 1e-5
    with pytest.raises(ValueError, match=r"multiples of 7, received \(1, 30, 28, 3\)"):
        model(jnp.zeros((1, 30, 28, 3)))
    with pytest.raises(ValueError, match="use_swiglu_ffn=True"):
        Dinov2Config.from_dict({"use_swiglu_ffn": True})
    plain = Dinov2Model(
        Dinov2Config(
            hidden_size=4,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=7,
            patch_size=7,
            use_mask_token=False,
        ),
        rngs=nnx.Rngs(0),
    )
    with pytest.raises(ValueError, match="no mask token"):
        plain(jnp.zeros((1, 7, 7, 3)), jnp.zeros((1, 1), bool))
