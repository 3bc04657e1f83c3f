"""Single files with CompVis's names: read as diffusers reads them, and written so that it can."""

import dataclasses
import json
import warnings

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from opened_files import opened_files

from conceptax import bundled_model
from conceptax.cli import main
from conceptax.converters import (
    CheckpointError,
    OutputError,
    inspect_checkpoint,
    load_pytorch,
    save_pytorch,
)
from conceptax.converters.files.safetensors_file import StoredTensor
from conceptax.converters.formats.compvis import load_single_file, save_single_file
from conceptax.converters.formats.compvis_parts import read_single_file
from conceptax.converters.tensors import tensor_specs, variables
from conceptax.methods.sampling import NoiseSchedule, alphas_cumprod, make_sampler
from conceptax.methods.text.phrases import ConceptError
from conceptax.reporting.models import load_pipeline

MODELS = ("unet", "vae", "text_encoder")
UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
VAE = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
TEXT = {
    "vocab_size": 720,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "max_position_embeddings": 12,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "projection_dim": 64,
}
LEFTOVERS = {
    "model_ema.decay": np.zeros((), np.float32),
    "model_ema.diffusion_modelinput_blocks00weight": np.zeros((32, 4, 3, 3), np.float32),
    "betas": np.zeros(1000, np.float32),
    "alphas_cumprod_prev": np.zeros(1000, np.float32),
    "first_stage_model.loss.logvar": np.zeros((), np.float32),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": np.arange(12)[None],
}


