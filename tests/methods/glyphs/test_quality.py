"""Counting what images show: balanced prompts, honest proportions."""

from collections import Counter

import numpy as np
import pytest

from conceptax.methods.evaluation.statistics import proportion
from conceptax.methods.evaluation.suites import choose
from conceptax.methods.glyphs.captions import DIGIT_NAMES, HELD_OUT_TEMPLATES, prompts
from conceptax.methods.glyphs.quality import (
    digit_called,
    erasure_figures,
    erasure_prompts,
    examine,
    examine_all,
    join,
    measure_quality,
    name_of,
    quality_prompts,
)
from conceptax.methods.glyphs.world import held_out_combinations


class Seer:
    """A judge that reads the answer from an image's first pixels; digits of `blind` become 8."""

    def __init__(self, blind=()):
        self.blind = blind

    def __call__(self, images):
        digit, color, texture = images[:, 0, 0].T.astype(int)
        return {
            "digit": np.where(np.isin(digit, self.blind), 8, digit),
            "color": color,
            "texture": texture,
        }


class Painter:
    """Writes what a prompt asks for into the first pixel, and notes the noise it was given."""

    def __init__(self):
        self.meaning = {each.text: each for each in prompts()} | {
            each.text: each for sets in quality_prompts(300, 0).values() for each in sets
        }
        self.indices = []

    def __call__(self, texts, *, seed, first_index):
        self.indices += [(seed, first_index + n) for n in range(len(texts))]
        images = np.zeros((len(texts), 64, 64, 3), np.uint8)
        for image, text in zip(images, texts, strict=True):
            asked = self.meaning[text]
            image[0, 0] = asked.digit, asked.color, asked.texture
        return images


def test_every_name_counts_equally():
    chosen = choose(prompts(), 100, 0, name_of)
    counts = Counter((each.digit, each.name) for each in chosen)
    assert len(counts) == sum(map(len, DIGIT_NAMES))
    assert set(counts.values()) == {2, 3}
    assert chosen == choose(prompts(), 100, 0, name_of) != choose(prompts(), 100, 1, name_of)
    few = choose(prompts(digit=3, name="three", color=0, texture=0), 25, 0, name_of)
    assert Counter(Counter(few).values()) == {3: 5, 2: 5}  # ten wordings, repeated evenly
    with pytest.raises(ValueError, match="at least one"):
        choose(prompts(), 0, 0, name_of)


def test_erasure_is_judged_by_held_out_wordings():
    sets = erasure_prompts("three", 90, seed=1)
    assert {name: len(each) for name, each in sets.items()} == dict.fromkeys(sets, 90)
    assert {each.name for each in sets["plain"]} == {"three"}
    assert Counter(each.name for each in sets["synonyms"]) == {"3": 30, "III": 30, "trio": 30}
    assert {each.digit for each in sets["others"]} == set(range(10)) - {3}
    held_out = {each.text for each in prompts(templates=HELD_OUT_TEMPLATES)}
    assert all(each.text in held_out for chosen in sets.values() for each in chosen)
    assert digit_called("III") == 3
    with pytest.raises(ValueError, match="names no digit"):
        digit_called("dog")


def test_figures_count_what_the_judge_sees():
    sets = erasure_prompts("three", 30, seed=0)
    draw = Painter()
    before = erasure_figures(examine_all(draw, Seer(), sets, seed=5), "three")
    assert len(set(draw.indices)) == 90 and {seed for seed, _ in draw.indices} == {5}
    assert all(figure["rate"] == 1 for figure in before.values())
    assert before["colors_where_asked"]["of"] == 60 and before["synonym trio"]["of"] == 10

    after = erasure_figures(examine_all(Painter(), Seer(blind=[3, 4]), sets, seed=5), "three")
    assert after["plain"]["rate"] == after["synonyms"]["rate"] == 0
    fours = sum(each.digit == 4 for each in sets["others"])
    assert after["others"]["count"] == 30 - fours < 30
    assert after["colors"]["rate"] == after["textures"]["rate"] == 1


def test_findings_can_be_joined_and_narrowed():
    sets = erasure_prompts("three", 8, seed=0)
    first = examine(Painter(), Seer(), sets["plain"], seed=0)
    second = examine(Painter(), Seer(blind=[3]), sets["plain"], seed=1)
    both = join([first, second])
    assert len(both.prompts) == 16 == len(both.images)
    assert proportion(both.right("digit"))["count"] == 8
    red = both.of(lambda prompt: prompt.color == 0)
    assert all(prompt.color == 0 for prompt in red.prompts) and len(red.digit) == len(red.prompts)


def test_quality_separates_unseen_combinations_and_wordings():
    sets = quality_prompts(78, seed=0)
    unseen = held_out_combinations()
    assert all((p.digit, p.color, p.texture) in unseen for p in sets["unseen combinations"])
    held_out = {each.text for each in prompts()}
    assert not held_out & {each.text for each in sets["training wordings"]}
    assert not any("number trio" in each.text for each in sets["training wordings"])

    quality = measure_quality(Painter(), Seer(blind=[0]), images=78, seed=0)
    found = quality["sets"]["held-out wordings"]
    assert found["digit"]["of"] == 78 and found["color"]["rate"] == 1
    assert found["by_digit"]["0"]["rate"] == 0 and found["by_digit"]["7"]["rate"] == 1
    assert sum(each["of"] for each in found["by_kind"].values()) == 78
