"""What the studies of small transformers on glyphs share: training, drawing, timing, keeping.

A study trains a model by rectified flow on latents of the bundled autoencoder, told captions by the
bundled CLIP, and draws the same held-out prompts from the same noise in several cells: dense, made
sparse, sparse after tuning. What differs is a `World`'s to say. Trainings keep checkpoints, and
finished cells stay in the results file, so a run that was interrupted goes on.
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
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from _processes import peak_memory
from flax import nnx

import conceptax
from conceptax.converters import load_pytorch
from conceptax.flax_models.layers.attention import GNA
from conceptax.flax_models.layers.joint_attention import JointSequence
from conceptax.kernels.gna.presets import Preset
from conceptax.kernels.gna.simulator import measure, simulate_model
from conceptax.kernels.gna.simulator.whole_model import speedups
from conceptax.methods.diffusion.text_to_image import Phase, sample_latents, to_uint8
from conceptax.methods.evaluation.suites import choose
from conceptax.methods.glyphs.captions import prompts
from conceptax.methods.glyphs.judge import load_judge
from conceptax.methods.glyphs.quality import name_of
from conceptax.methods.glyphs.recipe import Recipe, Stage, final_params
from conceptax.methods.sampling import LinearSampler, encode_images
from conceptax.methods.training import apply_gradients, init_state, train
from conceptax.reporting.report import Number, Table, markdown_table
from conceptax.reporting.results import environment, write_records

ROOT = Path(__file__).resolve().parent.parent
TEXT = 24  # tokens of a caption
GUIDANCE, CAPTION_DROPOUT = 3.0, 0.1
# What a training's seed adds to the study's, so that no two see the same noise.
OFFSETS = {"training": 0, "tuning": 1000, "images": 2000, "small": 2000}


@dataclasses.dataclass(frozen=True)
class Cell:
    """How a row of the table draws."""

    attention: GNA | None = None
    starts_dense: bool = False
    tuned: bool = False


def cells_of(sparse: GNA, begun_dense: str) -> dict[str, Cell]:
    """The rows of a study: `begun_dense` names the one whose first steps are dense."""
    return {
        "dense": Cell(),
        begun_dense: Cell(sparse, starts_dense=True),
        "all steps sparse": Cell(sparse),
        "all steps sparse, tuned": Cell(sparse, tuned=True),
    }


class World:
    """The bundled parts, and all that a study says of itself.

    Attributes:
      name: of the study, and of its results file.
      kind: the model's class.
      cells: by name; a sparse one's attention is that of all.
      stages: the trainings, among the study's `recipes`, that lead to the dense model.
      shared: those of them that are done once, for all seeds.
      grid: tokens along each dimension.
      latent_shape: of what is drawn.
      shift: of the training's noise levels towards noise.
      sampler: of a drawing.
      preset: what the simulator is asked; every step of it is sparse.
      study: sizes: `config`, `recipes`, `images` that a cell draws, `drawn` at a time,
        `sampling_steps`, `dense_steps` of those, `rounds` of the timing, `steps` of the training.
      folder: for checkpoints and latents.
    """

    name: ClassVar[str]
    kind: ClassVar[Any]
    cells: ClassVar[dict[str, Cell]]
    stages: ClassVar[tuple[str, ...]] = ("training",)
    shared: ClassVar[tuple[str, ...]] = ()
    grid: tuple[int, ...]
    latent_shape: tuple[int, ...]
    shift: ClassVar[float] = 1.0
    sampler: LinearSampler
    preset: Preset

    def __init__(self, study: Any, folder: Path) -> None:
        self.study, self.folder = study, folder
        self.source = conceptax.bundled_model()
        self.pipeline = load_pytorch(self.source)
        self.judge = load_judge(self.source / "judge")
        self.text_graphdef, text = nnx.split(self.pipeline.text_encoder)
        self.vae_graphdef, vae = nnx.split(self.pipeline.vae)
        self.text, self.vae = nnx.to_pure_dict(text), nnx.to_pure_dict(vae)

    # What a study says.

    @staticmethod
    def told(output: Any) -> Any:
        """What the model is conditioned on, of the text tower's output."""
        raise NotImplementedError

    def batches(self, name: str, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """Of a training: `mean` and `std` [B, *X, C] of scaled latents, `tokens` [B, L]."""
        raise NotImplementedError

    def asked(self, seed: int) -> list[Any]:
        """The prompts of a seed, each with a `text`."""
        raise NotImplementedError

    def rendered(self, asked: Sequence[Any]) -> np.ndarray:
        """What is asked for, uint8, in handwriting that no model saw."""
        raise NotImplementedError

    def judged(self, drawn: np.ndarray, asked: Sequence[Any], real: np.ndarray) -> dict[str, Any]:
        """The figures of what was drawn; `real` is what is rendered for the same prompts."""
        raise NotImplementedError

    # What all do.

    @functools.cache  # noqa: B019
    def tokens(self, text: str) -> np.ndarray:
        """Ids [L] of a text."""
        return np.asarray(self.pipeline.tokenize([text])[0], np.int32)

    def condition(self, texts: Sequence[str]) -> Any:
        """What the model is told of texts."""
        tokens = np.stack([self.tokens(text) for text in texts])
        return tell(self.told, self.text_graphdef, self.text, jnp.asarray(tokens))

    def prompts_of(self, seed: int) -> list[Any]:
        """Held-out wordings, every name of a digit as often."""
        return choose(prompts(), self.study.images, seed, name_of)

    def encoded(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Mean and deviation of the scaled latents of images [N, H, W, 3]."""
        vae, half = self.pipeline.vae, np.float16
        mean, std = encode_images(vae, images)
        scaled = np.asarray(vae.scale(jnp.asarray(mean)), half)
        return {"mean": scaled, "std": (std * vae.config.scaling_factor).astype(half)}

    def decode(self, latents: jax.Array) -> np.ndarray:
        """Scaled latents [*X, h, w, C] -> uint8 pixels."""
        flat = latents.reshape(-1, *latents.shape[-3:])
        images = to_uint8(decoded(self.vae_graphdef, self.vae, flat))
        return images.reshape(*latents.shape[:-3], *images.shape[1:])

    def kept(self, name: str, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, Any]:
        """Arrays that are made once and lie on the disk from then on."""
        path = self.folder / f"{name}.npz"
        if not path.exists():
            written = path.with_suffix(".part.npz")
            np.savez(written, **make())
            os.replace(written, path)
        return dict(np.load(path))

    @property
    def text_seen(self) -> int:
        """Tokens of text in the self-attention."""
        assert self.preset.model is not None
        return TEXT if self.preset.model.joint else 0


@functools.partial(jax.jit, static_argnums=(0, 1))
def tell(told: Callable[[Any], Any], graphdef: Any, params: Any, tokens: jax.Array) -> Any:
    """What a model is conditioned on by token ids [B,L]."""
    return told(nnx.merge(graphdef, params)(tokens))


@functools.partial(jax.jit, static_argnums=0)
def decoded(graphdef: Any, params: Any, latents: jax.Array) -> jax.Array:
    """Images [-1,1] of scaled latents."""
    vae = nnx.merge(graphdef, params)
    return vae.decode(vae.unscale(latents))


def shuffled(rng: np.random.Generator, count: int, size: int) -> Iterator[np.ndarray]:
    """Row numbers of batches, shuffled anew for each round."""
    while True:
        order = rng.permutation(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


# ---- training ----


@dataclasses.dataclass(frozen=True)
class FlowStage(Stage):
    """The static part of `flow_step`; `told` and `shift` are the world's."""

    text_graphdef: nnx.GraphDef[Any]
    told: Callable[[Any], Any]
    shift: float


def flow_step(static, state, frozen, batch, key):
    """One update on `batch` = {mean, std [B,*X,C] of scaled latents, tokens [B,L]}.

    Rectified flow (Esser et al. 2024, arXiv 2403.03206): the velocity noise - x of (1 - t) x +
    t noise, t logit-normal, and shifted as their equation 23 says.
    """
    draw, noise_key, time_key, drop_key = jax.random.split(key, 4)
    mean, std = (batch[each].astype(jnp.float32) for each in ("mean", "std"))
    x = mean + std * jax.random.normal(draw, mean.shape)
    noise = jax.random.normal(noise_key, x.shape)
    time = jax.nn.sigmoid(jax.random.normal(time_key, x.shape[:1]))
    time = static.shift * time / (1 + (static.shift - 1) * time)
    share = time.reshape(-1, *(1,) * (x.ndim - 1))
    dropped = jax.random.bernoulli(drop_key, CAPTION_DROPOUT, (len(x), 1))
    tokens = jnp.where(dropped, frozen["empty"][None], batch["tokens"])
    condition = tell(static.told, static.text_graphdef, frozen["text"], tokens)

    def loss_of(params):
        model = nnx.merge(static.graphdef, params)
        velocity = model((1 - share) * x + share * noise, 1000.0 * time, condition)
        return jnp.mean((velocity - (noise - x)) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    return apply_gradients(state, gradients, static.optimizer), {"loss": loss}


@functools.cache
def structure(kind: Any, config: Any, attention: GNA | None) -> nnx.GraphDef[Any]:
    make = functools.partial(kind, config, attention=attention)
    return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))[0]


def fit(world: World, name: str, attention: GNA | None, params: Any, seed: int) -> Any:
    """The parameters after a training of that name; those of a finished one are read."""
    study = world.study
    recipe, folder = study.recipes[name], trained(world, name, seed)
    graphdef, optimizer = structure(world.kind, study.config, attention), recipe.optimizer()
    state = train(
        flow_step,
        FlowStage(graphdef, optimizer, world.text_graphdef, world.told, world.shift),
        init_state(params, optimizer),
        {"text": world.text, "empty": world.tokens("")},
        world.batches(name, seed),
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


def tenth(recipe: Recipe) -> Recipe:
    """Of the tuning: a tenth of the steps at a third of the rate."""
    steps = max(1, recipe.steps // 10)
    return Recipe(steps, recipe.batch_size, recipe.learning_rate / 3, ema=0.98)


class Seed:
    """A seed's trainings, each done when something asks for it."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.seed = world, seed

    @functools.cached_property
    def dense(self) -> Any:
        first = 0 if self.world.shared else self.seed
        model = self.world.kind(self.world.study.config, rngs=nnx.Rngs(first))
        params = nnx.to_pure_dict(nnx.state(model))
        for name in self.world.stages:
            params = fit(self.world, name, None, params, self.of(name))
        return params

    def of(self, name: str) -> int:
        """The seed of one of its trainings."""
        return OFFSETS[name] + (0 if name in self.world.shared else self.seed)

    def params(self, cell: Cell) -> Any:
        if not cell.tuned:
            return self.dense
        return fit(self.world, "tuning", cell.attention, self.dense, self.of("tuning"))

    def records(self) -> dict[str, Any]:
        names = (*self.world.stages, "tuning")
        return {name: training_record(self.world, name, self.of(name)) for name in names}


# ---- drawing ----


_sample = jax.jit(sample_latents, static_argnums=0)


def drawer(world: World, cell: Cell, params: Any) -> Callable[[Sequence[str], Any], jax.Array]:
    """(texts, noise) -> latents."""
    made = functools.partial(structure, world.kind, world.study.config)
    phases = (Phase(made(cell.attention)),)
    if cell.starts_dense:
        phases = (Phase(made(None), world.study.dense_steps), *phases)
    whose = {"denoiser": params}

    def draw(texts: Sequence[str], noise: Any) -> jax.Array:
        given = world.condition(texts), world.condition([""]), noise, world.sampler, GUIDANCE
        return _sample(phases, whose, *given)

    return draw


def draw_all(world: World, cell: Cell, params: Any, texts: Sequence[str], seed: int) -> np.ndarray:
    """What each text asks for, uint8; the n-th from the same noise in every cell."""
    draw, images = drawer(world, cell, params), []
    for rows in batches_of(len(texts), world.study.drawn):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(rows))
        noise = jax.vmap(lambda key: jax.random.normal(key, world.latent_shape))(keys)
        images.append(world.decode(draw([texts[row] for row in rows], noise)))
    return np.concatenate(images)[: len(texts)]


def batches_of(total: int, size: int) -> list[np.ndarray]:
    """Row numbers; the last batch is filled up, so one program serves all."""
    starts = range(0, total, size)
    return [np.minimum(np.arange(start, start + size), total - 1) for start in starts]


def autoencoded(world: World, images: np.ndarray) -> np.ndarray:
    """Images [N, *F, H, W, 3] after the bundled autoencoder."""
    flat = images.reshape(-1, *images.shape[-3:])
    mean, _ = encode_images(world.pipeline.vae, flat)
    latents = world.pipeline.vae.scale(jnp.asarray(mean))
    parts = [world.decode(latents[rows]) for rows in batches_of(len(flat), world.study.drawn)]
    return np.concatenate(parts)[: len(flat)].reshape(images.shape)


# ---- times ----


def rates(world: World, sparse: GNA) -> dict[str, measure.Timing]:
    """One product, one dense and one sparse attention of the model, as many as are drawn."""
    config, batch = world.study.config, 2 * world.study.drawn  # guidance looks twice
    heads, dim = config.num_attention_heads, config.attention_head_dim
    tokens = int(np.prod(world.grid)) + world.text_seen
    keys = iter(jax.random.split(jax.random.key(0), 5))
    normal = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    x, weights = normal(batch * tokens, heads * dim), normal(heads * dim, 4 * heads * dim)
    qkv = [normal(batch, tokens, heads, dim) for _ in range(3)]
    sequence = JointSequence(world.grid)
    product = jax.jit(lambda x, weights: x @ weights)
    dense, near = (
        jax.jit(lambda q, k, v, setting=setting: sequence.attend(q, k, v, setting))
        for setting in (None, sparse)
    )
    return measure.take_turns(
        {
            "product": lambda: product(x, weights),
            "dense": lambda: dense(*qkv),
            "sparse": lambda: near(*qkv),
        },
        7 * world.study.rounds,
        seconds=0.0,
    )


def timed(world: World, params: Any) -> dict[str, Any]:
    """Seconds that a drawing of each cell takes, in turns, and its gain beside the predicted."""
    study, asked = world.study, world.preset
    assert asked.model is not None
    texts = [each.text for each in prompts()[: study.drawn]]
    noise = jax.random.normal(jax.random.key(0), (study.drawn, *world.latent_shape))
    # A tuned cell's program is that of another.
    chosen = {name: cell for name, cell in world.cells.items() if not cell.tuned}
    runs = {
        name: functools.partial(drawer(world, cell, params), texts, noise)
        for name, cell in chosen.items()
    }
    drawn = measure.take_turns(runs, study.rounds, seconds=0.0)
    (sparse,) = {cell.attention for cell in chosen.values()} - {None}
    one = {name: timing.median for name, timing in rates(world, sparse).items()}
    batch, width, tokens = 2 * study.drawn, asked.model.width, int(np.prod(world.grid))
    operations = asked.model.operations(tokens).attention / asked.model.layers
    linear = 8.0 * batch * (tokens + world.text_seen) * width**2 / one["product"]
    attention = batch * operations / one["dense"]
    kernel, cells = one["dense"] / one["sparse"], {}
    attending = asked.model.layers * study.sampling_steps * one["dense"]
    share = min(1.0, attending / drawn["dense"].median)
    result = None
    for name, cell in chosen.items():
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


def shown_share(figure: Mapping[str, Any]) -> Number:
    low, high = (f"{100 * figure[end]:.1f}" for end in ("low", "high"))
    return Number(f"{100 * figure['rate']:.1f} % ({low}–{high})")


def shown_difference(figure: Mapping[str, Any] | None) -> Number:
    """Points, with an interval; a dash for None."""
    if figure is None:
        return Number("–")
    low, high = (f"{100 * figure[end]:+.1f}" for end in ("low", "high"))
    return Number(f"{100 * figure['mean']:+.1f} ({low} to {high})")


GAINS = {
    "gain": "gain",
    "predicted": "predicted by rates",
    "predicted_by_share": "by attention's share",
    "predicted_bound": "by rates, kernel at its bound",
}
TIMES = """Drawing alone, without text encoder and autoencoder, float32, cells in turns, the
median. The simulator predicts from this machine's rates ({linear_gflops:g} GFLOP/s of one product,
{attention_gflops:g} of one dense attention, which make attention {attention_share:.0f} % of a
dense step) and the kernel's own gain, {kernel:.2f} × here and {pairs:.2f} × by the pairs{text}.
It leaves out norms, modulation and rotary embeddings, which take a large part of so narrow a
model: by its time alone, attention is {measured_share:.0f} % of a dense step, and *by attention's
share* is Amdahl's law with that."""


def time_table(record: Mapping[str, Any], one: str, text: str = "") -> Table:
    """The part on times; `one` is what is drawn, `text` which pairs are counted too."""
    timing, lines = record["timing"], []
    for name, cell in timing["cells"].items():
        gains = ("–",) * len(GAINS)
        if "gain" in cell:
            gains = tuple(f"{cell[each]:.2f} ×" for each in GAINS)
        lines.append((name, Number(f"{cell['seconds']:.2f}"), *map(Number, gains)))
    shares = {each: 100 * timing[each] for each in ("attention_share", "measured_share")}
    columns = ("", f"seconds a {one}", *GAINS.values())
    return Table("Times", columns, lines, TIMES.format(**timing | shares, text=text))


def minutes_of(record: Mapping[str, Any], stages: Sequence[str] = ("training",)) -> str:
    """How long the trainings of a seed took, the shortest and the longest."""
    seeds = record["seeds"].values()
    seconds = [sum(seed[stage]["seconds"] or 0.0 for stage in stages) for seed in seeds]
    return " to ".join(
        map(str, sorted({round(each / 60) for each in (min(seconds), max(seconds))}))
    )


# ---- the command ----


def run(
    world: World, record: dict[str, Any], seeds: Sequence[int], keep: Callable[[], None]
) -> None:
    """Do what the record lacks; `keep` is called after each piece."""
    if "ceiling" not in record:
        asked = world.asked(seeds[0])
        real = world.rendered(asked)
        pairs = {"rendered": real, "autoencoded": autoencoded(world, real)}
        record["ceiling"] = {
            name: world.judged(images, asked, real) for name, images in pairs.items()
        }
        keep()
    for seed in seeds:
        trainings, kept = Seed(world, seed), record["seeds"].setdefault(str(seed), {"cells": {}})
        missing = [name for name in world.cells if name not in kept["cells"]]
        if missing:
            asked = world.asked(seed)
            real = world.rendered(asked)
        for name in missing:
            cell = world.cells[name]
            params = trainings.params(cell)
            images = draw_all(world, cell, params, [each.text for each in asked], seed)
            np.save(world.folder / shown(name, seed), images[:8])
            kept["cells"][name] = world.judged(images, asked, real)
            if cell.tuned:
                kept |= trainings.records()
            keep()
            found = kept["cells"][name].items()
            rates = {each: round(f["rate"], 3) for each, f in found if isinstance(f, dict)}
            print(f"seed {seed}, {name}: {rates}")
        if "timing" not in record:
            record["timing"] = timed(world, trainings.dense)
            keep()
            print(record["timing"])


def shown(name: str, seed: int) -> str:
    """The file of a cell's first drawings."""
    return f"scenes of seed {seed}, {name}.npy"


def command(
    world_class: type[World],
    full: Any,
    quick: Any,
    tables: Callable[[Mapping[str, Any]], Sequence[Table]],
    write_page: Callable[[Mapping[str, Any], Path, World], str],
    description: str,
    arguments: Sequence[str] | None = None,
) -> None:
    """The command line of a study: do what is missing, print its tables, write its page.

    `write_page` makes the picture beside the page's path and returns the page's text above the
    tables.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of the dense training")
    parser.add_argument("--images", type=int, help="that a cell draws for a seed")
    parser.add_argument("--quick", action="store_true", help="all of it at a tiny size")
    parser.add_argument("--output", type=Path, help="the figures; what they lack is done")
    parser.add_argument("--workdir", type=Path, help="checkpoints, latents, some drawings")
    parser.add_argument("--page", type=Path, help="write this page, and its picture beside it")
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in ("steps", "images")}
    study = quick if options.quick else full
    study = dataclasses.replace(study, **{name: value for name, value in given.items() if value})
    name = f"{world_class.name}_quick" if options.quick else world_class.name
    folder = options.workdir or ROOT / "outputs" / name
    results = ROOT / "outputs" if options.quick else ROOT / "benchmarks" / "results"
    output = options.output or results / f"{name}.json"
    for each in (folder, output.parent):
        each.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(dataclasses.asdict(study)))
    record: dict[str, Any] = {"benchmark": world_class.name, "study": settings, "seeds": {}}
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

    world = world_class(study, folder)
    record |= {"date": datetime.date.today().isoformat(), "model": study.config.to_dict()}
    record |= {"parameters": parameters(world), "guidance": GUIDANCE, **environment()}
    run(world, record, options.seeds, keep)
    record["peak_gib"] = round(peak_memory(), 2)
    keep()
    text = "\n".join(map(markdown_table, tables(record)))
    print(text)
    if options.page:
        options.page.write_text(write_page(record, options.page, world) + text, encoding="utf-8")


def parameters(world: World) -> int:
    make = functools.partial(world.kind, world.study.config)
    state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))[1]
    return sum(leaf.size for leaf in jax.tree.leaves(state))
