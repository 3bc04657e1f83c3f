"""A single file of CompVis taken apart by names and shapes alone: its models and their settings.

What shapes do not tell is as published: heads of 64 features where projections are linear, else 8
heads, and 32 groups.
"""

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np

from .compvis_names import (
    LEFTOVERS,
    PROJECTIONS,
    TEXT_ENCODERS,
    UNET,
    VAE,
    Names,
    TextEncoder,
    fused,
    open_clip_names,
    renamed,
    unet_names,
    vae_names,
)
from .errors import CheckpointError
from .safetensors_file import StoredTensor

_HEAD = 64
_PROJECTION = ("text_projection.weight",)  # beside a text tower, not in it
_CLASSES = {
    "unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}  # fmt: skip

Shapes = Mapping[str, tuple[int, ...]]
Stored = dict[str, StoredTensor]


class Part(NamedTuple):
    """One model of a single file: its class, settings as in a `config.json`, and its tensors."""

    class_name: str
    raw: dict[str, Any]
    tensors: Stored


class SingleFile(NamedTuple):
    """What a single file holds.

    Attributes:
      family: "SD 1", "SD 2" or "SDXL".
      parts: component -> model.
      leftovers: what is known and not loaded -> its keys.
      unknown: the other keys.
    """

    family: str
    parts: dict[str, Part]
    leftovers: dict[str, list[str]]
    unknown: list[str]


def is_single_file(keys: Collection[str]) -> bool:
    """Whether tensors have the names of CompVis's single files."""
    prefixes = (UNET, VAE, *(e.prefix for encoders in TEXT_ENCODERS.values() for e in encoders))
    return any(key.startswith(prefixes) for key in keys)


def read_single_file(stored: Stored, source: str) -> SingleFile:
    """Take a single file apart by names and shapes alone.

    Raises:
      CheckpointError: a tensor that tells a size is missing.
    """
    family, encoders = _family(stored)
    known: dict[str, tuple[str, TextEncoder | None]] = {UNET: ("unet", None), VAE: ("vae", None)}
    known |= {encoder.prefix: (encoder.component, encoder) for encoder in encoders}
    groups: dict[str, Stored] = {prefix: {} for prefix in known}
    leftovers: dict[str, list[str]] = {}
    unknown = []
    for key, tensor in stored.items():
        kind = next(
            (kind for kind, patterns in LEFTOVERS.items()
             if any(fnmatchcase(key, pattern) for pattern in patterns)), None,
        )  # fmt: skip
        prefix = next((prefix for prefix in known if key.startswith(prefix)), None)
        if kind is not None:
            leftovers.setdefault(kind, []).append(key)
        elif prefix is not None:
            groups[prefix][key.removeprefix(prefix)] = tensor
        else:
            unknown.append(key)

    parts: dict[str, Part] = {}
    for prefix, tensors in groups.items():
        if not tensors:
            continue
        component, encoder = known[prefix]
        try:
            if component == "unet":
                raw, found, odd = _unet(tensors)
            elif component == "vae":
                raw, found, odd = _vae(tensors, family)
            else:
                assert encoder is not None
                raw, found, odd = _text(tensors, encoder)
        except (KeyError, IndexError, ValueError) as error:
            raise CheckpointError(
                f"{source}: the sizes of its {component} cannot be told ({error} is missing or "
                "has an odd shape). It is incomplete, or of another architecture."
            ) from error
        parts[component] = Part(_CLASSES[component], raw, found)
        unknown += [prefix + key for key in odd]
        if encoder is not None and encoder.dropped:
            last = raw["num_hidden_layers"]
            dropped = [k for k in tensors if k.startswith(f"transformer.resblocks.{last}.")]
            leftovers["the last layer of the text encoder, which nothing reads"] = [
                prefix + key for key in dropped
            ]
    return SingleFile(family, parts, leftovers, sorted(unknown))


def _family(stored: Stored) -> tuple[str, tuple[TextEncoder, ...]]:
    for family, encoders in TEXT_ENCODERS.items():
        if any(key.startswith(encoder.prefix) for key in stored for encoder in encoders):
            return family, encoders
    context = next(
        (tensor.shape[-1] for key, tensor in stored.items()
         if key.startswith(UNET) and key.endswith("attn2.to_k.weight") and tensor.shape), 0,
    )  # fmt: skip
    family = {1024: "SD 2", 2048: "SDXL"}.get(context, "SD 1")
    return family, TEXT_ENCODERS[family]


def heads(width: int) -> int:
    """Attention heads of 64 features."""
    return max(width // _HEAD, 1)


def _shapes(tensors: Stored) -> Shapes:
    return {key: tensor.shape for key, tensor in tensors.items()}


def _count(shapes: Shapes, form: str) -> int:
    """How many of the keys `form.format(0)`, `form.format(1)`, ... there are without a gap."""
    number = 0
    while form.format(number) in shapes:
        number += 1
    return number


def _apply(tensors: Stored, names: Names) -> tuple[Stored, list[str]]:
    """The tensors under their new names, and the keys that have none."""
    found, odd = {}, []
    for key, tensor in tensors.items():
        new = renamed(key, names)
        if new is None:
            odd.append(key)
        else:
            found[new] = tensor
    return found, odd


def _unet(tensors: Stored) -> tuple[dict[str, Any], Stored, list[str]]:
    raw = unet_config(_shapes(tensors))
    found, odd = _apply(tensors, unet_names_of(raw))
    return raw, found, odd


def unet_names_of(raw: Mapping[str, Any]) -> Names:
    """The names of a UNet with these settings, CompVis's -> diffusers'."""
    levels = len(raw["block_out_channels"])
    layers = raw["layers_per_block"]
    return unet_names(
        [layers] * levels if isinstance(layers, int) else layers,
        [kind.startswith("CrossAttn") for kind in raw["down_block_types"]],
    )


def unet_config(shapes: Shapes) -> dict[str, Any]:
    """The settings of a UNet, under their published names, from its shapes in a single file.

    Raises:
      KeyError, IndexError, ValueError: a tensor that tells a size is missing.
    """
    levels: list[list[tuple[int, int]]] = [[]]  # channels and transformer depth of each resnet
    place = 1
    while True:
        block = f"input_blocks.{place}"
        if f"{block}.0.op.weight" in shapes:
            levels.append([])
        elif f"{block}.0.in_layers.2.weight" in shapes:
            depth = _count(shapes, block + ".1.transformer_blocks.{}.norm1.weight")
            levels[-1].append((shapes[f"{block}.0.in_layers.2.weight"][0], depth))
        else:
            break
        place += 1
    if not all(levels):
        raise ValueError(f"input_blocks.{place}")
    middle = _count(shapes, "middle_block.1.transformer_blocks.{}.norm1.weight")
    channels = [level[0][0] for level in levels]
    attends = [level[0][1] > 0 for level in levels]
    layers = [len(level) for level in levels]
    depths = [max(level[0][1], 1) for level in levels]
    depths[-1] = middle or depths[-1]
    linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
    raw = {
        "_class_name": _CLASSES["unet"],
        "sample_size": 64,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "down_block_types": [("CrossAttn" if a else "") + "DownBlock2D" for a in attends],
        "up_block_types": [("CrossAttn" if a else "") + "UpBlock2D" for a in reversed(attends)],
        "block_out_channels": channels,
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "cross_attention_dim": shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        "transformer_layers_per_block": 1 if set(depths) == {1} else depths,
        "attention_head_dim": [heads(c) for c in channels] if linear else 8,
        "use_linear_projection": linear,
    }
    if (vector := shapes.get("label_emb.0.0.weight")) is not None:  # SDXL's sizes and crops
        raw |= {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": vector[1], "sample_size": 128,
        }  # fmt: skip
    return raw


def vae_config(shapes: Shapes, family: str) -> dict[str, Any]:
    """The settings of an autoencoder, as `unet_config` has those of a UNet."""
    levels = _count(shapes, "encoder.down.{}.block.0.conv1.weight")
    layers = _count(shapes, "encoder.down.0.block.{}.conv1.weight")
    return {
        "_class_name": _CLASSES["vae"],
        "sample_size": 1024 if family == "SDXL" else 512,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": [
            shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)
        ],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": layers,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "scaling_factor": 0.13025 if family == "SDXL" else 0.18215,
    }