def numpy_state(module):
    return {key: value.numpy() for key, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def tiny(torch, tmp_path_factory, repository):
    """Folder of a tiny SD 1 pipeline that diffusers wrote, and its state dicts."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    parts = {
        "unet": diffusers.UNet2DConditionModel(**UNET),
        "vae": diffusers.AutoencoderKL(**VAE),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)),
    }
    folder = tmp_path_factory.mktemp("tiny")
    libraries = {"unet": "diffusers", "vae": "diffusers", "text_encoder": "transformers"}
    index = {n: [libraries[n], type(part).__name__] for n, part in parts.items()}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index["_class_name"] = "StableDiffusionPipeline"
    for name in ("tokenizer", "scheduler"):
        (folder / name).symlink_to(repository / "src/conceptax/assets/glyphs" / name)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder, {name: numpy_state(part) for name, part in parts.items()}


@pytest.fixture(scope="module")
def single(tiny, tmp_path_factory):
    """The same as a single file, with what training leaves behind, beside no tokenizer."""
    pipeline = load_pytorch(tiny[0], components=MODELS)
    file = save_single_file(pipeline, tmp_path_factory.mktemp("single") / "model.safetensors")
    safetensors.numpy.save_file({**safetensors.numpy.load_file(file), **LEFTOVERS}, file)
    return file


def values(model):
    slots = variables(model)
    return {
        spec.key: spec.to_torch(np.asarray(slots[spec.path].get_value()))
        for spec in tensor_specs(model)
    }


def same(received, expected):
    assert received.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(received[key], value, err_msg=key)


def test_diffusers_reads_what_is_written(tiny, single, torch):
    """diffusers' own conversion of our single file gives back the models it was made from."""
    from diffusers.loaders import single_file_utils as theirs

    def content():
        return {
            key: torch.from_numpy(value)
            for key, value in safetensors.numpy.load_file(single).items()
            if not key.startswith("model_ema")
        }

    unet = theirs.convert_ldm_unet_checkpoint(content(), {**UNET, "num_class_embeds": None})
    same({key: value.numpy() for key, value in unet.items()}, tiny[1]["unet"])
    vae = theirs.convert_ldm_vae_checkpoint(content(), VAE)
    vae = {key: value.numpy() for key, value in vae.items() if not key.startswith("loss")}
    same(vae, tiny[1]["vae"])
    text = theirs.convert_ldm_clip_checkpoint(content())
    text = {k.removeprefix("text_model."): v.numpy() for k, v in text.items()}
    text.pop("embeddings.position_ids", None)
    same(text, {k.removeprefix("text_model."): v for k, v in tiny[1]["text_encoder"].items()})


def test_a_single_file_is_opened_once(single):
    with opened_files() as files, pytest.warns(UserWarning, match="holds no tokenizer"):
        load_pytorch(single)
    assert files == {single.name: 1}


def test_single_file_loads_with_its_sizes(tiny, single, tmp_path):
    with pytest.warns(UserWarning, match=r"holds no tokenizer.*pass tokenizer="):
        pipeline = load_pytorch(single)
    assert pipeline.tokenizer is None
    assert pipeline.scheduler_config["prediction_type"] == "epsilon"
    for name in MODELS:
        model = getattr(pipeline, name)
        expected = {k.removeprefix("text_model."): v for k, v in tiny[1][name].items()}
        same(values(model), expected)
        original = load_pytorch(tiny[0] / name).config
        for setting, value in original.to_dict().items():
            if setting != "sample_size":
                assert model.config.to_dict()[setting] == value, (name, setting)
    # a folder of it is what diffusers reads
    save_pytorch(pipeline, tmp_path / "out")
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out/unet")
    same(numpy_state(unet), tiny[1]["unet"])


def test_the_command_goes_there_and_back(tiny, tmp_path, capsys):
    folder, single, back = str(tiny[0]), str(tmp_path / "a.safetensors"), tmp_path / "back"
    assert main(["convert", folder, single, "--form", "single"]) == 0
    assert main(["inspect", single]) == 0
    out = capsys.readouterr().out
    assert "single file of SD 1" in out
    assert "unet: UNet2DConditionModel, " in out
    options = ["--tokenizer", str(tiny[0] / "tokenizer"), "--verify"]
    assert main(["convert", single, str(back), *options]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "relative difference" in line]
    assert len(told) == 3
    assert all(float(line.split()[-1]) < 1e-4 for line in told), told
    for name in MODELS:
        file = next((back / name).glob("*.safetensors"))
        received = safetensors.numpy.load_file(file)
        received = {k.removeprefix("text_model."): v for k, v in received.items()}
        same(received, {k.removeprefix("text_model."): v for k, v in tiny[1][name].items()})
    assert main(["convert", folder, single, "--form", "single"]) == 1
    assert "already exists" in capsys.readouterr().err


def test_settings_that_shapes_do_not_tell_are_not_lost(tiny, tmp_path):
    """A single file of such a model would load as another one, without a word."""
    pipeline = load_pytorch(tiny[0], components=MODELS)
    for name, change in {
        "unet": {"attention_head_dim": 4},
        "vae": {"scaling_factor": 0.5},
        "text_encoder": {"num_attention_heads": 2},
    }.items():
        model = nnx.clone(getattr(pipeline, name))
        model.config = dataclasses.replace(model.config, **change)
        other = dataclasses.replace(pipeline, **{name: model})
        (setting,) = change
        with pytest.raises(OutputError, match=f"cannot tell {setting}.*readers would assume"):
            save_single_file(other, tmp_path / "x.safetensors")
    with pytest.raises(
        OutputError, match=r"single file cannot hold .*do not divide into 32 groups"
    ):
        save_single_file(
            load_pytorch(bundled_model(), components=["unet"]), tmp_path / "x.safetensors"
        )
    assert list(tmp_path.iterdir()) == []


def test_leftovers_are_named_and_strangers_refused(single, tmp_path):
    from conceptax.converters.files.safetensors_file import open_safetensors

    file = read_single_file(open_safetensors(single), "it")
    assert file.family == "SD 1"
    assert sorted(key for keys in file.leftovers.values() for key in keys) == sorted(LEFTOVERS)
    assert file.unknown == []
    stranger = {**safetensors.numpy.load_file(single), "control_model.x": np.zeros(1, np.float32)}
    safetensors.numpy.save_file(stranger, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"1 unexpected: control_model.x"):
        load_pytorch(tmp_path / "a.safetensors", components=["unet"])
    inner = "model.diffusion_model.input_blocks.7.0.in_layers.0.weight"
    stranger = {**safetensors.numpy.load_file(single), inner: np.zeros(1, np.float32)}
    safetensors.numpy.save_file(stranger, tmp_path / "a.safetensors")
    with pytest.raises(
        CheckpointError, match=r"1 unexpected: model.diffusion_model.input_blocks.7"
    ):
        load_pytorch(tmp_path / "a.safetensors", components=["unet"])


@pytest.mark.parametrize(
    "lost",
    ["input_blocks.0.0.weight", "input_blocks.1.0.in_layers.2.weight", "middle_block.1.norm.bias"],
)
def test_missing_tensors_are_told(single, tmp_path, lost):
    content = safetensors.numpy.load_file(single)
    del content[f"model.diffusion_model.{lost}"]
    safetensors.numpy.save_file(content, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        load_pytorch(tmp_path / "a.safetensors", components=["unet"])


def test_parts_and_options(single, tmp_path):
    pipeline = load_pytorch(single, components=["vae"], param_dtype=ml_dtypes.bfloat16)
    assert (pipeline.unet, pipeline.tokenizer, pipeline.scheduler_config) == (None, None, {})
    assert pipeline.vae.decoder.conv_in.kernel.dtype == ml_dtypes.bfloat16
    with pytest.raises(ValueError, match="remat is for a component folder"):
        load_pytorch(single, remat=True)
    with pytest.raises(ValueError, match="components accepts"):
        load_pytorch(single, components=["judge"])
    with pytest.raises(ValueError, match="prediction_type accepts"):
        load_pytorch(single, prediction_type="noise")
    content = safetensors.numpy.load_file(single)
    content = {k: v for k, v in content.items() if not k.startswith("first_stage_model")}
    safetensors.numpy.save_file(content, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no vae \(found text_encoder, unet\)"):
        load_pytorch(tmp_path / "a.safetensors", components=["vae"])
    with pytest.warns(UserWarning) as told:
        pipeline = load_pytorch(tmp_path / "a.safetensors")
    assert "holds text_encoder, unet and no vae" in str(told[0].message)
    assert pipeline.vae is None
    assert pipeline.unet is not None
    (tmp_path / "b.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated"):
        load_pytorch(tmp_path / "b.safetensors")
    safetensors.numpy.save_file({"x": np.zeros(1)}, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="is no single file that is read"):
        load_single_file(tmp_path / "c.safetensors")


def test_a_text_encoder_of_clips_tokens_needs_no_tokenizer(single, tmp_path):
    content = safetensors.numpy.load_file(single)
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    content[name] = np.zeros((49408, content[name].shape[1]), np.float32)
    safetensors.numpy.save_file(content, tmp_path / "model.safetensors")
    pipeline = load_pytorch(
        tmp_path / "model.safetensors", components=["text_encoder", "tokenizer"]
    )
    assert pipeline.tokenizer("a photo of a cat").input_ids[1:-1] == [320, 1125, 539, 320, 2368]


def test_the_tokenizer_may_lie_beside_the_file(single, repository, tmp_path):
    folder = repository / "src/conceptax/assets/glyphs/tokenizer"
    parts = ["text_encoder", "tokenizer"]
    assert len(load_pytorch(single, components=parts, tokenizer=folder).tokenizer) == 706
    content = safetensors.numpy.load_file(single)
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    content = {k: v for k, v in content.items() if k.startswith("cond_stage_model")}
    safetensors.numpy.save_file(content, tmp_path / "whole.safetensors")
    content[name] = np.ascontiguousarray(content[name][:60])
    safetensors.numpy.save_file(content, tmp_path / "small.safetensors")
    (tmp_path / "tokenizer").symlink_to(folder)
    assert load_pytorch(tmp_path / "whole.safetensors", components=parts).tokenizer is not None
    with pytest.raises(CheckpointError, match=r"706 tokens, but the text encoder in .* only 60"):
        load_pytorch(tmp_path / "small.safetensors", components=parts)


def test_pickled_checkpoints_of_lightning(single, torch, tmp_path, tiny):
    """Weights under `state_dict`, beside training's state, whose classes are named, not loaded."""
    content = safetensors.numpy.load_file(single)
    state = {k: torch.from_numpy(np.array(v)) for k, v in content.items()}
    whole = {"state_dict": state, "global_step": 7, "optimizer_states": [{"lr": 0.1}]}
    torch.save(whole, tmp_path / "sd.ckpt")
    pipeline = load_pytorch(tmp_path / "sd.ckpt", components=["unet"])
    same(values(pipeline.unet), tiny[1]["unet"])


def test_a_class_of_lightning_is_not_imported(torch, tmp_path, single, monkeypatch):
    import sys
    import types

    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")

    class ModelCheckpoint:
        pass

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = module.__name__, "ModelCheckpoint"
    module.ModelCheckpoint = ModelCheckpoint
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    state = {
        k: torch.from_numpy(np.array(v))
        for k, v in safetensors.numpy.load_file(single).items()
        if k.startswith("first_stage_model")
    }
    torch.save({"callbacks": {ModelCheckpoint: {}}, "state_dict": state}, tmp_path / "sd.ckpt")
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, None)
    assert load_pytorch(tmp_path / "sd.ckpt", components=["vae"]).vae is not None


# SD 2 and SDXL.


def open_clip(torch, width=64, layers=3, projection=None):
    """A text tower with OpenCLIP's names and random values."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "positional_embedding": (12, width),
        "token_embedding.weight": (60, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "logit_scale": (),
        "text_projection": (width, projection or width),
    }
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}."
        for name, shape in {
            "ln_1": (width,),
            "ln_2": (width,),
            "attn.out_proj": (width, width),
            "mlp.c_fc": (32, width),
            "mlp.c_proj": (width, 32),
        }.items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
        shapes |= {
            f"{block}attn.in_proj_weight": (3 * width, width),
            f"{block}attn.in_proj_bias": (3 * width,),
        }
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def second(torch, tmp_path_factory):
    """A tiny SD 2 file, and what diffusers makes of it."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders import single_file_utils as theirs

    torch.manual_seed(1)
    settings = {
        **UNET,
        "block_out_channels": (64, 128),
        "use_linear_projection": True,
        "attention_head_dim": (1, 2),
    }
    unet = diffusers.UNet2DConditionModel(**settings)
    folder = tmp_path_factory.mktemp("second")
    unet.save_pretrained(folder / "unet")
    pipeline = load_pytorch_parts(unet=folder / "unet")
    file = save_single_file(pipeline, folder / "sd2.safetensors")
    text = {f"cond_stage_model.model.{k}": v for k, v in open_clip(torch, layers=24).items()}
    content = safetensors.numpy.load_file(file) | {k: v.numpy() for k, v in text.items()}
    safetensors.numpy.save_file(content, file)

    class Stub:
        class config:
            hidden_size = 64

    return file, theirs.convert_open_clip_checkpoint(Stub, text), numpy_state(unet)


def load_pytorch_parts(**paths):
    from conceptax.flax_models.pipelines.stable_diffusion import StableDiffusionPipeline

    parts = dict.fromkeys((*MODELS, "tokenizer"))
    parts |= {name: load_pytorch(path) for name, path in paths.items()}
    return StableDiffusionPipeline(**parts, scheduler_config={})


def test_second_generation(second):
    file, text, unet = second
    parts = [part for part in (*MODELS, "scheduler") if part != "vae"]
    with pytest.warns(UserWarning, match=r"'v_prediction' is assumed.*'epsilon' for the base"):
        pipeline = load_pytorch(file, components=parts)
    assert pipeline.scheduler_config["prediction_type"] == "v_prediction"
    same(values(pipeline.unet), unet)
    assert pipeline.unet.config.attention_head_dim == (1, 2)
    assert pipeline.unet.config.use_linear_projection
    config = pipeline.text_encoder.config
    assert (config.num_hidden_layers, config.hidden_act) == (23, "gelu")
    theirs = {k.removeprefix("text_model."): v.numpy() for k, v in text.items()}
    theirs.pop("text_projection.weight", None)
    same(values(pipeline.text_encoder), theirs)
    base = load_pytorch(file, components=["scheduler"], prediction_type="epsilon")
    assert base.scheduler_config["prediction_type"] == "epsilon"
    again = save_single_file(pipeline, file.parent / "again.safetensors")
    told = {
        k: v
        for k, v in safetensors.numpy.load_file(file).items()
        if ".resblocks.23." not in k
        and not k.endswith(("model.logit_scale", "model.text_projection"))
    }
    same(safetensors.numpy.load_file(again), told | {"v_pred": np.zeros(0, np.float32)})
    back = load_pytorch(again, components=["scheduler"])
    assert back.scheduler_config == pipeline.scheduler_config


def test_sdxl(torch, tiny, tmp_path):
    """Both text encoders, the second as diffusers' own conversion has it; and a whole pipeline."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import single_file_utils as theirs

    from conceptax.converters.formats.compvis import _named
    from conceptax.converters.formats.compvis_names import UNET as UNET_PREFIX
    from conceptax.converters.formats.compvis_parts import unet_names_of

    torch.manual_seed(2)
    settings = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 128,
        "attention_head_dim": (1, 1),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 48 + 6 * 256,
    }
    unet = UNet2DConditionModel(**settings)
    unet.save_pretrained(tmp_path / "unet")
    ours = load_pytorch(tmp_path / "unet")
    names = unet_names_of(ours.config.to_dict())
    content = {each.key: each.produce() for each in _named(ours, UNET_PREFIX, names, None)}
    vae = load_pytorch(tiny[0], components=["vae"])
    save_single_file(vae, tmp_path / "vae.safetensors")
    content |= safetensors.numpy.load_file(tmp_path / "vae.safetensors")
    first = tiny[1]["text_encoder"]
    prefix = "conditioner.embedders.0.transformer.text_model."
    content |= {prefix + key.removeprefix("text_model."): value for key, value in first.items()}
    tower = open_clip(torch, layers=2, projection=48)
    tower["token_embedding.weight"] = torch.randn(720, 64)
    second = {f"conditioner.embedders.1.model.{key}": value for key, value in tower.items()}
    content |= {key: value.numpy() for key, value in second.items()}
    safetensors.numpy.save_file(content, tmp_path / "xl.safetensors")

    pipeline = load_pytorch(tmp_path / "xl.safetensors", tokenizer=tiny[0] / "tokenizer")
    assert type(pipeline).__name__ == "StableDiffusionXLPipeline"
    assert pipeline.unet.config.sample_size == 128
    same(values(pipeline.unet), numpy_state(unet))
    same(
        values(pipeline.text_encoder), {k.removeprefix("text_model."): v for k, v in first.items()}
    )

    class Stub:
        class config:
            hidden_size = 64

    expected = theirs.convert_open_clip_checkpoint(
        Stub, second, prefix="conditioner.embedders.1.model."
    )
    expected = {key: value.numpy() for key, value in expected.items()}
    expected.pop("text_model.embeddings.position_ids", None)
    same(values(pipeline.text_encoder_2), expected)
    assert pipeline.text_encoder_2.config.projection_dim == 48
    assert pipeline.tokenizer_2.pad_token == "!" != pipeline.tokenizer.pad_token
    assert pipeline.scheduler_config["_class_name"] == "EulerDiscreteScheduler"
    make_sampler(NoiseSchedule.from_config(pipeline.scheduler_config), num_inference_steps=2)
    save_pytorch(pipeline, tmp_path / "out")
    again = load_pytorch(tmp_path / "out")
    same(values(again.text_encoder_2), expected)

    save_single_file(pipeline, tmp_path / "again.safetensors")
    del content["conditioner.embedders.1.model.logit_scale"]
    same(safetensors.numpy.load_file(tmp_path / "again.safetensors"), content)
    config = dataclasses.replace(pipeline.text_encoder_2.config, hidden_act="quick_gelu")
    pipeline.text_encoder_2.text_model.config = config
    with pytest.raises(OutputError, match="cannot tell hidden_act=quick_gelu"):
        save_single_file(pipeline, tmp_path / "other.safetensors")


# What a file tells beside its tensors.

SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "linspace",
}
VELOCITY = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def with_header(source, path, extra=None, **metadata):
    content = safetensors.numpy.load_file(source) | (extra or {})
    safetensors.numpy.save_file(content, path, metadata=metadata)
    return load_pytorch(path, components=["scheduler"]).scheduler_config


def test_velocities_are_told_to_readers_and_back(tiny, tmp_path):
    pipeline = load_pytorch(tiny[0], components=MODELS)
    pipeline = dataclasses.replace(pipeline, scheduler_config=SCHEDULER | VELOCITY)
    file = save_single_file(pipeline, tmp_path / "v.safetensors")
    content = safetensors.numpy.load_file(file)
    assert content["v_pred"].shape == content["ztsnr"].shape == (0,)
    with safetensors.safe_open(file, "np") as opened:
        assert opened.metadata()["modelspec.prediction_type"] == "v"
    with pytest.warns(UserWarning, match="holds no tokenizer"):
        back = load_pytorch(file)
    assert back.scheduler_config == pipeline.scheduler_config
    assert back.unet.config.sample_size == 8  # of 16 pixels, as the header says
    assert (
        load_pytorch(file, components=["scheduler"], prediction_type="epsilon").scheduler_config[
            "prediction_type"
        ]
        == "epsilon"
    )
    assert inspect_checkpoint(file).kind == (
        "single file of SD 1, predicts v_prediction, zero terminal SNR"
    )
    # without the marker: of a file that tells no more, epsilon
    (tmp_path / "plain").mkdir()
    plain = dataclasses.replace(pipeline, scheduler_config=SCHEDULER)
    save_single_file(plain, tmp_path / "plain/e.safetensors")
    assert (
        not {"v_pred", "ztsnr"}
        & safetensors.numpy.load_file(tmp_path / "plain/e.safetensors").keys()
    )


@pytest.mark.parametrize(
    ("keys", "metadata", "expected"),
    [
        ((), {}, {}),
        (("v_pred",), {}, {"prediction_type": "v_prediction"}),
        (("v_pred", "ztsnr"), {}, VELOCITY | {"timestep_spacing": "trailing"}),
        (("model.diffusion_model.v_pred",), {}, {"prediction_type": "v_prediction"}),
        ((), {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ((), {"modelspec.predict_key": "v"}, {"prediction_type": "v_prediction"}),
        (
            ("v_pred",),
            {"modelspec.prediction_type": "epsilon"},
            {"prediction_type": "v_prediction"},
        ),
        ((), {"modelspec.prediction_type": "epsilon"}, {}),
    ],
)
def test_markers_of_other_programs(single, tmp_path, keys, metadata, expected):
    extra = {key: np.zeros(0, np.float32) for key in keys}
    told = with_header(single, tmp_path / "a.safetensors", extra, **metadata)
    assert told == with_header(single, tmp_path / "b.safetensors") | expected


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prediction_type": "sample"}, "prediction_type=sample"),
        ({"beta_schedule": "linear"}, "beta_schedule=linear"),
        ({"beta_end": 0.02}, "beta_end=0.02"),
        ({"num_train_timesteps": 500}, "num_train_timesteps=500"),
        ({"trained_betas": [0.1]}, r"trained_betas=\[0.1\]"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True with"),
    ],
)
def test_schedules_that_no_reader_assumes(tiny, tmp_path, change, named):
    pipeline = load_pytorch(tiny[0], components=["unet"])
    pipeline = dataclasses.replace(pipeline, scheduler_config=SCHEDULER | change)
    with pytest.raises(OutputError, match=f"cannot tell {named}.*Write a folder"):
        save_single_file(pipeline, tmp_path / "x.safetensors")
    with pytest.raises(OutputError, match=r"beta_start=0\.0001, beta_end=0\.02, beta_schedule=l"):
        save_single_file(  # the defaults of the class
            dataclasses.replace(pipeline, scheduler_config={"_class_name": "DDIMScheduler"}),
            tmp_path / "x.safetensors",
        )


# Families and names.


def transformers_names(layers, width, projection=None):
    """Shapes of a text encoder with transformers' names."""
    block = {
        **{f"self_attn.{n}_proj": (width, width) for n in ("q", "k", "v", "out")},
        "layer_norm1": (width,),
        "layer_norm2": (width,),
        "mlp.fc1": (32, width),
        "mlp.fc2": (width, 32),
    }
    shapes = {
        "embeddings.token_embedding.weight": (60, width),
        "embeddings.position_embedding.weight": (12, width),
        "final_layer_norm.weight": (width,),
        "final_layer_norm.bias": (width,),
    }
    for layer in range(layers):
        for name, shape in block.items():
            shapes |= {
                f"encoder.layers.{layer}.{name}.weight": shape,
                f"encoder.layers.{layer}.{name}.bias": shape[:1],
            }
    shapes = {f"text_model.{key}": shape for key, shape in shapes.items()}
    return shapes | ({"text_projection.weight": (projection, width)} if projection else {})


@pytest.mark.parametrize(
    ("prefix", "width", "layers", "family", "component", "kept"),
    [
        ("cond_stage_model.transformer.", 768, 12, "SD 1", "text_encoder", 12),
        ("", 768, 12, "SD 1", "text_encoder", 12),
        ("cond_stage_model.transformer.", 1024, 23, "SD 2", "text_encoder", 23),
        ("cond_stage_model.transformer.", 1024, 24, "SD 2", "text_encoder", 23),
        ("", 1024, 24, "SD 2", "text_encoder", 23),
        ("conditioner.embedders.0.transformer.", 768, 24, "SDXL", "text_encoder", 24),
        ("conditioner.embedders.1.transformer.", 1280, 32, "SDXL", "text_encoder_2", 32),
        ("", 1280, 32, "SDXL", "text_encoder_2", 32),
    ],
)
def test_text_encoders_with_the_names_of_transformers(
    prefix, width, layers, family, component, kept
):
    second = component == "text_encoder_2"
    shapes = transformers_names(layers, width, projection=1280 if second else None)
    file = read_single_file(stored({prefix + k: shape for k, shape in shapes.items()}), "it")
    assert (file.family, list(file.parts), file.unknown) == (family, [component], [])
    raw = file.parts[component].raw
    assert raw["num_hidden_layers"] == kept
    assert raw["num_attention_heads"] == width // 64
    assert raw["hidden_act"] == ("quick_gelu" if width == 768 else "gelu")
    dropped = [key for keys in file.leftovers.values() for key in keys]
    assert all(".layers.23." in key for key in dropped)
    assert len(dropped) == (16 if kept < layers else 0)
    shorter = {k: s for k, s in shapes.items() if kept == layers or ".layers.23." not in k}
    found = {
        k.removeprefix("text_model."): t.shape for k, t in file.parts[component].tensors.items()
    }
    assert found == {k.removeprefix("text_model."): shape for k, shape in shorter.items()}


@pytest.mark.parametrize("layers", [22, 23, 24])
def test_only_the_published_last_layer_is_passed_over(torch, layers):
    from diffusers.loaders import single_file_utils as theirs

    tower = open_clip(torch, layers=layers)
    tower = {f"cond_stage_model.model.{key}": value for key, value in tower.items()}

    class Stub:
        class config:
            hidden_size = 64

    expected = theirs.convert_open_clip_checkpoint(Stub, dict(tower))
    expected.pop("text_projection.weight", None)
    file = read_single_file(stored({k: tuple(v.shape) for k, v in tower.items()}), "it")
    assert {f"text_model.{k}": t.shape for k, t in file.parts["text_encoder"].tensors.items()} == {
        key: tuple(value.shape) for key, value in expected.items()
    }


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ({"conditioner.embedders.0.model.ln_final.weight": (1280,)}, "SDXL's refiner"),
        (
            {
                "model.diffusion_model.label_emb.0.0.weight": (5120, 2560),
                "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (
                    768,
                    1280,
                ),
            },
            "SDXL's refiner",
        ),
        (
            {
                "model.diffusion_model.label_emb.0.0.weight": (1280, 2048),
                "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (
                    320,
                    1024,
                ),
            },
            "Stable Diffusion 2 unCLIP",
        ),
        ({"model.diffusion_model.input_blocks.0.0.weight": (320, 5, 3, 3)}, "depth-to-image"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (320, 7, 3, 3)}, "x4 upscaler"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (320, 8, 3, 3)}, "InstructPix2Pix"),
        ({"distilled_guidance_layer.in_proj.bias": (1,), "img_in.bias": (1,)}, "Chroma"),
        ({"edm_mean": (4,), "first_stage_model.x": (1,)}, "Playground 2.5"),
    ],
)
def test_relatives_are_refused_by_name(shapes, named):
    with pytest.raises(CheckpointError, match=f"it is .*{named}.*FLUX.1, FLUX.2, .* are read"):
        read_single_file(stored(shapes), "it")


