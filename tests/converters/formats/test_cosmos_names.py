"""Cosmos under NVIDIA's names: both generations, the tokenizer, LoRAs, and what is not read."""

import dataclasses
import re

import numpy as np
import pytest
from filled_models import filled, weights

from conceptax.converters import (
    CheckpointError,
    inspect_checkpoint,
    load_pytorch,
    save_single_file,
)
from conceptax.converters.files.safetensors_file import PendingTensor, StoredTensor
from conceptax.converters.formats.compvis import build_parts, open_single_file
from conceptax.converters.formats.compvis_parts import read_single_file
from conceptax.converters.formats.cosmos_names import cosmos_names, cosmos_vae_names
from conceptax.converters.formats.identify import SINGLE, identify
from conceptax.converters.formats.lora import load_lora
from conceptax.converters.formats.names import joined
from conceptax.flax_models.autoencoder_kl_cosmos import (
    AutoencoderKLCosmos,
    AutoencoderKLCosmosConfig,
)
from conceptax.flax_models.cosmos_transformer_3d import (
    CosmosTransformer3DConfig,
    CosmosTransformer3DModel,
)
from conceptax.methods.sampling import EDMSchedule

FLOATS = {"dtype": np.float32, "param_dtype": None, "sharding": None}
PUBLISHED = {
    "Predict1 Text2World": "text_to_world_14b",
    "Predict1 Video2World": "video_to_world_7b",
    "Predict2 Text2Image": "predict2_2b_text_to_image",
    "Predict2 Video2World": "predict2_14b_video_to_world",
}
SMALL = CosmosTransformer3DConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    mlp_ratio=2.0,
    text_embed_dim=10,
    adaln_lora_dim=4,
    max_size=(4, 8, 6),
    rope_scale=(1.0, 1.0, 1.0),
    qk_norm_eps=1e-6,
)
VAE = AutoencoderKLCosmosConfig(
    encoder_block_out_channels=(4, 6, 6, 8),
    decode_block_out_channels=(4, 6, 6, 8),
    num_layers=1,
)
# What NVIDIA's files hold beside, and diffusers drops too.
BESIDE = {
    False: ("logvar.0.freqs", "logvar.0.phases", "logvar.1.weight", "pos_embedder.seq"),
    True: (
        "accum_iteration",
        "pos_embedder.seq",
        "pos_embedder.dim_spatial_range",
        "pos_embedder.dim_temporal_range",
        "blocks.0.self_attn.q_norm._extra_state",
    ),
}


class Kept(dict):
    """diffusers empties a checkpoint before it looks for Predict1's names in it."""

    def pop(self, key):
        return self[key]


def original(model, table):
    """Values under the publisher's names."""
    pending = [PendingTensor.of(key, value) for key, value in weights(model).items()]
    return {each.key: np.array(each.produce(), order="C") for each in joined(pending, table)}


def same(model, found):
    own = weights(model)
    assert found.config == model.config and own.keys() == weights(found).keys()
    for key, value in weights(found).items():
        np.testing.assert_array_equal(value, own[key], err_msg=key)


def left_over(file):
    return sorted(key for keys in file.leftovers.values() for key in keys)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_name_and_shape_at_full_size(name, torch):
    """Written names are those that diffusers reads, and lead back; settings follow from shapes."""
    import diffusers
    from diffusers.loaders import single_file_utils

    config = getattr(CosmosTransformer3DConfig, PUBLISHED[name])()
    with torch.device("meta"):
        module = diffusers.CosmosTransformer3DModel(**config.to_dict())
    theirs = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    kind, nothing = np.dtype(np.float32), dict
    pending = [PendingTensor(key, kind, shape, nothing) for key, shape in theirs.items()]
    written = joined(pending, cosmos_names(config.to_dict()))
    files = {f"net.{each.key}": each.shape for each in written}
    state = Kept({key: torch.empty(shape, device="meta") for key, shape in files.items()})
    found = single_file_utils.convert_cosmos_transformer_checkpoint_to_diffusers(state)
    assert {key: tuple(value.shape) for key, value in found.items()} == theirs
    beside = [f"net.{key}" for key in BESIDE["Predict2" in name]]
    stored = {key: StoredTensor("F32", shape, nothing) for key, shape in files.items()}
    stored |= {key: StoredTensor("F32", (1,), nothing) for key in beside}
    file = read_single_file(stored, "it")
    part = file.parts["transformer"]
    assert {key: each.shape for key, each in part.tensors.items()} == theirs
    assert file.unknown == [] and left_over(file) == sorted(beside)
    assert file.kind == f"single file of Cosmos {name}, transformer alone"
    read = CosmosTransformer3DConfig.from_dict(part.raw)
    assert read == dataclasses.replace(config, qk_norm_eps=1e-6)


