"""`conceptax sample` with pipelines of videos, tiny ones of the real classes."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from flow_toy import save_pipeline
from PIL import Image

from conceptax.cli import main
from conceptax.cli.sample import _video_family
from conceptax.reporting.videos import read_frames

PROMPT = "a red three on brick"
# Killed, as the system kills, after two steps.
KILLED = """
import os, signal, sys
from conceptax.methods.diffusion import kept_samples
kept_samples._SECONDS = 0
save = kept_samples.Kept.save
def kill(self, carry, step, total):
    save(self, carry, step, total)
    if step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
kept_samples.Kept.save = kill
from conceptax.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "pipeline"
    save_pipeline(folder, "wan-pair")
    return folder


@pytest.fixture(scope="module")
def command(folder):
    drawn = ["--frames", "5", "--size", "16x32", "--steps", "4", "--prompt", PROMPT]
    return ["sample", "--model", str(folder), *drawn]


def run(capsys, *arguments):
    status = main([str(each) for each in arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def clip(command, tmp_path_factory):
    """What a run that nothing stopped writes."""
    file = tmp_path_factory.mktemp("clip") / "clip.gif"
    assert main([*command, "--output", str(file)]) == 0
    assert os.listdir(file.parent) == ["clip.gif"]
    return file


def test_a_killed_sample_goes_on_to_the_same_bytes(command, clip, tmp_path, capsys):
    file = tmp_path / "clip.gif"
    arguments = [sys.executable, "-c", KILLED, *command, "--output", file]
    killed = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(os.listdir(tmp_path / ".clip.gif.sampling")) == [
        "0000.npz",
        "conceptax_sample.json",
    ]
    status, _, err = run(capsys, *command, "--seed", 7, "--output", file)
    assert status == 1 and "with other settings: --seed 0 (now 7)" in err
    status, out, err = run(capsys, *command, "--output", file)
    assert status == 0, err
    assert "going on after step 2 of 4" in err
    assert f"{file}: 1 videos of 5 frames of 16x32 pixels" in out
    assert file.read_bytes() == clip.read_bytes()
    assert os.listdir(tmp_path) == ["clip.gif"]


def test_a_folder_holds_both_files_and_frames(command, clip, tmp_path, capsys):
    pytest.importorskip("imageio_ffmpeg")
    out = tmp_path / "out"
    status, _, err = run(capsys, *command, "--png", "--fps", 5, "--output", out)
    assert status == 0, err
    name = "0000_a-red-three-on-brick"
    record = json.loads((out / "sample.json").read_text())
    assert record["files"] == dict.fromkeys((f"{name}.gif", f"{name}.mp4", name), PROMPT)
    assert (record["frames"], record["fps"], record["height"]) == (5, 5, 16)
    frames = read_frames(out / name)
    assert frames.shape == (5, 16, 32, 3)
    for suffix, most in ((".gif", 12), (".mp4", 50)):  # 256 colors; colors of 2 x 2 pixels
        other = read_frames(out / f"{name}{suffix}")
        assert other.shape == frames.shape
        assert np.abs(other.astype(int) - frames).mean() < most
    with Image.open(out / f"{name}.gif") as image:
        assert image.info["duration"] == 200


def test_windows_are_checked_before_anything_is_drawn(command, tmp_path, capsys):
    out = tmp_path / "a.gif"
    status, _, err = run(
        capsys, *command, "--attention", "window=3x4x8 stride=1x2x4", "--output", out
    )
    assert status == 0, err
    status, _, err = run(
        capsys, *command, "--attention", "wan-720p", "--output", tmp_path / "b.gif"
    )
    assert status == 1 and (
        "a window of 12x24x24 at stride 4x8x8 (wan-720p) does not fit a layout of 3x4x8 tokens; "
        "the nearest that it fits is 12x24x24" in err
    )


def test_unfit_wishes_are_told(command, folder, tmp_path, capsys):
    out = ["--output", tmp_path / "a.gif"]
    model = ["sample", "--model", folder, "--prompt", PROMPT]
    for arguments, message in (
        ([*model, *out, "--frames", 6], "--frames 6 must be one more than a multiple of 2"),
        ([*model, *out, "--size", "17"], "--size takes height and width in pixels"),
        ([*model, *out, "--size", "16x32", "--width", 8], "goes without --height and --width"),
        ([*model, *out, "--size", "18x32"], "--height 18 must be a positive multiple of 4"),
        ([*model, *out, "--batch-size", 2], "by itself, one by one: leave out --batch-size"),
        (
            [*model, *out, "--devices", 2],
            "2 devices cannot share the 41 frames of these latents alike: take 40 or 42, 79 or 83 "
            "frames of video, or another number of devices.",
        ),
        ([*model, *out, "--devices", 99], "--devices accepts 1 to 8 here, received 99"),
        ([*model, *out, "--png"], "--png is for an --output that is a folder"),
        ([*model, *out, "--image", folder / "x.png"], "draws from texts alone: leave out --image"),
        ([*model, "--output", tmp_path / "a.png"], "a .gif or .mp4 file"),
        ([*model, *out, "--dense-steps", 1], "--dense-steps is for an --attention"),
        (
            ["sample", "--prompt", PROMPT, "--guidance-2", 3, "--output", tmp_path / "a.png"],
            "--guidance-2 is for two models that take turns",
        ),
    ):
        status, _, err = run(capsys, *arguments)
        assert status == 1 and message in err, (message, err)
    assert not list(tmp_path.iterdir())


def test_inspect_and_verify_name_the_pipeline(folder, tmp_path, capsys):
    assert _video_family(folder).__name__ == "WanPipeline"
    status, out, err = run(capsys, "inspect", folder)
    assert status == 0 and "pipeline (WanPipeline)" in out, err
    assert "transformer_2: WanTransformer3DModel" in out
    status, out, err = run(capsys, "convert", folder, tmp_path / "out", "--verify")
    assert status == 0 and "WanPipeline" in out, err
    for name in ("transformer", "transformer_2", "vae", "text_encoder"):
        assert f"{name}: largest relative difference between JAX and PyTorch: " in out
    assert "not compared" not in out
