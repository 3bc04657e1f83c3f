"""Personalizing methods on glyphs: everything that docs/personalizing_results.md shows.

    python benchmarks/personalizing_studies.py              # all rows, 3 seeds; resumable
    python benchmarks/personalizing_studies.py --write      # the page and its plot
    python benchmarks/personalizing_studies.py --picture    # what some rows draw, of the first seed

The subject is one writer's seven in two tones, five images on one texture
(`_glyph_subjects`); the bundled model has seen digits of one color only.  Asked
are: does a plain prompt draw it (similarity of features to the five images, and whether both tones
are there), and does "a red <new1> seven on gravel" still get its color and its texture, by the
judge?  Neither color nor texture is one that the five images show.  A row and seed is a cell, kept
as JSON under benchmarks/results/personalizing; one that is there is not run again.  Settings were
chosen on seed 100; the table's seeds are others.
"""

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from _glyph_subjects import DIGIT, TEXTURE, TONES, WORD, shows_tones, subject_images
from matplotlib.figure import Figure

import conceptax
from conceptax.converters import load_pytorch
from conceptax.methods.diffusion.text_to_image import TextToImage
from conceptax.methods.evaluation.statistics import (
    image_similarity,
    mean_interval,
    mutual_similarity,
    rate,
)
from conceptax.methods.evaluation.suites import choose
from conceptax.methods.glyphs.captions import COLORS, TEXTURES, Prompt, prompts
from conceptax.methods.glyphs.judge import ATTRIBUTES, load_judge
from conceptax.methods.glyphs.quality import name_of
from conceptax.methods.personalization import METHODS, Concept, personalize
from conceptax.reporting.instruments import load_clip
from conceptax.reporting.results import environment, write_records

RESULTS = Path(__file__).parent / "results" / "personalizing"
DOCS = Path(__file__).parents[1] / "docs"
TOKEN = "<new1>"
IMAGES = 67  # of each figure and seed: three seeds are 201
STEPS, GUIDANCE = 20, 5.0
CLASS_IMAGES = 48  # for prior preservation, drawn by the model itself
SHOWN = ("a {}", "a photo of a {}", "a red {} on gravel", "a green {} on brick", "a white {}")
PLAIN = ("a {}", "a photo of a {}", "a picture of a {}")

# What all methods share here; the model is small, and its rates are larger than Stable Diffusion's.
COMMON = {"batch_size": 4, "augment": False, "flip": False, "steps": 300}
# The keys and values alone, as Custom Diffusion's defaults have it, hardly learn two tones here.
_CROSS_ATTENTION = {"learning_rate": 3e-5, "trained": "crossattn"}
ROWS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ClassDiffusion": ("class-diffusion", _CROSS_ATTENTION),
    "Custom Diffusion": ("custom-diffusion", _CROSS_ATTENTION | {"prior_weight": 0.0}),
    "ClassDiffusion, prior": ("class-diffusion", _CROSS_ATTENTION | {"prior_weight": 1.0}),
    "Custom Diffusion, prior": ("custom-diffusion", _CROSS_ATTENTION),
    "DreamBooth": ("dreambooth", {"learning_rate": 5e-5}),
    "textual inversion": ("textual-inversion", {"learning_rate": 5e-3}),
}
BASE = "no personalizing"


