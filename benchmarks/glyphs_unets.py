"""Other UNets for the bundled text encoder and autoencoder: another seed, or without a digit.

    python benchmarks/glyphs_unets.py OUTPUT [--seed 1] [--without 3] [--steps 4000]

The first shows whether an erased text encoder erases in a model that it was not erased for; the
second how fast a model learns a digit that it never saw, beside one that was made to forget it.
Writes a diffusers folder with the bundled model's other parts and how well it draws, by the judge.
"""

import argparse
import dataclasses
import functools
from pathlib import Path

import conceptax
from conceptax.converters import atomic_folder, load_pytorch, save_pytorch
from conceptax.methods.diffusion.text_to_image import TextToImage
from conceptax.methods.glyphs.build import BuildConfig, train_unet
from conceptax.methods.glyphs.judge import load_judge
from conceptax.methods.glyphs.quality import measure_quality
from conceptax.methods.glyphs.recipe import Recipe
from conceptax.reporting.results import environment, write_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--workdir", type=Path, help="checkpoints; default: beside the output")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--without", type=int, nargs="*", default=[], help="digits never shown")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    # As the bundled UNet learnt, which took 8,000 updates of 32 images: three parts, then one.
    last = arguments.steps // 4
    build = BuildConfig(
        seed=arguments.seed,
        without=tuple(arguments.without),
        unet=Recipe(arguments.steps - last, arguments.batch_size, 1e-3),
        refine=Recipe(last, arguments.batch_size, 6e-4, ema=0.998),
    )
    workdir = arguments.workdir or arguments.output.with_name(arguments.output.name + "-work")
    source = conceptax.bundled_model()
    pipeline = load_pytorch(source)
    with atomic_folder(arguments.output, force=True, markers=["quality.json"]) as folder:
        unet = train_unet(build, workdir, pipeline.text_encoder, pipeline.vae)
        pipeline = dataclasses.replace(pipeline, unet=unet)
        save_pytorch(pipeline, folder)
        draw = functools.partial(
            TextToImage.from_pipeline(pipeline),
            num_inference_steps=25,
            guidance_scale=5.0,
            batch_size=16,
        )
        quality = measure_quality(draw, load_judge(source / "judge"), images=195)
        record = {"quality": quality, "build": dataclasses.asdict(build), **environment()}
        write_records(folder / "quality.json", record)
    digits = quality["sets"]["held-out wordings"]["by_digit"]
    for digit, figure in digits.items():
        print(f"{digit}: {figure['count']}/{figure['of']}")


if __name__ == "__main__":
    main()
