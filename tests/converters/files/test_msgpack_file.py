"""Checkpoints of diffusers' and transformers' former Flax classes load, bit for bit."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from flax import serialization

from conceptax import bundled_model
from conceptax.converters import CheckpointError, inspect_checkpoint, load_pytorch, save_pytorch
from conceptax.converters.files.msgpack_file import open_flax
from conceptax.converters.tensors import tensor_specs, variables

MODELS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def pipeline():
    return load_pytorch(bundled_model(), components=MODELS)


def state(model):
    slots = variables(model)
    return {
        spec.key: spec.to_torch(np.asarray(slots[spec.path].get_value()))
        for spec in tensor_specs(model)
    }


def flax_tree(name, tensors):
    """PyTorch's tensors as Flax's tree, by the rule that diffusers and transformers applied."""
    tree = {}
    for key, value in tensors.items():
        if name == "text_encoder":
            path = ["text_model", *key.split(".")]
        else:
            path = re.sub(r"(\w+)\.(\d+)", r"\1_\2", key).split(".")
        if path[-1] == "weight":
            kind = (
                "scale" if value.ndim == 1 else "embedding" if "embedding" in path[-2] else "kernel"
            )
            if name != "text_encoder" and "time_embedding" in path:
                kind = "kernel"
            path[-1] = kind
            if kind == "kernel":
                value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        if name == "vae" and "attentions_0" in path:
            old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}
            path = [old.get(part, part) for part in path]
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = np.ascontiguousarray(value)
    return tree


def write(folder, name, tree, config):
    folder.mkdir(parents=True, exist_ok=True)
    stem = "flax_model" if name == "text_encoder" else "diffusion_flax_model"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / f"{stem}.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    return folder / f"{stem}.msgpack"


@pytest.fixture(scope="module")
def legacy(pipeline, tmp_path_factory):
    """The bundled model as diffusers 0.39 would have written it with Flax."""
    root = tmp_path_factory.mktemp("legacy")
    index = {
        "_class_name": "FlaxStableDiffusionPipeline",
        "safety_checker": [None, None],
        "unet": ["diffusers", "FlaxUNet2DConditionModel"],
        "vae": ["diffusers", "FlaxAutoencoderKL"],
        "text_encoder": ["transformers", "FlaxCLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "FlaxDDIMScheduler"],
    }
    (root / "model_index.json").write_text(json.dumps(index))
    for name in MODELS:
        model = getattr(pipeline, name)
        config = json.loads(model.published_config.text)
        if name != "text_encoder":
            config |= {"_class_name": f"Flax{model.pytorch_class}"}
        if name == "unet":
            config |= {"split_head_dim": False, "use_memory_efficient_attention": False}
        write(root / name, name, flax_tree(name, state(model)), config)
    (root / "scheduler").mkdir()
    scheduler = json.loads((bundled_model() / "scheduler/scheduler_config.json").read_text())
    scheduler["_class_name"] = "FlaxDDIMScheduler"
    (root / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    (root / "tokenizer").symlink_to(bundled_model() / "tokenizer")
    return root


def test_names_are_those_that_were_published(legacy):
    """Some keys of runwayml's flax branch of SD 1.5, as flax.traverse_util flattens them."""
    tree = serialization.msgpack_restore(
        (legacy / "unet/diffusion_flax_model.msgpack").read_bytes()
    )
    block = tree["down_blocks_1"]["attentions_0"]["transformer_blocks_0"]
    assert set(block) == {"attn1", "attn2", "ff", "norm1", "norm2", "norm3"}
    assert block["attn2"]["to_out_0"]["kernel"].ndim == 2
    assert block["ff"]["net_0"]["proj"]["kernel"].ndim == 2
    assert tree["conv_in"]["kernel"].shape[:3] == (3, 3, 4)
    assert "kernel" in tree["time_embedding"]["linear_1"]
    text = serialization.msgpack_restore((legacy / "text_encoder/flax_model.msgpack").read_bytes())
    layer = text["text_model"]["encoder"]["layers"]["0"]
    assert "kernel" in layer["self_attn"]["q_proj"] and "scale" in layer["layer_norm1"]
    assert "embedding" in text["text_model"]["embeddings"]["token_embedding"]


