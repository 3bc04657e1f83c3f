"""A small Wan-type model draws digits that move: dense, made sparse, and sparse after tuning.

    python benchmarks/video_glyphs.py --seeds 0          # one training, its drawings, the figures
    python benchmarks/video_glyphs.py --seeds 0 1 2 --page docs/video_glyphs.md
    python benchmarks/video_glyphs.py --quick            # a minute, to try the script

A clip is 8 frames of 128x128 pixels: one handwriting of a digit in one color moves over a texture,
which stands still, along the way that its caption names last ("a red three on brick, in a circle").
The bundled autoencoder makes 32x32 latents of each frame, and a token is 2x2 of them: 8x16x16 =
2,048 tokens. For each seed a `WanTransformer3DModel` learns rectified flow, told captions by the
bundled CLIP through cross-attention: first single frames, without a way, then clips. Its
self-attention then gives way to neighborhood attention, which sees a tenth of the pairs: after
30 % of the steps and in all of them, with the parameters as they are, and in all steps after
training on with it for a tenth as long. All draw the same held-out prompts from the same noise.

The digit is found in each frame by its color, whichever of the six that is; the judge of the
bundled model says what the pixels around it show, and its places are compared with the ways. That
is done to rendered clips too, which tell how far the instruments can be trusted.

Trainings keep checkpoints and finished cells stay in the results file: run the same again after an
interruption. --page writes the page from the figures, and its GIF.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _flow_study import (
    GUIDANCE,
    TEXT,
    World,
    cells_of,
    command,
    minutes_of,
    shown,
    shown_difference,
    shown_share,
    shuffled,
    tenth,
    time_table,
)
from PIL import Image
from scipy import ndimage
from transformer_speed import preset_of

from conceptax.flax_models.layers.attention import GNA
from conceptax.flax_models.wan_transformer_3d import (
    WanTransformer3DConfig,
    WanTransformer3DModel,
)
from conceptax.kernels.gna.presets import Preset
from conceptax.methods.evaluation.statistics import (
    frame_consistency,
    mean_interval,
    proportion,
    rate,
)
from conceptax.methods.glyphs.captions import COLORS, DIGITS, TEXTURES, Prompt, caption
from conceptax.methods.glyphs.judge import ATTRIBUTES
from conceptax.methods.glyphs.recipe import Recipe
from conceptax.methods.glyphs.world import (
    COLOR_VALUES,
    IMAGE_SIZE,
    SPLITS,
    Jitter,
    background,
    ink,
    load_split,
    paint,
    to_bytes,
    varied,
)
from conceptax.methods.sampling import LinearSampler, NoiseSchedule, unipc_sampler
from conceptax.reporting.gna_tables import by
from conceptax.reporting.instruments import load_clip
from conceptax.reporting.report import Number, Table
from conceptax.reporting.videos import save_gif

FRAMES = 8
CANVAS = 2 * IMAGE_SIZE  # pixels along each side of a frame
LATENTS = CANVAS // 4
GRID = (FRAMES, LATENTS // 2, LATENTS // 2)
WINDOW, STRIDE = (6, 6, 6), (2, 2, 2)  # three quarters of the frames, three eighths of each side
SHIFT = 3.0  # of the noise levels, as Wan's
SCHEDULE = NoiseSchedule(
    scheduler_class="UniPCMultistepScheduler",
    prediction_type="flow_prediction",
    use_flow_sigmas=True,
    flow_shift=SHIFT,
)
TIMES = np.arange(FRAMES)
_LINE, _LOOP = np.linspace(-1, 1, FRAMES), 2 * np.pi * TIMES / FRAMES
_BACK = -np.cos(2 * np.pi * TIMES / (FRAMES - 1))
# Where the digit is in each frame, rows down and columns to the right, by what a caption says.
WAYS = {
    name: np.stack(np.broadcast_arrays(*rows_and_columns), axis=-1)
    for name, rows_and_columns in {
        "to the right": (0.0, _LINE),
        "to the left": (0.0, -_LINE),
        "up": (-_LINE, 0.0),
        "down": (_LINE, 0.0),
        "in a circle": (-0.8 * np.cos(_LOOP), 0.8 * np.sin(_LOOP)),  # from the top, clockwise
        "to and fro": (0.0, _BACK),
    }.items()
}
NAMES = tuple(WAYS)
REACH = 22.0, 30.0  # pixels from the middle of a way to its end
FOLLOWED, SMALLEST = 0.8, 6.0  # share of a path that its way explains; its size, pixels
SPEC = [
    (d, c, t, w)
    for d in range(DIGITS)
    for c in range(len(COLORS))
    for t in range(len(TEXTURES))
    for w in range(len(WAYS))
]


@dataclasses.dataclass(frozen=True)
class Study:
    """Sizes of all that is made; the figures are of these.

    Attributes:
      layers, heads: of the model, a head having 32 features.
      clips: rendered for the trainings.
      image_steps, image_batch: of the training on single frames.
      steps, batch: of that on clips; the tuning has a tenth of the steps and a third of the rate.
      image_rate, learning_rate, ema: of both.
      images: clips that a cell draws for a seed.
      sampling_steps, dense_steps: of a drawing; the cell that begins densely has the latter so.
      drawn: clips at a time.
      rounds: of the timing.
    """

    layers: int = 6
    heads: int = 3
    clips: int = 2000
    image_steps: int = 2400
    image_batch: int = 24
    image_rate: float = 2e-3
    steps: int = 1200
    batch: int = 4
    learning_rate: float = 1.5e-3
    ema: float = 0.995
    images: int = 60
    sampling_steps: int = 10
    dense_steps: int = 3
    drawn: int = 4
    rounds: int = 3

    @property
    def config(self) -> WanTransformer3DConfig:
        """Of the model: latents of 4 channels, and the bundled CLIP's states of 96."""
        return WanTransformer3DConfig(
            num_attention_heads=self.heads,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,
            text_dim=96,
            freq_dim=64,
            ffn_dim=4 * 32 * self.heads,
            num_layers=self.layers,
        )

    @property
    def recipes(self) -> dict[str, Recipe]:
        """Of the dense trainings, and of the sparse tuning."""
        training = Recipe(self.steps, self.batch, self.learning_rate, ema=self.ema)
        return {
            "images": Recipe(self.image_steps, self.image_batch, self.image_rate, ema=self.ema),
            "training": training,
            "tuning": tenth(training),
        }


