"""End-to-end speed-up of a diffusion transformer with neighborhood attention: FLOPs and Amdahl.

The dense steps at the beginning, the text and the linear layers gain nothing. What they take
follows from the model's operations and a device's rates, or from a published share.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from ..presets import OF_ALL_LAYERS, PRESETS, Operations, Preset, Transformer
from .schedule import Gpu, end_to_end_speedup, find_gpu
from .simulate import Simulation, simulate

Basis = Literal["measured", "published", "assumed", "given"]


class Rate(NamedTuple):
    """What a device does in a second, in floating-point operations, and how that is known."""

    flops: float
    basis: Basis
    source: str


class Rates(NamedTuple):
    """Of linear layers and of dense attention, head dimension 128, in bfloat16."""

    linear: Rate
    attention: Rate


_HOPPER = Rate(
    600e12, "assumed", "about 60 % of the data sheet's 989 TFLOP/s, as large products reach"
)
_CUDNN = "NATTEN's docs/profiler.md, cuDNN on FLUX.1's and HunyuanVideo's tokens"
RATES = {
    "a100": Rates(
        Rate(220e12, "assumed", "about 70 % of the data sheet's 312 TFLOP/s"),
        Rate(200e12, "assumed", "of 50 to 73 % of 312 TFLOP/s, arXiv 2307.08691"),
    ),
    "h100": Rates(_HOPPER, Rate(559e12, "published", f"{_CUDNN}: 542 and 576 TFLOP/s")),
    "h200": Rates(
        _HOPPER,
        Rate(559e12, "assumed", f"an H100's, which computes alike; {_CUDNN}: 542 and 576 TFLOP/s"),
    ),
    "b200": Rates(
        Rate(
            *(430e12, "published"),
            "what arXiv 2504.16922's run times leave to eager PyTorch's layers, 470 and 390 "
            "TFLOP/s for FLUX.1 and HunyuanVideo",
        ),
        Rate(1212e12, "published", f"{_CUDNN}: 1218 and 1206 TFLOP/s"),
    ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class WholeModel:
    """A model's prediction.

    Attributes:
      preset: with the window, stride, layout and steps that were asked for.
      model: the preset's.
      operations: of one forward pass, dense.
      image_alone: one attention without text, as published figures are counted.
      with_text: the same as the model has it; nothing else where text comes by cross-attention.
      rates: of the device.
    """

    preset: Preset
    model: Transformer
    operations: Operations
    image_alone: Simulation
    with_text: Simulation
    rates: Rates

    @property
    def replaced(self) -> float:
        """Share of the steps that are sparse."""
        return 1 - self.preset.dense_steps / self.preset.steps

    @property
    def attention_share(self) -> float:
        """Of the dense transformer's time that is self-attention, by the rates."""
        return 1 - self.forward_seconds(math.inf) / self.forward_seconds()

    @property
    def kernel_speedup(self) -> float:
        """Predicted of self-attention with its text; at most the bound."""
        return speedups(self.with_text)["kernel"]

    @property
    def advice(self) -> str:
        """How to do without masks, if there are any."""
        tiles = self.with_text.query_tile, self.with_text.key_tile
        return self.preset.advice(self.layout, tiles)

    @property
    def layout(self) -> tuple[int, ...]:
        """Image tokens along each dimension."""
        return tuple(window.length for window in self.with_text.windows)

    def end_to_end(
        self, speedup: float, attention_share: float | None = None, *, all_steps: bool = False
    ) -> float:
        """Speed-up of all steps together, by Amdahl's law.

        Args:
          speedup: of self-attention.
          attention_share: of the dense run time; by default of the transformer's, by the rates.
          all_steps: as if no step stayed dense.
        """
        share = self.attention_share if attention_share is None else attention_share
        return end_to_end_speedup(share, 1 / speedup, replaced=1.0 if all_steps else self.replaced)

    def forward_seconds(self, speedup: float = 1.0) -> float:
        """Of one forward pass by the rates, self-attention being so many times faster."""
        work, (linear, attention) = self.operations, self.rates
        return (
            work.linear / linear.flops + (work.cross + work.attention / speedup) / attention.flops
        )

    def sample_seconds(self, dense_steps: int) -> float:
        """Of all steps by the rates, without VAE and text encoders: sparse as the kernel is."""
        sparse = (self.preset.steps - dense_steps) * self.forward_seconds(self.kernel_speedup)
        return self.model.forwards * (dense_steps * self.forward_seconds() + sparse)


