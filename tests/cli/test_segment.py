"""`conceptax segment` end to end, on a model of the smallest sizes and random parameters."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from segmentation_oracles import random_model

from conceptax.cli import main
from conceptax.converters import load_maft_plus, load_open_clip, load_pytorch, save_pytorch
from conceptax.converters.formats.segmentation import TEACHER
from conceptax.converters.tokenizer import write_tokenizer
from conceptax.flax_models.convnext import ConvNeXtConfig
from conceptax.flax_models.maft_plus import MaftPlus, MaftPlusConfig
from conceptax.flax_models.open_clip import OpenCLIP, OpenCLIPConfig, OpenCLIPTextConfig
from conceptax.methods.glyphs.tokenizer import MAX_LENGTH, build_tokenizer
from conceptax.methods.segmentation.augmentation import ResizeFlip
from conceptax.methods.segmentation.batches import scene_batches
from conceptax.methods.segmentation.datasets import open_scenes
from conceptax.methods.segmentation.maft_plus import MaftPlusTraining, fit
from conceptax.methods.segmentation.metrics import confusion_matrix, semantic_quality
from conceptax.methods.segmentation.set_losses import SetLossConfig
from conceptax.methods.segmentation.vocabulary import Vocabulary, text_rows
from conceptax.methods.training import RULES, make_mesh
from conceptax.reporting.models import load_open_clip_model
from conceptax.reporting.overlay import class_colors, overlay

WORDS = "three, trio; brick; grass"
SEEN = ["--short-side", "64", "--long-side", "96"]
TRAINED = [
    "--short-side",
    "128",
    "--long-side",
    "128",
    "--batch-size",
    "2",
    "--steps",
    "3",
    "--learning-rate",
    "0.001",
    "--set-losses.num-points",
    "16",
]
CONFIG = MaftPlusTraining(steps=3, learning_rate=1e-3, set_losses=SetLossConfig(num_points=16))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of a model and its tokenizer."""
    tokenizer = build_tokenizer()
    text = OpenCLIPTextConfig(8, 1, 1, len(tokenizer), MAX_LENGTH)
    clip = OpenCLIPConfig(text, ConvNeXtConfig((1, 1, 1, 1), (4, 4, 8, 8)), embed_dim=8)
    config = MaftPlusConfig.of(
        clip,
        hidden_dim=32,
        heads=8,
        num_points=2,
        encoder_layers=1,
        encoder_ffn=32,
        decoder_layers=1,
        decoder_ffn=32,
        num_queries=5,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_pytorch(random_model(lambda rngs: MaftPlus(config, rngs=rngs), seed=21), folder)
    write_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three images with a bright left part."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("images", "annotations"):
        (root / name).mkdir()
    for n in range(3):
        labels = np.full((50, 60), n % 2 + 1, np.uint8)
        labels[:, : 20 + 5 * n], labels[-4:] = 0, 255
        image = rng.integers(0, 90, (50, 60, 3), dtype=np.uint8)
        image[labels == 0] += 120
        Image.fromarray(image).save(root / f"images/{n}.png")
        Image.fromarray(labels).save(root / f"annotations/{n}.png")
    return root


@pytest.fixture(scope="module")
def found(model, data, tmp_path_factory):
    """What `run` wrote of the images."""
    output = tmp_path_factory.mktemp("run") / "found"
    images = [str(path) for path in sorted((data / "images").iterdir())]
    arguments = ["--model", str(model), "--vocabulary", WORDS, "--output", str(output), *SEEN]
    assert main(["segment", "run", *images, *arguments, "--least-score", "0"]) == 0
    return output


def test_run(found):
    legend = json.loads((found / "legend.json").read_text())
    assert [each["names"] for each in legend["classes"]] == [
        ["three", "trio"],
        ["brick"],
        ["grass"],
    ]
    counts = np.zeros(3, int)
    for n in range(3):
        with Image.open(found / f"{n}_labels.png") as image:
            assert image.mode == "I;16" and image.size == (60, 50)
            counts += np.bincount(np.asarray(image).ravel(), minlength=3)
        with Image.open(found / f"{n}_overlay.png") as image:
            assert image.mode == "RGB" and image.size == (60, 50)
    assert [each["pixels"] for each in legend["classes"]] == counts.tolist()
    assert legend["void"] == {"label": 65535, "pixels": 0}


def test_void(model, data, tmp_path, capsys):
    arguments = ["--model", str(model), "--vocabulary", WORDS, *SEEN, "--least-score", "2"]
    output = tmp_path / "void"
    image = str(data / "images/0.png")
    assert main(["segment", "run", image, *arguments, "--output", str(output)]) == 0
    assert "nothing; void 100.0 %" in capsys.readouterr().out
    assert (np.asarray(Image.open(output / "0_labels.png")) == 65535).all()
    np.testing.assert_array_equal(Image.open(output / "0_overlay.png"), Image.open(image))
    content = json.loads((output / "panoptic.json").read_text())
    assert content["annotations"][0]["segments_info"] == []
    assert not np.asarray(Image.open(output / "0_panoptic.png")).any()


def evaluate(model, data, output, *arguments):
    main_arguments = ["--model", str(model), "--data", str(data), "--vocabulary", WORDS, *SEEN]
    assert main(["segment", "evaluate", *main_arguments, "--output", str(output), *arguments]) == 0
    return json.loads((output / "metrics.json").read_text())


def test_evaluate(model, data, found, tmp_path, capsys):
    """The figures of the label maps that `run` wrote, by another way."""
    record = evaluate(model, data, tmp_path / "e", "--text-cache", str(tmp_path / "cache"))
    matrix = np.zeros((4, 4), int)
    for n in range(3):
        seen = np.asarray(Image.open(found / f"{n}_labels.png")).astype(int)
        truth = np.asarray(Image.open(data / f"annotations/{n}.png")).astype(int)
        matrix += confusion_matrix(seen, truth, 3, ignore=255)
    quality = semantic_quality(matrix)
    for name, value in record["semantic"].items():
        assert value == pytest.approx(getattr(quality, name)), name
    assert [each["name"] for each in record["iou"]] == ["three", "brick", "grass"]
    assert record["panoptic"] is None and record["scenes"] == 3
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert f"| {quality.miou:.2f} | {quality.miou_predicted:.2f} |" in capsys.readouterr().out


def test_evaluate_panoptic(model, data, found, tmp_path):
    """What the model finds, taken as the truth, is found."""
    root = tmp_path / "own"
    (root / "panoptic").mkdir(parents=True)
    (root / "images").symlink_to(data / "images")
    content = json.loads((found / "panoptic.json").read_text())
    (root / "panoptic.json").write_text(json.dumps(content))
    for n in range(3):
        (root / f"panoptic/{n}_panoptic.png").symlink_to(found / f"{n}_panoptic.png")
    scenes = open_scenes(root, 3, layout="panoptic")
    segments = [each["segments_info"] for each in content["annotations"]]
    assert [len(scenes[n].segments) for n in range(3)] == [len(each) for each in segments]
    for n, described in enumerate(segments):
        for each in described:
            left, top, width, height = each["bbox"]
            own = scenes[n].ids == each["id"]
            assert each["area"] == own.sum() == own[top:, left:][:height, :width].sum()
    record = evaluate(model, root, tmp_path / "e", "--layout", "panoptic")
    everything = record["panoptic"]["all"]
    assert everything["classes"] > 0 and everything["sq"] == everything["pq"]
    assert everything["pq"] == pytest.approx(100) and everything["rq"] == pytest.approx(100)
    assert record["panoptic"]["stuff"] == {"pq": None, "sq": None, "rq": None, "classes": 0}


@pytest.fixture(scope="module")
def trained(model, data, tmp_path_factory):
    """Arguments of a training, the folder that it wrote, and its checkpoints."""
    root = tmp_path_factory.mktemp("trained")
    arguments = [
        "segment",
        "train",
        "--model",
        str(model),
        "--data",
        str(data),
        "--vocabulary",
        WORDS,
        *TRAINED,
        "--export",
        "pth",
        "--checkpoint-every",
        "2",
    ]
    places = ["--output", str(root / "model"), "--checkpoint-dir", str(root / "checkpoints")]
    assert main([*arguments, *places]) == 0
    return arguments, root / "model", root / "checkpoints"


def same(one, other):
    pairs = zip(jax.tree.leaves(nnx.state(one)), jax.tree.leaves(nnx.state(other)), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_train(trained, model, data, tmp_path, torch):
    """A detectron2 file that the other commands take, with the CLIP it was held to."""
    _, folder, _ = trained
    record = json.loads((folder / "segmenting.json").read_text())
    assert record["last_step"]["step"] == 3 and record["settings"]["set_losses"]["num_points"] == 16
    file, before = folder / "maft_plus.pth", load_pytorch(model)
    after = load_maft_plus(file)
    assert after.config == before.config and not same(after, before)
    original = before.backbone.clip_model
    assert same(load_open_clip(file, prefix=TEACHER, config=original.config), original)
    assert not same(after.backbone.clip_model, original)
    content = torch.load(file, weights_only=True)["model"]
    assert content["criterion.empty_weight"].shape == (4,)
    evaluate(file, data, tmp_path / "e")


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(trained, tmp_path):
    arguments, folder, checkpoints = trained
    shutil.copytree(checkpoints, tmp_path / "checkpoints")
    steps = sorted(int(each.name) for each in checkpoints.iterdir() if each.name.isdigit())
    assert steps == [2, 3]
    shutil.rmtree(tmp_path / "checkpoints/3")
    places = [
        *("--output", str(tmp_path / "model")),
        *("--checkpoint-dir", str(tmp_path / "checkpoints")),
    ]
    assert main([*arguments, *places]) == 0
    one, other = (load_maft_plus(each / "maft_plus.pth") for each in (folder, tmp_path / "model"))
    assert same(one, other)
    another = ["--seed", "1", "--force"]
    assert main([*arguments, *places, *another]) == 1  # checkpoints of another run


@pytest.mark.slow
def test_a_mesh_trains_the_same(trained, model, data):
    start, vocabulary = load_pytorch(model), Vocabulary.parse(WORDS)
    rows = text_rows(start.backbone.clip_model, build_tokenizer(), vocabulary)
    batches = scene_batches(open_scenes(data, 3), ResizeFlip(128, 128), 2, seed=0)
    sharded = fit(
        start,
        rows,
        vocabulary.synonyms(),
        batches,
        CONFIG,
        seed=0,
        mesh=make_mesh(data=1, fsdp=2),
        rules=RULES["MaftPlus"],
        progress=False,
    )
    expected = load_maft_plus(trained[1] / "maft_plus.pth")
    for one, other in zip(
        jax.tree.leaves(nnx.state(sharded)), jax.tree.leaves(nnx.state(expected)), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=2e-4)


@pytest.mark.slow
def test_a_new_model_around_a_clip(model, tmp_path):
    original = load_pytorch(model).backbone.clip_model
    save_pytorch(original, tmp_path / "clip")
    clip = load_open_clip_model(tmp_path / "clip", dtype="float32")
    config = dataclasses.replace(load_pytorch(model).config, form="panoptic")
    new = MaftPlus.around(clip, config, rngs=nnx.Rngs(0))
    assert same(new.backbone.clip_model, original)
    rows = jnp.eye(3, 8)
    output = nnx.jit(lambda model: model(jnp.zeros((1, 64, 64, 3)), rows))(new)
    assert output.open_logits.shape == (1, 5, 4)


@pytest.mark.slow
def test_street_scenes(repository, tmp_path):
    """From random weights, the loss falls and most pixels of the training images get right."""
    streets = repository.parent / "shared/data/camvid_subset"
    if not streets.exists():
        pytest.skip("the street scenes are not beside the repository")
    tokenizer = build_tokenizer()
    config = OpenCLIPConfig.tiny(vocab_size=len(tokenizer), context_length=MAX_LENGTH)
    save_pytorch(OpenCLIP(config, rngs=nnx.Rngs(0)), tmp_path / "clip")
    write_tokenizer(tokenizer, tmp_path / "clip")
    words = "sky; building; pole; road; pavement; tree; sign; fence; car; pedestrian; bicyclist"
    where = [
        "--data",
        str(streets),
        "--ignore",
        "11",
        "--vocabulary",
        words,
        "--short-side",
        "128",
        "--long-side",
        "192",
    ]
    training = [
        "--open-clip",
        str(tmp_path / "clip"),
        "--decoder",
        "tiny",
        "--form",
        "panoptic",
        "--token-order",
        "raster",
        "--steps",
        "60",
        "--batch-size",
        "4",
        "--learning-rate",
        "0.002",
        "--rates",
        "*",
        "1.0",
        "--set-losses.num-points",
        "512",
        "--output",
        str(tmp_path / "model"),
    ]
    assert main(["segment", "train", *where, *training]) == 0
    lines = (tmp_path / "model/training.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 60 and np.mean(losses[-10:]) < 0.75 * np.mean(losses[:10])
    looking = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "figures")]
    assert main(["segment", "evaluate", *where, *looking]) == 0
    record = json.loads((tmp_path / "figures/metrics.json").read_text())
    assert record["scenes"] == 16 and record["semantic"]["pacc"] > 40
    print(losses[0], losses[-1], record["semantic"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--vocabulary", WORDS], "at least one image"),
        (["run", "{0}", "{0}", "--vocabulary", WORDS], "0 comes twice"),
        (["run", "{0}", "--vocabulary", WORDS, "--stuff", "wall"], "--stuff names wall"),
        (["run", "{0}", "--vocabulary", ";"], "at least one class"),
        (["evaluate", "--data", "{data}", "--vocabulary", "a; b"], "unknown labels [2]"),
        (["evaluate", "--data", "{data}", "--vocabulary", WORDS, "--layout", "x"], "no layout 'x'"),
        (
            ["train", "--data", "{data}", "--vocabulary", WORDS, "--open-clip", "c"],
            "either --open-clip",
        ),
    ],
)
def test_messages(arguments, message, model, data, tmp_path, capsys):
    places = {"{0}": str(data / "images/0.png"), "{data}": str(data)}
    arguments = [places.get(each, each) for each in arguments]
    output = tmp_path / "output"
    command = ["segment", *arguments, "--model", str(model), "--output", str(output)]
    assert main(command) == 1
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_a_model_without_tokenizer(model, data, tmp_path, capsys):
    save_pytorch(load_pytorch(model), tmp_path / "bare")
    arguments = [str(data / "images/0.png"), "--vocabulary", WORDS, *SEEN]
    bare = ["--model", str(tmp_path / "bare"), "--output", str(tmp_path / "output")]
    assert main(["segment", "run", *arguments, *bare]) == 1
    assert "pass --tokenizer FOLDER" in capsys.readouterr().err
    assert main(["segment", "run", *arguments, *bare, "--tokenizer", str(model)]) == 0


def test_overlay():
    colors = class_colors([f"class {n}" for n in range(200)])
    assert len(np.unique(colors, axis=0)) == 200
    image = np.full((60, 80, 3), 100, np.uint8)
    labels = np.full((60, 80), 1)
    labels[:, :30] = 2  # void
    picture = np.asarray(overlay(image, labels, ("wall", "sky"), colors))
    assert (picture[:, :29] == 100).all()
    middle = np.rint(0.45 * 100 + 0.55 * colors[1])
    np.testing.assert_array_equal(picture[2, 78], middle)
    assert (picture[:, 32:] == 255).any()  # letters
