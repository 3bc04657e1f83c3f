"""The explorer's simulator in JavaScript beside Python's, number for number, and the page."""

import dataclasses
import importlib
import importlib.util
import itertools
import math
import re
from types import SimpleNamespace

import jaxtyping
import numpy as np
import pytest
from browser import browser_page
from javascript import run_in_node

from conceptax.cli import main
from conceptax.kernels.gna.presets import OF_ALL_LAYERS, PRESETS, Preset
from conceptax.kernels.gna.problem import windows_of
from conceptax.kernels.gna.simulator import GPUS, search, simulate, simulate_model
from conceptax.kernels.gna.tiles import visits
from conceptax.reporting.gna_explorer import SOURCES, explorer_constants, explorer_page
from conceptax.reporting.gna_tables import model_record

# Calls functions of the simulator by name.
SCRIPT = """
const simulator = require(given.source)(given.constants);
const plain = (_, value) => ArrayBuffer.isView(value) ? [...value] : value;
const answers = given.calls.map(([name, ...rest]) => simulator[name](...rest));
console.log(JSON.stringify(answers, plain));
"""


def in_javascript(calls):
    """What functions of the simulator give: calls are of a name and its arguments."""
    given = {"source": str(SOURCES / "simulator.js"), "constants": explorer_constants()}
    return run_in_node(SCRIPT, given | {"calls": calls})


@pytest.fixture
def unchecked():
    """No type checks, which take six times as long as the simulator; other tests have them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def snake(name):
    return re.sub(r"[A-Z]", lambda letter: f"_{letter[0].lower()}", name)


def draw(rng, most=(60, 16, 8)):
    """Settings as `simulate` takes them, of 1 to 3 dimensions."""
    rank = int(rng.integers(1, 4))
    number = lambda low, high: int(rng.integers(low, high + 1))  # noqa: E731
    layout = [number(1, most[rank - 1]) for _ in range(rank)]
    dilation = [number(1, min(3, x)) if rng.random() < 0.3 else 1 for x in layout]
    window = [number(1, x // d) for x, d in zip(layout, dilation, strict=True)]
    tiling = ("permuted", "permuted", "fused", "single-dim")[number(0, 3)]
    tiles = None, None
    if rng.random() < 0.8:
        own = 1 if tiling == "single-dim" else rank
        tiles = tuple(tuple(number(1, 9) for _ in range(own)) for _ in range(2))
    kv_heads = number(1, 3)
    additional = number(1, 40) if rng.random() < 0.5 else 0
    return {
        "token_layout": tuple(layout),
        "kernel_size": tuple(window),
        "stride": tuple(number(1, k) for k in window),
        "dilation": tuple(dilation),
        "is_causal": tuple(bool(rng.random() < 0.25) for _ in layout),
        "query_tile": tiles[0],
        "key_tile": tiles[1],
        "tiling": tiling,
        "batch": number(1, 2),
        "heads": kv_heads * number(1, 4),
        "kv_heads": kv_heads,
        "head_dim": (32, 64, 128, 80)[number(0, 3)],
        "additional": additional,
        "additional_queries": bool(rng.random() < 0.5),
        "mask_every_tile": bool(rng.random() < 0.5),
        "gpu": list(GPUS)[number(0, len(GPUS) - 1)],
    }


JAVASCRIPT = {
    "token_layout": "layout",
    "kernel_size": "window",
    "is_causal": "causal",
    "query_tile": "queryTile",
    "key_tile": "keyTile",
    "kv_heads": "kvHeads",
    "head_dim": "headDim",
    "additional_queries": "additionalQueries",
    "mask_every_tile": "maskEveryTile",
}


def settings(problem):
    """The same as the page's simulator takes them."""
    return {JAVASCRIPT.get(name, name): value for name, value in problem.items()}


