"""The toy of the training tests in one of several processes, as a launcher starts them.

    python processes_toy.py FOLDER [WHAT STEP]

finds the other processes through the environment, trains, saving every third of ten steps to
FOLDER/run, writes its losses and what it holds to FOLDER/INDEX.json, and exports the trained
parameters to FOLDER/model.safetensors.  WHAT happens in process 1 alone:

    a signal       it sends it to itself at batch STEP
    RAISE          its batch STEP raises
    UNREADABLE     it cannot read the checkpoint after STEP, and is slow to see what the others do
    MISFIT         the checkpoint after STEP does not fit
    UNWRITTEN      it cannot write its part of the checkpoint after STEP
    ELSEWHERE      its checkpoints are in a folder of its own
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import training_toy as toy

from conceptax.cli import processes
from conceptax.converters.files.safetensors_file import PendingTensor, write_safetensors
from conceptax.converters.parameters import on_host
from conceptax.methods import training
from conceptax.methods.training import checkpoints


def main() -> None:
    folder = Path(sys.argv[1])
    if "SIGKILL" in sys.argv:
        processes._HEARTBEAT_SECONDS = 10  # that a test waits for it
    processes.join_processes()
    me = jax.process_index()
    what, number = (sys.argv[2], int(sys.argv[3])) if me == 1 and len(sys.argv) > 2 else ("", 0)
    if what in ("UNREADABLE", "MISFIT"):
        _unreadable(number, OSError if what == "UNREADABLE" else checkpoints._MisfitError)
    if what == "UNREADABLE":
        _see_late(folder / "run")
    if what == "UNWRITTEN":
        _unwritten(number)
    if "ELSEWHERE" in sys.argv:
        checkpoints._LATE_SECONDS = 1
    rows, seen = training.local_rows(16), []

    def batches():
        for n, batch in enumerate(toy.batches()):
            if what.startswith("SIG") and n == number:
                os.kill(os.getpid(), getattr(signal, what))
            if what == "RAISE" and n == number:
                raise LookupError("no such picture")
            seen.append(len(batch["x"][rows]))
            yield {"x": batch["x"][rows]}

    mesh = training.make_mesh(2, 4)
    state = toy.run(
        batches=batches(),
        mesh=mesh,
        checkpoint_dir=folder / ("elsewhere" if what == "ELSEWHERE" else "run"),
        checkpoint_every=3,
        metrics_path=folder / f"metrics-{me}.jsonl",
    )
    kernel = state.params["layers"][0]["kernel"]
    tensors = [
        PendingTensor(path, np.dtype(np.float32), leaf.shape, lambda leaf=leaf: on_host(leaf))
        for path, leaf in zip(
            training.leaf_paths(state.params), jax.tree.leaves(state.params), strict=True
        )
    ]
    write_safetensors(folder / "model.safetensors", tensors, {})
    whole = training.gather(state.params)
    found = {
        "devices": len(jax.devices()),
        "rows": sorted(set(seen)),
        "spread": not kernel.is_fully_addressable,
        "sum": float(sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(whole))),
    }
    (folder / f"{me}.json").write_text(json.dumps(found))


def _unreadable(step, error):
    restore = training.Checkpoints._restore

    def fails(self, target, wanted, *others):
        if wanted == step:
            raise error("only here")
        return restore(self, target, wanted, *others)

    training.Checkpoints._restore = fails


def _see_late(folder):
    """As where a network file system shows what another process did some time after."""
    listed, opened, looks = os.listdir, training.Checkpoints._open, []

    def slow(self):
        time.sleep(0.5)
        looks.clear()
        return opened(self)

    def late(path="."):
        if Path(path) == folder:
            looks.append(path)
            return listed(path) if len(looks) > 1 else []
        return listed(path)

    training.Checkpoints._open, os.listdir = slow, late


def _unwritten(step):
    save = ocp.StandardCheckpointHandler.async_save

    class Failing:
        def result(self, timeout=None):
            raise OSError(28, "No space left on device")

    async def fails(self, directory, *arguments, **options):
        writes = await save(self, directory, *arguments, **options)
        return [*(writes or []), *[Failing()] * (f"{os.sep}{step}." in str(directory))]

    ocp.StandardCheckpointHandler.async_save = fails


if __name__ == "__main__":
    main()
