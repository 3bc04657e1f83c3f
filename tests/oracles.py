"""PyTorch oracles: tiny random models of the real classes, and how both sides are called.

An oracle's inputs are numpy arrays in our layout (images NHWC); `torch_call` brings them to
torch's.
"""

import dataclasses
import types
import unittest.mock
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from conceptax.converters.tensors import tensor_specs
from conceptax.flax_models.cosmos_transformer_3d import CosmosCondition
from conceptax.flax_models.layers.joint_attention import JointTextCondition
from conceptax.flax_models.unet_2d_condition import TextCondition


@dataclasses.dataclass
class Oracle:
    """A torch module, differentiable inputs, integer inputs, and the two ways to call it.

    `options` are those of loading it.
    """

    module: Any
    inputs: dict[str, np.ndarray]
    fixed: dict[str, np.ndarray]
    torch_call: Callable[..., Any]
    jax_call: Callable[..., Any]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def nchw(x: Any) -> Any:
    return x.permute(0, 3, 1, 2)


def nhwc(x: Any) -> Any:
    return x.permute(0, 2, 3, 1)


def unet(seed: int = 0, size: tuple[int, int] = (8, 8), **changes: Any) -> Oracle:
    import diffusers
    import torch

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    settings = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    } | changes
    module = diffusers.UNet2DConditionModel(**settings).eval()
    return Oracle(
        module,
        {
            "sample": rng.normal(size=(2, *size, 4)).astype(np.float32),
            "text": rng.normal(size=(2, 5, 8)).astype(np.float32),
        },
        {"timesteps": np.array([3, 901])},
        lambda sample, text, timesteps: nhwc(module(nchw(sample), timesteps, text).sample),
        lambda model, sample, text, timesteps: model(sample, timesteps, text),
    )


# Stable Diffusion XL's in small: blocks without attention, a depth per block, text_time.
SDXL_UNET: dict[str, Any] = {
    "block_out_channels": (8, 8, 16),
    "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 4),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 12 + 6 * 6,
}


def unet_xl(seed: int = 0, **changes: Any) -> Oracle:
    """Also conditioned on a pooled text and on sizes."""
    oracle = unet(seed, **{**SDXL_UNET, **changes})
    module = oracle.module
    rng = np.random.default_rng(seed + 1)
    oracle.inputs["pooled"] = rng.normal(size=(2, 12)).astype(np.float32)
    oracle.fixed["sizes"] = np.array([[512, 640, 0, 16, 512, 512], [64, 64, 3, 0, 32, 48]])

    def torch_call(sample: Any, text: Any, pooled: Any, timesteps: Any, sizes: Any) -> Any:
        added = {"text_embeds": pooled, "time_ids": sizes}
        output = module(nchw(sample), timesteps, text, added_cond_kwargs=added)
        return nhwc(output.sample)

    oracle.torch_call = torch_call
    oracle.jax_call = lambda model, sample, text, pooled, timesteps, sizes: model(
        sample, timesteps, TextCondition(text, pooled, sizes)
    )
    return oracle


def unet_motion(seed: int = 0, size: tuple[int, int] = (8, 8), **changes: Any) -> Oracle:
    """Two videos of three frames; the text is repeated per frame for diffusers."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    settings = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "num_attention_heads": 2,
        "motion_num_attention_heads": 2,
        "motion_max_seq_length": 4,
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
    } | changes
    module = diffusers.UNetMotionModel(**settings).eval()

    def torch_call(sample: Any, text: Any, timesteps: Any) -> Any:
        text = text.repeat_interleave(sample.shape[1], dim=0)
        output = module(sample.permute(0, 4, 1, 2, 3), timesteps, text).sample
        return output.permute(0, 2, 3, 4, 1)

    return Oracle(
        module,
        {
            "sample": rng.normal(size=(2, 3, *size, 4)).astype(np.float32),
            "text": rng.normal(size=(2, 5, 8)).astype(np.float32),
        },
        {"timesteps": np.array([3, 901])},
        torch_call,
        lambda model, sample, text, timesteps: model(sample, timesteps, text),
    )


def dit(seed: int = 0, **changes: Any) -> Oracle:
    import diffusers
    import torch

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "out_channels": 8,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
    } | changes
    module = diffusers.DiTTransformer2DModel(**settings).eval()
    return Oracle(
        module,
        {"sample": rng.normal(size=(2, 8, 8, 4)).astype(np.float32)},
        {"timesteps": np.array([3, 901]), "labels": np.array([4, 10])},
        lambda sample, timesteps, labels: nhwc(module(nchw(sample), timesteps, labels).sample),
        lambda model, sample, timesteps, labels: model(sample, timesteps, labels),
    )


def randomized(module: Any, seed: int) -> Any:
    """Every parameter random: defaults leave norms at one and what is gated at zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            norm = name.endswith("gamma") or (parameter.ndim == 1 and name.endswith("weight"))
            parameter.normal_(0.0, 0.1, generator=generator).add_(float(norm))
    return module.eval()


