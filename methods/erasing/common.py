"""What the erasers that train a network have in common: settings, latents, the run."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..sampling import NoiseSchedule, denoise_until, make_sampler, noise_latents
from ..seeds import seed_key
from ..settings import check_min_timestep, check_settings
from ..text.phrases import Encoders, PhraseSettings, Retained, empty_condition
from ..training import TrainState, train


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
    """The same where the text encoder trains.

    Attributes:
      text: structure of the text encoder.
    """

    text: nnx.GraphDef[Any]


# ---- latents ----


def latent_sources(
    pipeline: StableDiffusionPipeline,
    config: TrainedSettings,
    subjects: Sequence[Int[np.ndarray, "_ L"]] = (),
    *,
    samples: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """The frozen arrays that `draw_latents` reads.

    Args:
      pipeline: the model.
      config: settings; `latents` decides.
      subjects: token ids of prompts, each set with trajectories of its own.
      samples: number of a set's trajectories.
      seed: of the trajectories.
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
    # [subjects, steps, samples, h, w, c], and their times [steps]
    return {"latents": jnp.stack(runs), "latent_times": jnp.asarray(sampler.timesteps)}


def draw_latents(
    static: ErasingStatic,
    frozen: Mapping[str, Any],
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
      key: of all that is random.
      size: number of latents.
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
    latents = denoise_until(
        model,
        sampler,
        jax.random.normal(first, (size, *static.latent_shape)),
        count,
        condition,
        frozen["empty_states"],
        config.guidance,
    )
    times = jnp.full((size,), jnp.asarray(sampler.timesteps)[count])
    return jax.lax.stop_gradient(latents), times


# ---- the run ----


def trained(
    step: Callable[..., Any],
    prepare: Callable[..., Any],
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: TrainedSettings,
    *,
    retain: Sequence[str] | Retained | None,
    seed: int,
    **options: Any,
) -> tuple[Any, TrainState, Mapping[str, Any]]:
    """`prepare`, and all of the `cycles`: what the method's parts are put together from.

    Args:
      step, prepare: of the method.
      pipeline, concepts, config, retain, seed: as for `prepare`.
      options: passed to `conceptax.methods.training.train` (mesh, checkpoint_dir, progress, ...).
    """
    static, state, frozen = prepare(pipeline, concepts, config, retain=retain, seed=seed)
    state = train(
        step,
        static,
        state,
        frozen,
        key=seed_key(seed),
        num_steps=config.cycles,
        fixed_length=True,
        **options,
    )
    return static, state, frozen
