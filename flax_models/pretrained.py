"""`from_pretrained` and `save_pretrained`, as users of diffusers and transformers know them."""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConceptaxError

Model = TypeVar("Model")


class WrongModelError(ConceptaxError, TypeError):
    """What was loaded is another model than the class that was asked for it."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A model's settings as its folder had them, for when it is written again.

    All of them are equal: they take no part in what a model is, so equal architectures have equal
    graph definitions, and compile once, whatever else their folders say.
    """

    text: str = dataclasses.field(compare=False)


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
