"""SalUn: forget images of the concept with those weights alone that matter to them.

Source: Fan et al. 2023, "SalUn: Empowering Machine Unlearning via Gradient-Based Weight Saliency in
Both Image Classification and Generation" (arXiv 2310.12508), section 4.  The saliency mask is

    m = 1(|grad_theta l_f(theta_0)| >= gamma)

with gamma the median, or another quantile, of all entries (equation 3), and the masked weights
train on images x of the concept c, with another prompt c' in place of c, and on retained images,

    E |e(x_t, c') - e(x_t, c)|^2 + beta E |noise - e(x_t)|^2

(equation 6).  As in the authors' code no gradient flows through e(x_t, c'), which is the model
being trained.  l_f is the denoising loss, of the guided prediction with `saliency_guidance`: 7.5 in
the code, 0 in the paper.  (The stored version of their script for Stable Diffusion marks the
*lowest* gradients; the paper's highest are taken here.)

c' is the prompt with the anchor in the concept's place, where the paper takes another class.
Images of both kinds are drawn by the original model: one for each prompt of the concepts, and
`retain_images` of the retained phrases.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..diffusion.objectives import prediction_loss
from ..seeds import seed_key
from ..settings import check_settings
from ..text.phrases import Retained, concatenated, empty_condition
from ..training import TrainState, constrain_batch
from .common import (
    ErasingStatic,
    Frozen,
    ImageSettings,
    assembled,
    draw_prompts,
    drawn_images,
    erasing_prompts,
    noised,
    prompt_conditions,
    some_rows,
    stepped,
)


@dataclasses.dataclass(frozen=True)
class SalUnConfig(ImageSettings):
    """All settings of a SalUn run.

    Attributes:
      saliency: fraction of the trainable weights that train: those of the largest gradients.
      saliency_batches: of `prompts` images that the gradients are summed over.
      saliency_guidance: of the prediction whose loss is differentiated.
      retain_images: of retained phrases.
      retain_rows: retained images per update.
      retain_weight: beta.
      frames: in how many templates each retained phrase is put, besides being retained bare.
    """

    saliency: float = 0.5
    saliency_batches: int = 8
    saliency_guidance: float = 7.5
    retain_images: int = 128
    retain_rows: int = 8
    retain_weight: float = 1.0
    frames: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = {"saliency_batches": 1, "retain_images": 1, "retain_rows": 1}
        rest = {"saliency_guidance": 0, "retain_weight": 0, "frames": 0}
        check_settings(self, least=counts | rest)
        if not 0 < self.saliency <= 1:
            raise ValueError(f"saliency is a fraction in (0, 1], received {self.saliency}.")


def saliency_mask(gradients: Any, fraction: float) -> Any:
    """True at the `fraction` of all entries whose magnitude is largest (equation 3)."""
    every = jnp.concatenate([jnp.abs(leaf).ravel() for leaf in jax.tree.leaves(gradients)])
    lowest = jnp.quantile(every, 1 - fraction)
    return jax.tree.map(lambda leaf: jnp.abs(leaf) >= lowest, gradients)


def salun_step(
    static: ErasingStatic, state: TrainState, frozen: Frozen, batch: None, key: PRNGKeyArray
) -> tuple[TrainState, dict[str, Array]]:
    """One update of the salient weights, on images of one concept and retained ones.

    Returns:
      the new state and metrics: loss, erase, retain.
    """
    del batch
    config = static.config
    concept_key, prompt_key, noise_key, row_key = jax.random.split(key, 4)
    names = ("states", "anchor_states", "images")
    _, (concept, anchor, images) = draw_prompts(static, frozen, names, concept_key, prompt_key)
    stored = frozen["retained_states"], frozen["retained_images"]
    rows = jax.random.choice(row_key, len(stored[1]), (config.retain_rows,))
    retained, others = constrain_batch(jax.tree.map(lambda leaf: leaf[rows], stored))
    together = jnp.concatenate([images, others])
    latents, times, noise = constrain_batch(noised(static, together, noise_key))
    size = config.prompts

    def loss_of(params: Any) -> tuple[Array, dict[str, Array]]:
        masked = jax.tree.map(
            lambda leaf, mask: jnp.where(mask, leaf, jax.lax.stop_gradient(leaf)),
            params,
            frozen["mask"],
        )
        now = static.edited(masked, frozen)
        still = static.edited(jax.lax.stop_gradient(params), frozen)
        context = concatenated(concept, retained)
        predicted = now(latents, times, context)
        erase = prediction_loss(predicted[:size], still(latents[:size], times[:size], anchor))
        retain = prediction_loss(predicted[size:], noise[size:])
        loss = erase + config.retain_weight * retain
        return loss, {"loss": loss, "erase": erase, "retain": retain}

    return stepped(static, state, loss_of)


def prepare(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: SalUnConfig,
    *,
    retain: Sequence[str] | Retained | None = None,
    seed: int = 0,
) -> tuple[ErasingStatic, TrainState, dict[str, Any]]:
    """Everything `salun_step` needs, computed once: it draws the images and finds the mask.

    Arguments and errors as of `esd.prepare`; `retain` says what is preserved.
    """
    rows, what = config.prompts + config.retain_rows, f" with retain_rows {config.retain_rows}"
    static, state, frozen = assembled(pipeline, config, rows=rows, what=what)
    prompts, words = erasing_prompts(pipeline, concepts, config, retain, seed, frames=config.frames)
    retained = some_rows(words, config.retain_images, seed)
    texts = {
        "states": prompt_conditions(pipeline, prompts.tokens),  # [C, T, L, D]
        "anchor_states": prompt_conditions(pipeline, prompts.without),
        "images": drawn_images(pipeline, prompts.tokens, config, seed),  # [C, T, h, w, c]
        "retained_states": prompt_conditions(pipeline, retained),  # [N, L, D]
        "retained_images": drawn_images(pipeline, retained, config, seed + 1),
    }
    frozen |= jax.tree.map(jnp.asarray, texts)
    gradients = forgetting_gradients(static, state, frozen, empty_condition(pipeline), seed)
    return static, state, frozen | {"mask": saliency_mask(gradients, config.saliency)}


def forgetting_gradients(
    static: ErasingStatic, state: TrainState, frozen: Frozen, empty: Any, seed: int
) -> Any:
    """Gradients of l_f by the trained parameters, summed over `saliency_batches`.

    Args:
      static, state, frozen: of a run.
      empty: what the UNet reads of the empty prompt, [L, D].
      seed: of the prompts, times and noise.
    """
    config = static.config

    def loss_of(params: Any, frozen: Frozen, empty: Any, key: PRNGKeyArray) -> Array:
        concept_key, prompt_key, noise_key = jax.random.split(key, 3)
        names = ("states", "images")
        _, (concept, images) = draw_prompts(static, frozen, names, concept_key, prompt_key)
        latents, times, noise = noised(static, images, noise_key)
        without = jax.tree.map(lambda one, all_: jnp.broadcast_to(one, all_.shape), empty, concept)
        inputs = concatenated((latents, times, concept), (latents, times, without))
        conditional, unconditional = jnp.split(static.edited(params, frozen)(*inputs), 2)
        guided = conditional + config.saliency_guidance * (conditional - unconditional)
        return prediction_loss(guided, noise)

    slope, key = jax.jit(jax.grad(loss_of)), seed_key(seed)
    total = jax.tree.map(jnp.zeros_like, state.params)
    for n in range(config.saliency_batches):
        gradient = slope(state.params, frozen, empty, jax.random.fold_in(key, n))
        total = jax.tree.map(jnp.add, total, gradient)
    return total