def speedups(simulation: Simulation) -> dict[str, float]:
    """Of attention, by what is counted: the bound comes first, and a kernel's is at most that."""
    bound = simulation.flop_speedup
    return {
        "pairs": bound,
        "worst query tile": simulation.worst_tile_speedup,
        "mean query tile": simulation.tile_speedup,
        "kernel": min(bound, simulation.wave_speedup),
        "kernel and permutation": min(bound, simulation.speedup),
    }


def simulate_model(
    model: str | Preset,
    *,
    attention: Preset | None = None,
    layout: Sequence[int] | None = None,
    steps: int | None = None,
    dense_steps: int | None = None,
    query_tile: int | Sequence[int] | None = None,
    key_tile: int | Sequence[int] | None = None,
    mask_every_tile: bool = False,
    gpu: str | Gpu = "h200",
    linear_rate: float | None = None,
    attention_rate: float | None = None,
) -> WholeModel:
    """Predict what a neighborhood attention saves of a whole diffusion transformer.

    Args:
      model: a preset that has a model, or its name.
      attention: whose window and stride to take instead of the preset's.
      layout: tokens along each dimension, instead of the preset's.
      steps: of sampling, instead of the preset's.
      dense_steps: at the beginning; by default the preset's share of the steps.
      query_tile, key_tile: tile shapes; by default the preset's for the GPU, and on another layout
        those of the GPU's that visit fewest pairs.
      mask_every_tile: as in `simulate`.
      gpu: a name from `GPUS`, or constants of your own, whose rates must be given.
      linear_rate, attention_rate: TFLOP/s of linear layers and of dense attention; by default those
        known of the GPU (`RATES`).

    Raises:
      ValueError: an argument is out of range, there is no such model, or the window does not fit.
    """
    preset = PRESETS.get(model) if isinstance(model, str) else model
    if preset is None or preset.model is None or preset.layout is None:
        raise ValueError(f"model must be one of {', '.join(OF_ALL_LAYERS)}, received {model!r}.")
    steps = preset.steps if steps is None else steps
    dense_steps = preset.dense_steps_of(steps) if dense_steps is None else dense_steps
    if not (steps >= 1 and 0 <= dense_steps <= steps):
        raise ValueError(
            f"dense_steps must be between 0 and the steps, at least 1; received {dense_steps} of "
            f"{steps}."
        )
    tiles = preset.tiles
    if layout is not None and tuple(layout) != preset.layout:
        preset = dataclasses.replace(preset, layout=tuple(layout), attention_share=None)
        tiles = {}
    if attention is not None:
        names = ("window", "stride", "dilation", "layers", "name", "source")
        own = {name: getattr(attention, name) for name in names}
        preset = dataclasses.replace(preset, **own)
    preset = dataclasses.replace(preset, steps=steps, dense_steps=dense_steps)
    assert preset.model is not None and preset.layout is not None
    windows = preset.windows(preset.layout)
    machine = find_gpu(gpu)
    if query_tile is None and key_tile is None:
        query_tile, key_tile = tiles.get(machine.tile_class, (None, None))
    attended = functools.partial(
        simulate,
        preset.layout,
        kernel_size=tuple(window.kernel_size for window in windows),
        stride=tuple(window.stride for window in windows),
        dilation=tuple(window.dilation for window in windows),
        query_tile=query_tile,
        key_tile=key_tile,
        heads=preset.model.heads,
        head_dim=preset.model.head_dim,
        mask_every_tile=mask_every_tile,
        gpu=machine,
    )
    alone = text = attended()
    if preset.model.joint:
        text = attended(additional=preset.model.text, additional_queries=True)
    return WholeModel(
        preset=preset,
        model=preset.model,
        operations=preset.model.operations(math.prod(preset.layout)),
        image_alone=alone,
        with_text=text,
        rates=_rates(gpu, linear=linear_rate, attention=attention_rate),
    )


def _rates(gpu: str | Gpu, **given: float | None) -> Rates:
    for name, rate in given.items():
        if rate is None and isinstance(gpu, Gpu):
            raise ValueError(f"{name}_rate is not known of a GPU of your own: measure and give it.")
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"{name}_rate must be a positive number, received {rate}.")
    named = {
        name: Rate(1e12 * rate, "given", "for this prediction")
        for name, rate in given.items()
        if rate is not None
    }
    return Rates(**named) if isinstance(gpu, Gpu) else RATES[gpu]._replace(**named)
