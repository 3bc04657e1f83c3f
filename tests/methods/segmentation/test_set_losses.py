"""MAFT+'s losses against the authors' outputs, Mask2Former's against transformers'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from oracles import relative_error

from conceptax.methods.segmentation.maft_plus import (
    MaftPlusTraining,
    mask_aware_loss,
    poly_adamw,
    representation_compensation_loss,
)
from conceptax.methods.segmentation.set_losses import (
    SetLossConfig,
    Targets,
    deep_losses,
    match,
    matching_costs,
    set_losses,
)
from conceptax.methods.training import make_mesh


@pytest.mark.parametrize("size", ["8x8", "5x9", "9x5", "13x7"])
def test_compensation_equals_the_authors(size, golden):
    stored = np.load(golden(f"maft_plus_rc_{size}.npz"))
    student, teacher = (
        stored[f"in.{name}_bchw"].transpose(0, 2, 3, 1) for name in ("student", "teacher")
    )
    loss, gradient = jax.jit(jax.value_and_grad(representation_compensation_loss))(student, teacher)
    np.testing.assert_allclose(loss, stored["out.loss"], rtol=1e-5)
    expected = stored["grad.student_bchw"].transpose(0, 2, 3, 1)
    assert relative_error(np.asarray(gradient), expected) < 1e-5


@pytest.mark.parametrize(("size", "cells"), [((34, 25), (1, 2, 5)), ((42, 25), (1, 3, 7))])
def test_cells_of_portrait_maps(size, cells):
    """A constant difference d is (n d) in each of n sums: the loss tells the numbers of cells."""
    teacher = jnp.ones((1, *size, 1))
    sums = np.repeat(cells, cells) * 0.01
    expected = (0.5 * sums**2).mean()
    loss = representation_compensation_loss(teacher + 0.01, teacher)
    np.testing.assert_allclose(loss, expected, rtol=1e-3)


def test_compensation_of_what_does_not_fit():
    with pytest.raises(ValueError, match=r"at least 4 wide; received \(1, 5, 3, 2\)"):
        representation_compensation_loss(jnp.ones((1, 5, 3, 2)), jnp.ones((1, 5, 3, 2)))
    with pytest.raises(ValueError, match="two maps of one shape"):
        representation_compensation_loss(jnp.ones((1, 5, 4, 2)), jnp.ones((1, 4, 5, 2)))


@pytest.fixture(scope="module")
def aware(golden):
    """The stored case, its targets padded to one instance more than there are."""
    stored = np.load(golden("maft_plus_mask_aware.npz"))
    labels, masks = np.zeros((2, 4), np.int32), np.ones((2, 4, 32, 32), bool)
    valid = np.zeros((2, 4), bool)
    for image in range(2):
        count = len(stored[f"in.labels.{image}"])
        labels[image, :count] = stored[f"in.labels.{image}"]
        masks[image, :count] = stored[f"in.masks.{image}"]
        valid[image, :count] = True
    run = jax.jit(jax.value_and_grad(mask_aware_loss, argnums=(0, 1)))
    return stored, run, (labels, masks, valid)


def test_mask_aware_equals_the_authors(aware):
    stored, run, targets = aware
    loss, (by_class, by_mask) = run(stored["in.class_logits"], stored["in.mask_logits"], *targets)
    np.testing.assert_allclose(loss, stored["out.loss"], rtol=1e-5)
    assert relative_error(np.asarray(by_class), stored["grad.class_logits"]) < 2e-5
    np.testing.assert_array_equal(by_mask, 0)


def test_mask_aware_without_targets(aware):
    stored, run, (labels, masks, valid) = aware
    loss, (gradient, _) = run(
        stored["in.class_logits"], stored["in.mask_logits"], labels, masks, np.zeros_like(valid)
    )
    assert loss == 0
    np.testing.assert_array_equal(gradient, 0)


# ---- Mask2Former ----

CONFIG = SetLossConfig(num_points=48)
QUERIES, CLASSES, SIZE, FULL = 7, 5, (8, 12), (32, 48)


def case(counts, padding=1, seed=0):
    """Random predictions and targets: `counts` instances per image, then padding."""
    rng = np.random.default_rng(seed)
    batch, total = len(counts), max(counts) + padding
    classes = rng.normal(size=(batch, QUERIES, CLASSES + 1)).astype(np.float32)
    masks = rng.normal(size=(batch, QUERIES, *SIZE)).astype(np.float32)
    labels = rng.integers(0, CLASSES, (batch, total)).astype(np.int32)
    truth = np.repeat(np.repeat(rng.random((batch, total, 8, 12)) > 0.6, 4, 2), 4, 3)
    valid = np.arange(total) < np.array(counts)[:, None]
    return classes, masks, Targets(*map(jnp.asarray, (labels, truth, valid)))


class Recorder:
    """Stands in for torch.rand and keeps what it gave."""

    def __init__(self, torch):
        self.generator, self.original = torch.Generator().manual_seed(0), torch.rand
        self.given = []

    def __call__(self, *shape, device=None):
        self.given.append(self.original(*shape, generator=self.generator))
        return self.given[-1]


def run_set_losses(classes, masks, targets, matched, candidates, uniform):
    return set_losses(classes, masks, targets, matched, candidates, uniform, CONFIG)


@pytest.fixture(scope="module")
def costs_of():
    return jax.jit(lambda *arguments: matching_costs(*arguments, CONFIG))


@pytest.mark.parametrize("counts", [(3,), (1,)])
def test_layer_equals_transformers(counts, torch, monkeypatch, costs_of):
    import transformers
    from transformers.models.mask2former import modeling_mask2former as hf

    settings = transformers.Mask2FormerConfig(
        num_labels=CLASSES, train_num_points=CONFIG.num_points
    )
    criterion = hf.Mask2FormerLoss(settings, {})
    classes, masks, targets = case(counts)
    leaves = [torch.tensor(x, requires_grad=True) for x in (classes, masks)]
    labels = [torch.tensor(np.asarray(targets.labels[0, : counts[0]])).long()]
    truth = [torch.tensor(np.asarray(targets.masks[0, : counts[0]])).float()]

    recorder = Recorder(torch)
    monkeypatch.setattr(torch, "rand", recorder)
    query, chosen = criterion.matcher(leaves[1], leaves[0], truth, labels)[0]
    again = [(query, chosen)]  # without drawing points anew
    monkeypatch.setattr(criterion.matcher, "forward", lambda *_: again)
    losses = criterion(leaves[1], leaves[0], truth, labels)
    expected = [losses[f"loss_{name}"] for name in ("cross_entropy", "mask", "dice")]
    sum((n + 1) * loss for n, loss in enumerate(expected)).backward()

    points, many, uniform = (x.numpy() for x in recorder.given)
    matched = match(costs_of(classes, masks, targets, points), targets.valid)
    wanted = np.full(targets.valid.shape, -1)
    wanted[0, chosen.numpy()] = query.numpy()
    np.testing.assert_array_equal(matched, wanted)

    def by_target(drawn):
        """Points come in the order of queries; ours in the order of targets."""
        out = np.zeros((1, targets.valid.shape[1], *drawn.shape[1:]), np.float32)
        out[0, chosen.numpy()] = drawn
        return out

    arguments = (targets, matched, jnp.asarray(by_target(many)), jnp.asarray(by_target(uniform)))

    def weighted(classes, masks):
        losses = run_set_losses(classes, masks, *arguments)
        return sum((n + 1) * loss for n, loss in enumerate(losses)), losses

    gradients, received = jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))(classes, masks)
    for ours, theirs in zip(received, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.item(), rtol=2e-5)
    for ours, leaf in zip(gradients, leaves, strict=True):
        assert relative_error(np.asarray(ours), leaf.grad.numpy()) < 2e-5


@pytest.fixture(scope="module")
def layer():
    return jax.jit(run_set_losses)


def test_images_are_averaged_as_devices_would(layer):
    """Eight devices with an image each: the mean of their losses, masks divided by the mean count.

    An image without targets counts as an image."""
    counts = (3, 1, 0, 2)
    classes, masks, targets = case(counts)
    rng = np.random.default_rng(1)
    shape = targets.valid.shape
    matched = np.stack([rng.permutation(QUERIES)[: shape[1]] for _ in counts]).astype(np.int32)
    many = rng.random((*shape, CONFIG.candidates, 2), np.float32)
    uniform = rng.random((*shape, 12, 2), np.float32)
    together = layer(classes, masks, targets, matched, many, uniform)
    singles = []
    for n in range(len(counts)):
        one = jax.tree.map(
            lambda x, n=n: x[n : n + 1], (classes, masks, targets, matched, many, uniform)
        )
        singles.append([np.asarray(loss) for loss in layer(*one)])
    singles = np.array(singles)
    np.testing.assert_allclose(together.classes, singles[:, 0].mean(), rtol=1e-5)
    # A device alone divides by its own count; together they divide by the mean, here 6 / 4.
    sums = singles[:, 1:] * np.maximum(counts, 1)[:, None]
    mean_count = sum(counts) / len(counts)
    np.testing.assert_allclose(
        [together.masks, together.dice], (sums / mean_count).mean(0), rtol=1e-5
    )


def test_padding_changes_nothing(layer, costs_of):
    classes, masks, real = case((2, 2), padding=0)
    rng = np.random.default_rng(2)
    points = rng.random((2, CONFIG.num_points, 2), np.float32)
    many = rng.random((2, 2, CONFIG.candidates, 2), np.float32)
    uniform = rng.random((2, 2, 12, 2), np.float32)

    def padded(x, value):
        widths = [(0, 0), (0, 3)] + [(0, 0)] * (x.ndim - 2)
        return np.pad(np.asarray(x), widths, constant_values=value)

    results = []
    for targets, drawn in (
        (real, (many, uniform)),
        (
            Targets(padded(real.labels, 1), padded(real.masks, True), padded(real.valid, False)),
            (padded(many, 0.5), padded(uniform, 0.5)),
        ),
    ):
        matched = match(costs_of(classes, masks, targets, points), jnp.asarray(targets.valid))
        results.append(layer(classes, masks, targets, matched, *drawn))
    np.testing.assert_allclose(*np.array(results), rtol=1e-6)


def test_matching_is_optimal():
    """Against all assignments, with padding, infinities, and more targets than queries."""
    import itertools

    rng = np.random.default_rng(0)
    for queries, count, valid in ((4, 3, 2), (3, 3, 3), (2, 3, 3)):
        costs = rng.normal(size=(1, queries, count)).astype(np.float32)
        mask = (np.arange(count) < valid)[None]
        matched = np.asarray(match(jnp.asarray(costs), jnp.asarray(mask)))[0]
        assert (matched[valid:] == -1).all()
        pairs = [(q, g) for g, q in enumerate(matched) if q >= 0]
        assert len(pairs) == min(queries, valid) == len({q for q, _ in pairs})
        total = sum(costs[0, q, g] for q, g in pairs)
        size = min(queries, valid)
        best = min(
            sum(costs[0, q, g] for q, g in zip(some, others, strict=True))
            for some in itertools.permutations(range(queries), size)
            for others in itertools.combinations(range(valid), size)
        )
        np.testing.assert_allclose(total, best, rtol=1e-5)
    broken = jnp.asarray([[[np.nan, 1.0], [2.0, np.inf]]])
    np.testing.assert_array_equal(match(broken, jnp.ones((1, 2), bool)), [[1, 0]])


def test_deep_supervision_sums_layers():
    classes, masks, targets = case((3, 2))
    stacked = [jnp.stack([x, -x]) for x in map(jnp.asarray, (classes, masks))]
    run = jax.jit(lambda c, m, k: deep_losses(c, m, targets, k, CONFIG))
    total, parts = run(*stacked, jax.random.key(0))
    np.testing.assert_allclose(total, 2 * parts.classes + 5 * parts.masks + 5 * parts.dice)
    same, _ = run(*stacked, jax.random.key(0))
    other, _ = run(*stacked, jax.random.key(1))
    assert total == same
    assert total != other
    np.testing.assert_allclose(total, other, rtol=0.2)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight host devices")
def test_losses_do_not_depend_on_devices():
    """The same numbers from one device and from four, the images spread over them."""
    classes, masks, targets = case((3, 1, 0, 2))
    stacked = [jnp.stack([x, -x]) for x in map(jnp.asarray, (classes, masks))]
    run = jax.jit(lambda c, m, t, k: deep_losses(c, m, t, k, CONFIG))
    key = jax.random.key(0)
    expected = run(*stacked, targets, key)
    mesh = make_mesh(data=4)
    images, layers = PartitionSpec("data"), PartitionSpec(None, "data")
    spread = [jax.device_put(x, NamedSharding(mesh, layers)) for x in stacked]
    targets = jax.device_put(targets, NamedSharding(mesh, images))
    with jax.set_mesh(mesh):
        received = run(*spread, targets, key)
    np.testing.assert_allclose(received[0], expected[0], rtol=1e-5)
    for one, other in zip(received[1], expected[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_wrong_settings():
    with pytest.raises(ValueError, match="num_points >= 1"):
        SetLossConfig(num_points=0)
    with pytest.raises(ValueError, match="steps must be at least 1, received 0"):
        MaftPlusTraining(steps=0)


# ---- optimizer ----


def test_optimizer_equals_torch(torch):
    """Three updates with torch's AdamW, groups, clipping and polynomial decay."""
    rng = np.random.default_rng(0)
    shapes = {"backbone": {"kernel": (3, 2)}, "cdt": {"kernel": (2,), "norm": {"bias": (4,)}}}
    params = jax.tree.map(
        lambda s: rng.normal(size=s).astype(np.float32), shapes, is_leaf=lambda x: type(x) is tuple
    )
    gradients = [
        jax.tree.map(lambda p, s=scale: s * rng.normal(size=p.shape).astype(np.float32), params)
        for scale in (1.0, 1e-4, 0.1)
    ]
    config = MaftPlusTraining(steps=10, learning_rate=1e-2, weight_decay=0.5)
    leaves, tree = jax.tree.flatten(params)
    tensors = [torch.nn.Parameter(torch.tensor(leaf)) for leaf in leaves]
    groups = [
        {"params": [tensors[0]], "lr": 1e-3, "weight_decay": 0.5},
        {"params": [tensors[1]], "lr": 1e-2, "weight_decay": 0.5},
        {"params": [tensors[2]], "lr": 1e-2, "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.PolynomialLR(reference, 10, 0.9)
    optimizer = poly_adamw(config)
    state = optimizer.init(params)
    for gradient in gradients:
        for tensor, leaf in zip(tensors, jax.tree.leaves(gradient), strict=True):
            tensor.grad = torch.tensor(leaf)
        torch.nn.utils.clip_grad_norm_(tensors, 0.01)
        reference.step()
        schedule.step()
        updates, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    for received, tensor in zip(jax.tree.leaves(params), tensors, strict=True):
        # torch divides by norm + 1e-6
        np.testing.assert_allclose(received, tensor.detach().numpy(), atol=2e-5)
    assert jax.tree.structure(params) == tree
