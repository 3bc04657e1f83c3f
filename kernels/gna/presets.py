"""Attention settings by name, as `--attention` takes them: published presets, and your own.

A preset is a window and a stride; a published one also knows the model and the token layout that it
is for, how many steps stay dense, and the tiles of kernels. `attention_preset` reads both forms.
Presets with their figures are from arXiv 2504.16922 unless their `source` says otherwise.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from .problem import windows_of
from .tiles import Window, visits

TileClass = Literal["hopper", "blackwell"]
Tiles = tuple[tuple[int, ...], tuple[int, ...]]  # of queries, and of keys

EXAMPLE = "window=32x32 stride=8x8"


class Operations(NamedTuple):
    """Floating-point operations of a transformer's forward pass on one sample."""

    linear: int
    attention: int  # dense self-attention: of image and text tokens together, where they are joint
    cross: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


@dataclasses.dataclass(frozen=True, slots=True)
class Transformer:
    """What a diffusion transformer's operations are counted from.

    Attributes:
      name: as people say it.
      heads, head_dim, layers: of its self-attentions.
      text: tokens of a prompt.
      joint: whether text and image tokens attend to each other in one self-attention; if not, each
        block reads the text by cross-attention.
      weights: of the linear layers that an image token passes in a block.
      text_weights: the same for a text token.
      forwards: passes per step; 2 with classifier-free guidance.
      pixels: of a frame along each side of a token.
      frames: of a video per token, but for the first.
    """

    name: str
    heads: int
    head_dim: int
    layers: int
    text: int
    joint: bool
    weights: int
    text_weights: int
    forwards: int = 1
    pixels: int = 16
    frames: int = 4

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim

    def operations(self, tokens: int) -> Operations:
        """Of a forward pass over so many image tokens.

        Embeddings, modulation and norms, a thousandth of it, are left out.
        """
        read = tokens + self.text if self.joint else tokens
        linear = 2 * (self.weights * tokens + self.text_weights * self.text)
        cross = 0 if self.joint else 4 * self.width * tokens * self.text
        attention = 4 * self.width * read**2
        return Operations(*(self.layers * each for each in (linear, attention, cross)))

    def size(self, layout: Sequence[int]) -> str:
        """The size of what has this token layout, as a sentence says it."""
        *time, rows, columns = layout
        pixels = f"{rows * self.pixels}x{columns * self.pixels} px"
        return f"{(time[0] - 1) * self.frames + 1} frames of {pixels}" if time else pixels


@dataclasses.dataclass(frozen=True, slots=True)
class Preset:
    """A neighborhood attention for a model, or for any layout.

    Attributes:
      window, stride: tokens along each dimension of the layout, or a number for all dimensions.
      name: what it is asked for by; empty for a setting of your own.
      layout: tokens along each dimension that it is made for.
      model: that it is made for.
      steps, dense_steps: of sampling, and how many of these, at the beginning, stay dense.
      attention_share: of the published dense run time on a B200, VAE and text encoders included,
        that is self-attention; None where nobody published it.
      tiles: shapes with which kernels for head dimension 128 need no mask, by class of GPU.
      source: of the setting.
    """

    window: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    name: str = ""
    layout: tuple[int, ...] | None = None
    model: Transformer | None = None
    steps: int = 0
    dense_steps: int = 0
    attention_share: float | None = None
    tiles: Mapping[TileClass, Tiles] = dataclasses.field(default_factory=dict, hash=False)
    source: str = ""

    def __str__(self) -> str:
        name = f" ({self.name})" if self.name else ""
        return f"a window of {_by(self.window)} at stride {_by(self.stride)}{name}"

    def dense_steps_of(self, steps: int) -> int:
        """How many of `steps` stay dense: the same share of them as of the preset's own."""
        return round(steps * self.dense_steps / self.steps) if self.steps else 0

    def windows(self, layout: Sequence[int]) -> tuple[Window, ...]:
        """One per dimension of a layout.

        Raises:
          ValueError: it does not fit the layout; the message names the nearest that it fits.
        """
        given = [len(each) for each in (self.window, self.stride) if isinstance(each, tuple)]
        if set(given) - {len(layout)}:
            raise ValueError(
                f"{self} has {given[0]} dimensions and does not fit a layout of {_by(layout)} "
                f"tokens, which has {len(layout)}."
            )
        sizes = self.window if isinstance(self.window, tuple) else (self.window,) * len(layout)
        least = tuple(map(max, layout, sizes))
        if least != tuple(layout):
            raise ValueError(
                f"{self} does not fit a layout of {_by(layout)} tokens; the nearest that it fits "
                f"is {self._sized(least)}."
            )
        return windows_of(tuple(layout), self.window, self.stride, names={"kernel_size": "window"})

    def advice(self, layout: Sequence[int], tiles: Tiles) -> str:
        """How to do without masks, which cost time, in one sentence; empty where none is needed.

        Args:
          layout: tokens along each dimension.
          tiles: shapes of query and key tiles, which both lie on a grid of the layout. Those of the
            kernels here start at the window, and need masks for fewer layouts.

        Raises:
          ValueError: the window does not fit the layout.
        """
        nearest = [*map(_mask_free_length, self.windows(layout), *tiles)]
        if nearest == list(layout):
            return ""
        found = [length for length in nearest if length is not None]
        if len(found) < len(nearest):
            return f"{self} always needs masks; `conceptax gna search` lists strides that do not."
        return f"{_by(layout)} tokens need masks for {self}; {self._sized(found)} needs none."

    def _sized(self, layout: Sequence[int]) -> str:
        size = f" ({self.model.size(layout)})" if self.model else ""
        return f"{_by(layout)}{size}"


