"""Evaluating an erasure: figures against independent formulas, and a rerun to the digit."""

import dataclasses
import json
import types
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import scipy.linalg
import scipy.special
from flax import nnx

from conceptax.cli import main
from conceptax.converters import (
    CheckpointError,
    load_changes,
    load_pytorch,
    save_changes,
    save_pytorch,
)
from conceptax.flax_models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from conceptax.flax_models.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from conceptax.flax_models.glyph_classifier import GlyphClassifier, GlyphClassifierConfig
from conceptax.flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from conceptax.flax_models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from conceptax.methods.diffusion.text_to_image import TextToImage
from conceptax.methods.evaluation import (
    Asked,
    ClipClassifier,
    EvaluationConfig,
    Suites,
    evaluate,
    frechet_distance,
    phrase_suites,
    read_synonyms,
)
from conceptax.methods.evaluation.instruments import Clip
from conceptax.methods.evaluation.statistics import clip_score, unit
from conceptax.methods.evaluation.suites import HELD_OUT_TEMPLATES
from conceptax.methods.evaluation.unsafe_prompts import UnsafePrompt
from conceptax.methods.glyphs.captions import prompts
from conceptax.methods.glyphs.evaluation import GlyphsClassifier, glyphs_suites
from conceptax.methods.glyphs.judge import Judge, load_judge, save_judge
from conceptax.methods.glyphs.quality import attribute_called
from conceptax.methods.glyphs.recipe import SCHEDULER
from conceptax.methods.glyphs.tokenizer import build_tokenizer
from conceptax.methods.text.phrases import TEMPLATES, ConceptError
from conceptax.reporting.gallery import Images, read_report
from conceptax.reporting.instruments import load_clip
from conceptax.reporting.models import load_edited

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
CONFIG = EvaluationConfig(images=4, steps=2, batch_size=2, attack_images=3, seed=5)


def random_model(model_class, config, rng):
    abstract = nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)

    def fill(path, leaf):
        fan_in = 1 if path[-1].key == "embedding" else np.prod(leaf.shape[:-1])
        values = rng.normal(size=leaf.shape) / np.sqrt(fan_in)
        return jnp.asarray(values if len(leaf.shape) > 1 else 1 + 0.1 * values, leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, nnx.to_pure_dict(state)))


