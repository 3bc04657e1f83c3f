"""What the erasers that train a network have in common: settings, latents, the run."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..memory import require_unet_memory
from ..sampling import NoiseSchedule, denoise_until, make_sampler, noise_latents
from ..seeds import seed_key
from ..settings import check_min_timestep, check_settings
from ..text.phrases import (
    Encoders,
    PhraseSettings,
    Retained,
    TemplatedConcepts,
    empty_condition,
    encode_phrases,
    encoder_patterns,
    retained_phrases,
    stacked_prompts,
)
from ..training import (
    TrainState,
    apply_gradients,
    constrain_batch,
    cosine_adamw,
    init_state,
    split_trainable,
    train,
)

Frozen = Mapping[str, Any]  # the arrays that a step reads and never changes

# How an attack descends: the step size is relative to the token embeddings' root mean square.
OPTIMIZERS: Mapping[str, Callable[[float], optax.GradientTransformation]] = {
    "adam": optax.adam,
    "sign": optax.sign_sgd,
}


@dataclasses.dataclass(frozen=True)
class TrainedSettings(PhraseSettings):
    """The settings of erasers that train a network.

    Attributes:
      cycles: steps of the training loop.
      prompts: prompts per cycle (P).
      learning_rate: of AdamW, falling to 0 along a cosine.
      weight_decay: AdamW's decay.
      trainable: patterns of the parameters that train.
      eta: strength of the negative guidance in the target; 0 maps the concept onto the anchor.
      latents: where predictions are compared: at "noise" (z ~ N(0, I), upper timesteps, at no
        cost), at latents that the model being "edited" draws, as in ESD's paper, or at points of
        the original model's own "ddim" trajectories under the concept, computed once.
      ddim_steps: length of the runs that draw latents.
      min_timestep: lowest timestep of "noise" latents, as a fraction of the schedule.
    """

    cycles: int = 250
    prompts: int = 4
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    trainable: tuple[str, ...] = ("*",)
    eta: float = 3.0
    latents: str = "noise"
    ddim_steps: int = 10
    min_timestep: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"cycles": 1, "prompts": 1, "weight_decay": 0, "eta": 0, "ddim_steps": 1}
        check_settings(self, least=least, positive=("learning_rate",))
        check_min_timestep(self.min_timestep)


@dataclasses.dataclass(frozen=True)
class EncoderSettings(TrainedSettings):
    """The settings of erasers that train the text encoder.

    Attributes:
      erase_updates: updates of the text encoder per cycle (M).
      edit: which of SDXL's text encoders train; other models have one.
      frames: in how many templates each retained phrase is put, besides being retained bare.
    """

    trainable: tuple[str, ...] = ("encoder", "final_layer_norm")
    erase_updates: int = 1
    edit: Encoders = "both"
    frames: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, least={"erase_updates": 1, "frames": 0})


@dataclasses.dataclass(frozen=True)
class ErasingStatic:
    """What a step needs and never changes: structures, optimizer, settings.

    Attributes:
      unet: structure of the UNet.
      optimizer: of the trained parameters.
      config: the method's settings.
      timesteps: number of training timesteps of the schedule.
      latent_shape: [h, w, c] of a latent.
    """

    unet: nnx.GraphDef[Any]
    optimizer: optax.GradientTransformation
    config: Any
    timesteps: int
    latent_shape: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class EncoderStatic(ErasingStatic):
    """The same where the text encoder trains, whose structure is `text`."""

    text: nnx.GraphDef[Any]

    def models(self, params: Any, frozen: Frozen) -> tuple[Any, Any, Any]:
        """The text encoder T with the trained `params`, the original one T0, and the UNet."""
        return (
            nnx.merge(self.text, params, frozen["text"]),
            nnx.merge(self.text, frozen["original"]),
            nnx.merge(self.unet, frozen["unet"]),
        )


# ---- what a run starts from ----


def erasing_prompts(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: PhraseSettings,
    retain: Sequence[str] | Retained | None,
    seed: int,
    *,
    frames: int = 0,
    length: int | None = None,
) -> tuple[TemplatedConcepts, Int[np.ndarray, "N L"]]:
    """The concepts' prompts, and what is retained: each phrase bare and in `frames` templates.

    Args:
      pipeline, concepts, config, retain, seed: as of a method's `prepare`.
      frames: templates of a retained phrase.
      length: tokens in the concepts' prompts; None is what the text encoder reads.
    """
    tokenizer, whole = pipeline.tokenizer, pipeline.max_length
    words = retained_phrases(pipeline, concepts, config, retain).kept
    prompts = stacked_prompts(tokenizer, concepts, words, config, length=length or whole, seed=seed)
    rng, templates = np.random.default_rng(seed), prompts.templates
    framed = [templates[int(rng.integers(len(templates)))].format(w) for w in [*words] * frames]
    return prompts, encode_phrases(tokenizer, [*words, *framed], whole)


def assembled(
    pipeline: StableDiffusionPipeline,
    config: TrainedSettings,
    *,
    untrained: Sequence[str] = (),
    rows: int = 0,
    what: str = "",
) -> tuple[Any, TrainState, dict[str, Any]]:
    """Static, state and the models' frozen parameters of a run: "unet", "original" and "text".

    `EncoderSettings` train the text encoder and other settings the UNet, a float32 copy of either.

    Args:
      pipeline, config: as of a method's `prepare`.
      untrained: patterns of parameters among the trainable ones that do not train.
      rows: that the UNet predicts at a time, besides one for each prompt.
      what: takes them besides the prompts, in words.

    Raises:
      NotEnoughMemoryError: the UNet has no room for a cycle.
      ValueError: a pattern of parameters that matches nothing, or an encoder to edit that the model
        does not have.
    """
    model, trainable, updates = pipeline.unet, config.trainable, config.cycles
    if isinstance(config, EncoderSettings):
        model, updates = pipeline.prompt_encoder, updates * config.erase_updates
        trainable = encoder_patterns(pipeline, trainable, config.edit)
    cycle = f"a cycle of {config.prompts} prompts{what}"
    require_unet_memory(pipeline, config.prompts + rows, cycle, "take fewer")
    structure, trained, rest = split_trainable(model, trainable, tuple(untrained))
    trained = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trained)
    optimizer = cosine_adamw(config.learning_rate, config.weight_decay, updates)
    schedule = NoiseSchedule.from_config(pipeline.scheduler_config)
    settings = optimizer, config, schedule.num_train_timesteps, pipeline.latent_shape
    frozen = {"original": nnx.to_pure_dict(nnx.state(model))}
    if isinstance(config, EncoderSettings):
        unet, params = nnx.split(pipeline.unet)
        static = EncoderStatic(unet, *settings, structure)
        frozen |= {"text": rest, "unet": nnx.to_pure_dict(params)}
    else:
        static = ErasingStatic(structure, *settings)
        frozen |= {"unet": rest}
    return static, init_state(trained, optimizer), jax.tree.map(jnp.asarray, frozen)


# ---- latents ----


def latent_sources(
    pipeline: StableDiffusionPipeline,
    config: TrainedSettings,
    subjects: Sequence[Int[np.ndarray, "_ L"]] = (),
    *,
    samples: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """The frozen arrays that `draw_latents` reads; the settings' `latents` says which.

    Of "ddim" latents each of `subjects`, token ids of prompts, has `samples` trajectories of its
    own: "latents" float32 [subjects, steps, samples, h, w, c], and their times int32 [steps].
    """
    if config.latents == "noise":
        return {}
    schedule = NoiseSchedule.from_config(pipeline.scheduler_config)
    sampler = make_sampler(schedule, "ddim", num_inference_steps=config.ddim_steps)
    if config.latents == "edited":
        return {"sampler": sampler, "empty_states": empty_condition(pipeline)}  # [L, D]
    text, text_params = nnx.split(pipeline.prompt_encoder)
    unet, unet_params = nnx.split(pipeline.unet)

    @jax.jit
    def run(sampler: Any, params: Any, tokens: Array, key: PRNGKeyArray) -> Array:
        original = nnx.merge(text, params[0])
        denoiser = nnx.merge(unet, params[1])
        pick_key, noise_key = jax.random.split(key)
        rows = jax.random.choice(pick_key, tokens.shape[0], (samples,))
        context = original(tokens[rows]).condition

        def step(carry: tuple[Array, Any], i: Array) -> tuple[tuple[Array, Any], Array]:
            x, memory = carry
            output = denoiser(x, sampler.timesteps[i], context)
            return sampler.advance(x, output, i, None, memory), x

        start = jax.random.normal(noise_key, (samples, *pipeline.latent_shape))
        return jax.lax.scan(step, (start, sampler.memory(start)), jnp.arange(config.ddim_steps))[1]

    params = nnx.to_pure_dict(text_params), nnx.to_pure_dict(unet_params)
    keys = jax.random.split(seed_key(seed), len(subjects))
    runs = [run(sampler, params, *each) for each in zip(subjects, keys, strict=True)]
    return {"latents": jnp.stack(runs), "latent_times": jnp.asarray(sampler.timesteps)}


def draw_latents(
    static: ErasingStatic,
    frozen: Frozen,
    key: PRNGKeyArray,
    size: int,
    *,
    model: Any = None,
    condition: Any = None,
    subjects: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B h w C"], Int[Array, " B"]]:
    """Latents and times to compare predictions at, without gradient.

    `latents="noise"`: pure noise at high timesteps, at no cost.
    `latents="edited"`: images that the model being edited draws under `condition`, with guidance,
    stopped at one random point of a DDIM run (Gandikota et al. 2023, section 4).
    `latents="ddim"`: random points of the trajectories of `latent_sources`.

    Args:
      static, frozen: as `prepare` makes them.
      key, size: of all that is random, and the number of latents.
      model: the UNet being edited, or read through an edited text encoder.
      condition: what the UNet reads of the prompts.
      subjects: whose trajectories, one number for each latent.
    """
    config = static.config
    if config.latents == "noise":
        return noise_latents(key, size, static.latent_shape, static.timesteps, config.min_timestep)
    first, second = jax.random.split(key)
    if config.latents == "ddim":
        cached, times = frozen["latents"], frozen["latent_times"]
        point = jax.random.randint(first, (size,), 0, cached.shape[1])
        sample = jax.random.randint(second, (size,), 0, cached.shape[2])
        return cached[subjects, point, sample], times[point]
    sampler = frozen["sampler"]
    count = jax.random.randint(second, (), 0, config.ddim_steps)
    noise, empty = jax.random.normal(first, (size, *static.latent_shape)), frozen["empty_states"]
    latents = denoise_until(model, sampler, noise, count, condition, empty, config.guidance)
    times = jnp.full((size,), jnp.asarray(sampler.timesteps)[count])
    return jax.lax.stop_gradient(latents), times


# ---- the run ----


def draw_prompts(
    static: ErasingStatic,
    frozen: Frozen,
    names: Sequence[str],
    concept_key: PRNGKeyArray,
    prompt_key: PRNGKeyArray,
) -> tuple[Int[Array, ""], tuple[Any, ...]]:
    """One concept's number, and `prompts` rows of its own in the frozen [C, T, ...] of `names`."""
    every = tuple(frozen[name] for name in names)
    concepts, prompts = jax.tree.leaves(every)[0].shape[:2]
    which = jax.random.randint(concept_key, (), 0, concepts)
    rows = jax.random.choice(prompt_key, prompts, (static.config.prompts,))
    return which, constrain_batch(jax.tree.map(lambda leaf: leaf[which, rows], every))


