"""Tokenizers: CLIP's own, from what comes with the package, and the models that it is taken for."""

import copy
import importlib.util
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
from conceptax.converters.pipeline_folder import (
    check_vocabulary,
    pipeline_tokenizer,
    tokenizer_entry,
    tokenizer_kind,
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


# ---- T5's and Qwen's ----

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


def build_t5(folder):
    """A unigram tokenizer's folder as published ones are: with what only older versions read."""
    import transformers

    words = ["▁a", "▁cat", "▁", *"abct", "▁dog"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((w, -2.0) for w in words)]
    tokenizer = transformers.T5Tokenizer(vocabulary, extra_ids=0, model_max_length=512)
    tokenizer.save_pretrained(folder)
    (folder / "spiece.model").write_bytes(b"\n\x05bytes of SentencePiece's own")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}  ')
    return tokenizer


def build_qwen(folder):
    """A byte-level tokenizer's folder with a chat template, trained on a sentence."""
    import tokenizers
    import transformers

    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator(["a photo of a cat and a dog"] * 3, vocab_size=290, min_frequency=2)
    folder.mkdir()
    model.save_model(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    merges = (folder / "merges.txt").read_text().splitlines()[1:]
    tokenizer = transformers.Qwen2Tokenizer(
        vocabulary,
        [tuple(line.split()) for line in merges],
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return tokenizer


BUILDERS = {"T5Tokenizer": build_t5, "Qwen2Tokenizer": build_qwen}


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("kind", BUILDERS)
def test_what_nothing_was_added_to_is_written_as_it_was(kind, tmp_path):
    built = BUILDERS[kind](tmp_path / "published")
    tokenizer = read_tokenizer(tmp_path / "published", kind)
    texts = ["a cat", "a photo of a dog, twice", ""]
    for text in texts:  # whose padding and truncation leave traces in a tokenizer
        options = {"padding": "max_length", "max_length": 9, "truncation": True}
        assert tokenizer(text, **options).input_ids == built(text, **options).input_ids
    write_tokenizer(copy.deepcopy(tokenizer), tmp_path / "same")
    assert contents(tmp_path / "same") == contents(tmp_path / "published")

    tokenizer.add_tokens(["<new1>"])
    write_tokenizer(tokenizer, tmp_path / "edited")
    again = read_tokenizer(tmp_path / "edited", kind)
    assert len(again) == len(built) + 1
    assert again("a <new1> cat").input_ids == tokenizer("a <new1> cat").input_ids
    assert len(read_tokenizer(tmp_path / "same", kind)) == len(built)


def test_t5s_end_and_padding(tmp_path):
    build_t5(tmp_path / "t5")
    tokenizer = read_tokenizer(tmp_path / "t5", "T5Tokenizer")
    ids = tokenizer("a cat", padding="max_length", max_length=5).input_ids
    assert ids == [3, 4, 1, 0, 0]


def test_qwens_chat_template(tmp_path):
    build_qwen(tmp_path / "qwen")
    tokenizer = read_tokenizer(tmp_path / "qwen", "Qwen2Tokenizer")
    told = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a cat"}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert told == (
        "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer(told).input_ids.count(start) == 2


def test_tokenizers_of_other_kinds_are_refused(tmp_path):
    build_t5(tmp_path / "T5")
    build_qwen(tmp_path / "Qwen2")
    write_tokenizer(clip_tokenizer(), tmp_path / "CLIP")
    for held in ("T5", "Qwen2", "CLIP"):
        for wanted in {"T5", "Qwen2", "CLIP"} - {held}:
            with pytest.raises(CheckpointError) as error:
                read_tokenizer(tmp_path / held, f"{wanted}Tokenizer")
            told = f"holds the tokenizer of a {held} model, and what reads it takes that of a "
            assert f"{told}{wanted} model." in str(error.value)
    (tmp_path / "CLIP" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="holds the tokenizer of a CLIP model"):
        read_tokenizer(tmp_path / "CLIP", "Qwen2Tokenizer")
    (tmp_path / "T5" / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match="is not a T5 tokenizer"):
        read_tokenizer(tmp_path / "T5", "T5Tokenizer")


@pytest.mark.skipif(
    importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is installed"
)
def test_sentencepiece_alone_needs_its_package(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"\n")
    with pytest.raises(
        CheckpointError, match=r"package sentencepiece\. Install it, or add the tok"
    ):
        read_tokenizer(tmp_path, "T5Tokenizer")


def test_the_text_encoder_tells_which_tokenizer(tmp_path):
    index = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "text_encoder_3": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
    }
    kinds = [tokenizer_kind(index, f"tokenizer{n}") for n in ("", "_2", "_3", "_4")]
    assert kinds == ["CLIPTokenizer", "T5Tokenizer", "Qwen2Tokenizer", "CLIPTokenizer"]
    build_t5(tmp_path / "tokenizer_2")
    tokenizer = pipeline_tokenizer(tmp_path, "tokenizer_2", "T5Tokenizer")
    assert tokenizer_entry(tokenizer, index["tokenizer_2"]) == index["tokenizer_2"]
    assert tokenizer_entry(tokenizer, None) == ["transformers", "T5Tokenizer"]
    assert tokenizer_entry(clip_tokenizer(), None) == ["transformers", "CLIPTokenizer"]
    with pytest.raises(
        CheckpointError, match="tokenizer has 11 tokens, but the text encoder embeds"
    ):
        check_vocabulary(tmp_path, tokenizer, 10)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        pipeline_tokenizer(tmp_path, "tokenizer_3", "Qwen2Tokenizer")


# ---- models without one ----


PADS = {"SD 1": ["<|endoftext|>"], "SD 2": ["!"], "SDXL": ["<|endoftext|>", "!"]}


@pytest.mark.parametrize("family", ["SD 1", "SD 2", pytest.param("SDXL", marks=pytest.mark.slow)])
def test_a_single_file_needs_nothing_else(family, tmp_path, capsys):
    """It becomes a folder that diffusers finds complete; the one with two tokenizers is drawn."""
    file, folder = tmp_path / "model.safetensors", tmp_path / "folder"
    save_single_file(clip_pipeline(family), file)
    assert main(["convert", str(file), str(folder)]) == 0
    if family == "SDXL":
        drawing = ["sample", "--prompt", "a photo of a cat", "--steps", "1", "--guidance", "2"]
        assert main([*drawing, "--model", str(file), "--output", str(tmp_path / "a.png")]) == 0
        assert main([*drawing, "--model", str(folder), "--output", str(tmp_path / "b.png")]) == 0
        one, other = (Image.open(tmp_path / f"{name}.png").tobytes() for name in "ab")
        assert one == other
    assert "warning" not in capsys.readouterr().err.lower()
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
