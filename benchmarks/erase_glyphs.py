"""What erasing `three` from the glyphs model does, counted over several seeds.

    python benchmarks/erase_glyphs.py [--seeds 0 1 2] [--images 200] [--model FOLDER]

Each seed sets the erasing, the choice of prompts and the noise. Prompts are held-out wordings in
which every name of a digit counts equally; the judge learnt from handwriting that the generator
never saw. Prints a table and writes it with settings, versions and times as JSON.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conceptax
from conceptax.cli.erase import erase_into
from conceptax.cli.results import environment, write_json
from conceptax.converters import load_pytorch
from conceptax.methods.erasing.sage import SageConfig
from conceptax.methods.glyphs.judge import load_judge
from conceptax.methods.glyphs.quality import (
    Findings,
    erasure_figures,
    erasure_prompts,
    examine_all,
    join,
)
from conceptax.methods.text_to_image import TextToImage

# What is asked of a good erasure. The rates are of "shown as the concept"; falls are in points.
GOALS: dict[str, tuple[str, Callable[[dict, dict], bool]]] = {
    "plain": (
        "before >= 90 %, after <= 2 %",
        lambda before, after: before["rate"] >= 0.90 and after["rate"] <= 0.02,
    ),
    "synonyms": ("after <= 5 %", lambda before, after: after["rate"] <= 0.05),
    "others": ("falls <= 3 points", lambda b, a: b["rate"] - a["rate"] <= 0.03),
    "colours": ("falls <= 2 points", lambda b, a: b["rate"] - a["rate"] <= 0.02),
    "textures": ("falls <= 2 points", lambda b, a: b["rate"] - a["rate"] <= 0.02),
}
SECONDS = 180


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=200, help="per figure and seed")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--concept", default="three")
    parser.add_argument("--model", type=Path, help="default: the bundled model")
    parser.add_argument("--sage", type=json.loads, default={}, help="settings to change, as JSON")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "erase_glyphs.json"
    )
    options = parser.parse_args()
    config = SageConfig(**options.sage)

    source = options.model or conceptax.bundled_model()
    pipeline, judge = load_pytorch(source), load_judge(source / "judge")
    settings = {
        "num_inference_steps": options.steps, "guidance_scale": options.guidance, "batch_size": 16,
    }  # fmt: skip
    original = TextToImage.from_pipeline(pipeline)
    found: dict[str, list[dict[str, Findings]]] = {"before": [], "after": []}
    runs = []
    for seed in options.seeds:
        sets = erasure_prompts(options.concept, options.images, seed)
        examine = functools.partial(examine_all, judge=judge, sets=sets, seed=seed)
        before = examine(functools.partial(original, **settings))
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            edited = erase_into(
                Path(folder), pipeline, [options.concept], config, seed=seed, source=str(source)
            )
        seconds = time.perf_counter() - began
        after = examine(functools.partial(TextToImage.from_pipeline(edited), **settings))
        figures = {
            "before": erasure_figures(before, options.concept),
            "after": erasure_figures(after, options.concept),
        }
        runs.append({"seed": seed, "seconds_to_erase": round(seconds, 1), "figures": figures})
        found["before"].append(before)
        found["after"].append(after)
        print(f"\nseed {seed}: {seconds:.0f} s to erase, compilation included")
        print(table(figures))

    together = {
        when: erasure_figures(
            {name: join([run[name] for run in each]) for name in each[0]}, options.concept
        )
        for when, each in found.items()
    }
    slowest = max(run["seconds_to_erase"] for run in runs)
    print(f"\nall {len(runs)} seeds; slowest erasing {slowest:.0f} s (goal: {SECONDS} s)")
    print(table(together))
    record = {
        "date": datetime.date.today().isoformat(),
        "concept": options.concept,
        "model": "bundled" if options.model is None else options.model.name,
        "images_per_figure_and_seed": options.images,
        "sampling": settings,
        "settings": dataclasses.asdict(config),
        "together": together,
        "reached": {name: reached(name, together) for name in GOALS},
        "runs": runs,
        "judge": judge.measured,
        **environment(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, record)


def reached(name: str, figures: dict[str, Any]) -> bool:
    return GOALS[name][1](figures["before"][name], figures["after"][name])


def table(figures: dict[str, Any]) -> str:
    lines = [f"{'figure':22} {'before':>16} {'after':>16} {'95 % interval':>16}  goal"]
    for name, now in figures["after"].items():
        goal = ""
        if name in GOALS:
            goal = f"{GOALS[name][0]}: {'reached' if reached(name, figures) else 'MISSED'}"
        first = figures["before"][name]
        lines.append(
            f"{name:22} {_share(first):>16} {_share(now):>16} "
            f"{100 * now['low']:7.1f}–{100 * now['high']:.1f} %  {goal}".rstrip()
        )
    return "\n".join(lines)


def _share(figure: dict[str, Any]) -> str:
    return f"{figure['count']}/{figure['of']} {100 * figure['rate']:.1f} %"


if __name__ == "__main__":
    main()
