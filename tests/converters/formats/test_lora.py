"""LoRA files of three programs change a pipeline as they should, and differences become LoRAs."""

import dataclasses
import json
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from conceptax import bundled_model
from conceptax.converters import CheckpointError, OutputError, load_pytorch
from conceptax.converters.formats.lora import (
    check_lora,
    difference,
    load_lora,
    merge_lora,
    save_lora,
)
from conceptax.converters.tensors import tensor_specs, variables
from conceptax.flax_models.clip import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
QUERY, OUT = f"{ATTENTION}.to_q", f"{ATTENTION}.to_out.0"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT = "encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def pipeline():
    parts = ["unet", "text_encoder"]
    return load_pytorch(bundled_model(), components=parts, param_dtype=np.float32)


def weights(model):
    slots = variables(model)
    return {
        spec.key: spec.to_torch(np.asarray(slots[spec.path].get_value())).astype(np.float64)
        for spec in tensor_specs(model)
    }


@pytest.fixture(scope="module")
def before(pipeline):
    return {"unet": weights(pipeline.unet), "text_encoder": weights(pipeline.text_encoder)}


@pytest.fixture(scope="module")
def pairs(before):
    """(component, module) -> A, B of rank 3 in PyTorch's layout."""
    rng = np.random.default_rng(0)
    modules = [("unet", QUERY), ("unet", OUT), ("unet", CONV), ("text_encoder", TEXT)]
    found = {}
    for name, module in modules:
        out, *inside = before[name][f"{module}.weight"].shape
        ones = [1] * (len(inside) - 1)
        down = rng.standard_normal((3, *inside)).astype(np.float32) / 10
        found[name, module] = down, rng.standard_normal((out, 3, *ones)).astype(np.float32)
    return found


def expected(before, pairs, scale):
    """The explicit sum in float64."""
    after = {name: dict(state) for name, state in before.items()}
    for (name, module), (down, up) in pairs.items():
        key = f"{module}.weight"
        change = up.reshape(len(up), 3).astype(float) @ down.reshape(3, -1).astype(float)
        after[name][key] = before[name][key] + scale * change.reshape(before[name][key].shape)
    return after


def peft(name, module):
    prefix = "unet." if name == "unet" else "text_encoder.text_model."
    return [f"{prefix}{module}.lora_{x}.weight" for x in "AB"]


def adapter(name, module):
    return [
        key.replace("_A.", "_A.default.").replace("_B.", "_B.default.")
        for key in peft(name, module)
    ]


def older(name, module):
    prefix = "unet." if name == "unet" else "text_encoder."
    return [f"{prefix}{module}.lora.{x}.weight" for x in ("down", "up")]


def processors(name, module):
    if "attn" not in module or name != "unet":
        return peft(name, module)
    *attention, layer = module.removesuffix(".0").split(".")
    return [f"unet.{'.'.join(attention)}.processor.{layer}_lora.{x}.weight" for x in ("down", "up")]


def kohya(name, module):
    prefix = "lora_unet_" if name == "unet" else "lora_te_text_model_"
    return [f"{prefix}{module.replace('.', '_')}.lora_{x}.weight" for x in ("down", "up")]


def kohya_compvis(name, module):
    old = {
        ATTENTION: "input_blocks.3.1.transformer_blocks.0.attn2",
        CONV: "input_blocks.1.0.in_layers.2",
    }
    for new, compvis in old.items():
        module = module.replace(new, compvis)
    return kohya(name, module)


def comfy(name, module):
    prefix = (
        "diffusion_model." if name == "unet" else "text_encoders.clip_l.transformer.text_model."
    )
    return [f"{prefix}{module}.lora_{x}.weight" for x in ("down", "up")]


def of_2023(name, module):
    """diffusers 0.18: text encoders with the UNet's names."""
    module = module.replace("q_proj", "to_q")
    prefix = "unet." if name == "unet" else "text_encoder.text_model."
    between = "_lora" if name != "unet" else ".lora"
    return [f"{prefix}{module}{between}.{x}.weight" for x in ("down", "up")]


def write(path, pairs, names, extra=None, metadata=None):
    content = dict(extra or {})
    for (name, module), pair in pairs.items():
        content |= dict(zip(names(name, module), pair, strict=True))
    safetensors.numpy.save_file(content, path, metadata)
    return path


