"""Images of a subject's class, for prior preservation: what a folder lacks, the model draws.

As in Custom Diffusion (arXiv 2212.04488, section 3.2, with generated images): the model itself
says, before it is trained, what the class looks like.
"""

from collections.abc import Sequence
from pathlib import Path

from conceptax.flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from conceptax.methods.diffusion.text_to_image import text_to_image
from conceptax.methods.subjects.images import ImageError, image_files
from conceptax.reporting.pictures import save_png


def complete_class_images(
    pipeline: StableDiffusionPipeline,
    folders: Sequence[tuple[Path, str]],
    count: int,
    seed: int,
    *,
    steps: int = 50,
    guidance: float = 6.0,
) -> int:
    """Draw images until every folder has `count`.

    Image n of a folder is drawn from the noise of the seed's image n, by DDIM with eta 1, so a
    folder that was completed in two runs holds what one run would have drawn.

    Args:
      pipeline: the model before it is personalized.
      folders: each with the prompt of its class; one that does not exist is made.
      count: images that each should have.
      seed: of the noise.
      steps, guidance: of sampling.

    Returns:
      how many were drawn.
    """
    drawn = 0
    for folder, prompt in folders:
        try:
            have = len(image_files(folder))
        except ImageError:  # none yet
            have = 0
        if have >= count:
            continue
        images = text_to_image(
            pipeline,
            [prompt] * (count - have),
            seed=seed,
            first_index=have,
            sampler="ddim",
            eta=1.0,
            num_inference_steps=steps,
            guidance_scale=guidance,
        )
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images, start=have):
            save_png(image, folder / f"drawn_{number:04d}.png", {"prompt": prompt})
        drawn += len(images)
    return drawn
