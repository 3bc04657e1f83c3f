"""A pipeline of the real classes, small enough to erase from in a test."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from personalizing_toy import pipeline_of

from conceptax.flax_models.pipelines.stable_diffusion import StableDiffusionPipeline


def tiny_pipeline() -> StableDiffusionPipeline:
    """Initial weights, 4x4 latents, the glyphs tokenizer."""
    seeds = itertools.count()
    return pipeline_of(
        lambda kind, config: kind(config, rngs=nnx.Rngs(next(seeds))),
        text_layers=2,
        cells=4,
        levels=1,
    )


PHRASES = {"vocabulary": 40, "similarity_cap": 1.0, "templates": ("a {}", "a photo of a {}")}


def moved(params, size=0.02):
    """Parameters away from the original's, where no gradient vanishes."""
    return jax.tree.map(lambda p: p + size * jnp.sin(jnp.arange(p.size).reshape(p.shape)), params)


def agree(ours, theirs, tolerance=2e-5):
    """Two gradients, against the largest entry of the whole."""
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(theirs))
    assert scale > 0
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * scale)


def one(unet, latent, time, hidden):
    """A prediction for one prompt alone."""
    return unet(latent[None], time, hidden[None])[0]
