"""Builds the bundled glyphs model from scratch: world, tokenizer, four trainings.

Everything follows from one seed.  Each stage checkpoints in its own folder of `workdir` and leaves
its weights there, so an interrupted build goes on where it stopped.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ...flax_models.autoencoder_kl import AutoencoderKL
from ...flax_models.clip import CLIPModel, CLIPTextModel
from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ...flax_models.unet_2d_condition import UNet2DConditionModel
from ..sampling import NoiseSchedule, encode_images
from ..seeds import seed_key
from ..training import init_state, split_trainable, train
from . import recipe
from .captions import caption
from .recipe import DenoisingStage, Recipe, Stage
from .tokenizer import build_tokenizer
from .world import GlyphWorld

_READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.35.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """What a build is made from.

    Attributes:
      seed: of the world, the initial parameters, the batches and the noise.
      images: rendered images in the generator's world.
      without: digits that the UNet never sees.
      text, vision, autoencoder, unet: length and speed of the trainings.
      refine: of a second training of the UNet, from where the first one ended.
    """

    seed: int = 0
    images: int = 24_000
    without: tuple[int, ...] = ()
    text: Recipe = recipe.TEXT_RECIPE
    vision: Recipe = recipe.VISION_RECIPE
    autoencoder: Recipe = recipe.AUTOENCODER_RECIPE
    unet: Recipe = recipe.UNET_RECIPE
    refine: Recipe = recipe.REFINE_RECIPE


def build(config: BuildConfig, workdir: Path) -> tuple[StableDiffusionPipeline, CLIPModel]:
    """Train all models (or load those already trained in `workdir`).

    Returns:
      the pipeline, whose text encoder is the CLIP's text tower, and that CLIP, in float32.
    """
    clip = train_clip(config, workdir)
    vae = train_autoencoder(config, workdir)
    pipeline = StableDiffusionPipeline(
        unet=train_unet(config, workdir, clip.text_model, vae),
        vae=vae,
        text_encoder=clip.text_model,
        tokenizer=_tokenizer(),
        scheduler_config=dict(recipe.SCHEDULER),
        model_index=MODEL_INDEX,
    )
    return pipeline, clip


def train_clip(config: BuildConfig, workdir: Path) -> CLIPModel:
    """Stages 1 and 2: the small CLIP's text tower, then its vision tower against those texts."""
    model = recipe.CaptionedClip(recipe.clip_config(_tokenizer()), rngs=nnx.Rngs(config.seed))
    world = _world(config, workdir)
    labels = np.stack([world[field] for field in ("digit", "color", "texture")], axis=1)

    def text(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"tokens": _caption_tokens(world, index, rng), "labels": labels[index]}

    def captioned(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"image": world["image"][index], **text(index, rng)}

    for name, step, example, trainable in (
        ("text", recipe.text_step, text, ("clip.text_*", "head")),
        ("vision", recipe.contrastive_step, captioned, ("clip.vis*", "clip.logit_scale")),
    ):
        model = _run(name, model, step, example, config, workdir, trainable=trainable)
    return model.clip


def train_autoencoder(config: BuildConfig, workdir: Path) -> AutoencoderKL:
    """Stage 3: the autoencoder; its scaling factor makes the latents' variance one."""
    model = AutoencoderKL(recipe.AUTOENCODER, rngs=nnx.Rngs(config.seed + 1))
    images = _world(config, workdir)["image"]

    def example(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"image": images[index]}

    model = _run("autoencoder", model, recipe.autoencoder_step, example, config, workdir)
    mean, std = (
        part.astype(np.float32) for part in encode_images(model, images[:1024], np.float16)
    )
    scale = float(1.0 / np.sqrt(mean.var() + (std**2).mean()))
    model.config = dataclasses.replace(model.config, scaling_factor=round(scale, 5))
    return model


