"""Scenes of glyphs, the captions a tiny OpenCLIP learns from, and the study at its smallest."""

import dataclasses
import json

import numpy as np
import pytest

from conceptax.methods.glyphs.captions import COLOURS, DIGIT_NAMES, TEXTURES
from conceptax.methods.glyphs.open_clip import caption
from conceptax.methods.glyphs.scenes import SCENE_SIZE, SEEN, UNSEEN, Figure, GlyphScenes, draw
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
    """A digit's pixels have its colour, the others do not."""
    rng = np.random.default_rng(0)
    red, blue = COLOURS.index("red"), COLOURS.index("blue")
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
        digit, colour, texture = (int(rng.integers(n)) for n in (10, 6, 3))
        text, said = caption(rng, digit, colour, texture)
        words = set(text.replace(",", "").replace(":", "").split())
        assert bool(words & set(DIGIT_NAMES[digit])) == said[0], text
        assert (COLOURS[colour] in words) == said[1], text
        kinds.add(tuple(said.tolist()))
    assert kinds == {(True, False, False), (False, False, True), (True, True, True)}


def test_the_study(repository, tmp_path, monkeypatch):
    """One row and seed of a few steps, kept, not run again, and written down."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import segmentation_glyphs as benchmark

    assert list(benchmark.cells((0,)))[:2] == [("frozen CLIP", 0), ("fine-tuned CLIP", 0)]
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
    rows = benchmark.ROWS
    assert not any("visual" in path for path in rows["frozen CLIP"].trainable)
    assert "cdt" in rows["MAFT+"].trainable and "cdt" not in rows["+ compensation"].trainable
