"""Attention settings by name, as `--attention` takes them: published presets, and your own.

A preset is a window, a stride and a dilation, or those of each layer; a published one also knows
the model and the token layout that it is for, how many steps stay dense, and the tiles of kernels.
`attention_preset` reads both forms. Presets with their figures are from arXiv 2504.16922 unless
their `source` says otherwise.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from .problem import nearest_layout, windows_of
from .tiles import Window, visits

TileClass = Literal["hopper", "blackwell"]
Tiles = tuple[tuple[int, ...], tuple[int, ...]]  # of queries, and of keys

# Tokens along each dimension, or a number for all; None is all tokens of a dimension.
Sizes: TypeAlias = int | tuple[int | None, ...] | None

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
      window: tokens along each dimension of the layout, or a number for all dimensions; None is all
        tokens of a dimension.
      stride, dilation: of the window along each dimension, or numbers for all dimensions.
      layers: the settings of a model's layers where these differ, and None of a dense one; window,
        stride and dilation then say nothing.
      name: what it is asked for by; empty for a setting of your own.
      layout: tokens along each dimension that it is made for.
      model: that it is made for.
      steps, dense_steps: of sampling, and how many of these, at the beginning, stay dense.
      attention_share: of the published dense run time on a B200, VAE and text encoders included,
        that is self-attention; None where nobody published it.
      tiles: shapes with which kernels for head dimension 128 need no mask, by class of GPU.
      source: of the setting.
    """

    window: Sizes = None
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    layers: tuple["Preset | None", ...] = ()
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
        if self.layers:
            return f"a window for each of {len(self.layers)} layers{name}"
        dilated = "" if self.dilation == 1 else f", dilation {_by(self.dilation)}"
        return f"a window of {_by(self.window)} at stride {_by(self.stride)}{dilated}{name}"

    @property
    def settings(self) -> tuple["Preset", ...]:
        """Itself, or the different ones of its layers, in the order in which they come."""
        if not self.layers:
            return (self,)
        return tuple({each: None for each in self.layers if each is not None})

    def dense_steps_of(self, steps: int) -> int:
        """How many of `steps` stay dense: the same share of them as of the preset's own."""
        return round(steps * self.dense_steps / self.steps) if self.steps else 0

    def windows(self, layout: Sequence[int]) -> tuple[Window, ...]:
        """One per dimension of a layout.

        Raises:
          ValueError: it does not fit the layout; the message names the nearest that it fits. Or it
            has a window for each layer: ask its `settings`.
        """
        if self.layers:
            one = self.settings[0]
            raise ValueError(
                f"{self.name or 'this attention'} has windows of their own for each of its "
                f"{len(self.layers)} layers: take one of these, such as 'window={_by(one.window)} "
                f"stride={_by(one.stride)} dilation={_by(one.dilation)}'."
            )
        parts = (self.window, self.stride, self.dilation)
        given = [len(each) for each in parts if isinstance(each, tuple)]
        if set(given) - {len(layout)}:
            raise ValueError(
                f"{self} has {given[0]} dimensions and does not fit a layout of {_by(layout)} "
                f"tokens, which has {len(layout)}."
            )
        nearest = nearest_layout(layout, self.window, self.stride, self.dilation)
        if nearest not in (None, tuple(layout)):
            raise ValueError(
                f"{self} does not fit a layout of {_by(layout)} tokens; the nearest that it fits "
                f"is {self._sized(nearest)}."
            )
        settings = self.window, self.stride, self.dilation
        return windows_of(tuple(layout), *settings, names={"kernel_size": "window"})

    def require_fit(self, layout: Sequence[int]) -> None:
        """Raise the ValueError of `windows` unless all layers' windows fit the layout."""
        for setting in self.settings:
            setting.windows(layout)

    def advice(self, layout: Sequence[int], tiles: Tiles) -> str:
        """How to do without masks, which cost time, in one sentence; empty where none is needed.

        Args:
          layout: tokens along each dimension.
          tiles: shapes of query and key tiles, which both lie on a grid of the layout. Those of the
            kernels here start at the window, and need masks for fewer layouts.

        Raises:
          ValueError: the window does not fit the layout.
        """
        if self.layers:
            every = (setting.advice(layout, tiles) for setting in self.settings)
            return next(filter(None, every), "")
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
COSMOS_2B = _crossed("Cosmos-Predict2 2B", 16, 28, 6, 1024, 4 * 2048)
COSMOS_14B = _crossed("Cosmos-Predict2 14B", 40, 36, 6, 1024, 4 * 5120)
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


