"""MAFT+ (Jiao et al. 2024): vision and text of a CLIP optimized together for segmentation.

Three losses, each with gradients of its own (see `flax_models.maft_plus`): Mask2Former's train the
decoders, the mask-aware loss trains the image tower and the transfer, and representation
compensation keeps the image tower near its original.  Feature maps are `[B, H, W, C]`.

Decisions where the published code leaves a choice: stochastic depth is off in student and teacher;
one pass of the student serves both branches; an image without targets adds nothing to the
mask-aware loss.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ...flax_models.convnext import ConvNeXt
from ...flax_models.layers.bilinear import resize
from ...flax_models.maft_plus import MaftPlus, class_logits
from ..seeds import seed_key
from ..settings import check_settings
from ..training import (
    TrainState,
    accumulated,
    apply_gradients,
    dotted,
    gather,
    init_state,
    matches,
    split_trainable,
    train,
)
from .set_losses import SetLossConfig, Targets, deep_losses

# ---- losses ----


def smooth_l1(difference: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Huber's function with its bend at 1."""
    size = jnp.abs(difference)
    return jnp.where(size < 1, 0.5 * difference**2, size - 0.5)


def mask_aware_loss(
    class_logits: Float[Array, "B Q C"],
    mask_logits: Float[Array, "B Q h w"],
    labels: Int[Array, "B G"],
    masks: Bool[Array, "B G H W"],
    valid: Bool[Array, "B G"],
) -> Float[Array, ""]:
    """Class probabilities follow how well each mask fits (section 3.2 of the paper).

    For every instance, the probability that the queries give to its class is drawn towards their
    IoU with its mask, stretched to [0, 1] over the queries.

    Args:
      class_logits: open-vocabulary logits, the last one void, which is left out.
      mask_logits: proposals; no gradient passes them.
      labels, masks, valid: padded targets, masks at a resolution of their own.

    Returns:
      the mean over all pairs of a valid instance and a query; 0 without valid instances.
    """
    chances = jax.nn.softmax(class_logits[..., :-1], axis=-1)  # [B, Q, K]
    chances = jnp.take_along_axis(chances, labels[:, None, :], axis=2)  # [B, Q, G]
    soft = jax.lax.stop_gradient(jax.nn.sigmoid(mask_logits))

    # Sums over upsampled proposals, without making them: upsampling is linear, so its transpose
    # brings the targets down instead.
    low = jax.ShapeDtypeStruct(soft.shape[-2:], soft.dtype)
    down = jax.linear_transpose(lambda x: resize(x, masks.shape[-2:], axis=0), low)
    shrunk = jax.vmap(jax.vmap(lambda mask: down(mask)[0]))(masks.astype(soft.dtype))
    (everywhere,) = down(jnp.ones(masks.shape[-2:], soft.dtype))
    shared = jnp.einsum("bqhw,bghw->bqg", soft, shrunk)
    proposed = jnp.einsum("bqhw,hw->bq", soft, everywhere)[..., None]
    true = masks.sum(axis=(2, 3), dtype=soft.dtype)[:, None]  # [B, 1, G]
    iou = shared / (true + proposed - shared + 1e-7)
    least, most = (f(iou, axis=1, keepdims=True) for f in (jnp.min, jnp.max))
    wanted = (iou - least) / (most - least + 1e-8)

    pairs = jnp.where(valid[:, None], smooth_l1(chances - wanted), 0.0)
    return pairs.sum() / jnp.maximum(valid.sum() * soft.shape[1], 1)


def representation_compensation_loss(
    student: Float[Array, "B h w C"], teacher: Float[Array, "_ _ _ _"]
) -> Float[Array, ""]:
    """Distance of pooled feature maps, at three scales (section 3.4 of the paper).

    Both maps are rectified, made square by stretching the shorter side, and averaged over cells of
    a whole, a half and a quarter of the *original* width; compared are the sums of each row and of
    each column of cells. A portrait map therefore has more cells than a landscape one.

    Raises:
      ValueError: the maps differ in shape or are less than 4 wide.
    """
    if student.shape != teacher.shape or student.shape[2] < 4:
        raise ValueError(
            "representation_compensation_loss takes two maps of one shape, at least 4 wide; "
            f"received {student.shape} and {teacher.shape}."
        )
    _, height, width, _ = student.shape
    side = max(height, width)

    def sums(features: Array) -> Array:
        square = resize(jax.nn.relu(features), (side, side))
        parts = []
        for scale in (1, 2, 4):
            cell = width // scale
            count = side // cell
            cells = square[:, : count * cell, : count * cell]
            cells = cells.reshape(cells.shape[0], count, cell, count, cell, -1).mean(axis=(2, 4))
            parts += [cells.sum(axis=1), cells.sum(axis=2)]  # [B, count, C]
        return jnp.concatenate(parts, axis=1)

    return smooth_l1(sums(student) - sums(teacher)).mean()


