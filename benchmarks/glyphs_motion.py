"""A motion adapter for the bundled model, trained on digits that cross textures.

    python benchmarks/glyphs_motion.py
    python benchmarks/glyphs_motion.py --start outputs/glyphs_motion --steps 2000
    python benchmarks/glyphs_motion.py --model learnt --prompt "a red <new1> seven on grass"

The UNet stays as it is; motion modules are added and learn to denoise short videos, frames of one
video together. Then the same prompts are drawn as videos and as frames that know nothing of each
other, from the same noise. Measured: the similarity of consecutive frames (CLIP-I of the bundled
CLIP), how much their pixels differ (a still video would differ by nothing) and those of the
background, which should stand still, how far and how straight the digit moves, whether a classifier
sees the digit, color and texture that were asked for, and all but the last of rendered videos. A
model that was personalized (`--model`) is given the same adapter, which never saw its subject.

Writes the figures with settings, versions and times as JSON, a GIF, and the adapter as a folder
that diffusers loads.
"""

import argparse
import dataclasses
import datetime
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _glyph_subjects import render_video
from flax import nnx

import conceptax
from conceptax.converters import load_pytorch, save_pytorch
from conceptax.flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from conceptax.flax_models.unet_motion import (
    AnimateDiffTransformer3D,
    MotionAdapter,
    MotionAdapterConfig,
    motion_adapter,
    with_motion,
)
from conceptax.methods.diffusion.text_to_image import TextToImage
from conceptax.methods.diffusion.text_to_video import text_to_video, video_schedule
from conceptax.methods.evaluation.instruments import Clip
from conceptax.methods.evaluation.statistics import frame_consistency, mean_interval, proportion
from conceptax.methods.glyphs.captions import caption, prompts
from conceptax.methods.glyphs.judge import load_judge
from conceptax.methods.glyphs.recipe import DenoisingStage, Recipe, final_params
from conceptax.methods.glyphs.world import COLOR_VALUES, load_split, seen_combinations
from conceptax.methods.sampling import (
    NoiseSchedule,
    add_noise,
    alphas_cumprod,
    encode_images,
    training_target,
)
from conceptax.methods.training import apply_gradients, init_state, train
from conceptax.reporting.instruments import load_clip
from conceptax.reporting.results import environment, write_records
from conceptax.reporting.videos import save_gif

ROOT = Path(__file__).resolve().parent.parent
SAMPLING_STEPS, GUIDANCE = 25, 3.0
GIF_ROWS = 4


# ---- data ----


def videos(count: int, frames: int, seed: int) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Rendered videos uint8 [N,F,64,64,3], a caption of each, and the digits' colors [N]."""
    digits, triples = load_split("generator"), seen_combinations()
    clips, texts, colors = [], [], []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        digit, color, texture = triples[rng.integers(len(triples))]
        spline = digits.splines[rng.choice(digits.of(digit))]
        clips.append(render_video(rng, spline, color, texture, frames=frames))
        texts.append(caption(rng, digit, color, texture))
        colors.append(color)
    return np.stack(clips), texts, np.asarray(colors)


