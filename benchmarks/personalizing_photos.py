"""Personalizing Stable Diffusion 1.5 on real photographs: time of a step and memory.

    python benchmarks/personalizing_photos.py PHOTOS               # a dog; a bear and a barn
    python benchmarks/personalizing_photos.py PHOTOS --size tiny   # seconds instead of minutes

PHOTOS holds a folder of photographs for each subject.  ClassDiffusion's own settings: 512 pixels,
batches of two, augmented; weights are random, computation is bfloat16 with recomputed blocks,
masters of what trains float32.  Each row runs in a process of its own, so that peak memory is its
own.  A run whose loss is not finite, or whose trained part has not moved, is an error.
"""

import argparse
import json
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path

from _processes import measured_alone, peak_memory

RESULTS = Path(__file__).parent / "results"
RUNS = {"dog": ("dog",), "bear and barn": ("bear", "barn")}


def measure(photos: Path, subjects: tuple[str, ...], size: str, steps: int) -> dict:
    import jax
    import numpy as np
    from _random_sd15 import LATENT_SIZES, random_pipeline

    from conceptax.methods.personalization.class_diffusion import ClassDiffusionConfig, personalize
    from conceptax.methods.subjects.images import Concept, read_images

    # The bundled tokenizer knows few words: each subject starts from one that it knows.
    concepts = [
        Concept(f"<new{number}>", word, read_images(photos / subject), initializer="three")
        for number, (subject, word) in enumerate(zip(subjects, ("seven", "five"), strict=False), 1)
    ]
    pipeline = random_pipeline(size)
    side = LATENT_SIZES[size] * 8
    config = ClassDiffusionConfig(steps=steps, batch_size=2, size=side)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "log.jsonl"
        learnt = personalize(pipeline, concepts, config, seed=0, metrics_path=path, progress=False)
        log = [json.loads(line) for line in path.read_text().splitlines()]
    if not all(np.isfinite(each["loss"]) for each in log):
        sys.exit("the loss is not finite")
    words = [each.token for each in concepts]
    table = np.asarray(learnt.text_encoder.embeddings.token_embedding.embedding)
    rows = table[learnt.tokenizer.convert_tokens_to_ids(words)]
    start = table[learnt.tokenizer.convert_tokens_to_ids("three</w>")]
    if np.allclose(rows, start, rtol=0, atol=1e-7):
        sys.exit("the new tokens have not moved")
    seconds = [each["seconds"] for each in log]
    times = np.diff(seconds[1:])  # the first step waits for the compiler
    device = jax.devices()[0]
    peak = peak_memory()
    if device.platform != "cpu":
        peak = device.memory_stats()["peak_bytes_in_use"] / 2**30
    return {
        "images": sum(len(each.images) for each in concepts),
        "pixels": side,
        "steps": steps,
        "step_s": statistics.median(times.tolist()),
        "total_s": seconds[-1],
        "peak_gib": peak,
        "device": device.device_kind,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="keep the rest")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.photos, RUNS[options.one], options.size, options.steps)))
        return
    if missing := sorted(
        {s for run in options.only for s in RUNS[run] if not (options.photos / s).is_dir()}
    ):
        print(f"{options.photos} has no folder {', '.join(missing)}: nothing is measured.")
        return
    from conceptax.reporting.results import environment, write_records

    output = options.output or RESULTS / f"personalizing_photos_{options.size}.json"
    rows = json.loads(output.read_text())["rows"] if output.exists() else {}
    print(f"{'':15}{'images':>7}{'pixels':>8}{'step':>10}{'in all':>10}{'peak':>11}")
    for name in options.only:
        command = [
            sys.executable,
            __file__,
            str(options.photos),
            "--size",
            options.size,
            "--steps",
            str(options.steps),
            "--one",
            name,
        ]
        row = rows[name] = measured_alone(name, command)
        print(
            f"{name:15}{row['images']:7}{row['pixels']:8}{row['step_s']:8.1f} s"
            f"{row['total_s']:8.0f} s{row['peak_gib']:7.2f} GiB",
            flush=True,
        )
    record = {
        "benchmark": "personalizing_photos",
        "date": date.today().isoformat(),
        "size": options.size,
        "batch_size": 2,
        "compute": "bfloat16",
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_records(output, record | environment())


if __name__ == "__main__":
    main()
