"""Diffusion transformers' speed: blocks in JAX and torch, and what sparsity gains of whole models.

    python benchmarks/transformer_speed.py                        # all, on this machine's CPU
    python benchmarks/transformer_speed.py --models flux --dtypes float32 --engines jax
    python benchmarks/transformer_speed.py --size tiny            # minutes, to try the script
    python benchmarks/transformer_speed.py --gpu                  # FLUX as a whole, on one H200
    python benchmarks/transformer_speed.py --gpu --models hunyuan cosmos wan

On a CPU: a few blocks of full width with random weights and the published length of text, of videos
at the published rows and columns and as many frames as fit; torch eager and compiled each in a
process of their own, JAX in a third, where dense and neighborhood attention (GNA) take turns with
one large product and one attention, whose rates give the prediction (`simulate_model`), for the
blocks and, at the published layout, for the whole model.  With --gpu, in JAX alone, bfloat16, one
attention after the other until the minutes are over: FLUX.1 at 4K and FLUX.2-klein at 1K and 4K as
wholes, and of videos at the published layouts a few blocks, counted as often as the model has them;
dense attention is cuDNN's there, and a row says how often its program calls it.

Results are checked first, at a tiny size: JAX against torch on the same weights, GNA whose window
is the whole grid against dense attention, and GNA against its reference.  A run replaces its rows
in the results file and leaves the others; tables come last.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import math
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from _processes import peak_memory
from _published import ROWS, typical_error

from conceptax.kernels.gna.presets import OF_ALL_LAYERS, PRESETS, Preset, Transformer
from conceptax.kernels.gna.simulator import simulate_model
from conceptax.kernels.gna.simulator.whole_model import WholeModel, speedups
from conceptax.reporting.gna_tables import by
from conceptax.reporting.results import environment, write_records

RESULTS = Path(__file__).parent / "results"
ENGINES = ("jax", "eager", "compile")
DEVICES = ("h100", "h200", "b200")
OWN = "dense, own kernel"
BEGAN = time.perf_counter()
Sizes = tuple[int, ...]  # along each dimension


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that is measured.

    Attributes:
      title: as people say it.
      module, name: of its class; torch's has that name too.
      config: settings that differ from the class's, as both libraries say them.
      text: tokens.
      grids: tokens of the image or video along each dimension.
      presets: whose windows are measured, as large a part of a grid as of their own layout, which
        is the published one.
      layers: blocks of the published model.
      timestep, guidance: that the model is told, the latter where it takes one.
    """

    title: str
    module: str
    name: str
    config: Mapping[str, Any]
    text: int
    grids: tuple[Sizes, ...]
    presets: tuple[str, ...]
    layers: int
    timestep: float = 500.0
    guidance: float | None = None

    @property
    def kind(self) -> Any:
        return getattr(importlib.import_module(f"conceptax.flax_models.{self.module}"), self.name)

    @functools.cached_property
    def settings(self) -> Any:
        """The config of our class."""
        return self.kind.config_class.from_dict(dict(self.config))

    def shapes(self, grid: Sizes) -> dict[str, Sizes]:
        """Of the arrays that a forward pass reads; a token of a video is 1x2x2 latents."""
        config = self.settings
        sides = grid if len(grid) == 2 else (grid[0], 2 * grid[1], 2 * grid[2])
        widths = ("joint_attention_dim", "text_embed_dim", "text_dim")
        (width,) = (getattr(config, each) for each in widths if hasattr(config, each))
        shapes = {"latents": (1, *sides, config.in_channels), "states": (1, self.text, width)}
        if hasattr(config, "pooled_projection_dim"):
            shapes["pooled"] = (1, config.pooled_projection_dim)
        return shapes

    def condition(self, arrays: Mapping[str, Any]) -> Any:
        """What our model is told beside the timestep."""
        import jax.numpy as jnp

        from conceptax.flax_models.layers.joint_attention import JointTextCondition

        if self.name.startswith("Wan"):
            return arrays["states"]
        if self.name.startswith("Cosmos"):
            from conceptax.flax_models.cosmos_transformer_3d import CosmosCondition

            return CosmosCondition(arrays["states"], jnp.full((1,), 24.0))
        guidance = None if self.guidance is None else jnp.full((1,), self.guidance)
        return JointTextCondition(arrays["states"], arrays.get("pooled"), guidance)

    @property
    def torch_kind(self) -> Any:
        import diffusers
        from diffusers.models.transformers import transformer_cosmos

        if not hasattr(transformer_cosmos, "transforms"):  # without torchvision
            # The mask of padding has the latents' size.
            same = types.SimpleNamespace(resize=lambda mask, size, interpolation: mask)
            nearest = types.SimpleNamespace(NEAREST="nearest")
            transformer_cosmos.transforms = types.SimpleNamespace(
                functional=same, InterpolationMode=nearest
            )
        return getattr(diffusers, self.name)

    def torch_inputs(self, arrays: Mapping[str, Any], grid: Sizes) -> dict[str, Any]:
        """What torch's class is called with, given tensors."""
        import torch

        latents, states = arrays["latents"], arrays["states"]
        if len(grid) == 3:
            latents = latents.permute(0, 4, 1, 2, 3)
        given = {"hidden_states": latents, "encoder_hidden_states": states}
        given["timestep"] = torch.tensor([self.timestep], dtype=latents.dtype)
        if "pooled" in arrays:
            given["pooled_projections"] = arrays["pooled"]
        if self.name.startswith("Cosmos"):
            padding = torch.zeros(1, 1, *latents.shape[-2:], dtype=latents.dtype)
            return given | {"fps": 24, "padding_mask": padding}
        if self.name.startswith("Hunyuan"):
            given["encoder_attention_mask"] = torch.ones(1, self.text, dtype=torch.bool)
            given["guidance"] = torch.tensor([1000.0 * (self.guidance or 0)], dtype=latents.dtype)
        if self.name.startswith("Flux"):
            ranges = map(torch.arange, grid)
            rows, columns = torch.meshgrid(*ranges, indexing="ij")
            places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
            given |= {
                "hidden_states": latents.flatten(1, 2),
                "timestep": given["timestep"] / 1000,
                "guidance": torch.tensor([self.guidance], dtype=latents.dtype),
                "img_ids": places.to(latents.dtype),
                "txt_ids": torch.zeros(self.text, 3, dtype=latents.dtype),
            }
        return given

    def windows(self, grid: Sizes) -> dict[str, tuple[Sizes, Sizes]]:
        return windows(grid, self.presets)

    def published(self, grid: Sizes, window: str) -> Preset:
        """The whole model at its published layout, with the preset of a window on a grid."""
        preset = PRESETS[self.presets[list(self.windows(grid)).index(window)]]
        assert preset.model is not None
        told = {name: getattr(preset.model, name) for name in ("pixels", "frames")}
        model = transformer_of(self.settings, self.text)
        name = self.title.split(",")[0]
        model = dataclasses.replace(model, name=name, layers=self.layers, **told)
        return dataclasses.replace(preset, model=model, attention_share=None)


