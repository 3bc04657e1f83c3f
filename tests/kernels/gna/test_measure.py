"""Timing in turns, what tiles let one expect, and `conceptax gna bench`."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conceptax.cli import main
from conceptax.kernels import gna
from conceptax.kernels.gna.api import select
from conceptax.kernels.gna.cuda import build
from conceptax.kernels.gna.simulator import measure


def problem_of(layout, kernel_size, stride=1, heads=2, dim=8, dtype="float32"):
    x = jax.ShapeDtypeStruct((1, *layout, heads, dim), jnp.dtype(dtype))
    return gna.describe(x, x, x, kernel_size=kernel_size, stride=stride)


def test_all_take_turns_in_each_round(monkeypatch):
    order, waits, now = [], {"slow": 4.0, "fast": 2.0}, 0.0

    def contender(name):
        def call():
            nonlocal now
            now += waits[name]
            order.append(name)

        return call

    monkeypatch.setattr(measure, "time", types.SimpleNamespace(perf_counter=lambda: now))
    timings = measure.take_turns({name: contender(name) for name in waits}, 3, seconds=4.0)
    assert order[:4] == ["slow", "slow", "fast", "fast"]
    assert order[4:] == ["slow", "fast", "fast"] * 3
    assert timings == {name: (wait, (wait,) * 3) for name, wait in waits.items()}
    assert measure.speedup(timings["slow"], timings["fast"]) == 2
    order.clear()
    measure.take_turns({name: contender(name) for name in waits}, 2, seconds=0.0)
    assert order == ["slow", "fast"] * 3
    with pytest.raises(ValueError, match="at least 1 round, received 0"):
        measure.take_turns({}, 0)


def test_speedup_is_the_median_over_rounds():
    slow = measure.Timing(9.0, (2.0, 20.0, 6.0))
    fast = measure.Timing(9.0, (1.0, 5.0, 2.0))
    assert measure.speedup(slow, fast) == 3


@pytest.mark.parametrize(
    ("layout", "window", "stride", "tile", "limit"),
    [
        ((64, 64), (32, 32), (8, 8), (8, 8), 4),
        ((64, 64), (32, 32), (1, 1), (8, 8), 3.25),
        ((8, 16, 16), (4, 8, 8), (4, 4, 4), (4, 4, 4), 8),
        ((64, 64), (64, 64), (1, 1), (64,), 1),
    ],
)
def test_bound_is_that_of_the_best_tiles(layout, window, stride, tile, limit):
    found = measure.bound(problem_of(layout, window, stride), 64)
    assert found.tile_speedup == pytest.approx(limit, abs=5e-3)
    assert found.query_tile == tile and set(found.key_tile) == {1}


@pytest.mark.parametrize("implementation", ["xla", "cuda", "triton", "splash"])
def test_expected_tiles_are_those_of_the_backend(implementation):
    dtype = "bfloat16" if implementation == "triton" else "float32"
    problem = problem_of((64, 64), (32, 32), (8, 8), heads=4, dim=64, dtype=dtype)
    found = measure.expected(problem, implementation)
    assert found.pairs == 64**2 * 32**2
    assert len(found.query_tile) == len(found.key_tile) == 2
    if implementation == "triton":
        assert np.prod(found.query_tile) == np.prod(found.key_tile) == 128
    elif implementation == "splash":
        assert found.query_tile == found.key_tile == (8, 64)
    else:
        assert found.block_sparse and found.tile_speedup == 4
    dense = dataclasses.replace(problem, windows=problem_of((64, 64), (64, 64)).windows)
    assert measure.expected(dense, implementation).tile_speedup == 1
    with pytest.raises(ValueError, match="xla, cuda, triton or splash, received 'reference'"):
        measure.expected(problem, "reference")


def test_what_is_timed_is_attention():
    problem = problem_of((4, 6), (2, 3), (2, 1))
    given = measure.operands(problem)
    run = measure.attention(problem, "xla")
    expected = gna.neighborhood_attention(
        *given[:3], kernel_size=(2, 3), stride=(2, 1), implementation="reference"
    )
    assert given.query.shape == (1, 4, 6, 2, 8)
    output, *gradients = measure.training_step(run, given)()
    np.testing.assert_allclose(output, expected, atol=1e-5)
    np.testing.assert_allclose(measure.forward(run, given)(), expected, atol=1e-5)
    for one, other in zip(measure.backward(run, given)(), gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    everything = measure.attention(problem_of((4, 6), (4, 6)), "reference")
    dense = measure.dense_attention("xla", *given[:3])
    np.testing.assert_allclose(dense, everything(*given[:3]), atol=1e-5)


# Without a compiler, or with one that fails, the preferred implementation is another.


def test_default_implementation_needs_a_compiler(monkeypatch, tmp_path):
    problem = problem_of((8,), (4,))
    monkeypatch.setattr(build, "compiler", lambda target: None)
    assert select(problem) == "xla"


@pytest.mark.parametrize("broken", ["compiler", "folder"])
def test_default_implementation_survives_a_failing_build(broken, monkeypatch, tmp_path):
    from conceptax.kernels.gna import api, cuda

    script = tmp_path / "c++"
    script.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path if broken == "compiler" else script))
    for cached in (api._is_ready, cuda.prepare, build.load, build._version):
        cached.cache_clear()
    said = {"compiler": "did not compile(.|\n)*out of order", "folder": "XDG_CACHE_HOME"}[broken]
    with pytest.warns(RuntimeWarning, match=said):
        assert select(problem_of((8,), (4,))) == "xla"
    assert select(problem_of((8,), (4,))) == "xla"  # and says so once
    with pytest.raises(RuntimeError, match=said):
        cuda.prepare("cpu")
    for cached in (api._is_ready, cuda.prepare, build.load, build._version):
        cached.cache_clear()


# --- the command ---

LINE = [
    *("gna", "bench", "--layout", "8", "8", "--window", "4", "4", "--stride", "2", "2"),
    *("--heads", "2", "--head-dim", "8", "--implementation", "xla", "--rounds", "2"),
]


def test_bench_prints_and_records(tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert main([*LINE, "--output", str(file)]) == 0
    out = capsys.readouterr().out
    record = json.loads(file.read_text())
    assert [row["run"] for row in record["rows"]] == [
        "jax.nn, dense",
        "dense",
        "no masks",
        "stride 1",
        "asked for",
    ]
    assert record["rows"][4]["stride"] == [2, 2] and not record["rows"][4]["fitted"]
    assert record["implementation"] == "xla" and record["dtype"] == "float32"
    for row in record["rows"]:
        assert len(row["rounds_s"]) == 2 and min(row["rounds_s"]) == row["best_s"] > 0
        assert row["run"] in out
    # So little work is one tile whatever the stride, which tells no constants.
    assert record["fit"] is None and "no prediction: the runs do not tell" in out
    assert str(file) in out
    assert main([*LINE, "--output", str(file)]) == 1
    assert "already exists" in capsys.readouterr().err


def test_bench_fits_and_predicts(tmp_path, capsys, monkeypatch):
    """Times that follow the model are explained by its constants, and foretold."""
    true = dataclasses.replace(measure.this_machine("xla"), step=2e-4, launch=3e-5, mask=0.3)
    problems = {
        "dense": problem_of((16, 16), (16, 16), heads=4, dim=64),
        "no masks": problem_of((16, 16), (8, 8), (8, 8), heads=4, dim=64),
        "stride 1": problem_of((16, 16), (8, 8), heads=4, dim=64),
        "asked for": problem_of((16, 16), (8, 8), (4, 4), heads=4, dim=64),
    }
    seconds = {
        name: measure.expected(problem, "xla").blocks.seconds(true)
        for name, problem in problems.items()
    }

    def take_turns(contenders, rounds):
        assert list(contenders) == ["jax.nn, dense", *seconds] and rounds == 7
        return {name: measure.Timing(1.0, (seconds.get(name, 1.0),) * 3) for name in contenders}

    monkeypatch.setattr(measure, "take_turns", take_turns)
    file = tmp_path / "bench.json"
    line = "gna bench --layout 16 16 --window 8 8 --stride 4 4 --implementation xla"
    assert main([*line.split(), "--output", str(file)]) == 0
    record = json.loads(file.read_text())
    found = [record["fit"][name] for name in ("c_s", "t0_s", "mu")]
    assert found == pytest.approx([2e-4, 3e-5, 0.3], rel=1e-6)
    for row in record["rows"][1:]:
        assert row["predicted_s"] == pytest.approx(row["median_s"], rel=1e-6)
    assert "0.30" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "window", "stride"),
    [
        ({}, (32, 32), (8, 8)),
        ({"layout": (6,)}, (3,), (3,)),
        ({"layout": (64,), "dilation": (4,)}, (8,), (8,)),
        ({"window": (4,)}, (4, 4), (4, 4)),
        ({"stride": (2,)}, (32, 32), (2, 2)),
    ],
)
def test_bench_suits_what_is_not_given_to_what_is(given, window, stride):
    from conceptax.cli.gna import Bench
    from conceptax.cli.gna.bench import _windows

    windows = _windows(Bench(**given))
    assert tuple(w.kernel_size for w in windows) == window
    assert tuple(w.stride for w in windows) == stride


def test_bench_refuses_in_one_sentence(tmp_path, capsys):
    def refused(rest, text):
        assert main([*LINE, *rest.split()]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and text in err, err

    refused("--window 9 9", "9")
    refused("--rounds 0", "--rounds must be at least 1")
    refused("--implementation triton", "runs on a GPU")
    refused(f"--output {tmp_path}/a.txt", "--output takes a .json file")
    assert list(tmp_path.iterdir()) == []
