"""Stable Diffusion 1.5 speed: UNet forward and a text-encoder training step, JAX against PyTorch.

    python benchmarks/sd15.py                       # full size, float32, this machine's device
    python benchmarks/sd15.py --size tiny           # seconds instead of minutes
    python benchmarks/sd15.py --dtype bfloat16      # meant for a GPU

Every measurement runs in a process of its own (so that peak memory is its own), one after another:
JAX jitted, torch eager, torch.compile.  Latents are 64x64, text 77 tokens, weights random.  The
training step is one AdamW update of the text encoder through the frozen UNet, as SAGE does it.
First all three forward passes are compared on the same weights at the tiny size; the full-size
comparison is `make test-full`'s.
"""

import argparse
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SIZES = {
    "full": {"latent": 64, "length": 77},
    "tiny": {"latent": 16, "length": 77},
}
TINY_UNET = {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 64}
TINY_TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
FULL_TEXT = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12,
}  # fmt: skip
FULL_UNET = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768}
COMMON_UNET = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}


def configs(size: str) -> tuple[dict, dict]:
    unet, text = (FULL_UNET, FULL_TEXT) if size == "full" else (TINY_UNET, TINY_TEXT)
    return {**COMMON_UNET, **unet}, {**text, "vocab_size": 49408, "eos_token_id": 49407}


