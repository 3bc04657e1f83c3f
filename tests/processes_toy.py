"""The toy of the training tests in one of several processes, as a launcher starts them.

    python processes_toy.py FOLDER [SIGNAL STEP | UNREADABLE STEP]

finds the other processes through the environment, trains, saving every third of ten steps to
FOLDER/run, writes its losses and what it holds to FOLDER/INDEX.json, and exports the trained
parameters to FOLDER/model.safetensors.  Given SIGNAL, process 1 sends it to itself at batch STEP;
given UNREADABLE, it alone cannot read the checkpoint after STEP.
"""

import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import training_toy as toy

from conceptax.cli.processes import join_processes
from conceptax.converters.files.safetensors_file import PendingTensor, write_safetensors
from conceptax.converters.parameters import on_host
from conceptax.methods import training


def main() -> None:
    folder = Path(sys.argv[1])
    join_processes()
    me = jax.process_index()
    what, number = (sys.argv[2], int(sys.argv[3])) if me == 1 and len(sys.argv) > 2 else ("", 0)
    if what == "UNREADABLE":
        _hide(number)
    rows, seen = training.local_rows(16), []

    def batches():
        for n, batch in enumerate(toy.batches()):
            if what.startswith("SIG") and n == number:
                os.kill(os.getpid(), getattr(signal, what))
            seen.append(len(batch["x"][rows]))
            yield {"x": batch["x"][rows]}

    mesh = training.make_mesh(2, 4)
    state = toy.run(
        batches=batches(),
        mesh=mesh,
        checkpoint_dir=folder / "run",
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


def _hide(step: int) -> None:
    restore = training.Checkpoints._restore

    def fails(self, target, wanted, *others):
        if wanted == step:
            raise OSError("only here")
        return restore(self, target, wanted, *others)

    training.Checkpoints._restore = fails


if __name__ == "__main__":
    try:
        main()
    except training.ProcessLostError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
