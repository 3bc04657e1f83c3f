"""Pipelines on a flow draw what diffusers' draw, and travel in its folders unchanged."""

import dataclasses
import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
import torch
from flow_toy import FAMILIES, T5_LENGTH, save_pipeline

import conceptax
from conceptax.converters import CheckpointError, load_pytorch, save_pytorch
from conceptax.flax_models.layers.attention import GNA
from conceptax.flax_models.pipelines.flux import FluxPipeline
from conceptax.flax_models.pipelines.flux_2_klein import Flux2KleinPipeline
from conceptax.flax_models.pipelines.pipeline import Pipeline
from conceptax.flax_models.pipelines.stable_diffusion_3 import StableDiffusion3Pipeline
from conceptax.methods.diffusion.text_to_image import TextToImage
from conceptax.methods.training import make_mesh

PROMPTS = ["a red three on brick", "photo of a three"]
HEIGHT, WIDTH = 16, 24  # at downsampling 2 and patches of 2: 4 x 6 tokens
STEPS = 3
LENGTHS = {"flux": T5_LENGTH, "klein": 64, "sd3": 16}


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    """diffusers' pipeline, its folder, and ours from there."""
    folder = tmp_path_factory.mktemp(request.param) / "pipeline"
    theirs = save_pipeline(folder, request.param)
    ours = load_pytorch(folder)
    length = LENGTHS[request.param.split("-")[0]]
    return request.param, theirs, folder, dataclasses.replace(ours, max_sequence_length=length)


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).standard_normal((2, HEIGHT // 2, WIDTH // 2, 4), np.float32)


def theirs_from(family, pipeline, noise, folder_length, **options):
    """Their images in [0, 1] from our noise."""
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    if family.startswith("flux"):
        latents = pipeline._pack_latents(latents, 2, 4, HEIGHT // 2, WIDTH // 2)
    elif family.startswith("klein"):
        latents = pipeline._patchify_latents(latents)
    with torch.no_grad():
        return pipeline(
            prompt=PROMPTS,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            max_sequence_length=folder_length,
            latents=latents,
            output_type="np",
            **options,
        ).images


def test_families_are_told_apart(both):
    family, _, _, ours = both
    kinds = {"flux": FluxPipeline, "klein": Flux2KleinPipeline, "sd3": StableDiffusion3Pipeline}
    kind, _, variant = family.partition("-")
    assert type(ours) is kinds[kind] and isinstance(ours, Pipeline)
    defaults = {"dev": (28, 3.5), "schnell": (4, 0.0), "base": (50, 4.0)}
    own = (4, 1.0) if kind == "klein" else (28, 7.0)
    assert ours.defaults == defaults.get(variant, own)


def test_images_are_diffusers(both, noise):
    family, theirs, _, ours = both
    guidance = {"flux": 3.5, "klein": 4.0, "sd3": 7.0}[family.split("-")[0]]
    with jax.default_matmul_precision("highest"):
        images = conceptax.text_to_image(
            ours,
            PROMPTS,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            latents=noise,
        )
    expected = theirs_from(family, theirs, noise, ours.max_sequence_length, guidance_scale=guidance)
    assert images.std() > 5  # a picture, not a constant
    difference = np.abs(images.astype(int) - np.round(expected * 255).astype(int))
    assert difference.max() <= 1


@pytest.mark.parametrize("both", ["flux-dev"], indirect=True)
def test_guidance_comes_on_top_of_what_was_learnt(both, noise):
    family, theirs, _, ours = both
    options = {"guidance_scale": 3.5, "negative_prompt": "red", "true_cfg_scale": 2.5}
    size = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "latents": noise}
    with jax.default_matmul_precision("highest"):
        images = conceptax.text_to_image(ours, PROMPTS, **size, **options)
    options["negative_prompt"] = ["red"] * 2
    expected = theirs_from(family, theirs, noise, ours.max_sequence_length, **options)
    assert images.std() > 5
    assert np.abs(images.astype(int) - np.round(expected * 255)).max() <= 1
    with pytest.raises(ValueError, match="Pass a true_cfg_scale above 1, at twice the time"):
        conceptax.text_to_image(ours, PROMPTS, **size, negative_prompt="red", true_cfg_scale=1.0)
    with pytest.raises(ValueError, match="true_cfg_scale must be a finite number; got nan"):
        conceptax.text_to_image(ours, PROMPTS, **size, true_cfg_scale=float("nan"))


def test_a_folder_comes_back_bit_for_bit_and_diffusers_reads_it(both, tmp_path):
    _, theirs, folder, ours = both
    save_pytorch(ours, tmp_path / "again")
    absent = {name: None for name, part in theirs.components.items() if part is None}
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again", **absent)
    assert type(again) is type(theirs)
    for name, part in theirs.components.items():
        other = again.components[name]
        if isinstance(part, torch.nn.Module):
            states = part.state_dict(), other.state_dict()
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        elif name.startswith("tokenizer") and part is not None:
            assert other(PROMPTS)["input_ids"] == part(PROMPTS)["input_ids"]
    read = [
        json.loads((each / "model_index.json").read_text()) for each in (folder, tmp_path / "again")
    ]
    assert {k: v for k, v in read[0].items() if k[0] != "_"}.items() <= read[1].items()


@pytest.mark.parametrize(
    "both",
    ["sd3", *(pytest.param(each, marks=pytest.mark.slow) for each in ("flux-dev", "klein"))],
    indirect=True,
)
def test_a_window_of_the_whole_grid_draws_the_dense_image(both, noise):
    _, _, _, ours = both
    options = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "latents": noise}
    dense = TextToImage.from_pipeline(ours)(PROMPTS, **options)
    whole = GNA(window=(4, 6))
    sparse = TextToImage.from_pipeline(ours, attention=whole, dense_steps=1)(PROMPTS, **options)
    assert np.abs(sparse.astype(int) - dense.astype(int)).max() <= 1


@pytest.mark.parametrize(
    "both", ["flux-dev", pytest.param("sd3", marks=pytest.mark.slow)], indirect=True
)
def test_devices_draw_an_image_together(both, noise):
    _, _, _, ours = both
    options = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "latents": noise}
    drawer = TextToImage.from_pipeline(ours, attention=GNA((3, 2)), dense_steps=1)
    one = drawer(PROMPTS, **options)
    four, eight = (
        jax.make_mesh((count,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
        for count in (4, 8)
    )
    together = drawer(PROMPTS, mesh=four, **options)
    assert np.abs(together.astype(int) - one.astype(int)).max() <= 1
    with pytest.raises(ValueError, match="8 devices cannot share the 8 rows of these latents"):
        drawer(PROMPTS, mesh=eight, **options)


@pytest.mark.parametrize("both", ["flux-schnell", "klein", "sd3"], indirect=True)
def test_what_is_missing_or_does_not_fit_is_told(both, tmp_path):
    _, _, folder, ours = both
    for height in (HEIGHT + 2, 0, -4):
        with pytest.raises(ValueError, match=f"height={height} must be a positive multiple of 4"):
            conceptax.text_to_image(ours, "a three", height=height, width=WIDTH)
    with pytest.raises(ValueError, match=r"GNA\(window=9\) does not fit a grid of 4x6"):
        conceptax.text_to_image(
            ours, "a three", height=HEIGHT, width=WIDTH, num_inference_steps=1, attention=GNA(9)
        )
    named = (
        r"a window of 80x80 .*\(flux-4k\) does not fit .* 4x6 tokens; .* is 80x80 \(1280x1280 px"
    )
    with pytest.raises(ValueError, match=named):
        conceptax.text_to_image(ours, "a three", height=HEIGHT, width=WIDTH, attention="flux-4k")
    with pytest.raises(ValueError, match=r"attention takes .*; received 28"):
        conceptax.text_to_image(ours, "a three", attention="cosmos-predict2-2b")
    with pytest.raises(ValueError, match="dense_steps must be at least 0, received -1"):
        conceptax.text_to_image(ours, "a three", attention=GNA(2), dense_steps=-1)
    if not ours.LEARNT_GUIDANCE:
        with pytest.raises(ValueError, match="guided by guidance_scale: leave out true_cfg_scale"):
            conceptax.text_to_image(ours, "a", height=HEIGHT, width=WIDTH, true_cfg_scale=2)
    with pytest.raises(ValueError, match="follows a flow, by Euler steps: leave out sampler"):
        conceptax.text_to_image(ours, "a three", height=HEIGHT, width=WIDTH, sampler="ddim")
    with pytest.warns(UserWarning, match="ignored: "):
        ours.tokenize(["three " * 100])
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    shutil.rmtree(broken / "transformer")
    with pytest.raises(CheckpointError, match="transformer"):
        load_pytorch(broken)


@pytest.mark.parametrize("both", ["flux-dev"], indirect=True)
def test_images_split_over_devices_are_those_of_one(both):
    *_, ours = both
    drawer = TextToImage.from_pipeline(ours)
    size = {"height": HEIGHT, "width": WIDTH}
    options: dict = {"seed": 3, "num_inference_steps": 2, "batch_size": 1, **size}
    prompts = [*PROMPTS * 4]
    images = drawer(prompts, mesh=make_mesh(8), **options)
    assert len({image.tobytes() for image in images}) == len(prompts)
    difference = np.abs(images.astype(int) - drawer(prompts, **options))
    # Rounding may differ where a value lies between two bytes.
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-2
