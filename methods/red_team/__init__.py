"""Attacks that try to bring an erased concept back, on one interface.

    attack(original, edited, "three", TokenSearchConfig(), images=images, prompts=prompts, seed=0)

The settings say which attack it is.  Each module here has the same `run`, and gives one `Attempt`
after the other: a model, what to ask it for, and what that cost.  Whether an attempt succeeds is
for a judge of its images to say.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..settings import Method, method_of
from . import concept_inversion, relapse, token_search
from .common import Attempt, Target
from .concept_inversion import ConceptInversionConfig
from .relapse import RelapseConfig
from .token_search import TokenSearchConfig


@dataclasses.dataclass(frozen=True)
class Attack(Method):
    """One way to bring a concept back.

    Attributes:
      attempts: its function: a `Target`, settings, a seed and options -> what `run` returns, one
        after the other as they come about.
    """

    attempts: Callable[..., Iterator[Attempt]]

    def run(
        self,
        original: StableDiffusionPipeline,
        edited: StableDiffusionPipeline,
        concept: str,
        config: Any = None,
        *,
        images: UInt8[np.ndarray, "M H W 3"],
        prompts: Sequence[str],
        seed: int = 0,
        **options: Any,
    ) -> list[Attempt]:
        """`attack` with this one; without settings, with its own."""
        target = Target(original, edited, concept, images, prompts)
        return list(self.attempts(target, config or self.config(), seed=seed, **options))


ATTACKS: Mapping[str, Attack] = MappingProxyType(
    {
        "concept-inversion": Attack(
            "Concept Inversion", ConceptInversionConfig, concept_inversion.run
        ),
        "token-search": Attack("token search", TokenSearchConfig, token_search.run),
        "relapse": Attack("relapse", RelapseConfig, relapse.run),
    }
)
# The attack that some settings belong to; ValueError: they are of no attack.
attack_of = functools.partial(method_of, ATTACKS)


def attack(
    original: StableDiffusionPipeline,
    edited: StableDiffusionPipeline,
    concept: str,
    config: Any,
    *,
    images: UInt8[np.ndarray, "M H W 3"],
    prompts: Sequence[str],
    seed: int = 0,
    **options: Any,
) -> list[Attempt]:
    """Attack an edited model with the attack that `config` belongs to.

    Args:
      original: the model before erasing.
      edited: the model to attack; it stays as it is.
      concept: what was erased, as the prompts name it.
      config: the settings of one of `ATTACKS`.
      images: of the concept, as the original model draws them; image m shows what prompt m,
        counted round, asks for.
      prompts: texts that ask for the concept.
      seed: of everything random in the run.
      options: passed to the training loop (checkpoint_dir, checkpoint_every, progress, ...); with a
        checkpoint folder of its own, an interrupted attack is resumed by the same call.

    Returns:
      one attempt for each of the settings' snapshots and for the last step.
    """
    return attack_of(config).run(
        original, edited, concept, config, images=images, prompts=prompts, seed=seed, **options
    )


__all__ = [
    "ATTACKS",
    "Attack",
    "Attempt",
    "ConceptInversionConfig",
    "RelapseConfig",
    "Target",
    "TokenSearchConfig",
    "attack",
    "attack_of",
]
