"""Text to image: a pipeline, of whatever family, sampled with guidance.

`generate` is a pure, jittable function (a `lax.scan` over the sampler's steps) of arrays and split
modules; `TextToImage` is the same for people: prompts in, uint8 images out. Images and latents are
`[B, H, W, C]`, token ids `[B, L]`.  What differs between families is the pipeline's to say
(`flax_models.pipelines`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Key, UInt8

from ...flax_models.layers.attention import Neighborhoods, with_attention
from ...flax_models.layers.joint_attention import JointTextCondition
from ...flax_models.pipelines.guidance import Predictor, classifier_free
from ...flax_models.pipelines.pipeline import Pipeline
from ...flax_models.streaming import is_streamed
from ...flax_models.unet_2d_condition import TextCondition
from ...kernels.gna.presets import Preset, attention_preset
from ..estimate import OnEstimate, compile_seconds, run_seconds, work
from ..memory import available_memory, denoiser_bytes, require_memory, vae_bytes
from ..sampling import (
    FlowMatchSchedule,
    NoiseSchedule,
    Sampler,
    empirical_mu,
    flow_euler_sampler,
    make_sampler,
    schedule_of,
)
from ..seeds import seed_key

Params = Mapping[str, Any]  # {"denoiser": …, "vae": …, "text_encoder": …}, each a plain dict pytree


# What a model is conditioned on: text states, a `TextCondition` of SDXL, a `JointTextCondition` of
# a transformer, or a DiT's class labels.
Condition = Float[Array, "... L D"] | Int[Array, "..."] | TextCondition | JointTextCondition


class PipelineStatic(NamedTuple):
    """The hashable half of a pipeline: its family, and one graph definition per module.

    `text_encoder` is the pipeline's `prompt_encoder`: of SDXL both of them. `downsampling` is in
    pixels per latent. `vae_tiling` decodes large images in tiles (`AutoencoderKL.decode`). `first`
    is for steps with another attention, as for `sample_latents`.
    """

    family: type[Pipeline]
    denoiser: Any
    vae: Any
    text_encoder: Any
    downsampling: int
    vae_tiling: bool = False
    first: tuple[Any, int] | None = None


def split_pipeline(pipeline: Pipeline) -> tuple[PipelineStatic, Params]:
    """Graph definitions and parameters of the three modules, as `generate` takes them."""
    for name in pipeline.MODELS:
        if getattr(pipeline, name) is None and name not in pipeline.OPTIONAL:
            raise ValueError(f"Sampling needs the pipeline's {name}, which was not loaded.")
    modules = {
        "denoiser": pipeline.denoiser,
        "vae": pipeline.vae,
        "text_encoder": pipeline.prompt_encoder,
    }
    graphdefs, params = {}, {}
    for name, module in modules.items():
        graphdefs[name], state = nnx.split(module)
        params[name] = nnx.to_pure_dict(state)
    downsampling = pipeline.vae.config.downsampling
    return PipelineStatic(type(pipeline), **graphdefs, downsampling=downsampling), params


# ---- pure functions ----


def sample_latents(
    denoiser: Any,
    params: Any,
    condition: Condition,
    negative: Condition | None,
    noise: Float[Array, "B *X C"],
    sampler: Sampler,
    guidance_scale: Float[Array, ""] | float = 1.0,
    *,
    keys: Key[Array, " B"] | None = None,
    predictor: Callable[..., Predictor] = classifier_free,
    first: tuple[Any, int] | None = None,
) -> Float[Array, "B *X C"]:
    """Runs the sampler from unit normal noise to latents, in float32.

    Args:
      denoiser, params: graph definition and parameters of a UNet, a video UNet or a transformer.
      condition: what it reads of the prompts; for a DiT, class labels.
      negative: that of the negative prompts, each [B, ...] or one [...] for all; for a DiT the null
        class. None samples without guidance.
      noise: unit normal [B, H, W, C], of videos [B, F, H, W, C]; the sampler scales it.
      sampler: tables of the run.
      guidance_scale: strength of the prompt.
      keys: one per image; the source of fresh noise, needed exactly when `sampler.stochastic`.
      predictor: the kind of guidance (`flax_models.pipelines.guidance`).
      first: another graph definition of the same parameters, and how many steps it takes before
        `denoiser` does: dense attention ahead of sparse (arXiv 2504.16922, section 4.3).

    Raises:
      ValueError: a stochastic sampler without keys.
    """
    if sampler.stochastic and keys is None:
        raise ValueError("This sampler adds noise at every step: pass `keys`, one per image.")

    def run(graphdef: Any, carry: tuple[Array, Any], steps: Array) -> tuple[Array, Any]:
        model = nnx.merge(graphdef, params)
        predict = predictor(model, condition, negative, guidance_scale)
        if is_streamed(model):
            for i in steps:
                carry, _ = step(predict, carry, i)
            return carry
        return jax.lax.scan(functools.partial(step, predict), carry, steps)[0]

    def step(predict: Predictor, carry: tuple[Array, Any], i: Array) -> Any:
        x, memory = carry
        output = predict(sampler.scale(x, i), jnp.asarray(sampler.timesteps)[i])
        fresh = None
        if keys is not None and sampler.stochastic:
            fresh = _noise(keys, i + 1, x.shape[1:])
        return sampler.advance(x, output, i, fresh, memory), None

    x = noise.astype(jnp.float32) * sampler.init_noise_sigma
    carry, steps = (x, sampler.memory(x)), jnp.arange(sampler.num_steps)
    if first is not None:
        before, count = first
        carry, steps = run(before, carry, steps[:count]), steps[count:]
    return run(denoiser, carry, steps)[0]


def generate(
    static: PipelineStatic,
    params: Params,
    token_ids: Any,
    negative_ids: Any,
    noise: Float[Array, "B *F h w C"],
    sampler: Sampler,
    guidance_scale: Float[Array, ""] | float = 7.5,
    *,
    keys: Key[Array, " B"] | None = None,
    sizes: Float[Array, " 6"] | None = None,
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
    """
    family = static.family
    encoder = nnx.merge(static.text_encoder, params["text_encoder"])
    condition = family.encode(encoder, token_ids)
    negative = None
    if negative_ids is not None and not jax.tree.leaves(negative_ids):
        negative = family.without_text(condition)
    elif negative_ids is not None:
        negative = family.encode(encoder, jax.tree.map(_batched, negative_ids, token_ids))
    height, width = (side * static.downsampling for side in noise.shape[-3:-1])
    condition = family.for_size(condition, height, width, sizes)
    if negative is not None:
        negative = family.for_size(negative, height, width, sizes)
    latents = sample_latents(
        static.denoiser,
        params["denoiser"],
        condition,
        negative,
        noise,
        sampler,
        guidance_scale,
        keys=keys,
        predictor=family.predictor,
        first=static.first,
    )
    return _decode(static, params["vae"], latents)


