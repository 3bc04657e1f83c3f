"""Single files of FLUX.1 with every part: written, told, read back, and quantized."""

import dataclasses
import types

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from filled_models import filled, weights
from gguf_writer import gguf_bytes
from opened_files import opened_files
from oracles import relative_error

from conceptax.converters import (
    CheckpointError,
    OutputError,
    inspect_checkpoint,
    load_pytorch,
    merge_parts,
    save_pytorch,
    save_single_file,
    write_lora,
)
from conceptax.converters.files.safetensors_file import StoredTensor
from conceptax.converters.formats.compvis import PIPELINES, build_parts, open_single_file
from conceptax.converters.formats.compvis_parts import read_single_file
from conceptax.converters.formats.identify import COMPONENT, SINGLE, identify
from conceptax.converters.formats.transformer_parts import t5
from conceptax.converters.tensors import tensor_specs
from conceptax.flax_models.autoencoder_kl import (
    AutoencoderKL,
    AutoencoderKLConfig,
    AutoencoderKLFlux2,
    AutoencoderKLFlux2Config,
)
from conceptax.flax_models.autoencoder_kl_hunyuan_video import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideoConfig,
)
from conceptax.flax_models.autoencoder_kl_wan import AutoencoderKLWan, AutoencoderKLWanConfig
from conceptax.flax_models.clip import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from conceptax.flax_models.flux_2_transformer_2d import (
    Flux2Transformer2DConfig,
    Flux2Transformer2DModel,
)
from conceptax.flax_models.flux_transformer_2d import (
    FluxTransformer2DConfig,
    FluxTransformer2DModel,
)
from conceptax.flax_models.hunyuan_video_transformer_3d import (
    HunyuanVideoTransformer3DConfig,
    HunyuanVideoTransformer3DModel,
)
from conceptax.flax_models.layers.joint_attention import JointTextCondition
from conceptax.flax_models.sd3_transformer_2d import SD3Transformer2DConfig, SD3Transformer2DModel
from conceptax.flax_models.streaming import is_streamed
from conceptax.flax_models.t5 import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel
from conceptax.flax_models.wan_transformer_3d import WanTransformer3DConfig, WanTransformer3DModel

UNET, CLIP, T5 = "model.diffusion_model.", "text_encoders.clip_l.", "text_encoders.t5xxl."
FLOATS = {"dtype": np.float32, "param_dtype": None, "sharding": None}
FLOW = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "shift": 2.5,
    "use_dynamic_shifting": False,
}


def parts():
    """Sizes that a file tells, at their smallest; heads of 32 features split into 4, 14 and 14."""
    flux = FluxTransformer2DConfig(
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=1,
        joint_attention_dim=12,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )
    vae = AutoencoderKLConfig.from_dict(
        {
            "block_out_channels": [32],
            "down_block_types": ["DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D"],
            "layers_per_block": 1,
            "latent_channels": 16,
            "sample_size": 1024,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }
    )
    clip = {"vocab_size": 9, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1}
    clip |= {"num_attention_heads": 1, "projection_dim": 64, "max_position_embeddings": 7}
    clip |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    t5 = T5Config(
        vocab_size=9,
        d_model=12,
        d_kv=3,
        d_ff=20,
        num_layers=2,
        num_heads=5,
        feed_forward_proj="gated-gelu",
    )
    return {
        "transformer": filled(FluxTransformer2DModel, flux),
        "vae": filled(AutoencoderKL, vae),
        "text_encoder": filled(CLIPTextModel, CLIPTextConfig.from_dict(clip)),
        "text_encoder_2": filled(T5EncoderModel, t5),
    }


def pipeline_of(models, **more):
    settings = {"MODELS": tuple(models), "scheduler_config": FLOW, "carried": {}} | more
    return types.SimpleNamespace(**models, **settings)


@pytest.fixture(scope="module")
def models():
    return parts()


@pytest.fixture(scope="module")
def single(models, tmp_path_factory):
    return save_single_file(pipeline_of(models), tmp_path_factory.mktemp("flux") / "a.safetensors")


def read(path):
    stored = open_single_file(path)
    return read_single_file(stored, str(path))


