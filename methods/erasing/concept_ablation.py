"""Concept Ablation: train the UNet to predict for the concept what it predicts for the anchor.

Source: Kumari et al. 2023, "Ablating Concepts in Text-to-Image Diffusion Models" (arXiv
2303.13516), section 3.  x is an image of the anchor prompt c, drawn by the original model, and c*
the same prompt with the concept.  With noised images x_t,

    model-based   E |e(x_t, c, t).sg() - e(x_t, c*, t)|^2
    noise-based   E |noise - e(x_t, c*, t)|^2

where sg stops the gradient, plus lambda times the denoising loss on x and its own prompt c.  As in
the authors' code e(x_t, c, t) is that of the model being trained.  Their weights w_t are 1 here.

The keys and values of the cross-attention train, the paper's choice for most concepts; "*" trains
all.  The paper's anchor is a broader concept (Grumpy Cat -> cat): `anchor` names it, and the
default is none.  The authors draw 1000 images of 200 prompts; here there is one image for each
prompt in the templates and contexts.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..diffusion.objectives import prediction_loss
from ..settings import check_settings
from ..text.phrases import Retained, concatenated
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
    stepped,
)


@dataclasses.dataclass(frozen=True)
class ConceptAblationConfig(ImageSettings):
    """All settings of a Concept Ablation run.

    It retains the anchor alone: words of the vocabulary fill `contexts`.

    Attributes:
      objective: "model" or "noise".
      anchor_weight: of the denoising loss on the anchor's images (lambda).
    """

    trainable: tuple[str, ...] = ("*.attn2.to_k", "*.attn2.to_v")
    objective: Literal["model", "noise"] = "model"
    anchor_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, least={"anchor_weight": 0})


def ablation_step(
    static: ErasingStatic, state: TrainState, frozen: Frozen, batch: None, key: PRNGKeyArray
) -> tuple[TrainState, dict[str, Array]]:
    """One update of the UNet, on prompts of one concept and images of its anchor.

    Returns:
      the new state and metrics: loss, erase, anchor.
    """
    del batch
    concept_key, prompt_key, noise_key = jax.random.split(key, 3)
    names = ("states", "anchor_states", "images")
    _, (concept, anchor, images) = draw_prompts(static, frozen, names, concept_key, prompt_key)
    latents, times, noise = constrain_batch(noised(static, images, noise_key))
    both = concatenated((latents, times, concept), (latents, times, anchor))

    def loss_of(params: Any) -> tuple[Array, dict[str, Array]]:
        ablated, kept = jnp.split(static.edited(params, frozen)(*both), 2)
        target = kept if static.config.objective == "model" else noise
        erase, retain = prediction_loss(ablated, target), prediction_loss(kept, noise)
        loss = erase + static.config.anchor_weight * retain
        return loss, {"loss": loss, "erase": erase, "anchor": retain}

    return stepped(static, state, loss_of)


def prepare(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: ConceptAblationConfig,
    *,
    retain: Sequence[str] | Retained | None = None,
    seed: int = 0,
) -> tuple[ErasingStatic, TrainState, dict[str, Any]]:
    """Everything `ablation_step` needs, computed once; it draws the images.

    Arguments and errors as of `esd.prepare`.
    """
    rows = config.prompts
    static, state, frozen = assembled(pipeline, config, rows=rows, what=" and their anchors")
    prompts, _ = erasing_prompts(pipeline, concepts, config, retain, seed)
    texts = {
        "states": prompt_conditions(pipeline, prompts.tokens),  # [C, T, L, D]
        "anchor_states": prompt_conditions(pipeline, prompts.without),
        "images": drawn_images(pipeline, prompts.without, config, seed),  # [C, T, h, w, c]
    }
    return static, state, frozen | jax.tree.map(jnp.asarray, texts)