def _batched(one: Array, several: Array) -> Array:
    return one[None] if one.ndim < several.ndim else one


@functools.partial(jax.jit, static_argnums=0)  # also where the rest of `generate` is not
def _decode(
    static: PipelineStatic, params: Any, latents: Float[Array, "B *F h w C"]
) -> Float[Array, "B *F H W 3"]:
    return static.family.decode(nnx.merge(static.vae, params), latents, tiling=static.vae_tiling)


def image_keys(seed: int, indices: Int[Array, " B"] | Int[np.ndarray, " B"]) -> Key[Array, " B"]:
    """One key per image, a function of the seed and the image's own index alone."""
    return jax.vmap(jax.random.fold_in, (None, 0))(seed_key(seed), jnp.asarray(indices))


def initial_noise(keys: Key[Array, " B"], shape: tuple[int, ...]) -> Float[Array, " B *shape"]:
    """The unit normal noise each image starts from, float32 [B, *shape]."""
    return _noise(keys, 0, shape)


def _noise(keys: Key[Array, " B"], use: Array | int, shape: tuple[int, ...]) -> Array:
    """Unit normal noise of each image's key; `use` is 0 for the start, i + 1 for step i."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, use), shape))(keys)


jitted_generate = jax.jit(generate, static_argnums=0)  # equal architectures compile once


@functools.partial(jax.jit, static_argnums=(0, 1))
def generate_over(
    mesh: Mesh,
    static: PipelineStatic,
    params: Params,
    token_ids: Any,
    negative_ids: Any,
    noise: Array,
    sampler: Sampler,
    guidance_scale: Array | float,
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


# ---- for people ----


def to_uint8(images: Float[Array, "*B H W 3"] | np.ndarray) -> UInt8[np.ndarray, "*B H W 3"]:
    """Images in [-1, 1] as bytes, rounded as diffusers rounds them."""
    images = np.clip(np.asarray(images, np.float32) * 0.5 + 0.5, 0, 1)
    return np.round(images * 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class TextToImage:
    """A pipeline made ready to draw: `TextToImage.from_pipeline(pipeline)(["a three"], seed=0)`.

    Image n of a call depends on the prompt, the seed and the number `first_index + n`, not on the
    batch size or the devices (but for float rounding). The compiled program is shared by all
    pipelines of one architecture, so drawing with edited parameters (`dataclasses.replace(drawer,
    params=…)`) costs no compilation.
    """

    static: PipelineStatic
    params: Params
    pipeline: Pipeline  # read for its tokenizers and settings, not its weights
    schedule: NoiseSchedule | FlowMatchSchedule
    frames: int | None = None  # of a video; None draws images
    preset: Preset | None = None  # of neighborhood attention, if it was asked for by one

    @classmethod
    def from_pipeline(
        cls,
        pipeline: Pipeline,
        *,
        vae_tiling: bool = False,
        attention: Neighborhoods = None,
        dense_steps: int = 0,
    ) -> TextToImage:
        """Splits the modules; with `vae_tiling` large images are decoded in tiles.

        Args:
          pipeline: of any family.
          vae_tiling: decode in tiles the size of what the autoencoder was trained on.
          attention: of a transformer, `GNA` settings in place of dense self-attention, for all
            layers or one for each (`with_attention`); or a preset, or its name.
          dense_steps: how many steps are dense before.

        Raises:
          ValueError: a missing module, an unsupported scheduler, or a UNet that denoises
            something other than the autoencoder's latents (an inpainting model); attention of what
            has no choice of it.
        """
        if dense_steps < 0:
            raise ValueError(f"dense_steps must be at least 0, received {dense_steps}.")
        for name in (*pipeline.TOKENIZERS, "scheduler_config"):
            if not getattr(pipeline, name) and name not in pipeline.OPTIONAL:
                raise ValueError(f"Sampling needs the pipeline's {name}, which was not loaded.")
        static, params = split_pipeline(pipeline)
        denoised, coded = pipeline.latent_shape[-1], pipeline.vae.config.latent_channels
        if denoised != coded:
            raise ValueError(
                f"The {pipeline.DENOISER} denoises latents of {denoised} channels, and the "
                f"autoencoder's have latent_channels={coded}: they belong to different models."
            )
        if isinstance(attention, str):
            attention = attention_preset(attention)
        if attention is not None:
            sparse = nnx.split(with_attention(pipeline.denoiser, attention))[0]
            first = (static.denoiser, dense_steps) if dense_steps else None
            static = static._replace(denoiser=sparse, first=first)
        return cls(
            static=static._replace(vae_tiling=vae_tiling),
            params=params,
            pipeline=pipeline,
            schedule=schedule_of(pipeline.schedule_config),
            preset=attention if isinstance(attention, Preset) else None,
        )

    def __call__(
        self,
        prompts: str | Sequence[str] | Int[np.ndarray, "N L"],
        *,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        eta: float = 0.0,
        negative_prompt: str | None = None,
        batch_size: int = 8,
        mesh: Mesh | None = None,
        sizes: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: Float[Array, "N *F h w C"] | np.ndarray | None = None,
        first_index: int = 0,
        on_estimate: OnEstimate | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> UInt8[np.ndarray, "N *F H W 3"]:
        """One image per prompt, uint8 [N, H, W, 3], or one video, [N, F, H, W, 3].

        Args:
          prompts: one text or several; a prompt longer than the context is cut with a warning.
            Token ids, as `tokenize` gives them, are taken as they are.
          seed: of the noise; image n draws from (seed, first_index + n).
          num_inference_steps: steps per image, each with one evaluation of the model, to which PNDM
            adds one (`sampling.pndm.pndm_sampler`); by default the family's, 50 of Stable
            Diffusion.
          guidance_scale: strength of the prompt; by default the family's, of Stable Diffusion 7.5.
            No classifier-free guidance (half the time) at 1 or below.
          sampler: one of `sampling.SAMPLER_KINDS`; by default what the pipeline's scheduler asks
            for.
          eta: DDIM's fresh noise, 0 to 1.
          negative_prompt: what guidance steers away from; None is an empty text, or what a model
            of SDXL has in its place (`force_zeros_for_empty_prompt`).
          sizes: that an SDXL model draws for, in pixels: height and width of the original, top
            and left of the crop, height and width of the target; by default those of the image.
          batch_size: images at a time on each device; the last batch is padded, so one program
            serves all.
          mesh: devices, along its axis `data`, that draw a batch each.
          height, width: in pixels, multiples of the autoencoder's downsampling; by default the
            UNet's own.
          latents: unit normal noise, [N, h, w, C] or [N, F, h, w, C], in place of the seed's.
          first_index: number of the first image.
          on_estimate: called with about how long compiling and drawing will take, before either.
          on_progress: called with (images done, images in all) after each batch.

        Raises:
          ValueError: no prompt, token ids or sizes that do not fit, settings the sampler does
            not know.
          NotEnoughMemoryError: images too large, or too many, for the memory there is.
          FloatingPointError: the model produced NaN or infinity.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        if not len(prompts):
            raise ValueError("There is nothing to draw: pass at least one prompt.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        steps, guidance = self.pipeline.defaults
        steps = steps if num_inference_steps is None else num_inference_steps
        guidance_scale = guidance if guidance_scale is None else guidance_scale
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number; got {guidance_scale}.")
        frames = () if self.frames is None else (self.frames,)
        shape = (*frames, *self.pipeline.latent_shape_for(height, width))
        if self.preset is not None:
            self.preset.require_fit(self._token_layout(shape))
        if latents is not None and latents.shape != (len(prompts), *shape):
            raise ValueError(
                f"latents must be {(len(prompts), *shape)}, one per prompt at this size; "
                f"got {latents.shape}."
            )
        if sizes is not None and len(sizes) != (self.pipeline.SIZES or None):
            raise ValueError(f"sizes are six numbers of pixels, for SDXL; got {sizes}.")
        tables = self._sampler(sampler, steps, eta, shape)
        devices = 1 if mesh is None else mesh.shape["data"]
        total = len(prompts)
        each = min(batch_size, -(-total // devices))  # on a device
        batch_size = devices * each
        guided = self.pipeline.guides(guidance_scale)
        if negative_prompt is not None and not self.pipeline.guides(math.inf):
            raise ValueError(
                f"{type(self.pipeline).__name__} is not guided away from a negative_prompt here: "
                "this model learnt its guidance. Leave it out."
            )
        self._require_memory(shape, total, each, devices, guided)
        ids = self._token_ids(prompts)
        negative = None
        if guided:
            zeros = negative_prompt is None and self.pipeline.force_zeros_for_empty_prompt
            negative = () if zeros else self._token_ids([negative_prompt or ""])
            negative = jax.tree.map(jnp.asarray, negative)

        streamed = is_streamed(self.pipeline.denoiser) or is_streamed(self.pipeline.prompt_encoder)
        if streamed and mesh is not None:
            raise ValueError("streamed models draw on one device: leave out mesh.")
        whole = generate if streamed else jitted_generate
        program = whole if mesh is None else functools.partial(generate_over, mesh)
        draw = functools.partial(
            program, self.static, sizes=None if sizes is None else np.asarray(sizes, np.float32)
        )
        images = []
        for start in range(0, total, batch_size):
            rows = np.minimum(np.arange(start, start + batch_size), total - 1)
            keys = image_keys(seed, rows + first_index)
            noise = initial_noise(keys, shape) if latents is None else jnp.asarray(latents)[rows]
            own = jax.tree.map(lambda each: jnp.asarray(each[rows]), ids)  # noqa: B023, at once
            drawn = (self.params, own, negative, noise, tables, float(guidance_scale))
            fresh = keys if tables.stochastic else None
            if on_estimate is not None and not images and not streamed:
                found = work(draw, *drawn, keys=fresh)
                batches = -(-total // batch_size)
                on_estimate(compile_seconds(found.equations), run_seconds(found.flops) * batches)
            batch = np.asarray(draw(*drawn, keys=fresh))[: total - start]
            if not np.isfinite(batch).all():
                raise FloatingPointError(
                    f"The model produced NaN or infinite pixels in images {start} to "
                    f"{start + len(batch) - 1}: its weights are damaged, or its numbers exceed its "
                    "dtype; try float32."
                )
            images.append(to_uint8(batch))
            if on_progress is not None:
                on_progress(min(start + batch_size, total), total)
        return np.concatenate(images)

    def _token_layout(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens along each dimension of latents of that shape, frames first."""
        *frames, rows, columns, _ = shape
        return (*frames, rows // self.pipeline.PATCH, columns // self.pipeline.PATCH)

    def _sampler(self, kind: str | None, steps: int, eta: float, shape: tuple[int, ...]) -> Sampler:
        """The tables of a run for latents of that shape."""
        schedule, pipeline = self.schedule, self.pipeline
        if isinstance(schedule, NoiseSchedule):
            return make_sampler(schedule, kind, num_inference_steps=steps, eta=eta)
        if kind is not None or eta:
            raise ValueError(
                f"{type(pipeline).__name__} follows a flow, by Euler steps: leave out "
                f"{'sampler' if kind is not None else 'eta'}."
            )
        mu = None
        if schedule.use_dynamic_shifting:
            tokens = math.prod(self._token_layout(shape)[-2:])
            fitted = pipeline.SHIFT == "empirical"
            mu = empirical_mu(tokens, steps) if fitted else schedule.mu_of(tokens)
        return flow_euler_sampler(schedule, steps, sigmas=pipeline.flow_sigmas(steps), mu=mu)

    def _require_memory(
        self, shape: tuple[int, ...], total: int, batch: int, devices: int, guided: bool
    ) -> None:
        """Refuse what cannot fit, and say what might.

        Args:
          shape: of a latent, [h, w, C] or [F, h, w, C].
          total: images or videos in all, whose bytes the host keeps.
          batch: at a time on each device.
          devices: that draw at the same time.
          guided: whether the model sees each twice.
        """
        denoiser, vae = self.pipeline.denoiser, self.pipeline.vae
        *frames, h, w, _ = shape
        count, tiling, factor = (
            math.prod(frames),
            self.static.vae_tiling,
            vae.config.downsampling,
        )
        shared = devices if jax.default_backend() == "cpu" else 1  # all take of the host's
        video = self.frames is not None

        def needed(batch: int, tiling: bool, h: int, w: int) -> float:
            height, width = (
                min(side, vae.config.tile_size) if tiling else side
                for side in (h * factor, w * factor)
            )
            at_once = 1 if tiling else batch  # of videos frame by frame
            return shared * max(
                denoiser_bytes(denoiser, (1 + guided) * batch * count, h, w, self.pipeline.PATCH),
                vae_bytes(vae.config, at_once, height, width, vae.dtype)
                + 12.0 * batch * count * h * w * factor**2,
            )

        what = f"{'a video' if video else 'an image'} of {h * factor}x{w * factor} pixels"
        if video:
            what = f"{what} and {self.frames} frames"
        require_memory(
            3.0 * total * count * h * w * factor**2,
            f"keeping {total} times {what}",
            "draw fewer at a time, or smaller ones with height and width",
            host=True,
        )
        free, most = available_memory(), needed(batch, tiling, h, w)
        if free is None or most <= free:
            return
        if fewer := int(free / needed(1, tiling, h, w)):
            remedy = f"batch_size {fewer} may do"
        elif not tiling and not video and needed(1, True, h, w) <= free:
            remedy = "vae_tiling with batch_size 1 may do"
        else:
            side = factor * max(1, int(64 * math.sqrt(free / needed(1, tiling, 64, 64))))
            remedy = f"with batch_size 1, a height and width of up to {side} may do"
        require_memory(most, f"drawing {what}, {batch} at a time,", remedy)

    def _token_ids(self, prompts: Sequence[str] | np.ndarray) -> Any:
        if not isinstance(prompts, np.ndarray):
            return self.pipeline.tokenize(prompts)
        return self.pipeline.checked_token_ids(prompts)


def text_to_image(
    pipeline: Pipeline,
    prompts: str | Sequence[str] | Int[np.ndarray, "N L"],
    *,
    vae_tiling: bool = False,
    attention: Neighborhoods = None,
    dense_steps: int = 0,
    **options: Any,
) -> UInt8[np.ndarray, "N H W 3"]:
    """One uint8 image per prompt.

    `vae_tiling`, `attention` and `dense_steps` are those of `TextToImage.from_pipeline`, `options`
    those of calling it.
    """
    drawer = TextToImage.from_pipeline(
        pipeline, vae_tiling=vae_tiling, attention=attention, dense_steps=dense_steps
    )
    return drawer(prompts, **options)
