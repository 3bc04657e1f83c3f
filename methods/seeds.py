"""Seeds: what random numbers are made from."""

from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from ..errors import ConceptaxError

MOST = 2**32 - 1  # what jax uses of a seed; it drops the bits above in silence


class SeedError(ConceptaxError, ValueError):
    """A number that is no seed."""


def check_seed(seed: Any, name: str = "the seed") -> int:
    """The seed, if it is a whole number from 0 to 2**32 - 1.

    Raises:
      SeedError: it is not.
    """
    if not 0 <= seed <= MOST or seed != int(seed):
        raise SeedError(
            f"{name} must be a whole number from 0 to {MOST} (2**32 - 1), received {seed}."
        )
    return int(seed)


def seed_key(seed: int) -> PRNGKeyArray:
    """`jax.random.key` of a seed that is one.

    Raises:
      SeedError: it is not (`check_seed`).
    """
    return jax.random.key(check_seed(seed))
