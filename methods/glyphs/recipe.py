"""How the bundled glyphs model is trained: four pure steps, each with its own recipe.

1. `text_step`: the text tower of a small CLIP learns what captions say; it becomes the pipeline's
   text encoder, as in Stable Diffusion.
2. `contrastive_step`: that CLIP's vision tower learns to agree with the frozen texts.
3. `autoencoder_step`: an `AutoencoderKL` learns to compress the images (Rombach et al. 2022, eq. 25
   without the discriminator, plus an edge term that keeps strokes crisp).
4. `denoising_step`: a `UNet2DConditionModel` learns to predict the noise of cached latents, with
   min-SNR weights (Hang et al. 2023, eq. 8) and caption dropout (Ho & Salimans 2022).

Images are `[B, 64, 64, 3]` uint8, latents `[B, 16, 16, 4]`, texts `[B, 24]` int32.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ...flax_models.autoencoder_kl import AutoencoderKLConfig
from ...flax_models.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from ...flax_models.unet_2d_condition import UNet2DConditionConfig
from ..evaluation.preprocessing import CLIP_MEAN, CLIP_STD
from ..sampling.latents import to_unit
from ..sampling.schedule import NoiseSchedule, add_noise, alphas_cumprod
from ..settings import check_settings
from ..training.state import TrainState, apply_gradients

AUTOENCODER = AutoencoderKLConfig(
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(16, 32, 64),
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=64,
    latent_channels=4,
)
UNET = UNet2DConditionConfig(
    sample_size=16,
    block_out_channels=(48, 96),
    layers_per_block=1,
    norm_num_groups=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=96,
    attention_head_dim=4,
)
# Stable Diffusion 1.x's schedule, so that a recipe for one runs on the other.
SCHEDULER: Mapping[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}


def clip_config(tokenizer: Any) -> CLIPConfig:
    """The small CLIP of a tokenizer: both towers four layers of width 96."""
    layers: dict[str, Any] = {"num_hidden_layers": 4, "num_attention_heads": 4}
    size: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 384, "projection_dim": 64}
    text = CLIPTextConfig(
        **size,
        **layers,
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    vision = CLIPVisionConfig(**size, **layers, image_size=64, patch_size=8)
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Length and speed of one stage.

    Attributes:
      steps: optimizer updates.
      batch_size: examples an update sees.
      learning_rate: peak of a warm-up and cosine schedule, AdamW.
      weight_decay: AdamW's decay.
      ema: decay of the running mean of the parameters that is shipped; 0 ships the last ones.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.01
    ema: float = 0.0

    def __post_init__(self) -> None:
        check_settings(self, least={"steps": 1, "batch_size": 1, "weight_decay": 0})
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is a fraction in [0, 1), received {self.ema}.")

    @functools.cache  # noqa: B019  (one program for all stages with this recipe)
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW under a warm-up of 5 % and a cosine decay to 1 %, gradients clipped at norm 1."""
        warm_up = min(max(1, self.steps // 20), self.steps - 1)
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warm_up, self.steps, 0.01 * self.learning_rate
        )
        adamw = optax.adamw(rate, b2=0.99, weight_decay=self.weight_decay)
        means = [parameter_ema(self.ema)] if self.ema else []
        return optax.chain(optax.clip_by_global_norm(1.0), adamw, *means)


TEXT_RECIPE = Recipe(steps=1000, batch_size=256, learning_rate=1e-3, weight_decay=0.05)
VISION_RECIPE = Recipe(steps=700, batch_size=96, learning_rate=1e-3, weight_decay=0.05)
AUTOENCODER_RECIPE = Recipe(steps=1500, batch_size=16, learning_rate=2e-3, weight_decay=0.0)
UNET_RECIPE = Recipe(steps=6000, batch_size=32, learning_rate=1e-3, ema=0.999)
REFINE_RECIPE = Recipe(steps=2000, batch_size=32, learning_rate=6e-4, ema=0.998)


class ParameterEmaState(NamedTuple):
    """The running mean of the parameters."""

    mean: Any


def parameter_ema(decay: float) -> optax.GradientTransformation:
    """Pass updates through and keep a running mean of the parameters they lead to."""

    def update(updates: Any, state: ParameterEmaState, params: Any = None):
        ahead = optax.apply_updates(params, updates)
        mean = jax.tree.map(lambda m, p: decay * m + (1 - decay) * p, state.mean, ahead)
        return updates, ParameterEmaState(mean)

    return optax.GradientTransformation(
        lambda params: ParameterEmaState(jax.tree.map(jnp.copy, params)),
        update,  # type: ignore[arg-type]  # without extra arguments
    )


def final_params(state: TrainState) -> Any:
    """The parameters to ship: their running mean where the optimizer keeps one."""
    is_ema = lambda node: isinstance(node, ParameterEmaState)  # noqa: E731
    means = [s.mean for s in jax.tree.leaves(state.opt_state, is_leaf=is_ema) if is_ema(s)]
    return means[0] if means else state.params


@dataclasses.dataclass(frozen=True)
class Stage:
    """The static part of a step: the model's structure and the optimizer."""

    graphdef: nnx.GraphDef[Any]
    optimizer: optax.GradientTransformation


@dataclasses.dataclass(frozen=True)
class DenoisingStage(Stage):
    """The static part of `denoising_step`."""

    text_graphdef: nnx.GraphDef[Any]
    schedule: NoiseSchedule
    caption_dropout: float = 0.1
    snr_cap: float = 5.0


def contrastive_loss(logits: Float[Array, "N N"], true: Float[Array, "N N"]) -> Float[Array, ""]:
    """Symmetric cross-entropy of image-text logits, images along the first axis.

    `true` is 1 where caption j is true of image i; such pairs are positives together.
    """
    loss = jnp.zeros(())
    for axis in (0, 1):
        targets = true / true.sum(axis=axis, keepdims=True)
        loss -= (targets * jax.nn.log_softmax(logits, axis=axis)).sum(axis=axis).mean()
    return 0.5 * loss


class CaptionedClip(nnx.Module):
    """A CLIP and the linear head that reads digit, color and texture off either modality.

    The head exists in training only.  Texts learn first, by the head alone; then the vision tower
    learns against the frozen texts (contrastive tuning with one tower locked, Zhai et al. 2022)
    and against the same head, which digits need: contrasts alone stop at colors and textures.
    """

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        self.clip = CLIPModel(config, rngs=rngs)
        self.head = nnx.Linear(config.projection_dim, sum(ATTRIBUTES), rngs=rngs)


ATTRIBUTES = (10, 6, 3)  # digits, colors, textures


def attribute_loss(
    logits: Float[Array, "B A"], labels: Int[Array, "B 3"], sizes: tuple[int, ...] = ATTRIBUTES
) -> Float[Array, ""]:
    """Mean cross-entropy of digit, color and texture, summed over the three."""
    parts = jnp.split(logits, np.cumsum(sizes)[:-1].tolist(), axis=-1)
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(part, labels[:, i]).mean()
        for i, part in enumerate(parts)
    ]
    return sum(losses, jnp.zeros(()))


