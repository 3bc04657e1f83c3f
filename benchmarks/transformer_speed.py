"""Diffusion transformers' speed: FLUX.1's blocks in JAX and torch, and what sparsity gains of it.

    python benchmarks/transformer_speed.py                        # 2 + 2 blocks, this machine's CPU
    python benchmarks/transformer_speed.py --sides 64 --dtypes float32 --engines jax
    python benchmarks/transformer_speed.py --size tiny            # seconds, to try the script
    python benchmarks/transformer_speed.py --gpu                  # whole models on one H200

On a CPU: `FluxTransformer2DModel` with two double and two single blocks of full width, random
weights and 512 tokens of text; torch eager and compiled each in a process of their own, JAX in a
third, where dense and neighborhood attention (GNA) take turns with one large product and one
attention, whose rates give the prediction (`simulate_model`).  With --gpu: FLUX.1 at 4K and
FLUX.2-klein at 1K and 4K as wholes, in JAX alone, bfloat16, one attention after the other until the
minutes are over; dense attention is cuDNN's there, and a row says how often its program calls it.

Results are checked first, at a tiny size: JAX against torch on the same weights, GNA whose window
is the whole grid against dense attention, and GNA against its reference.  A run replaces its rows
in the results file and leaves the others; tables come last.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from _processes import peak_memory

from conceptax.kernels.gna.presets import PRESETS, Preset
from conceptax.kernels.gna.simulator import simulate_model
from conceptax.kernels.gna.simulator.whole_model import speedups
from conceptax.reporting.results import environment, write_records

RESULTS = Path(__file__).parent / "results"
ENGINES = ("jax", "eager", "compile")
OWN = "dense, own kernel"


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a model with two double and two single blocks, as both libraries' configs say it."""

    config: dict[str, Any]
    text: int
    sides: tuple[int, ...]

    @property
    def model(self) -> dict[str, Any]:
        return {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True, **self.config}


SIZES = {
    "full": Size({}, 512, (64, 128)),
    "tiny": Size(
        {
            **{"in_channels": 8, "attention_head_dim": 16, "num_attention_heads": 2},
            **{"joint_attention_dim": 32, "pooled_projection_dim": 24},
            "axes_dims_rope": (4, 6, 6),
        },
        8,
        (16, 32),
    ),
}