def same(models, found):
    for name, model in found.items():
        own = weights(models[name])
        assert type(model) is type(models[name])
        assert model.config == models[name].config
        for key, value in weights(model).items():
            np.testing.assert_array_equal(value, own[key], err_msg=f"{name}.{key}")


def test_every_part_returns(models, single):
    file = read(single)
    assert (file.family, file.kind) == ("FLUX.1", "single file of FLUX.1 dev")
    assert PIPELINES[file.family] == "FluxPipeline"
    same(models, build_parts(file, str(single), list(models), **FLOATS))
    keys = set(safetensors.numpy.load_file(single))
    assert UNET + "double_blocks.0.img_attn.qkv.weight" in keys
    assert "first_stage_model.decoder.up.0.block.0.conv1.weight" in keys
    assert CLIP + "transformer.text_model.final_layer_norm.weight" in keys
    assert T5 + "transformer.encoder.block.0.layer.0.SelfAttention.q.weight" in keys
    assert identify(single).kind == SINGLE
    told = inspect_checkpoint(single)
    assert told.healthy
    assert [(p.name, p.architecture, p.dtypes.keys()) for p in told.parts] == [
        ("transformer", "FluxTransformer2DModel", {"F32"}),
        ("vae", "AutoencoderKL", {"F32"}),
        ("text_encoder", "CLIPTextModel", {"F32"}),
        ("text_encoder_2", "T5EncoderModel", {"F32"}),
    ]


def test_a_pipeline_is_made_of_it(models, single, tmp_path):
    with pytest.warns(UserWarning) as told, opened_files() as files:
        pipeline = load_pytorch(single)
    assert files == {single.name: 1}
    assert ["holds no tokenizer" in str(each.message) for each in told] == [True, True]
    assert type(pipeline).__name__ == "FluxPipeline"
    same(models, {name: getattr(pipeline, name) for name in models})
    assert pipeline.scheduler_config == FLOW
    again = save_single_file(pipeline, tmp_path / "again.safetensors")
    assert again.read_bytes() == single.read_bytes()
    layer, ones = "transformer_blocks.0.attn.to_k", np.ones((1, 32), np.float32)
    pairs = {"transformer": {layer: (ones, 3 * ones.T)}}
    write_lora(pairs, pipeline, tmp_path / "lora.safetensors", naming="kohya")
    merged = weights(merge_parts(pipeline, tmp_path / "lora.safetensors").transformer)
    change = merged[f"{layer}.weight"] - weights(pipeline.transformer)[f"{layer}.weight"]
    np.testing.assert_allclose(change, 3, rtol=1e-5)
    own = {key: value for key, value in safetensors.numpy.load_file(single).items() if UNET in key}
    safetensors.numpy.save_file(own, tmp_path / "dev.safetensors")
    dev = load_pytorch(tmp_path / "dev.safetensors")
    assert (dev.vae, dev.text_encoder_2, dev.tokenizer) == (None, None, None)
    assert dev.scheduler_config["use_dynamic_shifting"]
    schnell = {key: value for key, value in own.items() if "guidance_in" not in key}
    safetensors.numpy.save_file(schnell, tmp_path / "schnell.safetensors")
    config = load_pytorch(tmp_path / "schnell.safetensors").scheduler_config
    assert (config["shift"], config["use_dynamic_shifting"]) == (1.0, False)


