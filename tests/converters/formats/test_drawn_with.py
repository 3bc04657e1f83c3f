"""Settings that an adapter's images are drawn with travel with it, whatever it is made into."""

import dataclasses
import json
import types
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from filled_models import filled, weights
from flow_toy import DYNAMIC

from conceptax.converters import (
    CheckpointError,
    DrawnWith,
    inspect_checkpoint,
    load_drawn_with,
    load_lora,
    load_pytorch,
    merge_lora,
    merge_parts,
    save_lora,
    save_pytorch,
    save_single_file,
    write_lora,
)
from conceptax.converters.formats.drawn_with import KEY, NAMED, drawn_with
from conceptax.flax_models.flux_transformer_2d import (
    FluxTransformer2DConfig,
    FluxTransformer2DModel,
)
from conceptax.flax_models.pipelines.flux import FluxPipeline
from conceptax.flax_models.pipelines.stable_diffusion_3 import StableDiffusion3Pipeline
from conceptax.methods.diffusion.text_to_image import TextToImage
from conceptax.methods.sampling import schedule_of
from conceptax.reporting.models import with_additions

URAE = NAMED["urae-4k"]
LAYER = "transformer_blocks.0.attn.to_q"
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", **DYNAMIC}
KINDS = (
    "header",
    "PEFT's folder",
    "diffusers' header",
    "as we write it",
    "kohya's",
    "its published name",
)


@pytest.fixture(scope="module")
def pipeline():
    config = FluxTransformer2DConfig(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=1,
        joint_attention_dim=6,
        pooled_projection_dim=4,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )
    return FluxPipeline(filled(FluxTransformer2DModel, config), *[None] * 5, FLOW)


def pairs():
    ones = np.ones((1, 32), np.float32)
    return {
        f"transformer.{LAYER}.lora_A.weight": ones,
        f"transformer.{LAYER}.lora_B.weight": ones.T,
    }


def write(path, metadata=None):
    content = {key: np.ascontiguousarray(value) for key, value in pairs().items()}
    safetensors.numpy.save_file(content, path, metadata)
    return path


def settings_of(pipeline):
    config, flow = pipeline.transformer.config, pipeline.scheduler_config
    shift = None if flow["use_dynamic_shifting"] else flow["shift"]
    return DrawnWith(config.ntk_factor, config.attention_scale, shift)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_states_them(pipeline, tmp_path, kind):
    stated = {"ntk_factor": 10, "attention_scale": "proportional", "shift": 3}
    path = tmp_path / "adapter_model.safetensors"
    if kind == "header":
        write(path := tmp_path / "a.safetensors", {KEY: json.dumps(stated)})
    elif kind == "PEFT's folder":
        write(path)
        settings = {"r": 1, "lora_alpha": 1, KEY: stated}
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        path = tmp_path
    elif kind == "diffusers' header":
        settings = {"transformer.r": 1, "transformer.lora_alpha": 1, f"transformer.{KEY}": stated}
        write(path, {"lora_adapter_metadata": json.dumps(settings)})
    elif kind == "its published name":
        write(path := tmp_path / "urae_4k_adapter_lora_conversion_dev.safetensors")
    else:
        naming = "kohya" if kind == "kohya's" else "peft"
        apart = load_lora(write(tmp_path / "bare.safetensors"), pipeline)
        write_lora(
            apart, pipeline, path := tmp_path / "x.safetensors", naming=naming, settings=URAE
        )
    assert load_drawn_with(path) == URAE
    merged = merge_parts(pipeline, path)
    assert settings_of(merged) == URAE and not load_drawn_with(write(tmp_path / "y.safetensors"))
    assert settings_of(pipeline) == DrawnWith(1.0)
    change = weights(merged.transformer)[f"{LAYER}.weight"]
    assert np.allclose(change - weights(pipeline.transformer)[f"{LAYER}.weight"], 1, atol=1e-4)
    told = inspect_checkpoint(path)
    assert told.healthy
    assert told.kind == "LoRA, drawn with ntk-factor=10 attention-scale=proportional shift=3"