# ---- what trains, and how ----

TRAINABLE = (
    "backbone.clip_model.visual.trunk.stem",
    "backbone.clip_model.visual.trunk.stages",
    "sem_seg_head",
    "void_embedding",
    "cdt",
)
# Norms and embeddings by their paths; the pixel decoder's level_embed is neither.
NOT_DECAYED = (
    "*.scale",
    "*.embedding",
    "*norm.bias",
    "*norm[12].bias",
    "*.trunk.stem.1.bias",
    "*.downsample.0.bias",
    "*.input_proj.[012].1.bias",
    "*._mask_pooling_proj.0.bias",
)
# (pattern, factor of the learning rate); the first that matches counts.
RATES = (("backbone", 0.1), ("*", 1.0))


@dataclasses.dataclass(frozen=True)
class MaftPlusTraining:
    """Settings of a run; the defaults are the published ones for ConvNeXt-Base.

    Attributes:
      steps: one batch each; the learning rate falls to 0 over them, along (1 - t / steps)^0.9.
      accumulate: steps whose gradients make one update, as one batch of all their images would.
      learning_rate: of the decoders and the transfer.
      rates: factors of the learning rate by path.
      weight_decay: of AdamW.
      not_decayed: patterns of the parameters without it.
      clip: largest norm of all gradients together.
      mask_aware_weight: of the loss that ties classes to how well masks fit.
      compensation_weight: of the loss that holds the image tower to its original.
      set_losses: settings of Mask2Former's losses.
      trainable: patterns of the parameters that are trained.
    """

    steps: int = 60_000
    accumulate: int = 1
    learning_rate: float = 1e-4
    rates: tuple[tuple[str, float], ...] = RATES
    weight_decay: float = 2e-5
    not_decayed: tuple[str, ...] = NOT_DECAYED
    clip: float = 0.01
    mask_aware_weight: float = 1.0
    compensation_weight: float = 0.1
    set_losses: SetLossConfig = SetLossConfig()  # noqa: RUF009  (frozen)
    trainable: tuple[str, ...] = TRAINABLE

    def __post_init__(self):
        check_settings(self, least={"steps": 1, "accumulate": 1})
        if not self.clip > 0:
            raise ValueError(f"clip must be positive, received {self.clip}.")


@functools.lru_cache
def poly_adamw(config: MaftPlusTraining) -> optax.GradientTransformation:
    """AdamW with rates and decay by path, on gradients clipped by their global norm."""
    by_path = jax.tree_util.tree_map_with_path

    def decays(path: Any, _: Any) -> bool:
        return not any(matches(pattern, dotted(path)) for pattern in config.not_decayed)

    def scaled(path: Any, update: Any) -> Any:
        rates = (rate for pattern, rate in config.rates if matches(pattern, dotted(path)))
        return next(rates, 1.0) * update

    updates = -(-config.steps // config.accumulate)
    schedule = optax.polynomial_schedule(config.learning_rate, 0.0, 0.9, updates)
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(),
        optax.add_decayed_weights(config.weight_decay, mask=functools.partial(by_path, decays)),
        optax.stateless(lambda updates, params: by_path(scaled, updates)),
        optax.scale_by_learning_rate(schedule),
    )
    return accumulated(optimizer, config.accumulate)


# ---- the step ----


@dataclasses.dataclass(frozen=True)
class MaftPlusStatic:
    """What a step needs and never changes: structures, optimizer, settings."""

    model: nnx.GraphDef[Any]  # the student; its parameters are trained and `frozen["model"]`
    teacher: nnx.GraphDef[Any]  # the original trunk; `frozen["teacher"]`
    optimizer: optax.GradientTransformation
    config: MaftPlusTraining


