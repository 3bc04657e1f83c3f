"""A single file of CompVis taken apart by names and shapes alone: its models and their settings.

What shapes do not tell is as published: heads of 64 features where projections are linear, else 8
heads, and 32 groups.
"""

import itertools
import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ..errors import CheckpointError
from ..files.safetensors_file import FLOAT_TYPES, StoredTensor
from .compvis_names import (
    ALIASES,
    LEFTOVERS,
    MARKERS,
    PROJECTIONS,
    STRANGERS,
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

_HEAD = 64
_PREFIXES = (UNET, VAE, *dict.fromkeys(e.prefix for each in TEXT_ENCODERS.values() for e in each))
_TOKENS = "embeddings.token_embedding.weight"  # of a text encoder with transformers' names
# A key of each model that has no prefix, or another one than CompVis's.
_TELLING = {UNET: "input_blocks.0.0.weight", VAE: "decoder.up.0.block.0.conv1.weight"}
_CHANNELS = {
    5: "a depth-to-image model",
    7: "the x4 upscaler",
    8: "an InstructPix2Pix or Zero123 model",
}
_PROJECTION = "text_projection.weight"  # beside a text tower, not in it
_MODELS = {UNET: "unet", VAE: "vae"}
_CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}

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
      scheduler: settings of the noise schedule that it tells.
      guessed: whether nothing in it tells the family.
    """

    family: str
    parts: dict[str, Part]
    leftovers: dict[str, list[str]]
    unknown: list[str]
    scheduler: Mapping[str, Any] = {}
    guessed: bool = False

    @property
    def kind(self) -> str:
        """The whole in a few words."""
        missing = [name for name in _components(self.family) if name not in self.parts]
        words = "single file" if self.guessed else f"single file of {self.family}"
        if len(self.parts) == 1:
            words += f", {next(iter(self.parts))} alone"
        elif missing:
            words += f", without {' and '.join(missing)}"
        if told := self.scheduler.get("prediction_type"):
            words += f", predicts {told}"
        if "trained_betas" in self.scheduler:
            words += ", with a noise schedule of its own"
        return words + (", zero terminal SNR" if self.scheduler.get(_ZERO_SNR) else "")


_ZERO_SNR = "rescale_betas_zero_snr"


def _components(family: str) -> tuple[str, ...]:
    encoders = dict.fromkeys(encoder.component for encoder in TEXT_ENCODERS[family])
    return ("unet", "vae", *encoders)


def is_single_file(stored: Stored) -> bool:
    """Whether tensors have the names of CompVis's single files, with their prefixes or without."""
    names = _canonical(stored).values()
    return any(name.startswith(_PREFIXES) and "lora_" not in name for name in names)


def is_bare_text(keys: Collection[str]) -> bool:
    """Whether they are a text encoder's as transformers names them in its folders."""
    return any(
        key.removeprefix("text_model.") == "encoder.layers.0.layer_norm1.weight" for key in keys
    )


def _canonical(stored: Stored) -> dict[str, str]:
    """Keys -> CompVis's keys, which have prefixes; others stay as they are."""
    names = {key: key for key in stored}
    for wrapper in ("module.", "model.", "module."):
        here = list(names.values())
        if here and all(name.startswith(wrapper) and not name.startswith(UNET) for name in here):
            names = {key: name.removeprefix(wrapper) for key, name in names.items()}
    here = set(names.values())
    for alias, prefix in ALIASES.items():
        if alias + _TELLING.get(prefix, f"text_model.{_TOKENS}") in here:
            names = {
                key: prefix + name.removeprefix(alias) if name.startswith(alias) else name
                for key, name in names.items()
            }
    shapes = {name: stored[key].shape for key, name in names.items()}
    if not any(name.startswith(_PREFIXES) for name in shapes) and (prefix := _bare(shapes)):
        names = {key: name if name in MARKERS else prefix + name for key, name in names.items()}
    return names


