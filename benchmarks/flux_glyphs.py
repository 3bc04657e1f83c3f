"""A small FLUX-type model draws digits: dense, made sparse, and sparse after tuning.

    python benchmarks/flux_glyphs.py --seeds 0          # one training, its drawings, the figures
    python benchmarks/flux_glyphs.py --seeds 0 1 2 --page docs/flux_glyphs.md
    python benchmarks/flux_glyphs.py --quick            # seconds, to try the script

An image is 64x64 pixels of the glyphs world, a handwritten digit in one color on one texture,
enlarged twice: the bundled autoencoder makes 32x32 latents of it, one token each. A
`FluxTransformer2DModel` learns rectified flow on images as they are, told captions by the bundled
CLIP, and then, for each seed anew, on enlarged ones, as models of many pixels do; an image spans
the same angles of the rotary embedding in both, whose tokens lie closer then. Its attention
among the image's tokens then gives way to neighborhood attention, the window and stride of
`flux-4k` at an eighth of its sides, which sees a tenth of the pairs: after a third of the steps
and in all of them, with the parameters as they are, and in all steps after training on with it for
a tenth as long. All draw the same held-out prompts from the same noise, and the judge of the
bundled model says what the images show. Drawing is timed in turns, beside what the simulator
predicts from the machine's rates.

Trainings keep checkpoints and finished cells stay in the results file: run the same again after an
interruption. --page writes the page from the figures, and its picture.
"""

import dataclasses
import functools
import statistics
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
from transformer_speed import preset_of, windows

from conceptax.flax_models.flux_transformer_2d import (
    FluxTransformer2DConfig,
    FluxTransformer2DModel,
    rotary_of,
)
from conceptax.flax_models.layers.attention import GNA
from conceptax.flax_models.layers.joint_attention import JointTextCondition
from conceptax.flax_models.layers.rotary import Rotary
from conceptax.kernels.gna.presets import Preset
from conceptax.methods.evaluation.statistics import (
    frechet_distance,
    mean_interval,
    proportion,
    rate,
)
from conceptax.methods.glyphs.captions import COLORS, DIGITS, TEXTURES, Prompt, caption
from conceptax.methods.glyphs.judge import ATTRIBUTES
from conceptax.methods.glyphs.recipe import Recipe
from conceptax.methods.glyphs.world import IMAGE_SIZE, render_many
from conceptax.methods.sampling import FlowMatchSchedule, LinearSampler, flow_euler_sampler
from conceptax.reporting.gna_tables import by
from conceptax.reporting.report import Number, Table

LARGER = 2  # times along each side
SIDE = LARGER * IMAGE_SIZE // 4  # latents, and tokens
# flux-4k's at an eighth of its sides.
((WINDOW, STRIDE),) = windows((SIDE, SIDE), ["flux-4k"]).values()
SCHEDULE = FlowMatchSchedule(use_dynamic_shifting=True)  # FLUX.1-dev's
TRIPLES = [
    (d, c, t) for d in range(DIGITS) for c in range(len(COLORS)) for t in range(len(TEXTURES))
]


