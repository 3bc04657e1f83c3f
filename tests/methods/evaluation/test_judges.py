"""Judges against transcriptions of what their packages compute, and their files."""

import pickle

import numpy as np
import pytest

from conceptax.bundled import bundled_model
from conceptax.converters import CheckpointError
from conceptax.converters.files.arrays import read_array
from conceptax.errors import MissingPackageError
from conceptax.methods.evaluation.judges import (
    EXPOSED,
    NUDENET_CLASSES,
    Q16,
    Judge,
    JudgeError,
    LabelJudge,
    Network,
    NudeNet,
    PhraseJudge,
    calibrated,
)
from conceptax.methods.evaluation.preprocessing import bilinear
from conceptax.methods.evaluation.statistics import jackknife_interval, maximum_mean_discrepancy
from conceptax.reporting.instruments import load_classifier, load_clip
from conceptax.reporting.judges import (
    file_record,
    load_label_judge,
    load_nudenet,
    load_q16,
    open_onnx,
    read_labels,
)

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 20, 28, 3), np.uint8)


def detections(rows):
    """What nudenet's `_postprocess` keeps of one image: classes and scores, loop by loop."""
    found = []
    for row in rows:
        if row[4:].max() >= 0.2:
            x, y, w, h = row[:4]
            found.append((row[4:].max(), int(row[4:].argmax()), (x - w / 2, y - h / 2, w, h)))
    found = sorted((each for each in found if each[0] > 0.25), key=lambda each: -each[0])
    kept = []  # cv2.dnn.NMSBoxes(boxes, scores, 0.25, 0.45)
    for score, name, (x, y, w, h) in found:
        for _, _, (a, b, c, d) in kept:
            wide = max(0, min(x + w, a + c) - max(x, a))
            high = max(0, min(y + h, b + d) - max(y, b))
            if wide * high / (w * h + c * d - wide * high) > 0.45:
                break
        else:
            kept.append((score, name, (x, y, w, h)))
    return [(name, score) for score, name, _ in kept]


def nudenet(outputs, seen=None, **options):
    def run(pixels):
        if seen is not None:
            seen.append(pixels)
        return outputs[: len(pixels)]

    return NudeNet(Network(run, (40, 40), {"file": "best.onnx", "sha256": "ab"}), **options)


@pytest.fixture(scope="module")
def outputs():
    """Of 6 images, 60 boxes each, many of which overlap."""
    boxes = RNG.uniform(10, 26, (6, 60, 4))
    scores = RNG.uniform(0, 1, (6, 60, len(NUDENET_CLASSES))) ** 6
    return np.concatenate([boxes, scores], 2).transpose(0, 2, 1).astype(np.float32)


def test_nudenet_detects_what_its_package_does(outputs):
    seen = []
    judge = nudenet(outputs, seen)
    dropped = 0
    for found, rows in zip(judge.detect(IMAGES), outputs.transpose(0, 2, 1), strict=True):
        expected = detections(rows)
        assert list(found.classes) == [name for name, _ in expected]
        np.testing.assert_allclose(found.scores, [score for _, score in expected])
        dropped += (rows[:, 4:].max(1) > 0.25).sum() - len(expected)
    assert dropped > 20
    (pixels,) = seen
    assert pixels.shape == (6, 3, 40, 40) and pixels.max() <= 1
    assert not pixels[:, :, 30:].any() and pixels[:, :, :28].any()  # black below what was 20 of 28


def test_nudenet_counts_exposed_parts_above_its_threshold(outputs):
    best = [
        max((s for c, s in detections(r) if NUDENET_CLASSES[c] in EXPOSED), default=0)
        for r in outputs.transpose(0, 2, 1)
    ]
    judge = nudenet(outputs, threshold=float(np.median(best)))
    assert len(EXPOSED) == 9 and judge.record["classes"] == list(EXPOSED)
    np.testing.assert_allclose(judge.scores(IMAGES), best)
    assert list(judge.sees(IMAGES)) == [each > judge.threshold for each in best]
    assert 0 < judge.sees(IMAGES).sum() < 6 and isinstance(judge, Judge)
    feet = nudenet(outputs, classes=["FEET_EXPOSED"])
    assert (feet.scores(IMAGES) <= judge.scores(IMAGES)).all()
    assert {"sha256", "threshold", "overlap"} <= feet.record.keys()
    with pytest.raises(JudgeError, match=r"received ..HAT"):
        nudenet(outputs, classes=["HAT"])
    with pytest.raises(JudgeError, match=r"gives \[images, 22, boxes\], and this file \[6, 21, 60"):
        nudenet(outputs[:, :21]).sees(IMAGES)


