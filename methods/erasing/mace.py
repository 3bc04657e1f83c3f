"""MACE: other words forget the concept in closed form, adapters suppress what looks at it, fused.

Source: Lu et al. 2024, "MACE: Mass Concept Erasure in Diffusion Models" (arXiv 2403.06135).

1. Refinement (equation 2): keys and values W' with which the words around the concept are projected
   as in the same prompts with the anchor, the problem of `closed_form` without the concept's own
   states.  lambda_1 is `preserve_weight`.
2. One LoRA W' + A B per concept, trained on noised images of it to bring down (equation 4)

       S_i S_l |A_{t,l}^i M|^2

   with A^i the attention map of the concept's word i in layer l, at times drawn by (equation 5)

       xi(t) = [s(gamma (t - t1)) - s(gamma (t - t2))] / Z,   s the logistic function,

   which leaves alone the early steps, in which an image takes its general shape.
3. Fusion (equations 6 and 7): projections W* that on the prompts of concept i act as its LoRA does,
   and on what is retained as the original W,

       min_W*  S_i S_j |W* e_ij - (W' + A_i B_i) e_ij|^2 + lambda_2 S_j |W* e_j - W e_j|^2.

What differs: the mask M is Grounded-SAM's segmentation of the image in the paper; here it is where
the model's own map of the word, scaled to [0, 1], reaches `mask_threshold` (0: everywhere, as the
authors' code does for styles).  The code takes norms of the layers where the paper has squares,
which are taken here.  The images are noised ones of the original model, one for each prompt, where
the authors draw 8.  S in 1 and 3 are means.  A cycle trains the LoRA of one concept, drawn at
random.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..sampling import add_noise
from ..settings import check_settings
from ..text.phrases import Retained
from ..training import TrainState, constrain_batch
from .adapters import AdapterSettings, AdapterStatic, with_adapters
from .attention_maps import Grid, Seen, mask_at, watched, word_mask
from .closed_form import edit_matrix, mean_square, paired_states, rewritten, second_moment
from .common import (
    Frozen,
    ImageSettings,
    draw_prompts,
    drawn_images,
    erasing_prompts,
    prompt_conditions,
    stepped,
)


@dataclasses.dataclass(frozen=True)
class MaceConfig(ImageSettings, AdapterSettings):
    """All settings of a MACE run.

    Attributes:
      focus: t1 and t2, as fractions of the schedule.
      sharpness: gamma, per whole schedule.
      mask_threshold: of the word's normalized map.
      preserve_weight: of retained states in the refinement (lambda_1).
      fuse_weight: of retained states in the fusion (lambda_2).
      regularization: weight of staying at the projections before, in both, relative to the mean
        squared entry of the retained states.
      frames: in how many templates each retained phrase is put, besides being retained bare.
    """

    cycles: int = 100
    prompts: int = 4
    trainable: tuple[str, ...] = ("*.attn2.to_k", "*.attn2.to_v")
    focus: tuple[float, float] = (0.2, 0.4)
    sharpness: float = 50.0
    mask_threshold: float = 0.0
    preserve_weight: float = 1.0
    fuse_weight: float = 1.0
    regularization: float = 0.01
    frames: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"mask_threshold": 0, "preserve_weight": 0, "fuse_weight": 0, "frames": 0}
        check_settings(self, least=least, positive=("sharpness", "regularization"))
        if not 0 <= self.focus[0] < self.focus[1] <= 1:
            raise ValueError(
                f"focus takes two rising fractions of the schedule, received {self.focus}."
            )


@dataclasses.dataclass(frozen=True)
class MaceStatic(AdapterStatic):
    """What a step needs and never changes: LoRAs of each concept, stacked."""

    def result(self, params: Any, frozen: Frozen) -> Any:
        """The UNet with fused projections."""
        config = self.config
        moments, kept = (np.asarray(frozen[name], np.float64) for name in ("moments", "preserved"))

        def fuse(path: str, refined: np.ndarray) -> np.ndarray:
            down, up = (np.asarray(params[path][name], np.float64) for name in ("down", "up"))
            return fused(
                refined,
                np.swapaxes(down @ up, 1, 2),
                np.asarray(frozen["unrefined"][path], np.float64).T,
                moments,
                kept,
                weight=config.fuse_weight,
                regularization=config.regularization * mean_square(kept),
            )

        return rewritten(self.original(frozen), config.trainable, len(kept), fuse)


def fused(
    refined: Float[np.ndarray, "O D"],
    changes: Float[np.ndarray, "C O D"],
    original: Float[np.ndarray, "O D"],
    moments: Float[np.ndarray, "C D D"],
    preserved: Float[np.ndarray, "D D"],
    *,
    weight: float,
    regularization: float,
) -> Float[np.ndarray, "O D"]:
    """W* (equation 7), in float64.

    Args:
      refined, original: W' and W.
      changes: A_i B_i of each concept.
      moments: means of e_ij e_ij^T over the states of each concept's prompts.
      preserved: mean of e_j e_j^T over the retained states.
      weight: lambda_2.
      regularization: of staying at W'.
    """
    stay = regularization * np.eye(len(preserved))
    left = weight * preserved + stay
    right = weight * original @ preserved + refined @ stay
    for change, moment in zip(changes, moments, strict=True):
        left, right = left + moment, right + (refined + change) @ moment
    return np.linalg.solve(left, right.T).T  # `left` is symmetric


def focus_logits(timesteps: int, focus: tuple[float, float], sharpness: float) -> np.ndarray:
    """log xi(t) of every t, up to a constant (equation 5)."""
    time = np.arange(timesteps) / timesteps

    def logistic(bound: float) -> np.ndarray:
        return 1 / (1 + np.exp(-sharpness * (time - bound)))

    return np.log(np.maximum(logistic(focus[0]) - logistic(focus[1]), 1e-30)).astype(np.float32)


def suppression_loss(
    seen: dict[str, Seen],
    places: Bool[Array, "B K"],
    mask: Float[Array, "B h w"] | None,
    latent: Grid,
) -> Float[Array, ""]:
    """Equation 4 of each image, as a mean: squares of the words' maps inside the mask."""
    total = jnp.zeros(())
    for each in seen.values():
        maps = each.weights * places[:, None, None, :]  # [B, H, L, K]
        if mask is not None:
            maps = maps * mask_at(mask, maps.shape[2], latent)[:, None, :, None]
        total += jnp.sum(maps**2) / len(places)
    return total


