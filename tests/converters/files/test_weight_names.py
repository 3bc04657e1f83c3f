"""Which of several weight files is read, and that the same one is fetched from the Hub."""

import pytest

from conceptax.converters.files.weight_names import weight_name
from conceptax.converters.files.weights import find_weights
from conceptax.converters.hub import HubId, _component

STEM = "diffusion_pytorch_model"
# Best first: plain, other variants, without a moving average, and last Flax's.
ORDER = [
    f"{STEM}.safetensors",
    "model.safetensors",
    f"{STEM}.bin",
    f"{STEM}.fp32.safetensors",
    f"{STEM}.fp16.safetensors",
    f"{STEM}.bf16.bin",
    f"{STEM}.ema.safetensors",
    f"{STEM}.fp8.safetensors",
    f"{STEM}.non_ema.safetensors",
    "diffusion_flax_model.msgpack",
]


@pytest.mark.parametrize("best", range(len(ORDER)))
def test_the_best_of_what_is_there_is_read(tmp_path, best):
    for name in (*ORDER[best:], "notes.safetensors", f"{STEM}-00001-of-00002.safetensors"):
        (tmp_path / name).touch()
    assert find_weights(tmp_path, "diffusers").name == ORDER[best]


def test_the_hub_gives_what_a_folder_would():
    for best, name in enumerate(ORDER):
        if name != "model.safetensors":  # of the other library, which the Hub's files do not tell
            others = [each for each in ORDER[best:] if each != "model.safetensors"]
            assert _component(HubId("org/name", "", None), [*others, "config.json"], None) == [
                "config.json",
                name,
            ]


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (f"{STEM}.FP16.safetensors", (STEM, "fp16", "safetensors", False, False)),
        ("model.safetensors.index.json", ("model", "", "safetensors", True, False)),
        ("model.fp16.safetensors.index.json", ("model", "fp16", "safetensors", True, False)),
        ("model.safetensors.index.fp16.json", ("model", "fp16", "safetensors", True, False)),
        ("pytorch_model.fp16-00001-of-00002.bin", ("pytorch_model", "fp16", "bin", False, True)),
        ("pytorch_model-00001-of-00002.fp16.bin", ("pytorch_model", "fp16", "bin", False, True)),
        ("v1.5.pruned.safetensors", ("v1.5", "pruned", "safetensors", False, False)),
        ("config.json", None),
        ("model.ckpt", None),
    ],
)
def test_names(file, expected):
    assert weight_name(file) == expected
