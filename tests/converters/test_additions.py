"""What a command writes another can read: parts of every kind, added to a pipeline."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import xl_toy
from clip_toy import clip_pipeline
from flax import nnx
from personalizing_toy import tiny_pipeline
from PIL import Image

from conceptax import merge_parts
from conceptax.cli import main
from conceptax.converters import (
    CheckpointError,
    load_pytorch,
    save_changes,
    save_lora,
    save_pytorch,
    save_single_file,
    save_textual_inversion,
)
from conceptax.converters.additions import is_whole


def edited(model, factor=1.5):
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf * factor, nnx.to_pure_dict(state)))


def same(one, other):
    pairs = (jax.tree.leaves(nnx.to_pure_dict(nnx.state(each))) for each in (one, other))
    return all(np.array_equal(a, b) for a, b in zip(*pairs, strict=True))


@pytest.fixture(scope="module")
def base():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    return save_pytorch(base, tmp_path_factory.mktemp("additions") / "base")


PARTS = ("unet", "text_encoder", "vae")


@pytest.mark.parametrize("name", PARTS)
def test_components_take_their_places(base, tmp_path, name):
    part = edited(getattr(base, name))
    path = save_pytorch(part, tmp_path / "erased")  # as --export text-encoder does
    (weights,) = path.glob("*.safetensors")
    for each in (path, weights):
        merged = merge_parts(base, each)
        for other in PARTS:
            wanted = part if other == name else getattr(base, other)
            assert same(getattr(merged, other), wanted)


def test_changes_and_several_parts_together(base, tmp_path):
    unet, text = edited(base.unet), edited(base.text_encoder)
    save_changes(unet, base.unet, tmp_path / "unet_changes.safetensors")
    save_changes(text, base.text_encoder, tmp_path / "text_encoder_changes.safetensors")
    merged = merge_parts(base, tmp_path)
    assert same(merged.unet, unet) and same(merged.text_encoder, text)
    (tmp_path / "unet_changes.safetensors").rename(tmp_path / "esd.safetensors")
    assert not same(merge_parts(base, tmp_path).unet, unet)  # files of known names come first
    merged = merge_parts(merge_parts(base, tmp_path), tmp_path / "esd.safetensors")
    assert same(merged.unet, unet) and same(merged.text_encoder, text)


def test_a_lora_and_embeddings_in_one_folder(base, tmp_path):
    own = base.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k
    unet = nnx.clone(base.unet)
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k
    layer.kernel.set_value(2 * own.kernel[...])
    save_lora(unet, base.unet, tmp_path / "pytorch_lora_weights.safetensors", rank=99)
    save_textual_inversion({"<new1>": np.ones(16, np.float32)}, tmp_path)
    merged = merge_parts(base, tmp_path, scale=0.5)
    moved = merged.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k
    np.testing.assert_allclose(moved.kernel[...], 1.5 * own.kernel[...], rtol=1e-3, atol=1e-5)
    assert len(merged.tokenizer) == len(base.tokenizer) + 1


def test_parts_take_the_types_of_the_pipeline(base, folder, tmp_path):
    path = save_pytorch(edited(base.unet, 2.0), tmp_path / "unet", dtype="float16")
    merged = merge_parts(base, path)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(merged.unet))} == {np.dtype("float32")}
    mapped = load_pytorch(folder, sharding="mapped")  # as convert has it
    assert same(merge_parts(mapped, path).unet, merged.unet)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("nothing", r"does not exist\. Pass a folder"),
        ("base", r"is a whole pipeline: .* not in addition .*such as .*base/unet\."),
        ("wider", r"does not fit this pipeline's text_encoder: .*of the wrong shape: .*another"),
        ("gelu", r"text_encoder: hidden_act 'gelu' instead of 'quick_gelu'\. It was made for"),
        ("stranger", r"is a CLIPTextModelWithProjection, which is no part of this Stable"),
        ("empty", r"holds no edited model, .*\(found nothing\).*Pass the file itself"),
        ("nan", r"text_encoder: .* holds NaN"),
    ],
)
def test_what_cannot_be_added_is_told(base, folder, tmp_path, given, text):
    from conceptax.flax_models.clip import CLIPTextModel, CLIPTextModelWithProjection

    config = base.text_encoder.config
    path = tmp_path / given
    if given == "base":
        path = folder
    elif given == "wider":
        config = dataclasses.replace(config, intermediate_size=48)
        save_pytorch(CLIPTextModel(config, rngs=nnx.Rngs(0)), path)
    elif given == "gelu":
        config = dataclasses.replace(config, hidden_act="gelu")
        save_pytorch(CLIPTextModel(config, rngs=nnx.Rngs(0)), path)
    elif given == "stranger":
        config = dataclasses.replace(config, projection_dim=8)
        save_pytorch(CLIPTextModelWithProjection(config, rngs=nnx.Rngs(0)), path)
    elif given == "empty":
        path.mkdir()
    elif given == "nan":
        save_pytorch(base.text_encoder, path)
        (weights,) = path.glob("*.safetensors")
        content = safetensors.numpy.load_file(weights)
        content[next(iter(content))][...] = np.nan
        safetensors.numpy.save_file(content, weights)
    with pytest.raises(CheckpointError, match=text):
        merge_parts(base, path)
    with pytest.raises(ValueError, match="into a pipeline, received a UNet2DConditionModel"):
        merge_parts(base.unet, path)


def test_the_encoders_of_xl_are_told_apart(tmp_path):
    pytest.importorskip("diffusers")
    xl_toy.save_pipeline(tmp_path / "xl", xl_toy.SMALL_UNET)
    pipeline = load_pytorch(tmp_path / "xl")
    for name in ("text_encoder", "text_encoder_2"):
        part = edited(getattr(pipeline, name))
        merged = merge_parts(pipeline, save_pytorch(part, tmp_path / name))
        assert same(getattr(merged, name), part)
        (other,) = {"text_encoder", "text_encoder_2"} - {name}
        assert getattr(merged, other) is getattr(pipeline, other)
    assert is_whole(tmp_path / "xl") and not is_whole(tmp_path / "text_encoder")


def test_single_files_of_a_part(tmp_path):
    pipeline = clip_pipeline("SD 1")
    names = ("vae", "unet", "text_encoder")
    for name in names:
        alone = dict.fromkeys(names) | {name: edited(getattr(pipeline, name))}
        file = tmp_path / f"{name}.safetensors"
        save_single_file(dataclasses.replace(pipeline, **alone), file)
        merged = merge_parts(pipeline, file)
        assert not is_whole(file)
        for other in names:
            assert same(getattr(merged, other), alone[other] or getattr(pipeline, other))
    save_single_file(pipeline, file := tmp_path / "whole.safetensors")
    assert is_whole(file)
    with pytest.raises(CheckpointError, match="is a whole model: use it in place of another one"):
        merge_parts(pipeline, file)
    with pytest.raises(CheckpointError, match=r"fit this pipeline's vae: .* It was made for anoth"):
        merge_parts(tiny_pipeline(), tmp_path / "vae.safetensors")


# ---- commands ----


def run(*arguments):
    return main([str(argument) for argument in arguments])


def refused(capsys, text, *arguments):
    capsys.readouterr()
    assert run(*arguments) == 1
    err = capsys.readouterr().err
    told = [line for line in err.splitlines() if not line.endswith("…")]  # but for what it does
    assert len(told) == 1 and text in told[0], err


def test_commands_take_parts(base, folder, tmp_path, capsys):
    unet = edited(base.unet)
    row = np.linspace(-1, 1, 16, dtype=np.float32)
    whole = dataclasses.replace(base, unet=unet)
    parts = tmp_path / "edited", tmp_path / "<new1>.safetensors"
    save_pytorch(unet, parts[0])
    save_textual_inversion({"<new1>": row}, tmp_path)
    add = [word for part in parts for word in ("--add", part)]
    assert run("convert", folder, tmp_path / "merged", *add) == 0
    assert f"{parts[1]}: new words for prompts: <new1>" in capsys.readouterr().out
    assert same(load_pytorch(tmp_path / "merged").unet, unet)
    save_pytorch(whole, tmp_path / "whole")
    drawing = ["sample", "--prompt", "a <new1> seven", "--steps", 2, "--output"]
    for name, model in {
        "a": ["--model", folder, *add],
        "b": ["--model", tmp_path / "merged"],
        "c": ["--model", tmp_path / "whole", "--add", parts[1]],
        "d": ["--model", folder],
    }.items():
        assert run(*drawing, tmp_path / f"{name}.png", *model) == 0
    a, b, c, d = (Image.open(tmp_path / f"{name}.png") for name in "abcd")
    assert a.tobytes() == b.tobytes() == c.tobytes() != d.tobytes()
    told = [json.loads(image.info["conceptax"]) for image in (a, d)]
    assert told[0]["add"] == list(map(str, parts)) and "add" not in told[1]
    for arguments, text in (
        (["--model", folder, "--add", parts[0], "--add-scale", 0.5], "--add-scale is for LoRA"),
        (["--model", folder, "--add-scale", 0], "--add-scale 0 adds nothing"),
        (["--model", folder, "--add", tmp_path / "whole"], "is a whole pipeline: use it in place"),
        (["--model", folder, "--add", tmp_path / "none"], "none does not exist"),
        (["--model", folder / "unet", "--add", parts[0]], "is no pipeline: sampling needs"),
    ):
        refused(capsys, text, *drawing, tmp_path / "x.png", *arguments)


def test_parts_may_be_ids_of_the_hub(base, tmp_path, monkeypatch):
    from conceptax.cli import convert, evaluate_personalization, sample
    from conceptax.cli.options import fetched

    unet = edited(base.unet)
    part = save_pytorch(unet, tmp_path / "unet")

    def local(path, **options):
        return part if str(path) == "org/part" else Path(path)

    for module in ("hub", "formats.identify"):
        monkeypatch.setattr(f"conceptax.converters.{module}.local", local)
    assert same(merge_parts(base, "org/part").unet, unet)
    add = (Path("org/part"), tmp_path)
    for command in (
        sample.Command(add=add),
        convert.Command(tmp_path, tmp_path / "out", add=add),
        evaluate_personalization.Command(add=add),
    ):
        assert fetched(command).add == (part, tmp_path)
