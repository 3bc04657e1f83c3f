"""`conceptax doctor`: what is installed, what runs here, and why not what does not."""

import collections
import dataclasses
import importlib.util
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

# Beside the core: what each is for.
_OPTIONAL = {
    "torch": "reads .bin, .pt and .ckpt files: pip install 'conceptax[torch]'",
    "diffusers": "conceptax convert --verify: pip install 'conceptax[torch]'",
    "gguf": "quantized weights in GGUF files: pip install 'conceptax[gguf]'",
    "jax_triton": "attention on NVIDIA GPUs: pip install 'conceptax[cuda]'",
    "gradio": "conceptax studio: pip install 'conceptax[ui]'",
    "imageio_ffmpeg": "MP4 files: pip install 'conceptax[video]'",
    "pillow_heif": "HEIC photographs: pip install 'conceptax[heic]'",
    "onnxruntime": "ONNX files that judge images: pip install 'conceptax[judges]'",
    "nudenet": "NudeNet's own model: pip install 'conceptax[judges]'",
    "sklearn": "training the bundled model: pip install 'conceptax[demo]'",
    "skimage": "training the bundled model: pip install 'conceptax[demo]'",
    "matplotlib": "pictures of gna search: pip install 'conceptax[demo]'",
}
_CORE = (
    "conceptax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "scipy",
)


@dataclasses.dataclass(frozen=True)
class Command:
    """Say what is installed, which devices and compilers there are, and which kernel runs where.

    Exit status 1 where something that every command needs does not work.
    """


def run(command: Command) -> None:
    """Print the report, a section at a time.

    Raises:
      RuntimeError: no device can compute.
    """
    _section("Versions", _versions())
    _section("Optional packages", _optional())
    devices, trouble = _devices()
    _section("Devices", devices)
    _section("Compilers", _compilers())
    if trouble is None:
        _section("Neighborhood attention", _backends())
    _section("Folders", _folders())
    if trouble is not None:
        raise RuntimeError(f"no device can compute: {trouble}")


def _section(title: str, rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, what in rows:
        print(f"  {name:{width}}  {what}")


def _versions() -> list[tuple[str, str]]:
    rows = [("python", f"{platform.python_version()}, {platform.platform()}")]
    for name in _CORE:
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def _optional() -> list[tuple[str, str]]:
    there = {name: importlib.util.find_spec(name) is not None for name in _OPTIONAL}
    return [
        (name, f"{'installed' if there[name] else 'not installed'}; {purpose}")
        for name, purpose in _OPTIONAL.items()
    ]


def _devices() -> tuple[list[tuple[str, str]], str | None]:
    import jax

    from conceptax.methods.memory import available_memory, describe_bytes
    from conceptax.reporting.results import environment

    try:
        kinds = collections.Counter((each.platform, each.device_kind) for each in jax.devices())
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        return [("none", reason)], reason
    rows = [(where, f"{count} x {kind}") for (where, kind), count in kinds.items()]
    free = available_memory(host=True)
    memory = "memory unknown" if free is None else f"{describe_bytes(free)} of memory free"
    rows.append(("host", f"{environment()['cpu_cores'] or os.cpu_count()} cores, {memory}"))
    return rows, None


def _compilers() -> list[tuple[str, str]]:
    from conceptax.kernels.gna.cuda import build

    names = {"cpu": "C++", "gpu": "CUDA"}
    return [
        (name, build.compiler(target) or build.missing(target) or "")
        for target, name in names.items()
    ]


def _backends() -> list[tuple[str, str]]:
    from conceptax.kernels.gna import features
    from conceptax.kernels.gna.api import BACKENDS, select, unsupported
    from conceptax.kernels.gna.platforms import default_platform

    here = default_platform()
    taken = select(features.BASE)
    rows = []
    for name in BACKENDS:
        reason = unsupported(name, features.BASE)
        what = "runs" if reason is None else f"does not run: {reason}"
        rows.append((name, f"{what}; taken here ({here})" if name == taken else what))
    return rows


def _folders() -> list[tuple[str, str]]:
    from huggingface_hub import constants

    import conceptax
    from conceptax.kernels.gna.cuda import build

    caches: dict[str, Any] = {
        "package": Path(conceptax.__file__).parent,
        "libraries": build._cache_folder(),
        "programs of XLA": os.environ.get("JAX_COMPILATION_CACHE_DIR") or "not kept",
        "models of the Hub": constants.HF_HUB_CACHE,
        "interpreter": sys.executable,
    }
    return [(name, f"{where}{_size(where)}") for name, where in caches.items()]


def _size(place: Any) -> str:
    folder = Path(place)
    if not folder.is_dir() or (folder.name == "conceptax" and (folder / "__init__.py").exists()):
        return ""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    return f" ({len(files)} files, {sum(f.stat().st_size for f in files) / 1e6:.0f} MB)"
