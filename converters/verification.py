"""Verify a written checkpoint against PyTorch: both frameworks on one random input."""

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..flax_models.cosmos_transformer_3d import CosmosCondition
from ..flax_models.layers.joint_attention import JointTextCondition
from ..flax_models.unet_2d_condition import TextCondition

_SIDE = 16  # latents per side of a UNet's input, at least; more where it halves more often
Outputs = tuple[list, list]  # ours and theirs, in our layout


def verify(model_or_pipeline: Any, folder: Path | str) -> dict[str, float | None]:
    """Compare what was converted with what diffusers and transformers make of its folder.

    Both compute in float32 on the CPU or wherever JAX is; the same random input goes into each
    model, small images and sequences, batch 1.

    Args:
      model_or_pipeline: what `save_pytorch` wrote.
      folder: where to.

    Returns:
      component (or class name) -> the largest difference of an output, relative to that output's
      largest magnitude; None for a class that is not compared.

    Raises:
      ImportError: torch, diffusers or transformers is not installed.
    """
    folder = Path(folder)
    if not hasattr(model_or_pipeline, "scheduler_config"):
        name = type(model_or_pipeline).__name__
        return {name: _difference(model_or_pipeline, folder)}
    parts = {name: getattr(model_or_pipeline, name) for name in model_or_pipeline.MODELS}
    return {n: _difference(part, folder / n) for n, part in parts.items() if part is not None}


def _difference(model: Any, folder: Path) -> float | None:
    rule = _RULES.get(getattr(model, "pytorch_class", ""))
    if rule is None:
        return None
    import torch

    library = importlib.import_module(model.pytorch_library)
    with _quiet(library):
        kind = getattr(library, model.pytorch_class)
        if model.pytorch_library == "diffusers" and kind._keep_in_fp32_modules:
            # All is float32 here. To keep parts in it, diffusers asks for a package more.
            kind = type(kind.__name__, (kind,), {"_keep_in_fp32_modules": None})
        module = kind.from_pretrained(folder).float().eval()
    graphdef, state = nnx.split(model)  # what was left in its file goes onto the device
    model = nnx.merge(graphdef, jax.tree.map(jnp.asarray, state))
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        ours, theirs = rule(model, module, model.config, np.random.default_rng(0))
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        one, other = np.asarray(one, np.float32), other.numpy()
        if one.shape != other.shape:
            return math.inf
        worst = max(worst, float(np.abs(one - other).max() / max(np.abs(other).max(), 1e-30)))
    return worst


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Without the library's progress bars, and its advice on other packages."""
    told = library.utils.logging
    before = told.get_verbosity()
    told.set_verbosity_error()
    told.disable_progress_bar()
    try:
        yield
    finally:
        told.set_verbosity(before)
        told.enable_progress_bar()


def _torch(*inputs: np.ndarray) -> list[Any]:
    """The inputs of PyTorch's module; those of four axes are images, channels last."""
    import torch

    layouts = (value.transpose(0, 3, 1, 2) if value.ndim == 4 else value for value in inputs)
    return [torch.from_numpy(np.ascontiguousarray(value)) for value in layouts]


def _nhwc(tensor: Any) -> Any:
    return tensor.permute(0, 2, 3, 1)


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def _denoised(config: Any, rng: np.random.Generator, *frames: int) -> tuple[np.ndarray, ...]:
    """Latents, a time and a text."""
    side = max(_SIDE, 2 ** (len(config.block_out_channels) + 1))
    sample = _normal(rng, 1, *frames, side, side, config.in_channels)
    return sample, np.array([501]), _normal(rng, 1, 7, config.cross_attention_dim)


