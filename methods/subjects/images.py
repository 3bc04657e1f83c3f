"""Concepts to learn: a token, a class word, a few images, from memory, a folder or a JSON list.

Images are uint8 `[H, W, 3]`, upright, in the order of their file names.
"""

import dataclasses
import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from ...errors import ConceptaxError
from ...text import TextError, read_text

_HEIF = (".heic", ".heif")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", *_HEIF)
_KEYS = ("instance_prompt", "class_prompt", "instance_data_dir", "class_data_dir")


class ImageError(ConceptaxError, ValueError):
    """An image that cannot be read; the message names the file."""


class ConceptListError(ConceptaxError, ValueError):
    """A list of concepts that cannot be used."""


@dataclasses.dataclass(frozen=True, eq=False)
class Concept:
    """A subject to learn.

    Attributes:
      token: its new token, `<new1>`.
      word: the word of its class, "dog".
      images: of the subject, uint8 [H, W, 3] of any sizes.
      prompt: what the images show, with the token in it; empty takes the method's own.
      class_prompt: what the class images show; empty is the class word.
      class_images: of other members of the class, for prior preservation.
      initializer: the word whose embedding the token starts from; empty takes the method's own.
    """

    token: str
    word: str
    images: Sequence[np.ndarray]
    prompt: str = ""
    class_prompt: str = ""
    class_images: Sequence[np.ndarray] = ()
    initializer: str = ""

    def __post_init__(self):
        if len(self.images) == 0:
            raise ConceptListError(f"the concept {self.token!r} has no images.")
        for image in (*self.images, *self.class_images):
            if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
                raise ConceptListError(
                    f"images are uint8 [H, W, 3]; the concept {self.token!r} has one of "
                    f"{image.dtype} {list(image.shape)}."
                )
        if not self.word.strip():
            raise ConceptListError(
                f"the concept {self.token!r} needs the word of its class, such as 'dog'."
            )
        if self.prompt and self.token not in self.prompt:
            raise ConceptListError(
                f"the prompt {self.prompt!r} lacks the concept's token {self.token!r}."
            )


def read_image(path: Path | str) -> UInt8[np.ndarray, "H W 3"]:
    """An image as its viewer shows it: turned as EXIF says, transparency on white.

    Grayscale (16 bits too), palettes and CMYK become RGB; of an animation the first frame is read.

    Raises:
      ImageError: a file that is absent, damaged, or of a kind that cannot be read here.
    """
    path = Path(path)
    if path.suffix.lower() in _HEIF:
        try:
            importlib.import_module("pillow_heif").register_heif_opener()
        except ImportError as error:
            raise ImageError(
                f"{path} is a HEIC image, and reading it needs pillow-heif: install "
                "conceptax[heic], or convert it to JPEG."
            ) from error
    try:
        with Image.open(path) as image:
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow raises many types for damaged files
        told = getattr(error, "strerror", None) or str(error)
        reason = (told.splitlines() or [type(error).__name__])[0]
        raise ImageError(
            f"{path} cannot be read as an image: {reason[:200].rstrip('.')}. Replace it or take it "
            "out."
        ) from error


