"""LoRAs of transformers: every program's names are read, and diffusers reads what is written."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from filled_models import filled, sizes, weights

from conceptax import bundled_model
from conceptax.cli import main
from conceptax.converters import CheckpointError, OutputError, load_pytorch
from conceptax.converters.formats.lora import (
    check_lora,
    load_lora,
    merge_lora,
    save_lora,
    write_lora,
)
from conceptax.converters.formats.lora_names import Place, place_of
from conceptax.converters.formats.lora_settings import supported
from conceptax.converters.formats.transformer_parts import table_of
from conceptax.converters.tensors import tensor_specs
from conceptax.flax_models.clip import CLIPTextConfig, CLIPTextModel
from conceptax.flax_models.cosmos_transformer_3d import (
    CosmosTransformer3DConfig,
    CosmosTransformer3DModel,
)
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
from conceptax.flax_models.sd3_transformer_2d import SD3Transformer2DConfig, SD3Transformer2DModel
from conceptax.flax_models.t5 import T5Config, T5EncoderModel
from conceptax.flax_models.wan_transformer_3d import WanTransformer3DConfig, WanTransformer3DModel

RANK = 2
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.1"
# Black Forest Labs' layers -> diffusers', whose rows follow one another.
LAYERS = {
    "double_blocks.0.img_attn.qkv": [f"{DOUBLE}.attn.to_{x}" for x in "qkv"],
    "double_blocks.0.txt_attn.qkv": [f"{DOUBLE}.attn.add_{x}_proj" for x in "qkv"],
    "double_blocks.0.img_attn.proj": [f"{DOUBLE}.attn.to_out.0"],
    "double_blocks.0.txt_attn.proj": [f"{DOUBLE}.attn.to_add_out"],
    "double_blocks.0.txt_mlp.2": [f"{DOUBLE}.ff_context.net.2"],
    "double_blocks.0.img_mod.lin": [f"{DOUBLE}.norm1.linear"],
    "single_blocks.1.linear1": [*(f"{SINGLE}.attn.to_{x}" for x in "qkv"), f"{SINGLE}.proj_mlp"],
    "single_blocks.1.linear2": [f"{SINGLE}.proj_out"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
}
XLABS = {
    "double_blocks.0.processor.qkv_lora1": "double_blocks.0.img_attn.qkv",
    "double_blocks.0.processor.qkv_lora2": "double_blocks.0.txt_attn.qkv",
    "double_blocks.0.processor.proj_lora1": "double_blocks.0.img_attn.proj",
    "double_blocks.0.processor.proj_lora2": "double_blocks.0.txt_attn.proj",
    "single_blocks.1.processor.proj_lora": "single_blocks.1.linear2",
}
TEXT = "encoder.layers.0.self_attn.q_proj"


@dataclasses.dataclass
class Parts:
    """What a LoRA needs of a pipeline."""

    transformer: Any
    text_encoder: Any
    text_encoder_2: Any


def flux(**settings):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 8)}
    sizes |= {"in_channels": 4, "joint_attention_dim": 12, "pooled_projection_dim": 10}
    return FluxTransformer2DConfig(guidance_embeds=True, **sizes | settings)


@pytest.fixture(scope="module")
def pipeline():
    clip = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1}
    clip |= {"num_attention_heads": 1, "projection_dim": 4}
    t5 = T5Config(vocab_size=9, d_model=6, d_kv=3, d_ff=8, num_layers=1, num_heads=2)
    return Parts(
        filled(FluxTransformer2DModel, flux(num_layers=1, num_single_layers=2)),
        filled(CLIPTextModel, CLIPTextConfig.from_dict(clip)),
        filled(T5EncoderModel, t5),
    )


def random_pair(shape, rng):
    out, inside = shape
    pair = rng.standard_normal((RANK, inside)), rng.standard_normal((out, RANK))
    return tuple(each.astype(np.float32) for each in pair)


@pytest.fixture(scope="module")
def fused(pipeline):
    """A and B of Black Forest Labs' layers."""
    own, rng = weights(pipeline.transformer), np.random.default_rng(0)
    pairs = {}
    for layer, modules in LAYERS.items():
        shapes = [own[f"{module}.weight"].shape for module in modules]
        pairs[layer] = random_pair((sum(shape[0] for shape in shapes), shapes[0][1]), rng)
    return pairs