def _bare(shapes: Shapes) -> str:
    """The prefix that the keys of one model lack, or ""."""
    if any(key.startswith(("visual", "vision_model.")) for key in shapes):
        return ""
    for tokens, layer, prefix in (
        ("token_embedding.weight", "transformer.resblocks.0.ln_1.weight", "model."),
        (f"transformer.text_model.{_TOKENS}", "", ""),
        (f"text_model.{_TOKENS}", "text_model.encoder.layers.0.layer_norm1.weight", "transformer."),
        (_TOKENS, "encoder.layers.0.layer_norm1.weight", "transformer."),
    ):
        if tokens in shapes and (not layer or layer in shapes):
            second = shapes[tokens][-1:] == (1280,)  # SDXL's
            return ("conditioner.embedders.1." if second else "cond_stage_model.") + prefix
    return next((prefix for prefix, telling in _TELLING.items() if telling in shapes), "")


def stranger(keys: Collection[str]) -> str:
    """What a file that is none of these holds, in a sentence; "" where that is unknown."""
    for what, beginnings in STRANGERS.items():
        if any(key.startswith(beginnings) for key in keys):
            return f"It is {what}; Stable Diffusion 1, 2 and XL are read."
    if any(key.startswith(("control_model.", "input_hint_block.", "controlnet_")) for key in keys):
        return "It is a ControlNet, which is not read here."
    inside = {key.split(".")[0] for key in keys}
    if {"unet", "vae"} & inside:
        return "Its names are those of a diffusers folder, which has a file for each model."
    for name, parts in _PUBLISHED.items():
        if parts <= inside:
            return (
                f"It is a {name} under the names of diffusers and transformers, which needs its "
                "config.json: put that beside it, or pass the folder that it comes from."
            )
    return ""


# What the keys of a model in a folder begin with.
_PUBLISHED = {
    "UNet": {"down_blocks", "up_blocks", "conv_in"},
    "VAE": {"encoder", "decoder"},
    "CLIP": {"text_model", "vision_model"},
}


def read_single_file(
    stored: Stored, source: str, metadata: Mapping[str, str] = MappingProxyType({})
) -> SingleFile:
    """Take a single file apart by names and shapes, and what its header tells beside them.

    Args:
      stored: its tensors.
      source: what to call it in messages.
      metadata: the free text in its header.

    Raises:
      CheckpointError: a tensor that tells a size is missing, or a model of another kind.
    """
    names = _canonical(stored)
    back = {name: key for key, name in names.items()}
    if len(back) != len(names):
        raise CheckpointError(f"{source} holds a tensor twice, under two programs' names.")
    tensors = {name: stored[key] for key, name in names.items()}
    if stranger_here := _other_model(tensors):
        raise CheckpointError(f"{source} is {stranger_here}; SD 1, SD 2 and SDXL are read.")
    told = _family(tensors) or _architecture(metadata)
    family = told or "SD 1"
    encoders = {each.prefix: each for each in TEXT_ENCODERS[family]}
    groups: dict[str, Stored] = {prefix: {} for prefix in (UNET, VAE, *encoders)}
    leftovers: dict[str, list[str]] = {}
    unknown = []
    for key, tensor in tensors.items():
        if key.removeprefix(UNET) in MARKERS:
            continue
        kind = next((k for k, form in LEFTOVERS.items() if re.fullmatch(form, key, re.S)), None)
        prefix = next((prefix for prefix in groups if key.startswith(prefix)), None)
        last = prefix in encoders and encoders[prefix].last_layer
        if kind is not None and not _wanted(key):
            leftovers.setdefault(kind, []).append(back[key])
        elif last and last.match(key, len(prefix or "")):
            kind = "the last layer of the text encoder, which nothing reads"
            leftovers.setdefault(kind, []).append(back[key])
        elif prefix is not None:
            groups[prefix][key.removeprefix(prefix)] = tensor
        else:
            unknown.append(back[key])

    parts: dict[str, Part] = {}
    for prefix, group in groups.items():
        if not group:
            continue
        component = _MODELS.get(prefix) or encoders[prefix].component
        try:
            if prefix == UNET:
                raw, found, odd = _unet(group)
            elif prefix == VAE:
                raw, found, odd = _vae(group, family)
            else:
                raw, found, odd = _text(group, encoders[prefix])
        except (KeyError, IndexError, ValueError) as error:
            raise CheckpointError(
                f"{source}: the sizes of its {component} cannot be told ({error} is missing or "
                "has an odd shape). It is incomplete, or of another architecture."
            ) from error
        if component in parts:
            raise CheckpointError(f"{source} holds {component} twice, under two programs' names.")
        parts[component] = Part(_CLASSES[component], raw, found)
        unknown += [back.get(prefix + key, prefix + key) for key in odd]
    if "unet" in parts and (sizes := _sizes(metadata, parts.get("vae"))):
        parts["unet"].raw["sample_size"] = sizes
    scheduler = _told(tensors, metadata) | _schedule(tensors, source)
    return SingleFile(family, parts, leftovers, sorted(unknown), scheduler, guessed=not told)