def _vae(tensors: Stored, family: str) -> tuple[dict[str, Any], Stored, list[str]]:
    raw = vae_config(_shapes(tensors), family)
    names = vae_names(len(raw["block_out_channels"]), raw["layers_per_block"])
    found, odd = _apply(tensors, names)
    for key, tensor in found.items():
        if ".attentions." in key and len(tensor.shape) == 4 and tensor.shape[2:] == (1, 1):
            found[key] = _reshaped(tensor, tensor.shape[:2])  # convolutions of one pixel
    return raw, found, odd


def _text(tensors: Stored, encoder: TextEncoder) -> tuple[dict[str, Any], Stored, list[str]]:
    odd: list[str] = []
    if encoder.open_clip:
        layers = _count(_shapes(tensors), "transformer.resblocks.{}.ln_1.weight") - encoder.dropped
        plain = {key: tensor for key, tensor in tensors.items() if fused(key) is None}
        found, odd = _apply(plain, open_clip_names(layers))
        dropped = f"transformer.resblocks.{layers}."
        odd = [key for key in odd if not (encoder.dropped and key.startswith(dropped))]
        for key, tensor in tensors.items():
            place = fused(key)
            if place and not (encoder.dropped and key.startswith(dropped)):
                for part, name in enumerate(PROJECTIONS):
                    found[f"{place[0]}.{name}.{place[1]}"] = _third(tensor, part)
        if "text_projection.weight" in found:
            found["text_projection.weight"] = _transposed(found["text_projection.weight"])
    else:
        found = {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
    shapes = _shapes(found)
    if encoder.component == "text_encoder_2":
        inside = {f"text_model.{key}": found[key] for key in found if key not in _PROJECTION}
        found = inside | {key: found[key] for key in found if key in _PROJECTION}
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    raw = {
        "architectures": [_CLASSES[encoder.component]],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, "encoder.layers.{}.layer_norm1.weight"),
        "num_attention_heads": heads(width),
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "hidden_act": "gelu" if encoder.open_clip else "quick_gelu",
        "projection_dim": shapes.get("text_projection.weight", (width,))[0],
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    return raw, found, odd


def _reshaped(tensor: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(tensor.dtype, shape, lambda: tensor.read().reshape(shape))


def _transposed(tensor: StoredTensor) -> StoredTensor:
    return StoredTensor(
        tensor.dtype, tensor.shape[::-1], lambda: np.ascontiguousarray(tensor.read().T)
    )


def _third(tensor: StoredTensor, part: int) -> StoredTensor:
    rows, *rest = tensor.shape
    if rows % 3:
        raise ValueError(f"in_proj {list(tensor.shape)}")
    rows //= 3
    return StoredTensor(
        tensor.dtype, (rows, *rest), lambda: tensor.read()[part * rows : (part + 1) * rows]
    )
