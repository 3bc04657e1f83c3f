"""Memory that pipelines take at their published sizes, whole and streamed, and where they fit.

    python benchmarks/pipeline_memory.py --page docs/models.md
    python benchmarks/pipeline_memory.py --measure flux --grid 16x16       # one pass, streamed

Parameters are counted from the architectures, in bfloat16. What is computed with them is a lower
bound, that of `methods.memory`: the widest layer of the denoiser for all that it sees at once
(twice with guidance), or of the autoencoder at full resolution. Streamed models hold two blocks at
a time, and all that is not a block. --measure writes a denoiser with random weights to a temporary
folder, which takes its bfloat16 size on the disk, streams one forward pass, and keeps the peak of
that process.

Figures go to the results file; --page replaces the table between the marks in a page.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib
import json
import math
import sys
import tempfile
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _processes import measured_alone, peak_memory

from conceptax.methods.memory import denoiser_bytes, vae_bytes, video_vae_bytes
from conceptax.reporting.results import environment, write_records

RESULTS = Path(__file__).parent / "results" / "pipeline_memory.json"
DEVICES = (24, 80, 141)  # GB
USABLE = 0.95  # of a device's memory
MARKS = "<!-- benchmarks/pipeline_memory.py -->\n\n", "\n\n<!-- end -->"


@dataclasses.dataclass(frozen=True)
class Part:
    """A model of a pipeline: module and name of its class, and the constructor of its config.

    `settings` replace some of the config's.
    """

    module: str
    name: str
    constructor: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def kind(self) -> Any:
        return getattr(importlib.import_module(f"conceptax.flax_models.{self.module}"), self.name)

    @property
    def config(self) -> Any:
        kind = self.kind.config_class
        made = getattr(kind, self.constructor)() if self.constructor else kind()
        return dataclasses.replace(made, **self.settings)


CLIP_L = Part("clip", "CLIPTextModel", "stable_diffusion_1_5")
CLIP_G = Part("clip", "CLIPTextModelWithProjection", "stable_diffusion_xl_2")
PROJECTED = Part(
    "clip", "CLIPTextModelWithProjection", "stable_diffusion_1_5", {"projection_dim": 768}
)
T5_XXL, T5_11B = (Part("t5", "T5EncoderModel", size) for size in ("xxl", "t5_11b"))
UMT5 = Part("t5", "UMT5EncoderModel", "xxl")
LLAMA = Part("llama", "LlamaModel")
IMAGE_VAE = Part("autoencoder_kl", "AutoencoderKL")
FLUX_VAE = Part("autoencoder_kl", "AutoencoderKL", "flux_1")
SD3_VAE = Part("autoencoder_kl", "AutoencoderKL", "stable_diffusion_3")
FLUX_2_VAE = Part("autoencoder_kl", "AutoencoderKLFlux2")
HUNYUAN_VAE = Part("autoencoder_kl_hunyuan_video", "AutoencoderKLHunyuanVideo")
COSMOS_VAE = Part("autoencoder_kl_cosmos", "AutoencoderKLCosmos")
WAN_VAE, WAN_2_2_VAE = (
    Part("autoencoder_kl_wan", "AutoencoderKLWan", size) for size in ("wan_2_1", "wan_2_2")
)


def _unet(size: str) -> Part:
    return Part("unet_2d_condition", "UNet2DConditionModel", size)


def _sd3(size: str) -> Part:
    return Part("sd3_transformer_2d", "SD3Transformer2DModel", size)


def _flux_2(size: str) -> Part:
    return Part("flux_2_transformer_2d", "Flux2Transformer2DModel", size)


def _cosmos(size: str) -> Part:
    return Part("cosmos_transformer_3d", "CosmosTransformer3DModel", size)


def _wan(size: str) -> Part:
    return Part("wan_transformer_3d", "WanTransformer3DModel", size)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a pipeline draws: its parts, and the size by default.

    Attributes:
      title: of the pipeline.
      denoisers, texts, vae: its models.
      height, width, frames: in pixels.
      guided: whether the denoiser sees all twice at once.
    """

    title: str
    denoisers: tuple[Part, ...]
    texts: tuple[Part, ...]
    vae: Part
    height: int = 1024
    width: int = 1024
    frames: int | None = None
    guided: bool = True

    @property
    def size(self) -> str:
        frames = f"{self.frames}×" if self.frames else ""
        return f"{frames}{self.height}×{self.width}"


