"""Images and videos from token ids: encode, sample, decode, as pure functions of arrays and split
modules.

`generate` is one jittable program (a `lax.scan` over the sampler's steps); `generate_by_steps` is
the same as a loop in Python over one compiled step, which can tell how far it is, and go on after
it was stopped.  Images and latents are `[B, H, W, C]`, videos and theirs `[B, F, H, W, C]`, token
ids `[B, L]`.  What differs between families is the pipeline's to say (`flax_models.pipelines`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from ...flax_models.context_parallel import ContextParallel
from ...flax_models.layers.joint_attention import JointTextCondition
from ...flax_models.pipelines.guidance import Guidance, Predictor, classifier_free
from ...flax_models.pipelines.pipeline import Pipeline
from ...flax_models.streaming import is_streamed
from ...flax_models.unet_2d_condition import TextCondition
from ..estimate import OnEstimate, compile_seconds, run_seconds, work
from ..sampling import Sampler
from ..seeds import seed_key
from .kept_samples import Kept

Params = Mapping[str, Any]  # {"denoiser": …, "vae": …, "text_encoder": …}, each a plain dict pytree

# What a model is conditioned on: text states, a `TextCondition` of SDXL, a `JointTextCondition` of
# a transformer, what else a family's transformer takes, or a DiT's class labels.
Condition = Float[Array, "... L D"] | Int[Array, "..."] | TextCondition | JointTextCondition | Any

# Told of a sample that is drawn step by step: "sampling" or "decoding", units done, units in all.
OnStep = Callable[[str, int, int], None]


class Phase(NamedTuple):
    """Steps of a run, one after the other, that one model takes.

    Several models may take turns: dense attention ahead of sparse (arXiv 2504.16922, section 4.3),
    which have the same parameters, or one model for high noise and one for low.

    Attributes:
      denoiser: its graph definition.
      steps: how many it takes; None for all that are left.
      part: whose parameters they are, a key of `Params`.
    """

    denoiser: Any
    steps: int | None = None
    part: str = "denoiser"


class PipelineStatic(NamedTuple):
    """The hashable half of a pipeline: its family, and one graph definition per module.

    `phases` are of its denoisers, in the order in which they run. `text_encoder` is the pipeline's
    `prompt_encoder`: of SDXL both of them. `downsampling` is in pixels per latent. `vae_tiling`
    decodes large images in tiles (`AutoencoderKL.decode`). `data_scale` is the pipeline's. `mesh`
    is of devices over which the denoiser's tokens are spread (`ContextParallel`), if they are.
    """

    family: type[Pipeline]
    phases: tuple[Phase, ...]
    vae: Any
    text_encoder: Any
    downsampling: int
    vae_tiling: bool = False
    data_scale: float = 1.0
    mesh: Mesh | None = None

    @property
    def predictor(self) -> Callable[..., Predictor]:
        """The family's, of its denoiser or of what spreads that over devices."""
        own = self.family.predictor
        return own if self.mesh is None else _Spread(own, self.mesh)


@dataclasses.dataclass(frozen=True)
class _Spread:
    """A predictor whose model runs on several devices at once."""

    predictor: Callable[..., Predictor]
    mesh: Mesh

    def __call__(self, model: Any, *given: Any) -> Predictor:
        return self.predictor(ContextParallel(model, self.mesh), *given)


def split_pipeline(pipeline: Pipeline) -> tuple[PipelineStatic, Params]:
    """Graph definitions and parameters of a pipeline's modules, as `generate` takes them."""
    for name in pipeline.MODELS:
        if getattr(pipeline, name) is None and name not in pipeline.OPTIONAL:
            raise ValueError(f"Sampling needs the pipeline's {name}, which was not loaded.")
    graphdefs, params = {}, {}
    denoisers = dict(zip(("denoiser", "denoiser_2"), pipeline.denoisers, strict=False))
    others = {"vae": pipeline.vae, "text_encoder": pipeline.prompt_encoder}
    for name, module in (denoisers | others).items():
        graphdefs[name], state = nnx.split(module)
        params[name] = nnx.to_pure_dict(state)
    static = PipelineStatic(
        type(pipeline),
        tuple(Phase(graphdefs[name], part=name) for name in denoisers),
        graphdefs["vae"],
        graphdefs["text_encoder"],
        pipeline.vae.config.downsampling,
        data_scale=pipeline.data_scale,
    )
    return static, params


