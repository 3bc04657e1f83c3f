"""Loading, saving and converting a UNet, and a first image: time and peak memory, beside peers.

    python benchmarks/load_save.py            # the published SD 1.5 size, 3.4 GB in float32
    python benchmarks/load_save.py --small    # the same architecture at a quarter of the width

Loading and saving are beside diffusers' own.  Converting is the command `conceptax convert FOLDER
FOLDER`, as it is and with `--dtype bfloat16`, from its start to its end, imports included, beside
`cp -r` of the same folder to the same disk.  Each is timed until the command returns (what it wrote
may still be in the page cache) and until the file system says that the bytes are on the disk
(`sync -f`); before each the disk is idle.  Starting is `conceptax sample` of one image of the
bundled model, with an empty cache of compiled programs and with the one that this leaves, beside a
program that draws it with diffusers.

Every measurement runs in a process of its own.  Seconds of the processors are beside those of the
clock, which other work lengthens.  Peak memory is *anonymous* memory (`RssAnon`: what
the process owns; pages of mapped files are not counted, since the system can drop them at any
moment), sampled from outside every two milliseconds, less what the process held before it began; of
a command all of it, and its peak resident memory too, mapped pages included.
Loading ends when every parameter has been touched; diffusers may keep parameters as views of the
mapped file, which shows as less anonymous memory.  The file is in the page cache for all.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from conceptax import bundled_model
from conceptax.reporting.results import write_records

RESULTS = Path(__file__).resolve().parent / "results"
LIBRARIES = ("conceptax", "diffusers")
TIMES = ("seconds", "seconds_on_disk", "cpu_seconds")
PARTS = ("load-save", "convert", "start")
_DRAWN_BY_DIFFUSERS = """
import sys, torch
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipeline("a red three on brick", num_inference_steps=50).images[0].save(sys.argv[2])
"""
SMALL = {"block_out_channels": [96, 160, 320, 320], "cross_attention_dim": 768}


def today() -> str:
    return datetime.date.today().isoformat()


def wait_for_parent(word: str) -> None:
    """Tell the measuring process where we are, and wait until it has taken note."""
    print(word, flush=True)
    sys.stdin.readline()


def make_checkpoint(folder: Path, small: bool) -> None:
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from conceptax.converters import save_pytorch
    from conceptax.flax_models.unet_2d_condition import (
        UNet2DConditionConfig,
        UNet2DConditionModel,
    )

    config = UNet2DConditionConfig.from_dict(SMALL if small else {})
    model = nnx.eval_shape(lambda: UNet2DConditionModel(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    for _, leaf in nnx.iter_graph(model):
        if isinstance(leaf, nnx.Param):
            leaf.set_value(jnp.asarray(rng.standard_normal(leaf.shape, np.float32)))
    save_pytorch(model, folder)


def run_conceptax(folder: Path, output: Path) -> None:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from conceptax.converters import load_pytorch, save_pytorch
    from conceptax.flax_models import unet_2d_condition  # noqa: F401  imports are not measured

    jax.block_until_ready(jnp.zeros(1))
    wait_for_parent("load")
    model = load_pytorch(folder)
    jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    wait_for_parent("save")
    save_pytorch(model, output)
    wait_for_parent("end")


def run_diffusers(folder: Path, output: Path) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    torch.zeros(1)
    wait_for_parent("load")
    model = UNet2DConditionModel.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.detach().flatten()[::1024].sum()  # one number of each page
    wait_for_parent("save")
    model.save_pretrained(output)
    wait_for_parent("end")


def anonymous_memory(pid: int) -> int:
    """Bytes of anonymous memory that a process holds now."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def processor_seconds(pid: int) -> float:
    """What a process and its threads have computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


class Peak(threading.Thread):
    """Samples a process until told to stop."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.peak, self.running = pid, anonymous_memory(pid), True
        self.start()

    def run(self) -> None:
        while self.running:
            with contextlib.suppress(OSError):  # it has ended
                self.peak = max(self.peak, anonymous_memory(self.pid))
            time.sleep(0.002)

    def stop(self) -> int:
        self.running = False
        self.join()
        return self.peak


def child(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, __file__, "--child", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
    )


def measure(library: str, folder: Path, work: Path) -> dict[str, dict[str, float]]:
    """Seconds and peak bytes of loading and of saving, in one fresh process."""
    with tempfile.TemporaryDirectory(dir=work) as output:
        process = child(library, str(folder), str(Path(output) / "saved"))
        assert process.stdin is not None and process.stdout is not None

        def reached(word: str) -> None:
            line = process.stdout.readline().strip()
            while line and line != word:  # a library's own words
                line = process.stdout.readline().strip()
            if line != word:
                raise RuntimeError(f"{library} stopped before {word!r}.")

        def proceed() -> None:
            process.stdin.write("\n")
            process.stdin.flush()

        reached("load")
        baseline = anonymous_memory(process.pid)
        figures = {}
        for phase, end in (("load", "save"), ("save", "end")):
            sampler = Peak(process.pid)
            start, before = time.perf_counter(), processor_seconds(process.pid)
            proceed()
            reached(end)
            figures[phase] = {
                "seconds": time.perf_counter() - start,
                "cpu_seconds": processor_seconds(process.pid) - before,
                "peak_bytes": sampler.stop() - baseline,
            }
        proceed()
        process.wait()
    return figures