SD3_TEXTS = (PROJECTED, CLIP_G, T5_XXL)
FLUX = Part("flux_transformer_2d", "FluxTransformer2DModel", "dev")
HUNYUAN = Part("hunyuan_video_transformer_3d", "HunyuanVideoTransformer3DModel")
OPEN_CLIP = Part("clip", "CLIPTextModel", "stable_diffusion_2")
QWEN_4B, QWEN_8B = Part("qwen3", "Qwen3Model"), Part("qwen3", "Qwen3Model", "qwen3_8b")
PIPELINES: Mapping[str, Drawn] = {
    "sd15": Drawn(
        *("Stable Diffusion 1.5", (_unet("stable_diffusion_1_5"),), (CLIP_L,), IMAGE_VAE),
        *(512, 512),
    ),
    "sd21": Drawn(
        *("Stable Diffusion 2.1", (_unet("stable_diffusion_2_1"),), (OPEN_CLIP,), IMAGE_VAE),
        *(768, 768),
    ),
    "sdxl": Drawn(
        "Stable Diffusion XL", (_unet("stable_diffusion_xl"),), (CLIP_L, CLIP_G), IMAGE_VAE
    ),
    "sd3": Drawn("Stable Diffusion 3 medium", (_sd3("sd3_medium"),), SD3_TEXTS, SD3_VAE),
    "sd3-no-t5": Drawn("– without T5", (_sd3("sd3_medium"),), SD3_TEXTS[:2], SD3_VAE),
    "sd35-medium": Drawn(
        "Stable Diffusion 3.5 medium", (_sd3("sd3_5_medium"),), SD3_TEXTS, SD3_VAE
    ),
    "sd35-large": Drawn("Stable Diffusion 3.5 large", (_sd3("sd3_5_large"),), SD3_TEXTS, SD3_VAE),
    "flux": Drawn("FLUX.1 dev, schnell", (FLUX,), (CLIP_L, T5_XXL), FLUX_VAE, guided=False),
    "flux-4k": Drawn(*("– at 4K", (FLUX,), (CLIP_L, T5_XXL), FLUX_VAE, 4096, 4096), guided=False),
    "klein-4b": Drawn(
        "FLUX.2 klein 4B", (_flux_2("klein_4b"),), (QWEN_4B,), FLUX_2_VAE, guided=False
    ),
    "klein-9b": Drawn(
        "FLUX.2 klein 9B", (_flux_2("klein_9b"),), (QWEN_8B,), FLUX_2_VAE, guided=False
    ),
    "hunyuan": Drawn(
        *("HunyuanVideo", (HUNYUAN,), (LLAMA, CLIP_L), HUNYUAN_VAE, 720, 1280, 129),
        guided=False,
    ),
    "cosmos-t2w": Drawn(
        *("Cosmos-Predict1 7B Text2World", (_cosmos("text_to_world_7b"),), (T5_11B,)),
        *(COSMOS_VAE, 704, 1280, 121),
    ),
    "cosmos-v2w": Drawn(
        *("Cosmos-Predict1 7B Video2World", (_cosmos("video_to_world_7b"),), (T5_11B,)),
        *(COSMOS_VAE, 704, 1280, 121),
    ),
    "cosmos-14b": Drawn(
        *("Cosmos-Predict1 14B Text2World", (_cosmos("text_to_world_14b"),), (T5_11B,)),
        *(COSMOS_VAE, 704, 1280, 121),
    ),
    "wan-1.3b": Drawn(*("Wan 2.1 T2V 1.3B", (_wan("t2v_1_3b"),), (UMT5,), WAN_VAE, 480, 832, 81)),
    "wan-14b": Drawn(*("Wan 2.1 T2V 14B", (_wan("t2v_14b"),), (UMT5,), WAN_VAE, 720, 1280, 81)),
    "wan-2.2-5b": Drawn(
        *("Wan 2.2 TI2V 5B", (_wan("ti2v_5b"),), (UMT5,), WAN_2_2_VAE, 704, 1280, 121)
    ),
    "wan-2.2-a14b": Drawn(
        *("Wan 2.2 T2V A14B", (_wan("t2v_14b"),) * 2, (UMT5,), WAN_VAE, 720, 1280, 81)
    ),
}