def prepare(
    model: MaftPlus,
    rows: Float[Array, "N D"],
    synonyms: Int[Array | np.ndarray, "K S"],
    config: MaftPlusTraining,
    *,
    teacher: ConvNeXt | None = None,
) -> tuple[MaftPlusStatic, TrainState, dict[str, Any]]:
    """Everything `train_step` needs.

    Args:
      model: the start; read, never changed.
      rows: text rows of the training vocabulary, of unit length.
      synonyms: the rows of each class.
      config: settings.
      teacher: the original trunk; default: the model's own as it is now.

    Raises:
      ValueError: a pattern of trainable parameters that matches nothing.
    """
    graphdef, train, rest = split_trainable(model, config.trainable)
    train = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), train)
    trunk, original = nnx.split(teacher or model.backbone.clip_model.visual.trunk)
    optimizer = poly_adamw(config)
    frozen = {"model": rest, "teacher": nnx.to_pure_dict(original)}
    frozen |= {"rows": rows, "synonyms": synonyms}
    static = MaftPlusStatic(graphdef, trunk, optimizer, config)
    return static, init_state(train, optimizer), jax.tree.map(jnp.asarray, frozen)


def fit(
    model: MaftPlus,
    rows: Float[Array, "N D"],
    synonyms: Int[Array | np.ndarray, "K S"],
    batches: Iterable[Any],
    config: MaftPlusTraining,
    *,
    seed: int,
    teacher: ConvNeXt | None = None,
    **options: Any,
) -> MaftPlus:
    """Train a model and return the trained one.

    Args:
      model, rows, synonyms, config, teacher: as for `prepare`.
      batches: what `train_step` takes, endless.
      seed: of the points at which masks are compared.
      options: of `training.train`: checkpoints, a mesh, where metrics go. Its key, number of steps
        and `fixed_length` follow from the seed and the settings.

    Raises:
      TypeError: options that `training.train` does not have, or that are settled here.
    """
    static, state, frozen = prepare(model, rows, synonyms, config, teacher=teacher)
    own: dict[str, Any] = {"key": seed_key(seed), "num_steps": config.steps, "fixed_length": True}
    state = train(train_step, static, state, frozen, batches, **own, **options)
    return nnx.merge(static.model, gather(state.params), frozen["model"])


def train_step(
    static: MaftPlusStatic,
    state: TrainState,
    frozen: Mapping[str, Any],
    batch: Mapping[str, Array],
    key: PRNGKeyArray,
) -> tuple[TrainState, dict[str, Array]]:
    """One update of all three parts.

    Args:
      static, state, frozen: from `prepare`.
      batch: `images` [B, H, W, 3], normalized and padded to multiples of 32, and the targets:
        `labels` [B, G], `masks` [B, G, H, W], `valid` [B, G].
      key: this step's key.

    Returns:
      the new state and metrics: loss; classes, masks and dice summed over layers; mask_aware;
      compensation.
    """
    loss_of = functools.partial(_loss, static, frozen, batch, key)
    (_, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return apply_gradients(state, gradients, static.optimizer), metrics


def _loss(
    static: MaftPlusStatic,
    frozen: Mapping[str, Any],
    batch: Mapping[str, Array],
    key: PRNGKeyArray,
    params: Any,
) -> tuple[Array, dict[str, Array]]:
    config = static.config
    student = nnx.merge(static.model, params, frozen["model"])
    teacher = nnx.merge(static.teacher, frozen["teacher"])
    targets = Targets(batch["labels"], batch["masks"], batch["valid"])
    synonyms = frozen["synonyms"]

    output = student(batch["images"], frozen["rows"])
    original = jax.lax.stop_gradient(teacher(batch["images"])[-1])
    rows = jnp.stack([layer.row_logits for layer in output.layers])  # [N, B, Q, R]
    masks = jnp.stack([layer.mask_logits for layer in output.layers])
    proposals, parts = deep_losses(
        class_logits(rows, synonyms), masks, targets, key, config.set_losses
    )
    open_logits = class_logits(output.open_logits, synonyms)

    def of_image(*arrays: Array) -> Array:
        return mask_aware_loss(*(array[None] for array in arrays))

    mask_aware = jax.vmap(of_image)(open_logits, masks[-1], *targets).mean()
    compensation = representation_compensation_loss(output.features, original)
    loss = (
        proposals
        + config.mask_aware_weight * mask_aware
        + config.compensation_weight * compensation
    )
    metrics = {"loss": loss, **parts._asdict()}
    return loss, metrics | {"mask_aware": mask_aware, "compensation": compensation}