def measure_command(command: list[str], work: Path, **environment: str) -> dict[str, float]:
    """Seconds of a command that makes what it names last, `OUT` in `work`; and its peak memory."""
    with tempfile.TemporaryDirectory(dir=work) as output:
        subprocess.run(["sync", "-f", output], check=True)
        start = time.perf_counter()
        process = subprocess.Popen(
            [part.replace("OUT", str(Path(output) / "out")) for part in command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", **environment},
        )
        sampler = Peak(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        returned = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{command} failed.")
        subprocess.run(["sync", "-f", output], check=True)
        return {
            "seconds": returned,
            "seconds_on_disk": time.perf_counter() - start,
            "peak_bytes": sampler.stop(),
            "peak_resident_bytes": usage.ru_maxrss * 1024,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
        }


def summary(library: str, phase: str, runs: list[dict], size: int) -> dict:
    """The row of some runs: the fastest time, the largest peak, and that beside the file's size."""
    row = {key: min(run[key] for run in runs) for key in TIMES if key in runs[0]}
    row |= {key: max(run[key] for run in runs) for key in runs[0] if key.startswith("peak")}
    row |= {"runs": runs} | ({"peak_ratio": row["peak_bytes"] / size} if size else {})
    row |= {"date": today(), "load_average": os.getloadavg()[0]}
    return {"library": library, "phase": phase, **row}


def conversions(folder: Path, work: Path, size: int, repeats: int) -> list[dict]:
    """Rows of `cp` and of `conceptax convert`, taken in turns."""
    convert = [sys.executable, "-m", "conceptax", "convert"]
    commands = {
        ("cp", "convert"): ["cp", "-r", str(folder), "OUT"],
        ("conceptax", "convert"): [*convert, str(folder), "OUT"],
        ("conceptax", "convert to bfloat16"): [*convert, str(folder), "OUT", "--dtype", "bfloat16"],
    }
    runs = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            for file in folder.iterdir():
                with open(file, "rb") as source:
                    while source.read(1 << 24):  # into the page cache
                        pass
            runs[name].append(measure_command(command, work))
    return [summary(*name, those, size) for name, those in runs.items()]


def starts(work: Path, repeats: int) -> list[dict]:
    """Rows of a first image of the bundled model, with an empty and with a filled cache."""
    prompt, bundled = "a red three on brick", str(bundled_model())
    draw = [sys.executable, "-m", "conceptax", "sample", "--prompt", prompt, "--output", "OUT.png"]
    draw_with_diffusers = [sys.executable, "-c", _DRAWN_BY_DIFFUSERS, bundled, "OUT.png"]
    runs: dict[tuple[str, str], list[dict]] = {
        ("conceptax", "start, empty cache"): [],
        ("conceptax", "start, filled cache"): [],
        ("diffusers", "start"): [],
    }
    empty, filled, peer = runs.values()
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(dir=work) as caches:
            for those in (empty, filled):
                environment = {"JAX_COMPILATION_CACHE_DIR": caches}
                those.append(measure_command(draw, work, **environment))
        peer.append(measure_command(draw_with_diffusers, work))
    return [summary(*name, those, 0) for name, those in runs.items()]


def print_table(rows: list[dict]) -> None:
    print(
        f"{'':10} {'':20} {'seconds':>8} {'CPU s':>8} {'on disk':>8} {'peak GB':>8} {'/ file':>7}"
    )
    for row in rows:
        times = [row.get(key) for key in ("seconds", "cpu_seconds", "seconds_on_disk")]
        shown = " ".join("        " if each is None else f"{each:8.2f}" for each in times)
        ratio = f"{row['peak_ratio']:7.3f}" if "peak_ratio" in row else ""
        print(
            f"{row['library']:10} {row['phase']:20} {shown} {row['peak_bytes'] / 1e9:8.2f} {ratio}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a quarter of the width")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest run counts")
    parser.add_argument("--work", type=Path, default=None, help="folder for the checkpoint")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="default: all")
    parser.add_argument(
        "--checkpoint", type=Path, help="the UNet's folder; default: random weights"
    )
    arguments = parser.parse_args()
    target = RESULTS / f"load_save{'_small' if arguments.small else ''}.json"
    kept = json.loads(target.read_text())["rows"] if target.exists() else []

    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        folder = arguments.checkpoint or Path(work) / "unet"
        made = (
            None if arguments.checkpoint else child("make", str(folder), str(int(arguments.small)))
        )
        if made is not None and made.wait():
            raise SystemExit("The checkpoint could not be made.")
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        part = {"load": "load-save", "save": "load-save", "start,": "start"}
        of = lambda row: part.get(row["phase"].split()[0], row["phase"].split()[0])  # noqa: E731
        rows = [row for row in kept if of(row) not in arguments.only]
        if "convert" in arguments.only:
            rows += conversions(folder, Path(work), size, arguments.repeats)
        runs = {name: [] for name in LIBRARIES}
        for _ in range(arguments.repeats if "load-save" in arguments.only else 0):
            for name in LIBRARIES:  # alternating, so that both meet the same machine
                runs[name].append(measure(name, folder, Path(work)))
        for phase in ("load", "save"):
            for name, those in runs.items():
                if those:
                    rows.append(summary(name, phase, [run[phase] for run in those], size))
        if "start" in arguments.only:
            rows += starts(Path(work), arguments.repeats)

    print(f"UNet2DConditionModel, float32, {size / 1e9:.2f} GB, CPU, {os.cpu_count()} cores")
    print_table(rows)
    versions = ("conceptax", "jax", "flax", "torch", "diffusers", "safetensors")
    report = {
        "benchmark": "load_save",
        "device": f"CPU, {os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in versions},
        "checkpoint_bytes": size,
        "small": arguments.small,
        "repeats": arguments.repeats,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    write_records(target, report)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        kind, path, last = sys.argv[2:]
        if kind == "make":
            make_checkpoint(Path(path), bool(int(last)))
        else:
            {"conceptax": run_conceptax, "diffusers": run_diffusers}[kind](Path(path), Path(last))
    else:
        main()
