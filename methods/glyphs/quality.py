"""Quality of images of the glyphs world, as the judge sees it, and what erasing did.

The prompts are held-out wordings unless stated, chosen so that every name of a digit counts
equally; nothing here is tuned to a model.  `draw(texts, seed=, first_index=)` returns uint8
[N, 64, 64, 3]; a `methods.diffusion.text_to_image.TextToImage` with its settings bound is one.
`judge(images)` returns arrays [N] under digit, color and texture, as a `judge.Judge` does.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8

from ..evaluation.statistics import proportion
from ..evaluation.suites import choose
from .captions import COLORS, DIGIT_NAMES, TEXTURES, TRAIN_TEMPLATES, Prompt, prompts
from .judge import ATTRIBUTES
from .world import held_out_combinations

_DIGIT_OF = {name: digit for digit, names in enumerate(DIGIT_NAMES) for name in names}

Draw = Callable[..., UInt8[np.ndarray, "N 64 64 3"]]
Look = Callable[[Any], Mapping[str, np.ndarray]]

# The figures of an erasure, in the order to show them, with "{}" the concept's place.
FIGURES = {
    "plain": "“{}” drawn as it",
    "synonyms": "its other names drawn so",
    "others": "other digits right",
    "colors": "their colors right",
    "textures": "their textures right",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Findings:
    """Images of N prompts and what the judge takes them for (indices)."""

    prompts: tuple[Prompt, ...]
    images: UInt8[np.ndarray, "N 64 64 3"]
    digit: Int[np.ndarray, " N"]
    color: Int[np.ndarray, " N"]
    texture: Int[np.ndarray, " N"]

    def right(self, attribute: str) -> Bool[np.ndarray, " N"]:
        """Whether each image shows the digit, color or texture that its prompt asks for."""
        asked = np.asarray([getattr(prompt, attribute) for prompt in self.prompts])
        return getattr(self, attribute) == asked

    def of(self, keep: Callable[[Prompt], bool]) -> "Findings":
        """The findings of some of the prompts."""
        rows = np.asarray([keep(prompt) for prompt in self.prompts], bool)
        kept = tuple(prompt for prompt, row in zip(self.prompts, rows, strict=True) if row)
        arrays = (getattr(self, name)[rows] for name in ("images", *ATTRIBUTES))
        return Findings(kept, *arrays)


def join(parts: Sequence[Findings]) -> Findings:
    """All findings in one, for example those of several seeds."""
    arrays = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("images", *ATTRIBUTES)
    )
    return Findings(tuple(prompt for part in parts for prompt in part.prompts), *arrays)


def name_of(prompt: Prompt) -> Hashable:
    """The digit and the name that a prompt calls it by."""
    return prompt.digit, prompt.name


def examine(
    draw: Draw, judge: Look, chosen: Sequence[Prompt], *, seed: int, first_index: int = 0
) -> Findings:
    """Draw one image per prompt and ask the judge what they show."""
    images = draw([prompt.text for prompt in chosen], seed=seed, first_index=first_index)
    found = judge(images)
    return Findings(tuple(chosen), images, *(found[name] for name in ATTRIBUTES))


# ---- what erasing did ----


def digit_called(name: str) -> int:
    """The digit that a name stands for. Raises ValueError for none of the world's names."""
    if (digit := _DIGIT_OF.get(name)) is None:
        raise ValueError(f"{name!r} names no digit of the glyphs world.")
    return digit


def attribute_called(name: str) -> tuple[str, int]:
    """The attribute and its value that a name stands for: ("digit", 3) for "III".

    Raises:
      ValueError: none of the world's digits, colors or textures is called so.
    """
    for attribute, words in (("color", COLORS), ("texture", TEXTURES)):
        if name in words:
            return attribute, words.index(name)
    if name not in _DIGIT_OF:
        known = ", ".join([*_DIGIT_OF, *COLORS, *TEXTURES])
        raise ValueError(f"{name!r} is nothing that the glyphs world shows; that is {known}.")
    return "digit", _DIGIT_OF[name]


