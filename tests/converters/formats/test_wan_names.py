"""Wan's original files: autoencoders, UMT5, folders, and LoRAs, against diffusers' own readers."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from filled_models import filled, weights

from conceptax.converters import CheckpointError, OutputError, inspect_checkpoint, save_single_file
from conceptax.converters.files.safetensors_file import PendingTensor, StoredTensor
from conceptax.converters.formats.compvis import build_parts, open_single_file
from conceptax.converters.formats.compvis_parts import read_single_file
from conceptax.converters.formats.identify import SINGLE, identify
from conceptax.converters.formats.lora import load_lora
from conceptax.converters.formats.names import joined
from conceptax.converters.formats.wan_names import (
    umt5_names,
    wan_names,
    wan_vae,
    wan_vae_names,
)
from conceptax.flax_models.autoencoder_kl_wan import AutoencoderKLWanConfig
from conceptax.flax_models.t5 import UMT5Config, UMT5EncoderModel
from conceptax.flax_models.wan_transformer_3d import WanTransformer3DConfig, WanTransformer3DModel

FLOATS = {"dtype": np.float32, "param_dtype": None, "sharding": None}
CONFIG = WanTransformer3DConfig(
    num_attention_heads=1, num_layers=2, text_dim=12, ffn_dim=8, freq_dim=6
)
# As the publisher's `T5Encoder` lists them.
UMT5_KEYS = (
    "token_embedding.weight",
    "blocks.0.norm1.weight",
    "blocks.0.attn.q.weight",
    "blocks.0.attn.k.weight",
    "blocks.0.attn.v.weight",
    "blocks.0.attn.o.weight",
    "blocks.0.norm2.weight",
    "blocks.0.ffn.gate.0.weight",
    "blocks.0.ffn.fc1.weight",
    "blocks.0.ffn.fc2.weight",
    "blocks.0.pos_embedding.embedding.weight",
    "norm.weight",
)


@dataclasses.dataclass
class Parts:
    """What a LoRA needs of a pipeline."""

    transformer: Any
    transformer_2: Any = None


@pytest.fixture(scope="module")
def transformer():
    return filled(WanTransformer3DModel, CONFIG)


def original(model, table):
    """Values under the publisher's names."""
    pending = [PendingTensor.of(key, value) for key, value in weights(model).items()]
    return {each.key: np.array(each.produce(), order="C") for each in joined(pending, table)}


def same(model, found):
    own = weights(model)
    assert found.config == model.config and own.keys() == weights(found).keys()
    for key, value in weights(found).items():
        np.testing.assert_array_equal(value, own[key], err_msg=key)


@pytest.mark.parametrize("version", ["2_1", "2_2"])
def test_an_autoencoders_names_and_sizes(version, torch):
    """At full size; diffusers has names for 2.1's alone."""
    import diffusers
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    config = getattr(AutoencoderKLWanConfig, f"wan_{version}")()
    with torch.device("meta"):
        module = diffusers.AutoencoderKLWan(**config.to_dict())
    theirs = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    kind = np.dtype(np.float32)
    pending = [PendingTensor(key, kind, shape, dict) for key, shape in theirs.items()]
    written = {each.key: each.shape for each in joined(pending, wan_vae_names(config.to_dict()))}
    if version == "2_1":
        state = {key: torch.empty(shape, device="meta") for key, shape in written.items()}
        found = convert_wan_vae_to_diffusers(state)
        assert {key: tuple(value.shape) for key, value in found.items()} == theirs
    else:
        assert written.keys() >= {
            "encoder.downsamples.2.downsamples.2.time_conv.weight",
            "decoder.upsamples.0.upsamples.3.resample.1.weight",
            "decoder.upsamples.3.upsamples.2.residual.6.bias",
        }
    assert AutoencoderKLWanConfig.from_dict(wan_vae(written)) == config
    stored = {key: StoredTensor("F32", shape, dict) for key, shape in written.items()}
    file = read_single_file(stored, "it")
    assert (file.kind, file.unknown) == ("single file of Wan, vae alone", [])
    assert {key: each.shape for key, each in file.parts["vae"].tensors.items()} == theirs


def test_a_pickle_of_umt5(torch, tmp_path):
    config = UMT5Config(vocab_size=9, d_model=12, d_kv=3, d_ff=20, num_layers=1, num_heads=5)
    model = filled(UMT5EncoderModel, config)
    content = original(model, umt5_names(1))
    assert set(content) == set(UMT5_KEYS)
    path = tmp_path / "models_t5_umt5-xxl-enc-bf16.pth"
    torch.save({key: torch.from_numpy(value) for key, value in content.items()}, path)
    assert identify(path).kind == SINGLE
    found = inspect_checkpoint(path)
    assert found.healthy and found.kind == "single file of Wan, text_encoder alone"
    file = read_single_file(open_single_file(path), str(path))
    same(model, build_parts(file, str(path), ["text_encoder"], **FLOATS)["text_encoder"])


