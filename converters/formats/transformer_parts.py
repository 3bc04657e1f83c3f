"""Sizes of FLUX, HunyuanVideo, Stable Diffusion 3, Wan and T5 told by shapes in a single file.

What shapes do not tell is as published: the split of a head's features among the axes of the
rotary embedding, heads of 64 features where Stable Diffusion 3 has no norm of its own for them, and
of 128 in Wan.
"""

import math
from typing import Any

from .cosmos_names import PREDICT1_KEY, PREDICT2_KEY, cosmos, cosmos_names
from .names import Shapes, Stored, Table, count, shapes_of, split
from .transformer_names import (
    flux_2_names,
    flux_names,
    hunyuan_names,
    sd_3_names,
    t5_gguf_names,
)
from .wan_names import TRANSFORMER_KEY, UMT5_KEY, umt5_names, wan, wan_names

Taken = tuple[dict[str, Any], Stored, list[str]]  # settings, tensors, keys of no place

FLUX, FLUX_2, SD_3, WAN, COSMOS = "FLUX.1", "FLUX.2", "SD 3", "Wan", "Cosmos"
HUNYUAN = "HunyuanVideo"
# Keys of each that no other model has, behind the prefix.
TELLING = {
    FLUX: ("double_blocks.0.img_mod.lin.weight",),
    FLUX_2: ("double_stream_modulation_img.lin.weight",),
    SD_3: ("joint_blocks.0.x_block.adaLN_modulation.1.weight",),
    HUNYUAN: ("txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.weight",),
    WAN: (TRANSFORMER_KEY,),
    COSMOS: (PREDICT1_KEY, PREDICT2_KEY),
}
CLASSES = {
    FLUX: "FluxTransformer2DModel",
    FLUX_2: "Flux2Transformer2DModel",
    SD_3: "SD3Transformer2DModel",
    WAN: "WanTransformer3DModel",
    COSMOS: "CosmosTransformer3DModel",
    HUNYUAN: "HunyuanVideoTransformer3DModel",
}
# Of HunyuanVideo's autoencoder, which no other one of causal convolutions has.
HUNYUAN_VAE_KEY = "encoder.down_blocks.1.resnets.0.conv_shortcut.conv.weight"
_DOUBLE, _SINGLE = "double_blocks.{}.img_attn.qkv.weight", "single_blocks.{}.linear1.weight"
_JOINT = "joint_blocks.{}.x_block.attn.qkv.weight"
_REFINER = "txt_in.individual_token_refiner.blocks.{}.self_attn_qkv.weight"
_HEAD = 64  # of Stable Diffusion 3
_WAN_SIZES = {(12, 16): "2.1 1.3B", (40, 16): "14B", (24, 48): "2.2 5B"}  # by heads and channels
_FROM_TEXT = {"Predict1": "Text2World", "Predict2": "Text2Image"}
_T5_LAYER = "encoder.block.{}.layer.0.layer_norm.weight"
_T5_ATTENTION = "encoder.block.0.layer.0.SelfAttention"
T5_GGUF = "enc.blk.{}.attn_norm.weight"
_UMT5_LAYER = "blocks.{}.pos_embedding.embedding.weight"
# A layer behind the first has a bias of its own in UMT5 alone.
UMT5_KEYS = (
    UMT5_KEY,
    "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
    "enc.blk.1.attn_rel_b.weight",
)


def table_of(family: str, raw: dict[str, Any]) -> Table:
    """The names of a transformer with these settings, its publisher's -> diffusers'."""
    if family == SD_3:
        return sd_3_names(raw["num_layers"], raw["dual_attention_layers"])
    if family == WAN:
        return wan_names(raw["num_layers"])
    if family == COSMOS:
        return cosmos_names(raw)
    layers = raw["num_layers"], raw["num_single_layers"]
    if family == HUNYUAN:
        return hunyuan_names(*layers, raw["num_refiner_layers"])
    return (flux_names if family == FLUX else flux_2_names)(*layers)


def transformer(tensors: Stored, family: str) -> Taken:
    """The settings of a transformer, under their published names, its tensors, and odd keys.

    Raises:
      KeyError, IndexError, ValueError: a tensor that tells a size is missing, or has an odd shape.
    """
    shapes = shapes_of(tensors)
    told = {
        FLUX: _flux,
        FLUX_2: _flux_2,
        SD_3: _sd_3,
        HUNYUAN: _hunyuan,
        WAN: wan,
        COSMOS: cosmos,
    }
    raw = told[family](shapes)
    return {"_class_name": CLASSES[family], **raw}, *split(tensors, table_of(family, raw))


def variant(family: str, raw: dict[str, Any]) -> str:
    """Which of a family's models it is, in a word or two; "" where that is not told."""
    if family == FLUX:
        extra = {128: "Canny or Depth", 384: "Fill"}.get(raw["in_channels"])
        return extra or ("dev" if raw["guidance_embeds"] else "schnell")
    if family == FLUX_2:
        return "dev" if raw["guidance_embeds"] else "klein"
    if family == HUNYUAN:
        return ""
    if family == WAN:
        return _WAN_SIZES.get((raw["num_attention_heads"], raw["in_channels"]), "")
    if family == COSMOS:
        generation = "Predict1" if raw["extra_pos_embed_type"] else "Predict2"
        kind = "Video2World" if raw["in_channels"] > raw["out_channels"] else _FROM_TEXT[generation]
        return f"{generation} {kind}"
    if raw["qk_norm"] is None:
        return "medium"
    return "3.5 medium" if raw["dual_attention_layers"] else "3.5 large"


