"""Verify a written checkpoint against PyTorch: both frameworks on one random input."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..flax_models.unet_2d_condition import TextCondition

_SEED = 0
_SIDE = 16  # latents per side of a UNet's input, at least; more where it halves more often


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
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    parts = {name: getattr(model_or_pipeline, name, None) for name in names}
    return {
        name: _difference(part, folder / name) for name, part in parts.items() if part is not None
    }


def _difference(model: Any, folder: Path) -> float | None:
    rule = _RULES.get(getattr(model, "pytorch_class", ""))
    if rule is None:
        return None
    import torch

    if model.pytorch_library == "diffusers":
        import diffusers as library
    else:
        import transformers as library
    published = getattr(library, model.pytorch_class)
    module = published.from_pretrained(folder).float().eval()
    graphdef, state = nnx.split(model)  # what was left in its file goes onto the device
    model = nnx.merge(graphdef, jax.tree.map(jnp.asarray, state))
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        ours, theirs = rule(model, module, np.random.default_rng(_SEED))
    theirs = [value.numpy() for value in theirs]
    ours = [np.asarray(value, np.float32) for value in ours]
    return max(
        float(np.abs(one - other).max() / max(np.abs(other).max(), 1e-30))
        if one.shape == other.shape
        else math.inf
        for one, other in zip(ours, theirs, strict=True)
    )


def _torch(values: np.ndarray, *, image: bool = False) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values.transpose(0, 3, 1, 2) if image else values))


def _nhwc(tensor: Any) -> Any:
    return tensor.permute(0, 2, 3, 1)


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def _unet(model: Any, module: Any, rng: np.random.Generator) -> tuple[list, list]:
    config = model.config
    side = max(_SIDE, 2 ** (len(config.block_out_channels) + 1))
    sample = _normal(rng, 1, side, side, config.in_channels)
    text = _normal(rng, 1, 7, config.cross_attention_dim)
    times = np.array([501])
    condition: Any = text
    theirs: dict[str, Any] = {}
    if getattr(config, "addition_embed_type", None) == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": _normal(rng, 1, width), "time_ids": np.full((1, 6), 64.0)}
        condition = TextCondition(jnp.asarray(text), **added)
        theirs = {"added_cond_kwargs": {k: _torch(v).float() for k, v in added.items()}}
    out = module(_torch(sample, image=True), _torch(times), _torch(text), **theirs).sample
    return [jax.jit(model.__call__)(sample, times, condition)], [_nhwc(out)]


def _vae(model: Any, module: Any, rng: np.random.Generator) -> tuple[list, list]:
    side = 4 * model.config.downsampling
    image = _normal(rng, 1, side, side, model.config.in_channels).clip(-1, 1)
    posterior = module.encode(_torch(image, image=True)).latent_dist
    decoded = module.decode(posterior.mean).sample
    latents = _nhwc(posterior.mean).numpy()
    mean, logvar = jax.jit(model.encode)(image)
    ours = [mean, logvar, jax.jit(model.decode)(latents)]
    return ours, [_nhwc(x) for x in (posterior.mean, posterior.logvar, decoded)]


def _ids(config: Any, rng: np.random.Generator) -> np.ndarray:
    length = min(config.max_position_embeddings, 16)
    ids = rng.integers(0, config.vocab_size, (1, length))
    ids[0, -1] = config.eos_token_id if config.eos_token_id != 2 else config.vocab_size - 1
    return np.minimum(ids, config.vocab_size - 1)


def _clip_text(model: Any, module: Any, rng: np.random.Generator) -> tuple[list, list]:
    ids = _ids(model.config, rng)
    return [jax.jit(model.__call__)(ids)[0]], [module(input_ids=_torch(ids)).last_hidden_state]


def _pixels(config: Any, rng: np.random.Generator) -> np.ndarray:
    channels = getattr(config, "num_channels", 3)
    return _normal(rng, 1, config.image_size, config.image_size, channels)


def _clip_vision(model: Any, module: Any, rng: np.random.Generator) -> tuple[list, list]:
    pixels = _pixels(model.config, rng)
    out = module(pixel_values=_torch(pixels, image=True))
    return list(jax.jit(model.__call__)(pixels)), [out.last_hidden_state, out.pooler_output]


def _clip(model: Any, module: Any, rng: np.random.Generator) -> tuple[list, list]:
    ids, pixels = _ids(model.config.text_config, rng), _pixels(model.config.vision_config, rng)
    out = module(input_ids=_torch(ids), pixel_values=_torch(pixels, image=True))
    return [jax.jit(model.__call__)(ids, pixels)], [out.logits_per_image]


def _dit(model: Any, module: Any, rng: np.random.Generator) -> tuple[list, list]:
    config = model.config
    sample = _normal(rng, 1, config.sample_size, config.sample_size, config.in_channels)
    times, labels = np.array([501]), rng.integers(0, config.num_embeds_ada_norm, 1)
    out = module(_torch(sample, image=True), _torch(times), _torch(labels)).sample
    return [jax.jit(model.__call__)(sample, times, labels)], [_nhwc(out)]


def _video_unet(model: Any, module: Any, rng: np.random.Generator) -> tuple[list, list]:
    config, frames = model.config, 2
    side = max(_SIDE, 2 ** (len(config.block_out_channels) + 1))
    sample = _normal(rng, 1, frames, side, side, config.in_channels)
    text, times = _normal(rng, 1, 7, config.cross_attention_dim), np.array([501])
    theirs = _torch(sample).permute(0, 4, 1, 2, 3), _torch(times), _torch(text.repeat(frames, 0))
    ours = jax.jit(model.__call__)(sample, times, text)
    return [ours], [module(*theirs).sample.permute(0, 2, 3, 4, 1)]


def _dinov2(model: Any, module: Any, rng: np.random.Generator) -> tuple[list, list]:
    pixels = _pixels(model.config, rng)
    out = module(_torch(pixels, image=True))
    return list(jax.jit(model.__call__)(pixels)), [out.last_hidden_state, out.pooler_output]


def _text_and_pixels(text: Any, vision: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    length = min(text.max_position_embeddings, 16)
    return rng.integers(0, text.vocab_size, (1, length)), _pixels(vision, rng)


def _blip(model: Any, module: Any, rng: np.random.Generator) -> tuple[list, list]:
    config = model.config
    ids, pixels = _text_and_pixels(config.text_config, config.vision_config, rng)
    theirs = _torch(ids), _torch(pixels, image=True)
    ours = [jax.jit(model.__call__)(ids, pixels), jax.jit(model.matching_logits)(ids, pixels)]
    contrast, matching = (module(*theirs, use_itm_head=head).itm_score for head in (False, True))
    return ours, [contrast, matching]


def _blip_2(model: Any, module: Any, rng: np.random.Generator) -> tuple[list, list]:
    config = model.config
    ids, pixels = _text_and_pixels(config.qformer_config, config.vision_config, rng)
    out = module(_torch(pixels, image=True), _torch(ids), _torch(np.ones_like(ids)))
    return [jax.jit(model.__call__)(ids, pixels)], [out.logits_per_image]


# Published class -> (model, module, rng) -> outputs of both, ours and theirs, in our layout.
_RULES: Mapping[str, Callable[..., tuple[list, list]]] = {
    "UNet2DConditionModel": _unet,
    "AutoencoderKL": _vae,
    "CLIPTextModel": _clip_text,
    "CLIPTextModelWithProjection": _clip_text,
    "CLIPVisionModel": _clip_vision,
    "CLIPModel": _clip,
    "DiTTransformer2DModel": _dit,
    "UNetMotionModel": _video_unet,
    "Dinov2Model": _dinov2,
    "BlipForImageTextRetrieval": _blip,
    "Blip2ForImageTextRetrieval": _blip_2,
}
