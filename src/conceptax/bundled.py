"""Find what comes with the package: the text-to-image model."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"


def bundled_model() -> Path:
    """Folder of the text-to-image model that comes with the package, in the diffusers layout.

    It draws handwritten digits on textures ("a red three on brick"); beside the pipeline it holds
    `clip/`, the CLIP whose text tower the pipeline uses, and `judge/`, a classifier of its images.

    Raises:
      FileNotFoundError: this installation lacks it.
    """
    folder = ASSETS / "glyphs"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"The bundled model is not in {folder}. Install conceptax again, or build the model "
            "with `conceptax glyphs train` and pass its folder with --model."
        )
    return folder
