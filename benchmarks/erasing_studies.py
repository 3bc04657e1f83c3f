"""SAGE, its rivals and its attackers on glyphs: everything that docs/erasing_results.md shows.

    python benchmarks/erasing_studies.py table                  # all methods x all attacks, 3 seeds
    python benchmarks/erasing_studies.py pareto ablations concepts
    python benchmarks/erasing_studies.py transfer --second FOLDER   # of benchmarks/glyphs_unets.py
    python benchmarks/erasing_studies.py relapse --never-knew FOLDER    # of its --without 3
    python benchmarks/erasing_studies.py --write                # tables and plots from what is kept

A study is a list of cells, each one erasure and its evaluation.  A cell's figures are kept as JSON
under benchmarks/results/erasing/STUDY, its edited model under --work; a cell that is there is not
run again, so a study may be stopped and started.  Settings of SAGE and its rivals were chosen on
seed 100; the table's seeds are others.
"""

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import conceptax
from conceptax.converters import load_pytorch, save_pytorch
from conceptax.methods.erasing import METHODS, erase
from conceptax.methods.evaluation import EvaluationConfig, evaluate
from conceptax.methods.glyphs.evaluation import glyphs_suites
from conceptax.methods.red_team import (
    ConceptInversionConfig,
    RelapseConfig,
    TokenSearchConfig,
)
from conceptax.reporting.instruments import load_classifier, load_clip
from conceptax.reporting.results import environment, write_records

RESULTS = Path(__file__).parent / "results" / "erasing"
IMAGES = 67  # of each figure and seed: three seeds are 201
STEPS = 15

INVERSION = ConceptInversionConfig(snapshots=(25, 100))
ATTACKS = {
    "concept-inversion": INVERSION,
    "token-search": TokenSearchConfig(forbidden=("three", "3", "III", "trio")),
    "relapse": RelapseConfig(snapshots=(0, 10, 30)),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One erasure and its evaluation.

    Attributes:
      name: of the row.
      method: key of `METHODS`, or "original" for no erasing.
      changes: of the method's settings.
      concepts: what is erased.
      seed: of the erasure and the evaluation.
      attacks: settings of the attacks that run.
    """

    name: str
    method: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    concepts: tuple[str, ...] = ("three",)
    seed: int = 100
    attacks: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', self.name)}-{self.seed}"


def table() -> Iterator[Cell]:
    """All methods and the original under all attacks."""
    for seed in (0, 1, 2):
        for method in (*METHODS, "original"):
            yield Cell(method, method, seed=seed, attacks=ATTACKS)


def pareto() -> Iterator[Cell]:
    """Each method's own trade of erasing for retention."""
    for method, field, values in (
        ("sage", "eta", (0.0, 1.0, 2.0, 8.0)),
        ("sage", "local_weight", (4.0, 64.0)),
        ("sage", "global_weight", (5.0, 80.0)),
        ("word", "eta", (0.0, 1.0, 2.0, 8.0)),
        ("esd-x", "eta", (1.0, 2.0, 6.0)),
        ("esd-u", "eta", (0.3, 3.0)),
        ("uce", "erase_weight", (0.1, 0.3, 3.0, 30.0)),
        ("advunlearn", "eta", (1.0, 6.0)),
        ("advunlearn", "retain_weight", (1.0, 3.0, 30.0)),
    ):
        for value in values:
            yield Cell(f"{method} {field} {value:g}", method, {field: value})
    for method in METHODS:
        yield Cell(f"{method} as it is", method)


# What the defaults were before all token states were compared, and what else was tried then.
EARLIER: Mapping[str, Any] = {
    "check_states": "pooled",
    "check_steps": 10,
    "global_weight": 5.0,
    "local_weight": 4.0,
}
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "as it is": {},
    "no self-check": {"check_steps": 0},
    "check: pooled": {"check_states": "pooled"},
    "check: outside-in": {"check_start": "random"},
    "check: anchor form": {"check": "anchor"},
    "check: guided, K 10": {"check": "guided", "check_steps": 10},
    "check: sign steps": {"check_optimizer": "sign"},
    "check: gamma 0": {"check_weight": 0.0},
    "check: gamma 4": {"check_weight": 4.0},
    "check: K 3": {"check_steps": 3},
    "check: K 10": {"check_steps": 10},
    "check: K 60": {"check_steps": 60},
    "check: alpha 0.3": {"check_rate": 0.3},
    "check: delta 0.3": {"check_radius": 0.3},
    "check: concept fixed": {"free_concept": False},
    "all token-wise": {"global_states": "tokens"},
    "K 10, alpha 0.3": {"check_steps": 10, "check_rate": 0.3},
    "K 10, gamma 4": {"check_steps": 10, "check_weight": 4.0},
    "K 10, all token-wise": {"check_steps": 10, "global_states": "tokens"},
    "K 10, all token-wise, alpha 0.3": {
        "check_steps": 10,
        "global_states": "tokens",
        "check_rate": 0.3,
    },
    "K 10, all token-wise, gamma 4": {
        "check_steps": 10,
        "global_states": "tokens",
        "check_weight": 4.0,
    },
    "K 10, all token-wise, global weight 60": {
        "check_steps": 10,
        "global_states": "tokens",
        "global_weight": 60.0,
    },
    "no global retention": {"global_weight": 0.0},
    "global: self form": {"global_form": "self"},
    "global: N 16": {"vocabulary": 16},
    "global: N 128": {"vocabulary": 128},
    "no local retention": {"local_weight": 0.0},
    "no retention": {"local_weight": 0.0, "global_weight": 0.0},
    "latents: ddim": {"latents": "ddim"},
    "500 cycles": {"cycles": 500},
    "500 cycles, alpha 0.2, 8 prompts": {
        "check_rate": 0.2,
        "cycles": 500,
        "prompts": 8,
    },
    "embeddings train too": {"trainable": ("*",)},
    "first two layers train": {"trainable": ("encoder.layers.[01]",)},
    "earlier": EARLIER,
    "earlier, alpha 0.3": {**EARLIER, "check_rate": 0.3},
    "earlier, K 60, alpha 0.2": {**EARLIER, "check_steps": 60, "check_rate": 0.2},
    "earlier, guided": {**EARLIER, "check": "guided"},
    "earlier, token-wise": {**EARLIER, "check_states": "tokens"},
    "earlier, token-wise, K 20, alpha 0.3": {
        **EARLIER,
        "check_states": "tokens",
        "check_steps": 20,
        "check_rate": 0.3,
    },
    "earlier, all token-wise": {**EARLIER, "check_states": "tokens", "global_states": "tokens"},
}


