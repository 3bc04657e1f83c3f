"""What the attacks have in common: what they start from, their loss, their snapshots.

The loss is the one that the model was trained with, read the other way round: which text (or which
parameters) make the edited model denoise images of the concept best,

    E || target - e(z_t, t, T(text)) ||^2

with latents z of the images, times t and noise drawn afresh, and the target that the model's
schedule predicts (the noise, for most).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, UInt8

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..diffusion.objectives import prediction_loss
from ..sampling import NoiseSchedule, encode_images, noised_latents
from ..seeds import seed_key
from ..settings import check_min_timestep, check_settings
from ..text.phrases import ConceptError, phrase_ids
from ..training import Checkpoints, TrainState, constrain_batch, split_trainable, train

Frozen = Mapping[str, Any]  # the arrays that a step reads and never changes

_EXAMINED = 8  # batches over which final losses are averaged


@dataclasses.dataclass(frozen=True, eq=False)
class Attempt:
    """What an attacker has in hand after some effort.

    Attributes:
      pipeline: the model to draw with.
      prompts: what to ask it for: N texts, or token ids int32 [N, L].
      budget: what it cost, as numbers ("steps", "norm", ...).
      details: what else is known (losses, found words, ...).
    """

    pipeline: StableDiffusionPipeline
    prompts: tuple[str, ...] | Int[np.ndarray, "N L"]
    budget: Mapping[str, float]
    details: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """What is attacked and with what: the arguments of `red_team.attack`.

    Raises:
      ValueError: no images or no prompts.
    """

    original: StableDiffusionPipeline
    edited: StableDiffusionPipeline
    concept: str
    images: UInt8[np.ndarray, "M H W 3"]
    prompts: Sequence[str]

    def __post_init__(self) -> None:
        if not len(self.images) or not len(self.prompts):
            raise ValueError(
                "an attack needs images of the concept and prompts that ask for it; received "
                f"{len(self.images)} images and {len(self.prompts)} prompts."
            )

    def of_images(self, tokens: Int[np.ndarray, "N L"]) -> Int[np.ndarray, "M L"]:
        """Of the prompts' tokens, the rows that ask for each image."""
        return tokens[np.arange(len(self.images)) % len(tokens)]


@dataclasses.dataclass(frozen=True)
class AttackSettings:
    """The settings that all attacks have.

    Attributes:
      steps: of the attack.
      snapshots: steps at which an attempt is recorded, besides the last.
      batch_size: images that a step sees, of each restart.
      min_timestep: lowest time, as a fraction of the schedule.
      max_timestep: highest time, as a fraction of the schedule.
    """

    steps: int = 100
    snapshots: tuple[int, ...] = ()
    batch_size: int = 8
    min_timestep: float = 0.0
    max_timestep: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self, least={"steps": 1, "batch_size": 1})
        check_min_timestep(self.min_timestep)
        if not self.min_timestep < self.max_timestep <= 1:
            raise ValueError(
                f"max_timestep is a fraction above min_timestep={self.min_timestep} and at most 1, "
                f"received {self.max_timestep}."
            )
        if not all(0 <= each <= self.steps for each in self.snapshots):
            raise ValueError(
                f"snapshots are steps from 0 to steps={self.steps}, received {self.snapshots}."
            )


@dataclasses.dataclass(frozen=True)
class AttackStatic:
    """What a step needs and never changes: structures and settings.

    Attributes:
      text_encoder, unet: structures of the edited model's parts.
      config: the attack's settings.
      schedule: the model's noise schedule.
    """

    text_encoder: nnx.GraphDef[Any]
    unet: nnx.GraphDef[Any]
    config: Any
    schedule: NoiseSchedule


def assembled(
    target: Target, config: AttackSettings, trains: Sequence[str] = ()
) -> tuple[AttackStatic, dict[str, Any], dict[str, Any]]:
    """What every attack starts from.

    Args:
      target, config: of the attack.
      trains: the parts of the edited model, "text_encoder" and "unet", that the attack trains.

    Returns:
      static; {part: float32 parameters} of what trains; and frozen, the other parameters of either
      part and "latents" [M, h, w, Z]: the images as the original's UNet sees them, the mean of the
      autoencoder's posterior.
    """
    edited, vae = target.edited, target.original.vae
    mean, _ = encode_images(vae, target.images)
    structures, trained = {}, {}
    frozen: dict[str, Any] = {"latents": np.asarray(vae.scale(jnp.asarray(mean)))}
    for name in ("text_encoder", "unet"):
        structures[name], params = nnx.split(getattr(edited, name))
        frozen[name] = nnx.to_pure_dict(params)
        if name in trains:
            _, params, frozen[name] = split_trainable(getattr(edited, name))
            trained[name] = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    schedule = NoiseSchedule.from_config(edited.scheduler_config)
    return AttackStatic(**structures, config=config, schedule=schedule), trained, frozen