def assert_equal(found, expected, told):
    """Numbers are the same, to the last bit; lists and tuples are alike."""
    if isinstance(expected, tuple | list):
        assert len(found) == len(expected), told
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other, told)
    else:
        assert found == expected, told


def test_simulations_are_equal_number_for_number(unchecked):
    rng = np.random.default_rng(26)
    problems = [draw(rng) for _ in range(2400)]
    found = in_javascript([("simulate", settings(problem)) for problem in problems])
    kinds = set()
    for problem, one in zip(problems, found, strict=True):
        expected = simulate(**problem)
        for name, value in one.items():
            assert_equal(value, getattr(expected, snake(name)), (name, problem))
        kinds.add((expected.tiling, len(expected.windows), expected.block_sparse))
    assert len(kinds) == 18  # all were met


def test_published_problems_are_equal(unchecked):
    """Of thousands of blocks, which are scheduled one by one."""
    problems = []
    for preset in map(PRESETS.__getitem__, OF_ALL_LAYERS):
        for gpu in GPUS:
            for stride in (1, preset.stride):
                attention = Preset(preset.window, stride)
                problems.append((preset, attention, gpu))
    calls = []
    for preset, attention, gpu in problems:
        windows = attention.windows(preset.layout)
        given = {
            "layout": preset.layout,
            "window": [w.kernel_size for w in windows],
            "stride": [w.stride for w in windows],
            "dilation": [1] * len(windows),
            "causal": [False] * len(windows),
            "tiling": "permuted",
            "maskEveryTile": gpu == "h100",
            "gpu": gpu,
        }
        calls.append(("simulateModel", preset.name, given, preset.steps, preset.dense_steps))
    for (preset, attention, gpu), one in zip(problems, in_javascript(calls), strict=True):
        expected = simulate_model(
            preset.name, attention=attention, gpu=gpu, mask_every_tile=gpu == "h100"
        )
        assert_model_equal(one, model_record(expected, gpu), expected)


def assert_model_equal(one, record, expected):
    told = (record["attention"], record["gpu"], record["size"])
    for name in ("image_alone", "with_text"):
        camel = "imageAlone" if name == "image_alone" else "withText"
        for key, value in one[camel].items():
            assert_equal(value, getattr(getattr(expected, name), snake(key)), (key, told))
    rows = {(row["tokens"], row["counted"]): row for row in one["rows"]}
    names = {"image alone": "imageAlone", "with text": "withText"}
    for row in record["rows"]:
        found = rows[names[row["tokens"]], row["counted"]]
        assert found["speedup"] == row["speedup"], told
        ends = {
            share: {snake(name): value for name, value in each.items()}
            for share, each in found["endToEnd"].items()
        }
        assert ends == row["end_to_end"], told
    assert one["shares"] == record["attention_shares"], told
    assert one["operations"] == {k: float(v) for k, v in record["operations"].items()}, told
    assert one["forward"] == record["forward_s"], told
    assert {snake(name): value for name, value in one["sample"].items()} == record["sample_s"]


def test_models_are_equal_on_other_layouts_and_steps(unchecked):
    rng = np.random.default_rng(3)
    problems = []
    while len(problems) < 120:
        name = OF_ALL_LAYERS[rng.integers(len(OF_ALL_LAYERS))]
        rank = len(PRESETS[name].layout)
        problem = draw(rng, most=(60, 48, 16))
        if len(problem["token_layout"]) != rank or problem["tiling"] == "single-dim":
            continue
        ones = {"dilation": (1,) * rank, "is_causal": (False,) * rank, "tiling": "permuted"}
        problem |= ones
        steps = int(rng.integers(1, 60))
        dense = None if rng.random() < 0.5 else int(rng.integers(0, steps + 1))
        problems.append((name, problem, steps, dense))
    expected = [
        simulate_model(
            name,
            attention=Preset(problem["kernel_size"], problem["stride"]),
            layout=problem["token_layout"],
            steps=steps,
            dense_steps=dense,
            **{each: problem[each] for each in ("query_tile", "key_tile", "mask_every_tile")},
            gpu=problem["gpu"],
        )
        for name, problem, steps, dense in problems
    ]
    constants = explorer_constants()
    calls, shares = [], []
    for (name, problem, steps, _), one in zip(problems, expected, strict=True):
        dense = one.preset.dense_steps
        calls.append(("simulateModel", name, settings(problem), steps, dense))
        shares.append(("denseStepsOf", constants["presets"][name], steps))
    for one, answer in zip(expected, in_javascript(calls), strict=True):
        gpu = next(name for name, gpu in GPUS.items() if gpu is one.with_text.gpu)
        assert_model_equal(answer, model_record(one, gpu), one)
    found = in_javascript(shares)
    for (name, _, steps, _), dense in zip(problems, found, strict=True):
        assert dense == PRESETS[name].dense_steps_of(steps)


