"""ESD: erase a concept by training the UNet against its own guidance.

Source: Gandikota et al. 2023, "Erasing Concepts from Diffusion Models" (arXiv 2303.07345), section
4, equation 7: the edited model's prediction under the concept c is to become the original's,
guided away from c,

    e_theta(x_t, c, t)  <-  e*(x_t, t) - eta [e*(x_t, c, t) - e*(x_t, t)]

with the mean squared difference as the loss.  x_t is an image that the edited model itself draws
under c, with guidance, stopped at a random time.  ESD-x trains the cross-attention, for concepts
that a word calls up; ESD-u trains everything else, for concepts that appear unasked.

One update draws one concept.  The paper trains on the bare concept against the empty prompt
(`templates=("{}",), contexts=0`); the defaults here put it into the same prompts as the other
methods do, with the anchor in its place as the unconditional side, so that the rest of a prompt
keeps its effect.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..diffusion.objectives import erase_target, prediction_loss
from ..text.phrases import Retained, concatenated
from ..training import TrainState, constrain_batch
from .common import (
    ErasingStatic,
    Frozen,
    UnetSettings,
    assembled,
    draw_latents,
    draw_prompts,
    erasing_prompts,
    latent_sources,
    prompt_conditions,
    stepped,
)


@dataclasses.dataclass(frozen=True)
class EsdXConfig(UnetSettings):
    """All settings of an ESD run; ESD-x by default.

    The paper's anchor is empty. ESD retains nothing: words of the vocabulary fill `contexts`.
    """

    cycles: int = 300
    latents: Literal["edited", "noise"] = "edited"


@dataclasses.dataclass(frozen=True)
class EsdUConfig(EsdXConfig):
    """All settings of an ESD-u run: those of ESD-x, with the other layers trained."""

    cycles: int = 200
    learning_rate: float = 2e-4
    trainable: tuple[str, ...] = ("*",)
    untrained: tuple[str, ...] = ("*.attn2", "time_embedding", "conv_norm_out", "conv_out")
    eta: float = 1.0


def esd_loss(
    now: nnx.Module,
    before: nnx.Module,
    latents: Float[Array, "P h w C"],
    times: Int[Array, " P"],
    concept: Any,
    anchor: Any,
    eta: float,
) -> Float[Array, ""]:
    """The mean squared difference to equation 7, for P prompts.

    Args:
      now, before: the edited and the original UNet.
      latents, times: where predictions are compared.
      concept, anchor: what the UNet reads of the prompts, and of them with the anchor in its place.
      eta: strength of the negative guidance.
    """
    inputs = concatenated((latents, times, anchor), (latents, times, concept))
    unconditional, conditional = jnp.split(before(*inputs), 2)  # type: ignore
    target = erase_target(unconditional, conditional, eta)
    return prediction_loss(now(latents, times, concept), target)  # type: ignore


def esd_step(
    static: ErasingStatic, state: TrainState, frozen: Frozen, batch: None, key: PRNGKeyArray
) -> tuple[TrainState, dict[str, Array]]:
    """One update of the UNet, on prompts of one concept.

    The metrics are the loss.
    """
    del batch
    config = static.config
    concept_key, prompt_key, latent_key = jax.random.split(key, 3)
    names = ("states", "anchor_states")
    _, (concept, anchor) = draw_prompts(static, frozen, names, concept_key, prompt_key)
    before = static.original(frozen)
    current = static.edited(jax.lax.stop_gradient(state.params), frozen)
    latents, times = constrain_batch(
        draw_latents(static, frozen, latent_key, config.prompts, model=current, condition=concept)
    )

    def loss_of(params: Any) -> tuple[Array, dict[str, Array]]:
        now = static.edited(params, frozen)
        loss = esd_loss(now, before, latents, times, concept, anchor, config.eta)
        return loss, {"loss": loss}

    return stepped(static, state, loss_of)


def prepare(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: EsdXConfig,
    *,
    retain: Sequence[str] | Retained | None = None,
    seed: int = 0,
) -> tuple[ErasingStatic, TrainState, dict[str, Any]]:
    """Everything `esd_step` needs, computed once.

    Args:
      pipeline, concepts, config: as for `erasing.erase`; `trainable` makes it ESD-x or ESD-u.
      retain: words that stand beside the concept in `contexts`; ESD itself retains nothing.
      seed: of those contexts.

    Raises:
      ConceptError: no or unusable concepts.
      ValueError: a pattern of parameters that matches nothing.
    """
    static, state, frozen = assembled(pipeline, config)
    prompts, _ = erasing_prompts(pipeline, concepts, config, retain, seed)
    texts = {
        "states": prompt_conditions(pipeline, prompts.tokens),  # [C, T, L, D]
        "anchor_states": prompt_conditions(pipeline, prompts.without),
        **latent_sources(pipeline, config),
    }
    return static, state, frozen | jax.tree.map(jnp.asarray, texts)
