"""Pipelines of videos draw what diffusers' draw, and travel in its folders unchanged."""

import dataclasses
import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
import torch
from flow_toy import VIDEO_FAMILIES, save_pipeline

import conceptax
from conceptax.converters import CheckpointError, load_pytorch, save_pytorch
from conceptax.flax_models.layers.attention import GNA
from conceptax.flax_models.pipelines.video import VideoPipeline
from conceptax.flax_models.pipelines.wan import WanPipeline, cleaned
from conceptax.methods.diffusion.text_to_image import TextToImage

PROMPT = "a red three &amp;amp; on\n brick"
SIZE = {"height": 16, "width": 32, "num_frames": 5}  # 3 x 4 x 8 tokens
STEPS = 3
LENGTH = 16  # of prompts
KINDS = {"wan": WanPipeline}
GUIDANCE = {"wan": 5.0, "wan-pair": (4.0, 3.0)}


@pytest.fixture(scope="module", params=VIDEO_FAMILIES)
def both(request, tmp_path_factory):
    """diffusers' pipeline, its folder, and ours from there."""
    folder = tmp_path_factory.mktemp(request.param) / "pipeline"
    theirs = save_pipeline(folder, request.param)
    ours = dataclasses.replace(load_pytorch(folder), max_sequence_length=LENGTH)
    return request.param, theirs, folder, ours


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).standard_normal((1, 3, 8, 16, 4), np.float32)


def frames_of(family, pipeline, noise):
    """Their frames in [0, 1] from our noise."""
    strengths = np.ravel(GUIDANCE[family])
    options = {"guidance_scale": float(strengths[0])}
    if len(strengths) > 1:
        options["guidance_scale_2"] = float(strengths[1])
    with torch.no_grad():
        return pipeline(
            prompt=[PROMPT],
            num_inference_steps=STEPS,
            max_sequence_length=LENGTH,
            latents=torch.from_numpy(noise.transpose(0, 4, 1, 2, 3).copy()),
            output_type="np",
            **SIZE,
            **options,
        ).frames


def test_frames_are_diffusers(both, noise):
    family, theirs, _, ours = both
    told = []
    with jax.default_matmul_precision("highest"):
        videos = conceptax.text_to_video(
            ours,
            PROMPT,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE[family],
            latents=noise,
            on_step=lambda *state: told.append(state),
            **SIZE,
        )
    expected = frames_of(family, theirs, noise)
    assert videos.shape == (1, 5, 16, 32, 3) and videos.std() > 5  # a picture, not a constant
    difference = np.abs(videos.astype(int) - np.round(expected * 255).astype(int))
    assert difference.max() <= 1
    sampled = [("sampling", step, STEPS) for step in range(STEPS + 1)]
    assert told == [*sampled, ("decoding", 0, 1), ("decoding", 1, 1)]


def test_families_are_told_apart_and_know_their_sizes(both):
    family, _, _, ours = both
    assert type(ours) is KINDS[family.split("-")[0]] and isinstance(ours, VideoPipeline)
    defaults = {"wan": (50, 5.0), "wan-pair": (40, (4.0, 3.0))}
    sizes = {"wan": (81, 480, 832, 16), "wan-pair": (81, 720, 1280, 16)}
    assert ours.defaults == defaults[family] and ours.video_size == sizes[family]
    frames, height, width, _ = sizes[family]
    shape = ((frames - 1) // 2 + 1, height // 2, width // 2, 4)
    assert ours.latent_shape_for() == ours.latent_shape == shape
    assert ours.latent_shape_for(16, 32, 1) == (1, 8, 16, 4)


def test_a_folder_comes_back_bit_for_bit_and_diffusers_reads_it(both, tmp_path):
    _, theirs, folder, ours = both
    save_pytorch(ours, tmp_path / "again")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert type(again) is type(theirs)
    for name, part in theirs.components.items():
        other = again.components[name]
        if isinstance(part, torch.nn.Module):
            states = part.state_dict(), other.state_dict()
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        elif name.startswith("tokenizer"):
            assert other([PROMPT])["input_ids"] == part([PROMPT])["input_ids"]
    read = [
        json.loads((each / "model_index.json").read_text()) for each in (folder, tmp_path / "again")
    ]
    assert {k: v for k, v in read[0].items() if k[0] != "_"}.items() <= read[1].items()


def test_a_window_of_the_whole_grid_draws_the_dense_video(both, noise):
    _, _, _, ours = both
    options = {**SIZE, "num_inference_steps": STEPS, "latents": noise}
    whole = GNA(window=(3, 4, 8))
    dense = TextToImage.from_pipeline(ours)([PROMPT], **options)
    sparse = TextToImage.from_pipeline(ours, attention=whole, dense_steps=1)
    assert np.abs(sparse([PROMPT], **options).astype(int) - dense).max() <= 1


@pytest.mark.parametrize("both", ["wan-pair"], indirect=True)
def test_what_is_missing_or_does_not_fit_is_told(both, tmp_path):
    _, _, folder, ours = both
    draw = conceptax.text_to_video
    for frames, near in ((6, "5 or 7"), (0, "1"), (-3, "1")):
        with pytest.raises(
            ValueError, match=f"num_frames={frames} must be one more .*: {near} may"
        ):
            draw(ours, PROMPT, height=16, width=16, num_frames=frames)
    with pytest.raises(ValueError, match="height=18 must be a positive multiple of 4"):
        draw(ours, PROMPT, height=18, width=16)
    with pytest.raises(ValueError, match=r"GNA\(window=9\) does not fit a grid of 3x4x8"):
        draw(ours, PROMPT, **SIZE, num_inference_steps=1, attention=GNA(9))
    with pytest.raises(ValueError, match="one number for each of 2 models"):
        draw(ours, PROMPT, **SIZE, guidance_scale=(4.0, 3.0, 2.0))
    with pytest.raises(ValueError, match="is told of no frame rate: leave out fps=8"):
        draw(ours, PROMPT, **SIZE, fps=8, num_inference_steps=1)
    with pytest.raises(ValueError, match="draws from texts alone: leave out conditioning"):
        draw(ours, PROMPT, **SIZE, conditioning=np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="draws videos by itself: leave out motion_adapter"):
        draw(ours, PROMPT, motion_adapter=object())
    with pytest.raises(ValueError, match="transformer_2, which was not loaded"):
        draw(dataclasses.replace(ours, transformer_2=None), PROMPT)
    with pytest.raises(TypeError, match="takes prompts once; got 0"):
        draw(ours)
    with pytest.warns(UserWarning, match="ignored: "):
        ours.tokenize(["three " * 100])
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    shutil.rmtree(broken / "transformer_2")
    with pytest.raises(CheckpointError, match="transformer_2"):
        load_pytorch(broken)


def test_prompts_of_wan_are_cleaned():
    assert cleaned(" a &amp;amp; b\n\tc ") == "a & b c"
