"""A tiny OpenCLIP that learns the glyphs world's scenes and captions, for segmentation.

Both towers learn together.  A caption is about a quarter of a scene, which shows a digit or nothing
but texture, and is compared with every quarter of the batch; one that leaves something unsaid
belongs to all that it is true of.  First each quarter is a picture of its own, seen as the mean
over the image tower's map.  Then scenes are seen whole, and a quarter is the mean over some of its
cells, drawn at random: otherwise every cell speaks of the whole picture, and what is pooled inside
a mask means nothing.  A linear head, which exists in training only, reads the quarter's digit,
colour and texture besides.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from ...flax_models.maft_plus import class_logits
from ...flax_models.mask2former import normalise
from ...flax_models.open_clip import IMAGE_MEAN, IMAGE_STD, OpenCLIP, OpenCLIPConfig
from ..segmentation.vocabulary import text_rows, tokenize
from ..training import TrainState, apply_gradients, init_state, train
from .captions import COLOURS, DIGIT_NAMES, DIGITS, SURFACES, TEXTURES, TRAIN_TEMPLATES, fill
from .recipe import Recipe, Stage, attribute_loss, contrastive_loss
from .scenes import Figure, draw, vocabulary_of
from .tokenizer import MAX_LENGTH, build_tokenizer
from .world import render_many

# In which the classes of scenes are put to it; the words around a name are those of captions.
TEMPLATES = ("a {}", "a photo of a {}", "a photo of {}")
_DIGIT_ALONE = ("a {name}", "a photo of a {name}", "a photo of {name}", "{name}")
_TEXTURE_ALONE = ("a {surface}", "a photo of a {surface}", "a photo of {surface}", "{surface}")
_COMPLETE = tuple(t for t in TRAIN_TEMPLATES if t.is_complete)
# What a quarter without a digit has for its digit and its colour.
_NO_DIGIT, _NO_COLOUR = DIGITS, len(COLOURS)
_SIZES = (DIGITS + 1, len(COLOURS) + 1, len(TEXTURES))
RECIPE = Recipe(steps=3500, batch_size=16, learning_rate=2e-3, weight_decay=0.05)


def quarters(seed: int, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], Int[np.ndarray, "4 3"]]:
    """A scene of up to four digits, and each quarter's digit, colour and texture."""
    rng = np.random.default_rng([seed, index, 2])
    count, texture = int(rng.integers(5)), int(rng.integers(len(TEXTURES)))
    drawn = rng.integers(DIGITS, size=count), rng.permutation(len(COLOURS)), rng.permutation(4)
    figures = [Figure(*map(int, each)) for each in zip(*drawn, strict=False)]
    labels = np.full((4, 3), (_NO_DIGIT, _NO_COLOUR, texture), np.int32)
    for figure in figures:
        labels[figure.quarter, :2] = figure.digit, figure.colour
    return draw(rng, figures, texture, tuple(range(DIGITS)), "generator").image, labels


def caption(
    rng: np.random.Generator, digit: int, colour: int, texture: int
) -> tuple[str, Bool[np.ndarray, "3"]]:
    """A caption of a quarter, and which of digit, colour and texture it tells."""
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
    text = fill(template, name=name, colour=COLOURS[colour], surface=surface)
    return text, np.array([True, True, True])


def to_pixels(images: UInt8[Array, "B H W 3"], scale: int) -> Float[Array, "B h w 3"]:
    """Normalised, and `scale` times as large."""
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
    """The static part of a step.

    Attributes:
      scale: how much images are enlarged.
      apart: whether the image tower sees each quarter alone, and all of it.
    """

    scale: int = 2
    apart: bool = False