def test_inpainting_unets_are_written_under_their_class(single, tmp_path):
    content = safetensors.numpy.load_file(single)
    content["model.diffusion_model.input_blocks.0.0.weight"] = np.ones((32, 9, 3, 3), np.float32)
    safetensors.numpy.save_file(content, tmp_path / "a.safetensors")
    pipeline = load_pytorch(tmp_path / "a.safetensors", components=["unet"])
    assert pipeline.unet.config.in_channels == 9
    assert pipeline.model_index["_class_name"] == "StableDiffusionInpaintPipeline"


@pytest.mark.parametrize("form", ["module.{}", "module.model.{}", "model.{}"])
def test_wrapped_names(single, form):
    whole = {k: v.shape for k, v in safetensors.numpy.load_file(single).items()}
    wrapped = read_single_file(stored({form.format(k): s for k, s in whole.items()}), "it")
    plain = read_single_file(stored(whole), "it")
    assert wrapped.unknown == []
    assert {n: p.raw for n, p in wrapped.parts.items()} == {
        n: p.raw for n, p in plain.parts.items()
    }


# Files of a part of a model, and under other names.


def prefixed(file, prefix):
    return {
        key: value
        for key, value in safetensors.numpy.load_file(file).items()
        if key.startswith(prefix)
    }