def train_unet(
    config: BuildConfig, workdir: Path, text_encoder: CLIPTextModel, vae: AutoencoderKL
) -> UNet2DConditionModel:
    """Stage 4: the denoiser, on cached latents, with the text encoder frozen."""
    model = UNet2DConditionModel(recipe.UNET, rngs=nnx.Rngs(config.seed + 2))
    world = _world(config, workdir)
    scale = np.float16(vae.config.scaling_factor)
    mean, std = (scale * part for part in encode_images(vae, world["image"], np.float16))
    (shown,) = np.nonzero(~np.isin(world["digit"], config.without))

    def example(position: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        index = shown[position]
        tokens = _caption_tokens(world, index, rng)
        return {"latent_mean": mean[index], "latent_std": std[index], "tokens": tokens}

    text_graphdef, text_state = nnx.split(text_encoder)
    frozen = {"text_encoder": nnx.to_pure_dict(text_state), "empty": jnp.asarray(_token_ids(""))}
    schedule = NoiseSchedule.from_config(recipe.SCHEDULER)
    stage = functools.partial(DenoisingStage, text_graphdef=text_graphdef, schedule=schedule)
    options = {"stage": stage, "frozen": frozen, "examples": len(shown)}
    later = dataclasses.replace(config, seed=config.seed + 1)  # other batches, other noise
    for name, run in (("unet", config), ("refine", later)):
        model = _run(name, model, recipe.denoising_step, example, run, workdir, **options)
    return model


def _run(
    name: str,
    model: Any,
    step: Any,
    example: Any,
    config: BuildConfig,
    workdir: Path,
    *,
    stage: Any = Stage,
    frozen: Any = None,
    examples: int | None = None,
    trainable: tuple[str, ...] = ("*",),
) -> Any:
    """Train the stage of this name to its end; the model with the parameters to ship.

    `frozen` is what the step reads beside the model; None hands it the model's own frozen part.
    """
    plan: Recipe = getattr(config, name)
    graphdef, params, rest = split_trainable(model, trainable)
    optimizer = plan.optimizer()
    dataset = (
        grain.MapDataset.range(config.images if examples is None else examples)
        .seed(config.seed)
        .shuffle()
        .repeat()
        .random_map(example)
        .batch(plan.batch_size)
    )
    state = train(
        step,
        stage(graphdef, optimizer),
        init_state(params, optimizer),
        rest if frozen is None else frozen,
        dataset.to_iter_dataset(_READ),  # its position is part of a checkpoint
        key=seed_key(config.seed),
        num_steps=plan.steps,
        fixed_length=True,
        checkpoint_dir=(workdir / name).absolute(),
        checkpoint_every=500,
        keep=2,
        metrics_path=workdir / f"{name}.jsonl",
        log_every=10,
    )
    return nnx.merge(graphdef, recipe.final_params(state), rest)


def _world(config: BuildConfig, workdir: Path) -> Mapping[str, np.ndarray]:
    """The rendered images and their attributes, cached in `workdir`."""
    path = workdir / f"world_{config.seed}_{config.images}.npz"
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        world = GlyphWorld("generator", config.images, config.seed)
        fields = ("image", "digit", "color", "texture")
        items = (
            [item[field] for field in fields] for item in (world[i] for i in range(len(world)))
        )
        columns = map(np.asarray, zip(*items, strict=True))
        np.savez(path, **dict(zip(fields, columns, strict=True)))
    return dict(np.load(path))


@functools.cache
def _tokenizer() -> Any:
    return build_tokenizer()


@functools.cache
def _token_ids(text: str) -> np.ndarray:
    return np.asarray(_tokenizer()(text, padding="max_length")["input_ids"], np.int32)


def _caption_tokens(
    world: Mapping[str, np.ndarray], index: int, rng: np.random.Generator
) -> np.ndarray:
    triple = (int(world[field][index]) for field in ("digit", "color", "texture"))
    return _token_ids(caption(rng, *triple))
