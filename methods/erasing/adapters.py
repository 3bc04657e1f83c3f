"""Low-rank adapters of a UNet: W + A B for chosen weights, with A and B trained and W frozen.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685).
The sum is made of the parameters before a step runs the UNet, whose modules know nothing of it; so
the same losses train adapters and whole weights, and what a run ends with is a plain UNet.

For a kernel [*in, out] the adapter is "down" [*in, r] and "up" [r, out]; "up" starts at zero,
"down" uniformly in +-1/sqrt(inputs), as in SPM's code.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..seeds import seed_key
from ..settings import check_settings
from ..training import TrainState, cosine_adamw, dotted, init_state, path_filter
from .common import ErasingStatic, Frozen, UnetSettings, require_rows, schedule_and_shape

Adapters = Mapping[str, Mapping[str, Array]]  # path of a kernel -> "down" and "up"


@dataclasses.dataclass(frozen=True)
class AdapterSettings(UnetSettings):
    """The settings of erasers that train adapters: of the `trainable` kernels.

    Attributes:
      rank: of the adapters (r).
    """

    rank: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, least={"rank": 1})


@dataclasses.dataclass(frozen=True)
class AdapterStatic(ErasingStatic):
    """What a step needs and never changes, where adapters train."""

    def edited(self, params: Adapters, frozen: Frozen) -> Any:
        """The UNet with the adapters' products added."""
        return nnx.merge(self.unet, added(frozen["original"], params))


def added(params: Any, adapters: Adapters) -> Any:
    """A UNet's parameters with the adapters' products added, in float32 where there is one."""

    def sum_of(path: Any, leaf: Array) -> Array:
        adapter = adapters.get(dotted(path))
        if adapter is None:
            return leaf
        return leaf.astype(jnp.float32) + adapter["down"] @ adapter["up"]

    return jax.tree_util.tree_map_with_path(sum_of, params)


def fresh(params: Any, config: AdapterSettings, seed: int, *axes: int) -> Adapters:
    """Adapters that change nothing yet, of the kernels that the settings choose.

    Args:
      params: of the UNet.
      config: `trainable`, `untrained` and `rank` are read.
      seed: of the starts.
      axes: sizes of leading axes, for several adapters of each kernel.

    Raises:
      ValueError: a pattern that matches nothing, or no kernel among what they match.
    """
    chosen = path_filter(config.trainable, config.untrained, among=params)
    key, adapters = seed_key(seed), {}
    for n, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        if dotted(path).endswith(".kernel") and chosen(path, leaf):
            *inputs, out = leaf.shape
            bound = 1 / math.sqrt(math.prod(inputs))
            shape = (*axes, *inputs, config.rank)
            down = jax.random.uniform(
                jax.random.fold_in(key, n), shape, minval=-bound, maxval=bound
            )
            adapters[dotted(path)] = {"down": down, "up": jnp.zeros((*axes, config.rank, out))}
    if not adapters:
        raise ValueError(
            f"trainable={list(config.trainable)} selects no kernel: adapters are of linear and "
            "convolutional layers."
        )
    return adapters


def with_adapters(
    pipeline: StableDiffusionPipeline,
    config: AdapterSettings,
    seed: int,
    *axes: int,
    static: type[AdapterStatic] = AdapterStatic,
    rows: int = 0,
    what: str = "",
) -> tuple[Any, TrainState, dict[str, Any]]:
    """Static, state and the frozen "original" of a run that trains adapters.

    Args:
      pipeline, config, seed: as of a method's `prepare`.
      axes: as of `fresh`.
      static: what becomes of it.
      rows, what: as of `common.assembled`.
    """
    require_rows(pipeline, config, rows, what)
    graphdef, state = nnx.split(pipeline.unet)
    original = jax.tree.map(jnp.asarray, nnx.to_pure_dict(state))
    optimizer = cosine_adamw(config.learning_rate, config.weight_decay, config.cycles)
    adapters = fresh(original, config, seed, *axes)
    made = static(graphdef, optimizer, config, *schedule_and_shape(pipeline))
    return made, init_state(adapters, optimizer), {"original": original}