def _joint_ids(rows: int, columns: int, text: int, axes: int) -> tuple[Any, Any]:
    """Positions of image and text as FLUX's pipelines give them; FLUX.2 counts the text's."""
    import torch

    image = torch.zeros(rows, columns, axes)
    image[..., 1] = torch.arange(rows)[:, None]
    image[..., 2] = torch.arange(columns)
    words = torch.zeros(text, axes)
    if axes == 4:
        words[:, 3] = torch.arange(text)
    return image.flatten(0, 1), words


def flux(seed: int = 0, **changes: Any) -> Oracle:
    """A grid that is not square; diffusers takes times from 0 to 1, and ids of all tokens."""
    import diffusers

    settings = {
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 10,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    } | changes
    module = randomized(diffusers.FluxTransformer2DModel(**settings), seed)
    rng = np.random.default_rng(seed)
    ids = _joint_ids(4, 5, 6, 3)

    def torch_call(sample: Any, text: Any, pooled: Any, timesteps: Any, guidance: Any) -> Any:
        guidance = guidance if settings["guidance_embeds"] else None
        times = timesteps.double() / 1000
        out = module(sample.flatten(1, 2), text, pooled, times, *ids, guidance).sample
        return out.unflatten(1, (4, 5))

    return Oracle(
        module,
        {
            "sample": rng.normal(size=(2, 4, 5, 4)).astype(np.float32),
            "text": rng.normal(size=(2, 6, 12)).astype(np.float32),
            "pooled": rng.normal(size=(2, 10)).astype(np.float32),
        },
        # Torch's frequencies have errors of the last bit, which larger strengths would magnify.
        {"timesteps": np.array([3, 901]), "guidance": np.array([0.03, 0.25], np.float32)},
        torch_call,
        lambda model, sample, text, pooled, timesteps, guidance: model(
            sample, timesteps, JointTextCondition(text, pooled, guidance)
        ),
    )


def sd3(seed: int = 0, **changes: Any) -> Oracle:
    """A grid that is not square, of three blocks, two of which attend twice."""
    import diffusers

    settings = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 10,
        "pos_embed_max_size": 12,
        "qk_norm": "rms_norm",
        "dual_attention_layers": (0, 1),
    } | changes
    module = randomized(diffusers.SD3Transformer2DModel(**settings), seed)
    rng = np.random.default_rng(seed)
    return Oracle(
        module,
        {
            "sample": rng.normal(size=(2, 8, 12, 4)).astype(np.float32),
            "text": rng.normal(size=(2, 5, 12)).astype(np.float32),
            "pooled": rng.normal(size=(2, 10)).astype(np.float32),
        },
        {"timesteps": np.array([3, 901])},
        lambda sample, text, pooled, timesteps: nhwc(
            module(nchw(sample), text, pooled, timesteps).sample
        ),
        lambda model, sample, text, pooled, timesteps: model(
            sample, timesteps, JointTextCondition(text, pooled)
        ),
    )


