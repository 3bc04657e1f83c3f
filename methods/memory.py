"""Memory checks: whether something fits, told before any of it is taken.

Estimates are lower bounds: arrays that are certain to exist at the same time, and nothing else. So
what is refused could not have worked; what is not refused may still be too large.
"""

import contextlib
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..errors import ConceptaxError
from ..flax_models.autoencoder_kl import AutoencoderKLConfig, AutoencoderKLFlux2Config

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


class NotEnoughMemoryError(ConceptaxError, ValueError):
    """Something larger than the memory that is free."""


def require_memory(
    needed: int | float, what: str, remedy: str, *, host: bool = False, spread: bool = False
) -> None:
    """Refuse what needs more bytes than are free on each device; `what` and `remedy` in words.

    Args:
      host: whether it is the host's memory that is needed, whatever the devices are.
      spread: whether all devices share what is needed.

    Raises:
      NotEnoughMemoryError: there are not as many.
    """
    free = available_memory(host=host)
    if spread and not host and jax.default_backend() != "cpu":
        needed /= jax.device_count()
    if free is not None and needed > free:
        raise NotEnoughMemoryError(
            f"{what} takes at least {describe_bytes(needed)} of memory, and "
            f"{describe_bytes(free)} are free: {remedy}."
        )


def require_images(count: int, remedy: str, *, height: int = 8, width: int = 8) -> None:
    """Refuse so many images, of that size in pixels or more, before any list of them is made.

    Raises:
      NotEnoughMemoryError: the host has no room for them.
    """
    smallest = 8 + 3 * height * width  # of a list, of an image
    require_memory(float(count * smallest), f"keeping {count} images", remedy, host=True)


def available_memory(*, host: bool = False) -> int | None:
    """Bytes that can still be had on a device, or on the host; None where nobody knows."""
    if not host and jax.default_backend() != "cpu":
        stats = jax.local_devices()[0].memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    known = [each for each in (_free_in_machine(), *_free_in_groups()) if each is not None]
    return min(known) if known else None


def describe_bytes(count: int | float) -> str:
    """With a unit, to three digits."""
    power = min(len(_UNITS) - 1, int(math.log(max(count, 1), 1000)))
    return f"{count / 1000**power:.3g} {_UNITS[power]}"


def denoiser_bytes(denoiser: Any, batch: int, height: int, width: int, patch: int = 1) -> float:
    """What a UNet, or a transformer of tokens of patch x patch latents, holds of a batch.

    Arguments as for `unet_bytes`.
    """
    config, dtype = denoiser.config, denoiser.dtype
    if not hasattr(config, "num_layers"):
        return unet_bytes(config, batch, height, width, dtype)
    tokens = batch * height * width / patch**2
    features = config.num_attention_heads * config.attention_head_dim
    return 5.0 * tokens * features * np.dtype(dtype).itemsize  # of a perceptron, and its input


def unet_bytes(config: Any, batch: int, height: int, width: int, dtype: Any) -> float:
    """What a UNet holds at its middle: all that its way up is joined with, and its input.

    `batch` counts those without guidance too; `height` and `width` are of the latents.
    """
    config = getattr(config, "unet", config)  # of a video UNet
    channels = config.block_out_channels
    pixels, total = float(height * width), float(height * width * channels[0])
    for level, width_ in enumerate(channels):
        total += config.per_block("layers_per_block")[level] * width_ * pixels
        if level + 1 < len(channels):
            pixels /= 4
            total += width_ * pixels
    return batch * total * np.dtype(dtype).itemsize


def vae_bytes(
    config: AutoencoderKLConfig | AutoencoderKLFlux2Config,
    batch: int,
    height: int,
    width: int,
    dtype: Any,
) -> float:
    """What decoding (or encoding) images holds at full resolution: a layer's input and output."""
    first, second = (*config.block_out_channels, config.block_out_channels[0])[:2]
    return float(batch) * height * width * (first + second) * np.dtype(dtype).itemsize


def video_vae_bytes(
    config: Any, batch: int, frames: int, height: int, width: int, dtype: Any
) -> float:
    """What decoding videos holds at its layers' finest resolution: a layer's input and output.

    Of a video autoencoder's `config`; the size is in pixels.
    """
    patch = getattr(config, "patch_size", None) or 1
    if hasattr(config, "base_dim"):  # Wan's, a latent frame at a time
        channels = 2 * (config.decoder_base_dim or config.base_dim) * config.dim_mult[0]
        frames = min(frames, config.temporal_downsampling)
    elif hasattr(config, "decode_block_out_channels"):  # Cosmos', patches of time too
        channels, frames = 2 * config.decode_block_out_channels[0], math.ceil(frames / patch)
    else:  # HunyuanVideo's, in pieces of time
        channels, frames = sum(config.block_out_channels[:2]), min(frames, config.tile_frames)
    positions = float(batch) * frames * height * width / patch**2
    return positions * channels * np.dtype(dtype).itemsize


def segmenter_bytes(config: Any, batch: int, height: int, width: int) -> float:
    """What MAFT+ holds of images of that size, as it sees them: pixels, and its finest map."""
    channels = config.decoder_config.feature_channels[0]
    return float(batch) * height * width * (4 * 3 + 2 * channels / 16)


def require_unet_memory(pipeline: Any, rows: int, what: str, remedy: str) -> None:
    """Refuse a training step whose UNet predicts for more rows, over all devices, than can fit.

    Latents are of the UNet's own size; `what` and `remedy` as for `require_memory`.
    """
    unet = pipeline.unet
    height, width = unet.config.latent_size
    needed = unet_bytes(unet.config, rows, height, width, unet.dtype)
    require_memory(needed, what, remedy, spread=True)


def _free_in_machine() -> int | None:
    """Memory, and what may be swapped out."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        kilobytes = [int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree")]
        return 1024 * sum(kilobytes)
    return None


def _free_in_groups() -> list[int]:
    """What the control groups of this process leave, by either version of their interface."""
    found = []
    names = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    for folder in _groups():
        for limit, usage in names:
            with contextlib.suppress(OSError, ValueError):
                most = int((folder / limit).read_text())
                used = int((folder / usage).read_text())
                found.append(max(0, most - used) + _reclaimable(folder) + _swap(folder))
    return [each for each in found if each < 1 << 60]  # that is no limit


def _groups() -> set[Path]:
    groups: set[Path] = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, controllers, name = line.split(":", 2)
            if number != "0" and "memory" not in controllers.split(","):
                continue
            root = Path("/sys/fs/cgroup") / ("" if number == "0" else "memory")
            below = root / name.lstrip("/")
            groups |= {each for each in (below, *below.parents) if root in (each, *each.parents)}
    return groups


def _reclaimable(folder: Path) -> int:
    """Of what a group uses, what the kernel gives back: pages of files."""
    names = ("inactive_file", "active_file", "total_inactive_file", "total_active_file")
    with contextlib.suppress(OSError, ValueError):
        lines = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(sum(int(lines.get(name, 0)) for name in each) for each in (names[:2], names[2:]))
    return 0


def _swap(folder: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        text = (folder / "memory.swap.max").read_text().strip()
        return 1 << 60 if text == "max" else int(text)
    return 0
