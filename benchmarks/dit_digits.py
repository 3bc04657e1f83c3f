"""A small diffusion transformer draws digits: dense, made sparse, and sparse after some tuning.

    python benchmarks/dit_digits.py            # about ten minutes on two cores

A `DiTTransformer2DModel` learns scikit-learn's handwritten digits, enlarged from 8x8 to 16x16
pixels, one token each. Its dense attention then gives way to neighborhood attention with windows of
a half and of a quarter of the side: first with the parameters as they are, then after training on
for a while. Each variant draws the same digits from the same noise; a classifier that learnt from
other handwriting counts how many it recognizes. Then a forward pass and a training step are timed,
with 256 tokens and with 1,024, the variants in turn; the fastest of several counts.

Prints tables and writes the figures with settings, versions and times as JSON, and a picture.
"""

import argparse
import dataclasses
import datetime
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from conceptax.flax_models.dit_transformer_2d import (
    GNA,
    DiTTransformer2DConfig,
    DiTTransformer2DModel,
)
from conceptax.kernels.gna import neighborhood_mask
from conceptax.methods.diffusion.text_to_image import sample_latents
from conceptax.methods.evaluation.statistics import rate
from conceptax.methods.glyphs.recipe import Recipe, final_params
from conceptax.methods.glyphs.world import load_split
from conceptax.methods.sampling import NoiseSchedule, add_noise, ddim_sampler, training_target
from conceptax.methods.training import apply_gradients, compile_step, init_state, train
from conceptax.reporting.results import environment, write_records

SIZE = 16  # pixels along each side
CONFIG = DiTTransformer2DConfig(
    num_attention_heads=2,
    attention_head_dim=32,
    num_layers=3,
    in_channels=1,
    sample_size=SIZE,
    patch_size=1,
    num_embeds_ada_norm=10,
)
SCHEDULE = NoiseSchedule(
    beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
)
LABEL_DROPOUT = 0.1
BATCH = 32
GUIDANCE, SAMPLING_STEPS, SAMPLING_BATCH = 2.0, 20, 100
ROOT = Path(__file__).resolve().parent.parent