def cosmos(
    seed: int = 0, *, frames: bool = False, fps: float | None = 30.0, **changes: Any
) -> Oracle:
    """Three frames of a grid that is not square, with or without a mask of given frames.

    Without torchvision diffusers cannot resize the mask of padding: what stands in for it here is
    PyTorch's own function.
    """
    import diffusers
    import torch
    from diffusers.models.transformers import transformer_cosmos

    settings = {
        "in_channels": 5,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "text_embed_dim": 10,
        "adaln_lora_dim": 4,
        "max_size": (4, 16, 16),
    } | changes
    transformer_cosmos.transforms = types.SimpleNamespace(
        functional=types.SimpleNamespace(
            resize=lambda x, size, interpolation: torch.nn.functional.interpolate(
                x, size=tuple(size), mode=interpolation
            )
        ),
        InterpolationMode=types.SimpleNamespace(NEAREST="nearest"),
    )
    module = randomized(diffusers.CosmosTransformer3DModel(**settings), seed)
    rng = np.random.default_rng(seed)
    shape = (2, 3, 4, 6)
    inputs = {
        "sample": rng.normal(size=(*shape, 4)).astype(np.float32),
        "text": rng.normal(size=(2, 5, 10)).astype(np.float32),
    }
    if settings["in_channels"] == 5:
        inputs["mask"] = rng.normal(size=(2, 3)).astype(np.float32)
    if settings.get("concat_padding_mask", True):
        inputs["padding"] = rng.normal(size=(1, 10, 13)).astype(np.float32)
    times = rng.normal(size=(2, 3) if frames else 2).astype(np.float32)
    norm = torch.linalg.vector_norm

    def in_own_dtype(x: Any, *, dtype: Any, **options: Any) -> Any:
        return norm(x, **options)  # diffusers asks for float32, which float64 refuses

    def torch_call(sample: Any, text: Any, timesteps: Any, mask: Any = None, padding: Any = None):
        if mask is not None:
            mask = mask[:, None, :, None, None].expand(2, 1, *shape[1:])
        with unittest.mock.patch.object(torch.linalg, "vector_norm", in_own_dtype):
            out = module(
                sample.permute(0, 4, 1, 2, 3),
                timesteps[:, None, :, None, None] if frames else timesteps,
                text,
                fps=fps,
                condition_mask=mask,
                padding_mask=None if padding is None else padding[:, None],
            )
        return out.sample.permute(0, 2, 3, 4, 1)

    def jax_call(
        model: Any, sample: Any, text: Any, timesteps: Any, mask: Any = None, padding=None
    ):
        if padding is not None:
            padding = jnp.broadcast_to(padding, (2, *padding.shape[1:]))
        rate = None if fps is None else jnp.full(2, fps)
        return model(sample, timesteps, CosmosCondition(text, rate, mask, padding))

    return Oracle(module, inputs, {"timesteps": times}, torch_call, jax_call)


def hunyuan_video(seed: int = 0, *, whole_text: bool = False, **changes: Any) -> Oracle:
    """A grid of three lengths; diffusers takes guidance a thousandfold, and always a mask."""
    import diffusers
    import torch

    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 2,
        "text_embed_dim": 12,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 4, 8),
    } | changes
    module = randomized(diffusers.HunyuanVideoTransformer3DModel(**settings), seed)
    rng = np.random.default_rng(seed)
    mask = np.arange(7) < np.array([[7], [7 if whole_text else 4]])

    def torch_call(sample: Any, text: Any, pooled: Any, timesteps: Any, guidance: Any) -> Any:
        sample, shown = sample.permute(0, 4, 1, 2, 3), torch.tensor(mask)
        out = module(sample, timesteps, text, shown, pooled, 1000 * guidance).sample
        return out.permute(0, 2, 3, 4, 1)

    return Oracle(
        module,
        {
            "sample": rng.normal(size=(2, 3, 4, 6, 4)).astype(np.float32),
            "text": rng.normal(size=(2, 7, 12)).astype(np.float32),
            "pooled": rng.normal(size=(2, 8)).astype(np.float32),
        },
        {"timesteps": np.array([3, 901]), "guidance": np.array([0.03, 0.25], np.float32)},
        torch_call,
        lambda model, sample, text, pooled, timesteps, guidance: model(
            sample,
            timesteps,
            JointTextCondition(text, pooled, guidance, None if whole_text else jnp.asarray(mask)),
        ),
    )