def _joint(name: str, layers: int, text: int, **others: int) -> Transformer:
    """24 heads of 128; double blocks, and single ones alike, have 12 times their width squared in
    projections and feed-forward, for each of the two kinds of tokens.
    """
    weights = 12 * (24 * 128) ** 2
    return Transformer(name, 24, 128, layers, text, True, weights, weights, **others)


def _crossed(
    name: str,
    heads: int,
    layers: int,
    own: int,
    text_channels: int,
    feed_forward: int,
    **others: int,
) -> Transformer:
    """Heads of 128; `own` square projections for an image token, and two for a text token."""
    width = 128 * heads
    weights = own * width**2 + 2 * width * feed_forward
    text = 2 * text_channels * width
    return Transformer(name, heads, 128, layers, 512, False, weights, text, forwards=2, **others)


FLUX = _joint("FLUX.1", layers=19 + 38, text=512)
HUNYUAN = _joint("HunyuanVideo", layers=20 + 40, text=256)
COSMOS = _crossed("Cosmos-Predict1 7B", 32, 28, 6, 1024, 4 * 4096, frames=8)
WAN = _crossed("Wan 2.1 14B", 40, 40, 6, 5120, 13824)

PAPER = "arXiv 2504.16922"
FLUX_TILES: Mapping[TileClass, Tiles] = {
    "hopper": ((16, 8), (16, 8)),
    "blackwell": ((16, 16), (16, 8)),
}
COSMOS_TILES: Mapping[TileClass, Tiles] = {
    "hopper": ((4, 4, 8), (4, 4, 8)),
    "blackwell": ((8, 4, 8), (4, 4, 8)),
}
# Among the shapes that NATTEN has for a B200, those of the paper's two windows for HunyuanVideo are
# told by its simulated column, and (2, 16, 8) by its measured one, too.
PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            (80, 80),
            (16, 16),
            name="flux-4k",
            layout=(256, 256),
            model=FLUX,
            steps=28,
            dense_steps=9,
            attention_share=0.518,
            tiles=FLUX_TILES,
            source=PAPER,
        ),
        Preset(
            (48, 48),
            (16, 16),
            name="flux-2k",
            layout=(128, 128),
            model=FLUX,
            steps=28,
            dense_steps=9,
            tiles=FLUX_TILES,
            source="flux-4k at half its sides; its quality is not published",
        ),
        Preset(
            (18, 24, 24),
            (16, 8, 8),
            name="hunyuan",
            layout=(30, 48, 80),
            model=HUNYUAN,
            steps=50,
            dense_steps=15,
            attention_share=0.607,
            tiles={"hopper": ((2, 8, 8), (2, 8, 8)), "blackwell": ((4, 8, 8), (2, 8, 8))},
            source=f"{PAPER}; stride 2x8x8 needs no masks either in tiles of two frames (Hopper)",
        ),
        Preset(
            (30, 40, 40),
            (1, 32, 8),
            name="hunyuan-58",
            layout=(30, 48, 80),
            model=HUNYUAN,
            steps=50,
            dense_steps=15,
            attention_share=0.607,
            tiles={"hopper": ((2, 8, 8), (2, 8, 8)), "blackwell": ((2, 16, 8), (2, 8, 8))},
            source=f"{PAPER}; stride 1x8x8 needs no masks either in tiles of 8 rows (Hopper)",
        ),
        Preset(
            (16, 32, 48),
            (1, 8, 16),
            name="cosmos-56",
            layout=(16, 44, 80),
            model=COSMOS,
            steps=35,
            dense_steps=12,
            attention_share=0.587,
            tiles=COSMOS_TILES,
            source=PAPER,
        ),
        Preset(
            (16, 24, 16),
            (1, 8, 16),
            name="cosmos-89",
            layout=(16, 44, 80),
            model=COSMOS,
            steps=35,
            dense_steps=12,
            attention_share=0.587,
            tiles=COSMOS_TILES,
            source=f"{PAPER}, which saw quality suffer untrained beyond cosmos-56",
        ),
        Preset(
            (12, 24, 24),
            (4, 8, 8),
            name="wan-720p",
            layout=(24, 48, 80),
            model=WAN,
            steps=50,
            dense_steps=15,
            tiles={"hopper": ((4, 4, 8), (4, 4, 8)), "blackwell": ((4, 8, 8), (2, 8, 8))},
            source="chosen as hunyuan's, and its share of dense steps; quality not published",
        ),
    )
}


