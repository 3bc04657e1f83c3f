"""Text to image: a Stable-Diffusion-style pipeline sampled with classifier-free guidance.

`generate` is a pure, jittable function (a `lax.scan` over the sampler's steps) of arrays and split
modules; `TextToImage` is the same for people: prompts in, uint8 images out. Images and latents are
`[B, H, W, C]`, token ids `[B, L]`. Guidance is Ho & Salimans' (arXiv 2207.12598) in the form
ε_uncond + g·(ε_cond − ε_uncond), so g = 1 is the plain conditional model.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key, UInt8

from ..flax_models.stable_diffusion import StableDiffusionPipeline
from .sampling import NoiseSchedule, Sampler, make_sampler

Params = Mapping[str, Any]  # {"unet": …, "vae": …, "text_encoder": …}, each a plain dict pytree


class PipelineStatic(NamedTuple):
    """The hashable half of a pipeline: one graph definition per module."""

    unet: Any
    vae: Any
    text_encoder: Any


def split_pipeline(pipeline: StableDiffusionPipeline) -> tuple[PipelineStatic, Params]:
    """Graph definitions and parameters of the three modules, as `generate` takes them."""
    graphdefs, params = {}, {}
    for name in PipelineStatic._fields:
        module = getattr(pipeline, name)
        if module is None:
            raise ValueError(f"Sampling needs the pipeline's {name}, which was not loaded.")
        graphdefs[name], state = nnx.split(module)
        params[name] = nnx.to_pure_dict(state)
    return PipelineStatic(**graphdefs), params


# ---- pure functions ----


def encode_tokens(
    text_encoder: Any, params: Any, token_ids: Int[Array, "*B L"]
) -> Float[Array, "*B L D"]:
    """What the UNet attends to: the text encoder's last hidden state. [L] or [B, L] token ids."""
    batch = token_ids if token_ids.ndim == 2 else token_ids[None]
    hidden = nnx.merge(text_encoder, params)(batch).last_hidden_state
    return hidden if token_ids.ndim == 2 else hidden[0]


