"""Attention presets by name, settings of one's own, and what is said where they do not fit."""

import dataclasses
import itertools
import math

import pytest

from conceptax.kernels.gna.presets import PRESETS, Preset, attention_preset
from conceptax.kernels.gna.simulator import GPUS, simulate

FLUX, HUNYUAN = PRESETS["flux-4k"], PRESETS["hunyuan"]


def simulated(setting, layout, **tiles):
    windows = setting.windows(layout)
    names = ("kernel_size", "stride", "dilation")
    settings = {name: tuple(getattr(window, name) for window in windows) for name in names}
    return simulate(layout, **settings, **tiles)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_need_no_masks(preset):
    assert set(preset.tiles) == {gpu.tile_class for gpu in GPUS.values()}
    preset.require_fit(preset.layout)
    for query_tile, key_tile in preset.tiles.values():
        tiles = {"query_tile": query_tile, "key_tile": key_tile}
        for setting in preset.settings:
            assert simulated(setting, preset.layout, **tiles).block_sparse
        assert preset.advice(preset.layout, (query_tile, key_tile)) == ""
    assert preset.dense_steps_of(preset.steps) == preset.dense_steps
    assert hash(preset) != hash(FLUX) or preset is FLUX


@pytest.mark.parametrize(
    ("name", "sparsity", "size"),
    [
        ("flux-4k", 90.2, "4096x4096 px"),
        ("flux-2k", 85.9, "2048x2048 px"),
        ("hunyuan", 91.0, "117 frames of 768x1280 px"),
        ("hunyuan-58", 58.3, "117 frames of 768x1280 px"),
        ("cosmos-56", 56.4, "121 frames of 704x1280 px"),
        ("cosmos-89", 89.1, "121 frames of 704x1280 px"),
        ("wan-720p", 92.5, "93 frames of 768x1280 px"),
    ],
)
def test_presets_are_the_published_ones(name, sparsity, size):
    preset = PRESETS[name]
    kept = math.prod(preset.window) / math.prod(preset.layout)
    assert 100 * (1 - kept) == pytest.approx(sparsity, abs=0.051)
    assert preset.model.size(preset.layout) == size


# Of the comments in its repository, and the means of 1 / S over its layers, which its published
# run times bear out (`test_simulator`).
@pytest.mark.parametrize(
    ("name", "layers", "mean", "size"),
    [
        (
            "cosmos-predict2-2b",
            {
                98: [0, 1],
                95: [2, 5, 10],
                92: [3, 4, 6, 7, 8, 9, 27],
                77: [*range(11, 23), 24, 25, 26],
                55: [23],
            },
            0.1653,
            "93 frames of 704x1280 px",
        ),
        (
            "cosmos-predict2-14b",
            {
                98: [*range(11)],
                95: [11, 12],
                92: [*range(13, 23)],
                77: [23, 25, 29, 30, 33, 35],
                55: [24, 26, 28, 31, 32, 34],
                0: [27],
            },
            0.1712,
            "93 frames of 704x1280 px",
        ),
    ],
)
def test_each_layer_has_the_published_sparsity(name, layers, mean, size):
    preset = PRESETS[name]
    assert preset.model.size(preset.layout) == size
    assert sorted(itertools.chain(*layers.values())) == [*range(preset.model.layers)]
    kept = [
        1.0 if one is None else 1 - simulated(one, (16, 44, 80)).sparsity for one in preset.layers
    ]
    for sparsity, indices in layers.items():
        for index in indices:
            assert round(100 * (1 - kept[index])) == sparsity
    assert sum(kept) / len(kept) == pytest.approx(mean, abs=5e-5)


# TFLOP per forward of one sample, counted with torch on the real classes at full size: linear and
# convolution layers, self-attention and cross-attention.
@pytest.mark.parametrize(
    ("name", "layout", "linear", "attention"),
    [
        ("flux-4k", (64, 64), 59.5, 14.9),
        ("flux-4k", (128, 128), 218.2, 200.0),
        ("flux-4k", (256, 256), 852.8, 3055.5),
        ("hunyuan", (30, 48, 80), 1569.2, 9828.0),
        ("hunyuan", (33, 45, 80), 1618.1, 10450.5),
        ("cosmos-56", (16, 44, 80), 741.1, 1455.2 + 13.2),
        ("wan-720p", (21, 30, 52), 785.4, 892.9),
        ("wan-720p", (21, 45, 80), 1809.7, 4713.7),
    ],
)
def test_operations_are_those_counted(name, layout, linear, attention):
    work = PRESETS[name].model.operations(math.prod(layout))
    assert work.linear / 1e12 == pytest.approx(linear, rel=1e-3)
    assert (work.attention + work.cross) / 1e12 == pytest.approx(attention, rel=2.5e-3)


def test_dense_steps_scale_with_the_steps():
    steps = (4, 20, 28, 50)
    assert [FLUX.dense_steps_of(n) for n in steps] == [1, 6, 9, 16]
    assert [HUNYUAN.dense_steps_of(n) for n in steps] == [1, 6, 8, 15]
    assert Preset((8, 8)).dense_steps_of(50) == 0