def wan(seed: int = 0, *, times: tuple[int, ...] = (2,), **changes: Any) -> Oracle:
    """A video of unequal sides; times are one, one per video, or one per token."""
    import diffusers

    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 10,
        "ffn_dim": 20,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    } | changes
    module = randomized(diffusers.WanTransformer3DModel(**settings), seed)
    rng = np.random.default_rng(seed)

    def torch_call(sample: Any, text: Any, timesteps: Any) -> Any:
        timesteps = timesteps.flatten(1) if timesteps.ndim > 1 else timesteps.expand(2)
        out = module(sample.permute(0, 4, 1, 2, 3), timesteps, text).sample
        return out.permute(0, 2, 3, 4, 1)

    return Oracle(
        module,
        {
            "sample": rng.normal(size=(2, 4, 4, 6, 4)).astype(np.float32),
            "text": rng.normal(size=(2, 5, 10)).astype(np.float32),
        },
        {"timesteps": rng.integers(0, 1000, times)},
        torch_call,
        lambda model, sample, text, timesteps: model(sample, timesteps, text),
    )


def flux_2(seed: int = 0, **changes: Any) -> Oracle:
    """As `flux`; no pooled text."""
    import diffusers

    settings = {
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "guidance_embeds": False,
        "axes_dims_rope": (2, 4, 4, 6),
    } | changes
    module = randomized(diffusers.Flux2Transformer2DModel(**settings), seed)
    rng = np.random.default_rng(seed)
    ids = _joint_ids(4, 5, 6, 4)

    def torch_call(sample: Any, text: Any, timesteps: Any, guidance: Any) -> Any:
        guidance = guidance if settings["guidance_embeds"] else None
        times = timesteps.double() / 1000
        out = module(sample.flatten(1, 2), text, times, *ids, guidance).sample
        return out.unflatten(1, (4, 5))

    return Oracle(
        module,
        {
            "sample": rng.normal(size=(2, 4, 5, 4)).astype(np.float32),
            "text": rng.normal(size=(2, 6, 12)).astype(np.float32),
        },
        {"timesteps": np.array([3, 901]), "guidance": np.array([0.03, 0.25], np.float32)},
        torch_call,
        lambda model, sample, text, timesteps, guidance: model(
            sample, timesteps, JointTextCondition(text, guidance=guidance)
        ),
    )


def autoencoder(seed: int = 0, **changes: Any) -> Oracle:
    import diffusers
    import torch

    torch.manual_seed(seed)
    settings = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
    } | changes
    module = diffusers.AutoencoderKL(**settings).eval()

    def torch_call(image: Any) -> Any:
        posterior = module.encode(nchw(image)).latent_dist
        factor, shift = module.config.scaling_factor, module.config.shift_factor or 0.0
        scaled = (posterior.mean - shift) * factor
        decoded = module.decode(scaled / factor + shift).sample
        return torch.cat([nhwc(x).flatten() for x in (scaled, posterior.logvar, decoded)])

    def jax_call(model: Any, image: Any) -> Any:
        mean, logvar = model.encode(image)
        scaled = model.scale(mean)
        decoded = model.decode(model.unscale(scaled))
        return jnp.concatenate([x.ravel() for x in (scaled, logvar, decoded)])

    image = np.random.default_rng(seed).normal(size=(2, 16, 16, 3)).astype(np.float32)
    return Oracle(module, {"image": image}, {}, torch_call, jax_call)


def autoencoder_flux_2(seed: int = 0, **changes: Any) -> Oracle:
    """Encoded, as the diffusion model sees it, and decoded from that."""
    import diffusers
    import torch
    from diffusers import Flux2KleinPipeline

    torch.manual_seed(seed)
    settings = {
        "block_out_channels": (8, 16),
        "decoder_block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
    } | changes
    module = diffusers.AutoencoderKLFlux2(**settings).eval()
    module.bn.running_mean.normal_(0.3, 0.5)
    module.bn.running_var.uniform_(0.5, 2.0)
    module.bn.num_batches_tracked.fill_(7)

    def torch_call(image: Any) -> Any:
        mean = module.encode(nchw(image)).latent_dist.mean
        patches = module.bn(Flux2KleinPipeline._patchify_latents(mean))
        deviation = torch.sqrt(module.bn.running_var + module.config.batch_norm_eps)
        back = patches * deviation.view(1, -1, 1, 1) + module.bn.running_mean.view(1, -1, 1, 1)
        decoded = module.decode(Flux2KleinPipeline._unpatchify_latents(back)).sample
        return torch.cat([nhwc(x).flatten() for x in (patches, decoded)])

    def jax_call(model: Any, image: Any) -> Any:
        patches = model.scale(model.encode(image)[0])
        decoded = model.decode(model.unscale(patches))
        return jnp.concatenate([x.ravel() for x in (patches, decoded)])

    image = np.random.default_rng(seed).normal(size=(2, 8, 12, 3)).astype(np.float32)
    return Oracle(module, {"image": image}, {}, torch_call, jax_call)