def windows(side: int) -> dict[str, tuple[int, int]]:
    """Window and stride along a side, as large a part of it as the preset's is of its own."""
    found = {}
    for name in ("flux-4k", "flux-2k"):
        preset = PRESETS[name]
        length = preset.layout[0]
        window, stride = (each[0] * side // length for each in (preset.window, preset.stride))
        found[f"GNA {window}x{window}, stride {stride}"] = (window, stride)
    return found


def preset_of(config: Any, text: int, side: int, window: int, stride: int) -> Preset:
    """What the simulator is asked: this model, every step of which is sparse."""
    # Squares of the width: projections and a perceptron of 4, or a gated one (FLUX.2).
    squares = 4 + int(3 * config.mlp_ratio) if hasattr(config, "mlp_ratio") else 12
    weights = squares * (config.num_attention_heads * config.attention_head_dim) ** 2
    model = dataclasses.replace(
        PRESETS["flux-4k"].model,
        heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        layers=config.num_layers + config.num_single_layers,
        text=text,
        weights=weights,
        text_weights=weights,
    )
    return Preset((window,) * 2, (stride,) * 2, layout=(side, side), model=model, steps=1)


# ---- JAX ----


class JaxModel:
    """A FLUX-type model with random weights, and what it is called with."""

    def __init__(self, config: Any, text: int, side: int, dtype: str) -> None:
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from conceptax.flax_models.layers.joint_attention import JointTextCondition

        self.config, self.text, self.side, self.dtype = config, text, side, jnp.dtype(dtype)
        self.keys = iter(jax.random.split(jax.random.key(0), 1 << 16))
        self.draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
        _, abstract = self.split(None)
        shapes = nnx.to_pure_dict(abstract)
        self.params = jax.tree.map(lambda leaf: 0.02 * self.normal(*leaf.shape), shapes)
        self.latents = self.normal(1, side, side, config.in_channels)
        pooled = getattr(config, "pooled_projection_dim", None)
        self.condition = JointTextCondition(
            self.normal(1, text, config.joint_attention_dim),
            pooled and self.normal(1, pooled),
            jnp.full((1,), 3.5) if config.guidance_embeds else None,
        )

    def normal(self, *shape: int) -> Any:
        return self.draw(next(self.keys), shape, self.dtype)

    def split(self, attention: Any) -> tuple[Any, Any]:
        from flax import nnx

        from conceptax.flax_models.flux_2_transformer_2d import Flux2Transformer2DModel
        from conceptax.flax_models.flux_transformer_2d import FluxTransformer2DModel

        classes = (FluxTransformer2DModel, Flux2Transformer2DModel)
        (kind,) = (each for each in classes if each.config_class is type(self.config))
        kinds = {"dtype": self.dtype, "param_dtype": self.dtype}
        make = functools.partial(kind, self.config, attention=attention, **kinds)
        return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))

    def forward(self, attention: Any) -> tuple[Callable[[], Any], dict[str, Any]]:
        """A compiled forward pass, and what its program says of itself.

        That is the GiB that it takes with its parameters, and its calls of cuDNN's attention.
        """
        import jax
        from flax import nnx

        graphdef, _ = self.split(attention)
        given = self.params, self.latents, self.condition
        call = jax.jit(lambda params, x, c: nnx.merge(graphdef, params)(x, 500.0, c))
        compiled = call.lower(*given).compile()
        sizes = compiled.memory_analysis()
        names = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
        held = sum(getattr(sizes, name) for name in names)
        calls = (compiled.as_text() or "").count('custom_call_target="__cudnn$fmha')
        return lambda: compiled(*given), {"program_gib": held / 2**30, "cudnn_calls": calls}

    def gna(self, window: int, stride: int = 1, implementation: str | None = None) -> Any:
        from conceptax.flax_models.layers.attention import GNA

        return GNA((window,) * 2, (stride,) * 2, implementation=implementation)

    def rates(self, attentions: dict[str, Any]) -> dict[str, Callable[[], Any]]:
        """One large product, that of a feed-forward, and one attention of each kind."""
        import jax

        from conceptax.flax_models.layers.joint_attention import JointSequence

        heads, dim = self.config.num_attention_heads, self.config.attention_head_dim
        tokens, width = self.side**2 + self.text, heads * dim
        x, weights = self.normal(tokens, width), self.normal(width, 4 * width)
        qkv = [self.normal(1, tokens, heads, dim) for _ in range(3)]
        sequence = JointSequence((self.side, self.side))
        product = jax.jit(lambda x, weights: x @ weights)
        calls: dict[str, Callable[[], Any]] = {"product": lambda: product(x, weights)}
        for name, attention in attentions.items():
            attend = jax.jit(lambda q, k, v, setting=attention: sequence.attend(q, k, v, setting))
            calls[f"attention, {name}"] = functools.partial(attend, *qkv)
        return calls

    def predicted(self, window: int, stride: int, timings: dict, name: str) -> dict:
        """The gain end to end that the measured rates let one expect, and how it comes about."""
        asked = preset_of(self.config, self.text, self.side, window, stride)
        seconds = {each: timing.median for each, timing in timings.items()}
        dense = seconds["attention, dense"]
        one = asked.model.operations(self.side**2).attention / asked.model.layers
        product = 8.0 * (self.side**2 + self.text) * asked.model.width**2
        rates = {"linear_rate": product / seconds["product"], "attention_rate": one / dense}
        result = simulate_model(asked, **{key: rate / 1e12 for key, rate in rates.items()})
        bound = speedups(result.with_text)["pairs"]
        kernel = dense / seconds[f"attention, {name}"]
        return {
            **rates,
            "attention_share": result.attention_share,
            "pairs_bound": bound,
            "kernel": kernel,
            "predicted": result.end_to_end(min(bound, kernel)),
            "predicted_bound": result.end_to_end(bound),
        }


def measure_jax(size: str, side: int, dtype: str, rounds: int) -> list[dict[str, Any]]:
    import jax

    from conceptax.flax_models.flux_transformer_2d import FluxTransformer2DConfig

    chosen = SIZES[size]
    model = JaxModel(FluxTransformer2DConfig(**chosen.model), chosen.text, side, dtype)
    settings = windows(side)
    attentions = {"dense": None} | {name: model.gna(*each) for name, each in settings.items()}
    return rows_of(model, attentions, settings, rounds, {"device": jax.devices()[0].device_kind})


