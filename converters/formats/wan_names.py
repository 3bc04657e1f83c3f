"""The names of Wan's transformer, autoencoder and UMT5 in its publisher's files beside diffusers'.

Tables as `names` reads them, and the sizes of the autoencoder, told by the shapes in its file.
"""

from collections.abc import Mapping
from typing import Any

from ...flax_models.autoencoder_kl_wan import AutoencoderKLWanConfig
from .names import Shapes, Table, count, prefixed

_TRANSFORMER = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_BLOCK = {
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",  # of the attention to the text: numbers are by use here, by place there
    "modulation": "scale_shift_table",
    **{
        f"{old}.{a}": f"{new}.{b}"
        for old, new in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for a, b in (
            *((name, f"to_{name}") for name in "qkv"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    },
}
_RESNET = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_RESAMPLE = {"resample.1": "resample.1", "time_conv": "time_conv"}
_ATTENTION = {name: name for name in ("norm", "to_qkv", "proj")}
_ENDS = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}
_UMT5 = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
_UMT5_LAYER = {
    "norm1": "layer.0.layer_norm",
    **{f"attn.{name}": f"layer.0.SelfAttention.{name}" for name in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}

# Keys that no other model's files have.
TRANSFORMER_KEY = "head.modulation"
VAE_KEY = "decoder.middle.0.residual.0.gamma"
UMT5_KEY = "blocks.0.pos_embedding.embedding.weight"
_HEAD = 128  # features of a head of every published transformer
_PATCH = 2  # pixels along a side of a patch of Wan 2.2's autoencoder


def wan_names(layers: int) -> Table:
    """Paths in a transformer of so many blocks -> diffusers'."""
    table = dict(_TRANSFORMER)
    for layer in range(layers):
        table |= prefixed(f"blocks.{layer}", f"blocks.{layer}", _BLOCK)
    return table


def wan(shapes: Shapes) -> dict[str, Any]:
    """The settings of a transformer, under their published names.

    Raises:
      KeyError, ValueError: a tensor that tells a size is missing, or has an odd shape.
    """
    width, channels, *patch = shapes["patch_embedding.weight"]
    time, rows, columns = patch
    out, odd = divmod(shapes["head.head.weight"][0], max(time * rows * columns, 1))
    if odd or width % _HEAD:
        raise ValueError("head.head or patch_embedding")
    return {
        "patch_size": patch,
        "num_attention_heads": width // _HEAD,
        "attention_head_dim": _HEAD,
        "in_channels": channels,
        "out_channels": out,
        "text_dim": shapes["text_embedding.0.weight"][1],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "num_layers": count(shapes, "blocks.{}.modulation"),
        "cross_attn_norm": "blocks.0.norm3.weight" in shapes,
        "eps": 1e-6,
        "rope_max_seq_len": 1024,
        "qk_norm": "rms_norm_across_heads",
        **dict.fromkeys(("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")),
    }


def wan_vae_names(raw: Mapping[str, Any]) -> Table:
    """Paths in an autoencoder with these settings -> diffusers'."""
    levels, layers = len(raw["dim_mult"]), raw["num_res_blocks"]
    table: dict[str, Any] = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        table |= prefixed(half, half, _ENDS)
        middle = {}
        for place, (part, names) in enumerate(
            (("resnets.0", _RESNET), ("attentions.0", _ATTENTION), ("resnets.1", _RESNET))
        ):
            middle |= prefixed(f"middle.{place}", f"mid_block.{part}", names)
        table |= prefixed(half, half, middle)
    for half, way, each in (("encoder", "down", layers), ("decoder", "up", layers + 1)):
        for level in range(levels):
            block = f"{half}.{way}_blocks.{level}"
            for place in range(each + (level < levels - 1)):
                flat = f"{half}.{way}samples.{level * (each + 1) + place}"
                old = f"{half}.{way}samples.{level}.{way}samples.{place}"
                resamples = place == each
                if raw["is_residual"]:
                    new = f"{block}.{way}sampler" if resamples else f"{block}.resnets.{place}"
                elif way == "down":
                    old, new = flat, flat.replace("downsamples", "down_blocks")
                else:
                    old = flat
                    new = f"{block}.upsamplers.0" if resamples else f"{block}.resnets.{place}"
                table |= prefixed(old, new, _RESAMPLE if resamples else _RESNET)
    return table


def wan_vae(shapes: Shapes) -> dict[str, Any]:
    """The settings of an autoencoder, under their published names.

    Raises:
      KeyError, ValueError: a tensor that tells a size is missing, or has an odd shape.
    """
    residual = "encoder.downsamples.0.downsamples.0.residual.2.weight" in shapes
    form = "encoder.downsamples.{}" + (".downsamples.{}" if residual else "")
    blocks: list[list[str]] = [[]]  # of each level, the last one of which resamples
    for place in range(len(shapes)):
        if residual:
            number = count(shapes, form.format(place, "{}") + ".residual.2.weight")
            there = [form.format(place, each) for each in range(number)]
            last = form.format(place, number)
        else:
            last = form.format(place)
            there = [last] if f"{last}.residual.2.weight" in shapes else []
        blocks[-1] += there
        if f"{last}.resample.1.weight" in shapes:
            blocks[-1].append(last)
            blocks.append([])
        elif residual or not there:
            break
    channels = [shapes[f"{each[0]}.residual.6.weight"][0] for each in blocks]
    base, inner = shapes["encoder.conv1.weight"][:2]
    (decoder, *_), (out, *_) = shapes["decoder.head.0.gamma"], shapes["decoder.head.2.weight"]
    multiples, odd = zip(*(divmod(each, max(base, 1)) for each in channels), strict=True)
    if any(odd) or not multiples[0] or decoder % multiples[0]:
        raise ValueError("encoder.downsamples or decoder.head")
    latents = shapes["conv2.weight"][0]
    published = (AutoencoderKLWanConfig.wan_2_1(), AutoencoderKLWanConfig.wan_2_2())
    scale = next((each for each in published if each.z_dim == latents), None)
    if scale is None:
        raise ValueError(f"{latents} channels of latents, whose scale nothing tells: conv2.weight")
    patch = _PATCH if residual else None
    decoder //= multiples[0]
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": base,
        "decoder_base_dim": None if decoder == base else decoder,
        "z_dim": latents,
        "dim_mult": list(multiples),
        "num_res_blocks": len(blocks[-1]),
        "temperal_downsample": [f"{each[-1]}.time_conv.weight" in shapes for each in blocks[:-1]],
        "latents_mean": list(scale.latents_mean),
        "latents_std": list(scale.latents_std),
        "is_residual": residual,
        "in_channels": inner,
        "out_channels": out,
        "patch_size": patch,
        "scale_factor_temporal": 2 ** sum(f"{e[-1]}.time_conv.weight" in shapes for e in blocks),
        "scale_factor_spatial": 2 ** (len(blocks) - 1) * (patch or 1),
    }


def umt5_names(layers: int) -> Table:
    """Paths in UMT5 of so many layers -> transformers'."""
    table = dict(_UMT5)
    for layer in range(layers):
        table |= prefixed(f"blocks.{layer}", f"encoder.block.{layer}", _UMT5_LAYER)
    return table
