"""The names of CompVis's single files (latent diffusion, `.ckpt`) beside diffusers' names.

Tables of (CompVis's, diffusers') module paths, made from a model's settings, so that they can be
read in both directions: single files are loaded and written by them, and LoRA files that name
modules in CompVis's way are understood.  SD 1, SD 2 and SDXL share those of the UNet, and all
families those of the VAE; what differs is which text encoders there are (`TEXT_ENCODERS`).  The
transformers' are in `transformer_names`.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from .cosmos_names import BUFFERS, VAE_BUFFERS
from .names import Names, Rows, equal_rows, prefixed
from .transformer_parts import COSMOS, FLUX, FLUX_2, HUNYUAN, SD_3, WAN

UNET, VAE = "model.diffusion_model.", "first_stage_model."

# ResBlock -> ResnetBlock2D, in the UNet and in the VAE.
_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESNET = {n: n for n in ("norm1", "conv1", "norm2", "conv2")} | {
    "nin_shortcut": "conv_shortcut"
}
_VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_VAE_MIDDLE = (
    ("block_1", "resnets.0", _VAE_RESNET),
    ("attn_1", "attentions.0", _VAE_ATTENTION),
    ("block_2", "resnets.1", _VAE_RESNET),
)
_OPEN_CLIP = {
    "token_embedding": "embeddings.token_embedding",
    "ln_final": "final_layer_norm",
    "positional_embedding": "embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
    **{
        f"attn.in_proj_{leaf}": equal_rows(*(f"self_attn.{x}_proj.{leaf}" for x in "qkv"))
        for leaf in ("weight", "bias")
    },
}


class TextEncoder(NamedTuple):
    """A text encoder in single files.

    Attributes:
      component: its name in a diffusers pipeline.
      prefix: what its keys begin with.
      open_clip: whether it has OpenCLIP's names and fused projections, or transformers' names.
      hidden_act: its activation, which nothing in a file tells.
      unread: number of the published last layer, which nothing reads and diffusers leaves out.
      class_name: of the model.
    """

    component: str
    prefix: str
    open_clip: bool
    hidden_act: str = "quick_gelu"
    unread: int | None = None
    class_name: str = "CLIPTextModel"

    @property
    def last_layer(self) -> re.Pattern[str] | None:
        """What the keys of that layer match, behind the prefix."""
        if self.unread is None:
            return None
        return re.compile(
            rf"(transformer\.resblocks|(text_model\.)?encoder\.layers)\.{self.unread}\."
        )


T5, UMT5 = "text_encoders.t5xxl.transformer.", "text_encoders.umt5xxl.transformer."
_PROJECTED: dict[str, Any] = {"class_name": "CLIPTextModelWithProjection"}
# By family; of two for one component the first is written.
TEXT_ENCODERS = {
    "SD 1": (TextEncoder("text_encoder", "cond_stage_model.transformer.", open_clip=False),),
    "SD 2": (
        TextEncoder("text_encoder", "cond_stage_model.model.", True, "gelu", unread=23),
        TextEncoder("text_encoder", "cond_stage_model.transformer.", False, "gelu", unread=23),
    ),
    "SDXL": (
        TextEncoder("text_encoder", "conditioner.embedders.0.transformer.", open_clip=False),
        TextEncoder("text_encoder_2", "conditioner.embedders.1.model.", True, "gelu", **_PROJECTED),
        TextEncoder(
            "text_encoder_2", "conditioner.embedders.1.transformer.", False, "gelu", **_PROJECTED
        ),
    ),
    FLUX: (
        TextEncoder("text_encoder", "text_encoders.clip_l.transformer.", False),
        TextEncoder("text_encoder_2", T5, False, class_name="T5EncoderModel"),
    ),
    FLUX_2: (),
    COSMOS: (),  # T5, which its files hold apart
    HUNYUAN: (),
    SD_3: (
        TextEncoder("text_encoder", "text_encoders.clip_l.transformer.", False, **_PROJECTED),
        TextEncoder(
            "text_encoder_2", "text_encoders.clip_g.transformer.", False, "gelu", **_PROJECTED
        ),
        TextEncoder("text_encoder_3", T5, False, class_name="T5EncoderModel"),
    ),
    WAN: (TextEncoder("text_encoder", UMT5, False, class_name="UMT5EncoderModel"),),
}

# What other programs' keys begin with -> CompVis's.
ALIASES = {
    "diffusion_model.": UNET,
    "net.": UNET,
    "vae.": VAE,
    "cond_stage_model.clip_l.transformer.": "cond_stage_model.transformer.",
    "cond_stage_model.clip_h.transformer.": "cond_stage_model.transformer.",
    "conditioner.embedders.0.clip_l.transformer.": "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.clip_g.transformer.": "conditioner.embedders.1.transformer.",
}

# Keys without tensors to speak of, by which programs that train and merge models tell what the
# UNet predicts -> settings of the scheduler.
MARKERS = {
    "v_pred": {"prediction_type": "v_prediction"},
    "ztsnr": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}

# What single files hold beside the models, harmless and not loaded -> a pattern of the keys.
LEFTOVERS = {
    "moving averages (EMA)": r"(first_stage_model\.)?model_ema\..*",
    "the noise schedule": r"betas|alphas_cumprod.*|sqrt_.*|log_one_minus_alphas_cumprod"
    r"|posterior_.*|logvar|lvlb_weights|scale_factor|denoiser\..*|(model\.)?model_sampling\..*"
    r"|(log_)?sigmas",
    "the training's state": r"global_step|(optimizer_states|lr_schedulers).*"
    r"|(optimizer|embedding_manager)\..*",
    "the autoencoder's training loss": r"(first_stage_model\.)?loss\..*",
    "positions of tokens, which are counted": r".*\.position_ids",
    "CLIP's contrastive head": r"cond_stage_model\.(.*\.)?(logit_scale|text_projection.*)"
    r"|cond_stage_model\.(model\.visual\..*|.*\.attn_mask)"
    r"|cond_stage_model\.transformer\.(vision_model|visual_projection)\..*"
    r"|conditioner\.embedders\.(.*\.(logit_scale|attn_mask)|0\..*text_projection.*)"
    r"|conditioner\.embedders\.1\.model\.visual\..*"
    r"|text_encoders\.(.*\.logit_scale|clip_.*text_projection.*)",
    "T5's second name for its embedding": r"text_encoders\.u?m?t5xxl\..*\.embed_tokens\.weight",
    "what Cosmos' training kept, and constants": rf"model\.diffusion_model\.({BUFFERS})"
    rf"|first_stage_model\.{VAE_BUFFERS}",
    "a tokenizer, which folders keep apart": r"text_encoders\..*\.spiece_model",
}


def _anywhere(*keys: str) -> tuple[str, ...]:
    """Beginnings of keys with and without the prefix."""
    return (*keys, *(UNET + key for key in keys))


# What no model here computes -> the beginnings of keys that tell it.
STRANGERS = {
    "Playground 2.5, whose latents are scaled in another way": ("edm_mean", "edm_std"),
    "a model of continuous noise levels (CosXL)": ("edm_vpred.",),
    "Chroma": _anywhere("distilled_guidance_layer."),
    "Wan's VACE": _anywhere("vace_blocks.", "vace_patch_embedding."),
    "Wan's Animate": _anywhere("motion_encoder.", "face_adapter."),
    "Wan's image-to-video model": _anywhere("img_emb.", "blocks.0.cross_attn.k_img."),
    "Cosmos-Predict2.5 or Transfer2.5": _anywhere(
        "crossattn_proj.", "img_context_proj.", "control_embedder."
    ),
    "FLUX.3": _anywhere("early_stream_modulations.", "content_mode_blocks."),
    "Stable Cascade": ("clip_txt_mapper.", "down_blocks.0.0.channelwise."),
    "SDXL's refiner": ("conditioner.embedders.0.model.",),
    "Stable Diffusion 2 unCLIP": ("noise_augmentor.", "embedder.model.visual."),
}


def _joined(old: str, new: str, table: Names) -> Names:
    return {f"{old}.{a}": f"{new}.{b}" for a, b in table.items()}


def unet_names(layers: Iterable[int], attends: Iterable[bool]) -> Names:
    """CompVis's module paths in a UNet -> diffusers'.

    Args:
      layers: resnets of each resolution on the way down, from the finest to the coarsest.
      attends: whether that resolution has transformers.
    """
    levels = list(zip(layers, attends, strict=True))
    names = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        "middle_block.1": "mid_block.attentions.0",
        **_joined("middle_block.0", "mid_block.resnets.0", _UNET_RESNET),
        **_joined("middle_block.2", "mid_block.resnets.1", _UNET_RESNET),
    }

    def add(place: int, way: tuple[str, str], level: int, layer: int, attend: bool) -> None:
        old, new = f"{way[0]}_blocks.{place}", f"{way[1]}_blocks.{level}"
        names.update(_joined(f"{old}.0", f"{new}.resnets.{layer}", _UNET_RESNET))
        if attend:
            names[f"{old}.1"] = f"{new}.attentions.{layer}"

    place = 1
    for level, (count, attend) in enumerate(levels):
        for layer in range(count):
            add(place, ("input", "down"), level, layer, attend)
            place += 1
        if level < len(levels) - 1:
            names[f"input_blocks.{place}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            place += 1
    place = 0
    for block, (count, attend) in enumerate(reversed(levels)):
        for layer in range(count + 1):
            add(place, ("output", "up"), block, layer, attend)
            place += 1
        if block < len(levels) - 1:
            after = f"output_blocks.{place - 1}.{1 + attend}.conv"
            names[after] = f"up_blocks.{block}.upsamplers.0.conv"
    return names


def vae_names(levels: int, layers: int) -> Names:
    """CompVis's module paths in an autoencoder of so many resolutions -> diffusers'.

    Args:
      levels: resolutions.
      layers: resnets of each on the way down; there is one more on the way up.
    """
    names = {name: name for name in ("quant_conv", "post_quant_conv")}
    ends = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
    for half, way, count in (("encoder", "down", layers), ("decoder", "up", layers + 1)):
        names |= _joined(half, half, ends)
        for old, new, table in _VAE_MIDDLE:
            names |= _joined(f"{half}.mid.{old}", f"{half}.mid_block.{new}", table)
        for level in range(levels):
            block = level if way == "down" else levels - 1 - level
            old, new = f"{half}.{way}.{level}", f"{half}.{way}_blocks.{block}"
            for layer in range(count):
                names |= _joined(f"{old}.block.{layer}", f"{new}.resnets.{layer}", _VAE_RESNET)
            names[f"{old}.{way}sample.conv"] = f"{new}.{way}samplers.0.conv"
    return names


def open_clip_names(layers: int) -> dict[str, str | Rows]:
    """OpenCLIP's paths in a text tower -> transformers'."""
    names: dict[str, str | Rows] = dict(_OPEN_CLIP)
    for layer in range(layers):
        old, new = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        names |= prefixed(old, new, _OPEN_CLIP_LAYER)
    return names
