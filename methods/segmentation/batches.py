"""Batches of scenes for `maft_plus.train_step`: augmented, padded, of few shapes.

Scenes whose augmented size, rounded up to a multiple, is the same come in the same batches, and
every batch has room for the same number of targets: a step is compiled once per such size.

Batch n is a function of the seed and of n alone, and the iterator's position is checkpointed, so a
resumed run sees what the uninterrupted one would.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence

import grain
import numpy as np
from jaxtyping import Bool, Float, Int, Int32, UInt8

from ...flax_models.open_clip import IMAGE_MEAN, IMAGE_STD
from ..training import local_rows
from .augmentation import LargeScaleJitter, ResizeFlip
from .datasets import SceneSource
from .metrics import Segment

_MEAN, _STD = (np.asarray(each, np.float32) for each in (IMAGE_MEAN, IMAGE_STD))
_MANY = 2**31 - 1  # batches, more than any run takes

Augmentation = ResizeFlip | LargeScaleJitter


def normalize_image(
    image: UInt8[np.ndarray, "H W 3"], padded: Sequence[int]
) -> Float[np.ndarray, "_ _ 3"]:
    """As CLIP wants it, float32, with zeros at the bottom and the right."""
    height, width = image.shape[:2]
    pixels = np.zeros((*padded, 3), np.float32)
    pixels[:height, :width] = (image - _MEAN) / _STD
    return pixels


def padded_size(size: Sequence[int], multiple: int = 32) -> tuple[int, int]:
    """Both sides rounded up to a multiple."""
    height, width = (-(-side // multiple) * multiple for side in size)
    return height, width


def targets_of(
    ids: Int32[np.ndarray, "H W"],
    segments: Mapping[int, Segment],
    padded: Sequence[int],
    room: int,
    *,
    keep_empty: bool = True,
) -> tuple[Int[np.ndarray, " G"], Bool[np.ndarray, "G h w"], Bool[np.ndarray, " G"]]:
    """Labels, masks and validity of a scene's segments, by id; crowds are left out.

    There are `room` masks, of the size `padded`. With `keep_empty` a segment without pixels left
    (behind a crop) stays a target.

    Raises:
      ValueError: there are more targets than room.
    """
    chosen = [
        (number, segment.category)
        for number, segment in sorted(segments.items())
        if not segment.is_crowd and (keep_empty or (ids == number).any())
    ]
    if len(chosen) > room:
        raise ValueError(f"a scene has {len(chosen)} targets, but there is room for {room}.")
    labels, valid = np.zeros(room, np.int32), np.zeros(room, bool)
    masks = np.zeros((room, *padded), bool)
    height, width = ids.shape
    for place, (number, category) in enumerate(chosen):
        labels[place], valid[place] = category, True
        masks[place, :height, :width] = ids == number
    return labels, masks, valid


def scene_batches(
    scenes: SceneSource,
    augmentation: Augmentation,
    batch_size: int,
    seed: int,
    *,
    room: int | None = None,
    multiple: int = 32,
    keep_empty: bool = True,
    threads: int = 2,
) -> grain.IterDataset:
    """Endless batches: {images [B, H, W, 3], labels [B, G], masks [B, G, H, W], valid [B, G]}.

    In every round each scene comes once, in another order; where the scenes of a padded size do not
    fill their last batch, some of them come twice.

    Args:
      scenes: where they come from.
      augmentation: what is done to them.
      batch_size: B, over all processes; each one reads its part of every batch.
      seed: of order and augmentation.
      room: G; default: what the fullest scene needs.
      multiple: of which the padded sides are multiples; a larger one makes fewer shapes.
      keep_empty: see `targets_of`.
      threads: that read ahead.

    Raises:
      ValueError: no scene, or a batch size, room or multiple that cannot be.
    """
    room = max(scenes.targets, default=0) if room is None else room
    count = len(scenes.sizes)
    if not count or batch_size < 1 or room < 1 or multiple % 32 or multiple < 1:
        raise ValueError(
            "scene_batches takes at least one scene, one image a batch, one target a scene and a "
            f"multiple of 32; received {count}, {batch_size}, {room} and {multiple}."
        )
    if max(scenes.targets) > room:
        raise ValueError(
            f"a scene has {max(scenes.targets)} targets, but there is room for {room}: raise it."
        )
    sizes = (padded_size(augmentation.size(size), multiple) for size in scenes.sizes)
    plan = _Plan(sizes, batch_size, seed)

    def load(number: int) -> dict[str, np.ndarray]:
        padded, indices, rngs = plan.batch(number)
        parts = []
        for index, rng in zip(indices, rngs, strict=True):
            scene = scenes[index]
            image, ids = augmentation(scene.image, scene.ids, rng)
            targets = targets_of(ids, scene.segments, padded, room, keep_empty=keep_empty)
            parts.append((normalize_image(image, padded), *targets))
        names, columns = ("images", "labels", "masks", "valid"), zip(*parts, strict=True)
        return {name: np.stack(each) for name, each in zip(names, columns, strict=True)}

    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return grain.MapDataset.range(_MANY).map(load).to_iter_dataset(read)


class _Plan:
    """Which scenes come in which batch."""

    def __init__(self, padded: Iterable[tuple[int, int]], batch_size: int, seed: int):
        self.batch_size, self.seed = batch_size, seed
        groups: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(padded):
            groups.setdefault(size, []).append(index)
        self.groups = {size: np.asarray(groups[size]) for size in sorted(groups)}
        self.length = sum(-(-len(group) // batch_size) for group in self.groups.values())
        self.round = functools.lru_cache(maxsize=2)(self._round)

    def _round(self, number: int) -> list[tuple[tuple[int, int], np.ndarray]]:
        """Every scene once: (padded size, indices) of each batch."""
        rng = np.random.default_rng([self.seed, number])
        found = []
        for size, group in self.groups.items():
            order = rng.permutation(group)
            filled = np.resize(order, -(-len(order) // self.batch_size) * self.batch_size)
            found += [(size, part) for part in filled.reshape(-1, self.batch_size)]
        return [found[place] for place in rng.permutation(len(found))]

    def batch(self, number: int) -> tuple[tuple[int, int], list[int], list[np.random.Generator]]:
        """Padded size, this process's scenes and their sources of randomness."""
        turn, place = divmod(number, self.length)
        size, indices = self.round(turn)[place]
        rngs = [np.random.default_rng([self.seed, number, n, 1]) for n in range(len(indices))]
        rows = local_rows(self.batch_size)
        return size, indices[rows].tolist(), rngs[rows]
