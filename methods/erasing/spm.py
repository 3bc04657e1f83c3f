"""SPM: erase a concept with adapters of rank one, anchored at what is farthest from it.

Source: Lyu et al. 2023, "One-dimensional Adapter to Rule Them All: Concepts, Diffusion Models and
Erasing Applications" (arXiv 2312.16145), section 3.  The membrane of a layer is y = W x + (v^T x)
u, a LoRA of rank one, in every linear and convolutional layer of the UNet's transformers.  It
trains on

    L_era = |e(x_t, c | M) - [e(x_t, c0) - eta (e(x_t, c) - e(x_t, c0))]|^2
    L_anc = E_a |e(x_t, a | M) - e(x_t, a)|^2
    L     = L_era + lambda L_anc

with c the concept, c0 its surrogate (the anchor here), and x_t an image that the erased model draws
under c, stopped at a random time: L_era is the loss of `esd`.  Latent anchoring draws a with a
probability that falls with its closeness to c, by (1 - cos(a, c))^alpha.

What differs: the authors' code draws a as Gaussian noise of the concept states' size, accepted with
probability 1 - cos; here a are retained phrases, drawn by the cosine of the pooled states.  Their
lambda is 1000, their eta 1, and their learning rate warms up and restarts twice.  "Facilitated
transport", which scales a membrane by the prompt while drawing, is left out: the membrane is always
open, as after their `merge_spm`.  As it has rank one, `--export lora` writes it exactly.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..diffusion.objectives import erase_target, prediction_loss
from ..settings import check_settings
from ..text.phrases import Retained, concatenated, concept_states, pooled_states
from ..training import TrainState, constrain_batch
from ..vectors import unit
from .adapters import AdapterSettings, AdapterStatic, with_adapters
from .common import (
    Frozen,
    draw_latents,
    draw_prompts,
    erasing_prompts,
    latent_sources,
    prompt_conditions,
    some_rows,
    stepped,
)


@dataclasses.dataclass(frozen=True)
class SpmConfig(AdapterSettings):
    """All settings of an SPM run.

    Attributes:
      anchors: retained phrases that are anchored.
      anchor_rows: of them per update.
      anchor_weight: lambda.
      anchor_exponent: alpha.
      frames: in how many templates each retained phrase is put, besides being retained bare.
    """

    cycles: int = 150
    learning_rate: float = 5e-3
    trainable: tuple[str, ...] = ("*.attentions",)
    eta: float = 3.0
    latents: Literal["edited", "noise"] = "noise"
    anchors: int = 512
    anchor_rows: int = 8
    anchor_weight: float = 30.0
    anchor_exponent: float = 1.0
    frames: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"anchors": 1, "anchor_rows": 1, "anchor_weight": 0, "anchor_exponent": 0}
        check_settings(self, least=least | {"frames": 0})


def spm_step(
    static: AdapterStatic, state: TrainState, frozen: Frozen, batch: None, key: PRNGKeyArray
) -> tuple[TrainState, dict[str, Array]]:
    """One update of the membranes, on prompts of one concept and anchors.

    Returns:
      the new state and metrics: loss, erase, anchor.
    """
    del batch
    config, size = static.config, static.config.prompts
    concept_key, prompt_key, latent_key, row_key = jax.random.split(key, 4)
    names = ("states", "anchor_states")
    _, (concept, anchor) = draw_prompts(static, frozen, names, concept_key, prompt_key)
    every = frozen["retained_states"]
    count = jax.tree.leaves(every)[0].shape[0]
    rows = jax.random.choice(row_key, count, (config.anchor_rows,))
    retained = constrain_batch(jax.tree.map(lambda leaf: leaf[rows], every))
    before = static.original(frozen)
    current = static.edited(jax.lax.stop_gradient(state.params), frozen)
    latents, times = constrain_batch(
        draw_latents(static, frozen, latent_key, size, model=current, condition=concept)
    )
    places = jnp.arange(size + config.anchor_rows) % size  # anchors share the concept's latents
    order = jnp.concatenate([jnp.arange(size), places])
    context = concatenated(anchor, concept, retained)
    targets = before(*constrain_batch((latents[order], times[order], context)))
    surrogate, unwanted, kept = jnp.split(targets, [size, 2 * size])
    target = erase_target(surrogate, unwanted, config.eta)
    context = concatenated(concept, retained)

    def loss_of(params: Any) -> tuple[Array, dict[str, Array]]:
        predicted = static.edited(params, frozen)(latents[places], times[places], context)
        erase = prediction_loss(predicted[:size], target)
        anchored = prediction_loss(predicted[size:], kept)
        loss = erase + config.anchor_weight * anchored
        return loss, {"loss": loss, "erase": erase, "anchor": anchored}

    return stepped(static, state, loss_of)


def prepare(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: SpmConfig,
    *,
    retain: Sequence[str] | Retained | None = None,
    seed: int = 0,
) -> tuple[AdapterStatic, TrainState, dict[str, Any]]:
    """Everything `spm_step` needs, computed once.

    Arguments and errors as of `esd.prepare`; `retain` says what is anchored.
    """
    rows, what = config.anchor_rows, f" with anchor_rows {config.anchor_rows}"
    static, state, frozen = with_adapters(pipeline, config, seed, rows=rows, what=what)
    prompts, words = erasing_prompts(pipeline, concepts, config, retain, seed, frames=config.frames)
    far = anchor_weights(pipeline, concepts, words, config.anchor_exponent)
    texts = {
        "states": prompt_conditions(pipeline, prompts.tokens),  # [C, T, L, D]
        "anchor_states": prompt_conditions(pipeline, prompts.without),
        "retained_states": prompt_conditions(
            pipeline, some_rows(words, config.anchors, seed, far)
        ),  # [N, L, D]
        **latent_sources(pipeline, config),
    }
    return static, state, frozen | jax.tree.map(jnp.asarray, texts)


def anchor_weights(
    pipeline: StableDiffusionPipeline, concepts: Sequence[str], rows: np.ndarray, exponent: float
) -> np.ndarray:
    """(1 - cos)^alpha of each phrase [N, L], to the concept that it is nearest to."""
    states = unit(pooled_states(pipeline.prompt_encoder, rows))
    cosines = np.asarray(states @ unit(concept_states(pipeline, concepts)).T).max(axis=1)
    return np.clip(1 - cosines, 1e-6, None) ** exponent
