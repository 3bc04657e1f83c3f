"""What a studio does, on tiny random models: pictures, sentences, what is kept and written."""

import dataclasses
import json

import numpy as np
import pytest
from flow_toy import FLOW_VAE, LENGTH, t5_tokenizer
from personalizing_toy import random_model, tiny_pipeline

from conceptax.cli.studio import explained, parsed
from conceptax.converters import OutputError, load_pytorch, save_pytorch
from conceptax.flax_models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from conceptax.flax_models.clip import CLIPTextConfig, CLIPTextModel
from conceptax.flax_models.flux_transformer_2d import (
    FluxTransformer2DConfig,
    FluxTransformer2DModel,
)
from conceptax.flax_models.pipelines.flux import FluxPipeline
from conceptax.flax_models.t5 import T5Config, T5EncoderModel
from conceptax.methods.diffusion.text_to_image import text_to_image
from conceptax.methods.erasing import METHODS, UceConfig
from conceptax.methods.erasing.sage import SageConfig
from conceptax.methods.glyphs.tokenizer import build_tokenizer
from conceptax.methods.red_team import ATTACKS, ConceptInversionConfig
from conceptax.methods.text.phrases import ConceptError
from conceptax.reporting.erasing import RECORD
from conceptax.studio import work
from conceptax.studio.models import MOST, Studio, open_studio
from conceptax.studio.work import Drawing

FEW = Drawing(seed=3, steps=2, guidance=2.0)
PHRASES = {"vocabulary": 40, "similarity_cap": 1.0, "templates": ("a {}",), "contexts": 2}
TINY = {"cycles": 2, "prompts": 2, "check_steps": 1, "global_rows": 4, "local_rows": 2, "frames": 1}


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


@pytest.fixture
def studio(pipeline, tmp_path):
    """With an edited model beside the original, which is equal to it."""
    return Studio(pipeline, "tiny", {"same": pipeline}, output=tmp_path / "out")


def told(studio, do, *arguments, **options):
    """The last thing that a job tells, and all that it said."""
    every = list(studio.run(lambda job: do(studio, job, *arguments, **options)))
    return every[-1], [each.said for each in every]


def captions(last):
    return [[picture.caption for picture in row.pictures] for row in last.rows]


def test_both_models_draw_from_the_same_noise(studio, pipeline):
    pair = dataclasses.replace(FEW, count=2)
    last, said = told(studio, work.draw, " a red three ", "same", pair)
    assert captions(last) == [["original", "same"]] * 2
    for row in last.rows:
        np.testing.assert_array_equal(row.pictures[0].image, row.pictures[1].image)
    settings = {"seed": 3, "num_inference_steps": 2, "guidance_scale": 2.0}
    alone = text_to_image(pipeline, ["a red three"] * 2, **settings)
    close = np.abs(last.rows[1].pictures[0].image.astype(int) - alone[1])
    assert close.max() <= 1  # the same program, step by step
    assert last.said == "“a red three”, seed 3, 2 steps, guidance 2."
    assert any("step 2 of 2" in each or "decoding" in each for each in said)


def test_what_cannot_be_drawn_is_a_sentence(studio):
    with pytest.raises(ConceptError, match="write a prompt"):
        told(studio, work.draw, " ", None, FEW)
    with pytest.raises(ConceptError, match="no edited model 'gone' any more; there is 'same'"):
        told(studio, work.draw, "a red three", "gone", FEW)
    with pytest.raises(ValueError, match="multiple"):
        told(studio, work.draw, "a red three", None, dataclasses.replace(FEW, height=13))
    with pytest.raises(ValueError, match="steps must be at least 1"):
        dataclasses.replace(FEW, steps=0)
    with pytest.raises(ConceptError, match="UNet2DConditionModel has no choice of attention"):
        told(studio, work.attend, "a red three", "window=4x4", FEW)
    with pytest.raises(ConceptError, match="no edited model to attack"):
        told(studio, work.bring_back, "three", None, ConceptInversionConfig(), FEW)


