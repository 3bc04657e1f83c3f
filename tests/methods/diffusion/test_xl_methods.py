"""Erasing and personalizing models with two text encoders, and with SD 2's settings."""

import dataclasses

import jax
import numpy as np
import pytest
import xl_toy
from flax import nnx

from conceptax.converters import load_pytorch, save_pytorch
from conceptax.flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from conceptax.methods.erasing import (
    AdvUnlearnConfig,
    ConceptAblationConfig,
    EsdXConfig,
    MaceConfig,
    ReceConfig,
    RecelerConfig,
    SalUnConfig,
    SpeedConfig,
    SpmConfig,
    StereoConfig,
    UceConfig,
    WordConfig,
    erase,
)
from conceptax.methods.erasing.sage import SageConfig
from conceptax.methods.personalization.class_diffusion import ClassDiffusionConfig, personalize
from conceptax.methods.text.phrases import edited_encoders
from conceptax.reporting.erasing import erase_into
from conceptax.reporting.personalizing import personalize_into

_SMALL = {"contexts": 0, "vocabulary": 12, "templates": ("{}", "a {}"), "similarity_cap": 1.0}
_RUN = {**_SMALL, "cycles": 1, "prompts": 2}
_CYCLE = {**_RUN, "frames": 0}
_RETENTION = {"global_rows": 4, "local_rows": 2}
SAGE = {**_CYCLE, **_RETENTION, "check_steps": 1}
METHODS = {
    "sage": (SageConfig(**SAGE), {"text_encoder", "text_encoder_2"}),
    "sage, second encoder": (SageConfig(**SAGE, edit="text_encoder_2"), {"text_encoder_2"}),
    "word": (WordConfig(**_CYCLE, **_RETENTION, edit="text_encoder"), {"text_encoder"}),
    "advunlearn": (
        AdvUnlearnConfig(**_CYCLE, warmup=0, attack_steps=1, attack_tokens=1, retain_rows=2),
        {"text_encoder", "text_encoder_2"},
    ),
    "esd-x": (EsdXConfig(**_RUN, ddim_steps=2), {"unet"}),
    "uce": (UceConfig(**_SMALL, frames=0), {"unet"}),
    "rece": (ReceConfig(**_SMALL, frames=0), {"unet"}),
    "speed": (SpeedConfig(**_SMALL, frames=0, threshold=10.0), {"unet"}),
    "concept-ablation": (ConceptAblationConfig(**_RUN, ddim_steps=2), {"unet"}),
    "salun": (
        SalUnConfig(**_CYCLE, ddim_steps=2, saliency_batches=1, retain_images=2, retain_rows=2),
        {"unet"},
    ),
    "spm": (SpmConfig(**_CYCLE, ddim_steps=2, anchors=2, anchor_rows=2), {"unet"}),
    "mace": (MaceConfig(**_CYCLE, ddim_steps=2, mask_threshold=0.3), {"unet"}),
    "receler": (RecelerConfig(**_RUN, ddim_steps=2, rank=2, attack_steps=1), {"unet"}),
    "stereo": (
        StereoConfig(**_RUN, ddim_steps=2, search_rounds=1, search_cycles=1, inversion_steps=2),
        {"unet"},
    ),
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("xl")
    xl_toy.save_pipeline(folder, xl_toy.SMALL_UNET)
    return load_pytorch(folder)


def changed_parts(before, after):
    """The models of a pipeline that differ."""

    def differs(name):
        leaves = [
            jax.tree.leaves(nnx.to_pure_dict(nnx.state(getattr(each, name))))
            for each in (before, after)
        ]
        return any((one != other).any() for one, other in zip(*leaves, strict=True))

    return {name for name in before.MODELS if differs(name)}


@pytest.mark.parametrize(
    "name",
    [n if n in ("uce", "speed") else pytest.param(n, marks=pytest.mark.slow) for n in METHODS],
)
def test_each_method_edits_its_parts_of_sdxl(pipeline, name):
    config, parts = METHODS[name]
    edited = erase(pipeline, ["three"], config, retain=["seven", "brick", "grass", "red"])
    assert type(edited) is type(pipeline)
    assert changed_parts(pipeline, edited) == parts
    finite = [
        np.isfinite(leaf).all()
        for part in parts
        for leaf in jax.tree.leaves(nnx.state(getattr(edited, part)))
    ]
    assert all(finite)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_what_is_exported_loads_in_diffusers(torch, pipeline, tmp_path):
    import diffusers

    config = METHODS["sage, second encoder"][0]
    (tmp_path / "erased").mkdir()
    edited = erase_into(
        tmp_path / "erased",
        pipeline,
        ["three"],
        config,
        seed=0,
        source="toy",
        retain=["seven", "brick", "grass", "red"],
    )
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "erased")
    weight = theirs.text_encoder_2.text_model.encoder.layers[0].mlp.fc1.weight.detach().numpy()
    ours = edited.text_encoder_2.text_model.encoder.layers[0].mlp.fc1.kernel[...]
    np.testing.assert_array_equal(weight, np.asarray(ours).T)
    original = pipeline.text_encoder_2.text_model.encoder.layers[0].mlp.fc1.kernel[...]
    assert (ours != original).any()
    with pytest.raises(ValueError, match="edits text_encoder and text_encoder_2 here"):
        erase_into(
            tmp_path / "x",
            pipeline,
            ["three"],
            SageConfig(**SAGE),
            seed=0,
            source="toy",
            export="text-encoder",
        )


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_subject_is_learnt_in_both_encoders(torch, pipeline, tmp_path):
    import diffusers
    from personalizing_toy import subject

    config = ClassDiffusionConfig(steps=1, batch_size=1, augment=False, learning_rate=1e-2)
    (tmp_path / "learnt").mkdir()
    learnt = personalize_into(
        tmp_path / "learnt", pipeline, [subject()], config, seed=0, source="toy"
    )
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "learnt")
    new = theirs.tokenizer_2.convert_tokens_to_ids("<new1>")
    assert new == theirs.tokenizer.convert_tokens_to_ids("<new1>") == len(pipeline.tokenizer)
    for encoder, tower in zip(
        (theirs.text_encoder, theirs.text_encoder_2), learnt.prompt_encoder.towers, strict=True
    ):
        table = encoder.get_input_embeddings().weight.detach().numpy()
        own = np.asarray(tower.embeddings.token_embedding.embedding[...])
        np.testing.assert_array_equal(table, own)
        # It started at the class word's and moved.
        assert (table[new] != 0).all() and not (table[:new] == table[new]).all(axis=1).any()
    assert "attn2" in str(
        [key for key, (one, other) in _unets(pipeline, learnt).items() if (one != other).any()]
    )
    assert not list((tmp_path / "learnt").glob("<new1>*"))


