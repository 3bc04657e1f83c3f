"""Text to image, and to video: a pipeline, of whatever family, sampled with guidance.

`TextToImage` is `generation.generate` for people: prompts in, uint8 images out, `[N, H, W, 3]`, or
videos, `[N, F, H, W, 3]`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from ...flax_models.context_parallel import require_shares
from ...flax_models.layers.attention import Neighborhoods, with_attention
from ...flax_models.layers.slabs import AXIS
from ...flax_models.pipelines.pipeline import Pipeline
from ...flax_models.pipelines.video import VideoPipeline
from ...flax_models.streaming import is_streamed
from ...kernels.gna.presets import Preset, attention_preset
from ..estimate import OnEstimate, compile_seconds, run_seconds, work
from ..memory import available_memory, denoiser_bytes, require_memory, vae_bytes, video_vae_bytes
from ..sampling import (
    EDMSchedule,
    FlowMatchSchedule,
    NoiseSchedule,
    Sampler,
    edm_sampler,
    empirical_mu,
    flow_euler_sampler,
    make_sampler,
    schedule_of,
)
from .generation import (
    Condition,
    OnStep,
    Params,
    Phase,
    PipelineStatic,
    generate,
    generate_by_steps,
    generate_over,
    image_keys,
    initial_noise,
    jitted_generate,
    sample_latents,
    split_pipeline,
)
from .kept_samples import KeptSamples

__all__ = [
    "Condition",
    "Params",
    "Phase",
    "PipelineStatic",
    "TextToImage",
    "generate",
    "generate_over",
    "image_keys",
    "initial_noise",
    "jitted_generate",
    "sample_latents",
    "split_pipeline",
    "text_to_image",
    "to_uint8",
]


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
    schedule: NoiseSchedule | FlowMatchSchedule | EDMSchedule
    frames: int | None = None  # of a video by an image model; None draws what the family draws
    dense: tuple[Phase, ...] = ()  # of the steps before those with another attention
    dense_steps: int = 0
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
        """Splits the modules; with `vae_tiling` large images and videos are decoded in tiles.

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
        dense = static.phases if dense_steps and attention is not None else ()
        if attention is not None:
            graphdefs = (
                nnx.split(with_attention(denoiser, attention))[0] for denoiser in pipeline.denoisers
            )
            phases = zip(static.phases, graphdefs, strict=True)
            static = static._replace(
                phases=tuple(phase._replace(denoiser=sparse) for phase, sparse in phases)
            )
        return cls(
            static=static._replace(vae_tiling=vae_tiling),
            params=params,
            pipeline=pipeline,
            schedule=schedule_of(pipeline.schedule_config),
            dense=dense,
            dense_steps=dense_steps if dense else 0,
            preset=attention if isinstance(attention, Preset) else None,
        )

    def __call__(
        self,
        prompts: str | Sequence[str] | Int[np.ndarray, "N L"],
        *,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        sampler: str | None = None,
        eta: float = 0.0,
        negative_prompt: str | None = None,
        true_cfg_scale: float | int | None = None,
        batch_size: int = 8,
        mesh: Mesh | None = None,
        sizes: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: int | None = None,
        conditioning: UInt8[np.ndarray, "K Y X 3"] | None = None,
        latents: Float[Array, "N *T h w C"] | np.ndarray | None = None,
        first_index: int = 0,
        on_estimate: OnEstimate | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        on_step: OnStep | None = None,
        kept: KeptSamples | None = None,
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
            No classifier-free guidance (half the time) at 1 or below. Of Wan 2.2's pair of models
            one for each, or one for both.
          sampler: one of `sampling.SAMPLER_KINDS`; by default what the pipeline's scheduler asks
            for.
          eta: DDIM's fresh noise, 0 to 1.
          negative_prompt: what guidance steers away from; None is an empty text, or what a model
            of SDXL has in its place (`force_zeros_for_empty_prompt`).
          true_cfg_scale: of FLUX.1 and HunyuanVideo, which are told the guidance, classifier-free
            guidance on top, away from the negative prompt; none at 1 or below, else twice the time.
          sizes: that an SDXL model draws for, in pixels: height and width of the original, top
            and left of the crop, height and width of the target; by default those of the image.
          batch_size: images at a time on each device; the last batch is padded, so one program
            serves all.
          mesh: devices, along its axis `data`, that draw a batch each; or along its axis `context`,
            that draw a video, or an image, together, each a part of its tokens.
          height, width: in pixels, multiples of the autoencoder's downsampling; by default the
            UNet's own, or the family's.
          num_frames: of a video, by default the family's.
          fps: frames per second, for families whose model is told; by default their own.
          conditioning: frames that a video begins with, for families that go on from such.
          latents: unit normal noise, [N, h, w, C] or [N, F, h, w, C], in place of the seed's.
          first_index: number of the first image.
          on_estimate: called with about how long compiling and drawing will take, before either.
          on_progress: called with (images done, images in all) after each batch.
          on_step: called with ("sampling" or "decoding", units done, units in all) as each batch
            goes on. It, `kept`, videos and streamed models have one program per step.
          kept: where a sample is kept between its steps, to go on from after a kill.

        Raises:
          ValueError: no prompt, token ids or sizes that do not fit, settings the sampler does
            not know; what is `kept` is of other settings.
          SamplingInterrupted: SIGINT or SIGTERM came, and the sample is `kept`.
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
        strengths = np.ravel(np.asarray(guidance_scale, np.float64))
        if not np.isfinite(strengths).all():
            raise ValueError(f"guidance_scale must be a finite number; got {guidance_scale}.")
        if len(strengths) not in (1, len(self.static.phases)):
            raise ValueError(
                f"guidance_scale takes one number for each of {len(self.static.phases)} models, "
                f"or one for all; got {guidance_scale}."
            )
        shape = self._shape(height, width, num_frames)
        if self.preset is not None:
            self.preset.require_fit(self.pipeline.token_layout(shape))
        if latents is not None and latents.shape != (len(prompts), *shape):
            raise ValueError(
                f"latents must be {(len(prompts), *shape)}, one per prompt at this size; "
                f"got {latents.shape}."
            )
        if sizes is not None and len(sizes) != (self.pipeline.SIZES or None):
            raise ValueError(f"sizes are six numbers of pixels, for SDXL; got {sizes}.")
        tables = self._sampler(sampler, steps, eta, shape)
        together = mesh if mesh is not None and AXIS in mesh.shape else None
        mesh = None if together is not None else mesh
        devices = 1 if mesh is None else mesh.shape["data"]
        total = len(prompts)
        each = min(batch_size, -(-total // devices))  # on a device
        batch_size = devices * each
        guided = self._guided(strengths, negative_prompt, true_cfg_scale)
        parts = 1 if together is None else together.shape[AXIS]
        if together is not None:
            video = isinstance(self.pipeline, VideoPipeline)
            frames = self.pipeline.vae.config.temporal_downsampling if video else None
            require_shares(together, shape, 1 if video else self.pipeline.PATCH, frames)
        tiling = self._require_memory(shape, total, each, devices, guided, parts)
        ids = self._token_ids(prompts)
        negative = None
        if guided:
            zeros = negative_prompt is None and self.pipeline.force_zeros_for_empty_prompt
            negative = () if zeros else self._token_ids([negative_prompt or ""])
            negative = jax.tree.map(jnp.asarray, negative)

        streamed = is_streamed(self.pipeline.denoiser) or is_streamed(self.pipeline.prompt_encoder)
        if streamed and (mesh or together) is not None:
            raise ValueError("streamed models draw on one device: leave out mesh.")
        by_steps = streamed or isinstance(self.pipeline, VideoPipeline) or bool(on_step or kept)
        if by_steps and mesh is not None:
            raise ValueError(
                "videos, and what is told or kept of steps, take no mesh that divides a batch; "
                f"one with an axis {AXIS!r} draws them together."
            )
        static, guidance = self._static(tables, strengths, tiling)
        if guided and true_cfg_scale is not None:
            guidance = guidance, float(true_cfg_scale)
        static = static._replace(mesh=together)
        known = self._known(conditioning, shape)
        more: dict[str, Any] = {}
        if sizes is not None:
            more["sizes"] = np.asarray(sizes, np.float32)
        program = jitted_generate if mesh is None else functools.partial(generate_over, mesh)
        if by_steps:
            program, more["on_step"] = generate_by_steps, on_step
        draw = functools.partial(program, static)
        if kept is not None:
            told = {
                "prompts": np.asarray(prompts).tolist(),
                "seed": seed,
                "first_index": first_index,
                "num_inference_steps": steps,
                "guidance_scale": strengths.tolist(),
                "negative_prompt": negative_prompt,
                "sampler": sampler,
                "eta": eta,
                "batch_size": batch_size,
                "sizes": None if sizes is None else list(sizes),
                "size": list(shape),
                "fps": fps,
            }
            told |= {} if true_cfg_scale is None else {"true_cfg_scale": true_cfg_scale}
            kept.claim(told | self._fingerprints(static, latents=latents, conditioning=known))
        images = []
        for start in range(0, total, batch_size):
            rows = np.minimum(np.arange(start, start + batch_size), total - 1)
            keys = image_keys(seed, rows + first_index)
            noise = initial_noise(keys, shape) if latents is None else jnp.asarray(latents)[rows]
            own = jax.tree.map(lambda each: jnp.asarray(each[rows]), ids)  # noqa: B023, at once
            drawn = (self.params, own, negative, noise, tables, guidance)
            more["keys"] = keys if tables.stochastic else None
            given = self.pipeline.given(keys, fps=fps, known=known)
            more |= {} if given is None else {"given": given}
            if kept is not None:
                more["kept"] = kept.batch(start)
            batches = -(-total // batch_size)
            if on_estimate is not None and not images and not streamed:
                if by_steps:
                    more["on_estimate"] = lambda compiling, running, batches=batches: on_estimate(
                        compiling, running * batches
                    )
                else:
                    found = work(draw, *drawn, **more)
                    on_estimate(
                        compile_seconds(found.equations), run_seconds(found.flops) * batches
                    )
            batch = np.asarray(draw(*drawn, **more))[: total - start]
            more.pop("on_estimate", None)
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

    def _guided(
        self, strengths: np.ndarray, negative: str | None, true: float | int | None
    ) -> bool:
        """Whether the model is also asked with the negative prompt, or without any."""
        name, learnt = type(self.pipeline).__name__, self.pipeline.LEARNT_GUIDANCE
        if true is not None and not (learnt and math.isfinite(true)):
            raise ValueError(
                f"true_cfg_scale must be a finite number; got {true}."
                if learnt
                else f"{name} is guided by guidance_scale: leave out true_cfg_scale."
            )
        guided = any(map(self.pipeline.guides, strengths.tolist())) or (true or 1) > 1
        if negative is None or guided or self.pipeline.guides(math.inf):
            return guided
        more = "Pass a true_cfg_scale above 1, at twice the time, or leave it out."
        raise ValueError(
            f"{name} is not guided away from a negative_prompt here: this model learnt its "
            f"guidance. {more if learnt else 'Leave it out.'}"
        )

    def _sampler(self, kind: str | None, steps: int, eta: float, shape: tuple[int, ...]) -> Sampler:
        """The tables of a run for latents of that shape."""
        schedule, pipeline = self.schedule, self.pipeline
        if isinstance(schedule, NoiseSchedule):
            return make_sampler(schedule, kind, num_inference_steps=steps, eta=eta)
        if kind is not None or eta:
            how = "is denoised" if isinstance(schedule, EDMSchedule) else "follows a flow,"
            raise ValueError(
                f"{type(pipeline).__name__} {how} by Euler steps: leave out "
                f"{'sampler' if kind is not None else 'eta'}."
            )
        if isinstance(schedule, EDMSchedule):
            return edm_sampler(schedule, steps, start=schedule.sigma_max)
        mu = None
        if schedule.use_dynamic_shifting:
            tokens = math.prod(self.pipeline.token_layout(shape)[-2:])
            fitted = pipeline.SHIFT == "empirical"
            mu = empirical_mu(tokens, steps) if fitted else schedule.mu_of(tokens)
        tables = flow_euler_sampler(schedule, steps, sigmas=pipeline.flow_sigmas(steps), mu=mu)
        if (
            mu is not None
            and steps > 1
            and tables.timesteps[-1] > 0.95 * schedule.num_train_timesteps
        ):
            warnings.warn(
                "at this size the schedule's shift, which follows it, leaves all steps at almost "
                "pure noise. Add an adapter that was made for the size (--add, merge_parts); what "
                "one that states nothing is drawn with goes with it: --add-settings urae-4k, or "
                'settings="urae-4k".',
                stacklevel=3,
            )
        return tables

    def _shape(self, height: int | None, width: int | None, frames: int | None) -> tuple[int, ...]:
        """Of the latents of an image or video of that size."""
        if isinstance(self.pipeline, VideoPipeline):
            return self.pipeline.latent_shape_for(height, width, frames)
        if frames not in (None, self.frames):
            raise ValueError(
                f"{type(self.pipeline).__name__} draws images: leave out num_frames={frames}, or "
                "pass a motion_adapter to text_to_video."
            )
        of_time = () if self.frames is None else (self.frames,)
        return (*of_time, *self.pipeline.latent_shape_for(height, width))

    def _static(
        self, tables: Sampler, strengths: np.ndarray, tiling: bool
    ) -> tuple[PipelineStatic, Any]:
        """What a run is compiled for, and its guidance: one number, or one for each step."""
        static = self.static._replace(vae_tiling=tiling)
        counts = self.pipeline.steps_of(np.asarray(tables.timesteps))
        guidance = float(strengths[0])
        if len(strengths) > 1:
            guidance = np.repeat(strengths, counts).astype(np.float32)
        if len(counts) == 1 and not self.dense:
            return static, guidance
        phases, begun = [], 0
        for number, (phase, count) in enumerate(zip(static.phases, counts, strict=True)):
            before = min(max(self.dense_steps - begun, 0), count)
            if before:
                phases.append(self.dense[number]._replace(steps=before))
            phases.append(phase._replace(steps=count - before))
            begun += count
        phases[-1] = phases[-1]._replace(steps=None)
        return static._replace(phases=tuple(phases)), guidance

    def _known(
        self, conditioning: UInt8[np.ndarray, "K Y X 3"] | None, shape: tuple[int, ...]
    ) -> Any:
        """What a family's models are told of the frames that a video begins with."""
        pipeline: Any = self.pipeline
        takes = isinstance(pipeline, VideoPipeline) and pipeline.TAKES_FRAMES
        if takes != (conditioning is not None):
            name = type(pipeline).__name__
            raise ValueError(
                f"{name} goes on from frames: pass an image or a video as conditioning."
                if takes
                else f"{name} draws from texts alone: leave out conditioning."
            )
        if conditioning is None:
            return None
        factor = self.static.downsampling
        size = (shape[-3] * factor, shape[-2] * factor)
        frames, count = pipeline.conditioning_frames(conditioning, shape[0], size)
        return _encode_frames(self.static, self.params["vae"], frames), count

    def _fingerprints(self, static: PipelineStatic, **arrays: Any) -> dict[str, str | None]:
        """Of what a sample depends on beside numbers and texts: equal ones give equal digests."""
        leaves = jax.tree.leaves({name: self.params[name] for name in sorted(self.params)})
        parts: list[bytes] = [str([(leaf.shape, str(leaf.dtype)) for leaf in leaves]).encode()]
        few = leaves[:: max(1, len(leaves) // 16)]
        parts += [
            np.asarray(leaf[(0,) * (leaf.ndim - 1)][:64]).tobytes() for leaf in few if leaf.ndim
        ]
        found: dict[str, str | None] = {"model": _digest(*parts)}
        settings = [
            str(getattr(node, "neighborhood", None))
            for phase in static.phases
            for _, node in nnx.iter_graph(nnx.merge(phase.denoiser, self.params[phase.part]))
            if hasattr(node, "neighborhood")
        ]
        steps = [phase.steps for phase in static.phases]
        dtypes = [str(denoiser.dtype) for denoiser in self.pipeline.denoisers]
        found["attention"] = _digest(str((settings, steps)).encode())
        found["dtype"] = ", ".join(dtypes)
        for name, value in arrays.items():
            leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(value)]
            found[name] = _digest(*leaves) if leaves else None
        return found

    def _require_memory(
        self,
        shape: tuple[int, ...],
        total: int,
        batch: int,
        devices: int,
        guided: bool,
        parts: int,
    ) -> bool:
        """Refuse what cannot fit, and say what might; whether to decode in tiles.

        Args:
          shape: of a latent, [h, w, C] or [F, h, w, C].
          total: images or videos in all, whose bytes the host keeps.
          batch: at a time on each device.
          devices: that draw at the same time.
          guided: whether the model sees each twice.
          parts: in which as many devices denoise each together.
        """
        denoiser, vae = self.pipeline.denoiser, self.pipeline.vae
        *times, h, w, _ = shape
        factor, tiling = vae.config.downsampling, self.static.vae_tiling
        count = math.prod(times)
        whole = isinstance(self.pipeline, VideoPipeline)  # decoded at once, or frame by frame
        frames = (count - 1) * vae.config.temporal_downsampling + 1 if whole else count
        on_host = jax.default_backend() == "cpu"  # all take of the host's memory
        shared, parts = (devices, 1) if on_host else (1, parts)
        video = bool(times)
        tile = getattr(vae.config, "tile_size", 256)  # the smallest of the video autoencoders'

        def needed(batch: int, tiling: bool, h: int, w: int) -> float:
            height, width = (
                min(side, tile) if tiling else side for side in (h * factor, w * factor)
            )
            at_once = 1 if tiling else batch
            decoding = (
                video_vae_bytes(vae.config, at_once, frames, height, width, vae.dtype)
                if whole
                else vae_bytes(vae.config, at_once, height, width, vae.dtype)
            )
            return shared * max(
                denoiser_bytes(denoiser, (1 + guided) * batch * count, h, w, self.pipeline.PATCH)
                / parts,
                decoding + 12.0 * batch * frames * h * w * factor**2,
            )

        what = f"{'a video' if video else 'an image'} of {h * factor}x{w * factor} pixels"
        if video:
            what = f"{what} and {frames} frames"
        require_memory(
            3.0 * total * frames * h * w * factor**2,
            f"keeping {total} times {what}",
            "draw fewer at a time, or smaller ones with height and width",
            host=True,
        )
        free, most = available_memory(), needed(batch, tiling, h, w)
        if free is None or most <= free:
            return tiling
        if fewer := int(free / needed(1, tiling, h, w)):
            remedy = f"batch_size {fewer} may do"
        elif not tiling and whole and needed(batch, True, h, w) <= free:
            warnings.warn(
                f"{what} is decoded in tiles: whole, it takes more memory than is free.",
                stacklevel=3,
            )
            return True
        elif not tiling and not video and needed(1, True, h, w) <= free:
            remedy = "vae_tiling with batch_size 1 may do"
        else:
            side = factor * max(1, int(64 * math.sqrt(free / needed(1, tiling, 64, 64))))
            remedy = f"with batch_size 1, a height and width of up to {side} may do"
            if whole:
                remedy = f"{remedy}, or fewer frames"
        require_memory(most, f"drawing {what}, {batch} at a time,", remedy)
        return tiling

    def _token_ids(self, prompts: Sequence[str] | np.ndarray) -> Any:
        if not isinstance(prompts, np.ndarray):
            return self.pipeline.tokenize(prompts)
        return self.pipeline.checked_token_ids(prompts)


@functools.partial(jax.jit, static_argnums=0)
def _encode_frames(static: PipelineStatic, params: Any, frames: Float[Array, "1 F H W 3"]) -> Array:
    family: Any = static.family
    return family.encode_frames(nnx.merge(static.vae, params), frames) * static.data_scale


def _digest(*parts: bytes) -> str:
    return hashlib.blake2s(b"".join(parts), digest_size=8).hexdigest()


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
