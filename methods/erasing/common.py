"""What the erasers that train a network have in common: settings, latents, the run."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..memory import require_unet_memory
from ..sampling import (
    NoiseSchedule,
    denoise_until,
    make_sampler,
    noise_latents,
    noised_latents,
)
from ..seeds import seed_key
from ..settings import check_min_timestep, check_settings, fixed
from ..text.phrases import (
    Encoders,
    PhraseSettings,
    Retained,
    TemplatedConcepts,
    conditions,
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

# Told of a cycle: how many are done, what gives the pipeline of now, and the newest metrics.
OnCycle = Callable[[int, Callable[[], StableDiffusionPipeline], Mapping[str, float]], None]

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
class UnetSettings(TrainedSettings):
    """The settings of erasers that train the UNet.

    Attributes:
      untrained: patterns of parameters among the trainable ones that do not train.
      guidance: of the runs that draw "edited" latents, or images.
    """

    prompts: int = 8
    trainable: tuple[str, ...] = ("*.attn2",)
    untrained: tuple[str, ...] = ()
    guidance: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, least={"guidance": 0})


@dataclasses.dataclass(frozen=True)
class ImageSettings(UnetSettings):
    """The settings of erasers that train the UNet on noised images, which the original draws.

    There is one for each prompt, drawn in `ddim_steps`.
    """

    eta: float = fixed(0.0)
    latents: Literal["images"] = fixed("images")
    ddim_steps: int = 20
    min_timestep: float = fixed(0.0)


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
      schedule: of the noise.
      latent_shape: [h, w, c] of a latent.
    """

    unet: nnx.GraphDef[Any]
    optimizer: optax.GradientTransformation
    config: Any
    schedule: NoiseSchedule
    latent_shape: tuple[int, int, int]

    def edited(self, params: Any, frozen: Frozen) -> Any:
        """The UNet with the trained `params`."""
        return nnx.merge(self.unet, params, frozen["unet"])

    def original(self, frozen: Frozen) -> Any:
        """The UNet as it was."""
        return nnx.merge(self.unet, frozen["original"])

    def result(self, params: Any, frozen: Frozen) -> Any:
        """The UNet that a run ends with."""
        return self.edited(params, frozen)


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
    rows: int = 0,
    what: str = "",
) -> tuple[Any, TrainState, dict[str, Any]]:
    """Static, state and the models' frozen parameters of a run: "unet", "original" and "text".

    `EncoderSettings` train the text encoder and `UnetSettings` the UNet, a float32 copy of either.

    Args:
      pipeline, config: as of a method's `prepare`.
      rows: that the UNet predicts at a time, besides one for each prompt.
      what: takes them besides the prompts, in words.

    Raises:
      NotEnoughMemoryError: the UNet has no room for a cycle.
      ValueError: a pattern of parameters that matches nothing, or an encoder to edit that the model
        does not have.
    """
    model, trainable, updates = pipeline.unet, config.trainable, config.cycles
    untrained = config.untrained if isinstance(config, UnetSettings) else ()
    if isinstance(config, EncoderSettings):
        model, updates = pipeline.prompt_encoder, updates * config.erase_updates
        trainable = encoder_patterns(pipeline, trainable, config.edit)
    require_rows(pipeline, config, rows, what)
    structure, trained, rest = split_trainable(model, trainable, untrained)
    trained = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trained)
    optimizer = cosine_adamw(config.learning_rate, config.weight_decay, updates)
    settings = optimizer, config, *schedule_and_shape(pipeline)
    frozen = {"original": nnx.to_pure_dict(nnx.state(model))}
    if isinstance(config, EncoderSettings):
        unet, params = nnx.split(pipeline.unet)
        static = EncoderStatic(unet, *settings, structure)
        frozen |= {"text": rest, "unet": nnx.to_pure_dict(params)}
    else:
        static = ErasingStatic(structure, *settings)
        frozen |= {"unet": rest}
    return static, init_state(trained, optimizer), jax.tree.map(jnp.asarray, frozen)


def require_rows(
    pipeline: StableDiffusionPipeline, config: TrainedSettings, rows: int, what: str
) -> None:
    """Refuse a cycle that the UNet has no room for; arguments as of `assembled`."""
    cycle = f"a cycle of {config.prompts} prompts{what}"
    require_unet_memory(pipeline, config.prompts + rows, cycle, "take fewer")


def schedule_and_shape(pipeline: StableDiffusionPipeline) -> tuple[Any, tuple[int, int, int]]:
    """The noise schedule and the latents' shape [h, w, c]."""
    return NoiseSchedule.from_config(pipeline.scheduler_config), pipeline.latent_shape


def prompt_conditions(pipeline: StableDiffusionPipeline, rows: Int[np.ndarray, "*N L"]) -> Any:
    """All that the UNet reads of prompts, leaves [*N, ...]."""
    flat = conditions(pipeline.prompt_encoder, rows.reshape(-1, rows.shape[-1]))
    return jax.tree.map(lambda leaf: leaf.reshape(*rows.shape[:-1], *leaf.shape[1:]), flat)


