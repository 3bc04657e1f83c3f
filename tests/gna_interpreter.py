"""Runs Triton kernels on the CPU: `python gna_interpreter.py kernels.py`, with TRITON_INTERPRET=1.

Calls come as lines of JSON {"kernel", "programs", "static", "operands", "results"}: operands is the
path of an .npz file, results a list of [shape, dtype]; the answer is the path of another.
"""

import importlib.util
import json
import sys

import numpy as np
import torch


def frozen(x):
    return tuple(map(frozen, x)) if isinstance(x, list) else x


def main():
    spec = importlib.util.spec_from_file_location("triton_kernels", sys.argv[1])
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        with np.load(asked["operands"]) as file:
            operands = [torch.from_numpy(file[f"arr_{n}"]) for n in range(len(file.files))]
        results = [
            torch.full(shape, float("nan"), dtype=getattr(torch, dtype))
            for shape, dtype in asked["results"]
        ]
        static = {name: frozen(x) for name, x in asked["static"].items()}
        getattr(kernels, asked["kernel"])[(asked["programs"],)](*operands, *results, **static)
        path = asked["operands"].replace("operands", "results")
        np.savez(path, *(x.numpy() for x in results))
        print(path, flush=True)


if __name__ == "__main__":
    main()