def same(pipeline, expected):
    for name, state in expected.items():
        for key, value in weights(getattr(pipeline, name)).items():
            np.testing.assert_allclose(value, state[key], rtol=2e-6, atol=2e-6, err_msg=key)


@pytest.mark.parametrize(
    "names", [peft, adapter, older, processors, kohya, kohya_compvis, comfy, of_2023]
)
def test_names_of_every_program(pipeline, before, pairs, tmp_path, names):
    file = write(tmp_path / "pytorch_lora_weights.safetensors", pairs, names)
    same(merge_lora(pipeline, tmp_path, 0.7), expected(before, pairs, 0.7))
    kept = load_lora(file, pipeline)
    assert {(name, module) for name in kept for module in kept[name]} == set(pairs)
    same(pipeline, before)  # the original stays as it was


def test_alpha_is_folded(pipeline, before, pairs, tmp_path):
    alphas = {
        kohya(*place)[0].replace("lora_down.weight", "alpha"): np.float32(1.5) for place in pairs
    }
    file = write(
        tmp_path / "a.safetensors", pairs, kohya, {k: np.array(v) for k, v in alphas.items()}
    )
    same(merge_lora(pipeline, file), expected(before, pairs, 0.5))
    settings = {"unet.lora_alpha": 6, "unet.r": 3, "text_encoder.lora_alpha": 6}
    noted = {"lora_adapter_metadata": json.dumps(settings)}
    file = write(tmp_path / "b.safetensors", pairs, peft, metadata=noted)
    same(merge_lora(pipeline, file), expected(before, pairs, 2.0))
    down, up = load_lora(file, pipeline)["unet"][CONV]
    np.testing.assert_allclose(difference(down, up).shape, before["unet"][f"{CONV}.weight"].shape)
    noted = {"lora_adapter_metadata": json.dumps({"unet.use_dora": True})}
    with pytest.raises(CheckpointError, match=r"use_dora \(unet\), which is not supported"):
        load_lora(write(tmp_path / "c.safetensors", pairs, peft, metadata=noted), pipeline)


def test_alphas_may_be_integers_and_have_an_axis(pipeline, before, pairs, tmp_path, torch):
    names = [kohya(*place)[0].replace("lora_down.weight", "alpha") for place in pairs]
    for dtype, shape in ((np.int64, ()), (np.int32, (1,)), (np.float64, (1, 1))):
        alphas = {name: np.full(shape, 6, dtype) for name in names}
        file = write(tmp_path / "a.SAFETENSORS", pairs, kohya, alphas)
        same(merge_lora(pipeline, file), expected(before, pairs, 2.0))
    content = {}
    for place, pair in pairs.items():
        content |= dict(zip(kohya(*place), map(torch.from_numpy, pair), strict=True))
    torch.save(content | dict.fromkeys(names, torch.tensor(6)), tmp_path / "a.pt")
    same(merge_lora(pipeline, tmp_path / "a.pt"), expected(before, pairs, 2.0))


def test_settings_beside_a_pefts_adapter(pipeline, pairs, tmp_path):
    """As PEFT scales: patterns end a module's name, the first that fits holds."""
    own = {place: pair for place, pair in pairs.items() if place[0] == "unet"}
    file = write(
        tmp_path / "adapter_model.safetensors",
        own,
        lambda _, module: [f"base_model.model.{module}.lora_{x}.weight" for x in "AB"],
    )

    def scales(**settings):
        config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, **settings}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        found = load_lora(tmp_path, pipeline)["unet"]
        ratios = [np.ptp(found[m][1] / own["unet", m][1]) for m in (QUERY, OUT, CONV)]
        assert max(ratios) < 1e-5
        return [
            round(float((found[m][1] / own["unet", m][1]).mean()), 5) for m in (QUERY, OUT, CONV)
        ]

    with pytest.raises(CheckpointError, match=r"keeps the strength of a LoRA in adapter_config"):
        load_lora(file, pipeline)
    assert scales() == [2, 2, 2]
    assert scales(lora_alpha=0) == [0, 0, 0]
    root = round(6 / np.sqrt(3), 5)
    assert scales(use_rslora=True, bias="none") == [root] * 3
    patterns = {"to_q": 12, ".*attn2.*": 3, "out.0": 1}
    assert scales(alpha_pattern=patterns) == [4, 1, 2]
    assert scales(r=8, rank_pattern={"to_q|to_out.0|conv1": 3}) == [2, 2, 2]
    for settings, told in (
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["conv_out"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"r": 4}, "has rank 3, and its settings say 4"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', expected numbers"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern has '\('"),
    ):
        with pytest.raises(CheckpointError, match=told):
            scales(**settings)
    text = {place: pair for place, pair in pairs.items() if place[0] != "unet"}
    write(
        file,
        text,
        lambda _, module: [f"base_model.model.text_model.{module}.lora_{x}.weight" for x in "AB"],
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "r": 3}))
    (found,) = load_lora(file, pipeline)["text_encoder"].values()
    np.testing.assert_allclose(found[1], 2 * text["text_encoder", TEXT][1], rtol=1e-6)
    settings = {"unet.r": 3, "unet.lora_alpha": 3, "unet.alpha_pattern": {QUERY: 9}}
    noted = {"lora_adapter_metadata": json.dumps(settings)}
    found = load_lora(write(tmp_path / "x.safetensors", own, peft, metadata=noted), pipeline)
    np.testing.assert_allclose(found["unet"][QUERY][1], 3 * own["unet", QUERY][1], rtol=1e-6)
    np.testing.assert_allclose(found["unet"][OUT][1], own["unet", OUT][1], rtol=1e-6)


