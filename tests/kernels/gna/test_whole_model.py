"""Whole models: every published end-to-end figure of the paper, rates, and the command."""

import json
import runpy
import statistics
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from conceptax.cli import main
from conceptax.cli.gna.commands import Simulate
from conceptax.kernels.gna.presets import OF_ALL_LAYERS, Preset
from conceptax.kernels.gna.simulator import GPUS, simulate_model
from conceptax.kernels.gna.simulator.whole_model import RATES, speedups

PUBLISHED = runpy.run_path("benchmarks/_published.py")
ROWS, predicted = PUBLISHED["ROWS"], PUBLISHED["predicted"]
COUNTED = ("pairs", "worst query tile", "mean query tile", "kernel and permutation")


@pytest.mark.parametrize(("name", "stride", "all_steps", "after_dense"), ROWS)
def test_published_predictions_are_reproduced(name, stride, all_steps, after_dense):
    found = predicted(name, stride)
    assert len(ROWS) == 21  # of two figures each
    for n, (flops, nattensim, _) in enumerate((all_steps, after_dense)):
        assert found["pairs"][n] == pytest.approx(flops, abs=0.006)
        assert found["worst query tile"][n] == pytest.approx(nattensim, abs=0.016)


def test_docs_have_the_predictions_beside_the_actual_figures():
    text = Path("docs/gna_simulator.md").read_text()
    errors = {counted: [] for counted in COUNTED}
    for name, stride, *published in ROWS:
        found = predicted(name, stride)
        actual = [row[2] for row in published]
        cells = [name, "×".join(map(str, stride)), pair(actual), *(pair(found[c]) for c in COUNTED)]
        both = {c: [p / a - 1 for p, a in zip(found[c], actual, strict=True)] for c in COUNTED}
        cells.append(
            " / ".join(f"{round(100 * error, 1) + 0.0:+.1f}" for error in both[COUNTED[-1]]) + " %"
        )
        assert f"| {' | '.join(cells)} |" in text
        for counted in COUNTED:
            errors[counted] += map(abs, both[counted])
    typical = [f"{100 * statistics.median(each):.1f} %" for each in errors.values()]
    worst = [f"{100 * max(each):.1f} %" for each in errors.values()]
    assert f"| median error | | | {' | '.join(typical)} | |" in text
    assert f"| largest error | | | {' | '.join(worst)} | |" in text


def pair(numbers):
    return " / ".join(f"{number:.2f}" for number in numbers)


def test_text_and_dense_steps_count():
    result = simulate_model("flux-4k", gpu="b200")
    bound = speedups(result.with_text)["pairs"]
    assert f"{bound:.2f}" == "8.96"
    assert f"{speedups(simulate_model('hunyuan').with_text)['pairs']:.2f}" == "10.63"
    assert result.replaced == 19 / 28
    assert result.end_to_end(bound, 0.518) == pytest.approx(1.45, abs=0.005)
    # At equal rates, the transformer alone.
    same = {"linear_rate": 1.0, "attention_rate": 1.0}
    for name, counted, all_steps, after in (
        ("flux-4k", "pairs", 3.27, 1.89),
        ("hunyuan", "pairs", 4.57, 2.21),
        ("cosmos-56", "pairs", 1.59, 1.32),
        ("cosmos-89", "pairs", 2.42, 1.63),
    ):
        result = simulate_model(name, **same)
        speedup = speedups(result.with_text)[counted]
        assert result.end_to_end(speedup, all_steps=True) == pytest.approx(all_steps, abs=0.011)
        assert result.end_to_end(speedup) == pytest.approx(after, abs=0.011)
    assert simulate_model("cosmos-56").with_text is not None
    assert simulate_model("cosmos-56").with_text.additional == 0
    fewer = simulate_model("flux-4k", steps=4, dense_steps=0)
    assert fewer.replaced == 1 and simulate_model("flux-4k", steps=20).preset.dense_steps == 6


def test_rates_give_seconds():
    result = simulate_model("flux-4k", linear_rate=600.0, attention_rate=542.0)
    work = result.operations
    dense = work.linear / 600e12 + work.attention / 542e12
    assert result.forward_seconds() == pytest.approx(dense) == pytest.approx(7.06, abs=0.01)
    assert result.attention_share == pytest.approx(work.attention / 542e12 / dense)
    assert result.rates.linear.basis == result.rates.attention.basis == "given"
    sparse = result.forward_seconds(result.kernel_speedup)
    assert sparse == pytest.approx(work.linear / 600e12 + 5.637 / result.kernel_speedup, rel=1e-3)
    assert result.sample_seconds(9) == pytest.approx(9 * dense + 19 * sparse)
    saved = result.sample_seconds(28) / result.sample_seconds(9)
    assert result.end_to_end(result.kernel_speedup) == pytest.approx(saved)
    twice = simulate_model("cosmos-56")
    assert twice.sample_seconds(35) == pytest.approx(2 * 35 * twice.forward_seconds())
    # The paper's runs took 129 s, of which 91.2 % were the transformer, and 628 s of 92.8 %.
    flux, hunyuan = (simulate_model(name, gpu="b200") for name in ("flux-4k", "hunyuan"))
    assert flux.sample_seconds(28) == pytest.approx(0.912 * 129, rel=0.08)
    assert hunyuan.sample_seconds(50) == pytest.approx(0.928 * 628, rel=0.08)