def cut(images: Float[Array, "B H W C"]) -> Float[Array, "N h w C"]:
    """Four quarters of each image or map, row by row."""
    batch, height, width, channels = images.shape
    parts = images.reshape(batch, 2, height // 2, 2, width // 2, channels)
    return parts.swapaxes(2, 3).reshape(4 * batch, height // 2, width // 2, channels)


def some_cells(key: PRNGKeyArray, shape: tuple[int, int, int]) -> Float[Array, "N h w"]:
    """Weights that average some cells of each map; how many is drawn, from one to all."""
    share_key, cell_key = jax.random.split(key)
    drawn = jax.random.uniform(cell_key, shape)
    share = jax.random.uniform(share_key, (shape[0], 1, 1))
    kept = drawn <= jnp.maximum(share, drawn.min(axis=(1, 2), keepdims=True))
    return kept / kept.sum(axis=(1, 2), keepdims=True)


def caption_step(
    static: CaptionStage, state: TrainState, frozen: Any, batch: Mapping[str, Array],
    key: PRNGKeyArray,
) -> tuple[TrainState, dict[str, Array]]:  # fmt: skip
    """One update of both towers.

    Args:
      static: structure, optimizer and scale.
      state: parameters.
      frozen: nothing.
      batch: {image uint8 [B, 128, 128, 3], tokens [B, 4, L], labels int [B, 4, 3], said bool
        [B, 4, 3]}; what has four is of quarters, row by row.
      key: of the cells.
    """
    del frozen
    labels, said, tokens = (
        batch[name].reshape(-1, batch[name].shape[-1]) for name in ("labels", "said", "tokens")
    )
    agree = (labels[:, None] == labels[None]) | ~said[None]  # [quarter, caption, attribute]
    true = agree.all(axis=-1).astype(jnp.float32)

    def loss_of(params: Any) -> tuple[Array, tuple[Array, Array]]:
        model = nnx.merge(static.graphdef, params)
        trunk, pixels = model.clip.visual.trunk, to_pixels(batch["image"], static.scale)
        if static.apart:
            pooled = trunk(cut(pixels))[-1].mean(axis=(1, 2))
        else:
            maps = cut(trunk(pixels)[-1])
            count, height, width, _ = maps.shape
            pooled = jnp.einsum("nhwc,nhw->nc", maps, some_cells(key, (count, height, width)))
        image = normalise(model.clip.visual.project(pooled))
        attributes = attribute_loss(model.head(image * 8), labels, _SIZES)
        text = normalise(model.clip.encode_text(tokens))
        contrast = contrastive_loss(model.clip.temperature() * image @ text.T, true)
        return contrast + attributes, (contrast, attributes)

    (loss, parts), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    metrics = {"loss": loss, "contrast": parts[0], "attributes": parts[1]}
    return apply_gradients(state, gradients, static.optimizer), metrics


def pretrain(
    recipe: Recipe = RECIPE, *, seed: int = 0, scale: int = 2, scenes: int = 3000, **options: Any
) -> tuple[OpenCLIP, Any]:
    """A CLIP that knows all ten digits, and its tokenizer.

    Args:
      recipe: its length and speed; an update sees `batch_size` scenes.
      seed: of parameters, scenes and captions.
      scale: how much scenes are enlarged.
      scenes: how many there are; their quarters get other captions whenever they are seen.
      options: of `training.train`.
    """
    tokenizer = build_tokenizer()
    config = OpenCLIPConfig.tiny(vocab_size=len(tokenizer), context_length=MAX_LENGTH)
    graphdef, params = nnx.split(_Captioned(config, rngs=nnx.Rngs(seed)))
    together = CaptionStage(graphdef, recipe.optimizer(), scale)
    apart = dataclasses.replace(together, apart=True)
    state = init_state(nnx.to_pure_dict(params), together.optimizer)
    scenes = min(scenes, recipe.steps * recipe.batch_size)
    drawn = [quarters(seed, index) for index in range(scenes)]  # once: it takes longer than a step

    def example(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        image, labels = drawn[index]
        texts, said = zip(*(caption(rng, *map(int, each)) for each in labels), strict=True)
        tokens = tokenize(tokenizer, texts, MAX_LENGTH)
        return {"image": image, "tokens": tokens, "labels": labels, "said": np.stack(said)}

    batches = (
        grain.MapDataset.range(scenes).seed(seed).shuffle().repeat().random_map(example)
        .batch(recipe.batch_size).to_iter_dataset()
    )  # fmt: skip
    for stage, until in ((apart, max(1, 2 * recipe.steps // 5)), (together, recipe.steps)):
        state = train(
            caption_step, stage, state, None, batches, key=jax.random.key(seed),
            num_steps=until, **options,
        )  # fmt: skip
    return nnx.merge(graphdef, state.params).clip, tokenizer


def zero_shot_accuracy(
    clip: OpenCLIP, tokenizer: Any, *, images: int = 500, seed: int = 7, scale: int = 2,
    digits: Sequence[int] = tuple(range(DIGITS)),
) -> float:  # fmt: skip
    """How often an image of a single digit is nearest to one of its names, in percent.

    Args:
      clip, tokenizer: what is measured.
      images: how many, of handwriting and crops that no training saw.
      seed: of the images.
      scale: how much they are enlarged.
      digits: those that are shown; all ten are names to choose from.
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
    colours, textures = rng.integers(len(COLOURS), size=images), rng.integers(3, size=images)
    return labels, render_many(labels, colours, textures, split="judge_test", seed=seed)


def _nearest_class(
    graphdef: nnx.GraphDef[Any], state: Any, images: Array, rows: Array, synonyms: Array, scale: int
) -> Array:  # fmt: skip
    embeddings = normalise(nnx.merge(graphdef, state).encode_image(to_pixels(images, scale)))
    similar = embeddings @ rows.T
    return class_logits(similar, synonyms)[:, : len(synonyms) - len(TEXTURES)].argmax(axis=-1)


_nearest = jax.jit(_nearest_class, static_argnums=(0, 5))