def _by_layers(name: str, model: Transformer, runs: Sequence[tuple[int, str]]) -> Preset:
    """Cosmos-Predict2's attention: so many layers after each other with a setting of this list.

    From 98 % sparsity, the first far apart, over 95, 92, 77 and 55 % to none; all see all frames.
    """
    settings = {
        "far": Preset((None, 4, 16), dilation=(1, 11, 5), name=name, model=model),
        "wide": Preset((None, 12, 16), (1, 4, 1), (1, 1, 5), name=name, model=model),
        **{
            key: Preset((None, *sides), (1, 4, 8), name=name, model=model)
            for key, sides in (("92 %", (12, 24)), ("77 %", (20, 40)), ("55 %", (28, 56)))
        },
        "dense": None,
    }
    return Preset(
        layers=tuple(settings[key] for count, key in runs for _ in range(count)),
        name=name,
        layout=(24, 44, 80),
        model=model,
        steps=35,
        tiles=COSMOS_TILES,
        source="nvidia-cosmos/cosmos-predict2, config_natten.py, of models trained with it at 720p",
    )


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
        _by_layers(
            "cosmos-predict2-2b",
            COSMOS_2B,
            [
                *((2, "far"), (1, "wide"), (2, "92 %"), (1, "wide"), (4, "92 %"), (1, "wide")),
                *((12, "77 %"), (1, "55 %"), (3, "77 %"), (1, "92 %")),
            ],
        ),
        _by_layers(
            "cosmos-predict2-14b",
            COSMOS_14B,
            [
                *((11, "far"), (2, "wide"), (10, "92 %"), (1, "77 %"), (1, "55 %"), (1, "77 %")),
                *((1, "55 %"), (1, "dense"), (1, "55 %"), (2, "77 %"), (2, "55 %"), (1, "77 %")),
                *((1, "55 %"), (1, "77 %")),
            ],
        ),
    )
}


# Those of them that are the same in all layers, of which whole models are simulated.
OF_ALL_LAYERS = tuple(name for name, preset in PRESETS.items() if not preset.layers)


def attention_preset(text: str) -> Preset:
    """The preset that a text names, or a setting of one's own such as `window=32x32 stride=8x8`.

    A single size stands for all dimensions of a layout, which is not known here; `all` as a
    window's size for all tokens of a dimension. Stride and dilation are 1 unless given.

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
    given: dict[str, tuple[Any, ...]] = {}
    for word in words:
        name, _, value = word.partition("=")
        numbers = tuple(_size(size, name) for size in value.split("x"))
        names = ("window", "stride", "dilation")
        if name not in names or name in given or 0 in numbers:
            raise ValueError(
                "an attention's setting has one window and at most one stride and one dilation, "
                f"with a size for each dimension, as in {EXAMPLE!r}; received {word!r} in {text!r}."
            )
        given[name] = numbers
    if given.get("window", (None,)) == (None,):
        raise ValueError(
            f"an attention's setting has a window, as in {EXAMPLE!r}; received {text!r}."
        )
    ranks = {len(sizes) for sizes in given.values()} - {1}
    if len(ranks) > 1 or max(ranks, default=1) > 3:
        raise ValueError(
            "an attention's window, stride and dilation have the same 1 to 3 dimensions, as in "
            f"{EXAMPLE!r}; received {text!r}."
        )
    window, stride = given["window"], given.get("stride", (1,))
    limits = [np.inf if size is None else size for size in window]
    if np.greater(stride, limits).any():
        raise ValueError(f"an attention's stride must not exceed its window; received {text!r}.")
    settings: dict[str, Any] = {k: v[0] if len(v) == 1 else v for k, v in given.items()}
    return Preset(**settings)


def _size(text: str, name: str) -> int | None:
    """A size as it is written, None for all tokens; 0 is none."""
    if text == "all" and name == "window":
        return None
    return int(text) if text.isdecimal() else 0


def _by(sizes: Sizes | Sequence[int]) -> str:
    every = sizes if isinstance(sizes, Sequence) else (sizes,)
    return "x".join("all" if size is None else str(size) for size in every)


def _mask_free_length(window: Window, query_tile: int, key_tile: int) -> int | None:
    """The nearest number of tokens, not below the window, with which no tile needs a mask."""
    for distance in range(4 * max(query_tile, key_tile)):
        for length in (window.length + distance, window.length - distance):
            if length >= window.kernel_size * window.dilation:
                other = dataclasses.replace(window, length=length)
                found = [visits(other, n, query_tile, key_tile) for n in {*other.group_lengths()}]
                if all(
                    (each.first == each.free_first).all() and (each.last == each.free_last).all()
                    for each in found
                ):
                    return length
    return None
