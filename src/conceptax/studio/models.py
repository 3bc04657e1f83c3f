"""The models of a studio: the original, the edited ones, and what judges their images."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, UInt8

from conceptax.converters import load_pytorch
from conceptax.converters.additions import is_whole
from conceptax.converters.formats.identify import resolved
from conceptax.flax_models.layers.attention import with_attention
from conceptax.flax_models.pipelines.pipeline import Pipeline
from conceptax.flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from conceptax.flax_models.pipelines.video import VideoPipeline
from conceptax.methods.text.phrases import ConceptError
from conceptax.reporting.erasing import Erased
from conceptax.reporting.instruments import load_classifier
from conceptax.reporting.models import load_edited, recompute, require_whole
from conceptax.studio.jobs import Job, Line, Told

MOST = 5  # erased models that are kept in memory


@dataclasses.dataclass(eq=False)
class Studio:
    """The models that a studio works with, one job at a time.

    Attributes:
      original: the model before erasing, of any family that draws images.
      source: its name, for people.
      edited: name -> an edited model; those made here come and go.
      output: the folder below which results may be written; None writes nothing.
      classifier: of what images show, if the original has a judge beside it.
      dtype: what the models compute in.
      made: name -> what was erased here and the model that it was made of.
    """

    original: Pipeline
    source: str = "the model"
    edited: dict[str, Pipeline] = dataclasses.field(default_factory=dict)
    output: Path | None = None
    classifier: Any = None
    dtype: str = "float32"
    made: dict[str, tuple[Erased, StableDiffusionPipeline]] = dataclasses.field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        self._line = Line()
        self._jobs: list[tuple[Any, Job]] = []

    @property
    def is_stable_diffusion(self) -> bool:
        """Whether the original is of the family that concepts are erased from."""
        return isinstance(self.original, StableDiffusionPipeline)

    def model(self, name: str | None) -> Pipeline:
        """An edited model by its name; the original without one.

        Raises:
          ConceptError: there is none of that name.
        """
        if not name:
            return self.original
        if name not in self.edited:
            raise ConceptError(
                f"there is no edited model {name!r} any more; there is "
                f"{', '.join(map(repr, self.edited)) or 'none: erase a concept first'}."
            )
        return self.edited[name]

    def stable_diffusion(self, name: str | None, purpose: str) -> StableDiffusionPipeline:
        """A model of that name, of the family that `purpose` takes.

        Raises:
          ConceptError: it is of another family, or there is none.
        """
        found = self.model(name)
        if not isinstance(found, StableDiffusionPipeline):
            raise ConceptError(
                f"{self.source} is a {type(found).__name__}, and {purpose} takes Stable Diffusion "
                "1, 2 or XL, whose UNet reads CLIP."
            )
        return found

    def keep(self, erased: Erased, original: StableDiffusionPipeline, title: str) -> str:
        """Keep an erased model, the oldest making room; its name."""
        name, number = title, 2
        while name in self.edited:
            name, number = f"{title} {number}", number + 1
        while len(self.made) >= MOST:
            oldest = next(iter(self.made))
            del self.made[oldest], self.edited[oldest]
        self.edited[name], self.made[name] = erased.pipeline, (erased, original)
        return name

    def attention_excuse(self) -> str:
        """Why the original takes no neighborhood attention; empty where it does."""
        try:
            with_attention(self.original.denoiser, None)
        except ValueError as error:
            return str(error)
        return ""

    def shows(
        self, images: UInt8[np.ndarray, "N H W 3"], concept: str
    ) -> Bool[np.ndarray, " N"] | None:
        """Which images show a concept; None where nothing here could tell."""
        if self.classifier is None:
            return None
        try:
            return self.classifier.among([concept]).shows(images, [concept] * len(images))
        except ValueError:  # it is no concept that the classifier knows
            return None

    # ---- jobs ----

    def run(self, work: Any, owner: Any = None) -> Iterator[Told]:
        """`Job.run`, for an owner, when the jobs that came before have ended."""
        entry = owner, Job(self._line)
        self._jobs.append(entry)
        try:
            yield from entry[1].run(work)
        finally:
            self._jobs.remove(entry)

    def stop(self, mine: Callable[[Any], bool] = lambda owner: True) -> int:
        """Stop the jobs of owners that are `mine`, also those that wait; how many there were."""
        found = [job for owner, job in list(self._jobs) if mine(owner)]
        for job in found:
            job.stop()
        return len(found)


def open_studio(
    model: Path,
    edited: Path | None = None,
    *,
    source: str = "",
    output: Path | None = None,
    dtype: str = "float32",
) -> Studio:
    """Load the models that a studio is for.

    Args:
      model: the original, a folder or a single file.
      edited: a pipeline, or what `conceptax erase --export` wrote.
      source: what to call the original.
      output, dtype: as of `Studio`.

    Raises:
      ConceptError: models that a studio has no use for.
      CheckpointError: what is wrong with a file.
    """
    purpose, place = "a studio", resolved(model)
    original = load_pytorch(place, dtype=jnp.dtype(dtype))
    if not isinstance(original, Pipeline):
        raise ConceptError(
            f"{model} holds one component, and {purpose} needs the whole pipeline: pass the "
            "folder with model_index.json."
        )
    if isinstance(original, VideoPipeline):
        raise ConceptError(
            f"{model} is a {type(original).__name__}, which draws videos, and {purpose} draws "
            "images: `conceptax sample` draws with it, with --attention too."
        )
    require_whole(original, model, purpose)
    if isinstance(original, StableDiffusionPipeline):
        recompute(original, "auto")
    studio = Studio(original, source or str(model), output=output, dtype=dtype)
    if edited is not None:
        studio.edited[edited.name] = _edited(edited, original, dtype, purpose)
    if (place / "judge").is_dir() and studio.is_stable_diffusion:
        tokenizer = original.tokenizer  # type: ignore
        studio.classifier = load_classifier(place / "judge", tokenizer, "judge")
    return studio


def _edited(path: Path, original: Pipeline, dtype: str, purpose: str) -> Pipeline:
    if isinstance(original, StableDiffusionPipeline):
        return load_edited(path, original, dtype, purpose)
    if not is_whole(path):
        raise ConceptError(
            f"{path} is no whole pipeline, and only such is compared with a "
            f"{type(original).__name__}: pass a folder with model_index.json."
        )
    edited = load_pytorch(path, dtype=jnp.dtype(dtype))
    if type(edited) is not type(original):
        raise ConceptError(
            f"{path} is a {type(edited).__name__}, and the model a {type(original).__name__}: two "
            "of one family are compared."
        )
    require_whole(edited, path, purpose)
    return edited