@pytest.mark.parametrize(
    ("component", "prefix", "bare"),
    [
        ("vae", "first_stage_model.", ""),
        pytest.param("vae", *2 * ("first_stage_model.",), marks=pytest.mark.slow),
        ("vae", "first_stage_model.", "vae."),
        pytest.param("unet", "model.diffusion_model.", "", marks=pytest.mark.slow),
        ("unet", "model.diffusion_model.", "diffusion_model."),
        pytest.param("unet", *2 * ("model.diffusion_model.",), marks=pytest.mark.slow),
        ("text_encoder", "cond_stage_model.transformer.", ""),
    ],
)
def test_a_file_of_one_model_becomes_its_folder(
    tiny, single, tmp_path, capsys, component, prefix, bare
):
    content = {bare + k.removeprefix(prefix): v for k, v in prefixed(single, prefix).items()}
    file = tmp_path / "part.safetensors"
    safetensors.numpy.save_file(content, file)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["convert", str(file), str(tmp_path / "out")]) == 0
        told = capsys.readouterr().err
        assert ("scaling_factor 0.18215 is assumed" in told) == (component == "vae")
        with pytest.raises(ConceptError, match="needs the whole pipeline"):
            load_pipeline(file, "float32", "sampling")
    received = values(load_pytorch(tmp_path / "out"))
    same(received, {k.removeprefix("text_model."): v for k, v in tiny[1][component].items()})
    assert main(["inspect", str(file)]) == 0
    assert f"{component} alone" in capsys.readouterr().out