def windows(grid: Sizes, presets: Sequence[str]) -> dict[str, tuple[Sizes, Sizes]]:
    """Window and stride on a grid, as large a part of it as each preset's is of its own layout."""
    found = {}
    for name in presets:
        preset = PRESETS[name]
        parts = list(zip(grid, preset.layout or grid, strict=True))
        window, stride = (
            tuple(max(1, size * side // of) for size, (side, of) in zip(each, parts, strict=True))
            for each in (preset.window, preset.stride)
            if isinstance(each, tuple)
        )
        found[f"GNA {by(window)}, stride {by(stride)}"] = (window, stride)
    return found


def layers_of(config: Any) -> int:
    """Blocks with a self-attention."""
    return config.num_layers + getattr(config, "num_single_layers", 0)


FLUX = ("flux_transformer_2d", "FluxTransformer2DModel")
HUNYUAN = ("hunyuan_video_transformer_3d", "HunyuanVideoTransformer3DModel")
COSMOS = ("cosmos_transformer_3d", "CosmosTransformer3DModel")
WAN = ("wan_transformer_3d", "WanTransformer3DModel")
FLUX_PRESETS, WAN_PRESETS = ("flux-4k", "flux-2k"), ("wan-720p",)
HUNYUAN_PRESETS, COSMOS_PRESETS = ("hunyuan", "hunyuan-58"), ("cosmos-56", "cosmos-89")
TWO_AND_TWO = {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True}
ONE_AND_ONE = {"num_layers": 1, "num_single_layers": 1}
ONE = {"num_layers": 1}
SMALL = {"attention_head_dim": 16, "num_attention_heads": 2}

SUBJECTS: Mapping[str, Mapping[str, Subject]] = {
    "full": {
        "flux": Subject(
            "FLUX.1, 2 + 2 blocks",
            *FLUX,
            TWO_AND_TWO,
            512,
            ((64, 64), (128, 128)),
            FLUX_PRESETS,
            57,
            guidance=3.5,
        ),
        # A sixth of the published frames, or fewer: the windows keep their share of the pairs.
        "hunyuan": Subject(
            "HunyuanVideo, 1 + 1 blocks",
            *HUNYUAN,
            ONE_AND_ONE,
            256,
            ((5, 48, 80),),
            HUNYUAN_PRESETS,
            60,
            guidance=6.0,
        ),
        "cosmos": Subject(
            *("Cosmos-Predict1 7B, 1 block", *COSMOS, ONE, 512, ((4, 44, 80),), COSMOS_PRESETS, 28),
            timestep=0.5,
        ),
        "wan-1.3b": Subject(
            "Wan 2.1 1.3B, 1 block",
            *WAN,
            {**ONE, "num_attention_heads": 12, "ffn_dim": 8960},
            512,
            ((4, 48, 80),),
            WAN_PRESETS,
            30,
        ),
        "wan": Subject("Wan 2.1 14B, 1 block", *WAN, ONE, 512, ((4, 48, 80),), WAN_PRESETS, 40),
    },
    "tiny": {
        "flux": Subject(
            "tiny FLUX.1",
            *FLUX,
            {
                **TWO_AND_TWO,
                **SMALL,
                **{"in_channels": 8, "joint_attention_dim": 32, "pooled_projection_dim": 24},
                "axes_dims_rope": (4, 6, 6),
            },
            8,
            ((16, 16), (32, 32)),
            FLUX_PRESETS,
            57,
            guidance=3.5,
        ),
        "hunyuan": Subject(
            "tiny HunyuanVideo",
            *HUNYUAN,
            {
                **ONE_AND_ONE,
                **SMALL,
                **{"in_channels": 4, "out_channels": 4, "num_refiner_layers": 1},
                **{"text_embed_dim": 12, "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6)},
            },
            8,
            ((5, 12, 20),),
            HUNYUAN_PRESETS,
            60,
            guidance=6.0,
        ),
        "cosmos": Subject(
            "tiny Cosmos",
            *COSMOS,
            {
                **ONE,
                **SMALL,
                **{"in_channels": 4, "out_channels": 4, "text_embed_dim": 10},
                **{"adaln_lora_dim": 4, "max_size": (16, 64, 64)},
            },
            8,
            ((4, 11, 20),),
            COSMOS_PRESETS,
            28,
            timestep=0.5,
        ),
        "wan": Subject(
            "tiny Wan",
            *WAN,
            {
                **ONE,
                **SMALL,
                **{"in_channels": 4, "out_channels": 4, "text_dim": 10},
                **{"ffn_dim": 64, "freq_dim": 16, "rope_max_seq_len": 64},
            },
            8,
            ((4, 12, 20),),
            WAN_PRESETS,
            40,
        ),
    },
}


def transformer_of(config: Any, text: int) -> Transformer:
    """What the operations of a model with this config are counted from."""
    width = config.num_attention_heads * config.attention_head_dim
    joint, forwards, text_weights = True, 1, None
    if hasattr(config, "ffn_dim"):  # Wan
        weights = 6 * width**2 + 2 * width * config.ffn_dim
        joint, forwards, text_weights = False, 2, 2 * width**2
    elif hasattr(config, "adaln_lora_dim"):  # Cosmos
        weights = 6 * width**2 + 2 * width * int(config.mlp_ratio * width)
        joint, forwards, text_weights = False, 2, 2 * width * config.text_embed_dim
    else:  # projections and a perceptron of 4, or a gated one (FLUX.2)
        squares = 4 + int(3 * config.mlp_ratio) if hasattr(config, "mlp_ratio") else 12
        weights = squares * width**2
    return Transformer(
        type(config).__name__,
        config.num_attention_heads,
        config.attention_head_dim,
        layers_of(config),
        text,
        joint,
        weights,
        weights if text_weights is None else text_weights,
        forwards=forwards,
    )


def preset_of(config: Any, text: int, grid: Sizes, window: Sizes, stride: Sizes) -> Preset:
    """What the simulator is asked: this model, every step of which is sparse."""
    return Preset(window, stride, layout=grid, model=transformer_of(config, text), steps=1)


def whole(result: WholeModel, dense: float, sparse: float) -> dict[str, Any]:
    """Seconds of a sample of the published model, of whose forward passes these are the seconds."""
    preset, model = result.preset, result.model
    after = preset.dense_steps * dense + (preset.steps - preset.dense_steps) * sparse
    seconds = {
        "dense": model.forwards * preset.steps * dense,
        "after_dense_steps": model.forwards * after,
        "all_steps": model.forwards * preset.steps * sparse,
    }
    return {
        **{"model": model.name, "size": model.size(result.layout), "steps": preset.steps},
        **{"dense_steps": preset.dense_steps, "attention": preset.name},
        **{"forward_s": {"dense": dense, "sparse": sparse}, "sample_s": seconds},
        "gain": {each: seconds["dense"] / seconds[each] for each in seconds if each != "dense"},
    }


def predictions() -> list[dict[str, Any]]:
    """Whole models with their presets' windows on GPUs, from the simulator."""
    rows = []
    for name in OF_ALL_LAYERS:
        for device in DEVICES:
            result = simulate_model(name, gpu=device)
            seconds = (result.forward_seconds(each) for each in (1.0, result.kernel_speedup))
            rows.append({"device": device, "preset": name, **whole(result, *seconds)})
    return rows


# ---- JAX ----


class JaxModel:
    """A model with random weights, and what it is called with."""

    def __init__(self, subject: Subject, grid: Sizes, dtype: str) -> None:
        import jax
        import jax.numpy as jnp
        from flax import nnx

        self.subject, self.config = subject, subject.settings
        self.text, self.grid, self.dtype = subject.text, grid, jnp.dtype(dtype)
        self.keys = iter(jax.random.split(jax.random.key(0), 1 << 16))
        self.draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
        _, abstract = self.split(None)
        shapes = nnx.to_pure_dict(abstract)
        self.params = jax.tree.map(lambda leaf: 0.02 * self.normal(*leaf.shape), shapes)
        arrays = {name: self.normal(*shape) for name, shape in subject.shapes(grid).items()}
        self.latents, self.condition = arrays["latents"], subject.condition(arrays)

    def normal(self, *shape: int) -> Any:
        return self.draw(next(self.keys), shape, self.dtype)

    def split(self, attention: Any) -> tuple[Any, Any]:
        from flax import nnx

        kinds = {"dtype": self.dtype, "param_dtype": self.dtype}
        make = functools.partial(self.subject.kind, self.config, attention=attention, **kinds)
        return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))

    def forward(self, attention: Any) -> tuple[Callable[[], Any], dict[str, Any]]:
        """A compiled forward pass, and what its program says of itself.

        That is the GiB that it takes with its parameters, and its calls of cuDNN's attention.
        """
        import jax
        from flax import nnx

        graphdef, _ = self.split(attention)
        given, timestep = (self.params, self.latents, self.condition), self.subject.timestep
        call = jax.jit(lambda params, x, c: nnx.merge(graphdef, params)(x, timestep, c))
        compiled = call.lower(*given).compile()
        sizes = compiled.memory_analysis()
        names = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
        held = sum(getattr(sizes, name) for name in names)
        calls = (compiled.as_text() or "").count('custom_call_target="__cudnn$fmha')
        return lambda: compiled(*given), {"program_gib": held / 2**30, "cudnn_calls": calls}

    def gna(self, window: Sizes, stride: Sizes | int = 1, implementation: str | None = None) -> Any:
        from conceptax.flax_models.layers.attention import GNA

        return GNA(window, stride, implementation=implementation)

    @property
    def transformer(self) -> Transformer:
        return transformer_of(self.config, self.text)

    @property
    def tokens(self) -> int:
        """In the self-attention."""
        return math.prod(self.grid) + (self.text if self.transformer.joint else 0)

    def rates(self, attentions: dict[str, Any]) -> dict[str, Callable[[], Any]]:
        """One large product, that of a feed-forward, and one attention of each kind."""
        import jax

        from conceptax.flax_models.layers.joint_attention import JointSequence

        heads, dim = self.config.num_attention_heads, self.config.attention_head_dim
        width = heads * dim
        x, weights = self.normal(self.tokens, width), self.normal(width, 4 * width)
        qkv = [self.normal(1, self.tokens, heads, dim) for _ in range(3)]
        sequence = JointSequence(self.grid)
        product = jax.jit(lambda x, weights: x @ weights)
        calls: dict[str, Callable[[], Any]] = {"product": lambda: product(x, weights)}
        for name, attention in attentions.items():
            attend = jax.jit(lambda q, k, v, setting=attention: sequence.attend(q, k, v, setting))
            calls[f"attention, {name}"] = functools.partial(attend, *qkv)
        return calls

    def predicted(self, setting: tuple[Sizes, Sizes], timings: dict, name: str) -> dict:
        """The gain end to end that the measured rates let one expect, and how it comes about."""
        asked = preset_of(self.config, self.text, self.grid, *setting)
        seconds = {each: timing.median for each, timing in timings.items()}
        dense, model = seconds["attention, dense"], self.transformer
        one = model.operations(math.prod(self.grid)).attention / model.layers
        product = 8.0 * self.tokens * model.width**2
        rates = {"linear_rate": product / seconds["product"], "attention_rate": one / dense}
        in_tera = {key: rate / 1e12 for key, rate in rates.items()}
        result = simulate_model(asked, **in_tera)
        bound = speedups(result.with_text)["pairs"]
        kernel = dense / seconds[f"attention, {name}"]
        found = {
            **rates,
            "attention_share": result.attention_share,
            "pairs_bound": bound,
            "kernel": kernel,
            "predicted": result.end_to_end(min(bound, kernel)),
            "predicted_bound": result.end_to_end(bound),
        }
        # Of the whole published model, whose kernel comes as near to its bound as this one.
        result = simulate_model(self.subject.published(self.grid, name), **in_tera)
        reached = speedups(result.with_text)["pairs"] * min(1.0, kernel / bound)
        seconds = (result.forward_seconds(each) for each in (1.0, reached))
        found["whole"] = whole(result, *seconds)
        return found


def measure_jax(subject: Subject, grid: Sizes, dtype: str, rounds: int) -> list[dict[str, Any]]:
    import jax

    model = JaxModel(subject, grid, dtype)
    settings = subject.windows(grid)
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
        row["process_gib"] = peak_memory()
        if name in settings:
            row["gain"] = measure.speedup(timings["dense"], timings[name])
            row |= model.predicted(settings[name], timings, name)
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


def measure_torch(
    subject: Subject, grid: Sizes, dtype: str, rounds: int, *, compiled: bool
) -> list[dict[str, Any]]:
    import torch

    kind = getattr(torch, dtype)
    model = subject.torch_kind(**subject.config).to(kind).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    shapes = subject.shapes(grid)
    arrays = {name: torch.randn(*shape, dtype=kind) for name, shape in shapes.items()}
    given = subject.torch_inputs(arrays, grid)
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


def check(names: Sequence[str], *, against_torch: bool) -> dict[str, float]:
    """Relative differences at the tiny size, all of which ought to be rounding."""
    import jax
    import jax.numpy as jnp

    found = {}
    with jax.default_matmul_precision("highest"):
        for subject in (SUBJECTS["tiny"][name] for name in names):
            grid = subject.grids[0]
            model = JaxModel(subject, grid, "float32")
            # Large weights, lest the blocks add nothing to compare.
            model.params = jax.tree.map(lambda leaf: 10 * leaf, model.params)

            def difference(one: Any, other: Any, model: JaxModel = model) -> float:
                received, expected = (model.forward(each)[0]() for each in (one, other))
                return float(jnp.linalg.norm(received - expected) / jnp.linalg.norm(expected))

            title = subject.title
            found[f"{title}, a window of everything"] = difference(model.gna(grid), None)
            for name, setting in subject.windows(grid).items():
                reference = model.gna(*setting, implementation="reference")
                found[f"{title}, {name}"] = difference(model.gna(*setting), reference)
            if against_torch:
                found[f"{title}, torch"] = difference_from_torch(subject, grid)
    return found


def difference_from_torch(subject: Subject, grid: Sizes) -> float:
    import tempfile

    import numpy as np
    import torch

    from conceptax.converters import load_pytorch

    torch.manual_seed(0)
    module = subject.torch_kind(**subject.config).eval()
    arrays = {name: torch.randn(*shape) for name, shape in subject.shapes(grid).items()}
    with torch.inference_mode():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
        expected = module(**subject.torch_inputs(arrays, grid)).sample
    if len(grid) == 3:
        expected = expected.permute(0, 2, 3, 4, 1)
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        loaded = load_pytorch(folder)
    ours = {name: array.numpy() for name, array in arrays.items()}
    received = loaded(ours["latents"], subject.timestep, subject.condition(ours))
    wanted = expected.numpy().reshape(received.shape)
    return float(np.linalg.norm(received - wanted) / np.linalg.norm(wanted))


# ---- on a GPU ----


def gpu_subjects(size: str) -> dict[str, Subject]:
    """Whole models of images, and blocks of videos at their published layouts."""
    from conceptax.flax_models.flux_2_transformer_2d import Flux2Transformer2DConfig

    klein = ("flux_2_transformer_2d", "Flux2Transformer2DModel")
    changed = Flux2Transformer2DConfig.klein_4b().to_dict()
    if size == "tiny":
        changed |= ONE_AND_ONE | SMALL | {"in_channels": 8, "joint_attention_dim": 32}
        changed |= {"axes_dims_rope": (4, 4, 4, 4)}
        tiny = Subject(*("tiny FLUX.2", *klein, changed, 8, ((32, 32),), FLUX_PRESETS[:1], 2))
        return {**SUBJECTS[size], "klein": tiny}
    dev = {"guidance_embeds": True}
    found = {
        "flux": Subject(
            *("FLUX.1 4K", *FLUX, dev, 512, ((256, 256),), FLUX_PRESETS[:1], 57), guidance=3.5
        ),
        "klein": Subject(
            *("FLUX.2-klein 4K", *klein, changed, 512, ((256, 256),), FLUX_PRESETS[:1], 25)
        ),
        "klein-1k": Subject(
            *("FLUX.2-klein 1K", *klein, changed, 512, ((64, 64),), FLUX_PRESETS[:1], 25)
        ),
    }
    for name, subject in SUBJECTS[size].items():
        if name != "flux":
            layout = PRESETS[subject.presets[0]].layout
            assert layout is not None
            found[name] = dataclasses.replace(subject, grids=(layout,))
    return found


IMAGES = ("flux", "klein", "klein-1k")


def measure_gpu(arguments: argparse.Namespace, report: dict[str, Any], output: Path) -> None:
    """First what matters most of each model, then the rest, as far as time goes."""
    dtype = "bfloat16" if arguments.size == "full" else "float32"
    known = gpu_subjects(arguments.size)
    subjects = [known[name] for name in arguments.models if name in known]
    models: dict[str, JaxModel] = {}
    timings: dict[str, dict[str, Any]] = {}
    titles = [subject.title for subject in subjects]
    report["rows"] = [row for row in report["rows"] if row["model"] not in titles]
    others = len(report["rows"])
    # The sparse kernel, what a model does without a setting, then other windows, and the sparse
    # kernel that sees everything.
    turns = [
        (subject, name)
        for first in (True, False)
        for subject in subjects
        for (sparse, *more) in [list(subject.windows(subject.grids[0]))]
        for name in ((sparse, "dense") if first else (*more, OWN))
    ]
    for subject, name in turns:
        title, (grid, *_) = subject.title, subject.grids
        settings, mine = subject.windows(grid), timings.setdefault(title, {})
        row = {"model": title, "grid": by(grid), "dtype": dtype, "engine": "jax", "contender": name}
        if time.perf_counter() - BEGAN > 60 * arguments.minutes:
            row["error"] = f"not begun within {arguments.minutes} minutes"
        else:
            try:
                if title not in models:
                    models[title] = JaxModel(subject, grid, dtype)
                model = models[title]
                attention = model.gna(grid) if name == OWN else None
                if name in settings:
                    attention = model.gna(*settings[name])
                row |= alone(model, name, attention, arguments.rounds, mine)
            except Exception as error:  # what does not fit must not keep others away
                row["error"] = str(error).splitlines()[0][:300]
        print(title, name, row.get("error", row.get("median_s")), file=sys.stderr)
        report["rows"].append(row)
        if title in models:
            add_gains(report["rows"][others:], models[title], mine)
        write_records(output, report)


def add_gains(rows: list[dict[str, Any]], model: JaxModel, timings: dict[str, Any]) -> None:
    """To the sparse rows of a model: gains over the fastest dense one, and predictions of them."""
    dense = min(
        (name for name in ("dense", OWN) if name in timings),
        key=lambda name: timings[name].median,
        default=None,
    )
    subject, settings = model.subject, model.subject.windows(model.grid)
    for row in rows:
        name = row["contender"]
        if row["model"] != subject.title or dense is None or name not in settings.keys() & timings:
            continue
        row["gain"] = timings[dense].median / timings[name].median
        named = {**timings, "attention, dense": timings[f"attention, {dense}"]}
        row |= model.predicted(settings[name], named, name)
        preset = subject.published(model.grid, name)
        if preset.layout == model.grid:
            times = subject.layers / layers_of(subject.settings)
            seconds = (times * timings[each].median for each in (dense, name))
            row["measured_whole"] = whole(simulate_model(preset), *seconds)


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
    parser.add_argument("--size", choices=SUBJECTS, default="full")
    parser.add_argument("--gpu", action="store_true", help="in JAX alone, at published layouts")
    parser.add_argument("--models", nargs="+", choices=(*SUBJECTS["full"], *IMAGES[1:]))
    parser.add_argument("--grids", nargs="+", help="tokens, such as 64x64 or 5x48x80")
    parser.add_argument("--dtypes", nargs="+", default=("float32", "bfloat16"))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="with --gpu: begin nothing later, checks counted"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--one", nargs=4, metavar=("MODEL", "ENGINE", "GRID", "DTYPE"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    subjects = gpu_subjects(arguments.size) if arguments.gpu else SUBJECTS[arguments.size]
    default = [name for name in subjects if name in IMAGES] if arguments.gpu else list(subjects)
    arguments.models = arguments.models or default
    if arguments.one:
        name, engine, grid, dtype = arguments.one
        rest = (SUBJECTS[arguments.size][name], sizes_of(grid), dtype, arguments.rounds)
        if engine == "jax":
            print(json.dumps(measure_jax(*rest)))
        else:
            print(json.dumps(measure_torch(*rest, compiled=engine == "compile")))
        return
    sys.exit(run(arguments))


def sizes_of(text: str) -> Sizes:
    return tuple(map(int, text.split("x")))


def run(arguments: argparse.Namespace) -> int:
    if arguments.gpu and arguments.size == "full" and environment()["device"] == "cpu":
        print("--gpu needs a GPU; --gpu --size tiny tries the script without one", file=sys.stderr)
        return 1
    device = "gpu" if arguments.gpu else "cpu"
    tiny = dict.fromkeys(name.split("-")[0] for name in arguments.models)
    checked = [name for name in tiny if name in SUBJECTS["tiny"]]
    found = check(checked, against_torch=not arguments.gpu)
    wrong = {name: error for name, error in found.items() if not error < 1e-4}
    if wrong:
        print(f"results are wrong, nothing is measured; relative errors: {wrong}", file=sys.stderr)
        return 1
    output = arguments.output or RESULTS / f"transformer_speed_{device}_{arguments.size}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(output.read_text()) if output.exists() else {}
    report = {
        "benchmark": "transformer_speed",
        "date": date.today().isoformat(),
        "size": arguments.size,
        **environment(),
        "relative_errors": before.get("relative_errors", {}) | found,
        "published": {"figures": 2 * len(ROWS), "median_error": typical_error()},
        "predictions": predictions(),
        "rows": before.get("rows", []),
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
    subjects = SUBJECTS[arguments.size]
    titles = [subject.title for subject in subjects.values()]
    chosen = [(name, subjects[name]) for name in arguments.models]
    given = [sizes_of(each) for each in arguments.grids or ()]
    cases = [
        (name, subject, grid, dtype, engine)
        for name, subject in chosen
        for grid in (given or subject.grids)
        if len(grid) == len(subject.grids[0])
        for dtype in arguments.dtypes
        for engine in arguments.engines
    ]
    for name, subject, grid, dtype, engine in cases:
        head = {"model": subject.title, "grid": by(grid), "dtype": dtype, "engine": engine}
        command = [sys.executable, __file__, "--size", arguments.size]
        command += ["--rounds", str(arguments.rounds), "--one", name, engine, by(grid), dtype]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            rows = [{"contender": engine, "error": done.stderr[-600:]}]
        else:
            rows = json.loads(done.stdout.splitlines()[-1])
        print(f"{'failed' if done.returncode else 'measured'} {head}", file=sys.stderr)
        others = [row for row in report["rows"] if not head.items() <= row.items()]
        report["rows"] = sorted(
            [*others, *(head | row for row in rows)],
            key=lambda row: (
                titles.index(row["model"]),
                math.prod(sizes_of(row["grid"])),
                row["dtype"],
                ENGINES.index(row["engine"]),
            ),
        )
        write_records(output, report)


def show(report: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items())
    print(f"\n{report['size']} size, {report['device']}, {report['cpu_cores']} cores; {versions}")
    groups = dict.fromkeys((r["model"], r["grid"], r["dtype"]) for r in report["rows"])
    for group in groups:
        rows = [r for r in report["rows"] if (r["model"], r["grid"], r["dtype"]) == group]
        model, grid, dtype = group
        print(f"\n{model}: {grid} tokens and text, {dtype}")
        titles = ("first s", "median s", "best s", "GiB", "x torch", "gain", "predicted", "of it")
        print(f"  {'':34}" + "".join(f"{title:>10}" for title in titles))
        best = min(
            (r["median_s"] for r in rows if r["engine"] != "jax" and "median_s" in r), default=None
        )
        for row in rows:
            print(f"  {row['contender']:34}{line_of(row, best)}")
        for row in rows:
            if "kernel" in row:
                print(
                    f"  {row['contender']}: linear {row['linear_rate'] / 1e12:.3g} and attention "
                    f"{row['attention_rate'] / 1e12:.3g} TFLOP/s measured, attention "
                    f"{100 * row['attention_share']:.1f} % of dense; {row['kernel']:.2f} x by the "
                    f"kernel, {row['pairs_bound']:.2f} x at most"
                )
            for key in ("measured_whole", "whole"):
                if key in row:
                    told = "predicted by these rates" if key == "whole" else "by these times"
                    print(f"  {told}: {told_whole(row[key])}")
    print("\nPredicted of whole models, without text encoders and autoencoders:")
    for row in report["predictions"]:
        print(f"  {row['device']}: {told_whole(row)}")
    error = report["published"]
    print(
        f"of {error['figures']} published gains on a B200, predictions are off by "
        f"{100 * error['median_error']:.1f} % in the median"
    )


def told_whole(found: Mapping[str, Any]) -> str:
    seconds, gain = found["sample_s"], found["gain"]
    return (
        f"{found['model']}, {found['size']}, {found['attention']}: {seconds['dense']:.4g} s a "
        f"sample of {found['steps']} steps dense, {seconds['after_dense_steps']:.4g} s "
        f"({gain['after_dense_steps']:.2f} x) with {found['dense_steps']} dense, "
        f"{seconds['all_steps']:.4g} s ({gain['all_steps']:.2f} x) all sparse"
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
