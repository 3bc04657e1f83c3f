"""Pipelines of videos draw what diffusers' draw, and travel in its folders unchanged."""

import dataclasses
import json
import shutil
import sys
from typing import Any, NamedTuple

import diffusers
import jax
import numpy as np
import pytest
import torch
from flax import nnx
from flow_toy import VIDEO_FAMILIES, safety_checker, save_pipeline
from PIL import Image

import conceptax
from conceptax.converters import CheckpointError, load_pytorch, save_pytorch
from conceptax.flax_models.layers.attention import GNA
from conceptax.flax_models.pipelines.cosmos_text_to_world import CosmosTextToWorldPipeline
from conceptax.flax_models.pipelines.cosmos_video_to_world import CosmosVideoToWorldPipeline
from conceptax.flax_models.pipelines.hunyuan_video import HunyuanVideoPipeline
from conceptax.flax_models.pipelines.video import VideoPipeline
from conceptax.flax_models.pipelines.wan import WanPipeline, cleaned
from conceptax.flax_models.unet_motion import MotionAdapter, MotionAdapterConfig
from conceptax.methods import memory
from conceptax.methods.diffusion import text_to_image
from conceptax.methods.diffusion.generation import image_keys
from conceptax.methods.diffusion.text_to_image import TextToImage

PROMPT = "a red three &amp;amp; on\n brick"
STEPS = 3
LENGTH = 16  # of prompts


class Expected(NamedTuple):
    """What is particular about a family, and its toy."""

    kind: type
    defaults: tuple[Any, Any]
    size: tuple[int, int, int, int]
    factor: int = 4  # pixels for a latent along each side, and frames
    guidance: Any = 5.0
    evaluations: int = STEPS

    @property
    def drawn(self) -> dict[str, int]:
        """Three latent frames of 4 x 8 tokens, or of 2 x 4."""
        return {"height": 16, "width": 32, "num_frames": 2 * self.factor + 1}


COSMOS = {"defaults": (36, 7.0), "size": (121, 704, 1280, 30), "guidance": 7.0, "evaluations": 2}
EXPECTED = {
    "wan": Expected(WanPipeline, (50, 5.0), (81, 480, 832, 16), 2),
    "wan-pair": Expected(WanPipeline, (40, (4.0, 3.0)), (81, 720, 1280, 16), 2, (4.0, 3.0)),
    "hunyuan": Expected(HunyuanVideoPipeline, (50, 6.0), (129, 720, 1280, 24), guidance=6.0),
    "cosmos-text": Expected(CosmosTextToWorldPipeline, **COSMOS),
    "cosmos-video": Expected(CosmosVideoToWorldPipeline, **COSMOS),
}


@pytest.fixture(scope="module", params=VIDEO_FAMILIES)
def both(request, tmp_path_factory):
    """diffusers' pipeline, its folder, and ours from there."""
    folder = tmp_path_factory.mktemp(request.param) / "pipeline"
    theirs = save_pipeline(folder, request.param)
    ours = dataclasses.replace(load_pytorch(folder), max_sequence_length=LENGTH)
    return request.param, theirs, folder, ours


@pytest.fixture(scope="module")
def drawn(both):
    """How a sample is drawn in the tests, that they compile once."""
    expected = EXPECTED[both[0]]
    sides = (16 // expected.factor, 32 // expected.factor)
    noise = np.random.default_rng(0).standard_normal((1, 3, *sides, 4), np.float32)
    given = {}
    if both[3].TAKES_FRAMES:
        count = expected.factor + 1  # two latent frames of the three are known
        frames = np.random.default_rng(1).integers(0, 256, (count, 24, 40, 3), np.uint8)
        given = {"conditioning": frames}
    guidance = {"guidance_scale": expected.guidance}
    return {"num_inference_steps": STEPS, "latents": noise, **expected.drawn, **guidance, **given}


def frames_of(family, pipeline, drawn, monkeypatch):
    """Their frames in [0, 1] from our noise."""
    options = {
        **drawn,
        "latents": torch.from_numpy(drawn["latents"].transpose(0, 4, 1, 2, 3).copy()),
    }
    first, *others = np.ravel(options.pop("guidance_scale")).tolist()
    options |= {"guidance_scale": first, **({"guidance_scale_2": others[0]} if others else {})}
    if (known := options.pop("conditioning", None)) is not None:
        options["video"] = [Image.fromarray(frame) for frame in known]
        # They draw noise for known frames in every step, we once.
        key = jax.random.fold_in(image_keys(0, np.arange(1))[0], 1 << 30)
        noise = np.asarray(jax.random.normal(key, drawn["latents"].shape[1:])).transpose(3, 0, 1, 2)
        module = sys.modules[type(pipeline).__module__]
        fixed = torch.from_numpy(noise.copy())[None]
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: fixed)
    if "hunyuan" not in family:
        options["negative_prompt"] = [""]
    with torch.no_grad():
        return pipeline(
            prompt=[PROMPT],
            max_sequence_length=LENGTH,
            output_type="np",
            **options,
        ).frames