@dataclasses.dataclass(frozen=True)
class Study:
    """Sizes of all that is made; the figures are of these.

    Attributes:
      double, single: blocks of the model.
      heads: of 32 features.
      digits: rendered for the trainings.
      small_steps, small_batch, small_rate: of the first training, on images that are not enlarged.
      steps, batch, learning_rate: of that on enlarged ones; the tuning has a tenth of the steps and
        a third of the rate.
      ema: of both.
      images: that a cell draws for a seed.
      sampling_steps, dense_steps: of a drawing; the cell that begins densely has the latter so.
      drawn: images at a time.
      rounds: of the timing.
    """

    double: int = 2
    single: int = 3
    heads: int = 3
    digits: int = 8000
    small_steps: int = 2000
    small_batch: int = 32
    small_rate: float = 3e-3
    steps: int = 600
    batch: int = 8
    learning_rate: float = 1e-3
    ema: float = 0.995
    images: int = 200
    sampling_steps: int = 12
    dense_steps: int = 4
    drawn: int = 10
    rounds: int = 3

    @property
    def config(self) -> FluxTransformer2DConfig:
        """Of the model: latents of 4 channels, and the bundled CLIP's states of 96."""
        return FluxTransformer2DConfig(
            in_channels=4,
            num_layers=self.double,
            num_single_layers=self.single,
            attention_head_dim=32,
            num_attention_heads=self.heads,
            joint_attention_dim=96,
            pooled_projection_dim=96,
            axes_dims_rope=(4, 14, 14),
        )

    @property
    def recipes(self) -> dict[str, Recipe]:
        """Of the dense trainings, and of the sparse tuning."""
        training = Recipe(self.steps, self.batch, self.learning_rate, ema=self.ema)
        return {
            "small": Recipe(self.small_steps, self.small_batch, self.small_rate, ema=self.ema),
            "training": training,
            "tuning": tenth(training),
        }


QUICK = Study(
    **{"double": 1, "single": 1, "heads": 1, "digits": 4, "steps": 2, "batch": 2, "images": 3},
    **{"small_steps": 2, "small_batch": 2},
    **{"sampling_steps": 3, "dense_steps": 1, "drawn": 2, "rounds": 1},
)


CELLS = cells_of(GNA(window=WINDOW, stride=STRIDE), "a third of the steps dense")


# ---- data ----


def rendered(triples: Any, split: str, seed: int) -> np.ndarray:
    """Images [N,64,64,3], uint8, of (digit, color, texture)."""
    return render_many(*np.asarray(triples).T, split=split, seed=seed)


def enlarged(images: np.ndarray) -> np.ndarray:
    """[N,64,64,3] -> [N,128,128,3]."""
    size = 2 * (LARGER * IMAGE_SIZE,)
    return np.stack(
        [Image.fromarray(each).resize(size, Image.Resampling.BICUBIC) for each in images]
    )


def reduced(images: np.ndarray) -> np.ndarray:
    """[N,128,128,3] -> [N,64,64,3], which the judge knows."""
    size = 2 * (IMAGE_SIZE,)
    return np.stack([Image.fromarray(each).resize(size, Image.Resampling.BOX) for each in images])


class Interpolated(FluxTransformer2DModel):
    """A grid of any size spans what one of SIDE / LARGER tokens a side does."""

    def rotary(self, grid: tuple[int, int], text: int) -> Rotary:
        return rotary_of(self.config, grid, text, spacing=SIDE / LARGER / grid[0])


