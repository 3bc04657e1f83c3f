"""Builds the bundled glyphs model from scratch: world, tokenizer, four trainings.

Everything follows from one seed.  Each stage checkpoints in its own folder of `workdir` and leaves
its weights there, so an interrupted build goes on where it stopped.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from ...flax_models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
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
    captioned = train_vision(config, workdir, train_text(config, workdir))
    clip = captioned.clip
    vae = train_autoencoder(config, workdir)
    unet = train_unet(config, workdir, clip.text_model, vae)
    return assemble(unet, vae, clip), clip


def assemble(
    unet: UNet2DConditionModel, vae: AutoencoderKL, clip: CLIPModel
) -> StableDiffusionPipeline:
    """The text-to-image pipeline around the trained parts."""
    return StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=clip.text_model,
        tokenizer=build_tokenizer(),
        scheduler_config=dict(recipe.SCHEDULER),
        model_index=MODEL_INDEX,
    )


def train_text(config: BuildConfig, workdir: Path) -> recipe.CaptionedClip:
    """Stage 1: the small CLIP's text tower."""
    tokenizer = build_tokenizer()
    model = recipe.CaptionedClip(
        recipe.clip_config(
            len(tokenizer),
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.model_max_length,
        ),
        rngs=nnx.Rngs(config.seed),
    )
    world = _world(config, workdir)
    labels = _labels(world)

    def example(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"tokens": _caption_tokens(world, index, rng), "labels": labels[index]}

    return _run(
        "text",
        model,
        recipe.text_step,
        Stage,
        config.text,
        None,
        _batches(config, config.text, example),
        config,
        workdir,
        trainable=("clip.text_*", "head"),
    )


def train_vision(
    config: BuildConfig, workdir: Path, model: recipe.CaptionedClip
) -> recipe.CaptionedClip:
    """Stage 2: its vision tower, against the texts of stage 1."""
    world = _world(config, workdir)
    labels = _labels(world)

    def example(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {
            "image": world["image"][index],
            "tokens": _caption_tokens(world, index, rng),
            "labels": labels[index],
        }

    return _run(
        "vision",
        model,
        recipe.contrastive_step,
        Stage,
        config.vision,
        None,
        _batches(config, config.vision, example),
        config,
        workdir,
        trainable=("clip.vis*", "clip.logit_scale"),
    )


def train_autoencoder(config: BuildConfig, workdir: Path) -> AutoencoderKL:
    """Stage 3: the autoencoder; its scaling factor makes the latents' variance one."""
    model = AutoencoderKL(recipe.AUTOENCODER, rngs=nnx.Rngs(config.seed + 1))
    world = _world(config, workdir)
    model = _run(
        "autoencoder",
        model,
        recipe.autoencoder_step,
        Stage,
        config.autoencoder,
        None,
        _batches(config, config.autoencoder, lambda index, rng: {"image": world["image"][index]}),
        config,
        workdir,
    )
    mean, std = encode_images(model, world["image"][:1024], np.float16)
    scale = float(
        1.0 / np.sqrt(mean.astype(np.float32).var() + (std.astype(np.float32) ** 2).mean())
    )
    return with_scaling_factor(model, round(scale, 5))


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
        return {
            "latent_mean": mean[index],
            "latent_std": std[index],
            "tokens": _caption_tokens(world, index, rng),
        }

    text_graphdef, text_state = nnx.split(text_encoder)
    frozen = {"text_encoder": nnx.to_pure_dict(text_state), "empty": jnp.asarray(_token_ids(""))}
    stage = functools.partial(
        DenoisingStage,
        text_graphdef=text_graphdef,
        schedule=NoiseSchedule.from_config(recipe.SCHEDULER),
    )
    later = dataclasses.replace(config, seed=config.seed + 1)  # other batches, other noise
    for name, plan, run in (("unet", config.unet, config), ("refine", config.refine, later)):
        batches = _batches(run, plan, example, len(shown))
        model = _run(name, model, recipe.denoising_step, stage, plan, frozen, batches, run, workdir)
    return model


def _run(
    name: str,
    model: Any,
    step: Any,
    stage: Any,
    plan: Recipe,
    frozen: Any,
    batches: Iterator[Any],
    config: BuildConfig,
    workdir: Path,
    trainable: tuple[str, ...] = ("*",),
) -> Any:
    """Train one stage to its end and return the model with the parameters to ship.

    `frozen` is what the step reads beside the model; None hands it the model's own frozen part.
    """
    graphdef, params, rest = split_trainable(model, trainable)
    optimizer = plan.optimizer()
    state = train(
        step,
        stage(graphdef, optimizer),
        init_state(params, optimizer),
        rest if frozen is None else frozen,
        batches,
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


def _labels(world: Mapping[str, np.ndarray]) -> Int[np.ndarray, "N 3"]:
    """Digit, color and texture of every image."""
    return np.stack([world[field] for field in ("digit", "color", "texture")], axis=1)


def with_scaling_factor(vae: AutoencoderKL, scaling_factor: float) -> AutoencoderKL:
    """The same autoencoder with another `scaling_factor` in its config."""
    vae.config = dataclasses.replace(vae.config, scaling_factor=scaling_factor)
    assert isinstance(vae.config, AutoencoderKLConfig)
    return vae


def _world(config: BuildConfig, workdir: Path) -> Mapping[str, np.ndarray]:
    """The rendered images and their attributes, cached in `workdir`."""
    path = workdir / f"world_{config.seed}_{config.images}.npz"
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        items = GlyphWorld("generator", config.images, config.seed)
        fields = ("image", "digit", "color", "texture")
        columns: dict[str, list[Any]] = {field: [] for field in fields}
        for item in (items[i] for i in range(len(items))):
            for field in fields:
                columns[field].append(item[field])
        arrays: dict[str, Any] = {field: np.asarray(column) for field, column in columns.items()}
        np.savez(path, **arrays)
    return dict(np.load(path))


@functools.cache
def _tokenizer() -> Any:
    return build_tokenizer()


@functools.cache
def _token_ids(text: str) -> np.ndarray:
    tokens = _tokenizer()(text, padding="max_length")["input_ids"]
    return np.asarray(tokens, np.int32)


def _caption_tokens(
    world: Mapping[str, np.ndarray], index: int, rng: np.random.Generator
) -> np.ndarray:
    triple = (int(world[field][index]) for field in ("digit", "color", "texture"))
    return _token_ids(caption(rng, *triple))


def _batches(config: BuildConfig, plan: Recipe, example: Any, examples: int | None = None) -> Any:
    """Endless shuffled batches; the grain iterator's position is part of a checkpoint."""
    dataset = (
        grain.MapDataset.range(config.images if examples is None else examples)
        .seed(config.seed)
        .shuffle()
        .repeat()
        .random_map(example)
        .batch(plan.batch_size)
    )
    return iter(dataset.to_iter_dataset(_READ))
