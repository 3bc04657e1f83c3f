"""A tiny OpenCLIP that learns the glyphs world's images and captions, for segmentation.

Both towers learn together, from single digits: every caption is compared with every image of the
batch, and one that leaves something unsaid belongs to all images that it is true of.  A linear
head, which exists in training only, reads the image's digit, colour and texture besides.
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
from .recipe import ATTRIBUTES, Recipe, Stage, attribute_loss
from .scenes import vocabulary_of
from .tokenizer import MAX_LENGTH, build_tokenizer
from .world import GlyphWorld, render_many

# In which the classes of scenes are put to it; the words around a name are those of captions.
TEMPLATES = ("a {}", "a photo of a {}", "a photo of {}")
_DIGIT_ALONE = ("a {name}", "a photo of a {name}", "a photo of {name}", "{name}")
_TEXTURE_ALONE = ("a {surface}", "a photo of a {surface}", "a photo of {surface}", "{surface}")
_COMPLETE = tuple(t for t in TRAIN_TEMPLATES if t.is_complete)
RECIPE = Recipe(steps=1500, batch_size=64, learning_rate=2e-3, weight_decay=0.05)


def caption(
    rng: np.random.Generator, digit: int, colour: int, texture: int
) -> tuple[str, Bool[np.ndarray, "3"]]:
    """A caption, and which of digit, colour and texture it tells."""
    name = str(rng.choice(list(DIGIT_NAMES[digit])))
    word = TEXTURES[texture]
    kind = rng.random()
    if kind < 0.4:
        text = fill(str(rng.choice(_DIGIT_ALONE)), name=name)
        return text, np.array([True, False, False])
    if kind < 0.6:
        text = fill(str(rng.choice(_TEXTURE_ALONE)), surface=word)
        return text, np.array([False, False, True])
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
        self.head = nnx.Linear(config.embed_dim, sum(ATTRIBUTES), rngs=rngs)


@dataclasses.dataclass(frozen=True)
class CaptionStage(Stage):
    """The static part of a step; images are enlarged `scale` times."""

    scale: int = 2


def caption_step(
    static: CaptionStage, state: TrainState, frozen: Any, batch: Mapping[str, Array],
    key: PRNGKeyArray,
) -> tuple[TrainState, dict[str, Array]]:  # fmt: skip
    """One update of both towers.

    Args:
      static: structure, optimizer and scale.
      state: parameters.
      frozen: nothing.
      batch: {image uint8 [B, 64, 64, 3], tokens [B, L], labels int [B, 3], said bool [B, 3]}.
      key: not used.
    """
    del frozen, key
    labels, said = batch["labels"], batch["said"]
    agree = (labels[:, None] == labels[None]) | ~said[None]  # [image, caption, attribute]
    true = agree.all(axis=-1).astype(jnp.float32)

    def loss_of(params: Any) -> tuple[Array, tuple[Array, Array]]:
        model = nnx.merge(static.graphdef, params)
        image = model.clip.encode_image(to_pixels(batch["image"], static.scale))
        attributes = attribute_loss(model.head(normalise(image) * 8), labels)
        text = model.clip.encode_text(batch["tokens"])
        logits = model.clip.temperature() * normalise(image) @ normalise(text).T
        contrast = jnp.zeros(())
        for axis in (0, 1):
            targets = true / true.sum(axis=axis, keepdims=True)
            contrast -= (targets * jax.nn.log_softmax(logits, axis=axis)).sum(axis).mean() / 2
        return contrast + attributes, (contrast, attributes)

    (loss, parts), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    metrics = {"loss": loss, "contrast": parts[0], "attributes": parts[1]}
    return apply_gradients(state, gradients, static.optimizer), metrics


def pretrain(
    recipe: Recipe = RECIPE, *, seed: int = 0, scale: int = 2, images: int = 6000, **options: Any
) -> tuple[OpenCLIP, Any]:
    """A CLIP that knows all ten digits, and its tokenizer.

    Args:
      recipe: its length and speed.
      seed: of parameters, images and captions.
      scale: how much images are enlarged.
      images: how many there are; each gets another caption whenever it is seen.
      options: of `training.train`.
    """
    tokenizer = build_tokenizer()
    config = OpenCLIPConfig.tiny(vocab_size=len(tokenizer), context_length=MAX_LENGTH)
    graphdef, params = nnx.split(_Captioned(config, rngs=nnx.Rngs(seed)))
    stage = CaptionStage(graphdef, recipe.optimizer(), scale)
    state = init_state(nnx.to_pure_dict(params), stage.optimizer)
    images = min(images, recipe.steps * recipe.batch_size)
    world = GlyphWorld("generator", images, seed)
    items = [world[index] for index in range(images)]  # drawn once: it takes longer than a step

    def example(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        item = items[index]
        triple = tuple(item[name] for name in ("digit", "colour", "texture"))
        text, said = caption(rng, *triple)
        tokens = tokenize(tokenizer, [text], MAX_LENGTH)[0]
        labels = np.asarray(triple, np.int32)
        return {"image": item["image"], "tokens": tokens, "labels": labels, "said": said}

    batches = (
        grain.MapDataset.range(images).seed(seed).shuffle().repeat().random_map(example)
        .batch(recipe.batch_size).to_iter_dataset()
    )  # fmt: skip
    state = train(
        caption_step, stage, state, None, batches, key=jax.random.key(seed),
        num_steps=recipe.steps, **options,
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