@pytest.mark.parametrize("second", [False, True])
def test_values_come_where_diffusers_puts_them(second, torch, tmp_path):
    from diffusers.loaders import single_file_utils

    kind = {"extra_pos_embed_type": None, "max_size": (128, 240, 240)} if second else {}
    config = dataclasses.replace(SMALL, **kind)
    model = filled(CosmosTransformer3DModel, config)
    content = original(model, cosmos_names(config.to_dict()))
    state = {f"net.{key}": torch.from_numpy(value) for key, value in content.items()}
    theirs = single_file_utils.convert_cosmos_transformer_checkpoint_to_diffusers(Kept(state))
    own = weights(model)
    assert theirs.keys() == own.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(value.numpy(), own[key], err_msg=key)
    beside = {f"net.{key}": torch.ones(1) for key in BESIDE[second]}
    path = tmp_path / "model.pt"
    torch.save({"model": state | beside}, path)
    assert identify(path).kind == SINGLE
    assert inspect_checkpoint(path).healthy
    file = read_single_file(open_single_file(path), str(path))
    same(model, build_parts(file, str(path), ["transformer"], **FLOATS)["transformer"])


def test_the_tokenizers_names_and_sizes(torch):
    """At full size; diffusers' script for it is not in its package."""
    import diffusers

    config, original = AutoencoderKLCosmosConfig(), diffusers.AutoencoderKLCosmos
    with torch.device("meta"):  # not the import, which makes wavelets for all that come after
        module = original()
    theirs = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    kind = np.dtype(np.float32)
    pending = [PendingTensor(key, kind, shape, dict) for key, shape in theirs.items()]
    files = {each.key: each.shape for each in joined(pending, cosmos_vae_names(config.to_dict()))}
    assert all("conv3d" in key or key.endswith(("norm.weight", "norm.bias")) for key in files)
    assert files.keys() >= {
        "encoder.down.0.downsample.conv2.conv3d.weight",
        "encoder.mid.attn_1.1.proj_out.conv3d.bias",
        "decoder.up.1.upsample.conv3.conv3d.weight",
        "decoder.up.0.block.0.nin_shortcut.conv3d.weight",
        "decoder.conv_out.1.conv3d.weight",
        "post_quant_conv.conv3d.weight",
    }
    stored = {key: StoredTensor("F32", shape, dict) for key, shape in files.items()}
    buffers = ("encoder.patcher3d.wavelets", "decoder.unpatcher3d._arange")
    file = read_single_file(stored | {k: StoredTensor("F32", (2,), dict) for k in buffers}, "it")
    assert (file.kind, file.unknown) == ("single file of Cosmos, vae alone", [])
    assert left_over(file) == sorted(buffers)
    assert {key: each.shape for key, each in file.parts["vae"].tensors.items()} == theirs
    assert AutoencoderKLCosmosConfig.from_dict(file.parts["vae"].raw) == config
    few = {k: s for k, s in stored.items() if "downsample.conv2" not in k}
    raw = read_single_file(few, "it").parts["vae"].raw
    assert (raw["temporal_compression_ratio"], raw["latents_mean"]) == (4, None)


