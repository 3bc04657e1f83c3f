"""The recipe of the bundled segmenter: a tiny MAFT+ that finds digits and textures in scenes.

A tiny CLIP learns all ten digits from captions (`open_clip.pretrain`).  The decoders then learn,
around the frozen CLIP, on scenes of the digits 0 to 6; at last they learn together with the image
tower, held back by compensation, and the transfer.  The digits 7, 8 and 9 are in no scene of the
training.  Everything follows from the seed.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from ...flax_models.maft_plus import MaftPlus, MaftPlusConfig
from ...flax_models.open_clip import OpenCLIP
from ..segmentation.augmentation import ResizeFlip
from ..segmentation.batches import scene_batches
from ..segmentation.datasets import Scene
from ..segmentation.evaluation import evaluate
from ..segmentation.maft_plus import MaftPlusTraining, fit
from ..segmentation.segmenter import Segmenter
from ..segmentation.set_losses import SetLossConfig
from ..segmentation.usage import Usage
from ..segmentation.vocabulary import Vocabulary, text_rows
from ..settings import check_settings
from .captions import DIGITS, TEXTURES
from .open_clip import RECIPE, TEMPLATES, Lessons, pretrain
from .scenes import SCENE_SIZE, SEEN, UNSEEN, GlyphScenes, vocabulary_of

_DECODERS = ("sem_seg_head", "void_embedding")
_TRUNK = tuple(f"backbone.clip_model.visual.trunk.{part}" for part in ("stem", "stages"))


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What trains besides the decoders, and whether compensation holds it back.

    Attributes:
      image_tower: CLIP's, but for its projection.
      compensation: keep the tower's features near those of the original.
      transfer: of the text to the image; it starts as the identity, and stays it otherwise.
    """

    image_tower: bool
    compensation: bool = False
    transfer: bool = False

    @property
    def trainable(self) -> tuple[str, ...]:
        """Patterns of parameters."""
        return (
            *_DECODERS,
            *(_TRUNK if self.image_tower else ()),
            *(("cdt",) if self.transfer else ()),
        )


_EXAMPLES = (4, 9, 16, 12)  # each with several digits, and among them every texture

FROZEN = Tuning(False)
MAFT_PLUS = Tuning(True, compensation=True, transfer=True)


@dataclasses.dataclass(frozen=True)
class SegmenterRecipe:
    """How long and how large everything is.

    Attributes:
      pretraining: of the CLIP.
      scale: how much images are enlarged; a digit is then 42 * scale pixels high.
      scenes: how many there are to train on.
      batch_size: scenes in an update.
      learning_rate: of the decoders.
      tower_rate: factor of the learning rate in the image tower.
      transfer_rate: factor of the learning rate in the transfer.
      compensation: weight of the loss.
      decoder_steps: of the decoders on the frozen CLIP.
      steps: of all together, from there.
      points: at which masks are compared.
      width: of the decoders.
      decoder_layers: of the decoder that has the queries.
    """

    pretraining: Lessons = RECIPE
    scale: int = 2
    scenes: int = 400
    batch_size: int = 4
    learning_rate: float = 2e-3
    tower_rate: float = 0.3
    transfer_rate: float = 0.01
    compensation: float = 0.1
    decoder_steps: int = 1500
    steps: int = 80
    points: int = 1024
    width: int = 32
    decoder_layers: int = 3

    def __post_init__(self) -> None:
        counts = ("scale", "scenes", "batch_size", "decoder_steps", "steps", "points", "width")
        check_settings(self, least=dict.fromkeys((*counts, "decoder_layers"), 1))

    @property
    def side(self) -> int:
        """Pixels along the side of what the model sees."""
        return self.scale * SCENE_SIZE


@dataclasses.dataclass(frozen=True)
class DrawnOnce(GlyphScenes):
    """Scenes that are kept: drawing one takes as long as training on it."""

    @functools.cache  # noqa: B019  (all of them are wanted to the end)
    def __getitem__(self, index: int) -> Scene:
        return super().__getitem__(index)


def build_segmenter(
    recipe: SegmenterRecipe | None = None,
    seed: int = 0,
    *,
    workdir: Path | None = None,
    progress: bool = True,
) -> tuple[MaftPlus, Any]:
    """Train the segmenter from scratch: about an hour on two cores.

    Args:
      recipe: lengths and sizes; by default those of the bundled segmenter.
      seed: of parameters, images, captions, scenes and points.
      workdir: keeps the losses and checkpoints of each training; a build that was interrupted goes
        on from there.
      progress: show how far a training is.

    Returns:
      the model, float32, and its `CLIPTokenizer`.
    """
    recipe = recipe or SegmenterRecipe()
    if workdir is not None:
        workdir = workdir.absolute()
        workdir.mkdir(parents=True, exist_ok=True)
    clip, tokenizer = pretrain(
        recipe.pretraining,
        seed=seed,
        scale=recipe.scale,
        metrics_dir=workdir,
        checkpoint_dir=workdir,
        progress=progress,
    )

    def options(name: str) -> dict[str, Any]:
        if workdir is None:
            return {"progress": progress}
        places = {"checkpoint_dir": workdir / name, "metrics_path": workdir / f"{name}.jsonl"}
        return {"progress": progress, "checkpoint_every": 250, "keep": 1, **places}

    model = new_decoders(clip, recipe, seed)
    for name, tuning, steps in (
        ("decoders", FROZEN, recipe.decoder_steps),
        ("together", MAFT_PLUS, recipe.steps),
    ):
        model = tune(model, tokenizer, tuning, recipe, seed=seed, steps=steps, **options(name))
    return model, tokenizer