def test_end_to_end_of_a_share_is_equal(unchecked):
    rng = np.random.default_rng(4)
    problems = [draw(rng) for _ in range(50)]
    simulations = in_javascript([("simulate", settings(problem)) for problem in problems])
    shares = rng.random((50, 2)).round(3).tolist()
    calls = [("endToEnd", one, *each) for one, each in zip(simulations, shares, strict=True)]
    for problem, each, found in zip(problems, shares, in_javascript(calls), strict=True):
        assert found == simulate(**problem).end_to_end(*each)


def test_strides_that_nothing_beats_are_equal(unchecked):
    rng = np.random.default_rng(5)
    problems = [draw(rng, most=(60, 24, 12)) for _ in range(300)]
    for problem in problems:
        if problem["tiling"] == "single-dim":
            problem |= {"query_tile": None, "key_tile": None}
    problems += [
        {
            "token_layout": preset.layout,
            "kernel_size": preset.window,
            "gpu": gpu,
            "dilation": (1,) * len(preset.layout),
            "is_causal": causal,
            "query_tile": None,
            "key_tile": None,
            "stride": preset.stride,
        }
        for preset in map(PRESETS.__getitem__, OF_ALL_LAYERS)
        for gpu in ("h200", "b200")
        for causal in ((False,) * len(preset.layout), (True,) + (False,) * len(preset.layout[1:]))
    ]
    keys = ("token_layout", "kernel_size", "dilation", "is_causal", "query_tile", "key_tile", "gpu")
    found = in_javascript([("search", settings(problem)) for problem in problems])
    met = 0
    for problem, choices in zip(problems, found, strict=True):
        expected = search(**{name: problem[name] for name in keys})
        assert len(choices) == len(expected), problem
        for choice, one in zip(choices, expected, strict=True):
            for field in dataclasses.fields(one):
                first, *rest = field.name.split("_")
                value = choice["".join([first, *map(str.capitalize, rest)])]
                assert_equal(value, getattr(one, field.name), (field.name, problem))
        met += len(choices) > 3
    assert met > 50
    # And the stride that is set, among all.
    calls = [
        ("choice", settings(problem | {"stride": choice["stride"]}), *tiles)
        for problem, choices in zip(problems, found, strict=True)
        for choice in choices[:1]
        for tiles in [(choice["queryTile"], choice["keyTile"])]
    ]
    firsts = [choices[0] for choices in found]
    assert in_javascript(calls) == firsts


def test_large_searches_thin_out_as_in_python(unchecked, monkeypatch):
    module = importlib.import_module("conceptax.kernels.gna.simulator.search")
    monkeypatch.setattr(module, "ALL_ROWS", 20)
    monkeypatch.setattr(module, "ALL_PRODUCTS", 40)
    constants = explorer_constants() | {"allRows": 20, "allProducts": 40}
    rng = np.random.default_rng(6)
    problems = [draw(rng, most=(60, 24, 12)) for _ in range(60)]
    keys = ("token_layout", "kernel_size", "dilation", "is_causal", "gpu")
    for problem in problems:
        problem |= {"query_tile": None, "key_tile": None}
    given = {"source": str(SOURCES / "simulator.js"), "constants": constants}
    calls = [("search", settings(problem)) for problem in problems]
    for problem, choices in zip(
        problems, run_in_node(SCRIPT, given | {"calls": calls}), strict=True
    ):
        expected = search(**{name: problem[name] for name in keys})
        assert [tuple(one["stride"]) for one in choices] == [one.stride for one in expected]