def text_config(tokenizer):
    return CLIPTextConfig(
        **TOWER,
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        eos_token_id=tokenizer.eos_token_id,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random pipeline of 64 pixels, with a judge and a CLIP, as the bundled model has them."""
    rng, tokenizer = np.random.default_rng(0), build_tokenizer()
    unet = UNet2DConditionConfig(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    vae = AutoencoderKLConfig(
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    text = text_config(tokenizer)
    clip = random_model(
        CLIPModel,
        CLIPConfig(text, CLIPVisionConfig(**TOWER, image_size=64), projection_dim=8),
        rng,
    )
    pipeline = StableDiffusionPipeline(
        random_model(UNet2DConditionModel, unet, rng),
        random_model(AutoencoderKL, vae, rng),
        clip.text_model,
        tokenizer,
        dict(SCHEDULER),
    )
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_pytorch(pipeline, path)
    save_pytorch(clip, path / "clip")
    eye = GlyphClassifierConfig(channels=(4, 4), strides=(4, 4), groups=2, features=4)
    save_judge(Judge(random_model(GlyphClassifier, eye, rng)), path / "judge")
    return path


@pytest.fixture(scope="module")
def pipeline(folder):
    return load_pytorch(folder)


@pytest.fixture(scope="module")
def edited(pipeline):
    """The pipeline with another text encoder."""
    graphdef, state = nnx.split(pipeline.text_encoder)
    changed = jax.tree.map(lambda leaf: 1.5 * leaf, nnx.to_pure_dict(state)["encoder"])
    params = {**nnx.to_pure_dict(state), "encoder": changed}
    return dataclasses.replace(pipeline, text_encoder=nnx.merge(graphdef, params))


# ---- Fréchet distance ----


def by_square_root(first, second):
    """The textbook's formula with SciPy's square root of a matrix."""
    a, b = np.cov(first.T), np.cov(second.T)
    root = scipy.linalg.sqrtm(a @ b).real
    return np.sum((first.mean(0) - second.mean(0)) ** 2) + np.trace(a + b - 2 * root)


@pytest.mark.parametrize(("count", "width"), [(50, 6), (200, 3)])
def test_the_frechet_distance_is_the_textbooks(count, width):
    rng = np.random.default_rng(0)
    first = rng.normal(size=(count, width)) @ rng.normal(size=(width, width))
    second = 0.5 + rng.normal(size=(count + 10, width)) @ rng.normal(size=(width, width))
    expected = by_square_root(first, second)
    assert expected > 1
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)


def test_the_frechet_distance_of_singular_covariances():
    rng = np.random.default_rng(1)
    few = rng.normal(size=(4, 9))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(few, few + 2.0) == pytest.approx(4 * 9, rel=1e-6)
    # Along one axis it is (m1 - m2)^2 + (s1 - s2)^2.
    line = rng.normal(size=(40, 1))
    expected = 9 + (2 * line.std(ddof=1)) ** 2
    distance = frechet_distance(line, 3 * line + 3 - 2 * line.mean())
    assert distance == pytest.approx(expected, rel=1e-9)


def test_wrong_features_have_no_distance():
    some = np.zeros((3, 2))
    with pytest.raises(ValueError, match="at least 2 samples, received 3 and 1"):
        frechet_distance(some, some[:1])
    with pytest.raises(ValueError, match="one width, received 2 and 3"):
        frechet_distance(some, np.zeros((3, 3)))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(some, np.full((3, 2), np.nan))


# ---- CLIP ----


def test_clip_score_is_that_of_transformers(torch, tmp_path):
    """Features of transformers' CLIP in the formula of torchmetrics: 100 · max(cos, 0)."""
    transformers = pytest.importorskip("transformers")
    tokenizer = build_tokenizer()
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
    torch.manual_seed(0)
    theirs = transformers.CLIPModel(config).eval()
    theirs.save_pretrained(tmp_path)
    clip = load_clip(tmp_path, tokenizer, "tiny")

    images = np.random.default_rng(0).integers(0, 256, (3, 24, 20, 3), np.uint8)
    texts = ["a red three", "grass", "a photo of a blue seven on brick"]
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    tokens = tokenizer(texts, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        out = theirs(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=processor(list(images), return_tensors="pt")["pixel_values"],
        )
        cosines = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
        expected = (100 * cosines.clamp(min=0)).numpy()
    assert expected.max() > 0 and expected.min() == 0  # both branches
    scores = clip_score(clip.features(images), clip.text_features(texts))
    # Cosines near zero are differences of numbers near one: absolute error, in hundredths.
    np.testing.assert_allclose(scores, expected, atol=2e-3)


# ---- classifiers ----


def test_the_judge_is_asked_about_one_attribute_each(folder):
    judge = load_judge(folder / "judge")
    classifier = GlyphsClassifier(judge).among(["three", "III", "red", "brick"])
    images = np.random.default_rng(0).integers(0, 256, (70, 64, 64, 3), np.uint8)
    found = judge(images)
    for phrase, attribute, value in (
        ("III", "digit", 3),
        ("blue", "color", 2),
        ("gravel", "texture", 2),
    ):
        shown = classifier.shows(images, [phrase] * 70)
        assert (shown == (found[attribute] == value)).all()
        said = classifier.says(images, [phrase] * 70)
        assert (said.hits == shown).all()
        most = found[f"{attribute}_probabilities"].max(-1)
        np.testing.assert_allclose(said.confidences, most, rtol=1e-6)
        words = [attribute_called(word) for word in said.words]
        assert words == [(attribute, each) for each in found[attribute].tolist()]
    mixed = classifier.shows(images[:3], ["grass", "nine", "white"])
    expected = [found["texture"][0] == 1, found["digit"][1] == 9, found["color"][2] == 5]
    assert mixed.tolist() == expected
    assert classifier.features(images).shape == (70, 4)
    with pytest.raises(ValueError, match=r"'dog' is nothing that the glyphs world shows; that is"):
        classifier.among(["dog"])


def test_the_judges_heads_read_its_features(folder):
    judge = load_judge(folder / "judge")
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    head = judge.params["digit"]
    logits = judge.features(images) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(
        jax.nn.softmax(logits), judge(images)["digit_probabilities"], atol=1e-6
    )


class Axes(Clip):
    """A CLIP in which colors are axes: an image is its mean color, a text what it names."""

    name = "axes"

    def __init__(self):
        pass

    def features(self, images):
        return images.astype(np.float32).mean((1, 2)) + 1e-3

    def text_features(self, texts):
        axes = {"red": [1, 0, 0], "green": [0, 1, 0], "blue": [0, 0, 1]}
        return np.asarray(
            [next((axes[w] for w in axes if w in text), [1, 1, 1]) for text in texts], np.float32
        )


def test_zero_shot_clip_takes_the_nearest_phrase():
    images = np.zeros((4, 8, 8, 3), np.uint8)
    images[0, ..., 0] = images[1, ..., 1] = 200
    images[2] = 90  # as near to "something else" as it gets
    images[3, ..., 2] = 255
    classifier = ClipClassifier(Axes()).among(["red", "green"])
    assert classifier.shows(images, ["red"] * 4).tolist() == [True, False, False, False]
    assert classifier.shows(images, ["red", "green", "green", "green"]).tolist() == [
        True,
        True,
        False,
        False,
    ]
    said = classifier.says(images, ["red"] * 4)
    assert said.words[:2] == ("red", "green") and "red" not in said.words[2:]
    cosines = unit(classifier.clip.features(images)) @ classifier._labels.T
    probabilities = scipy.special.softmax(100 * cosines.astype(np.float64), axis=-1)
    np.testing.assert_allclose(said.confidences, probabilities.max(-1), rtol=1e-4)
    assert classifier.record["phrases"] == ["red", "green"]
    assert json.dumps(classifier.record)
    with pytest.raises(ValueError, match="asked for \\['blue'\\]"):
        classifier.shows(images, ["blue"] * 4)


# ---- prompts ----


def meanings():
    return {each.text: each for each in prompts()}


def test_a_digit_has_synonyms_neighbors_and_distant_things():
    suites = glyphs_suites(["three", "seven"], 18, seed=0)
    known = meanings()
    for concept, digit in (("three", 3), ("seven", 7)):
        assert {known[each.text].digit for each in suites.plain[concept]} == {digit}
        assert {each.word for each in suites.plain[concept]} == {concept}
        assert {each.phrase for each in suites.synonyms[concept]} == {concept}
    words = Counter(each.word for each in suites.synonyms["three"])
    assert words == {"3": 6, "III": 6, "trio": 6}
    neighbors, distant = suites.retained["neighbors"], suites.retained["distant"]
    assert all(known[each.text].digit not in (3, 7) for each in (*neighbors, *distant))
    counts = Counter(each.phrase for each in neighbors)
    assert len(counts) == 8 and set(counts.values()) == {2, 3}
    assert "zero" in counts and "three" not in counts
    assert Counter(each.phrase for each in distant)["red"] == 2
    assert len({each.phrase for each in distant}) == 9
    for group in (neighbors, distant):
        assert all(each.word in each.text for each in group)
    assert glyphs_suites(["three", "seven"], 18, seed=0) == suites
    assert glyphs_suites(["three", "seven"], 18, seed=1) != suites


def test_a_color_has_no_synonyms():
    suites = glyphs_suites(["red"], 20, seed=0)
    known = meanings()
    assert {known[each.text].color for each in suites.plain["red"]} == {0}
    assert not suites.synonyms
    assert {each.phrase for each in suites.retained["neighbors"]} == {
        "green",
        "blue",
        "yellow",
        "purple",
        "white",
    }
    assert all(known[each.text].color for group in suites.retained.values() for each in group)
    both = glyphs_suites(["red", "three"], 20, seed=0)
    assert all(known[each.text].color for each in both.plain["three"])
    assert {each.phrase for each in both.retained["distant"]} == {"brick", "grass", "gravel"}
    with pytest.raises(ValueError, match="'dog' is nothing"):
        glyphs_suites(["dog"], 2, seed=0)


def test_phrases_make_prompts_for_any_model():
    assert not set(HELD_OUT_TEMPLATES) & set(TEMPLATES)
    suites = phrase_suites(
        ["van gogh"],
        6,
        0,
        synonyms={"van gogh": ["vincent", "the post-impressionist"]},
        neighbors=["monet", "cezanne", "gauguin"],
        distant=["a dog"],
    )
    assert len(suites.plain["van gogh"]) == 6
    assert {each.phrase for each in suites.synonyms["van gogh"]} == {"van gogh"}
    assert Counter(each.word for each in suites.retained["neighbors"]) == {
        "monet": 2,
        "cezanne": 2,
        "gauguin": 2,
    }
    assert set(suites.phrases) == {"van gogh", "monet", "cezanne", "gauguin", "a dog"}
    with pytest.raises(ConceptError, match=r"\['monet'\] cannot be both"):
        phrase_suites(["x"], 2, 0, synonyms={"x": ["monet"]}, neighbors=["monet"])
    with pytest.raises(ConceptError, match="exactly one"):
        phrase_suites(["x"], 2, 0, templates=["no place"], distant=["y"])
    with pytest.warns(UserWarning, match="what broke is not seen"):
        assert phrase_suites(["x"], 2, 0).retained == {}


def test_synonyms_belong_to_a_concept():
    assert read_synonyms(["trio", "three: III"], ["three"]) == {"three": ["trio", "III"]}
    lines = ["three: trio", "seven: VII"]
    assert read_synonyms(lines, ["three", "seven"]) == {"three": ["trio"], "seven": ["VII"]}
    with pytest.raises(ConceptError, match="'trio' names no synonym"):
        read_synonyms(["trio"], ["three", "seven"])


# ---- figures ----


class Brightness:
    """An image shows a phrase of even length if its first pixel is bright."""

    record = {"kind": "brightness"}
    features_title = "means"

    def among(self, phrases):
        self.phrases = list(phrases)
        return self

    def shows(self, images, phrases):
        even = np.asarray([len(phrase) % 2 == 0 for phrase in phrases])
        return (images[:, 0, 0, 0] > 127) == even

    def features(self, images):
        return images.reshape(len(images), -1, 3).mean(1)


@dataclasses.dataclass(frozen=True)
class StubSettings:
    """Settings of the stub.

    Attributes:
      steps: how often it tries.
      words: what it says.
    """

    steps: int = 2
    words: tuple[str, ...] = ("trio",)


def stub_attack(original, edited, concept, config, *, images, prompts, seed):
    """First words, then token ids that ask the original model itself."""
    assert images.dtype == np.uint8 and len(images) <= len(prompts)
    tokens = np.asarray(
        edited.tokenizer(list(config.words), padding="max_length")["input_ids"], np.int32
    )
    words = tuple(prompt.replace(concept, config.words[0]) for prompt in prompts)
    attempts = [(words, edited), (words, original)][: config.steps]
    return [
        types.SimpleNamespace(
            pipeline=model,
            prompts=asked,
            budget={"steps": n, "norm": np.float32(0.5)},
            details={"note": "x", "losses": (1.0, 2.0), "tokens": tokens},
        )
        for n, (asked, model) in enumerate(attempts)
    ]


@pytest.fixture(autouse=True)
def attacks(monkeypatch):
    registry = {
        name: types.SimpleNamespace(title=title, config=StubSettings, run=stub_attack)
        for name, title in (("relapse", "stub relapse"), ("other-one", "another stub"))
    }
    for module in ("methods.evaluation.figures", "reporting.evaluating", "cli.evaluate"):
        monkeypatch.setattr(f"conceptax.{module}.known_attacks", lambda: registry)
    return registry


SUITES = Suites(
    {"three": [Asked(f"a red three on {t}", "three", "three") for t in ("brick", "grass") * 2]},
    {"three": [Asked(f"a red {w} on brick", w, "three") for w in ("3", "III") * 2]},
    {"neighbors": [Asked(f"a red {w} on brick", w, w) for w in ("four", "nine") * 2]},
)


def test_figures_count_what_the_models_draw(pipeline, edited):
    unsafe = [
        UnsafePrompt("a blue nine", seed=77, guidance_scale=3.0),
        UnsafePrompt("a green nine on grass", seed=78),
        UnsafePrompt("a white one", guidance_scale=3.0),
    ]
    config = dataclasses.replace(CONFIG, attacks={"relapse": StubSettings()})
    told = []
    result = evaluate(
        pipeline,
        edited,
        ["three"],
        Brightness(),
        SUITES,
        config,
        unsafe=unsafe,
        never_knew=edited,
        report=told.append,
    )
    metrics = result.metrics
    assert json.loads(json.dumps(metrics)) == metrics
    assert len(told) == len(result.seconds) == 6 and "plain prompts for “three”" in told[0]

    # Every rate is the rate of the images that are handed out, and those are what the models draw.
    rows = {row["attack"]: row for row in metrics["attacks"]}
    assert list(rows) == ["plain", "synonyms", "unsafe prompts", "relapse"]
    by_title = {each.title: each for each in result.counted}
    for row in rows.values():
        of = by_title.get(row["title"]) or by_title[f"{row['title']} for “three”"]
        for when in ("before", "after"):
            if row[when] is not None:
                assert row[when]["count"] == getattr(of, when).hits.sum()
                assert row[when]["of"] == len(getattr(of, when).images)
    assert rows["synonyms"]["words"].keys() == {"3", "III"}
    assert rows["synonyms"]["words"]["III"]["after"]["of"] == 2
    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "batch_size": 2, "seed": 5}
    drawers = [TextToImage.from_pipeline(each) for each in (pipeline, edited)]
    texts = [each.text for each in SUITES.retained["neighbors"]]
    first = len(SUITES.plain["three"]) + len(SUITES.synonyms["three"]) + len(unsafe)
    before, after = (each(texts, first_index=first, **options) for each in drawers)
    kept = by_title["neighboring concepts"]
    assert (kept.before.images == before).all() and (kept.after.images == after).all()
    assert (before != after).any()
    (group,) = metrics["retention"]
    assert group["phrases"].keys() == {"four", "nine"}
    assert group["after"]["count"] == np.sum(
        Brightness().shows(after, [each.phrase for each in SUITES.retained["neighbors"]])
    )

    # Unsafe prompts bring their own noise and guidance.
    ours = by_title["unsafe prompts"].after.images
    own = drawers[1]([unsafe[0].text] * 2, **{**options, "seed": 77, "guidance_scale": 3.0})
    assert np.abs(ours[0].astype(int) - own[0]).max() <= 1
    own = drawers[1]([unsafe[1].text] * 2, **{**options, "seed": 78})
    assert np.abs(ours[1].astype(int) - own[0]).max() <= 1

    # The last attempt is in front; a model that never knew is attacked by relapse alone.
    relapse = rows["relapse"]
    assert relapse["before"] is None and len(relapse["budgets"]) == 2
    assert relapse["after"]["count"] == relapse["budgets"][-1]["count"]
    assert relapse["budgets"][0]["budget"] == {"steps": 0, "norm": 0.5}
    assert relapse["budgets"][0]["details"] == {"note": "x", "losses": [1.0, 2.0]}
    assert relapse["never_knew"][0]["count"] == relapse["budgets"][0]["count"]

    assert metrics["clip_score"] is None
    assert metrics["frechet"] == {
        "features": "means",
        "width": 3,
        "images": 4,
        "distance": frechet_distance(*(Brightness().features(each) for each in (before, after))),
    }


def test_an_untouched_model_shows_no_difference(pipeline, folder):
    clip = load_clip(folder / "clip", pipeline.tokenizer, "tiny clip")
    result = evaluate(pipeline, pipeline, ["three"], Brightness(), SUITES, CONFIG, clip=clip)
    for row in (*result.metrics["attacks"], *result.metrics["retention"]):
        assert row["before"] == row["after"]
    scores, distance = result.metrics["clip_score"], result.metrics["frechet"]
    assert scores["retained"]["before"] == scores["retained"]["after"]
    assert distance["features"] == "image features of tiny clip" and distance["width"] == 8
    assert distance["distance"] < 1e-4
    (neighbors,) = [each for each in result.counted if each.kind == "retention"]
    expected = clip_score(
        clip.features(neighbors.before.images), clip.text_features(neighbors.texts)
    )
    figure = scores["retained"]["before"]
    assert figure["mean"] == pytest.approx(expected.mean(), rel=1e-6) and figure["of"] == 4
    half = 1.96 * expected.std(ddof=1) / 2
    assert figure["high"] - figure["mean"] == pytest.approx(half, rel=1e-3)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="images must be at least 2, received 1"):
        EvaluationConfig(images=1)
    with pytest.raises(ValueError, match=r"attacks are among \['other-one', 'relapse'\]"):
        EvaluationConfig(attacks={"magic": None})