def _unet(model: Any, module: Any, config: Any, rng: np.random.Generator) -> Outputs:
    sample, times, text = _denoised(config, rng)
    condition: Any = text
    theirs: dict[str, Any] = {}
    if getattr(config, "addition_embed_type", None) == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": _normal(rng, 1, width), "time_ids": np.full((1, 6), 64.0)}
        condition = TextCondition(jnp.asarray(text), **added)
        given = (value.float() for value in _torch(*added.values()))
        theirs = {"added_cond_kwargs": dict(zip(added, given, strict=True))}
    out = module(*_torch(sample, times, text), **theirs).sample
    return [jax.jit(model.__call__)(sample, times, condition)], [_nhwc(out)]


def _vae(model: Any, module: Any, config: Any, rng: np.random.Generator) -> Outputs:
    side = 4 * config.downsampling
    image = _normal(rng, 1, side, side, config.in_channels).clip(-1, 1)
    posterior = module.encode(*_torch(image)).latent_dist
    decoded = module.decode(posterior.mean).sample
    ours = [*jax.jit(model.encode)(image), jax.jit(model.decode)(_nhwc(posterior.mean).numpy())]
    return ours, [_nhwc(x) for x in (posterior.mean, posterior.logvar, decoded)]


def _video_vae(model: Any, module: Any, config: Any, rng: np.random.Generator) -> Outputs:
    """One frame, then fours, as diffusers takes Wan's; Cosmos' latents have no variance."""
    side, frames = 4 * config.downsampling, 1 + max(4, config.temporal_downsampling)
    video = _normal(rng, 1, frames, side, side, 3).clip(-1, 1)
    posterior = module.encode(*_torch(video.transpose(0, 4, 1, 2, 3))).latent_dist
    latents = posterior.mode()
    moments = [latents, *([posterior.logvar] if hasattr(posterior, "logvar") else [])]
    theirs = [x.permute(0, 2, 3, 4, 1) for x in (*moments, module.decode(latents).sample)]
    ours = jax.jit(model.encode)(video)[: len(moments)]
    return [*ours, jax.jit(model.decode)(theirs[0].numpy())], theirs


def _ids(config: Any, rng: np.random.Generator) -> np.ndarray:
    length, last = min(config.max_position_embeddings, 16), config.vocab_size - 1
    ids = rng.integers(0, config.vocab_size, (1, length))
    end = getattr(config, "eos_token_id", 2)
    ids[0, -1] = last if end in (None, 2) else min(end, last)
    return ids


def _pixels(config: Any, rng: np.random.Generator) -> np.ndarray:
    channels = getattr(config, "num_channels", 3)
    return _normal(rng, 1, config.image_size, config.image_size, channels)


def _clip_text(model: Any, module: Any, config: Any, rng: np.random.Generator) -> Outputs:
    ids = _ids(config, rng)
    return [jax.jit(model.__call__)(ids)[0]], [module(*_torch(ids)).last_hidden_state]


def _states(model: Any, module: Any, config: Any, rng: np.random.Generator) -> Outputs:
    """A text encoder without pooling: its last states, or those that are read."""
    ids, mask = rng.integers(0, config.vocab_size, (1, 16)), np.ones((1, 16), np.int64)
    mask[0, 11:] = 0
    ours, inputs = jax.jit(model.__call__)(ids, mask), _torch(ids, mask)
    if not hasattr(model, "read"):
        return [ours], [module(*inputs).last_hidden_state]
    states = module(*inputs, output_hidden_states=True).hidden_states
    return list(ours), [states[index] for index in model.read]


def _vision(model: Any, module: Any, config: Any, rng: np.random.Generator) -> Outputs:
    pixels = _pixels(config, rng)
    out = module(*_torch(pixels))
    return list(jax.jit(model.__call__)(pixels)), [out.last_hidden_state, out.pooler_output]


def _clip(model: Any, module: Any, config: Any, rng: np.random.Generator) -> Outputs:
    inputs = _ids(config.text_config, rng), _pixels(config.vision_config, rng)
    return [jax.jit(model.__call__)(*inputs)], [module(*_torch(*inputs)).logits_per_image]