def test_what_a_query_sees_is_drawn(unchecked):
    rng = np.random.default_rng(7)
    problems = [draw(rng) for _ in range(300)]
    queries = [[int(rng.integers(x)) for x in problem["token_layout"]] for problem in problems]
    results = [simulate(**problem) for problem in problems]
    calls = [
        ("around", settings(problem), query, one.query_tile, one.key_tile)
        for problem, query, one in zip(problems, queries, results, strict=True)
    ]
    for problem, query, one, drawn in zip(
        problems, queries, results, in_javascript(calls), strict=True
    ):
        layout = problem["token_layout"]
        tokens = np.array(drawn["tokens"]).reshape(layout)
        seen = [w.mask(np.array([x]))[0] for w, x in zip(one.windows, query, strict=True)]
        mask = np.array(1)
        for each in seen:
            mask = np.multiply.outer(mask, each)
        np.testing.assert_array_equal((tokens & 4) > 0, mask > 0, str(problem))
        assert drawn["keys"] == mask.sum()
        assert tokens[tuple(query)] & 8
        assert ((tokens & 3) > 0)[mask > 0].all()
        if problem["tiling"] == "single-dim":
            tile = np.ravel_multi_index(query, layout) // one.query_tile[0]
            counts = one.visited_per_tile[0, tile], one.free_per_tile[0, tile]
            own = np.arange(math.prod(layout)) // one.query_tile[0] == tile
            np.testing.assert_array_equal((tokens.ravel() & 8) > 0, own)
            keys = np.arange(math.prod(layout)) // one.key_tile[0]
            pairs = np.unique(np.stack([keys, tokens.ravel() & 3]), axis=1)
            assert len(pairs[0]) == len(np.unique(keys))  # a key tile is of one kind
            kinds = pairs[1]
            assert ((kinds > 0).sum(), (kinds == 1).sum()) == counts
            assert (drawn["visited"], drawn["free"]) == counts
            continue
        kinds, own, counts = np.array(1), np.array(1), np.array([1, 1])
        for w, x, tq, tk in zip(one.windows, query, one.query_tile, one.key_tile, strict=True):
            group, place = x % w.dilation, x // w.dilation
            length = w.group_lengths()[group]
            found = visits(w, length, tq, tk, dynamic=problem["tiling"] == "fused")
            tile = place // tq
            inside = np.arange(length)
            # Dynamic tiles begin with the first key that the tile's first query sees.
            start = w.bounds(length, np.array([tile * tq]))[0][0]
            key = (inside - start * (problem["tiling"] == "fused")) // tk
            visited = (key >= found.first[tile]) & (key < found.last[tile])
            free = (key >= found.free_first[tile]) & (key < found.free_last[tile])
            along, mine = np.zeros(w.length, int), np.zeros(w.length, int)
            along[group :: w.dilation] = np.where(visited, 2 - free, 0)
            mine[group :: w.dilation] = inside // tq == tile
            kinds = np.minimum(np.multiply.outer(kinds, along), 2)  # free only if free in all
            own = np.multiply.outer(own, mine)
            counts = counts * [
                found.last[tile] - found.first[tile],
                found.free_last[tile] - found.free_first[tile],
            ]
        np.testing.assert_array_equal(tokens & 3, kinds, str(problem))
        np.testing.assert_array_equal((tokens & 8) > 0, own > 0, str(problem))
        assert [drawn["visited"], drawn["free"]] == counts.tolist()