class DigitWorld(World):
    """Large digits, drawn by a FLUX-type model."""

    name, kind, cells = "flux_glyphs", Interpolated, CELLS
    stages, shared, shift = ("small", "training"), ("small",), 2.0
    grid, latent_shape = (SIDE, SIDE), (SIDE, SIDE, 4)

    @staticmethod
    def told(output: Any) -> JointTextCondition:
        return JointTextCondition(output.last_hidden_state, output.pooled)

    @functools.cached_property
    def sampler(self) -> LinearSampler:
        """FLUX.1's steps for so many tokens."""
        steps = self.study.sampling_steps
        sigmas = np.linspace(1.0, 1.0 / steps, steps)
        return flow_euler_sampler(SCHEDULE, steps, sigmas=sigmas, mu=SCHEDULE.mu_of(SIDE**2))

    @functools.cached_property
    def preset(self) -> Preset:
        return preset_of(self.study.config, TEXT, self.grid, WINDOW, STRIDE)

    @functools.cached_property
    def data(self) -> dict[str, np.ndarray]:
        """Latents' mean and deviation, scaled, as they are [N,16,16,4] and enlarged [N,32,32,4].

        `small mean`, `mean` and so on, and `triple` [N,3]; kept on the disk.
        """

        def make() -> dict[str, np.ndarray]:
            rng = np.random.default_rng(0)
            triples = np.asarray(TRIPLES)[rng.integers(len(TRIPLES), size=self.study.digits)]
            images = rendered(triples, "generator", 0)
            small = {f"small {name}": each for name, each in self.encoded(images).items()}
            return small | self.encoded(enlarged(images)) | {"triple": triples}

        return self.kept(f"digits_{self.study.digits}", make)

    def batches(self, name: str, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """Shuffled anew for each round, each time with other captions."""
        data, rng = self.data, np.random.default_rng(seed)
        size, prefix = self.study.recipes[name].batch_size, "small " if name == "small" else ""
        for rows in shuffled(rng, len(data["triple"]), min(size, len(data["triple"]))):
            texts = [caption(rng, *map(int, data["triple"][row])) for row in rows]
            parts = {each: data[prefix + each][rows] for each in ("mean", "std")}
            yield {**parts, "tokens": np.stack([self.tokens(text) for text in texts])}

    def asked(self, seed: int) -> list[Prompt]:
        return self.prompts_of(seed)

    def rendered(self, asked: Sequence[Prompt]) -> np.ndarray:
        triples = [(each.digit, each.color, each.texture) for each in asked]
        return enlarged(rendered(triples, "judge_test", 1))

    def judged(
        self, drawn: np.ndarray, asked: Sequence[Prompt], real: np.ndarray
    ) -> dict[str, Any]:
        """What the judge finds right; `right` is whether an image is so wholly, 1 or 0.

        `distance` is the Fréchet distance of the judge's features from those of `real`.
        """
        drawn, real = reduced(drawn), reduced(real)
        found, right = self.judge(drawn), {}
        for name in ATTRIBUTES:
            right[name] = found[name] == np.asarray([getattr(each, name) for each in asked])
        whole = np.logical_and.reduce(list(right.values()))
        features = self.judge.features(drawn), self.judge.features(real)
        return {
            **{each: proportion(hits) for each, hits in right.items()},
            "whole": proportion(whole),
            "distance": round(frechet_distance(*features), 3),
            "right": whole.astype(int).tolist(),
        }


# ---- the page ----


def pooled(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A cell's figures over all seeds, and by how much fewer images are right than dense.

    The difference is that of images with the same prompt and noise.
    """
    seeds = record["seeds"].values()
    cells = [seed["cells"][name] for seed in seeds]
    found: dict[str, Any] = {}
    for figure in (*ATTRIBUTES, "whole"):
        count, of = (sum(cell[figure][each] for cell in cells) for each in ("count", "of"))
        value, low, high = rate(count, of)
        found[figure] = {"count": count, "of": of, "rate": value, "low": low, "high": high}
    ours, dense = (
        np.concatenate([seed["cells"][each]["right"] for seed in seeds]) for each in (name, "dense")
    )
    found["difference"] = mean_interval((ours - dense).astype(np.float64))
    found["distance"] = statistics.mean(cell["distance"] for cell in cells)
    return found


def quality_table(record: Mapping[str, Any]) -> Table:
    """The part on what is drawn."""
    figures = (*ATTRIBUTES, "whole")
    lines: list[tuple[str | Number, ...]] = []
    for name in CELLS:
        found = pooled(record, name)
        apart = shown_difference(None if name == "dense" else found["difference"])
        shares = (shown_share(found[each]) for each in figures)
        lines.append((name, *shares, apart, Number(f"{found['distance']:.2f}")))
    for name, found in record["ceiling"].items():
        shares = (shown_share(found[each]) for each in figures)
        lines.append((name, *shares, shown_difference(None), Number(f"{found['distance']:.2f}")))
    columns = ("", *ATTRIBUTES, "all three", "points to dense", "distance")
    return Table("What the judge sees", columns, lines, QUALITY)


PAGE = """# A FLUX-type model, sparse without retraining

Written by `benchmarks/flux_glyphs.py` from the figures in `benchmarks/results`.

A `FluxTransformer2DModel` with {double} double and {single} single blocks, {heads} heads of 32
({parameters:,} parameters) learnt rectified flow on images of the glyphs world: a handwritten
digit in one color on one texture, 64×64 pixels, and enlarged to 128×128; tokens of the latter lie
half as far apart in the rotary embedding (position interpolation, Chen et al. 2023, arXiv
2306.15595), which is the model's only departure from FLUX.1. Text comes from the
bundled CLIP, states and pooled state; the bundled autoencoder makes 32×32 latents of an enlarged
image, one token each, so 1,024 and {text} of text attend jointly. It trained {small_steps:,}
steps of {small_batch} images as they are, 256 tokens each, then, for each of {seeds} seeds anew,
{steps:,} of {batch} enlarged ones ({minutes} minutes on {cores} cores), captions dropped one time
in ten.

Then the image's queries see a window of {window} tokens, shared by {stride} of them
(`flux-4k` at an eighth of its sides), and all of the text: {sparsity:.1f} % of the pairs
among image tokens fall away. Each row draws the same {images} held-out prompts a seed from the
same noise, in {sampling_steps} Euler steps with FLUX's shift and guidance {guidance:g}: dense;
with the first {dense_steps} steps dense and the others sparse; sparse in all steps; and sparse in
all steps after {tuning} steps of training with that attention. Only the last changed any
parameter.

![Rows of digits: {names}]({picture})

From the top: {names}. A digit is about twenty
tokens high, twice the window: what it is to be is agreed upon in the dense steps, or by way of the
text alone.

"""
QUALITY = """The bundled judge looks at each image at half its size: *digit*, *color* and *texture*
are the shares that show what the prompt asks for, *all three* of those with nothing wrong, with
95 % Wilson intervals. *Points to dense* is the difference in *all three*, image by image from the
same prompt and noise, with a 95 % interval. *Distance* is the Fréchet distance of the judge's
features from those of rendered images of the same prompts, in handwriting that no model saw;
*rendered* is how well the judge reads these, *autoencoded* after the autoencoder."""


def tables(record: Mapping[str, Any]) -> tuple[Table, Table]:
    return quality_table(record), time_table(record, "image", " with text")


def page(record: Mapping[str, Any], path: Path, world: DigitWorld) -> str:
    """The page above its tables, in Markdown; its picture is written beside it."""
    study, seeds = record["study"], record["seeds"]
    picture, first = path.with_suffix(".png"), min(map(int, seeds))
    rows = [np.load(world.folder / shown(name, first)) for name in CELLS]
    sheet(rows).save(picture, optimize=True)
    return PAGE.format(
        **study,
        parameters=record["parameters"],
        text=TEXT,
        seeds=len(seeds),
        minutes=minutes_of(record, (*DigitWorld.stages, "tuning")),
        cores=record["cpu_cores"],
        window=by(WINDOW, "×"),
        stride=by(STRIDE, "×"),
        sparsity=100 * record["timing"]["sparsity"],
        guidance=GUIDANCE,
        tuning=max(1, study["steps"] // 10),
        picture=picture.name,
        names="; ".join(CELLS),
    )


def sheet(rows: Sequence[np.ndarray]) -> Image.Image:
    """One row of images for each cell; a column shares its prompt and its noise."""
    padded = [np.pad(row, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255) for row in rows]
    lines = [row.transpose(1, 0, 2, 3).reshape(row.shape[1], -1, 3) for row in padded]
    return Image.fromarray(np.concatenate(lines))


def main(arguments: Sequence[str] | None = None) -> None:
    command(DigitWorld, Study(), QUICK, tables, page, __doc__.splitlines()[0], arguments)


if __name__ == "__main__":
    main()