def _dit(model: Any, module: Any, config: Any, rng: np.random.Generator) -> Outputs:
    sample = _normal(rng, 1, config.sample_size, config.sample_size, config.in_channels)
    inputs = sample, np.array([501]), rng.integers(0, config.num_embeds_ada_norm, 1)
    return [jax.jit(model.__call__)(*inputs)], [_nhwc(module(*_torch(*inputs)).sample)]


def _sd3(model: Any, module: Any, config: Any, rng: np.random.Generator) -> Outputs:
    side = config.patch_size * min(4, config.pos_embed_max_size)
    sample, times = _normal(rng, 1, side, side, config.in_channels), np.array([501])
    text = _normal(rng, 1, 7, config.joint_attention_dim)
    pooled = _normal(rng, 1, config.pooled_projection_dim)
    condition = JointTextCondition(jnp.asarray(text), jnp.asarray(pooled))
    out = module(*_torch(sample, text, pooled, times)).sample
    return [jax.jit(model.__call__)(sample, times, condition)], [_nhwc(out)]


def _cosmos(model: Any, module: Any, config: Any, rng: np.random.Generator) -> Outputs:
    """Masks are channels like others: diffusers needs torchvision to resize that of padding."""
    masked = config.in_channels > config.out_channels  # in which the mask of given frames counts
    sides = tuple(size * count for size, count in zip(config.patch_size, (2, 3, 4), strict=True))
    latents = _normal(rng, 1, *sides, config.in_channels - masked)
    states, times = _normal(rng, 1, 7, config.text_embed_dim), np.array([0.3], np.float32)
    given = (np.arange(sides[0]) == 0).astype(np.float32)[None]
    channels = [latents]
    if masked:
        channels.append(np.broadcast_to(given[..., None, None, None], (1, *sides, 1)))
    if config.concat_padding_mask:
        channels.append(np.zeros((1, *sides, 1), np.float32))
    module.register_to_config(concat_padding_mask=False)
    inputs = np.concatenate(channels, axis=-1).transpose(0, 4, 1, 2, 3)
    out = module(*_torch(inputs, times, states), fps=24).sample
    mask = jnp.asarray(given) if masked else None
    condition = CosmosCondition(jnp.asarray(states), jnp.array([24.0]), mask)
    ours = jax.jit(model.__call__)(latents, times, condition)
    return [ours], [out.permute(0, 2, 3, 4, 1)]


def _flux(model: Any, module: Any, config: Any, rng: np.random.Generator) -> Outputs:
    """FLUX.1 and FLUX.2; diffusers takes times from 0 to 1, and the positions of all tokens."""
    rows, columns, words, axes = 6, 4, 7, len(config.axes_dims_rope)
    image, text = np.zeros((rows, columns, axes), np.float32), np.zeros((words, axes), np.float32)
    image[..., 1], image[..., 2] = np.indices((rows, columns))
    if axes == 4:
        text[:, 3] = np.arange(words)
    latents = _normal(rng, 1, rows, columns, config.in_channels)
    states, times = _normal(rng, 1, words, config.joint_attention_dim), np.array([501.0])
    given = {}
    if config.guidance_embeds:
        given["guidance"] = np.array([0.25], np.float32)
    if hasattr(config, "pooled_projection_dim"):
        given["pooled"] = _normal(rng, 1, config.pooled_projection_dim)
    names = {"guidance": "guidance", "pooled": "pooled_projections"}
    theirs = {names[k]: v for k, v in zip(given, _torch(*given.values()), strict=True)}
    flat = (latents.reshape(1, -1, config.in_channels), states, times / 1000)
    keys = ("hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids")
    flat = _torch(*flat, image.reshape(-1, axes), text)
    out = module(**dict(zip(keys, flat, strict=True)), **theirs).sample
    condition = JointTextCondition(jnp.asarray(states), **given)
    ours = jax.jit(model.__call__)(latents, times, condition)
    return [ours], [out.unflatten(1, (rows, columns))]