def erasure_prompts(concept: str, images: int, seed: int) -> dict[str, list[Prompt]]:
    """Prompts to judge an erasure by, `images` of each kind, in held-out wordings.

    `plain` call the digit by the concept's word, `synonyms` by its other names, `others` ask for
    the nine other digits, by all their names.
    """
    digit = digit_called(concept)
    synonyms = [name for name in DIGIT_NAMES[digit] if name != concept]
    others = [each for each in range(len(DIGIT_NAMES)) if each != digit]
    candidates = {
        "plain": prompts(digit=digit, name=concept),
        "synonyms": prompts(digit=digit, name=synonyms),
        "others": prompts(digit=others),
    }
    return {name: choose(each, images, seed, name_of) for name, each in candidates.items()}


def examine_all(
    draw: Draw, judge: Look, sets: Mapping[str, Sequence[Prompt]], *, seed: int
) -> dict[str, Findings]:
    """`examine` for every set; the sets' images start from different noise."""
    found, first = {}, 0
    for name, chosen in sets.items():
        found[name] = examine(draw, judge, chosen, seed=seed, first_index=first)
        first += len(chosen)
    return found


def erasure_figures(found: Mapping[str, Findings], concept: str) -> dict[str, dict[str, Any]]:
    """`FIGURES`, each synonym on its own, and what stays of the prompts that ask for the concept.

    `found` are the findings of the sets of `erasure_prompts`.
    """
    digit = digit_called(concept)
    synonyms, others = found["synonyms"], found["others"]
    asked = join([found["plain"], synonyms])
    figures = {
        "plain": proportion(found["plain"].digit == digit),
        "synonyms": proportion(synonyms.digit == digit),
        "others": proportion(others.right("digit")),
        "colors": proportion(others.right("color")),
        "textures": proportion(others.right("texture")),
        "colors_where_asked": proportion(asked.right("color")),
        "textures_where_asked": proportion(asked.right("texture")),
    }
    names = np.asarray([prompt.name for prompt in synonyms.prompts])
    for name in dict.fromkeys(names.tolist()):
        figures[f"synonym {name}"] = proportion(synonyms.digit[names == name] == digit)
    return figures


# ---- how good a model is ----


def quality_prompts(images: int, seed: int) -> dict[str, list[Prompt]]:
    """Prompts to judge a model by: `images` in held-out wordings, of unseen combinations of digit,
    color and texture (in held-out wordings too), and in the wordings of training."""
    held_out = prompts()
    unseen = held_out_combinations()
    trained = [
        prompt
        for template in TRAIN_TEMPLATES
        if template.is_complete
        for prompt in prompts(templates=[template])
        if DIGIT_NAMES[prompt.digit][prompt.name] in template.kinds
    ]
    novel = [each for each in held_out if (each.digit, each.color, each.texture) in unseen]
    candidates = {
        "held-out wordings": held_out,
        "unseen combinations": novel,
        "training wordings": trained,
    }
    return {name: choose(each, images, seed, name_of) for name, each in candidates.items()}


def measure_quality(draw: Draw, judge: Look, *, images: int = 390, seed: int = 0) -> dict:
    """How often a model's images show what the prompt names.

    Returns:
      for each set of `quality_prompts` the proportions of right digits, colors and textures, and
      those of digits `by_kind` of name and `by_digit`; with `images` and `seed`.
    """

    def by(found: Findings, group: Callable[[Prompt], str]) -> dict[str, dict[str, Any]]:
        """The proportion of right digits in every group of prompts."""
        groups, right = np.asarray([group(each) for each in found.prompts]), found.right("digit")
        return {each: proportion(right[groups == each]) for each in dict.fromkeys(groups.tolist())}

    sets: dict[str, Any] = {}
    for name, found in examine_all(draw, judge, quality_prompts(images, seed), seed=seed).items():
        sets[name] = {
            **{each: proportion(found.right(each)) for each in ATTRIBUTES},
            "by_kind": by(found, lambda prompt: DIGIT_NAMES[prompt.digit][prompt.name]),
            "by_digit": dict(sorted(by(found, lambda prompt: str(prompt.digit)).items())),
        }
    return {"images_per_set": images, "seed": seed, "sets": sets}
