"""What the images of an adapter are drawn with: rotary base, attention's scale, shift of the noise.

An adapter of FLUX.1 to sizes beyond its training needs more than its weights, such as URAE's to
4096 x 4096 pixels (Yu et al. 2025).  A LoRA states it as JSON under the key
`conceptax.drawn_with`, in the header of its file or in PEFT's settings:

    {"ntk_factor": 10, "attention_scale": "proportional", "shift": 3.0}
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from flax import nnx

from ..errors import CheckpointError

KEY = "conceptax.drawn_with"
EXAMPLE = "ntk-factor=10 attention-scale=proportional shift=3"
_FLOW = "FlowMatchEulerDiscreteScheduler"
_USUAL = {"ntk_factor": 1.0, "attention_scale": None}  # settings of the model


@dataclasses.dataclass(frozen=True)
class DrawnWith:
    """Settings that an adapter's images are drawn with; None leaves one as it is.

    Attributes:
      ntk_factor, attention_scale: as in `FluxTransformer2DConfig`.
      shift: of the noise, fixed in place of one that follows the image's size.

    Raises:
      ValueError: no positive number, nor "proportional" of the attention's scale.
    """

    ntk_factor: float | int | str | None = None
    attention_scale: float | int | str | None = None
    shift: float | int | str | None = None

    def __post_init__(self):
        for name, value in self.stated.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 < value < math.inf) and (name, value) != (
                "attention_scale",
                "proportional",
            ):
                also = " or 'proportional'" if name == "attention_scale" else ""
                raise ValueError(f"{name} takes a positive number{also}, received {value!r}.")

    @property
    def stated(self) -> dict[str, Any]:
        """The settings that are not left as they are."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    def __bool__(self) -> bool:
        return bool(self.stated)

    def __str__(self) -> str:
        told = {k: v if isinstance(v, str) else f"{v:g}" for k, v in self.stated.items()}
        return " ".join(f"{k.replace('_', '-')}={v}" for k, v in told.items())

    @property
    def header(self) -> dict[str, str]:
        """As it is kept in the header of a file."""
        return {KEY: json.dumps(self.stated)} if self else {}

    def applied(self, pipeline: Any, source: Any) -> Any:
        """A pipeline that draws so.

        Args:
          pipeline: it stays as it is.
          source: what states the settings, for messages.

        Raises:
          CheckpointError: the pipeline has no such settings.
        """
        new: dict[str, Any] = {}
        if own := {name: value for name, value in self.stated.items() if name in _USUAL}:
            model: Any = getattr(pipeline, "transformer", None)
            if not hasattr(getattr(model, "config", None), "ntk_factor"):
                raise CheckpointError(
                    f"{source} is drawn with {self}, which FLUX.1's transformer alone can be: it "
                    f"was made for another model than this {type(pipeline).__name__}."
                )
            new["transformer"] = model = nnx.clone(model)
            model.config = dataclasses.replace(model.config, **own)
        if self.shift is not None and (flow := pipeline.scheduler_config):
            if (kind := flow.get("_class_name", _FLOW)) != _FLOW:
                raise CheckpointError(
                    f"{source} is drawn with {self}, and this pipeline's {kind} has no such shift: "
                    "it was made for another model."
                )
            fixed = {"use_dynamic_shifting": False, "shift": self.shift}
            new["scheduler_config"] = {**flow, **fixed}
        return dataclasses.replace(pipeline, **new) if new else pipeline


URAE_4K = DrawnWith(10, "proportional", 3.0)
NAMED: Mapping[str, DrawnWith] = MappingProxyType({"urae-4k": URAE_4K})
# Published adapters whose files state nothing, by the names that they are published under.
PUBLISHED = {"urae_4k_adapter_lora_conversion_dev": URAE_4K}


def drawn_with(given: DrawnWith | Mapping[str, Any] | str | None) -> DrawnWith:
    """Settings as people give them: by name, by a text such as `EXAMPLE`, or by their names.

    Raises:
      ValueError: they are none.
    """
    if given is None or isinstance(given, DrawnWith):
        return given or DrawnWith()
    if isinstance(given, str):
        if given in NAMED:
            return NAMED[given]
        pairs = [word.partition("=") for word in given.split()]
        settings = {name.replace("-", "_"): _value(value) for name, _, value in pairs}
    else:
        settings = dict(given)
    known = {field.name for field in dataclasses.fields(DrawnWith)}
    if not settings or not settings.keys() <= known:
        raise ValueError(
            f"what images are drawn with is {', '.join(NAMED)}, or settings such as {EXAMPLE!r}; "
            f"received {given!r}."
        )
    return DrawnWith(**settings)


def _value(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def stated_by(source: Any, *places: Mapping[str, Any]) -> DrawnWith:
    """What a file states in the first of these places that does: its header, or PEFT's settings.

    Raises:
      CheckpointError: what it states is none.
    """
    stated = next((place[KEY] for place in places if KEY in place), None)
    if stated is None:
        return DrawnWith()
    try:
        read = json.loads(stated) if isinstance(stated, str) else stated
        return drawn_with(read if isinstance(read, dict) else str(read))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: {KEY} says {str(stated)[:80]!r}: {error}") from error


def of_config(raw: Mapping[str, Any]) -> DrawnWith:
    """What a transformer's `config.json` states."""
    return DrawnWith(**{name: raw.get(name) for name in _USUAL})


def difference_of(edited: Any, original: Any) -> DrawnWith:
    """Settings in which a transformer, or a pipeline, differs from its original, or the usual."""
    models = (getattr(each, "transformer", each) for each in (edited, original))
    ours, theirs = (
        {
            name: getattr(getattr(model, "config", None), name, usual)
            for name, usual in _USUAL.items()
        }
        for model in models
    )
    own = {name: value for name, value in ours.items() if value != theirs[name]}
    new, old = (getattr(each, "scheduler_config", None) or {} for each in (edited, original))
    if "shift" in new and not new.get("use_dynamic_shifting", False):
        names = ("shift", "use_dynamic_shifting")
        if any(new.get(name) != old.get(name) for name in names):
            own["shift"] = new["shift"]
    return DrawnWith(**own)
