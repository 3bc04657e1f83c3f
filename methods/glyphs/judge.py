"""The judge: an independent classifier that says what an image of the glyphs world shows.

It is trained only on renders of the handwritten digits of the `judge` split, which the
text-to-image model never sees, and measured on those of `judge_test`, which neither sees. Its
renders vary more than the world's, and are blurred, faded and given noise, so that it
looks past a generator's mild artefacts. Its own accuracy travels with its weights.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from ...flax_models.glyph_classifier import GlyphClassifier, GlyphClassifierConfig
from ...text import read_text
from ..evaluation.instruments import in_batches
from ..evaluation.statistics import rate
from ..seeds import seed_key
from ..settings import check_settings
from ..training import dotted
from .captions import COLORS, TEXTURES
from .world import IMAGE_SIZE, Jitter, load_split, render_many

ATTRIBUTES = ("digit", "color", "texture")
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
TRAINING_JITTER = Jitter(
    shift=4.0, scale=0.14, stretch=0.12, shear=0.12, rotation=0.20, weight=0.10, color=0.06
)
_BATCH = 64  # images judged at once; shorter batches are filled up, so one compilation serves all


@dataclasses.dataclass(frozen=True, slots=True)
class JudgeConfig:
    """How the judge is trained.

    AdamW runs over drawings of handwritten samples with a cosine learning rate after a short
    warm-up; the judge is the moving average of its weights.

    Attributes:
      seed: of everything random.
      steps: batches.
      batch_size: images in each.
      renders: how often each handwritten sample is drawn, in random colors and textures.
      learning_rate: the highest.
      weight_decay: AdamW's.
      label_smoothing: probability that is spread over the other classes.
      average: factor of the moving average per step.
    """

    seed: int = 0
    steps: int = 1200
    batch_size: int = 96
    renders: int = 30
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    average: float = 0.99

    def __post_init__(self) -> None:
        check_settings(self, least={"steps": 1, "batch_size": 1, "renders": 1, "weight_decay": 0})


def render_set(
    split: str, renders: int, seed: int, jitter: Jitter | None = None
) -> tuple[UInt8[np.ndarray, "N 64 64 3"], dict[str, Int[np.ndarray, " N"]]]:
    """Every handwritten sample of `split` drawn `renders` times, with its labels."""
    count = len(load_split(split).labels) * renders
    samples = np.arange(count) % (count // renders)
    rng = np.random.default_rng(seed)
    labels = {
        "digit": load_split(split).labels[samples].astype(np.int32),
        "color": rng.integers(len(COLORS), size=count, dtype=np.int32),
        "texture": rng.integers(len(TEXTURES), size=count, dtype=np.int32),
    }
    columns = (labels[each] for each in ATTRIBUTES)
    images = render_many(*columns, split=split, seed=seed, jitter=jitter, samples=samples)
    return images, labels


def _blur(images: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Binomial filter [1 4 6 4 1] / 16 along both axes, edges repeated."""
    for axis in (1, 2):
        padding = [(2, 2) if each == axis else (0, 0) for each in range(4)]
        padded = jnp.pad(images, padding, mode="edge")
        first, second, middle, fourth, fifth = (
            jax.lax.slice_in_dim(padded, i, i + images.shape[axis], axis=axis) for i in range(5)
        )
        images = (first + 4.0 * second + 6.0 * middle + 4.0 * fourth + fifth) / 16.0
    return images