def _wanted(key: str) -> bool:
    """A text projection, where the model has one."""
    return key.startswith("conditioner.embedders.1.") and "text_projection" in key


def _other_model(tensors: Stored) -> str:
    """What a file is that has such prefixes and is none of the families; "" if it is one."""
    for what, beginnings in STRANGERS.items():
        if any(key.startswith(beginnings) for key in tensors):
            return what
    shapes = _shapes(tensors)
    first = shapes.get(UNET + "input_blocks.0.0.weight", ())
    if len(first) == 4 and first[1] in _CHANNELS:
        return f"{_CHANNELS[first[1]]} ({first[1]} channels in)"
    if UNET + "label_emb.0.0.weight" in shapes:
        other = {1024: "Stable Diffusion 2 unCLIP", 1280: "SDXL's refiner"}
        return other.get(_width(shapes, UNET, "attn2.to_k.weight"), "")
    return ""


def _width(shapes: Shapes, beginning: str, end: str) -> int:
    """The last size of the first tensor whose name begins and ends so, or 0."""
    named = (shapes[key] for key in shapes if key.startswith(beginning) and key.endswith(end))
    return next((shape[-1] for shape in named if shape), 0)


def _family(tensors: Stored) -> str:
    """The family by prefixes and sizes, or "" where there is but an autoencoder."""
    shapes = _shapes(tensors)
    context = _width(shapes, UNET, "attn2.to_k.weight")
    xl = UNET + "label_emb.0.0.weight" in shapes or context == 2048
    if xl or any(key.startswith("conditioner.") for key in shapes):
        return "SDXL"
    text = _width(shapes, "cond_stage_model.", _TOKENS)
    open_clip = any(key.startswith("cond_stage_model.model.transformer.") for key in shapes)
    # SD 1's projections are convolutions.
    linear = len(shapes.get(UNET + "middle_block.1.proj_in.weight", ())) == 2
    if open_clip or linear or 1024 in (context, text):
        return "SD 2"
    one = any(key.startswith((UNET, "cond_stage_model.")) for key in shapes)
    return "SD 1" if one else ""


def _architecture(metadata: Mapping[str, str]) -> str:
    named = metadata.get("modelspec.architecture", "")
    forms = {
        "stable-diffusion-xl": "SDXL",
        "stable-diffusion-v2": "SD 2",
        "stable-diffusion-v1": "SD 1",
    }
    return next((family for form, family in forms.items() if named.startswith(form)), "")


def _sizes(metadata: Mapping[str, str], vae: Part | None) -> int | list[int] | None:
    """A UNet's `sample_size` from the pixels of the images that it was trained on."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", metadata.get("modelspec.resolution", ""))
    if not found:
        return None
    levels = len(vae.raw["block_out_channels"]) if vae else 4
    width, height = (int(pixels) >> (levels - 1) for pixels in found.groups())
    return (height if width == height else [height, width]) if width and height else None


def _told(tensors: Stored, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Settings of the scheduler: what marker keys say goes before what the header says."""
    names = ("modelspec.prediction_type", "modelspec.predict_key")
    named = next((metadata[name].lower() for name in names if name in metadata), "")
    forms = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
    told: dict[str, Any] = {"prediction_type": forms[named]} if named in forms else {}
    for key in tensors:
        told |= MARKERS.get(key.removeprefix(UNET), {})
    return told