def test_what_does_not_fit_is_said_in_the_same_words(unchecked):
    rng = np.random.default_rng(8)
    calls, expected, refused = [], [], 0
    while len(calls) < 400:
        problem = draw(rng)
        for name in ("kernel_size", "stride", "dilation"):
            if rng.random() < 0.4:
                problem[name] = tuple(int(x + rng.integers(0, 4)) for x in problem[name])
        told = ""
        try:
            windows_of(
                problem["token_layout"],
                *(problem[name] for name in ("kernel_size", "stride", "dilation")),
                names={"kernel_size": "window"},
            )
        except ValueError as error:
            told, refused = str(error), refused + 1
        calls.append(("misfit", settings(problem)))
        expected.append(told)
    assert in_javascript(calls) == expected and 100 < refused < 300


def test_advice_is_the_same(unchecked):
    rng = np.random.default_rng(9)
    calls, expected = [], []
    models = explorer_constants()["models"]
    for _ in range(300):
        problem = draw(rng, most=(40, 30, 20))
        rank = len(problem["token_layout"])
        windows = {"dilation": (1,) * rank, "is_causal": (False,) * rank}
        tiles = [[int(2 ** rng.integers(0, 4)) for _ in range(rank)] for _ in range(2)]
        preset = Preset(problem["kernel_size"], problem["stride"])
        name, model = "", None
        if rank > 1:
            base = PRESETS["flux-4k" if rank == 2 else "hunyuan"]
            preset = dataclasses.replace(preset, name=base.name, model=base.model)
            name, model = base.name, models[base.model.name]
        calls.append(("advice", settings(problem | windows), *tiles, name, model))
        expected.append(preset.advice(problem["token_layout"], tuple(map(tuple, tiles))))
    assert in_javascript(calls) == expected
    assert "" in expected
    assert all(any(word in text for text in expected) for word in ("always", " px) needs none"))


# --- the page ---


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page as the command writes it, opened from disk; its file and the browser's page."""
    folder = tmp_path_factory.mktemp("explorer")
    file = folder / "explorer.html"
    assert main(["gna", "explore", "--output", str(file)]) == 0
    with browser_page(folder / "profile") as opened:
        opened.file = file
        yield opened


def show(page, **changes):
    """Open the page with settings in its address, and wait for the answers."""
    given = {"preset": "hunyuan"} | changes
    address = "&".join(f"{name}={value}" for name, value in given.items())
    page.open("about:blank")
    page.errors.clear()
    page.open(f"{page.file.as_uri()}#{address}")
    page.wait("document.querySelector('#times tr') || !document.getElementById('refused').hidden")


def text(page, selector):
    return page.evaluate(f"document.querySelector('{selector}').innerText")


def texts(page, selector):
    return page.evaluate(
        f"[...document.querySelectorAll('{selector}')].map((one) => one.textContent)"
    )


def settled(page, condition):
    """Wait until the address holds what was changed."""
    page.wait(f"{condition} && document.getElementById('refused').hidden")


def test_page_says_what_the_simulator_does(page):
    show(page)
    expected = simulate_model("hunyuan").with_text
    assert texts(page, "#figures .value") == [
        f"{expected.flop_speedup:.2f}×",
        f"{expected.tile_speedup:.2f}×",
        f"{expected.worst_tile_speedup:.2f}×",
        "none",
        f"{expected.wave_speedup:.2f}×",
    ]
    rows = [row.split("\t") for row in text(page, "#times tbody").splitlines()]
    for name, row in zip(GPUS, rows, strict=True):
        one = simulate_model("hunyuan", gpu=name).with_text
        assert row[0] == name.upper()
        assert row[3:6] == [f"{one.wave_speedup:.2f}×", f"{one.speedup:.2f}×", str(one.waves)]
        assert float(row[1].removesuffix(" ms")) == pytest.approx(1e3 * one.seconds, rel=1e-3)
    assert "457 s with 15 of 50 steps dense" in text(page, "#whole-told")
    assert page.errors == []