def flux_2():
    config = Flux2Transformer2DConfig(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = {"block_out_channels": [32], "down_block_types": ["DownEncoderBlock2D"]}
    vae |= {"up_block_types": ["UpDecoderBlock2D"], "layers_per_block": 1}
    return {
        "transformer": filled(Flux2Transformer2DModel, config),
        "vae": filled(AutoencoderKLFlux2, AutoencoderKLFlux2Config.from_dict(vae)),
    }


def sd_3():
    config = SD3Transformer2DConfig(
        num_layers=2,
        num_attention_heads=1,
        joint_attention_dim=12,
        caption_projection_dim=64,
        pooled_projection_dim=8,
        pos_embed_max_size=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    clip = {"vocab_size": 9, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1}
    clip |= {"num_attention_heads": 1, "projection_dim": 64, "max_position_embeddings": 7}
    clip |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    second = CLIPTextConfig.from_dict(clip | {"hidden_act": "gelu", "projection_dim": 48})
    return {
        "transformer": filled(SD3Transformer2DModel, config),
        "text_encoder": filled(CLIPTextModelWithProjection, CLIPTextConfig.from_dict(clip)),
        "text_encoder_2": filled(CLIPTextModelWithProjection, second),
    }


def wan(z_dim=16):
    config = WanTransformer3DConfig(
        num_attention_heads=1, num_layers=2, text_dim=12, ffn_dim=8, freq_dim=6
    )
    latents = AutoencoderKLWanConfig()
    vae = AutoencoderKLWanConfig(
        base_dim=4,
        dim_mult=(1, 2, 2),
        num_res_blocks=1,
        temperal_downsample=(False, True),
        z_dim=z_dim,
        latents_mean=latents.latents_mean[:z_dim],
        latents_std=latents.latents_std[:z_dim],
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )
    umt5 = UMT5Config(vocab_size=9, d_model=12, d_kv=3, d_ff=20, num_layers=2, num_heads=5)
    return {
        "transformer": filled(WanTransformer3DModel, config),
        "vae": filled(AutoencoderKLWan, vae),
        "text_encoder": filled(UMT5EncoderModel, umt5),
    }


def hunyuan_video():
    config = HunyuanVideoTransformer3DConfig(
        in_channels=4,
        out_channels=4,
        num_attention_heads=1,
        attention_head_dim=32,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=12,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 14, 14),
    )
    return {"transformer": filled(HunyuanVideoTransformer3DModel, config)}


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (wan, "single file of Wan"),
        (hunyuan_video, "single file of HunyuanVideo, transformer alone"),
        (flux_2, "single file of FLUX.2 klein"),
        (sd_3, "single file of SD 3 3.5 medium, without vae and text_encoder_3"),
    ],
)
def test_other_families_return(tmp_path, make, kind):
    models = make()
    path = save_single_file(pipeline_of(models), tmp_path / "a.safetensors")
    file = read(path)
    assert (file.kind, file.unknown, file.leftovers) == (kind, [], {})
    same(models, build_parts(file, str(path), list(models), **FLOATS))
    assert inspect_checkpoint(path).healthy
    if make is sd_3:  # which does without T5, and not without an autoencoder
        with pytest.warns(UserWarning) as told:
            assert load_pytorch(path).text_encoder_3 is None
        messages = "; ".join(str(each.message) for each in told)
        assert "text_encoder_2, transformer and no vae: that can" in messages
    content = safetensors.numpy.load_file(path)
    projection = "text_encoders.clip_l.transformer.text_projection.weight"
    if projection in content:  # which published files lack
        del content[projection]
        safetensors.numpy.save_file(content, path)
        found = build_parts(read(path), str(path), ["text_encoder"], **FLOATS)["text_encoder"]
        np.testing.assert_array_equal(weights(found)["text_projection.weight"], np.eye(64))


def test_a_pipeline_of_wan_is_made_of_it(tmp_path):
    models = wan()
    path = save_single_file(pipeline_of(models, scheduler_config={}), tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="holds no tokenizer"):
        pipeline = load_pytorch(path)
    assert type(pipeline).__name__ == "WanPipeline" and pipeline.transformer_2 is None
    same(models, {name: getattr(pipeline, name) for name in models})
    told = pipeline.scheduler_config
    assert (told["_class_name"], told["flow_shift"]) == ("UniPCMultistepScheduler", 3.0)
    assert "expand_timesteps" not in pipeline.model_index
    wide = dataclasses.replace(models["transformer"].config, in_channels=48, out_channels=48)
    alone = pipeline_of({"transformer": filled(WanTransformer3DModel, wide)}, scheduler_config={})
    pipeline = load_pytorch(save_single_file(alone, tmp_path / "5b.safetensors"))
    assert pipeline.scheduler_config["flow_shift"] == 5.0
    assert pipeline.model_index["expand_timesteps"]


