"""A single file taken apart by names and shapes alone: its models and their settings.

What shapes do not tell is as published: heads of 64 features where projections are linear, else 8
heads, and 32 groups.
"""

import itertools
import math
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
    STRANGERS,
    T5,
    TEXT_ENCODERS,
    UMT5,
    UNET,
    VAE,
    TextEncoder,
    open_clip_names,
    unet_names,
    vae_names,
)
from .cosmos_names import VAE_KEY as COSMOS_VAE_KEY
from .cosmos_names import cosmos_vae, cosmos_vae_names
from .drawn_with import of_config, stated_by
from .names import Names, Shapes, Stored, count, shapes_of, split
from .transformer_parts import (
    COSMOS,
    FLUX,
    FLUX_2,
    HUNYUAN,
    HUNYUAN_VAE_KEY,
    SD_3,
    T5_GGUF,
    TELLING,
    UMT5_KEYS,
    WAN,
    Taken,
    hunyuan_vae,
    t5,
    transformer,
    variant,
)
from .wan_names import VAE_KEY as WAN_VAE_KEY
from .wan_names import wan_vae, wan_vae_names

READ = "Stable Diffusion 1, 2, XL and 3, FLUX.1, FLUX.2, HunyuanVideo, Wan and Cosmos"
_HEAD = 64
_PREFIXES = (UNET, VAE, *dict.fromkeys(e.prefix for each in TEXT_ENCODERS.values() for e in each))
# Of these alone a file is none: LoRAs have them too.
_BESIDE = "text_encoders."
_TOKENS = "embeddings.token_embedding.weight"  # of a text encoder with transformers' names
# Keys of each model that has no prefix, or another one than CompVis's.
_TELLING = {
    UNET: ("input_blocks.0.0.weight", *(key for keys in TELLING.values() for key in keys)),
    VAE: ("decoder.up.0.block.0.conv1.weight", COSMOS_VAE_KEY, WAN_VAE_KEY, HUNYUAN_VAE_KEY),
    UMT5: UMT5_KEYS,
    T5: (_T5_NORM := "encoder.block.0.layer.0.layer_norm.weight", T5_GGUF.format(0)),
}
_CHANNELS = {
    5: "a depth-to-image model",
    7: "the x4 upscaler",
    8: "an InstructPix2Pix or Zero123 model",
}
# First and last weights of video models, by which those that continue an image are told.
_VIDEO_ENDS = {
    "Wan": ("patch_embedding.weight", "head.head.weight"),
    "HunyuanVideo": ("img_in.proj.weight", "final_layer.linear.weight"),
}
_PROJECTION = "text_projection.weight"  # beside a text tower, not in it
# Settings of the autoencoder's latents by family; SD 1's and 2's are the first.
_LATENTS = {
    "SD 1": {"scaling_factor": 0.18215},
    "SDXL": {"scaling_factor": 0.13025},
    FLUX: {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    SD_3: {"scaling_factor": 1.5305, "shift_factor": 0.0609},
}
_CHANNELS_OF = {16: FLUX, 32: FLUX_2}  # latents of an autoencoder alone -> the family assumed


class Part(NamedTuple):
    """One model of a single file: its class, settings as in a `config.json`, and its tensors."""

    class_name: str
    raw: dict[str, Any]
    tensors: Stored


class SingleFile(NamedTuple):
    """What a single file holds.

    Attributes:
      family: "SD 1", "SD 2", "SDXL", "FLUX.1", "FLUX.2", "SD 3", "HunyuanVideo", "Wan" or "Cosmos".
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
        if "transformer" in self.parts:
            words = f"{words} {variant(self.family, self.parts['transformer'].raw)}".rstrip()
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
    return ("transformer" if family in TELLING else "unet", "vae", *encoders)


def is_single_file(stored: Stored) -> bool:
    """Whether tensors have the names of CompVis's single files, with their prefixes or without."""
    names = _canonical(stored).values()
    own = [name for name in names if name.startswith(_PREFIXES) and "lora_" not in name]
    alone = {T5 + "shared.weight", UMT5 + "shared.weight", UMT5 + UMT5_KEYS[0]}
    return any(not name.startswith(_BESIDE) for name in own) or not alone.isdisjoint(own)


def is_published(keys: Collection[str]) -> bool:
    """Whether they are a model's as diffusers and transformers name them in their folders."""
    telling = "encoder.layers.0.layer_norm1.weight", _T5_NORM, HUNYUAN_VAE_KEY
    return any(key.removeprefix("text_model.") in telling for key in keys)


def _canonical(stored: Stored) -> dict[str, str]:
    """Keys -> CompVis's keys, which have prefixes; others stay as they are."""
    names = {key: key for key in stored}
    for wrapper in ("module.", "model.", "module."):
        here = list(names.values())
        if here and all(name.startswith(wrapper) and not name.startswith(UNET) for name in here):
            names = {key: name.removeprefix(wrapper) for key, name in names.items()}
    here = set(names.values())
    for alias, prefix in ALIASES.items():
        telling = _TELLING.get(prefix, (f"text_model.{_TOKENS}",))
        if any(alias + key in here for key in telling):
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
    return next(
        (prefix for prefix, keys in _TELLING.items() if not shapes.keys().isdisjoint(keys)), ""
    )


def stranger(keys: Collection[str]) -> str:
    """What a file that is none of these holds, in a sentence; "" where that is unknown."""
    for what, beginnings in STRANGERS.items():
        if any(key.startswith(beginnings) for key in keys):
            return f"It is {what}; {READ} are read."
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
        raise CheckpointError(f"{source} is {stranger_here}; {READ} are read.")
    told = _family(tensors) or _architecture(metadata)
    family = told or _guess(tensors)
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
        if kind is not None and not _wanted(key, family):
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
        component = (
            _components(family)[(UNET, VAE).index(prefix)]
            if prefix in (UNET, VAE)
            else (encoders[prefix].component)
        )
        try:
            raw, found, odd = _taken(group, prefix, family, encoders.get(prefix))
        except (KeyError, IndexError, ValueError) as error:
            raise CheckpointError(
                f"{source}: the sizes of its {component} cannot be told ({error} is missing or "
                "has an odd shape). It is incomplete, or of another architecture."
            ) from error
        if component in parts:
            raise CheckpointError(f"{source} holds {component} twice, under two programs' names.")
        class_name = raw.get("_class_name") or raw["architectures"][0]
        parts[component] = Part(class_name, raw, found)
        unknown += [back.get(prefix + key, prefix + key) for key in odd]
    if "unet" in parts and (sizes := _sizes(metadata, parts.get("vae"))):
        parts["unet"].raw["sample_size"] = sizes
    if family == FLUX and "transformer" in parts:
        stated = stated_by(source, metadata).stated
        parts["transformer"].raw.update(of_config(stated).stated)
    scheduler = _told(tensors, metadata) | _schedule(tensors, source)
    return SingleFile(family, parts, leftovers, sorted(unknown), scheduler, guessed=not told)


def _taken(group: Stored, prefix: str, family: str, encoder: TextEncoder | None) -> Taken:
    """The settings of one model, under their published names, its tensors, and keys of no place."""
    if encoder is not None:
        return t5(group) if prefix in (T5, UMT5) else _text(group, encoder)
    if prefix == VAE:
        return _vae(group, family)
    return transformer(group, family) if family in TELLING else _unet(group)


def _wanted(key: str, family: str) -> bool:
    """A text projection, where the model has one."""
    if "text_projection" not in key:
        return False
    three = family == SD_3 and "transformer.text_projection" in key
    return key.startswith("conditioner.embedders.1.") or three


def _other_model(tensors: Stored) -> str:
    """What a file is that has such prefixes and is none of the families; "" if it is one."""
    for what, beginnings in STRANGERS.items():
        if any(key.startswith(beginnings) for key in tensors):
            return what
    shapes = shapes_of(tensors)
    first = shapes.get(UNET + "input_blocks.0.0.weight", ())
    if len(first) == 4 and first[1] in _CHANNELS:
        return f"{_CHANNELS[first[1]]} ({first[1]} channels in)"
    for name, ends in _VIDEO_ENDS.items():
        first, last = (shapes.get(UNET + key, ()) for key in ends)
        if len(first) == 5 and last and last[0] != math.prod(first[1:]):
            return f"{name}'s image-to-video model ({first[1]} channels in)"
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
    shapes = shapes_of(tensors)
    for family, keys in TELLING.items():
        if any(UNET + key in shapes for key in keys):
            return family
    if VAE + WAN_VAE_KEY in shapes or any(key.startswith(UMT5) for key in shapes):
        return WAN
    if VAE + COSMOS_VAE_KEY in shapes:
        return COSMOS
    if VAE + HUNYUAN_VAE_KEY in shapes:
        return HUNYUAN
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


def _guess(tensors: Stored) -> str:
    """The family of an autoencoder or of T5 alone, of several the one that is used most."""
    shape = tensors[key].shape if (key := VAE + "decoder.conv_in.weight") in tensors else ()
    channels = shape[1] if len(shape) == 4 else 0
    three = any(key.startswith(T5) for key in tensors)
    return FLUX if three else _CHANNELS_OF.get(channels, "SD 1")


def _architecture(metadata: Mapping[str, str]) -> str:
    named = metadata.get("modelspec.architecture", "")
    forms = {
        "stable-diffusion-xl": "SDXL",
        "stable-diffusion-v2": "SD 2",
        "stable-diffusion-v1": "SD 1",
        "stable-diffusion-3": SD_3,
        "flux-1": FLUX,
        "flux-2": FLUX_2,
        "wan": WAN,
        "cosmos": COSMOS,
        "hunyuan-video": HUNYUAN,
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


def unet_names_of(raw: Mapping[str, Any]) -> Names:
    """The names of a UNet with these settings, CompVis's -> diffusers'."""
    levels = len(raw["block_out_channels"])
    layers = raw["layers_per_block"]
    return unet_names(
        [layers] * levels if isinstance(layers, int) else layers,
        [kind.startswith("CrossAttn") for kind in raw["down_block_types"]],
    )


def _unet(tensors: Stored) -> Taken:
    shapes = shapes_of(tensors)
    levels: list[list[tuple[int, int]]] = [[]]  # channels and transformer depth of each resnet
    for place in itertools.count(1):
        block = f"input_blocks.{place}"
        if f"{block}.0.op.weight" in shapes:
            levels.append([])
        elif f"{block}.0.in_layers.2.weight" in shapes:
            depth = count(shapes, block + ".1.transformer_blocks.{}.norm1.weight")
            levels[-1].append((shapes[f"{block}.0.in_layers.2.weight"][0], depth))
        else:
            break
    if not all(levels):
        raise ValueError(block)
    channels = [level[0][0] for level in levels]
    attends = [level[0][1] > 0 for level in levels]
    layers = [len(level) for level in levels]
    depths = [max(level[0][1], 1) for level in levels]
    depths[-1] = count(shapes, _MIDDLE + "transformer_blocks.{}.norm1.weight") or depths[-1]
    linear = len(shapes[f"{_MIDDLE}proj_in.weight"]) == 2
    raw = {
        "_class_name": "UNet2DConditionModel",
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
    return raw, *split(tensors, unet_names_of(raw))


_MIDDLE = "middle_block.1."
# FLUX.2's autoencoder normalizes its latents.
FLUX_2_VAE = {
    "encoder.quant_conv": "quant_conv",
    "decoder.post_quant_conv": "post_quant_conv",
    "bn": "bn",
}
_OPTIONAL = {
    "use_quant_conv": "quant_conv",
    "use_post_quant_conv": "post_quant_conv",
    "mid_block_add_attention": "decoder.mid.attn_1.q",
}


def _vae(tensors: Stored, family: str) -> Taken:
    shapes = shapes_of(tensors)
    if WAN_VAE_KEY in shapes:
        raw = wan_vae(shapes)
        return raw, *split(tensors, wan_vae_names(raw))
    if COSMOS_VAE_KEY in shapes:
        raw = cosmos_vae(shapes)
        return raw, *split(tensors, cosmos_vae_names(raw))
    if HUNYUAN_VAE_KEY in shapes:
        return hunyuan_vae(shapes), tensors, []
    levels = count(shapes, "encoder.down.{}.block.0.conv1.weight")
    channels = [shapes[f"encoder.down.{n}.block.0.conv1.weight"][0] for n in range(levels)]
    raw = {
        "_class_name": "AutoencoderKL",
        "sample_size": 512 if family in ("SD 1", "SD 2") else 1024,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": count(shapes, "encoder.down.0.block.{}.conv1.weight"),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
    }
    names = vae_names(levels, raw["layers_per_block"])
    if family == FLUX_2:
        raw |= {"_class_name": "AutoencoderKLFlux2", "batch_norm_eps": 1e-4, "patch_size": [2, 2]}
        decoder = [shapes[f"decoder.up.{n}.block.0.conv1.weight"][0] for n in range(levels)]
        raw |= {} if decoder == channels else {"decoder_block_out_channels": decoder}
        names |= FLUX_2_VAE
    else:
        raw |= _LATENTS.get(family, _LATENTS["SD 1"])
        raw |= {name: False for name, key in _OPTIONAL.items() if f"{key}.weight" not in shapes}
    found, odd = split(tensors, names)
    for key, tensor in found.items():
        if ".attentions." in key and tensor.shape[2:] in ((1,), (1, 1)):
            found[key] = _reshaped(tensor, tensor.shape[:2])  # convolutions of one pixel
    return raw, found, odd


def _text(tensors: Stored, encoder: TextEncoder) -> Taken:
    odd: list[str] = []
    if encoder.open_clip:
        layers = count(shapes_of(tensors), "transformer.resblocks.{}.ln_1.weight")
        found, odd = split(tensors, open_clip_names(layers))
        if (width := found.get(_PROJECTION)) is not None:
            found[_PROJECTION] = width.then(width.shape[::-1], lambda v: np.ascontiguousarray(v.T))
    else:
        found = {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
    projected = encoder.class_name.endswith("WithProjection")
    shapes = shapes_of(found)
    vocabulary, width = shapes[_TOKENS]
    if projected and _PROJECTION not in found and encoder.prefix.startswith(_BESIDE):
        found[_PROJECTION] = StoredTensor(  # as ComfyUI has it
            "F32", (width, width), lambda: np.eye(width, dtype=np.float32)
        )
    raw = {
        "architectures": [encoder.class_name],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count(shapes, "encoder.layers.{}.layer_norm1.weight"),
        "num_attention_heads": _heads(width),
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "hidden_act": encoder.hidden_act,
        "projection_dim": shapes.get(_PROJECTION, (width,))[0] if projected else width,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    projection = {_PROJECTION: found.pop(_PROJECTION)} if _PROJECTION in found else {}
    if projected:
        found = {f"text_model.{key}": tensor for key, tensor in found.items()} | projection
    return raw, found, odd


def _reshaped(tensor: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    return tensor.then(shape, lambda values: values.reshape(shape))