def test_page_needs_nothing_else(page):
    page.requests.clear()
    show(page)
    asked = {url.split("#")[0] for url in page.requests}
    assert asked <= {page.file.as_uri(), "about:blank", "data:,"}
    held = page.file.read_text(encoding="utf-8")
    assert held == explorer_page() and len(held) < 3e6
    assert not re.search(r"/\* [\w.]+ \*/", held)  # every part is in its place


def test_address_holds_all_settings(page):
    given = {
        "preset": "own", "layout": "40x50", "window": "9x12", "stride": "2x3", "dilation": "1x2",
        "causal": "10", "queryTile": "4x8", "keyTile": "8x4", "tiling": "fused",
        "maskEveryTile": "1", "gpu": "b200", "heads": "12", "kvHeads": "4", "headDim": "64",
        "batch": "2", "additional": "77", "additionalQueries": "1", "steps": "20",
        "denseSteps": "5", "share": "42.5", "query": "11x13",
    }  # fmt: skip
    show(page, **given)
    page.key("Tab")
    page.evaluate("document.getElementById('link').click()")
    held = page.evaluate("location.hash")
    assert held == "#" + "&".join(f"{name}={value}" for name, value in given.items())
    expected = simulate(
        (40, 50),
        kernel_size=(9, 12),
        stride=(2, 3),
        dilation=(1, 2),
        is_causal=(True, False),
        query_tile=(4, 8),
        key_tile=(8, 4),
        tiling="fused",
        mask_every_tile=True,
        gpu="b200",
        heads=12,
        kv_heads=4,
        head_dim=64,
        batch=2,
        additional=77,
        additional_queries=True,
    )
    assert texts(page, "#figures .value")[:2] == [
        f"{expected.flop_speedup:.2f}×",
        f"{expected.tile_speedup:.2f}×",
    ]
    end = expected.end_to_end(0.425, 1 - 5 / 20)
    assert f"{end:.2f}× with 5 of 20 steps dense" in text(page, "#whole-told")
    show(page, stride="2x2x", gpu="tpu", layout="30x48x80")
    assert "stride, gpu could not be read and stay as the preset has them" in text(page, "#advice")
    assert page.evaluate("document.getElementById('gpu').value") == "h200"


def test_form_changes_what_is_shown(page):
    page.look(1200, 900)
    show(page)
    stride = "document.getElementById('stride-0')"
    page.evaluate(f"{stride}.select(), {stride}.focus()")
    page.type("2")
    settled(page, "location.hash.includes('stride=2x8x8')")
    assert "no masks" in text(page, "#point") and "Stride 2×8×8" in text(page, "#point")
    page.evaluate(f"{stride}.select()")
    page.type("19")
    page.wait("!document.getElementById('refused').hidden")
    assert text(page, "#refused").startswith("Stride must not exceed window; received 19 > 18")
    assert page.evaluate("document.getElementById('results').inert")
    page.evaluate(f"{stride}.select()")
    page.type("-")
    page.wait("document.getElementById('stride-0').getAttribute('aria-invalid') === 'true'")
    page.wait("document.getElementById('refused').textContent.includes('whole number')")
    # A layout whose sides do not divide by the tiles.
    show(page, layout="30x45x80", stride="2x8x8")
    assert "30x48x80 (117 frames of 768x1280 px) needs none" in text(page, "#advice")
    # Another number of dimensions is nobody's preset.
    page.evaluate(
        "document.getElementById('rank').value = '1';"
        "document.getElementById('rank').dispatchEvent(new Event('change'))"
    )
    settled(page, "location.hash.startsWith('#preset=own&layout=80&')")
    assert page.errors == []


