"""conceptax erases, learns and locates visual concepts in JAX.

The rooms of the house, each imported on its own so that this module stays light:

* `conceptax.flax_models`: what computes. NNX modules, one architecture per file.
* `conceptax.methods`: what trains. Losses, pure steps, samplers, data, the training loop.
* `conceptax.kernels`: what is fast.
* `conceptax.converters`: what travels. PyTorch weights in and out.
* `conceptax.cli`: the `conceptax` command.
"""

from pathlib import Path

__version__ = "0.1.0"


def bundled_model() -> Path:
    """Folder of the text-to-image model that comes with the package, in the diffusers layout.

    It draws handwritten digits on textures ("a red three on brick"); beside the pipeline it holds
    `clip/`, the CLIP whose text tower the pipeline uses, and `judge/`, a classifier of its images.

    Raises:
      FileNotFoundError: this installation lacks it.
    """
    folder = Path(__file__).parent / "assets" / "glyphs"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"The bundled model is not in {folder}. Install conceptax again, or build the model "
            "with `conceptax glyphs train` and pass its folder with --model."
        )
    return folder
