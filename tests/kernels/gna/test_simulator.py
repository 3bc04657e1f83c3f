"""The simulator against brute force, published figures, and the commands that use it."""

import functools
import importlib
import itertools
import math
import time
import tracemalloc

import jaxtyping
import numpy as np
import pytest
from PIL import Image

from conceptax.cli import main
from conceptax.kernels.gna.simulator import (
    attention_share_of,
    end_to_end_speedup,
    fit,
    scaled_share,
    schedule,
    search,
    simulate,
)
from conceptax.kernels.gna.simulator.schedule import GPUS, Blocks, Gpu
from conceptax.kernels.gna.simulator.search import tabulate
from conceptax.kernels.gna.tiles import Window

search_module = importlib.import_module("conceptax.kernels.gna.simulator.search")

FLUX = {"token_layout": (256, 256), "kernel_size": 80}
HUNYUAN = {"token_layout": (30, 48, 80), "kernel_size": (18, 24, 24)}
LINE = {"token_layout": (32768,), "kernel_size": 2048}
HOPPER_3D = {"query_tile": (2, 8, 8), "key_tile": (2, 8, 8)}
BLACKWELL_3D = {"query_tile": (4, 8, 8), "key_tile": (2, 8, 8)}

# The problem, GPU, stride; FLOP-wise and tile-aware speed-up, per cent of visited tiles without
# masks (whole per cents, some of them cut off instead of rounded); NATTEN's milliseconds.
PUBLISHED = [
    (LINE, {}, "h100", 1, "16.00", "15.11", 89, 0.094848),
    (LINE, {}, "h100", 256, "16.00", "16.00", 100, 0.062687),
    (LINE, {}, "h100", 2048, "16.00", "16.00", 100, 0.059264),
    (LINE, {}, "b200", 1, "16.00", "14.32", 79, 0.058111),
    (LINE, {}, "b200", 256, "16.00", "16.00", 100, 0.037888),
    (LINE, {}, "b200", 2048, "16.00", "16.00", 100, 0.038240),
    (FLUX, {}, "h100", 1, "10.24", "7.51", 49, 16.201),
    (FLUX, {}, "h100", 16, "10.24", "10.24", 100, 7.914),
    (FLUX, {}, "b200", 1, "10.24", "7.06", 43, 8.692),
    (FLUX, {}, "b200", 16, "10.24", "10.24", 100, 4.114),
    (HUNYUAN, HOPPER_3D, "h100", 1, "11.11", "5.44", 17, 79.043),
    (HUNYUAN, HOPPER_3D, "h100", (16, 8, 8), "11.11", "11.11", 100, 23.359),
    (HUNYUAN, BLACKWELL_3D, "b200", 1, "11.11", "4.92", 15, 42.243),
    (HUNYUAN, BLACKWELL_3D, "b200", (16, 8, 8), "11.11", "10.42", 100, 13.010),
]


def published(problem, tiles, gpu, stride):
    heads = 1 if problem is LINE else 24
    settings = {"stride": stride, "gpu": gpu, "heads": heads, "mask_every_tile": True}
    return simulate(**problem, **tiles, **settings)


# --- brute force ---