def test_frames_are_diffusers(both, drawn, monkeypatch):
    family, theirs, _, ours = both
    told = []
    with jax.default_matmul_precision("highest"):
        videos = conceptax.text_to_video(
            ours, PROMPT, on_step=lambda *state: told.append(state), **drawn
        )
    expected = frames_of(family, theirs, drawn, monkeypatch)
    assert videos.shape == (1, drawn["num_frames"], 16, 32, 3)
    assert videos.std() > 5  # a picture, not a constant
    difference = np.abs(videos.astype(int) - np.round(expected * 255).astype(int))
    assert difference.max() <= 1
    steps = EXPECTED[family].evaluations
    sampled = [("sampling", step, steps) for step in range(steps + 1)]
    assert told == [*sampled, ("decoding", 0, 1), ("decoding", 1, 1)]


@pytest.mark.parametrize("both", ["hunyuan"], indirect=True)
def test_guidance_comes_on_top_of_what_was_learnt(both, drawn, monkeypatch):
    """The negative prompt is shorter, and so is its mask.

    The toy's template ends before the 95 tokens that are cut off, unlike Llama's: of fewer words
    nothing is left, whose mean is 0 / 0 in diffusers, and 0 here.
    """
    _, theirs, _, ours = both
    more = {"negative_prompt": "three red on a brick", "true_cfg_scale": 3.0}
    with jax.default_matmul_precision("highest"):
        videos = conceptax.text_to_video(ours, PROMPT, **drawn, **more)
    expected = frames_of("hunyuan", theirs, drawn | more, monkeypatch)
    assert videos.std() > 5
    assert np.abs(videos.astype(int) - np.round(expected * 255)).max() <= 1