def test_the_publishers_folder(transformer, tmp_path):
    """Whose settings are not read; its weights may be in several files."""
    content = original(transformer, wan_names(2))
    settings = {"_class_name": "WanModel", "dim": 128, "model_type": "t2v"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    names = sorted(content)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in shards.items():
        safetensors.numpy.save_file({key: content[key] for key in keys}, tmp_path / file)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    files = {key: file for file, keys in shards.items() for key in keys}
    index.write_text(json.dumps({"weight_map": files}))
    for place in (tmp_path, index):
        found = identify(place)
        assert (found.kind, found.path) == (SINGLE, index)
        told = inspect_checkpoint(place)
        assert told.healthy and told.kind == "single file of Wan, transformer alone"
    file = read_single_file(open_single_file(index), str(index))
    same(transformer, build_parts(file, "it", ["transformer"], **FLOATS)["transformer"])


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ("vace_blocks.0.before_proj.weight", "Wan's VACE"),
        ("img_emb.proj.0.weight", "Wan's image-to-video model"),
        ("face_adapter.fuser_blocks.0.linear1_kv.weight", "Wan's Animate"),
        ("", r"Wan's image-to-video model \(36 channels in\)"),
    ],
)
def test_relatives_are_named(transformer, extra, what):
    content = original(transformer, wan_names(2))
    if extra:
        content[extra] = np.zeros(1, np.float32)
    else:
        content["patch_embedding.weight"] = np.zeros((128, 36, 1, 2, 2), np.float32)
    stored = {key: StoredTensor.of(value) for key, value in content.items()}
    with pytest.raises(CheckpointError, match=rf"it is {what}; Stable Diffusion .*, Wan .*are"):
        read_single_file(stored, "it")


def test_two_transformers_are_not_written(transformer, tmp_path):
    with pytest.raises(OutputError, match="this model has two"):
        save_single_file(Parts(transformer, transformer), tmp_path / "a.safetensors")


# ---- LoRA ----

LAYERS = {
    **{f"self_attn.{x}": f"attn1.to_{x}" for x in "qkv"},
    **{f"cross_attn.{x}": f"attn2.to_{x}" for x in "qkv"},
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
OTHERS = {
    "time_projection.1": "condition_embedder.time_proj",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "head.head": "proj_out",
}


@pytest.fixture(scope="module")
def pairs(transformer):
    """Of the publisher's layers, A and B of rank 2, and the layers' names in diffusers."""
    own, rng = weights(transformer), np.random.default_rng(0)
    names = {
        f"blocks.{n}.{old}": f"blocks.{n}.{new}" for n in (0, 1) for old, new in LAYERS.items()
    }
    found = {}
    for old, new in names.items():
        out, inside = own[f"{new}.weight"].shape
        pair = rng.standard_normal((2, inside)), rng.standard_normal((out, 2))
        found[old] = new, *(each.astype(np.float32) for each in pair)
    return found


def in_file(pairs, prefix, kinds, alpha=None, joint="."):
    content = {}
    for name, (_, down, up) in pairs.items():
        name = prefix + name.replace(".", joint)
        content |= {f"{name}.lora_{kinds[0]}.weight": down, f"{name}.lora_{kinds[1]}.weight": up}
        if alpha is not None:
            content[f"{name}.alpha"] = np.array(alpha, np.float32)
    return content


FORMS = {
    "PEFT": ("diffusion_model.", ("A", "B"), None, "."),
    "ComfyUI with alpha": ("diffusion_model.", ("down", "up"), 3.0, "."),
    "musubi": ("lora_unet_", ("down", "up"), 3.0, "_"),
}


@pytest.mark.parametrize("form", FORMS)
def test_loras_as_diffusers_reads_them(form, transformer, pairs, tmp_path, torch):
    from diffusers import WanPipeline

    path = tmp_path / "pytorch_lora_weights.safetensors"
    safetensors.numpy.save_file(in_file(pairs, *FORMS[form]), path)
    found = load_lora(path, Parts(transformer))
    assert found.keys() == {"transformer"} and len(found["transformer"]) == len(pairs)
    theirs = WanPipeline.lora_state_dict(str(tmp_path))
    assert len(theirs) == 2 * len(pairs)
    for _, (module, _, _) in pairs.items():
        down, up = found["transformer"][module]
        key = f"transformer.{module}.lora_"
        expected = theirs[f"{key}B.weight"] @ theirs[f"{key}A.weight"]
        np.testing.assert_allclose(up @ down, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_loras_of_other_layers_and_of_the_second_transformer(transformer, pairs, tmp_path):
    own, path = weights(transformer), tmp_path / "a.safetensors"
    rows = {old: own[f"{new}.weight"].shape for old, new in OTHERS.items()}
    ones = {
        old: (OTHERS[old], np.ones((1, inside), np.float32), np.ones((out, 1), np.float32))
        for old, (out, inside) in rows.items()
    }
    for prefix, joint in (("diffusion_model.", "."), ("lora_unet_", "_")):
        safetensors.numpy.save_file(in_file(ones, prefix, ("down", "up"), 1.0, joint), path)
        assert load_lora(path, Parts(transformer))["transformer"].keys() == set(OTHERS.values())
    name, (module, down, up) = next(iter(pairs.items()))
    for prefix in ("transformer_2.", "transformer."):
        key = f"{prefix}{module}.lora_"
        safetensors.numpy.save_file({f"{key}A.weight": down, f"{key}B.weight": up}, path)
        found = load_lora(path, Parts(transformer, transformer))
        assert {name: set(each) for name, each in found.items()} == {prefix[:-1]: {module}}
    bare = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    safetensors.numpy.save_file(bare, path)
    assert load_lora(path, Parts(transformer, transformer)).keys() == {"transformer"}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("diffusion_model.blocks.0.norm3.diff", "of whole differences, which is not supported"),
        ("diffusion_model.blocks.0.ffn.0.diff_b", "of whole differences, which is not supported"),
        ("diffusion_model.blocks.7.ffn.0.lora_A.weight", r"blocks\.7\.ffn\.0 lacks lora_B"),
        ("diffusion_model.blocks.0.cross_attn.k_img.lora_{}.weight", r"k_img\. It was made for an"),
    ],
)
def test_a_lora_is_applied_wholly_or_not(key, message, transformer, pairs, tmp_path):
    content = in_file(pairs, *FORMS["PEFT"])
    content |= {key.format(kind): np.ones((2, 2), np.float32) for kind in "AB"}
    safetensors.numpy.save_file(content, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_lora(tmp_path / "a.safetensors", Parts(transformer))
