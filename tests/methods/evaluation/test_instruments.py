"""Metrics of personalization against transformers' own models, processors and tokenizers."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from metric_models_toy import TOWER, blip, blip_2, dinov2, randomize
from personalizing_toy import tiny_pipeline
from PIL import Image

from conceptax.cli import main
from conceptax.converters import CheckpointError, save_pytorch, save_textual_inversion
from conceptax.flax_models.pipelines.new_tokens import add_tokens
from conceptax.methods.diffusion.text_to_image import text_to_image
from conceptax.methods.evaluation.personalization import (
    Instruments,
    Subject,
    measure,
    without_tokens,
)
from conceptax.methods.evaluation.preprocessing import Preprocessing
from conceptax.methods.evaluation.statistics import (
    clip_score,
    frame_consistency,
    image_similarity,
    mean_interval,
    mutual_similarity,
    text_alignment,
)
from conceptax.methods.glyphs.tokenizer import build_tokenizer
from conceptax.reporting.gallery import Images, read_report
from conceptax.reporting.instruments import load_blip, load_clip, load_dino

TEXTS = ["a red three", "grass", "a photo of a blue seven on brick"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "three", "seven", "grass", "of"]
SIZES = ((24, 20), (17, 30), (16, 16))


@pytest.fixture(scope="session")
def transformers(torch):
    return pytest.importorskip("transformers")


def images(seed=0, sizes=SIZES):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def cosines(torch, first, second):
    return torch.nn.functional.cosine_similarity(first, second, dim=-1).detach().numpy()


# ---- preparing images ----

PROCESSORS = {
    "clip": (
        "CLIPImageProcessorPil",
        Preprocessing.clip(16),
        {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}},
    ),
    "old clip": ("CLIPImageProcessorPil", Preprocessing.clip(224), {"size": 18, "crop_size": 14}),
    "dinov2": (
        "BitImageProcessorPil",
        Preprocessing.dinov2(),
        {
            "size": {"shortest_edge": 20},
            "crop_size": {"height": 14, "width": 14},
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
    ),
    "blip": (
        "BlipImageProcessorPil",
        Preprocessing.blip(16),
        {"size": {"height": 12, "width": 18}, "resample": 2, "image_mean": [0.1, 0.2, 0.3]},
    ),
    "off": (
        "CLIPImageProcessorPil",
        Preprocessing.clip(9),
        {"do_resize": False, "do_center_crop": False, "do_normalize": False, "do_rescale": False},
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_are_prepared_as_transformers_does(transformers, tmp_path, name):
    kind, default, settings = PROCESSORS[name]
    processor = getattr(transformers, kind)(**settings)
    processor.save_pretrained(tmp_path)
    files = [file for file in tmp_path.iterdir() if "preprocessor" in file.name]
    written = json.loads(files[0].read_text())
    sizes = [(9, 13), *SIZES, (31, 20)] if name != "off" else [(9, 13)] * 2
    given = images(sizes=sizes)
    expected = processor(given, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    for config in (settings, written):
        ours = default.updated(config, "here")
        received = np.asarray(ours.normalize(jnp.asarray(ours.prepare(given))))
        np.testing.assert_allclose(received, expected, atol=2e-6)


def test_the_defaults_are_those_of_transformers(transformers):
    for kind, ours in (
        ("CLIPImageProcessorPil", Preprocessing.clip(224)),
        ("BlipImageProcessorPil", Preprocessing.blip(384)),
    ):
        theirs = getattr(transformers, kind)().to_dict()
        assert ours.updated(theirs, kind) == ours


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": {"longest_edge": 3}}, "here: 'height'"),
        ({"size": {"shortest_edge": 0}}, "positive integers"),
        ({"crop_size": {"shortest_edge": 3}}, "names no height"),
        ({"resample": 9}, "9 is not a valid Resampling"),
        ({"image_std": [1.0]}, "three channels"),
        ({"image_mean": None}, "here"),
    ],
)
def test_unfit_settings_of_images_are_told(config, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing.clip(8).updated(config, "here")


def test_images_that_do_not_fit_are_told():
    with pytest.raises(ValueError, match="no images"):
        Preprocessing.clip(8).prepare([])
    with pytest.raises(ValueError, match=r"24x24 pixels is larger than .* 19x16"):
        Preprocessing(16, (24, 24)).prepare(images())
    with pytest.raises(ValueError, match="of one size"):
        Preprocessing(16).prepare(images())


# ---- each metric, from files to number ----


def bert(transformers, folder):
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("second", [False, True])
def test_blip_scores_are_those_of_transformers(torch, transformers, tmp_path, second):
    module = (blip_2 if second else blip)(transformers)
    module.save_pretrained(tmp_path)
    tokenizer = bert(transformers, tmp_path)
    processor = transformers.BlipImageProcessorPil(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path)
    texts = ["a red three", "grass", "a blue seven of unknown"]

    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    pixels = processor(images(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        if second:
            scores = module(pixels, tokens.input_ids, tokens.attention_mask).logits_per_image
        else:
            scores = module(
                tokens.input_ids, pixels, use_itm_head=False, attention_mask=tokens.attention_mask
            ).itm_score
    measured = load_blip(tmp_path, "tiny", second=second)
    received = text_alignment(measured.features(images()), measured.text_features(texts))
    np.testing.assert_allclose(received, scores.numpy().diagonal(), atol=2e-6)

    with pytest.warns(UserWarning, match="reads 8; ignored: 'three three"):
        long = measured.text_features(["a red three three three three three three three"])
    assert long.shape == (1, 8)
    measured.rows = 5
    with pytest.raises(ValueError, match="tiny embeds 5 tokens and its tokenizer gave 9"):
        measured.text_features(["grass"])


def test_dino_similarity_is_that_of_transformers(torch, transformers, tmp_path):
    module = dinov2(transformers)
    module.save_pretrained(tmp_path)
    processor = transformers.BitImageProcessorPil(
        size={"shortest_edge": 30},
        crop_size={"height": 28, "width": 28},
    )
    processor.save_pretrained(tmp_path)
    generated, references = images(), images(1, SIZES[:2])

    def features(given):
        with torch.no_grad():
            return module(processor(given, return_tensors="pt")["pixel_values"]).pooler_output

    theirs, own = features(generated), features(references)
    expected = cosines(torch, theirs[:, None], own[None]).mean(1)
    dino = load_dino(tmp_path, "tiny")
    measured = dino.features(references)
    received = image_similarity(dino.features(generated), measured)
    np.testing.assert_allclose(received, expected, atol=2e-6)
    pair = cosines(torch, own[0], own[1])
    np.testing.assert_allclose(mutual_similarity(measured), [pair, pair], atol=2e-6)
    videos = np.stack([measured, measured[::-1]])
    np.testing.assert_allclose(frame_consistency(videos), [pair, pair], atol=2e-6)


@pytest.fixture(scope="session")
def tiny_clip(torch, transformers, tmp_path_factory):
    """A CLIP folder of transformers', with processor and tokenizer, and its module."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "clip", build_tokenizer()
    tower = {**TOWER, "projection_dim": 8}
    config = transformers.CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "max_position_embeddings": tokenizer.model_max_length,
        },
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    module = randomize(transformers.CLIPModel(config))
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16}
    )
    for part in (module, processor, tokenizer):
        part.save_pretrained(folder)
    tokens = tokenizer(TEXTS, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        out = module(
            input_ids=tokens.input_ids,
            pixel_values=processor(images(), return_tensors="pt")["pixel_values"],
        )
    return folder, out.text_embeds, out.image_embeds


def test_clip_scores_are_those_of_transformers(torch, tiny_clip):
    folder, text, image = tiny_clip
    expected = cosines(torch, image, text)
    clip = load_clip(folder, None, "tiny")
    seen, read = clip.features(images()), clip.text_features(TEXTS)
    np.testing.assert_allclose(text_alignment(seen, read), expected, atol=2e-6)
    # The formula of torchmetrics.
    np.testing.assert_allclose(clip_score(seen, read), 100 * expected.clip(0), atol=2e-4)
    expected = cosines(torch, image[:, None], image[None, :2]).mean(1)
    np.testing.assert_allclose(image_similarity(seen, seen[:2]), expected, atol=2e-6)


def test_a_folder_of_another_kind_is_told(tiny_clip):
    folder = tiny_clip[0]
    with pytest.raises(CheckpointError, match="is a CLIPModel, not a DINOv2"):
        load_dino(folder, "")
    with pytest.raises(CheckpointError, match="not a Blip2ForImageTextRetrieval"):
        load_blip(folder, "", second=True)


# ---- together ----


def test_all_is_measured_together(tiny_clip):
    clip = load_clip(tiny_clip[0], None, "tiny")
    given, photographs = images(), images(1)
    prompts = ["a <new1> three", "grass", "grass"]
    subjects = [Subject("bear", photographs), Subject("barn", photographs[:1])]
    result = measure(given, prompts, subjects, Instruments(clip=clip))
    expected = text_alignment(
        clip.features(given), clip.text_features(["a three", "grass", "grass"])
    )
    np.testing.assert_allclose(result["scores"]["CLIP-T"], expected, atol=1e-6)
    assert result["text"] == {"CLIP-T": mean_interval(expected)}
    bear, barn = (result["subjects"][name]["CLIP-I"] for name in ("bear", "barn"))
    assert bear["of"] == 3 and bear["low"] < bear["mean"] < bear["high"] and "references" in bear
    assert "references" not in barn
    assert list(result["prompts"]) == prompts[:2]
    assert result["prompts"]["grass"]["CLIP-T"] == pytest.approx(expected[1:].mean(), abs=1e-6)
    assert result["models"] == {"clip": "tiny"}
    json.dumps(result)


def test_what_cannot_be_measured_is_told(tiny_clip):
    clip = load_clip(tiny_clip[0], None, "tiny")
    given, eyes = images(), Instruments(clip=clip)
    with pytest.raises(ValueError, match="at least 2 images, received 1"):
        measure(given[:1], ["a"], [], eyes)
    with pytest.raises(ValueError, match="3 images need as many prompts, received 1"):
        measure(given, ["a"], [], eyes)
    with pytest.raises(ValueError, match="at least one model"):
        measure(given, ["a"] * 3, [], Instruments())
    with pytest.raises(ValueError, match="a name of its own"):
        measure(given, ["a"] * 3, [Subject("x", given), Subject("x", given)], eyes)


def test_intervals_and_prompts_without_tokens():
    values = np.asarray([1.0, 2.0, 4.0])
    half = 1.959964 * values.std(ddof=1) / np.sqrt(3)
    found = mean_interval(values)
    assert found["of"] == 3 and found["high"] - found["mean"] == pytest.approx(half)
    for wrong in ([1.0], [1.0, np.nan]):
        with pytest.raises(ValueError, match="2 finite values"):
            mean_interval(np.asarray(wrong))
    assert without_tokens("a <new1> dog, <new2>") == "a dog,"


# ---- the command ----


def save(folder, given, names=None):
    folder.mkdir()
    for n, image in enumerate(given):
        Image.fromarray(image).save(folder / (names[n] if names else f"{n}.png"))
    return folder


@pytest.fixture
def files(tmp_path):
    """Four images, photographs of two subjects, and two prompts."""
    save(tmp_path / "drawn", images(2, (*SIZES, (20, 20))))
    save(tmp_path / "bear", images(3))
    save(tmp_path / "barn", images(4, SIZES[:1]))
    (tmp_path / "prompts.txt").write_text("a <new1> three\ngrass\n")
    return tmp_path


def evaluate(capsys, *arguments):
    status = main(["evaluate", "personalization", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command_measures_a_folder(files, tiny_clip, capsys):
    command = [
        "--images",
        files / "drawn",
        "--references",
        files / "bear",
        "--references",
        files / "barn",
        "--clip",
        tiny_clip[0],
    ]
    status, out, err = evaluate(
        capsys, *command, "--prompts", files / "prompts.txt", "--output", files / "out"
    )
    assert status == 0, err
    record = json.loads((files / "out" / "metrics.json").read_text())
    clip = load_clip(tiny_clip[0], None, "clip")
    drawn, texts = images(2, (*SIZES, (20, 20))), ["a three", "a three", "grass", "grass"]
    expected = text_alignment(clip.features(drawn), clip.text_features(texts))
    np.testing.assert_allclose(record["scores"]["CLIP-T"], expected, atol=1e-6)
    assert set(record["subjects"]) == {"bear", "barn"} and record["models"] == {"clip": "clip"}
    assert "seed" not in record["settings"] and record["versions"]["jax"]
    table = (files / "out" / "table.md").read_text()
    assert table in out and "| CLIP-I, barn | " in table
    assert f"| CLIP-T | {np.mean(expected):.4f}, " in table and "| a <new1> three | " in table

    page = read_report(files / "out", Images(files))
    assert page.kind == "personalization" and page.runs[0].label == "drawn"
    assert [group.title for group in page.groups[1:]] == [
        "photographs of bear",
        "photographs of barn",
    ]
    assert [item.prompt for item in page.items[:4]] == ["a <new1> three"] * 2 + ["grass"] * 2
    assert page.items[3].after[0].told.startswith("CLIP-T ")
    assert " · CLIP-I, bear " in page.items[3].after[0].told
    assert len(page.items) == 4 + 3 + 1 and page.items[0].before is None
    assert all(item.before and item.after == (None,) for item in page.items[4:])
    assert [fact.title for fact in page.runs[0].facts] == ["CLIP-I, bear", "CLIP-I, barn", "CLIP-T"]
    assert all(fact.meaning for fact in page.runs[0].facts)

    names = ("2.png", "0.png")  # a folder that knows its prompts: just these, in this order
    known = {"files": dict(zip(names, ("grass", "a three"), strict=True))}
    (files / "drawn" / "sample.json").write_text(json.dumps(known))
    assert evaluate(capsys, *command, "--output", files / "again")[0] == 0
    again = json.loads((files / "again" / "metrics.json").read_text())
    swapped = text_alignment(clip.features([drawn[2], drawn[0]]), clip.text_features(texts[:1:-1]))
    assert again["scores"]["CLIP-T"][0] == pytest.approx(float(swapped[0]), abs=1e-6)
    assert list(again["prompts"]) == ["grass", "a three"]


def test_the_command_draws_with_a_model(files, tiny_clip, tmp_path, capsys):
    save_pytorch(tiny_pipeline(), tmp_path / "model")
    row = np.linspace(-1, 1, 16, dtype=np.float32)
    save_textual_inversion({"<new1>": row}, tmp_path)
    status, _, err = evaluate(
        capsys,
        "--model",
        tmp_path / "model",
        "--add",
        tmp_path / "<new1>.safetensors",
        "--references",
        files / "bear",
        "--clip",
        tiny_clip[0],
        "--prompts",
        files / "prompts.txt",
        "--output",
        files / "out",
        "--count",
        2,
        "--steps",
        2,
        "--seed",
        7,
    )
    assert status == 0, err
    record = json.loads((files / "out" / "metrics.json").read_text())
    assert record["settings"]["seed"] == 7 and record["images"] == 4
    assert record["settings"]["add"] == [str(tmp_path / "<new1>.safetensors")]
    drawn = text_to_image(
        add_tokens(tiny_pipeline(), {"<new1>": row}),
        ["a <new1> three"] * 2 + ["grass"] * 2,
        seed=7,
        num_inference_steps=2,
        guidance_scale=6.0,
        eta=1.0,
    )
    clip = load_clip(tiny_clip[0], None, "clip")
    photographs = clip.features(images(3))
    expected = image_similarity(clip.features(drawn), photographs)
    np.testing.assert_allclose(record["scores"]["CLIP-I, bear"], expected, atol=1e-5)
    assert "seed 7, 2 steps" in (files / "out" / "table.md").read_text()
    # What it drew is a folder that it measures, with the same result.
    status, _, err = evaluate(
        capsys,
        "--images",
        files / "out" / "images",
        "--references",
        files / "bear",
        "--clip",
        tiny_clip[0],
        "--output",
        files / "again",
    )
    assert status == 0, err
    again = json.loads((files / "again" / "metrics.json").read_text())
    assert again["scores"] == record["scores"]


def test_unfit_command_lines_are_told(files, tiny_clip, capsys, tmp_path_factory):
    output = tmp_path_factory.mktemp("unfit") / "out"
    drawn, bear = ["--images", files / "drawn"], ["--references", files / "bear"]
    clip = ["--clip", tiny_clip[0], "--output", output]
    (files / "three.txt").write_text("a\nb\nc\n")
    (files / "bear" / "sample.json").write_text("[]")
    for arguments, message in (
        (bear, "either --images"),
        ([*drawn, *bear, "--model", files], "either --images"),
        (drawn, "--references"),
        ([*drawn, *bear, "--add", files], "--add goes with --model"),
        ([*drawn, *bear], "--clip, --dino, --blip or --blip2"),
        ([*drawn, *bear, *clip], "has no sample.json: say what was asked for with --prompts"),
        ([*drawn, *bear, *clip, "--prompts", files / "three.txt"], "4 images, which 3 prompts"),
        (["--images", files / "bear", *bear, *clip], "does not say which image"),
        (
            ["--images", files / "no", *bear, *clip, "--prompts", files / "three.txt"],
            "is not a folder of images",
        ),
        ([*drawn, "--references", files, *clip], "holds no images"),
        (["--model", files, *bear, *clip], "pass --prompts"),
        (["--model", files, *bear, *clip, "--count", 0], "--count must be at least 1"),
    ):
        status, _, err = evaluate(capsys, *arguments)
        assert status == 1 and message in err, (message, err)
        assert not output.exists()


def test_the_longest_command_is_meant(capsys):
    assert main(["evaluate", "personalization", "--help"]) == 0
    assert "--references" in capsys.readouterr().out
    assert main(["evaluate", "--help"]) == 0
    assert "--edited" in capsys.readouterr().out
    assert main(["evaluate"]) == 1
    assert "pass the edited model with --edited" in capsys.readouterr().err