def test_a_setting_of_your_own():
    assert attention_preset("flux-4k") is FLUX and attention_preset(" hunyuan ") is HUNYUAN
    found = attention_preset("window=32x24 stride=8x8")
    assert (found.window, found.stride, found.layout) == ((32, 24), (8, 8), None)
    for_all = attention_preset("stride=8 window=32")
    assert (for_all.window, for_all.stride) == (32, 8)
    assert [w.kernel_size for w in for_all.windows((64, 32, 40))] == [32] * 3
    assert attention_preset("window=5x6x7").stride == 1
    found = attention_preset("window=allx4x16 dilation=1x11x5")
    assert found == dataclasses.replace(
        PRESETS["cosmos-predict2-2b"].layers[0], name="", model=None
    )
    assert [w.kernel_size for w in found.windows((5, 44, 80))] == [5, 4, 16]
    assert str(found) == "a window of allx4x16 at stride 1, dilation 1x11x5"
    assert attention_preset("window=allx8 stride=3x4").window == (None, 8)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("flux-8k", r"is flux-4k, .*, or a setting .* 'window=32x32 stride=8x8'; .* 'flux-8k'\."),
        ("", "received ''"),
        ("stride=8x8", "has a window, as in 'window=32x32 stride=8x8'; received 'stride=8x8'"),
        ("window=all stride=4", "has a window, as in .*; received 'window=all stride=4'"),
        ("window=32x", "received 'window=32x' in"),
        ("window=0", "received 'window=0' in"),
        ("window=4.5", r"received 'window=4\.5' in"),
        ("window=8 window=9", "received 'window=9' in 'window=8 window=9'"),
        ("window=8 dilation=0", "received 'dilation=0' in"),
        ("window=8 causal=1", "received 'causal=1' in"),
        ("window=8x8 stride=all", "received 'stride=all' in"),
        ("window=8x8 dilation=2x2x2", "the same 1 to 3 dimensions"),
        ("window=8x8 flux-4k", "received 'flux-4k' in"),
        ("window=8x8 stride=2x2x2", "the same 1 to 3 dimensions"),
        ("window=2x2x2x2", "the same 1 to 3 dimensions"),
        ("window=8x8 stride=4x9", "stride must not exceed its window; received 'window=8x8 str"),
        ("window=8x8 stride=9", "stride must not exceed its window"),
    ],
)
def test_a_wrong_setting_is_told(text, says):
    with pytest.raises(ValueError, match=says) as raised:
        attention_preset(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("attention", "layout", "says"),
    [
        (
            FLUX,
            (64, 256),
            "a window of 80x80 at stride 16x16 (flux-4k) does not fit a layout of 64x256 tokens; "
            "the nearest that it fits is 80x256 (1280x4096 px).",
        ),
        (HUNYUAN, (17, 48, 80), "is 18x48x80 (69 frames of 768x1280 px)."),
        (Preset(32, 8), (40, 30), "of 32 at stride 8 does not fit a layout of 40x30 tokens; the "),
        (
            Preset((None, 4, 16), dilation=(1, 11, 5)),
            (16, 40, 80),
            "dilation 1x11x5 does not fit a layout of 16x40x80 tokens; the nearest that it fits is "
            "16x44x80.",
        ),
        (
            PRESETS["cosmos-predict2-14b"],
            (16, 44, 80),
            "cosmos-predict2-14b has windows of their own for each of its 36 layers: take one of "
            "these, such as 'window=allx4x16 stride=1 dilation=1x11x5'.",
        ),
        (FLUX, (30, 48, 80), "has 2 dimensions and does not fit a layout of 30x48x80 tokens, whi"),
    ],
)
def test_a_window_that_does_not_fit_is_told(attention, layout, says):
    with pytest.raises(ValueError, match="of") as raised:
        attention.windows(layout)
    assert says in str(raised.value)


def test_layers_that_do_not_fit_are_told():
    preset = PRESETS["cosmos-predict2-2b"]
    preset.require_fit((5, 44, 90))
    with pytest.raises(
        ValueError, match=r"of 16x44x72 tokens; the nearest .* is 16x44x80 \(61 fra"
    ):
        preset.require_fit((16, 44, 72))
    assert "needs none" in preset.advice((16, 44, 84), preset.tiles["hopper"])


@pytest.mark.parametrize(
    ("name", "layout", "says"),
    [
        ("hunyuan", (30, 45, 80), "; 30x48x80 (117 frames of 768x1280 px) needs none."),
        ("wan-720p", (23, 46, 80), "; 24x48x80 (93 frames of 768x1280 px) needs none."),
        ("flux-4k", (250, 256), "250x256 tokens need masks for a window of 80x80 at stride 16x16"),
    ],
)
def test_the_nearest_layout_without_masks_is_named(name, layout, says):
    preset = PRESETS[name]
    assert says in preset.advice(layout, preset.tiles["hopper"])


def test_strides_finer_than_tiles_always_need_masks():
    said = attention_preset("window=32x32 stride=4x8").advice((64, 64), ((8, 8), (8, 8)))
    assert said.startswith("a window of 32x32 at stride 4x8 always needs masks; `conceptax gna se")