def abstract(part: Part, dtype: Any = None) -> Any:
    """The model of a part without its parameters."""
    from flax import nnx

    from conceptax.flax_models.abstract import OneKey

    options = {} if dtype is None else {"dtype": dtype, "param_dtype": dtype}
    return nnx.eval_shape(lambda: part.kind(part.config, rngs=OneKey(), **options))


def size_of(module: Any) -> int:
    import jax
    from flax import nnx

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module)))


@functools.cache
def counted(part: Part) -> tuple[int, int]:
    """Parameters of a model, and those that are there at a time while its blocks are streamed."""
    model = abstract(part)
    total, lists = size_of(model), getattr(part.kind, "BLOCKS", ())
    blocks = [
        size_of(block)
        for name in lists
        for block in functools.reduce(getattr, name.split("."), model)
    ]
    return total, total - sum(blocks) + sum(sorted(blocks)[-2:])


def row_of(drawn: Drawn) -> dict[str, Any]:
    """Figures of a pipeline: numbers of parameters, and bytes in bfloat16."""
    groups = {"denoiser": drawn.denoisers, "text": drawn.texts, "vae": (drawn.vae,)}
    counts = {name: [counted(part) for part in parts] for name, parts in groups.items()}
    whole, streamed = (
        2.0 * sum(count[i] for counts_of in counts.values() for count in counts_of) for i in (0, 1)
    )
    config, kind, (denoiser, *_) = drawn.vae.config, np.float16, drawn.denoisers
    factor, frames = config.downsampling, 1
    if drawn.frames is not None:
        frames = (drawn.frames - 1) // config.temporal_downsampling + 1
        pixels = (drawn.frames, drawn.height, drawn.width)
        decoding = video_vae_bytes(config, 1, *pixels, kind)
    else:
        decoding = vae_bytes(config, 1, drawn.height, drawn.width, kind)
    asked = types.SimpleNamespace(config=denoiser.config, dtype=kind)
    sides = drawn.height // factor, drawn.width // factor
    patch = 2 if hasattr(asked.config, "num_layers") else 1
    denoising = denoiser_bytes(asked, (1 + drawn.guided) * frames, *sides, patch)
    busy = max(denoising, decoding)
    peak = {"whole": whole + busy}
    if hasattr(denoiser.kind, "BLOCKS"):
        peak["streamed"] = streamed + busy
    return {
        "title": drawn.title,
        "size": drawn.size,
        "parameters": {name: sum(count for count, _ in each) for name, each in counts.items()},
        "denoising": denoising,
        "decoding": decoding,
        "whole": whole,
        "streamed": streamed,
        "peak": peak,
    }


# ---- measuring ----


def random_folder(part: Part, folder: Path) -> None:
    """A folder of that model with random weights in bfloat16, in files of about 2 GB."""
    import jax.numpy as jnp
    from safetensors.numpy import save_file

    from conceptax.converters.tensors import tensor_specs

    pool = (0.02 * np.random.default_rng(0).standard_normal(1 << 26, np.float32)).astype(
        jnp.bfloat16
    )
    settings = {"_class_name": part.kind.pytorch_class, **part.config.to_dict()}
    (folder / "config.json").write_text(json.dumps(settings))
    where: dict[str, str] = {}

    def write(tensors: dict[str, np.ndarray]) -> None:
        name = f"{len(set(where.values()))}.safetensors"
        save_file(tensors, folder / name)
        where.update(dict.fromkeys(tensors, name))

    tensors, held = {}, 0
    for spec in tensor_specs(abstract(part)):
        count = math.prod(spec.shape)
        values = pool[:count] if count <= len(pool) else np.resize(pool, count)
        tensors[spec.key] = values.reshape(spec.shape)
        held += tensors[spec.key].nbytes
        if held > 2e9:
            write(tensors)
            tensors, held = {}, 0
    write(tensors)
    index = {"metadata": {}, "weight_map": where}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def forward(folder: str, grid: tuple[int, ...], text: int) -> dict[str, Any]:
    """One streamed forward pass of a denoiser over so many tokens, and this process's peak."""
    import time

    import jax
    import jax.numpy as jnp
    from transformer_speed import Subject

    from conceptax.converters import load_pytorch

    model = load_pytorch(folder, dtype=jnp.bfloat16, stream=True)
    module = type(model).__module__.rpartition(".")[2]
    guidance = 4.0 if getattr(model.config, "guidance_embeds", False) else None
    subject = Subject(
        *("", module, type(model).__name__, model.config.to_dict(), text, (grid,), (), 0),
        guidance=guidance,
    )
    shapes = {name: jnp.ones(shape) for name, shape in subject.shapes(grid).items()}
    began = time.perf_counter()
    jax.block_until_ready(model(shapes["latents"], 0.5, subject.condition(shapes)))
    return {"seconds": time.perf_counter() - began, "peak_gib": peak_memory()}


