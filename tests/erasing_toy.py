"""A pipeline of the real classes, small enough to erase from in a test."""

import itertools

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
