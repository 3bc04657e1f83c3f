"""Scenes of glyphs, the captions a tiny OpenCLIP learns from, and the study at its smallest."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from conceptax.methods.glyphs.captions import COLORS, DIGIT_NAMES, TEXTURES
from conceptax.methods.glyphs.open_clip import caption, pooling, quarters, single
from conceptax.methods.glyphs.recipe import contrastive_loss
from conceptax.methods.glyphs.scenes import SCENE_SIZE, SEEN, UNSEEN, Figure, GlyphScenes, draw
from conceptax.methods.glyphs.world import COLOR_VALUES, GlyphWorld
from conceptax.methods.segmentation.datasets import SceneSource


def test_scenes_are_a_function_of_seed_and_index():
    scenes = GlyphScenes(6, seed=3)
    assert isinstance(scenes, SceneSource) and len(scenes) == len(scenes.targets) == 6
    for index in (4, 0):
        one, other = scenes[index], GlyphScenes(9, seed=3)[index]
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.ids, other.ids)
    images = [scenes[0].image, scenes[1].image, GlyphScenes(6, seed=4)[0].image]
    images.append(GlyphScenes(6, seed=3, split="judge_test")[0].image)
    assert len({image.tobytes() for image in images}) == 4


def test_what_scenes_show():
    training, testing = GlyphScenes(40, digits=SEEN), GlyphScenes(40, among=UNSEEN, seed=1)
    assert training.classes == 10 and testing.classes == 13
    assert training.vocabulary.names == (*(next(iter(DIGIT_NAMES[d])) for d in SEEN), *TEXTURES)
    assert set(testing.vocabulary.classes[7]) == {"seven", "7", "VII", "septet"}
    counts, seen = [], set()
    for source in (training, testing):
        for index in range(40):
            image, ids, segments = source[index]
            assert image.shape == (*ids.shape, 3) == (SCENE_SIZE, SCENE_SIZE, 3)
            labels = {segment.category for segment in segments.values()}
            assert set(np.unique(ids)) == set(segments) == {label + 1 for label in labels}
            digits = {label for label in labels if label < len(source.digits)}
            assert len(labels - digits) == 1  # one texture
            assert source is training or digits & set(UNSEEN)
            counts.append(len(digits))
            seen |= digits
    assert seen == set(range(10)) and set(counts) == {1, 2, 3, 4}


def test_masks_are_exact():
    """A digit's pixels have its color, the others do not."""
    rng = np.random.default_rng(0)
    red, blue = COLORS.index("red"), COLORS.index("blue")
    figures = [Figure(8, red, 0), Figure(3, blue, 3)]
    image, ids, _ = draw(rng, figures, 1, tuple(range(10)), "generator")
    strong = image.astype(int) - image.mean(axis=-1, keepdims=True)
    for digit, channel in ((8, 0), (3, 2)):
        inside = ids == digit + 1
        assert 100 < inside.sum() < 1500
        quarter = np.s_[:64, :64] if digit == 8 else np.s_[64:, 64:]
        assert inside[quarter].sum() == inside.sum()
        assert np.mean(strong[..., channel][inside] > 40) > 0.97
        assert np.mean(strong[..., channel][ids == 12] > 40) < 0.03


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"digits": (1, 10)}, {"among": (7,), "digits": SEEN}]
)
def test_wrong_scenes(wrong):
    with pytest.raises(ValueError, match="received"):
        GlyphScenes(**{"size": 4, **wrong})


def test_captions_tell_what_they_say():
    rng, kinds = np.random.default_rng(0), set()
    for _ in range(300):
        digit, color, texture = (int(rng.integers(n)) for n in (11, 6, 3))
        text, said = caption(rng, digit, color, texture)
        words = set(text.replace(",", "").replace(":", "").split())
        told = set(DIGIT_NAMES[digit]) if digit < 10 else {TEXTURES[texture]}
        assert bool(words & told) == said[0], text
        assert (COLORS[color] in words) == said[1], text
        kinds.add(tuple(said.tolist()))
    assert kinds == {(True, False, False), (True, False, True), (True, True, True)}