# ---- sampling ----


def sample_latents(
    denoiser: Any,
    params: Any,
    condition: Condition,
    negative: Condition | None,
    noise: Float[Array, "B *X C"],
    sampler: Sampler,
    guidance_scale: Guidance = 1.0,
    *,
    keys: Key[Array, " B"] | None = None,
    predictor: Callable[..., Predictor] = classifier_free,
) -> Float[Array, "B *X C"]:
    """Runs the sampler from unit normal noise to latents, in float32.

    Args:
      denoiser: graph definition of a UNet, a video UNet or a transformer; or `Phase`s.
      params: its parameters; of phases, those of each `part`.
      condition: what it reads of the prompts; for a DiT, class labels.
      negative: that of the negative prompts, each [B, ...] or one [...] for all; for a DiT the null
        class. None samples without guidance.
      noise: unit normal [B, H, W, C], of videos [B, F, H, W, C]; the sampler scales it.
      sampler: tables of the run.
      guidance_scale: strength of the prompt, or one for each step; or a pair of such (`Guidance`).
      keys: one per image; the source of fresh noise, needed exactly when `sampler.stochastic`.
      predictor: the kind of guidance (`flax_models.pipelines.guidance`).

    Raises:
      ValueError: a stochastic sampler without keys.
    """
    phases = denoiser if isinstance(denoiser, tuple) else (Phase(denoiser),)
    params = params if isinstance(denoiser, tuple) else {"denoiser": params}
    carry = _start(noise, sampler, keys)
    for phase, steps in _spans(phases, sampler.num_steps):
        model = nnx.merge(phase.denoiser, params[phase.part])
        given = (predictor, model, condition, negative, sampler, guidance_scale, keys)
        one = functools.partial(_step, *given)
        if is_streamed(model):
            for i in map(int, steps):
                carry = one(carry, i)
            continue

        def step(carry: Any, i: Array, one: Any = one) -> tuple[Any, None]:
            return one(carry, i), None

        carry = jax.lax.scan(step, carry, jnp.asarray(steps))[0]
    return carry[0]


def _spans(phases: tuple[Phase, ...], num_steps: int) -> Iterator[tuple[Phase, np.ndarray]]:
    """Each phase, and the numbers of its steps."""
    steps = np.arange(num_steps)
    for phase in phases:
        yield phase, steps[: phase.steps]
        steps = steps[len(steps[: phase.steps]) :]


def _start(
    noise: Float[Array, "B *X C"], sampler: Sampler, keys: Key[Array, " B"] | None
) -> tuple[Array, Any]:
    """The latents and the sampler's memory before the first step."""
    if sampler.stochastic and keys is None:
        raise ValueError("This sampler adds noise at every step: pass `keys`, one per image.")
    x = noise.astype(jnp.float32) * sampler.init_noise_sigma
    return x, sampler.memory(x)


def _step(
    predictor: Callable[..., Predictor],
    model: Any,
    condition: Condition,
    negative: Condition | None,
    sampler: Sampler,
    guidance_scale: Any,
    keys: Key[Array, " B"] | None,
    carry: tuple[Array, Any],
    i: Array | int,
) -> tuple[Array, Any]:
    """The next latents and memory."""
    x, memory = carry
    strength = jax.tree.map(lambda g: jnp.asarray(g)[i] if jnp.ndim(g) else g, guidance_scale)
    predict = predictor(model, condition, negative, strength)
    output = predict(sampler.scale(x, i), jnp.asarray(sampler.timesteps)[i])
    fresh = None
    if keys is not None and sampler.stochastic:
        fresh = _noise(keys, i + 1, x.shape[1:])
    return sampler.advance(x, output, i, fresh, memory)


def image_keys(seed: int, indices: Int[Array, " B"] | Int[np.ndarray, " B"]) -> Key[Array, " B"]:
    """One key per image, a function of the seed and the image's own index alone."""
    return jax.vmap(jax.random.fold_in, (None, 0))(seed_key(seed), jnp.asarray(indices))


def initial_noise(keys: Key[Array, " B"], shape: tuple[int, ...]) -> Float[Array, " B *shape"]:
    """The unit normal noise each image starts from, float32 [B, *shape]."""
    return _noise(keys, 0, shape)


