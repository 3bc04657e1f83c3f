"""The recipe of the bundled segmenter, and its smallest build by the command."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from conceptax.cli import main
from conceptax.converters import load_pytorch
from conceptax.methods.glyphs.captions import TEXTURES
from conceptax.methods.glyphs.segmenter import (
    FROZEN,
    MAFT_PLUS,
    SegmenterRecipe,
    Tuning,
    example_scenes,
    unseen_scenes,
    usage_of,
)
from conceptax.methods.segmentation.usage import read_usage
from conceptax.methods.training.paths import matches


def test_what_trains():
    tower, transfer = "backbone.clip_model.visual.trunk.stages.0.conv", "cdt.atten.q.kernel"
    text, decoder = "backbone.clip_model.transformer.layers.0", "sem_seg_head.predictor.x"
    for tuning, trained in (
        (FROZEN, [decoder]),
        (Tuning(True), [decoder, tower]),
        (MAFT_PLUS, [decoder, tower, transfer]),
    ):
        found = [
            path
            for path in (text, decoder, tower, transfer)
            if any(matches(pattern, path) for pattern in tuning.trainable)
        ]
        assert found == trained


def test_how_it_is_used():
    usage = usage_of(SegmenterRecipe(scale=1))
    assert usage.short_side == usage.long_side == 128 and usage.stuff == TEXTURES
    assert usage.vocabulary is not None and len(usage.vocabulary) == 13
    assert usage.vocabulary.classes[3][:2] == ("three", "3")
    assert all("{}" in template for template in usage.templates)


def test_examples_show_every_texture_and_several_digits():
    labels = [
        {segment.category for segment in scene.segments.values()} for _, scene in example_scenes()
    ]
    assert all(len(each) >= 4 for each in labels)
    assert {10, 11, 12, 7, 8, 9} <= set().union(*labels)
    assert [name for name, _ in example_scenes()] == [f"scene_{n}" for n in range(1, 5)]
    again = unseen_scenes(2)[1]
    assert again.image is unseen_scenes(2)[1].image  # drawn once


def test_wrong_recipes():
    for name in ("scale", "steps", "decoder_steps", "points"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, received 0"):
            SegmenterRecipe(**{name: 0})


def test_the_command_refuses(tmp_path, capsys):
    output = ["--output", str(tmp_path / "out"), "--workdir", str(tmp_path / "work")]
    assert main(["glyphs", "segmenter", *output, "--measure", "0"]) == 1
    assert "--measure must be at least 1, received 0." in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


SMALL = {
    **{"scale": 1, "scenes": 4, "batch_size": 2, "decoder_steps": 2, "steps": 1},
    **{"points": 16, "width": 32, "decoder_layers": 1},
}


# Nearly all of it is compilation.
@pytest.mark.slow
def test_a_build(tmp_path, monkeypatch, capsys):
    """The command writes what `segment run` takes, and builds the same again from its work."""
    monkeypatch.chdir(tmp_path)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    for lesson in ("digits", "quarters", "cells"):
        flags += [f"--pretraining.{lesson}.steps=2", f"--pretraining.{lesson}.batch-size=4"]
    command = ["glyphs", "segmenter", "--measure", "2", *flags]
    assert main([*command, "--output", "one"]) == 0
    assert "MB; mIoU seen" in capsys.readouterr().out
    logs = {path.name for path in (tmp_path / "glyph-segmenter-work").glob("*.jsonl")}
    assert logs == {f"{n}.jsonl" for n in ("digits", "quarters", "cells", "decoders", "together")}
    record = json.loads((tmp_path / "one/quality.json").read_text())
    assert 0 <= record["quality"]["pacc"] <= 100 and record["build"]["recipe"]["steps"] == 1
    recipe = dataclasses.replace(SegmenterRecipe(), scale=1)
    assert read_usage(tmp_path / "one") == usage_of(recipe)
    for name, scene in example_scenes():
        with Image.open(tmp_path / f"one/examples/{name}.png") as image:
            np.testing.assert_array_equal(image, scene.image)
    assert main(["segment", "run", "--model", "one"]) == 0
    assert (tmp_path / "segmented/scene_4_segments.png").is_file()

    assert main([*command, "--output", "two"]) == 0  # from the last checkpoints
    one, other = (jax.tree.leaves(nnx.state(load_pytorch(tmp_path / n))) for n in ("one", "two"))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
    capsys.readouterr()
    assert main([*command, "--output", "three", "--seed", "1"]) == 1
    assert "checkpoints of a run with other settings: --seed (0 before" in capsys.readouterr().err
    assert not (tmp_path / "three").exists()
