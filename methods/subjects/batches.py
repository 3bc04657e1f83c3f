"""Batches of a subject's images: augmented as Custom Diffusion does, or plain with cached latents.

Pixels are float32 in [-1, 1].  A batch is {"tokens" int32 [B, L], "mask" [B, h, w, 1]} with either
{"pixels" [B, H, W, 3]} or the scaled posterior {"latent_mean", "latent_std" [B, h, w, Z]}; with
prior preservation it also has {"prior": the same of class images, without a mask}.

Example n is a function of the seed and of n alone, and the iterator's position is checkpointed, so
a resumed run sees what the uninterrupted one would.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from ..sampling.latents import to_unit
from ..text.phrases import encode_phrases
from ..training import local_rows
from .images import Concept

# What a caption begins with: nothing, one of two for a small subject, one of two for a large one.
PREFIXES = ("", "a far away ", "very small ", "zoomed in ", "close up ")
_SMALL, _LARGE = (1, 2), (3, 4)
_MANY = 2**40  # examples: more than any run asks for
_READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)

Encode = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class Instances:
    """The images of all concepts, one after the other, and the token ids of their captions.

    Attributes:
      images: of the subjects, uint8 [H, W, 3] of any sizes.
      owner: [N] which concept each one shows.
      captions: [C, P, L] a concept's prompt behind each prefix, the empty one first.
      class_images: per concept, uint8 [K, size, size, 3]; empty without prior preservation.
      class_captions: [C, L].
    """

    images: Sequence[np.ndarray]
    owner: Int[np.ndarray, " N"]
    captions: Int[np.ndarray, "C P L"]
    class_images: Sequence[np.ndarray]
    class_captions: Int[np.ndarray, "C L"]


def collect(
    tokenizer: Any,
    concepts: Sequence[Concept],
    prompts: Sequence[str],
    length: int,
    size: int,
    *,
    prefixes: Sequence[str] = PREFIXES,
    prior: bool = False,
) -> Instances:
    """The images and captions of concepts.

    Args:
      tokenizer: one that knows the new tokens.
      concepts, prompts: the subjects, and what each one's images show.
      length: tokens in a caption.
      size: pixels along a side of the class images.
      prefixes: what captions begin with.
      prior: whether class images are wanted.
    """
    images = [image for concept in concepts for image in concept.images]
    owner = [n for n, concept in enumerate(concepts) for _ in concept.images]
    captions = np.stack(
        [
            encode_phrases(tokenizer, [each + prompt for each in prefixes], length)
            for prompt in prompts
        ]
    )
    classes = [
        np.stack([square(image, size, crop=True) for image in concept.class_images])
        for concept in (concepts if prior else ())
    ]
    class_prompts = [concept.class_prompt or concept.word for concept in concepts]
    class_captions = encode_phrases(tokenizer, class_prompts, length)
    return Instances(images, np.asarray(owner), captions, classes, class_captions)


def square(
    image: UInt8[np.ndarray, "H W 3"], size: int, *, crop: bool
) -> UInt8[np.ndarray, "S S 3"]:
    """The image at size x size, bilinear: its central square, or all of it, squeezed."""
    height, width = image.shape[:2]
    side, box = min(height, width), None
    if crop:
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    resized = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized)


def augment(
    image: UInt8[np.ndarray, "H W 3"],
    size: int,
    cells: int,
    rng: np.random.Generator,
    *,
    flip: bool,
    crop: bool,
) -> tuple[Float[np.ndarray, "S S 3"], Float[np.ndarray, "M M 1"], int]:
    """Custom Diffusion's augmentation (Kumari et al. 2023): the subject small, or close up.

    Two times in three it is resized to a side between size/3 and size and pasted somewhere on gray,
    otherwise to 1.2 to 1.4 times the size and cropped somewhere.

    Args:
      image: the whole picture.
      size, cells: pixels and latent cells along a side of the result.
      rng: source of the randomness.
      flip: mirror one time in two.
      crop: take the central square instead of squeezing the picture into one.

    Returns:
      pixels; a mask that is 1 where a latent cell lies in the picture, a cell away from its border;
      and the index of the caption's prefix in `PREFIXES`.
    """
    factor = size // cells
    if flip and rng.random() < 0.5:
        image = image[:, ::-1]
    if rng.random() < 0.66:
        scale = int(rng.integers(-(-size // 3), size, endpoint=True))
    else:
        scale = int(rng.integers(int(np.ceil(1.2 * size)), int(1.4 * size), endpoint=True))
    top, left = (int(at) for at in rng.integers(0, abs(size - scale), 2, endpoint=True))
    picture = to_unit(square(np.ascontiguousarray(image), scale, crop=crop))
    if scale > size:
        pixels = picture[top : top + size, left : left + size]
        mask = np.ones((cells, cells, 1), np.float32)
    else:
        pixels = np.zeros((size, size, 3), np.float32)
        pixels[top : top + scale, left : left + scale] = picture
        mask = np.zeros((cells, cells, 1), np.float32)
        rows, columns = (
            slice(start // factor + 1, max(0, (start + scale) // factor - 1))
            for start in (top, left)
        )
        mask[rows, columns] = 1.0
    choices = _LARGE if scale > size else _SMALL if scale < 0.6 * size else (0,)
    return pixels, mask, int(rng.choice(choices))


def augmented(
    instances: Instances, size: int, cells: int, *, flip: bool, crop: bool
) -> Callable[[int, np.random.Generator], dict[str, Any]]:
    """Example `index` of an endless run over the images, each time another augmentation."""

    def example(index: int, rng: np.random.Generator) -> dict[str, Any]:
        owner = instances.owner[index]
        pixels, mask, prefix = augment(
            instances.images[index], size, cells, rng, flip=flip, crop=crop
        )
        tokens = instances.captions[owner, prefix]
        batch: dict[str, Any] = {"pixels": pixels, "mask": mask, "tokens": tokens}
        if instances.class_images:
            others = instances.class_images[owner]
            chosen = others[rng.integers(len(others))]
            shown = chosen[:, ::-1] if flip and rng.random() < 0.5 else chosen
            tokens = instances.class_captions[owner]
            batch["prior"] = {"pixels": to_unit(shown), "tokens": tokens}
        return batch

    return example


def cached(
    instances: Instances, size: int, cells: int, encode: Encode, *, flip: bool, crop: bool
) -> Callable[[int, np.random.Generator], dict[str, Any]]:
    """The same without augmentation but for mirroring: every image is encoded once, here.

    Args:
      encode: pixels [n, size, size, 3] -> mean and standard deviation of the scaled latents.
    """

    def encode_all(images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        turns = [[to_unit(image) for image in images]]
        if flip:
            turns.append([image[:, ::-1] for image in turns[0]])
        encoded = [encode(np.stack(turn)) for turn in turns]
        mean, std = (np.stack(parts) for parts in zip(*encoded, strict=True))
        return {"latent_mean": mean, "latent_std": std}  # [turns, N, h, w, Z]

    subjects = encode_all([square(image, size, crop=crop) for image in instances.images])
    classes = [encode_all(list(images)) for images in instances.class_images]
    mask = np.ones((cells, cells, 1), np.float32)

    def pick(latents: dict[str, np.ndarray], index: int, rng: np.random.Generator) -> dict:
        turn = int(rng.integers(len(latents["latent_mean"])))
        return {name: part[turn, index] for name, part in latents.items()}

    def example(index: int, rng: np.random.Generator) -> dict[str, Any]:
        owner = instances.owner[index]
        tokens = instances.captions[owner, 0]
        batch: dict[str, Any] = pick(subjects, index, rng) | {"mask": mask, "tokens": tokens}
        if classes:
            others = classes[owner]
            chosen = int(rng.integers(others["latent_mean"].shape[1]))
            tokens = instances.class_captions[owner]
            batch["prior"] = pick(others, chosen, rng) | {"tokens": tokens}
        return batch

    return example


def batches(
    example: Callable[[int, np.random.Generator], dict[str, Any]],
    examples: int,
    batch_size: int,
    seed: int,
) -> grain.IterDataset:
    """Endless batches: the images in random order, again and again.

    Of several processes each one makes its rows of every batch.
    """
    rows = local_rows(batch_size)
    part = rows.stop - rows.start
    whole = grain.MapDataset.range(examples).seed(seed).shuffle().repeat().random_map(example)

    def mine(n: int) -> dict[str, Any]:
        batch, row = divmod(n, part)
        return whole[batch * batch_size + rows.start + row]

    return grain.MapDataset.range(_MANY).map(mine).batch(part).to_iter_dataset(_READ)
