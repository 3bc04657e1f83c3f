"""What the benchmark of whole transformers asks the simulator: their operations and windows."""

import dataclasses
import importlib
import math
import types

import pytest

from conceptax.kernels.gna.presets import OF_ALL_LAYERS, PRESETS
from conceptax.kernels.gna.simulator.measure import Timing

# TFLOP of a forward pass at full size, by torch's counter on meta tensors: linear layers, and
# self-attention, with Wan's cross-attention in it.
COUNTED = {
    "hunyuan": (1569.2, 9828.0),
    "cosmos": (741.1, 1455.2),
    "wan-1.3b": (82.1, 200.9),
    "wan": (785.4, 892.9),
    "flux": (852.8, 3055.5),
}
LAYOUTS = {"wan-1.3b": (21, 30, 52), "wan": (21, 30, 52)}


@pytest.fixture(scope="module")
def speed(repository):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "benchmarks"))
        yield importlib.import_module("transformer_speed")


@pytest.mark.parametrize("name", COUNTED)
def test_operations_are_those_that_torch_counts(speed, name):
    subject = speed.SUBJECTS["full"][name]
    model = dataclasses.replace(
        speed.transformer_of(subject.settings, subject.text), layers=subject.layers
    )
    layout = LAYOUTS.get(name, PRESETS[subject.presets[0]].layout)
    work = model.operations(math.prod(layout))
    linear, attention = COUNTED[name]
    assert work.linear / 1e12 == pytest.approx(linear, rel=0.01)
    found = work.attention + (work.cross if name.startswith("wan") else 0)
    assert found / 1e12 == pytest.approx(attention, rel=0.001)
    for preset in subject.presets if name != "wan-1.3b" else ():
        theirs = PRESETS[preset].model
        names = ("name", "pixels", "frames")
        assert (
            dataclasses.replace(model, **{each: getattr(theirs, each) for each in names}) == theirs
        )


def test_windows_keep_their_share_of_the_published_layout(speed):
    for subjects in speed.SUBJECTS.values():
        for subject in subjects.values():
            for grid in subject.grids:
                pairs = zip(subject.presets, subject.windows(grid).values(), strict=True)
                for preset, (window, stride) in pairs:
                    layout, published = PRESETS[preset].layout, PRESETS[preset].window
                    share = math.prod(window) / math.prod(grid)
                    assert share == pytest.approx(
                        math.prod(published) / math.prod(layout), rel=0.25
                    )
                    assert all(s <= w <= g for s, w, g in zip(stride, window, grid, strict=True))
            for layout in {PRESETS[preset].layout for preset in subject.presets}:
                for preset in subject.presets:
                    if PRESETS[preset].layout == layout:
                        (found,) = speed.windows(layout, [preset]).values()
                        assert found == (PRESETS[preset].window, PRESETS[preset].stride)


def test_a_sample_is_its_steps(speed):
    result = speed.simulate_model("cosmos-56")
    found = speed.whole(result, 10.0, 5.0)
    assert found["sample_s"] == {
        "dense": 2 * 35 * 10,
        "after_dense_steps": 2 * (12 * 10 + 23 * 5),
        "all_steps": 2 * 35 * 5,
    }
    assert found["gain"]["all_steps"] == 2


def test_blocks_at_the_published_layout_are_counted_as_often_as_the_model_has_them(speed):
    subject = speed.gpu_subjects("full")["hunyuan"]
    (grid,) = subject.grids
    name, other = subject.windows(grid)
    model = types.SimpleNamespace(subject=subject, grid=grid, predicted=lambda *_: {})
    seconds = {"dense": 0.6, speed.OWN: 0.5, name: 0.1}
    timings = {each: Timing(9.0, (time,)) for each, time in seconds.items()}
    timings |= {f"attention, {each}": timing for each, timing in timings.items()}
    rows = [{"model": subject.title, "contender": each} for each in (name, other, "dense")]
    speed.add_gains(rows, model, timings)
    assert rows[0]["gain"] == pytest.approx(5) and "gain" not in rows[1] and "gain" not in rows[2]
    found = rows[0]["measured_whole"]  # 60 blocks, two at a time, in 50 steps, 15 of them dense
    assert found["sample_s"]["dense"] == pytest.approx(30 * 50 * 0.5)
    assert found["sample_s"]["after_dense_steps"] == pytest.approx(30 * (15 * 0.5 + 35 * 0.1))
    assert found["model"] == "HunyuanVideo" and found["size"] == "117 frames of 768x1280 px"


def test_predictions_cover_every_preset_and_device(speed):
    rows = speed.predictions()
    assert len(rows) == len(speed.DEVICES) * len(OF_ALL_LAYERS)
    assert all(row["gain"]["after_dense_steps"] > 1 for row in rows)
    assert speed.typical_error() < 0.03
