"""Stable Diffusion's models, JAX against PyTorch; and what the sampler adds to its model.

    python benchmarks/stable_diffusion.py                     # every task, float32, this device
    python benchmarks/stable_diffusion.py --tasks unet vae --image 1024
    python benchmarks/stable_diffusion.py --size tiny         # seconds instead of minutes
    python benchmarks/stable_diffusion.py --dtype bfloat16

Tasks: a product of two square matrices of 2,048 and a 3x3 convolution of 320 channels (`product`,
`convolution`), as the machine's limit; a forward pass of SD-1.5's UNet and of SDXL's (`unet`,
`unet-xl`), an image decoded (`vae`), 64 texts encoded (`text`), one AdamW update of the text
encoder through the frozen UNet, as SAGE does it, without and with recomputed activations (`step`,
`step-remat`), and a guided DDIM step of SD-1.5 beside its UNet alone (`sampler`, in JAX only).

Every measurement runs in a process of its own (so that peak memory is its own), one after
another: JAX jitted, torch eager, torch.compile. On a CPU, JAX in bfloat16 comes thrice: as it
chooses (`jax`), widened to float32 as XLA does, and by the CPU's own instructions (`native`).
Text is 77 tokens, weights are random. First the UNets of both frameworks are compared on the same
weights at the tiny size; the full-size comparison is `make test-full`'s. A run replaces its tasks
in the results file and leaves the others.
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

from _processes import peak_memory

from conceptax.reporting.results import write_records

RESULTS = Path(__file__).parent / "results"
ENGINES = ("jax", "widened", "native", "eager", "compile")
OF_BFLOAT16 = ENGINES[1:3]
TASKS = (
    "product",
    "convolution",
    "unet",
    "unet-xl",
    "vae",
    "text",
    "step",
    "step-remat",
    "sampler",
)
TEXTS, LENGTH = 64, 77
SAMPLER_STEPS = 4

CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
UNET = {
    "down_block_types": (CROSS[0],) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + (CROSS[1],) * 3,
    "attention_head_dim": 8,
}
UNET_XL = {
    "down_block_types": ("DownBlock2D",) + (CROSS[0],) * 2,
    "up_block_types": (CROSS[1],) * 2 + ("UpBlock2D",),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
VAE = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
TEXT = {"vocab_size": 49408, "eos_token_id": 49407}
CONFIGS = {
    "full": {
        "unet": {
            **UNET,
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 768,
        },
        "unet-xl": {
            **UNET_XL,
            "block_out_channels": (320, 640, 1280),
            "cross_attention_dim": 2048,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": {**VAE, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
        "text": {
            **TEXT,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
    },
    "tiny": {
        "unet": {**UNET, "block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 64},
        "unet-xl": {
            **UNET_XL,
            "block_out_channels": (32, 64, 64),
            "cross_attention_dim": 64,
            "attention_head_dim": (2, 4, 4),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 96,
        },
        "vae": {**VAE, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
        "text": {
            **TEXT,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
    },
}


PRODUCT = {"full": 2048, "tiny": 256}
CONVOLVED = {"full": (64, 320), "tiny": (16, 32)}  # side of the image, channels


def operations(task: str, size: str) -> int | None:
    """Additions and multiplications, of the tasks that are one product."""
    if task == "product":
        return 2 * PRODUCT[size] ** 3
    side, channels = CONVOLVED[size]
    return 2 * side**2 * 9 * channels**2 if task == "convolution" else None


def pooled_size(xl: dict) -> int:
    """Features of SDXL's pooled text: what six embedded sizes leave of the projection's input."""
    return xl["projection_class_embeddings_input_dim"] - 6 * xl["addition_time_embed_dim"]


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
        "first_s": first,
        "median_s": statistics.median(times),
        "best_s": min(times),
        "repeats": repeats,
        "peak_gib": peak_memory(),
    }


# ---- JAX ----


class JaxTasks:
    """What each task runs, compiled, as a function without arguments."""

    def __init__(self, size: str, dtype: str, image: int) -> None:
        import jax.numpy as jnp
        import numpy as np

        self.size, self.configs, self.latent = size, CONFIGS[size], image // 8
        self.dtype = jnp.dtype(dtype)
        self.rng = np.random.default_rng(0)

    def normal(self, *shape: int):
        import jax.numpy as jnp
        import numpy as np

        return jnp.asarray(self.rng.standard_normal(shape, np.float32), self.dtype)

    def model(self, kind, config, **settings):
        """Graph definition and random parameters."""
        import jax
        from flax import nnx

        make = functools.partial(kind, config, dtype=self.dtype, param_dtype=self.dtype, **settings)
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
        return graphdef, jax.tree.map(
            lambda leaf: 0.02 * self.normal(*leaf.shape), nnx.to_pure_dict(abstract)
        )

    def denoiser(self, name: str = "unet", **settings):
        from conceptax.flax_models.unet_2d_condition import (
            UNet2DConditionConfig,
            UNet2DConditionModel,
        )

        config = UNet2DConditionConfig(**self.configs[name])
        return self.model(UNet2DConditionModel, config, **settings)

    def text_encoder(self, **settings):
        from conceptax.flax_models.clip import CLIPTextConfig, CLIPTextModel

        return self.model(CLIPTextModel, CLIPTextConfig(**self.configs["text"]), **settings)

    def forward(self, name: str):
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from conceptax.flax_models.unet_2d_condition import TextCondition

        graphdef, params = self.denoiser(name)
        config = self.configs[name]
        condition = self.normal(1, LENGTH, config["cross_attention_dim"])
        if name == "unet-xl":
            time_ids = jnp.asarray([[512.0, 512, 0, 0, 512, 512]])
            condition = TextCondition(condition, self.normal(1, pooled_size(config)), time_ids)
        x, t = self.normal(1, self.latent, self.latent, 4), jnp.asarray([500])
        step = jax.jit(lambda params, x, c: nnx.merge(graphdef, params)(x, t, c))
        return lambda: step(params, x, condition)

    def product(self):
        import jax

        from conceptax.kernels.products import dot_general

        sides = (PRODUCT[self.size],) * 2
        given = self.normal(*sides), self.normal(*sides)
        product = jax.jit(lambda a, b: dot_general(a, b, (((1,), (0,)), ((), ()))))
        return lambda: product(*given)

    def convolution(self):
        import jax
        from flax import nnx

        from conceptax.flax_models.layers.resnet import conv3x3

        side, channels = CONVOLVED[self.size]
        layer = conv3x3(channels, channels, dtype=self.dtype, rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(layer)
        x = self.normal(1, side, side, channels)
        call = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))
        return lambda: call(params, x)

    def vae(self):
        import jax
        from flax import nnx

        from conceptax.flax_models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

        graphdef, params = self.model(AutoencoderKL, AutoencoderKLConfig(**self.configs["vae"]))
        latents = self.normal(1, self.latent, self.latent, 4)
        decode = jax.jit(lambda params, x: nnx.merge(graphdef, params).decode(x))
        return lambda: decode(params, latents)

    def text(self):
        import jax
        from flax import nnx

        graphdef, params = self.text_encoder()
        ids = self.rng.integers(0, 49000, (TEXTS, LENGTH))
        encode = jax.jit(lambda params, ids: nnx.merge(graphdef, params)(ids).last_hidden_state)
        return lambda: encode(params, ids)

    def step(self, *, remat: bool):
        import jax
        import jax.numpy as jnp
        import optax
        from flax import nnx

        from conceptax.kernels.memory import compiler_options
        from conceptax.methods.training import TrainState, apply_gradients, init_state

        unet_def, unet = self.denoiser(remat=remat)
        text_def, text = self.text_encoder(remat=remat)
        optimizer = optax.adamw(1e-5)
        x, t = self.normal(1, self.latent, self.latent, 4), jnp.asarray([500])
        ids = self.rng.integers(0, 49000, (1, LENGTH))

        def update(state: TrainState, unet, x, ids):
            def loss_of(params):
                context = nnx.merge(text_def, params)(ids).last_hidden_state
                return jnp.mean(nnx.merge(unet_def, unet)(x, t, context).astype(jnp.float32) ** 2)

            return apply_gradients(state, jax.grad(loss_of)(state.params), optimizer)

        compiled = jax.jit(update, donate_argnums=0, compiler_options=compiler_options())
        holder = [init_state(text, optimizer)]

        def run():
            holder[0] = compiled(holder[0], unet, x, ids)
            return holder[0].step

        return run

    def sampler(self):
        """The whole run of a few steps, and that many of the bare model's."""
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from conceptax.methods.diffusion.text_to_image import sample_latents
        from conceptax.methods.sampling import NoiseSchedule, make_sampler

        graphdef, params = self.denoiser()
        schedule = NoiseSchedule.from_config({"steps_offset": 1, "clip_sample": False})
        sampler = make_sampler(schedule, "ddim", num_inference_steps=SAMPLER_STEPS)
        texts = self.normal(2, LENGTH, self.configs["unet"]["cross_attention_dim"])
        noise, t = self.normal(1, self.latent, self.latent, 4), jnp.asarray([500])
        whole = jax.jit(
            lambda params, texts, noise: sample_latents(
                graphdef, params, texts[1:], texts[:1], noise, sampler, 7.5
            )
        )
        bare = jax.jit(lambda params, texts, x: nnx.merge(graphdef, params)(x, t, texts))
        pair = jnp.concatenate([noise, noise])

        def model_alone():
            for _ in range(SAMPLER_STEPS):
                out = bare(params, texts, pair).block_until_ready()
            return out

        return lambda: whole(params, texts, noise), model_alone