def augment(key: Array, images: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Images [0,1] as a mediocre generator might return them: soft or over-sharp, faded, noisy."""
    blur_key, contrast_key, shade_key, level_key, noise_key, grain_key = jax.random.split(key, 6)
    one_each = (images.shape[0], 1, 1, 1)
    amount = jax.random.uniform(blur_key, one_each, minval=-0.5, maxval=1.0)
    images = images + amount * (_blur(images) - images)
    contrast = jax.random.uniform(contrast_key, one_each, minval=0.8, maxval=1.15)
    shade = jax.random.uniform(shade_key, one_each, minval=-0.06, maxval=0.06)
    images = 0.45 + contrast * (images - 0.45) + shade
    level = jax.random.uniform(level_key, one_each, maxval=0.05)
    coarse = jax.random.normal(grain_key, (images.shape[0], IMAGE_SIZE // 4, IMAGE_SIZE // 4, 3))
    coarse = jax.image.resize(coarse, images.shape, "linear")
    noise = jax.random.normal(noise_key, images.shape)
    return jnp.clip(images + level * (noise + coarse), 0.0, 1.0)


def judge_loss(
    logits: dict[str, Float[Array, "B _"]], labels: dict[str, Int[Array, " B"]], smoothing: float
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Cross-entropy summed over the three heads (labels smoothed), and each head's accuracy."""
    loss = jnp.zeros(())
    metrics = {}
    for name, values in logits.items():
        target = optax.smooth_labels(jax.nn.one_hot(labels[name], values.shape[-1]), smoothing)
        loss += optax.softmax_cross_entropy(values, target).mean()
        metrics[name] = jnp.mean(values.argmax(-1) == labels[name])
    return loss, metrics | {"loss": loss}


def _optimizer(config: JudgeConfig) -> optax.GradientTransformation:
    warm_up = max(1, config.steps // 20)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warm_up, max(config.steps, warm_up + 1)
    )
    return optax.adamw(rate, weight_decay=config.weight_decay)


@partial(jax.jit, static_argnames=("graphdef", "config"), donate_argnames="state")
def judge_step(graphdef, config: JudgeConfig, state, images, labels, key):
    """One training step. `state`: params, average, optimizer; images uint8 [B,64,64,3]."""
    pixels = augment(key, images.astype(jnp.float32) / 255.0)

    def loss_of(params):
        logits = nnx.merge(graphdef, params)(pixels)
        return judge_loss(logits, labels, config.label_smoothing)

    (_, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(state["params"])
    updates, optimizer = _optimizer(config).update(gradients, state["optimizer"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    average = optax.incremental_update(params, state["average"], 1.0 - config.average)
    return {"params": params, "average": average, "optimizer": optimizer}, metrics


@partial(jax.jit, static_argnames=("graphdef", "features"))
def _look(graphdef, params, images, *, features: bool = False):
    model = nnx.merge(graphdef, params)
    return model.features(images) if features else jax.tree.map(jax.nn.softmax, model(images))


class Judge:
    """The trained classifier with its measured accuracy (`measured`: a JSON-like dict)."""

    def __init__(self, model: GlyphClassifier, measured: dict[str, Any] | None = None):
        self.config = model.config
        self.graphdef, state = nnx.split(model)
        self.params = nnx.to_pure_dict(state)
        self.measured = measured or {}

    def __call__(self, images: Any) -> dict[str, np.ndarray]:
        """Say what images show.

        Takes uint8 [N,64,64,3], or floats of that shape in [0, 1]. Returns int arrays [N] under
        `digit`, `color` and `texture` (indices), and class probabilities under
        `digit_probabilities` [N,10], `color_probabilities` [N,6] and
        `texture_probabilities` [N,3]. Raises ValueError for another shape or range.
        """
        found = self._look(images)
        classes = {name: found[name].argmax(-1) for name in ATTRIBUTES}
        return classes | {f"{name}_probabilities": found[name] for name in ATTRIBUTES}

    def features(self, images: Any) -> Float[np.ndarray, "N F"]:
        """What its three heads read of images, which are those that it is called with."""
        return self._look(images, features=True)

    def _look(self, images: Any, **options: Any) -> Any:
        look = partial(_look, self.graphdef, self.params, **options)
        return in_batches(look, _as_pixels(images, self.config.image_size), _BATCH)


def _as_pixels(images: Any, size: int) -> Float[np.ndarray, "N H W 3"]:
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[1:] != (size, size, 3):
        raise ValueError(
            f"the judge reads images of shape [N, {size}, {size}, 3], got {list(array.shape)}"
        )
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255.0
    array = array.astype(np.float32)
    if array.size and not (array.min() >= -0.01 and array.max() <= 1.01):
        raise ValueError(
            "the judge reads uint8 images or floats in [0, 1], got floats from "
            f"{array.min():.3g} to {array.max():.3g}; rescale them first"
        )
    return array


def train_judge(
    config: JudgeConfig | None = None,
    *,
    model_config: GlyphClassifierConfig | None = None,
    split: str = "judge",
) -> Judge:
    """Train a judge from scratch, a pure function of the config's seed on a given device."""
    config = config or JudgeConfig()
    images, labels = render_set(split, config.renders, config.seed + 1, TRAINING_JITTER)
    model = GlyphClassifier(model_config or GlyphClassifierConfig(), rngs=nnx.Rngs(config.seed))
    graphdef, initial = nnx.split(model)
    params = nnx.to_pure_dict(initial)
    state = {
        "params": params,
        "average": jax.tree.map(jnp.copy, params),
        "optimizer": _optimizer(config).init(params),
    }
    order = np.random.default_rng(config.seed)
    key = seed_key(config.seed)
    for step in range(config.steps):
        rows = order.integers(len(images), size=config.batch_size)
        batch = {name: values[rows] for name, values in labels.items()}
        drawn = jax.random.fold_in(key, step)
        state, _ = judge_step(graphdef, config, state, images[rows], batch, drawn)
    return Judge(nnx.merge(graphdef, state["average"]))


def measure_judge(
    judge: Judge, *, split: str = "judge_test", renders: int = 6, seed: int = 7
) -> dict[str, Any]:
    """The judge's accuracy per attribute, with 95 % intervals over images, and per digit."""
    images, labels = render_set(split, renders, seed)
    found = judge(images)
    right = {name: found[name] == labels[name] for name in ATTRIBUTES}
    count = len(images)
    samples = count // renders
    measured: dict[str, Any] = {"split": split, "handwritten_samples": samples, "images": count}
    for name in ATTRIBUTES:
        accuracy, low, high = rate(int(right[name].sum()), count)
        measured[name] = {"accuracy": accuracy, "low": low, "high": high}
    measured["accuracy_of_digit"] = {
        str(digit): float(right["digit"][labels["digit"] == digit].mean())
        for digit in np.unique(labels["digit"])
    }
    return measured


def save_judge(judge: Judge, folder: str | Path, training: JudgeConfig | None = None) -> None:
    """Write `model.safetensors` (float32) and `config.json` with the measured accuracy."""
    from safetensors.numpy import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    leaves = jax.tree_util.tree_leaves_with_path(judge.params)
    tensors = {dotted(path): np.ascontiguousarray(jax.device_get(leaf)) for path, leaf in leaves}
    (folder / WEIGHTS_FILE).write_bytes(save(tensors))
    record = {
        "_class_name": type(judge).__name__,
        "model": judge.config.to_dict(),
        "training": dataclasses.asdict(training) if training else None,
        "measured": judge.measured,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_judge(folder: str | Path) -> Judge:
    """Read a judge's folder. Raises ValueError where files are missing or do not fit."""
    from safetensors.numpy import load_file

    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no judge's folder: it has no {name}")
    try:
        record = json.loads(read_text(folder / CONFIG_FILE))
        config = GlyphClassifierConfig.from_dict(record["model"])
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} describes no judge: {error!r}.") from error
    abstract = nnx.eval_shape(lambda: GlyphClassifier(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    tensors = load_file(folder / WEIGHTS_FILE)
    leaves, tree = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
    expected = {dotted(path): leaf.shape for path, leaf in leaves}
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise ValueError(f"{folder / WEIGHTS_FILE} does not hold the weights its config asks for")
    params = jax.tree.unflatten(tree, [jnp.asarray(tensors[dotted(path)]) for path, _ in leaves])
    return Judge(nnx.merge(graphdef, params), record["measured"])