def test_tencents_checkpoint(tmp_path, torch):
    """As published: a pickle with the tensors under "module", of which nothing is executed."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    models = hunyuan_video()
    written = save_single_file(pipeline_of(models), tmp_path / "a.safetensors")
    content = safetensors.numpy.load_file(written)
    own = {key.removeprefix(UNET): torch.from_numpy(value) for key, value in content.items()}
    assert infer_diffusers_model_type(dict(own)) == "hunyuan-video"
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": own}, path)
    assert identify(path).kind == SINGLE
    (part,) = inspect_checkpoint(path).parts
    assert (part.name, part.architecture) == ("transformer", "HunyuanVideoTransformer3DModel")
    file = read(path)
    assert (file.family, file.unknown) == ("HunyuanVideo", [])
    pipeline = load_pytorch(path)
    assert type(pipeline).__name__ == "HunyuanVideoPipeline" and pipeline.vae is None
    assert pipeline.scheduler_config["shift"] == 7.0
    found = {"transformer": pipeline.transformer}
    same(models, found)
    again = save_single_file(pipeline_of(found), tmp_path / "again.safetensors")
    assert again.read_bytes() == written.read_bytes()
    vae = pipeline_of({**models, "vae": models["transformer"]})
    with pytest.raises(OutputError, match="holds its transformer alone, and no vae: write a fold"):
        save_single_file(vae, tmp_path / "b.safetensors")
    first = torch.zeros(32, 9, 1, 2, 2)  # channels of an image beside the noise
    torch.save({"module": {**own, "img_in.proj.weight": first}}, path)
    with pytest.raises(
        CheckpointError, match=r"HunyuanVideo's image-to-video model \(9 channels in"
    ):
        read(path)


def test_tencents_autoencoder(tmp_path, torch):
    """Under diffusers' names, in a folder with settings of Tencent's own, or as a file alone."""
    config = AutoencoderKLHunyuanVideoConfig(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
    )
    models = {"vae": filled(AutoencoderKLHunyuanVideo, config)}
    content = {key: np.array(value, order="C") for key, value in weights(models["vae"]).items()}
    (folder := tmp_path / "vae").mkdir()
    (folder / "config.json").write_text('{"_class_name": "AutoencoderKLCausal3D"}')
    own = {f"vae.{key}": torch.from_numpy(value) for key, value in content.items()}
    torch.save({"state_dict": own}, folder / "pytorch_model.pt")
    safetensors.numpy.save_file(content, alone := tmp_path / "hunyuan_video_vae.safetensors")
    for path in (folder, folder / "pytorch_model.pt", alone):
        told = inspect_checkpoint(path)
        assert (told.kind, told.healthy) == ("single file of HunyuanVideo, vae alone", True)
        pipeline = load_pytorch(path)
        assert type(pipeline).__name__ == "HunyuanVideoPipeline" and pipeline.transformer is None
        same(models, {"vae": pipeline.vae})
    written = save_pytorch(models["vae"], tmp_path / "written")
    same(models, {"vae": load_pytorch(written)})
    file = written / "diffusion_pytorch_model.safetensors"
    assert identify(file).kind == COMPONENT  # its settings are beside it


def test_diffusers_reads_what_is_beside_the_transformer(models, single, torch):
    """It tells the model, and its converters find every tensor of the other parts."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import (
        convert_ldm_clip_checkpoint,
        convert_ldm_vae_checkpoint,
        convert_sd3_t5_checkpoint_to_diffusers,
        infer_diffusers_model_type,
    )

    content = {k: torch.from_numpy(v) for k, v in safetensors.numpy.load_file(single).items()}
    assert infer_diffusers_model_type(content) == "flux-dev"
    prefix = CLIP + "transformer."
    for name, theirs in (
        ("text_encoder", convert_ldm_clip_checkpoint(dict(content), remove_prefix=prefix)),
        ("text_encoder_2", convert_sd3_t5_checkpoint_to_diffusers(dict(content))),
    ):
        own = weights(models[name])
        assert {key.removeprefix("text_model.") for key in theirs} == own.keys()
        for key, value in theirs.items():
            np.testing.assert_array_equal(value.numpy(), own[key.removeprefix("text_model.")])
    ours = {k: v for k, v in content.items() if k.startswith("first_stage")}
    config = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32,),
        layers_per_block=1,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **config,
    )
    vae.load_state_dict(convert_ldm_vae_checkpoint(ours, config))