def test_both_in_one_file(tmp_path):
    @dataclasses.dataclass
    class Pipeline:
        transformer: object
        vae: object
        scheduler_config: dict
        carried: dict = dataclasses.field(default_factory=dict)
        MODELS = ("transformer", "vae")

    models = {
        "transformer": filled(CosmosTransformer3DModel, SMALL),
        "vae": filled(AutoencoderKLCosmos, VAE),
    }
    path = save_single_file(Pipeline(**models, scheduler_config={}), tmp_path / "a.safetensors")
    file = read_single_file(open_single_file(path), str(path))
    assert (file.kind, file.unknown) == ("single file of Cosmos Predict1 Text2World", [])
    for name, found in build_parts(file, str(path), list(models), **FLOATS).items():
        same(models[name], found)


@pytest.mark.parametrize(
    ("kind", "named", "drawn"),
    [
        ({"in_channels": 17}, "CosmosVideoToWorldPipeline", True),
        ({"extra_pos_embed_type": None}, "Cosmos2TextToImagePipeline", False),
    ],
)
def test_a_pipeline_is_made_of_it(kind, named, drawn, tmp_path):
    from safetensors.numpy import save_file

    config = dataclasses.replace(SMALL, **kind)
    content = original(filled(CosmosTransformer3DModel, config), cosmos_names(config.to_dict()))
    path = tmp_path / "model.safetensors"
    save_file({f"net.{key}": value for key, value in content.items()}, path)
    pipeline = load_pytorch(path)
    assert pipeline.model_index["_class_name"] == named
    assert type(pipeline).__name__ == (named if drawn else "CosmosTextToWorldPipeline")
    if drawn:
        schedule = EDMSchedule.from_config(pipeline.schedule_config)
        assert (schedule.final_sigmas_type, schedule.sigma_data) == ("sigma_min", 0.5)
    else:
        with pytest.raises(ValueError, match="Predict2, whose steps are others, is converted"):
            _ = pipeline.schedule_config


@pytest.mark.parametrize("prefix", ["net.", "diffusion_model.", "transformer."])
def test_loras_under_nvidias_names(prefix, tmp_path):
    from safetensors.numpy import save_file

    @dataclasses.dataclass
    class Parts:
        transformer: object

    config = dataclasses.replace(SMALL, extra_pos_embed_type=None)
    model = filled(CosmosTransformer3DModel, config)
    rng = np.random.default_rng(0)
    names = {"blocks.1.self_attn.q_proj": "transformer_blocks.1.attn1.to_q"}
    names |= {"blocks.0.mlp.layer2": "transformer_blocks.0.ff.net.2"}
    if prefix == "transformer.":
        names = {new: new for new in names.values()}
    content, own = {}, weights(model)
    for old, new in names.items():
        rows, columns = own[f"{new}.weight"].shape
        for kind, shape in (("A", (2, columns)), ("B", (rows, 2))):
            content[f"{prefix}{old}.lora_{kind}.weight"] = rng.standard_normal(shape, np.float32)
    save_file(content, tmp_path / "lora.safetensors")
    pairs = load_lora(tmp_path / "lora.safetensors", Parts(model))["transformer"]
    assert pairs.keys() == set(names.values())
    for old, new in names.items():
        product = content[f"{prefix}{old}.lora_B.weight"] @ content[f"{prefix}{old}.lora_A.weight"]
        np.testing.assert_allclose(pairs[new][1] @ pairs[new][0], product, rtol=1e-5, atol=1e-5)


def test_what_is_not_read_is_named(torch, tmp_path):
    path = tmp_path / "autoencoder.jit"
    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    with pytest.raises(CheckpointError, match="is a TorchScript program, which is not run"):
        inspect_checkpoint(path)
    model = filled(CosmosTransformer3DModel, dataclasses.replace(SMALL, extra_pos_embed_type=None))
    content = original(model, cosmos_names(model.config.to_dict()))
    stored = {f"net.{key}": StoredTensor.of(value) for key, value in content.items()}
    newer = {"net.crossattn_proj.0.weight": StoredTensor.of(np.ones((2, 2), np.float32))}
    with pytest.raises(CheckpointError, match=re.escape("Cosmos-Predict2.5 or Transfer2.5")):
        read_single_file(stored | newer, "it")
    del stored["net.final_layer.linear.weight"]
    with pytest.raises(CheckpointError, match="sizes of its transformer cannot be told"):
        read_single_file(stored, "it")