def measure_jax(
    task: str, size: str, dtype: str, image: int, repeats: int, *, engine: str = "jax"
) -> dict:
    import jax

    from conceptax.kernels import products

    if engine in OF_BFLOAT16:
        products.fast_bfloat16 = lambda: engine == "native"
    tasks = JaxTasks(size, dtype, image)
    if task == "sampler":
        # In turns, so that a change of the machine's speed meets both.
        runs = tasks.sampler()
        for run in runs:
            jax.block_until_ready(run())
        times = [[], []]
        for _ in range(repeats):
            for run, those in zip(runs, times, strict=True):
                start = time.perf_counter()
                jax.block_until_ready(run())
                those.append((time.perf_counter() - start) / SAMPLER_STEPS)
        result = {
            "median_s": statistics.median(times[0]),
            "best_s": min(times[0]),
            "model_best_s": min(times[1]),
            "overhead": min(times[0]) / min(times[1]) - 1,
            "repeats": repeats,
            "peak_gib": peak_memory(),
        }
    else:
        run = {
            "product": tasks.product,
            "convolution": tasks.convolution,
            "unet": functools.partial(tasks.forward, "unet"),
            "unet-xl": functools.partial(tasks.forward, "unet-xl"),
            "vae": tasks.vae,
            "text": tasks.text,
            "step": functools.partial(tasks.step, remat=False),
            "step-remat": functools.partial(tasks.step, remat=True),
        }[task]()
        result = timed(run, jax.block_until_ready, repeats)
    device = jax.devices()[0]
    if device.platform != "cpu":
        result["peak_gib"] = device.memory_stats()["peak_bytes_in_use"] / 2**30
    return result | {"device": device.device_kind}


