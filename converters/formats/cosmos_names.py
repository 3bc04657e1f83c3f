"""The names of Cosmos' transformers and tokenizer in NVIDIA's files beside diffusers'.

Tables as `names` reads them, and the sizes that shapes in such files tell.  What they do not tell
is as published: how far positions are stretched, by a model's width; that the mask of padding is a
channel of input; and the epsilon of the norms of queries and keys, 1e-6 there.  The statistics of a
tokenizer's latents are in another file of its folder, and taken to be those of CV8x8x8.
"""

from collections.abc import Mapping
from typing import Any

from ...flax_models.autoencoder_kl_cosmos import AutoencoderKLCosmosConfig
from .names import Shapes, Table, count, prefixed

_LINEARS = ("linear_1", "linear_2")
_ENDS = {
    "x_embedder.proj.1": "patch_embed.proj",
    **{f"t_embedder.1.{name}": f"time_embed.t_embedder.{name}" for name in _LINEARS},
    "final_layer.linear": "proj_out",
}
_PREDICT1 = {
    **_ENDS,
    "affline_norm": "time_embed.norm",
    **{f"extra_pos_embedder.pos_emb_{x}": f"learnable_pos_embed.pos_emb_{x}" for x in "thw"},
    **{f"final_layer.adaLN_modulation.{n}": f"norm_out.linear_{n}" for n in (1, 2)},
}
_PREDICT1_ATTENTION = {
    "to_q.0": "to_q",
    "to_q.1": "norm_q",
    "to_k.0": "to_k",
    "to_k.1": "norm_k",
    "to_v.0": "to_v",
    "to_out.0": "to_out.0",
}
_PREDICT1_BLOCK = {
    **prefixed("blocks.0.block.attn", "attn1", _PREDICT1_ATTENTION),
    **prefixed("blocks.1.block.attn", "attn2", _PREDICT1_ATTENTION),
    "blocks.2.block.layer1": "ff.net.0.proj",
    "blocks.2.block.layer2": "ff.net.2",
    **{
        f"blocks.{n}.adaLN_modulation.{k}": f"norm{n + 1}.linear_{k}"
        for n in range(3)
        for k in (1, 2)
    },
}
_PREDICT2 = {
    **_ENDS,
    "t_embedding_norm": "time_embed.norm",
    **{f"final_layer.adaln_modulation.{n}": f"norm_out.linear_{n}" for n in (1, 2)},
}
_PREDICT2_ATTENTION = {
    "q_proj": "to_q",
    "q_norm": "norm_q",
    "k_proj": "to_k",
    "k_norm": "norm_k",
    "v_proj": "to_v",
    "output_proj": "to_out.0",
}
_PREDICT2_BLOCK = {
    **prefixed("self_attn", "attn1", _PREDICT2_ATTENTION),
    **prefixed("cross_attn", "attn2", _PREDICT2_ATTENTION),
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
    **{
        f"adaln_modulation_{part}.{k}": f"norm{n}.linear_{k}"
        for n, part in enumerate(("self_attn", "cross_attn", "mlp"), 1)
        for k in (1, 2)
    },
}
_CONV = {"0.conv3d": "conv_s", "1.conv3d": "conv_t"}
_RESNET = {
    "norm1.norm": "norm1.norm",
    **prefixed("conv1", "conv1", _CONV),
    "norm2.norm": "norm2.norm",
    **prefixed("conv2", "conv2", _CONV),
    "nin_shortcut.conv3d": "conv_shortcut",
}
_ATTENTION = {
    "norm.norm": "norm.norm",
    **{f"{name}.conv3d": f"to_{name}" for name in "qkv"},
    "proj_out.conv3d": "to_out.0",
}
_HALF = {
    **prefixed("conv_in", "conv_in", _CONV),
    **prefixed("mid.block_1", "mid_block.resnets.0", _RESNET),
    **prefixed("mid.attn_1.0", "mid_block.attentions.0", _ATTENTION),
    **prefixed("mid.attn_1.1", "mid_block.temp_attentions.0", _ATTENTION),
    **prefixed("mid.block_2", "mid_block.resnets.1", _RESNET),
    "norm_out.norm": "norm_out.norm",
    **prefixed("conv_out", "conv_out", _CONV),
}
_RESAMPLE = {f"conv{n}.conv3d": f"conv{n}" for n in (1, 2, 3)}

# Keys that no other model's files have.
PREDICT1_KEY = "blocks.block0.blocks.0.block.attn.to_q.0.weight"
PREDICT2_KEY = "blocks.0.adaln_modulation_self_attn.1.weight"
VAE_KEY = "decoder.mid.attn_1.1.q.conv3d.weight"
# What such files hold beside, harmless and not loaded.
BUFFERS = r"logvar\.\d\..*|pos_embedder\..*|accum_.*|(.*\.)?_extra_state"
VAE_BUFFERS = r".*\.(wavelets|_arange|patch_size_buffer)"
# By whether it is Predict2, takes a mask of given frames, and the width.
_SCALES = {
    (False, False, 4096): (2.0, 1.0, 1.0),
    (False, True, 4096): (2.0, 1.0, 1.0),
    (False, False, 5120): (2.0, 2.0, 2.0),
    (False, True, 5120): (2.0, 2.0, 2.0),
    (True, False, 2048): (1.0, 4.0, 4.0),
    (True, False, 5120): (1.0, 4.0, 4.0),
    (True, True, 2048): (1.0, 3.0, 3.0),
    (True, True, 5120): (20 / 24, 2.0, 2.0),
}
_PATCH = 2  # latents along a side of a patch
_LAYER, _LAYERS = ".2.block.layer1", "blocks.block{}.blocks.2.block.layer1.weight"