def batches(data: dict[str, np.ndarray], size: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    rng, count = np.random.default_rng(seed), len(data["tokens"])
    while True:
        order = rng.permutation(count)
        for start in range(0, count - size + 1, size):
            rows = order[start : start + size]
            yield {name: values[rows] for name, values in data.items()}


# ---- training ----


def still_adapter(unet: Any, frames: int, seed: int) -> MotionAdapter:
    """An adapter that changes nothing yet: the last layer of each of its modules is zero."""
    config = MotionAdapterConfig(
        block_out_channels=unet.config.block_out_channels,
        motion_layers_per_block=unet.config.layers_per_block,
        motion_num_attention_heads=4,
        motion_norm_num_groups=unet.config.norm_num_groups,
        motion_max_seq_length=frames,
    )
    adapter = MotionAdapter(config, rngs=nnx.Rngs(seed))
    for _, node in nnx.iter_graph(adapter):
        if isinstance(node, AnimateDiffTransformer3D):
            kernel = node.proj_out.kernel
            kernel.set_value(jnp.zeros_like(kernel[...]))
    return adapter


def is_motion(path: tuple[Any, ...], variable: Any) -> bool:
    """Whether a variable of a video UNet learns: the motion modules' parameters."""
    return "motion_modules" in path and isinstance(variable, nnx.Param)


def motion_step(static, state, frozen, batch, key):
    """One update on `batch` = {latent_mean, latent_std [B,F,16,16,4] scaled, tokens [B,L]}."""
    draw, noise_key, time_key, drop_key = jax.random.split(key, 4)
    mean, std = batch["latent_mean"], batch["latent_std"]
    latents = mean + std * jax.random.normal(draw, mean.shape)
    noise = jax.random.normal(noise_key, mean.shape)
    times = jax.random.randint(time_key, mean.shape[:1], 0, static.schedule.num_train_timesteps)
    noisy = add_noise(static.schedule, latents, noise, times)
    target = training_target(static.schedule, latents, noise, times)
    dropped = jax.random.bernoulli(drop_key, static.caption_dropout, (len(mean), 1))
    tokens = jnp.where(dropped, frozen["empty"], batch["tokens"])
    text = nnx.merge(static.text_graphdef, frozen["text_encoder"])(tokens).condition
    alphas = jnp.asarray(alphas_cumprod(static.schedule))[times]
    weights = jnp.minimum(1.0, static.snr_cap * (1 - alphas) / alphas)  # as the UNet was trained

    def loss_of(params):
        unet = nnx.merge(static.graphdef, params, frozen["unet"])
        error = (unet(noisy, times, text) - target) ** 2
        return jnp.mean(weights * error.mean(axis=(1, 2, 3, 4)))

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    return apply_gradients(state, gradients, static.optimizer), {"loss": loss}


def fit(
    pipeline: StableDiffusionPipeline,
    start: MotionAdapter,
    recipe: Recipe,
    *,
    count: int,
    frames: int,
    seed: int,
) -> tuple[MotionAdapter, list[float]]:
    """The adapter after training, and how many seconds the data and the training took."""
    began = time.perf_counter()
    clips, texts, _ = videos(count, frames, seed)
    mean, std = encode_images(pipeline.vae, clips.reshape(-1, *clips.shape[2:]))
    mean, std = pipeline.vae.scale(jnp.asarray(mean)), std * pipeline.vae.config.scaling_factor
    data = {
        "latent_mean": np.asarray(mean).reshape(count, frames, *mean.shape[1:]),
        "latent_std": std.reshape(count, frames, *std.shape[1:]),
        "tokens": pipeline.tokenize(texts),
    }
    rendered = time.perf_counter()
    model = with_motion(pipeline.unet, start)
    graphdef, motion, rest = nnx.split(model, is_motion, ...)
    text_graphdef, text = nnx.split(pipeline.text_encoder)
    optimizer = recipe.optimizer()
    schedule = NoiseSchedule.from_config(pipeline.schedule_config)
    frozen = {
        "unet": nnx.to_pure_dict(rest),
        "text_encoder": nnx.to_pure_dict(text),
        "empty": pipeline.tokenize([""]),
    }
    state = train(
        motion_step,
        DenoisingStage(graphdef, optimizer, text_graphdef, schedule),
        init_state(nnx.to_pure_dict(motion), optimizer),
        frozen,
        batches(data, recipe.batch_size, seed),
        key=jax.random.key(seed),
        num_steps=recipe.steps,
        log_every=20,
    )
    learnt = nnx.merge(graphdef, final_params(state), frozen["unet"])
    return motion_adapter(learnt), [rendered - began, time.perf_counter() - rendered]


# ---- figures ----


def figures(clips: np.ndarray, clip: Clip) -> dict[str, Any]:
    """Of videos uint8 [N,F,H,W,3]: similarity and difference of consecutive frames.

    The digit covers less than half of a frame, so the median pixel is one of the background.
    """
    features = clip.features(clips.reshape(-1, *clips.shape[2:])).reshape(*clips.shape[:2], -1)
    change = np.abs(np.diff(clips.astype(np.float64), axis=1)).mean(axis=-1)  # [N,F-1,H,W]
    return {
        "frame_consistency": mean_interval(frame_consistency(features)),
        "change_of_pixels": mean_interval(change.mean(axis=(1, 2, 3))),
        "change_of_background": mean_interval(np.median(change, axis=(2, 3)).mean(axis=1)),
    }


def path_of_digit(clips: np.ndarray, colors: np.ndarray) -> dict[str, Any]:
    """How far the middle of what has the digit's color moves in a frame, and how straight.

    Straightness is the distance from the first frame to the last over the length of the path: 1
    for a digit that crosses, near 0 for one that jumps to and fro.
    """
    fill = COLOR_VALUES[colors][:, None, None, None]
    weight = np.exp(-((np.linalg.norm(clips / 255.0 - fill, axis=-1) / 0.25) ** 2))  # [N,F,H,W]
    grid = np.stack(np.mgrid[: clips.shape[2], : clips.shape[3]], axis=-1)
    total = weight.sum(axis=(2, 3))[..., None]
    center = np.einsum("nfhw,hwc->nfc", weight, grid) / np.maximum(total, 1e-9)
    length = np.linalg.norm(np.diff(center, axis=1), axis=-1).sum(axis=1)
    crossed = np.linalg.norm(center[:, -1] - center[:, 0], axis=-1)
    return {
        "pixels_a_frame": mean_interval(length / (clips.shape[1] - 1)),
        "straightness": mean_interval(crossed / np.maximum(length, 1e-9)),
    }


def recognized(clips: np.ndarray, asked: list[Any], judge: Any) -> dict[str, Any]:
    """How many frames show the digit, the color and the texture of their prompt."""
    count, frames = clips.shape[:2]
    found = judge(clips.reshape(-1, *clips.shape[2:]))
    return {
        name: proportion(found[name] == np.repeat([getattr(each, name) for each in asked], frames))
        for name in ("digit", "color", "texture")
    } | {"frames": count * frames}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and measure a motion adapter.")
    parser.add_argument("--steps", type=int, default=1000, help="of the training")
    parser.add_argument("--videos", type=int, default=500, help="rendered to train on")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1, help="videos per step")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--drawn", type=int, default=24, help="videos that are measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="go on with this adapter's training")
    parser.add_argument("--adapter", type=Path, help="take this one instead of training")
    parser.add_argument("--model", type=Path, help="draw with this personalized model")
    parser.add_argument("--prompt", action="append", default=[], help="what to draw with it")
    parser.add_argument("--save-adapter", type=Path, default=ROOT / "outputs" / "glyphs_motion")
    results = ROOT / "benchmarks" / "results" / "glyphs_motion.json"
    parser.add_argument("--output", type=Path, default=results)
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "glyphs_motion.gif")
    options = parser.parse_args()
    if (options.model is None) != (not options.prompt):
        parser.error("--model and --prompt go together")
    began, source, frames = time.perf_counter(), conceptax.bundled_model(), options.frames
    pipeline = load_pytorch(source)

    recipe = Recipe(options.steps, options.batch, options.rate, ema=0.99)
    seconds = []
    if options.adapter is None:
        if options.start is None:
            start = still_adapter(pipeline.unet, frames, options.seed)
        else:
            start = load_pytorch(options.start)
        adapter, seconds = fit(
            pipeline, start, recipe, count=options.videos, frames=frames, seed=options.seed
        )
        save_pytorch(adapter, options.save_adapter, force=True)
    else:
        adapter = load_pytorch(options.adapter)

    everything = prompts()
    rng = np.random.default_rng(options.seed)
    asked = [everything[n] for n in rng.choice(len(everything), options.drawn, replace=False)]
    texts = [each.text for each in asked]
    if options.model is not None:
        pipeline = load_pytorch(options.model)
        texts = [options.prompt[n % len(options.prompt)] for n in range(options.drawn)]
    shape = (options.drawn, frames, *pipeline.latent_shape)
    noise = rng.normal(size=shape).astype(np.float32)
    settings = {"num_inference_steps": SAMPLING_STEPS, "guidance_scale": GUIDANCE}
    # On the model's own betas, on which this adapter was trained.
    together = text_to_video(
        pipeline,
        texts,
        motion_adapter=adapter,
        num_frames=frames,
        beta_schedule=None,
        latents=noise,
        batch_size=4,
        **settings,
    )
    schedule = video_schedule(pipeline.scheduler_config, None)
    images = dataclasses.replace(TextToImage.from_pipeline(pipeline), schedule=schedule)
    alone = images(
        [text for text in texts for _ in range(frames)],
        latents=noise.reshape(-1, *shape[2:]),
        sampler="ddim",
        batch_size=32,
        **settings,
    ).reshape(together.shape)
    clip = load_clip(source / "clip", None, "bundled")
    judge = load_judge(source / "judge")
    rendered, _, colors = videos(options.drawn, frames, options.seed + 1)
    wanted, found = np.asarray([each.color for each in asked]), {}
    for name, clips, fill in (
        ("with the adapter", together, wanted),
        ("frames on their own", alone, wanted),
        ("rendered", rendered, colors),
    ):
        found[name] = figures(clips, clip)
        if options.model is None or name == "rendered":
            found[name] |= path_of_digit(clips, fill)
        if options.model is None and name != "rendered":
            found[name]["recognized"] = recognized(clips, asked, judge)
        means = {
            key: round(found[name][key]["mean"], 4) for key in found[name] if key != "recognized"
        }
        print(f"{name:20} {means}")
    rows = [
        np.concatenate([one, other], axis=2) for one, other in zip(together, alone, strict=True)
    ]
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    save_gif(np.concatenate(rows[:GIF_ROWS], axis=1), options.picture, 8)
    record = {
        "benchmark": "glyphs_motion",
        "date": datetime.date.today().isoformat(),
        "adapter": adapter.config.to_dict(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.split(adapter)[1])),
        "model": options.model.name if options.model else "bundled",
        "prompts": options.prompt,
        "recipe": None if options.adapter else dataclasses.asdict(recipe),
        "start": options.start and options.start.name,
        "videos": options.videos,
        "sampling": {"steps": SAMPLING_STEPS, "guidance": GUIDANCE, "videos": options.drawn},
        "seed": options.seed,
        "figures": found,
        "seconds_to_render_and_train": [round(each, 1) for each in seconds],
        "seconds": round(time.perf_counter() - began, 1),
        **environment(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_records(options.output, record)


if __name__ == "__main__":
    main()