def rows_of(
    model: JaxModel, attentions: dict, settings: dict, rounds: int, head: dict
) -> list[dict[str, Any]]:
    """Everything in turns; a row for each attention."""
    from conceptax.kernels.gna.simulator import measure

    compiled = {}
    for name, attention in attentions.items():
        start = time.perf_counter()
        compiled[name] = (*model.forward(attention), time.perf_counter() - start)
    runs = {name: run for name, (run, _, _) in compiled.items()}
    timings = measure.take_turns(runs | model.rates(attentions), rounds, seconds=0.0)
    rows = []
    for name, (_, program, compiling) in compiled.items():
        row = head | {"contender": name} | row_of(timings[name], compiling) | program
        if name in settings:
            row["gain"] = measure.speedup(timings["dense"], timings[name])
            row |= model.predicted(*settings[name], timings, name)
        rows.append(row)
    return rows


def row_of(timing: Any, compiling: float) -> dict[str, Any]:
    return {
        "first_s": compiling + timing.first,
        "median_s": timing.median,
        "best_s": timing.best,
        "repeats": len(timing.rounds),
    }


# ---- PyTorch ----


def torch_inputs(size: Size, side: int, dtype: Any) -> dict[str, Any]:
    import torch

    config = size.config
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
    draw = functools.partial(torch.randn, dtype=dtype)
    return {
        "hidden_states": draw(1, side**2, config.get("in_channels", 64)),
        "encoder_hidden_states": draw(1, size.text, config.get("joint_attention_dim", 4096)),
        "pooled_projections": draw(1, config.get("pooled_projection_dim", 768)),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "guidance": torch.tensor([3.5], dtype=dtype),
        "img_ids": places.to(dtype),
        "txt_ids": torch.zeros(size.text, 3, dtype=dtype),
    }


def measure_torch(
    size: str, side: int, dtype: str, rounds: int, *, compiled: bool
) -> list[dict[str, Any]]:
    import diffusers
    import torch

    kind = getattr(torch, dtype)
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(**SIZES[size].model)
    model = model.to(kind).to_empty(device="cpu").requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    given = torch_inputs(SIZES[size], side, kind)
    call = torch.compile(model) if compiled else model
    times = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        with torch.inference_mode():
            call(**given)
        times.append(time.perf_counter() - start)
    row = {
        "contender": "compile" if compiled else "eager",
        "first_s": times[0],
        "median_s": statistics.median(times[1:]),
        "best_s": min(times[1:]),
        "repeats": rounds,
        "process_gib": peak_memory(),
        "threads": torch.get_num_threads(),
    }
    return [row]


# ---- checks ----


def check(*, against_torch: bool) -> dict[str, float]:
    """Relative differences at the tiny size, all of which ought to be rounding."""
    import jax
    import jax.numpy as jnp

    from conceptax.flax_models.flux_transformer_2d import FluxTransformer2DConfig

    size, side = SIZES["tiny"], 16
    with jax.default_matmul_precision("highest"):
        model = JaxModel(FluxTransformer2DConfig(**size.model), size.text, side, "float32")
        # Large weights, lest the blocks add nothing to compare.
        model.params = jax.tree.map(lambda leaf: 10 * leaf, model.params)

        def difference(one: Any, other: Any) -> float:
            received, expected = (model.forward(each)[0]() for each in (one, other))
            return float(jnp.linalg.norm(received - expected) / jnp.linalg.norm(expected))

        found = {"a window of everything": difference(model.gna(side), None)}
        for name, setting in windows(side).items():
            reference = model.gna(*setting, implementation="reference")
            found[name] = difference(model.gna(*setting), reference)
        if against_torch:
            found["torch"] = difference_from_torch(size, side)
    return found


def difference_from_torch(size: Size, side: int) -> float:
    import tempfile

    import diffusers
    import numpy as np
    import torch

    from conceptax.converters import load_pytorch
    from conceptax.flax_models.layers.joint_attention import JointTextCondition

    torch.manual_seed(0)
    module = diffusers.FluxTransformer2DModel(**size.model).eval()
    given = torch_inputs(size, side, torch.float32)
    with torch.inference_mode():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
        expected = module(**given).sample.numpy().reshape(1, side, side, -1)
    names = ("encoder_hidden_states", "pooled_projections", "guidance")
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        loaded = load_pytorch(folder)
    latents = given["hidden_states"].numpy().reshape(1, side, side, -1)
    received = loaded(latents, 500.0, JointTextCondition(*(given[n].numpy() for n in names)))
    return float(np.linalg.norm(received - expected) / np.linalg.norm(expected))


# ---- whole models on a GPU ----


