"""Text to image: a pipeline of Stable Diffusion 1, 2 or XL, sampled with classifier-free guidance.

`generate` is a pure, jittable function (a `lax.scan` over the sampler's steps) of arrays and split
modules; `TextToImage` is the same for people: prompts in, uint8 images out. Images and latents are
`[B, H, W, C]`, token ids `[B, L]`. Guidance is Ho & Salimans' (arXiv 2207.12598) in the form
ε_uncond + g·(ε_cond − ε_uncond), so g = 1 is the plain conditional model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Key, UInt8

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline, expanded
from ...flax_models.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline
from ...flax_models.unet_2d_condition import TextCondition
from ..memory import available_memory, require_memory, unet_bytes, vae_bytes
from ..sampling import NoiseSchedule, Sampler, make_sampler
from ..seeds import seed_key

_LONGEST = 1 << 16  # pixels along a side; attention over more would take days

Params = Mapping[str, Any]  # {"unet": …, "vae": …, "text_encoder": …}, each a plain dict pytree


# What a model is conditioned on: text states, a `TextCondition` of SDXL, or a DiT's class labels.
Condition = Float[Array, "... L D"] | Int[Array, "..."] | TextCondition


class PipelineStatic(NamedTuple):
    """The hashable half of a pipeline: one graph definition per module.

    `text_encoder` is the pipeline's `prompt_encoder`: of SDXL both of them. `vae_tiling` decodes
    large images in tiles (`AutoencoderKL.decode`).
    """

    unet: Any
    vae: Any
    text_encoder: Any
    vae_tiling: bool = False


def split_pipeline(pipeline: StableDiffusionPipeline) -> tuple[PipelineStatic, Params]:
    """Graph definitions and parameters of the three modules, as `generate` takes them."""
    for name in pipeline.MODELS:
        if getattr(pipeline, name) is None:
            raise ValueError(f"Sampling needs the pipeline's {name}, which was not loaded.")
    modules = {
        "unet": pipeline.unet,
        "vae": pipeline.vae,
        "text_encoder": pipeline.prompt_encoder,
    }
    graphdefs, params = {}, {}
    for name, module in modules.items():
        graphdefs[name], state = nnx.split(module)
        params[name] = nnx.to_pure_dict(state)
    return PipelineStatic(**graphdefs), params


# ---- pure functions ----


def encode_tokens(text_encoder: Any, params: Any, token_ids: Int[Array, "B *two L"]) -> Condition:
    """What the UNet reads of texts: the last hidden state [B, L, D], or SDXL's `TextCondition`."""
    return nnx.merge(text_encoder, params)(token_ids).condition


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
) -> Float[Array, "B *X C"]:
    """Runs the sampler from unit normal noise to latents, in float32.

    Args:
        denoiser, params: graph definition and parameters of a UNet, a video UNet or a DiT. Output
            channels behind the noise, such as a DiT's variances, are not used.
        condition: hidden states of the prompts, [B, L, D], or a `TextCondition`; for a DiT, class
            labels.
        negative: those of the negative prompts, each [B, ...] or one [...] for all; for a DiT the
            null class. None samples without guidance, at half the cost, whatever
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
        condition = jax.tree.map(
            lambda without, text: jnp.concatenate([jnp.broadcast_to(without, text.shape), text]),
            negative,
            condition,
        )

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
    vae: Any, params: Any, latents: Float[Array, "B *F h w C"], *, tiling: bool = False
) -> Float[Array, "B *F H W 3"]:
    """Images in [-1, 1], float32, of latents in the UNet's scale; of videos frame by frame.

    `tiling` is that of `AutoencoderKL.decode`.
    """
    model = nnx.merge(vae, params)

    def decode(latents: Array) -> Array:
        images = model.decode(model.unscale(latents), tiling=tiling)
        return jnp.clip(images.astype(jnp.float32), -1, 1)

    if latents.ndim == 4:
        return decode(latents)
    return jax.lax.map(decode, latents.swapaxes(0, 1)).swapaxes(0, 1)


def generate(
    static: PipelineStatic,
    params: Params,
    token_ids: Int[Array, "B *two L"],
    negative_ids: Int[Array, "..."] | None,
    noise: Float[Array, "B *F h w C"],
    sampler: Sampler,
    guidance_scale: Float[Array, ""] | float = 7.5,
    *,
    keys: Key[Array, " B"] | None = None,
    sizes: Float[Array, " 6"] | None = None,
) -> Float[Array, "B *F H W 3"]:
    """Images in [-1, 1], float32, of tokenized prompts: encode, sample, decode.

    Pure; jit it with `static` as the only static argument.

    Args:
        static, params: from `split_pipeline`.
        token_ids: of the prompts, [B, L]; for SDXL also [B, 2, L], those of both tokenizers.
        negative_ids: of the negative prompts, or without the first dimension of one for all; of no
            text at all, [0], which is zeros in place of states; None for no guidance.
        noise, sampler, guidance_scale, keys: as for `sample_latents`.
        sizes: SDXL's `TextCondition.time_ids`; by default an uncropped image of the drawn size.
    """
    encoder = static.text_encoder, params["text_encoder"]
    condition = encode_tokens(*encoder, token_ids)
    negative = None
    if negative_ids is not None and negative_ids.size == 0:
        negative = jax.tree.map(jnp.zeros_like, condition)
    elif negative_ids is not None:
        one = negative_ids.ndim < token_ids.ndim
        negative = encode_tokens(*encoder, negative_ids[None] if one else negative_ids)
    if isinstance(condition, TextCondition):
        if sizes is None:
            factor = nnx.merge(static.vae, params["vae"]).config.downsampling
            height, width = (side * factor for side in noise.shape[-3:-1])
            sizes = jnp.asarray([height, width, 0, 0, height, width], jnp.float32)
        time_ids = jnp.broadcast_to(sizes, condition.time_ids.shape)
        condition = condition._replace(time_ids=time_ids)
        if isinstance(negative, TextCondition):
            negative = negative._replace(time_ids=sizes)
    latents = sample_latents(
        static.unet, params["unet"], condition, negative, noise, sampler, guidance_scale, keys=keys
    )
    return decode_latents(static.vae, params["vae"], latents, tiling=static.vae_tiling)


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
    token_ids: Array,
    negative_ids: Array | None,
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

    A word of several vectors stands for all of them (`expanded`).
    `max_length` bounds the tokenizer's own limit (which some folders do not state). A longer prompt
    is cut with a warning that names the part which is lost.
    """
    length = min(tokenizer.model_max_length, max_length or tokenizer.model_max_length)
    prompts = expanded(tokenizer, prompts)
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
    batch size or the devices (but for float rounding). The compiled program is shared by all
    pipelines of one architecture, so drawing with edited parameters (`dataclasses.replace(drawer,
    params=…)`) costs no compilation.
    """

    static: PipelineStatic
    params: Params
    tokenizer: Any
    schedule: NoiseSchedule
    latent_shape: tuple[int, int, int]  # default (h, w, channels)
    downsampling: int  # image pixels per latent pixel, along each side
    max_length: int  # tokens the text encoder reads
    vocabulary: int  # tokens it knows
    frames: int | None = None  # of a video; None draws images
    tokenizer_2: Any = None  # of SDXL
    force_zeros: bool = False  # no negative prompt is zeros in place of an empty text's states

    @classmethod
    def from_pipeline(
        cls, pipeline: StableDiffusionPipeline, *, vae_tiling: bool = False
    ) -> TextToImage:
        """Splits the modules; with `vae_tiling` large images are decoded in tiles.

        Raises:
            ValueError: a missing module, an unsupported scheduler, or a UNet that denoises
                something other than the autoencoder's latents (an inpainting model).
        """
        for name in (*pipeline.TOKENIZERS, "scheduler_config"):
            if not getattr(pipeline, name):
                raise ValueError(f"Sampling needs the pipeline's {name}, which was not loaded.")
        static, params = split_pipeline(pipeline)
        vae, shape = pipeline.vae.config, pipeline.latent_shape
        if shape[-1] != vae.latent_channels:
            raise ValueError(
                f"The UNet denoises latents of {shape[-1]} channels, and the autoencoder's have "
                f"latent_channels={vae.latent_channels}: they belong to different models."
            )
        xl = isinstance(pipeline, StableDiffusionXLPipeline)
        schedule = NoiseSchedule.from_config if xl else stable_diffusion_schedule
        return cls(
            static=static._replace(vae_tiling=vae_tiling),
            params=params,
            tokenizer=pipeline.tokenizer,
            schedule=schedule(pipeline.scheduler_config),
            latent_shape=shape,
            downsampling=vae.downsampling,
            max_length=pipeline.text_encoder.config.max_position_embeddings,
            vocabulary=pipeline.text_encoder.config.vocab_size,
            tokenizer_2=pipeline.tokenizer_2 if xl else None,
            force_zeros=pipeline.force_zeros_for_empty_prompt,
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
        negative_prompt: str | None = None,
        batch_size: int = 8,
        mesh: Mesh | None = None,
        sizes: Sequence[int] | None = None,
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
            negative_prompt: what guidance steers away from; None is an empty text, or what a model
                of SDXL has in its place (`force_zeros_for_empty_prompt`).
            sizes: that an SDXL model draws for, in pixels: height and width of the original, top
                and left of the crop, height and width of the target; by default those of the image.
            batch_size: images at a time on each device; the last batch is padded, so one program
                serves all.
            mesh: devices, along its axis `data`, that draw a batch each.
            height, width: in pixels, multiples of `downsampling`; by default the UNet's own.
            latents: unit normal noise, [N, h, w, C] or [N, F, h, w, C], in place of the seed's.
            first_index: number of the first image.
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
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number; got {guidance_scale}.")
        shape = self._latent_shape(height, width)
        if latents is not None and latents.shape != (len(prompts), *shape):
            raise ValueError(
                f"latents must be {(len(prompts), *shape)}, one per prompt at this size; "
                f"got {latents.shape}."
            )
        if sizes is not None and (self.tokenizer_2 is None or len(sizes) != 6):
            raise ValueError(f"sizes are six numbers of pixels, for SDXL; got {sizes}.")
        tables = make_sampler(
            self.schedule, sampler, num_inference_steps=num_inference_steps, eta=eta
        )
        devices = 1 if mesh is None else mesh.shape["data"]
        total = len(prompts)
        each = min(batch_size, -(-total // devices))  # on a device
        batch_size = devices * each
        guided = guidance_scale > 1
        self._require_memory(shape, total, each, devices, guided)
        ids = self._token_ids(prompts)
        negative = None
        if guided:
            zeros = negative_prompt is None and self.force_zeros
            negative = np.zeros(0, np.int32) if zeros else self._token_ids([negative_prompt or ""])

        draw = jitted_generate if mesh is None else functools.partial(generate_over, mesh)
        images = []
        for start in range(0, total, batch_size):
            rows = np.minimum(np.arange(start, start + batch_size), total - 1)
            keys = image_keys(seed, rows + first_index)
            noise = initial_noise(keys, shape) if latents is None else jnp.asarray(latents)[rows]
            batch = draw(
                self.static,
                self.params,
                ids[rows],
                negative,
                noise,
                tables,
                float(guidance_scale),
                keys=keys if tables.stochastic else None,
                sizes=None if sizes is None else np.asarray(sizes, np.float32),
            )
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
        unet, vae = (
            nnx.merge(getattr(self.static, name), self.params[name]) for name in ("unet", "vae")
        )
        *frames, h, w, _ = shape
        count, tiling, factor = math.prod(frames), self.static.vae_tiling, self.downsampling
        shared = devices if jax.default_backend() == "cpu" else 1  # all take of the host's
        video = self.frames is not None

        def needed(batch: int, tiling: bool, h: int, w: int) -> float:
            height, width = (
                min(side, vae.config.tile_size) if tiling else side
                for side in (h * factor, w * factor)
            )
            at_once = 1 if tiling else batch  # of videos frame by frame
            return shared * max(
                unet_bytes(unet.config, (1 + guided) * batch * count, h, w, unet.dtype),
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

    def _token_ids(self, prompts: Sequence[str] | np.ndarray) -> Int[np.ndarray, "N *two L"]:
        if not isinstance(prompts, np.ndarray):
            ids = tokenize(self.tokenizer, prompts, max_length=self.max_length)
            if self.tokenizer_2 is None:
                return ids
            with warnings.catch_warnings():  # of a long prompt, told by the first
                warnings.simplefilter("ignore", UserWarning)
                second = tokenize(self.tokenizer_2, prompts, max_length=self.max_length)
            return np.stack([ids, second], axis=1)
        length = min(self.tokenizer.model_max_length, self.max_length)
        if prompts.shape[1] != length or prompts.min() < 0 or prompts.max() >= self.vocabulary:
            raise ValueError(
                f"token ids must be [N, {length}], from 0 to {self.vocabulary - 1}; got "
                f"{prompts.shape} from {prompts.min()} to {prompts.max()}."
            )
        return prompts.astype(np.int32)

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        default_height, default_width, channels = self.latent_shape
        sizes = []
        for name, size, default in (
            ("height", height, default_height),
            ("width", width, default_width),
        ):
            if size is not None and (not 1 <= size <= _LONGEST or size % self.downsampling):
                raise ValueError(
                    f"{name}={size} must be a positive multiple of {self.downsampling} pixels, at "
                    f"most {_LONGEST}."
                )
            sizes.append(default if size is None else size // self.downsampling)
        return (*(() if self.frames is None else (self.frames,)), *sizes, channels)


def text_to_image(
    pipeline: StableDiffusionPipeline,
    prompts: str | Sequence[str] | Int[np.ndarray, "N L"],
    *,
    vae_tiling: bool = False,
    **options: Any,
) -> UInt8[np.ndarray, "N H W 3"]:
    """One uint8 image per prompt; `options` are those of calling a `TextToImage`."""
    return TextToImage.from_pipeline(pipeline, vae_tiling=vae_tiling)(prompts, **options)
