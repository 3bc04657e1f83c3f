"""Checkpoints travel both ways without losing a bit, in every layout that people publish."""

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from conceptax import bundled_model
from conceptax.cli import main
from conceptax.converters import (
    CheckpointError,
    OutputError,
    inspect_checkpoint,
    load_pytorch,
    save_pytorch,
)
from conceptax.converters.files import safetensors_file
from conceptax.converters.files.output import atomic_file, atomic_folder
from conceptax.converters.files.safetensors_file import PendingTensor, write_safetensors
from conceptax.converters.files.weights import find_weights
from conceptax.converters.tensors import tensor_specs, turned
from conceptax.flax_models.configs import ModelConfig
from conceptax.flax_models.pipelines.stable_diffusion import StableDiffusionPipeline


@dataclasses.dataclass(frozen=True)
class ToyConfig(ModelConfig):
    width: int = 4


class ToyBlock(nnx.Module):
    def __init__(self, width, **init):
        self.linear = nnx.Linear(width, 2 * width, **init)
        self.norm = nnx.LayerNorm(width, **init)
        self.to_out = nnx.List([nnx.Linear(2 * width, width, use_bias=False, **init)])


class Toy(nnx.Module):
    """Every kind of parameter that the table knows."""

    config_class = ToyConfig
    pytorch_class = "Toy"
    pytorch_library = "diffusers"
    pytorch_prefix = "toy."
    pytorch_renames = {"old": "linear", "proj": "to_out.0"}
    pytorch_ignored = ("*.position_ids",)

    def __init__(self, config, *, dtype=jnp.float32, param_dtype=jnp.float32, remat=False, rngs):
        init = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.conv = nnx.Conv(3, config.width, (3, 2), **init)
        self.narrow = nnx.Conv(1, 1, (1, 1), use_bias=False, **init)
        self.group = nnx.GroupNorm(config.width, num_groups=2, **init)
        self.embed = nnx.Embed(8, config.width, **init)
        self.blocks = nnx.List([ToyBlock(config.width, **init) for _ in range(2)])
        self.token = nnx.Param(jnp.ones((config.width,), param_dtype))
        self.scale = nnx.Param(jnp.ones((), param_dtype))
        self.drop = nnx.Dropout(0.1, rngs=nnx.Rngs(1))  # its random state is no weight


DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
SHAPES = {
    "blocks.0.linear.bias": (8,),
    "blocks.0.linear.weight": (8, 4),
    "blocks.0.norm.bias": (4,),
    "blocks.0.norm.weight": (4,),
    "blocks.0.to_out.0.weight": (4, 8),
    "blocks.1.linear.bias": (8,),
    "blocks.1.linear.weight": (8, 4),
    "blocks.1.norm.bias": (4,),
    "blocks.1.norm.weight": (4,),
    "blocks.1.to_out.0.weight": (4, 8),
    "conv.bias": (4,),
    "conv.weight": (4, 3, 3, 2),
    "embed.weight": (8, 4),
    "group.bias": (4,),
    "group.weight": (4,),
    "narrow.weight": (1, 1, 1, 1),
    "scale": (),
    "token": (4,),
}


def toy_tensors(dtype=np.float32, prefix=""):
    rng = np.random.default_rng(0)
    return {prefix + k: rng.standard_normal(s).astype(dtype) for k, s in SHAPES.items()}


def write_toy(folder, tensors, name="diffusion_pytorch_model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"_class_name": "Toy", "width": 4, "_note": "kept"}')
    safetensors.numpy.save_file(tensors, folder / name, {"format": "pt"})
    return folder


def same_bits(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype, key
        assert left[key].shape == right[key].shape, key
        assert left[key].tobytes() == right[key].tobytes(), key


def read(folder, name="diffusion_pytorch_model.safetensors"):
    return safetensors.numpy.load_file(folder / name)


def load_toy(folder, **options):
    return load_pytorch(folder, architecture=Toy, **options)


def test_specification_of_every_kind():
    specs = {s.key: s for s in tensor_specs(Toy(ToyConfig(), rngs=nnx.Rngs(0)))}
    assert {key: spec.shape for key, spec in specs.items()} == SHAPES
    assert specs["conv.weight"].axes == (2, 3, 1, 0)
    assert specs["blocks.1.to_out.0.weight"].path == ("blocks", 1, "to_out", 0, "kernel")


@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((70, 300), (1, 0)),  # more than a block in both directions
        ((1500, 1500), (1, 0)),  # in memory of its own
        ((65, 130, 3, 3), (2, 3, 1, 0)),
        ((3, 400, 2), (2, 1, 0)),
        ((2, 3, 2, 2, 2), (2, 3, 4, 1, 0)),
        ((0, 5), (1, 0)),
        ((7, 5), (0, 1)),
        ((), ()),
    ],
)
def test_turning_is_a_transposition(shape, axes, dtype):
    values = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    result = turned(values, axes)
    assert result.flags.c_contiguous
    assert not result.size or result.ctypes.data % 64 == 0
    np.testing.assert_array_equal(result, values.transpose(axes))
    np.testing.assert_array_equal(jax.device_put(result), values.transpose(axes))