def cosmos_names(raw: Mapping[str, Any]) -> Table:
    """NVIDIA's paths in a transformer with these settings -> diffusers'."""
    first = raw["extra_pos_embed_type"] is not None
    table = dict(_PREDICT1 if first else _PREDICT2)
    for layer in range(raw["num_layers"]):
        old = f"blocks.block{layer}" if first else f"blocks.{layer}"
        block = _PREDICT1_BLOCK if first else _PREDICT2_BLOCK
        table |= prefixed(old, f"transformer_blocks.{layer}", block)
    return table


def cosmos(shapes: Shapes) -> dict[str, Any]:
    """The settings of a transformer, under their published names.

    Raises:
      KeyError, ValueError: a tensor that tells a size is missing, or has an odd shape.
    """
    second = PREDICT2_KEY in shapes
    block = "blocks.0" if second else "blocks.block0.blocks"
    query, key, lora, hidden = (
        (".self_attn.q_norm", ".cross_attn.k_proj", ".adaln_modulation_self_attn.1", ".mlp.layer1")
        if second
        else (".0.block.attn.to_q.1", ".1.block.attn.to_k.0", ".0.adaLN_modulation.1", _LAYER)
    )
    width, inputs = shapes["x_embedder.proj.1.weight"]
    (head,) = shapes[f"{block}{query}.weight"]
    channels, odd = divmod(inputs, _PATCH**2)
    out, rest = divmod(shapes["final_layer.linear.weight"][0], _PATCH**2)
    if odd or rest or channels < 2 or head < 1 or width % head:
        raise ValueError("x_embedder.proj.1 or final_layer.linear")
    raw = {
        "in_channels": channels - 1,
        "out_channels": out,
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "num_layers": count(shapes, PREDICT2_KEY.replace("0", "{}") if second else _LAYERS),
        "mlp_ratio": shapes[f"{block}{hidden}.weight"][0] / width,
        "text_embed_dim": shapes[f"{block}{key}.weight"][1],
        "adaln_lora_dim": shapes[f"{block}{lora}.weight"][0],
        "max_size": [128, 240, 240],
        "patch_size": [1, _PATCH, _PATCH],
        "rope_scale": list(_SCALES.get((second, channels - 1 > out, width), (1.0, 1.0, 1.0))),
        "concat_padding_mask": True,
        "extra_pos_embed_type": None if second else "learnable",
        "qk_norm_eps": 1e-6,
    }
    if not second:
        tokens = [shapes[f"extra_pos_embedder.pos_emb_{axis}"][0] for axis in "thw"]
        raw["max_size"] = [n * p for n, p in zip(tokens, raw["patch_size"], strict=True)]
    return raw


def cosmos_vae_names(raw: Mapping[str, Any]) -> Table:
    """NVIDIA's paths in a tokenizer with these settings -> diffusers'."""
    table: dict[str, Any] = {f"{name}.conv3d": name for name in ("quant_conv", "post_quant_conv")}
    down = len(raw["encoder_block_out_channels"]) - 1
    up = len(raw["decode_block_out_channels"]) - 1
    for half, way, levels, layers in (
        ("encoder", "down", down, raw["num_layers"]),
        ("decoder", "up", up, raw["num_layers"] + 1),
    ):
        table |= prefixed(half, half, _HALF)
        for level in range(levels):
            # The decoder's finest comes first there.
            own = level if way == "down" else levels - 1 - level
            old, new = f"{half}.{way}.{level}", f"{half}.{way}_blocks.{own}"
            for layer in range(layers):
                table |= prefixed(f"{old}.block.{layer}", f"{new}.resnets.{layer}", _RESNET)
            table |= prefixed(f"{old}.{way}sample", f"{new}.{way}samplers.0", _RESAMPLE)
    return table


def cosmos_vae(shapes: Shapes) -> dict[str, Any]:
    """The settings of a tokenizer, under their published names.

    Raises:
      KeyError, ValueError: a tensor that tells a size is missing, or has an odd shape.
    """
    convolution = "{}.block.0.conv1.0.conv3d.weight"
    first, inner = shapes["encoder.conv_in.0.conv3d.weight"][:2]
    down, up = (
        [
            shapes[convolution.format(f"{half}.{level}")][0]
            for level in range(count(shapes, f"{half}.{convolution}"))
        ]
        for half in ("encoder.down", "decoder.up")
    )
    published = AutoencoderKLCosmosConfig()
    patch, colors = published.patch_size, published.in_channels
    if inner != colors * patch**3:
        raise ValueError("encoder.conv_in.0.conv3d")
    halved = [f"encoder.down.{level}.downsample.conv" for level in range(len(down))]
    space, time = (
        patch * 2 ** sum(f"{each}{n}.conv3d.weight" in shapes for each in halved) for n in (1, 2)
    )
    latents = shapes["quant_conv.conv3d.weight"][0]
    raw = published.to_dict() | {
        "_class_name": "AutoencoderKLCosmos",
        "out_channels": shapes["decoder.conv_out.0.conv3d.weight"][0] // patch**3,
        "latent_channels": latents,
        "encoder_block_out_channels": [first, *down],
        "decode_block_out_channels": [*up, shapes["decoder.conv_in.0.conv3d.weight"][0]],
        "num_layers": count(shapes, "encoder.down.0.block.{}.conv1.0.conv3d.weight"),
        "spatial_compression_ratio": space,
        "temporal_compression_ratio": time,
    }
    if (latents, space, time) != (16, 8, 8):  # no statistics are known
        raw |= {"latents_mean": None, "latents_std": None}
    return raw