def attention_preset(text: str) -> Preset:
    """The preset that a text names, or a setting of one's own such as `window=32x32 stride=8x8`.

    A single size stands for all dimensions of a layout, which is not known here; the stride is 1
    unless given.

    Raises:
      ValueError: the text is neither; one sentence.
    """
    words = text.split()
    if len(words) == 1 and words[0] in PRESETS:
        return PRESETS[words[0]]
    if "=" not in text:
        raise ValueError(
            f"an attention is {', '.join(PRESETS)}, or a setting of your own such as {EXAMPLE!r}; "
            f"received {text!r}."
        )
    given: dict[str, int | tuple[int, ...]] = {}
    for word in words:
        name, _, value = word.partition("=")
        sizes = value.split("x")
        numbers = tuple(int(size) for size in sizes if size.isdecimal() and int(size) > 0)
        if name not in ("window", "stride") or name in given or len(numbers) < len(sizes):
            raise ValueError(
                "an attention's setting has one window and at most one stride, with a size for "
                f"each dimension, as in {EXAMPLE!r}; received {word!r} in {text!r}."
            )
        given[name] = numbers if len(numbers) > 1 else numbers[0]
    if "window" not in given:
        raise ValueError(
            f"an attention's setting has a window, as in {EXAMPLE!r}; received {text!r}."
        )
    ranks = {len(sizes) for sizes in given.values() if isinstance(sizes, tuple)}
    if len(ranks) > 1 or max(ranks, default=1) > 3:
        raise ValueError(
            "an attention's window and stride have the same 1 to 3 dimensions, as in "
            f"{EXAMPLE!r}; received {text!r}."
        )
    window, stride = given["window"], given.get("stride", 1)
    if np.greater(stride, window).any():
        raise ValueError(f"an attention's stride must not exceed its window; received {text!r}.")
    return Preset(window, stride)


def _by(sizes: int | Sequence[int]) -> str:
    return "x".join(map(str, sizes)) if isinstance(sizes, Sequence) else str(sizes)


def _mask_free_length(window: Window, query_tile: int, key_tile: int) -> int | None:
    """The nearest number of tokens, not below the window, with which no tile needs a mask."""
    for distance in range(4 * max(query_tile, key_tile)):
        for length in (window.length + distance, window.length - distance):
            if length >= window.kernel_size:
                other = dataclasses.replace(window, length=length)
                found = visits(other, length, query_tile, key_tile)
                if (found.first == found.free_first).all() and (
                    found.last == found.free_last
                ).all():
                    return length
    return None
