"""Relapse: fine-tune the edited model on a handful of images of the erased concept.

How soon does the concept come back?  The edited model is trained on by its own denoising loss (Ho
et al. 2020, arXiv 2006.11239, equation 14) on images with their prompts, and drawn with after some
steps of it.  A model that never knew the concept, trained on in the same way, says what a relapse
is and what is new learning: run the attack on it as the edited model.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, PRNGKeyArray, UInt8

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..diffusion.objectives import prediction_loss
from ..sampling import NoiseSchedule
from ..settings import check_settings
from ..text.phrases import encode_phrases, text_length
from ..training import (
    TrainState,
    apply_gradients,
    constant_adamw,
    init_state,
    split_trainable,
)
from .common import (
    AttackSettings,
    AttackStatic,
    Attempt,
    draw_examples,
    image_latents,
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
    static: AttackStatic,
    state: TrainState,
    frozen: Mapping[str, Any],
    batch: None,
    key: PRNGKeyArray,
) -> tuple[TrainState, dict[str, Array]]:
    """One update of the trained parts.

    Args:
      static, state, frozen: from `prepare`; the parameters are {part: its parameters}.
      batch: None; the images are among `frozen`.
      key: this update's key.

    Returns:
      the new state and metrics: loss.
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


def _part(static: AttackStatic, params: Any, frozen: Mapping[str, Any], name: str) -> Any:
    return nnx.merge(getattr(static, name), params.get(name, {}), frozen[name])


def prepare(
    original: StableDiffusionPipeline,
    edited: StableDiffusionPipeline,
    config: RelapseConfig,
    *,
    images: UInt8[np.ndarray, "M H W 3"],
    prompts: Sequence[str],
) -> tuple[AttackStatic, TrainState, dict[str, Any]]:
    """Everything `relapse_step` needs, computed once; arguments as for `run`.

    Raises:
      ConceptError: a prompt is too long.
      ValueError: no images, or no prompts.
    """
    latents = image_latents(original, images, prompts)
    tokens = encode_phrases(edited.tokenizer, prompts, text_length(edited))
    structures, trained = {}, {}
    frozen: dict[str, Any] = {
        "latents": latents,  # [M, h, w, c]
        "prompts": tokens[np.arange(len(latents)) % len(tokens)],  # [M, L], that of each image
    }
    for name in _PARTS["both"]:
        structures[name], params, rest = split_trainable(getattr(edited, name))
        if name in _PARTS[config.part]:
            trained[name] = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
            frozen[name] = rest
        else:
            frozen[name] = nnx.to_pure_dict(nnx.state(getattr(edited, name)))
    schedule = NoiseSchedule.from_config(edited.scheduler_config)
    static = AttackStatic(**structures, config=config, schedule=schedule)
    return static, init_state(trained, _optimizer(config)), jax.tree.map(jnp.asarray, frozen)


def run(
    original: StableDiffusionPipeline,
    edited: StableDiffusionPipeline,
    concept: str,
    config: RelapseConfig | None = None,
    *,
    images: UInt8[np.ndarray, "M H W 3"],
    prompts: Sequence[str],
    seed: int = 0,
    **options: Any,
) -> list[Attempt]:
    """Train the edited model on with images of the concept.

    Args:
      original: the model before erasing; its autoencoder encodes the images.
      edited: the model to attack; it stays as it is.
      concept: what was erased; the images and prompts say it.
      config: settings.
      images: of the concept; image m shows what prompt m, counted round, asks for.
      prompts: what to train on and ask for. To draw others, ask the attempts' pipelines for them.
      seed: of everything random in the run.
      options: passed to `conceptax.methods.training.train` (checkpoint_dir, progress, ...).

    Returns:
      one attempt per snapshot, with a model of its own; its budget is "steps" and "images".

    Raises:
      ConceptError: a prompt is too long.
      ValueError: no images, or no prompts.
    """
    del concept
    config = config or RelapseConfig()
    static, state, frozen = prepare(original, edited, config, images=images, prompts=prompts)
    attempts = []
    for steps, after in snapshots(relapse_step, static, state, frozen, seed=seed, **options):
        parts = {name: _part(static, after.params, frozen, name) for name in _PARTS[config.part]}
        attempts.append(
            Attempt(
                dataclasses.replace(edited, **parts),
                tuple(prompts),
                {"steps": float(steps), "images": float(len(images))},
                {"part": config.part},
            )
        )
    return attempts
