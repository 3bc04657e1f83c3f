"""Class images for prior preservation: drawn with the model itself, before it learns a subject.

As in Custom Diffusion (Kumari et al. 2023, arXiv 2212.04488, section 3.2, with generated images)
and DreamBooth (Ruiz et al. 2023, arXiv 2208.12242, section 3.3), the model says what the class
looks like.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..diffusion.text_to_image import text_to_image
from ..subjects.images import Concept

# Per concept: `num_class_images` in diffusers' examples/custom_diffusion and examples/dreambooth
# (README.md), whose words are "200-300 works well for most cases".
CLASS_IMAGES = 200


def draw_class_images(
    pipeline: StableDiffusionPipeline,
    prompt: str,
    count: int = CLASS_IMAGES,
    *,
    seed: int = 0,
    first: int = 0,
    steps: int = 50,
    guidance: float = 6.0,
    **options: Any,
) -> UInt8[np.ndarray, "N H W 3"]:
    """Images of a class, uint8, by DDIM with eta 1, as Custom Diffusion's code draws them.

    Args:
      pipeline: the model before it is personalized.
      prompt: of the class, such as "dog".
      count: how many.
      seed: of the noise; image n draws from (seed, n).
      first: number of the first image, so that a part of them can be drawn.
      steps, guidance: of sampling.
      options: more of calling a `TextToImage`.
    """
    return text_to_image(
        pipeline,
        [prompt] * count,
        seed=seed,
        first_index=first,
        sampler="ddim",
        eta=1.0,
        num_inference_steps=steps,
        guidance_scale=guidance,
        **options,
    )


def lacking_class_images(concepts: Sequence[Concept], config: Any) -> list[Concept]:
    """The concepts that have no class images while the settings preserve a prior."""
    return [each for each in concepts if config.prior_weight and not len(each.class_images)]


def with_class_images(
    pipeline: StableDiffusionPipeline, concepts: Sequence[Concept], config: Any, *, seed: int = 0
) -> list[Concept]:
    """The concepts with class images drawn for those that need some and have none.

    A warning says how many are drawn, which takes longer than learning where the model is large.

    Args:
      pipeline: the model before it is personalized.
      concepts: what is to be learnt.
      config: settings of the method; without a `prior_weight` nothing is drawn.
      seed: of the noise.
    """
    if not (lacking := lacking_class_images(concepts, config)):
        return list(concepts)
    names = ", ".join(f"{each.token} ({each.word})" for each in lacking)
    warnings.warn(
        f"{CLASS_IMAGES} class images are drawn first for each of {names}, which has none "
        f"(prior_weight={config.prior_weight}). Give them as class_images to draw them once "
        "(draw_class_images), or set prior_weight to 0 to do without.",
        stacklevel=3,
    )

    def completed(concept: Concept) -> Concept:
        if not any(concept is each for each in lacking):
            return concept
        prompt = concept.class_prompt or concept.word
        images = draw_class_images(pipeline, prompt, CLASS_IMAGES, seed=seed)
        return dataclasses.replace(concept, class_images=list(images))

    return [completed(concept) for concept in concepts]