class Bench:
    """The bundled model, who measures, and the subject."""

    def __init__(self) -> None:
        source = conceptax.bundled_model()
        self.pipeline = load_pytorch(source, param_dtype=jnp.float32)
        self.judge = load_judge(source / "judge")
        self.clip = load_clip(source / "clip", self.pipeline.tokenizer, "glyphs CLIP")
        self.images = subject_images()

    @functools.cached_property
    def class_images(self) -> np.ndarray:
        """Sevens as the model draws them, for prior preservation."""
        asked = choose(prompts(digit=DIGIT, name=WORD), CLASS_IMAGES, 0, name_of)
        return self.draw(self.pipeline, [each.text for each in asked], seed=0)

    def draw(self, pipeline: Any, texts: Sequence[str], seed: int) -> np.ndarray:
        return TextToImage.from_pipeline(pipeline)(
            texts, seed=seed, num_inference_steps=STEPS, guidance_scale=GUIDANCE, batch_size=16
        )

    def learn(
        self, name: str, seed: int, changes: Mapping[str, Any], log: Path | None = None
    ) -> tuple[Any, str]:
        """A row's pipeline, and what its subject is called."""
        method, settings = ROWS[name]
        config = METHODS[method].config(**COMMON | dict(settings) | dict(changes))
        prior = tuple(self.class_images) if config.prior_weight else ()
        concept = Concept(TOKEN, WORD, tuple(self.images), class_images=prior)
        pipeline = personalize(
            self.pipeline, [concept], config, seed=seed, metrics_path=log, progress=False
        )
        # Textual inversion's token stands in the class word's place.
        return pipeline, TOKEN if method == "textual-inversion" else f"{TOKEN} {WORD}"

    def run(self, name: str, seed: int, images: int, changes: Mapping[str, Any]) -> dict[str, Any]:
        """A cell's record."""
        pipeline, subject, log = self.pipeline, WORD, []
        _ = self.class_images  # drawn before the clock runs
        began = time.perf_counter()
        if name != BASE:
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / "log.jsonl"
                pipeline, subject = self.learn(name, seed, changes, path)
                log = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        seconds = time.perf_counter() - began
        figures = self.figures(pipeline, subject, seed, images)
        return {
            "row": name,
            "seed": seed,
            "images": images,
            "steps": STEPS,
            "guidance": GUIDANCE,
            "settings": {} if name == BASE else COMMON | dict(ROWS[name][1]) | dict(changes),
            "seconds_to_train": round(seconds, 1),
            "figures": figures,
            "drift": [[each["step"], each["spl"]] for each in log if "spl" in each],
            **environment(),
        }

    def picture(self, names: Sequence[str], seed: int) -> Figure:
        """The five images, and below them what rows draw of the same noise."""
        rows = {"the subject": self.images}
        for name in names:
            pipeline, subject = self.pipeline, WORD
            if name != BASE:
                pipeline, subject = self.learn(name, seed, {})
            rows[name] = self.draw(pipeline, [each.format(subject) for each in SHOWN], seed)
        figure = Figure(figsize=(7.5, 1.5 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), len(SHOWN))
        for axes, (name, images) in zip(grid, rows.items(), strict=True):
            axes[0].set_ylabel(name, fontsize=8)
            for axis, image in zip(axes, images, strict=True):
                axis.imshow(image)
                axis.set(xticks=[], yticks=[])
        for axis, prompt in zip(grid[1], SHOWN, strict=True):
            axis.set_title(prompt.format("…"), fontsize=8)
        return figure

    def figures(self, pipeline: Any, subject: str, seed: int, images: int) -> dict[str, Any]:
        """Fidelity of plain prompts, and what is obeyed of prompts that compose."""
        plain = [PLAIN[n % len(PLAIN)].format(subject) for n in range(images)]
        drawn = self.draw(pipeline, plain, seed)
        found: dict[str, Any] = {}
        for eye, features in (("CLIP-I", self.clip.features), ("judge-I", self.judge.features)):
            references = np.asarray(features(self.images))
            similar = image_similarity(np.asarray(features(drawn)), references)
            found[eye] = mean_interval(similar) | {"values": similar.tolist()}
            found[eye]["references"] = float(mutual_similarity(references).mean())
        found["both tones"] = counted(shows_tones(drawn))
        found["digit, plain"] = counted(self.judge(drawn)["digit"] == DIGIT)

        others = [each for each in prompts(digit=DIGIT, name=WORD) if not _shown(each)]
        asked = choose(others, images, seed, _asked)
        texts = [each.text.replace(WORD, subject) for each in asked]
        seen = self.judge(self.draw(pipeline, texts, seed + 1000))
        right = {
            each: seen[each] == np.asarray([getattr(prompt, each) for prompt in asked])
            for each in ATTRIBUTES
        }
        found |= {each: counted(hits) for each, hits in right.items()}
        found["color and texture"] = counted(right["color"] & right["texture"])
        return found


def _shown(prompt: Prompt) -> bool:
    """Whether the subject's images show the color or the texture."""
    return COLORS[prompt.color] in TONES or TEXTURES[prompt.texture] == TEXTURE


def _asked(prompt: Prompt) -> tuple[int, int]:
    return prompt.color, prompt.texture


