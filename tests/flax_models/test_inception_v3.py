"""Inception-v3 of Fréchet distances against a transcription of pytorch-fid's; its file; the FID."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from inception_toy import inception
from oracles import relative_error
from PIL import Image

from conceptax.converters import CheckpointError
from conceptax.converters.formats.inception import load_inception
from conceptax.flax_models.inception_v3 import FIDInceptionV3, InceptionV3Config
from conceptax.methods.evaluation.instruments import Inception
from conceptax.methods.evaluation.statistics import frechet_distance
from conceptax.reporting.instruments import load_fid

SIDE = 75
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 40, 56, 3), np.uint8)


@pytest.fixture(scope="module")
def module(torch):
    return inception(torch)


@pytest.fixture(scope="module")
def file(torch, module, tmp_path_factory):
    """As pytorch-fid publishes it."""
    path = tmp_path_factory.mktemp("fid") / "pt_inception.pth"
    torch.save(module.state_dict(), path)
    return path


def features(torch, module, pixels, dtype):
    with torch.no_grad():
        given = torch.tensor(pixels, dtype=dtype).permute(0, 3, 1, 2)
        return module.to(dtype)(given).numpy()


@pytest.fixture(scope="module")
def eye(file):
    found = load_fid(file, "clean")
    found.side = SIDE
    return found


def clean(image):
    """clean-fid's `make_resizer("PIL", False, "bicubic", ...)`, and its (x - 128) / 128."""
    planes = [
        np.asarray(
            Image.fromarray(image[:, :, n].astype(np.float32), mode="F").resize(
                (SIDE, SIDE), resample=Image.Resampling.BICUBIC
            )
        )
        for n in range(3)
    ]
    return (np.stack(planes, -1) - 128) / 128


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
def test_features_are_those_of_pytorch_fid(torch, module, eye):
    pixels = np.stack([clean(image) for image in IMAGES])
    exact = features(torch, module, pixels, torch.float64)
    single = features(torch, module, pixels, torch.float32)
    with jax.default_matmul_precision("highest"):
        received = eye.features(IMAGES)
    assert received.shape == (5, 128) and (received > 0).mean() > 0.2
    assert relative_error(received, exact) < 2 * relative_error(single, exact) + 2e-6

    # The distance, as pytorch-fid's `calculate_frechet_distance` has it.
    one, other = exact[:3], exact[2:]
    root = np.sqrt(np.linalg.eigvals(np.cov(one.T) @ np.cov(other.T)).real.clip(0)).sum()
    apart = ((one.mean(0) - other.mean(0)) ** 2).sum()
    expected = apart + np.trace(np.cov(one.T) + np.cov(other.T)) - 2 * root
    assert frechet_distance(received[:3], received[2:]) == pytest.approx(expected, rel=1e-3)


def test_the_other_resize_is_pytorch_fids(torch, eye):
    given = torch.tensor(IMAGES / 255, dtype=torch.float32).permute(0, 3, 1, 2)
    sides = {"size": (SIDE, SIDE), "mode": "bilinear", "align_corners": False}
    expected = 2 * torch.nn.functional.interpolate(given, **sides) - 1
    other = Inception(nnx.merge(eye.graphdef, eye.params), resize="pytorch-fid", side=SIDE)
    received = np.stack([other.pixels(image) for image in IMAGES])
    np.testing.assert_allclose(received, expected.permute(0, 2, 3, 1).numpy(), atol=1e-5)
    assert "pytorch-fid" in other.features_title and "clean" in eye.features_title


def test_every_tensor_is_read(module, file):
    model = load_inception(file)
    assert model.config == InceptionV3Config(16, 11) and model.config.features == 128
    state = module.state_dict()
    for key, ours in (
        ("Mixed_7c.branch3x3_2b.conv.weight", model.Mixed_7c.branch3x3_2b.conv.kernel),
        ("Mixed_6e.branch7x7_3.conv.weight", model.Mixed_6e.branch7x7_3.conv.kernel),
    ):
        np.testing.assert_array_equal(ours[...], state[key].numpy().transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(
        model.Mixed_5b.branch_pool.bn.running_var[...],
        state["Mixed_5b.branch_pool.bn.running_var"].numpy(),
    )
    logits = model.logits(jnp.ones((1, 128)))
    expected = state["fc.weight"].sum(1) + state["fc.bias"]
    np.testing.assert_allclose(logits[0], expected.numpy(), atol=1e-5)


def test_the_published_sizes_are_the_defaults():
    model = nnx.eval_shape(lambda: FIDInceptionV3(InceptionV3Config(), rngs=nnx.Rngs(0)))
    kernels = [leaf.shape for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    # 23,834,568 of torchvision's with 1,000 classes and without its auxiliary head, and 8 more.
    assert sum(int(np.prod(shape)) for shape in kernels) == 23_834_568 + 8 * 2049
    with pytest.raises(ValueError, match="divisor"):
        InceptionV3Config(divisor=3)


def test_other_files_are_told(torch, module, tmp_path):
    path = tmp_path / "some.pth"
    state = module.state_dict()
    without = {k: v for k, v in state.items() if k != "Mixed_6b.branch1x1.bn.bias"}
    for content, message in (
        ({"a": torch.ones(2)}, "has no Conv2d_1a_3x3"),
        (state | {"AuxLogits.fc.bias": torch.ones(2)}, "it is torchvision's"),
        (without, r"Mixed_6b\.branch1x1\.bn\.bias"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            load_inception(path)
    with pytest.raises(CheckpointError, match=r"none\.pth"):
        load_inception(tmp_path / "none.pth")
