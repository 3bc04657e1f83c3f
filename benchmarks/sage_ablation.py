"""What each part of SAGE does on glyphs: one setting changed at a time, same prompts and noise.

    python benchmarks/sage_ablation.py [--seeds 100] [--images 120] [--only default "no self-check"]

The defaults of `SageConfig` were chosen by this table, on other seeds than `erase_glyphs.py` uses.
"""

import argparse
import datetime
import functools
import json
import time
from pathlib import Path

import jax.numpy as jnp

import conceptax
from conceptax.cli.results import environment, write_json
from conceptax.converters import load_pytorch
from conceptax.methods.glyphs.judge import load_judge
from conceptax.methods.glyphs.quality import erasure_figures, erasure_prompts, examine_all, join
from conceptax.methods.sage import SageConfig, erase
from conceptax.methods.text_to_image import TextToImage

VARIANTS = {
    "default": {},
    "no self-check": {"check_steps": 0},
    "check: anchor": {"check": "anchor"},
    "check: sign steps": {"check_optimizer": "sign"},
    "check: 3x steps": {"check_steps": 30},
    "check: concept fixed": {"free_concept": False},
    "check: radius 0.1": {"check_radius": 0.1},
    "eta 0": {"eta": 0.0},
    "ddim latents": {"latents": "ddim"},
    "no frames": {"frames": 0},
    "no global": {"global_weight": 0.0},
    "global: self form": {"global_form": "self"},
    "no local": {"local_weight": 0.0},
}
SHOWN = ("plain", "synonyms", "others", "colours", "textures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[100])
    parser.add_argument("--images", type=int, default=120, help="per figure and seed")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--model", type=Path, help="default: the bundled model")
    parser.add_argument("--sage", type=json.loads, default={}, help="changes to all, as JSON")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "sage_ablation.json"
    )
    options = parser.parse_args()

    source = options.model or conceptax.bundled_model()
    pipeline = load_pytorch(source, param_dtype=jnp.float32)
    judge = load_judge(source / "judge")
    sampling = {"num_inference_steps": 25, "guidance_scale": 5.0, "batch_size": 16}

    def figures(model, seed):
        draw = functools.partial(TextToImage.from_pipeline(model), **sampling)
        return examine_all(draw, judge, erasure_prompts("three", options.images, seed), seed=seed)

    rows = {"original": ([figures(pipeline, seed) for seed in options.seeds], 0.0)}
    _print_row("original", *rows["original"])
    for name in options.only:
        config = SageConfig(**(options.sage | VARIANTS[name]))
        found, seconds = [], []
        for seed in options.seeds:
            began = time.perf_counter()
            edited = erase(
                pipeline, ["three"], config, seed=seed, progress=False, log_every=config.cycles
            )
            seconds.append(time.perf_counter() - began)
            found.append(figures(edited, seed))
        rows[name] = (found, max(seconds))
        _print_row(name, *rows[name])
    write_json(
        options.output,
        {
            "date": datetime.date.today().isoformat(),
            "seeds": options.seeds,
            "images_per_figure_and_seed": options.images,
            "sampling": sampling,
            "common_changes": options.sage,
            "rows": {
                name: {
                    "changes": VARIANTS.get(name, {}),
                    "seconds": seconds,
                    "figures": _together(found),
                }
                for name, (found, seconds) in rows.items()
            },
            **environment(),
        },
    )


def _together(found):
    return erasure_figures({name: join([run[name] for run in found]) for name in found[0]}, "three")


def _print_row(name, found, seconds):
    together = _together(found)
    cells = "  ".join(f"{key} {100 * together[key]['rate']:5.1f}" for key in SHOWN)
    print(f"{name:22} {cells}   {seconds:5.0f} s", flush=True)


if __name__ == "__main__":
    main()