@pytest.mark.parametrize("edit", ["text_encoder", "text_encoder_2"])
def test_a_subject_is_learnt_in_one_encoder(pipeline, edit):
    """The other's row stays that of the word it started from."""
    from personalizing_toy import subject

    config = ClassDiffusionConfig(
        steps=1, batch_size=1, augment=False, learning_rate=1e-2, trained="nothing", edit=edit
    )
    learnt = personalize(pipeline, [subject()], config, progress=False)
    word = learnt.tokenizer.convert_tokens_to_ids("<new1>")
    for name, tower in zip(
        ("text_encoder", "text_encoder_2"), learnt.prompt_encoder.towers, strict=True
    ):
        table = np.asarray(tower.embeddings.token_embedding.embedding[...])
        stayed = (table[:word] == table[word]).all(axis=1).any()
        assert stayed == (name != edit)
    assert all((one == other).all() for one, other in _unets(pipeline, learnt).values())


def _unets(*pipelines):
    leaves = [
        {
            jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(
                nnx.to_pure_dict(nnx.state(each.unet))
            )
        }
        for each in pipelines
    ]
    return {key: (leaves[0][key], leaves[1][key]) for key in leaves[0]}


def test_models_with_one_encoder_have_no_second_to_edit():
    empty = StableDiffusionPipeline(None, None, None, None, {})
    assert edited_encoders(empty, "both") == ("text_encoder",)
    assert edited_encoders(empty, "text_encoder") == ("text_encoder",)
    for config in (SageConfig(edit="text_encoder_2"), AdvUnlearnConfig(edit="text_encoder_2")):
        with pytest.raises(ValueError, match="this model has one text encoder"):
            erase(empty, ["three"], config)


@pytest.fixture(scope="module")
def sd_2():
    """Linear projections, heads per level, v-prediction, gelu, and another padding."""
    from erasing_toy import tiny_pipeline

    from conceptax.flax_models.clip import CLIPTextModel
    from conceptax.flax_models.unet_2d_condition import UNet2DConditionModel

    pipeline = tiny_pipeline()
    pipeline.tokenizer.pad_token = "!"
    unet = dataclasses.replace(
        pipeline.unet.config, use_linear_projection=True, attention_head_dim=(2,)
    )
    text = dataclasses.replace(pipeline.text_encoder.config, hidden_act="gelu", eos_token_id=2)
    return dataclasses.replace(
        pipeline,
        unet=UNet2DConditionModel(unet, rngs=nnx.Rngs(0)),
        text_encoder=CLIPTextModel(text, rngs=nnx.Rngs(1)),
        scheduler_config={**pipeline.scheduler_config, "prediction_type": "v_prediction"},
    )


@pytest.mark.slow
def test_sage_runs_on_the_settings_of_sd_2(torch, sd_2, tmp_path):
    import diffusers

    edited = erase(sd_2, ["three"], SageConfig(**SAGE), retain=["seven", "brick", "grass"])
    assert changed_parts(sd_2, edited) == {"text_encoder"}
    folder = save_pytorch(edited, tmp_path / "sd2")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert theirs.tokenizer.pad_token == "!" and theirs.text_encoder.config.hidden_act == "gelu"
    assert theirs.scheduler.config.prediction_type == "v_prediction"


def test_a_subject_is_learnt_on_the_settings_of_sd_2(torch, sd_2, tmp_path):
    import diffusers
    from personalizing_toy import subject

    config = ClassDiffusionConfig(steps=1, batch_size=1, augment=False, learning_rate=1e-2)
    learnt = personalize(sd_2, [subject()], config, progress=False)
    moved = {key for key, (one, other) in _unets(sd_2, learnt).items() if (one != other).any()}
    assert moved and all("attn2" in key for key in moved)
    assert learnt.scheduler_config["prediction_type"] == "v_prediction"
    folder = save_pytorch(learnt, tmp_path / "sd2")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    ids = theirs.tokenizer("photo of a <new1> seven", padding="max_length").input_ids
    assert ids == learnt.tokenizer("photo of a <new1> seven", padding="max_length")["input_ids"]
    assert len(theirs.tokenizer) - 1 in ids and theirs.tokenizer.pad_token == "!"
