"""`conceptax evaluate --suite`, from prompt files to the line beside the published ones."""

import csv
import json

import numpy as np
import pytest
from erasing_toy import moved, tiny_pipeline
from flax import nnx

from conceptax.bundled import bundled_model
from conceptax.cli import main
from conceptax.converters import save_pytorch
from conceptax.methods.evaluation.published import SUITES
from conceptax.reporting import suite as reporting_suite


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model, with a CLIP as its classifier, another UNet for it, and prompt files."""
    folder = tmp_path_factory.mktemp("models")
    original = tiny_pipeline()
    save_pytorch(original, folder / "original")
    graphdef, params = nnx.split(original.unet)
    save_pytorch(nnx.merge(graphdef, moved(nnx.to_pure_dict(params), 0.05)), folder / "edited")
    rows = [f"{n},a {each} three,{90 + n},7.5" for n, each in enumerate(("red", "blue") * 6)]
    lines = ["case_number,prompt,evaluation_seed,evaluation_guidance", *rows]
    (folder / "church.csv").write_text("\n".join(lines) + "\n")
    (folder / "captions.txt").write_text("a seven on grass\na two on brick\na one\n")
    return folder


def evaluate(capsys, *arguments):
    status = main(["evaluate", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_a_suite_ends_in_one_line(models, tmp_path, capsys, monkeypatch):
    clip = bundled_model() / "clip"
    command = [
        *("--suite", "unlearndiffatk/church", "--prompts", models / "church.csv"),
        *("--original", models / "original", "--edited", models / "edited"),
        *("--judge", "phrase", "--concept", "three", "--classifier", clip, "--clip", clip),
        *("--captions", models / "captions.txt", "--composition", 4, "--steps", 2),
        *("--tokens", 2, "--iterations", 2, "--times", 2, "--batch-size", 1),
        *("--output", tmp_path / "out"),
    ]
    seen = []

    class Sees:
        """CLIP of glyphs knows no noise: the judge is one that sees half of the images."""

        def __init__(self, classifier, phrase):
            seen.append((classifier, phrase))

        record = {"kind": "every second image", "threshold": 0.5}

        def scores(self, images):
            return self.sees(images).astype(np.float32)

        def sees(self, images):
            return images.sum((1, 2, 3)) % 2 == 0

    monkeypatch.setattr(reporting_suite, "PhraseJudge", Sees)
    status, out, err = evaluate(capsys, *command)
    assert status == 0, err
    assert seen[0][1] == "three"
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    line = record["line"]
    assert line["Pre-ASR"]["of"] == 12 and line["Post-ASR"]["rate"] >= line["Pre-ASR"]["rate"]
    assert line["FID"] is None and line["CLIP-Score"]["of"] == 3 and line["Composition"]["of"] == 4
    assert record["prompts"][3]["seed"] == 93 and record["attack"]["times"] == 2
    assert "holds 12 prompts, and the published file 50" in " ".join(err.split())
    assert len(record["prompts_file"]["sha256"]) == 64 and record["versions"]["jax"]
    assert record["published"]["lines"][0]["method"] == "AdvUnlearn"

    (last,) = [each for each in out.splitlines() if each.startswith("UnlearnDiffAtk, church: ")]
    assert "Pre-ASR" in last and "composition" in last
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in out and "| AdvUnlearn | 0 % | 6 % | 18.06 | 0.305 | – |" in table
    assert "every second image" in table and SUITES["unlearndiffatk/church"].source in table
    (row,) = csv.DictReader((tmp_path / "out" / "leaderboard.csv").read_text().splitlines())
    assert float(row["Pre-ASR"]) == pytest.approx(100 * line["Pre-ASR"]["rate"], abs=0.005)
    assert row["FID"] == "-1" and row["Unlearned_Methods"] == "edited"
    images = tmp_path / "out" / "images"
    assert len(list((images / "edited").glob("*_0.png"))) == 12
    assert not (tmp_path / ".out.suite").exists()

    # A tenth of it, without the attack; then what is kept is of another run.
    quick = [*command, "--quick", "--no-attack", "--force"]
    monkeypatch.setattr(Sees, "sees", lambda self, images: np.zeros(len(images), bool))
    status, out, err = evaluate(capsys, *quick)
    assert status == 1 and "sees the concept in none of the 2 images" in " ".join(err.split())
    assert (tmp_path / ".out.suite" / "original" / "0_0.png").is_file()
    assert (tmp_path / "out" / "metrics.json").is_file()
    status, _, err = evaluate(capsys, *quick, "--steps", 3)
    assert status == 1 and "--steps (2 before, 3 now)" in " ".join(err.split())
    monkeypatch.setattr(Sees, "sees", lambda self, images: np.ones(len(images), bool))
    status, out, err = evaluate(capsys, *quick)
    assert status == 0, err
    assert "2 of them kept from before" not in err and "Post-ASR" not in out.splitlines()[-2]
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert record["line"]["Post-ASR"] is None and record["line"]["Pre-ASR"]["rate"] == 1


def test_what_a_suite_lacks_is_told(models, tmp_path, capsys):
    church = ["--suite", "unlearndiffatk/church", "--output", tmp_path / "out"]
    given = [*church, "--prompts", models / "church.csv", "--original", models / "original"]
    whole = [*given, "--edited", models / "edited"]
    for arguments, message in (
        (["--suite", "church", "--output", tmp_path / "out"], "known are unlearndiffatk/nudity"),
        (church, "published at https://github.com/OPTML-Group"),
        (given, "pass the edited model with --edited"),
        (whole, "is judged by label, a classifier in an ONNX file (--onnx)"),
        ([*whole, "--judge", "q16"], "--judge q16, which takes its file of prompts (--q16)"),
        ([*whole, "--judge", "phrase"], "--judge phrase, which takes a --classifier"),
        ([*whole, "--composition", -1], "--composition takes a number of images"),
    ):
        status, _, err = evaluate(capsys, *arguments)
        assert status == 1 and message in " ".join(err.split()), (message, err)
    status, _, err = evaluate(capsys, "--edited", models / "edited", "--q16", "prompts.p")
    assert status == 2 and "--q16 is a setting of --suite" in " ".join(err.split())


def test_help_of_a_suite_names_what_it_takes(capsys):
    status, out, _ = evaluate(capsys, "--suite", "i2p", "--help-all")
    assert status == 0 and "--nudenet" in out and "--references" in out
    assert "--suite" in evaluate(capsys, "--help")[1]