def autoencoder_hunyuan_video(seed: int = 0, frames: int = 9, **changes: Any) -> Oracle:
    """Frames that are not square; of more than 16, encoded and decoded in pieces."""
    import diffusers
    import torch

    settings = {
        "block_out_channels": (8, 8, 12),
        "down_block_types": ("HunyuanVideoDownBlock3D",) * 3,
        "up_block_types": ("HunyuanVideoUpBlock3D",) * 3,
        "layers_per_block": 1,
        "norm_num_groups": 2,  # of pairs, a bias before a norm has all but no gradient
        "latent_channels": 4,
    } | changes
    module = randomized(diffusers.AutoencoderKLHunyuanVideo(**settings), seed)

    def torch_call(video: Any) -> Any:
        posterior = module.encode(video.permute(0, 4, 1, 2, 3)).latent_dist
        decoded = module.decode(posterior.mean).sample
        parts = (posterior.mean * module.config.scaling_factor, posterior.logvar, decoded)
        return torch.cat([x.permute(0, 2, 3, 4, 1).flatten() for x in parts])

    def jax_call(model: Any, video: Any) -> Any:
        mean, logvar = model.encode(video)
        scaled = model.scale(mean)
        decoded = model.decode(model.unscale(scaled))
        return jnp.concatenate([x.ravel() for x in (scaled, logvar, decoded)])

    video = np.random.default_rng(seed).normal(size=(2, frames, 16, 24, 3)).astype(np.float32)
    return Oracle(module, {"video": video}, {}, torch_call, jax_call)


def autoencoder_cosmos(
    seed: int = 0, *, size: tuple[int, int, int] = (9, 32, 48), **changes: Any
) -> Oracle:
    """Encoded, and decoded from that; the first blocks of the encoder, the last ones of the decoder
    attend too."""
    import diffusers
    import torch

    settings = {
        "latent_channels": 4,
        "encoder_block_out_channels": (8, 8, 12),
        "decode_block_out_channels": (8, 12, 12, 12),
        "num_layers": 1,
        "resolution": 64,
        "attention_resolutions": (16,),
        "latents_mean": list(np.linspace(-0.2, 0.3, 16)),
        "latents_std": list(np.linspace(0.5, 0.9, 16)),
    } | changes
    module = randomized(diffusers.AutoencoderKLCosmos(**settings), seed)

    def torch_call(video: Any) -> Any:
        latents = module.encode(video.permute(0, 4, 1, 2, 3)).latent_dist.mode()
        decoded = module.decode(latents).sample
        return torch.cat([x.permute(0, 2, 3, 4, 1).flatten() for x in (latents, decoded)])

    def jax_call(model: Any, video: Any) -> Any:
        latents, _ = model.encode(video)
        return jnp.concatenate([x.ravel() for x in (latents, model.decode(latents))])

    video = np.random.default_rng(seed).normal(size=(2, *size, 3)).astype(np.float32)
    return Oracle(module, {"video": video}, {}, torch_call, jax_call)


