"""Attention to listed blocks: values and gradients against float64, transformations, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gna_oracle import masked
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from conceptax.kernels import gna
from conceptax.kernels.gna import BlockMask, api
from conceptax.kernels.gna.backends import xla_lists
from conceptax.kernels.gna.cuda import build

BACKENDS = ["reference", "xla", *(["cuda"] if build.compiler("cpu") else [])]

# As in test_sweep: rounding of results, and of probabilities that are rounded to 16 bits.
TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def random_problem(seed):
    """Operands of random sizes, cotangents, and lists with places that are to be ignored."""
    rng = np.random.default_rng(seed)
    draw = lambda least, most: int(rng.integers(least, most + 1))  # noqa: E731
    kv_heads, tokens, keys = draw(1, 2), draw(1, 150), draw(1, 60)
    batch, heads = draw(1, 2), kv_heads * draw(1, 3)
    query_block, key_block = draw(1, 100) if seed % 2 else draw(1, 12), draw(1, 20)
    dim, value_dim, additional = draw(1, 20), draw(1, 20), int(rng.choice([0, 0, 1, 5, 30]))
    shapes = [(batch, tokens, heads, dim), (batch, keys, kv_heads, dim)]
    shapes += [(batch, keys, kv_heads, value_dim)]
    if additional:
        shapes += [(batch, additional, kv_heads, dim), (batch, additional, kv_heads, value_dim)]
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    arrays += [None] * (5 - len(arrays))
    cotangents = (
        rng.standard_normal((batch, tokens, heads, value_dim)).astype(np.float32),
        rng.standard_normal((batch, tokens, heads)).astype(np.float32),
    )
    rows, columns = -(-tokens // query_block), -(-keys // key_block)
    of_lists = int(rng.choice([1, batch])), int(rng.choice([1, heads])), rows
    most = draw(1, columns)
    blocks = np.argsort(rng.random((*of_lists, columns)), axis=-1)[..., :most]
    counts = rng.integers(0, most + 1, of_lists)
    beyond = np.arange(most) >= counts[..., None]
    blocks = np.where(beyond, rng.integers(-9, columns + 9, blocks.shape), blocks)
    if seed % 3 == 0:  # some name no block, some are listed twice
        blocks = np.where(rng.random(blocks.shape) < 0.2, columns, blocks)
        blocks[..., :1] = blocks[..., -1:]
    block_mask = BlockMask(
        jnp.asarray(blocks, jnp.int32), jnp.asarray(counts, jnp.int32), query_block, key_block
    )
    return arrays, cotangents, block_mask


def seen(block_mask, tokens, keys):
    """Whether queries see keys [B, H, tokens, keys], list by list."""
    blocks, counts = np.asarray(block_mask.blocks), np.asarray(block_mask.counts)
    mask = np.zeros((*blocks.shape[:2], tokens, keys), bool)
    for *at, row in np.ndindex(counts.shape):
        own = slice(row * block_mask.query_block, (row + 1) * block_mask.query_block)
        for block in blocks[(*at, row)][: counts[(*at, row)]]:
            if block >= 0:
                first = block * block_mask.key_block
                mask[(*at, own, slice(first, first + block_mask.key_block))] = True
    return mask


def with_gradients(arrays, cotangents, block_mask, implementation):
    """Output, log-sum-exp and gradients of what is given, by one program."""

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(arrays, cotangents, block_mask):
        def call(*arrays):
            return attend(*arrays, block_mask=block_mask, implementation=implementation)

        results, pull = jax.vjp(call, *arrays)
        return *results, *pull(tuple(cotangents))

    return [x for x in run(arrays, cotangents, block_mask) if x is not None]


def attend(q, k, v, ak=None, av=None, **rest):
    rest = {"return_lse": True} | rest
    return gna.block_sparse_attention(q, k, v, additional_keys=ak, additional_values=av, **rest)


def check(seed, implementation, dtype="float32"):
    arrays, cotangents, block_mask = random_problem(seed)
    arrays = [None if x is None else jnp.asarray(x, dtype) for x in arrays]
    cotangents = jnp.asarray(cotangents[0], dtype), jnp.asarray(cotangents[1])
    got = with_gradients(arrays, cotangents, block_mask, implementation)
    exact = [None if x is None else np.asarray(x, float) for x in (*arrays, *cotangents)]
    expected = masked(seen(block_mask, arrays[0].shape[1], arrays[1].shape[1]), *exact)
    assert [x.dtype for x in got] == [dtype, "float32"] + [dtype] * (len(got) - 2)
    tolerance = TOLERANCE[dtype]
    for n, (one, other) in enumerate(zip(got, expected, strict=True)):
        largest = np.abs(other[np.isfinite(other)]).max(initial=1)
        np.testing.assert_allclose(
            np.asarray(one, float),
            other,
            rtol=tolerance,
            atol=tolerance * largest,
            err_msg=f"result {n} of seed {seed}",
        )


@pytest.mark.parametrize(
    ("implementation", "seed"),
    [(name, seed) for name in BACKENDS for seed in range(9 if name == "cuda" else 4)],
)
def test_random_problems(implementation, seed):
    check(seed, implementation, ("float32", "bfloat16", "float16")[seed % 5 % 3])


@pytest.mark.slow
@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("seed", range(100, 150))
def test_many_random_problems(implementation, seed):
    check(seed, implementation, ("float32", "bfloat16", "float16")[seed % 3])


def test_short_steps(monkeypatch):
    """Lists of several steps, and few blocks at a time."""
    monkeypatch.setattr(xla_lists, "GATHERED", 8)
    monkeypatch.setattr(xla_lists, "budget", lambda: 128)
    api.attend.clear_cache()
    check(3, "xla")
    api.attend.clear_cache()


# Queries and keys of 7 blocks, the last ones ragged, grouped heads, additional keys.
SHAPES = [(2, 26, 4, 8), (2, 33, 2, 8), (2, 33, 2, 4), (2, 3, 2, 8), (2, 3, 2, 4)]
reference = functools.partial(attend, implementation="reference")


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def some_blocks(batch=2, heads=4, seed=1, **most):
    """Lists of about half of all blocks; the first one is of nothing."""
    mask = np.random.default_rng(seed).random((batch, heads, 7, 7)) < 0.5
    mask[..., 0, :] = False
    return BlockMask.from_dense(mask, query_block=4, key_block=5, **most)


def loss(function):
    """A scalar that weighs every number of the results, but for log-sum-exps of nothing."""

    def scalar(*args):
        results = jax.tree.leaves(function(*args))
        results = [jnp.where(jnp.isfinite(x), x, 0) for x in results]
        return sum(jnp.vdot(x, jnp.sin(jnp.arange(x.size)).reshape(x.shape)) for x in results)

    return scalar


def assert_same(function, other, args):
    """Values and gradients of two functions agree."""
    every = tuple(range(len(args)))
    pair = [
        jax.jit(jax.value_and_grad(loss(f), every), compiler_options=FAST)
        for f in (function, other)
    ]
    one, two = (jax.tree.leaves(f(*args)) for f in pair)
    for x, y in zip(one, two, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_nothing_of_other_blocks_is_touched(implementation):
    """NaN and infinity in keys and values that are not listed, or not for this query."""
    given, block_mask = arrays(*SHAPES[:3]), some_blocks(1, 1)
    blocks, counts = np.asarray(block_mask.blocks), np.asarray(block_mask.counts)
    bad = np.zeros(33, bool)
    bad[10:15] = True  # the third block
    listing = np.array([2 in blocks[0, 0, n, : counts[0, 0, n]] for n in range(7)])
    listing = np.repeat(listing, 4)[:26]
    assert listing.any() and not listing.all()
    spoilt = [given[0], *(jnp.where(bad[:, None, None], jnp.nan, x) for x in given[1:])]
    spoilt[2] = jnp.where(bad[:, None, None], jnp.inf, given[2])
    cotangents = arrays((2, 26, 4, 4), (2, 26, 4), seed=2)
    clean, got = (
        with_gradients([*x, None, None], cotangents, block_mask, implementation)
        for x in (given, spoilt)
    )
    for n in (0, 1, 2):  # output, log-sum-exp, the query's gradient
        np.testing.assert_array_equal(got[n][:, ~listing], clean[n][:, ~listing])
        assert np.isnan(np.asarray(got[n])[:, listing]).any(-1).all()
    # A block that shares no query with the third one has the gradients it had; an unlisted one has
    # none at all.
    only = BlockMask.from_dense(np.arange(7) != 2 * np.ones((7, 1)), query_block=4, key_block=5)
    clean, got = (
        with_gradients([*x, None, None], cotangents, only, implementation) for x in (given, spoilt)
    )
    for one, other in zip(got, clean, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.asarray(got[3])[:, bad].any() and not np.asarray(got[4])[:, bad].any()


@pytest.mark.parametrize("implementation", BACKENDS)
def test_a_query_that_sees_nothing(implementation):
    block_mask = BlockMask.from_dense(
        np.eye(7, dtype=bool)[:, ::-1] & (np.arange(7) > 2), query_block=4, key_block=5
    )
    given, cotangents = arrays(*SHAPES[:3]), arrays((2, 26, 4, 4), (2, 26, 4), seed=2)
    got = with_gradients([*given, None, None], cotangents, block_mask, implementation)
    np.testing.assert_array_equal(got[0][:, 16:], 0)
    np.testing.assert_array_equal(got[1][:, 16:], -np.inf)
    np.testing.assert_array_equal(got[2][:, 16:], 0)
    assert all(np.isfinite(got[n]).all() for n in (0, 2, 3, 4))
    assert np.isfinite(got[1][:, :16]).all()

    def merged(q, k, v):  # with what others see, it counts for nothing
        parts = [
            attend(q, k, v, block_mask=x, implementation=implementation)
            for x in (block_mask, some_blocks(1, 1))
        ]
        return gna.merge_attentions(*zip(*parts, strict=True))

    gradients = jax.jit(jax.grad(loss(merged), (0, 1, 2)))(*given)
    assert all(np.isfinite(x).all() for x in gradients)


LAYOUT, TILE = (4, 8), (2, 4)
ALIGNED = {"kernel_size": (2, 8), "stride": (2, 4)}


@pytest.mark.parametrize("implementation", BACKENDS)
def test_aligned_windows_are_neighborhood_attention(implementation):
    block_mask = BlockMask.from_windows(LAYOUT, **ALIGNED, query_tile=TILE, key_tile=2)
    assert block_mask.blocks.shape == (1, 1, 4, 4)
    given = arrays((1, *LAYOUT, 2, 4), (1, *LAYOUT, 1, 4), (1, *LAYOUT, 1, 4))

    def by_lists(q, k, v):
        q, k, v = gna.to_tiles(q, TILE), gna.to_tiles(k, 2), gna.to_tiles(v, 2)
        output, lse = attend(q, k, v, block_mask=block_mask, implementation=implementation)
        return tuple(gna.from_tiles(x, LAYOUT, TILE) for x in (output, lse[..., None]))

    def by_windows(q, k, v):
        output, lse = gna.neighborhood_attention(
            q, k, v, **ALIGNED, return_lse=True, implementation=implementation
        )
        return output, lse[..., None]

    assert_same(by_lists, by_windows, given)


def test_lists_are_data():
    """Chosen by the operands in the same program; other lists run it again."""
    given = arrays(*SHAPES[:3])
    traced = 0

    @jax.jit
    def step(q, k, v, bias):
        nonlocal traced
        traced += 1
        scores = gna.pooled_scores(q, k, query_block=4, key_block=5) + bias
        block_mask = BlockMask.from_scores(scores, 3, query_block=4, key_block=5)
        function = functools.partial(attend, block_mask=block_mask)
        return jax.value_and_grad(loss(function), (0, 1, 2))(q, k, v), block_mask

    for bias in arrays((7, 7), (7, 7)):
        got, block_mask = step(*given, 3 * bias)
        function = functools.partial(reference, block_mask=block_mask)
        expected = jax.jit(jax.value_and_grad(loss(function), (0, 1, 2)))(*given)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-4)
    assert traced == 1


def test_pooled_scores_and_what_they_list():
    q, k = arrays(*SHAPES[:2])
    scores = gna.pooled_scores(q, k, query_block=4, key_block=5)
    for i, j in ((0, 0), (6, 6)):
        rows, columns = q[:, 4 * i : 4 * i + 4].mean(1), k[:, 5 * j : 5 * j + 5].mean(1)
        expected = (rows * columns.repeat(2, axis=1)).sum(-1) * 8**-0.5
        np.testing.assert_allclose(scores[:, :, i, j], expected, rtol=1e-5, atol=1e-6)
    few = scores.at[..., 1, 2:].set(-jnp.inf)
    block_mask = BlockMask.from_scores(few, 3, query_block=4, key_block=5)
    np.testing.assert_array_equal(block_mask.counts[..., 1], 2)
    np.testing.assert_array_equal(block_mask.counts[..., 2], 3)
    best = np.argsort(-np.asarray(few), axis=-1)[..., :3]
    np.testing.assert_array_equal(block_mask.blocks[..., 2:, :], best[..., 2:, :])


def test_lists_of_a_dense_mask():
    mask = np.array([[1, 0, 1], [0, 0, 0]], bool)
    block_mask = BlockMask.from_dense(mask, query_block=2, key_block=2)
    np.testing.assert_array_equal(block_mask.blocks[0, 0], [[0, 2], [0, 1]])
    np.testing.assert_array_equal(block_mask.counts[0, 0], [2, 0])
    make = functools.partial(BlockMask.from_dense, query_block=2, key_block=2)
    assert jax.jit(make)(mask).blocks.shape == (1, 1, 2, 3)
    short = jax.jit(functools.partial(make, most=1))(mask)
    np.testing.assert_array_equal(short.counts[0, 0], [1, 0])


def test_to_tiles_and_back():
    (x,) = arrays((2, 4, 6, 2, 3))
    row = gna.to_tiles(x, (2, 3))
    np.testing.assert_array_equal(row[:, 6:9], x[:, 0, 3:6])
    np.testing.assert_array_equal(row[:, 9:12], x[:, 1, 3:6])
    np.testing.assert_array_equal(gna.from_tiles(row, (4, 6), (2, 3)), x)


def whole(function, block_mask):
    """A function of the operands with additional keys."""
    return functools.partial(function, block_mask=block_mask)


@pytest.mark.parametrize("implementation", BACKENDS[1:])
def test_vmap_over_operands_and_lists(implementation):
    q, k, v = arrays((3, *SHAPES[0]), (2, 3, *SHAPES[1][1:]), SHAPES[2])
    masks = [some_blocks(seed=seed, most=7) for seed in range(3)]
    block_masks = jax.tree.map(lambda *x: jnp.stack(x), *masks)
    function = functools.partial(attend, implementation=implementation)

    def mapped(q, k, v):
        call = lambda q, k, v, block_mask: function(q, k, v, block_mask=block_mask)  # noqa: E731
        return jax.vmap(call, (0, 1, None, 0))(q, k, v, block_masks)

    def one_by_one(q, k, v):
        each = [reference(q[n], k[:, n], v, block_mask=masks[n]) for n in range(3)]
        return jax.tree.map(lambda *x: jnp.stack(x), *each)

    assert_same(mapped, one_by_one, (q, k, v))


def test_checkpoint():
    block_mask = some_blocks()
    pair = (jax.checkpoint(whole(attend, block_mask)), whole(reference, block_mask))
    assert_same(*pair, arrays(*SHAPES))


@pytest.mark.parametrize("implementation", BACKENDS[1:])
def test_shard_map_over_batch_and_heads(implementation):
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)
    spec, of_lists = PartitionSpec("data", None, "heads"), PartitionSpec("data", "heads")
    block_mask = some_blocks()

    def call(block_mask, *x):
        return attend(*x, block_mask=block_mask, implementation=implementation)

    sharded = jax.shard_map(
        call, mesh=mesh, in_specs=(of_lists, *(spec,) * 5), out_specs=(spec, spec)
    )
    pair = functools.partial(sharded, block_mask), whole(reference, block_mask)
    assert_same(*pair, arrays(*SHAPES))


@pytest.mark.parametrize(("heads", "kind"), [(1, AxisType.Auto), (4, AxisType.Explicit)])
def test_devices_divide_batch_and_heads(heads, kind):
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(kind,) * 2)
    block_mask = some_blocks(1, heads)
    given = arrays(*SHAPES)
    spread = NamedSharding(mesh, PartitionSpec("data", None, "heads"))
    divided = [jax.device_put(x, spread) for x in given]

    def step(*x):
        def function(*x):
            output, lse = attend(*x, block_mask=block_mask, implementation="xla")
            return (output**2).mean() + jnp.where(jnp.isfinite(lse), lse, 0).mean()

        return jax.value_and_grad(function, range(5))(*x)

    step = jax.jit(step)
    with jax.set_mesh(mesh):
        received = step(*divided)
        assert "all-gather(" not in step.lower(*divided).compile().as_text()
    for one, other in zip(jax.tree.leaves(received), jax.tree.leaves(step(*given)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_symbolic_batch():
    (batch,) = export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((batch, *x[1:]), jnp.float32) for x in SHAPES]
    function = functools.partial(attend, block_mask=some_blocks(1), implementation="xla")
    step = jax.jit(jax.value_and_grad(loss(function), range(5)), compiler_options=FAST)
    exported = export.export(step, platforms=["cpu"])(*shapes)
    inputs = arrays(*((3, *x[1:]) for x in SHAPES))
    got, expected = exported.call(*inputs), step(*inputs)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_strict_promotion(implementation):
    """No operand is brought to another rank or dtype without being told, also where jax counts in
    64 bits."""

    def call(*x):
        scores = gna.pooled_scores(*x[:2], query_block=4, key_block=5)
        block_mask = BlockMask.from_scores(scores, 3, query_block=4, key_block=5)
        output, lse = attend(*x, block_mask=block_mask, implementation=implementation)
        return output.sum() + lse.sum()

    step = jax.value_and_grad(call, range(5))
    inputs = arrays(*SHAPES)
    expected = jax.jit(step, compiler_options=FAST)(*inputs)
    strict = jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict")
    with strict[0], strict[1], jax.enable_x64(True):
        received = jax.jit(step, compiler_options=FAST)(*inputs)
    for one, other in zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("training", [False, True])
def test_memory_is_linear_in_tokens(training):
    """What the compiler reserves beside the operands, for lists of equal length."""

    def reserved(tokens):
        x = jax.ShapeDtypeStruct((1, tokens, 2, 32), jnp.float32)
        rows = tokens // 64
        block_mask = BlockMask(
            jax.ShapeDtypeStruct((1, 1, rows, 8), jnp.int32),
            jax.ShapeDtypeStruct((1, 1, rows), jnp.int32),
            64,
            64,
        )

        def call(q, k, v, block_mask):
            return attend(q, k, v, block_mask=block_mask, implementation="xla")

        function = jax.grad(loss(call), (0, 1, 2)) if training else call
        compiled = jax.jit(function).lower(x, x, x, block_mask).compile(FAST)
        return compiled.memory_analysis().temp_size_in_bytes, x.size * 4

    (small, of_small), (large, of_large) = reserved(4096), reserved(65536)
    assert large - small <= 24 * (of_large - of_small)
    assert large < 2 * 65536**2 * 4 / 100


def test_what_does_not_fit_is_refused():
    q, k, v, ak, _ = arrays(*SHAPES)
    good = some_blocks()
    wrong = BlockMask(good.blocks[:, :, 1:], good.counts, 4, 5)
    for given, options, message in (
        ((q[..., None, :], k, v), {}, r"query must be \[batch, tokens, heads, head_dim\]"),
        ((q, k, v[:, 1:]), {}, "the same batch, and key and value the same tokens"),
        ((q[:1], k, v), {}, "query and key must have the same batch"),
        ((q, k, v, ak), {}, "received additional_keys without additional_values"),
        ((q, k, v), {"scale": -1}, "scale must be a positive number"),
        ((q, k, v), {"block_mask": wrong}, r"\[2 or 1, 4 or 1, 7, most\].*shapes \(2, 4, 6, "),
        ((q, k, v), {"block_mask": BlockMask(good.blocks, good.counts, 0, 5)}, "query_block must"),
        (
            (q, k, v),
            {"block_mask": BlockMask(good.blocks + 0.0, good.counts, 4, 5)},
            "must be int32; received float32 and int32",
        ),
        ((q, k, v), {"implementation": "fast"}, "implementation must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(*given, **({"block_mask": good} | options))
    with pytest.raises(NotImplementedError, match="it takes no block lists"):
        attend(q, k, v, block_mask=good, implementation="triton")
    problem = gna.describe_lists(q, k, v, block_mask=good)
    assert "block lists on CPUs" in str(gna.unsupported("cuda", problem, "gpu"))
    long = jax.ShapeDtypeStruct((1, 2**20, 1, 8), jnp.float32)
    lists = [jax.ShapeDtypeStruct((1, 1, 2**17, *x), jnp.int32) for x in ((2,), ())]
    with pytest.raises(ValueError, match=r"fewer than 2\^31 for each key head"):
        gna.describe_lists(long, long, long, block_mask=BlockMask(*lists, 8, 8))


def test_lists_that_cannot_be_made_are_refused():
    mask = np.ones((7, 7), bool)
    sizes = {"query_block": 4, "key_block": 5}
    with pytest.raises(ValueError, match=r"mask must be bool .* received int64 of shape \(7, 7\)"):
        BlockMask.from_dense(mask.astype(int), **sizes)
    with pytest.raises(ValueError, match="most must be at least 7, the blocks of the longest list"):
        BlockMask.from_dense(mask, most=6, **sizes)
    with pytest.raises(ValueError, match="most must be at least 1"):
        BlockMask.from_scores(jnp.zeros((1, 1, 7, 7)), 0, **sizes)
    make = functools.partial(BlockMask.from_windows, LAYOUT, query_tile=TILE, key_tile=2)
    with pytest.raises(ValueError, match="the windows must see whole tiles of keys"):
        make(kernel_size=3)
    with pytest.raises(ValueError, match="key_tile must divide the token layout"):
        make(kernel_size=2, stride=2, key_tile=3)
    with pytest.raises(ValueError, match=r"x must be \[batch, 32, heads, head_dim\]"):
        gna.from_tiles(jnp.zeros((1, 31, 1, 1)), LAYOUT, TILE)