# ---- PyTorch ----


class TorchTasks:
    """What each task runs as a function without arguments; `compiled` wraps what is called."""

    def __init__(self, size: str, dtype: str, image: int, *, compiled: bool) -> None:
        import torch

        self.size, self.configs, self.latent = size, CONFIGS[size], image // 8
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = getattr(torch, dtype)
        self.wrap = torch.compile if compiled else lambda call: call

    def normal(self, *shape: int):
        import torch

        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def model(self, make):
        import torch

        with torch.device("meta"):
            model = make()
        model = model.to(self.dtype).to_empty(device=self.device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
            for name, buffer in model.named_buffers():
                if name.endswith("position_ids"):
                    buffer.copy_(torch.arange(buffer.shape[-1])[None])
        return model

    def denoiser(self, name: str = "unet"):
        import diffusers

        model = self.model(lambda: diffusers.UNet2DConditionModel(**self.configs[name]))
        return model.requires_grad_(False)

    def text_encoder(self):
        import transformers

        config = transformers.CLIPTextConfig(**self.configs["text"])
        return self.model(lambda: transformers.CLIPTextModel(config))

    def inference(self, call):
        import torch

        def run():
            with torch.inference_mode():
                return call()

        return run

    def forward(self, name: str):
        import torch

        config = self.configs[name]
        forward = self.wrap(self.denoiser(name))
        x, t = self.normal(1, 4, self.latent, self.latent), torch.tensor([500], device=self.device)
        context = self.normal(1, LENGTH, config["cross_attention_dim"])
        added = None
        if name == "unet-xl":
            time_ids = torch.tensor([[512.0, 512, 0, 0, 512, 512]], device=self.device)
            added = {"text_embeds": self.normal(1, pooled_size(config)), "time_ids": time_ids}
        return self.inference(lambda: forward(x, t, context, added_cond_kwargs=added).sample)

    def product(self):
        sides = (PRODUCT[self.size],) * 2
        a, b = self.normal(*sides), self.normal(*sides)
        product = self.wrap(lambda a, b: a @ b)
        return self.inference(lambda: product(a, b))

    def convolution(self):
        import torch

        side, channels = CONVOLVED[self.size]
        layer = self.model(lambda: torch.nn.Conv2d(channels, channels, 3, padding=1))
        layer = self.wrap(layer.to(memory_format=torch.channels_last))
        x = self.normal(1, channels, side, side).to(memory_format=torch.channels_last)
        return self.inference(lambda: layer(x))

    def vae(self):
        import diffusers

        model = self.model(lambda: diffusers.AutoencoderKL(**self.configs["vae"]))
        decode = self.wrap(model.decode)
        latents = self.normal(1, 4, self.latent, self.latent)
        return self.inference(lambda: decode(latents).sample)

    def text(self):
        import torch

        encode = self.wrap(self.text_encoder())
        ids = torch.randint(0, 49000, (TEXTS, LENGTH), device=self.device)
        return self.inference(lambda: encode(input_ids=ids).last_hidden_state)

    def step(self, *, remat: bool):
        import torch

        unet, text = self.denoiser(), self.text_encoder()
        if remat:
            unet.train().enable_gradient_checkpointing()
            text.train().gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(text.parameters(), lr=1e-5)
        x, t = self.normal(1, 4, self.latent, self.latent), torch.tensor([500], device=self.device)
        ids = torch.randint(0, 49000, (1, LENGTH), device=self.device)

        def loss_of():
            context = text(input_ids=ids).last_hidden_state
            return (unet(x, t, context).sample.float() ** 2).mean()

        loss_fn = self.wrap(loss_of)

        def run():
            optimizer.zero_grad()
            loss_fn().backward()
            optimizer.step()

        return run


def measure_torch(
    task: str, size: str, dtype: str, image: int, repeats: int, *, compiled: bool
) -> dict:
    import torch

    tasks = TorchTasks(size, dtype, image, compiled=compiled)
    run = {
        "product": tasks.product,
        "convolution": tasks.convolution,
        "unet": functools.partial(tasks.forward, "unet"),
        "unet-xl": functools.partial(tasks.forward, "unet-xl"),
        "vae": tasks.vae,
        "text": tasks.text,
        "step": functools.partial(tasks.step, remat=False),
        "step-remat": functools.partial(tasks.step, remat=True),
    }[task]()

    def wait(_):
        if tasks.device == "cuda":
            torch.cuda.synchronize()

    result = timed(run, wait, repeats)
    if tasks.device == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    name = torch.cuda.get_device_name() if tasks.device == "cuda" else "cpu"
    return result | {"device": name, "threads": torch.get_num_threads()}


# ---- the run ----


def check_agreement(name: str) -> float:
    """Relative difference of both frameworks' tiny UNets on the same weights."""
    import tempfile

    import diffusers
    import numpy as np
    import torch

    from conceptax.converters import load_pytorch
    from conceptax.flax_models.unet_2d_condition import TextCondition

    config = CONFIGS["tiny"][name]
    module = diffusers.UNet2DConditionModel(**config).eval()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 16, 16, 4)).astype(np.float32)
    texts = rng.standard_normal((1, LENGTH, config["cross_attention_dim"])).astype(np.float32)
    condition, added = texts, None
    if name == "unet-xl":
        pooled = rng.standard_normal((1, pooled_size(config))).astype(np.float32)
        time_ids = np.array([[512, 512, 0, 0, 512, 512]], np.float32)
        condition = TextCondition(texts, pooled, time_ids)
        added = {"text_embeds": torch.tensor(pooled), "time_ids": torch.tensor(time_ids)}
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        received = np.asarray(load_pytorch(folder)(x, np.array([500]), condition))
    with torch.inference_mode():
        expected = module(
            torch.tensor(x).permute(0, 3, 1, 2),
            torch.tensor([500]),
            torch.tensor(texts),
            added_cond_kwargs=added,
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
    parser.add_argument("--size", choices=CONFIGS, default="full")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--image", type=int, default=512, help="side of an image in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--engines", nargs="+", choices=ENGINES)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("TASK", "ENGINE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    if arguments.one:
        task, engine = arguments.one
        rest = (task, arguments.size, arguments.dtype, arguments.image, arguments.repeats)
        if engine in ("jax", *OF_BFLOAT16):
            result = measure_jax(*rest, engine=engine)
        else:
            result = measure_torch(*rest, compiled=engine == "compile")
        print(json.dumps(result))
        return

    alike = OF_BFLOAT16 if arguments.dtype == "float32" else ()
    engines = arguments.engines or [name for name in ENGINES if name not in alike]
    agreement = {name: check_agreement(name) for name in ("unet", "unet-xl")}
    if not all(difference < 1e-4 for difference in agreement.values()):
        sys.exit(f"the UNets disagree, nothing is measured; relative differences: {agreement}")
    output = arguments.output or (
        RESULTS / f"stable_diffusion_{arguments.size}_{arguments.dtype}.json"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    packages = ("jax", "flax", "torch", "diffusers", "transformers")
    report = {
        "benchmark": "stable_diffusion",
        "size": arguments.size,
        "dtype": arguments.dtype,
        "agreement": agreement,
        "versions": {p: version(p) for p in packages},
        "rows": json.loads(output.read_text())["rows"] if output.exists() else [],
    }
    for task in arguments.tasks:
        rows = []
        for engine in engines if task != "sampler" else ("jax",):
            row = {
                "task": task,
                "engine": engine,
                "image": arguments.image,
                "cpu": cpu_name(),
                "date": date.today().isoformat(),
            }
            command = [
                sys.executable,
                __file__,
                "--size",
                arguments.size,
                "--dtype",
                arguments.dtype,
                "--image",
                str(arguments.image),
                "--repeats",
                str(arguments.repeats),
                "--one",
                task,
                engine,
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                row["error"] = done.stderr[-600:]
                print(task, engine, "failed:", row["error"], file=sys.stderr)
            else:
                row |= json.loads(done.stdout.splitlines()[-1])
                print(f"measured {task} {engine}: {row['best_s']:.3f} s", file=sys.stderr)
            rows.append(row)
        measured = {(row["task"], row["engine"]) for row in rows}
        rows += [row for row in report["rows"] if (row["task"], row["engine"]) not in measured]
        rows.sort(key=lambda row: (TASKS.index(row["task"]), ENGINES.index(row["engine"])))
        report["rows"] = rows
        write_records(output, report)  # each task once it is done
    show(report)


def show(report: dict) -> None:
    good = [row for row in report["rows"] if "error" not in row]
    jax_s = {row["task"]: row["median_s"] for row in good if row["engine"] == "jax"}
    print(f"\n{report['size']} size, {report['dtype']}, {cpu_name()}")
    columns = "task", "engine", "image", "first s", "median s", "best s", "peak GiB", "jax / it"
    print(("{:12}{:9}" + "{:>10}" * 6).format(*columns))
    for row in report["rows"]:
        head = f"{row['task']:12}{row['engine']:9}{row['image']:10}"
        if "error" in row:
            print(f"{head}  failed")
            continue
        ratio = jax_s.get(row["task"], float("nan")) / row["median_s"]
        print(
            f"{head}{row.get('first_s', float('nan')):10.1f}{row['median_s']:10.3f}"
            f"{row['best_s']:10.3f}{row['peak_gib']:10.2f}{ratio:10.2f}"
        )
        if counted := operations(row["task"], report["size"]):
            print(f"  {counted / row['best_s'] / 1e9:.0f} GFLOP/s at best")
        if "overhead" in row:
            print(f"  a step is {100 * row['overhead']:.1f} % above its model alone")


if __name__ == "__main__":
    main()
