"""Relapse: fine-tune the edited model on a handful of images of the erased concept.

How soon does the concept come back?  The edited model is trained on by its own denoising loss (Ho
et al. 2020, arXiv 2006.11239, equation 14) on images with their prompts, and drawn with after some
steps of it.  A model that never knew the concept, trained on in the same way, says what a relapse
is and what is new learning: run the attack on it as the edited model.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from ..diffusion.objectives import prediction_loss
from ..settings import check_settings
from ..text.phrases import encode_phrases
from ..training import TrainState, apply_gradients, constant_adamw, init_state
from .common import (
    AttackSettings,
    AttackStatic,
    Attempt,
    Frozen,
    Target,
    assembled,
    draw_examples,
    snapshots,
)

_PARTS = {"unet": ("unet",), "text_encoder": ("text_encoder",), "both": ("text_encoder", "unet")}


@dataclasses.dataclass(frozen=True)
class RelapseConfig(AttackSettings):
    """All settings of a relapse, whose steps are updates of the model.

    Attributes:
      part: what is trained, "unet", "text_encoder" or "both".
      learning_rate: of AdamW.
      weight_decay: AdamW's decay.
    """

    snapshots: tuple[int, ...] = (0, 10, 25, 50)
    part: Literal["unet", "text_encoder", "both"] = "unet"
    learning_rate: float = 1e-4
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, least={"weight_decay": 0}, positive=("learning_rate",))


def relapse_step(
    static: AttackStatic, state: TrainState, frozen: Frozen, batch: None, key: PRNGKeyArray
) -> tuple[TrainState, dict[str, Array]]:
    """One update of the trained parts.

    The parameters are {part: its parameters}; the metrics are the loss.
    """
    del batch
    rows, (latents, times, target) = draw_examples(static, frozen, key)

    def loss_of(params: Any) -> Array:
        text_encoder, unet = (_part(static, params, frozen, name) for name in _PARTS["both"])
        states = text_encoder(frozen["prompts"][rows]).last_hidden_state
        return prediction_loss(unet(latents, times, states), target)

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    return apply_gradients(state, gradients, _optimizer(static.config)), {"loss": loss}


def _optimizer(config: RelapseConfig) -> optax.GradientTransformation:
    return constant_adamw(config.learning_rate, config.weight_decay, clip=False)


def _part(static: AttackStatic, params: Any, frozen: Frozen, name: str) -> Any:
    return nnx.merge(getattr(static, name), params.get(name, {}), frozen[name])


def prepare(
    target: Target, config: RelapseConfig
) -> tuple[AttackStatic, TrainState, dict[str, Any]]:
    """Everything `relapse_step` needs, computed once.

    Raises:
      ConceptError: a prompt is too long.
    """
    static, trained, frozen = assembled(target, config, _PARTS[config.part])
    tokenizer, length = target.edited.tokenizer, target.edited.max_length
    tokens = encode_phrases(tokenizer, target.prompts, length)
    frozen["prompts"] = target.of_images(tokens)  # [M, L]
    return static, init_state(trained, _optimizer(config)), jax.tree.map(jnp.asarray, frozen)


def run(
    target: Target, config: RelapseConfig, *, seed: int = 0, **options: Any
) -> Iterator[Attempt]:
    """Train the edited model on with images of the concept.

    The prompts are what it is trained on and asked for; to draw others, ask the attempts'
    pipelines for them.

    Yields:
      one attempt per snapshot, with a model of its own; its budget is "steps" and "images".

    Raises:
      ConceptError: a prompt is too long.
    """
    static, state, frozen = prepare(target, config)
    for steps, after in snapshots(relapse_step, static, state, frozen, seed=seed, **options):
        parts = {name: _part(static, after.params, frozen, name) for name in _PARTS[config.part]}
        model = dataclasses.replace(target.edited, **parts)
        budget = {"steps": float(steps), "images": float(len(target.images))}
        yield Attempt(model, tuple(target.prompts), budget, {"part": config.part})