def test_too_much_is_refused_in_a_sentence(page):
    large = {"preset": "own", "layout": "9000x9000", "window": "8x8", "stride": "1x1"}
    large |= {"dilation": "1x1", "causal": "00", "query": "0x0"}
    cases = {
        "up to 4,194,304 tokens": large,
        "too many blocks": large | {"layout": "2000x2000", "heads": 64, "kvHeads": 64, "batch": 9},
        "flattened tokens take too long": large
        | {"layout": "1000x1000", "window": "900x900", "tiling": "single-dim"},
        "a multiple of KV heads": large | {"layout": "9x9", "heads": 5, "kvHeads": 2},
    }
    for said, given in cases.items():
        show(page, **given)
        assert said in text(page, "#refused"), said
        assert text(page, "#refused").endswith(".")
    assert page.errors == []


def test_map_follows_pointer_and_keys(page):
    page.look(1200, 900)
    show(page, preset="flux-2k")
    page.evaluate("document.getElementById('map').scrollIntoView({block: 'center'})")
    left, top, width = page.evaluate(
        "(({x, y, width}) => [x, y, width])(document.getElementById('map').getBoundingClientRect())"
    )
    scale = min(width / 128, 620 / 128)
    page.point(left + 20.5 * scale, top + 100.5 * scale)
    page.wait(
        "document.getElementById('told').textContent.startsWith('Query (100, 20) sees 2,304')"
    )
    page.evaluate("document.getElementById('map').focus()")
    for name, shift, query in (
        ("ArrowRight", False, "(100, 21)"),
        ("ArrowUp", False, "(99, 21)"),
        ("ArrowDown", True, "(115, 21)"),
        ("Home", False, "(115, 0)"),
        ("ArrowLeft", False, "(115, 0)"),
        ("End", False, "(115, 127)"),
    ):
        page.key(name, shift=shift)
        assert f"Query {query}" in text(page, "#told")
    expected = simulate_model("flux-2k").image_alone
    tile = 115 // 16 * 16 + 127 // 8
    visited, free = (each[0, tile] for each in (expected.visited_per_tile, expected.free_per_tile))
    assert f"visits {visited} key tiles: {free} without a mask" in text(page, "#told")
    show(page)
    page.evaluate("document.getElementById('map').focus()")
    page.key("PageDown")
    assert "Query (16, 24, 40)" in text(page, "#told")
    assert page.errors == []


def test_strides_are_taken_from_their_picture(page):
    page.look(1200, 900)
    show(page)
    strides = [one.stride for one in search((30, 48, 80), kernel_size=(18, 24, 24))]
    assert [text.split()[0] for text in texts(page, "#choices tbody button")] == [
        "×".join(map(str, stride)) for stride in strides
    ]
    page.evaluate("document.querySelector('#pareto .point').focus()")
    page.key("End")
    assert text(page, "#point").startswith("Stride 2×8×8: 11.11×")
    page.key("Enter")
    settled(page, "location.hash.includes('stride=2x8x8')")
    page.wait("document.activeElement.matches('#pareto .point[aria-current]')")  # focus stays
    page.evaluate("document.querySelectorAll('#times button')[3].focus()")
    page.key("Enter")
    settled(page, "location.hash.includes('gpu=b200')")
    page.wait("document.activeElement.matches('#times [aria-pressed=true]')")
    page.evaluate("document.querySelectorAll('#times button')[2].click()")
    settled(page, "location.hash.includes('gpu=h200')")
    page.evaluate("document.getElementById('pareto').scrollIntoView({block: 'center'})")
    x, y = page.evaluate(
        "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
        "(document.querySelector('#pareto .point circle').getBoundingClientRect())"
    )
    page.point(x, y, press=True)
    settled(page, "location.hash.includes('stride=1x1x1')")
    assert page.errors == []


