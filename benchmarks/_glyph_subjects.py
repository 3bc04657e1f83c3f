"""What the studies draw beside the glyphs world: a seven in two tones, and a digit that moves.

The seven is a subject to personalize on: one writer's, where all other digits have one tone.  The
handwriting is a sample that neither the bundled model nor its judge learnt from; its upper half is
yellow and its lower half blue.  Both are among the world's six colors: the bundled autoencoder
turns any other, such as orange, into the nearest of them.
"""

import numpy as np
from jaxtyping import Bool, UInt8
from scipy import ndimage

from conceptax.methods.glyphs.captions import COLORS, TEXTURES
from conceptax.methods.glyphs.world import (
    COLOR_VALUES,
    IMAGE_SIZE,
    Jitter,
    background,
    ink,
    load_split,
    paint,
    render,
    to_bytes,
    varied,
)

DIGIT, WORD, TEXTURE = 7, "seven", "grass"
TONES = ("yellow", "blue")  # above, below
_TONES = COLOR_VALUES[[COLORS.index(tone) for tone in TONES]]
_SAMPLE = 1  # among the sevens of the split


def subject_images(count: int = 5, seed: int = 0) -> UInt8[np.ndarray, "N 64 64 3"]:
    """Images of the subject, all on one texture, as a few photographs of a thing often are.

    Args:
      count: N.
      seed: of the backgrounds and of how a writer's hand varies.
    """
    split = load_split("judge_test")
    spline = split.splines[split.of(DIGIT)[_SAMPLE]]
    fill = np.repeat(_TONES, IMAGE_SIZE // 2, axis=0)[:, None]  # [64, 1, 3]
    texture = TEXTURES.index(TEXTURE)
    rngs = (np.random.default_rng([seed, index]) for index in range(count))
    return np.stack([render(rng, spline, fill, texture) for rng in rngs])


def shows_tones(images: UInt8[np.ndarray, "N 64 64 3"]) -> Bool[np.ndarray, " N"]:
    """Which images show both tones, the first above the second.

    A pixel has a tone within a distance of 0.35 in sRGB; each tone takes a fiftieth of the image or
    more, which is a third of what it takes in `subject_images`.
    """
    distances = np.linalg.norm(images[..., None, :] / 255.0 - _TONES, axis=-1)  # [N, H, W, 2]
    near = distances < 0.35
    area = near.mean((1, 2))
    rows = np.arange(IMAGE_SIZE)[:, None, None]
    height = (near * rows).sum((1, 2)) / np.maximum(near.sum((1, 2)), 1)  # [N, 2], downwards
    return (area > 0.02).all(-1) & (height[:, 0] < height[:, 1])


def render_video(
    rng: np.random.Generator,
    spline: np.ndarray,
    color: int,
    texture: int,
    *,
    frames: int,
    speed: float = 1.5,
    jitter: Jitter | None = None,
) -> np.ndarray:
    """A digit that crosses a texture, which stands still: uint8 [F,64,64,3].

    It moves in a random direction, `speed` pixels a frame, and is in the middle of the image in
    the middle of the video. The other arguments are those of `render`.
    """
    jitter = jitter or Jitter()
    image, coverage = background(rng, texture), ink(rng, spline, jitter)
    fill = varied(rng, COLOR_VALUES[color], jitter)
    angle = rng.uniform(0, 2 * np.pi)
    step = speed * np.array([np.sin(angle), np.cos(angle)])
    moved = (ndimage.shift(coverage, (n - (frames - 1) / 2) * step, order=1) for n in range(frames))
    return np.stack([to_bytes(paint(image, each, fill)) for each in moved])