def test_erasing_is_watched_kept_and_written(studio, pipeline, tmp_path):
    config = SageConfig(**TINY, **PHRASES)
    watched = ["a red three", "a red two"]
    options = {"watched": watched, "looks": 2}
    last, said = told(studio, work.erase, ["three", " three "], config, FEW, **options)
    assert [row.title for row in last.rows] == [f"“{prompt}”" for prompt in watched]
    assert captions(last) == [["before", "cycle 1", "after"]] * 2
    name = "three erased by SAGE"
    assert last.said.startswith(f"“{name}” is among the edited models now")
    assert list(studio.edited) == ["same", name]
    before, _, after = (picture.image for picture in last.rows[0].pictures)
    assert (before != after).any()
    assert any("SAGE: cycle" in each for each in said)

    told(studio, work.save, name, "mine")
    folder = tmp_path / "out" / "mine"
    record = json.loads((folder / RECORD).read_text())
    assert record["concepts"] == ["three"] and record["model"] == "tiny" and "loss" in str(record)
    settings = {"seed": 3, "num_inference_steps": 2, "guidance_scale": 2.0}
    again = text_to_image(load_pytorch(folder), watched[:1], **settings)
    assert np.abs(again[0].astype(int) - after).max() <= 1
    with pytest.raises(OutputError, match="mine"):
        told(studio, work.save, name, "mine")
    for bad in ("../out", "/tmp/x", "", ".hidden", "a/b", "a\0b"):
        with pytest.raises(ConceptError, match="a folder's name begins"):
            told(studio, work.save, name, bad)
    with pytest.raises(ConceptError, match="erased here"):
        told(studio, work.save, "same", "other")
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["mine"]


def test_closed_forms_erase_too_and_only_some_are_kept(studio):
    config = UceConfig(**PHRASES)
    last, _ = told(studio, work.erase, ["three"], config, FEW, start="same")
    assert captions(last) == [["before", "after"]]
    (name,) = studio.made
    assert studio.made[name][0].run.record["model"] == "same"
    erased = studio.made[name]
    for _ in range(MOST):
        studio.keep(*erased, title="again")
    assert len(studio.made) == MOST and name not in studio.edited and "same" in studio.edited
    assert f"again {MOST}" in studio.edited
    studio.output = None
    with pytest.raises(ConceptError, match="--output"):
        told(studio, work.save, "again", "mine")
    with pytest.raises(ConceptError, match="nothing to erase"):
        told(studio, work.erase, ["  "], config, FEW)


@pytest.mark.parametrize(
    "name", ["concept-inversion", pytest.param("token-search", marks=pytest.mark.slow)]
)
def test_attacks_are_watched(studio, name):
    few = {"candidates": 2, "top": 4} if name == "token-search" else {}
    config = ATTACKS[name].config(steps=4, batch_size=2, restarts=2, **few)
    options = {"prompts": ["a red three", "three on brick"], "examples": 2, "looks": 2}
    two = dataclasses.replace(FEW, count=2)
    last, _ = told(studio, work.bring_back, "three", "same", config, two, **options)
    assert captions(last) == [["original", "same, by name", "step 2", "step 4"]] * 2
    assert last.said.startswith(f"{ATTACKS[name].title}, 4 steps, ")
    assert last.said.endswith("See for yourself.")


@pytest.mark.parametrize("do", ["erase", pytest.param("bring_back", marks=pytest.mark.slow)])
def test_training_stops_between_two_steps(studio, do):
    config = SageConfig(**TINY | {"cycles": 50}, **PHRASES)
    if do == "bring_back":
        config = ConceptInversionConfig(steps=50, batch_size=2, restarts=2)
    concept = ["three"] if do == "erase" else "three"

    def run(job):
        tell = job.tell

        def stopping(said, *rest, **rows):
            if said.startswith(("SAGE: cycle 3 of", "Concept Inversion: step 3 of")):
                job.stop()
            tell(said, *rest, **rows)

        job.tell = stopping
        more = () if do == "erase" else ("same",)
        options = {"looks": 1} if do == "erase" else {"looks": 1, "examples": 2}
        return getattr(work, do)(studio, job, concept, *more, config, FEW, **options)

    *_, last = studio.run(run)
    assert last.ended and "Stopped. The last was:" in last.said and " 2 of 50" in last.said
    assert last.rows and list(studio.edited) == ["same"]


