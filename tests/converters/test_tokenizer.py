"""Tokenizers: CLIP's own, from what comes with the package, and the models that it is taken for."""

import json

import pytest
from clip_toy import clip_pipeline
from PIL import Image

from conceptax.cli import main
from conceptax.converters import (
    CheckpointError,
    inspect_checkpoint,
    load_pytorch,
    save_pytorch,
    save_single_file,
)
from conceptax.converters.tokenizer import (
    CLIP_TOKENS,
    clip_tokenizer,
    read_tokenizer,
    write_tokenizer,
)

# Ids of OpenAI's tokenizer, as published implementations give them.
KNOWN = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "A Café, it's   12 dogs!": [320, 15304, 267, 585, 568, 272, 273, 3255, 256],
    "<new1>": [283, 686, 272, 285],
}


def test_clips_own_tokenizer():
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == CLIP_TOKENS == 49408 and tokenizer.model_max_length == 77
    for text, ids in KNOWN.items():
        assert tokenizer(text).input_ids == [49406, *ids, 49407]


@pytest.mark.parametrize(("pad", "index"), [("<|endoftext|>", 49407), ("!", 0)])
def test_it_pads_as_its_model_learnt(pad, index, tmp_path):
    write_tokenizer(clip_tokenizer(pad), tmp_path)
    for tokenizer in (clip_tokenizer(pad), read_tokenizer(tmp_path)):
        ids = tokenizer("a cat", padding="max_length").input_ids
        assert ids == [49406, 320, 2368, 49407, *[index] * 73]


# ---- models without one ----


PADS = {"SD 1": ["<|endoftext|>"], "SD 2": ["!"], "SDXL": ["<|endoftext|>", "!"]}


@pytest.mark.parametrize("family", PADS)
def test_a_single_file_needs_nothing_else(family, tmp_path, capsys):
    """It is drawn with, and becomes a folder that diffusers finds complete."""
    file, folder = tmp_path / "model.safetensors", tmp_path / "folder"
    save_single_file(clip_pipeline(family), file)
    drawing = ["sample", "--prompt", "a photo of a cat", "--steps", "1", "--guidance", "2"]
    assert main([*drawing, "--model", str(file), "--output", str(tmp_path / "a.png")]) == 0
    assert main(["convert", str(file), str(folder)]) == 0
    assert main([*drawing, "--model", str(folder), "--output", str(tmp_path / "b.png")]) == 0
    assert "warning" not in capsys.readouterr().err.lower()
    one, other = (Image.open(tmp_path / f"{name}.png").tobytes() for name in "ab")
    assert one == other
    index = json.loads((folder / "model_index.json").read_text())
    for name, pad in zip(("tokenizer", "tokenizer_2"), PADS[family], strict=False):
        assert index[name] == ["transformers", "CLIPTokenizer"]
        assert read_tokenizer(folder / name).pad_token == pad


@pytest.mark.parametrize("family", PADS)
def test_a_folder_without_one_gets_clips(family, tmp_path, capsys):
    pipeline = clip_pipeline(family)
    save_pytorch(pipeline, tmp_path / "model")
    names = pipeline.TOKENIZERS
    with pytest.warns(UserWarning) as told:
        loaded = load_pytorch(tmp_path / "model")
    assert [str(each.message) for each in told] == [
        f"{tmp_path / 'model'} holds no {name}: CLIP's own, which comes with conceptax, takes its "
        "place."
        for name in names
    ]
    assert [getattr(loaded, name).pad_token for name in names] == PADS[family]
    found = inspect_checkpoint(tmp_path / "model")
    assert found.healthy and found.advice.startswith(f"It holds no {names[0]}")
    assert main(["inspect", str(tmp_path / "model")]) == 0
    assert "CLIP's own, which comes with conceptax" in capsys.readouterr().out
    if family == "SD 1":
        config = tmp_path / "model/text_encoder/config.json"
        config.write_text(config.read_text().replace("49408", "700"))
        assert inspect_checkpoint(tmp_path / "model").problems["missing"] == ["tokenizer"]
        with pytest.raises(CheckpointError, match="tokenizer holds no tokenizer"):
            load_pytorch(tmp_path / "model", components=["tokenizer"])
