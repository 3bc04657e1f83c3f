"""Fuzz every reader of checkpoints for as long as you like, and report what should not come out.

    python benchmarks/fuzz_checkpoints.py --minutes 60

Only `CheckpointError` may come out, within a minute, and nothing may appear beside the file. Each
target of `tests/fuzz_targets.py` gets an equal share of the time, with new examples every run
(hypothesis), in a process of its own, so that a crash of the interpreter is a finding too. With
`--engine atheris`, where that is installed, coverage drives the changes to some of these examples.
Findings are kept as files in the folder `--findings`, which a run makes only if it has any.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

_SLOW = 60.0  # seconds for one file


def explore(name: str, seconds: float, seed: int, engine: str, root: str, report: Any) -> None:
    """Run one target on files in the folder `root`; sends (executions, findings) when done."""
    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["conceptax", "msgpack"]):
            from fuzz_targets import allowed, targets
    else:
        from fuzz_targets import allowed, targets
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    target = targets()[name]
    found: dict[str, tuple[str, bytes]] = {}  # where it was raised -> what, and the file
    count = 0
    end = time.monotonic() + seconds
    folder, corpus = Path(root) / "inside", Path(root) / "corpus"
    folder.mkdir()
    options = settings(
        max_examples=200,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    def attempt(contents: bytes) -> None:
        nonlocal count
        if time.monotonic() > end:
            return
        count += 1
        start = time.monotonic()
        report.send(("trying", contents))
        try:
            allowed(target, folder, contents)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno} {type(error).__name__}"
            found.setdefault(where, (traceback.format_exc(), contents))
        if time.monotonic() - start > _SLOW:
            found.setdefault("slow", (f"{time.monotonic() - start:.0f} s", contents))
        strange = {entry.name for entry in folder.parent.iterdir()} - {folder.name, corpus.name}
        if strange:
            found.setdefault("wrote", (f"appeared beside its folder: {sorted(strange)}", contents))

    if engine == "atheris":

        def attempt_or_end(contents: bytes) -> None:
            attempt(contents)
            if time.monotonic() > end:  # libFuzzer would end the process without a word
                report.send(("done", (count, found)))
                os._exit(0)

        corpus.mkdir()

        @seeded(seed)
        @options
        @given(target.contents)
        def write(contents: bytes) -> None:
            (corpus / str(len(list(corpus.iterdir())))).write_bytes(contents)

        write()
        flags = [f"-seed={seed}", "-max_len=4096", "-verbosity=0"]
        atheris.Setup(["fuzz", *flags, str(corpus)], attempt_or_end)
        atheris.Fuzz()
    rounds = random.Random(seed)
    while time.monotonic() < end:

        @seeded(rounds.getrandbits(64))
        @options
        @given(target.contents)
        def run(contents: bytes) -> None:
            attempt(contents)

        run()
    report.send(("done", (count, found)))


def main() -> None:
    from fuzz_targets import targets

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="for all targets together")
    parser.add_argument("--only", nargs="+", choices=sorted(targets()), default=sorted(targets()))
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(31))
    parser.add_argument("--engine", choices=("hypothesis", "atheris"), default="hypothesis")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    total = 0
    share = 60 * options.minutes / len(options.only)
    context = multiprocessing.get_context("spawn")
    for name in options.only:
        here, there = context.Pipe(duplex=False)
        tried, count, found = b"", 0, {}
        with tempfile.TemporaryDirectory() as root:
            arguments = (name, share, options.seed, options.engine, root, there)
            process = context.Process(target=explore, args=arguments)
            process.start()
            there.close()
            try:
                while True:
                    kind, content = here.recv()
                    if kind == "trying":
                        tried = content
                    else:
                        count, found = content
            except EOFError:
                process.join()
        if process.exitcode:
            found["crash"] = (f"the process ended with {process.exitcode}", tried)
        total += len(found)
        print(json.dumps({"target": name, "files": count, "findings": sorted(found)}), flush=True)
        for number, (what, contents) in enumerate(found.values()):
            options.findings.mkdir(exist_ok=True)
            (options.findings / f"{name}-{number}.bin").write_bytes(contents)
            (options.findings / f"{name}-{number}.txt").write_text(what)
    sys.exit(1 if total else 0)


if __name__ == "__main__":
    main()
