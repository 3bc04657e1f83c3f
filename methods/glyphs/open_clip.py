"""A tiny OpenCLIP that learns the glyphs world's images and captions, for segmentation.

Both towers learn together.  A caption is about a region that shows a digit or nothing but texture,
and is compared with every region of the batch; one that leaves something unsaid belongs to all that
it is true of.  There are three lessons.  The first shows single digits, each a whole image.  In the
second a region is a quarter of a scene: the mean over its part of the image tower's map.  In the
third it is the mean over some of the quarter's cells, drawn at random: otherwise every cell speaks
of the whole picture, and what is pooled inside a mask means nothing.  A linear head, which exists
in training only, reads the region's digit, color and texture besides.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from ...flax_models.maft_plus import class_logits
from ...flax_models.mask2former import normalize
from ...flax_models.open_clip import IMAGE_MEAN, IMAGE_STD, OpenCLIP, OpenCLIPConfig
from ..seeds import seed_key
from ..segmentation.vocabulary import text_rows, tokenize
from ..training import TrainState, apply_gradients, init_state, train
from .captions import COLORS, DIGIT_NAMES, DIGITS, SURFACES, TEXTURES, TRAIN_TEMPLATES, fill
from .recipe import Recipe, Stage, attribute_loss, contrastive_loss
from .scenes import Figure, draw, vocabulary_of
from .tokenizer import MAX_LENGTH, build_tokenizer
from .world import IMAGE_SIZE, GlyphWorld, render_many

# In which the classes of scenes are put to it; the words around a name are those of captions.
TEMPLATES = ("a {}", "a photo of a {}", "a photo of {}")
_DIGIT_ALONE = ("a {name}", "a photo of a {name}", "a photo of {name}", "{name}")
_TEXTURE_ALONE = ("a {surface}", "a photo of a {surface}", "a photo of {surface}", "{surface}")
_COMPLETE = tuple(t for t in TRAIN_TEMPLATES if t.is_complete)
# What a region without a digit has for its digit and its color.
_NO_DIGIT, _NO_COLOR = DIGITS, len(COLORS)
_STRIDE = 32  # of the last map
_SIZES = (DIGITS + 1, len(COLORS) + 1, len(TEXTURES))


@dataclasses.dataclass(frozen=True)
class Lessons:
    """How long each lesson is; a later one begins anew, with the parameters of the one before.

    Attributes:
      digits: single ones, each a whole image.
      quarters: of scenes.
      cells: some of a quarter's, drawn at random.
    """

    digits: Recipe
    quarters: Recipe
    cells: Recipe


RECIPE = Lessons(
    Recipe(steps=800, batch_size=64, learning_rate=2e-3, weight_decay=0.05),
    Recipe(steps=400, batch_size=16, learning_rate=1.5e-3, weight_decay=0.05),
    Recipe(steps=1200, batch_size=16, learning_rate=1.5e-3, weight_decay=0.05),
)


class Picture(NamedTuple):
    """An image, and the digit, color and texture of each of its regions."""

    image: UInt8[np.ndarray, "H W 3"]
    labels: Int[np.ndarray, "R 3"]


def single(seed: int, index: int) -> Picture:
    """An image of one digit, all of it one region."""
    item = GlyphWorld("generator", index + 1, seed)[index]
    labels = [[item[name] for name in ("digit", "color", "texture")]]
    return Picture(item["image"], np.array(labels, np.int32))


def quarters(seed: int, index: int) -> Picture:
    """A scene of up to four digits; its regions are its quarters, row by row, and all of it."""
    rng = np.random.default_rng([seed, index, 2])
    count, texture = int(rng.integers(5)), int(rng.integers(len(TEXTURES)))
    drawn = rng.integers(DIGITS, size=count), rng.permutation(len(COLORS)), rng.permutation(4)
    figures = [Figure(*map(int, each)) for each in zip(*drawn, strict=False)]
    labels = np.full((5, 3), (_NO_DIGIT, _NO_COLOR, texture), np.int32)
    for figure in figures:
        labels[figure.quarter, :2] = figure.digit, figure.color
    return Picture(draw(rng, figures, texture, tuple(range(DIGITS)), "generator").image, labels)


def caption(
    rng: np.random.Generator, digit: int, color: int, texture: int
) -> tuple[str, Bool[np.ndarray, "3"]]:
    """A caption of a region, and which of digit, color and texture it tells."""
    word = TEXTURES[texture]
    if digit == _NO_DIGIT:
        return fill(str(rng.choice(_TEXTURE_ALONE)), surface=word), np.array([True, False, True])
    name = str(rng.choice(list(DIGIT_NAMES[digit])))
    if rng.random() < 0.6:
        text = fill(str(rng.choice(_DIGIT_ALONE)), name=name)
        return text, np.array([True, False, False])
    usable = [t for t in _COMPLETE if DIGIT_NAMES[digit][name] in t.kinds]
    surface = str(rng.choice(SURFACES[word]))
    template = usable[rng.integers(len(usable))]
    text = fill(template, name=name, color=COLORS[color], surface=surface)
    return text, np.array([True, True, True])


def to_pixels(images: UInt8[Array, "B H W 3"], scale: int) -> Float[Array, "B h w 3"]:
    """Normalized, and `scale` times as large."""
    pixels = (images.astype(jnp.float32) - jnp.asarray(IMAGE_MEAN)) / jnp.asarray(IMAGE_STD)
    batch, height, width, channels = pixels.shape
    return jax.image.resize(pixels, (batch, scale * height, scale * width, channels), "bilinear")


class _Captioned(nnx.Module):
    """The model and its head."""

    def __init__(self, config: OpenCLIPConfig, *, rngs: nnx.Rngs):
        self.clip = OpenCLIP(config, rngs=rngs)
        self.head = nnx.Linear(config.embed_dim, sum(_SIZES), rngs=rngs)


@dataclasses.dataclass(frozen=True)
class CaptionStage(Stage):
    """The static part of a step; images are enlarged `scale` times."""

    scale: int = 2


def pooling(
    rng: np.random.Generator, parts: int, width: int, *, some: bool
) -> Float[np.ndarray, "R h w"]:
    """Weights that average the cells of each part of a map, row by row, and then of all of it.

    Args:
      rng: draws which cells count, if not all do.
      parts: along each side; 1 is all of it, which then comes once.
      width: cells along each side of a part.
      some: whether only some cells of a part count; how many is drawn too, from one to all.
    """
    side = parts * width
    whole = np.full((1, side, side), side**-2, np.float32)
    if parts == 1:
        return whole
    weights = np.zeros((parts, parts, parts, width, parts, width), np.float32)
    for place in np.ndindex(parts, parts):
        drawn = rng.random((width, width))
        kept = drawn <= max(rng.random() if some else 1.0, drawn.min())
        weights[*place, place[0], :, place[1]] = kept / kept.sum()
    return np.concatenate([weights.reshape(-1, side, side), whole])


def caption_step(
    static: CaptionStage,
    state: TrainState,
    frozen: Any,
    batch: Mapping[str, Array],
    key: PRNGKeyArray,
) -> tuple[TrainState, dict[str, Array]]:
    """One update of both towers.

    `batch` is {image uint8 [B, H, W, 3]} and of its regions {cells [B, R, h, w], weights over the
    image tower's map; tokens [B, R, L]; labels int [B, R, 3]; said bool [B, R, 3]}.
    """
    del frozen, key
    labels, said, tokens = (
        batch[name].reshape(-1, batch[name].shape[-1]) for name in ("labels", "said", "tokens")
    )
    agree = (labels[:, None] == labels[None]) | ~said[None]  # [region, caption, attribute]
    true = agree.all(axis=-1).astype(jnp.float32)

    def loss_of(params: Any) -> tuple[Array, dict[str, Array]]:
        model = nnx.merge(static.graphdef, params)
        features = model.clip.visual.trunk(to_pixels(batch["image"], static.scale))[-1]
        pooled = jnp.einsum("bhwc,brhw->brc", features, batch["cells"])
        image = normalize(model.clip.visual.project(pooled.reshape(-1, pooled.shape[-1])))
        attributes = attribute_loss(model.head(image * 8), labels, _SIZES)
        text = normalize(model.clip.encode_text(tokens))
        contrast = contrastive_loss(model.clip.temperature() * image @ text.T, true)
        loss = contrast + attributes
        return loss, {"loss": loss, "contrast": contrast, "attributes": attributes}

    (_, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return apply_gradients(state, gradients, static.optimizer), metrics


def pretrain(
    lessons: Lessons = RECIPE,
    *,
    seed: int = 0,
    scale: int = 2,
    images: int = 6000,
    scenes: int = 3000,
    metrics_dir: Path | None = None,
    checkpoint_dir: Path | None = None,
    progress: bool = True,
) -> tuple[OpenCLIP, Any]:
    """A CLIP that knows all ten digits, and its tokenizer.

    Args:
      lessons: their length and speed.
      seed: of parameters, images and captions.
      scale: how much images are enlarged.
      images, scenes: how many there are at most; each gets other captions whenever it is seen.
      metrics_dir: folder for a JSONL file of each lesson's losses.
      checkpoint_dir: folder for checkpoints of each lesson, from which an interrupted one goes on.
      progress: show how far a lesson is.
    """
    tokenizer = build_tokenizer()
    config = OpenCLIPConfig.tiny(vocab_size=len(tokenizer), context_length=MAX_LENGTH)
    graphdef, state = nnx.split(_Captioned(config, rngs=nnx.Rngs(seed)))
    width = scale * IMAGE_SIZE // _STRIDE

    def learn(name: str, params: Any, pictures: Sequence[Picture]) -> Any:
        recipe = getattr(lessons, name)
        stage = CaptionStage(graphdef, recipe.optimizer(), scale)
        parts = 1 if name == "digits" else 2

        def example(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
            image, labels = pictures[index]
            texts, said = zip(*(caption(rng, *map(int, each)) for each in labels), strict=True)
            return {
                "image": image,
                "labels": labels,
                "said": np.stack(said),
                "tokens": tokenize(tokenizer, texts, MAX_LENGTH),
                "cells": pooling(rng, parts, width, some=name == "cells"),
            }

        batches = (
            grain.MapDataset.range(len(pictures))
            .seed(seed)
            .shuffle()
            .repeat()
            .random_map(example)
            .batch(recipe.batch_size)
            .to_iter_dataset()
        )
        state = train(
            caption_step,
            stage,
            init_state(params, stage.optimizer),
            None,
            batches,
            key=seed_key(seed),
            num_steps=recipe.steps,
            checkpoint_dir=checkpoint_dir and (checkpoint_dir / name).absolute(),
            checkpoint_every=250 if checkpoint_dir else None,
            keep=1,
            fixed_length=True,
            progress=progress,
            metrics_path=metrics_dir and metrics_dir / f"{name}.jsonl",
        )
        return state.params

    def drawn(draw: Callable[[int, int], Picture], most: int, *used: Recipe) -> list[Picture]:
        # Once: it takes longer than a step.
        count = min(most, max(recipe.steps * recipe.batch_size for recipe in used))
        return [draw(seed, index) for index in range(count)]

    params = learn("digits", nnx.to_pure_dict(state), drawn(single, images, lessons.digits))
    pictures = drawn(quarters, scenes, lessons.quarters, lessons.cells)
    for name in ("quarters", "cells"):
        params = learn(name, params, pictures)
    return nnx.merge(graphdef, params).clip, tokenizer


def zero_shot_accuracy(
    clip: OpenCLIP,
    tokenizer: Any,
    *,
    images: int = 500,
    seed: int = 7,
    scale: int = 2,
    digits: Sequence[int] = tuple(range(DIGITS)),
) -> float:
    """How often an image of a single digit is nearest to one of its names, in percent.

    The images, of handwriting and crops that no training saw, show `digits`; all ten are names to
    choose from. They are enlarged `scale` times.
    """
    labels, pictures = _single_digits(tuple(digits), images, seed)
    vocabulary = vocabulary_of(range(DIGITS))
    rows = text_rows(clip, tokenizer, vocabulary, templates=TEMPLATES)
    graphdef, state = nnx.split(clip)
    synonyms = jnp.asarray(vocabulary.synonyms())
    right = 0
    for start in range(0, images, 50):
        part = jnp.asarray(np.resize(pictures[start : start + 50], (50, *pictures.shape[1:])))
        found = np.asarray(_nearest(graphdef, state, part, rows, synonyms, scale))
        wanted = labels[start : start + 50]
        right += int((found[: len(wanted)] == wanted).sum())
    return 100 * right / images


@functools.lru_cache(maxsize=4)
def _single_digits(
    digits: tuple[int, ...], images: int, seed: int
) -> tuple[Int[np.ndarray, " N"], UInt8[np.ndarray, "N H W 3"]]:
    """Labels and images; drawn once, which takes longer than looking at them."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(np.asarray(digits), images)
    colors, textures = rng.integers(len(COLORS), size=images), rng.integers(3, size=images)
    return labels, render_many(labels, colors, textures, split="judge_test", seed=seed)


def _nearest_class(
    graphdef: nnx.GraphDef[Any], state: Any, images: Array, rows: Array, synonyms: Array, scale: int
) -> Array:
    embeddings = normalize(nnx.merge(graphdef, state).encode_image(to_pixels(images, scale)))
    similar = embeddings @ rows.T
    return class_logits(similar, synonyms)[:, : len(synonyms) - len(TEXTURES)].argmax(axis=-1)


_nearest = jax.jit(_nearest_class, static_argnums=(0, 5))