# ---- models from files ----


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model))


def same(first, second):
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, second))


def test_whatever_erasing_exports_can_be_evaluated(pipeline, edited, tmp_path):
    save_pytorch(edited, tmp_path / "pipeline")
    save_pytorch(edited.text_encoder, tmp_path / "encoder")
    (tmp_path / "changes").mkdir()
    file = tmp_path / "changes" / "text_encoder_changes.safetensors"
    keys = save_changes(edited.text_encoder, pipeline.text_encoder, file)
    expected, before = params_of(edited.text_encoder), params_of(pipeline.text_encoder)
    for path in (tmp_path / "pipeline", tmp_path / "encoder", file.parent, file):
        loaded = load_edited(path, pipeline, "float32")
        assert same(params_of(loaded.text_encoder), expected), path
        assert same(params_of(loaded.unet), params_of(pipeline.unet))
    assert same(params_of(pipeline.text_encoder), before) and not same(before, expected)

    (weights,) = (tmp_path / "pipeline" / "unet").glob("*.safetensors")
    unet = safetensors.numpy.load_file(weights)
    name = "conv_in.weight"
    kernel = params_of(pipeline.unet)["conv_in"]["kernel"]
    for prefix in ("unet.", ""):
        file = tmp_path / "partial.safetensors"
        safetensors.numpy.save_file({prefix + name: 2 * unet[name]}, file)
        loaded = load_edited(file, pipeline, "float32")
        assert (params_of(loaded.unet)["conv_in"]["kernel"] == 2 * kernel).all() and keys
    file.rename(tmp_path / "changes/unet_changes.safetensors")  # as of two edited parts
    loaded = load_edited(tmp_path / "changes", pipeline, "float32")
    assert (params_of(loaded.unet)["conv_in"]["kernel"] == 2 * kernel).all()
    assert same(params_of(loaded.text_encoder), expected)

    safetensors.numpy.save_file({name: unet[name], "x": unet[name]}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match="1 unexpected: x"):
        load_changes(tmp_path / "more.safetensors", pipeline.unet)
    with pytest.raises(CheckpointError, match="holds no tensor of a CLIPTextModel"):
        load_changes(tmp_path / "changes/unet_changes.safetensors", pipeline.text_encoder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no edited model"):
        load_edited(tmp_path / "empty", pipeline, "float32")
    save_pytorch(pipeline.vae, tmp_path / "vae")
    with pytest.raises(CheckpointError, match="is a AutoencoderKL; an erasure edits"):
        load_edited(tmp_path / "vae", pipeline, "float32")


# ---- the command ----


@pytest.fixture(scope="module")
def edited_folder(edited, tmp_path_factory):
    path = tmp_path_factory.mktemp("edited") / "encoder"
    save_pytorch(edited.text_encoder, path)
    near = [{"phrase": "threes", "concept": "three", "similarity": 0.97}]
    (path / "erasing.json").write_text(json.dumps({"method": "SAGE", "not_retained": near}))
    return path


def refused(capsys, arguments, text):
    assert main([str(argument) for argument in arguments]) == 1
    err = capsys.readouterr().err
    assert text in err and "Traceback" not in err, err


def test_an_evaluation_repeats_itself_to_the_digit(folder, edited_folder, tmp_path, capsys):
    unsafe = tmp_path / "unsafe.csv"
    unsafe.write_text("prompt,categories,sd_seed\na nine,x,3\na two,y,4\na one,x,5\n")
    command = ["evaluate", "--original", folder, "--edited", edited_folder]
    command += ["--concept", "three", "--concept", "seven", "--output", tmp_path / "first"]
    command += ["--images", "4", "--steps", "2", "--batch-size", "2", "--attacks", "other-one"]
    command += ["--other-one.words", "nonet", "--other-one.steps", "1", "--seed", "3"]
    command += ["--unsafe-prompts", unsafe, "--unsafe-category", "x"]
    assert main([str(argument) for argument in command]) == 0
    shown = capsys.readouterr().out
    assert "another stub" in shown and "· trio" not in shown and "· “trio”" in shown
    written = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert written == ["conceptax.json", "metrics.json", "report.html", "table.md"]
    record = json.loads((tmp_path / "first" / "metrics.json").read_text())
    assert record["settings"]["attack_settings"] == {"other-one": {"steps": 1, "words": ["nonet"]}}
    assert [(row["attack"], row["concept"]) for row in record["attacks"]] == [
        ("plain", "three"),
        ("plain", "seven"),
        ("synonyms", "three"),
        ("synonyms", "seven"),
        ("unsafe prompts", "three or seven"),
        ("other-one", "three"),
        ("other-one", "seven"),
    ]
    assert record["attacks"][4]["after"]["of"] == 2
    assert record["frechet"]["features"] == "image features of tiny/clip"
    assert record["clip_score"]["concepts"]["after"]["of"] == 8
    assert {"conceptax", "jax"} <= record["versions"].keys()
    assert shown.startswith((tmp_path / "first" / "table.md").read_text())

    page = (tmp_path / "first" / "report.html").read_text()
    assert page.count("<table>") == 5 and "“threes”" in page
    shown = read_report(tmp_path / "first", Images(tmp_path))
    assert shown.kind == "erasure" and len(shown.items) == 8 * 4 + 2
    attacked = [each for each in shown.items if shown.groups[each.group].name == "other-one"]
    assert all(each.before is None and each.seed == 3 for each in attacked)
    assert "nonet" in attacked[0].after[0].prompt and attacked[0].concepts == ("three",)
    hits = [each.after[0].shown for each in shown.items if each.concepts == ("three", "seven")]
    assert sum(hits) == record["attacks"][4]["after"]["count"] and len(hits) == 2
    assert all(
        shot.word and 0 < shot.confidence <= 1 for each in shown.items for shot in each.after
    )
    (ran,) = shown.runs
    assert ran.label == "SAGE" and ran.command.startswith("conceptax evaluate --original ")
    assert "--settings" in ran.again and len(ran.tables) == 5 and len(ran.facts) == 7 + 2 + 2
    assert [len(each.items) for each in shown.front] == [5, 5]
    assert record["erasing"]["not_retained"][0]["phrase"] == "threes"

    again = ["evaluate", "--settings", tmp_path / "first/metrics.json"]
    again = [str(each) for each in [*again, "--output", tmp_path / "second"]]
    assert main(again) == 0
    repeated = json.loads((tmp_path / "second" / "metrics.json").read_text())
    assert repeated.pop("seconds").keys() == record.pop("seconds").keys()
    assert repeated == record
    capsys.readouterr()
    refused(capsys, [*again, "--images", "8"], "brings all settings: leave out --images")
    refused(capsys, again, "already exists and is not empty")
    nothing = tmp_path / "nothing.json"
    nothing.write_text("{}")
    refused(capsys, ["evaluate", "--settings", nothing], "is no record of an evaluation")
    nothing.write_text('{"settings": {"edited": "x"}}')
    refused(capsys, ["evaluate", "--settings", nothing], "lacks the settings ['attack_images'")


def test_a_clip_judges_other_worlds(folder, edited_folder, tmp_path, capsys):
    lists = {}
    for name, lines in {
        "synonyms": "trio\n",
        "neighbors": "four\nfive\n",
        "distant": "grass\n",
        "templates": "look at {}\n{}, please\n",
    }.items():
        lists[name] = tmp_path / f"{name}.txt"
        lists[name].write_text(lines)
    command = ["evaluate", "--original", folder, "--edited", edited_folder, "--concept", "three"]
    command += ["--classifier", folder / "clip", "--output", tmp_path / "out", "--attacks"]
    command += ["--images", "4", "--steps", "2", "--batch-size", "2"]
    for name, file in lists.items():
        command += [f"--{name}", file]
    assert main([str(argument) for argument in command]) == 0
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert record["classifier"]["kind"] == "zero-shot CLIP"
    assert record["classifier"]["phrases"] == ["three", "four", "five", "grass"]
    assert [row["attack"] for row in record["attacks"]] == ["plain", "synonyms"]
    assert [row["group"] for row in record["retention"]] == ["neighbors", "distant"]
    assert record["settings"]["distant"] == ["grass"] and record["clip_score"]["model"] == "clip"


def test_what_cannot_be_evaluated_is_told(folder, edited_folder, tmp_path, capsys):
    base = ["evaluate", "--original", folder, "--output", tmp_path / "out"]
    refused(capsys, [*base, "--concept", "three"], "pass the edited model with --edited")
    base += ["--edited", edited_folder]
    refused(capsys, base, "no concept was given")
    refused(capsys, [*base, "--concept", "dog"], "'dog' is nothing that the glyphs world shows")
    base += ["--concept", "three"]
    refused(capsys, [*base, "--attacks", "magic"], "--attacks takes names of ['relapse'")
    refused(capsys, [*base, "--unsafe-category", "x"], "pass that file too")
    refused(capsys, [*base, "--classifier", folder / "vae"], "is no classifier")
    refused(capsys, [*base, "--images", "1"], "images must be at least 2")
    bare = tmp_path / "bare"
    save_pytorch(load_pytorch(folder), bare)
    refused(
        capsys,
        [
            "evaluate",
            "--original",
            bare,
            "--edited",
            edited_folder,
            "--concept",
            "three",
            "--output",
            tmp_path / "out",
        ],
        "pass a classifier",
    )
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["bare"]
