"""docs/speed.md from what other scripts measured on a CPU: models, transformers, files.

python benchmarks/speed_page.py
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

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

![Seconds of Stable Diffusion's models, in JAX and in PyTorch](speed.png)

Written by `benchmarks/speed_page.py` from the figures in `benchmarks/results`.

"""
MODELS = """{device}, {dtype}, images of {image} pixels, batch 1, random weights: the median of
{repeats} calls after the first one, which compiles; the process's peak of memory; the first call.
The figures of a line were taken one after another, on its day. With
`benchmarks/stable_diffusion.py`."""
SAMPLER = """ A guided DDIM step of SD 1.5 takes {step:.2f} s, its UNet alone {model:.2f} s: the
sampler adds {overhead:.1f} %."""
BLOCKS = """Full width, random weights, batch 1, {cores} cores: the median, and the process's peak
of memory, JAX's with all its contenders. Images have the published text; videos the published rows
and columns and as many frames as fit, and windows keep their share of the tokens. *Gain* is that of
neighborhood attention over JAX's dense blocks, in turns, *predicted* what the simulator makes of
the machine's rates. With `benchmarks/transformer_speed.py`, {date}."""
WHOLES = """Seconds of a dense sample by the rates of linear layers and attention, without text
encoders and autoencoders, and the gain with the first steps dense, and with none. This CPU's rates
are those measured on the blocks above, in float32; those of GPUs are published or assumed, as the
[simulator](gna_simulator.md#whole-models) says. Of the {figures} published gains on a B200, the
simulator's predictions are off by {error:.1f} % in the median."""
FILES = """SD 1.5's UNet in float32 ({size:.2f} GB), the file in the page cache; the fastest of
{repeats} runs, and the process's own memory at its peak as a share of the file's size. diffusers
leaves what it loads mapped. Converting is `conceptax convert FOLDER FOLDER` from the start of the
command to its end, beside `cp -r`; the second time is until the bytes are on the disk. With
`benchmarks/load_save.py`, {dates}."""


def measured(report: Mapping[str, Any]) -> tuple[dict[tuple[str, str], Any], list[str]]:
    """Rows by task and engine, and the tasks that all engines did."""
    rows = {(row["task"], row["engine"]): row for row in report["rows"] if "error" not in row}
    return rows, [task for task in TASKS if all((task, engine) in rows for engine in ENGINES)]


def plot(report: Mapping[str, Any]) -> Figure:
    """Bars of the models' seconds, one group a task."""
    rows, known = measured(report)
    figure = Figure(figsize=(8, 0.5 + 0.7 * len(known)), layout="constrained")
    axes = figure.subplots()
    for shift, (engine, name) in enumerate(ENGINES.items()):
        places = [place + 0.25 * (shift - 1) for place in range(len(known))]
        bars = axes.barh(
            places, [rows[task, engine]["median_s"] for task in known], 0.23, label=name
        )
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set_yticks(range(len(known)), [TASKS[task] for task in known])
    axes.invert_yaxis()
    axes.set_xlabel("seconds, less is better")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def models(report: Mapping[str, Any]) -> Table:
    """The part on models."""
    rows, known = measured(report)

    def cell(task: str, engine: str) -> Number:
        row = rows[task, engine]
        aside = f"{row['peak_gib']:.1f} GiB, first {row['first_s']:.0f} s"
        return Number(f"{row['median_s']:.2f} s", aside)

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


def blocks(report: Mapping[str, Any]) -> Table:
    """The part on blocks of transformers: a line for each window."""
    rows = [row for row in report["rows"] if "error" not in row]
    lines: list[tuple[str | Number, ...]] = []
    for row in rows:
        if "gain" not in row:
            continue
        same = [each for each in rows if all(each[key] == row[key] for key in SAME)]
        seconds = {each["contender"]: each for each in same}
        cells = (
            Number(f"{seconds[name]['median_s']:.1f} s", f"{memory(seconds[name]):.1f} GiB")
            if name in seconds
            else Number("–")
            for name in ("eager", "compile", "dense", row["contender"])
        )
        of = Number(f"{row['gain']:.2f}"), Number(f"{row['predicted']:.2f}")
        title = f"{row['model']}, {row['grid']}, {row['dtype']}; {row['contender']}"
        lines.append((title, *cells, *of))
    titles = ("", "PyTorch", "torch.compile", "JAX", "JAX, GNA", "gain", "predicted")
    note = BLOCKS.format(cores=report["cpu_cores"], date=report["date"])
    return Table("Blocks of transformers", titles, lines, note)


SAME = ("model", "grid", "dtype")


def memory(row: Mapping[str, Any]) -> float:
    """GiB of the process, of JAX with every contender in it."""
    return row["process_gib"]


def wholes(report: Mapping[str, Any]) -> Table:
    """The part on whole models: seconds of a sample, dense, and by how much less sparse."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in report["predictions"]:
        key = row["model"].removesuffix("-dev"), row["attention"]
        found.setdefault(key, {})[row["device"]] = row
    for row in report["rows"]:
        if row["dtype"] == "float32" and "whole" in row:
            key = row["whole"]["model"], row["whole"]["attention"]
            found.setdefault(key, {})["cpu"] = row["whole"]
    lines: list[tuple[str | Number, ...]] = []
    for (model, attention), devices in found.items():
        one = next(iter(devices.values()))
        cells = [f"{model}, {one['size']}; {attention}"]
        cells.append(f"{one['dense_steps']} of {one['steps']}")
        lines.append((*cells, *(sample(devices.get(name)) for name in WHERE)))
    titles = ("", "dense steps", *WHERE.values())
    error = report["published"]
    note = WHOLES.format(figures=error["figures"], error=100 * error["median_error"])
    return Table("Whole transformers, predicted", titles, lines, note)


WHERE = {"cpu": "this CPU", "h100": "H100", "h200": "H200", "b200": "B200"}


def sample(found: Mapping[str, Any] | None) -> Number:
    """Seconds of a dense sample, and the gains."""
    if found is None:
        return Number("–")
    seconds, gain = found["sample_s"]["dense"], found["gain"]
    text = f"{seconds / 3600:,.0f} h" if seconds > 7200 else f"{seconds:,.0f} s"
    return Number(text, f"{gain['after_dense_steps']:.2f} ×, {gain['all_steps']:.2f} ×")


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
                Number(f"{row['peak_ratio']:.3f}" if "peak_ratio" in row else "–"),
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
    report = read_json(RESULTS / "stable_diffusion_full_float32.json")
    plot(report).savefig(page.with_suffix(".png"), dpi=120)
    tables = [models(report)]
    if (report := RESULTS / "transformer_speed_cpu_full.json").exists():
        tables += [part(read_json(report)) for part in (blocks, wholes)]
    tables.append(files(read_json(RESULTS / "load_save.json")))
    page.write_text(PAGE + "\n".join(map(markdown_table, tables)), "utf-8")


if __name__ == "__main__":
    main()
