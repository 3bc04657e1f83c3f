"""`from_pretrained` and `save_pretrained`, as users of diffusers and transformers know them.

`PretrainedModel` is a model that has them and is made of its config alone.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax.numpy as jnp
from flax import nnx

from ..errors import ConceptaxError
from .layers.attention import Neighborhoods
from .layers.embeddings import Dtype
from .layers.remat import Remat

Model = TypeVar("Model")


class WrongModelError(ConceptaxError, TypeError):
    """What was loaded is another model than the class that was asked for it."""


@dataclasses.dataclass(frozen=True)
class Published:
    """What a model's folder had and the model does not, for when it is written again.

    All of them are equal: they take no part in what a model is, so equal architectures have equal
    graph definitions, and compile once, whatever else their folders say.

    Attributes:
      text: the settings.
      unread: name on disk -> tensor that the model does not read, left in its file.
    """

    text: str = dataclasses.field(compare=False)
    unread: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)


class Buffer(nnx.Variable):
    """A constant that checkpoints store, and that does not train."""


class Pretrained:
    """A model or pipeline that loads and saves itself, by `conceptax.load` and `conceptax.save`."""

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path: Path | str,
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        dtype: Any = None,
        **options: Any,
    ) -> Model:
        """Load from a folder, a file, or the Hugging Face Hub.

        Args:
          path: a diffusers or transformers folder, a single file, or `org/name[@revision]`.
          subfolder: a part of it, such as "unet".
          variant: of the weights, such as "fp16".
          dtype: computation dtype, by default float32.
          options: as for `conceptax.load`.

        Raises:
          CheckpointError: what is wrong with the checkpoint.
          WrongModelError: it holds another model.
        """
        import conceptax

        if dtype is not None:
            options["dtype"] = dtype
        loaded = conceptax.load(path, subfolder=subfolder, variant=variant, **options)
        if not isinstance(loaded, cls):
            place = f"{path} ({subfolder})" if subfolder else str(path)
            hint = " Pass subfolder= for a part of it." if hasattr(loaded, "MODELS") else ""
            raise WrongModelError(
                f"{place} holds a {type(loaded).__name__}, not a {cls.__name__}.{hint}"
            )
        return loaded

    def save_pretrained(self, path: Path | str, **options: Any) -> Path:
        """Write a folder that diffusers and transformers load; see `conceptax.save`."""
        import conceptax

        return conceptax.save(self, path, **options)


class PretrainedModel(Pretrained, nnx.Module):
    """A model that its config describes.

    Args:
      config: architecture.
      dtype: computation dtype; norms and softmax accumulate in float32.
      param_dtype: dtype of the parameters.
      rngs: source of the initial parameters.
    """

    config: Any
    config_class: ClassVar[Any]
    pytorch_class: ClassVar[str]
    pytorch_library: ClassVar[str]
    _build: Callable[..., None]  # makes the layers: config, then the options by name

    def __init__(
        self,
        config: Any,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype = config, dtype
        self._build(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


class RecomputingModel(PretrainedModel):
    """A `PretrainedModel` that need not keep its activations for the backward pass.

    Args:
      config: as the others but `remat`, see `PretrainedModel`.
      dtype: of the computation.
      param_dtype: of the parameters.
      remat: whether to recompute each layer's activations; or a policy of `layers.remat`.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        config: Any,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        remat: Remat = False,
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype = config, dtype
        self._build(config, remat=remat, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


class AttendingModel(PretrainedModel):
    """A transformer whose self-attention may be sparse, layer by layer.

    Args:
      config: as the others but `attention`, see `RecomputingModel`.
      attention: `GNA` settings of the self-attention: one for all layers, or a sequence of one per
        layer, in which None is dense. None, the default, is dense everywhere. Where a text joins
        in, every query sees all of it, and it sees everything. Parameters are the same whatever it
        is.
      dtype: of the computation.
      param_dtype: of the parameters.
      remat: whether to recompute each layer's activations; or a policy of `layers.remat`.
      rngs: source of the initial parameters.

    Raises:
      ValueError: `attention` has another number of layers than the config.
    """

    def __init__(
        self,
        config: Any,
        *,
        attention: Neighborhoods = None,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        remat: Remat = False,
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype, self.remat = config, dtype, remat
        self._build(config, attention, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