def test_a_stranded_pipeline_gets_out(legacy, pipeline, tmp_path):
    loaded = load_pytorch(legacy)
    save_pytorch(loaded, tmp_path / "out")
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    again = load_pytorch(tmp_path / "out")
    for name in MODELS:
        expected = state(getattr(pipeline, name))
        for model in (getattr(loaded, name), getattr(again, name)):
            received = state(model)
            assert received.keys() == expected.keys()
            for key, value in expected.items():
                assert received[key].dtype == value.dtype
                np.testing.assert_array_equal(received[key], value, err_msg=key)
    config = json.loads((tmp_path / "out/unet/config.json").read_text())
    assert config["_class_name"] == "UNet2DConditionModel"
    assert "split_head_dim" not in config
    assert inspect_checkpoint(legacy).healthy, inspect_checkpoint(legacy)


def test_diffusers_reads_what_came_out(legacy, tmp_path, torch):
    diffusers = pytest.importorskip("diffusers")
    model = load_pytorch(legacy, components=["unet"]).unet
    save_pytorch(model, tmp_path / "unet")
    module = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    expected = state(model)
    received = {key: value.numpy() for key, value in module.state_dict().items()}
    assert received.keys() == expected.keys()
    for key, value in received.items():
        np.testing.assert_array_equal(value, expected[key].astype(np.float32), err_msg=key)


def packed(tmp_path, tree):
    path = tmp_path / "a.msgpack"
    path.write_bytes(serialization.msgpack_serialize(tree))
    return open_flax(path)


def test_layouts_types_and_boxes(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 2, 4, 5)).astype(ml_dtypes.bfloat16)
    dense = rng.standard_normal((7, 6)).astype(np.float16)
    tree = {
        "conv": {"kernel": kernel},
        "norm": {"scale": np.arange(3.0), "bias": np.float32(2)},
        "dense_1": {"kernel": {"value": dense}},
        "steps": np.arange(4),
    }
    tensors = packed(tmp_path, tree)
    assert {key: (t.dtype, t.shape) for key, t in tensors.items()} == {
        "conv.weight": ("BF16", (5, 4, 3, 2)),
        "norm.weight": ("F64", (3,)),
        "norm.bias": ("F32", ()),
        "dense_1.weight": ("F16", (6, 7)),
        "steps": ("I64", (4,)),
    }
    np.testing.assert_array_equal(tensors["conv.weight"].read(), kernel.transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(tensors["dense_1.weight"].read(), dense.T)
    # a training state, and an array in chunks, as flax stores those above 2^30 bytes
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    large = rng.standard_normal((9, 5)).astype(np.float32)
    state = serialization.to_bytes({"step": 3, "params": {"layer": {"kernel": large}}})
    (tmp_path / "b.msgpack").write_bytes(state)
    assert b"__msgpack_chunked_array__" in state
    (tensor,) = open_flax(tmp_path / "b.msgpack").values()
    np.testing.assert_array_equal(tensor.read(), large.T)


def test_an_orbax_folder_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "FlaxAutoencoderKL"}')
    (tmp_path / "_METADATA").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is an Orbax checkpoint.*diffusion_flax_model\.msg"):
        load_pytorch(tmp_path)


def test_missing_and_foreign_arrays(legacy, tmp_path, pipeline):
    config = json.loads((legacy / "text_encoder/config.json").read_text())
    tree = flax_tree("text_encoder", state(pipeline.text_encoder))
    del tree["text_model"]["final_layer_norm"]["scale"]
    tree["lm_head"] = {"kernel": np.ones((2, 2), np.float32)}
    write(tmp_path / "x", "text_encoder", tree, config)
    with pytest.raises(
        CheckpointError, match=r"1 missing: .*final_layer_norm\.weight; 1 unexpected"
    ):
        load_pytorch(tmp_path / "x")