def updated(
    static: EncoderStatic,
    state: TrainState,
    loss_of: Callable[[PRNGKeyArray, Any], tuple[Array, dict[str, Array]]],
    key: PRNGKeyArray,
) -> tuple[TrainState, dict[str, Array]]:
    """The state one cycle on, after `erase_updates` updates, and the last one's metrics.

    `loss_of` makes the loss and metrics from an update's key and the parameters.
    """

    def update(state: TrainState, key: PRNGKeyArray) -> tuple[TrainState, dict[str, Array]]:
        loss = functools.partial(loss_of, key)
        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        return apply_gradients(state, gradients, static.optimizer), metrics

    keys = jax.random.split(key, static.config.erase_updates)
    after, metrics = jax.lax.scan(update, state, keys)
    last = jax.tree.map(lambda series: series[-1], metrics)
    return dataclasses.replace(after, step=state.step + 1), last


def trained(
    step: Callable[..., Any],
    prepare: Callable[..., Any],
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: TrainedSettings,
    *,
    retain: Sequence[str] | Retained | None = None,
    seed: int = 0,
    **options: Any,
) -> StableDiffusionPipeline:
    """`prepare`, all of the `cycles`, and the pipeline with what was trained in its place.

    Args:
      step, prepare: of the method.
      pipeline, concepts, config, retain, seed, options: as for `erasing.erase`.
    """
    static, state, frozen = prepare(pipeline, concepts, config, retain=retain, seed=seed)
    key, cycles = seed_key(seed), config.cycles
    state = train(
        step, static, state, frozen, key=key, num_steps=cycles, fixed_length=True, **options
    )
    if isinstance(static, EncoderStatic):
        encoder, _, _ = static.models(state.params, frozen)
        return pipeline.with_prompt_encoder(encoder)
    return dataclasses.replace(pipeline, unet=nnx.merge(static.unet, state.params, frozen["unet"]))