def peak_memory() -> float:
    """Peak resident memory of this process, GiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 2**20
    return float("nan")


def timed(run, wait, repeats: int) -> dict:
    start = time.perf_counter()
    wait(run())
    first = time.perf_counter() - start
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        wait(run())
        times.append(time.perf_counter() - start)
    return {
        "first_s": first, "median_s": statistics.median(times), "best_s": min(times),
        "repeats": repeats, "peak_gib": peak_memory(),
    }  # fmt: skip


def measure_jax(task: str, size: str, dtype: str, repeats: int) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx

    from conceptax.flax_models.clip import CLIPTextConfig, CLIPTextModel
    from conceptax.flax_models.unet_2d_condition import (
        UNet2DConditionConfig,
        UNet2DConditionModel,
    )
    from conceptax.methods.training import TrainState, apply_gradients, init_state

    unet_config, text_config = configs(size)
    kind = jnp.dtype(dtype)
    settings = {"dtype": kind, "param_dtype": kind}
    rng = np.random.default_rng(0)

    def random_model(make):
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
        fill = lambda leaf: jnp.asarray(  # noqa: E731
            rng.standard_normal(leaf.shape, np.float32) * 0.02, leaf.dtype
        )
        return graphdef, jax.tree.map(fill, nnx.to_pure_dict(abstract))

    unet_def, unet = random_model(
        functools.partial(UNet2DConditionModel, UNet2DConditionConfig(**unet_config), **settings)
    )
    latent, length = SIZES[size]["latent"], SIZES[size]["length"]
    x = jnp.asarray(rng.standard_normal((1, latent, latent, 4)), kind)
    t = jnp.asarray([500])

    if task == "forward":
        context = jnp.asarray(
            rng.standard_normal((1, length, unet_config["cross_attention_dim"])), kind
        )
        step = jax.jit(lambda p, x, c: nnx.merge(unet_def, p)(x, t, c))
        run = lambda: step(unet, x, context)  # noqa: E731
    else:
        text_def, text = random_model(
            functools.partial(CLIPTextModel, CLIPTextConfig(**text_config), **settings)
        )
        optimizer = optax.adamw(1e-5)
        ids = jnp.asarray(rng.integers(0, 49000, (1, length)))

        def update(state: TrainState, unet, x, ids):
            def loss_of(params):
                context = nnx.merge(text_def, params)(ids).last_hidden_state
                return jnp.mean(nnx.merge(unet_def, unet)(x, t, context).astype(jnp.float32) ** 2)

            return apply_gradients(state, jax.grad(loss_of)(state.params), optimizer)

        step = jax.jit(update, donate_argnums=0)
        holder = [init_state(text, optimizer)]

        def run():
            holder[0] = step(holder[0], unet, x, ids)
            return holder[0].step

    result = timed(run, jax.block_until_ready, repeats)
    device = jax.devices()[0]
    if device.platform != "cpu":
        result["peak_gib"] = device.memory_stats()["peak_bytes_in_use"] / 2**30
    return result | {"device": device.device_kind}


def measure_torch(task: str, size: str, dtype: str, repeats: int, compiled: bool) -> dict:
    import diffusers
    import torch
    import transformers

    unet_config, text_config = configs(size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype)

    def random_model(make):
        with torch.device("meta"):
            model = make()
        model = model.to(kind).to_empty(device=device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
            for name, buffer in model.named_buffers():
                if name.endswith("position_ids"):
                    buffer.copy_(torch.arange(buffer.shape[-1])[None])
        return model

    unet = random_model(lambda: diffusers.UNet2DConditionModel(**unet_config, attention_head_dim=8))
    unet.requires_grad_(False)
    latent, length = SIZES[size]["latent"], SIZES[size]["length"]
    x = torch.randn(1, 4, latent, latent, device=device, dtype=kind)
    t = torch.tensor([500], device=device)

    if task == "forward":
        context = torch.randn(
            1, length, unet_config["cross_attention_dim"], device=device, dtype=kind
        )
        forward = torch.compile(unet) if compiled else unet

        def run():
            with torch.inference_mode():
                return forward(x, t, context).sample
    else:
        text = random_model(
            lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**text_config))
        )
        optimizer = torch.optim.AdamW(text.parameters(), lr=1e-5)
        ids = torch.randint(0, 49000, (1, length), device=device)

        def loss_of():
            context = text(input_ids=ids).last_hidden_state
            return (unet(x, t, context).sample.float() ** 2).mean()

        loss_fn = torch.compile(loss_of) if compiled else loss_of

        def run():
            optimizer.zero_grad()
            loss_fn().backward()
            optimizer.step()

    def wait(_):
        if device == "cuda":
            torch.cuda.synchronize()

    result = timed(run, wait, repeats)
    if device == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return result | {"device": name, "threads": torch.get_num_threads()}


def check_agreement() -> float:
    """Largest relative difference of the two tiny UNets on the same weights."""
    import tempfile

    import diffusers
    import numpy as np
    import torch

    from conceptax.converters import load_pytorch

    module = diffusers.UNet2DConditionModel(**configs("tiny")[0], attention_head_dim=8).eval()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 16, 16, 4)).astype(np.float32)
    context = rng.standard_normal((1, 77, 64)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        received = np.asarray(load_pytorch(folder)(x, np.array([500]), context))
    with torch.inference_mode():
        expected = module(
            torch.tensor(x).permute(0, 3, 1, 2), torch.tensor([500]), torch.tensor(context)
        ).sample
    expected = expected.permute(0, 2, 3, 1).numpy()
    return float(np.linalg.norm(received - expected) / np.linalg.norm(expected))


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", default=["forward", "step"])
    parser.add_argument("--engines", nargs="+", default=["jax", "eager", "compile"])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("TASK", "ENGINE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    if arguments.one:
        task, engine = arguments.one
        rest = (task, arguments.size, arguments.dtype, arguments.repeats)
        if engine == "jax":
            result = measure_jax(*rest)
        else:
            result = measure_torch(*rest, compiled=engine == "compile")
        print(json.dumps(result))
        return

    difference = check_agreement()
    if not difference < 1e-4:
        sys.exit(f"the two UNets disagree: relative difference {difference:.2e}; nothing measured.")
    rows = []
    for task in arguments.tasks:
        for engine in arguments.engines:
            command = [
                sys.executable, __file__, "--size", arguments.size, "--dtype", arguments.dtype,
                "--repeats", str(arguments.repeats), "--one", task, engine,
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                rows.append({"task": task, "engine": engine, "error": done.stderr[-600:]})
                print(task, engine, "failed:", done.stderr[-600:], file=sys.stderr)
                continue
            row = {"task": task, "engine": engine, **json.loads(done.stdout.splitlines()[-1])}
            rows.append(row)
            print(f"measured {task} {engine}: {row['median_s']:.3f} s", file=sys.stderr)
    report = {
        "benchmark": "sd15", "date": date.today().isoformat(), "size": arguments.size,
        "dtype": arguments.dtype, "cpu": cpu_name(), "agreement": difference,
        "versions": {p: version(p) for p in ("jax", "flax", "torch", "diffusers", "transformers")},
        "rows": rows,
    }  # fmt: skip
    output = arguments.output or RESULTS / f"sd15_{arguments.size}_{arguments.dtype}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")

    base = {
        row["task"]: row["median_s"]
        for row in rows
        if row["engine"] == "jax" and "error" not in row
    }
    print(f"\nSD-1.5 {arguments.size}, {arguments.dtype}, {cpu_name()}, {report['date']}")
    print(f"{'task':9}{'engine':9}{'first s':>9}{'median s':>10}{'peak GiB':>10}{'jax / it':>10}")
    for row in rows:
        if "error" in row:
            print(f"{row['task']:9}{row['engine']:9}  failed")
            continue
        ratio = base.get(row["task"], float("nan")) / row["median_s"]
        print(
            f"{row['task']:9}{row['engine']:9}{row['first_s']:9.1f}{row['median_s']:10.3f}"
            f"{row['peak_gib']:10.2f}{ratio:10.2f}"
        )


if __name__ == "__main__":
    main()
