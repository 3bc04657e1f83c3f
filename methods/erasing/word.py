"""Word erasure: SAGE without its self-check, so that only the concept's own words are erased.

What remains of the cycle (`sage`) is self-erasure on plain prompts, with the same global and local
retention.  It shows what the self-check is for: other names of the concept stay.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..settings import fixed
from ..text.phrases import Retained
from . import sage


@dataclasses.dataclass(frozen=True)
class WordConfig(sage.SageConfig):
    """All settings of a word erasure: those of SAGE but for the self-check's."""

    check: Literal["anchor", "recall"] = fixed("recall")
    check_steps: int = fixed(0)
    check_rate: float = fixed(0.0)
    check_optimizer: Literal["adam", "sign"] = fixed("adam")
    check_weight: float = fixed(0.0)
    check_radius: float | None = fixed(None)
    check_start: Literal["prompt", "random"] = fixed("prompt")
    check_states: Literal["pooled", "tokens"] = fixed("pooled")
    free_concept: bool = fixed(False)


def erase(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: WordConfig | None = None,
    *,
    retain: Sequence[str] | Retained | None = None,
    seed: int = 0,
    **options: Any,
) -> StableDiffusionPipeline:
    """Erase concepts by their words alone; arguments and result as of `sage.erase`."""
    config = config or WordConfig()
    return sage.erase(pipeline, concepts, config, retain=retain, seed=seed, **options)
