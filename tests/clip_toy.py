"""Tiny pipelines of each family's layout whose text encoders have CLIP's own 49,408 tokens."""

import dataclasses

import numpy as np
from personalizing_toy import random_model

from conceptax.flax_models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from conceptax.flax_models.clip import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from conceptax.flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from conceptax.flax_models.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline
from conceptax.flax_models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from conceptax.methods.glyphs.recipe import SCHEDULER


def clip_pipeline(family):
    """A pipeline of CLIP's tokens, in the layout that single files of a family have."""
    second = family != "SD 1"
    text = CLIPTextConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        hidden_act="gelu" if family == "SD 2" else "quick_gelu",
    )
    unet = UNet2DConditionConfig(
        sample_size=8,
        block_out_channels=(64,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=64,
        attention_head_dim=(1,) if second else 8,
        use_linear_projection=second,
    )
    vae = AutoencoderKLConfig(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        sample_size=16,
    )
    rng = np.random.default_rng(0)
    parts = {"scheduler_config": SCHEDULER}
    kind = StableDiffusionPipeline
    if family == "SDXL":
        kind = StableDiffusionXLPipeline
        unet = dataclasses.replace(
            unet,
            cross_attention_dim=128,
            transformer_layers_per_block=(1,),
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=48 + 6 * 256,
        )
        vae = dataclasses.replace(vae, scaling_factor=0.13025)
        other = dataclasses.replace(text, hidden_act="gelu", projection_dim=48)
        parts["text_encoder_2"] = random_model(CLIPTextModelWithProjection, other, rng)
        parts["tokenizer_2"] = None
    return kind(
        unet=random_model(UNet2DConditionModel, unet, rng),
        vae=random_model(AutoencoderKL, vae, rng),
        text_encoder=random_model(CLIPTextModel, text, rng),
        tokenizer=None,
        **parts,
    )