def some_rows(
    rows: Int[np.ndarray, "N L"], count: int, seed: int, weights: np.ndarray | None = None
) -> Int[np.ndarray, "M L"]:
    """At most `count` different rows, drawn with probability in proportion to their weights."""
    chance = None if weights is None else weights / weights.sum()
    size = min(count, len(rows))
    return rows[np.random.default_rng(seed).choice(len(rows), size, replace=False, p=chance)]


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
        timesteps = static.schedule.num_train_timesteps
        return noise_latents(key, size, static.latent_shape, timesteps, config.min_timestep)
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


def drawn_images(
    pipeline: StableDiffusionPipeline,
    rows: Int[np.ndarray, "*N L"],
    config: UnetSettings,
    seed: int,
) -> Float[Array, "*N h w c"]:
    """Latents of images that the pipeline draws, one for each prompt, float32.

    Args:
      pipeline: the original.
      rows: token ids of the prompts.
      config: `prompts` are drawn at a time, in `ddim_steps`, with `guidance`.
      seed: of the noise.
    """
    schedule, shape = schedule_and_shape(pipeline)
    sampler = make_sampler(schedule, "ddim", num_inference_steps=config.ddim_steps)
    graphdef, state = nnx.split(pipeline.unet)
    flat = rows.reshape(-1, rows.shape[-1])
    every, size = conditions(pipeline.prompt_encoder, flat), config.prompts

    @jax.jit
    def draw(params: Any, key: PRNGKeyArray, some: Any, empty: Any) -> Array:
        noise, unet = jax.random.normal(key, (size, *shape)), nnx.merge(graphdef, params)
        steps = config.ddim_steps
        return denoise_until(unet, sampler, noise, steps, some, empty, config.guidance)

    params, empty = nnx.to_pure_dict(state), empty_condition(pipeline)
    images, key = [], seed_key(seed)
    for start in range(0, len(flat), size):
        places = np.minimum(np.arange(start, start + size), len(flat) - 1)  # the last is filled up
        some = jax.tree.map(lambda leaf, places=places: leaf[places], every)
        images.append(draw(params, jax.random.fold_in(key, start), some, empty))
    return jnp.concatenate(images)[: len(flat)].reshape(*rows.shape[:-1], *shape)


def noised(
    static: ErasingStatic, images: Float[Array, "B h w c"], key: PRNGKeyArray
) -> tuple[Array, Array, Array]:
    """Images at random times of the whole schedule, the times, and what a model should predict."""
    return noised_latents(static.schedule, images, key, 0, static.schedule.num_train_timesteps)


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


def descended(
    objective: Callable[[Array, Array], Array],
    start: Float[Array, "*S"],
    keys: Array,
    optimizer: optax.GradientTransformation,
    unit: Array | float,
) -> tuple[Float[Array, "*S"], Float[Array, ""]]:
    """Where an attack ends, and its last loss (0 without steps).

    Args:
      objective: what falls, of the attacked array and a step's key.
      start: the array.
      keys: one for each step.
      optimizer: whose updates are in `unit`.
      unit: of a step, a number or one for each entry of the last axis.
    """

    def advance(carry: tuple[Array, Any], key: Array) -> tuple[tuple[Array, Any], Array]:
        place, memory = carry
        loss, gradient = jax.value_and_grad(objective)(place, key)
        move: Any
        move, memory = optimizer.update(gradient, memory)
        return (place + unit * move, memory), loss

    (end, _), losses = jax.lax.scan(advance, (start, optimizer.init(start)), keys)
    return end, losses[-1].astype(jnp.float32) if len(keys) else jnp.zeros(())


def stepped(
    static: ErasingStatic,
    state: TrainState,
    loss_of: Callable[[Any], tuple[Array, dict[str, Array]]],
) -> tuple[TrainState, dict[str, Array]]:
    """The state after one update on a loss of the parameters, and its metrics."""
    (_, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return apply_gradients(state, gradients, static.optimizer), metrics


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
        return stepped(static, state, functools.partial(loss_of, key))

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
    on_step: OnCycle | None = None,
    **options: Any,
) -> StableDiffusionPipeline:
    """`prepare`, all of the `cycles`, and the pipeline with what was trained in its place.

    Args:
      step, prepare: of the method.
      pipeline, concepts, config, retain, seed, options: as for `erasing.erase`.
      on_step: called after each cycle with (cycles done, what gives the pipeline as it is now, the
        newest metrics); that pipeline is good until the call returns. What it raises ends the run.
    """
    static, state, frozen = prepare(pipeline, concepts, config, retain=retain, seed=seed)

    def with_trained(state: TrainState) -> StableDiffusionPipeline:
        if isinstance(static, EncoderStatic):
            encoder, _, _ = static.models(state.params, frozen)
            return pipeline.with_prompt_encoder(encoder)
        return dataclasses.replace(pipeline, unet=static.result(state.params, frozen))

    def tell(done: int, state: TrainState, metrics: Mapping[str, float]) -> None:
        assert on_step is not None
        on_step(done, functools.partial(with_trained, state), metrics)

    options |= {"key": seed_key(seed), "num_steps": config.cycles, "fixed_length": True}
    told = None if on_step is None else tell
    return with_trained(train(step, static, state, frozen, on_step=told, **options))
