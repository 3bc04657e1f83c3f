"""Image preprocessing: resized, cut and normalized as a model's folder says.

What transformers' image processors do with `preprocessor_config.json`: bytes are resized by Pillow,
the center is cut out, and the pixels are scaled and normalized.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

Images = UInt8[np.ndarray, "_ _ _ 3"] | Sequence[UInt8[np.ndarray, "_ _ 3"]]  # of any sizes

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How bytes become a model's pixels.

    Attributes:
      size: pixels of the shorter side after resizing; (height, width) resizes to just that; None
        does not resize.
      crop: (height, width) of the center that is kept; None keeps all.
      resample: Pillow's number of the interpolation; 3 is bicubic.
      scale: factor of the bytes.
      mean, std: of the scaled channels.
    """

    size: int | tuple[int, int] | None
    crop: tuple[int, int] | None = None
    resample: int = 3
    scale: float = 1 / 255
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @classmethod
    def clip(cls, side: int) -> "Preprocessing":
        """CLIP's, where its folder does not say: the center square, CLIP's statistics."""
        return cls(side, (side, side))

    @classmethod
    def blip(cls, side: int) -> "Preprocessing":
        """BLIP's and BLIP-2's, where the folder does not say: the whole image, made a square."""
        return cls((side, side))

    @classmethod
    def dinov2(cls) -> "Preprocessing":
        """DINOv2's, where its folder does not say: shorter side 256, the center's 224, ImageNet's
        statistics."""
        return cls(256, (224, 224), mean=IMAGENET_MEAN, std=IMAGENET_STD)

    @classmethod
    def imagenet(cls, size: tuple[int, int]) -> "Preprocessing":
        """A classifier's, where nothing says: the whole image, bilinear, ImageNet's statistics."""
        return cls(size, resample=2, mean=IMAGENET_MEAN, std=IMAGENET_STD)

    def updated(self, config: Mapping[str, Any], source: str) -> "Preprocessing":
        """These settings with those of a parsed `preprocessor_config.json` in their place.

        Raises:
          ValueError: a setting that cannot be read; the message starts with `source`.
        """
        changes: dict[str, Any] = {}
        try:
            if "size" in config:
                changes["size"] = _size(config["size"], square=isinstance(self.size, tuple))
            if "crop_size" in config:
                crop = _size(config["crop_size"], square=True)
                if isinstance(crop, int):
                    raise ValueError(f"crop_size {config['crop_size']!r} names no height and width")
                changes["crop"] = crop
            if "resample" in config:
                changes["resample"] = int(Image.Resampling(config["resample"]))
            for name in ("mean", "std"):
                if f"image_{name}" in config:
                    values = config[f"image_{name}"]
                    changes[name] = tuple(float(value) for value in values)
                    if len(changes[name]) != 3:
                        raise ValueError(f"statistics are of three channels, received {values!r}")
            if "rescale_factor" in config:
                changes["scale"] = float(config["rescale_factor"])
            off = {
                "do_resize": {"size": None},
                "do_center_crop": {"crop": None},
                "do_rescale": {"scale": 1.0},
                "do_normalize": {"mean": (0.0,) * 3, "std": (1.0,) * 3},
            }
            for key, without in off.items():
                if config.get(key) is False:
                    changes |= without
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{source}: {error}.") from error
        return dataclasses.replace(self, **changes)

    def prepare(self, images: Images) -> UInt8[np.ndarray, "N h w 3"]:
        """Images of any sizes, resized and cut.

        Raises:
          ValueError: no image, a crop that is larger than a resized image, or results of several
            sizes, which only settings without a crop give.
        """
        if len(images) == 0:
            raise ValueError("there are no images to measure.")
        prepared = [self._prepare(image) for image in images]
        if len(shapes := {image.shape for image in prepared}) > 1:
            raise ValueError(
                "this model's settings cut nothing, so its images must be of one size; received "
                f"{sorted(shapes)}."
            )
        return np.stack(prepared)

    def _prepare(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
        height, width = image.shape[:2]
        if self.size is not None:
            if isinstance(self.size, int):
                short, size = min(height, width), self.size
                height, width = int(size * height / short), int(size * width / short)
            else:
                height, width = self.size
            if (height, width) != image.shape[:2]:
                resample = Image.Resampling(self.resample)
                image = np.asarray(Image.fromarray(image).resize((width, height), resample))
        if self.crop is None:
            return image
        rows, columns = self.crop
        if rows > height or columns > width:
            raise ValueError(
                f"the crop of {rows}x{columns} pixels is larger than the resized image, which has "
                f"{height}x{width}."
            )
        top, left = (height - rows) // 2, (width - columns) // 2
        return image[top : top + rows, left : left + columns]

    def normalize(self, images: UInt8[Array, "N h w 3"]) -> Float[Array, "N h w 3"]:
        """Bytes -> normalized float32 pixels."""
        pixels = images.astype(jnp.float32) * self.scale
        return (pixels - jnp.asarray(self.mean)) / jnp.asarray(self.std)


def bilinear(
    images: Float[np.ndarray, "N H W C"] | UInt8[np.ndarray, "N H W C"], size: tuple[int, int]
) -> Float[np.ndarray, "N h w C"]:
    """Images interpolated between the centers of pixels, whatever the factor.

    What OpenCV's INTER_LINEAR and PyTorch's `interpolate(mode="bilinear")` do; Pillow would average
    where it makes them smaller.
    """
    resized = images.astype(np.float32)
    for axis, length in ((1, size[0]), (2, size[1])):
        before = resized.shape[axis]
        if before == length:
            continue
        place = np.clip((np.arange(length) + 0.5) * before / length - 0.5, 0, before - 1)
        low = np.minimum(place.astype(int), max(before - 2, 0))
        share = (place - low).astype(np.float32).reshape([-1 if n == axis else 1 for n in range(4)])
        upper = resized.take(np.minimum(low + 1, before - 1), axis)
        resized = resized.take(low, axis) * (1 - share) + upper * share
    return resized


def _size(value: Any, *, square: bool) -> int | tuple[int, int]:
    """{"shortest_edge": 224}, {"height": 384, "width": 384}, or a number, as old files have it."""
    if isinstance(value, int):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    if "shortest_edge" in value:
        sides = (value["shortest_edge"],)
    else:
        sides = value["height"], value["width"]
    if not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"a size is made of positive integers, received {value!r}")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])
