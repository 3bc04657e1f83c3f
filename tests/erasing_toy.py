"""A pipeline of the real classes, small enough to erase from in a test."""

from flax import nnx

from conceptax.flax_models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from conceptax.flax_models.clip import CLIPTextConfig, CLIPTextModel
from conceptax.flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from conceptax.flax_models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from conceptax.methods.glyphs.recipe import SCHEDULER
from conceptax.methods.glyphs.tokenizer import build_tokenizer


def tiny_pipeline() -> StableDiffusionPipeline:
    """Random weights, 4x4 latents, the glyphs tokenizer."""
    tokenizer = build_tokenizer()
    text = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    unet = UNet2DConditionConfig(
        sample_size=4,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    vae = AutoencoderKLConfig(
        block_out_channels=(4,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=4,
    )
    return StableDiffusionPipeline(
        UNet2DConditionModel(unet, rngs=nnx.Rngs(0)),
        AutoencoderKL(vae, rngs=nnx.Rngs(1)),
        CLIPTextModel(text, rngs=nnx.Rngs(2)),
        tokenizer,
        SCHEDULER,
    )