def test_a_convolution_in_three_parts(pipeline, before, tmp_path, torch):
    """A middle, as LyCORIS writes: the change is three convolutions, one after another."""
    key, rng = kohya("unet", CONV)[0].removesuffix("lora_down.weight"), np.random.default_rng(1)
    out, inside, *window = before["unet"][f"{CONV}.weight"].shape
    shapes = {
        "lora_down": (3, inside, 1, 1),
        "lora_mid": (3, 3, *window),
        "lora_up": (out, 3, 1, 1),
    }
    parts = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    content = {f"{key}{name}.weight": values for name, values in parts.items()}
    safetensors.numpy.save_file(
        content | {f"{key}alpha": np.float32([6])}, tmp_path / "x.safetensors"
    )
    change = difference(*load_lora(tmp_path / "x.safetensors", pipeline)["unet"][CONV])
    x = torch.tensor(rng.standard_normal((1, inside, 5, 5)), dtype=torch.float32)
    conv, y = torch.nn.functional.conv2d, x
    for name in ("lora_down", "lora_mid", "lora_up"):
        y = conv(y, torch.tensor(parts[name]))
    np.testing.assert_allclose(conv(x, torch.tensor(change)), 2 * y, rtol=2e-4, atol=2e-3)


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_both_text_encoders_of_xl(tmp_path, name):
    settings = CLIPTextConfig.from_dict(
        {
            "vocab_size": 8,
            "hidden_size": 4,
            "intermediate_size": 6,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "projection_dim": 5,
        }
    )
    pipeline = SimpleNamespace(
        unet=None,
        text_encoder=CLIPTextModel(settings, rngs=nnx.Rngs(0)),
        text_encoder_2=CLIPTextModelWithProjection(settings, rngs=nnx.Rngs(0)),
    )
    second = name == "text_encoder_2"
    module = "encoder.layers.0.self_attn.out_proj"
    under = f"lora_te{1 + second}_text_model_{module.replace('.', '_')}.lora"
    full = f"{name}.text_model.{module}"
    clip = f"clip_{'lg'[second]}"
    names = [
        (f"{under}_down.weight", f"{under}_up.weight"),
        (f"{full}.lora_A.weight", f"{full}.lora_B.weight"),
        (f"{name}.{module}.lora_A.weight", f"{name}.{module}.lora_B.weight"),
        (f"{full}.lora_linear_layer.down.weight", f"{full}.lora_linear_layer.up.weight"),
        *(
            (
                f"{each}.text_model.{module}.lora_down.weight",
                f"{each}.text_model.{module}.lora_up.weight",
            )
            for each in (clip, f"{clip}.transformer", f"text_encoders.{clip}.transformer")
        ),
        (
            f"{name}.text_model.encoder.layers.0.self_attn.to_out_lora.down.weight",
            f"{name}.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight",
        ),
    ]
    pair = np.ones((2, 4), np.float32), np.ones((4, 2), np.float32)
    place = ("text_model." if second else "") + module
    for keys in names:
        safetensors.numpy.save_file(dict(zip(keys, pair, strict=True)), tmp_path / "x.safetensors")
        assert {n: set(p) for n, p in load_lora(tmp_path / "x.safetensors", pipeline).items()} == {
            name: {place}
        }, keys
    # An adapter of a model alone: its settings or its folder tell which one
    keys = [f"base_model.model.text_model.{module}.lora_{x}.weight" for x in "AB"]
    folder = tmp_path / name
    folder.mkdir()
    for to in (tmp_path, folder):
        file = to / "adapter_model.safetensors"
        safetensors.numpy.save_file(dict(zip(keys, pair, strict=True)), file)
        (to / "adapter_config.json").write_text("{}")
    assert load_lora(folder, pipeline).keys() == {name}
    with pytest.raises(CheckpointError, match="whether it is for text_encoder or text_encoder_2"):
        load_lora(tmp_path, pipeline)
    kind = "CLIPTextModelWithProjection" if second else "CLIPTextModel"
    settings = {"auto_mapping": {"base_model_class": kind}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert load_lora(tmp_path, pipeline).keys() == {name}
    if second:
        keys = [f"lora_te2_text_projection.lora_{x}.weight" for x in ("down", "up")]
        pair = np.ones((1, 4), np.float32), np.ones((5, 1), np.float32)
        safetensors.numpy.save_file(dict(zip(keys, pair, strict=True)), tmp_path / "x.safetensors")
        assert list(load_lora(tmp_path / "x.safetensors", pipeline)[name]) == ["text_projection"]


def test_pickles_and_half_precision(pipeline, before, pairs, tmp_path, torch):
    content = {}
    for place, pair in pairs.items():
        content |= dict(zip(peft(*place), map(torch.from_numpy, pair), strict=True))
    torch.save(content, tmp_path / "pytorch_lora_weights.bin")
    same(merge_lora(pipeline, tmp_path), expected(before, pairs, 1.0))
    half = {key: pair[0].astype(ml_dtypes.bfloat16) for key, pair in pairs.items()}
    rounded = {key: (half[key].astype(np.float32), pair[1]) for key, pair in pairs.items()}
    stored = {key: (half[key], pair[1]) for key, pair in pairs.items()}
    file = write(tmp_path / "bf16.safetensors", stored, peft)
    same(merge_lora(pipeline, file), expected(before, rounded, 1.0))


def test_what_does_not_fit_is_told(pipeline, pairs, tmp_path):
    def fails(extra, match, of=pairs):
        file = write(tmp_path / "x.safetensors", of, peft, extra)
        with pytest.raises(CheckpointError, match=match):
            merge_lora(pipeline, file)

    one = np.ones((3, 3), np.float32)
    fails({"unet.x.hada_w1_a": one}, "1 of LoHa, which is not supported: unet.x.hada_w1_a")
    fails({"lora_unet_x.dora_scale": one}, "1 of DoRA, which is not supported: lora_unet_x")
    fails({"unet.x.lora_B.bias": one}, "1 of LoRA with biases")
    fails({"bundle_emb.cat.emb_params": one}, "1 of embeddings within a LoRA")
    fails({"unet.x.weight": one}, "1 unexpected: unet.x.weight")
    for name in ("unet.x", "text_encoder_2.x"):
        foreign = {f"{name}.lora_{kind}.weight": one for kind in "AB"}
        fails(foreign, rf"1 unexpected: {name}\. It was made for another")
    value = f"{ATTENTION}.to_v"
    fails({f"unet.{value}.lora_A.weight": one}, "lacks lora_B. The file is incomplete")
    with pytest.raises(CheckpointError, match="lacks lora_B"):  # told without the model too
        check_lora(tmp_path / "x.safetensors")
    both = {f"unet.{value}.lora_A.weight": one, f"unet.{value}.lora_B.weight": one}
    fails(both, r"changes a weight of shape \[3, 3\], this model's has")
    fails(both | {f"unet.{value}.lora_A.weight": one[:2]}, r"has A \[2, 3\] and B \[3, 3\]")
    fails(both | {f"unet.{value}.lora_A.weight": one * np.nan}, "holds NaN")
    fails(both | {f"unet.{value}.alpha": one}, r"alpha has shape \[3, 3\]")
    fails(
        {f"unet.{value}.lora_A.weight": one.astype(int), **{f"unet.{value}.lora_B.weight": one}},
        "A is I64, expected floating",
    )
    twice = kohya("unet", QUERY)
    fails(dict.fromkeys(twice, one), "under two names")
    with pytest.raises(CheckpointError, match="holds none of pytorch_lora_weights"):
        load_lora(tmp_path, pipeline)


# Differences of two models.


def edited(pipeline, changes):
    models = {name: nnx.clone(getattr(pipeline, name)) for name in ("unet", "text_encoder")}
    for (name, key), change in changes.items():
        spec = next(spec for spec in tensor_specs(models[name]) if spec.key == key)
        slot = variables(models[name])[spec.path]
        slot.set_value(slot.get_value() + spec.to_nnx(change.reshape(spec.shape)))
    return dataclasses.replace(pipeline, **models)


def test_a_low_rank_difference_returns(pipeline, before, pairs, tmp_path):
    changes = {
        (name, f"{module}.weight"): up.reshape(len(up), 3) @ down.reshape(3, -1)
        for (name, module), (down, up) in pairs.items()
    }
    after = edited(pipeline, changes)
    summary = save_lora(after, pipeline, tmp_path / "rank.safetensors", rank=3)
    assert set(summary.ranks.values()) == {3}
    assert set(summary.ranks) == {
        "unet." + QUERY,
        "unet." + OUT,
        "unet." + CONV,
        "text_encoder.text_model." + TEXT,
    }
    assert summary.error < 1e-5
    assert summary.left_out == []
    same(merge_lora(pipeline, tmp_path / "rank.safetensors"), expected(before, pairs, 1.0))
    with pytest.raises(OutputError, match="already exists"):
        save_lora(after, pipeline, tmp_path / "rank.safetensors", rank=3)
    summary = save_lora(after.unet, pipeline.unet, tmp_path / "half.safetensors", energy=0.999999)
    assert set(summary.ranks.values()) == {3}
    low = save_lora(after, pipeline, tmp_path / "one.safetensors", rank=1, dtype=ml_dtypes.bfloat16)
    # Eckart and Young: what is lost are the other singular values
    squares = [
        np.linalg.svd(c.reshape(len(c), -1), compute_uv=False) ** 2 for c in changes.values()
    ]
    lost = sum(s[1:].sum() for s in squares) / sum(s.sum() for s in squares)
    np.testing.assert_allclose(low.error, np.sqrt(lost), rtol=1e-4)
    stored = safetensors.numpy.load_file(tmp_path / "one.safetensors")
    assert {value.dtype for value in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert stored[f"unet.{CONV}.lora_B.weight"].ndim == 4


def test_what_a_lora_cannot_hold_is_named(pipeline, tmp_path, before):
    bias = np.ones_like(before["unet"][f"{OUT}.bias"], np.float32)
    square = np.ones_like(before["unet"][f"{OUT}.weight"], np.float32)
    only = edited(pipeline, {("unet", f"{OUT}.bias"): bias})
    file = tmp_path / "a.safetensors"
    with pytest.raises(OutputError, match=r"equals the original but for unet\..*to_out\.0\.bias"):
        save_lora(only, pipeline, file, rank=1)
    both = edited(pipeline, {("unet", f"{OUT}.bias"): bias, ("unet", f"{OUT}.weight"): square})
    summary = save_lora(both, pipeline, file, energy=0.9)
    assert summary.left_out == [f"unet.{OUT}.bias"]
    assert summary.ranks == {f"unet.{OUT}": 1}
    for options in ({}, {"rank": 1, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 2.0}):
        with pytest.raises(ValueError, match=r"rank|energy"):
            save_lora(both, pipeline, file, **options)
    broken = edited(pipeline, {("unet", f"{OUT}.weight"): square * np.nan})
    with pytest.raises(OutputError, match="holds NaN"):
        save_lora(broken, pipeline, file, rank=1, force=True)
    assert sorted(tmp_path.iterdir()) == [file]


def test_diffusers_merges_the_same(pipeline, pairs, tmp_path, torch):
    """Through PEFT, where that is installed."""
    pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    write(tmp_path / "pytorch_lora_weights.safetensors", pairs, peft)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(bundled_model())
    theirs.to(torch.float32)
    theirs.load_lora_weights(tmp_path)
    theirs.fuse_lora(lora_scale=0.7)
    theirs.unload_lora_weights()
    ours = merge_lora(pipeline, tmp_path, 0.7)
    state = {k: v.numpy() for k, v in theirs.unet.state_dict().items()}
    same(dataclasses.replace(ours, text_encoder=pipeline.text_encoder), {"unet": state})