# Tables that tell a noise schedule -> how its kept signal, alpha-bar, follows from their values.
_TABLES = {
    "alphas_cumprod": lambda values: values,
    "betas": lambda values: np.cumprod(1 - values),
    **dict.fromkeys(
        ("denoiser.sigmas", "model_sampling.sigmas", "model.model_sampling.sigmas", "sigmas"),
        lambda values: 1 / (1 + values**2),
    ),
}
_MOST_STEPS = 100_000


def _schedule(tensors: Stored, source: str) -> dict[str, Any]:
    """Settings of a noise schedule that is stored and is not the one that all files share.

    Raises:
      CheckpointError: it is another one, in too few digits to be used.
    """
    for name, kept_signal in _TABLES.items():
        table = tensors.get(name)
        if table is None or table.dtype not in FLOAT_TYPES or len(table.shape) != 1:
            continue
        if not 2 <= table.shape[0] <= _MOST_STEPS:
            continue
        with np.errstate(all="ignore"):
            alphas = kept_signal(table.read().astype(np.float64))
        if not (np.isfinite(alphas).all() and 0 <= alphas.min() < alphas.max() <= 1):
            continue  # no schedule
        alphas = np.sort(alphas)[::-1]
        shared = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
        root = np.sqrt(shared)
        zero = np.square((root - root[-1]) * root[0] / (root[0] - root[-1]))
        for known, settings in ((shared, {}), (zero, MARKERS["ztsnr"])):
            if alphas.shape == known.shape and np.allclose(alphas, known, 1e-2, 5e-4):
                return dict(settings)
        betas = 1 - alphas / np.concatenate([[1.0], alphas[:-1]])
        if not (betas.min() > 0 and betas.max() < 1):
            raise CheckpointError(
                f"{source} holds a noise schedule ({name}) that is not Stable Diffusion's, and its "
                "steps cannot be told apart. Use a file that has it in float32, or has none."
            )
        return {"trained_betas": betas.tolist(), "num_train_timesteps": len(betas)}
    return {}


def _heads(width: int) -> int:
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
    new = {key: renamed(key, names) for key in tensors}
    found = {name: tensors[key] for key, name in new.items() if name is not None}
    return found, [key for key, name in new.items() if name is None]


def unet_names_of(raw: Mapping[str, Any]) -> Names:
    """The names of a UNet with these settings, CompVis's -> diffusers'."""
    levels = len(raw["block_out_channels"])
    layers = raw["layers_per_block"]
    return unet_names(
        [layers] * levels if isinstance(layers, int) else layers,
        [kind.startswith("CrossAttn") for kind in raw["down_block_types"]],
    )


def _unet(tensors: Stored) -> tuple[dict[str, Any], Stored, list[str]]:
    """The settings of a UNet, under their published names, its tensors, and keys of no place."""
    shapes = _shapes(tensors)
    levels: list[list[tuple[int, int]]] = [[]]  # channels and transformer depth of each resnet
    for place in itertools.count(1):
        block = f"input_blocks.{place}"
        if f"{block}.0.op.weight" in shapes:
            levels.append([])
        elif f"{block}.0.in_layers.2.weight" in shapes:
            depth = _count(shapes, block + ".1.transformer_blocks.{}.norm1.weight")
            levels[-1].append((shapes[f"{block}.0.in_layers.2.weight"][0], depth))
        else:
            break
    if not all(levels):
        raise ValueError(block)
    channels = [level[0][0] for level in levels]
    attends = [level[0][1] > 0 for level in levels]
    layers = [len(level) for level in levels]
    depths = [max(level[0][1], 1) for level in levels]
    depths[-1] = _count(shapes, _MIDDLE + "transformer_blocks.{}.norm1.weight") or depths[-1]
    linear = len(shapes[f"{_MIDDLE}proj_in.weight"]) == 2
    raw = {
        "_class_name": _CLASSES["unet"],
        "sample_size": 64,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "down_block_types": [("CrossAttn" if a else "") + "DownBlock2D" for a in attends],
        "up_block_types": [("CrossAttn" if a else "") + "UpBlock2D" for a in reversed(attends)],
        "block_out_channels": channels,
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "cross_attention_dim": shapes[f"{_MIDDLE}transformer_blocks.0.attn2.to_k.weight"][1],
        "transformer_layers_per_block": 1 if set(depths) == {1} else depths,
        "attention_head_dim": [_heads(c) for c in channels] if linear else 8,
        "use_linear_projection": linear,
    }
    if (vector := shapes.get("label_emb.0.0.weight")) is not None:  # SDXL's sizes and crops
        raw |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": vector[1],
            "sample_size": 128,
        }
    return raw, *_apply(tensors, unet_names_of(raw))