def test_an_sdxl_vae_is_told_by_the_header(tiny, tmp_path):
    vae = load_pytorch(tiny[0] / "vae")
    vae.config = dataclasses.replace(vae.config, scaling_factor=0.13025)
    from conceptax.flax_models.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline

    file = save_single_file(
        StableDiffusionXLPipeline(None, vae, None, None, {}), tmp_path / "vae.safetensors"
    )
    assert load_pytorch(file, components=["vae"]).vae.config.scaling_factor == 0.13025


def test_diffusers_weights_need_their_config(tiny, tmp_path, capsys):
    for name in ("unet", "vae"):
        (source,) = (tiny[0] / name).glob("*.safetensors")
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(source.read_bytes())
        assert main(["convert", str(file), str(tmp_path / "out")]) == 1
        said = capsys.readouterr().err
        assert "needs its config.json" in said
        assert main(["inspect", str(file)]) == 1
        assert "needs its config.json" in capsys.readouterr().out


def test_names_of_files_do_not_matter(single, torch, tmp_path, tiny):
    content = prefixed(single, "first_stage_model.")
    safetensors.numpy.save_file(content, tmp_path / "a.SAFETENSORS")
    for name in ("model", "b.ckpt"):
        (tmp_path / name).write_bytes((tmp_path / "a.SAFETENSORS").read_bytes())
    pickled = {key: torch.from_numpy(value) for key, value in content.items()}
    torch.save({"model": {"state_dict": pickled}, "epoch": 3}, tmp_path / "c.CKPT")
    torch.save(pickled, tmp_path / "old", _use_new_zipfile_serialization=False)
    for name in ("a.SAFETENSORS", "model", "b.ckpt", "c.CKPT", "old"):
        vae = load_pytorch(tmp_path / name, components=["vae"]).vae
        same(values(vae), tiny[1]["vae"])
    torch.save(pickled, tmp_path / "d.safetensors")
    with pytest.raises(CheckpointError, match=r"it is a PyTorch pickle\. Name it \.ckpt"):
        load_pytorch(tmp_path / "d.safetensors")
    for name, start, what in (
        ("x.ckpt", b"<!DOCTYPE html><html>", "a web page"),
        ("x.safetensors", b"\n<html>", "a web page"),
        ("y.safetensors", b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS"),
        ("z.bin", b"\x89PNG\r\n", "a picture"),
        ("v.ckpt", b"what", "a text"),
        ("w.safetensors", bytes(600), "full of zeros"),
    ):
        (tmp_path / name).write_bytes(start)
        with pytest.raises(CheckpointError, match=rf"{name} is {what}"):
            load_pytorch(tmp_path / name)
    (tmp_path / "u.ckpt").write_bytes(b"\1\2\3")
    with pytest.raises(CheckpointError, match=r"u\.ckpt is not .*: it is of no known format"):
        load_pytorch(tmp_path / "u.ckpt")


def kept_signal(first, last):
    return np.cumprod(1 - np.linspace(first**0.5, last**0.5, 1000) ** 2)


def test_a_stored_noise_schedule_is_used_where_it_is_another(tiny, single, tmp_path, torch):
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    content = safetensors.numpy.load_file(single)
    usual, other = kept_signal(0.00085, 0.012), kept_signal(0.001, 0.02)
    steps = torch.tensor(1 - usual / np.concatenate([[1], usual[:-1]]))
    zero = np.cumprod(1 - rescale_zero_terminal_snr(steps).numpy())

    def told(**tables):
        file = tmp_path / "other.safetensors"
        safetensors.numpy.save_file(content | tables, file)
        return load_pytorch(file, components=["scheduler"]).scheduler_config

    plain = told()
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        assert told(alphas_cumprod=usual.astype(dtype)) == plain
    assert told(**{"denoiser.sigmas": np.sqrt(1 / usual - 1)}) == plain
    rescaled = told(alphas_cumprod=zero.astype(np.float32))
    assert rescaled["rescale_betas_zero_snr"] and rescaled["timestep_spacing"] == "trailing"
    received = NoiseSchedule.from_config(told(alphas_cumprod=other))
    np.testing.assert_allclose(alphas_cumprod(received), other, rtol=1e-5)
    with pytest.raises(CheckpointError, match=r"alphas_cumprod.*cannot be told apart"):
        told(alphas_cumprod=other.astype(ml_dtypes.bfloat16))


def test_a_single_file_tells_what_it_leaves_out(tiny, tmp_path):
    pipeline = load_pytorch(tiny[0], components=["vae"])
    pipeline = dataclasses.replace(pipeline, carried={"safety_checker": tmp_path})
    with pytest.warns(UserWarning, match="no place for safety_checker, which is left out"):
        save_single_file(pipeline, tmp_path / "a.safetensors")


def meta_state(module):
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def stored(shapes):
    return {
        key: StoredTensor("F32", shape, lambda shape=shape: np.zeros(shape, np.float32))
        for key, shape in shapes.items()
    }


PUBLISHED = {  # of sd-v1-4.ckpt
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "model.diffusion_model.middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
    "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.11.0.emb_layers.1.weight": (320, 1280),
    "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
}


@pytest.mark.parametrize("family", ["SD 1", "SDXL"])
def test_published_sizes(torch, family):
    """All keys and shapes of SD 1.5, and of SDXL's UNet and VAE, there and back, without values."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders import single_file_utils as theirs

    from conceptax.converters.formats.compvis_names import vae_names
    from conceptax.converters.formats.compvis_parts import unet_names_of
    from conceptax.converters.formats.names import renamed

    settings = (
        {"cross_attention_dim": 768}
        if family == "SD 1"
        else {
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "block_out_channels": (320, 640, 1280),
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        }
    )
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**settings)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    tables = {
        "model.diffusion_model.": (meta_state(unet), unet_names_of(unet.config)),
        "first_stage_model.": (meta_state(vae), vae_names(4, 2)),
    }
    shapes = {}
    for prefix, (state, names) in tables.items():
        back = {new: old for old, new in names.items()}
        for key, shape in state.items():
            old = renamed(key, back)
            attention = ".attn_1." in old and len(shape) == 2
            shapes[prefix + old] = (*shape, 1, 1) if attention else shape
    if family == "SD 1":
        assert {key: shapes[key] for key in PUBLISHED} == PUBLISHED
        assert sum(key.startswith("model.") for key in shapes) == 686
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    config = dict(unet.config)
    oracle = theirs.convert_ldm_unet_checkpoint(dict(tensors), config)
    assert {k: tuple(v.shape) for k, v in oracle.items()} == meta_state(unet)
    oracle = theirs.convert_ldm_vae_checkpoint(dict(tensors), vae.config)
    assert {k: tuple(v.shape) for k, v in oracle.items()} == meta_state(vae)

    file = read_single_file(stored(shapes), "it")
    assert (file.family, file.unknown, file.leftovers) == (family, [], {})
    for name, module in (("unet", unet), ("vae", vae)):
        part = file.parts[name]
        assert {k: t.shape for k, t in part.tensors.items()} == meta_state(module)
        for setting, value in part.raw.items():
            if setting not in ("_class_name", "sample_size", "scaling_factor"):
                theirs_value = module.config[setting]
                value = tuple(value) if isinstance(value, list) else value
                assert value == (
                    tuple(theirs_value) if isinstance(theirs_value, list) else theirs_value
                ), setting
