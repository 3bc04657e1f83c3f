"""Runs Triton kernels on the CPU: `python gna_interpreter.py FOLDER`, with TRITON_INTERPRET=1.

Calls come as lines of JSON {"kernel", "programs", "static", "operands", "results"}: operands is the
path of an .npz file, results a list of [shape, dtype]; the answer is the path of another.
"""

import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np


def load(folder: Path):
    """`triton_kernels` of a folder, without the package around it, which would import jax."""
    package = types.ModuleType("gna_kernels")
    package.__path__ = [str(folder)]
    sys.modules["gna_kernels"] = package
    return importlib.import_module("gna_kernels.triton_kernels")


def frozen(x):
    return tuple(map(frozen, x)) if isinstance(x, list) else x


def main():
    import torch

    kernels = load(Path(sys.argv[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        with np.load(asked["operands"]) as file:
            operands = [torch.from_numpy(file[f"arr_{n}"]) for n in range(len(file.files))]
        results = [
            torch.full(shape, float("nan"), dtype=getattr(torch, dtype))
            for shape, dtype in asked["results"]
        ]
        static = kernels.Static(**{name: frozen(x) for name, x in asked["static"].items()})
        getattr(kernels, asked["kernel"])[(asked["programs"],)](*operands, *results, S=static)
        path = asked["operands"].replace("operands", "results")
        np.savez(path, *(x.numpy() for x in results))
        print(path, flush=True)


if __name__ == "__main__":
    main()