def measure(name: str, grid: str, text: int) -> dict[str, Any]:
    (part, *_) = PIPELINES[name].denoisers
    with tempfile.TemporaryDirectory() as folder:
        random_folder(part, Path(folder))
        command = [sys.executable, __file__, "--forward", folder, "--grid", grid]
        found = measured_alone(name, [*command, "--text", str(text)])
    today = datetime.date.today().isoformat()
    return {"pipeline": name, "grid": grid, "text": text, **found, "date": today}


# ---- the page ----


def fits(row: Mapping[str, Any], gigabytes: int) -> str:
    """How a pipeline runs with so much memory."""
    for name, peak in row["peak"].items():
        if peak <= USABLE * gigabytes * 1e9:
            return name
    return "–"


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """In Markdown: billions of parameters, and GB."""
    columns = (
        *("", "billions: denoiser", "text encoders", "in float32", "in bfloat16"),
        *("drawn", "denoising", "decoding", "peak", "peak, `stream=True`"),
        *(f"{device} GB" for device in DEVICES),
    )
    lines = [columns, ("---",) * len(columns)]
    for row in rows.values():
        counts, peak = row["parameters"], row["peak"]
        sizes = (2 * row["whole"], row["whole"])
        busy = (row["denoising"], row["decoding"], peak["whole"])
        streamed = f"{peak['streamed'] / 1e9:.1f}" if "streamed" in peak else "–"
        lines.append(
            (
                row["title"],
                *(f"{counts[name] / 1e9:.3g}" for name in ("denoiser", "text")),
                *(f"{size / 1e9:.1f}" for size in sizes),
                row["size"],
                *(f"{size / 1e9:.1f}" for size in busy),
                streamed,
                *(fits(row, device) for device in DEVICES),
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured_table(record: Mapping[str, Any]) -> str:
    """In Markdown: what was measured here; nothing where nothing was."""
    if not record["measured"]:
        return ""
    lines = [("streamed forward pass of", "tokens", "text", "peak", "time", "day"), ("---",) * 6]
    for row in record["measured"]:
        title = record["rows"][row["pipeline"]]["title"]
        peak = f"{row['peak_gib'] * 2**30 / 1e9:.1f} GB"
        cells = (row["grid"].replace("x", "×"), str(row["text"]), peak, f"{row['seconds']:.0f} s")
        lines.append((title, *cells, row["date"]))
    return "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_page(page: Path, text: str) -> None:
    """Put a text between the marks of a page."""
    start, end = MARKS
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    _, _, after = rest.partition(end)
    if not after:
        raise SystemExit(f"{page} lacks the marks {start.strip()} and {end.strip()}.")
    page.write_text(f"{before}{start}{text}{end}{after}", encoding="utf-8")


def counted_rows(names: Iterable[str]) -> dict[str, Any]:
    return {name: row_of(PIPELINES[name]) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", choices=PIPELINES, nargs="+", default=[])
    parser.add_argument("--grid", default="16x16", help="tokens to measure with")
    parser.add_argument("--text", type=int, default=512, help="tokens of text to measure with")
    parser.add_argument("--page", type=Path, help="replace the table in this page")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--forward", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.forward:
        grid = tuple(map(int, options.grid.split("x")))
        print(json.dumps(forward(options.forward, grid, options.text)))
        return
    record: dict[str, Any] = {"benchmark": "pipeline_memory", "measured": []}
    if options.output.exists():
        record = json.loads(options.output.read_text(encoding="utf-8"))
    record |= {"rows": counted_rows(PIPELINES), "date": datetime.date.today().isoformat()}
    for name in options.measure:
        found = measure(name, options.grid, options.text)
        same = ("pipeline", "grid", "text")
        others = (r for r in record["measured"] if any(r[key] != found[key] for key in same))
        record["measured"] = [*others, found]
        print(found)
    record |= environment()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_records(options.output, record)
    text = table(record["rows"]) + measured_table(record)
    print(text)
    if options.page:
        write_page(options.page, text)


if __name__ == "__main__":
    main()