def gpu_models(size: str) -> dict[str, tuple[Any, int, int]]:
    """Config, tokens of text and tokens along a side, by name; tiny ones can be tried anywhere."""
    from conceptax.flax_models.flux_2_transformer_2d import Flux2Transformer2DConfig
    from conceptax.flax_models.flux_transformer_2d import FluxTransformer2DConfig

    if size == "tiny":
        tiny = SIZES["tiny"]
        (channels, *_), klein = tiny.config.values(), Flux2Transformer2DConfig.klein_4b()
        klein = dataclasses.replace(
            klein,
            num_layers=1,
            num_single_layers=1,
            in_channels=channels,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 4, 4),
        )
        flux = FluxTransformer2DConfig(**tiny.model)
        return {"tiny FLUX.1": (flux, tiny.text, 32), "tiny FLUX.2": (klein, tiny.text, 32)}
    klein = Flux2Transformer2DConfig.klein_4b()
    return {
        "FLUX.1 4K": (FluxTransformer2DConfig.dev(), 512, 256),
        "FLUX.2-klein 4K": (klein, 512, 256),
        "FLUX.2-klein 1K": (klein, 512, 64),
    }


def measure_gpu(arguments: argparse.Namespace, report: dict[str, Any], output: Path) -> None:
    """First what matters most of each model, then the rest, as far as time goes."""
    begin = time.perf_counter()
    dtype = "bfloat16" if arguments.size == "full" else "float32"
    models, timings = {}, {}
    report["rows"] = []
    # The sparse kernel, what a model does without a setting, and the sparse one seeing everything.
    for contenders in (("GNA", "dense"), (OWN,)):
        for title, (config, text, side) in gpu_models(arguments.size).items():
            setting = next(iter(windows(side).values()))
            head = {"model": title, "side": side, "dtype": dtype, "engine": "jax"}
            for name in contenders:
                row = head | {"contender": name}
                if name == "GNA":
                    row |= {"window": setting[0], "stride": setting[1]}
                if time.perf_counter() - begin > 60 * arguments.minutes:
                    row["error"] = f"not begun within {arguments.minutes} minutes"
                else:
                    try:
                        if title not in models:
                            models[title] = JaxModel(config, text, side, dtype)
                        model = models[title]
                        attentions = {"GNA": model.gna(*setting), OWN: model.gna(side)}
                        known = timings.setdefault(title, {})
                        row |= alone(model, name, attentions.get(name), arguments.rounds, known)
                    except Exception as error:  # what does not fit must not keep others away
                        row["error"] = str(error).splitlines()[0][:300]
                print(title, name, row.get("error", row.get("median_s")), file=sys.stderr)
                report["rows"].append(row)
                add_gain(report["rows"], models.get(title), timings.get(title, {}), title, setting)
                write_records(output, report)
    report["rows"].sort(key=lambda row: list(gpu_models(arguments.size)).index(row["model"]))
    write_records(output, report)


def add_gain(
    rows: list[dict[str, Any]],
    model: JaxModel | None,
    timings: dict[str, Any],
    title: str,
    setting: tuple[int, int],
) -> None:
    """To the sparse row: its gain over the fastest dense one, and the prediction of it."""
    dense = min(
        (name for name in ("dense", OWN) if name in timings),
        key=lambda name: timings[name].median,
        default=None,
    )
    if model is None or dense is None or "GNA" not in timings:
        return
    (row,) = (each for each in rows if each["model"] == title and each["contender"] == "GNA")
    row["gain"] = timings[dense].median / timings["GNA"].median
    named = {**timings, "attention, dense": timings[f"attention, {dense}"]}
    row |= model.predicted(*setting, named, "GNA")


def alone(
    model: JaxModel, name: str, attention: Any, rounds: int, timings: dict[str, Any]
) -> dict[str, Any]:
    """What one attention's row says; its times and those of its parts go into `timings`."""
    from conceptax.kernels.gna.simulator import measure

    start = time.perf_counter()
    run, program = model.forward(attention)
    compiling = time.perf_counter() - start
    found = measure.take_turns({name: run} | model.rates({name: attention}), rounds, seconds=0.0)
    timings |= found
    return row_of(found[name], compiling) | program