def test_other_programs_files(models, single, tmp_path):
    """ComfyUI's: the autoencoder under `vae.`, and what is beside the models passed over."""
    content = safetensors.numpy.load_file(single)
    theirs = {key.replace("first_stage_model.", "vae."): value for key, value in content.items()}
    one = np.ones(1, np.float32)
    extra = {
        CLIP + "logit_scale": one,
        CLIP + "transformer.text_projection.weight": one,
        T5 + "logit_scale": one,
        T5 + "spiece_model": np.ones(5, np.uint8),
        T5 + "transformer.encoder.embed_tokens.weight": one,
    }
    safetensors.numpy.save_file(theirs | extra, tmp_path / "a.safetensors")
    file = read(tmp_path / "a.safetensors")
    assert sorted(key for keys in file.leftovers.values() for key in keys) == sorted(extra)
    assert file.unknown == []
    same(models, build_parts(file, "it", list(models), **FLOATS))
    # A file of one model, with its prefix or without
    for prefix, name in ((UNET, "transformer"), (T5 + "transformer.", "text_encoder_2")):
        alone = {k.removeprefix(prefix): v for k, v in content.items() if k.startswith(prefix)}
        safetensors.numpy.save_file(alone, tmp_path / "b.safetensors")
        file = read(tmp_path / "b.safetensors")
        assert (list(file.parts), file.unknown) == ([name], [])
        same(models, build_parts(file, "it", [name], **FLOATS))
    (tmp_path / "config.json").write_text("{}")  # beside which T5's is a component
    assert open_single_file(tmp_path / "b.safetensors") is None


def test_an_autoencoder_alone_is_guessed(single, tmp_path):
    content = safetensors.numpy.load_file(single)
    prefix = "first_stage_model."
    alone = {k.removeprefix(prefix): v for k, v in content.items() if k.startswith(prefix)}
    safetensors.numpy.save_file(alone, tmp_path / "ae.safetensors")
    file = read(tmp_path / "ae.safetensors")
    assert (file.family, file.guessed) == ("FLUX.1", True)
    raw = file.parts["vae"].raw
    assert (raw["scaling_factor"], raw["shift_factor"]) == (0.3611, 0.1159)
    assert (raw["use_quant_conv"], raw["use_post_quant_conv"]) == (False, False)


def same_streamed(*paths):
    """The transformers, whose blocks stay in their files, compute the same."""
    text = JointTextCondition(jnp.ones((1, 3, 12)), jnp.ones((1, 64)), jnp.ones(1))
    outputs = []
    for path in paths:
        model = load_pytorch(path, stream=True, components=["transformer"]).transformer
        assert is_streamed(model)
        outputs.append(np.asarray(model(jnp.ones((1, 2, 3, 64)), 5.0, text)))
    # Where an array begins in memory decides in which order XLA sums.
    assert relative_error(*outputs) < 1e-5