def test_a_layer_without_a_rule_is_refused():
    model = nnx.ConvTranspose(2, 3, (2, 2), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"no rule for nnx.ConvTranspose"):
        tensor_specs(model)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("prefix", ["", "toy."])
def test_round_trip_is_bit_exact(tmp_path, dtype, prefix):
    tensors = toy_tensors(dtype, prefix)
    source = write_toy(tmp_path / "source", {**tensors, "embed.position_ids": np.arange(3)})
    model = load_toy(source)
    kernel = model.blocks[1].linear.kernel[...]
    assert kernel.dtype == dtype
    np.testing.assert_array_equal(np.asarray(kernel), tensors[prefix + "blocks.1.linear.weight"].T)
    np.testing.assert_array_equal(
        np.asarray(model.conv.kernel[...]), tensors[prefix + "conv.weight"].transpose(2, 3, 1, 0)
    )
    save_pytorch(model, tmp_path / "out")
    same_bits(read(tmp_path / "out"), toy_tensors(dtype, "toy."))
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


def test_same_parameters_give_the_same_bytes(tmp_path):
    model = load_toy(write_toy(tmp_path / "source", toy_tensors()))
    for name in ("a", "b"):
        save_pytorch(model, tmp_path / name)
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_mixed_types_stay_mixed_and_aligned(tmp_path):
    tensors = toy_tensors()
    tensors["conv.bias"] = tensors["conv.bias"].astype(np.float16)
    model = load_toy(write_toy(tmp_path / "source", tensors))
    save_pytorch(model, tmp_path / "out")
    same_bits(read(tmp_path / "out"), {"toy." + key: value for key, value in tensors.items()})


def test_conversion_on_load_and_on_save(tmp_path):
    tensors = toy_tensors()
    source = write_toy(tmp_path / "source", tensors)
    expected = {"toy." + k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
    save_pytorch(load_toy(source, param_dtype=jnp.bfloat16), tmp_path / "a")
    save_pytorch(load_toy(source), tmp_path / "b", dtype=jnp.bfloat16)
    same_bits(read(tmp_path / "a"), expected)
    same_bits(read(tmp_path / "b"), expected)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (np.float64, "F64"),
        (ml_dtypes.float8_e4m3fn, "F8_E4M3"),
        (ml_dtypes.float8_e5m2, "F8_E5M2"),
    ],
)
def test_types_that_no_parameter_keeps_are_converted_on_request(tmp_path, kind, name):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"_class_name": "Toy", "width": 4}))
    tensors = toy_tensors(kind)
    write_safetensors(
        source / "diffusion_pytorch_model.safetensors",
        [PendingTensor(k, v.dtype, v.shape, lambda v=v: v) for k, v in tensors.items()],
        {},
    )
    with pytest.raises(CheckpointError, match=rf"wrong type .*\({name}\).* --dtype float32"):
        load_toy(source)
    model = load_toy(source, param_dtype=jnp.float16)
    np.testing.assert_array_equal(
        np.asarray(model.token[...]), tensors["token"].astype(np.float16), strict=True
    )
    with pytest.raises(OutputError, match="which is not stored as a weight"):
        save_pytorch(model, tmp_path / "out", dtype=kind)


def test_the_command_converts_them(tmp_path, monkeypatch, capsys):
    from conceptax.converters import architectures

    monkeypatch.setattr(architectures, "model_class", lambda name, source: Toy)
    source = write_toy(tmp_path / "source", toy_tensors(np.float64))
    assert main(["convert", str(source), str(tmp_path / "out")]) == 1
    assert "--dtype float32" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    expected = toy_tensors(np.float64, "toy.")
    same_bits(
        read(tmp_path / "out"),
        {key: value.astype(ml_dtypes.bfloat16) for key, value in expected.items()},
    )


def test_values_that_do_not_fit_the_new_type(tmp_path):
    tensors = toy_tensors()
    tensors["conv.bias"][0] = 1e6
    source = write_toy(tmp_path / "source", tensors)
    with pytest.raises(CheckpointError, match=r"conv.bias has values too large for float16"):
        load_toy(source, param_dtype=jnp.float16)
    with pytest.raises(ValueError, match=r"conv.bias has values too large for float16"):
        save_pytorch(load_toy(source), tmp_path / "out", dtype=jnp.float16)
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_old_names_are_accepted_and_new_ones_written(tmp_path):
    tensors = {
        k.replace("linear", "old").replace("to_out.0", "proj"): v for k, v in toy_tensors().items()
    }
    save_pytorch(load_toy(write_toy(tmp_path / "source", tensors)), tmp_path / "out")
    same_bits(read(tmp_path / "out"), toy_tensors(prefix="toy."))


