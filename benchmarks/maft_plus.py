"""MAFT+ speed: a full-size forward pass, deformable sampling alone, and matching.

    python benchmarks/maft_plus.py                     # Base at 640x640, float32
    python benchmarks/maft_plus.py --size 320 --threads 1
    python benchmarks/maft_plus.py --only sampling

Every measurement runs in a process of its own (so that peak memory is its own), one after another,
with random weights.  torch runs transformers' ConvNeXt and Mask2Former, the parts it has of the
model; JAX runs all of it: class heads, mask pooling, 404 text rows and their transfer besides.
Sampling is one layer's: `sample_levels` visits a query's points one after another, the dense form
gathers all their corners at once.  Matching is a training step's: queries to targets for ten
layers and eight images, on the host by SciPy through a callback (what the losses do) or on the
device by optax; both must find assignments of the same cost.  Seconds are those of the process's
processor time when --threads is 1 (other processes do not count), else of the clock.
"""

import argparse
import functools
import json
import math
import os
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

from _processes import measured_alone, peak_memory

from conceptax.reporting.results import write_records

RESULTS = Path(__file__).parent / "results"
ROWS = 403  # synonyms of ADE20K-150
DIMS, DEPTHS = (128, 256, 512, 1024), (3, 3, 27, 3)
LAYERS, IMAGES, QUERIES = 10, 8, 100  # whose targets a step matches


def timed(run, repeats: int, threads: int) -> dict:
    clock = time.process_time if threads == 1 else time.perf_counter
    start = clock()
    run()
    first = clock() - start
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        times.append(clock() - start)
    return {"first_s": first, "best_s": min(times), "times_s": times, "peak_gib": peak_memory()}


def forward_jax(size: int, repeats: int, threads: int) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from conceptax.converters.parameters import OneKey
    from conceptax.flax_models.maft_plus import MaftPlus, MaftPlusConfig

    keys = OneKey()
    model = nnx.eval_shape(lambda: MaftPlus(MaftPlusConfig.base(), rngs=keys))
    graphdef, abstract = nnx.split(model)
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * 0.02),
        nnx.to_pure_dict(abstract),
    )
    images = jnp.asarray(rng.standard_normal((1, size, size, 3), np.float32))
    rows = jnp.asarray(rng.standard_normal((ROWS, 640), np.float32))

    @jax.jit
    def step(state, images, rows):
        out = nnx.merge(graphdef, state)(images, rows)
        return out.layers[-1], out.open_logits

    return timed(lambda: jax.block_until_ready(step(state, images, rows)), repeats, threads)


def forward_torch(size: int, repeats: int, threads: int) -> dict:
    import torch
    import transformers
    from transformers.models.mask2former import modeling_mask2former as hf

    torch.set_num_threads(threads)
    trunk_config = transformers.ConvNextConfig(
        hidden_sizes=list(DIMS), depths=list(DEPTHS), layer_norm_eps=1e-6
    )
    config = transformers.Mask2FormerConfig(decoder_layers=10)

    def random_module(make):
        with torch.device("meta"):
            module = make()
        module = module.to_empty(device="cpu").eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(std=0.02)
        return module

    trunk = random_module(lambda: transformers.ConvNextModel(trunk_config))
    pixel = random_module(lambda: hf.Mask2FormerPixelDecoder(config, DIMS))
    decoder = random_module(lambda: hf.Mask2FormerTransformerModule(256, config))
    images = torch.randn(1, 3, size, size)

    def run():
        with torch.inference_mode():
            maps = trunk(images, output_hidden_states=True).hidden_states[-4:]
            pixels = pixel(list(maps), return_dict=True)
            return decoder(list(pixels.multi_scale_features), pixels.mask_features)

    return timed(run, repeats, threads)