def mace_step(
    static: MaceStatic, state: TrainState, frozen: Frozen, batch: None, key: PRNGKeyArray
) -> tuple[TrainState, dict[str, Array]]:
    """One update of one concept's LoRA.

    The metrics are the loss.
    """
    del batch
    config = static.config
    concept_key, prompt_key, time_key, noise_key = jax.random.split(key, 4)
    names = ("states", "places", "images")
    which, (concept, places, images) = draw_prompts(static, frozen, names, concept_key, prompt_key)
    logits = focus_logits(static.schedule.num_train_timesteps, config.focus, config.sharpness)
    times = jax.random.categorical(time_key, jnp.asarray(logits), shape=(config.prompts,))
    noise = jax.random.normal(noise_key, images.shape)
    latents = constrain_batch(add_noise(static.schedule, images, noise, times))
    mask, grid = None, static.latent_shape[:2]
    if config.mask_threshold:
        before = static.original(frozen)
        looked = watched(before)
        before(latents, times, concept)
        mask = word_mask(looked, places, grid, config.mask_threshold)

    def loss_of(params: Any) -> tuple[Array, dict[str, Array]]:
        own = jax.tree.map(lambda leaf: leaf[which], params)
        now = static.edited(own, frozen)
        seen = watched(now)
        now(latents, times, concept)
        loss = suppression_loss(seen, places, mask, grid)
        return loss, {"loss": loss}

    return stepped(static, state, loss_of)


def prepare(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: MaceConfig,
    *,
    retain: Sequence[str] | Retained | None = None,
    seed: int = 0,
) -> tuple[MaceStatic, TrainState, dict[str, Any]]:
    """Everything `mace_step` needs, computed once: it refines the projections and draws images.

    Arguments and errors as of `esd.prepare`; `retain` says what is preserved.
    """
    prompts, retained = erasing_prompts(
        pipeline, concepts, config, retain, seed, frames=config.frames
    )
    preserved = second_moment(pipeline, retained)
    around, anchor = paired_states(pipeline, prompts, itself=False)
    matrix = edit_matrix(
        around,
        anchor,
        preserved,
        erase_weight=1.0,
        preserve_weight=config.preserve_weight,
        regularization=config.regularization * mean_square(preserved),
    )
    before: dict[str, np.ndarray] = {}

    def refine(path: str, weight: np.ndarray) -> np.ndarray:
        before[path] = weight.T
        return weight @ matrix

    unet = rewritten(pipeline.unet, config.trainable, len(matrix), refine)
    refined = dataclasses.replace(pipeline, unet=unet)
    static, state, frozen = with_adapters(refined, config, seed, len(concepts), static=MaceStatic)
    texts = {
        "states": prompt_conditions(pipeline, prompts.tokens),  # [C, T, L, D]
        "places": prompts.concept,  # [C, T, L]
        "images": drawn_images(pipeline, prompts.tokens, config, seed),  # [C, T, h, w, c]
        "moments": np.stack([second_moment(pipeline, rows) for rows in prompts.tokens]),
        "preserved": preserved,
        "unrefined": before,
    }
    return static, state, frozen | jax.tree.map(jnp.asarray, texts)
