"""Mask2Former's losses (Cheng et al. 2022): queries matched to targets, compared at sampled points.

Masks are `[B, Q, h, w]` logits; targets are padded to a static number G of instances per image and
marked by `valid`, so that one compilation serves every image of a shape.  No value depends on how
images are spread over devices: classes are averaged per image and then over images, masks over all
targets of the batch, as eight devices with an image each would.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ...flax_models.layers.bilinear import sample_points


class Targets(NamedTuple):
    """What is in a batch of images.

    Attributes:
      labels: [B, G] class of each instance.
      masks: [B, G, H, W] its pixels, at the padded images' resolution.
      valid: [B, G] False for padding, whose label and mask are ignored.
    """

    labels: Int[Array, "B G"]
    masks: Bool[Array, "B G H W"]
    valid: Bool[Array, "B G"]


@dataclasses.dataclass(frozen=True)
class SetLossConfig:
    """Weights and numbers of points; the defaults are the published ones.

    Attributes:
      class_weight: of the class loss, and of classes in the cost of a match.
      mask_weight, dice_weight: of the masks' cross-entropy and Dice loss, and in that cost.
      void_weight: of queries without a target in the class loss.
      num_points: points at which two masks are compared.
      oversample: candidates drawn per point that is kept for being uncertain.
      importance: share of points kept for being uncertain; the others are drawn uniformly.
    """

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    void_weight: float = 0.1
    num_points: int = 12544
    oversample: float = 3.0
    importance: float = 0.75

    def __post_init__(self):
        if self.num_points < 1 or self.oversample < 1 or not 0 <= self.importance <= 1:
            raise ValueError(
                "SetLossConfig accepts num_points >= 1, oversample >= 1 and importance in [0, 1]; "
                f"received {self.num_points}, {self.oversample} and {self.importance}."
            )

    @property
    def uncertain_points(self) -> int:
        """Points that are kept for being uncertain."""
        return int(self.importance * self.num_points)

    @property
    def candidates(self) -> int:
        """Points among which the uncertain ones are sought."""
        return int(self.oversample * self.num_points)


class SetLosses(NamedTuple):
    """The three losses of one layer, not weighted."""

    classes: Float[Array, ""]
    masks: Float[Array, ""]
    dice: Float[Array, ""]


def matching_costs(
    class_logits: Float[Array, "B Q C"],
    mask_logits: Float[Array, "B Q h w"],
    targets: Targets,
    points: Float[Array, "B P 2"],
    config: SetLossConfig,
) -> Float[Array, "B Q G"]:
    """What each pair of a query and a target costs, compared at P points of the image."""

    def of_image(classes: Array, masks: Array, labels: Array, truth: Array, at: Array) -> Array:
        logits = sample_points(masks.transpose(1, 2, 0), at).T  # [Q, P]
        inside = sample_points(truth.transpose(1, 2, 0), at)  # [P, G]
        count = at.shape[0]
        entropy = jax.nn.softplus(-logits) @ inside + jax.nn.softplus(logits) @ (1 - inside)
        soft = jax.nn.sigmoid(logits)
        overlap = 2 * soft @ inside + 1
        dice = 1 - overlap / (soft.sum(-1)[:, None] + inside.sum(0) + 1)
        likely = jax.nn.softmax(classes, axis=-1)[:, labels]
        return (
            config.mask_weight * entropy / count
            - config.class_weight * likely
            + config.dice_weight * dice
        )

    arguments = (class_logits, mask_logits, targets.labels, targets.masks, points)
    return jax.vmap(of_image)(*jax.lax.stop_gradient(arguments))


def match(costs: Float[Array, "*N Q G"], valid: Bool[Array, "*N G"]) -> Int[Array, "*N G"]:
    """The query of each target under the cheapest assignment, found on the host by SciPy.

    Padding gets -1, and so do the dearest targets where there are more of them than queries. NaN
    and infinite costs count as the largest number.
    """
    shape = jax.ShapeDtypeStruct(valid.shape, jnp.int32)
    return jax.pure_callback(_assign, shape, costs, valid, vmap_method="expand_dims")


def _assign(costs: Array, valid: Array) -> np.ndarray:
    from scipy.optimize import linear_sum_assignment

    prices, real = np.asarray(costs, np.float64), np.asarray(valid)
    largest = float(np.finfo(np.float32).max)
    prices = np.nan_to_num(prices, nan=largest, posinf=largest, neginf=largest)
    queries = np.full(real.shape, -1, np.int32)
    for place in np.ndindex(real.shape[:-1]):
        columns = np.flatnonzero(real[place])
        chosen, target = linear_sum_assignment(prices[place][:, columns])
        queries[place][columns[target]] = chosen
    return queries


def set_losses(
    class_logits: Float[Array, "B Q C"],
    mask_logits: Float[Array, "B Q h w"],
    targets: Targets,
    matched: Int[Array, "B G"],
    candidates: Float[Array, "B G M 2"],
    uniform: Float[Array, "B G U 2"],
    config: SetLossConfig,
) -> SetLosses:
    """The three losses of matched queries.

    Args:
      class_logits: the last one is void.
      matched: from `match`.
      candidates: points among which those nearest to a mask's border are kept.
      uniform: further points.
    """
    found = targets.valid & (matched >= 0)
    place = jnp.maximum(matched, 0)

    def class_loss(logits: Array, labels: Array, queries: Array, found: Array) -> Array:
        count, void = logits.shape[0], logits.shape[1] - 1
        wanted = jnp.full((count,), void, labels.dtype)
        wanted = wanted.at[jnp.where(found, queries, count)].set(labels, mode="drop")
        weights = jnp.where(wanted == void, config.void_weight, 1.0)
        likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[:, None], axis=1)
        return -jnp.sum(weights * likelihood[:, 0]) / weights.sum()

    def mask_loss(logits: Array, truth: Array, many: Array, uniform: Array) -> tuple[Array, Array]:
        doubt = -jnp.abs(sample_points(jax.lax.stop_gradient(logits), many))
        kept = jax.lax.top_k(doubt, config.uncertain_points)[1]
        at = jnp.concatenate([many[kept], uniform])
        values = sample_points(logits, at)
        inside = sample_points(truth, at)
        entropy = jax.nn.softplus(values) - values * inside
        soft = jax.nn.sigmoid(values)
        overlap = 2 * jnp.sum(soft * inside) + 1
        return entropy.mean(), 1 - overlap / (soft.sum() + inside.sum() + 1)

    classes = jax.vmap(class_loss)(class_logits, targets.labels, place, found).mean()
    chosen = jnp.take_along_axis(mask_logits, place[:, :, None, None], axis=1)  # [B, G, h, w]
    masks, dice = jax.vmap(jax.vmap(mask_loss))(chosen, targets.masks, candidates, uniform)
    # Devices with an image each would divide by their mean number of targets, or 1.
    count = jnp.maximum(targets.valid.sum(), targets.valid.shape[0])
    masks, dice = (jnp.where(found, each, 0.0).sum() / count for each in (masks, dice))
    return SetLosses(classes, masks, dice)


def deep_losses(
    class_logits: Float[Array, "N B Q C"],
    mask_logits: Float[Array, "N B Q h w"],
    targets: Targets,
    key: PRNGKeyArray,
    config: SetLossConfig,
) -> tuple[Float[Array, ""], SetLosses]:
    """Deep supervision: the losses of N layers, each with a matching and points of its own.

    Returns:
      the weighted sum, and each loss summed over layers.
    """
    batch, count = targets.valid.shape
    match_key, candidate_key, uniform_key = jax.random.split(key, 3)
    layers = class_logits.shape[0]

    def costs(layer: tuple[Array, Array, Array]) -> Array:
        classes, masks, key = layer
        points = jax.random.uniform(key, (batch, config.num_points, 2))
        return matching_costs(classes, masks, targets, points, config)

    keys = jax.random.split(match_key, layers)
    all_costs = jax.lax.map(costs, (*jax.lax.stop_gradient((class_logits, mask_logits)), keys))
    valid = jnp.broadcast_to(targets.valid, (layers, batch, count))
    matched = match(all_costs, valid)

    def losses(layer: tuple[Array, Array, Array, Array, Array]) -> SetLosses:
        classes, masks, queries, first, second = layer
        rest = config.num_points - config.uncertain_points
        candidates = jax.random.uniform(first, (batch, count, config.candidates, 2))
        uniform = jax.random.uniform(second, (batch, count, rest, 2))
        return set_losses(classes, masks, targets, queries, candidates, uniform, config)

    keys = jax.random.split(candidate_key, layers), jax.random.split(uniform_key, layers)
    by_layer = jax.lax.map(losses, (class_logits, mask_logits, matched, *keys))
    parts = SetLosses(*(part.sum() for part in by_layer))
    weights = config.class_weight, config.mask_weight, config.dice_weight
    classes, masks, dice = (weight * part for weight, part in zip(weights, parts, strict=True))
    return classes + masks + dice, parts