def counted(hits: np.ndarray) -> dict[str, Any]:
    """A proportion with its 95 % Wilson interval."""
    value, low, high = rate(int(hits.sum()), len(hits))
    return {"count": int(hits.sum()), "of": len(hits), "rate": value, "low": low, "high": high}


# ---- the page ----

PAGE = """# Personalizing on glyphs

`python benchmarks/personalizing_studies.py --write` makes this page.

<!-- table -->
<!-- end of table -->

![Drift of the subject's phrase from its class](personalizing_drift.png)
"""
COLUMNS = ("both tones", "color", "texture", "color and texture", "digit")


def pooled_rate(cells: Sequence[dict[str, Any]], name: str) -> str:
    figures = [cell["figures"][name] for cell in cells]
    value, low, high = rate(sum(f["count"] for f in figures), sum(f["of"] for f in figures))
    return f"{100 * value:.1f} ({100 * low:.0f}–{100 * high:.0f})"


def pooled_mean(cells: Sequence[dict[str, Any]], name: str) -> str:
    values = np.concatenate([cell["figures"][name]["values"] for cell in cells])
    found = mean_interval(values)
    return f"{found['mean']:.3f} ± {found['high'] - found['mean']:.3f}"


def write_page(results: Path, docs: Path) -> None:
    """Write the table between its markers, and the plot; the text around them stays."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        rows.setdefault(record["row"], []).append(record)
    order = [name for name in (*ROWS, BASE) if name in rows]
    lines = [
        "| method | CLIP-I | judge-I | both tones | color | texture | both | a seven | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in order:
        cells = rows[name]
        seconds = sum(cell["seconds_to_train"] for cell in cells) / len(cells)
        parts = [pooled_mean(cells, eye) for eye in ("CLIP-I", "judge-I")]
        parts += [pooled_rate(cells, each) for each in COLUMNS]
        lines.append(f"| {' | '.join((name, *parts, f'{seconds:.0f}'))} |")
    page = docs / "personalizing_results.md"
    text = page.read_text(encoding="utf-8") if page.exists() else PAGE
    begin, end = "<!-- table -->\n", "<!-- end of table -->"
    first, last = text.index(begin) + len(begin), text.index(end)
    page.write_text(text[:first] + "\n".join(lines) + "\n" + text[last:], encoding="utf-8")

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for name in order:
        if any(cell["drift"] for cell in rows[name]):
            curves = [np.asarray(cell["drift"]) for cell in rows[name]]
            mean = np.mean([curve[:, 1] for curve in curves], axis=0)
            axes.plot(curves[0][:, 0], mean, label=name)
    axes.set(xlabel="updates", ylabel=f"1 − cos(“{TOKEN} {WORD}”, “{WORD}”)")
    axes.legend(frameon=False)
    figure.savefig(docs / "personalizing_drift.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--images", type=int, default=IMAGES, help="per figure and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--change", type=json.loads, default={}, help="settings, as JSON")
    parser.add_argument("--picture", action="store_true", help="write docs/personalizing.png")
    parser.add_argument("--write", action="store_true", help="write docs/personalizing_results.md")
    options = parser.parse_args()
    if options.picture:
        names = (BASE, "Custom Diffusion", "ClassDiffusion", "DreamBooth")
        Bench().picture(names, options.seeds[0]).savefig(DOCS / "personalizing.png", dpi=110)
        return
    wanted = [name for name in (*ROWS, BASE) if not options.only or name in options.only]
    if unknown := sorted(set(options.only or ()) - {*ROWS, BASE}):
        parser.error(f"rows are {[*ROWS, BASE]}, received {unknown}")
    missing = [
        (name, seed, path)
        for seed in options.seeds
        for name in wanted
        if not (
            path := options.results / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.json"
        ).exists()
    ]
    bench = Bench() if missing else None
    for name, seed, path in missing:
        record = bench.run(name, seed, options.images, options.change)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_records(path, record)
        figures = record["figures"]
        rates = ", ".join(f"{each} {100 * figures[each]['rate']:.0f}" for each in COLUMNS)
        similar = ", ".join(f"{each} {figures[each]['mean']:.3f}" for each in ("CLIP-I", "judge-I"))
        seconds = record["seconds_to_train"]
        print(f"{name}, seed {seed}: {similar}, {rates}; {seconds:.0f} s", flush=True)
    if options.write:
        write_page(options.results, DOCS)


if __name__ == "__main__":
    main()