def test_every_known_rate_says_how_it_is_known():
    assert RATES.keys() == GPUS.keys()
    for rates in RATES.values():
        for rate in rates:
            assert rate.basis in ("measured", "published", "assumed") and rate.source
            assert 1e14 < rate.flops < 2e15


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "flux-8k"}, "one of flux-4k, flux-2k, .* received 'flux-8k'"),
        ({"model": Preset((8, 8))}, "model must be one of"),
        ({"dense_steps": 29}, "received 29 of 28"),
        ({"steps": 0}, "at least 1; received 0 of 0"),
        ({"linear_rate": -1.0}, r"linear_rate must be a positive number, received -1\.0"),
        ({"gpu": GPUS["h200"], "linear_rate": 9.0}, "attention_rate is not known"),
        ({"gpu": "abacus"}, "one of a100, h100"),
        ({"layout": (64, 64)}, r"nearest that it fits is 80x80 \(1280x1280 px\)"),
    ],
)
def test_wrong_arguments_are_told(change, says):
    with pytest.raises(ValueError, match=says):
        simulate_model(**{"model": "flux-4k", **change})


# --- the command ---


def lines_of(capsys, arguments):
    assert main(["gna", "simulate", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_command_prints_the_published_column(capsys, tmp_path):
    file = tmp_path / "flux.json"
    flags = ["--model", "flux-4k", "--gpu", "b200", "--output", str(file)]
    lines = lines_of(capsys, flags)
    bound, worst = lines[lines.index("image alone") + 1 :][:2]
    assert bound.split()[:7] == ["pairs", "10.24", "x", "1.88", "x", "1.46", "x"]
    assert worst.split()[:9] == ["worst", "query", "tile", "10.24", "x", "1.88", "x", "1.46", "x"]
    assert lines[lines.index("with text") + 1].split()[1] == "8.96"
    text = "\n".join(lines)
    assert "65,536 and 512 of text" in text and "the first 9 dense" in text
    assert "852.7 linear, 3,055.5 self-attention" in text and "1,212 TFLOP/s, published" in text
    assert "54.0 of 516 key tiles visited by the mean query tile, 54 by the worst" in text
    record = json.loads(file.read_text())
    (row,) = (
        row
        for row in record["rows"]
        if (row["tokens"], row["counted"]) == ("image alone", "worst query tile")
    )
    assert row["end_to_end"]["published"]["after_dense_steps"] == pytest.approx(1.46, abs=0.005)
    one = record["image_alone"]
    assert (one["worst_tile_speedup"], one["mean_visits"], one["worst_visits"]) == (10.24, 50, 50)
    assert record["rates"]["linear"]["basis"] == "published"
    assert main(["gna", "simulate", *flags]) == 1 and "already exists" in capsys.readouterr().err


def test_command_takes_other_windows_layouts_and_rates(capsys, tmp_path):
    own = ["--attention", "window=48x48 stride=16x16", "--linear-rate", "500", "--steps", "20"]
    text = "\n".join(lines_of(capsys, ["--model", "flux-4k", *own]))
    assert "window 48x48, stride 16x16; 20 steps, the first 6 dense" in text
    assert "linear, 500 TFLOP/s, given" in text
    text = "\n".join(lines_of(capsys, ["--model", "hunyuan", "--layout", "30", "45", "80"]))
    assert "30x48x80 (117 frames of 768x1280 px) needs none" in text and "published:" not in text
    text = "\n".join(lines_of(capsys, ["--model", "cosmos-89", "--window", "16", "32", "48"]))
    assert "window 16x32x48, stride 1x1x1;" in text and "with text" not in text
    assert "13.2 cross-attention" in text and "twice a step" in text
    file = tmp_path / "one.json"
    arguments = ["--layout", "64", "64", "--attention", "window=32 stride=8", "--output", str(file)]
    text = "\n".join(lines_of(capsys, arguments))
    assert "window       32x32, stride 8x8" in text and "worst query tile" in text
    record = json.loads(file.read_text())
    assert record["worst_tile_speedup"] <= record["tile_speedup"] and record["stride"] == [8, 8]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "takes --layout and --window, and a whole model --model."),
        (["--layout", "8", "8"], "takes --layout and --window"),
        (["--layout", "8", "8", "--stride", "2"], "--stride goes with --window"),
        (["--layout", "8", "--window", "4", "--steps", "9"], "--steps goes with --model"),
        (["--model", "flux-4k", "--heads", "9"], "--heads is said by --model: leave it out"),
        (["--model", "flux-4k", "--attention", "wide"], "is flux-4k, flux-2k,"),
        (["--model", "flux-4k", "--attention", "window=a"], "received 'window=a' in 'window=a'."),
        (["--model", "flux-4k", "--attention", "hunyuan"], "(hunyuan) has 3 dimensions"),
        (["--model", "flux-4k", "--attention", "window=9", "--window", "9"], "leave out --window"),
        (["--model", "flux-4k", "--dense-steps", "-1"], "--dense-steps must be between"),
        (["--model", "flux-4k", "--linear-rate", "0"], "--linear-rate must be a positive number"),
        (["--model", "flux-4k", "--output", "a.txt"], "--output takes a .json file"),
        (["--layout", "8", "8", "--attention", "window=9"], "nearest that it fits is 9x9."),
    ],
)
def test_command_refuses_in_one_sentence(arguments, says, capsys):
    assert main(["gna", "simulate", *arguments]) == 1
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and "Traceback" not in err


def test_command_offers_every_preset():
    hints = get_type_hints(Simulate)
    names = [name for choice in get_args(hints["model"]) for name in get_args(choice)]
    assert names == list(OF_ALL_LAYERS)
    assert list(get_args(hints["gpu"])) == list(GPUS)
