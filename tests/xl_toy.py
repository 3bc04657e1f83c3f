"""A tiny random pipeline of Stable Diffusion XL, as diffusers makes it."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from conceptax.converters.tokenizer import read_tokenizer, write_tokenizer
from conceptax.methods.glyphs.tokenizer import build_tokenizer

LENGTH = 20
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 16 + 24,
    "attention_head_dim": (1, 2),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 12 + 6 * 6,
}
VAE = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "sample_size": 16,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
}
TEXT = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": LENGTH}
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


# The least that trains: one attention layer, quick to compile.
SMALL_UNET = UNET | {
    "sample_size": 4,
    "block_out_channels": (8,),
    "mid_block_type": None,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "attention_head_dim": (2,),
    "transformer_layers_per_block": (1,),
}


def save_pipeline(folder: Path, unet: Mapping[str, Any] = MappingProxyType(UNET)) -> Any:
    """Make one, write it, and return it."""
    import diffusers
    import torch
    import transformers

    torch.manual_seed(0)
    tokenizers = [build_tokenizer(max_length=LENGTH) for _ in range(2)]
    tokenizers[1].pad_token = "!"
    first = tokenizers[0]
    ids = {
        "vocab_size": len(first),
        "eos_token_id": 2,
        "bos_token_id": 0,
        "pad_token_id": 1,
        **TEXT,
    }
    encoder = transformers.CLIPTextConfig(hidden_size=16, intermediate_size=32, **ids)
    encoder_2 = transformers.CLIPTextConfig(
        hidden_size=24, intermediate_size=32, hidden_act="gelu", projection_dim=12, **ids
    )
    pipeline = diffusers.StableDiffusionXLPipeline(
        unet=diffusers.UNet2DConditionModel(**unet),
        vae=diffusers.AutoencoderKL(**VAE),
        text_encoder=transformers.CLIPTextModel(encoder).eval(),
        text_encoder_2=transformers.CLIPTextModelWithProjection(encoder_2).eval(),
        tokenizer=first,
        tokenizer_2=tokenizers[1],
        scheduler=diffusers.EulerDiscreteScheduler(**SCHEDULER),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    for number, name in enumerate(("tokenizer", "tokenizer_2")):
        write_tokenizer(tokenizers[number], folder / name)
        # As it is read: "!" is a token of its own there, also in the middle of a text.
        setattr(pipeline, name, read_tokenizer(folder / name))
    return pipeline
