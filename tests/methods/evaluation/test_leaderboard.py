"""Suites end to end on tiny models: figures, resuming, devices, the noise of published seeds."""

import dataclasses
import json

import numpy as np
import pytest
from erasing_toy import moved, tiny_pipeline
from flax import nnx

from conceptax.methods.evaluation import leaderboard
from conceptax.methods.evaluation.composition import Composed, compositions, shows_composed
from conceptax.methods.evaluation.judges import JudgeError, LabelJudge, Network
from conceptax.methods.evaluation.kept_images import KeptImages
from conceptax.methods.evaluation.leaderboard import SuiteConfig, Utility, evaluate_suite, tenth
from conceptax.methods.evaluation.preprocessing import Preprocessing
from conceptax.methods.evaluation.published import SUITES
from conceptax.methods.evaluation.statistics import proportion
from conceptax.methods.evaluation.torch_noise import torch_latents, torch_normal
from conceptax.methods.evaluation.unsafe_prompts import UnsafePrompt
from conceptax.methods.glyphs.evaluation import glyphs_compositions
from conceptax.methods.red_team.unlearn_diff_atk import UnlearnDiffAtkConfig
from conceptax.methods.training import make_mesh

CONFIG = SuiteConfig(
    steps=2,
    batch_size=2,
    attack=UnlearnDiffAtkConfig(tokens=2, iterations=2, times=3, learning_rate=0.5),
)
PROMPTS = [
    UnsafePrompt(f"a {color} three", (), None if n == 3 else 40 + n, 7.5 if n % 2 else 3.0)
    for n, color in enumerate(("red", "blue", "green", "gray", "red", "blue"))
]


class Dark:
    """Sees the concept in images that are dark enough."""

    def __init__(self, threshold):
        self.threshold = threshold

    @property
    def record(self):
        return {"kind": "darkness", "threshold": self.threshold}

    def scores(self, images):
        return (255 - images.mean((1, 2, 3))).astype(np.float32)

    def sees(self, images):
        return self.scores(images) > self.threshold


@pytest.fixture(scope="module")
def pair():
    original = tiny_pipeline()
    graphdef, params = nnx.split(original.unet)
    unet = nnx.merge(graphdef, moved(nnx.to_pure_dict(params), 0.05))
    return original, dataclasses.replace(original, unet=unet)


@pytest.fixture(scope="module")
def run(pair, tmp_path_factory):
    """A whole run, its folder, and the judge, which sees some images and not others."""
    folder = tmp_path_factory.mktemp("suite")
    free = dataclasses.replace(CONFIG, attack=None)
    evaluate_suite(*pair, PROMPTS, Dark(0), free, folder)
    scores = Dark(0).scores(KeptImages(folder / "edited").read(range(6)))
    judge = Dark(float(np.sort(scores)[3:5].mean()))
    lines = []
    return folder, judge, evaluate_suite(*pair, PROMPTS, judge, CONFIG, folder, report=lines.append)


def test_the_line_counts_what_was_judged(run):
    folder, judge, found = run
    pre = judge.sees(KeptImages(folder / "edited").read(range(6)))
    assert found["line"]["Pre-ASR"] == proportion(pre) and pre.sum() == 2
    attacks = [each["attack"] for each in found["prompts"]]
    assert [each is None for each in attacks] == list(pre)  # those are not attacked
    post = pre | [each is not None and each["success"] for each in attacks]
    assert found["line"]["Post-ASR"] == proportion(post)
    for n, each in enumerate(attacks):
        if each is not None and each["success"]:
            assert judge.sees(KeptImages(folder / "attacked").read([n])).all()
        elif each is not None:
            assert each["times"] == 3 and len(each["tokens"]) == 2
    assert found["judge"]["sees"]["of"] == 6 and found["judge"]["threshold"] == judge.threshold
    assert [each["seed"] for each in found["prompts"]] == [40, 41, 42, 3, 44, 45]
    assert [each["guidance"] for each in found["prompts"][:2]] == [3.0, 7.5]
    json.dumps(found)


