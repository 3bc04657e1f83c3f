"""Receler: erasers behind the cross-attention, trained against attacks and only where the word is.

Source: Huang et al. 2023, "Receler: Reliable Concept Erasing of Text-to-Image Diffusion Models via
Lightweight Erasers" (arXiv 2311.17717), section 3.  With o the erasers' outputs in the layers l of
the cross-attention, and M the mask of the cells that attend to the concept's words in the original,

    L_erase = |e(x_t, c') - [e(x_t, c0) - eta (e(x_t, c) - e(x_t, c0))]|^2
    L_reg   = mean_l |o_l (1 - M)|^2 / |1 - M|
    L       = L_erase + weight L_reg

c' is the concept's prompt with soft words that an attack has found: text states put behind the
prompt, which move until the erased model predicts what the original did for the concept,
min |e(x_t, c') - e(x_t, c)|^2.  c0 is the prompt with the anchor.

What differs from the authors' code: their eraser is a perceptron with biases and GELU behind each
attention, and no weight of a published UNet can hold it; here it is linear, so that it becomes an
adapter of the attention's `to_out`, and the result is a plain UNet, or a LoRA (`--export lora`).
Their soft words start at random and live on from cycle to cycle, with 50 steps of the attack in
each; here each cycle begins anew at the prompt's own states, so that plain prompts are erased too.
Their eta is 1.  Their mask is of maps of 16 x 16 cells; here of those nearest to a quarter of the
latent's side.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ...flax_models.clip import pooling_positions
from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ...flax_models.unet_2d_condition import text_states, with_text_states
from ..diffusion.objectives import erase_target, prediction_loss
from ..settings import check_settings
from ..text.phrases import Retained, concatenated
from ..training import TrainState, constrain_batch
from .adapters import Adapters, AdapterSettings, AdapterStatic, with_adapters
from .attention_maps import Seen, mask_at, watched, word_mask
from .common import (
    OPTIMIZERS,
    Frozen,
    descended,
    draw_latents,
    draw_prompts,
    erasing_prompts,
    latent_sources,
    prompt_conditions,
    stepped,
)


@dataclasses.dataclass(frozen=True)
class RecelerConfig(AdapterSettings):
    """All settings of a Receler run.

    It retains what its mask leaves out: words of the vocabulary fill `contexts`.

    Attributes:
      attack_words: soft words behind each prompt.
      attack_steps: steps of the attack in each cycle.
      attack_rate: its step size, relative to the root mean square of the text states' entries.
      mask_threshold: of the word's normalized map.
      mask_weight: of L_reg.
    """

    cycles: int = 200
    prompts: int = 4
    learning_rate: float = 5e-3
    trainable: tuple[str, ...] = ("*.attn2.to_out",)
    eta: float = 3.0
    latents: Literal["edited", "noise"] = "noise"
    rank: int = 16
    attack_words: int = 4
    attack_steps: int = 3
    attack_rate: float = 0.1
    mask_threshold: float = 0.1
    mask_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"attack_words": 1, "attack_steps": 0, "attack_rate": 0, "mask_weight": 0}
        check_settings(self, least=least | {"mask_threshold": 0})


def outside_loss(
    seen: dict[str, Seen],
    erasers: Adapters,
    mask: Float[Array, "B h w"],
    latent: tuple[int, int],
) -> Float[Array, ""]:
    """L_reg: what erasers put where the mask is 0, per cell and channel, as a mean over layers."""
    total = jnp.zeros(())
    for name, each in seen.items():
        eraser = erasers[f"{name}.to_out.0.kernel"]
        output = each.gathered.astype(jnp.float32) @ eraser["down"] @ eraser["up"]  # [B, L, C]
        outside = 1 - mask_at(mask, output.shape[1], latent)
        squares = (outside[..., None] * output) ** 2
        total += squares.mean(axis=-1).sum() / (outside.sum() + 1e-9)
    return total / len(seen)


def receler_step(
    static: AdapterStatic, state: TrainState, frozen: Frozen, batch: None, key: PRNGKeyArray
) -> tuple[TrainState, dict[str, Array]]:
    """One cycle: an attack, and an update of the erasers on what it found.

    Returns:
      the new state and metrics: loss, erase, outside, attack (its last loss).
    """
    del batch
    config, size = static.config, static.config.prompts
    concept_key, prompt_key, latent_key, attack_key = jax.random.split(key, 4)
    names = ("states", "anchor_states", "places", "free")
    _, (concept, anchor, places, free) = draw_prompts(
        static, frozen, names, concept_key, prompt_key
    )
    current = static.edited(jax.lax.stop_gradient(state.params), frozen)
    latents, times = constrain_batch(
        draw_latents(static, frozen, latent_key, size, model=current, condition=concept)
    )
    before = static.original(frozen)
    seen = watched(before)
    inputs = concatenated((latents, times, anchor), (latents, times, concept))
    without, wanted = jnp.split(before(*inputs), 2)
    target, grid = erase_target(without, wanted, config.eta), static.latent_shape[:2]
    under = {name: Seen(*(leaf[size:] for leaf in each)) for name, each in seen.items()}
    mask = word_mask(under, places, grid, config.mask_threshold)

    def attacked(words: Array) -> Any:
        return with_text_states(concept, jnp.where(free[..., None], words, text_states(concept)))

    def objective(words: Array, _: Array) -> Array:
        return prediction_loss(current(latents, times, attacked(words)), wanted)

    states = text_states(concept)
    unit = jnp.sqrt(jnp.mean(states**2))
    optimizer = OPTIMIZERS["adam"](config.attack_rate)
    words, last = descended(
        objective, states, jax.random.split(attack_key, config.attack_steps), optimizer, unit
    )
    context = attacked(jax.lax.stop_gradient(words))

    def loss_of(params: Any) -> tuple[Array, dict[str, Array]]:
        now = static.edited(params, frozen)
        looked = watched(now)
        erase = prediction_loss(now(latents, times, context), target)
        outside = outside_loss(looked, params, mask, grid)
        loss = erase + config.mask_weight * outside
        return loss, {"loss": loss, "erase": erase, "outside": outside, "attack": last}

    return stepped(static, state, loss_of)


def prepare(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: RecelerConfig,
    *,
    retain: Sequence[str] | Retained | None = None,
    seed: int = 0,
) -> tuple[AdapterStatic, TrainState, dict[str, Any]]:
    """Everything `receler_step` needs, computed once.

    Arguments and errors as of `esd.prepare`.
    """
    static, state, frozen = with_adapters(pipeline, config, seed)
    prompts, _ = erasing_prompts(pipeline, concepts, config, retain, seed)
    rows = prompts.tokens.reshape(-1, prompts.tokens.shape[-1])
    ends = np.asarray(pooling_positions(pipeline.prompt_encoder.config, jnp.asarray(rows)))
    behind = np.arange(rows.shape[1]) - ends.reshape(*prompts.tokens.shape[:2], 1)
    texts = {
        "states": prompt_conditions(pipeline, prompts.tokens),  # [C, T, L, D]
        "anchor_states": prompt_conditions(pipeline, prompts.without),
        "places": prompts.concept,  # [C, T, L]
        "free": (behind >= 0) & (behind < config.attack_words),
        **latent_sources(pipeline, config),
    }
    return static, state, frozen | jax.tree.map(jnp.asarray, texts)