def text_step(
    static: Stage, state: TrainState, frozen: Any, batch: Mapping[str, Array], key: PRNGKeyArray
) -> tuple[TrainState, dict[str, Array]]:
    """One update of the text tower on `batch` = {tokens [B,L], labels int [B,3]}."""
    del key

    def loss_of(params):
        model = nnx.merge(static.graphdef, params, frozen)
        features = model.clip.get_text_features(batch["tokens"])
        return attribute_loss(model.head(features), batch["labels"])

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    return apply_gradients(state, gradients, static.optimizer), {"loss": loss}


def contrastive_step(
    static: Stage, state: TrainState, frozen: Any, batch: Mapping[str, Array], key: PRNGKeyArray
) -> tuple[TrainState, dict[str, Array]]:
    """One update of the vision tower on `batch` = {image uint8, tokens [B,L], labels int [B,3]}."""
    del key
    labels = batch["labels"]
    same = (labels[:, None] == labels[None]).all(axis=-1).astype(jnp.float32)

    def loss_of(params):
        model = nnx.merge(static.graphdef, params, frozen)
        pixels = batch["image"].astype(jnp.float32) / 255.0
        pixels = (pixels - jnp.asarray(CLIP_MEAN)) / jnp.asarray(CLIP_STD)
        image = model.clip.get_image_features(pixels)
        text = model.clip.get_text_features(batch["tokens"])
        attributes = attribute_loss(model.head(image), labels)
        image, text = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (image, text))
        logits = jnp.exp(model.clip.logit_scale[...]) * image @ text.T
        contrast = contrastive_loss(logits, same)
        loss = contrast + attributes
        return loss, {"loss": loss, "contrast": contrast, "attributes": attributes}

    (_, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return apply_gradients(state, gradients, static.optimizer), metrics


def autoencoder_step(
    static: Stage, state: TrainState, frozen: Any, batch: Mapping[str, Array], key: PRNGKeyArray
) -> tuple[TrainState, dict[str, Array]]:
    """One autoencoder update on `batch` = {image uint8 [B,64,64,3]}."""
    del frozen
    images = to_unit(batch["image"])

    def loss_of(params):
        vae = nnx.merge(static.graphdef, params)
        mean, logvar = vae.encode(images)
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        error = vae.decode(latents) - images
        edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
        reconstruction = jnp.abs(error).mean() + edges
        divergence = 0.5 * (mean**2 + jnp.exp(logvar) - 1.0 - logvar).mean()
        loss = reconstruction + 1e-4 * divergence
        return loss, {"loss": loss, "reconstruction": reconstruction, "divergence": divergence}

    (_, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return apply_gradients(state, gradients, static.optimizer), metrics


def denoising_step(
    static: DenoisingStage,
    state: TrainState,
    frozen: Any,
    batch: Mapping[str, Array],
    key: PRNGKeyArray,
) -> tuple[TrainState, dict[str, Array]]:
    """One UNet update on `batch` = {latent_mean, latent_std [B,16,16,4] scaled, tokens [B,L]}.

    `frozen` is {"text_encoder": its parameters, "empty": token ids [L] of the empty caption}.
    """
    draw, noise_key, time_key, drop_key = jax.random.split(key, 4)
    mean, std = (batch[f"latent_{each}"].astype(jnp.float32) for each in ("mean", "std"))
    size = mean.shape[0]
    latents = mean + std * jax.random.normal(draw, mean.shape)
    noise = jax.random.normal(noise_key, mean.shape)
    timesteps = jax.random.randint(time_key, (size,), 0, static.schedule.num_train_timesteps)
    noisy = add_noise(static.schedule, latents, noise, timesteps)
    dropped = jax.random.bernoulli(drop_key, static.caption_dropout, (size, 1))
    tokens = jnp.where(dropped, frozen["empty"][None], batch["tokens"])
    text_encoder = nnx.merge(static.text_graphdef, frozen["text_encoder"])
    text = text_encoder(tokens).last_hidden_state
    alphas = jnp.asarray(alphas_cumprod(static.schedule))[timesteps]
    snr = alphas / (1 - alphas)
    weights = jnp.minimum(snr, static.snr_cap) / snr

    def loss_of(params):
        predicted = nnx.merge(static.graphdef, params)(noisy, timesteps, text)
        return (weights * ((predicted - noise) ** 2).mean(axis=(1, 2, 3))).mean()

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    return apply_gradients(state, gradients, static.optimizer), {"loss": loss}
