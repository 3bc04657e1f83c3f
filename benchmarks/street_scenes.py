"""MAFT+ on real street scenes, from random weights: does it learn, can it learn them by heart?

    python benchmarks/street_scenes.py               # ../shared/data/camvid_subset
    python benchmarks/street_scenes.py --write       # and keep the figures beside this file

A tiny model takes 50 steps on all scenes; another one is trained on eight of them and evaluated on
the same eight.  What it sees in the first of them is drawn into the work folder, below the truth.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from PIL import Image

from conceptax.flax_models.maft_plus import MaftPlus, MaftPlusConfig
from conceptax.flax_models.open_clip import OpenCLIP, OpenCLIPConfig
from conceptax.methods.glyphs.tokenizer import MAX_LENGTH, build_tokenizer
from conceptax.methods.segmentation.augmentation import ResizeFlip
from conceptax.methods.segmentation.batches import scene_batches
from conceptax.methods.segmentation.datasets import SceneSource, open_scenes
from conceptax.methods.segmentation.evaluation import evaluate, true_labels
from conceptax.methods.segmentation.maft_plus import MaftPlusTraining, fit
from conceptax.methods.segmentation.segmenter import Segmenter
from conceptax.methods.segmentation.set_losses import SetLossConfig
from conceptax.methods.segmentation.vocabulary import Vocabulary, text_rows
from conceptax.reporting.overlay import class_colors, overlay
from conceptax.reporting.results import environment, write_records

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "camvid_subset"
WORDS = "sky; building; pole; road; pavement; tree; sign; fence; car; pedestrian; bicyclist"
IGNORE = len(WORDS.split(";"))
SHORT, LONG = 192, 256


def new_model(seed: int) -> MaftPlus:
    """A tiny one; nothing in it has been trained, its text tower neither."""
    sizes = OpenCLIPConfig.tiny(vocab_size=len(build_tokenizer()), context_length=MAX_LENGTH)
    config = MaftPlusConfig.tiny(sizes, form="panoptic", token_order="raster")
    return MaftPlus.around(OpenCLIP(sizes, rngs=nnx.Rngs(seed)), config, rngs=nnx.Rngs(seed))


def trained(
    scenes: SceneSource, steps: int, options: argparse.Namespace
) -> tuple[Segmenter, dict[str, Any]]:
    """A model after some steps; and its first and last losses, how well it does, and how long."""
    model, vocabulary = new_model(options.seed), Vocabulary.parse(WORDS)
    rows = text_rows(model.backbone.clip_model, build_tokenizer(), vocabulary)
    training = MaftPlusTraining(
        steps=steps,
        learning_rate=options.learning_rate,
        rates=(("cdt", 0.1), ("*", 1.0)),
        compensation_weight=0.0,
        set_losses=SetLossConfig(num_points=options.points),
    )
    batches = scene_batches(scenes, ResizeFlip(SHORT, LONG), options.batch_size, options.seed)
    log = options.work / f"{len(scenes)}.jsonl"
    log.unlink(missing_ok=True)
    began = time.perf_counter()
    model = fit(
        model,
        rows,
        vocabulary.synonyms(),
        batches,
        training,
        seed=options.seed,
        progress=False,
        metrics_path=log,
    )
    seconds = time.perf_counter() - began
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    segmenter = Segmenter(model, rows, vocabulary.synonyms(), short=SHORT, longest=LONG)
    quality = evaluate(segmenter, scenes).semantic
    iou = np.round(quality.iou, 1).tolist()
    return segmenter, {
        "scenes": len(scenes),
        "steps": steps,
        "seconds": round(seconds, 1),
        "first_losses": statistics.mean(losses[:10]),
        "last_losses": statistics.mean(losses[-10:]),
        "pacc": quality.pacc,
        "miou": quality.miou,
        "iou": dict(zip(vocabulary.names, iou, strict=True)),
    }


def first_of(data: Path, count: int, work: Path) -> SceneSource:
    """The first scenes, by links to their files."""
    folder = work / f"first-{count}"
    for part in ("images", "annotations"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for path in sorted((data / part).iterdir())[:count]:
            link = folder / part / path.name
            if not link.exists():
                link.symlink_to(path.resolve())
    return open_scenes(folder, IGNORE, ignore=IGNORE)


def picture(segmenter: Segmenter, scenes: SceneSource) -> Image.Image:
    """The first scene: the truth above, what was found below."""
    scene, names = scenes[0], Vocabulary.parse(WORDS).names
    colors = class_colors(names)
    maps = true_labels(scene, IGNORE), segmenter(scene.image).labels()
    parts = [np.asarray(overlay(scene.image, labels, names, colors)) for labels in maps]
    return Image.fromarray(np.concatenate(parts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "street_scenes")
    parser.add_argument("--steps", type=int, default=50, help="on all scenes")
    parser.add_argument("--longer", type=int, default=400, help="steps on eight scenes")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--points", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="keep the figures beside this file")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    eight = first_of(options.data, 8, options.work)
    _, started = trained(open_scenes(options.data, IGNORE, ignore=IGNORE), options.steps, options)
    print(json.dumps(started), flush=True)
    segmenter, known = trained(eight, options.longer, options)
    print(json.dumps(known), flush=True)
    picture(segmenter, eight).save(options.work / "overlay.png")
    if options.write:
        settings = {
            name: getattr(options, name)
            for name in ("batch_size", "learning_rate", "points", "seed")
        }
        path = Path(__file__).parent / "results" / "street_scenes.json"
        write_records(path, {"runs": [started, known], "settings": settings, **environment()})


if __name__ == "__main__":
    main()