QUICK = Study(
    **{"layers": 1, "heads": 1, "clips": 4, "image_steps": 2, "image_batch": 2},
    **{"steps": 2, "batch": 1, "images": 3, "sampling_steps": 2, "dense_steps": 1},
    **{"drawn": 2, "rounds": 1},
)
CELLS = cells_of(GNA(window=WINDOW, stride=STRIDE), "30 % of the steps dense")


@dataclasses.dataclass(frozen=True)
class MovingPrompt:
    """A prompt of the glyphs world, and the way that it names last (an index of `NAMES`)."""

    still: Prompt
    way: int

    @property
    def text(self) -> str:
        return f"{self.still.text}, {NAMES[self.way]}"

    @property
    def spec(self) -> tuple[int, int, int, int]:
        return self.still.digit, self.still.color, self.still.texture, self.way


# ---- clips ----


def path_along(rng: np.random.Generator, way: int) -> np.ndarray:
    """Middles of the digit, [F, 2] pixels, so that 64x64 around each lie within the frame."""
    moved = WAYS[NAMES[way]] * rng.uniform(*REACH)
    room = IMAGE_SIZE / 2 - np.abs(moved).max(axis=0)
    return CANVAS / 2 + moved + rng.uniform(-1, 1, 2) * room


def clip(rng: np.random.Generator, spec: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [F,128,128,3] of a (digit, color, texture, way), and the digit's path [F,2]."""
    digit, color, texture, way = map(int, spec)
    source, jitter = load_split(split), Jitter(shift=0.0)
    image, path = background(rng, texture, CANVAS), path_along(rng, way)
    coverage = ink(rng, source.splines[rng.choice(source.of(digit))], jitter)
    fill = varied(rng, COLOR_VALUES[color], jitter)
    frames = []
    for corner in path - IMAGE_SIZE / 2:
        whole = np.floor(corner).astype(int)
        part = np.pad(coverage, ((0, 1), (0, 1)))
        part = ndimage.shift(part, corner - whole, order=1)[:IMAGE_SIZE, :IMAGE_SIZE]
        canvas = np.zeros((CANVAS, CANVAS), np.float32)
        rows, columns = (slice(each, each + IMAGE_SIZE) for each in whole)
        canvas[rows, columns] = part[: CANVAS - whole[0], : CANVAS - whole[1]]
        frames.append(to_bytes(paint(image, canvas, fill)))
    return np.stack(frames), path


def rendered(specs: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    """One clip per spec, and its path, each a function of split, index and spec alone."""
    rngs = (np.random.default_rng([SPLITS.index(split), i]) for i in range(len(specs)))
    made = [clip(rng, spec, split) for rng, spec in zip(rngs, specs, strict=True)]
    return np.stack([each for each, _ in made]), np.stack([path for _, path in made])


# ---- instruments ----


def located(clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the digit is, [N, F, 2] pixels, and in how many pixels its color is seen, [N, F].

    Its color is that of the six which most of a clip's pixels are near to, so it need not be the
    one that was asked for. Its place is the middle of the pixels that are; of a frame without, that
    of the frame.
    """
    grid = np.stack(np.mgrid[:CANVAS, :CANVAS], axis=-1).astype(np.float32)
    places, areas = [], []
    for frames in clips:
        apart = np.linalg.norm(frames[..., None, :] / np.float32(255) - COLOR_VALUES, axis=-1)
        near = np.maximum(0.0, 1.0 - (apart / 0.35) ** 2)  # [F, H, W, 6]
        weight = near[..., near.sum(axis=(0, 1, 2)).argmax()]
        area = weight.sum(axis=(1, 2))
        middle = np.einsum("fhw,hwc->fc", weight, grid) / np.maximum(area, 1e-6)[:, None]
        places.append(np.where(area[:, None] > 0, middle, CANVAS / 2))
        areas.append(area)
    return np.stack(places), np.stack(areas)


def along(paths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The way (an index) that each path [N,F,2] is most like, and the share of it that this tells.

    A path is compared with a way enlarged as fits it best, both about their middles. One that
    stays within few pixels follows none: its share is 0.
    """
    paths = paths - paths.mean(axis=1, keepdims=True)
    size = (paths**2).sum(axis=(1, 2))
    shares = []
    for way in WAYS.values():
        way = way - way.mean(axis=0)
        scale = np.maximum(0.0, np.einsum("nfc,fc->n", paths, way) / (way**2).sum())
        left = ((paths - scale[:, None, None] * way) ** 2).sum(axis=(1, 2))
        shares.append(1 - left / np.maximum(size, 1e-9))
    found = np.stack(shares, axis=-1)
    moves = np.sqrt(size / FRAMES) >= SMALLEST
    return found.argmax(axis=-1), np.where(moves, found.max(axis=-1), 0.0)


def cropped(clips: np.ndarray, places: np.ndarray) -> np.ndarray:
    """64x64 pixels around each place, within the frame: [N*F,64,64,3]."""
    corners = np.clip(np.round(places - IMAGE_SIZE / 2).astype(int), 0, CANVAS - IMAGE_SIZE)
    return np.stack(
        [
            frame[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
            for frames, path in zip(clips, corners, strict=True)
            for frame, (top, left) in zip(frames, path, strict=True)
        ]
    )


class ClipWorld(World):
    """A digit that moves, drawn by a Wan-type model."""

    name, kind, cells, stages = "video_glyphs", WanTransformer3DModel, CELLS, ("images", "training")
    grid, latent_shape, shift = GRID, (FRAMES, LATENTS, LATENTS, 4), SHIFT

    @staticmethod
    def told(output: Any) -> Any:
        return output.last_hidden_state

    @functools.cached_property
    def sampler(self) -> LinearSampler:
        return unipc_sampler(SCHEDULE, self.study.sampling_steps)

    @functools.cached_property
    def preset(self) -> Preset:
        return preset_of(self.study.config, TEXT, GRID, WINDOW, STRIDE)

    @functools.cached_property
    def data(self) -> dict[str, np.ndarray]:
        """Latents' mean and deviation [N,F,32,32,4], scaled, and `spec` [N,4]; on the disk."""

        def make() -> dict[str, np.ndarray]:
            rng = np.random.default_rng(0)
            specs = np.asarray(SPEC)[rng.integers(len(SPEC), size=self.study.clips)]
            clips, _ = rendered(specs, "generator")
            latents = self.encoded(clips.reshape(-1, *clips.shape[2:]))
            shape = (len(specs), *self.latent_shape)
            return {name: each.reshape(shape) for name, each in latents.items()} | {"spec": specs}

        return self.kept(f"clips_{self.study.clips}", make)

    def batches(self, name: str, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """Shuffled anew for each round, each time with other captions; of images, one frame each.

        A caption that the text tower would cut is drawn again.
        """
        data, rng = self.data, np.random.default_rng(seed)
        size = self.study.recipes[name].batch_size
        for rows in shuffled(rng, len(data["mean"]), min(size, len(data["mean"]))):
            parts, tokens = {each: data[each][rows] for each in ("mean", "std")}, []
            for *still, way in data["spec"][rows].tolist():
                ending = "" if name == "images" else f", {NAMES[way]}"
                text = caption(rng, *still) + ending
                while len(self.pipeline.tokenizer(text).input_ids) > TEXT:
                    text = caption(rng, *still) + ending
                tokens.append(self.tokens(text))
            if name == "images":
                one = rng.integers(FRAMES, size=len(rows))
                each_row = np.arange(len(rows))
                parts = {key: each[each_row, one][:, None] for key, each in parts.items()}
            yield {**parts, "tokens": np.stack(tokens)}

    def asked(self, seed: int) -> list[MovingPrompt]:
        """Every way as often."""
        order = np.random.default_rng(seed).permutation(self.study.images) % len(WAYS)
        pairs = zip(self.prompts_of(seed), order.tolist(), strict=True)
        return [MovingPrompt(*pair) for pair in pairs]

    def rendered(self, asked: Sequence[MovingPrompt]) -> np.ndarray:
        return rendered([each.spec for each in asked], "judge_test")[0]

    @functools.cached_property
    def eye(self) -> Any:
        return load_clip(self.source / "clip", None, "bundled")

    def judged(
        self, drawn: np.ndarray, asked: Sequence[MovingPrompt], real: np.ndarray
    ) -> dict[str, Any]:
        """What is right of clips; `right` is how many frames of each are so wholly.

        `frame` and the attributes count frames, `motion` clips whose digit goes the way that is
        asked for, `clip` those of them with three quarters of the frames right. `consistency` is
        the mean cosine of consecutive frames' features (CLIP-I), `background` how much the median
        pixel changes from frame to frame, of 255, each for every clip.
        """
        places, _ = located(drawn)
        wanted = np.asarray([each.spec for each in asked])
        found, shape = self.judge(cropped(drawn, places)), drawn.shape[:2]
        right = {
            name: found[name].reshape(shape) == wanted[:, i, None]
            for i, name in enumerate(ATTRIBUTES)
        }
        whole = np.logical_and.reduce(list(right.values()))
        way, told = along(places)
        follows = (way == wanted[:, 3]) & (told >= FOLLOWED)
        features = self.eye.features(drawn.reshape(-1, *drawn.shape[2:])).reshape(*shape, -1)
        change = np.abs(np.diff(drawn.astype(np.float32), axis=1)).mean(axis=-1)
        return {
            **{each: proportion(hits.ravel()) for each, hits in right.items()},
            "frame": proportion(whole.ravel()),
            "motion": proportion(follows),
            "clip": proportion(follows & (whole.mean(axis=1) >= 0.75)),
            "right": whole.sum(axis=1).tolist(),
            "consistency": np.round(frame_consistency(features), 4).tolist(),
            "background": np.round(np.median(change, axis=(2, 3)).mean(axis=1), 2).tolist(),
            "told": np.round(told, 3).tolist(),
        }


# ---- the page ----

COUNTS = (*ATTRIBUTES, "frame", "motion", "clip")
MEANS = ("consistency", "background")


def figures(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Those of several seeds in one."""
    found: dict[str, Any] = {}
    for name in COUNTS:
        count, of = (sum(cell[name][each] for cell in cells) for each in ("count", "of"))
        value, low, high = rate(count, of)
        found[name] = {"count": count, "of": of, "rate": value, "low": low, "high": high}
    for name in MEANS:
        found[name] = mean_interval(np.concatenate([cell[name] for cell in cells]))
    return found


def pooled(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A cell's figures over all seeds, and by how much fewer frames are right than dense.

    The difference is that of clips with the same prompt and noise, so its interval knows that the
    frames of a clip are alike.
    """
    seeds = record["seeds"].values()
    ours, dense = (
        np.concatenate([seed["cells"][each]["right"] for seed in seeds]) for each in (name, "dense")
    )
    cells = [seed["cells"][name] for seed in seeds]
    return figures(cells) | {"difference": mean_interval((ours - dense) / FRAMES)}


def quality_table(record: Mapping[str, Any]) -> Table:
    """The part on what is drawn."""
    rows = {name: pooled(record, name) for name in CELLS}
    rows["dense"]["difference"] = None
    rows |= {name: figures([found]) for name, found in record["ceiling"].items()}
    lines: list[tuple[str | Number, ...]] = []
    for name, found in rows.items():
        consistency, background = (found[each] for each in MEANS)
        low, high = (f"{consistency[end]:.3f}" for end in ("low", "high"))
        cells = (
            *(shown_share(found[each]) for each in COUNTS),
            shown_difference(found.get("difference")),
            Number(f"{consistency['mean']:.3f} ({low}–{high})"),
            Number(f"{background['mean']:.1f}"),
        )
        lines.append((name, *cells))
    names = ("all three", "motion", "clips", "points to dense", "consistency", "background")
    return Table("What is seen", ("", *ATTRIBUTES, *names), lines, QUALITY)


def tables(record: Mapping[str, Any]) -> tuple[Table, Table]:
    return quality_table(record), time_table(record, "clip")


PAGE = """# A Wan-type model of moving digits, sparse without retraining

Written by `benchmarks/video_glyphs.py` from the figures in `benchmarks/results`.

A `WanTransformer3DModel` with {layers} blocks, {heads} heads of 32 ({parameters:,} parameters)
learnt rectified flow on clips of {frames} frames of 128×128 pixels: a handwritten digit in one
color moves over a texture along the way that a caption names last: {ways}. Text comes from the
bundled CLIP through cross-attention; the bundled autoencoder makes 32×32 latents of each frame,
and a token is 2×2 of them, so {tokens:,} attend to each other. Each of {seeds} seeds trained
{image_steps:,} steps of {image_batch} single frames, whose captions name no way, and {steps:,}
steps of {batch} clips ({minutes} minutes on {cores} cores, the tuning below included), captions
dropped one time in ten, noise levels shifted by {shift:g} as Wan's are.

Then queries see a window of {window} tokens, frames first, shared by {stride} of them:
{sparsity:.1f} % of the pairs fall away. Each row draws the same {images} held-out prompts a seed
from the same noise, in {sampling_steps} steps of UniPC with guidance {guidance:g}: dense; with the
first {dense_steps} steps dense and the others sparse; sparse in all steps; and sparse in all steps
after {tuning} steps of training with that attention. Only the last changed any parameter.

![Rows of clips: {names}]({picture})

From the top: {names}; prompts: {prompts}.

"""
QUALITY = """The digit is found in each frame by its color, whichever of the six that is, and the
bundled judge looks at 64×64 pixels around it: *digit*, *color* and *texture* are the shares of
frames that show what the prompt asks for, *all three* of those with nothing wrong. *Motion* is the
share of clips whose digit goes the way that the prompt names: of the six ways, enlarged to fit,
its path is most like that one, which explains 80 % of it or more. *Clips* have that and three
quarters of their frames right. All with 95 % Wilson intervals. *Points to dense* is the difference
in *all three*, clip by clip from the same prompt and noise, with a 95 % interval over clips.
*Consistency* is the mean cosine of consecutive frames' features of the bundled CLIP, read beside
that of rendered clips; *background* is by how much the median pixel changes from frame to frame,
of 255. *Rendered* are clips of the same prompts in handwriting that no model saw, *autoencoded*
these after the autoencoder."""
PICTURED, SHRUNK = 4, 96  # prompts of the GIF; pixels along a side of a frame there


def page(record: Mapping[str, Any], path: Path, world: ClipWorld) -> str:
    """The page above its tables, in Markdown; its GIF is written beside it."""
    study, seeds = record["study"], record["seeds"]
    picture, first = path.with_suffix(".gif"), min(map(int, seeds))
    rows = [np.load(world.folder / shown(name, first))[:PICTURED] for name in CELLS]
    save_gif(sheet(rows), picture, 5)
    return PAGE.format(
        **study,
        parameters=record["parameters"],
        frames=FRAMES,
        ways=", ".join(f"“{name}”" for name in WAYS),
        tokens=int(np.prod(GRID)),
        seeds=len(seeds),
        minutes=minutes_of(record, (*ClipWorld.stages, "tuning")),
        cores=record["cpu_cores"],
        shift=SHIFT,
        window=by(WINDOW, "×"),
        stride=by(STRIDE, "×"),
        sparsity=100 * record["timing"]["sparsity"],
        guidance=GUIDANCE,
        tuning=max(1, study["steps"] // 10),
        picture=picture.name,
        names="; ".join(CELLS),
        prompts="; ".join(f"“{each.text}”" for each in world.asked(first)[:PICTURED]),
    )


def sheet(rows: Sequence[np.ndarray]) -> np.ndarray:
    """One video [F,H,W,3]: a row of clips for each cell; a column shares prompt and noise."""
    small = (SHRUNK, SHRUNK)

    def shrunk(clip: np.ndarray) -> np.ndarray:
        frames = [np.asarray(Image.fromarray(frame).resize(small)) for frame in clip]
        return np.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)

    lines = [np.concatenate([shrunk(clip) for clip in row], axis=2) for row in rows]
    return np.concatenate(lines, axis=1)


def main(arguments: Sequence[str] | None = None) -> None:
    command(ClipWorld, Study(), QUICK, tables, page, __doc__.splitlines()[0], arguments)


if __name__ == "__main__":
    main()