def _noise(keys: Key[Array, " B"], use: Array | int, shape: tuple[int, ...]) -> Array:
    """Unit normal noise of each image's key; `use` is 0 for the start, i + 1 for step i."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, use), shape))(keys)


# ---- the whole ----


def generate(
    static: PipelineStatic,
    params: Params,
    token_ids: Any,
    negative_ids: Any,
    noise: Float[Array, "B *T h w C"],
    sampler: Sampler,
    guidance_scale: Guidance = 7.5,
    *,
    keys: Key[Array, " B"] | None = None,
    sizes: Float[Array, " 6"] | None = None,
    given: Any = None,
) -> Float[Array, "B *F H W 3"]:
    """Images in [-1, 1], float32, of tokenized prompts: encode, sample, decode.

    Pure; jit it with `static` as the only static argument, unless models of it are streamed
    (`flax_models.streaming`), whose blocks compile one by one.

    Args:
      static, params: from `split_pipeline`.
      token_ids: of the prompts, as the family's `tokenize` gives them: [B, L]; for SDXL also
        [B, 2, L], those of both tokenizers.
      negative_ids: of the negative prompts, or without the first dimension of one for all; of no
        text at all, (), which is zeros in place of states; None for no guidance.
      noise, sampler, guidance_scale, keys: as for `sample_latents`.
      sizes: SDXL's `TextCondition.time_ids`; by default an uncropped image of the drawn size.
      given: what else the family's models are told, as its `given` makes it.
    """
    height, width = (side * static.downsampling for side in noise.shape[-3:-1])
    condition, negative = conditions(
        static, height, width, params["text_encoder"], token_ids, negative_ids, sizes, given
    )
    latents = sample_latents(
        static.phases,
        params,
        condition,
        negative,
        noise,
        sampler,
        guidance_scale,
        keys=keys,
        predictor=static.predictor,
    )
    return _decode(static, params["vae"], latents)


def conditions(
    static: PipelineStatic,
    height: int,
    width: int,
    params: Any,
    token_ids: Any,
    negative_ids: Any,
    sizes: Float[Array, " 6"] | None = None,
    given: Any = None,
) -> tuple[Condition, Condition | None]:
    """What the denoiser is told of the prompts, and of the negative ones; as for `generate`.

    `params` are those of the text encoders, the height and width in pixels.
    """
    family, encoder = static.family, nnx.merge(static.text_encoder, params)
    condition = family.encode(encoder, token_ids)
    negative = None
    if negative_ids is not None and not jax.tree.leaves(negative_ids):
        negative = family.without_text(condition)
    elif negative_ids is not None:
        negative = family.encode(encoder, jax.tree.map(_batched, negative_ids, token_ids))
    condition = family.for_size(condition, height, width, sizes)
    condition = family.with_given(condition, given)
    if negative is not None:
        negative = family.for_size(negative, height, width, sizes)
        negative = family.with_given(negative, given)
    return condition, negative


def _batched(one: Array, several: Array) -> Array:
    return one[None] if one.ndim < several.ndim else one


@functools.partial(jax.jit, static_argnums=0)  # also where the rest of `generate` is not
def _decode(
    static: PipelineStatic, params: Any, latents: Float[Array, "B *T h w C"]
) -> Float[Array, "B *F H W 3"]:
    latents = latents if static.data_scale == 1 else latents / static.data_scale
    return static.family.decode(nnx.merge(static.vae, params), latents, tiling=static.vae_tiling)


jitted_generate = jax.jit(generate, static_argnums=0)  # equal architectures compile once
_jitted_conditions = jax.jit(conditions, static_argnums=(0, 1, 2))


def _split_step(predictor: Any, graphdef: Any, params: Any, *given: Any) -> tuple[Array, Any]:
    """One step of a model that is split."""
    return _step(predictor, nnx.merge(graphdef, params), *given)


jitted_step = jax.jit(_split_step, static_argnums=(0, 1))  # equal architectures compile once


def generate_by_steps(
    static: PipelineStatic,
    params: Params,
    token_ids: Any,
    negative_ids: Any,
    noise: Float[Array, "B *T h w C"],
    sampler: Sampler,
    guidance_scale: Guidance = 7.5,
    *,
    keys: Key[Array, " B"] | None = None,
    sizes: Float[Array, " 6"] | None = None,
    given: Any = None,
    on_step: OnStep | None = None,
    on_estimate: OnEstimate | None = None,
    kept: Kept | None = None,
) -> Float[Array, "B *F H W 3"]:
    """What `generate` gives, by a loop in Python; streamed models too.

    Args:
      static, params, token_ids, negative_ids, noise, sampler, guidance_scale, keys, sizes, given:
        as for `generate`.
      on_step: told of each step, and of the decoding, before and after.
      on_estimate: told about how long compiling and running will take, unless models are streamed.
      kept: where latents are kept between steps; the run goes on from what is there.

    Raises:
      SamplingInterrupted: a signal came, and what is kept lets the same call go on.
    """
    told = on_step or (lambda *_: None)
    total = sampler.num_steps
    carry = _start(noise, sampler, keys)
    done = 0
    if kept is not None:
        carry, done = kept.restore(carry)
    condition: Any = None
    negative: Any = None
    if done < total:
        text_encoder = nnx.merge(static.text_encoder, params["text_encoder"])
        height, width = (side * static.downsampling for side in noise.shape[-3:-1])
        encode = conditions if is_streamed(text_encoder) else _jitted_conditions
        told_of = (params["text_encoder"], token_ids, negative_ids, sizes, given)
        condition, negative = encode(static, height, width, *told_of)
    spans = [(phase, steps[steps >= done]) for phase, steps in _spans(static.phases, total)]
    spans = [(phase, steps) for phase, steps in spans if len(steps)]
    streamed = {
        phase.part: is_streamed(nnx.merge(phase.denoiser, params[phase.part])) for phase, _ in spans
    }

    def of_step(phase: Phase, carry: Any, i: Any) -> tuple[Any, ...]:
        own = (static.predictor, phase.denoiser, params[phase.part])
        return (*own, condition, negative, sampler, guidance_scale, keys, carry, i)

    if on_estimate is not None and not any(streamed.values()):
        found = [(work(jitted_step, *of_step(p, carry, int(s[0]))), len(s)) for p, s in spans]
        found += [(work(_decode, static, params["vae"], carry[0]), 1)]
        on_estimate(
            compile_seconds(sum(each.equations for each, _ in found)),
            run_seconds(sum(each.flops * times for each, times in found)),
        )
    told("sampling", done, total)
    with contextlib.ExitStack() as stack:
        for phase, steps in spans:
            step = _split_step if streamed[phase.part] else jitted_step
            for i in map(int, steps):
                carry = jax.block_until_ready(step(*of_step(phase, carry, i)))
                if kept is not None:
                    if i == done:  # until here a signal stops at once: nothing is lost
                        stack.enter_context(kept.stoppable(total))
                    kept.save(carry, i + 1, total)
                told("sampling", i + 1, total)
    told("decoding", 0, 1)
    images = jax.block_until_ready(_decode(static, params["vae"], carry[0]))
    told("decoding", 1, 1)
    return images


@functools.partial(jax.jit, static_argnums=(0, 1))
def generate_over(
    mesh: Mesh,
    static: PipelineStatic,
    params: Params,
    token_ids: Any,
    negative_ids: Any,
    noise: Array,
    sampler: Sampler,
    guidance_scale: Guidance,
    *,
    keys: Array | None = None,
    sizes: Array | None = None,
) -> Float[Array, "B *F H W 3"]:
    """`generate` with the images split over a mesh's axis `data`.

    Each device runs the program of its share alone, so an image does not depend on how many devices
    there are. `negative_ids` are those of one prompt for all.
    """
    one, each = PartitionSpec(), PartitionSpec("data")

    def share(params, token_ids, negative_ids, noise, sampler, guidance_scale, keys, sizes):
        return generate(
            static,
            params,
            token_ids,
            negative_ids,
            noise,
            sampler,
            guidance_scale,
            keys=keys,
            sizes=sizes,
        )

    run = jax.shard_map(
        share,
        mesh=mesh,
        in_specs=(one, each, one, each, one, one, each, one),
        out_specs=each,
        check_vma=False,
    )
    return run(params, token_ids, negative_ids, noise, sampler, guidance_scale, keys, sizes)