_MIDDLE = "middle_block.1."
_OPTIONAL = {
    "use_quant_conv": "quant_conv",
    "use_post_quant_conv": "post_quant_conv",
    "mid_block_add_attention": "decoder.mid.attn_1.q",
}


def _vae(tensors: Stored, family: str) -> tuple[dict[str, Any], Stored, list[str]]:
    """Of an autoencoder what `_unet` tells of a UNet."""
    shapes = _shapes(tensors)
    levels = _count(shapes, "encoder.down.{}.block.0.conv1.weight")
    channels = [shapes[f"encoder.down.{n}.block.0.conv1.weight"][0] for n in range(levels)]
    raw = {
        "_class_name": _CLASSES["vae"],
        "sample_size": 1024 if family == "SDXL" else 512,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": _count(shapes, "encoder.down.0.block.{}.conv1.weight"),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "scaling_factor": 0.13025 if family == "SDXL" else 0.18215,
    }
    raw |= {name: False for name, key in _OPTIONAL.items() if f"{key}.weight" not in shapes}
    found, odd = _apply(tensors, vae_names(levels, raw["layers_per_block"]))
    for key, tensor in found.items():
        if ".attentions." in key and tensor.shape[2:] in ((1,), (1, 1)):
            found[key] = _reshaped(tensor, tensor.shape[:2])  # convolutions of one pixel
    return raw, found, odd


def _text(tensors: Stored, encoder: TextEncoder) -> tuple[dict[str, Any], Stored, list[str]]:
    """Of a text encoder what `_unet` tells of a UNet."""
    odd: list[str] = []
    if encoder.open_clip:
        layers = _count(_shapes(tensors), "transformer.resblocks.{}.ln_1.weight")
        plain = {key: tensor for key, tensor in tensors.items() if fused(key) is None}
        found, odd = _apply(plain, open_clip_names(layers))
        for key, tensor in tensors.items():
            if place := fused(key):
                for part, name in enumerate(PROJECTIONS):
                    found[f"{place[0]}.{name}.{place[1]}"] = _third(tensor, part)
        if (width := found.get(_PROJECTION)) is not None:
            found[_PROJECTION] = width.then(width.shape[::-1], lambda v: np.ascontiguousarray(v.T))
    else:
        found = {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
    second = encoder.component == "text_encoder_2"
    shapes = _shapes(found)
    vocabulary, width = shapes[_TOKENS]
    raw = {
        "architectures": [_CLASSES[encoder.component]],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, "encoder.layers.{}.layer_norm1.weight"),
        "num_attention_heads": _heads(width),
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "hidden_act": encoder.hidden_act,
        "projection_dim": shapes.get(_PROJECTION, (width,))[0] if second else width,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    projection = {_PROJECTION: found.pop(_PROJECTION)} if _PROJECTION in found else {}
    if second:
        found = {f"text_model.{key}": tensor for key, tensor in found.items()} | projection
    return raw, found, odd


def _reshaped(tensor: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    return tensor.then(shape, lambda values: values.reshape(shape))


def _third(tensor: StoredTensor, part: int) -> StoredTensor:
    rows, *rest = tensor.shape
    if rows % 3:
        raise ValueError(f"in_proj {list(tensor.shape)}")
    rows //= 3
    return tensor.then((rows, *rest), lambda values: values[part * rows : (part + 1) * rows])
