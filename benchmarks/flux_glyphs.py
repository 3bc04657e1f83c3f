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

import argparse
import dataclasses
import datetime
import functools
import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _processes import peak_memory
from flax import nnx
from PIL import Image
from transformer_speed import preset_of, windows

import conceptax
from conceptax.converters import load_pytorch
from conceptax.flax_models.flux_transformer_2d import (
    FluxTransformer2DConfig,
    FluxTransformer2DModel,
)
from conceptax.flax_models.layers.attention import GNA
from conceptax.flax_models.layers.joint_attention import JointSequence, JointTextCondition
from conceptax.kernels.gna.simulator import measure, simulate_model
from conceptax.kernels.gna.simulator.whole_model import speedups
from conceptax.methods.diffusion.text_to_image import Phase, sample_latents, to_uint8
from conceptax.methods.evaluation.statistics import (
    frechet_distance,
    mean_interval,
    proportion,
    rate,
)
from conceptax.methods.evaluation.suites import choose
from conceptax.methods.glyphs.captions import COLORS, DIGITS, TEXTURES, caption, prompts
from conceptax.methods.glyphs.judge import ATTRIBUTES, Judge, load_judge
from conceptax.methods.glyphs.quality import name_of
from conceptax.methods.glyphs.recipe import Recipe, Stage, final_params
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
from conceptax.methods.sampling import (
    FlowMatchSchedule,
    LinearSampler,
    encode_images,
    flow_euler_sampler,
)
from conceptax.methods.training import apply_gradients, init_state, train
from conceptax.reporting.report import Number, Table, markdown_table
from conceptax.reporting.results import environment, write_records