def new_decoders(clip: OpenCLIP, recipe: SegmenterRecipe, seed: int) -> MaftPlus:
    """A model with untrained decoders around a CLIP, its transfer the identity."""
    config = MaftPlusConfig.tiny(clip.config, form="panoptic", token_order="raster")
    decoders = dataclasses.replace(
        config.decoder_config, hidden_dim=recipe.width, decoder_layers=recipe.decoder_layers
    )
    config = dataclasses.replace(config, decoder_config=decoders)
    return MaftPlus.around(clip, config, rngs=nnx.Rngs(seed))


def tune(
    model: MaftPlus,
    tokenizer: Any,
    tuning: Tuning,
    recipe: SegmenterRecipe,
    *,
    seed: int,
    steps: int,
    **options: Any,
) -> MaftPlus:
    """The model after some steps on scenes of the digits 0 to 6.

    Args:
      model: it stays as it is.
      tokenizer: the CLIP's.
      tuning: what trains.
      recipe: sizes and rates.
      seed: of the scenes, their order, and the points at which masks are compared.
      steps: how many.
      options: of `training.train`: checkpoints, where metrics go.
    """
    scenes = DrawnOnce(recipe.scenes, digits=SEEN, seed=seed)
    rates = (("backbone", recipe.tower_rate), ("cdt", recipe.transfer_rate), ("*", 1.0))
    training = MaftPlusTraining(
        steps=steps,
        learning_rate=recipe.learning_rate,
        rates=rates,
        trainable=tuning.trainable,
        compensation_weight=recipe.compensation if tuning.compensation else 0.0,
        set_losses=SetLossConfig(num_points=recipe.points),
    )
    names = scenes.vocabulary
    rows = text_rows(model.backbone.clip_model, tokenizer, names, templates=TEMPLATES)
    augmentation = ResizeFlip(recipe.side, recipe.side, flip=False)
    batches = scene_batches(scenes, augmentation, recipe.batch_size, seed)
    return fit(model, rows, names.synonyms(), batches, training, seed=seed, **options)


def unseen_scenes(count: int) -> DrawnOnce:
    """Scenes in handwriting that no training saw, an unseen digit in each."""
    return DrawnOnce(count, among=UNSEEN, split="judge_test", seed=1000)


def example_scenes() -> Iterator[tuple[str, Scene]]:
    """Names and contents of four scenes to look at, in handwriting that no training saw."""
    scenes = GlyphScenes(max(_EXAMPLES) + 1, split="judge_test", seed=2000)
    for number, index in enumerate(_EXAMPLES, 1):
        yield f"scene_{number}", scenes[index]


def usage_of(recipe: SegmenterRecipe) -> Usage:
    """All ten digits by all their names, and the textures, whose regions are stuff."""
    return Usage(vocabulary_of(range(DIGITS)), TEXTURES, TEMPLATES, recipe.side, recipe.side)


def segmenter_of(
    model: MaftPlus, tokenizer: Any, vocabulary: Vocabulary, recipe: SegmenterRecipe
) -> Segmenter:
    """A model of the recipe, ready to look at scenes."""
    clip, side = model.backbone.clip_model, recipe.side
    rows = text_rows(clip, tokenizer, vocabulary, templates=TEMPLATES)
    return Segmenter(model, rows, vocabulary.synonyms(), short=side, longest=side)


def measure_segmenter(
    model: MaftPlus, tokenizer: Any, recipe: SegmenterRecipe, *, scenes: int = 100
) -> dict[str, Any]:
    """How well a model finds what scenes of unseen handwriting show, in percent.

    Args:
      model, tokenizer: from `build_segmenter`.
      recipe: of the model.
      scenes: how many; a 7, 8 or 9 is in each.

    Returns:
      `seen` and `unseen`, the mIoU of the classes in the training's scenes and of the digits 7, 8
      and 9; `pacc`, the share of pixels that are right; `iou` of each class by its name; NaN for
      what no scene shows.
    """
    tests = unseen_scenes(scenes)
    found = evaluate(segmenter_of(model, tokenizer, tests.vocabulary, recipe), tests).semantic
    trained = np.delete(found.iou, UNSEEN)
    return {
        "seen": float(np.nanmean(trained)),
        "unseen": float(np.nanmean(found.iou[list(UNSEEN)])),
        "pacc": float(found.pacc),
        "iou": dict(zip(tests.vocabulary.names, found.iou.tolist(), strict=True)),
    }