def test_judge_says_what_it_sees(studio):
    class Judge:
        def among(self, phrases):
            if phrases != ["three"]:
                raise ValueError("unknown")
            return self

        def shows(self, images, phrases):
            return np.arange(len(images)) < 2

    images = np.zeros((3, 4, 4, 3), np.uint8)
    assert work._verdict(studio, "three", images, images) == ""
    studio.classifier = Judge()
    said = work._verdict(studio, "three", images[:1], images)
    assert said == (
        " The judge sees “three” in 2 of 3 images; when the edited model was asked by name, in 1."
    )
    assert work._verdict(studio, "dragon", images, images) == ""


@pytest.fixture(scope="module")
def flux():
    """A transformer's pipeline, at downsampling 2 and tokens of 2 by 2."""
    rng = np.random.default_rng(0)
    clip, t5 = build_tokenizer(max_length=LENGTH), t5_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(clip),
        eos_token_id=clip.eos_token_id,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
    )
    transformer = FluxTransformer2DConfig(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    long = T5Config(vocab_size=len(t5), d_model=12, d_kv=4, d_ff=24, num_heads=3, num_layers=1)
    return FluxPipeline(
        random_model(FluxTransformer2DModel, transformer, rng),
        random_model(AutoencoderKL, AutoencoderKLConfig(**FLOW_VAE), rng),
        random_model(CLIPTextModel, text, rng),
        random_model(T5EncoderModel, long, rng),
        clip,
        t5,
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        max_sequence_length=8,
    )


def test_attention_is_compared_where_there_is_a_choice(flux):
    studio = Studio(flux, "flux")
    assert studio.attention_excuse() == "" and not studio.is_stable_diffusion
    few = Drawing(steps=5, guidance=0.0, height=32, width=32)
    last, _ = told(studio, work.attend, "a red three", "window=4x4 stride=2x2", few, dense_steps=1)
    window = "a window of 4x4 at stride 2x2"
    assert captions(last) == [["dense", window, "difference, 4 times as bright"]]
    dense, sparse, difference = (picture.image.astype(int) for picture in last.rows[0].pictures)
    assert (dense != sparse).any()
    np.testing.assert_array_equal(difference, np.minimum(4 * abs(dense - sparse), 255))
    assert last.said.startswith("A dense step took ") and "after 1 dense ones." in last.said
    last, _ = told(
        studio, work.attend, "three", "window=4x4", dataclasses.replace(few, steps=1), dense_steps=0
    )
    assert "take two steps or more" in last.said
    with pytest.raises(ValueError, match="does not fit a layout of 8x8 tokens"):
        told(studio, work.attend, "three", "flux-2k", few)
    with pytest.raises(ConceptError, match="erasing takes Stable Diffusion"):
        told(studio, work.erase, ["three"], UceConfig(), few)


def test_models_are_opened_and_checked(pipeline, tmp_path):
    save_pytorch(pipeline, tmp_path / "model")
    studio = open_studio(tmp_path / "model", tmp_path / "model", output=tmp_path / "out")
    assert studio.source == str(tmp_path / "model") and list(studio.edited) == ["model"]
    assert studio.is_stable_diffusion and studio.classifier is None
    with pytest.raises(ConceptError, match="needs the whole pipeline"):
        open_studio(tmp_path / "model" / "unet")


def test_settings_are_given_as_flags():
    config = parsed(SageConfig(cycles=7), ["--check-steps", "2", "--no-free-concept"])
    assert config == SageConfig(cycles=7, check_steps=2, free_concept=False)
    assert parsed(config, []) is config
    for words, text in (
        (["--check-stepz", "2"], "there is no --check-stepz.*did you mean --check-steps"),
        (["--check-steps", "many"], "--check-steps takes a whole number"),
        (["--check", "never"], "--check takes anchor, recall, guided; received 'never'"),
    ):
        with pytest.raises(ValueError, match=text):
            parsed(config, words)
    for method in (*METHODS.values(), *ATTACKS.values()):
        assert parsed(method.config(), ["--batch-size", "3"] if method in ATTACKS.values() else [])
        rows = explained(method.config)
        assert all(flag and what for flag, _, what in rows)