def _rgb(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    if image.mode == "F":
        raise ImageError("floating-point pixels have no known range.")
    if image.mode.startswith("I"):  # 16 bits a pixel
        gray = np.clip(np.asarray(image), 0, 65535) // 257
        return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=-1)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def image_files(folder: Path | str) -> list[Path]:
    """All images of a folder, by file name; other files are skipped.

    Raises:
      ImageError: no folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(f"{folder} is not a folder of images.")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    files = [folder / name for name in names if not name.startswith(".")]
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not images:
        there = ", ".join(names[:8]) or "nothing"
        raise ImageError(f"{folder} holds no images ({', '.join(SUFFIXES)}); found {there}.")
    return images


def read_images(folder: Path | str) -> list[UInt8[np.ndarray, "H W 3"]]:
    """All images of a folder, in the order of `image_files`.

    Raises:
      ImageError: no folder, no image in it, or one that cannot be read.
    """
    return [read_image(file) for file in image_files(folder)]


def read_concepts(
    path: Path | str,
    *,
    tokens: Sequence[str] = (),
    words: Sequence[str] = (),
    initializers: Sequence[str] = (),
) -> list[Concept]:
    """Concepts from a JSON list in the layout of Custom Diffusion and ClassDiffusion.

    Its objects have `instance_prompt`, `class_prompt`, `instance_data_dir` and, for prior
    preservation, `class_data_dir`. A relative folder is looked for beside the file, then in the
    working directory.

    Args:
      path: the JSON file.
      tokens: the new tokens, one per concept; none takes the `<...>` in each instance prompt.
      words: the class words, one per concept; none takes the class prompts, without an article or
        a "photo of" in front.
      initializers: one per concept, or none.

    Raises:
      ConceptListError: a file of another layout, or unequal counts.
      ImageError: images that are absent or cannot be read.
    """
    path = Path(path)
    entries = _entries(path)
    for name, given in (("tokens", tokens), ("class words", words), ("initializers", initializers)):
        if given and len(given) != len(entries):
            raise ConceptListError(
                f"{path} holds {len(entries)} concepts, but {len(given)} {name} were given "
                f"({', '.join(given)})."
            )
    concepts = []
    for number, entry in enumerate(entries):
        prompt, kind = entry["instance_prompt"], entry["class_prompt"]
        named = sorted(set(re.findall(r"<[^<>\s]+>", prompt)))
        if not tokens and len(named) != 1:
            raise ConceptListError(
                f"{path}: concept {number}: the instance prompt {prompt!r} must hold one new token "
                f"such as '<new1>', found {named or 'none'}."
            )
        images, class_images = (
            _images(entry[key], path) if entry.get(key) else () for key in _KEYS[2:]
        )
        token = tokens[number] if tokens else named[0]
        word = words[number] if words else class_word(kind)
        start = initializers[number] if initializers else ""
        concepts.append(Concept(token, word, images, prompt, kind, class_images, start))
    return concepts


def read_class_folders(path: Path | str) -> list[tuple[Path, str]]:
    """The folders of class images in such a file, which need not exist, and their prompts.

    Raises:
      ConceptListError: a file of another layout.
    """
    path = Path(path)
    entries = [entry for entry in _entries(path) if entry.get("class_data_dir")]
    return [(_folder(entry["class_data_dir"], path), entry["class_prompt"]) for entry in entries]


def named_folders(path: Path | str) -> list[Path]:
    """All folders that such a file names, of instances and of classes.

    Raises:
      ConceptListError: a file of another layout.
    """
    path = Path(path)
    given = [entry.get(key) for entry in _entries(path) for key in _KEYS[2:]]
    return [_folder(name, path) for name in given if name]


def class_word(prompt: str) -> str:
    """The class in a class prompt: "a photo of a teddy bear" -> "teddy bear"."""
    prompt = re.sub(r"^(an? |the )?(photo|picture|image) of ", "", prompt.strip())
    return re.sub(r"^(an?|the) ", "", prompt)


def _entries(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of concepts, checked."""
    try:
        entries = json.loads(read_text(path))
    except TextError as error:
        raise ConceptListError(str(error)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConceptListError(f"cannot read the concepts in {path}: {error}.") from error
    if not isinstance(entries, list) or not entries:
        raise ConceptListError(f"{path} must hold a JSON list of concepts, at least one.")
    for number, entry in enumerate(entries):
        here = f"{path}: concept {number}"
        if not isinstance(entry, dict):
            raise ConceptListError(f"{here} must be an object with {', '.join(_KEYS)}.")
        missing = [key for key in _KEYS[:3] if not entry.get(key)]
        unknown = sorted(entry.keys() - set(_KEYS))
        wrong = [key for key in _KEYS if not isinstance(entry.get(key, ""), str | None)]
        for what, keys in (("lacks", missing), ("has unknown", unknown), ("has no text in", wrong)):
            if keys:
                raise ConceptListError(
                    f"{here} {what} {', '.join(keys)}; it takes {', '.join(_KEYS[:3])} and, for "
                    f"prior preservation, {_KEYS[3]}."
                )
    return entries


def _images(given: str, path: Path) -> list[UInt8[np.ndarray, "H W 3"]]:
    folder = _folder(given, path)
    if not folder.is_dir():
        raise ImageError(
            f"{path}: {given} is not a folder, neither beside this file nor in the working "
            "directory."
        )
    return read_images(folder)


def _folder(given: str, path: Path) -> Path:
    beside = path.parent / given
    return beside if beside.is_dir() else Path(given)