def sample_latents(
    denoiser: Any,
    params: Any,
    condition: Float[Array, "B L D"] | Int[Array, " B"],
    negative: Float[Array, "... L D"] | Int[Array, "..."] | None,
    noise: Float[Array, "B *X C"],
    sampler: Sampler,
    guidance_scale: Float[Array, ""] | float = 1.0,
    *,
    keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B *X C"]:
    """Runs the sampler from unit normal noise to latents, in float32.

    Args:
        denoiser, params: graph definition and parameters of a UNet, a video UNet or a DiT. Output
            channels behind the noise, such as a DiT's variances, are not used.
        condition: hidden states of the prompts; for a DiT, class labels.
        negative: hidden states of the negative prompts, [B, L, D] or one [L, D] for all; for a DiT
            the null class. None samples without guidance, at half the cost, whatever
            `guidance_scale`.
        noise: unit normal [B, H, W, C], of videos [B, F, H, W, C]; the sampler scales it.
        sampler: tables of the run.
        guidance_scale: g in ε_uncond + g·(ε_cond − ε_uncond).
        keys: one per image; the source of fresh noise, needed exactly when `sampler.stochastic`.

    Raises:
        ValueError: a stochastic sampler without keys.
    """
    if sampler.stochastic and keys is None:
        raise ValueError("This sampler adds noise at every step: pass `keys`, one per image.")
    model = nnx.merge(denoiser, params)
    if negative is not None:
        # Unconditional half first, as in diffusers.
        condition = jnp.concatenate([jnp.broadcast_to(negative, condition.shape), condition])

    def body(carry: tuple[Array, Any], i: Array) -> tuple[tuple[Array, Any], None]:
        x, memory = carry
        inputs = sampler.scale(x, i)
        if negative is not None:
            inputs = jnp.concatenate([inputs, inputs])
        timestep = jnp.asarray(sampler.timesteps)[i]
        output = model(inputs, timestep, condition)[..., : x.shape[-1]].astype(jnp.float32)
        if negative is not None:
            without, with_prompt = jnp.split(output, 2)
            output = without + guidance_scale * (with_prompt - without)
        fresh = None
        if keys is not None and sampler.stochastic:
            fresh = _noise(keys, i + 1, x.shape[1:])
        return sampler.advance(x, output, i, fresh, memory), None

    x = noise.astype(jnp.float32) * sampler.init_noise_sigma
    return jax.lax.scan(body, (x, sampler.memory(x)), jnp.arange(sampler.num_steps))[0][0]


def decode_latents(
    vae: Any, params: Any, latents: Float[Array, "B *F h w C"]
) -> Float[Array, "B *F H W 3"]:
    """Images in [-1, 1], float32, of latents in the UNet's scale; of videos frame by frame."""
    model = nnx.merge(vae, params)

    def decode(latents: Array) -> Array:
        return jnp.clip(model.decode(model.unscale(latents)).astype(jnp.float32), -1, 1)

    if latents.ndim == 4:
        return decode(latents)
    return jax.lax.map(decode, latents.swapaxes(0, 1)).swapaxes(0, 1)


def generate(
    static: PipelineStatic,
    params: Params,
    token_ids: Int[Array, "B L"],
    negative_ids: Int[Array, "... L"] | None,
    noise: Float[Array, "B *F h w C"],
    sampler: Sampler,
    guidance_scale: Float[Array, ""] | float = 7.5,
    *,
    keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B *F H W 3"]:
    """Images in [-1, 1], float32, of tokenised prompts: encode, sample, decode.

    Pure; jit it with `static` as the only static argument. `negative_ids` is [B, L], [L] for all,
    or None for no guidance. `noise` and `keys` are those of `sample_latents`.
    """
    encoder = static.text_encoder, params["text_encoder"]
    condition = encode_tokens(*encoder, token_ids)
    negative = None if negative_ids is None else encode_tokens(*encoder, negative_ids)
    latents = sample_latents(
        static.unet, params["unet"], condition, negative, noise, sampler, guidance_scale, keys=keys
    )
    return decode_latents(static.vae, params["vae"], latents)


def image_keys(seed: int, indices: Int[Array, " B"] | Int[np.ndarray, " B"]) -> Key[Array, " B"]:
    """One key per image, a function of the seed and the image's own index alone."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(indices))


def initial_noise(keys: Key[Array, " B"], shape: tuple[int, ...]) -> Float[Array, " B *shape"]:
    """The unit normal noise each image starts from, float32 [B, *shape]."""
    return _noise(keys, 0, shape)


def _noise(keys: Key[Array, " B"], use: Array | int, shape: tuple[int, ...]) -> Array:
    """Unit normal noise of each image's key; `use` is 0 for the start, i + 1 for step i."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, use), shape))(keys)


jitted_generate = jax.jit(generate, static_argnums=0)  # equal architectures compile once


# ---- for people ----


def stable_diffusion_schedule(scheduler_config: Mapping[str, Any]) -> NoiseSchedule:
    """The schedule that diffusers' `StableDiffusionPipeline` samples with.

    That class corrects old configurations: whatever the file says, `steps_offset` becomes 1 and
    `clip_sample` false. Without the correction one folder would give other images here than there.
    """
    schedule = NoiseSchedule.from_config(scheduler_config)
    return dataclasses.replace(schedule, steps_offset=1, clip_sample=False)


def tokenize(
    tokenizer: Any, prompts: Sequence[str], *, max_length: int | None = None
) -> Int[np.ndarray, "B L"]:
    """Token ids int32 [B, L], padded to the context length as diffusers pads them.

    `max_length` bounds the tokenizer's own limit (which some folders do not state). A longer prompt
    is cut with a warning that names the part which is lost.
    """
    length = min(tokenizer.model_max_length, max_length or tokenizer.model_max_length)
    prompts = list(prompts)
    ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True).input_ids
    for prompt, full in zip(prompts, tokenizer(prompts, truncation=False).input_ids, strict=True):
        if len(full) > length:
            lost = tokenizer.decode(full[length - 1 : -1])
            warnings.warn(
                f"The prompt {prompt!r} is {len(full)} tokens long and the text encoder reads "
                f"{length}; ignored: {lost!r}.",
                stacklevel=2,
            )
    return np.asarray(ids, np.int32)


def to_uint8(images: Float[Array, "*B H W 3"] | np.ndarray) -> UInt8[np.ndarray, "*B H W 3"]:
    """Images in [-1, 1] as bytes, rounded as diffusers rounds them."""
    images = np.clip(np.asarray(images, np.float32) * 0.5 + 0.5, 0, 1)
    return np.round(images * 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class TextToImage:
    """A pipeline made ready to draw: `TextToImage.from_pipeline(pipeline)(["a three"], seed=0)`.

    Image n of a call depends on the prompt, the seed and the number `first_index + n`, not on the
    batch size (but for float rounding). The compiled program is shared by all pipelines of one
    architecture, so drawing with edited parameters (`dataclasses.replace(drawer, params=…)`) costs
    no compilation.
    """

    static: PipelineStatic
    params: Params
    tokenizer: Any
    schedule: NoiseSchedule
    latent_shape: tuple[int, int, int]  # default (h, w, channels)
    downsampling: int  # image pixels per latent pixel, along each side
    max_length: int  # tokens the text encoder reads
    frames: int | None = None  # of a video; None draws images

    @classmethod
    def from_pipeline(cls, pipeline: StableDiffusionPipeline) -> TextToImage:
        """Splits the modules.

        Raises:
            ValueError: a missing module, an unsupported scheduler, or a UNet that denoises
                something other than the autoencoder's latents (an inpainting model).
        """
        for name in ("tokenizer", "scheduler_config"):
            if not getattr(pipeline, name):
                raise ValueError(f"Sampling needs the pipeline's {name}, which was not loaded.")
        static, params = split_pipeline(pipeline)
        unet, vae = pipeline.unet.config, pipeline.vae.config
        if not unet.in_channels == unet.out_channels == vae.latent_channels:
            raise ValueError(
                f"A text-to-image UNet maps latents to latents: in_channels={unet.in_channels}, "
                f"out_channels={unet.out_channels} and the autoencoder's latent_channels="
                f"{vae.latent_channels} must be equal (inpainting models are not supported)."
            )
        size = unet.sample_size or 64
        return cls(
            static=static,
            params=params,
            tokenizer=pipeline.tokenizer,
            schedule=stable_diffusion_schedule(pipeline.scheduler_config),
            latent_shape=(size, size, unet.in_channels),
            downsampling=vae.downsampling,
            max_length=pipeline.text_encoder.config.max_position_embeddings,
        )

    def __call__(
        self,
        prompts: str | Sequence[str] | Int[np.ndarray, "N L"],
        *,
        seed: int = 0,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        sampler: str | None = None,
        eta: float = 0.0,
        negative_prompt: str = "",
        batch_size: int = 8,
        height: int | None = None,
        width: int | None = None,
        latents: Float[Array, "N *F h w C"] | np.ndarray | None = None,
        first_index: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> UInt8[np.ndarray, "N *F H W 3"]:
        """One image per prompt, uint8 [N, H, W, 3], or one video, [N, F, H, W, 3].

        Args:
            prompts: one text or several; a prompt longer than the context is cut with a warning.
                Token ids, as `tokenize` gives them, are taken as they are.
            seed: of the noise; image n draws from (seed, first_index + n).
            num_inference_steps: model evaluations per image.
            guidance_scale: strength of the prompt; no guidance (half the time) at 1 or below.
            sampler: one of `sampling.SAMPLER_KINDS`; by default what the pipeline's scheduler asks
                for (DDIM for a PNDM configuration, as SD 1.5 ships).
            eta: DDIM's fresh noise, 0 to 1.
            negative_prompt: what guidance steers away from.
            batch_size: images at a time; the last batch is padded, so one program serves all.
            height, width: in pixels, multiples of `downsampling`; by default the UNet's own.
            latents: unit normal noise, [N, h, w, C] or [N, F, h, w, C], in place of the seed's.
            first_index: number of the first image.
            on_progress: called with (images done, images in all) after each batch.

        Raises:
            ValueError: no prompt, token ids or sizes that do not fit, settings the sampler does
                not know.
            FloatingPointError: the model produced NaN or infinity.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        if not len(prompts):
            raise ValueError("There is nothing to draw: pass at least one prompt.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        shape = self._latent_shape(height, width)
        if latents is not None and latents.shape != (len(prompts), *shape):
            raise ValueError(
                f"latents must be {(len(prompts), *shape)}, one per prompt at this size; "
                f"got {latents.shape}."
            )
        tables = make_sampler(
            self.schedule, sampler, num_inference_steps=num_inference_steps, eta=eta
        )
        ids = self._token_ids(prompts)
        negative = self._token_ids([negative_prompt])[0] if guidance_scale > 1 else None

        total, batch_size = len(prompts), min(batch_size, len(prompts))
        images = []
        for start in range(0, total, batch_size):
            rows = np.minimum(np.arange(start, start + batch_size), total - 1)
            keys = image_keys(seed, rows + first_index)
            noise = initial_noise(keys, shape) if latents is None else jnp.asarray(latents)[rows]
            batch = jitted_generate(
                self.static, self.params, ids[rows], negative, noise, tables,
                float(guidance_scale), keys=keys if tables.stochastic else None,
            )  # fmt: skip
            batch = np.asarray(batch)[: total - start]
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

    def _token_ids(self, prompts: Sequence[str] | np.ndarray) -> Int[np.ndarray, "N L"]:
        if not isinstance(prompts, np.ndarray):
            return tokenize(self.tokenizer, prompts, max_length=self.max_length)
        length = min(self.tokenizer.model_max_length, self.max_length)
        table = self.params["text_encoder"]["embeddings"]["token_embedding"]["embedding"]
        if prompts.shape[1] != length or prompts.min() < 0 or prompts.max() >= len(table):
            raise ValueError(
                f"token ids must be [N, {length}], from 0 to {len(table) - 1}; got {prompts.shape} "
                f"from {prompts.min()} to {prompts.max()}."
            )
        return prompts.astype(np.int32)

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        default_height, default_width, channels = self.latent_shape
        sizes = []
        for name, size, default in (
            ("height", height, default_height),
            ("width", width, default_width),
        ):
            if size is not None and (size < 1 or size % self.downsampling):
                raise ValueError(
                    f"{name}={size} must be a positive multiple of {self.downsampling} pixels."
                )
            sizes.append(default if size is None else size // self.downsampling)
        return (*(() if self.frames is None else (self.frames,)), *sizes, channels)


def text_to_image(
    pipeline: StableDiffusionPipeline,
    prompts: str | Sequence[str] | Int[np.ndarray, "N L"],
    **options: Any,
) -> UInt8[np.ndarray, "N H W 3"]:
    """One uint8 image per prompt; `options` are those of calling a `TextToImage`."""
    return TextToImage.from_pipeline(pipeline)(prompts, **options)
