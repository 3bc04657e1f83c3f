"""A pipeline of Stable Diffusion 1.5's architecture with random weights, for benchmarks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from stable_diffusion import CONFIGS

import conceptax
from conceptax.converters import load_pytorch
from conceptax.flax_models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from conceptax.flax_models.clip import CLIPTextConfig, CLIPTextModel
from conceptax.flax_models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel

LATENT_SIZES = {"full": 64, "tiny": 16}


def random_pipeline(size: str) -> Any:
    """The three models around the bundled tokenizer, 77 tokens long, for bfloat16 computation.

    UNet and autoencoder are stored in bfloat16, the text encoder in float32; blocks are recomputed
    in the backward pass.
    """
    rng = np.random.default_rng(0)

    def model(kind, config, param_dtype):
        settings = {"dtype": jnp.bfloat16, "remat": True, "param_dtype": param_dtype}
        graphdef, abstract = nnx.split(
            nnx.eval_shape(lambda: kind(config, **settings, rngs=nnx.Rngs(0)))
        )
        state = jax.tree.map(
            lambda leaf: jnp.asarray(
                rng.standard_normal(leaf.shape, np.float32) * 0.02, leaf.dtype
            ),
            nnx.to_pure_dict(abstract),
        )
        return nnx.merge(graphdef, state)

    bundled = load_pytorch(conceptax.bundled_model())
    tokenizer = bundled.tokenizer
    tokenizer.model_max_length = 77
    configs = CONFIGS[size]
    return dataclasses.replace(
        bundled,
        unet=model(
            UNet2DConditionModel,
            UNet2DConditionConfig(**configs["unet"], sample_size=LATENT_SIZES[size]),
            jnp.bfloat16,
        ),
        vae=model(AutoencoderKL, AutoencoderKLConfig(**configs["vae"]), jnp.bfloat16),
        text_encoder=model(
            CLIPTextModel,
            CLIPTextConfig(**configs["text"] | {"eos_token_id": tokenizer.eos_token_id}),
            jnp.float32,
        ),
        tokenizer=tokenizer,
    )
