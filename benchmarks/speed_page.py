"""docs/speed.md from what `stable_diffusion.py` and `load_save.py` measured on a CPU.

python benchmarks/speed_page.py
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conceptax.converters.files.weights import read_json
from conceptax.reporting.report import Number, Table, markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

TASKS = {
    "unet": "forward pass, UNet of SD 1.5",
    "unet-xl": "forward pass, UNet of SDXL",
    "vae": "an image decoded",
    "text": "64 texts encoded",
    "step": "a training step of the text encoder through the UNet",
    "step-remat": "the same, activations recomputed",
}
ENGINES = {"jax": "JAX", "eager": "PyTorch", "compile": "torch.compile"}

PAGE = """# Speed and memory

Written by `benchmarks/speed_page.py` from the figures in `benchmarks/results`.

"""
MODELS = """{device}, {dtype}, images of {image} pixels, batch 1, random weights: the median of
{repeats} calls after the first one, which compiles; the process's peak of memory; the first call.
The figures of a line were taken one after another, on its day. With
`benchmarks/stable_diffusion.py`."""
SAMPLER = """ A guided DDIM step of SD 1.5 takes {step:.2f} s, its UNet alone {model:.2f} s: the
sampler adds {overhead:.1f} %."""
FILES = """SD 1.5's UNet in float32 ({size:.2f} GB), the file in the page cache; the fastest of
{repeats} runs, and the process's own memory at its peak as a share of the file's size. diffusers
leaves what it loads mapped. Converting is `conceptax convert FOLDER FOLDER` from the start of the
command to its end, beside `cp -r`; the second time is until the bytes are on the disk. With
`benchmarks/load_save.py`, {dates}."""


def models(report: Mapping[str, Any]) -> Table:
    """The part on models."""
    rows = {(row["task"], row["engine"]): row for row in report["rows"] if "error" not in row}

    def cell(task: str, engine: str) -> Number:
        row = rows[task, engine]
        aside = f"{row['peak_gib']:.1f} GiB, first {row['first_s']:.0f} s"
        return Number(f"{row['median_s']:.2f} s", aside)

    known = [task for task in TASKS if all((task, engine) in rows for engine in ENGINES)]
    lines = []
    for task in known:
        fastest = min(rows[task, engine]["median_s"] for engine in ("eager", "compile"))
        ratio = Number(f"{rows[task, 'jax']['median_s'] / fastest:.2f}")
        cells = (cell(task, engine) for engine in ENGINES)
        lines.append((TASKS[task], *cells, ratio, rows[task, "jax"]["date"]))
    one = rows["unet", "jax"]
    counts = {rows[task, engine]["repeats"] for task in known for engine in ENGINES}
    repeats = " to ".join(map(str, sorted({min(counts), max(counts)})))
    note = MODELS.format(
        device=f"CPU ({one['cpu']}), {rows['unet', 'eager']['threads']} threads",
        dtype=report["dtype"],
        image=one["image"],
        repeats=repeats,
    )
    columns = ("", *ENGINES.values(), "JAX / PyTorch's best", "day")
    if (row := rows.get(("sampler", "jax"))) is not None:
        note += SAMPLER.format(
            step=row["best_s"], model=row["model_best_s"], overhead=100 * row["overhead"]
        )
    return Table("Stable Diffusion's models", columns, lines, note)


def files(report: Mapping[str, Any]) -> Table:
    """The part on files."""
    lines = []
    for row in report["rows"]:
        aside = f"{row['seconds_on_disk']:.1f} s" if "seconds_on_disk" in row else ""
        lines.append(
            (
                row["phase"],
                row["library"],
                Number(f"{row['seconds']:.1f} s", aside),
                Number(f"{row['peak_ratio']:.3f}"),
            )
        )
    note = FILES.format(
        size=report["checkpoint_bytes"] / 1e9,
        repeats=report["repeats"],
        dates=", ".join(sorted({row["date"] for row in report["rows"]})),
    )
    columns = ("", "with", "time", "peak memory / file")
    lines.sort(key=lambda line: line[0])
    return Table("Loading, saving, converting", columns, lines, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "speed.md")
    page = parser.parse_args().page
    tables = (
        models(read_json(RESULTS / "stable_diffusion_full_float32.json")),
        files(read_json(RESULTS / "load_save.json")),
    )
    page.write_text(PAGE + "\n".join(map(markdown_table, tables)), "utf-8")


if __name__ == "__main__":
    main()
