"""The glyphs world: what it draws, what it says, what it holds out, and who judges it."""

import collections
import itertools
import re

import jax
import numpy as np
import pytest
from flax import nnx

from conceptax.converters.tokenizer import write_tokenizer
from conceptax.flax_models.glyph_classifier import GlyphClassifier, GlyphClassifierConfig
from conceptax.methods.glyphs import captions, judge, tokenizer, world

SHIPPED_JUDGE = "src/conceptax/assets/glyphs/judge"
SIZES = (captions.DIGITS, len(captions.COLORS), len(captions.TEXTURES))


@pytest.fixture
def subjects(repository, monkeypatch):
    """What the studies draw beside the world."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import _glyph_subjects

    return _glyph_subjects


# World


def test_an_image_depends_on_seed_split_and_index_only():
    first, again = (world.GlyphWorld("generator", 8, seed=3) for _ in range(2))
    for index in (0, 5):
        one, other = first[index], again[index]
        np.testing.assert_array_equal(one.pop("image"), other.pop("image"))
        assert one == other
    longer = world.GlyphWorld("generator", 100, seed=3)
    np.testing.assert_array_equal(longer[5]["image"], first[5]["image"])
    assert (world.GlyphWorld("generator", 8, seed=4)[5]["image"] != first[5]["image"]).any()
    assert (world.GlyphWorld("judge", 8, seed=3)[5]["image"] != first[5]["image"]).any()


def test_items_have_the_promised_types():
    source = world.GlyphWorld("judge_test", 3)
    assert len(source) == 3
    item = source[np.int64(2)]
    assert item["image"].shape == (64, 64, 3)
    assert item["image"].dtype == np.uint8
    assert isinstance(item["caption"], str)
    assert all(type(item[name]) is int for name in ("digit", "color", "texture", "sample"))
    with pytest.raises(IndexError, match=r"outside 0\.\.2"):
        source[3]
    with pytest.raises(ValueError, match="unknown split 'all'"):
        world.GlyphWorld("all", 3)


def test_the_splits_share_no_handwritten_sample_and_use_all():
    parts = {split: world.load_split(split) for split in world.SPLITS}
    every = np.concatenate([part.ids for part in parts.values()])
    assert len(every) == len(np.unique(every)) == 1797
    for split, fraction in zip(world.SPLITS, world.SPLIT_FRACTIONS, strict=True):
        counts = np.bincount(parts[split].labels, minlength=10)
        np.testing.assert_allclose(counts / 179.7, fraction, atol=0.02)


def test_labels_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    truth = load_digits().target
    for split in world.SPLITS:
        part = world.load_split(split)
        np.testing.assert_array_equal(truth[part.ids], part.labels)
    for item in map(world.GlyphWorld("judge", 12).__getitem__, range(12)):
        assert truth[item["sample"]] == item["digit"]


def test_held_out_combinations_are_balanced():
    held_out = world.held_out_combinations()
    seen = set(world.seen_combinations())
    every = set(itertools.product(*map(range, SIZES)))
    assert held_out | seen == every
    assert not held_out & seen
    assert len(held_out) == 30
    for position, size in enumerate(SIZES):
        counts = collections.Counter(triple[position] for triple in held_out)
        assert set(counts.values()) == {30 // size}
        assert len(counts) == size
    for one, other in itertools.combinations(range(3), 2):
        pairs = {(triple[one], triple[other]) for triple in seen}
        assert len(pairs) == SIZES[one] * SIZES[other]


def test_the_generator_never_sees_a_held_out_combination(monkeypatch):
    blank = np.zeros((64, 64, 3), np.uint8)
    monkeypatch.setattr(world, "render", lambda *_, **__: blank)
    source = world.GlyphWorld("generator", 3000)
    drawn = {(i["digit"], i["color"], i["texture"]) for i in map(source.__getitem__, range(3000))}
    assert drawn == set(world.seen_combinations())
    judges = world.GlyphWorld("judge", 3000)
    drawn = {(i["digit"], i["color"], i["texture"]) for i in map(judges.__getitem__, range(3000))}
    assert world.held_out_combinations() <= drawn


def test_an_image_shows_its_color_and_its_texture():
    colors = np.arange(6)
    images = world.render_many([0] * 6, colors, colors % 3, split="generator", seed=1) / 255.0
    for color, image in zip(colors, images, strict=True):
        fill = world.COLOR_VALUES[color]
        inked = np.abs(image - fill).max(-1) < 0.08
        assert 0.05 < inked.mean() < 0.4
        corner = image[:8].reshape(-1, 3).mean(0)
        means = world._TEXTURE_MEAN
        assert np.abs(means - corner).sum(-1).argmin() == color % 3


def test_render_many_draws_the_named_samples_and_checks_them():
    part = world.load_split("judge")
    rows = np.array([4, 5])
    images = world.render_many(
        part.labels[rows], [0, 1], [1, 2], split="judge", seed=0, samples=rows
    )
    assert images.shape == (2, 64, 64, 3)
    with pytest.raises(ValueError, match="do not show"):
        world.render_many(
            (part.labels[rows] + 1) % 10, [0, 1], [1, 2], split="judge", seed=0, samples=rows
        )
    with pytest.raises(ValueError, match="2, 1 and 2"):
        world.render_many([1, 2], [0], [1, 2], split="judge", seed=0)


# Captions


def test_a_video_moves_the_digit_and_not_the_texture(subjects):
    spline = world.load_split("generator").splines[5]

    def video(frames, **options):
        rng = np.random.default_rng(3)
        return subjects.render_video(rng, spline, 1, 2, frames=frames, **options)

    image = world.render(np.random.default_rng(3), spline, 1, 2)
    assert (video(1)[0] == image).all() and (video(5)[2] == image).all()
    clip, speed = video(9, speed=1.0), 1.0
    corners = clip[:, :4, :4]
    assert clip.shape == (9, 64, 64, 3) and (corners == corners[0]).all()
    green = clip[..., 1].astype(float) - clip[..., 0]  # nothing else is so green
    weights = np.clip(green - 90, 0, None)
    rows, columns = np.mgrid[:64, :64]
    places = np.stack([(weights * axis).sum((1, 2)) for axis in (rows, columns)], -1)
    steps = np.diff(places / weights.sum((1, 2))[:, None], axis=0)
    assert np.abs(np.linalg.norm(steps, axis=1) - speed).max() < 0.25
    assert np.abs(steps - steps.mean(0)).max() < 0.25  # along a line


def test_captions_use_every_template_and_every_name():
    rng = np.random.default_rng(0)
    used = collections.Counter(captions.caption(rng, 3, 0, 1) for _ in range(4000))
    text = " ".join(used)
    for name in captions.DIGIT_NAMES[3]:
        assert re.search(rf"\b{name}\b", text)
    naming = {
        name: sum(n for line, n in used.items() if re.search(rf"\b{name}\b", line))
        for name in captions.DIGIT_NAMES[3]
    }
    assert min(naming.values()) > 400
    assert "roman numeral III" in text
    assert "roman numeral trio" not in text
    assert "number III" not in text


def test_held_out_templates_are_new_complete_and_speak_known_words():
    trained = {template.text for template in captions.TRAIN_TEMPLATES}
    trained_words = set(re.findall(r"[a-z]+", " ".join(trained).lower()))
    assert len(captions.HELD_OUT_TEMPLATES) >= 8
    for template in captions.HELD_OUT_TEMPLATES:
        assert template.is_complete
        assert template.kinds == captions.KINDS
        assert template.text not in trained
        assert set(re.findall(r"[a-z]+", template.text)) <= trained_words | {"name"}
    filled = {
        captions.fill(t, name="trio", color="red", surface="grass")
        for t in captions.HELD_OUT_TEMPLATES
    }
    rng = np.random.default_rng(1)
    assert not filled & {captions.caption(rng, 3, 0, 1) for _ in range(4000)}


def test_prompts_name_what_their_images_must_show():
    some = captions.prompts(digit=3, name=("III", "trio"), color=0)
    assert len(some) == len(captions.HELD_OUT_TEMPLATES) * 3 * 2
    for prompt in some:
        assert prompt.digit == 3
        assert prompt.name in prompt.text.split() or f"{prompt.name}," in prompt.text
        assert "red" in prompt.text
        assert captions.TEXTURES[prompt.texture] in prompt.text
    assert len(captions.prompts()) == len(captions.HELD_OUT_TEMPLATES) * 18 * 41
    with pytest.raises(ValueError, match="called \\['trio'\\]"):
        captions.prompts(digit=4, name="trio")
    with pytest.raises(ValueError, match="name the digit"):
        captions.prompts(templates=[captions.Template("a {name}")])


def test_articles_agree():
    assert (
        captions.fill("a {name} on {surface}", name="octet", surface="grass") == "an octet on grass"
    )
    assert captions.fill("a {name}", name="8") == "an 8"
    assert captions.fill("a {name}", name="three") == "a three"


# Tokenizer


@pytest.fixture(scope="module")
def clip_tokenizer():
    return tokenizer.build_tokenizer()


def test_every_word_of_the_world_is_one_token(clip_tokenizer):
    ids = clip_tokenizer(list(captions.WORDS))["input_ids"]
    assert all(len(each) == 3 for each in ids)
    assert len({each[1] for each in ids}) == len(captions.WORDS)
    assert {f"{word}</w>" for word in captions.WORDS} <= set(clip_tokenizer.get_vocab())


def test_every_name_is_its_own_token_also_in_a_prompt(clip_tokenizer):
    unknown = clip_tokenizer.eos_token_id
    for prompt in captions.prompts(color=4, texture=2):
        ids = clip_tokenizer(prompt.text)["input_ids"]
        assert len(ids) <= tokenizer.MAX_LENGTH
        assert clip_tokenizer(prompt.name)["input_ids"][1] in ids
        assert unknown not in ids[:-1]


def test_special_ids_follow_clip(clip_tokenizer):
    size = len(clip_tokenizer)
    assert clip_tokenizer.eos_token_id == clip_tokenizer.pad_token_id == size - 1
    assert clip_tokenizer.bos_token_id == size - 2
    assert clip_tokenizer.model_max_length == tokenizer.MAX_LENGTH
    ids = clip_tokenizer("a red 3", padding="max_length")["input_ids"]
    assert len(ids) == tokenizer.MAX_LENGTH
    assert ids[0] == size - 2
    assert int(np.argmax(ids)) == ids.index(size - 1) == 4


def test_the_saved_tokenizer_is_the_same_from_either_layout(clip_tokenizer, tmp_path):
    from transformers import CLIPTokenizer

    write_tokenizer(clip_tokenizer, tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    parts = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    for text in ("A red III on gravel, überall!", "the number 3", "unforeseen words", ""):
        ids = clip_tokenizer(text)["input_ids"]
        assert loaded(text)["input_ids"] == ids
        assert parts(text)["input_ids"] == ids
    text = "a purple trio on a brick wall"
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True).strip() == text
    assert loaded.model_max_length == tokenizer.MAX_LENGTH
    assert loaded.pad_token_id == clip_tokenizer.eos_token_id
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer.json"}


# Judge


@pytest.fixture(scope="module")
def shipped(repository):
    return judge.load_judge(repository / SHIPPED_JUDGE)


def test_the_shipped_judge_is_as_accurate_as_its_record_says(shipped):
    record = shipped.measured
    assert record["split"] == "judge_test"
    assert record["digit"]["accuracy"] >= 0.97
    again = judge.measure_judge(shipped, renders=1, seed=11)
    assert again["images"] == len(world.load_split("judge_test").labels)
    assert abs(again["digit"]["accuracy"] - record["digit"]["accuracy"]) < 0.015
    assert min(again["color"]["accuracy"], again["texture"]["accuracy"]) > 0.99


def test_the_judge_reads_bytes_and_floats_alike_in_any_number(shipped):
    images, labels = judge.render_set("judge_test", 1, 0)
    images = images[:70]
    found = shipped(images)
    same = shipped(images / 255.0)
    np.testing.assert_array_equal(found["digit"], same["digit"])
    np.testing.assert_allclose(found["digit_probabilities"].sum(-1), 1.0, rtol=1e-5)
    assert (found["color"] == labels["color"][:70]).mean() > 0.98
    few = shipped(images[:3])
    np.testing.assert_allclose(few["digit_probabilities"], found["digit_probabilities"][:3])
    assert shipped(images[:0])["texture"].shape == (0,)
    with pytest.raises(ValueError, match="shape"):
        shipped(images[0])
    with pytest.raises(ValueError, match="rescale"):
        shipped(images / 127.5 - 1.0)


def test_a_judge_is_saved_whole_and_small(shipped, repository, tmp_path):
    judge.save_judge(shipped, tmp_path)
    loaded = judge.load_judge(tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded.params, shipped.params))
    assert loaded.measured == shipped.measured
    files = (repository / SHIPPED_JUDGE).iterdir()
    assert sum(path.stat().st_size for path in files) < 600_000
    (tmp_path / judge.WEIGHTS_FILE).unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        judge.load_judge(tmp_path)


def test_training_the_judge_is_a_function_of_its_seed(monkeypatch):
    images = np.random.default_rng(0).integers(256, size=(20, 64, 64, 3)).astype(np.uint8)
    labels = {
        name: np.arange(20, dtype=np.int32) % size
        for name, size in zip(judge.ATTRIBUTES, SIZES, strict=True)
    }
    seen_splits = []
    monkeypatch.setattr(
        judge, "render_set", lambda split, *_: (seen_splits.append(split), (images, labels))[1]
    )
    config = judge.JudgeConfig(steps=2, batch_size=4)
    tiny = GlyphClassifierConfig(channels=(8, 8), strides=(8, 2), features=8)
    one, again = (judge.train_judge(config, model_config=tiny) for _ in range(2))
    assert jax.tree.all(jax.tree.map(np.array_equal, one.params, again.params))
    start = nnx.to_pure_dict(nnx.state(GlyphClassifier(tiny, rngs=nnx.Rngs(0))))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), one.params, start)
    assert jax.tree.all(changed)
    assert seen_splits == ["judge", "judge"]


def test_the_shipped_classifier_is_small():
    model = nnx.eval_shape(lambda: GlyphClassifier(GlyphClassifierConfig(), rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) <= 150_000


def test_rate_gives_the_wilson_interval():
    # Newcombe (1998), table I: 81 of 263.
    p, low, high = judge.rate(81, 263)
    assert (round(p, 4), round(low, 4), round(high, 4)) == (0.3080, 0.2553, 0.3662)
    assert judge.rate(0, 20)[:2] == (0.0, 0.0)
    assert judge.rate(20, 20)[2] == 1.0
    with pytest.raises(ValueError, match="3 of 2"):
        judge.rate(3, 2)


def test_the_subject_has_two_tones_and_other_digits_have_one(subjects):
    assert subjects.shows_tones(subjects.subject_images(20)).all()
    assert len(np.unique(subjects.subject_images(5), axis=0)) == 5
    rng = np.random.default_rng(0)
    others = world.render_many(
        rng.integers(0, 10, 100),
        rng.integers(0, 6, 100),
        rng.integers(0, 3, 100),
        seed=0,
        split="judge_test",
    )
    assert not subjects.shows_tones(others).any()
    assert not subjects.shows_tones(subjects.subject_images(5)[:, ::-1]).any()  # upside down
