"""The last lines of `gpu_acceptance.sh`: what its steps have left in a folder, as a short table."""

import argparse
import csv
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

AIMS = {"FLUX-4K": 7.9, "Hunyuan": 22.0, "FLUX-4K, stride 1": 11.0, "Hunyuan, stride 1": 45.0}
STEPS = ("sparse", "stride_1", "float16", "xla")
NATTEN = ("NATTEN, cooperative", "NATTEN, ping-pong")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--able", nargs="+", metavar="NAME", help="print those that ran to the end of their checks"
    )
    arguments = parser.parse_args()
    if arguments.able:
        print(*able(arguments.folder, arguments.able))
        return
    for part in (checks, attention, transformers, profile, clocks):
        try:
            for line in part(arguments.folder):
                print(line)
        except Exception as error:  # one file that is cut short must not hide the others
            print(f"{part.__name__}: {type(error).__name__}: {error}")
    left = arguments.folder / "not_done"
    if left.exists():
        print("NOT DONE:", ", ".join(left.read_text().split("\n")).rstrip(", "))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def able(folder: Path, names: list[str]) -> list[str]:
    """Implementations whose checks ended; those that are wrong are left out where they are."""
    found = []
    for name in names:
        for check in read(folder / f"check_{name}.json").get("checks", ()):
            if "failed" not in check and check["error_over_allowed"]:
                found.append(name)
    return found


def checks(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("check_*.json")):
        for check in read(path)["checks"]:
            errors, left_out = check["error_over_allowed"], check["left_out"]
            told = f"{len(errors)} problems {'right' if check['passed'] else 'WRONG'}"
            wrong = [name for name, error in errors.items() if not error <= 1]
            told += f" ({'; '.join(wrong)})" if wrong else ""
            told += f"; {len(left_out)} it cannot do" if left_out else ""
            if "failed" in check:
                told = f"FAILED: {check['failed'][:200]}"
            yield f"{check['implementation']}: {told}"
    for tool in ("memcheck", "synccheck", "racecheck"):
        log = folder / f"{tool}.log"
        if log.exists():
            lines = [x for x in log.read_text(errors="replace").splitlines() if "SUMMARY" in x]
            yield f"{tool}: {lines[-1].strip('= ') if lines else 'no summary'}"


def attention(folder: Path) -> Iterator[str]:
    reports = [read(folder / f"{step}.json") for step in STEPS]
    rows = [row for report in reports for row in report.get("rows", ())]
    cases = dict.fromkeys((row["name"], row["dtype"], row["pass"]) for row in rows)
    if not rows:
        return
    titles = ("dense", "NATTEN", "permuting", "cuda", "triton", "xla", "TFLOP/s", "aim")
    yield f"{'ms':45}" + "".join(f"{title:>10}" for title in titles)
    for case in cases:
        mine = {
            row["contender"]: row
            for row in rows
            if (row["name"], row["dtype"], row["pass"]) == case and "median_s" in row
        }
        dense = next((name for name in mine if name.startswith("jax.nn")), "")
        natten = min(NATTEN, key=lambda name: mine.get(name, {}).get("median_s", 1e9))
        numbers = [
            1e3 * mine[name]["median_s"] if name in mine else None
            for name in (dense, natten, "NATTEN, permuting", "cuda", "triton", "xla")
        ]
        ours = [mine[name] for name in ("cuda", "triton", "xla") if name in mine]
        best = min(ours, key=lambda row: row["median_s"], default=None)
        numbers += [best and rate(best), AIMS.get(case[0]) if case[2] == "forward" else None]
        cells = (f"{'' if x is None else f'{x:.2f}':>10}" for x in numbers)
        yield f"{', '.join(case):45}" + "".join(cells)
    absent = {(row["contender"], row["absent"]) for row in rows if "absent" in row}
    yield from (f"{name}: {why}" for name, why in sorted(absent))


def rate(row: dict[str, Any]) -> float:
    """TFLOP/s: two products of all pairs that are seen, and five more in a backward pass."""
    tokens = 1
    for length in row["layout"]:
        tokens *= length
    products = 2 if row["pass"] == "forward" else 7
    pairs = tokens**2 / row["pairs_bound"]
    return 2e-12 * products * pairs * row["heads"] * row["head_dim"] / row["median_s"]


def transformers(folder: Path) -> Iterator[str]:
    for row in read(folder / "transformers.json").get("rows", ()):
        told = row.get("error") or f"{row['median_s']:.3f} s"
        for name, digits in (("gain", 2), ("predicted", 2)):
            told += f", {name} {row[name]:.{digits}f} x" if row.get(name) else ""
        yield f"{row['model']}, {row['grid']}, {row['contender']}: {told[:200]}"


# Of a profile: a title, and what the name of a metric has in it.
METRICS = {
    "registers": ("launch__registers_per_thread",),
    "tensor %": ("pipe_tensor", "pct_of_peak_sustained_active"),
    "issue %": ("issue_active", "pct"),
    "DRAM %": ("dram__throughput", "pct"),
}


def profile(folder: Path) -> Iterator[str]:
    path = folder / "profile.csv"
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines() if line.startswith('"')]
    units, *kernels = csv.DictReader(lines)
    for kernel in kernels:
        took, unit = kernel["gpu__time_duration.sum"], units["gpu__time_duration.sum"]
        told = f"{kernel['Kernel Name'][:60]}: {took} {unit}"
        for title, parts in METRICS.items():
            found = [v for name, v in kernel.items() if all(part in name for part in parts) and v]
            told += f", {title} {max(found, key=float)}" if found else ""
        yield told


def clocks(folder: Path) -> Iterator[str]:
    path = folder / "clocks.csv"
    if not path.exists():
        return
    samples = []
    for line in path.read_text().splitlines():
        try:
            samples.append([float(x.replace("[N/A]", "nan")) for x in line.split(",")])
        except ValueError:
            continue  # cut short, or an error
    busy = [one for one in samples if len(one) == 5 and one[4] >= 90]
    if busy:
        clock, memory, power, heat, _ = zip(*busy, strict=True)
        yield (
            f"clocks under load: {statistics.median(clock):.0f} MHz, {min(clock):.0f} at least; "
            f"memory {statistics.median(memory):.0f} MHz; {statistics.median(power):.0f} W, "
            f"{max(power):.0f} at most; {max(heat):.0f} C"
        )


if __name__ == "__main__":
    main()