def ablations() -> Iterator[Cell]:
    """SAGE with one setting changed, and what that does to Concept Inversion."""
    for name, changes in ABLATIONS.items():
        yield Cell(name, "sage", changes, attacks={"concept-inversion": INVERSION})


def concepts() -> Iterator[Cell]:
    """Two concepts in one run, and a color."""
    yield Cell("three and seven", "sage", concepts=("three", "seven"), seed=0)
    yield Cell("red", "sage", concepts=("red",), seed=0)


def transfer() -> Iterator[Cell]:
    """What the table's SAGE encoders do in another UNet; `--second` is that UNet's pipeline."""
    for seed in (0, 1, 2):
        yield Cell("sage", "sage", seed=seed)


def relapse() -> Iterator[Cell]:
    """What the table's relapse teaches `--never-knew`, a pipeline whose UNet never saw a three."""
    for seed in (0, 1, 2):
        yield Cell("never knew", "original", seed=seed, attacks={"relapse": ATTACKS["relapse"]})


STUDIES = {
    "table": table,
    "pareto": pareto,
    "ablations": ablations,
    "concepts": concepts,
    "transfer": transfer,
    "relapse": relapse,
}
# Studies of a second pipeline, and the option that names its folder.
SECOND = {"transfer": "second", "relapse": "never_knew"}