def autoencoder_wan(
    seed: int = 0, shape: tuple[int, int, int] = (5, 6, 8), **changes: Any
) -> Oracle:
    """Encoded, as the diffusion model sees it, and decoded from that; frame by frame in diffusers,
    whose pieces are of four frames."""
    import diffusers
    import torch

    rng = np.random.default_rng(seed)
    settings = {
        "base_dim": 6,
        "z_dim": 4,
        "dim_mult": [1, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [True],
        "latents_mean": [0.1, -0.2, 0.3, -0.4],
        "latents_std": [0.5, 2.0, 1.5, 0.75],
        "scale_factor_temporal": 2,
        "scale_factor_spatial": 2,
    } | changes
    module = randomized(diffusers.AutoencoderKLWan(**settings), seed)
    mean, std = (torch.tensor(settings[f"latents_{name}"]) for name in ("mean", "std"))

    def torch_call(video: Any) -> Any:
        posterior = module.encode(video.permute(0, 4, 1, 2, 3)).latent_dist
        latents, logvar = (x.permute(0, 2, 3, 4, 1) for x in (posterior.mean, posterior.logvar))
        scaled = (latents - mean) / std
        unscaled = (scaled * std + mean).permute(0, 4, 1, 2, 3)
        decoded = module.decode(unscaled).sample.permute(0, 2, 3, 4, 1)
        return torch.cat([x.flatten() for x in (scaled, logvar, decoded)])

    def jax_call(model: Any, video: Any) -> Any:
        mean, logvar = model.encode(video)
        scaled = model.scale(mean)
        decoded = model.decode(model.unscale(scaled))
        return jnp.concatenate([x.ravel() for x in (scaled, logvar, decoded)])

    video = rng.normal(size=(1, *shape, 3)).astype(np.float32)
    return Oracle(module, {"video": video}, {}, torch_call, jax_call)


# Wan 2.2's in small.
WAN_2_2_AUTOENCODER: dict[str, Any] = {
    "base_dim": 4,
    "decoder_base_dim": 6,
    "dim_mult": [1, 2, 2],
    "temperal_downsample": [False, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 8,
}


_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def _token_ids(eos: int) -> np.ndarray:
    ids = np.random.default_rng(1).integers(3, 90, (3, 7))
    ids[0, 4:], ids[1, 6], ids[2, 2:] = eos, eos, eos
    return ids


def clip_text(
    seed: int = 0, *, eos_token_id: int = 98, projection: bool = False, **changes: Any
) -> Oracle:
    """Last and penultimate hidden states, and the pooled state, projected or not."""
    import torch
    import transformers

    torch.manual_seed(seed)
    settings = {
        **_TOWER,
        "vocab_size": 99,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "projection_dim": 12,
    }
    config = transformers.CLIPTextConfig(**settings | changes, eos_token_id=eos_token_id)
    name = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    module = getattr(transformers, name)(config).eval()

    def torch_call(ids: Any) -> Any:
        out = module(input_ids=ids, output_hidden_states=True)
        pooled = out.text_embeds if projection else out.pooler_output
        parts = (out.last_hidden_state, pooled, out.hidden_states[-2])
        return torch.cat([part.flatten() for part in parts])

    def jax_call(model: Any, ids: Any) -> Any:
        return jnp.concatenate([part.ravel() for part in model(ids)])

    return Oracle(module, {}, {"ids": _token_ids(98)}, torch_call, jax_call)


def clip(seed: int = 0) -> Oracle:
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.CLIPConfig(
        text_config={**_TOWER, "vocab_size": 99, "eos_token_id": 98, "bos_token_id": 0},
        vision_config={**_TOWER, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    module = transformers.CLIPModel(config).eval()
    image = np.random.default_rng(seed).normal(size=(2, 16, 16, 3)).astype(np.float32)
    return Oracle(
        module,
        {"image": image},
        {"ids": _token_ids(98)},
        lambda image, ids: module(input_ids=ids, pixel_values=nchw(image)).logits_per_image,
        lambda model, image, ids: model(ids, image),
    )


def t5(seed: int = 0, *, name: str = "T5", masked: bool = False, **changes: Any) -> Oracle:
    """200 tokens, whose distances reach all buckets."""
    import transformers

    rng = np.random.default_rng(seed)
    settings = {
        "vocab_size": 50,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 24,
        "num_heads": 3,
        "num_layers": 3,
        "feed_forward_proj": "gated-gelu",
    } | changes
    config = getattr(transformers, f"{name}Config")(**settings)
    module = randomized(getattr(transformers, f"{name}EncoderModel")(config), seed)
    fixed = {"ids": rng.integers(0, 50, (2, 200))}
    if masked:
        fixed["mask"] = (np.arange(200) < np.array([[200], [77]])).astype(np.int64)
    return Oracle(
        module,
        {},
        fixed,
        lambda ids, mask=None: module(ids, attention_mask=mask).last_hidden_state,
        lambda model, ids, mask=None: model(ids, mask),
    )


def llama(seed: int = 0, **changes: Any) -> Oracle:
    """As `qwen3`, the third-last hidden states."""
    settings = {"name": "Llama", "lm": False, "read": (-3,), "head_dim": None, "rope_theta": 5e5}
    return qwen3(seed, **settings | changes)


def qwen3(
    seed: int = 0,
    *,
    read: tuple[int, ...] = (1, 2, 4),
    lm: bool = True,
    name: str = "Qwen3",
    **changes: Any,
) -> Oracle:
    """Hidden states of five layers, padded on the right; what is not read has no gradient."""
    import torch
    import transformers

    rng = np.random.default_rng(seed)
    settings = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_theta": 1e6,
    } | changes
    config = getattr(transformers, f"{name}Config")(**settings)
    kind = getattr(transformers, name + ("ForCausalLM" if lm else "Model"))
    module = randomized(kind(config), seed)

    def torch_call(ids: Any, mask: Any) -> Any:
        states = module(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return torch.stack([states[index] for index in read])

    return Oracle(
        module,
        {},
        {
            "ids": rng.integers(0, 50, (2, 9)),
            "mask": (np.arange(9) < np.array([[9], [6]])).astype(np.int64),
        },
        torch_call,
        lambda model, ids, mask: jnp.stack(model(ids, mask)),
        {"read": read},
    )


def torch_results(oracle: Oracle, dtype: Any, weights: np.ndarray | None = None):
    """Output, gradients of inputs and of parameters (by state-dict key) of `sum(w * output)`."""
    import torch

    module = oracle.module.to(dtype)
    module.zero_grad()
    inputs = {k: torch.tensor(v, dtype=dtype, requires_grad=True) for k, v in oracle.inputs.items()}
    output = oracle.torch_call(**inputs, **{k: torch.tensor(v) for k, v in oracle.fixed.items()})
    if weights is None:
        weights = np.random.default_rng(7).normal(size=tuple(output.shape))
    (output * torch.tensor(weights, dtype=dtype)).sum().backward()
    parameters = {
        key: None if p.grad is None else p.grad.numpy() for key, p in module.named_parameters()
    }
    return output.detach().numpy(), {k: v.grad.numpy() for k, v in inputs.items()}, parameters


def jax_results(oracle: Oracle, model: nnx.Module):
    """The same from our model."""
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    fixed = {key: jnp.asarray(value) for key, value in oracle.fixed.items()}

    @jax.jit
    def run(params: Any, inputs: Any, weights: Any) -> Any:
        def weighted(params: Any, inputs: Any) -> Any:
            output = oracle.jax_call(nnx.merge(graphdef, params), **inputs, **fixed)
            return jnp.sum(output * weights), output

        return jax.grad(weighted, argnums=(0, 1), has_aux=True)(params, inputs)

    shape = jax.eval_shape(
        lambda p, x: oracle.jax_call(nnx.merge(graphdef, p), **x, **fixed), params, oracle.inputs
    ).shape
    weights = np.random.default_rng(7).normal(size=shape)
    with jax.default_matmul_precision("highest"):
        (by_parameter, by_input), output = run(params, oracle.inputs, weights)
    by_path = {
        tuple(getattr(entry, "key", getattr(entry, "idx", None)) for entry in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(by_parameter)
    }
    by_key = {
        spec.key: spec.to_torch(np.asarray(by_path[spec.path])) for spec in tensor_specs(model)
    }
    return np.asarray(output), {k: np.asarray(v) for k, v in by_input.items()}, by_key


def relative_error(received: np.ndarray, exact: np.ndarray) -> float:
    """Norm of the difference over the norm of the exact values."""
    return float(np.linalg.norm(received - exact) / max(np.linalg.norm(exact), 1e-30))