def test_sharded_files_with_index(tmp_path):
    model = load_toy(write_toy(tmp_path / "source", toy_tensors()))
    save_pytorch(model, tmp_path / "out", max_shard_size=300)
    names = sorted(os.listdir(tmp_path / "out"))
    assert len(names) > 5
    assert names[:2] == ["conceptax.json", "config.json"]
    assert names[2].startswith("diffusion_pytorch_model-00001-of-")
    index = json.loads(
        (tmp_path / "out/diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in toy_tensors().values())
    save_pytorch(load_toy(tmp_path / "out"), tmp_path / "whole")
    same_bits(read(tmp_path / "whole"), toy_tensors(prefix="toy."))


@pytest.mark.parametrize("size", ["5 apples", 0, "-1GB"])
def test_shard_size_must_make_sense(tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size"):
        save_pytorch(Toy(ToyConfig(), rngs=nnx.Rngs(0)), tmp_path / "out", max_shard_size=size)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"],
)
def test_other_file_names(tmp_path, name):
    model = load_toy(write_toy(tmp_path, toy_tensors(), name))
    np.testing.assert_array_equal(np.asarray(model.token[...]), toy_tensors()["token"])


def test_the_plain_file_comes_first_as_in_diffusers(tmp_path, torch):
    def folder(*names):
        for number, name in enumerate(names):
            values = {k: np.full_like(v, number) for k, v in toy_tensors().items()}
            write_toy(tmp_path / names[0], values, name)
        return float(load_toy(tmp_path / names[0]).scale[...])

    stem = "diffusion_pytorch_model"
    assert folder(f"{stem}.non_ema.safetensors") == 0
    (tmp_path / "upper").mkdir()
    (tmp_path / "upper" / f"{stem.upper()}.BF16.SAFETENSORS").touch()
    assert find_weights(tmp_path / "upper", "diffusers").name.endswith(".BF16.SAFETENSORS")
    assert folder(f"{stem}.bf16.safetensors", f"{stem}.fp16.safetensors") == 1
    assert folder(f"{stem}.fp16.safetensors", f"{stem}.non_ema.safetensors") == 0
    assert folder(f"{stem}.fp8.safetensors", f"{stem}.safetensors") == 1
    mixed = write_toy(tmp_path / "mixed", toy_tensors(), f"{stem}.fp16.safetensors")
    plain = {k: torch.full(v.shape, 7.0) for k, v in toy_tensors().items()}
    torch.save(plain, mixed / f"{stem}.bin")
    assert float(load_toy(mixed).scale[...]) == 7
    (found,) = inspect_checkpoint(bundled_model() / "vae").parts
    assert found.variant == ""


@pytest.mark.parametrize("index", ["safetensors.index.fp16.json", "fp16.safetensors.index.json"])
def test_a_variant_in_shards(tmp_path, index):
    tensors, weight_map = toy_tensors(), {}
    for number, keys in enumerate((list(tensors)[:5], list(tensors)[5:]), 1):
        shard = f"diffusion_pytorch_model.fp16-0000{number}-of-00002.safetensors"
        write_toy(tmp_path, {key: tensors[key] for key in keys}, shard)
        weight_map |= dict.fromkeys(keys, shard)
    file = tmp_path / f"diffusion_pytorch_model.{index}"
    file.write_text(json.dumps({"weight_map": weight_map}))
    np.testing.assert_array_equal(load_toy(tmp_path).token[...], tensors["token"])


def test_parts_that_nothing_computes_with_travel_along(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(bundled_model(), source)
    index = json.loads((source / "model_index.json").read_text()) | {
        "_class_name": ["pipeline", "MyPipeline"],
        "requires_safety_checker": True,
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],  # not downloaded
    }
    (source / "model_index.json").write_text(json.dumps(index))
    (source / "pipeline.py").write_text("raise SystemExit")
    (source / "feature_extractor").mkdir()
    (source / "feature_extractor/preprocessor_config.json").write_text("{ }")
    (source / "safety_checker/deep").mkdir(parents=True)
    (tmp_path / "blob").write_bytes(bytes(range(256)))
    (source / "safety_checker/model.safetensors").symlink_to(tmp_path / "blob")
    (source / "safety_checker/deep/x").write_text("x")
    pipeline = dataclasses.replace(load_pytorch(source, sharding="mapped"), unet=None)
    save_pytorch(pipeline, tmp_path / "out", dtype="float16")
    out = tmp_path / "out"
    for name in (
        "safety_checker/model.safetensors",
        "safety_checker/deep/x",
        "pipeline.py",
        "feature_extractor/preprocessor_config.json",
    ):
        assert (out / name).read_bytes() == (source / name).read_bytes()
        assert not (out / name).is_symlink()
    after = json.loads((out / "model_index.json").read_text())
    kept = ("_class_name", "safety_checker", "feature_extractor", "requires_safety_checker")
    assert {name: after[name] for name in kept} == {name: index[name] for name in kept}
    assert after["image_encoder"] == after["unet"] == [None, None]
    shutil.rmtree(source / "safety_checker")
    with pytest.raises(OutputError, match=r"safety_checker was to be carried along from"):
        save_pytorch(pipeline, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    (source / "safety_checker").mkdir()
    (source / "safety_checker/up").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="neither a file nor a folder of its own"):
        load_pytorch(source, sharding="mapped")


# ---- tensors that are not read ----


@pytest.fixture(scope="module")
def language_model(tmp_path_factory, torch):
    """A folder of a Qwen3ForCausalLM of five layers."""
    import oracles

    folder = tmp_path_factory.mktemp("qwen3")
    oracles.qwen3().module.save_pretrained(folder)
    return folder


def test_what_is_not_read_travels_along(language_model, tmp_path, torch):
    import transformers

    model = load_pytorch(language_model, read=(1, 3))
    assert len(model.layers) == 3
    weights = dict(read(language_model, "model.safetensors"))
    unread = {name for name in weights if re.match(r"lm_head|model\.(norm|layers\.[34])\.", name)}
    assert model.published_config.unread.keys() == unread
    save_pytorch(model, tmp_path / "same")
    same_bits(read(tmp_path / "same", "model.safetensors"), weights)

    edited = jnp.ones_like(model.layers[0].mlp.up_proj.kernel[...])
    model.layers[0].mlp.up_proj.kernel[...] = edited
    save_pytorch(model, tmp_path / "edited", max_shard_size=8000)
    _, loading = transformers.Qwen3ForCausalLM.from_pretrained(
        tmp_path / "edited", output_loading_info=True
    )
    assert not any(loading.values())
    again = load_pytorch(tmp_path / "edited", read=(5,))
    np.testing.assert_array_equal(again.layers[0].mlp.up_proj.kernel[...], edited)
    np.testing.assert_array_equal(again.norm.scale[...], weights["model.norm.weight"])


def test_what_is_not_read_is_converted_too(language_model, tmp_path):
    model = load_pytorch(language_model, read=(1,), param_dtype="float16")
    save_pytorch(model, tmp_path / "half")
    save_pytorch(model, tmp_path / "brain", dtype=jnp.bfloat16)
    for name, dtype in (("half", np.float16), ("brain", ml_dtypes.bfloat16)):
        assert {values.dtype for values in read(tmp_path / name, "model.safetensors").values()} == {
            np.dtype(dtype)
        }


def test_what_belongs_to_no_layer_is_still_told(language_model, tmp_path):
    shutil.copytree(language_model, tmp_path / "odd")
    weights = dict(read(language_model, "model.safetensors"))
    stray = {"model.layers.1.self_attn.q_proj.bias": np.zeros(32, np.float32)}
    safetensors.numpy.save_file(weights | stray, tmp_path / "odd/model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected.*layers\.1\.self_attn\.q_proj\.bias"):
        load_pytorch(tmp_path / "odd", read=(1, 3))
    with pytest.raises(
        CheckpointError, match=r"hidden states from 0 to 5, .* received \(9, 18, 27"
    ):
        load_pytorch(language_model)
    weights["model.norm.weight"] = np.full(16, np.nan, np.float32)
    safetensors.numpy.save_file(weights, tmp_path / "odd/model.safetensors")
    model = load_pytorch(tmp_path / "odd", read=(1, 3))
    with pytest.raises(OutputError, match=r"model\.norm\.weight holds NaN"):
        save_pytorch(model, tmp_path / "written")


def test_statistics_of_patches_travel_along(tmp_path, torch):
    import diffusers
    import oracles

    from conceptax.flax_models.autoencoder_kl import AutoencoderKLFlux2

    oracles.autoencoder_flux_2().module.save_pretrained(tmp_path / "vae")
    weights = read(tmp_path / "vae")
    save_pytorch(load_pytorch(tmp_path / "vae"), tmp_path / "same")
    written = read(tmp_path / "same")
    assert written["bn.num_batches_tracked"] == 7
    same_bits(written, weights)
    config = load_pytorch(tmp_path / "vae").config
    save_pytorch(AutoencoderKLFlux2(config, rngs=nnx.Rngs(0)), tmp_path / "new")
    module = diffusers.AutoencoderKLFlux2.from_pretrained(tmp_path / "new")
    assert not module.bn.running_mean.any() and module.bn.running_var.eq(1).all()


def test_a_tied_embedding_is_read_once(tmp_path, torch):
    """Older files hold it under either name, or under both, and some the decoder too."""
    import oracles

    oracles.t5().module.save_pretrained(tmp_path)
    weights = dict(read(tmp_path, "model.safetensors"))
    table, other = weights.pop("shared.weight"), "encoder.embed_tokens.weight"
    for names in ([other], ["shared.weight"], ["shared.weight", other]):
        rest = {"decoder.final_layer_norm.weight": np.ones(16, np.float32)}
        file = tmp_path / "model.safetensors"
        safetensors.numpy.save_file(weights | rest | dict.fromkeys(names, table), file)
        np.testing.assert_array_equal(load_pytorch(tmp_path).shared.embedding[...], table)


def test_single_file_beside_its_config(tmp_path):
    write_toy(tmp_path, toy_tensors())
    write_toy(
        tmp_path, {k: np.asarray(v + 1) for k, v in toy_tensors().items()}, "other.safetensors"
    )
    model = load_toy(str(tmp_path / "other.safetensors"))
    np.testing.assert_array_equal(np.asarray(model.token[...]), toy_tensors()["token"] + 1)


@pytest.mark.parametrize("old", [False, True])
def test_pickled_parameters(tmp_path, torch, old):
    """A saved dict of `named_parameters`, in both forms of torch.save."""
    source = write_toy(tmp_path / "source", toy_tensors())
    (source / "diffusion_pytorch_model.safetensors").unlink()
    state = {k: torch.nn.Parameter(torch.from_numpy(v)) for k, v in toy_tensors().items()}
    expected = toy_tensors(prefix="toy.")
    if not old:
        state["token"] = torch.nn.Parameter(state["token"].detach().to(torch.float8_e5m2))
        eighth = expected["toy.token"].astype(ml_dtypes.float8_e5m2)
        expected["toy.token"] = eighth.astype(np.float32)
    file = source / "diffusion_pytorch_model.bin"
    torch.save(state, file, _use_new_zipfile_serialization=not old)
    save_pytorch(load_toy(source, param_dtype=jnp.float32), tmp_path / "out")
    same_bits(read(tmp_path / "out"), expected)


@pytest.mark.parametrize("sharded", [False, True])
def test_pickles_without_execution(tmp_path, torch, sharded):
    tensors = {k: torch.from_numpy(v.copy()) for k, v in toy_tensors().items()}
    tensors["token"] = tensors["token"].bfloat16()
    tensors["blocks.0.linear.weight"] = tensors["blocks.0.linear.weight"].T.contiguous().T
    write_toy(tmp_path / "source", toy_tensors())
    (tmp_path / "source/diffusion_pytorch_model.safetensors").unlink()
    stem = tmp_path / "source/diffusion_pytorch_model"
    if sharded:
        files = {"a.bin": {"token": tensors["token"]}}
        files["b.bin"] = {k: v for k, v in tensors.items() if k != "token"}
        for name, part in files.items():
            torch.save(part, tmp_path / "source" / name)
        weight_map = {k: name for name, part in files.items() for k in part}
        stem.with_suffix(".bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(tensors, stem.with_suffix(".bin"))
    save_pytorch(load_toy(tmp_path / "source"), tmp_path / "out")
    expected = toy_tensors(prefix="toy.")
    expected["toy.token"] = expected["toy.token"].astype(ml_dtypes.bfloat16)
    same_bits(read(tmp_path / "out"), expected)


def test_the_model_outlives_its_files(tmp_path):
    source = write_toy(tmp_path / "source", toy_tensors())
    model = load_toy(source)
    file = source / "diffusion_pytorch_model.safetensors"
    with open(file, "r+b") as handle:  # the same pages that were mapped
        handle.write(b"\xff" * file.stat().st_size)
    shutil.rmtree(source)
    save_pytorch(model, tmp_path / "out")
    same_bits(read(tmp_path / "out"), toy_tensors(prefix="toy."))


def test_loaded_model_splits_merges_and_jits(tmp_path):
    model = load_toy(write_toy(tmp_path, toy_tensors()))
    graphdef, state = nnx.split(model, nnx.Param, ...)[:2]
    hash(graphdef)
    total = jax.jit(lambda s: sum(x.sum() for x in jax.tree.leaves(s)))(state)
    assert np.isclose(total, sum(v.sum() for v in toy_tensors().values()), rtol=1e-5)


@pytest.fixture(scope="module")
def mesh():
    if jax.device_count() < 8:
        pytest.skip("needs eight host devices")
    return jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def test_parameters_land_on_their_sharding(tmp_path, mesh):
    source = write_toy(tmp_path / "source", toy_tensors())
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    seen = {}

    def rule(path, shape):
        seen[path] = shape
        return rows if path[-1] == "embedding" else everywhere

    model = load_toy(source, sharding=rule)
    assert seen["blocks", 1, "linear", "kernel"] == (4, 8)
    embedding = model.embed.embedding[...]
    assert embedding.sharding == rows
    assert {s.data.shape for s in embedding.addressable_shards} == {(4, 4)}
    assert model.conv.kernel[...].sharding == everywhere
    np.testing.assert_array_equal(np.asarray(embedding), toy_tensors()["embed.weight"])
    save_pytorch(model, tmp_path / "out")
    same_bits(read(tmp_path / "out"), toy_tensors(prefix="toy."))

    for leaf in jax.tree.leaves(nnx.state(load_toy(source, sharding=everywhere), nnx.Param)):
        assert leaf.sharding == everywhere


# What is written for people is refused or replaced, never damaged.


def test_refuses_to_overwrite_without_force(tmp_path):
    model = load_toy(write_toy(tmp_path / "source", toy_tensors()))
    save_pytorch(model, tmp_path / "out")
    with pytest.raises(OutputError, match=r"already exists and is not empty.*--force"):
        save_pytorch(model, tmp_path / "out")
    model.token[...] = model.token[...] + 1
    save_pytorch(model, tmp_path / "out", force=True)
    assert sorted(os.listdir(tmp_path / "out")) == [
        "conceptax.json",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    np.testing.assert_array_equal(read(tmp_path / "out")["toy.token"], np.asarray(model.token[...]))
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_saving_over_the_source(tmp_path):
    """A result of ours may be; what somebody else wrote may not, mapped or not."""
    source = write_toy(tmp_path / "source", toy_tensors())
    for sharding in (None, "mapped"):
        with pytest.raises(OutputError, match=r"no conceptax.json.*remove it yourself"):
            save_pytorch(load_toy(source, sharding=sharding), source, force=True)
    same_bits(read(source), toy_tensors())
    saved = save_pytorch(load_toy(source), tmp_path / "saved")
    save_pytorch(load_toy(saved, sharding="mapped"), saved, force=True)
    same_bits(read(saved), toy_tensors(prefix="toy."))


@pytest.fixture
def copies(monkeypatch):
    """How the system copies between files: a few bytes at a time, until it refuses with `error`."""
    if not hasattr(os, "copy_file_range"):
        pytest.skip("this system copies no ranges of files")
    copy, asked = os.copy_file_range, types.SimpleNamespace(count=0, error=None)

    def some(source, target, count, **options):
        asked.count += 1
        if asked.error and asked.count > 2:
            raise OSError(asked.error, os.strerror(asked.error))
        return copy(source, target, min(count, 5), **options)

    monkeypatch.setattr(os, "copy_file_range", some)
    monkeypatch.setattr(safetensors_file, "_PIECE", 8)
    return asked


@pytest.mark.parametrize("error", [None, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP])
def test_what_stays_as_it_is_is_copied_by_the_system(tmp_path, copies, error):
    """Where it does not, or stops in the middle, the rest is written."""
    copies.error = error
    source = write_toy(tmp_path / "source", toy_tensors())
    model, told = load_toy(source, sharding="mapped"), []
    with safetensors_file.telling(lambda *each: told.append(each)):
        save_pytorch(model, tmp_path / "out")
    same_bits(read(tmp_path / "out"), toy_tensors(prefix="toy."))
    assert copies.count > len(SHAPES) if error is None else copies.count > 2
    sizes = sum(tensor.nbytes for tensor in toy_tensors().values())
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1][1:] == (sizes, sizes)


def test_a_full_disk_is_told_while_the_system_copies(tmp_path, copies):
    copies.error = errno.ENOSPC
    source = write_toy(tmp_path / "source", toy_tensors())
    with pytest.raises(OutputError, match="free some space"):
        save_pytorch(load_toy(source, sharding="mapped"), tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_what_is_converted_is_not_copied_by_the_system(tmp_path, copies):
    source = write_toy(tmp_path / "source", toy_tensors())
    save_pytorch(load_toy(source, sharding="mapped"), tmp_path / "out", dtype="bfloat16")
    save_pytorch(load_toy(source), tmp_path / "again")
    assert not copies.count


@pytest.mark.parametrize("name", [".git/HEAD", "notes.txt", "deeper/config.json"])
def test_what_was_added_to_a_result_is_not_deleted(tmp_path, name):
    model = Toy(ToyConfig(), rngs=nnx.Rngs(0))
    out = save_pytorch(model, tmp_path / "out")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("years of work")
    with pytest.raises(OutputError, match=rf"also holds .*{name.split('/')[0]}"):
        save_pytorch(model, out, force=True)
    assert (out / name).read_text() == "years of work"
    (out / name).unlink()
    save_pytorch(model, out, force=True)


def test_the_working_folder_is_no_result(tmp_path, monkeypatch):
    model = Toy(ToyConfig(), rngs=nnx.Rngs(0))
    inner = save_pytorch(model, tmp_path / "out") / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    for path in (".", "..", tmp_path, "../../out/inner", "/"):
        with pytest.raises(OutputError, match="working folder, which is not replaced"):
            save_pytorch(model, path, force=True)
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(tmp_path / "out"))
    with pytest.raises(OutputError, match="is the home folder"):
        save_pytorch(model, tmp_path / "out", force=True)


def test_the_next_run_repairs_what_a_killed_one_left(tmp_path):
    """A run that ended between its two renames left no result, but the old one aside."""
    kill = """
import os, sys, pathlib
from conceptax.converters.files.output import atomic_folder, atomic_file
where, when = sys.argv[1:]
renames = []
rename = pathlib.Path.rename
def dying(self, target):
    renames.append(target)
    if len(renames) == 2:
        os._exit(9)
    return rename(self, target)
with atomic_file(f"{where}/x.png", force=True) as file:
    file.write_text("half")
    with atomic_folder(f"{where}/out", force=True) as work:
        (work / "config.json").write_text("{}")
        pathlib.Path.rename = dying
        if when == "writing":
            os._exit(9)
"""
    (tmp_path / ".out.notes.partial").write_text("not ours")
    with atomic_folder(tmp_path / "out") as work:
        (work / "config.json").write_text('{"first": true}')
    for when in ("writing", "replacing"):
        run = subprocess.run([sys.executable, "-c", kill, tmp_path, when], timeout=300)
        assert run.returncode == 9
        assert (tmp_path / "out").exists() == (when == "writing")
        assert len(os.listdir(tmp_path)) > 2
        with pytest.raises(OutputError, match="already exists"), atomic_folder(tmp_path / "out"):
            pass
        with atomic_file(tmp_path / "x.png", force=True) as file:
            file.write_text("whole")
        assert sorted(os.listdir(tmp_path)) == [".out.notes.partial", "out", "x.png"]
        assert (tmp_path / "out/config.json").read_text() == '{"first": true}'


def test_a_result_that_is_being_written_is_left_alone(tmp_path):
    with atomic_folder(tmp_path / "out") as work:
        with (
            pytest.raises(OutputError, match="by another process"),
            atomic_folder(tmp_path / "out"),
        ):
            pass
        with atomic_folder(tmp_path / "out.b"):
            pass
        (work / "x").write_text("")
    assert sorted(os.listdir(tmp_path)) == ["out", "out.b"]


def test_force_replaces_checkpoints_only(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    model = Toy(ToyConfig(), rngs=nnx.Rngs(0))
    with pytest.raises(OutputError, match="does not look like an earlier result"):
        save_pytorch(model, tmp_path / "home", force=True)
    for name in ("file", "link"):
        with pytest.raises(OutputError, match="exists and is not a folder"):
            save_pytorch(model, tmp_path / name, force=True)
    assert (tmp_path / "home/thesis.txt").read_text() == "years of work"
    assert sorted(os.listdir(tmp_path)) == ["file", "home", "link"]


def test_only_models_and_pipelines_are_saved(tmp_path):
    with pytest.raises(TypeError, match=r"received Linear"):
        save_pytorch(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), tmp_path / "out")
    with pytest.raises(ValueError, match="dtype must be float32, float16 or bfloat16"):
        save_pytorch(Toy(ToyConfig(), rngs=nnx.Rngs(0)), tmp_path / "out", dtype=np.int8)
    assert os.listdir(tmp_path) == []


# Real models, written by and read by diffusers and transformers.

WORDS = ["a", "cat", "the"]


def build_tokenizer():
    transformers = pytest.importorskip("transformers")
    letters = [chr(c) for c in range(97, 123)]
    symbols = [*letters, *(x + "</w>" for x in letters), "th", "the</w>"]
    specials = ["<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(
        vocab={s: i for i, s in enumerate(symbols + specials)},
        merges=[("t", "h"), ("th", "e</w>")],
        model_max_length=12,
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory, torch):
    """A tiny pipeline folder written by diffusers, and the pipeline."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text_config = transformers.CLIPTextConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    text = transformers.CLIPTextModel(text_config)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        attention_head_dim=2,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        sample_size=16,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("published") / "pipeline"
    pipeline.save_pretrained(folder)
    return folder, pipeline


@pytest.fixture(scope="module")
def exported(published, tmp_path_factory):
    """The same pipeline after a journey through JAX: (JAX pipeline, its folder)."""
    pipeline = load_pytorch(published[0])
    folder = tmp_path_factory.mktemp("exported") / "deep/er/pipeline"
    assert save_pytorch(pipeline, folder) == folder
    return pipeline, folder


def test_pipeline_round_trip_is_bit_exact(published, exported):
    source, target = published[0], exported[1]
    for name in ("unet", "vae"):
        same_bits(read(target / name), read(source / name))
    # transformers 5 writes a new text encoder without the prefix that 4.57 asks for.
    text = read(source / "text_encoder", "model.safetensors")
    same_bits(
        read(target / "text_encoder", "model.safetensors"),
        {"text_model." + key.removeprefix("text_model."): text[key] for key in text},
    )
    for name in (
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
    ):
        assert json.loads((target / name).read_text()) == json.loads((source / name).read_text())


def test_diffusers_draws_the_same_image_from_the_exported_folder(published, exported, torch):
    import diffusers

    restored = diffusers.StableDiffusionPipeline.from_pretrained(exported[1])
    restored.set_progress_bar_config(disable=True)
    options = {
        "latents": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        "num_inference_steps": 2,
        "output_type": "np",
    }
    images = [pipe("the cat", **options).images for pipe in (published[1], restored)]
    np.testing.assert_array_equal(*images)


def test_an_edited_text_encoder_means_the_same_in_torch(exported, torch, tmp_path):
    import transformers

    model = load_pytorch(exported[1] / "text_encoder")
    q_proj = model.encoder.layers[0].self_attn.q_proj
    q_proj.kernel[...] = 3 * q_proj.kernel[...]
    save_pytorch(model, tmp_path / "text_encoder")
    restored, report = transformers.CLIPTextModel.from_pretrained(
        tmp_path / "text_encoder", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = np.array([[54, 1, 2, 55, 55], [54, 9, 55, 55, 55]], np.int32)
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(lambda ids: model(ids))(ids)
    with torch.no_grad():
        theirs = restored(torch.from_numpy(ids).long())
    # Two float32 computations of order-one values in two layers.
    np.testing.assert_allclose(ours.last_hidden_state, theirs.last_hidden_state, atol=2e-6)
    np.testing.assert_allclose(ours.pooled, theirs.pooler_output, atol=2e-6)


def test_tokenizer_survives_with_an_added_token(exported, tmp_path):
    import transformers

    pipeline, _ = exported
    tokenizer = build_tokenizer()
    tokenizer.add_tokens("<new1>")
    save_pytorch(dataclasses.replace(pipeline, tokenizer=tokenizer), tmp_path / "out")
    folder = tmp_path / "out/tokenizer"
    assert sorted(os.listdir(folder)) == [
        "added_tokens.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    assert json.loads((folder / "added_tokens.json").read_text()) == {"<new1>": 56}
    restored = transformers.CLIPTokenizer.from_pretrained(folder)
    from_vocabulary = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt")
    )
    text = "the <new1> cat"
    assert restored(text).input_ids == tokenizer(text).input_ids
    assert restored.model_max_length == 12
    assert from_vocabulary("the cat").input_ids == tokenizer("the cat").input_ids


def test_components_can_be_chosen(published, tmp_path):
    part = load_pytorch(published[0], components=["text_encoder", "tokenizer"])
    assert isinstance(part, StableDiffusionPipeline)
    assert part.unet is None
    assert part.vae is None
    save_pytorch(part, tmp_path / "out")
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index["unet"] == index["scheduler"] == [None, None]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    with pytest.raises(ValueError, match=r"components accepts .*received \['unett'\]"):
        load_pytorch(published[0], components=["unett"])
    with pytest.raises(ValueError, match="components= does not apply"):
        load_pytorch(published[0] / "unet", components=["unet"])


def test_a_pipeline_rule_sees_the_component(published, mesh):
    owners = set()
    everywhere = NamedSharding(mesh, PartitionSpec())

    def rule(path, shape):
        owners.add(path[0])
        return everywhere

    load_pytorch(published[0], components=["text_encoder", "vae"], sharding=rule)
    assert owners == {"text_encoder", "vae"}


def test_half_precision_export_says_so_to_transformers(exported, tmp_path, torch):
    import transformers

    model = load_pytorch(exported[1] / "text_encoder")
    save_pytorch(model, tmp_path / "half", dtype=jnp.float16)
    restored = transformers.CLIPTextModel.from_pretrained(tmp_path / "half", dtype="auto")
    assert restored.dtype == torch.float16


def test_clip_with_both_towers(tmp_path, torch):
    transformers = pytest.importorskip("transformers")
    small = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 4,
    }
    original = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**small, "vocab_size": 20, "max_position_embeddings": 6},
            vision_config={**small, "image_size": 8, "patch_size": 4},
            projection_dim=4,
        )
    )
    original.save_pretrained(tmp_path / "source")
    save_pytorch(load_pytorch(tmp_path / "source"), tmp_path / "out")
    same_bits(
        read(tmp_path / "out", "model.safetensors"), read(tmp_path / "source", "model.safetensors")
    )
    restored = transformers.CLIPModel.from_pretrained(tmp_path / "out")
    for key, value in original.state_dict().items():
        assert torch.equal(value, restored.state_dict()[key]), key