def test_a_run_that_was_killed_goes_on(pair, run, tmp_path, monkeypatch):
    _, judge, expected = run
    kept, written = leaderboard._KeptSearch.write, []

    def killed(self, *given):
        kept(self, *given)
        written.append(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(leaderboard._KeptSearch, "write", killed)
    for _ in range(40):  # killed after every round of the attack
        try:
            found = evaluate_suite(*pair, PROMPTS, judge, CONFIG, tmp_path)
            break
        except KeyboardInterrupt:
            images = tmp_path / "edited" / "2_0.png"
            images.unlink(missing_ok=True)  # and one image was not complete
    assert len(written) > 2
    assert found == expected


def test_devices_share_the_work(pair, run, tmp_path):
    _, judge, expected = run
    config = dataclasses.replace(CONFIG, batch_size=1)
    mesh = make_mesh(2, devices=None)
    found = evaluate_suite(*pair, PROMPTS, judge, config, tmp_path, mesh=mesh)
    for one, other in zip(found["prompts"], expected["prompts"], strict=True):
        for name in ("seed", "guidance", "original", "edited"):
            assert one[name] == other[name]
        assert (one["attack"] is None) == (other["attack"] is None)


def test_a_blind_judge_loses_nothing(pair, run):
    folder, _, _ = run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    with pytest.raises(JudgeError, match=r"darkness sees the concept in none of the 6.*are kept"):
        evaluate_suite(*pair, PROMPTS, Dark(256), CONFIG, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")} == before
    with pytest.raises(ValueError, match="at least 2 prompts"):
        evaluate_suite(*pair, PROMPTS[:1], Dark(0), CONFIG, folder)


def test_prompts_without_room_are_left_out(pair, run, tmp_path):
    free = dataclasses.replace(CONFIG, attack=None)
    long = UnsafePrompt(" ".join(["red"] * 40))
    lines = []
    config = dataclasses.replace(
        CONFIG, attack=dataclasses.replace(CONFIG.attack, times=1, iterations=2)
    )
    found = evaluate_suite(
        *pair, [PROMPTS[0], long, PROMPTS[1]], Dark(0), config, tmp_path, report=lines.append
    )
    assert found["left_out"] == [1] and len(found["prompts"]) == 2
    assert any("no room for the prefix" in line for line in lines)
    with pytest.raises(ValueError, match="2 others are needed"):
        evaluate_suite(*pair, [PROMPTS[0], long], Dark(0), config, tmp_path)
    assert free.attack is None


class Eye:
    """Features of an image: its channels' means, and their squares."""

    name = features_title = "means"

    def features(self, images):
        means = np.stack([np.asarray(image).mean((0, 1)) for image in images]) / 255
        return np.concatenate([means, means**2], 1).astype(np.float32)

    def text_features(self, texts):
        return np.asarray([[len(text) % 7, 1, 2, 3, 1, 1] for text in texts], np.float32)


def test_quality_is_measured_of_captions(pair, tmp_path):
    free = dataclasses.replace(CONFIG, attack=None)
    captions = [
        UnsafePrompt(f"a {each} seven", (), n) for n, each in enumerate(("red", "blue") * 4)
    ]
    loads = [lambda n=n: np.full((4, 5, 3), 20 * n + 10, np.uint8) for n in range(5)]
    for reference in ((), loads):
        given = Utility(captions, Eye(), Eye(), reference)
        folder = tmp_path / str(len(reference))
        found = evaluate_suite(*pair, PROMPTS[:2], Dark(0), free, folder, utility=given)
        assert found["line"]["FID"]["of"] == 8 and found["line"]["FID"]["mean"] > 0
        assert found["line"]["FID"]["low"] < found["line"]["FID"]["high"]
        assert found["utility"]["cmmd"]["mean"] > 0
        scores = found["utility"]["clip_score"]
        assert scores["before"]["mean"] != scores["after"]["mean"]
        assert found["line"]["CLIP-Score"] == scores["after"]
        told = "5 images" if reference else "original model"
        assert told in found["utility"]["compared_with"]
        assert len(list((folder / "captions").iterdir())) == 8


def test_composition_is_one_more_column(pair, tmp_path):
    class Attributes:
        """Every image shows what is red."""

        def among(self, phrases):
            return self

        def shows(self, images, phrases):
            return np.asarray(["red" in phrase for phrase in phrases])

        record, features_title = {}, ""

        def features(self, images):
            return np.ones((len(images), 2))

    asked = [
        Composed("a red three", "attributes", (), ("red", "red three")),
        Composed("a blue three", "attributes", (), ("blue",)),
        Composed("red and blue", "colors", (), ("red", "blue")),
    ]
    free = dataclasses.replace(CONFIG, attack=None)
    given = Utility(composed=asked, composer=Attributes())
    found = evaluate_suite(*pair, PROMPTS[:2], Dark(0), free, tmp_path, utility=given)
    assert found["line"]["Composition"]["count"] == 1 and found["line"]["Composition"]["of"] == 3
    assert found["composition"]["kinds"]["colors"]["before"]["count"] == 0


def test_compositions_have_foils_of_the_same_words():
    found = compositions(40, 0, without=["a red car"])
    kinds = [each.kind for each in found]
    assert all(kinds.count(kind) == 10 for kind in ("colors", "counts", "objects", "positions"))
    assert len(set(found)) == 40
    for each in found:
        assert "red" not in each.text.split() and "car" not in each.text.split()
        assert each.text not in each.foils and each.foils
    with pytest.raises(ValueError, match="at least 2"):
        compositions(4, 0, colors=("red",))


def test_the_glyphs_world_is_composed_without_what_was_erased():
    found = glyphs_compositions(["three", "brick"], 18, 0)
    digits = [each.parts[0] for each in found]
    assert len(set(digits)) == 9 and all(digits.count(each) == 2 for each in digits)
    for each in found:
        digit, color, texture = each.parts
        assert "three" not in (digit, each.text) and texture != "brick"
        assert color in each.text and texture in each.text
    with pytest.raises(ValueError, match="van gogh"):
        glyphs_compositions(["van gogh"], 4, 0)


def test_a_clip_tells_a_prompt_from_its_foils():
    from conceptax.bundled import bundled_model
    from conceptax.reporting.instruments import load_classifier, load_clip

    clip = load_clip(bundled_model() / "clip", None, "clip")
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    asked = [Composed("a red three", "colors", ("a blue three",), ("red",))] * 3
    seen, read = clip.features(images), clip.text_features(["a red three", "a blue three"])
    read = read / np.linalg.norm(read, axis=1, keepdims=True)
    expected = seen @ read[0] > seen @ read[1]
    assert list(shows_composed(clip, images, asked)) == list(expected)
    classifier = load_classifier(bundled_model() / "clip", None, "clip")
    assert list(shows_composed(classifier, images, asked)) == list(expected)


@pytest.mark.parametrize("count", [16, 23, 40, 4 * 8 * 8])
@pytest.mark.parametrize("seed", [0, 3842, 2**33 + 5])
def test_noise_is_that_of_pytorch(torch, count, seed):
    torch.manual_seed(seed)
    expected = torch.randn(count).numpy()
    np.testing.assert_allclose(torch_normal(seed, count), expected, atol=2e-6)


def test_latents_are_those_of_a_pipeline(torch):
    torch.manual_seed(982)
    expected = torch.randn((1, 4, 6, 8))[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(torch_latents(982, (6, 8, 4)), expected, atol=2e-6)
    with pytest.raises(ValueError, match="at least 16"):
        torch_normal(0, 4)


def test_images_are_kept_as_soon_as_they_are_drawn(tmp_path):
    kept, drawn = KeptImages(tmp_path / "images"), []

    def draw(numbers):
        if 3 in numbers and not drawn:
            raise KeyboardInterrupt
        return np.stack([np.full((2, 3, 3), n, np.uint8) for n in numbers])

    with pytest.raises(KeyboardInterrupt):
        kept.complete(5, 2, draw)
    assert kept.missing(5) == [2, 3, 4]
    drawn.append(True)
    told = []
    kept.complete(5, 2, draw, lambda done, of: told.append((done, of)))
    assert told == [(2, 3), (3, 3)] and not kept.missing(5)
    assert [batch.shape[0] for batch in kept.batches(5, 3)] == [3, 2]
    assert (kept.read([4, 1])[:, 0, 0, 0] == [4, 1]).all()
    assert {path.name for path in kept.folder.iterdir()} == {f"{n}_0.png" for n in range(5)}


def test_published_lines_are_percentages_of_their_prompts():
    for name, suite in SUITES.items():
        for line in suite.lines:
            assert 0 <= line.pre_asr <= line.post_asr <= 100, (name, line)
            assert suite.source is not None and suite.prompts is not None
            assert line.fid > 10 and 0.1 < line.clip_score < 0.4
    assert len(SUITES["unlearndiffatk/nudity"].lines) == 11
    assert tenth(range(142)) == list(range(0, 142, 10)) and tenth(range(3)) == [0, 1]


def test_a_label_judge_judges_a_suite(pair, tmp_path):
    network = Network(lambda pixels: pixels.mean((2, 3)), None, {"file": "colors.onnx"})
    plain = Preprocessing(None, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    judge = LabelJudge(network, ["red", "green", "blue"], ["red", "green"], preprocessing=plain)
    free = dataclasses.replace(CONFIG, attack=None)
    found = evaluate_suite(*pair, PROMPTS, judge, free, tmp_path)
    assert found["line"]["Post-ASR"] is None and found["judge"]["classes"] == ["red", "green"]
