"""OpenCLIP against open_clip itself, where that is installed (with timm and torchvision)."""

import importlib.util
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import relative_error

from conceptax.converters import load_open_clip

# open_clip imports torchvision, whose wheel looks for operators of another build of torch, and
# transformers fails beside it: it runs in a process of its own.
PROGRAM = """
import sys
import torch

library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import numpy as np
import open_clip

torch.manual_seed(0)
vision = {"timm_model_name": "convnext_tiny", "timm_model_pretrained": False, "timm_pool": "",
          "timm_proj": sys.argv[2], "timm_drop": 0.0, "timm_drop_path": 0.0, "image_size": 64}
text = {"context_length": 12, "vocab_size": 99, "width": 64, "heads": 1, "layers": 2}
model = open_clip.CLIP(32, vision, text).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    image = torch.randn(2, 3, 64, 96)
    tokens = torch.randint(1, 98, (3, 12))
    tokens[:, 7], tokens[:, 8:] = 98, 0
    found = {"image": image, "tokens": tokens, "image_features": model.encode_image(image),
             "text_features": model.encode_text(tokens)}
torch.save(model.state_dict(), sys.argv[1] + "/open_clip_pytorch_model.bin")
np.savez(sys.argv[1] + "/oracle.npz", **{name: value.numpy() for name, value in found.items()})
"""


@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_features_are_those_of_open_clip(projection, tmp_path):
    if importlib.util.find_spec("open_clip") is None or importlib.util.find_spec("timm") is None:
        pytest.skip("open_clip and timm are not installed")
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path), projection], check=True)
    oracle = np.load(tmp_path / "oracle.npz")
    model = load_open_clip(tmp_path / "open_clip_pytorch_model.bin")
    assert model.config.projection == projection
    image = jnp.asarray(oracle["image"].transpose(0, 2, 3, 1))
    image_features = nnx.jit(lambda model, x: model.encode_image(x))(model, image)
    text_features = nnx.jit(lambda model, x: model.encode_text(x))(model, oracle["tokens"])
    assert relative_error(image_features, oracle["image_features"]) < 1e-5
    assert relative_error(text_features, oracle["text_features"]) < 1e-5