def test_8_bits_with_scales(models, single, tmp_path):
    """As ComfyUI keeps them: fused layers are cut after they are scaled."""
    content = safetensors.numpy.load_file(single)
    written = {UNET + "scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn)}
    for key, value in content.items():
        if key.startswith(UNET) and value.ndim == 2:
            written[key] = (value * 4).astype(ml_dtypes.float8_e4m3fn)
            written[key.replace(".weight", ".scale_weight")] = np.array(0.25, np.float32)
            content[key] = written[key].astype(np.float32) / 4
        else:
            written[key] = value
    safetensors.numpy.save_file(written, tmp_path / "a.safetensors")
    safetensors.numpy.save_file(content, tmp_path / "b.safetensors")
    found, expected = (
        build_parts(read(tmp_path / f"{name}.safetensors"), "it", ["transformer"], **FLOATS)
        for name in "ab"
    )
    same(expected, found)
    told = inspect_checkpoint(tmp_path / "a.safetensors")
    assert told.healthy
    assert told.parts[0].quantized == {"F8_E4M3 with scales"}
    assert told.parts[1].quantized == set()
    same_streamed(*(tmp_path / f"{name}.safetensors" for name in "ab"))


def test_8_bits_without_scales(single, tmp_path):
    """As many all-in-one files have it: read into the type that is asked for."""
    content = safetensors.numpy.load_file(single)
    own = {k: v.astype(ml_dtypes.float8_e4m3fn) for k, v in content.items() if UNET in k}
    safetensors.numpy.save_file(own, tmp_path / "a.safetensors")
    assert "in which no parameter is kept" in inspect_checkpoint(tmp_path / "a.safetensors").advice
    with pytest.raises(CheckpointError, match="Convert such weights"):
        load_pytorch(tmp_path / "a.safetensors")
    found = weights(load_pytorch(tmp_path / "a.safetensors", param_dtype="float32").transformer)
    key, layer = "attn.to_k.weight", UNET + "double_blocks.0.img_attn.qkv.weight"
    np.testing.assert_array_equal(
        found[f"transformer_blocks.0.{key}"], own[layer][32:64].astype(np.float32)
    )


def test_gguf(models, single, tmp_path):
    """As ComfyUI's node writes it: linear layers in blocks, without the prefix."""
    gguf = pytest.importorskip("gguf")
    content = safetensors.numpy.load_file(single)
    own = {k.removeprefix(UNET): v for k, v in content.items() if k.startswith(UNET)}
    written, plain = {}, {}
    for key, value in own.items():
        kind = "Q8_0" if value.ndim == 2 and value.shape[1] % 32 == 0 else "F32"
        number = gguf.GGMLQuantizationType[kind]
        packed = gguf.quants.quantize(value, number)
        written[key] = (int(number), value.shape, packed.tobytes())
        plain[key] = gguf.quants.dequantize(packed, number)
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(written))
    told = inspect_checkpoint(tmp_path / "a.gguf")
    assert (told.kind, told.healthy) == ("single file of FLUX.1 dev, transformer alone", True)
    assert (told.parts[0].quantized, told.advice) == ({"Q8_0"}, "")
    assert told.parts[0].nbytes == sum(len(packed) for _, _, packed in written.values())
    safetensors.numpy.save_file(plain, tmp_path / "b.safetensors")
    expected = weights(load_pytorch(tmp_path / "b.safetensors").transformer)
    found = weights(load_pytorch(tmp_path / "a.gguf").transformer)
    for key, value in found.items():
        np.testing.assert_array_equal(value, expected[key], err_msg=key)
    same_streamed(tmp_path / "a.gguf", tmp_path / "b.safetensors")
    half = load_pytorch(tmp_path / "a.gguf", param_dtype="bfloat16").transformer
    assert half.proj_out.kernel[...].dtype == ml_dtypes.bfloat16


def test_what_a_file_cannot_tell_is_refused(models, tmp_path):
    odd = filled(
        FluxTransformer2DModel,
        FluxTransformer2DConfig(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=1,
            joint_attention_dim=12,
            pooled_projection_dim=64,
            axes_dims_rope=(4, 4, 8),
        ),
    )
    with pytest.raises(OutputError, match="axes_dims_rope"):
        save_single_file(pipeline_of(models | {"transformer": odd}), tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="holds no vae"):
        save_single_file(pipeline_of(models | {"vae": None}), tmp_path / "a.safetensors")
        build_parts(read(tmp_path / "a.safetensors"), "it", ["vae"], **FLOATS)


def test_t5_under_llama_cpps_names(models):
    names = {
        "shared": "token_embd",
        "encoder.final_layer_norm": "enc.output_norm",
        "encoder.block": "enc.blk",
        "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
        "layer.0.SelfAttention.": "attn_",
        "layer.0.layer_norm": "attn_norm",
        "layer.1.layer_norm": "ffn_norm",
        "layer.1.DenseReluDense.wi_0": "ffn_gate",
        "layer.1.DenseReluDense.wi_1": "ffn_up",
        "layer.1.DenseReluDense.wo": "ffn_down",
    }
    stored = {}
    for spec in tensor_specs(models["text_encoder_2"]):
        key = spec.key
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        stored[key] = StoredTensor("F32", spec.shape, lambda: None)
    assert "enc.blk.1.attn_q.weight" in stored
    raw, found, odd = t5(stored)
    assert odd == []
    assert found.keys() == {spec.key for spec in tensor_specs(models["text_encoder_2"])}
    assert T5Config.from_dict(raw) == models["text_encoder_2"].config
    file = read_single_file(stored, "it")
    assert (file.family, list(file.parts), file.unknown) == ("FLUX.1", ["text_encoder_2"], [])