@pytest.mark.parametrize(
    "given",
    [
        {"preset": "flux-4k", "gpu": "b200"},
        {"preset": "cosmos-56", "stride": "1x8x1", "layout": "16x40x80", "denseSteps": "3"},
        {"preset": "wan-720p", "dilation": "2x1x1", "gpu": "a100"},
        {"preset": "own", "layout": "500", "window": "64", "stride": "16", "dilation": "2",
         "causal": "1", "heads": "8", "kvHeads": "2", "additional": "9", "query": "0",
         "additionalQueries": "0"},
    ],
)  # fmt: skip
def test_copied_code_gives_the_same_numbers(page, given, capsys):
    show(page, **given)
    attend, simulated, command = texts(page, "#code pre")
    compile(attend, "attend", "exec")
    names = {}
    exec(simulated, names)
    result = names["result"]
    result = getattr(result, "with_text", result)
    assert texts(page, "#figures .value")[:3] == [
        f"{value:.2f}×"
        for value in (result.flop_speedup, result.tile_speedup, result.worst_tile_speedup)
    ]
    assert f"{result.wave_speedup:.2f}×" == texts(page, "#figures .value")[4]
    assert main(command.replace("\\\n", " ").split()[1:]) == 0
    said = capsys.readouterr().out
    assert f"{result.flop_speedup:.2f} x" in said and f"{result.tile_speedup:.2f} x" in said


@pytest.mark.parametrize("width", [320, 390, 760, 1024, 1400])
def test_page_fits_windows_of_every_width(page, width):
    for dark, preset in ((False, "hunyuan"), (True, "flux-4k"), (False, "own")):
        page.look(width, 800, dark=dark, phone=width < 500)
        line = {"layout": "32768", "window": "2048", "stride": "256", "query": "500"}
        line |= {"dilation": "1", "causal": "0"}
        show(page, preset=preset, **(line if preset == "own" else {}))
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.errors == []
    small = page.evaluate(
        "[...document.querySelectorAll('button, select, input[type=number]')]"
        ".filter((one) => one.offsetParent && one.getBoundingClientRect().height < 31)"
        ".map((one) => one.outerHTML)"
    )
    assert small == []


def luminance(color):
    values = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colors_are_legible_in_both_modes():
    """Texts at WCAG's 4.5 to 1, what is drawn at 3 to 1 where it must be told apart."""
    style = (SOURCES / "explorer.css").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in
                   style.split("prefers-color-scheme: dark", 1))  # fmt: skip
    assert light.keys() == {*dark}
    for colors in (light, dark):
        for ink, paper in itertools.product(("ink", "quiet", "accent"), ("page", "card")):
            assert contrast(colors[ink], colors[paper]) >= 4.5, (ink, paper)
        assert contrast(colors["bad"], colors["bad-card"]) >= 4.5
        assert contrast(colors["ink"], colors["tip"]) >= 4.5
        for seen in ("free", "masked"):
            assert contrast(colors[seen], colors["card"]) >= 3, seen
            assert contrast(colors[seen], colors["skipped"]) >= 2.4, seen
        assert contrast(colors["query"], colors["card"]) >= 3


def test_command_writes_html_only(tmp_path, capsys):
    assert main(["gna", "explore", "--output", str(tmp_path / "page.txt")]) == 1
    assert "--output takes a .html file, received" in capsys.readouterr().err


def test_site_has_the_page_of_today(repository):
    """It is made with the site, not kept."""
    config = (repository / "mkdocs.yml").read_text(encoding="utf-8")
    assert ".ci/explorer.py" in config and not (repository / "docs" / "explorer.html").exists()
    structure = pytest.importorskip("mkdocs.structure.files")
    path = repository / ".ci" / "explorer.py"
    spec = importlib.util.spec_from_file_location("explorer_hook", path)
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    plugins = SimpleNamespace(_current_plugin=None)
    settings = SimpleNamespace(site_dir="site", use_directory_urls=True, plugins=plugins)
    files = hook.on_files(structure.Files([]), config=settings)
    assert files.get_file_from_path("explorer.html").content_string == explorer_page()