def _wan(model: Any, module: Any, config: Any, rng: np.random.Generator) -> Outputs:
    sides = (size * count for size, count in zip(config.patch_size, (3, 4, 2), strict=True))
    sample, times = _normal(rng, 1, *sides, config.in_channels), np.array([501])
    text = _normal(rng, 1, 7, config.text_dim)
    out = module(*_torch(sample.transpose(0, 4, 1, 2, 3), times, text)).sample
    return [jax.jit(model.__call__)(sample, times, text)], [out.permute(0, 2, 3, 4, 1)]


def _hunyuan_video(model: Any, module: Any, config: Any, rng: np.random.Generator) -> Outputs:
    """Guidance is of a size whose thousandfold torch's frequencies do not magnify."""
    frames, rows, columns = (2 * size for size in config.patch)
    latents = _normal(rng, 1, frames, rows, columns, config.in_channels)
    states, times = _normal(rng, 1, 7, config.text_embed_dim), np.array([501.0], np.float32)
    pooled, mask = _normal(rng, 1, config.pooled_projection_dim), np.arange(7)[None] < 5
    guidance = np.array([0.25], np.float32)
    theirs = latents.transpose(0, 4, 1, 2, 3), times, states, mask, pooled, 1000 * guidance
    out = module(*_torch(*theirs[: 6 if config.guidance_embeds else 5])).sample
    condition = JointTextCondition(*map(jnp.asarray, (states, pooled, guidance, mask)))
    return [jax.jit(model.__call__)(latents, times, condition)], [out.permute(0, 2, 3, 4, 1)]


def _video_unet(model: Any, module: Any, config: Any, rng: np.random.Generator) -> Outputs:
    sample, times, text = _denoised(config, rng, 2)
    theirs = _torch(sample.transpose(0, 4, 1, 2, 3), times, text.repeat(2, 0))
    out = module(*theirs).sample
    return [jax.jit(model.__call__)(sample, times, text)], [out.permute(0, 2, 3, 4, 1)]


def _blip(model: Any, module: Any, config: Any, rng: np.random.Generator) -> Outputs:
    inputs = _ids(config.text_config, rng), _pixels(config.vision_config, rng)
    ours = [jax.jit(model.__call__)(*inputs), jax.jit(model.matching_logits)(*inputs)]
    return ours, [module(*_torch(*inputs), use_itm_head=head).itm_score for head in (False, True)]


def _blip_2(model: Any, module: Any, config: Any, rng: np.random.Generator) -> Outputs:
    ids, pixels = _ids(config.qformer_config, rng), _pixels(config.vision_config, rng)
    out = module(*_torch(pixels, ids, np.ones_like(ids)))
    return [jax.jit(model.__call__)(ids, pixels)], [out.logits_per_image]


# Published class -> (model, module, config, random numbers) -> outputs of both.
_RULES: Mapping[str, Callable[..., Outputs]] = {
    "UNet2DConditionModel": _unet,
    "AutoencoderKL": _vae,
    "AutoencoderKLFlux2": _vae,
    "AutoencoderKLHunyuanVideo": _video_vae,
    "AutoencoderKLWan": _video_vae,
    "AutoencoderKLCosmos": _video_vae,
    "CLIPTextModel": _clip_text,
    "CLIPTextModelWithProjection": _clip_text,
    "T5EncoderModel": _states,
    "UMT5EncoderModel": _states,
    "LlamaModel": _states,
    "LlamaForCausalLM": _states,
    "Qwen3Model": _states,
    "Qwen3ForCausalLM": _states,
    "CLIPVisionModel": _vision,
    "CLIPModel": _clip,
    "DiTTransformer2DModel": _dit,
    "SD3Transformer2DModel": _sd3,
    "CosmosTransformer3DModel": _cosmos,
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux,
    "WanTransformer3DModel": _wan,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
    "UNetMotionModel": _video_unet,
    "Dinov2Model": _vision,
    "BlipForImageTextRetrieval": _blip,
    "Blip2ForImageTextRetrieval": _blip_2,
}
