"""A pipeline of the real classes, small and quick to compile, and pictures to learn from."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from conceptax.flax_models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from conceptax.flax_models.clip import CLIPTextConfig, CLIPTextModel
from conceptax.flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from conceptax.flax_models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from conceptax.methods.glyphs.recipe import SCHEDULER
from conceptax.methods.glyphs.tokenizer import build_tokenizer
from conceptax.methods.subjects.images import Concept

SIZE, CELLS = 16, 8  # pixels and latent cells along a side


def random_model(model_class, config, rng):
    """Random weights of unit gain, without running the initializers operation by operation."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0))))

    def fill(leaf):
        values = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        return jnp.asarray(values if len(leaf.shape) > 1 else 1 + 0.1 * values, leaf.dtype)

    return nnx.merge(graphdef, jax.tree.map(fill, nnx.to_pure_dict(state)))


def tiny_pipeline() -> StableDiffusionPipeline:
    """Random weights, one cross-attention layer, the glyphs tokenizer."""
    rng = np.random.default_rng(0)
    return pipeline_of(lambda kind, config: random_model(kind, config, rng))


def pipeline_of(
    make: Callable[..., Any], *, text_layers: int = 1, cells: int = CELLS, levels: int = 2
) -> StableDiffusionPipeline:
    """A pipeline whose parts are made of a class and its config: UNet, autoencoder, text encoder.

    Args:
      make: the parts, in this order.
      text_layers: of the text encoder.
      cells: of a latent along a side.
      levels: of the autoencoder, of which all but the first halve the side.
    """
    tokenizer = build_tokenizer()
    text = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=text_layers,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionConfig(
        sample_size=cells,
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
        block_out_channels=(4,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=cells * 2 ** (levels - 1),
    )
    return StableDiffusionPipeline(
        make(UNet2DConditionModel, unet),
        make(AutoencoderKL, vae),
        make(CLIPTextModel, text),
        tokenizer,
        SCHEDULER,
    )


def pictures(count: int, seed: int = 0, shape: tuple[int, int] = (20, 18)) -> list[np.ndarray]:
    """Random images, uint8."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*shape, 3), np.uint8) for _ in range(count)]


def subject(token: str = "<new1>", word: str = "seven", **changes) -> Concept:
    """Three pictures of a subject and two of its class."""
    return Concept(token, word, pictures(3), class_images=pictures(2, 1), **changes)