# ---- the run ----


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--gpu", action="store_true", help="whole models, in JAX alone")
    parser.add_argument("--sides", nargs="+", type=int, help="tokens along a side of the image")
    parser.add_argument("--dtypes", nargs="+", default=("float32", "bfloat16"))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--minutes", type=float, default=3.5, help="with --gpu: begin nothing later"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--one", nargs=3, metavar=("ENGINE", "SIDE", "DTYPE"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.one:
        engine, side, dtype = arguments.one
        rest = (arguments.size, int(side), dtype, arguments.rounds)
        if engine == "jax":
            print(json.dumps(measure_jax(*rest)))
        else:
            print(json.dumps(measure_torch(*rest, compiled=engine == "compile")))
        return
    sys.exit(run(arguments))


def run(arguments: argparse.Namespace) -> int:
    if arguments.gpu and arguments.size == "full" and environment()["device"] == "cpu":
        print("--gpu needs a GPU; --gpu --size tiny tries the script without one", file=sys.stderr)
        return 1
    found = check(against_torch=not arguments.gpu)
    wrong = {name: error for name, error in found.items() if not error < 1e-4}
    if wrong:
        print(f"results are wrong, nothing is measured; relative errors: {wrong}", file=sys.stderr)
        return 1
    device = "gpu" if arguments.gpu else "cpu"
    output = arguments.output or RESULTS / f"transformer_speed_{device}_{arguments.size}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "benchmark": "transformer_speed",
        "date": date.today().isoformat(),
        "size": arguments.size,
        **environment(),
        "relative_errors": found,
        "rows": json.loads(output.read_text())["rows"] if output.exists() else [],
    }
    ended = False
    try:
        if arguments.gpu:
            measure_gpu(arguments, report, output)
        else:
            measure_cpu(arguments, report, output)
        ended = True
    except KeyboardInterrupt:  # out of time: there is something to show all the same
        pass
    show(report)
    return 0 if ended and not any("error" in row for row in report["rows"]) else 1


def measure_cpu(arguments: argparse.Namespace, report: dict[str, Any], output: Path) -> None:
    """Each engine in a process of its own, so that neither memory nor threads are shared."""
    for side in arguments.sides or SIZES[arguments.size].sides:
        for dtype in arguments.dtypes:
            for engine in arguments.engines:
                head = {"side": side, "dtype": dtype, "engine": engine}
                command = [sys.executable, __file__, "--size", arguments.size]
                command += ["--rounds", str(arguments.rounds), "--one", engine, str(side), dtype]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    rows = [{"contender": engine, "error": done.stderr[-600:]}]
                else:
                    rows = json.loads(done.stdout.splitlines()[-1])
                print(f"{'failed' if done.returncode else 'measured'} {head}", file=sys.stderr)
                others = [r for r in report["rows"] if not head.items() <= r.items()]
                report["rows"] = sorted(
                    [*others, *(head | row for row in rows)],
                    key=lambda r: (r["side"], r["dtype"], ENGINES.index(r["engine"])),
                )
                write_records(output, report)


def show(report: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items())
    print(f"\n{report['size']} size, {report['device']}, {report['cpu_cores']} cores; {versions}")
    groups = dict.fromkeys((r.get("model"), r["side"], r["dtype"]) for r in report["rows"])
    for group in groups:
        rows = [r for r in report["rows"] if (r.get("model"), r["side"], r["dtype"]) == group]
        model, side, dtype = group
        print(f"\n{model or 'FLUX.1, 2 + 2 blocks'}: {side}x{side} tokens and text, {dtype}")
        titles = ("first s", "median s", "best s", "GiB", "x torch", "gain", "predicted", "of it")
        print(f"  {'':24}" + "".join(f"{title:>10}" for title in titles))
        best = min(
            (r["median_s"] for r in rows if r["engine"] != "jax" and "median_s" in r), default=None
        )
        for row in rows:
            print(f"  {row['contender']:24}{line_of(row, best)}")
        for row in rows:
            if "kernel" in row:
                print(
                    f"  {row['contender']}: linear {row['linear_rate'] / 1e12:.3g} and attention "
                    f"{row['attention_rate'] / 1e12:.3g} TFLOP/s measured, attention "
                    f"{100 * row['attention_share']:.1f} % of dense; {row['kernel']:.2f} x by the "
                    f"kernel, {row['pairs_bound']:.2f} x at most"
                )


def line_of(row: dict[str, Any], best: float | None) -> str:
    if "error" in row:
        return f"  failed: {row['error'].splitlines()[-1] if row['error'] else ''}"
    gain, predicted = row.get("gain"), row.get("predicted")
    numbers: Sequence[tuple[float | None, int]] = (
        (row["first_s"], 1),
        (row["median_s"], 3),
        (row["best_s"], 3),
        (row.get("program_gib", row.get("process_gib")), 2),
        (best and row["median_s"] / best, 2),
        (gain, 2),
        (predicted, 2),
        (gain and predicted and gain / predicted, 2),
    )
    return "".join(f"{'' if x is None else f'{x:.{digits}f}':>10}" for x, digits in numbers)


if __name__ == "__main__":
    main()
