"""A small FLUX-type model draws scenes of digits: dense, made sparse, and sparse after tuning.

    python benchmarks/flux_glyphs.py --seeds 0          # one training, its drawings, the figures
    python benchmarks/flux_glyphs.py --seeds 0 1 2 --page docs/flux_glyphs.md
    python benchmarks/flux_glyphs.py --quick            # seconds, to try the script

A scene is 128x128 pixels: four handwritings of the digit that its caption names, in one color, on
one texture; the bundled autoencoder makes 32x32 latents of it, one token each. For each seed a
`FluxTransformer2DModel` learns rectified flow on such scenes, told captions by the bundled CLIP.
Its attention among the image's tokens then gives way to neighborhood attention, the window and
stride of `flux-4k` at an eighth of its sides, which sees a tenth of the pairs: after a third of the
steps and in all of them, with the parameters as they are, and in all steps after training on with
it for a tenth as long. All draw the same held-out prompts from the same noise, and the judge of the
bundled model says what each quarter of a scene shows. Drawing is timed in turns, beside what the
simulator predicts from the machine's rates.

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
)
from conceptax.flax_models.layers.attention import GNA
from conceptax.flax_models.layers.joint_attention import JointTextCondition
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
from conceptax.methods.sampling import FlowMatchSchedule, LinearSampler, flow_euler_sampler
from conceptax.reporting.gna_tables import by
from conceptax.reporting.report import Number, Table

ACROSS = 2  # digits along each side of a scene
QUARTERS = ACROSS**2
SCENE = ACROSS * IMAGE_SIZE
SIDE = SCENE // 4  # latents, and tokens
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
      scenes: rendered for the trainings.
      steps, batch, learning_rate, ema: of the dense training; the tuning has a tenth of the steps
        and a third of the rate.
      images: scenes that a cell draws for a seed.
      sampling_steps, dense_steps: of a drawing; the cell that begins densely has the latter so.
      drawn: scenes at a time.
      rounds: of the timing.
    """

    double: int = 2
    single: int = 3
    heads: int = 3
    scenes: int = 4000
    steps: int = 2000
    batch: int = 8
    learning_rate: float = 2e-3
    ema: float = 0.995
    images: int = 200
    sampling_steps: int = 15
    dense_steps: int = 5
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
        """Of the dense training, and of the sparse tuning."""
        training = Recipe(self.steps, self.batch, self.learning_rate, ema=self.ema)
        return {"training": training, "tuning": tenth(training)}


QUICK = Study(
    **{"double": 1, "single": 1, "heads": 1, "scenes": 4, "steps": 2, "batch": 2, "images": 3},
    **{"sampling_steps": 3, "dense_steps": 1, "drawn": 2, "rounds": 1},
)


CELLS = cells_of(GNA(window=WINDOW, stride=STRIDE), "a third of the steps dense")


# ---- data ----


def scene(rng: np.random.Generator, triple: Any, split: str) -> np.ndarray:
    """Four handwritings of a digit, uint8 [128,128,3], of a (digit, color, texture)."""
    digit, color, texture = map(int, triple)
    source, jitter = load_split(split), Jitter()
    image = background(rng, texture, SCENE)
    for top in range(0, SCENE, IMAGE_SIZE):
        for left in range(0, SCENE, IMAGE_SIZE):
            quarter = slice(top, top + IMAGE_SIZE), slice(left, left + IMAGE_SIZE)
            coverage = ink(rng, source.splines[rng.choice(source.of(digit))], jitter)
            fill = varied(rng, COLOR_VALUES[color], jitter)
            image[quarter] = paint(image[quarter], coverage, fill)
    return to_bytes(image)


def rendered(triples: Any, split: str) -> np.ndarray:
    """One scene per triple, each a function of split, index and triple alone."""
    rngs = (np.random.default_rng([SPLITS.index(split), i]) for i in range(len(triples)))
    pairs = zip(rngs, triples, strict=True)
    return np.stack([scene(rng, triple, split) for rng, triple in pairs])


class SceneWorld(World):
    """Four digits to a scene, drawn by a FLUX-type model."""

    name, kind, cells = "flux_glyphs", FluxTransformer2DModel, CELLS
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
        """Latents' mean and deviation [N,32,32,4], scaled, and `triple` [N,3]; kept on the disk."""

        def make() -> dict[str, np.ndarray]:
            rng = np.random.default_rng(0)
            chosen = rng.integers(len(TRIPLES), size=self.study.scenes)
            triples = np.asarray(TRIPLES)[chosen]
            return self.encoded(rendered(triples, "generator")) | {"triple": triples}

        return self.kept(f"scenes_{self.study.scenes}", make)

    def batches(self, name: str, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """Shuffled anew for each round, each time with other captions."""
        data, rng = self.data, np.random.default_rng(seed)
        for rows in shuffled(rng, len(data["mean"]), self.study.batch):
            texts = [caption(rng, *map(int, data["triple"][row])) for row in rows]
            tokens = np.stack([self.tokens(text) for text in texts])
            yield {"mean": data["mean"][rows], "std": data["std"][rows], "tokens": tokens}

    def asked(self, seed: int) -> list[Prompt]:
        return self.prompts_of(seed)

    def rendered(self, asked: Sequence[Prompt]) -> np.ndarray:
        return rendered([(each.digit, each.color, each.texture) for each in asked], "judge_test")

    def judged(
        self, drawn: np.ndarray, asked: Sequence[Prompt], real: np.ndarray
    ) -> dict[str, Any]:
        """What the judge finds right; `right` is how many quarters of each scene are so wholly.

        `quarter` and the attributes count quarters, `scene` scenes with four right ones. `distance`
        is the Fréchet distance of the judge's features from those of `real`.
        """
        parts, shape = quarters(drawn), (len(drawn), QUARTERS)
        found, right = self.judge(parts), {}
        for name in ATTRIBUTES:
            wanted = np.asarray([getattr(each, name) for each in asked])
            right[name] = found[name].reshape(shape) == wanted[:, None]
        whole = np.logical_and.reduce(list(right.values()))
        features = self.judge.features(parts), self.judge.features(quarters(real))
        return {
            **{each: proportion(hits.ravel()) for each, hits in right.items()},
            "quarter": proportion(whole.ravel()),
            "scene": proportion(whole.all(axis=1)),
            "distance": round(frechet_distance(*features), 3),
            "right": whole.sum(axis=1).tolist(),
        }


def quarters(images: np.ndarray) -> np.ndarray:
    """[N,128,128,3] -> [N*4,64,64,3], those of a scene together, row by row."""
    parts = images.reshape(-1, ACROSS, IMAGE_SIZE, ACROSS, IMAGE_SIZE, 3)
    return parts.transpose(0, 1, 3, 2, 4, 5).reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)


