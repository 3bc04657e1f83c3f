"""Prompt suites that an erasure is evaluated on.

Every prompt says which phrase its image should show, and which word it uses for that: a prompt for
the phrase "three" may say "III".
"""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from ..text.phrases import ConceptError

Candidate = TypeVar("Candidate")

# Wordings that `concepts.TEMPLATES`, in which concepts are erased, does not hold.
HELD_OUT_TEMPLATES = (
    "an image of {}",
    "a rendering of {}",
    "a close-up of {}",
    "look at this {}",
    "here is {}",
    "{}, centered",
    "a scene with {} in it",
    "an illustration that shows {}",
    "a view of {} in daylight",
    "{} as one would imagine it",
)


class Asked(NamedTuple):
    """A prompt's text, its word for the phrase, and the phrase that its image should show."""

    text: str
    word: str
    phrase: str


@dataclasses.dataclass(frozen=True)
class Suites:
    """Prompts of an evaluation.

    Attributes:
      plain: concept -> prompts with its own word, in wordings that erasing has not seen.
      synonyms: concept -> the same with other names of it; concepts without any are absent.
      retained: "neighbors" and "distant" -> prompts for what should stay; either may be absent.
    """

    plain: Mapping[str, Sequence[Asked]]
    synonyms: Mapping[str, Sequence[Asked]]
    retained: Mapping[str, Sequence[Asked]]

    @property
    def phrases(self) -> list[str]:
        """Everything that an image may be asked about, each once."""
        groups = (*self.plain.values(), *self.synonyms.values(), *self.retained.values())
        return list(dict.fromkeys(asked.phrase for group in groups for asked in group))


def choose(
    candidates: Iterable[Candidate], count: int, seed: int, group: Callable[[Candidate], Hashable]
) -> list[Candidate]:
    """`count` prompts in which every group is equally frequent, to within one.

    Within a group they are drawn without repetition, as long as there are enough.
    """
    rng = np.random.default_rng(seed)
    groups: dict[Hashable, list[Candidate]] = {}
    for prompt in candidates:
        groups.setdefault(group(prompt), []).append(prompt)
    if count < 1 or not groups:
        raise ValueError(f"need at least one image and one prompt, got {count} of {len(groups)}.")
    queues = [[each[i] for i in rng.permutation(len(each))] for each in groups.values()]
    queues = [queues[i] for i in rng.permutation(len(queues))]
    turns = math.ceil(count / len(queues))
    return [queue[turn % len(queue)] for turn in range(turns) for queue in queues][:count]


def phrase_suites(
    concepts: Sequence[str],
    images: int,
    seed: int,
    *,
    templates: Sequence[str] = HELD_OUT_TEMPLATES,
    synonyms: Mapping[str, Sequence[str]] | None = None,
    neighbors: Sequence[str] = (),
    distant: Sequence[str] = (),
) -> Suites:
    """Prompts for any model: phrases in templates, every phrase equally often.

    Args:
      concepts: what was erased.
      images: prompts of each kind, for each concept or for each retained group.
      seed: of the choice.
      templates: with one "{}" each; they should not be those that erasing used.
      synonyms: concept -> other names of it.
      neighbors: what resembles the concepts and should stay.
      distant: what does not and should stay.

    Raises:
      ConceptError: templates without their "{}", a phrase that is erased and retained, or synonyms
        of something else.
    """
    synonyms = synonyms or {}
    if wrong := [each for each in templates if each.count("{}") != 1] or not templates:
        raise ConceptError(f"templates need exactly one '{{}}' each; received {wrong}.")
    if unknown := sorted(set(synonyms) - set(concepts)):
        raise ConceptError(f"there are synonyms of {unknown}, and the concepts are {concepts}.")
    names = {*concepts, *(name for each in synonyms.values() for name in each)}
    if both := sorted(names & {*neighbors, *distant}):
        raise ConceptError(f"{both} cannot be both erased and retained.")
    if not (neighbors or distant):
        warnings.warn(
            "neither neighbors nor distant phrases: what broke is not seen.", stacklevel=2
        )

    def of(words: Sequence[str], phrase: str | None = None) -> list[Asked]:
        pairs = itertools.product(templates, words)
        asked = [Asked(template.format(word), word, phrase or word) for template, word in pairs]
        return choose(asked, images, seed, lambda each: each.word)

    retained = {"neighbors": neighbors, "distant": distant}
    return Suites(
        {concept: of([concept]) for concept in concepts},
        {concept: of(each, concept) for concept, each in synonyms.items() if each},
        {group: of(each) for group, each in retained.items() if each},
    )


def read_synonyms(lines: Sequence[str], concepts: Sequence[str]) -> dict[str, list[str]]:
    """Other names of concepts, from lines "concept: name"; one concept alone may be left out.

    Raises:
      ConceptError: a line that names none of several concepts.
    """
    found: dict[str, list[str]] = {}
    for line in lines:
        concept, colon, name = line.partition(":")
        if not colon and len(concepts) == 1:
            concept, name = concepts[0], line
        concept, name = concept.strip(), name.strip()
        if concept not in concepts or not name:
            raise ConceptError(
                f"the line {line!r} names no synonym: write 'concept: synonym', with a concept of "
                f"{list(concepts)}."
            )
        found.setdefault(concept, []).append(name)
    return found
