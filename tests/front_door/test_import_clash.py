"""transformers and diffusers work from the repository root, where a folder is called `kernels`.

Both look for a package of that name; with the current directory on the path they find ours.
"""

import subprocess
import sys

import pytest

FORWARDS = """
import os, sys
assert sys.path[0] == "" and os.path.isdir("kernels"), "the clash is not set up"
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

text = CLIPTextModel(CLIPTextConfig(
    vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, max_position_embeddings=6, bos_token_id=14, eos_token_id=15,
))
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=8, attention_head_dim=2,
)
with torch.no_grad():
    hidden = text(torch.tensor([[14, 1, 2, 3, 15, 15]])).last_hidden_state
    noise = unet(torch.randn(1, 4, 8, 8), 7, hidden).sample
assert hidden.shape == (1, 6, 8) and noise.shape == (1, 4, 8, 8)
assert hidden.isfinite().all() and noise.isfinite().all()
import conceptax.kernels
print("both ran")
"""


def test_torch_models_run_beside_our_kernels_folder(repository):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    result = subprocess.run(
        [sys.executable, "-c", FORWARDS], cwd=repository, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[-2] == "both ran"