# ---- the page ----


def pooled(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A cell's figures over all seeds, and by how much fewer quarters are right than dense.

    The difference is that of scenes with the same prompt and noise, so its interval knows that
    quarters of a scene are alike.
    """
    seeds = record["seeds"].values()
    cells = [seed["cells"][name] for seed in seeds]
    found: dict[str, Any] = {}
    for figure in (*ATTRIBUTES, "quarter", "scene"):
        count, of = (sum(cell[figure][each] for cell in cells) for each in ("count", "of"))
        value, low, high = rate(count, of)
        found[figure] = {"count": count, "of": of, "rate": value, "low": low, "high": high}
    ours, dense = (
        np.concatenate([seed["cells"][each]["right"] for seed in seeds]) for each in (name, "dense")
    )
    found["difference"] = mean_interval((ours - dense) / QUARTERS)
    found["distance"] = statistics.mean(cell["distance"] for cell in cells)
    return found


def quality_table(record: Mapping[str, Any]) -> Table:
    """The part on what is drawn."""
    figures = ("digit", "color", "texture", "quarter", "scene")
    lines: list[tuple[str | Number, ...]] = []
    for name in CELLS:
        found = pooled(record, name)
        apart = shown_difference(None if name == "dense" else found["difference"])
        shares = (shown_share(found[each]) for each in figures)
        lines.append((name, *shares, apart, Number(f"{found['distance']:.2f}")))
    for name, found in record["ceiling"].items():
        shares = (shown_share(found[each]) for each in figures)
        lines.append((name, *shares, shown_difference(None), Number(f"{found['distance']:.2f}")))
    columns = (
        "",
        "digit",
        "color",
        "texture",
        "all three",
        "scenes",
        "points to dense",
        "distance",
    )
    return Table("What the judge sees", columns, lines, QUALITY)


PAGE = """# A FLUX-type model, sparse without retraining

Written by `benchmarks/flux_glyphs.py` from the figures in `benchmarks/results`.

A `FluxTransformer2DModel` with {double} double and {single} single blocks, {heads} heads of 32
({parameters:,} parameters) learnt rectified flow on scenes of 128×128 pixels: four handwritings of
the digit that a caption names, in one color, on one texture. Text comes from the bundled CLIP,
states and pooled state; the bundled autoencoder makes 32×32 latents of a scene, one token each, so
1,024 and {text} of text attend jointly. Each of {seeds} seeds trained {steps:,} steps of {batch}
scenes ({minutes} minutes on {cores} cores), captions dropped one time in ten.

Then the image's queries see a window of {window} tokens, shared by {stride} of them
(`flux-4k` at an eighth of its sides), and all of the text: {sparsity:.1f} % of the pairs
among image tokens fall away. Each row draws the same {images} held-out prompts a seed from the
same noise, in {sampling_steps} Euler steps with FLUX's shift and guidance {guidance:g}: dense;
with the first {dense_steps} steps dense and the others sparse; sparse in all steps; and sparse in
all steps after {tuning} steps of training with that attention. Only the last changed any
parameter.

![Rows of scenes: {names}]({picture})

From the top: {names}.

"""
QUALITY = """The bundled judge looks at each quarter of a scene: *digit*, *color* and *texture*
are the shares of quarters that show what the prompt asks for, *all three* of those with nothing
wrong, *scenes* of scenes with four such quarters, with 95 % Wilson intervals. *Points to dense* is
the difference in *all three*, scene by scene from the same prompt and noise, with a 95 % interval
over scenes. *Distance* is the Fréchet distance of the judge's features from those of rendered
scenes of the same prompts, in handwriting that no model saw; *rendered* is how well the judge
reads these, *autoencoded* after the autoencoder."""


def tables(record: Mapping[str, Any]) -> tuple[Table, Table]:
    return quality_table(record), time_table(record, "scene", " with text")


def page(record: Mapping[str, Any], path: Path, world: SceneWorld) -> str:
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
        minutes=minutes_of(record),
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
    """One row of scenes for each cell; a column shares its prompt and its noise."""
    padded = [np.pad(row, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255) for row in rows]
    lines = [row.transpose(1, 0, 2, 3).reshape(row.shape[1], -1, 3) for row in padded]
    return Image.fromarray(np.concatenate(lines))


def main(arguments: Sequence[str] | None = None) -> None:
    command(SceneWorld, Study(), QUICK, tables, page, __doc__.splitlines()[0], arguments)


if __name__ == "__main__":
    main()