class Bench:
    """The bundled model, who judges, and what was drawn already."""

    def __init__(self, work: Path):
        self.work = work
        source = conceptax.bundled_model()
        self.pipeline = load_pytorch(source, param_dtype=jnp.float32)
        tokenizer = self.pipeline.tokenizer
        self.judge = load_classifier(source / "judge", tokenizer, "judge")
        self.clip = load_clip(source / "clip", tokenizer, "glyphs CLIP")
        self.drawn: dict[Any, Any] = {}

    def edited(self, cell: Cell) -> tuple[Any, float | None]:
        """The edited pipeline, from the work folder where it is there, and the seconds it took."""
        if cell.method == "original":
            return self.pipeline, 0.0
        settings = METHODS[cell.method].config(**cell.changes)
        changes = "".join(f"-{k}-{v}" for k, v in sorted(cell.changes.items()))
        name = f"{cell.method}{changes}-{'-'.join(cell.concepts)}-{cell.seed}"
        folder = self.work / name.replace("/", "_").replace(" ", "")
        part = METHODS[cell.method].edits
        if not (folder / "erasing.json").exists():
            began = time.perf_counter()
            edited = erase(self.pipeline, cell.concepts, settings, seed=cell.seed)
            seconds = round(time.perf_counter() - began, 1)
            save_pytorch(getattr(edited, part), folder, force=True)
            write_records(folder / "erasing.json", {"seconds": seconds} | environment())
        seconds = json.loads((folder / "erasing.json").read_text(encoding="utf-8"))["seconds"]
        return dataclasses.replace(self.pipeline, **{part: load_pytorch(folder)}), seconds

    def run(self, cell: Cell, images: int, second: Any = None, never_knew: Any = None) -> dict:
        """A cell's record.

        `second` is a pipeline whose UNet draws in place of the bundled one, `never_knew` one that
        relapse is also run on.
        """
        edited, seconds = self.edited(cell)
        original = self.pipeline
        if second is not None:
            original, edited = (
                dataclasses.replace(second, text_encoder=each.text_encoder)
                for each in (original, edited)
            )
        config = EvaluationConfig(
            images=images, steps=STEPS, seed=cell.seed, attacks=dict(cell.attacks)
        )
        found = evaluate(
            original,
            edited,
            cell.concepts,
            self.judge,
            glyphs_suites(cell.concepts, images, cell.seed),
            config,
            clip=self.clip,
            never_knew=never_knew,
            drawn=self.drawn if second is None else None,
            report=lambda text: print(f"  {text}", flush=True),
        )
        return {
            "cell": dataclasses.asdict(dataclasses.replace(cell, attacks={})),
            "attacks": {name: dataclasses.asdict(each) for name, each in cell.attacks.items()},
            "images": images,
            "steps": STEPS,
            "guidance": config.guidance,
            "seconds_to_erase": seconds,
            "seconds": found.seconds,
            "metrics": found.metrics,
            **environment(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", help=f"of {', '.join(STUDIES)}")
    parser.add_argument("--work", type=Path, default=Path(".cache/erasing"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--images", type=int, default=IMAGES, help="per figure and seed")
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the rows to run")
    parser.add_argument("--second", type=Path, help="pipeline with another UNet, for transfer")
    parser.add_argument("--never-knew", type=Path, help="pipeline to compare relapse with")
    parser.add_argument("--write", action="store_true", help="write docs/erasing_results.md")
    options = parser.parse_args()
    if unknown := sorted(set(options.studies) - set(STUDIES)):
        parser.error(f"studies are {sorted(STUDIES)}, received {unknown}")
    for study in set(options.studies) & set(SECOND):
        if getattr(options, SECOND[study]) is None:
            parser.error(f"{study} needs --{SECOND[study].replace('_', '-')}")
    bench = Bench(options.work) if options.studies else None
    for study in options.studies:
        others = {}
        if option := SECOND.get(study):
            others[option] = load_pytorch(getattr(options, option), param_dtype=jnp.float32)
        for cell in STUDIES[study]():
            path = options.results / study / f"{cell.key}.json"
            if path.exists() or (options.only and cell.name not in options.only):
                continue
            if options.seeds and cell.seed not in options.seeds:
                continue
            print(f"{study}: {cell.key}", flush=True)
            began = time.perf_counter()
            record = bench.run(cell, options.images, **others)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_records(path, record)
            print(f"  {time.perf_counter() - began:.0f} s: {summary(record)}", flush=True)
    if options.write:
        from _erasing_pages import write_page

        write_page(options.results, Path(__file__).parents[1] / "docs", list(ABLATIONS))


def summary(record: dict) -> str:
    """Attack successes and retention of a cell on a line."""
    metrics = record["metrics"]
    parts = [
        f"{each['attack']} {100 * each['after']['rate']:.0f}" for each in metrics["attacks"]
    ] + [f"{each['group']} {100 * each['after']['rate']:.0f}" for each in metrics["retention"]]
    return ", ".join(parts)


if __name__ == "__main__":
    main()