def neighborhoods(side: int, **options: Any) -> dict[str, GNA]:
    """Windows of a part of the side, each shared by runs of half as many queries."""
    return {
        f"window {side // part}": GNA(window=side // part, stride=side // part // 2, **options)
        for part in (2, 4)
    }


@dataclasses.dataclass(frozen=True)
class Stage:
    """The static part of `denoising_step`."""

    graphdef: nnx.GraphDef[Any]
    optimizer: optax.GradientTransformation


def denoising_step(static, state, frozen, batch, key):
    """One update on `batch` = {image [B,16,16,1], label [B]}."""
    del frozen
    noise_key, time_key, drop_key = jax.random.split(key, 3)
    labels = jnp.where(
        jax.random.bernoulli(drop_key, LABEL_DROPOUT, batch["label"].shape),
        CONFIG.null_class,
        batch["label"],
    )
    timesteps = jax.random.randint(time_key, labels.shape, 0, SCHEDULE.num_train_timesteps)
    noise = jax.random.normal(noise_key, batch["image"].shape)

    def loss_of(params):
        return loss(static.graphdef, params, batch["image"], labels, timesteps, noise)

    value, gradients = jax.value_and_grad(loss_of)(state.params)
    return apply_gradients(state, gradients, static.optimizer), {"loss": value}


def loss(graphdef, params, images, labels, timesteps, noise):
    noisy = add_noise(SCHEDULE, images, noise, timesteps)
    predicted = nnx.merge(graphdef, params)(noisy, timesteps, labels)
    return jnp.mean((predicted - training_target(SCHEDULE, images, noise, timesteps)) ** 2)


def structure(attention: GNA | None) -> nnx.GraphDef[Any]:
    model = nnx.eval_shape(
        lambda: DiTTransformer2DModel(CONFIG, attention=attention, rngs=nnx.Rngs(0))
    )
    return nnx.split(model)[0]


def handwriting(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [N,8,8] in [0,1] and labels [N]."""
    digits, ids = load_digits(), load_split(split).ids
    return (digits.images[ids] / 16).astype(np.float32), digits.target[ids]


def enlarge(images: np.ndarray) -> np.ndarray:
    """[N,8,8] in [0,1] -> [N,16,16,1] in [-1,1]."""
    shape = (len(images), SIZE, SIZE)
    return 2 * np.asarray(jax.image.resize(images, shape, "linear"))[..., None] - 1


def reduce(images: np.ndarray) -> np.ndarray:
    """[N,16,16,1] in [-1,1] -> what the classifier reads, [N,64]."""
    half = images.reshape(-1, 8, SIZE // 8, 8, SIZE // 8).mean((2, 4))
    return (half.reshape(-1, 64) + 1) / 2


def batches(seed: int) -> Iterator[dict[str, np.ndarray]]:
    images, labels = handwriting("generator")
    images, rng = enlarge(images), np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(labels))
        for rows in np.split(order, range(BATCH, len(order), BATCH))[:-1]:
            yield {"image": images[rows], "label": labels[rows].astype(np.int32)}


def fit(attention: GNA | None, params: Any, recipe: Recipe, seed: int) -> tuple[Any, float]:
    """The parameters after training, and how many seconds it took."""
    graphdef, optimizer = structure(attention), recipe.optimizer()
    began = time.perf_counter()
    state = train(
        denoising_step,
        Stage(graphdef, optimizer),
        init_state(params, optimizer),
        batches=batches(seed),
        key=jax.random.key(seed),
        num_steps=recipe.steps,
        log_every=20,
    )
    return final_params(state), time.perf_counter() - began


def draw(graphdef: Any, params: Any, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` digits, all classes in turn, as images and the labels asked for."""
    run = jax.jit(sample_latents, static_argnums=0)
    sampler = ddim_sampler(SCHEDULE, SAMPLING_STEPS)
    images, labels = [], np.arange(count, dtype=np.int32) % 10
    for start in range(0, count, SAMPLING_BATCH):
        part = jnp.asarray(labels[start : start + SAMPLING_BATCH])
        key = jax.random.fold_in(jax.random.key(seed), start)
        noise = jax.random.normal(key, (len(part), SIZE, SIZE, 1))
        null = jnp.asarray(CONFIG.null_class)
        images.append(np.asarray(run(graphdef, params, part, null, noise, sampler, GUIDANCE)))
    return np.clip(np.concatenate(images), -1, 1), labels


def held_out_loss(graphdef: Any, params: Any, seed: int) -> float:
    """Prediction error on handwriting that no training saw, at timesteps spread evenly."""
    images, labels = handwriting("judge_test")
    timesteps = jnp.linspace(0, SCHEDULE.num_train_timesteps - 1, len(labels)).astype(int)
    noise = jax.random.normal(jax.random.key(seed), (len(labels), SIZE, SIZE, 1))
    operands = (jnp.asarray(enlarge(images)), jnp.asarray(labels), timesteps, noise)
    return float(jax.jit(functools.partial(loss, graphdef))(params, *operands))


def pairs_seen(side: int, attention: GNA | None) -> float:
    if attention is None:
        return 1.0
    mask = neighborhood_mask(
        (side, side),
        kernel_size=attention.window,
        stride=attention.stride,
        dilation=attention.dilation,
    )
    return float(mask.mean())


def seconds_of(params: Any, side: int, batch: int, repeats: int) -> dict[str, dict[str, float]]:
    """The fastest forward pass and training step of each variant, the variants in turn.

    With `side` tokens along each side; positions stretch to it, and so do windows. The C++ kernels
    are left out where they cannot be built.
    """
    images = jax.random.normal(jax.random.key(0), (batch, side, side, 1))
    labels = jnp.arange(batch, dtype=jnp.int32) % 10
    optimizer = Recipe(steps=100, batch_size=batch, learning_rate=1e-3).optimizer()
    variants = {"dense": None, **neighborhoods(side)}
    cpp = {"dense": GNA(side, implementation="cuda"), **neighborhoods(side, implementation="cuda")}
    runs, times = {}, {}
    for name, attention in {**variants, **{f"{n}, C++": a for n, a in cpp.items()}}.items():
        graphdef = structure(attention)
        forward = jax.jit(lambda p, x, y, g=graphdef: nnx.merge(g, p)(x, 500, y))
        try:
            jax.block_until_ready(forward(params, images, labels))
        except NotImplementedError as error:
            print(f"{name}: {error}")
            continue
        step = compile_step(denoising_step, Stage(graphdef, optimizer))
        runs[name] = forward, step, init_state(jax.tree.map(jnp.copy, params), optimizer)
        times[name] = {"forward": [], "step": []}
    for _ in range(repeats + 1):  # the first step compiles
        for name, (forward, step, state) in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(forward(params, images, labels))
            times[name]["forward"].append(time.perf_counter() - began)
            began = time.perf_counter()
            batch_of = {"image": images, "label": labels}
            state, _ = jax.block_until_ready(step(state, None, batch_of, jax.random.key(1)))
            times[name]["step"].append(time.perf_counter() - began)
            runs[name] = forward, step, state
    return {
        name: {what: min(values[1:]) for what, values in each.items()}
        for name, each in times.items()
    }


def sheet(variants: dict[str, np.ndarray], columns: int = 20, scale: int = 3) -> Image.Image:
    """One row of digits for each variant; a column shares its class and its noise."""
    rows = []
    for images in variants.values():
        pixels = np.pad(images[:columns, :, :, 0], ((0, 0), (1, 1), (1, 1)), constant_values=-0.6)
        rows.append(pixels.transpose(1, 0, 2).reshape(SIZE + 2, -1))
    image = Image.fromarray(np.uint8(127.5 * (np.concatenate(rows) + 1)))
    return image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800, help="of the dense training")
    parser.add_argument("--tuning", type=int, default=150, help="steps of the sparse tuning")
    parser.add_argument("--images", type=int, default=300, help="drawn by each variant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each kind")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "dit_digits.json"
    )
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "dit_digits.png")
    options = parser.parse_args()
    seed, began = options.seed, time.perf_counter()

    classifier = SVC(gamma=0.5, C=10.0).fit(*_flat(handwriting("judge")))
    images, labels = handwriting("judge_test")
    right = int((classifier.predict(reduce(enlarge(images))) == labels).sum())
    judge = _share(right, len(labels))
    print(f"classifier: {_text(judge)} of handwriting that it has not seen")

    recipes = {
        "training": Recipe(options.steps, BATCH, learning_rate=3e-3, ema=0.99),
        "tuning": Recipe(options.tuning, BATCH, learning_rate=1e-3, ema=0.98),
    }
    model = DiTTransformer2DModel(CONFIG, rngs=nnx.Rngs(seed))
    params, seconds = fit(None, nnx.to_pure_dict(nnx.state(model)), recipes["training"], seed)
    training = {"dense": seconds}
    variants = {"dense": (None, params)}
    for name, attention in neighborhoods(SIZE).items():
        tuned, training[name] = fit(attention, params, recipes["tuning"], seed + 1)
        variants |= {name: (attention, params), f"{name}, tuned": (attention, tuned)}

    drawn, figures = {}, {}
    for name, (attention, weights) in variants.items():
        graphdef = structure(attention)
        drawn[name], asked = draw(graphdef, weights, options.images, seed)
        right = int((classifier.predict(reduce(drawn[name])) == asked).sum())
        figures[name] = {
            "recognized": _share(right, len(asked)),
            "held_out_loss": round(held_out_loss(graphdef, weights, seed), 5),
            "pairs_seen": pairs_seen(SIZE, attention),
        }
        print(
            f"{name:18} recognized {_text(figures[name]['recognized'])}, "
            f"held-out loss {figures[name]['held_out_loss']}"
        )
    sheet(drawn).save(options.picture, optimize=True)

    timings = []
    for side, batch in ((SIZE, BATCH), (2 * SIZE, 8)):
        found = seconds_of(params, side, batch, options.repeats)
        timings.append(
            {
                "tokens": [side, side],
                "batch": batch,
                "milliseconds": {
                    name: {what: round(1e3 * seconds, 1) for what, seconds in each.items()}
                    for name, each in found.items()
                },
            }
        )
        print(f"\n{side}x{side} tokens, batch {batch}: forward, training step (ms)")
        for name, each in timings[-1]["milliseconds"].items():
            print(f"{name:18} {each['forward']:10.1f} {each['step']:10.1f}")
    record = {
        "benchmark": "dit_digits",
        "date": datetime.date.today().isoformat(),
        "model": CONFIG.to_dict(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "attention": {n: dataclasses.asdict(a) for n, a in neighborhoods(SIZE).items()},
        "recipes": {name: dataclasses.asdict(recipe) for name, recipe in recipes.items()},
        "seconds_to_train": {name: round(seconds, 1) for name, seconds in training.items()},
        "sampling": {"steps": SAMPLING_STEPS, "guidance": GUIDANCE, "images": options.images},
        "seed": seed,
        "classifier": judge,
        "figures": figures,
        "timings": timings,
        "seconds": round(time.perf_counter() - began, 1),
        **environment(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_records(options.output, record)


def _flat(split: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return reduce(enlarge(split[0])), split[1]


def _share(count: int, total: int) -> dict[str, Any]:
    share, low, high = rate(count, total)
    return {"count": count, "of": total, "rate": share, "low": low, "high": high}


def _text(share: dict[str, Any]) -> str:
    return (
        f"{100 * share['rate']:.1f} % ({100 * share['low']:.1f}–{100 * share['high']:.1f}, "
        f"{share['count']} of {share['of']})"
    )


if __name__ == "__main__":
    main()