def ordinary_tokens(tokenizer: Any) -> Int[np.ndarray, " V"]:
    """Ids of the vocabulary without its special tokens, ascending."""
    return np.setdiff1d(list(tokenizer.get_vocab().values()), tokenizer.all_special_ids)


def word_tokens(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without start and end.

    Raises:
      ConceptError: it has none.
    """
    (ids,) = phrase_ids(tokenizer, [text], special=False)
    if not ids:
        raise ConceptError(f"the tokenizer knows no token of {text!r}.")
    return ids


def restart_keys(key: PRNGKeyArray, restarts: int) -> Key[Array, " R"]:
    """One key per restart, whatever their number: n restarts begin as any larger number does."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(restarts))


def draw_examples(
    static: AttackStatic, frozen: Frozen, key: PRNGKeyArray
) -> tuple[Int[Array, " B"], tuple[Array, Array, Array]]:
    """A batch to denoise: which images, and their noisy latents, times and targets."""
    config, count = static.config, static.schedule.num_train_timesteps
    row_key, noise_key = jax.random.split(key)
    rows = jax.random.randint(row_key, (config.batch_size,), 0, frozen["latents"].shape[0])
    bounds = int(config.min_timestep * count), int(config.max_timestep * count)
    noised = noised_latents(static.schedule, frozen["latents"][rows], noise_key, *bounds)
    return rows, constrain_batch(noised)


def embedding_loss(
    static: AttackStatic,
    frozen: Frozen,
    embeddings: Float[Array, "B L C"],
    noised: tuple[Array, Array, Array],
) -> Float[Array, ""]:
    """How well the edited model denoises under B prompts given as token embeddings.

    `noised` are latents, times and targets, as of `draw_examples`.
    """
    latents, times, target = noised
    text_encoder = nnx.merge(static.text_encoder, frozen["text_encoder"])
    unet = nnx.merge(static.unet, frozen["unet"])
    ends = jnp.zeros(embeddings.shape[0], jnp.int32)  # not read: the UNet attends to all states
    states = text_encoder(inputs_embeds=embeddings, eos_positions=ends).last_hidden_state
    return prediction_loss(unet(latents, times, states), target)


def mean_losses(loss: Any, candidates: Array, key: PRNGKeyArray) -> Float[Array, " R"]:
    """The loss of each candidate, `loss(candidate, key)`, over the same several batches for all."""
    keys = jax.random.split(key, _EXAMINED)
    return jax.lax.map(lambda each: jax.vmap(loss, (0, None))(candidates, each), keys).mean(axis=0)


def snapshots(
    step: Any,
    static: AttackStatic,
    state: TrainState,
    frozen: Frozen,
    *,
    seed: int,
    checkpoint_dir: str | Path | None = None,
    **options: Any,
) -> Iterator[tuple[int, TrainState]]:
    """Run the training loop and stop at each of the settings' snapshots, and at the last step.

    Each stretch has a checkpoint folder of its own, so that an interrupted run, called again,
    passes by the snapshots that it has and gives the same ones.

    Arguments and options are those of `conceptax.methods.training.train`.

    Yields:
      the number of steps and the state after them.
    """
    for until in sorted({*static.config.snapshots, static.config.steps}):
        folder = None if checkpoint_dir is None else Path(checkpoint_dir) / f"until_{until}"
        if until and folder is not None and folder.is_dir() and options.get("resume", True):
            with Checkpoints(folder) as kept:
                if kept.latest_step == until:
                    state = kept.restore(state)
        if until > int(state.step):
            run = {"key": seed_key(seed), "num_steps": until, "checkpoint_dir": folder}
            state = train(step, static, state, frozen, **run, **options)
        yield until, state
