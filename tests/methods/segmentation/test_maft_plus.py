"""A training step of MAFT+ on a tiny model."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from segmentation_oracles import MINIMAL, random_model

from conceptax.flax_models.maft_plus import MaftPlus
from conceptax.methods.segmentation.maft_plus import (
    NOT_DECAYED,
    RATES,
    TRAINABLE,
    MaftPlusTraining,
    fit,
    prepare,
    train_step,
)
from conceptax.methods.segmentation.set_losses import SetLossConfig
from conceptax.methods.training import leaf_paths, matches, train

CONFIG = MaftPlusTraining(
    steps=20,
    learning_rate=3e-3,
    set_losses=SetLossConfig(num_points=64),
    rates=(("backbone", 0.1), ("*", 1.0)),
)


@pytest.fixture(scope="module")
def model():
    return random_model(lambda rngs: MaftPlus(MINIMAL, rngs=rngs))


def batch():
    """Two images 64x128: a bright left half, a dark top; the second has one target less."""
    images = np.random.default_rng(0).normal(size=(2, 64, 128, 3)).astype(np.float32)
    masks = np.zeros((2, 2, 64, 128), bool)
    masks[:, 0, :, :64] = True
    masks[:, 1, :20] = True
    images += 2 * masks[:, 0, ..., None] - 2 * masks[:, 1, ..., None]
    return {
        "images": jnp.asarray(images),
        "labels": jnp.array([[0, 2], [1, 0]]),
        "masks": jnp.asarray(masks),
        "valid": jnp.array([[True, True], [True, False]]),
    }


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    rows = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    synonyms = np.array([[0, 1], [2, 2], [3, 3]], np.int32)
    static, state, frozen = prepare(model, jnp.asarray(rows), jnp.asarray(synonyms), CONFIG)
    before = jax.tree.map(np.asarray, (state.params, frozen))
    metrics = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    after = train(
        train_step,
        static,
        state,
        frozen,
        itertools.repeat(batch()),
        key=jax.random.key(0),
        num_steps=CONFIG.steps,
        progress=False,
        metrics_path=metrics,
    )
    return (
        static,
        before,
        after,
        frozen,
        [json.loads(line) for line in metrics.read_text().splitlines()],
    )


def test_loss_falls(run):
    losses = [record["loss"] for record in run[4]]
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    assert run[4][0]["compensation"] < 1e-10  # the student is its own teacher
    assert run[4][-1]["compensation"] > 1e-6


def test_fit_takes_no_key_beside_its_seed(model):
    rows, synonyms = jnp.eye(3, 8), np.arange(3, dtype=np.int32)[:, None]
    options = {"seed": 0, "key": jax.random.key(1)}
    with pytest.raises(TypeError, match="multiple values for keyword argument 'key'"):
        fit(model, rows, synonyms, [], CONFIG, **options)


def test_exactly_the_trainable_parameters_change(run, model):
    static, (params, before), after, frozen, _ = run
    paths = leaf_paths(params)
    moved = [
        not np.array_equal(one, other)
        for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(after.params), strict=True)
    ]
    still = {path for path, moves in zip(paths, moved, strict=True) if not moves}
    assert still == set()
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(frozen), strict=True):
        np.testing.assert_array_equal(one, other)
    everything = leaf_paths(model)
    expected = [p for p in everything if any(matches(pattern, p) for pattern in TRAINABLE)]
    assert sorted(paths) == sorted(expected)
    assert not any("trunk.head" in path or "text" in path for path in paths)
    assert not any(path.endswith("clip_model.logit_scale") for path in paths)
    nnx.merge(static.model, after.params, frozen["model"])


def test_groups_by_path(model):
    """What is not decayed is what belongs to norms and embeddings."""
    owners = dict(nnx.iter_graph(model))
    trained = [p for p in leaf_paths(model) if any(matches(t, p) for t in TRAINABLE)]
    by_path = {".".join(map(str, path)): path for path in owners}
    for name in trained:
        owner = owners[by_path[name][:-1]]
        exempt = isinstance(owner, nnx.LayerNorm | nnx.GroupNorm | nnx.Embed)
        assert any(matches(p, name) for p in NOT_DECAYED) == exempt, name
        rate = next(rate for pattern, rate in RATES if matches(pattern, name))
        assert rate == (0.1 if name.startswith("backbone") else 1.0)
    for pattern in NOT_DECAYED:
        assert any(matches(pattern, name) for name in trained), pattern