def test_quarters_show_what_their_labels_say():
    digits = set()
    for index in range(30):
        image, labels = quarters(3, index)
        np.testing.assert_array_equal(image, quarters(3, index)[0])
        distance = np.abs(image[..., None, :] / 255 - COLOR_VALUES).max(axis=-1)
        assert labels[4].tolist() == [10, 6, labels[0, 2]]
        for number, (digit, color, texture) in enumerate(labels[:4]):
            top, left = (64 * place for place in divmod(number, 2))
            painted = (distance[top : top + 64, left : left + 64] < 0.12).sum(axis=(0, 1))
            assert np.flatnonzero(painted > 100).tolist() == ([color] if digit < 10 else [])
            assert (color < 6) == (digit < 10) and texture == labels[0, 2]
            digits.add(int(digit))
    assert digits == set(range(11))


def test_a_single_digit_is_its_region():
    image, labels = single(3, 5)
    np.testing.assert_array_equal(image, GlyphWorld("generator", 9, 3)[5]["image"])
    assert labels.shape == (1, 3) and labels[0, 0] == GlyphWorld("generator", 9, 3)[5]["digit"]


def test_pooling_takes_some_cells_of_each_quarter():
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(pooling(rng, 1, 3, some=False), np.full((1, 3, 3), 1 / 9))
    *every, whole = pooling(rng, 2, 3, some=False)
    for number, weights in enumerate(every):
        top, left = (number // 2) * 3, (number % 2) * 3
        np.testing.assert_allclose(weights[top : top + 3, left : left + 3], 1 / 9, rtol=1e-6)
        assert np.count_nonzero(weights) == 9
    np.testing.assert_allclose(whole, 1 / 36, rtol=1e-6)
    some = np.stack([pooling(rng, 2, 3, some=True) for _ in range(300)])
    np.testing.assert_allclose(some.sum(axis=(2, 3)), 1, rtol=1e-5)
    np.testing.assert_array_equal(some[:, 4], np.stack([whole] * 300))
    parts = some[:, :4]
    kept = (parts > 0).sum(axis=(2, 3))
    np.testing.assert_allclose(parts.max(axis=(2, 3)), 1 / kept, rtol=1e-5)
    assert set(kept.ravel()) == set(range(1, 10))
    outside = np.stack(every) == 0
    assert not np.any(parts[:, outside])
    assert (parts[:, ~outside] > 0).mean() == pytest.approx(0.53, abs=0.05)


def test_contrasts_share_what_is_true_among_rows_and_columns():
    rng = np.random.default_rng(0)
    logits, true = rng.normal(size=(5, 5)), np.eye(5) + np.tri(5, k=-2)
    likely = [logits - np.log(np.exp(logits).sum(axis, keepdims=True)) for axis in (0, 1)]
    images = [-likely[1][i][true[i] > 0].mean() for i in range(5)]
    captions = [-likely[0][:, j][true[:, j] > 0].mean() for j in range(5)]
    received = contrastive_loss(jnp.asarray(logits), jnp.asarray(true))
    assert float(received) == pytest.approx((np.mean(images) + np.mean(captions)) / 2, rel=1e-5)


@pytest.fixture
def benchmark(repository, monkeypatch):
    """The study as a module."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import segmentation_glyphs

    return segmentation_glyphs


def test_what_the_study_compares(benchmark):
    assert list(benchmark.cells((0,)))[:2] == [("frozen CLIP", 0), ("fine-tuned CLIP", 0)]
    rows = benchmark.ROWS
    assert not any("visual" in path for path in rows["frozen CLIP"].trainable)
    assert "cdt" in rows["MAFT+"].trainable and "cdt" not in rows["+ compensation"].trainable
    assert benchmark.harmonic_mean(60.0, 30.0) == 40
    assert benchmark.harmonic_mean(60.0, 0.0) == 0


# Nearly all of it is compilation.
@pytest.mark.slow
def test_the_study(benchmark, tmp_path):
    """One row and seed of a few steps, kept, not run again, and written down."""
    settings = dataclasses.replace(benchmark.SMALL, tests=2)
    arguments = (tmp_path / "work", tmp_path / "results", settings)
    benchmark.study(*arguments, only=["frozen CLIP"], seeds=[0])
    (file,) = (tmp_path / "results").iterdir()
    record = json.loads(file.read_text())
    for figure in benchmark.FIGURES:
        assert 0 <= record[figure] < 1000
    assert record["zero_shot"] == record["zero_shot_before"]  # the tower is frozen
    written = file.stat().st_mtime_ns
    benchmark.study(*arguments, only=["frozen CLIP"], seeds=[0])
    assert file.stat().st_mtime_ns == written
    table = benchmark.table_of(tmp_path / "results")
    assert [row[0] for row in table.rows] == ["frozen CLIP"]
    assert f"{record['seen']:.1f}" == table.rows[0][1].text
