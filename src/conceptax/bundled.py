"""Find what comes with the package: the text-to-image model, and the segmenter."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
EXAMPLES = "examples"  # folder of images, in a segmenter's


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


def bundled_segmenter() -> Path:
    """Folder of the segmenter that comes with the package: a tiny MAFT+ in our own layout.

    It finds handwritten digits and the textures under them. Beside the model are `tokenizer/`;
    `segmenter.json`, which states its vocabulary and the size at which it sees images;
    `quality.json`, how well it does; and `examples/`, scenes to look at.

    Raises:
      FileNotFoundError: this installation lacks it.
    """
    folder = ASSETS / "glyph_segmenter"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"The bundled segmenter is not in {folder}. Install conceptax again, or build it with "
            "`conceptax glyphs segmenter` and pass its folder with --model."
        )
    return folder
