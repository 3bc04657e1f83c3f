"""Word erasure: SAGE without its self-check, so that only the concept's own words are erased.

What remains of the cycle (`sage`) is self-erasure on plain prompts, with the same global and local
retention.  It shows what the self-check is for: other names of the concept stay.
"""

import dataclasses
from typing import Literal

from ..settings import fixed
from . import sage


@dataclasses.dataclass(frozen=True)
class WordConfig(sage.SageConfig):
    """All settings of a word erasure, for `sage.erase`: those of SAGE but for the self-check's."""

    check: Literal["anchor", "recall"] = fixed("recall")
    check_steps: int = fixed(0)
    check_rate: float = fixed(0.0)
    check_optimizer: Literal["adam", "sign"] = fixed("adam")
    check_weight: float = fixed(0.0)
    check_radius: float | None = fixed(None)
    check_start: Literal["prompt", "random"] = fixed("prompt")
    check_states: Literal["pooled", "tokens"] = fixed("pooled")
    free_concept: bool = fixed(False)
