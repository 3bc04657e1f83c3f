"""Samples that are stopped between two steps go on to what they would have been."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest
from flow_toy import save_pipeline

import conceptax
from conceptax.converters import load_pytorch
from conceptax.methods.diffusion.generation import generate, generate_by_steps, split_pipeline
from conceptax.methods.diffusion.kept_samples import (
    KeptSamples,
    KeptSamplesError,
    SamplingInterrupted,
)
from conceptax.methods.diffusion.text_to_image import TextToImage

PROMPTS = ["a red three on brick", "a three"]
STEPS = 4
OPTIONS = {
    "height": 16,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": STEPS,
    "batch_size": 1,
    "seed": 3,
}


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "pipeline"
    save_pipeline(folder, "wan")
    return dataclasses.replace(load_pytorch(folder), max_sequence_length=16)


@pytest.fixture(scope="module")
def whole(pipeline):
    return conceptax.text_to_video(pipeline, PROMPTS, **OPTIONS)


def stopping(after, then):
    """What is told of steps, and does something after so many."""
    told = []

    def on_step(*state):
        told.append(state)
        if len([stage for stage, done, _ in told if stage == "sampling" and done]) == after:
            then()

    return on_step


def raising():
    raise Stop


def stopped(pipeline, folder, after, **options):
    """A run that was killed after so many steps."""
    with pytest.raises(Stop), KeptSamples(folder, every=0) as kept:
        told = stopping(after, raising)
        conceptax.text_to_video(pipeline, PROMPTS, kept=kept, on_step=told, **OPTIONS | options)


@pytest.mark.parametrize("after", [2, STEPS + 1])
def test_what_was_stopped_goes_on_to_the_same_bytes(pipeline, whole, after, tmp_path):
    folder = tmp_path / "kept"
    stopped(pipeline, folder, after)
    files = sorted(file.name for file in folder.iterdir())
    assert files == [*["0000.npz", "0001.npz"][: 1 + after // STEPS], "conceptax_sample.json"]
    told = []
    with KeptSamples(folder) as kept:
        videos = conceptax.text_to_video(
            pipeline, PROMPTS, kept=kept, on_step=lambda *state: told.append(state), **OPTIONS
        )
        assert folder.exists()  # until what was drawn is in its place
    np.testing.assert_array_equal(videos, whole)
    assert not folder.exists()
    assert told[0] == ("sampling", min(after, STEPS), STEPS)
    assert len([1 for stage, *_ in told if stage == "decoding"]) == 4


def test_a_signal_waits_for_the_end_of_the_step(pipeline, whole, tmp_path):
    folder = tmp_path / "kept"
    then = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    with pytest.raises(SamplingInterrupted) as stop, KeptSamples(folder, every=1e9) as kept:
        conceptax.text_to_video(pipeline, PROMPTS, kept=kept, on_step=stopping(2, then), **OPTIONS)
    assert stop.value.code == 128 + signal.SIGTERM and stop.value.step == 3
    assert f"SIGTERM received; stopped after step 3 of {STEPS} and saved" in str(stop.value)
    with KeptSamples(folder) as kept:
        videos = conceptax.text_to_video(pipeline, PROMPTS, kept=kept, **OPTIONS)
    np.testing.assert_array_equal(videos, whole)


def test_other_settings_are_refused_by_name(pipeline, tmp_path):
    folder = tmp_path / "kept"
    stopped(pipeline, folder, 1)
    drawer = TextToImage.from_pipeline(pipeline)
    other = jax.tree.map(lambda leaf: leaf + 1, drawer.params["denoiser"])
    edited = dataclasses.replace(drawer, params={**drawer.params, "denoiser": other})
    for draw, changed, message in (
        (drawer, {"num_inference_steps": 5}, r"num_inference_steps=4 \(now 5\)"),
        (drawer, {"guidance_scale": 2.0, "seed": 4}, r"scale=\[5.0\] .*; seed=3 \(now 4"),
        (drawer, {"latents": np.zeros((2, 3, 8, 16, 4), np.float32)}, "latents=null"),
        (edited, {}, "model="),
    ):
        with pytest.raises(KeptSamplesError, match=message), KeptSamples(folder) as kept:
            draw(PROMPTS, kept=kept, **OPTIONS | changed)
    (folder / "0000.npz").write_bytes(b"PK")
    with (
        pytest.raises(KeptSamplesError, match=r"0000\.npz is damaged"),
        KeptSamples(folder) as kept,
    ):
        drawer(PROMPTS, kept=kept, **OPTIONS)
    (folder / "conceptax_sample.json").write_text("{")
    with pytest.raises(KeptSamplesError, match=r"is damaged .*to begin anew"):
        KeptSamples(folder).claim({})


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(KeptSamplesError, match="keeps no sample"), KeptSamples(tmp_path) as kept:
        kept.claim({})
    with KeptSamples(tmp_path):
        pass
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_step_by_step_is_the_whole_program(pipeline, whole):
    drawer = TextToImage.from_pipeline(pipeline)
    static, params = split_pipeline(pipeline)
    sampler = drawer._sampler(None, 2, 0.0, (3, 8, 16, 4))
    noise = jax.random.normal(jax.random.key(0), (1, 3, 8, 16, 4))
    ids, negative = pipeline.tokenize(PROMPTS[:1]), pipeline.tokenize([""])
    given = (static, params, ids, negative, noise, sampler, 5.0)
    one = jax.jit(generate, static_argnums=0)(*given)
    np.testing.assert_allclose(generate_by_steps(*given), one, atol=1e-5)