@functools.cache
def sees(length, k, s, d, causal):
    """mask[i, j] of one dimension, written out query by query."""
    mask = np.zeros((length, length), bool)
    for x in range(length):
        group, i = x % d, x // d
        count = len(range(group, length, d))
        leader = i - i % s + (s - 1 if causal else s // 2)
        leader = min(leader, count - 1)
        if causal:
            start, end = max(leader - k + 1, 0), i + 1
        else:
            start = min(max(leader - k // 2, 0), count - k)
            end = start + k
        for j in range(start, end):
            mask[x, j * d + group] = True
    return mask


def places(layout, dilation, tile):
    """Group and tile of every token: [tokens], row-major over groups and over tiles."""
    coordinates = np.unravel_index(np.arange(math.prod(layout)), layout)
    groups = np.ravel_multi_index(
        [x % d for x, d in zip(coordinates, dilation, strict=True)], dilation
    )
    grid = [math.ceil(math.ceil(x / d) / t) for x, d, t in zip(layout, dilation, tile, strict=True)]
    inner = [x // d // t for x, d, t in zip(coordinates, dilation, tile, strict=True)]
    return groups, np.ravel_multi_index(inner, grid), math.prod(dilation), math.prod(grid)


def count(mask, query, key, queries, keys):
    """Visited and mask-free tile pairs per query tile, from pairs [N, N] and tiles [N], [N, N]."""
    tiles = (query[:, None] * keys + key).ravel()
    seen = np.bincount(tiles, mask.ravel(), queries * keys).reshape(queries, keys)
    pairs = np.bincount(tiles, minlength=queries * keys).reshape(queries, keys)
    return (seen > 0).sum(axis=1), ((seen > 0) & (seen == pairs)).sum(axis=1)


def brute_force(problem, tiling):
    """Pairs, and visited and mask-free key tiles per query tile, by enumeration of all pairs."""
    layout, dilation = problem["token_layout"], problem["dilation"]
    along = [
        sees(*row)
        for row in zip(
            layout,
            *(problem[name] for name in ("kernel_size", "stride", "dilation", "is_causal")),
            strict=True,
        )
    ]
    tokens = math.prod(layout)
    mask = functools.reduce(np.multiply.outer, along)
    rank = len(layout)
    mask = mask.transpose(*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)).reshape(tokens, tokens)
    query_tile, key_tile = problem["query_tile"], problem["key_tile"]
    x = np.arange(tokens)
    if tiling == "single-dim":
        query, key = x // query_tile[0], x // key_tile[0]
        counts = count(mask, query, key[None], query[-1] + 1, key[-1] + 1)
        return mask.sum(), [each[None] for each in counts]
    groups, inner, group_count, grid = places(layout, dilation, query_tile)
    query = groups * grid + inner
    if tiling == "permuted":
        groups, inner, _, key_grid = places(layout, dilation, key_tile)
        key = (groups * key_grid + inner)[None]
        counts = count(mask, query, key, group_count * grid, group_count * key_grid)
    else:
        # Key tiles are counted from the first key that the query tile sees along each dimension;
        # keys before it and in other groups go to a tile that nobody visits.
        coordinates = np.stack(np.unravel_index(x, layout))
        inside = coordinates // np.array(dilation)[:, None]
        key = np.zeros((tokens, tokens), int)
        for tile in np.unique(query):
            members = np.flatnonzero(query == tile)
            anywhere = mask[members].any(axis=0)
            key_groups = groups == groups[members[0]]
            offset = inside - inside[:, anywhere].min(axis=1, keepdims=True)
            place = offset // np.array(key_tile)[:, None] + 1
            place = np.where((offset < 0).any(axis=0) | ~key_groups, 0, place)
            key[members] = np.ravel_multi_index(list(place), [max(layout) + 2] * rank)
        counts = count(mask, query, key, group_count * grid, (max(layout) + 2) ** rank)
    return mask.sum(), [each.reshape(group_count, grid) for each in counts]


def random_problem(rng):
    rank = int(rng.integers(1, 4))
    layout = rng.integers(1, (32, 9, 5)[rank - 1] + 1, rank)
    dilation = rng.integers(1, np.minimum(layout, 3) + 1)
    kernel_size = rng.integers(1, layout // dilation + 1)
    stride = rng.integers(1, kernel_size + 1)
    problem = {
        "token_layout": layout,
        "dilation": dilation,
        "kernel_size": kernel_size,
        "stride": stride,
        "query_tile": rng.integers(1, 5, rank),
        "key_tile": rng.integers(1, 5, rank),
    }
    problem = {name: tuple(map(int, values)) for name, values in problem.items()}
    problem["is_causal"] = tuple(map(bool, rng.random(rank) < 0.25))
    return problem


@pytest.fixture
def unchecked():
    """No type checks, which take six times as long as the simulator; other tests have them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("tiling", "problems"),
    [
        ("permuted", 1500),
        ("fused", 500),
        ("single-dim", 500),
        pytest.param("permuted", 7000, marks=pytest.mark.slow),
        pytest.param("fused", 2000, marks=pytest.mark.slow),
        pytest.param("single-dim", 2000, marks=pytest.mark.slow),
    ],
)
def test_counts_are_exact(tiling, problems, unchecked):
    rng = np.random.default_rng(len(tiling))
    clean = 0
    for _ in range(problems):
        problem = random_problem(rng)
        if tiling == "single-dim":
            problem |= {
                "query_tile": problem["query_tile"][:1],
                "key_tile": problem["key_tile"][:1],
            }
        result = simulate(**problem, tiling=tiling)
        pairs, (visited, free) = brute_force(problem, tiling)
        assert result.pairs == pairs, problem
        np.testing.assert_array_equal(result.visited_per_tile, visited, str(problem))
        np.testing.assert_array_equal(result.free_per_tile, free, str(problem))
        assert (result.visited_tiles, result.free_tiles) == (visited.sum(), free.sum()), problem
        assert result.block_sparse == (visited.sum() == free.sum()), problem
        clean += result.block_sparse
    assert problems // 20 < clean < problems  # both kinds were met


def test_tables_of_a_search_are_exact():
    for length, causal, dilation in itertools.product((1, 7, 12), (False, True), (1, 3)):
        if length < dilation:
            continue
        table = tabulate(Window(length, 1, 1, dilation, causal), 4, 3)
        assert len(table.stride) == sum(range(2, length // dilation + 1)) or length == 1
        names = ("kernel_size", "stride", "pairs", "visited", "free", "most")
        columns = (getattr(table, name) for name in names)
        for k, s, *counts in zip(*columns, strict=True):
            one = simulate(
                (length,),
                kernel_size=int(k),
                stride=int(s),
                dilation=dilation,
                is_causal=causal,
                query_tile=4,
                key_tile=3,
            )
            assert counts == [one.pairs, one.visited_tiles, one.free_tiles, one.worst_visits]


def test_block_sparsity_is_exact(unchecked):
    """A sufficient rule, and problems where masks are needed though a closed form denies it."""
    rng = np.random.default_rng(0)
    met = 0
    for _ in range(4000):
        query_tile, key_tile = (int(2 ** rng.integers(0, 4)) for _ in range(2))
        length, stride = int(rng.integers(2, 64)), 2 * int(rng.integers(1, 16))
        kernel_size = 2 * int(rng.integers(1, 32))
        rule = (
            stride <= kernel_size <= length
            and stride % query_tile == kernel_size % key_tile == 0
            and (length - kernel_size) % key_tile == 0
            and (stride - kernel_size) % (2 * key_tile) == 0
        )
        if rule:
            tiles = {"query_tile": query_tile, "key_tile": key_tile}
            assert simulate((length,), kernel_size=kernel_size, stride=stride, **tiles).block_sparse
            met += 1
    assert met > 100
    assert not simulate((8,), kernel_size=4, query_tile=1, key_tile=2).block_sparse
    backward = {"query_tile": (1, 8, 8), "key_tile": (2, 8, 8)}
    problem = {"kernel_size": (4, 8, 8), "stride": (1, 8, 8)}
    assert not simulate((8, 16, 16), **problem, **backward).block_sparse


# --- published figures ---


@pytest.mark.parametrize(
    ("problem", "tiles", "gpu", "stride", "flops", "tile", "free", "milliseconds"), PUBLISHED
)
def test_published_speedups_and_times(problem, tiles, gpu, stride, flops, tile, free, milliseconds):
    result = published(problem, tiles, gpu, stride)
    assert f"{result.flop_speedup:.2f}" == flops
    assert f"{result.tile_speedup:.2f}" == tile
    assert free in (round(100 * result.free_share), int(100 * result.free_share))
    assert result.block_sparse == (free == 100)
    assert abs(1e3 * result.seconds / milliseconds - 1) < 0.09


def test_tilings_of_published_problems():
    fused, flat = {"tiling": "fused"}, {"tiling": "single-dim", "query_tile": 128, "key_tile": 128}
    assert f"{simulate(**FLUX, **fused).tile_speedup:.2f}" == "8.33"
    assert f"{simulate(**HUNYUAN, **fused, **HOPPER_3D).tile_speedup:.2f}" == "6.87"
    assert f"{simulate(**FLUX, **flat).tile_speedup:.2f}" == "3.20"
    assert f"{simulate(**HUNYUAN, **flat).tile_speedup:.2f}" == "3.23"


def test_permutation_is_memory_traffic():
    flux = simulate(**FLUX, stride=16, heads=24, gpu="h200")
    hunyuan = simulate(**HUNYUAN, stride=(16, 8, 8), heads=24, gpu="h200")
    assert 1e3 * flux.permutation == pytest.approx(0.75, abs=0.005)
    assert 1e3 * hunyuan.permutation == pytest.approx(1.3, abs=0.05)
    assert simulate(**LINE).permutation == 0
    assert flux.speedup < flux.wave_speedup < flux.tile_speedup * 1.02


# Cosmos-Predict2 at 720p: mean of 1/S over its layers (2B: 28 layers, 14B: 36), dense and sparse
# seconds at 10 and at 16 frames a second (16 and 24 latent frames), and the error allowed.
@pytest.mark.parametrize(
    ("relative_time", "at_10", "at_16", "allowed"),
    [
        (0.1653, (111.1, 52.9), (221.7, 89.4), 0.0035),
        (0.1712, (436.7, 252.1), (836.9, 412.9), 0.003),
        (0.1653, (115.1, 56.0), (228.8, 94.2), 0.003),
        (0.1712, (447.9, 260.0), (856.9, 426.0), 0.003),
        (0.1653, (62.4, 32.6), (123.9, 54.0), 0.0165),
        (0.1712, (230.0, 136.5), (439.4, 223.1), 0.016),
    ],
    ids=["2B-h200", "14B-h200", "2B-h100", "14B-h100", "2B-b200", "14B-b200"],
)
def test_published_end_to_end(relative_time, at_10, at_16, allowed):
    share = attention_share_of(at_10[0] / at_10[1], relative_time)
    assert end_to_end_speedup(share, relative_time) == pytest.approx(at_10[0] / at_10[1])
    predicted = end_to_end_speedup(scaled_share(share, 24 / 16), relative_time)
    assert predicted == pytest.approx(at_16[0] / at_16[1], rel=allowed)


# --- the rest of a simulation ---


def test_additional_tokens():
    problem = {"kernel_size": 4, "stride": 2, "query_tile": 4, "key_tile": 4, "heads": 2}
    plain = simulate((16,), **problem)
    more = simulate((16,), additional=6, **problem)
    assert more.pairs == plain.pairs + 16 * 6 and more.dense_pairs == 16 * 22
    assert more.visited_tiles == plain.visited_tiles + 4 * 2 and more.dense_tiles == 4 * 6
    assert more.free_tiles == plain.free_tiles + 4  # the second tile is ragged
    joint = simulate((16,), additional=6, additional_queries=True, **problem)
    assert joint.pairs == more.pairs + 6 * 22 and joint.dense_pairs == 22 * 22
    assert joint.query_tiles == 6 and joint.dense_tiles == 6 * 6
    assert joint.visited_tiles == more.visited_tiles + 2 * 6
    assert joint.block_sparse == more.block_sparse == plain.block_sparse


def test_worst_query_tile():
    """Padding has no part in it, nor have text queries, which see everything."""
    problem = {"kernel_size": 5, "query_tile": 4, "key_tile": 2}
    one = simulate((10,), **problem)  # keys 0 to 5, 2 to 9 and 5 to 9
    assert one.visited_per_tile.tolist() == [[3, 4, 3]]
    assert (one.worst_visits, one.all_visits, one.worst_tile_speedup) == (4, 5, 1.25)
    assert one.mean_visits == pytest.approx(10 / 3)
    joint = simulate((10,), additional=3, additional_queries=True, **problem)
    assert (joint.worst_visits, joint.all_visits) == (6, 7)
    assert joint.mean_visits == pytest.approx(10 / 3 + 2)
    padded = simulate((9,), kernel_size=4, dilation=2, query_tile=4, key_tile=2)
    assert padded.visited_per_tile.tolist() == [[3, 3], [2, 0]]  # the last holds no token
    assert padded.mean_visits == pytest.approx(8 / 3)
    (choice,) = search((8,), kernel_size=4, query_tile=2, key_tile=2)[-1:]
    again = simulate((8,), kernel_size=4, stride=choice.stride, query_tile=2, key_tile=2)
    assert choice.worst_tile_speedup == again.worst_tile_speedup < again.tile_speedup


def test_dense_window_gains_nothing():
    result = simulate((8, 16), kernel_size=(8, 16), query_tile=4, key_tile=(4, 8), heads=3, batch=2)
    assert result.flop_speedup == result.tile_speedup == result.bound_share == 1
    assert result.sparsity == 0 and result.block_sparse
    assert result.makespan == result.dense_makespan
    assert result.flops == result.tile_flops == 4 * 128 * 128**2 * 6


def test_masks_where_needed_take_less_time():
    selective = simulate(**FLUX, heads=24)
    everywhere = simulate(**FLUX, heads=24, mask_every_tile=True)
    assert everywhere.seconds / selective.seconds == pytest.approx(1.2, abs=0.03)
    share = selective.end_to_end(0.5)
    assert 1 < share < 2 and selective.end_to_end(0.5, replaced=0.0) == 1
    assert 1 < selective.end_to_end(0.5, replaced=0.5) < share


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kernel_size": 9}, "kernel_size"),
        ({"stride": 5}, "stride"),
        ({"query_tile": 2}, "come together"),
        ({"query_tile": (2, 2), "key_tile": 2}, "query_tile"),
        ({"gpu": "abacus"}, "one of a100, h100, h200, b200"),
        ({"heads": 4, "kv_heads": 3}, "multiple of kv_heads"),
        ({"batch": 0}, "batch must be at least 1, received 0"),
        ({"additional": -1}, "received -1"),
    ],
)
def test_wrong_arguments_are_told(change, text):
    with pytest.raises(ValueError, match=text):
        simulate(**{"token_layout": (8,), "kernel_size": 4, **change})


# --- time ---


def test_blocks_start_on_the_first_free_slot():
    gpu = Gpu(processors=2, bandwidth=1.0, step=1.0, launch=0.0, mask=1.0)
    nothing = np.zeros(4)
    assert Blocks(np.array([5.0, 1, 1, 1]), nothing).seconds(gpu) == 5
    assert Blocks(np.array([1.0, 1, 1, 5]), nothing).seconds(gpu) == 6
    assert Blocks(np.array([1.0, 1, 1, 1]), np.array([0.0, 0, 2, 0])).seconds(gpu) == 4
    equal = Blocks(np.full(5, 2.0), np.zeros(5), repeats=3)
    assert equal.seconds(gpu) == 8 * 2 and equal.critical_work(gpu).tolist() == [8, 16, 0]
    rng = np.random.default_rng(0)
    costs = rng.uniform(1, 3, 50)
    seconds = Blocks(costs, np.zeros(50), repeats=2).seconds(gpu)
    assert max(costs.max(), costs.sum()) <= seconds <= costs.sum() + costs.max()


def test_fit_recovers_constants():
    true = Gpu(processors=132, bandwidth=1e12, step=2e-6, launch=9e-6, mask=0.4)
    runs = [simulate(**FLUX, stride=stride, heads=3) for stride in (1, 8, 16)]
    timed = [(run.blocks, run.blocks.seconds(true)) for run in runs]
    timed.append((runs[0].dense_blocks, runs[0].dense_blocks.seconds(true)))
    found = fit(timed, GPUS["h200"])
    assert (found.step, found.launch, found.mask) == pytest.approx((2e-6, 9e-6, 0.4), rel=1e-6)
    with pytest.raises(ValueError, match="at least three runs"):
        fit(timed[:2], true)
    with pytest.raises(ValueError, match="do not tell"):
        fit([timed[3]] * 3, true)


@pytest.mark.parametrize("gpu", ["h100", "b200"])
def test_constants_are_the_fit_to_published_times(gpu):
    rows = [row for row in PUBLISHED if row[2] == gpu]
    runs = [(published(*row[:4]).blocks, row[7] / 1e3) for row in rows]
    found, given = fit(runs, GPUS[gpu]), GPUS[gpu]
    assert found.step == pytest.approx(given.step, rel=0.01)
    assert found.launch == pytest.approx(given.launch, rel=0.05)
    assert found.mask == pytest.approx(given.mask, rel=0.02)


def test_amdahl():
    assert end_to_end_speedup(0.5, 0.0) == 2
    assert end_to_end_speedup(0.5, 0.5, replaced=0.5) == 1 / 0.875
    assert end_to_end_speedup(0.5, 0.5, permutation=0.5) == 1
    assert scaled_share(0.5, 3.0) == 0.75
    with pytest.raises(ValueError, match=r"attention_share must be between 0 and 1, received 1\.2"):
        end_to_end_speedup(1.2, 0.1)
    with pytest.raises(ValueError, match="no attention share explains"):
        attention_share_of(4.0, 0.5)


# --- search ---


def test_search_finds_the_finest_block_sparse_strides():
    fastest = search(**HUNYUAN)[0]
    assert (fastest.stride, fastest.query_tile) == ((2, 8, 8), (2, 8, 8))
    assert fastest.block_sparse and f"{fastest.tile_speedup:.2f}" == "11.11"
    assert search(**HUNYUAN, **BLACKWELL_3D)[0].stride == (16, 8, 8)
    assert search(**FLUX)[0].stride == (16, 16)
    assert search(**LINE)[0].stride == (256,)
    assert search(**HUNYUAN)[-1].stride == (1, 1, 1)


@pytest.mark.parametrize(
    ("layout", "sparsity"),
    [((256, 256), 0.9), ((30, 48, 80), 0.91), ((16, 44, 80), 0.9)],
    ids=["flux", "hunyuan", "cosmos"],
)
def test_search_over_all_windows_is_fast(layout, sparsity):
    start = time.process_time()
    choices = search(layout, sparsity=sparsity)
    assert time.process_time() - start < 1
    assert len(choices) > 5
    assert all(abs(choice.sparsity - sparsity) <= 0.01 + 1e-9 for choice in choices)
    speedups = [choice.speedup for choice in choices]
    assert speedups == sorted(speedups, reverse=True)


def test_cosmos_needs_tiles_that_divide_its_layout():
    at = {"sparsity": 0.9, "block_sparse": True}
    poor = search((16, 44, 80), **at, **HOPPER_3D)
    good = search((16, 44, 80), **at, query_tile=(4, 4, 8), key_tile=(4, 4, 8))
    shares = [[c.tile_speedup / c.flop_speedup for c in each] for each in (poor, good)]
    assert max(shares[0]) == pytest.approx((44 / 48) ** 2, abs=1e-9)
    assert max(shares[1]) == 1


@pytest.mark.parametrize(
    ("layout", "causal", "dilation", "at"),
    [
        ((6, 9), (False, False), (1, 1), {"sparsity": 0.6, "tolerance": 0.1}),
        ((6, 9), (True, False), (1, 1), {"sparsity": 0.6, "tolerance": 0.1}),
        # A causal window's pairs change with its stride: what beats another may leave the band.
        ((12,), (True,), (1,), {"sparsity": 0.7, "tolerance": 0.01}),
        ((19,), (True,), (2,), {"sparsity": 0.8, "tolerance": 0.02}),
        ((8, 6), (True, True), (1, 1), {"sparsity": 0.8, "tolerance": 0.02}),
        ((4, 5, 3), (False, True, True), (1, 1, 1), {"sparsity": 0.8, "tolerance": 0.01}),
        ((16,), (True,), (1,), {"kernel_size": (13,)}),
        ((8, 6), (True, False), (1, 1), {"kernel_size": (7, 5)}),
    ],
)
def test_search_returns_what_nothing_beats(layout, causal, dilation, at, unchecked):
    rank = len(layout)
    options = {"query_tile": 2, "key_tile": (2, 3, 2)[:rank], "gpu": "b200"}
    options |= {"is_causal": causal, "dilation": dilation}
    longest = [x // d for x, d in zip(layout, dilation, strict=True)]
    windows = itertools.product(*(range(2, x + 1) for x in longest))
    everything = []
    for k in [at["kernel_size"]] if "kernel_size" in at else windows:
        for s in itertools.product(*(range(1, x + 1) for x in k)):
            one = simulate(layout, kernel_size=k, stride=s, **options)
            if "kernel_size" in at or abs(one.sparsity - at["sparsity"]) <= at["tolerance"]:
                masked = one.visited_tiles - one.free_tiles
                speedup = one.dense_tiles / (one.visited_tiles + GPUS["b200"].mask * masked)
                everything.append((speedup, -one.sparsity, -math.prod(s)))
    points = np.array(everything)
    at_least = (points[:, None] >= points - 1e-12).all(axis=-1)
    more = (points[:, None] > points + 1e-12).any(axis=-1)
    beaten = (at_least & more).any(axis=0)
    expected = np.unique(points[~beaten].round(9), axis=0)
    found = search(layout, **at, **options)
    values = [(c.speedup, -c.sparsity, -math.prod(c.stride)) for c in found]
    np.testing.assert_allclose(np.unique(np.round(values, 9), axis=0), expected)
    assert len(found) == len(expected) > 1


def test_search_takes_little_memory(monkeypatch):
    """A search takes parts of the products at a time, and finds the same in smaller ones."""

    def values(choices):
        return {(c.speedup, c.sparsity, math.prod(c.stride)) for c in choices}

    at = {"sparsity": 0.9, "is_causal": (True, False, False)}
    found = search((16, 24, 24), **at)
    tracemalloc.start()
    try:
        monkeypatch.setattr(search_module, "CHUNK", 1 << 12)
        monkeypatch.setattr(search_module, "ROWS", 7)
        assert values(search((16, 24, 24), **at)) == values(found)
        monkeypatch.undo()
        monkeypatch.setattr(search_module, "CHUNK", 1 << 17)
        tracemalloc.reset_peak()
        assert search((64, 48, 80), sparsity=0.9, **HOPPER_3D)
        # All products at once take 2 GB.
        assert tracemalloc.get_traced_memory()[1] < 1e8
        # Nor are all rows of a dimension compared at once, here 0.8 GB.
        rows = np.arange(1, 1 << 14)
        alike = np.ones_like(rows)
        table = search_module.Table(alike, rows, alike, rows, 0 * rows, rows)
        tracemalloc.reset_peak()
        assert list(search_module._undominated(table, False, "pairs").stride) == [1]
        assert tracemalloc.get_traced_memory()[1] < 1e8
    finally:
        tracemalloc.stop()


def test_search_of_too_much_takes_whole_tiles(monkeypatch):
    monkeypatch.setattr(search_module, "ALL_PRODUCTS", 100)
    found = search((16, 24, 24), sparsity=0.9, **HOPPER_3D)
    for choice in found:
        assert abs(choice.sparsity - 0.9) <= 0.01 + 1e-9
        sides = zip(choice.kernel_size, choice.stride, (16, 24, 24), (2, 8, 8), strict=True)
        for window, stride, length, tile in sides:
            assert window % tile == 0 or window == length
            assert stride % tile == 0 or stride == 1


def test_search_says_what_it_needs():
    with pytest.raises(ValueError, match="either kernel_size or sparsity"):
        search((8, 8))
    with pytest.raises(ValueError, match="either kernel_size or sparsity"):
        search((8, 8), kernel_size=4, sparsity=0.5)
    with pytest.raises(ValueError, match="below 1"):
        search((8, 8), sparsity=1.5)
    with pytest.raises(ValueError, match=r"nothing fits a sparsity of 0\.999"):
        search((8, 8), sparsity=0.999, tolerance=0.0001)


# --- the commands ---


def test_simulate_prints_a_table(capsys):
    arguments = "gna simulate --layout 30 48 80 --window 18 24 24 --stride 16 8 8 --heads 24"
    assert main([*arguments.split(), "--head-dim", "128", "--gpu", "h200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("tile pairs"))
    assert row.split()[2:5] == ["810,000", "72,900", "11.11"] and "100.0 % of the bound" in row
    assert any("none: block-sparse" in line for line in lines)
    assert any(line.startswith("with permutation") for line in lines)
    more = "--additional 77 --additional-queries --attention-share 0.6 --causal True False False"
    assert main([*arguments.split(), *more.split()]) == 0
    out = capsys.readouterr().out
    assert "77 additional" in out and "causal in dimension 0" in out and "whole model" in out


@pytest.mark.parametrize(
    ("layout", "rest", "tiles"),
    [
        ((64,), ["--window", "16"], 8),
        ((16, 24), ["--sparsity", "0.8", "--dilation", "2", "1"], 4),
        ((8, 16, 16), ["--window", "4", "8", "8", "--causal", "True", "False", "False"], 4),
    ],
    ids=["1-D", "2-D", "3-D"],
)
def test_search_lists_and_draws(layout, rest, tiles, tmp_path, capsys):
    file = tmp_path / "search.png"
    where = ["--layout", *map(str, layout), "--query-tile", str(tiles), "--key-tile", str(tiles)]
    arguments = ["gna", "search", *where, *rest, "--output", str(file)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("window") and str(file) in out
    with Image.open(file) as image:
        assert image.format == "PNG" and min(image.size) > 800
        colors = {tuple(color) for _, color in image.convert("RGB").getcolors(1 << 20)}
    assert {(0xD1, 0x24, 0x2F), (0xEC, 0xEF, 0xF2)} <= colors
    before = file.read_bytes()
    assert main(arguments) == 1
    assert "already exists" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert main([*arguments, "--force", "--limit", "1"]) == 0


def test_commands_refuse_in_one_sentence(tmp_path, capsys):
    def refused(arguments, text):
        assert main(["gna", *arguments.split()]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and text in err and "Traceback" not in err, err

    refused("simulate --layout 8 8 --window 9", "--window must not exceed the tokens along a dim")
    refused("simulate --layout 8 8 --window 9", "dimension 0 (--window=(9, 9), --layout (8, 8)).")
    refused("simulate --layout 8 8 --window 4 --stride 1 1 1", "--stride must be an integer of")
    refused("simulate --layout 8 8 --window 4 --stride 5", "--stride must not exceed --window;")
    refused("simulate --layout 8 8 --window 4 --query-tile 2", "--key-tile come together")
    refused("search --layout 8 8 --sparsity 0.5 --dilation 9", "--dilation must not exceed the tok")
    refused("search --layout 8 8", "either --window or --sparsity; received neither")
    refused("bench --layout 8 8 --window 9 --rounds 1", "--window must not exceed the tokens along")
    refused("search --layout 8 8 --window 4 --limit 0", "--limit must be at least 1")
    refused(f"search --layout 8 8 --window 4 --output {tmp_path}/a.gif", ".png file")
    refused(
        f"search --layout 8 8 --sparsity 2 --output {tmp_path}/a.png",
        "--sparsity must be at least 0 and below 1, r",
    )
    assert list(tmp_path.iterdir()) == []
    assert main(["gna"]) == 0


def test_gpu_table_covers_all_ranks():
    for gpu in schedule.GPUS.values():
        for rank in (1, 2, 3):
            for query, key in gpu.tiles[rank]:
                assert len(query) == len(key) == rank and math.prod(key) == 128