def _heads(width: int, head: int) -> dict[str, int]:
    if head < 1 or width % head:
        raise ValueError(f"{width} features in heads of {head}")
    return {"attention_head_dim": head, "num_attention_heads": width // head}


def _blocks(shapes: Shapes) -> dict[str, Any]:
    """What both FLUX have in common."""
    width, channels = shapes["img_in.weight"]
    (head,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
    out = shapes["final_layer.linear.weight"][0]
    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": None if out == channels else out,
        "num_layers": count(shapes, _DOUBLE),
        "num_single_layers": count(shapes, _SINGLE),
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        **_heads(width, head),
    }


def _axes(head: int) -> list[int]:
    """16, 56 and 56 of 128."""
    first = head // 16 * 2
    return [first, *[(head - first) // 2] * 2]


def _flux(shapes: Shapes) -> dict[str, Any]:
    raw = _blocks(shapes)
    return raw | {
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "axes_dims_rope": _axes(raw["attention_head_dim"]),
    }


def _hunyuan(shapes: Shapes) -> dict[str, Any]:
    width, channels, frames, patch, _ = shapes["img_in.proj.weight"]
    (head,) = shapes["double_blocks.0.img_attn_q_norm.weight"]
    out, odd = divmod(shapes["final_layer.linear.weight"][0], max(frames * patch**2, 1))
    if odd:
        raise ValueError("final_layer.linear")
    return {
        "in_channels": channels,
        "out_channels": out,
        "num_layers": count(shapes, "double_blocks.{}.img_attn_qkv.weight"),
        "num_single_layers": count(shapes, _SINGLE),
        "num_refiner_layers": count(shapes, _REFINER),
        "mlp_ratio": 4.0,
        "patch_size": patch,
        "patch_size_t": frames,
        "qk_norm": "rms_norm",
        "guidance_embeds": "guidance_in.mlp.0.weight" in shapes,
        "text_embed_dim": shapes["txt_in.input_embedder.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "rope_theta": 256.0,
        "rope_axes_dim": _axes(head),
        "image_condition_type": None,
        **_heads(width, head),
    }


def hunyuan_vae(shapes: Shapes) -> dict[str, Any]:
    """The settings of HunyuanVideo's autoencoder, whose names Tencent's file shares with diffusers.

    Raises:
      KeyError, ValueError: a tensor that tells a size is missing, or has an odd shape.
    """
    first = "encoder.down_blocks.{}.resnets.0.conv1.conv.weight"
    levels = count(shapes, first)
    out, *_ = shapes["decoder.conv_out.conv.weight"]
    _, latents, *_ = shapes["decoder.conv_in.conv.weight"]
    _, channels, *_ = shapes["encoder.conv_in.conv.weight"]
    return {
        "_class_name": "AutoencoderKLHunyuanVideo",
        "in_channels": channels,
        "out_channels": out,
        "latent_channels": latents,
        "block_out_channels": [shapes[first.format(level)][0] for level in range(levels)],
        "down_block_types": ["HunyuanVideoDownBlock3D"] * levels,
        "up_block_types": ["HunyuanVideoUpBlock3D"] * levels,
        "layers_per_block": count(shapes, "encoder.down_blocks.0.resnets.{}.conv1.conv.weight"),
        "norm_num_groups": 32,
        "scaling_factor": 0.476986,
        "spatial_compression_ratio": 8,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in shapes,
    }


def _flux_2(shapes: Shapes) -> dict[str, Any]:
    raw = _blocks(shapes)
    width, hidden = shapes["double_blocks.0.img_mlp.2.weight"]
    return raw | {
        "timestep_guidance_channels": shapes["time_in.in_layer.weight"][1],
        "mlp_ratio": hidden / width,
        "axes_dims_rope": [raw["attention_head_dim"] // 4] * 4,
        "rope_theta": 2000,
        "eps": 1e-6,
    }


def _sd_3(shapes: Shapes) -> dict[str, Any]:
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    layers = count(shapes, _JOINT)
    dual = "joint_blocks.{}.x_block.attn2.qkv.weight"
    norm = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight")
    side = math.isqrt(shapes["pos_embed"][1])
    out, odd = divmod(shapes["final_layer.linear.weight"][0], max(patch, 1) ** 2)
    if odd or side**2 != shapes["pos_embed"][1]:
        raise ValueError("pos_embed or final_layer.linear")
    return {
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": out,
        "num_layers": layers,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": side,
        "qk_norm": None if norm is None else "rms_norm",
        "dual_attention_layers": [n for n in range(layers) if dual.format(n) in shapes],
        **_heads(width, _HEAD if norm is None else norm[0]),
    }


def t5(tensors: Stored) -> Taken:
    """Of an encoder of T5 what `transformer` tells of a transformer."""
    odd: list[str] = []
    kind = "T5" if tensors.keys().isdisjoint(UMT5_KEYS) else "UMT5"
    if T5_GGUF.format(0) in tensors:
        layers = count(shapes_of(tensors), T5_GGUF)
        tensors, odd = split(tensors, t5_gguf_names(layers))
    elif UMT5_KEY in tensors:
        tensors, odd = split(tensors, umt5_names(count(shapes_of(tensors), _UMT5_LAYER)))
    shapes = shapes_of(tensors)
    vocabulary, width = shapes["shared.weight"]
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in shapes
    buckets, heads = shapes[f"{_T5_ATTENTION}.relative_attention_bias.weight"]
    inner = shapes[f"{_T5_ATTENTION}.q.weight"][0]
    if heads < 1 or inner % heads:
        raise ValueError(f"{inner} features in {heads} heads")
    raw = {
        "architectures": [f"{kind}EncoderModel"],
        "model_type": kind.lower(),
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wo.weight"][1],
        "num_layers": count(shapes, _T5_LAYER),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "layer_norm_epsilon": 1e-6,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "is_encoder_decoder": True,
    }
    return raw, tensors, odd