def sampling_inputs(size: int):
    import numpy as np

    rng = np.random.default_rng(0)
    layout = tuple((size // stride, size // stride) for stride in (32, 16, 8))
    tokens = sum(math.prod(grid) for grid in layout)
    values = rng.standard_normal((1, tokens, 8, 32), np.float32)
    centers = []
    for height, width in layout:
        y, x = np.meshgrid(
            (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij"
        )
        centers.append(np.stack([x, y], axis=-1).reshape(-1, 2))
    sizes = np.array([(width, height) for height, width in layout])[:, None]
    points = np.concatenate(centers)[None, :, None, None, None] * sizes - 0.5
    points = points + 2 * rng.standard_normal((1, tokens, 8, 3, 4, 2))
    weights = rng.random((1, tokens, 8, 3, 4), np.float32)
    return layout, sizes, values, points.astype(np.float32), weights


def dense_sampling(values, layout, points, weights):
    """All corners of all points of all queries at once: [B, Q, M, K, 4, D] for each map."""
    import jax.numpy as jnp

    total, first = 0.0, 0
    heads = jnp.arange(values.shape[2])[:, None]
    for level, (height, width) in enumerate(layout):
        flat = values[0, first : first + height * width]
        first += height * width
        x, y = points[..., level, :, 0], points[..., level, :, 1]
        found, factors = [], []
        for dy in (0, 1):
            for dx in (0, 1):
                i, j = jnp.floor(y) + dy, jnp.floor(x) + dx
                inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
                index = jnp.where(inside, i * width + j, 0).astype(jnp.int32)
                found.append(flat[index, heads])
                factors.append(jnp.where(inside, (1 - abs(y - i)) * (1 - abs(x - j)), 0))
        factor = jnp.stack(factors, -1) * weights[..., level, :, None]
        total = total + jnp.einsum("bqmkcd,bqmkc->bqmd", jnp.stack(found, -2), factor)
    return total


def sampling_jax(form: str, size: int, repeats: int, threads: int) -> dict:
    import jax

    from conceptax.flax_models.layers.bilinear import sample_levels

    layout, _, *arguments = sampling_inputs(size)
    method = sample_levels if form == "linear" else dense_sampling

    def call(values, points, weights):
        return method(values, layout, points, weights)

    forward = jax.jit(call)
    backward = jax.jit(jax.grad(lambda *a: call(*a).sum(), argnums=(0, 1, 2)))
    compiled = [f.lower(*arguments).compile() for f in (forward, backward)]
    kept = [c.memory_analysis().temp_size_in_bytes / 2**20 for c in compiled]
    one = timed(lambda: jax.block_until_ready(forward(*arguments)), repeats, threads)
    two = timed(lambda: jax.block_until_ready(backward(*arguments)), repeats, threads)
    return {
        "forward_s": one["best_s"],
        "forward_temporary_mib": kept[0],
        "gradient_s": two["best_s"],
        "gradient_temporary_mib": kept[1],
    }


def sampling_torch(size: int, repeats: int, threads: int) -> dict:
    import torch
    from transformers.models.mask2former import modeling_mask2former as hf

    torch.set_num_threads(threads)
    layout, sizes, values, points, weights = sampling_inputs(size)
    places = ((points + 0.5) / sizes).astype("float32")
    leaves = [torch.tensor(x, requires_grad=True) for x in (values, places, weights)]

    def call():
        return hf.multi_scale_deformable_attention(leaves[0], layout, leaves[1], leaves[2])

    def forward():
        with torch.inference_mode():
            call()

    one = timed(forward, repeats, threads)
    two = timed(lambda: call().sum().backward(), repeats, threads)
    return {"forward_s": one["best_s"], "gradient_s": two["best_s"]}


def matching(solver: str, targets: int, size: int, repeats: int, threads: int) -> dict:
    del size
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from conceptax.methods.segmentation.set_losses import match

    costs = jnp.asarray(np.random.default_rng(0).random((LAYERS, IMAGES, QUERIES, targets)))
    everything = jnp.ones((LAYERS, IMAGES, targets), bool)

    def on_device(each):
        queries, columns = optax.assignment.hungarian_algorithm(each)
        return jnp.zeros(targets, jnp.int32).at[columns].set(queries)

    find = {
        "scipy": jax.jit(lambda costs: match(costs, everything)),
        "optax": jax.jit(jax.vmap(jax.vmap(on_device))),
    }
    best, found = (
        float(jnp.take_along_axis(costs, each(costs)[:, :, None], axis=2).sum())
        for each in find.values()
    )
    if not math.isclose(best, found, rel_tol=1e-5):
        sys.exit(f"optax finds assignments of cost {found}, SciPy of {best}")
    run = find[solver]
    return timed(lambda: jax.block_until_ready(run(costs)), repeats, threads)


MEASUREMENTS = {
    "forward jax": forward_jax,
    "forward torch": forward_torch,
    "sampling jax linear": lambda *a: sampling_jax("linear", *a),
    "sampling jax dense": lambda *a: sampling_jax("dense", *a),
    "sampling torch": sampling_torch,
} | {
    f"matching {solver} {targets}": functools.partial(matching, solver, targets)
    for targets in (20, 60)
    for solver in ("scipy", "optax")
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", type=int, default=640, help="pixels of each side")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", choices=["forward", "sampling", "matching"])
    parser.add_argument("--write", action="store_true", help="keep the results beside this file")
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        result = MEASUREMENTS[options.measure](options.size, options.repeats, options.threads)
        print(json.dumps(result))
        return
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    if options.threads == 1:
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    results = {}
    for name in MEASUREMENTS:
        if options.only and not name.startswith(options.only):
            continue
        command = [sys.executable, __file__, "--measure", name]
        for flag in ("size", "repeats", "threads"):
            command += [f"--{flag}", str(getattr(options, flag))]
        results[name] = measured_alone(name, command, environment)
        numbers = {k: v for k, v in results[name].items() if not isinstance(v, list)}
        print(f"{name:20}", *(f"{k}={v:.2f}" for k, v in numbers.items()), flush=True)
    if options.write:
        record = {
            "date": date.today().isoformat(),
            "size": options.size,
            "threads": options.threads,
            "repeats": options.repeats,
            "clock": "processor time" if options.threads == 1 else "elapsed time",
            "versions": {name: version(name) for name in ("jax", "torch", "transformers")},
            "results": results,
        }
        path = RESULTS / f"maft_plus_{options.size}.json"
        write_records(path, record)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
