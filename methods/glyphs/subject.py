"""A subject to personalise on: one writer's seven, in two tones that no caption has a word for.

The handwriting is a sample that neither the bundled model nor its judge learnt from; its upper
half is orange and its lower half cyan, and neither colour is among the world's six.
"""

import numpy as np
from jaxtyping import UInt8

from .captions import TEXTURES
from .world import IMAGE_SIZE, Jitter, load_split, render_filled

DIGIT, WORD, TEXTURE = 7, "seven", "grass"
_TONES = np.array([[0.98, 0.55, 0.10], [0.10, 0.78, 0.86]], np.float32)  # above, below
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
    return np.stack([
        render_filled(
            np.random.default_rng([seed, index]), spline, fill, TEXTURES.index(TEXTURE),
            jitter=Jitter(),
        )
        for index in range(count)
    ])  # fmt: skip