def test_families_are_told_apart_and_know_their_sizes(both):
    family, _, _, ours = both
    expected = EXPECTED[family]
    assert type(ours) is expected.kind and isinstance(ours, VideoPipeline)
    assert ours.defaults == expected.defaults and ours.video_size == expected.size
    frames, height, width, _ = expected.size
    factor = expected.factor
    shape = ((frames - 1) // factor + 1, height // factor, width // factor, 4)
    assert ours.latent_shape_for() == ours.latent_shape == shape
    assert ours.latent_shape_for(16, 32, 1) == (1, 16 // factor, 32 // factor, 4)


def test_a_folder_comes_back_bit_for_bit_and_diffusers_reads_it(both, tmp_path, monkeypatch):
    _, theirs, folder, ours = both
    save_pytorch(ours, tmp_path / "again")
    module = sys.modules[type(theirs).__module__]
    monkeypatch.setattr(module, "CosmosSafetyChecker", safety_checker, raising=False)
    # Without accelerate diffusers loads none of those that keep parts in float32.
    monkeypatch.setattr(type(theirs.transformer), "_keep_in_fp32_modules", None)
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


@pytest.mark.parametrize(
    "both",
    [
        pytest.param(each, marks=[pytest.mark.slow] * (each not in ("hunyuan", "wan-pair")))
        for each in EXPECTED
    ],
    indirect=True,
)
def test_a_window_of_the_whole_grid_draws_the_dense_video(both, drawn):
    family, _, _, ours = both
    rows, columns = (side // (2 * EXPECTED[family].factor) for side in (16, 32))
    whole = GNA(window=(3, rows, columns))
    dense = TextToImage.from_pipeline(ours)([PROMPT], **drawn)
    sparse = TextToImage.from_pipeline(ours, attention=whole, dense_steps=1)
    assert np.abs(sparse([PROMPT], **drawn).astype(int) - dense).max() <= 1


@pytest.mark.parametrize(
    "both", ["wan-pair", pytest.param("cosmos-video", marks=pytest.mark.slow)], indirect=True
)
def test_devices_draw_a_video_together(both, drawn):
    _, _, _, ours = both
    drawer = TextToImage.from_pipeline(ours, attention="window=allx2x2 stride=1x2x1", dense_steps=1)
    meshes = [
        jax.make_mesh((count,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
        for count in (3, 2)
    ]
    together = drawer([PROMPT], mesh=meshes[0], **drawn)
    assert np.abs(together.astype(int) - drawer([PROMPT], **drawn)).max() <= 1
    with pytest.raises(ValueError, match="2 devices cannot share the 3 frames of these latents"):
        drawer([PROMPT], mesh=meshes[1], **drawn)


@pytest.mark.parametrize("both", ["cosmos-video"], indirect=True)
def test_a_world_goes_on_from_frames(both, drawn):
    _, _, _, ours = both
    with pytest.raises(ValueError, match="goes on from frames: pass an image or a video"):
        conceptax.text_to_video(ours, PROMPT, **{**drawn, "conditioning": None})
    frames = drawn["conditioning"]
    video, count = ours.conditioning_frames(np.repeat(frames, 3, axis=0), 3, (16, 32))
    assert video.shape == (1, 9, 16, 32, 3) and count == 3  # the last ones
    video, count = ours.conditioning_frames(frames[:1], 3, (16, 32))
    assert count == 1 and np.abs(video[0, 1:]).max() == 0 < np.abs(video[0, 0]).max() <= 1
    slow = conceptax.text_to_video(ours, PROMPT, fps=8, **drawn)
    assert (slow != conceptax.text_to_video(ours, PROMPT, **drawn)).any()


@pytest.mark.parametrize("both", ["wan-pair"], indirect=True)
def test_what_is_missing_or_does_not_fit_is_told(both, tmp_path):
    _, _, folder, ours = both
    draw, size = conceptax.text_to_video, EXPECTED["wan"].drawn
    for frames, near in ((6, "5 or 7"), (0, "1"), (-3, "1")):
        with pytest.raises(
            ValueError, match=f"num_frames={frames} must be one more .*: {near} may"
        ):
            draw(ours, PROMPT, height=16, width=16, num_frames=frames)
    with pytest.raises(ValueError, match="height=18 must be a positive multiple of 4"):
        draw(ours, PROMPT, height=18, width=16)
    with pytest.raises(ValueError, match=r"GNA\(window=9\) does not fit a grid of 3x4x8"):
        draw(ours, PROMPT, **size, num_inference_steps=1, attention=GNA(9))
    with pytest.raises(ValueError, match="one number for each of 2 models"):
        draw(ours, PROMPT, **size, guidance_scale=(4.0, 3.0, 2.0))
    with pytest.raises(ValueError, match="is told of no frame rate: leave out fps=8"):
        draw(ours, PROMPT, **size, fps=8, num_inference_steps=1)
    with pytest.raises(ValueError, match="draws from texts alone: leave out conditioning"):
        draw(ours, PROMPT, **size, conditioning=np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="draws videos by itself: leave out motion_adapter"):
        config = MotionAdapterConfig((8,), motion_norm_num_groups=4, motion_num_attention_heads=2)
        draw(ours, PROMPT, motion_adapter=MotionAdapter(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="transformer_2, which was not loaded"):
        draw(dataclasses.replace(ours, transformer_2=None), PROMPT)
    with pytest.raises(TypeError, match="takes prompts once; got them 0 times"):
        draw(ours)
    with pytest.warns(UserWarning, match="ignored: "):
        ours.tokenize(["three " * 100])
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    shutil.rmtree(broken / "transformer_2")
    with pytest.raises(CheckpointError, match="transformer_2"):
        load_pytorch(broken)


@pytest.mark.parametrize("both", ["wan"], indirect=True)
def test_wan_that_expands_timesteps_draws_the_same_from_text(both, drawn, monkeypatch):
    """They tell every token the time, which is the same for all without an image."""
    _, theirs, _, ours = both
    ours = dataclasses.replace(ours, model_index={**ours.model_index, "expand_timesteps": True})
    assert ours.video_size == (121, 704, 1280, 24)
    theirs.register_to_config(expand_timesteps=True)
    expected = frames_of("wan", theirs, drawn, monkeypatch)
    theirs.register_to_config(expand_timesteps=False)
    with jax.default_matmul_precision("highest"):
        videos = conceptax.text_to_video(ours, PROMPT, **drawn)
    assert np.abs(videos.astype(int) - np.round(expected * 255).astype(int)).max() <= 1


@pytest.mark.parametrize("both", ["wan-pair"], indirect=True)
def test_streamed_models_draw_the_same(both, drawn):
    _, _, folder, ours = both
    streamed = dataclasses.replace(load_pytorch(folder, stream=True), max_sequence_length=LENGTH)
    videos = conceptax.text_to_video(streamed, PROMPT, **drawn)
    whole = conceptax.text_to_video(ours, PROMPT, **drawn)
    assert np.abs(videos.astype(int) - whole).max() <= 1


@pytest.mark.parametrize("both", ["wan"], indirect=True)
def test_what_memory_asks_for_is_told(both, monkeypatch):
    drawer = TextToImage.from_pipeline(both[3])
    free = [2e7]
    for module in (memory, text_to_image):
        monkeypatch.setattr(module, "available_memory", lambda **_: int(free[0]))
    with pytest.raises(memory.NotEnoughMemoryError, match=r"5 frames, 1 at .* or fewer frames\."):
        drawer([PROMPT], height=1024, width=1024, num_frames=5)
    # Of 3 x 256 x 256 tokens 5 arrays of 24 features take 94 MB; two frames of 1024 x 1024 pixels
    # and 8 channels, and the pixels of five, 130 MB, and those of a tile 67 MB.
    free[0] = 1e8
    with pytest.warns(UserWarning, match="1024x1024 pixels and 5 frames is decoded in tiles"):
        assert drawer._require_memory((3, 512, 512, 4), 1, 1, 1, False, 1)
    free[0] = 1.4e8
    assert not drawer._require_memory((3, 512, 512, 4), 1, 1, 1, False, 1)


def test_prompts_of_wan_are_cleaned():
    assert cleaned(" a &amp;amp; b\n\tc ") == "a & b c"