ROOT = Path(__file__).resolve().parent.parent
ACROSS = 2  # digits along each side of a scene
QUARTERS = ACROSS**2
SCENE = ACROSS * IMAGE_SIZE
SIDE = SCENE // 4  # latents, and tokens
WINDOW, STRIDE = windows(SIDE)["GNA 10x10, stride 2"]  # flux-4k's at an eighth of its sides
GUIDANCE, CAPTION_DROPOUT = 3.0, 0.1
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
        tenth = max(1, self.steps // 10)
        return {
            "training": Recipe(self.steps, self.batch, self.learning_rate, ema=self.ema),
            "tuning": Recipe(tenth, self.batch, self.learning_rate / 3, ema=0.98),
        }


QUICK = Study(
    **{"double": 1, "single": 1, "heads": 1, "scenes": 4, "steps": 2, "batch": 2, "images": 3},
    **{"sampling_steps": 3, "dense_steps": 1, "drawn": 2, "rounds": 1},
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """How a row of the table draws."""

    attention: GNA | None = None
    starts_dense: bool = False
    tuned: bool = False


SPARSE = GNA(window=WINDOW, stride=STRIDE)
CELLS = {
    "dense": Cell(),
    "a third of the steps dense": Cell(SPARSE, starts_dense=True),
    "all steps sparse": Cell(SPARSE),
    "all steps sparse, tuned": Cell(SPARSE, tuned=True),
}


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


class World:
    """The bundled parts, and what is made with them once."""

    def __init__(self, study: Study, folder: Path) -> None:
        self.study, self.folder = study, folder
        source = conceptax.bundled_model()
        self.pipeline = load_pytorch(source)
        self.judge = load_judge(source / "judge")
        self.text_graphdef, text = nnx.split(self.pipeline.text_encoder)
        self.vae_graphdef, vae = nnx.split(self.pipeline.vae)
        self.text, self.vae = nnx.to_pure_dict(text), nnx.to_pure_dict(vae)

    @functools.cache  # noqa: B019
    def tokens(self, text: str) -> np.ndarray:
        """Ids [L] of a text."""
        return np.asarray(self.pipeline.tokenize([text])[0], np.int32)

    @functools.cached_property
    def data(self) -> dict[str, np.ndarray]:
        """Latents' mean and deviation [N,32,32,4], scaled, and `triple` [N,3]; kept on the disk."""
        path = self.folder / f"scenes_{self.study.scenes}.npz"
        if not path.exists():
            rng = np.random.default_rng(0)
            chosen = rng.integers(len(TRIPLES), size=self.study.scenes)
            triples = np.asarray(TRIPLES)[chosen]
            mean, std = encode_images(self.pipeline.vae, rendered(triples, "generator"))
            vae, half = self.pipeline.vae, np.float16
            arrays = {
                "mean": np.asarray(vae.scale(jnp.asarray(mean)), half),
                "std": (std * vae.config.scaling_factor).astype(half),
                "triple": triples,
            }
            written = path.with_suffix(".part.npz")
            np.savez(written, **arrays)
            os.replace(written, path)
        return dict(np.load(path))

    def batches(self, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """Shuffled anew for each round, each time with other captions."""
        data, size = self.data, self.study.batch
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(len(data["mean"]))
            for start in range(0, len(order) - size + 1, size):
                rows = order[start : start + size]
                texts = [caption(rng, *map(int, data["triple"][row])) for row in rows]
                tokens = np.stack([self.tokens(text) for text in texts])
                yield {"mean": data["mean"][rows], "std": data["std"][rows], "tokens": tokens}

    def condition(self, texts: Sequence[str]) -> JointTextCondition:
        """What the model is told of texts."""
        tokens = np.stack([self.tokens(text) for text in texts])
        return told(self.text_graphdef, self.text, jnp.asarray(tokens))

    def decode(self, latents: jax.Array) -> np.ndarray:
        """Scaled latents -> uint8 scenes."""
        return to_uint8(decoded(self.vae_graphdef, self.vae, latents))

    def reference(self, seed: int) -> tuple[list[Any], np.ndarray]:
        """The prompts of a seed, and rendered scenes of them in handwriting that no model saw."""
        asked = choose(prompts(), self.study.images, seed, name_of)
        triples = [(each.digit, each.color, each.texture) for each in asked]
        return asked, rendered(triples, "judge_test")


@functools.partial(jax.jit, static_argnums=0)
def told(graphdef: Any, params: Any, tokens: jax.Array) -> JointTextCondition:
    """A text tower's states and pooled state of token ids [B,L]."""
    output = nnx.merge(graphdef, params)(tokens)
    return JointTextCondition(output.last_hidden_state, output.pooled)


@functools.partial(jax.jit, static_argnums=0)
def decoded(graphdef: Any, params: Any, latents: jax.Array) -> jax.Array:
    """Images [-1,1] of scaled latents."""
    vae = nnx.merge(graphdef, params)
    return vae.decode(vae.unscale(latents))


# ---- training ----


@dataclasses.dataclass(frozen=True)
class FlowStage(Stage):
    """The static part of `flow_step`."""

    text_graphdef: nnx.GraphDef[Any]


def flow_step(static, state, frozen, batch, key):
    """One update on `batch` = {mean, std [B,32,32,4] of scaled latents, tokens [B,L]}.

    Rectified flow (Esser et al. 2024, arXiv 2403.03206): the velocity noise - x of (1 - t) x +
    t noise, t logit-normal.
    """
    draw, noise_key, time_key, drop_key = jax.random.split(key, 4)
    mean, std = (batch[each].astype(jnp.float32) for each in ("mean", "std"))
    x = mean + std * jax.random.normal(draw, mean.shape)
    noise = jax.random.normal(noise_key, x.shape)
    time = jax.nn.sigmoid(jax.random.normal(time_key, x.shape[:1]))
    share = time[:, None, None, None]
    dropped = jax.random.bernoulli(drop_key, CAPTION_DROPOUT, (len(x), 1))
    tokens = jnp.where(dropped, frozen["empty"][None], batch["tokens"])
    condition = told(static.text_graphdef, frozen["text"], tokens)

    def loss_of(params):
        model = nnx.merge(static.graphdef, params)
        velocity = model((1 - share) * x + share * noise, 1000.0 * time, condition)
        return jnp.mean((velocity - (noise - x)) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    return apply_gradients(state, gradients, static.optimizer), {"loss": loss}


@functools.cache
def structure(config: FluxTransformer2DConfig, attention: GNA | None) -> nnx.GraphDef[Any]:
    make = functools.partial(FluxTransformer2DModel, config, attention=attention)
    return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))[0]


def fit(world: World, name: str, attention: GNA | None, params: Any, seed: int) -> Any:
    """The parameters after a training of that name; those of a finished one are read."""
    study = world.study
    recipe, folder = study.recipes[name], trained(world, name, seed)
    optimizer = recipe.optimizer()
    state = train(
        flow_step,
        FlowStage(structure(study.config, attention), optimizer, world.text_graphdef),
        init_state(params, optimizer),
        {"text": world.text, "empty": world.tokens("")},
        world.batches(seed),
        key=jax.random.key(seed),
        num_steps=recipe.steps,
        fixed_length=True,
        checkpoint_dir=folder,
        checkpoint_every=100,
        keep=1,
        metrics_path=folder.with_suffix(".jsonl"),
        log_every=min(10, recipe.steps),
    )
    return final_params(state)


def trained(world: World, name: str, seed: int) -> Path:
    """The folder of a training's checkpoints."""
    return (world.folder / f"{name}_{seed}_{world.study.steps}").absolute()


def training_record(world: World, name: str, seed: int) -> dict[str, Any]:
    """How long a training took at its median speed, and where its loss ended."""
    path = trained(world, name, seed).with_suffix(".jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    speeds = [row["steps_per_second"] for row in rows if row["steps_per_second"]]
    steps, last = rows[-1]["step"], [row["loss"] for row in rows[-max(1, len(rows) // 10) :]]
    seconds = round(steps / statistics.median(speeds), 1) if speeds else None
    return {"steps": steps, "seconds": seconds, "loss": round(statistics.mean(last), 5)}


class Seed:
    """A seed's trainings, each done when something asks for it."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.seed = world, seed

    @functools.cached_property
    def dense(self) -> Any:
        model = FluxTransformer2DModel(self.world.study.config, rngs=nnx.Rngs(self.seed))
        return fit(self.world, "training", None, nnx.to_pure_dict(nnx.state(model)), self.seed)

    @functools.cached_property
    def tuned(self) -> Any:
        return fit(self.world, "tuning", SPARSE, self.dense, self.seed + 1000)

    def records(self) -> dict[str, Any]:
        return {
            "training": training_record(self.world, "training", self.seed),
            "tuning": training_record(self.world, "tuning", self.seed + 1000),
        }

    def params(self, cell: Cell) -> Any:
        return self.tuned if cell.tuned else self.dense


# ---- drawing ----


_sample = jax.jit(sample_latents, static_argnums=0)


def sampler_of(study: Study) -> LinearSampler:
    """FLUX.1's steps for so many tokens."""
    steps = study.sampling_steps
    sigmas = np.linspace(1.0, 1.0 / steps, steps)
    return flow_euler_sampler(SCHEDULE, steps, sigmas=sigmas, mu=SCHEDULE.mu_of(SIDE**2))


def drawer(world: World, cell: Cell, params: Any) -> Callable[[Sequence[str], Any], jax.Array]:
    """(texts, noise) -> latents."""
    study = world.study
    phases = (Phase(structure(study.config, cell.attention)),)
    if cell.starts_dense:
        phases = (Phase(structure(study.config, None), study.dense_steps), *phases)
    sampler = sampler_of(study)

    def draw(texts: Sequence[str], noise: Any) -> jax.Array:
        condition, negative = world.condition(texts), world.condition([""])
        whose = {"denoiser": params}
        return _sample(phases, whose, condition, negative, noise, sampler, GUIDANCE)

    return draw


def draw_all(world: World, cell: Cell, params: Any, texts: Sequence[str], seed: int) -> np.ndarray:
    """A scene per text, uint8; the n-th from the same noise in every cell."""
    draw, images = drawer(world, cell, params), []
    for rows in batches_of(len(texts), world.study.drawn):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(rows))
        noise = jax.vmap(lambda key: jax.random.normal(key, (SIDE, SIDE, 4)))(keys)
        images.append(world.decode(draw([texts[row] for row in rows], noise)))
    return np.concatenate(images)[: len(texts)]


def batches_of(total: int, size: int) -> list[np.ndarray]:
    """Row numbers; the last batch is filled up, so one program serves all."""
    starts = range(0, total, size)
    return [np.minimum(np.arange(start, start + size), total - 1) for start in starts]


def quarters(images: np.ndarray) -> np.ndarray:
    """[N,128,128,3] -> [N*4,64,64,3], those of a scene together, row by row."""
    parts = images.reshape(-1, ACROSS, IMAGE_SIZE, ACROSS, IMAGE_SIZE, 3)
    return parts.transpose(0, 1, 3, 2, 4, 5).reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)


def judged(
    images: np.ndarray, asked: Sequence[Any], judge: Judge, reference: np.ndarray
) -> dict[str, Any]:
    """What the judge finds right; `right` is how many quarters of each scene are in all respects.

    `quarter` and the attributes count quarters, `scene` scenes with four right ones. `distance` is
    the Fréchet distance of the judge's features from the reference's.
    """
    parts, shape = quarters(images), (len(images), QUARTERS)
    found = judge(parts)
    wanted = {each: np.asarray([getattr(a, each) for a in asked])[:, None] for each in ATTRIBUTES}
    right = {each: found[each].reshape(shape) == wanted[each] for each in ATTRIBUTES}
    whole = np.logical_and.reduce(list(right.values()))
    features = judge.features(parts), judge.features(quarters(reference))
    return {
        **{each: proportion(hits.ravel()) for each, hits in right.items()},
        "quarter": proportion(whole.ravel()),
        "scene": proportion(whole.all(axis=1)),
        "distance": round(frechet_distance(*features), 3),
        "right": whole.sum(axis=1).tolist(),
    }


# ---- times ----


def rates(study: Study, rounds: int) -> dict[str, measure.Timing]:
    """One product, one dense and one sparse attention of the model, as many scenes as drawn."""
    config, batch = study.config, 2 * study.drawn  # guidance looks twice
    heads, dim = config.num_attention_heads, config.attention_head_dim
    tokens = SIDE**2 + TEXT
    keys = iter(jax.random.split(jax.random.key(0), 5))
    normal = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    x, weights = (
        normal(batch * tokens, config.features),
        normal(config.features, 4 * config.features),
    )
    qkv = [normal(batch, tokens, heads, dim) for _ in range(3)]
    sequence = JointSequence((SIDE, SIDE))
    product = jax.jit(lambda x, weights: x @ weights)
    dense, sparse = (
        jax.jit(lambda q, k, v, setting=setting: sequence.attend(q, k, v, setting))
        for setting in (None, SPARSE)
    )
    return measure.take_turns(
        {
            "product": lambda: product(x, weights),
            "dense": lambda: dense(*qkv),
            "sparse": lambda: sparse(*qkv),
        },
        7 * rounds,
        seconds=0.0,
    )


TEXT = 24  # tokens of a caption


def timed(world: World, params: Any) -> dict[str, Any]:
    """Seconds a scene of each cell, in turns, and its gain beside the predicted one."""
    study = world.study
    texts = [each.text for each in prompts()[: study.drawn]]
    noise = jax.random.normal(jax.random.key(0), (study.drawn, SIDE, SIDE, 4))
    runs = {}
    for name, cell in CELLS.items():
        if not cell.tuned:  # the same program
            runs[name] = functools.partial(drawer(world, cell, params), texts, noise)
    drawn = measure.take_turns(runs, study.rounds, seconds=0.0)
    one = {name: timing.median for name, timing in rates(study, study.rounds).items()}
    asked = preset_of(study.config, TEXT, SIDE, WINDOW, STRIDE)
    batch, width = 2 * study.drawn, study.config.features
    operations = asked.model.operations(SIDE**2).attention / asked.model.layers
    linear = 8.0 * batch * (SIDE**2 + TEXT) * width**2 / one["product"]
    attention = batch * operations / one["dense"]
    kernel, cells = one["dense"] / one["sparse"], {}
    attending = asked.model.layers * study.sampling_steps * one["dense"]
    share = min(1.0, attending / drawn["dense"].median)
    result = None
    for name in runs:
        cell = CELLS[name]
        result = simulate_model(
            asked,
            steps=study.sampling_steps,
            dense_steps=study.dense_steps if cell.starts_dense else 0,
            linear_rate=linear / 1e12,
            attention_rate=attention / 1e12,
        )
        bound = speedups(result.with_text)["pairs"]
        cells[name] = {"seconds": round(drawn[name].median / study.drawn, 4)}
        if cell.attention is not None:
            cells[name] |= {
                "gain": round(measure.speedup(drawn["dense"], drawn[name]), 3),
                "predicted": round(result.end_to_end(min(bound, kernel)), 3),
                "predicted_by_share": round(result.end_to_end(min(bound, kernel), share), 3),
                "predicted_bound": round(result.end_to_end(bound), 3),
            }
    assert result is not None
    return {
        "cells": cells,
        "linear_gflops": round(linear / 1e9, 1),
        "attention_gflops": round(attention / 1e9, 1),
        "attention_share": round(result.attention_share, 4),
        "measured_share": round(share, 4),
        "kernel": round(kernel, 3),
        "pairs": round(speedups(result.with_text)["pairs"], 3),
        "sparsity": round(1 - 1 / speedups(result.image_alone)["pairs"], 4),
    }


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


def _share(figure: Mapping[str, Any]) -> Number:
    low, high = (f"{100 * figure[end]:.1f}" for end in ("low", "high"))
    return Number(f"{100 * figure['rate']:.1f} % ({low}–{high})")


def quality_table(record: Mapping[str, Any]) -> Table:
    """The part on what is drawn."""
    figures = ("digit", "color", "texture", "quarter", "scene")
    lines: list[tuple[str | Number, ...]] = []
    for name in CELLS:
        found = pooled(record, name)
        apart = found["difference"]
        told = "–"
        if name != "dense":
            low, high = (f"{100 * apart[end]:+.1f}" for end in ("low", "high"))
            told = f"{100 * apart['mean']:+.1f} ({low} to {high})"
        shares = (_share(found[each]) for each in figures)
        lines.append((name, *shares, Number(told), Number(f"{found['distance']:.2f}")))
    for name, found in record["ceiling"].items():
        shares = (_share(found[each]) for each in figures)
        lines.append((name, *shares, Number("–"), Number(f"{found['distance']:.2f}")))
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


def time_table(record: Mapping[str, Any]) -> Table:
    """The part on times."""
    timing, lines = record["timing"], []
    for name, cell in timing["cells"].items():
        gains = ("–",) * len(GAINS)
        if "gain" in cell:
            gains = tuple(f"{cell[each]:.2f} ×" for each in GAINS)
        lines.append((name, Number(f"{cell['seconds']:.2f}"), *map(Number, gains)))
    shares = {each: 100 * timing[each] for each in ("attention_share", "measured_share")}
    columns = ("", "seconds a scene", *GAINS.values())
    return Table("Times", columns, lines, TIMES.format(**timing | shares))


GAINS = {
    "gain": "gain",
    "predicted": "predicted by rates",
    "predicted_by_share": "by attention's share",
    "predicted_bound": "by rates, kernel at its bound",
}
PAGE = """# A FLUX-type model, sparse without retraining

Written by `benchmarks/flux_glyphs.py` from the figures in `benchmarks/results`.

A `FluxTransformer2DModel` with {double} double and {single} single blocks, {heads} heads of 32
({parameters:,} parameters) learnt rectified flow on scenes of 128×128 pixels: four handwritings of
the digit that a caption names, in one color, on one texture. Text comes from the bundled CLIP,
states and pooled state; the bundled autoencoder makes 32×32 latents of a scene, one token each, so
1,024 and {text} of text attend jointly. Each of {seeds} seeds trained {steps:,} steps of {batch}
scenes ({minutes} minutes on {cores} cores), captions dropped one time in ten.

Then the image's queries see a window of {window}×{window} tokens, shared by {stride}×{stride} of
them (`flux-4k` at an eighth of its sides), and all of the text: {sparsity:.1f} % of the pairs
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
TIMES = """Drawing alone, without text encoder and autoencoder, float32, cells in turns, the
median. The simulator predicts from this machine's rates ({linear_gflops:g} GFLOP/s of one product,
{attention_gflops:g} of one dense attention, which make attention {attention_share:.0f} % of a
dense step) and the kernel's own gain, {kernel:.2f} × here and {pairs:.2f} × by the pairs with
text. It leaves out norms, modulation and rotary embeddings, which take a large part of so narrow a
model: by its time alone, attention is {measured_share:.0f} % of a dense step, and *by attention's
share* is Amdahl's law with that."""


def page(record: Mapping[str, Any], picture: str) -> str:
    """The page, in Markdown."""
    study, seeds = record["study"], record["seeds"]
    seconds = [seed["training"]["seconds"] or 0.0 for seed in seeds.values()]
    minutes = sorted({round(each / 60) for each in (min(seconds), max(seconds))})
    text = PAGE.format(
        **study,
        parameters=record["parameters"],
        text=TEXT,
        seeds=len(seeds),
        minutes=" to ".join(map(str, minutes)),
        cores=record["cpu_cores"],
        window=WINDOW,
        stride=STRIDE,
        sparsity=100 * record["timing"]["sparsity"],
        guidance=GUIDANCE,
        tuning=max(1, study["steps"] // 10),
        picture=picture,
        names="; ".join(CELLS),
    )
    return text + "\n".join(map(markdown_table, (quality_table(record), time_table(record))))


def sheet(rows: Sequence[np.ndarray]) -> Image.Image:
    """One row of scenes for each cell; a column shares its prompt and its noise."""
    padded = [np.pad(row, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255) for row in rows]
    lines = [row.transpose(1, 0, 2, 3).reshape(row.shape[1], -1, 3) for row in padded]
    return Image.fromarray(np.concatenate(lines))


# ---- the command ----


def run(
    world: World, record: dict[str, Any], seeds: Sequence[int], keep: Callable[[], None]
) -> None:
    """Do what the record lacks; `keep` is called after each piece."""
    if "ceiling" not in record:
        asked, real = world.reference(seeds[0])
        mean, _ = encode_images(world.pipeline.vae, real)
        latents = world.pipeline.vae.scale(jnp.asarray(mean))
        parts = [world.decode(latents[rows]) for rows in batches_of(len(mean), world.study.drawn)]
        coded = np.concatenate(parts)[: len(mean)]
        pairs = {"rendered": real, "autoencoded": coded}
        record["ceiling"] = {
            name: judged(images, asked, world.judge, real) for name, images in pairs.items()
        }
        keep()
    for seed in seeds:
        trainings, kept = Seed(world, seed), record["seeds"].setdefault(str(seed), {"cells": {}})
        missing = [name for name in CELLS if name not in kept["cells"]]
        if missing:
            asked, real = world.reference(seed)
        for name in missing:
            cell = CELLS[name]
            params = trainings.params(cell)
            images = draw_all(world, cell, params, [each.text for each in asked], seed)
            np.save(world.folder / shown(name, seed), images[:8])
            kept["cells"][name] = judged(images, asked, world.judge, real)
            if cell.tuned:
                kept |= trainings.records()
            keep()
            print(f"seed {seed}, {name}: {kept['cells'][name]['quarter']}")
        if "timing" not in record:
            record["timing"] = timed(world, trainings.dense)
            keep()
            print(record["timing"])


def shown(name: str, seed: int) -> str:
    """The file of a cell's first scenes."""
    return f"scenes of seed {seed}, {name}.npy"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of the dense training")
    parser.add_argument("--images", type=int, help="that a cell draws for a seed")
    parser.add_argument("--quick", action="store_true", help="all of it at a tiny size")
    parser.add_argument("--output", type=Path, help="the figures; what they lack is done")
    parser.add_argument("--workdir", type=Path, help="checkpoints, latents, some scenes")
    parser.add_argument("--page", type=Path, help="write this page, and its picture beside it")
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in ("steps", "images")}
    study = QUICK if options.quick else Study()
    study = dataclasses.replace(study, **{name: value for name, value in given.items() if value})
    name = "flux_glyphs_quick" if options.quick else "flux_glyphs"
    folder = options.workdir or ROOT / "outputs" / name
    results = ROOT / "outputs" if options.quick else ROOT / "benchmarks" / "results"
    output = options.output or results / f"{name}.json"
    for each in (folder, output.parent):
        each.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(dataclasses.asdict(study)))
    record: dict[str, Any] = {"benchmark": "flux_glyphs", "study": settings, "seeds": {}}
    if output.exists():
        record = json.loads(output.read_text(encoding="utf-8"))
        if record["study"] != settings:
            parser.error(
                f"{output} holds figures of another size, {record['study']}; name another --output."
            )

    def keep() -> None:
        written = output.with_suffix(".part")
        write_records(written, record)
        os.replace(written, output)

    world = World(study, folder)
    record |= {"date": datetime.date.today().isoformat(), "model": study.config.to_dict()}
    record |= {"parameters": parameters(study.config), "guidance": GUIDANCE, **environment()}
    run(world, record, options.seeds, keep)
    record["peak_gib"] = round(peak_memory(), 2)
    keep()
    tables = quality_table(record), time_table(record)
    print("\n".join(map(markdown_table, tables)))
    if options.page:
        first = min(map(int, record["seeds"]))
        picture = options.page.with_suffix(".png")
        rows = [np.load(folder / shown(name, first)) for name in CELLS]
        sheet(rows).save(picture, optimize=True)
        options.page.write_text(page(record, picture.name), encoding="utf-8")


def parameters(config: FluxTransformer2DConfig) -> int:
    make = functools.partial(FluxTransformer2DModel, config)
    state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))[1]
    return sum(leaf.size for leaf in jax.tree.leaves(state))


if __name__ == "__main__":
    main()