def expected(pipeline, pairs, scale):
    """The sums, in which the halves of the last modulation change places."""
    own = weights(pipeline.transformer)
    after = {key: value.astype(np.float64) for key, value in own.items()}
    for layer, (down, up) in pairs.items():
        change, start = scale * up.astype(np.float64) @ down, 0
        if "adaLN" in layer:
            change = np.roll(change, len(change) // 2, axis=0)
        for module in LAYERS[layer]:
            key = f"{module}.weight"
            stop = start + len(own[key])
            after[key], start = after[key] + change[start:stop], stop
    return after


def published(form):
    def write(pairs, alpha):
        content = {}
        for layer, (down, up) in pairs.items():
            name = form(layer)
            content |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            content[f"{name}.alpha"] = np.array(alpha, np.float32)
        return content

    return write


def in_peft(prefix):
    def write(pairs, alpha):
        content = {}
        for layer, (down, up) in pairs.items():
            content[f"{prefix}{layer}.lora_A.weight"] = down
            content[f"{prefix}{layer}.lora_B.weight"] = up * np.float32(alpha / RANK)
        return content

    return write


def diffusers_names(prefix, joint, leaves):
    """Each of diffusers' layers with its rows of B."""

    def write(pairs, alpha):
        content = {}
        for layer, (down, up) in pairs.items():
            if "adaLN" in layer:
                up = np.roll(up, len(up) // 2, axis=0)
            parts = LAYERS[layer]
            cuts = np.cumsum([len(up) * share // 7 for share in (1, 1, 1)])
            pieces = np.split(up, cuts if len(parts) == 4 else len(parts))
            for module, piece in zip(parts, pieces, strict=True):
                name = prefix + module.replace(".", joint)
                content[f"{name}.{leaves[0]}.weight"] = down
                content[f"{name}.{leaves[1]}.weight"] = piece * np.float32(alpha / RANK)
                if leaves[0] == "lora_down":
                    content[f"{name}.alpha"] = np.array(RANK, np.float32)
        return content

    return write


FORMS = {
    "PEFT": diffusers_names("transformer.", ".", ("lora_A", "lora_B")),
    "diffusers, older": diffusers_names("transformer.", ".", ("lora.down", "lora.up")),
    "mixture": diffusers_names("lora_transformer_", "_", ("lora_down", "lora_up")),
    "kohya": published(lambda layer: "lora_unet_" + layer.replace(".", "_")),
    "ComfyUI": published(lambda layer: "diffusion_model." + layer),
    "BFL": in_peft(""),
    "fal": in_peft("base_model.model."),
}


def check(pipeline, path, expected, scale=1.0):
    after = weights(merge_lora(pipeline, path, scale).transformer)
    assert after.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(after[key], value, rtol=2e-5, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", [False, True])
def test_names_of_every_program(pipeline, fused, tmp_path, form, text):
    content = FORMS[form](fused, alpha=3.0)
    pair = random_pair((4, 4), np.random.default_rng(1))
    if text:
        prefix = {
            "kohya": "lora_te1_text_model_" + TEXT.replace(".", "_"),
            "mixture": "lora_te1_text_model_" + TEXT.replace(".", "_"),
            "ComfyUI": "text_encoders.clip_l.transformer.text_model." + TEXT,
        }.get(form, "text_encoder.text_model." + TEXT)
        names = ("lora_down", "lora_up") if "lora_te1" in prefix else ("lora_A", "lora_B")
        content |= {f"{prefix}.{n}.weight": v for n, v in zip(names, pair, strict=True)}
    safetensors.numpy.save_file(content, tmp_path / "a.safetensors")
    found = load_lora(tmp_path / "a.safetensors", pipeline)
    assert set(found["transformer"]) == {name for names in LAYERS.values() for name in names}
    assert set(found) == {"transformer"} | ({"text_encoder"} if text else set())
    check(pipeline, tmp_path / "a.safetensors", expected(pipeline, fused, 1.5))
    if text:
        after = weights(merge_lora(pipeline, tmp_path / "a.safetensors", 0.5).text_encoder)
        before = weights(pipeline.text_encoder)[f"{TEXT}.weight"]
        np.testing.assert_allclose(
            after[f"{TEXT}.weight"], before + 0.5 * pair[1] @ pair[0], rtol=1e-5, atol=1e-5
        )


def test_xlabs(pipeline, fused, tmp_path):
    own = {layer: fused[layer] for layer in XLABS.values()}
    content = {}
    for name, layer in XLABS.items():
        for leaf, values in zip(("down", "up"), fused[layer], strict=True):
            content[f"{name}.{leaf}.weight"] = values
    safetensors.numpy.save_file(content, tmp_path / "a.safetensors")
    check(pipeline, tmp_path / "a.safetensors", expected(pipeline, own, 1.0))
    name, (down, up) = "single_blocks.1.processor.qkv_lora", fused["single_blocks.1.linear1"]
    content = {f"{name}.down.weight": down, f"{name}.up.weight": up[: 3 * 32]}
    safetensors.numpy.save_file(content, tmp_path / "b.safetensors")
    found = load_lora(tmp_path / "b.safetensors", pipeline)["transformer"]
    assert set(found) == {f"{SINGLE}.attn.to_{x}" for x in "qkv"}
    np.testing.assert_array_equal(found[f"{SINGLE}.attn.to_v"][1], up[64:96])


def test_t5_has_kohyas_third_name(pipeline, tmp_path):
    module = "encoder.block.0.layer.0.SelfAttention.q"
    pair = random_pair((6, 6), np.random.default_rng(2))
    for name in ("lora_te3_" + module.replace(".", "_"), "text_encoders.t5xxl." + module):
        content = {f"{name}.lora_{x}.weight": v for x, v in zip(("down", "up"), pair, strict=True)}
        safetensors.numpy.save_file(content, tmp_path / "a.safetensors")
        found = load_lora(tmp_path / "a.safetensors", pipeline)
        assert {name: set(own) for name, own in found.items()} == {"text_encoder_2": {module}}


def test_what_is_not_applied_is_told(pipeline, fused, tmp_path):
    def fails(content, match, read=merge_lora):
        safetensors.numpy.save_file(content, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=match):
            read(pipeline, tmp_path / "x.safetensors")

    control = {"double_blocks.0.img_attn.norm.query_norm.scale": np.ones(16, np.float32)}
    content = in_peft("")(fused, 1.0)
    fails(content | control, r"1 of a control LoRA of FLUX \(Canny, Depth\), which is not")
    zero = {key: value * ("lora_B" not in key) for key, value in content.items()}
    fails(zero, "changes nothing: every product of its matrices is zero")
    name = "lora_unet_double_blocks_7_img_attn_qkv"
    pair = fused["double_blocks.0.img_attn.qkv"]
    fails(
        {f"{name}.lora_down.weight": pair[0], f"{name}.lora_up.weight": pair[1]},
        r"1 unexpected: transformer\.double_blocks_7_img_attn_qkv\. It was made for another",
    )
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    fails(
        {f"{name}.lora_down.weight": pair[0], f"{name}.lora_up.weight": pair[1][:-1]},
        "changes 95 rows of .*, which do not divide so",
    )
    twice = in_peft("transformer.")({f"{DOUBLE}.attn.to_k": pair}, 1.0)
    twice = {key: value[:32] if "lora_B" in key else value for key, value in twice.items()}
    fails(content | twice, rf"transformer\.{DOUBLE}\.attn\.to_k is there under two names")
    with pytest.raises(CheckpointError, match="was trained with use_dora"):
        supported({"use_dora": True}, "it")
    assert place_of("lora_unet_x.alpha") == Place("unet", "x", "alpha")


# ---- out ----


def sd_parts():
    return load_pytorch(bundled_model(), components=["unet", "text_encoder"])


def flux_parts():
    """A block of each kind, as wide as diffusers takes for granted; sizes alone."""
    config = FluxTransformer2DConfig(num_layers=1, num_single_layers=1, guidance_embeds=True)
    text = load_pytorch(bundled_model(), components=["text_encoder"]).text_encoder
    return Parts(sizes(FluxTransformer2DModel, config), text, None)


def small_parts(model_class, config):
    """Sizes alone, of a family whose widths diffusers reads from the file."""
    return dataclasses.replace(flux_parts(), transformer=sizes(model_class, config))


def flux_2_parts():
    config = Flux2Transformer2DConfig(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return small_parts(Flux2Transformer2DModel, config)


def sd_3_parts():
    config = SD3Transformer2DConfig(
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=32,
        pooled_projection_dim=8,
        pos_embed_max_size=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return small_parts(SD3Transformer2DModel, config)


def wan_parts():
    config = WanTransformer3DConfig(
        num_attention_heads=1, attention_head_dim=12, text_dim=10, ffn_dim=20, num_layers=2
    )
    return small_parts(WanTransformer3DModel, config)


def cosmos_parts():
    config = CosmosTransformer3DConfig(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, text_embed_dim=10
    )
    return small_parts(CosmosTransformer3DModel, config)


def hunyuan_video_parts():
    """A block of each kind, as wide as diffusers takes for granted."""
    config = HunyuanVideoTransformer3DConfig(
        num_layers=1, num_single_layers=1, num_refiner_layers=1
    )
    return small_parts(HunyuanVideoTransformer3DModel, config)


BLOCKS = r".*transformer_blocks\..*"
FAMILIES = {
    "SD 1": (sd_parts, "unet", "StableDiffusionPipeline", r".*attn[12]\.(to_q|to_out\.0)"),
    "SD 3": (sd_3_parts, "transformer", "StableDiffusion3Pipeline", BLOCKS),
    "FLUX.1": (flux_parts, "transformer", "FluxPipeline", BLOCKS),
    "Wan": (wan_parts, "transformer", "WanPipeline", r"blocks\..*"),
    "Cosmos": (cosmos_parts, "transformer", "Cosmos2_5_PredictBasePipeline", BLOCKS),
    "HunyuanVideo": (hunyuan_video_parts, "transformer", "HunyuanVideoPipeline", BLOCKS),
    "FLUX.2": (flux_2_parts, "transformer", "Flux2KleinPipeline", BLOCKS),
}
# What its loader makes of kohya's names of these lacks the prefix that it then asks for.
EMBEDDERS = r"x_embedder|time_text_embed\.text_embedder\.linear_1|norm_out\.linear|proj_out"
# What diffusers has no names for: kohya's of some, and a text encoder of those but SD 3.
UNREAD = {(family, "kohya") for family in ("SD 3", "Cosmos", "HunyuanVideo")} | {
    (family, True) for family in ("FLUX.2", "Wan", "Cosmos", "HunyuanVideo")
}
_THEIRS = re.compile(
    r"(?P<component>unet|transformer|text_encoder)\.(?P<module>.+?)"
    r"\.(?:lora_linear_layer\.|lora\.|lora_)?(?P<kind>A|B|down|up)\.weight"
)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    make, *rest = FAMILIES[request.param]
    return request.param, make(), *rest


def diffusers_name(name, module):
    """A layer as it is called today; after kohya's files it has names of 2023."""
    module = module.removeprefix("text_model.").replace(".processor.", ".")
    if not module.endswith("_lora"):
        return module
    *inside, last = module.removesuffix("_lora").split(".")
    if name == "text_encoder":
        last = {f"to_{x}": f"{x}_proj" for x in ("q", "k", "v", "out")}[last]
    return ".".join([*inside, "to_out.0" if last == "to_out" else last])


def products_of(theirs):
    """Component and layer -> A and B of what diffusers hands to PEFT."""
    found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for key, value in theirs.items():
        parsed = _THEIRS.fullmatch(key)
        assert parsed, key
        place = parsed["component"], diffusers_name(parsed["component"], parsed["module"])
        kind = {"down": "A", "up": "B"}.get(parsed["kind"], parsed["kind"])
        assert kind not in found.setdefault(place, {}), key
        found[place][kind] = value.numpy()
    return found


def same_products(pairs, found, rng):
    """Each layer once, and its change on some inputs."""
    assert set(found) == {(name, module) for name, own in pairs.items() for module in own}
    for (name, module), (down, up) in found.items():
        mine = pairs[name][module]
        probe = rng.standard_normal((down.shape[1], 3)).astype(np.float32)
        np.testing.assert_allclose(
            up @ (down @ probe), mine[1] @ (mine[0] @ probe), rtol=1e-3, atol=1e-3
        )


def pairs_of(parts, name, chosen, rng):
    """Of each chosen layer, with ranks that differ."""
    found = {}
    for spec in tensor_specs(getattr(parts, name)):
        module = spec.key.removesuffix(".weight")
        if spec.key.endswith(".weight") and len(spec.shape) == 2 and re.fullmatch(chosen, module):
            rank = int(rng.integers(1, 4))
            down, up = rng.standard_normal((rank, spec.shape[1])), None
            up = rng.standard_normal((spec.shape[0], rank))
            found[module] = down.astype(np.float32), up.astype(np.float32)
    return found


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("naming", ["peft", "kohya"])
def test_diffusers_applies_every_key_that_is_written(family, naming, text, tmp_path, torch):
    """As it converts a file before it hands it to PEFT, each layer once and with equal product."""
    diffusers = pytest.importorskip("diffusers")
    name, parts, denoiser, pipeline_class, chosen = family
    rng = np.random.default_rng(0)
    if naming == "peft" and denoiser == "transformer":
        chosen = f"{chosen}|{EMBEDDERS}"
    pairs = {denoiser: pairs_of(parts, denoiser, chosen, rng)}
    if text:
        pairs["text_encoder"] = pairs_of(parts, "text_encoder", r".*(self_attn|mlp)\..*", rng)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    write_lora(pairs, parts, path, naming=naming)
    back = load_lora(path, parts)
    same_products(pairs, {(name, m): pair for name in back for m, pair in back[name].items()}, rng)
    if (name, naming) in UNREAD or (name, text) in UNREAD:
        return
    theirs = getattr(diffusers, pipeline_class).lora_state_dict(str(tmp_path))
    if isinstance(theirs, tuple):
        theirs, alphas = theirs
        rank = {m: len(down) for own in pairs.values() for m, (down, _) in own.items()}
        for key, alpha in (alphas or {}).items():
            key = key.removesuffix(".alpha")
            key = key if key.endswith(".weight") else f"{key}.lora.down.weight"
            parsed = _THEIRS.fullmatch(key)
            assert parsed, key
            module = diffusers_name(parsed["component"], parsed["module"])
            assert alpha == rank[module]
    found = {place: (pair["A"], pair["B"]) for place, pair in products_of(theirs).items()}
    same_products(pairs, found, rng)


@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model."])
def test_hunyuan_videos_original_names(prefix, tmp_path, torch):
    """Every layer, against diffusers, but for two kinds in which it cuts A too: the refiner's fused
    projections and the last modulation, which are B A cut here."""
    from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers

    parts, rng = hunyuan_video_parts(), np.random.default_rng(0)
    own = {spec.key: spec.shape for spec in tensor_specs(parts.transformer)}
    layers = {}
    for old, entry in table_of("HunyuanVideo", parts.transformer.config.to_dict()).items():
        paths = [entry] if isinstance(entry, str) else list(entry.parts)
        if all(len(own.get(f"{path}.weight", ())) == 2 for path in paths):
            layers[old] = paths
    pairs = {}
    for old, paths in layers.items():
        shapes = [own[f"{path}.weight"] for path in paths]
        pairs[old] = random_pair((sum(out for out, _ in shapes), shapes[0][1]), rng)
    content = {
        f"{prefix}{old}.lora_{kind}.weight": values
        for old, pair in pairs.items()
        for kind, values in zip("AB", pair, strict=True)
    }
    safetensors.numpy.save_file(content, tmp_path / "a.safetensors")
    found = load_lora(tmp_path / "a.safetensors", parts)
    assert set(found) == {"transformer"}
    received, apart = found["transformer"], ("txt_in.individual_token_refiner", "final_layer.adaLN")
    matrices = {key.removesuffix(".weight") for key, shape in own.items() if len(shape) == 2}
    assert received.keys() == matrices
    for old, (down, up) in pairs.items():
        if old.startswith(apart[1]):
            up = np.roll(up, len(up) // 2, axis=0)
        probe = rng.standard_normal((down.shape[1], 3)).astype(np.float32)
        cut = [b @ (a @ probe) for a, b in (received[path] for path in layers[old])]
        np.testing.assert_allclose(
            np.concatenate(cut), up @ (down @ probe), rtol=1e-3, atol=1e-3, err_msg=old
        )
    theirs = _convert_hunyuan_video_lora_to_diffusers(
        {k: torch.from_numpy(v) for k, v in content.items() if not k.startswith(apart, len(prefix))}
    )
    products = products_of(theirs)
    kept = {path for old in layers if not old.startswith(apart) for path in layers[old]}
    mine = {"transformer": {path: received[path] for path in kept}}
    same_products(mine, {k: (pair["A"], pair["B"]) for k, pair in products.items()}, rng)


def test_layers_exist_in_diffusers_transformer(torch):
    """The names above are those of its modules, so that PEFT finds each."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    parts = flux_parts()
    pairs = pairs_of(parts, "transformer", ".*", np.random.default_rng(0))
    guidance = {f"time_text_embed.guidance_embedder.linear_{n}" for n in (1, 2)}
    assert set(pairs) == linear | guidance


def test_a_kohya_file_returns_by_bits(pipeline, fused, tmp_path):
    """What was cut is joined again: A of a fused layer is stored once."""
    content = published(lambda layer: "lora_unet_" + layer.replace(".", "_"))(fused, RANK)
    safetensors.numpy.save_file(content, tmp_path / "a.safetensors")
    pairs = load_lora(tmp_path / "a.safetensors", pipeline)
    write_lora(pairs, pipeline, tmp_path / "b.safetensors", naming="kohya")
    back = safetensors.numpy.load_file(tmp_path / "b.safetensors")
    assert back.keys() == content.keys()
    for key, value in content.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_a_transformers_difference_becomes_a_lora(pipeline, fused, tmp_path):
    safetensors.numpy.save_file(in_peft("")(fused, RANK), tmp_path / "a.safetensors")
    edited = merge_lora(pipeline, tmp_path / "a.safetensors")
    for naming in ("peft", "kohya"):
        for one, other in ((edited, pipeline), (edited.transformer, pipeline.transformer)):
            path = tmp_path / f"{naming}.safetensors"
            summary = save_lora(one, other, path, rank=RANK, naming=naming, force=True)
            assert summary.error < 1e-5
            assert f"transformer.{SINGLE}.proj_mlp" in summary.ranks
            check(pipeline, path, expected(pipeline, fused, 1.0))
    check_lora(path)


def test_the_command_writes_kohyas_names(tmp_path, capsys):
    source = bundled_model() / "text_encoder"
    content = safetensors.numpy.load_file(source / "model.safetensors")
    doubled = {key: value * np.float16(1 + ("fc1.weight" in key)) for key, value in content.items()}
    edited = tmp_path / "edited"
    edited.mkdir()
    (edited / "config.json").write_bytes((source / "config.json").read_bytes())
    safetensors.numpy.save_file(doubled, edited / "model.safetensors")
    file = tmp_path / "a.safetensors"
    command = ["convert", str(edited), str(file), "--original", str(source), "--form", "lora"]
    assert main([*command, "--rank", "2", "--naming", "kohya"]) == 0
    keys = safetensors.numpy.load_file(file).keys()
    assert all(key.startswith("lora_te_text_model_encoder_layers_") for key in keys)
    single = ["convert", str(source), str(tmp_path / "b.safetensors"), "--form", "single"]
    assert main([*single, "--naming", "kohya"]) == 1
    assert "--naming is for --form lora" in capsys.readouterr().err


def test_what_cannot_be_written_is_told(pipeline, tmp_path):
    pair = np.ones((2, 32), np.float32), np.ones((32, 2), np.float32)
    name = f"{DOUBLE}.attn.to_q"
    path = tmp_path / "a.safetensors"
    for pairs, told in (
        ({"transformer": {}}, "a LoRA would be empty"),
        ({"transformer": {"x": pair}}, r"transformer\.x with A \[2, 32\] and B \[32, 2\] does not"),
        ({"unet": {name: pair}}, rf"unet\.{name} with A"),
        ({"transformer": {name: (pair[0], pair[1][:, :1])}}, "does not fit this pipeline"),
    ):
        with pytest.raises(OutputError, match=told):
            write_lora(pairs, pipeline, path)
    whole = {"transformer": {name: (pair[0] * 1e6, pair[1])}}
    with pytest.raises(OutputError, match="does not fit into float16"):
        write_lora(whole, pipeline, path, dtype=np.float16)
    with pytest.raises(ValueError, match=r"naming takes \('peft', 'kohya'\), received 'x'"):
        write_lora(whole, pipeline, path, naming="x")
    assert list(tmp_path.iterdir()) == []