@pytest.mark.parametrize("size", [(7, 33), (40, 12), (20, 28)])
def test_bilinear_is_that_of_pytorch(torch, size):
    given = torch.from_numpy(IMAGES.astype(np.float32)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(given, size, mode="bilinear", align_corners=False)
    received = bilinear(IMAGES, size).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(received, expected.numpy(), atol=1e-3)  # of 255


@pytest.fixture(scope="module")
def clip():
    return load_clip(bundled_model() / "clip", None, "clip")


def test_q16_is_the_nearer_of_two_prompts(torch, clip, tmp_path):
    images = RNG.integers(0, 256, (12, 64, 64, 3), np.uint8)
    features = clip.features(images)
    prompts = (features[:2] + 0.1 * RNG.normal(size=(2, features.shape[1]))).astype(np.float16)
    (tmp_path / "prompts.p").write_bytes(pickle.dumps(prompts))
    judge = load_q16(tmp_path / "prompts.p", clip)
    # Its SimClassifier: cosines times 100, and the larger one's index.
    image, text = (torch.from_numpy(each.astype(np.float32)) for each in (features, prompts))
    similarity = (
        100
        * (image / image.norm(dim=-1, keepdim=True))
        @ (text / text.norm(dim=-1, keepdim=True)).T
    )
    assert list(judge.sees(images)) == (similarity.argmax(1) == 1).tolist()
    assert list(judge.sees(images)[:2]) == [False, True]
    expected = torch.softmax(similarity, -1)[:, 1].numpy()
    np.testing.assert_allclose(judge.scores(images), expected, atol=1e-4)
    assert judge.record["clip"] == "clip" and len(judge.record["sha256"]) == 64
    with pytest.raises(JudgeError, match="tuned for another CLIP"):
        Q16(clip, np.ones((2, 5)), {})


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("order", "CF")
def test_arrays_in_pickles_are_read(tmp_path, protocol, order):
    path, array = tmp_path / "prompts.p", np.asarray(RNG.normal(size=(2, 3)), order=order)
    path.write_bytes(pickle.dumps(array.astype(np.float16, order="K"), protocol))
    np.testing.assert_array_equal(read_array(path), array.astype(np.float16))
    path.write_bytes(pickle.dumps(array.tolist(), protocol))
    np.testing.assert_array_equal(read_array(path), array)
    np.save(path.with_suffix(".npy"), array)
    np.testing.assert_array_equal(read_array(path.with_suffix(".npy")), array)


class Runs:
    def __reduce__(self):
        return print, ("executed",)


def test_pickles_execute_nothing(tmp_path, capsys):
    path = tmp_path / "prompts.p"
    objects = np.asarray([{}, []], object)
    for content, message in (
        (pickle.dumps(Runs()), "names builtins.print, which could run a program"),
        (pickle.dumps(objects), "holds objects"),
        (b"\x80\x05nonsense", "not a file of one array"),
        (pickle.dumps({"a": 1}), "numbers are wanted"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_array(path)
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_array(tmp_path / "none.p")


def colors(pixels):
    """A network whose three outputs are the means of the channels."""
    return pixels.mean((2, 3))


def test_a_label_counts_among_the_likeliest():
    network, labels = Network(colors, None, {"file": "faces.onnx"}), ["red", "green", "blue"]
    images = np.zeros((3, 8, 8, 3), np.uint8)
    images[np.arange(3), ..., np.arange(3)] = 200
    judge = LabelJudge(network, labels, ["green"])
    assert list(judge.sees(images)) == [False, True, False]
    assert judge.record["classes"] == ["green"] and judge.record["top"] == 1
    logits = np.asarray(judge.scores(images))  # of ImageNet's statistics: softmax of the means
    assert logits.min() > 0 and logits.max() < 1 and logits.argmax() == 1
    assert LabelJudge(network, labels, ["green"], top=3).sees(images).all()
    assert not LabelJudge(network, labels, ["green"], threshold=0.999).sees(images).any()
    with pytest.raises(JudgeError, match=r"similar: \['green'\]"):
        LabelJudge(network, labels, ["Gree"])
    with pytest.raises(JudgeError, match="top from 1 to 3"):
        LabelJudge(network, labels, ["green"], top=4)
    with pytest.raises(JudgeError, match=r"gives \[3, 3\]"):
        LabelJudge(network, [*labels, "black"], ["green"]).sees(images)


def test_a_judge_that_sees_nothing_is_refused(outputs):
    found, hits = calibrated(nudenet(outputs), [IMAGES[:4], IMAGES[:2]])
    assert found["sees"]["count"] == hits.sum() > 0
    assert found["sees"]["of"] == 6 and found["kind"] == "NudeNet"
    with pytest.raises(JudgeError, match=r"NudeNet sees the concept in none of the 6 images"):
        calibrated(nudenet(outputs, threshold=1.0), [IMAGES])


def test_a_phrase_is_asked_for():
    judge = load_classifier(bundled_model() / "judge", None, "judge")
    asked = PhraseJudge(judge, "three")
    images = RNG.integers(0, 256, (4, 64, 64, 3), np.uint8)
    assert list(asked.sees(images)) == list(judge.shows(images, ["three"] * 4))
    assert asked.record["classes"] == ["three"]


# ---- ONNX files ----


def field(number, value):
    """One field of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value):
    head, rest = value & 127, value >> 7
    return bytes([head | 128]) + varint(rest) if rest else bytes([head])


def means_onnx(*dims):
    """An ONNX file of one ReduceMean over height and width."""

    def tensor(name, sizes):
        each = (field(1, field(1, s) if isinstance(s, int) else field(2, s)) for s in sizes)
        shape = field(2, b"".join(each))
        return field(1, name) + field(2, field(1, field(1, 1) + shape))

    axes = field(1, "axes") + field(8, 2) + field(8, 3) + field(20, 7)
    keep = field(1, "keepdims") + field(3, 0) + field(20, 2)
    node = field(1, "x") + field(2, "y") + field(4, "ReduceMean") + field(5, axes) + field(5, keep)
    graph = field(1, node) + field(2, "means") + field(11, tensor("x", dims))
    graph += field(12, tensor("y", dims[:2]))
    return field(1, 7) + field(7, graph) + field(8, field(2, 13))


def test_onnx_files_are_run(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "labels.txt").write_text("red\ngreen\nblue\n")
    images = np.zeros((3, 8, 8, 3), np.uint8)
    images[np.arange(3), ..., np.arange(3)] = 200
    for dims in (("batch", 3, 8, 8), (2, 3, "h", "w")):
        file = tmp_path / "means.onnx"
        file.write_bytes(means_onnx(*dims))
        judge = load_label_judge(file, tmp_path / "labels.txt", ["blue"])
        assert list(judge.sees(images)) == [False, False, True]
        record = judge.record
        assert record["sha256"] == file_record(file)["sha256"] and record["versions"]
    with pytest.raises(JudgeError, match="it is another model"):
        load_nudenet(file, 0.45).sees(images)
    file.write_bytes(b"no network")
    with pytest.raises(CheckpointError, match=r"means\.onnx is no ONNX network"):
        open_onnx(file, "the classifier")


def test_what_is_missing_is_told(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"none\.onnx cannot be read"):
        open_onnx(tmp_path / "none.onnx", "the classifier")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"conceptax\[judges\].*--nudenet"):
        load_nudenet(None, 0.45)


def test_labels_are_read_from_lines_and_from_transformers(tmp_path):
    lines, config = tmp_path / "labels.txt", tmp_path / "config.json"
    lines.write_text("a b\n\nc\n")
    config.write_text('{"id2label": {"1": "c", "0": "a b"}}')
    assert read_labels(lines) == read_labels(config) == ["a b", "c"]
    lines.write_text("\n")
    config.write_text('{"id2label": {"2": "c"}}')
    for path, message in ((lines, "holds no labels"), (config, "numbers its labels from 0")):
        with pytest.raises(CheckpointError, match=message):
            read_labels(path)


# ---- statistics ----


def test_the_discrepancy_is_that_of_the_published_program():
    x, y = RNG.normal(size=(7, 5)), 0.3 + RNG.normal(size=(9, 5))
    x, y = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (x, y))

    def kernel(a, b):
        return np.mean([[np.exp(-np.sum((p - q) ** 2) / 200) for q in b] for p in a])

    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert maximum_mean_discrepancy(3 * x, y) == pytest.approx(expected, abs=1e-9)
    assert maximum_mean_discrepancy(x, x) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="one width"):
        maximum_mean_discrepancy(x, y[:, :3])
    with pytest.raises(ValueError, match="NaN"):
        maximum_mean_discrepancy(x * np.nan, y)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = RNG.normal(size=12)
    found = jackknife_interval(lambda rows: float(values[rows].mean()), 12, groups=12)
    half = 1.959964 * values.std(ddof=1) / np.sqrt(12)
    assert found["mean"] == pytest.approx(values.mean()) and found["of"] == 12
    assert found["high"] - found["mean"] == pytest.approx(half)
    assert found["mean"] - found["low"] == pytest.approx(half)
    with pytest.raises(ValueError, match="at least 2 samples"):
        jackknife_interval(lambda rows: 0.0, 1)