def test_people_state_them_and_what_is_written_keeps_them(pipeline, tmp_path):
    path = write(tmp_path / "a.safetensors")
    merged = merge_lora(pipeline, path, settings="urae-4k")
    assert settings_of(merged) == URAE
    own = with_additions(pipeline, [path], 1.0, "ntk-factor=4 shift=2")
    assert settings_of(own) == DrawnWith(4.0, None, 2.0)
    given = {"attention_scale": 0.2}
    assert settings_of(merge_parts(pipeline, path, settings=given)) == DrawnWith(1.0, 0.2)

    save_lora(merged, pipeline, tmp_path / "b.safetensors", rank=1)
    assert load_drawn_with(tmp_path / "b.safetensors") == URAE
    save_lora(merged.transformer, pipeline.transformer, tmp_path / "c.safetensors", rank=1)
    assert load_drawn_with(tmp_path / "c.safetensors") == DrawnWith(10, "proportional")
    # Of a merged original they are no difference.
    again = merge_lora(merged, path, 0.5)
    save_lora(again, merged, tmp_path / "d.safetensors", rank=1)
    assert not load_drawn_with(tmp_path / "d.safetensors")

    folder = save_pytorch(merged.transformer, tmp_path / "transformer")
    read = json.loads((folder / "config.json").read_text())
    assert (read["ntk_factor"], read["attention_scale"]) == (10, "proportional")
    assert load_pytorch(folder).config == merged.transformer.config
    assert settings_of(merge_parts(pipeline, folder)) == dataclasses.replace(URAE, shift=None)
    plain = save_pytorch(pipeline.transformer, tmp_path / "plain")
    assert (
        not {"ntk_factor", "attention_scale"}
        & json.loads((plain / "config.json").read_text()).keys()
    )
    with pytest.raises(CheckpointError, match=r"ntk_factor None instead of 10"):
        merge_parts(merged, plain)
    model = load_pytorch(folder)
    model.config = pipeline.transformer.config
    written = save_pytorch(model, tmp_path / "undone") / "config.json"
    assert "ntk_factor" not in json.loads(written.read_text())

    single = save_single_file(merged, tmp_path / "single.safetensors")
    assert settings_of(load_pytorch(single)) == URAE
    one = save_single_file(
        dataclasses.replace(merged, scheduler_config={}), tmp_path / "1.safetensors"
    )
    assert settings_of(merge_parts(pipeline, one)) == dataclasses.replace(URAE, shift=None)


def test_what_does_not_fit_is_told(pipeline, tmp_path):
    path = write(tmp_path / "a.safetensors", {KEY: '{"ntk_factor": "large"}'})
    with pytest.raises(
        CheckpointError, match="ntk_factor takes a positive number, received 'large'"
    ):
        merge_lora(pipeline, path)
    assert not inspect_checkpoint(path).healthy
    for text in ("[1]", "{", "{}", '{"other": 1}', "null"):
        with pytest.raises(CheckpointError, match=f"a.safetensors: {KEY} says"):
            load_drawn_with(write(path, {KEY: text}))
    for given in ("urae", "shift", "shift=", "shift=-1", "theta=1", "", {"shift": True}, {}):
        with pytest.raises(ValueError, match=r"is urae-4k, or settings such as|takes a positive"):
            drawn_with(given)
    with pytest.raises(ValueError, match="settings are of a LoRA"):
        merge_parts(pipeline, save_pytorch(pipeline.transformer, tmp_path / "t"), settings=URAE)
    with pytest.raises(ValueError, match="--add-settings is for LoRA files"):
        with_additions(pipeline, [], 1.0, "urae-4k")
    other = StableDiffusion3Pipeline(pipeline.transformer, *[None] * 7, {"_class_name": "EDM"})
    with pytest.raises(CheckpointError, match="pipeline's EDM has no such shift"):
        URAE.applied(other, path)
    with pytest.raises(CheckpointError, match=r"which FLUX\.1's transformer alone can be"):
        URAE.applied(dataclasses.replace(pipeline, transformer=None), path)


def test_a_size_that_the_schedule_cannot_draw_is_told(pipeline):
    def tables(pipeline, side):
        own = {"pipeline": pipeline, "schedule": schedule_of(pipeline.scheduler_config)}
        drawer: Any = types.SimpleNamespace(**own)
        return TextToImage._sampler(drawer, None, 28, 0.0, (side, side, 16))

    with pytest.warns(UserWarning, match=r"all steps at almost pure noise.*--add-settings urae-4k"):
        tables(pipeline, 512)
    tables(pipeline, 256)
    assert tables(URAE.applied(pipeline, ""), 512).timesteps[-1] < 150
